"""A silo's training data among those that FedML's data set has."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from fedgmr_plugin.engine.samples import Samples
from fedgmr_plugin.errors import DataError
from fedgmr_plugin.runtimes.samples import samples_of


class SiloSamples:
    """Client to its samples, collected at its first call.

    Args:
        loaders: FedML's ``train_data_local_dict``; clients are its keys in order. A silo may have its own
            data only.
    """

    def __init__(self, loaders: Mapping[Any, Any]) -> None:
        self._loaders, self._ids = loaders, sorted(loaders)
        self._known: dict[int, Samples] = {}

    def __call__(self, client: int) -> Samples:
        """The samples of a client.

        Raises:
            DataError: GMR-302 if it has none.
        """
        if client not in self._known:
            self._known[client] = samples_of(self._loaders[self._id(client)], f"client {client}")
        return self._known[client]

    def _id(self, client: int) -> Hashable:
        if client < len(self._ids):
            return self._ids[client]
        if len(self._ids) == 1:
            return self._ids[0]
        raise DataError("GMR-302", f"client {client} is missing", where="train_data_local_dict")
