"""Real data sets for benchmarks, read from ``.npz`` files, and their partitions over clients.

The files lie in the folder that the environment variable FEDGMR_DATA_DIR names, or in ``shared/data`` beside
the source tree. Images stay uint8 until they are used; nothing is written to disk.

Legend: n samples, C channels, H x W pixels, N clients.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from fedgmr_plugin.datasets import dirichlet_partition, fedml_dataset, iid_partition
from fedgmr_plugin.engine.seeds import derive

Split = Literal["iid", "dirichlet", "writers"]


@dataclass(frozen=True, eq=False)
class ImageData:
    """One labelled image data set.

    Attributes:
        x_train, x_test: uint8 [n, C, H, W].
        y_train, y_test: int64 [n], classes 0, 1, ...
        classes: number of classes.
        writers: int64 [n] of the training images, who wrote each; None where nobody did.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    writers: np.ndarray | None = None

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """Mean of each channel of the training images, scaled to [0, 1]; float32 [C, 1, 1]."""
        return (self.x_train.mean(axis=(0, 2, 3), keepdims=True)[0] / 255).astype(np.float32)

    @functools.cached_property
    def std(self) -> np.ndarray:
        """Standard deviation of each channel, likewise."""
        return (self.x_train.std(axis=(0, 2, 3), keepdims=True)[0] / 255).astype(np.float32)

    def floats(self, x: np.ndarray, *, normalise: bool = False) -> np.ndarray:
        """float32 of uint8 images: in [0, 1], or with mean 0 and deviation 1 per channel."""
        scaled = x.astype(np.float32) / 255
        return (scaled - self.mean) / self.std if normalise else scaled


def data_dir() -> Path:
    """Folder of the data files.

    Raises:
        FileNotFoundError: there is none.
    """
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("FEDGMR_DATA_DIR", beside))
    if not folder.is_dir():
        raise FileNotFoundError(f"no data sets in {folder}: set FEDGMR_DATA_DIR to their folder")
    return folder


def fashion_mnist(*, full: bool = True) -> ImageData:
    """Fashion-MNIST, 60,000 / 10,000 images of 28 x 28; with ``full=False`` its first 5,000 / 1,000."""
    return _grey(data_dir() / f"fashion_mnist_{'full' if full else 'small'}.npz")


def mnist() -> ImageData:
    """MNIST's test file, split into 8,000 / 2,000 images of 28 x 28."""
    return _grey(data_dir() / "mnist_t10k_8k2k.npz")


def cifar10(*, full: bool = True) -> ImageData:
    """CIFAR-10, 32 x 32: 50,000 / 10,000 from JPEG (lossy), or 2,000 / 500 original images."""
    if full:
        return _jpeg_pack(data_dir() / "cifar10_full_jpegpack.npz")
    return _colour(data_dir() / "cifar10_small_u8.npz")


def tiny_imagenet100() -> ImageData:
    """The first 100 classes of Tiny-ImageNet at 32 x 32, 10,000 / 2,000."""
    return _colour(data_dir() / "tinyimagenet100_32_100x20.npz")


def omniglot() -> ImageData:
    """Handwritten characters of 160 writers, 242 classes, 28 x 28, 3,872 / 968.

    The file holds out whole characters, which a classifier could not learn. Its two parts are joined and
    split again so that one image in five is tested, of every character and (nearly) of every writer.
    """
    return _omniglot(data_dir() / "omniglot_small_28.npz")


DATASETS: dict[str, Callable[[], ImageData]] = {
    "fashion_mnist": fashion_mnist,
    "fashion_mnist_small": functools.partial(fashion_mnist, full=False),
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar10_small": functools.partial(cifar10, full=False),
    "tiny_imagenet100": tiny_imagenet100,
    "omniglot": omniglot,
}


def partition(
    data: ImageData,
    split: Split,
    clients: int,
    seed: int,
    *,
    alpha: float = 0.6,
    min_samples: int = 20,
    smallest: int | None = 0,
) -> list[np.ndarray]:
    """Cut the training images into clients.

    Args:
        split: ``iid``; ``dirichlet`` label skew; or ``writers``, whole writers in blocks, as LEAF's users.
        alpha, min_samples: of the label skew.
        smallest: the client that gets the smallest share (the fast one, in the paper); None leaves them.

    Returns:
        For each client its indices, int64, increasing.
    """
    if split == "iid":
        return iid_partition(len(data.y_train), clients, seed)
    if split == "dirichlet":
        return dirichlet_partition(data.y_train, clients, alpha, seed, min_samples, smallest=smallest)
    if data.writers is None:
        raise ValueError("split=writers needs a data set with writers")
    parts = block_partition(data.writers, clients)
    if smallest is not None:
        least = min(range(clients), key=lambda n: (len(parts[n]), n))
        parts[least], parts[smallest] = parts[smallest], parts[least]
    return parts


def block_partition(groups: np.ndarray, clients: int) -> list[np.ndarray]:
    """Give each client a block of consecutive groups; numbers of groups differ by at most one.

    Raises:
        ValueError: there are fewer groups than clients.
    """
    names = np.unique(groups)
    if len(names) < clients:
        raise ValueError(f"{len(names)} groups cannot be cut into {clients} clients")
    return [np.flatnonzero(np.isin(groups, block)) for block in np.array_split(names, clients)]


