"""Models between FedML's own silos: buffers, integers, and what a window makes of what they sent."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.events import WindowClosed
from fedgmr_plugin.engine.samples import BatchPlan, TensorSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.kernels.layout import ModelLayout, build_layout
from fedgmr_plugin.kernels.masks import rank, scores
from fedgmr_plugin.protocol.fedml_pickle import read_model
from fedgmr_plugin.runtimes.devices import field as field_module
from fedgmr_plugin.runtimes.devices.field import Field, Problem
from fedgmr_plugin.runtimes.devices.loopback import Loopback
from fedgmr_plugin.runtimes.devices.plain import PlainOffice
from fedgmr_plugin.runtimes.silos.pickles import PickledModels


class Tabled(nn.Module):
    """A weight that is tied, batch normalisation, and a table of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.out = nn.Linear(6, 2)
        self.register_buffer("table", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        """Scores [n, 2]."""
        hidden = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.out(hidden)  # type: ignore[no-any-return]


def tabled() -> Tabled:
    with isolated_rng(1):
        return Tabled()


def samples(client: int) -> TensorSamples:
    x = 3.0 + 2.0 * torch.randn(20 + 10 * client, 6, generator=torch.Generator().manual_seed(client))
    return TensorSamples(x, (x.sum(1) > 18).long())


PROBLEM = Problem(tabled, samples, samples(9), samples(8), BatchPlan(8, 2, 1, True, 3), 0.1)


def test_integers_of_one_silo_do_not_reach_the_others() -> None:
    """They are not merged: an index out of range would end whoever is sent it."""
    model = tabled()
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


def trained(content: bytearray, *rest: Any, samples: TensorSamples, **named: Any) -> bytes:
    """As FedML's trainer: every weight, in training mode."""
    model = tabled()
    expected = PickledModels(model, build_layout(model)).expected
    model.load_state_dict(read_model(content, expected))
    x, y = samples.x, samples.y
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return pickle.dumps(model.state_dict())


class Watched(PlainOffice):
    """Holds each window's model against the mean of the files that came, coordinate by coordinate."""

    def __init__(self, *given: Any, codec: Any, **named: Any) -> None:
        super().__init__(*given, codec=codec, numbered=False, **named)
        self.merged = 0
        self._sent_D: dict[int, Tensor] = {}
        self._answers: dict[int, tuple[Tensor, Tensor, float]] = {}
        self._act, self.server.handle = self.server.handle, self._watched  # type: ignore[method-assign]

    def _send(self, sent: Any) -> tuple[float, float]:
        zero_D = torch.zeros(self.server.layout.size)
        self._sent_D[sent.dispatch] = sent.ranking.place(sent.values_S, zero_D)
        return super()._send(sent)

    def _got(self, client: int, dispatch: int, said: Any, content: Any) -> None:
        flight, layout = self.server.flights[dispatch], self.server.layout
        answer_D = layout.from_state_dict(pickle.loads(content), torch.zeros(layout.size))  # noqa: S301  (its own bytes)
        mask_D = flight.ranking.mask(flight.rung)
        weight = said.samples * (1.0 + self.server.version - flight.version) ** -0.6
        self._answers[dispatch] = answer_D, mask_D, weight
        super()._got(client, dispatch, said, content)

    def _watched(self, event: Any) -> Any:
        before_D, layout = self.server.w_D.clone().double(), self.server.layout
        effects = self._act(event)
        if isinstance(event, WindowClosed):
            self._check(before_D, layout)
        return effects

    def _check(self, before_D: Tensor, layout: ModelLayout) -> None:
        is_delta = self.server.config.update_form == "delta"
        total_D, weight_D = torch.zeros(2, layout.size, dtype=torch.float64)
        for dispatch, (answer_D, mask_D, weight) in self._answers.items():
            moved_D = (answer_D - (self._sent_D[dispatch] if is_delta else before_D)).double()
            moved_D[layout.parameters :] = (answer_D - before_D)[layout.parameters :]
            total_D += weight * mask_D * moved_D
            weight_D += weight * mask_D
        new_D = before_D + total_D / weight_D.where(weight_D > 0, torch.ones(()).double())
        torch.testing.assert_close(self.server.w_D.double(), new_D, rtol=1e-5, atol=1e-6)
        self.merged += len(self._answers)
        self._answers = {}


@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_a_window_is_the_mean_of_the_files_that_came(tmp_path: Path, form: Any) -> None:
    """With buffers, tied weights, densities that grow, and answers that are late."""
    config = FedGMRConfig(
        densities=(1.0, 0.5, 0.2),
        interval=2,
        trigger="time",
        update_form=form,
        window_slack=0.1,
        device_submodel="masked",
        device_authentication="off",
    )
    with mock.patch.multiple(
        field_module,
        codec_of=lambda config, model, layout, shape: PickledModels(model, layout),
        PlainOffice=Watched,
        train_file=trained,
    ):
        field = Field(PROBLEM, config, tmp_path, 3, 12, Loopback(0), rate=100.0)
        field.seconds = lambda n: (0.5, 0.8, 2.0)[n]
        field.begin()
        for n in range(3):
            field.plain_device(n, repeats=False)
        field.run()
    office: Any = field.office
    assert office.merged == len(field.records("arrival")) > 12
    assert max(r["staleness"] for r in field.records("arrival")) > 0
    assert field.records("restoration")
    assert all(r["loss"] is not None and r["loss"] < 10 for r in field.records("evaluation"))
