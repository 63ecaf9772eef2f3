"""Defects of the method's published release that this implementation must not have (method page, section 10).

One test, or one group, for each of the fourteen. FedProx (in 7) and FIARSE's straight-through layer (9) are
baselines that this package does not have yet, so 7 is tested for every rule that exists; 9 has no test. That
nothing needs a GPU (13) is what running these tests on a CPU shows.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedgmr_plugin.engine
import fedgmr_plugin.kernels
from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.events import Dispatch, UploadArrived, WindowClosed
from fedgmr_plugin.engine.network import LogNormalLinks, VirtualNetwork
from fedgmr_plugin.engine.samples import Batch, BatchPlan, TensorSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.simulate import Simulation
from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.engine.workbench import Clients, Training, Workbench
from fedgmr_plugin.kernels import (
    GMRRules,
    MaskedUpdate,
    Observation,
    Ranking,
    build_layout,
    merge,
    rank,
    scores,
    staleness_weight,
)
from fedgmr_plugin.kernels import start as gmr_start
from fedgmr_plugin.kernels import step as gmr_step


def mlp() -> nn.Sequential:
    with isolated_rng(0):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def data(count: int, seed: int = 0) -> TensorSamples:
    generator = torch.Generator().manual_seed(seed)
    return TensorSamples(
        torch.randn(count, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    )


class World:
    """A server with dispatches out, and a run around it."""

    def __init__(self, densities: Sequence[float], windows: int = 20, **options: Any) -> None:
        self.model = options.pop("model", None) or mlp()
        self.layout = build_layout(self.model)
        n = len(densities)
        sizes = options.pop("sizes", (20,) * n)
        self.data: list[Any] = options.pop("samples", None) or [data(s, i) for i, s in enumerate(sizes)]
        self.trainer = options.pop("trainer", None) or BuiltinTrainer()
        self.test_batches = options.pop("test", lambda: [self.data[0].take(np.arange(5))])
        steps = options.pop("steps", 2)
        self.config = FedGMRConfig(densities=tuple(densities), **options)
        self.server = Server(
            self.config, Plan(0, windows, n, 5, (20,) * n), self.layout, self.layout.gather(self.model)
        )
        self.sent: list[Dispatch] = []
        self.log: list[dict[str, Any]] = []
        self.batch_plan = BatchPlan(5, steps, 1, True, 0)

    def start(self) -> World:
        self.sent += [e for e in self.server.start() if isinstance(e, Dispatch)]
        return self

    def arrive(self, dispatch: int, value: float, samples: int = 10) -> None:
        sent = self.sent[dispatch]
        values_S = torch.full_like(sent.values_S, value)
        assert self.server.handle(UploadArrived(dispatch, sent.client, values_S, samples, 0.0)) == []

    def close(self) -> None:
        effects = self.server.handle(WindowClosed(0.0, 0.0, 0.0))
        self.sent += [e for e in effects if isinstance(e, Dispatch)]

    def simulation(self) -> Simulation:
        n = len(self.data)
        clients = Clients(self.data.__getitem__, self.config.validation_fraction, 0, n)
        densities = self.config.initial_densities(n)
        network = VirtualNetwork(self.config, densities, 37.2, LogNormalLinks(self.config, densities, 0))
        training = Training(self.trainer, self.batch_plan, 0.1)
        return Simulation(
            self.server,
            network,
            Workbench(self.config, self.layout, self.model, clients, training),
            self.test_batches,
            self.log.append,
        )


# -- 1 to 4: what is merged ------------------------------------------------------------------------


def test_01_the_buffer_is_used() -> None:
    """Defect 1: the release's buffer is never used."""
    world = World((1.0, 1.0), update_scope="buffer", update_form="replacement", staleness="constant").start()
    world.arrive(0, 2.0)
    world.arrive(1, 4.0)
    world.close()
    world.arrive(2, 8.0)  # client 0 alone: client 1's last upload still counts
    world.close()
    assert world.server.w_D.tolist() == [6.0] * world.layout.size


def test_02_staleness_goes_with_its_client_when_others_are_absent() -> None:
    """Defect 2: staleness coefficients go to the wrong clients when some are absent."""
    world = World((1.0, 1.0, 1.0), update_form="replacement").start()
    for _ in range(3):  # client 0 comes every window, 1 and 2 stay out
        world.arrive(next(s.dispatch for s in reversed(world.sent) if s.client == 0), 0.0)
        world.close()
    world.arrive(2, 8.0)  # client 2, three windows late; client 1 absent
    world.arrive(world.sent[-1].dispatch, 0.0)
    world.close()
    late = staleness_weight("polynomial", 3)
    assert world.server.w_D.tolist() == pytest.approx([8.0 * late / (late + 1.0)] * world.layout.size)


