"""A client's data: labelled samples, what is held out of them, and which of them each step sees.

Legend: b samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgmr_plugin.engine.seeds import numpy_generator

Batch = tuple[Any, Any]
Index = NDArray[np.int64]


class Samples(Protocol):
    """Labelled samples, map style."""

    def __len__(self) -> int: ...

    def take(self, index: Index) -> Batch:
        """The samples at `index` (int64 [b]): x [b, ...], y [b, ...]."""
        ...


@dataclass(frozen=True)
class Subset:
    """The samples of `parent` at `index` (int64 [n])."""

    parent: Samples
    index: Index

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Index) -> Batch:
        return self.parent.take(self.index[index])


@dataclass(frozen=True)
class TensorSamples:
    """Samples held as two tensors of equal length."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Index) -> Batch:
        at_x = torch.from_numpy(np.ascontiguousarray(index)).to(self.x.device)
        return self.x.index_select(0, at_x), self.y.index_select(0, at_x.to(self.y.device))


def take_each(samples: Samples, indices: Sequence[Index]) -> list[Batch]:
    """``samples.take`` of each of `indices`; those of tensors at once, which a GPU is told in one go."""
    if isinstance(samples, Subset):
        return take_each(samples.parent, [samples.index[index] for index in indices])
    if not isinstance(samples, TensorSamples) or not indices:
        return [samples.take(index) for index in indices]
    sizes = list(map(len, indices))
    x, y = samples.take(np.concatenate(indices))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def split(samples: Samples, fraction: float, seed: int, client: int) -> tuple[Samples, Samples | None]:
    """Hold ``int(fraction * n)`` samples out for validation: (training part, validation part or None).

    The validation part is read without random transforms where `samples` know how (`unaugmented`).
    """
    held = int(fraction * len(samples))
    if held == 0:
        return samples, None
    order = numpy_generator(seed, "split", client).permutation(len(samples))
    plain = getattr(samples, "unaugmented", None) or samples
    return Subset(samples, np.sort(order[held:])), Subset(plain, np.sort(order[:held]))


def in_batches(samples: Samples, batch_size: int) -> Iterator[Batch]:
    """All samples in order, in batches of at most `batch_size`."""
    for start in range(0, len(samples), batch_size):
        yield samples.take(np.arange(start, min(start + batch_size, len(samples))))


@dataclass(frozen=True)
class BatchPlan:
    """Which samples a client's steps see, as a function of how often it was dispatched before.

    A client walks through seeded permutations of its data, one after another across dispatches, as a
    shuffling loader would; with `epochs` each dispatch makes whole passes instead.

    Attributes:
        steps: local steps K, or None for `epochs` passes.
        shuffle: false keeps the data's order.
    """

    batch_size: int
    steps: int | None
    epochs: int
    shuffle: bool
    seed: int

    def batches(self, client: int, size: int, count: int) -> Iterator[Index]:
        """Sample indices (int64 [b]) of each batch of the client's dispatch number `count`.

        With steps, every batch is full unless the client has fewer samples than `batch_size`.
        """
        if self.steps is None:
            for epoch in range(count * self.epochs, (count + 1) * self.epochs):
                order = self._order(client, size, epoch)
                for start in range(0, size, self.batch_size):
                    yield order[start : start + self.batch_size]
            return
        width = min(self.batch_size, size)
        position = count * self.steps * width
        orders: dict[int, Index] = {}
        for _ in range(self.steps):
            epochs = range(position // size, (position + width - 1) // size + 1)
            orders = {e: orders[e] if e in orders else self._order(client, size, e) for e in epochs}
            joined = np.concatenate([orders[e] for e in epochs])
            offset = position - epochs[0] * size
            yield joined[offset : offset + width]
            position += width

    def _order(self, client: int, size: int, epoch: int) -> Index:
        if not self.shuffle:
            return np.arange(size)
        return numpy_generator(self.seed, "batches", client, epoch).permutation(size)


class BatchList(Sequence[Batch]):
    """Batches that are read when asked for, in order or by position."""

    def __init__(
        self,
        samples: Samples,
        indices: list[Index],
        on_read: Callable[[], None] | None = None,
        interrupt: Callable[[], None] | None = None,
    ) -> None:
        self._samples, self._indices = samples, indices
        self._on_read, self._interrupt = on_read, interrupt

    @property
    def watched(self) -> bool:
        """Whether somebody who looks at the model is called before each batch is read."""
        return self._on_read is not None

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return BatchList(self._samples, self._indices[position], self._on_read, self._interrupt)
        index = self._indices[position]
        for call in (self._interrupt, self._on_read):
            if call is not None:
                call()
        return self._samples.take(index)
