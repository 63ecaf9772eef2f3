"""Uploads that fit the link: the largest part of a change, and the rest with the next one.

Legend: D coordinates, S support of one sub-model, k prunable coordinates that are sent.

Restoration makes a client's sub-model larger, not its link. With ``upload: decoupled`` a client trains all of
its sub-model and sends what its link can carry: everything that is never pruned, and of the prunable
coordinates of its change the k = ``int(d0 * D_p)`` of largest size, as many as its initial density d0 had. It
remembers the rest and adds it to its next change (error feedback; Karimireddy et al., ICML 2019, arXiv
1901.09847): what the server does not refuse is not lost, only late.

The names of the k coordinates are sent too: log2 C(n, k) bits for n prunable coordinates of the sub-model.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.kernels.layout import ModelLayout

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


class Uplink:
    """The clients' uplinks, with what each client has not sent yet.

    Args:
        layout: map of the global vector.
        densities: initial densities of the clients [N].
        form: whether updates are changes or weights.

    Attributes:
        residual: by client, changes that it has not sent [D]; 0 where there is nothing.
    """

    def __init__(
        self, layout: ModelLayout, densities: Sequence[float], form: Literal["delta", "replacement"]
    ) -> None:
        self._layout, self._densities, self._form = layout, densities, form
        self._is_prunable_D = torch.zeros(layout.size, dtype=torch.bool)
        for entry in layout.of_kind("prunable"):
            self._is_prunable_D[entry.slice] = True
        self.residual: dict[int, Tensor] = {}
        self._known: OrderedDict[tuple[str, int], int] = OrderedDict()

    def share(self, sent: Dispatch, *, by_density: bool = False) -> float:
        """Size of the upload that answers `sent`, in dense models; its coordinates' names included.

        Args:
            by_density: price values as ``payload_rule: density`` does, so that those of the client's first
                sub-model cost d0 here too; otherwise by their share of all coordinates.
        """
        size, total = sent.ranking.ends[sent.rung], self._layout.size
        prunable, most = self._counts(sent)
        values = (size - max(prunable - most, 0)) / total
        if by_density:
            values = min(sent.density, self._densities[sent.client])
        if most >= prunable:
            return values
        return values + _log2_choices(prunable, most) / (8 * self._layout.dtype.itemsize * total)

    def thin(self, sent: Dispatch, values_S: Tensor) -> Thinned:
        """What of a trained update is sent now; the rest is remembered.

        An update that is not finite, which the server refuses, is sent as it is: nothing of it is remembered.
        """
        prunable, most = self._counts(sent)
        if not bool(values_S.isfinite().all()):
            return Thinned(values_S, None)
        if most >= prunable and sent.client not in self.residual:
            return Thinned(values_S, None)
        index_S = sent.ranking.support(sent.rung)
        is_prunable_S = self._is_prunable_D.to(index_S.device)[index_S]
        base_S = sent.values_S if self._form == "replacement" else torch.zeros_like(values_S)
        owed_D = self.residual.pop(sent.client, None)
        if owed_D is None:
            owed_D = torch.zeros(self._layout.size, dtype=values_S.dtype, device=values_S.device)
        change_S = torch.where(is_prunable_S, values_S - base_S + owed_D[index_S], values_S - base_S)
        sent_S = ~is_prunable_S
        place_P = is_prunable_S.nonzero().squeeze(1)
        order_P = change_S[place_P].abs().sort(descending=True, stable=True).indices
        sent_S[place_P[order_P[: min(most, prunable)]]] = True
        owed_D[index_S] = change_S.masked_fill(sent_S, 0.0)
        if bool(owed_D.any()):
            self.residual[sent.client] = owed_D
        whole_S = torch.where(is_prunable_S, base_S + change_S, values_S)
        return Thinned(whole_S, None) if bool(sent_S.all()) else Thinned(whole_S[sent_S], sent_S)

    def _counts(self, sent: Dispatch) -> tuple[int, int]:
        """Prunable coordinates of the sub-model, and how many of them the client's link affords."""
        key = sent.ranking.digest, sent.rung
        if key not in self._known:
            held_D = sent.ranking.mask(sent.rung) & self._is_prunable_D.to(sent.ranking.rung_D.device)
            self._known[key] = int(torch.count_nonzero(held_D))
        self._known.move_to_end(key)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return self._known[key], int(self._densities[sent.client] * self._layout.prunable)


def _log2_choices(n: int, k: int) -> float:
    """log2 of the number of ways to choose k of n."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2.0)
