"""FedML's 8-element dataset from a labelled data set and a partition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks.data.labelled import Labelled
from fedgmr_plugin.engine.seeds import derive

#: Samples of one evaluation batch.
TEST_BATCH = 200


def federated(
    data: Labelled,
    parts: Sequence[NDArray[Any]],
    batch_size: int,
    *,
    seed: int = 0,
    test_batch: int = TEST_BATCH,
) -> list[Any]:
    """FedML's 8-element dataset of DataLoaders; nothing is copied.

    FedML's own algorithms test on every client, so the test set is dealt out to the clients too: one sample
    each in turn, so that the clients' tests together are the test set.

    Args:
        parts: indices of the training samples of each client [N].
        batch_size: of the training loaders; test loaders have `test_batch`.
        seed: of the loaders' shuffling.
    """

    def loader(rows: Dataset[Any], *address: int | str) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(derive(seed, "loader", *address))
        if "train" in address:
            return DataLoader(rows, batch_size=batch_size, shuffle=True, generator=generator)
        return DataLoader(rows, batch_size=test_batch, generator=generator)

    clients, tests = range(len(parts)), len(data.test)  # type: ignore[arg-type]
    return [
        sum(len(part) for part in parts),
        tests,
        loader(data.train, "train"),
        loader(data.test, "test"),
        {n: len(parts[n]) for n in clients},
        {n: loader(Subset(data.train, parts[n].tolist()), "train", n) for n in clients},
        {n: loader(Subset(data.test, range(n, tests, len(parts))), "test", n) for n in clients},
        data.classes,
    ]
