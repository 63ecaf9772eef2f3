"""Traffic that fits the link: the largest part of a change, and the rest with the next one.

Legend: D coordinates, S support of one sub-model, k prunable coordinates that travel.

Restoration makes a client's sub-model larger, not its link. Decoupled, a client of initial density d0 trains
all of its restored sub-model while what travels stays as large as its first one was: everything that is never
pruned, and ``k = int(d0 * D_p)`` prunable coordinates.

- ``upload: decoupled`` (`Uplink`): the k coordinates that changed most. The client remembers the rest and
  adds it to its next change (error feedback; Karimireddy et al., ICML 2019, arXiv 1901.09847): what the
  server does not refuse is not lost, only late.
- ``download: decoupled`` (`Downlink`): the k coordinates in which what the client has differs most from the
  sub-model. It keeps what it was sent before of the others, 0 of those that it was never sent. The server
  remembers what every client has, so that what is late is sent once it matters.

The names of the k coordinates travel too: log2 C(n, k) bits for n prunable coordinates of the sub-model.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.network import Transfer, payload_megabytes
from fedgmr_plugin.kernels.layout import ModelLayout
from fedgmr_plugin.kernels.masks import Ranking

#: Counts of sub-models that are remembered.
_MOST = 64


class Thinned(NamedTuple):
    """Part of an update.

    Attributes:
        values_S: the values that are sent, in payload order.
        sent_S: bool [S], which coordinates they are of; None for all.
    """

    values_S: Tensor
    sent_S: Tensor | None


class Budget:
    """How much of a sub-model each client's link carries as fast as its first one.

    Args:
        layout: map of the global vector.
        densities: initial densities of the clients [N].
    """

    def __init__(self, layout: ModelLayout, densities: Sequence[float]) -> None:
        self.layout, self._densities = layout, tuple(densities)
        self._is_prunable_D = torch.zeros(layout.size, dtype=torch.bool)
        for entry in layout.of_kind("prunable"):
            self._is_prunable_D[entry.slice] = True
        self._known: OrderedDict[tuple[str, int], int] = OrderedDict()

    def carries_all(self, client: int) -> bool:
        """Whether the link carries the dense model."""
        return int(self._densities[client] * self.layout.prunable) >= self.layout.prunable

    def carries(self, client: int, ranking: Ranking, rung: int) -> bool:
        """Whether the link carries a whole sub-model."""
        prunable, most = self._counts(client, ranking, rung)
        return most >= prunable

    def share(self, client: int, ranking: Ranking, rung: int, *, by_density: bool = False) -> float:
        """What travels of a sub-model one way, in dense models; its coordinates' names included.

        Args:
            by_density: price values as ``payload_rule: density`` does, so that those of the client's first
                sub-model cost d0 here too; otherwise by their share of all coordinates.
        """
        size, total = ranking.ends[rung], self.layout.size
        prunable, most = self._counts(client, ranking, rung)
        values = (size - max(prunable - most, 0)) / total
        if by_density:
            values = min(ranking.densities[rung], self._densities[client])
        if most >= prunable:
            return values
        return values + _log2_choices(prunable, most) / (8 * self.layout.dtype.itemsize * total)

    def transfer(
        self,
        config: FedGMRConfig,
        model_megabytes: float,
        client: int,
        ranking: Ranking,
        rung: int,
        *,
        whole: bool = False,
    ) -> Transfer:
        """MB of a dispatch and of its answer.

        Args:
            model_megabytes: S.
            whole: whether all of the sub-model is sent to the client, whatever its link carries.
        """
        total = ranking.ends[rung] / self.layout.size
        size = payload_megabytes(config, model_megabytes, ranking.densities[rung], total)
        by_density = config.payload_rule == "density"
        part = min(size, model_megabytes * self.share(client, ranking, rung, by_density=by_density))
        is_part = config.download == "decoupled" and not whole and not self.carries(client, ranking, rung)
        return Transfer(
            down=part if is_part else size,
            up=part if config.upload == "decoupled" else size,
            shared=not is_part,
        )

    def is_prunable(self, index_S: Tensor) -> Tensor:
        """bool [S]: which coordinates of a sub-model can be pruned."""
        return self._is_prunable_D.to(index_S.device)[index_S]

    def choose(self, client: int, ranking: Ranking, rung: int, change_S: Tensor) -> Tensor:
        """bool [S]: what travels; all that is never pruned, and the largest |change| as many as fit."""
        is_prunable_S = self.is_prunable(ranking.support(rung))
        prunable, most = self._counts(client, ranking, rung)
        chosen_S = ~is_prunable_S
        place_P = is_prunable_S.nonzero().squeeze(1)
        order_P = change_S[place_P].abs().sort(descending=True, stable=True).indices
        chosen_S[place_P[order_P[: min(most, prunable)]]] = True
        return chosen_S

    def _counts(self, client: int, ranking: Ranking, rung: int) -> tuple[int, int]:
        """Prunable coordinates of the sub-model, and how many of them the client's link carries."""
        key = ranking.digest, rung
        if key not in self._known:
            held_D = ranking.mask(rung) & self._is_prunable_D.to(ranking.rung_D.device)
            self._known[key] = int(torch.count_nonzero(held_D))
        self._known.move_to_end(key)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return self._known[key], int(self._densities[client] * self.layout.prunable)


