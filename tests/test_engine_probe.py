"""Loss and gradients on the probe set, against gradients taken by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.network import LogNormalLinks, VirtualNetwork
from fedgmr_plugin.engine.probe import Probe, ProbeSet, probe_set
from fedgmr_plugin.engine.samples import Batch, BatchPlan, TensorSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.simulate import Simulation
from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.engine.workbench import Clients, Training, Workbench
from fedgmr_plugin.kernels import build_layout
from fedgmr_plugin.protocol.schema import problems


def model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Batch norm and dropout: a gradient in training mode would be another one."""
    with isolated_rng(0):
        return nn.Sequential(
            nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 6), nn.Linear(6, 3)
        ).to(dtype)


def data(count: int, seed: int, dtype: torch.dtype = torch.float64) -> TensorSamples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator).to(dtype)
    return TensorSamples(x, torch.randint(0, 3, (count,), generator=generator))


def by_hand(net: nn.Module, batch: Batch) -> tuple[float, Tensor]:
    net.eval()
    loss = F.cross_entropy(net(batch[0]), batch[1])
    grads = torch.autograd.grad(loss, list(net.parameters()))
    return float(loss.detach()), torch.cat([g.reshape(-1) for g in grads]).double()


def mean_by_hand(net: nn.Module, parts: tuple[Batch, ...]) -> tuple[float, Tensor]:
    found = [by_hand(net, p) for p in parts]
    return sum(f[0] for f in found) / len(found), torch.stack([f[1] for f in found]).mean(0)


# -- the probe set ---------------------------------------------------------------------------------


def rows(batch: Batch) -> set[tuple[float, ...]]:
    return {tuple(x) for x in batch[0].tolist()}


