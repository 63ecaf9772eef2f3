"""One labelled data set, ready to be cut into clients.

Legend: n samples, C channels, H x W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Labelled:
    """Training and test samples, and what a partition of the training samples goes by.

    Attributes:
        train, test: map-style datasets of pairs (x, y).
        classes: number of classes, which is the width of a model's output.
        y_train: int64 [n], class of each training sample; None where a sample has no single class.
        users: int64 [n], who each training sample is from; None where nobody is known.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    classes: int
    y_train: Array | None = None
    users: Array | None = None

    @property
    def samples(self) -> int:
        """Number of training samples."""
        return len(cast(Sized, self.train))

    @property
    def test_samples(self) -> int:
        """Number of test samples."""
        return len(cast(Sized, self.test))


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled images of one size, in memory.

    Attributes:
        x_train, x_test: uint8 [n, C, H, W].
        y_train, y_test: int64 [n], classes 0, 1, ...
        classes: number of classes.
        users: int64 [n] of the training images, who wrote each; None where nobody is known.
    """

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    classes: int
    users: Array | None = None

    @property
    def mean(self) -> Array:
        """Mean of each channel of the training images, scaled to [0, 1]; float32 [C, 1, 1]."""
        return self._moments[0]

    @property
    def std(self) -> Array:
        """Standard deviation of each channel, likewise."""
        return self._moments[1]

    @functools.cached_property
    def _moments(self) -> tuple[Array, Array]:
        """Mean and deviation, from counts of the 256 values: no copy of the images is made."""
        counts = np.zeros((self.x_train.shape[1], 256))
        for start in range(0, len(self.x_train), 1000):
            for channel, x in enumerate(self.x_train[start : start + 1000].swapaxes(0, 1)):
                counts[channel] += np.bincount(x.ravel(), minlength=256)
        share, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
        mean = share @ values
        std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))
        return mean.astype(np.float32)[:, None, None], std.astype(np.float32)[:, None, None]

    def floats(self, x: Array, *, normalise: bool = False) -> Array:
        """float32 of uint8 images: in [0, 1], or with mean 0 and deviation 1 per channel."""
        scaled: Array = x.astype(np.float32) / 255
        return (scaled - self.mean) / self.std if normalise else scaled

    def labelled(self, *, augment: bool = False, normalise: bool = False) -> Labelled:
        """As samples: x float32 [C, H, W], y int64.

        Args:
            augment: flips and crops of the training images, drawn at every read (`AugmentedImages`).
            normalise: mean 0 and deviation 1 per channel over the training images.
        """
        test = self._tensors(self.x_test, self.y_test, normalise)
        train: Dataset[Any] = (
            AugmentedImages(self, normalise=normalise)
            if augment
            else self._tensors(self.x_train, self.y_train, normalise)
        )
        return Labelled(train, test, self.classes, self.y_train, self.users)

    def _tensors(self, x: Array, y: Array, normalise: bool) -> TensorDataset:
        return TensorDataset(torch.from_numpy(self.floats(x, normalise=normalise)), torch.from_numpy(y))


class TrainingImages(Dataset[tuple[Tensor, int]]):
    """Training images as they are, made floats whenever one is read."""

    def __init__(self, data: ImageData, *, normalise: bool = False) -> None:
        self._data, self._normalise = data, normalise

    def __len__(self) -> int:
        return len(self._data.y_train)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.__getitems__([i])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several images at once, as torch's loaders ask for them."""
        x = torch.from_numpy(self._data.floats(self._data.x_train[rows], normalise=self._normalise))
        return list(zip(x, self._data.y_train[rows].tolist(), strict=True))


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Training images, flipped and shifted at random whenever one is read.

    A flip with probability 1/2 and a crop of the original size at a random place of the image padded by
    `pad` black pixels. Draws come from torch's global generator, as usual for transforms; the engine seeds
    that for each dispatch, so a dispatch that is repeated sees the same images.

    Attributes:
        unaugmented: the images as they are, which validation reads.
    """

    def __init__(self, data: ImageData, *, pad: int = 4, normalise: bool = False) -> None:
        self._data, self._pad, self._normalise = data, pad, normalise
        self.unaugmented = TrainingImages(data, normalise=normalise)

    def __len__(self) -> int:
        return len(self._data.y_train)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.__getitems__([i])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several images at once, as torch's loaders ask for them."""
        x = F.pad(torch.from_numpy(self._data.x_train[rows]), (self._pad,) * 4)
        b, channels, height, width = len(rows), *self._data.x_train.shape[1:]
        top, left = torch.randint(2 * self._pad + 1, (2, b, 1))
        flipped = torch.rand(b, 1) < 0.5
        across = torch.arange(width)
        row = top + torch.arange(height)
        column = left + torch.where(flipped, across.flip(0), across)
        x = x[
            torch.arange(b)[:, None, None, None],
            torch.arange(channels)[:, None, None],
            row[:, None, :, None],
            column[:, None, None, :],
        ]
        floats = torch.from_numpy(self._data.floats(x.numpy(), normalise=self._normalise))
        return list(zip(floats, self._data.y_train[rows].tolist(), strict=True))
