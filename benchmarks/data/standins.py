"""Small real image sets in ``.npz`` files, which stand in for the paper's data where those are not at hand.

Images stay uint8 until they are used. Each reader takes the folder of the files.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.folder import arrays_of
from benchmarks.data.labelled import ImageData, Labelled

Array = NDArray[Any]
_HOW = "It is one of the project's own stand-in files: set FEDGMR_DATA_DIR to the folder that holds them."


def fashion_mnist(folder: Path, *, normalise: bool = False) -> Labelled:
    """Fashion-MNIST, 60,000 / 10,000 images of 28 x 28."""
    return _grey(folder / "fashion_mnist_full.npz").labelled(normalise=normalise)


def fashion_mnist_small(folder: Path, *, normalise: bool = False) -> Labelled:
    """Its first 5,000 / 1,000 images."""
    return _grey(folder / "fashion_mnist_small.npz").labelled(normalise=normalise)


def mnist(folder: Path, *, normalise: bool = False) -> Labelled:
    """MNIST's test file, split into 8,000 / 2,000 images of 28 x 28."""
    return _grey(folder / "mnist_t10k_8k2k.npz").labelled(normalise=normalise)


def cifar10_jpeg(folder: Path, *, augment: bool = False, normalise: bool = False) -> Labelled:
    """CIFAR-10, 50,000 / 10,000 images of 32 x 32, from JPEG: lossy, and in another order."""
    data = _jpeg_pack(folder / "cifar10_full_jpegpack.npz")
    return data.labelled(augment=augment, normalise=normalise)


def cifar10_small(folder: Path, *, augment: bool = False, normalise: bool = False) -> Labelled:
    """2,000 / 500 original images of CIFAR-10."""
    return _colour(folder / "cifar10_small_u8.npz").labelled(augment=augment, normalise=normalise)


def tiny_imagenet100(folder: Path, *, augment: bool = False, normalise: bool = False) -> Labelled:
    """The first 100 classes of Tiny-ImageNet at 32 x 32, 10,000 / 2,000: stands in for ImageNet-100."""
    data = _colour(folder / "tinyimagenet100_32_100x20.npz")
    return data.labelled(augment=augment, normalise=normalise)


def omniglot(folder: Path, *, normalise: bool = False) -> Labelled:
    """Handwritten characters of 160 writers, 242 classes, 28 x 28, 3,872 / 968: stands in for FEMNIST.

    The file holds out whole characters, which a classifier could not learn. Its two parts are joined and
    split again so that one image in five is tested, of every character and (nearly) of every writer.
    """
    return _omniglot(folder / "omniglot_small_28.npz").labelled(normalise=normalise)


# -- files ---------------------------------------------------------------------------------------------


def _grey(path: Path) -> ImageData:
    with arrays_of(path, _HOW) as arrays:
        return _image_data(arrays, [arrays[f"x_{part}"][:, None] for part in ("train", "test")])


def _omniglot(path: Path) -> ImageData:
    with arrays_of(path, _HOW) as arrays:
        x, y, writer, drawer = (
            np.concatenate([arrays[f"{name}_train"], arrays[f"{name}_test"]])
            for name in ("x", "y", "writer", "drawer")
        )
    test = (y.astype(np.int64) + drawer) % 5 == 0
    parts = {"y_train": y[~test], "y_test": y[test]}
    return _image_data(parts, [x[~test][:, None], x[test][:, None]], writer[~test].astype(np.int64))


def _colour(path: Path) -> ImageData:
    with arrays_of(path, _HOW) as arrays:
        return _image_data(arrays, [_channels_first(arrays[f"x_{part}"]) for part in ("train", "test")])


@functools.cache  # decoding takes 10 to 30 s
def _jpeg_pack(path: Path) -> ImageData:
    with arrays_of(path, _HOW) as arrays:
        images = [decode_jpegs(arrays[f"jpeg_{part}"], arrays[f"len_{part}"]) for part in ("train", "test")]
        return _image_data(arrays, [_channels_first(x) for x in images])


def decode_jpegs(pack: Array, lengths: Array, which: Sequence[int] | None = None) -> Array:
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


def _channels_first(x: Array) -> Array:
    """[n, H, W, C] as contiguous [n, C, H, W]."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _image_data(arrays: Any, images: list[Array], users: Array | None = None) -> ImageData:
    y_train, y_test = (arrays[f"y_{part}"].astype(np.int64) for part in ("train", "test"))
    classes = int(max(y_train.max(), y_test.max())) + 1
    return ImageData(images[0], y_train, images[1], y_test, classes, users)