def test_the_probe_set_is_a_fixed_sample_with_disjoint_pairs() -> None:
    clients = [data(40, 0), data(9, 1), data(1, 2)]
    found = probe_set(clients, 5, 16, 6)
    assert [len(p[1]) for p in found.parts] == [16, 9, 1]
    for own, part, pair in zip(clients, found.parts, found.pairs, strict=True):
        everything = rows((own.x, own.y))
        assert rows(part) <= everything and len(rows(part)) == len(part[1])
        if pair is None:
            assert len(own) == 1
            continue
        first, second = map(rows, pair)
        assert len(first) == len(second) == min(6, len(own) // 2) and not first & second
    again, other = probe_set(clients, 5, 16, 6), probe_set(clients, 6, 16, 6)
    assert torch.equal(again.parts[0][0], found.parts[0][0])
    assert not torch.equal(other.parts[0][0], found.parts[0][0])


# -- gradients -------------------------------------------------------------------------------------


def probe() -> tuple[Probe, ProbeSet, nn.Module, Tensor]:
    net = model()
    layout = build_layout(net)
    found = probe_set([data(30, n) for n in range(3)], 0, 12, 4)
    return Probe(net, layout, BuiltinTrainer(), found), found, model(), layout.gather(net)


def test_loss_and_gradient_are_means_over_clients_in_evaluation_mode() -> None:
    measured, found, net, w_D = probe()
    loss, grad_P = mean_by_hand(net, found.parts)
    here = measured.gradient(w_D)
    assert here.loss == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(here.grad_P.double(), grad_P, rtol=1e-10, atol=1e-12)
    assert len(here.grad_P) == build_layout(net).parameters


def test_a_gradient_equals_a_difference_quotient() -> None:
    measured, _, _, w_D = probe()
    here = measured.gradient(w_D)
    direction_D = torch.zeros_like(w_D)
    direction_D[: len(here.grad_P)] = torch.randn(
        len(here.grad_P), dtype=w_D.dtype, generator=torch.Generator().manual_seed(1)
    )
    h = 1e-5
    quotient = (
        measured.gradient(w_D + h * direction_D).loss - measured.gradient(w_D - h * direction_D).loss
    ) / (2 * h)
    assert quotient == pytest.approx(float(here.grad_P @ direction_D[: len(here.grad_P)]), rel=1e-6)


def test_the_record_holds_what_it_says() -> None:
    measured, found, net, w_D = probe()
    layout = build_layout(net)
    step_D = (
        0.05 * torch.randn(layout.size, dtype=w_D.dtype, generator=torch.Generator().manual_seed(2)).abs()
    )
    uncovered_P = torch.rand(layout.parameters, generator=torch.Generator().manual_seed(3)) < 0.3
    loss, grad_P = mean_by_hand(net, found.parts)
    clients = [by_hand(net, p)[1] for p in found.parts]
    pairs = [[by_hand(net, b)[1] for b in pair] for pair in found.pairs if pair is not None]
    layout.scatter(net, w_D + step_D)
    loss_next, grad_next_P = mean_by_hand(net, found.parts)
    step_P = step_D[: layout.parameters]

    here, fields = measured.before(w_D, uncovered_P)
    fields |= measured.after(here, step_P, w_D + step_D)
    wanted: dict[str, Any] = {
        "loss": loss,
        "loss_next": loss_next,
        "grad_sq": float(grad_P @ grad_P),
        "grad_next_sq": float(grad_next_P @ grad_next_P),
        "grad_dot_step": float(grad_P @ step_P),
        "grad_change_sq": float((grad_next_P - grad_P).square().sum()),
        "step_sq": float(step_P @ step_P),
        "grad_uncovered_sq": float(grad_P[uncovered_P].square().sum()),
        "client_grad_sq": [float(g @ g) for g in clients],
        "client_gap_sq": [float((g - grad_P).square().sum()) for g in clients],
        "noise_sq": float(np.mean([0.5 * float((a - b).square().sum()) for a, b in pairs])),
    }
    assert set(fields) == set(wanted)
    for key, value in wanted.items():
        assert fields[key] == pytest.approx(value, rel=1e-8), key
    assert problems({"type": "probe", "window": 0, **fields}) == []


def test_clients_gaps_satisfy_the_variance_identity() -> None:
    """(1/N) sum ||g_n - g||^2 = (1/N) sum ||g_n||^2 - ||g||^2."""
    measured, found, _, w_D = probe()
    _, fields = measured.before(w_D, torch.zeros(build_layout(model()).parameters, dtype=torch.bool))
    n = len(found.parts)
    assert sum(fields["client_gap_sq"]) / n == pytest.approx(
        sum(fields["client_grad_sq"]) / n - fields["grad_sq"], rel=1e-8
    )


def test_measuring_leaves_no_gradients_and_does_not_change_w() -> None:
    measured, _, _, w_D = probe()
    before = w_D.clone()
    measured.gradient(w_D)
    assert torch.equal(w_D, before)
    assert all(p.grad is None for p in measured._model.parameters())


# -- within a run ----------------------------------------------------------------------------------


class World:
    def __init__(self, windows: int = 6, **options: Any) -> None:
        self.config = FedGMRConfig(
            densities=(1.0, 0.5, 0.2), probe=True, interval=3, probe_samples=8, **options
        )
        self.model = model()
        self.layout = build_layout(self.model)
        samples = [data(30, n) for n in range(3)]
        clients = Clients(samples.__getitem__, 0.1, 0, 3)
        self.server = Server(
            self.config, Plan(0, windows, 3, 100, (27,) * 3), self.layout, self.layout.gather(self.model)
        )
        densities = (1.0, 0.5, 0.2)
        network = VirtualNetwork(self.config, densities, 10.0, LogNormalLinks(self.config, densities, 0))
        self.log: list[dict[str, Any]] = []
        self.vectors: list[Tensor] = []
        training = Training(BuiltinTrainer(), BatchPlan(4, 2, 1, True, 0), 0.1)
        self.simulation = Simulation(
            self.server,
            network,
            Workbench(self.config, self.layout, self.model, clients, training),
            lambda: [data(5, 9).take(np.arange(5))],
            self.record,
        )
        self.parts = probe_set([clients.train(n) for n in range(3)], 0, 8, 4).parts

    def record(self, fields: dict[str, Any]) -> None:
        self.log.append(fields)
        if fields["type"] == "window":
            self.vectors.append(self.server.w_D.clone())

    def run(self) -> list[dict[str, Any]]:
        self.vectors.append(self.server.w_D.clone())
        self.simulation.run()
        return [r for r in self.log if r["type"] == "probe"]


@pytest.mark.parametrize(("interval", "expected"), [(None, [0, 3]), (1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4])])
def test_probes_come_at_their_interval_after_their_window(interval: int | None, expected: list[int]) -> None:
    world = World(probe_interval=interval)
    assert [r["window"] for r in world.run()] == expected
    for i, r in enumerate(world.log):
        if r["type"] == "probe":
            assert world.log[i - 1]["type"] == "window" and world.log[i - 1]["window"] == r["window"]