def test_03_the_weight_change_score_is_not_the_magnitude() -> None:
    """Defect 3: the release's `wg` score is always |w|."""
    layout = build_layout(mlp())
    w_D = torch.linspace(1.0, 2.0, layout.size)
    change_D = torch.linspace(2.0, 0.0, layout.size)
    kept = {
        score: rank(layout, w_D, scores(score, layout, w_D, change_D=change_D), [0.25]).mask(0)
        for score in ("magnitude", "weight_change")
    }
    weight = layout.by_name["0.weight"].slice
    assert kept["magnitude"][weight][-6:].all() and not kept["magnitude"][weight][:12].any()
    assert not torch.equal(kept["magnitude"], kept["weight_change"])
    assert torch.equal(
        scores("weight_change", layout, w_D, change_D=change_D), (w_D * change_D).abs()[weight]
    )


def test_04_masks_are_what_was_sent_and_not_what_is_nonzero() -> None:
    """Defect 4: an active weight that is exactly 0 is dropped, and a restored 0 stays dropped."""
    ranking = Ranking((0.5, 1.0), torch.tensor([0, 1], dtype=torch.int16))
    updates = [
        MaskedUpdate(ranking, 1, torch.tensor([0.0, 2.0]), 1.0),  # trained to exactly 0
        MaskedUpdate(ranking, 0, torch.tensor([6.0]), 1.0),
    ]
    assert merge(torch.tensor([4.0, 4.0]), ranking, updates, form="replacement").w_D.tolist() == [3.0, 2.0]
    world = World((1.0, 0.5)).start()
    world.server.put(torch.zeros(world.layout.size), world.server.ranking)
    for sent in world.sent:
        assert len(sent.values_S) == sent.ranking.ends[sent.rung]  # zeros are sent all the same
    world.arrive(1, 1.0)
    world.close()
    held = world.sent[1].ranking.mask(world.sent[1].rung)
    assert (world.server.w_D[held] == 1.0).all() and (world.server.w_D[~held] == 0.0).all()


# -- 5 and 6: the client's step --------------------------------------------------------------------