def federated(
    data: ImageData,
    parts: Sequence[np.ndarray],
    batch_size: int,
    *,
    augment: bool = False,
    normalise: bool = False,
    seed: int = 0,
) -> list[Any]:
    """FedML's 8-element dataset.

    Args:
        augment: random flips and crops (pad 4) of the training images, drawn at every read.
        normalise: mean 0 and deviation 1 per channel.
        seed: of the loaders' shuffling.
    """
    test = (data.floats(data.x_test, normalise=normalise), data.y_test)
    if not augment:
        train = (data.floats(data.x_train, normalise=normalise), data.y_train)
        return fedml_dataset(train, test, parts, batch_size, classes=data.classes, seed=seed)
    # The loaders of the stand-in (no pixels) are replaced by loaders of augmented images.
    stand_in = (np.zeros((len(data.y_train), 1), np.float32), data.y_train)
    dataset = fedml_dataset(stand_in, test, parts, batch_size, classes=data.classes, seed=seed)
    images = AugmentedImages(data, normalise=normalise)

    def loader(rows: Dataset[Any], *address: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(derive(seed, "augmented", *address))
        return DataLoader(rows, batch_size=batch_size, shuffle=True, generator=generator)

    dataset[2] = loader(images)
    dataset[5] = {n: loader(Subset(images, part.tolist()), n) for n, part in enumerate(parts)}
    return dataset


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Training images, flipped and shifted at random whenever one is read.

    A flip with probability 1/2 and a crop of the original size at a random place of the image padded by
    `pad` black pixels. Draws come from torch's global generator, as usual for transforms.
    """

    def __init__(self, data: ImageData, *, pad: int = 4, normalise: bool = False) -> None:
        self._data, self._pad, self._normalise = data, pad, normalise

    def __len__(self) -> int:
        return len(self._data.y_train)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x = torch.from_numpy(self._data.x_train[i].copy())
        height, width = x.shape[1:]
        top, left = torch.randint(2 * self._pad + 1, (2,)).tolist()
        x = F.pad(x, (self._pad,) * 4)[:, top : top + height, left : left + width]
        if torch.rand(()) < 0.5:
            x = x.flip(2)
        floats = self._data.floats(x.numpy(), normalise=self._normalise)
        return torch.from_numpy(floats), int(self._data.y_train[i])


# -- files ---------------------------------------------------------------------------------------------


@functools.cache
def _grey(path: Path) -> ImageData:
    with np.load(path) as arrays:
        return _image_data(arrays, [arrays[f"x_{part}"][:, None] for part in ("train", "test")])


@functools.cache
def _omniglot(path: Path) -> ImageData:
    with np.load(path) as arrays:
        x, y, writer, drawer = (
            np.concatenate([arrays[f"{name}_train"], arrays[f"{name}_test"]])
            for name in ("x", "y", "writer", "drawer")
        )
    test = (y.astype(np.int64) + drawer) % 5 == 0
    parts = {"y_train": y[~test], "y_test": y[test]}
    return _image_data(parts, [x[~test][:, None], x[test][:, None]], writer[~test].astype(np.int64))


@functools.cache
def _colour(path: Path) -> ImageData:
    with np.load(path) as arrays:
        return _image_data(arrays, [_channels_first(arrays[f"x_{part}"]) for part in ("train", "test")])


@functools.cache
def _jpeg_pack(path: Path) -> ImageData:
    with np.load(path) as arrays:
        images = [decode_jpegs(arrays[f"jpeg_{part}"], arrays[f"len_{part}"]) for part in ("train", "test")]
        return _image_data(arrays, [_channels_first(x) for x in images])


def decode_jpegs(pack: np.ndarray, lengths: np.ndarray, which: Sequence[int] | None = None) -> np.ndarray:
    """Decode images from concatenated JPEG files.

    Args:
        pack: uint8, the files' bytes one after another.
        lengths: number of bytes of each file.
        which: positions to decode, in this order; all when None.

    Returns:
        uint8 [n, H, W, 3].
    """
    from PIL import Image

    ends = np.cumsum(lengths, dtype=np.int64)
    images = []
    for i in range(len(ends)) if which is None else which:
        content = pack[ends[i] - int(lengths[i]) : ends[i]].tobytes()
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            images.append(np.asarray(image.convert("RGB")))
    return np.stack(images)


def _channels_first(x: np.ndarray) -> np.ndarray:
    """[n, H, W, C] as contiguous [n, C, H, W]."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _image_data(arrays: Any, images: list[np.ndarray], writers: np.ndarray | None = None) -> ImageData:
    y_train, y_test = (arrays[f"y_{part}"].astype(np.int64) for part in ("train", "test"))
    for array in (*images, y_train, y_test):
        array.flags.writeable = False  # shared by everybody who asks for this data set
    classes = int(max(y_train.max(), y_test.max())) + 1
    return ImageData(images[0], y_train, images[1], y_test, classes, writers)
