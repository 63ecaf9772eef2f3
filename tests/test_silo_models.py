"""Models between FedML's own silos: what one of them sends reaches the others through the merge alone."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import torch
from torch import nn

from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.kernels.layout import build_layout
from fedgmr_plugin.kernels.masks import rank, scores
from fedgmr_plugin.protocol.fedml_pickle import read_model
from fedgmr_plugin.runtimes.silos.pickles import PickledModels


class Tabled(nn.Module):
    """A weight that is tied, batch normalisation, and a table of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.out = nn.Linear(6, 2)
        self.register_buffer("table", torch.arange(3))


def test_integers_of_one_silo_do_not_reach_the_others() -> None:
    """They are not merged: an index out of range would end whoever is sent it."""
    with isolated_rng(1):
        model = Tabled()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    layout = build_layout(model)
    w_D = layout.gather(model)
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), [0.5, 1.0])
    models = PickledModels(model, layout)
    values_S = ranking.cut(w_D, 1)
    answer = OrderedDict((name, t + 1) for name, t in before.items())
    found_S = models.decode(pickle.dumps(answer), ranking, 0)
    assert torch.equal(found_S, ranking.cut(w_D + 1, 0))
    sent = read_model(models.encode(values_S, ranking, 1), models.expected)
    assert sent.keys() == before.keys()
    assert all(torch.equal(sent[name], before[name]) for name in before)
