"""CIFAR-10 as its authors publish it, in either of two layouts; 50,000 / 10,000 images of 32 x 32.

``cifar-10-batches-py/`` (torchvision's layout) holds pickles. Each file's MD5 is compared with the published
one before anything of it is read, and even then it is not unpickled: its opcodes are walked as data, and the
two values that matter are picked out. ``cifar-10-batches-bin/`` holds records of one label and 3,072 pixels.
No checksums of its files are published, so their sizes and the number of images of each class are compared.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.folder import DataDamaged, DataMissing, verified
from benchmarks.data.labelled import ImageData, Labelled

Array = NDArray[Any]
Pair = tuple[Array, Array]

TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = "test_batch"
#: Published MD5 of each pickle (torchvision compares the same).
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
#: Images of one file.
BATCH = 10_000
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_CLASSES = 10


def cifar10(folder: Path, *, augment: bool = False, normalise: bool = False) -> Labelled:
    """CIFAR-10 from the layout that is there.

    Args:
        augment: flips, and crops of 32 with padding 4.
        normalise: mean 0 and deviation 1 per channel.

    Raises:
        DataMissing: neither layout is there, or a file of it is not.
        DataDamaged: another checksum, size or count than published.
    """
    read, suffix, inside = _layout(folder)
    missing = [name + suffix for name in (*TRAIN, TEST) if not (inside / (name + suffix)).is_file()]
    if missing:
        raise DataMissing(f"{inside} lacks {', '.join(missing)}: unpack the archive again")
    parts = [read(inside / (name + suffix)) for name in TRAIN]
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    test_x, test_y = read(inside / (TEST + suffix))
    for what, labels in (("training", y), ("test", test_y)):
        counts = np.bincount(labels, minlength=_CLASSES).tolist()
        if counts != [len(labels) // _CLASSES] * _CLASSES:
            raise DataDamaged(f"{inside} has {counts} {what} images of the classes, not equally many")
    return ImageData(x, y, test_x, test_y, _CLASSES).labelled(augment=augment, normalise=normalise)


def _layout(folder: Path) -> tuple[Any, str, Path]:
    """How to read a file, what its name ends with, and the folder of the layout."""
    for name, read, suffix in (
        ("cifar-10-batches-py", read_pickled, ""),
        ("cifar-10-batches-bin", read_binary, ".bin"),
    ):
        if (folder / name).is_dir():
            return read, suffix, folder / name
    raise DataMissing(
        f"no cifar-10-batches-py and no cifar-10-batches-bin in {folder}. Unpack cifar-10-python.tar.gz or "
        "cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html there, or use a stand-in: "
        "`name: cifar10_jpeg` or `name: cifar10_small`."
    )


def read_binary(path: Path) -> Pair:
    """Images uint8 [n, 3, 32, 32] and labels int64 [n] of one file of the binary layout.

    Raises:
        DataDamaged: the size is not that of `BATCH` records, or a label is none.
    """
    size = path.stat().st_size
    if size != BATCH * (1 + _PIXELS):
        raise DataDamaged(f"{path} has {size} bytes, not {BATCH * (1 + _PIXELS)}")
    records = np.fromfile(path, dtype=np.uint8).reshape(BATCH, 1 + _PIXELS)
    return _images(path, records[:, 1:], records[:, 0].astype(np.int64))


def read_pickled(path: Path) -> Pair:
    """The same of one file of torchvision's layout, without unpickling it.

    Raises:
        DataDamaged: its MD5 is not the published one, or it holds something else.
    """
    pixels, labels = b"", [0]
    for key, value in _values(verified(path, MD5[path.name])):
        if isinstance(value, str) and len(value) == BATCH * _PIXELS:
            pixels = value.encode("latin-1")
        elif isinstance(value, list) and key == "labels":
            labels = value
    if not pixels or len(labels) != BATCH:
        raise DataDamaged(f"{path} does not hold {BATCH} images and labels")
    x = np.frombuffer(pixels, dtype=np.uint8).reshape(BATCH, _PIXELS)
    return _images(path, x, np.asarray(labels, dtype=np.int64))


def _values(pickled: bytes) -> Iterator[tuple[str, str | list[int]]]:
    """Texts of a pickle, and runs of integers between them; each with the text before it.

    A list of integers is written in pieces with marks between, which do not end a run.
    """
    before = ""
    run: list[int] = []
    for opcode, value, _ in pickletools.genops(pickled):
        if isinstance(value, str) and "STRING" in opcode.name:
            if run:
                yield before, run
            yield before, value
            before, run = value, []
        elif isinstance(value, int) and opcode.name in ("BININT", "BININT1", "BININT2"):
            run.append(value)
    if run:
        yield before, run


def _images(path: Path, pixels: Array, labels: Array) -> Pair:
    if labels.min() < 0 or labels.max() >= _CLASSES:
        raise DataDamaged(f"{path} holds the label {labels.max()}, and there are {_CLASSES} classes")
    return np.ascontiguousarray(pixels).reshape(-1, *_SHAPE), labels