class Uplink:
    """The clients' uplinks, with what each client has not sent yet.

    Args:
        budget: what the links carry.
        form: whether updates are changes or weights.

    Attributes:
        residual: by client, changes that it has not sent [D]; 0 where there is nothing.
    """

    def __init__(self, budget: Budget, form: Literal["delta", "replacement"]) -> None:
        self._budget, self._form = budget, form
        self.residual: dict[int, Tensor] = {}

    def thin(self, sent: Dispatch, values_S: Tensor) -> Thinned:
        """What of a trained update is sent now; the rest is remembered.

        An update that is not finite, which the server refuses, is sent as it is: nothing of it is remembered.
        """
        client, ranking, rung = sent.client, sent.ranking, sent.rung
        if not bool(values_S.isfinite().all()):
            return Thinned(values_S, None)
        if client not in self.residual and self._budget.carries(client, ranking, rung):
            return Thinned(values_S, None)
        index_S = ranking.support(rung)
        is_prunable_S = self._budget.is_prunable(index_S)
        base_S = sent.values_S if self._form == "replacement" else torch.zeros_like(values_S)
        owed_D = self.residual.pop(client, None)
        if owed_D is None:
            size = self._budget.layout.size
            owed_D = torch.zeros(size, dtype=values_S.dtype, device=values_S.device)
        change_S = torch.where(is_prunable_S, values_S - base_S + owed_D[index_S], values_S - base_S)
        sent_S = self._budget.choose(client, ranking, rung, change_S)
        owed_D[index_S] = change_S.masked_fill(sent_S, 0.0)
        if bool(owed_D.any()):
            self.residual[client] = owed_D
        whole_S = torch.where(is_prunable_S, base_S + change_S, values_S)
        return Thinned(whole_S, None) if bool(sent_S.all()) else Thinned(whole_S[sent_S], sent_S)


class Downlink:
    """The clients' downlinks, with what each client has.

    Args:
        budget: what the links carry.

    Attributes:
        held: by client, the last value that it was sent of every coordinate [D]; 0 where there is none. Of
            clients that have been dispatched to and whose link does not carry the whole model.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.held: dict[int, Tensor] = {}

    def cut(self, whole: Dispatch) -> Dispatch:
        """The dispatch that the client receives: `whole` itself where all of it travels.

        That is so where the link carries it, and where the client has nothing yet. Otherwise the values are
        those that the client has once the part that travels is put in place; of a sub-model of which it has
        nothing but older values, they are a mixture of versions.
        """
        client, ranking, rung = whole.client, whole.ranking, whole.rung
        index_S, size = ranking.support(rung), self._budget.layout.size
        if self._budget.carries_all(client):
            return whole
        held_D = self.held.get(client)
        if held_D is None:
            held_D = self.held[client] = whole.values_S.new_zeros(size)
        elif not self._budget.carries(client, ranking, rung):
            old_S = held_D[index_S]
            sent_S = self._budget.choose(client, ranking, rung, whole.values_S - old_S)
            whole = replace(whole, values_S=torch.where(sent_S, whole.values_S, old_S))
        held_D[index_S] = whole.values_S
        return whole


def _log2_choices(n: int, k: int) -> float:
    """log2 of the number of ways to choose k of n."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2.0)
