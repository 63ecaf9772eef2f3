"""Updates of which only a part counts, such as the rows of a last layer whose classes a client knows.

Legend: D coordinates, S support of an update, C classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fedgmr_plugin.engine.samples import Samples, in_batches
from fedgmr_plugin.kernels.aggregate import MaskedUpdate
from fedgmr_plugin.kernels.layout import ModelLayout
from fedgmr_plugin.kernels.masks import Ranking

#: bool [D], what of a client's uploads may count besides its sub-model; None for all of it.
Shares = Callable[[int], Tensor | None]
#: Rankings that are remembered: each costs six bytes a coordinate.
_MOST = 64


class Restricted:
    """Cuts updates down to what counts of them; None for `shares` leaves every one as it is."""

    def __init__(self, shares: Shares | None) -> None:
        self._shares = shares
        self._known: OrderedDict[tuple[str, int], Ranking] = OrderedDict()
        # By what an upload names, as long as somebody keeps that: those of a buffer come with every merge.
        self._named: MutableMapping[Tensor, Ranking] = WeakIdKeyDictionary()

    def __call__(self, client: int, update: MaskedUpdate, sent_S: Tensor | None = None) -> MaskedUpdate:
        """The part of a client's update that counts: none of its rungs holds the other coordinates.

        Args:
            sent_S: bool [S], which coordinates `update` has the values of; None for all. One tensor is of one
                upload, and not changed.
        """
        if sent_S is not None:
            if sent_S not in self._named:
                self._named[sent_S] = _ranking_of(update, sent_S)
            update = update._replace(ranking=self._named[sent_S])
        share_D = None if self._shares is None else self._shares(client)
        if share_D is None:
            return update
        ranking = self._ranking(client, update.ranking, share_D)
        is_kept_S = share_D.to(update.values_S.device)[update.index_S]
        return update._replace(ranking=ranking, values_S=update.values_S[is_kept_S])

    def _ranking(self, client: int, ranking: Ranking, share_D: Tensor) -> Ranking:
        key = ranking.digest, client
        if key not in self._known:
            nobody = torch.full_like(ranking.rung_D, len(ranking.densities))
            rung_D = torch.where(share_D.to(ranking.rung_D.device), ranking.rung_D, nobody)
            self._known[key] = Ranking(ranking.densities, rung_D)
        self._known.move_to_end(key)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return self._known[key]


def _ranking_of(update: MaskedUpdate, sent_S: Tensor) -> Ranking:
    """The ranking of an update that has none of the coordinates but `sent_S`."""
    ranking = update.ranking
    rung_D = torch.full_like(ranking.rung_D, len(ranking.densities))
    held_D = update.index_S[sent_S]
    rung_D[held_D] = ranking.rung_D[held_D]
    return Ranking(ranking.densities, rung_D)


def known_classes(samples: Samples, classes: int) -> Tensor:
    """bool [C]: which of `classes` labels occur in `samples`; all samples are read.

    Targets below 0, such as a text's filling, are no labels.
    """
    is_known_C = torch.zeros(classes, dtype=torch.bool)
    for _, y in in_batches(samples, 512):
        is_known_C[y[y >= 0].long().unique()] = True
    return is_known_C


def rows_of(layout: ModelLayout, layer: str, is_known_C: Tensor) -> Tensor:
    """bool [D]: everything but the rows (weights and biases) of other classes in the last linear layer.

    Args:
        layer: its name in the model; its outputs are the classes.
        is_known_C: the classes that count.
    """
    share_D = torch.ones(layout.size, dtype=torch.bool)
    for entry in layout.entries:
        if entry.name.rpartition(".")[0] == layer:
            share_D[entry.slice].view(entry.shape)[~is_known_C] = False
    return share_D
