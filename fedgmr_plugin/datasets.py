"""A small real data set, cut into federated clients: what the demonstration trains on, offline.

`digits` gives scikit-learn's handwritten digits as FedML's 8-element dataset; `DigitsCNN` is a model that
fits them, `DigitsMLP` one that just does. `dirichlet_partition`, `iid_partition` and `fedml_dataset` do the
same for any labelled arrays.

Legend: n samples, N clients, C classes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedgmr_plugin.engine.seeds import derive, numpy_generator
from fedgmr_plugin.errors import ConfigError, DataError, HostError

#: One sample in five of every class is held out for testing.
_TEST_EVERY = 5


def digits(
    clients: int = 10,
    alpha: float | None = 0.6,
    seed: int = 0,
    batch_size: int = 20,
    *,
    min_samples: int = 10,
    smallest: int | None = 0,
) -> list[Any]:
    """scikit-learn's handwritten digits as FedML's 8-element dataset.

    1,797 images of 8 x 8, as float32 [1, 8, 8] in [0, 1], 10 classes. About 80 % train, 20 % test, the same
    split for every seed and stratified by class; only the partition over the clients follows `seed`.

    Args:
        clients: N.
        alpha: concentration of the Dirichlet label skew; None for an IID partition.
        seed: of the partition and of the loaders' shuffling.
        batch_size: of the loaders.
        min_samples: fewest training samples of a client.
        smallest: this client gets the smallest share: client 0, the one of highest initial density, as in
            the paper's setting. None leaves the shares as they fall.

    Raises:
        HostError: GMR-505 without scikit-learn.
        DataError: GMR-301 if `min_samples` cannot be met.
        ConfigError: GMR-104 for an argument out of range.
    """
    x, y = _load_digits()
    is_test = _rank_in_class(y) % _TEST_EVERY == _TEST_EVERY - 1
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    if alpha is None:
        parts = iid_partition(len(train), clients, seed)
    else:
        parts = dirichlet_partition(y[train], clients, alpha, seed, min_samples, smallest=smallest)
    return fedml_dataset((x[train], y[train]), (x[test], y[test]), parts, batch_size, classes=10, seed=seed)


def dirichlet_partition(
    labels: NDArray[Any],
    clients: int,
    alpha: float,
    seed: int,
    min_samples: int = 1,
    *,
    smallest: int | None = None,
) -> list[NDArray[Any]]:
    """Cut samples into clients with Dirichlet label skew.

    The samples of each class, in random order, are shared out in proportions drawn from Dirichlet(alpha 1_N),
    independently for each class. Clients that are left with fewer than `min_samples` then receive random
    samples from whoever has most. Every index appears exactly once.

    Args:
        labels: class of each sample, int [n].
        clients: N >= 1.
        alpha: > 0; small values give each class to few clients.
        seed: of all draws (Philox).
        min_samples: fewest samples of a client.
        smallest: exchange shares so that this client has the smallest one.

    Returns:
        For each client its indices, int64, increasing.

    Raises:
        ConfigError: GMR-104 for an argument out of range.
        DataError: GMR-301 if there are fewer than N * min_samples samples.
    """
    labels = np.asarray(labels)
    _check_partition(len(labels), clients, min_samples, smallest)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError("GMR-104", f"alpha={alpha} is not above 0", where="dirichlet_partition")
    draw = numpy_generator(seed, "dirichlet_partition")
    shares: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = draw.permutation(np.flatnonzero(labels == label))
        proportions = draw.dirichlet(np.full(clients, alpha))
        cuts = np.floor(np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        for share, piece in zip(shares, np.split(members, cuts), strict=True):
            share.extend(piece.tolist())
    shares = [draw.permutation(np.asarray(share, dtype=np.int64)).tolist() for share in shares]
    _top_up(shares, min_samples)
    if smallest is not None:
        least = min(range(clients), key=lambda n: (len(shares[n]), n))
        shares[least], shares[smallest] = shares[smallest], shares[least]
    return [np.sort(np.asarray(share, dtype=np.int64)) for share in shares]


def iid_partition(samples: int, clients: int, seed: int) -> list[NDArray[Any]]:
    """Cut `samples` indices into `clients` random shares whose sizes differ by at most one.

    Raises:
        ConfigError: GMR-104 for fewer than one client.
        DataError: GMR-301 for more clients than samples.
    """
    _check_partition(samples, clients, 1, None)
    order = numpy_generator(seed, "iid_partition").permutation(samples)
    return [np.sort(part) for part in np.array_split(order, clients)]


def fedml_dataset(
    train: tuple[NDArray[Any], NDArray[Any]],
    test: tuple[NDArray[Any], NDArray[Any]],
    parts: Sequence[NDArray[Any]],
    batch_size: int,
    *,
    classes: int,
    seed: int = 0,
) -> list[Any]:
    """FedML's 8-element dataset of DataLoaders from arrays and a partition.

    FedML's own algorithms test on every client, so the test set is dealt out to the clients too: one sample
    each in turn, so that the clients' tests together are the test set.

    Args:
        train, test: x [n, ...] and y [n].
        parts: indices into the training arrays, one array per client.
        seed: of the loaders' shuffling.
    """
    (x, y), (test_x, test_y) = map(_tensor, train), map(_tensor, test)

    def loader(x: Tensor, y: Tensor, *address: int | str, shuffle: bool) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(derive(seed, "loader", *address))
        return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle, generator=generator)

    rows = [_tensor(part) for part in parts]
    train_loaders = {n: loader(x[r], y[r], "train", n, shuffle=True) for n, r in enumerate(rows)}
    test_loaders = {
        n: loader(test_x[n :: len(rows)], test_y[n :: len(rows)], "test", n, shuffle=False)
        for n in range(len(rows))
    }
    return [
        sum(len(r) for r in rows),
        len(test_x),
        loader(x, y, "train", shuffle=True),
        loader(test_x, test_y, "test", shuffle=False),
        {n: len(r) for n, r in enumerate(rows)},
        train_loaders,
        test_loaders,
        classes,
    ]


class DigitsCNN(nn.Module):
    """A small network for 8 x 8 grey images: two 3x3 convolutions, a pool, two linear layers.

    38,282 parameters, of which 37,520 (98 %) are prunable weights.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [b, C] of images [b, 1, 8, 8]."""
        x = torch.relu(self.conv1(x))
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        out: Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return out


class DigitsMLP(nn.Module):
    """One hidden layer for 8 x 8 grey images: as small as the task allows.

    1,210 parameters with 16 hidden units, of which the hidden layer's 1,024 weights are prunable: a client of
    density .05 has 51 of them.
    """

    def __init__(self, hidden: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [b, C] of images [b, 1, 8, 8]."""
        out: Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return out


