"""FedML's 8-element dataset from a labelled data set and a partition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks.data.labelled import Labelled
from fedgmr_plugin.engine.seeds import torch_generator

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

    def training(rows: Dataset[Any], *address: int) -> DataLoader[Any]:
        generator = torch_generator(seed, "training loader", *address)
        return DataLoader(rows, batch_size=batch_size, shuffle=True, generator=generator)

    def testing(rows: Dataset[Any]) -> DataLoader[Any]:
        # A loader without a generator draws from the global one whenever it is iterated.
        return DataLoader(rows, batch_size=test_batch, generator=torch_generator(seed, "test loader"))

    clients, tests = range(len(parts)), data.test_samples
    return [
        sum(len(part) for part in parts),
        tests,
        training(data.train),
        testing(data.test),
        {n: len(parts[n]) for n in clients},
        {n: training(Subset(data.train, parts[n].tolist()), n) for n in clients},
        {n: testing(Subset(data.test, range(n, tests, len(parts)))) for n in clients},
        data.classes,
    ]
