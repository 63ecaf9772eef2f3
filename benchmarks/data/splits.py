"""How a data set's training samples are shared out among clients.

Legend: n samples, N clients.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.labelled import Labelled
from fedgmr_plugin.datasets import dirichlet_partition, iid_partition
from fedgmr_plugin.errors import ConfigError, DataError

Split = Literal["iid", "dirichlet", "users"]


def partition(
    data: Labelled,
    split: Split,
    clients: int,
    seed: int,
    *,
    alpha: float = 0.6,
    min_samples: int = 20,
    smallest: int | None = 0,
) -> list[NDArray[Any]]:
    """Cut the training samples into clients.

    Args:
        split: ``iid``; ``dirichlet``, label skew; or ``users``, whole users in blocks, as in the paper.
        alpha, min_samples: of the label skew.
        smallest: the client that gets the smallest share (the fast one, in the paper); None leaves the shares
            as they fall. Not for ``iid``.

    Returns:
        For each client its indices, int64, increasing; every sample is in exactly one.

    Raises:
        ConfigError: GMR-106 for a split that the data set does not allow; GMR-104 for an argument out of
            range.
        DataError: GMR-301 for too few samples or users.
    """
    if split == "iid":
        return iid_partition(data.samples, clients, seed)
    if split == "dirichlet":
        if data.y_train is None:
            raise ConfigError(
                "GMR-106",
                "split=dirichlet needs one class per sample, and sequences have none",
                where="data.split",
                hint="Use `iid` or `users`.",
            )
        return dirichlet_partition(data.y_train, clients, alpha, seed, min_samples, smallest=smallest)
    if data.users is None:
        raise ConfigError(
            "GMR-106",
            "split=users needs a data set that knows its users",
            where="data.split",
            hint="Use `iid` or `dirichlet`.",
        )
    if smallest is not None and not 0 <= smallest < clients:
        problem = f"smallest={smallest} is not one of {clients} clients"
        raise ConfigError("GMR-104", problem, where="data.smallest")
    parts = block_partition(data.users, clients)
    if smallest is not None:
        least = min(range(clients), key=lambda n: (len(parts[n]), n))
        parts[least], parts[smallest] = parts[smallest], parts[least]
    return parts


def block_partition(users: NDArray[Any], clients: int) -> list[NDArray[Any]]:
    """Give each client a block of consecutive users; numbers of users differ by at most one.

    Raises:
        DataError: GMR-301 for fewer users than clients.
    """
    names, user_n = np.unique(users, return_inverse=True)
    if len(names) < clients:
        raise DataError(
            "GMR-301", f"{len(names)} users cannot be cut into {clients} clients", where="data.split"
        )
    sizes = [len(block) for block in np.array_split(names, clients)]
    client_n = np.repeat(np.arange(clients), sizes)[user_n]
    return [np.flatnonzero(client_n == n) for n in range(clients)]
