"""FedML's 8-element dataset, seen as one `Samples` per client and one stream of test batches.

FedML hands over ``[train_num, test_num, train_global, test_global, {client: n}, {client: train loader},
{client: test loader}, class_num]``. Nothing of a client is read before it is asked for, so ten thousand
clients cost no more than the ones that train. What a loader may be: `fedgmr_plugin.runtimes.samples`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from fedgmr_plugin.engine.samples import Batch, Samples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.errors import DataError
from fedgmr_plugin.runtimes.samples import pair_of, samples_of

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
        return [pair_of(batch, where, any_x=True) for batch in source]
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
                hint=f"Set `client_num_in_total` in train_args to {len(ids)}, or cut the data into more.",
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
