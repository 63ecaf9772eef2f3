"""ImageNet-100 as a folder of images: one hundred classes of ImageNet, read from disk when needed.

The layout is the usual one, ``imagenet100/train/CLASS/*`` and ``imagenet100/val/CLASS/*`` with JPEG files;
``imagenet100`` may also be a link to a whole ImageNet. Classes are the first hundred by name, or those of a
file with one name a line. Numbers of images are compared with those of ImageNet: 50 a class for validation,
732 to 1,300 for training.

Training images are cut and flipped at random as in the paper (RandomResizedCrop, 168 pixels); test images are
scaled so that their shorter side is 8/7 of that (192), and cut in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.data.folder import DataDamaged, need
from benchmarks.data.labelled import Labelled
from fedgmr_plugin.errors import ConfigError

Array = NDArray[Any]
Transform = Callable[[Any], Tensor]


class Counts(NamedTuple):
    """Numbers that a folder must have: classes, and images of a class, fewest and most."""

    classes: int
    train: tuple[int, int]
    val: tuple[int, int]


COUNTS = Counts(100, (732, 1300), (50, 50))
#: Mean and deviation of ImageNet's channels, as everybody uses them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SUFFIXES = frozenset({".jpeg", ".jpg", ".png"})
_HOW = (
    "Get ImageNet from https://image-net.org (its terms allow research only), and put the folders of the "
    "classes there, or use the stand-in `name: tiny_imagenet100`."
)


def imagenet100(
    folder: Path, *, augment: bool = False, normalise: bool = False, size: int = 168, class_list: str = ""
) -> Labelled:
    """ImageNet-100: x float32 [3, size, size].

    Args:
        augment: random cuts and flips of the training images, drawn at every read from torch's global
            generator; without it they are treated as test images are.
        normalise: by ImageNet's mean and deviation; else pixels are in [0, 1].
        size: pixels of a side.
        class_list: file of class names, one a line, relative to `folder`; empty for the first hundred.

    Raises:
        DataMissing: no such folder or list.
        DataDamaged: a class is missing, or has another number of images than ImageNet's.
        ConfigError: GMR-104 for a size below 1.
    """
    if size < 1:
        raise ConfigError("GMR-104", f"size={size} is below 1", where="data.size")
    root = need(folder / "imagenet100", _HOW)
    names = classes_of(root, need(folder / class_list, "See `class_list`.") if class_list else None)
    train = index(root / "train", names, COUNTS.train)
    test = index(root / "val", names, COUNTS.val)
    plain = transform(size, augment=False, normalise=normalise)
    images = ImageFiles(*train, plain)
    if augment:
        drawn = transform(size, augment=True, normalise=normalise)
        images = ImageFiles(*train, drawn, unaugmented=images)
    return Labelled(images, ImageFiles(*test, plain), len(names), train[1])


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files, decoded and transformed whenever one is read.

    Attributes:
        unaugmented: the same images without random transforms, which validation reads; None where
            `transformed` draws nothing.
    """

    def __init__(
        self, paths: Sequence[Path], y: Array, transformed: Transform, unaugmented: ImageFiles | None = None
    ) -> None:
        self._paths, self._y, self._transformed, self.unaugmented = paths, y, transformed, unaugmented

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self._paths[i], formats=("JPEG", "PNG")) as image:  # ImageNet has a PNG named JPEG
            return self._transformed(image.convert("RGB")), int(self._y[i])


def classes_of(root: Path, listed: Path | None) -> list[str]:
    """Names of the classes, sorted: those of the file `listed`, one a line, or the first by name.

    Raises:
        DataDamaged: there are not as many as `COUNTS` says, or one has no folder.
    """
    there = sorted(path.name for path in need(root / "train", _HOW).iterdir() if path.is_dir())
    if listed is None:
        names = there[: COUNTS.classes]
    else:
        names = sorted(set(listed.read_text(encoding="utf-8").split()))
    if len(names) != COUNTS.classes:
        raise DataDamaged(f"{listed or root / 'train'} has {len(names)} classes, not {COUNTS.classes}")
    if absent := sorted(set(names) - set(there)):
        raise DataDamaged(f"{root / 'train'} lacks the class {absent[0]} (and {len(absent) - 1} more)")
    return names


def index(folder: Path, names: Sequence[str], allowed: tuple[int, int]) -> tuple[list[Path], Array]:
    """Image files of the classes `names` and the class of each, int64 [n].

    Raises:
        DataMissing: a class has no folder.
        DataDamaged: a class has fewer or more images than `allowed`.
    """
    paths: list[Path] = []
    counts = []
    for name in names:
        found = sorted(p for p in need(folder / name, _HOW).iterdir() if p.suffix.lower() in _SUFFIXES)
        if not allowed[0] <= len(found) <= allowed[1]:
            raise DataDamaged(f"{folder / name} has {len(found)} images, not {allowed[0]} to {allowed[1]}")
        paths += found
        counts.append(len(found))
    return paths, np.repeat(np.arange(len(names), dtype=np.int64), counts)


def transform(size: int, *, augment: bool, normalise: bool) -> Transform:
    """A Pillow image to float32 [3, size, size]."""
    from fedgmr_plugin.runtimes.host import define_torchvision_schemas, torchvision_usable

    if not torchvision_usable():
        define_torchvision_schemas()
    from torchvision import transforms as T

    cut: list[Any] = (
        [T.RandomResizedCrop(size), T.RandomHorizontalFlip()]
        if augment
        else [T.Resize(round(size * 8 / 7)), T.CenterCrop(size)]
    )
    composed: Transform = T.Compose([*cut, T.ToTensor(), *([T.Normalize(MEAN, STD)] if normalise else [])])
    return composed
