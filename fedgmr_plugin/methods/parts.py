"""What methods are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Method(NamedTuple):
    """One method.

    Attributes:
        name: what `method` in ``fedgmr_args`` takes.
        title: for tables.
        rule: what it does, in a sentence or two.
        source: who described it, where.
        options: of `fedgmr_plugin.config.FedGMRConfig`, its choice of parts.
    """

    name: str
    title: str
    rule: str
    source: str
    options: Mapping[str, Any]


#: Everybody holds and trains the whole model, at the bandwidth of their class.
DENSE: Mapping[str, Any] = {"dense_start": True, "trigger": "none", "evaluate": "global"}

#: Rounds: the server waits for everybody and takes the mean of the weights.
ROUNDS: Mapping[str, Any] = {"schedule": "sync", "update_form": "replacement", "staleness": "constant"}

#: Sub-models whose densities stay, in rounds; each sub-model leaves the server by itself.
FROZEN: Mapping[str, Any] = {
    **ROUNDS,
    "trigger": "none",
    "incremental_splitting": False,
    "layer_floor": 0.0,
    "evaluate": "global",
}

#: What FedGMR adds to a family of masks besides GMR: asynchrony, the buffer, incremental splitting.
AUXILIARY: Mapping[str, Any] = {
    "schedule": "async",
    "update_scope": "buffer",
    "incremental_splitting": True,
}

#: GMR.
RESTORED: Mapping[str, Any] = {"trigger": "plateau"}