def moved(trainer: BuiltinTrainer, rate: float) -> tuple[Tensor, Tensor]:
    model = mlp()
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    data_ = data(5)
    trainer.train(model, [(data_.x, data_.y)], None, learning_rate=rate, client=0)
    return before, torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_05_clipping_runs_after_backward() -> None:
    """Defect 5: clipping before backward does nothing."""
    before, free = moved(BuiltinTrainer(), 1.0)
    _, clipped = moved(BuiltinTrainer(gradient_clip=0.01), 1.0)
    assert float((free - before).norm()) > 0.1
    assert float((clipped - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_06_weight_decay_is_proportional_to_the_weight() -> None:
    """Defect 6: the release adds the constant wd instead of wd * w."""
    before, plain = moved(BuiltinTrainer(), 0.1)
    _, decayed = moved(BuiltinTrainer(weight_decay=0.5), 0.1)
    assert torch.allclose(decayed - plain, -0.1 * 0.5 * before, atol=1e-7)


# -- 7 to 9: methods and data sets -----------------------------------------------------------------


class Conv2(nn.Module):
    """The shape of the paper's FEMNIST model, narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 2, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2, 3, 5, padding=2),
            nn.MaxPool2d(4),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 62))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def digits(seed: int) -> TensorSamples:
    generator = torch.Generator().manual_seed(seed)
    return TensorSamples(
        torch.rand(12, 1, 28, 28, generator=generator), torch.randint(0, 62, (12,), generator=generator)
    )


METHODS: list[dict[str, Any]] = [
    {"aggregation": "mask_aware", "update_form": "replacement"},
    {"aggregation": "global_average", "update_form": "replacement"},
    {"aggregation": "plain_average", "update_form": "replacement"},
    {"aggregation": "mask_aware", "update_scope": "buffer", "update_form": "replacement"},
    {"aggregation": "mask_aware", "mixing": True, "staleness": "hinge"},
    {"score": "weight_change", "trigger": "time"},
    {"score": "random", "trigger": "gradient"},
    {"schedule": "sync", "dense_start": True, "trigger": "none"},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_07_every_method_runs_on_62_classes_of_images_with_one_hot_bce(options: dict[str, Any]) -> None:
    """Defect 7: on FEMNIST every method but FedGMR crashes."""
    with isolated_rng(0):
        model = Conv2()
    world = World(
        (1.0, 0.5, 0.1), windows=3, interval=1, steps=1, model=model, samples=[digits(i) for i in range(3)],
        trainer=BuiltinTrainer(loss="bce"), **options,
    )  # fmt: skip
    end = world.simulation().run()
    assert end["windows"] == 3 and torch.isfinite(world.server.w_D).all()
    assert [r["window"] for r in world.log if r["type"] == "evaluation"]


def test_08_one_client_at_a_time_is_aggregated() -> None:
    """Defect 8: FedAsync never aggregates one client at a time. Mixing moves w by the one client's share."""
    world = World((1.0, 1.0, 1.0, 1.0), update_form="replacement", mixing=True).start()
    w_D = world.server.w_D.clone()
    for dispatch in (2, 0):
        world.arrive(dispatch, 1.0)
        world.close()
        w_D = 0.25 * 1.0 + 0.75 * w_D
        assert torch.allclose(world.server.w_D, w_D, atol=1e-6)


# -- 10 to 12: triggers and weights ----------------------------------------------------------------


def test_10_counters_start_again_when_a_trigger_fires() -> None:
    """Defect 10: counters are not reset, so the next check fires at once."""
    rules = GMRRules(patience=3)
    state = gmr_start(rules, (0.05,))
    fired = []
    for check in range(1, 15):
        state, done = gmr_step(rules, state, Observation(0.0, None, (0.5,)))
        fired += [check] * len(done)
    assert fired == [4, 4 + 6 + 3]  # patience, then the cool-down and patience again


def test_11_triggers_do_not_look_at_the_test_set() -> None:
    """Defect 11: plateaus are found on test data. Here it may be anything."""
    histories = []
    for labels in (0, 1):

        def test_set(label: int = labels) -> Iterator[Batch]:
            yield data(30, 7).x, torch.full((30,), label)

        world = World(
            (1.0, 0.2, 0.05), windows=25, interval=2, patience=1, test=test_set, evaluate="validation"
        )
        world.simulation().run()
        evaluations = [r["accuracy"] for r in world.log if r["type"] == "evaluation"]
        restorations = [r for r in world.log if r["type"] == "restoration"]
        histories.append((evaluations, restorations, world.server.w_D.tolist(), world.server.candidate))
    assert histories[0][1] and histories[0][1:] == histories[1][1:]
    assert histories[0][0] != histories[1][0]


def test_12_uploads_weigh_as_many_samples_as_they_saw() -> None:
    """Defect 12: aggregation weights ignore the amount of data."""
    world = World((1.0, 1.0), update_form="replacement").start()
    world.arrive(0, 1.0, samples=30)
    world.arrive(1, 5.0, samples=10)
    world.close()
    assert world.server.w_D.tolist() == pytest.approx([2.0] * world.layout.size)


# -- 13 and 14: cost and causality -----------------------------------------------------------------


def test_13_no_deep_copies_and_no_lists_of_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect 13: GPU only, ten deep copies of the model a window, masks as Python index lists."""

    def refuse(*_args: Any, **_keywords: Any) -> None:
        raise AssertionError("the engine deep-copied something")

    world = World((1.0, 0.5, 0.05), windows=5, interval=2, trigger="time")
    simulation = world.simulation()
    monkeypatch.setattr(copy, "deepcopy", refuse)
    simulation.run()
    for package in (fedgmr_plugin.kernels, fedgmr_plugin.engine):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            assert not hasattr(importlib.import_module(found.name), "deepcopy"), found.name
    ranking = world.server.ranking
    assert isinstance(ranking.rung_D, Tensor) and ranking.rung_D.element_size() == 2
    assert ranking.rung_D.device.type == "cpu" and isinstance(ranking.support(0), Tensor)


def test_13_memory_of_a_window_does_not_grow_with_the_clients_that_share_a_sub_model() -> None:
    """Clients of one density share one payload; masks are cut from one ranking."""
    world = World((1.0, 0.05, 0.05, 0.05, 0.05)).start()
    payloads = {s.values_S.data_ptr() for s in world.sent}
    assert len(payloads) == 2 and len({id(s.ranking) for s in world.sent}) == 1


def test_14_an_upload_that_misses_the_close_is_merged_once_when_it_has_arrived() -> None:
    """Defect 14: it is merged at once all the same, and again when it really arrives."""
    world = World(
        (1.0, 0.05), windows=30, interval=1, trigger="time", time_fractions=(0.1,), time_floors=(1.0,)
    )
    world.simulation().run()
    arrivals = [r for r in world.log if r["type"] == "arrival"]
    sent = {r["dispatch"]: r for r in world.log if r["type"] == "dispatch"}
    windows = {r["window"]: r for r in world.log if r["type"] == "window"}
    assert len({a["dispatch"] for a in arrivals}) == len(arrivals)
    late = [a for a in arrivals if a["staleness"] > 0]
    assert late and all(
        windows[a["window"] - 1]["close"] < a["time"] <= windows[a["window"]]["close"] for a in late
    )
    slow = [a for a in arrivals if a["client"] == 1 and a["density"] == 1.0]
    assert len(slow) == 1 and slow[0]["staleness"] >= 12  # 14.7 windows at the mean rates
    assert slow[0]["time"] - sent[slow[0]["dispatch"]]["time"] > 37.2 * (1 / 1.5 + 1 / 0.375)


def test_the_learning_rate_can_warm_up() -> None:
    """With BCE and a rate of .25 the release stays at chance for its first 460 virtual seconds."""
    world = World((1.0,), warmup_windows=10).start()
    scales = [world.sent[0].learning_rate_scale]
    for _ in range(11):
        world.arrive(len(world.sent) - 1, 0.0)
        world.close()
        scales.append(world.sent[-1].learning_rate_scale)
    assert scales == pytest.approx([0.1 * (i + 1) for i in range(10)] + [1.0, 1.0])
