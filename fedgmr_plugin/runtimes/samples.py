"""Indexed samples of whatever FedML users give for one client.

A client's "loader" may be a torch DataLoader, a torch Dataset, a list of ``(x, y)`` batches, or any finite
iterable of batches. We need map-style samples: the order and the composition of batches come from the run's
seed tree, never from a loader's own shuffling; its samplers only say which samples belong to the client.

Legend: b samples of one batch, n samples of one client.

Laws, tested: nothing is read before it is asked for; nothing draws from a global random generator, except a
dataset's own random transforms inside `take` (the engine isolates those); they are evaluated at every `take`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from fedgmr_plugin.engine.samples import Batch, Samples, TensorSamples
from fedgmr_plugin.engine.samples import Subset as SelectedSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.errors import DataError

_STREAM_BATCH = 64
#: A stream that yields more than this many times its declared length is taken for endless.
_ENDLESS_FACTOR, _ENDLESS_SLACK = 100, 10_000

_log = logging.getLogger(__name__)


class MapSamples:
    """Samples of a map-style dataset, fetched and collated at every `take`.

    Random transforms of the dataset draw from the global generators, as they do in any torch program: call
    `take` inside `isolated_rng`.

    Attributes:
        unaugmented: the same samples without those transforms, for validation; None unless the dataset has an
            attribute of that name, which is such a dataset.
    """

    def __init__(self, dataset: Any, collate: Any, where: str, rows: np.ndarray | None = None) -> None:
        self._dataset, self._collate, self._where, self._rows = dataset, collate, where, rows
        plain = _unaugmented(dataset, where)
        self.unaugmented = None if plain is None else MapSamples(plain, collate, where, rows)

    def __len__(self) -> int:
        return len(self._dataset) if self._rows is None else len(self._rows)

    def take(self, index: np.ndarray) -> Batch:
        chosen = np.asarray(index, dtype=np.int64)
        numbers = [int(i) for i in (chosen if self._rows is None else self._rows[chosen])]
        fetch_many = getattr(self._dataset, "__getitems__", None)
        items = fetch_many(numbers) if fetch_many else [self._dataset[i] for i in numbers]
        return pair_of(self._collate(items), self._where, any_x=True)


def _unaugmented(dataset: Any, where: str) -> Any:
    """The dataset without its random transforms; None where it has none, or does not tell.

    Raises:
        DataError: GMR-302 if it has not the same number of samples.
    """
    if isinstance(dataset, Subset):
        inner = _unaugmented(dataset.dataset, where)
        return None if inner is None else Subset(inner, dataset.indices)
    plain = getattr(dataset, "unaugmented", None)
    if plain is not None and len(plain) != len(dataset):
        raise DataError(
            "GMR-302",
            f"`unaugmented` of the dataset of {where} has {len(plain)} samples, the dataset {len(dataset)}",
            where=where,
        )
    return plain


class BatchSamples:
    """Samples of a list of batches, concatenated at the first `take`."""

    def __init__(self, batches: Sequence[Any], where: str) -> None:
        pairs = [pair_of(batch, where) for batch in batches]
        pairs = [pair for pair in pairs if len(pair[0])]
        if len({(x.shape[1:], y.shape[1:]) for x, y in pairs}) > 1:
            raise DataError("GMR-302", "its batches hold samples of different shapes", where=where)
        self._length = sum(len(x) for x, _ in pairs)
        self._pairs = pairs
        self._whole: TensorSamples | None = None

    def __len__(self) -> int:
        return self._length

    def take(self, index: np.ndarray) -> Batch:
        if self._whole is None:
            x, y = zip(*self._pairs, strict=True)
            self._whole = TensorSamples(torch.cat(x), torch.cat(y))
            self._pairs = []
        return self._whole.take(index)


def samples_of(source: Any, where: str = "dataset", *, declared: int | None = None) -> Samples:
    """Indexed samples of whatever FedML users give for one client.

    Args:
        source: DataLoader, Dataset, list of ``(x, y)`` batches, or a finite iterable of batches.
        where: how to call it in an error (``"client 3"``).
        declared: its number of samples as declared, to recognise an endless stream.

    Raises:
        DataError: GMR-301 if there is no sample, GMR-302 if the form is not understood.
    """
    if source is None:
        raise DataError("GMR-301", f"the training data of {where} is None", where=where)
    samples: Samples
    if isinstance(source, DataLoader):
        samples = _of_loader(source, where, declared)
    elif isinstance(source, (list, tuple)):
        samples = BatchSamples(source, where)
    elif isinstance(source, IterableDataset):
        samples = _of_stream(DataLoader(source, batch_size=_STREAM_BATCH), where, declared)
    elif isinstance(source, Dataset):
        samples = _of_dataset(source, default_collate, where, None)
    elif isinstance(source, Iterable):
        samples = _of_stream(source, where, declared)
    else:
        raise DataError(
            "GMR-302",
            f"the data of {where} is a {type(source).__name__}, not a loader or batches",
            where=where,
        )
    if len(samples) == 0:
        raise DataError("GMR-301", f"{where} has no sample", where=where)
    return samples


def _of_loader(loader: DataLoader[Any], where: str, declared: int | None) -> Samples:
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return _of_stream(loader, where, declared)
    return _of_dataset(loader.dataset, loader.collate_fn, where, _members(loader, where))


def _of_dataset(dataset: Any, collate: Any, where: str, rows: np.ndarray | None) -> Samples:
    if not isinstance(dataset, Sized):
        raise DataError("GMR-302", f"the dataset of {where} has no length", where=where)
    if collate is default_collate:
        base: Any = dataset
        base_rows = rows
        while type(base) is Subset:
            inner = np.asarray(base.indices, dtype=np.int64)
            base, base_rows = base.dataset, inner if base_rows is None else inner[base_rows]
        if type(base) is TensorDataset:
            if len(base.tensors) != 2:
                raise DataError(
                    "GMR-302",
                    f"the dataset of {where} has {len(base.tensors)} tensors, not x and y",
                    where=where,
                )
            whole = TensorSamples(*base.tensors)
            return whole if base_rows is None else SelectedSamples(whole, base_rows)
    return MapSamples(dataset, collate, where, rows)


def _members(loader: DataLoader[Any], where: str) -> np.ndarray | None:
    """Indices that belong to the client: what its samplers can draw, not the order in which they do."""
    length = len(cast(Sized, loader.dataset))
    draws: Iterable[int]
    batch_sampler: Any = loader.batch_sampler
    if type(batch_sampler) is BatchSampler:
        sampler: Any = batch_sampler.sampler
        if isinstance(sampler, SubsetRandomSampler):
            return np.asarray(sampler.indices, dtype=np.int64)
        if isinstance(sampler, WeightedRandomSampler):
            _log.warning("%s: the weights of its WeightedRandomSampler are ignored", where)
            return None
        if type(sampler) in (SequentialSampler, RandomSampler):
            drawn_from = len(sampler.data_source)
            return None if drawn_from == length else np.arange(drawn_from)
        draws = sampler
    else:
        draws = itertools.chain.from_iterable(batch_sampler)
    with isolated_rng(0):
        return np.unique(np.fromiter(itertools.islice(draws, 10 * length), dtype=np.int64))


def _of_stream(source: Iterable[Any], where: str, declared: int | None) -> Samples:
    limit = None if declared is None else _ENDLESS_FACTOR * declared + _ENDLESS_SLACK
    batches: list[Batch] = []
    count = 0
    with isolated_rng(0):
        for batch in source:
            pair = pair_of(batch, where)
            count += len(pair[0])
            if limit is not None and count > limit:
                raise DataError(
                    "GMR-302",
                    f"the data of {where} goes on after {limit} samples ({declared} declared)",
                    where=where,
                )
            batches.append(pair)
    return BatchSamples(batches, where)


def pair_of(batch: Any, where: str, *, any_x: bool = False) -> Batch:
    """Check one batch: two tensors (or arrays) of equal length.

    With `any_x`, x may also be what a collate function made of something else (a dictionary, say).
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = f"{len(batch)} elements" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise DataError("GMR-302", f"a batch of {where} is not a pair (x, y): {what}", where=where)
    for part in batch[1:] if any_x else batch:
        if not isinstance(part, (Tensor, np.ndarray)):
            raise DataError(
                "GMR-302", f"a batch of {where} holds a {type(part).__name__}, not a tensor", where=where
            )
    x, y = (torch.as_tensor(p) if isinstance(p, np.ndarray) else p for p in batch)
    if not isinstance(x, Tensor):
        return x, y
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise DataError(
            "GMR-302",
            f"a batch of {where} has x {tuple(x.shape)} and y {tuple(y.shape)}: lengths differ",
            where=where,
        )
    return x, y
