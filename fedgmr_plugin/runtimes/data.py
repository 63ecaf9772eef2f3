"""FedML's 8-element dataset, seen as one `Samples` per client and one stream of test batches.

FedML hands over ``[train_num, test_num, train_global, test_global, {client: n}, {client: train loader},
{client: test loader}, class_num]``. A client's "loader" may be a torch DataLoader, a torch Dataset, a list of
``(x, y)`` batches, or any finite iterable of batches. Whatever it is, we need *indexed* samples: the order
and the composition of batches come from the run's seed tree, never from a loader's own shuffling.

Legend: b samples of one batch, n samples of one client.

Laws, tested: nothing is read before it is asked for; nothing here draws from a global random generator,
except a dataset's own random transforms inside `Samples.take` (the engine isolates those); transforms are
evaluated again at every `take`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
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

from fedgmr_plugin.engine.client import Batch, Samples, TensorSamples
from fedgmr_plugin.engine.client import Subset as SelectedSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.errors import DataError

_FIELDS = (
    "train_num",
    "test_num",
    "train_global",
    "test_global",
    "train_num_dict",
    "train_loader_dict",
    "test_loader_dict",
    "class_num",
)
_EVALUATION_BATCH = 256
_STREAM_BATCH = 64
#: A stream that yields more than this many times its declared length is taken for endless.
_ENDLESS_FACTOR, _ENDLESS_SLACK = 100, 10_000

_log = logging.getLogger(__name__)


# -- one client ----------------------------------------------------------------------------------------


class MapSamples:
    """Samples of a map-style dataset, fetched and collated at every `take`.

    Random transforms of the dataset draw from the global generators, as they do in any torch program: call
    `take` inside `isolated_rng`.
    """

    def __init__(self, dataset: Any, collate: Any, where: str, rows: np.ndarray | None = None) -> None:
        self._dataset, self._collate, self._where, self._rows = dataset, collate, where, rows

    def __len__(self) -> int:
        return len(self._dataset) if self._rows is None else len(self._rows)

    def take(self, index: np.ndarray) -> Batch:
        chosen = np.asarray(index, dtype=np.int64)
        numbers = [int(i) for i in (chosen if self._rows is None else self._rows[chosen])]
        fetch_many = getattr(self._dataset, "__getitems__", None)
        items = fetch_many(numbers) if fetch_many else [self._dataset[i] for i in numbers]
        return _pair(self._collate(items), self._where, any_x=True)


class BatchSamples:
    """Samples of a list of batches, concatenated at the first `take`."""

    def __init__(self, batches: Sequence[Any], where: str) -> None:
        pairs = [_pair(batch, where) for batch in batches]
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
            pair = _pair(batch, where)
            count += len(pair[0])
            if limit is not None and count > limit:
                raise DataError(
                    "GMR-302",
                    f"the data of {where} goes on after {limit} samples ({declared} declared)",
                    where=where,
                )
            batches.append(pair)
    return BatchSamples(batches, where)


def _pair(batch: Any, where: str, *, any_x: bool = False) -> Batch:
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


# -- test data -----------------------------------------------------------------------------------------


class EvaluationBatches:
    """Test batches in a fixed order: may be iterated often, and never touches a global random state.

    Random transforms, if any, are seeded by the batch's number, so every pass sees the same data.
    """

    def __init__(self, parts: Sequence[tuple[Any, str]]) -> None:
        self._sources = parts
        self._parts: list[list[Batch] | tuple[Samples, int]] | None = None

    def _prepared(self) -> list[list[Batch] | tuple[Samples, int]]:
        if self._parts is None:
            self._parts = [_evaluation_part(source, where) for source, where in self._sources]
        return self._parts

    def __len__(self) -> int:
        """Number of batches."""
        return sum(
            len(part) if isinstance(part, list) else -(-len(part[0]) // part[1]) for part in self._prepared()
        )

    def __iter__(self) -> Iterator[Batch]:
        number = 0
        for part in self._prepared():
            if isinstance(part, list):
                yield from part
                continue
            samples, size = part
            for start in range(0, len(samples), size):
                index = np.arange(start, min(start + size, len(samples)))
                with isolated_rng(number):
                    batch = samples.take(index)
                number += 1
                yield batch

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(
            sum(len(y) for _, y in part) if isinstance(part, list) else len(part[0])
            for part in self._prepared()
        )


def _evaluation_part(source: Any, where: str) -> list[Batch] | tuple[Samples, int]:
    if isinstance(source, (list, tuple)):
        return [_pair(batch, where, any_x=True) for batch in source]
    size = source.batch_size if isinstance(source, DataLoader) else None
    return samples_of(source, where), size or _EVALUATION_BATCH


# -- the 8-element list --------------------------------------------------------------------------------


class ClientSamples(Sequence[Samples]):
    """Samples of every client, each built when it is first asked for."""

    def __init__(
        self, ids: Sequence[Hashable], loaders: Mapping[Hashable, Any], counts: Mapping[Hashable, int]
    ):
        self._ids, self._loaders, self._counts = ids, loaders, counts
        self._built: dict[int, Samples] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        n = range(len(self))[position]
        if n not in self._built:
            client = self._ids[n]
            self._built[n] = samples_of(
                self._loaders[client], f"client {client}", declared=self._counts[client]
            )
        return self._built[n]


@dataclass(frozen=True)
class FederatedData:
    """A FedML dataset, ready for the engine.

    Attributes:
        ids: FedML's client ids; client n of the engine is ``ids[n]``.
        clients: their training samples, lazily.
        test: test batches.
        train_loaders, test_loaders: FedML's own objects by client id, for hooks that want them; a client may
            be missing from `test_loaders`.
        classes: FedML's ``class_num``.
    """

    ids: tuple[Hashable, ...]
    clients: ClientSamples
    test: EvaluationBatches
    train_loaders: Mapping[Hashable, Any]
    test_loaders: Mapping[Hashable, Any]
    classes: int | None


def read_dataset(dataset: Any, clients: int | None = None) -> FederatedData:
    """Read FedML's 8-element dataset without touching any client's data.

    Test batches come from ``test_global``; where that is None or empty, from the union of the clients' test
    loaders.

    Args:
        dataset: FedML's list (or tuple).
        clients: use the first so many clients (``client_num_in_total``); all when None. Ids need not be
            contiguous: integers are taken in increasing order, others in the dictionary's order.

    Raises:
        DataError: GMR-301 for a client whose loader is None or whose declared count is 0; GMR-302 if the
            list has another form, a client is missing from a dictionary, or there is no test data.
    """
    if not isinstance(dataset, (list, tuple)) or len(dataset) != len(_FIELDS):
        size = f"{len(dataset)} elements" if isinstance(dataset, (list, tuple)) else type(dataset).__name__
        raise DataError(
            "GMR-302",
            f"dataset is not FedML's list of {len(_FIELDS)} elements: {size}",
            where=", ".join(_FIELDS),
        )
    _, _, _, test_global, counts, loaders, test_loaders, classes = dataset
    for name, value in (("train_num_dict", counts), ("train_loader_dict", loaders)):
        if not isinstance(value, Mapping):
            raise DataError(
                "GMR-302", f"{name} is a {type(value).__name__}, not a dictionary by client", where="dataset"
            )
    if test_loaders is not None and not isinstance(test_loaders, Mapping):
        raise DataError(
            "GMR-302", "test_loader_dict is neither a dictionary by client nor None", where="dataset"
        )

    ids = _client_ids(counts, loaders, clients)
    for client in ids:
        if loaders[client] is None:
            raise DataError(
                "GMR-301", f"the training data of client {client} is None", where="train_loader_dict"
            )
        if counts[client] == 0:
            raise DataError("GMR-301", f"client {client} has 0 samples", where="train_num_dict")
    tests: Mapping[Hashable, Any] = {} if test_loaders is None else test_loaders
    return FederatedData(
        ids=ids,
        clients=ClientSamples(ids, loaders, counts),
        test=_test_batches(test_global, tests, ids),
        train_loaders=loaders,
        test_loaders=tests,
        classes=None if classes is None else int(classes),
    )


def _client_ids(
    counts: Mapping[Any, int], loaders: Mapping[Any, Any], clients: int | None
) -> tuple[Hashable, ...]:
    ids = list(loaders)
    if all(isinstance(client, (int, np.integer)) for client in ids):
        ids.sort()
    for missing, name in (
        (set(counts) - set(ids), "train_loader_dict"),
        (set(ids) - set(counts), "train_num_dict"),
    ):
        if missing:
            shown = ", ".join(sorted(str(client) for client in missing)[:5])
            raise DataError("GMR-302", f"client {shown} is missing", where=name)
    if not ids:
        raise DataError("GMR-302", "there is no client", where="train_loader_dict")
    if clients is not None:
        if clients > len(ids):
            raise DataError(
                "GMR-302",
                f"client_num_in_total={clients}, but the dataset has {len(ids)} clients",
                where="train_loader_dict",
            )
        ids = ids[:clients]
    return tuple(ids)


def _is_missing(source: Any) -> bool:
    return source is None or (isinstance(source, (list, tuple)) and not source)


def _test_batches(
    whole: Any, by_client: Mapping[Hashable, Any], ids: Sequence[Hashable]
) -> EvaluationBatches:
    if not _is_missing(whole):
        return EvaluationBatches([(whole, "test_global")])
    parts = [(by_client[c], f"test data of client {c}") for c in ids if not _is_missing(by_client.get(c))]
    if not parts:
        raise DataError(
            "GMR-302",
            "there is no test data: test_global and the clients' loaders are empty",
            where="dataset",
        )
    return EvaluationBatches(parts)