def _tensor(array: NDArray[Any]) -> Tensor:
    """The array as a tensor, sharing memory unless the array is read-only."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _load_digits() -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise HostError(
            "GMR-505",
            f"the digits data need scikit-learn, which cannot be imported: {error}",
            hint="Run: python -m pip install scikit-learn",
        ) from error
    bunch = load_digits()
    x = (np.asarray(bunch.images, dtype=np.float32) / 16)[:, None]
    return x, np.asarray(bunch.target, dtype=np.int64)


def _rank_in_class(labels: NDArray[Any]) -> NDArray[Any]:
    """How many earlier samples have the same label, int64 [n]."""
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    return rank


def _check_partition(samples: int, clients: int, min_samples: int, smallest: int | None) -> None:
    if clients < 1:
        raise ConfigError("GMR-104", f"clients={clients} is below 1", where="partition")
    if smallest is not None and not 0 <= smallest < clients:
        raise ConfigError(
            "GMR-104", f"smallest={smallest} is not one of {clients} clients", where="partition"
        )
    if samples < clients * min_samples:
        raise DataError(
            "GMR-301",
            f"{samples} samples cannot give {clients} clients {min_samples} each",
            where="partition",
        )


def _top_up(shares: list[list[int]], min_samples: int) -> None:
    """Move samples, one at a time from the largest share, until every share has `min_samples`."""
    by_size = [(-len(share), n) for n, share in enumerate(shares)]
    heapq.heapify(by_size)
    for share in shares:
        while len(share) < min_samples:
            size, donor = heapq.heappop(by_size)
            if -size != len(shares[donor]):  # this share has grown since
                heapq.heappush(by_size, (-len(shares[donor]), donor))
                continue
            share.append(shares[donor].pop())
            heapq.heappush(by_size, (-len(shares[donor]), donor))