def test_a_runs_probes_are_gradients_at_its_own_vectors() -> None:
    world = World(probe_interval=1, trigger="time", time_fractions=(0.3,), time_floors=(1.0,), min_updates=1)
    net = model()
    for r in world.run():
        t = r["window"]
        losses, grads = [], []
        for w_D in world.vectors[t : t + 2]:
            world.layout.scatter(net, w_D)
            loss, grad_P = mean_by_hand(net, world.parts)
            losses.append(loss)
            grads.append(grad_P)
        step_P = (world.vectors[t + 1] - world.vectors[t])[: world.layout.parameters]
        assert (r["loss"], r["loss_next"]) == (pytest.approx(losses[0]), pytest.approx(losses[1]))
        assert r["grad_sq"] == pytest.approx(float(grads[0] @ grads[0]))
        assert r["grad_next_sq"] == pytest.approx(float(grads[1] @ grads[1]))
        assert r["grad_dot_step"] == pytest.approx(float(grads[0] @ step_P))
        window = next(w for w in world.log if w["type"] == "window" and w["window"] == t)
        assert r["step_sq"] == pytest.approx(window["step_sq"])


@pytest.mark.parametrize("scope", ["arrivals", "buffer"])
def test_the_gradient_on_uncovered_coordinates_is_that_of_what_did_not_move(scope: str) -> None:
    """The dense client is lost for a while: then some coordinates are held by nobody."""
    options: dict[str, Any] = {"update_scope": scope, "update_form": "replacement"}
    world = World(windows=4, probe_interval=1, **options)
    simulation = world.simulation
    world.vectors.append(world.server.w_D.clone())
    simulation.start()
    simulation.network.drop(0)
    simulation.pending.pop(0)
    net = model()
    for _ in range(3):
        before_D = world.server.w_D.clone()
        simulation.step()
        (window,) = [r for r in world.log if r["type"] == "window"][-1:]
        (found,) = [r for r in world.log if r["type"] == "probe"][-1:]
        world.layout.scatter(net, before_D)
        _, grad_P = mean_by_hand(net, world.parts)
        ranking = world.server.ranking
        held_P = ranking.mask(ranking.rung(0.5))[: world.layout.parameters]
        assert window["uncovered"] == int((~held_P).sum()) > 0
        assert found["grad_uncovered_sq"] == pytest.approx(float(grad_P[~held_P].square().sum()))
        if world.server.phase != "collecting" or world.server.version == 2:
            break


def test_a_window_whose_uploads_are_all_refused_covers_nothing_even_with_a_buffer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The buffer is not merged again then, so the whole gradient is on uncovered coordinates."""
    train = Workbench.train

    def unusable_later(bench: Workbench, sent: Dispatch) -> LocalUpdate:
        update = train(bench, sent)
        return update._replace(stats=update.stats._replace(samples=0)) if sent.version else update

    monkeypatch.setattr(Workbench, "train", unusable_later)
    world = World(windows=3, probe_interval=1, update_scope="buffer", update_form="replacement")
    probes = world.run()
    windows = [r for r in world.log if r["type"] == "window"]
    assert [w["arrivals"] for w in windows] == [3, 0, 0]
    assert windows[1]["uncovered"] == world.layout.parameters
    assert probes[0]["grad_uncovered_sq"] == 0.0
    assert probes[1]["grad_uncovered_sq"] == pytest.approx(probes[1]["grad_sq"])


def test_probing_does_not_change_the_run() -> None:
    plain, probed = World(), World(probe_interval=1)
    plain.config = plain.server.config
    plain.simulation._probing = None
    plain.run()
    probed.run()
    assert torch.equal(plain.server.w_D, probed.server.w_D)
