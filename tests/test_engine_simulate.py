"""Whole runs on the virtual clock: FedAvg as a special case, determinism, causality, budgets, the run log."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.course import model_sha256
from fedgmr_plugin.engine.events import Dispatch, UploadArrived
from fedgmr_plugin.engine.network import LogNormalLinks, VirtualNetwork
from fedgmr_plugin.engine.samples import Batch, BatchPlan, TensorSamples
from fedgmr_plugin.engine.seeds import derive, isolated_rng
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.simulate import InTurn, Simulation
from fedgmr_plugin.engine.snapshot import Snapshot, restore, snapshot
from fedgmr_plugin.engine.trainer import BuiltinTrainer, LocalStats, Metrics
from fedgmr_plugin.engine.workbench import Clients, Training, Workbench
from fedgmr_plugin.errors import WireError
from fedgmr_plugin.kernels import ModelLayout, build_layout
from fedgmr_plugin.kernels.cost import window_seconds
from fedgmr_plugin.protocol.runlog import encode
from fedgmr_plugin.protocol.schema import RECORDS, problems

SIZES = (40, 30, 20, 50, 25, 35, 45, 15, 60, 30)


def data(count: int, seed: int) -> TensorSamples:
    """Points of three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return TensorSamples(x, (x[:, 0] > 0).long() + (x[:, 0] + x[:, 1] > 1.0).long())


def mlp() -> nn.Sequential:
    with isolated_rng(0):
        return nn.Sequential(
            nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
        )


def dropping() -> nn.Sequential:
    with isolated_rng(0):
        return nn.Sequential(
            nn.Linear(6, 12), nn.Dropout(0.5), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
        )


class World:
    """Everything of one run, made anew."""

    def __init__(
        self,
        densities: Sequence[float] = (1.0, 0.5, 0.1),
        *,
        windows: int = 8,
        in_flight: int | None = None,
        test_interval: int = 3,
        seed: int = 0,
        model: nn.Module | None = None,
        trainer: Any = None,
        executor: Any = None,
        megabytes: float = 37.2,
        rate: float = 0.1,
        steps: int | None = 2,
        samples: Any = None,
        test: Any = None,
        **options: Any,
    ) -> None:
        n = len(densities)
        self.config = FedGMRConfig(densities=tuple(densities), **{"interval": 3, **options})
        self.model = model or mlp()
        self.layout: ModelLayout = build_layout(self.model)
        self.data = samples or [data(SIZES[i % 10], i) for i in range(n)]
        self.clients = Clients(self.data.__getitem__, self.config.validation_fraction, seed, n)
        held = tuple(len(self.clients.train(i)) for i in range(n))
        plan = Plan(seed, windows, in_flight or n, test_interval, held)
        self.plan = plan
        self.server = Server(self.config, plan, self.layout, self.layout.gather(self.model))
        self.network = VirtualNetwork(
            self.config, densities, megabytes, LogNormalLinks(self.config, densities, seed)
        )
        self.batch_plan = BatchPlan(5, steps, 1, True, seed)
        self.trainer = trainer or BuiltinTrainer(momentum=0.5, weight_decay=0.01)
        self.log: list[dict[str, Any]] = []
        self.test_set = data(50, 99)
        self.simulation = Simulation(
            self.server,
            self.network,
            Workbench(
                self.config,
                self.layout,
                self.model,
                self.clients,
                Training(self.trainer, self.batch_plan, rate),
            ),
            test or (lambda: [self.test_set.take(np.arange(50))]),
            self.log.append,
            executor(self) if executor else None,
        )

    def run(self) -> dict[str, Any]:
        return self.simulation.run()

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in self.log if r["type"] == kind]


def plain_sgd(
    model: nn.Module, batches: Iterable[Batch], rate: float, momentum: float = 0.5, decay: float = 0.01
) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def floats(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items() if t.is_floating_point()}


# -- FedAvg is a special case ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_full_client_without_delay_is_plain_sgd_bit_for_bit(dtype: torch.dtype) -> None:
    """Replacement form, batch norm and momentum included: the merge must add no rounding of its own."""
    samples = [TensorSamples(data(40, 0).x.to(dtype), data(40, 0).y)]
    test = [(data(9, 1).x.to(dtype), data(9, 1).y)]
    world = World(
        (1.0,),
        update_form="replacement",
        model=mlp().to(dtype),
        samples=samples,
        windows=6,
        test=lambda: test,
    )
    model = mlp().to(dtype)
    train = world.clients.train(0)
    for round_index in range(6):
        batches = [train.take(i) for i in world.batch_plan.batches(0, len(train), round_index)]
        plain_sgd(model, batches, 0.1)
    end = world.run()
    assert torch.equal(world.layout.gather(model), world.server.w_D)
    assert end["model_sha256"] == model_sha256(world.layout.gather(model))
    assert all(a["staleness"] == 0 for a in world.records("arrival"))


@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_full_densities_and_sync_are_fedavg_on_the_same_batches(form: str) -> None:
    world = World(
        (1.0,) * 4,
        schedule="sync",
        update_form=form,
        windows=5,
        model=mlp().double(),
        samples=doubles(4),
        test=list,
    )
    world.run()
    model = mlp().double()
    state = floats(model)
    for round_index in range(5):
        total, mean = 0, {n: torch.zeros_like(t) for n, t in state.items()}
        for client in range(4):
            model.load_state_dict(state, strict=False)
            train = world.clients.train(client)
            batches = [train.take(i) for i in world.batch_plan.batches(client, len(train), round_index)]
            plain_sgd(model, batches, 0.1)
            weight = sum(len(y) for _, y in batches)
            total += weight
            for name, tensor in floats(model).items():
                mean[name] += weight * tensor
        state = {n: t / total for n, t in mean.items()}
    model.load_state_dict(state, strict=False)
    assert torch.allclose(world.layout.gather(model), world.server.w_D, rtol=1e-10, atol=1e-12)


def doubles(count: int) -> list[TensorSamples]:
    return [TensorSamples(d.x.double(), d.y) for d in (data(SIZES[i], i) for i in range(count))]


def test_training_learns() -> None:
    world = World((1.0, 0.5, 0.1), windows=40, steps=5, test_interval=39, evaluate="global", rate=0.2)
    world.run()
    first, last = world.records("evaluation")
    assert last["loss"] < 0.7 * first["loss"] and last["accuracy"] > first["accuracy"] + 0.1


# -- determinism -----------------------------------------------------------------------------------


def global_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, tuple(keys), tuple(rest), tuple(torch.get_rng_state().tolist())


def test_equal_seeds_give_equal_bits_whatever_the_global_generators_hold() -> None:
    ends, logs = [], []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = global_state()
        world = World(model=dropping(), probe=True, probe_interval=2)
        ends.append(world.run())
        logs.append(world.log)
        assert global_state() == before
    assert ends[0] == ends[1] and logs[0] == logs[1]
    assert len(ends[0]["model_sha256"]) == 64
    assert World(model=dropping(), seed=1).run()["model_sha256"] != ends[0]["model_sha256"]


class Reversed:
    """An executor that trains in another order, each on a model of its own, as parallel workers would."""

    def __init__(self, world: World) -> None:
        self.world = world

    def begin(self, sent: Dispatch) -> None:
        pass

    def finish(self, sent: Sequence[Dispatch]) -> list[LocalUpdate]:
        done = {}
        for dispatch in reversed(sent):
            done[dispatch.dispatch] = self.world.simulation.bench.train(dispatch)
        return [done[d.dispatch] for d in sent]


def test_the_order_of_training_does_not_matter() -> None:
    first, second = World(model=dropping()), World(model=dropping(), executor=Reversed)
    assert first.run() == second.run() and first.log == second.log


class Counting(nn.Module):
    """Its output depends on a buffer that is not part of the vector: an integer or a non-persistent one."""

    def __init__(self, persistent: bool, in_place: bool) -> None:
        super().__init__()
        with isolated_rng(0):
            self.hidden, self.out = nn.Linear(6, 10), nn.Linear(10, 3)
        kind = torch.int64 if persistent else torch.float32
        self.register_buffer("steps", torch.zeros((), dtype=kind), persistent=persistent)
        self.in_place = in_place
        self.steps: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.in_place:
            self.steps.add_(1)
        elif self.training:
            self.steps = self.steps + 1
        return self.out(torch.tanh(self.hidden(x)) / (1.0 + 0.1 * self.steps))


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "replaced"])
@pytest.mark.parametrize("persistent", [True, False], ids=["integer", "non-persistent"])
def test_no_state_leaks_from_one_client_to_the_next(persistent: bool, in_place: bool) -> None:
    """What a dispatch returns depends on the dispatch, not on who trained on the scratch model before."""
    ends = [World(model=Counting(persistent, in_place), executor=e).run() for e in (None, Reversed)]
    assert ends[0]["model_sha256"] == ends[1]["model_sha256"]


def test_one_thread_and_two_give_the_same_bits() -> None:
    threads = torch.get_num_threads()
    shas = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            shas.append(World(model=dropping()).run()["model_sha256"])
    finally:
        torch.set_num_threads(threads)
    assert shas[0] == shas[1]


def test_the_sha_is_of_the_little_endian_bytes() -> None:
    import hashlib
    import struct

    w_D = torch.tensor([1.5, -2.25, 0.0])
    assert model_sha256(w_D) == hashlib.sha256(struct.pack("<3f", 1.5, -2.25, 0.0)).hexdigest()
    assert model_sha256(w_D.double()) == hashlib.sha256(struct.pack("<3d", 1.5, -2.25, 0.0)).hexdigest()


class Augmented:
    """Samples with a random transform that draws from the global generators, as torchvision's do."""

    def __init__(self, base: TensorSamples) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def take(self, index: np.ndarray) -> Batch:
        x, y = self.base.take(index)
        noise = torch.randn_like(x) + float(np.random.rand()) + random.random()
        return x + 0.1 * noise, y


def test_random_augmentation_draws_from_the_runs_own_seeds() -> None:
    def test_set() -> Iterator[Batch]:
        yield Augmented(data(20, 99)).take(np.arange(20))

    logs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        world = World(samples=[Augmented(data(40, i)) for i in range(3)], test=test_set, probe=True)
        before = global_state()
        world.run()
        assert global_state() == before
        logs.append(world.log)
    assert logs[0] == logs[1]


# -- causality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["arrivals", "buffer"])
def test_no_upload_is_merged_before_it_arrived_nor_twice(scope: str) -> None:
    form = "replacement" if scope == "buffer" else "delta"
    world = World((1.0, 0.5, 0.2, 0.1), windows=30, trigger="time", update_scope=scope, update_form=form)
    world.run()
    sent = {r["dispatch"]: r for r in world.records("dispatch")}
    windows = {r["window"]: r for r in world.records("window")}
    arrivals = world.records("arrival")
    assert len({a["dispatch"] for a in arrivals}) == len(arrivals)
    for a in arrivals:
        made, window = sent[a["dispatch"]], windows[a["window"]]
        assert (
            made["client"] == a["client"]
            and made["version"] == a["version"]
            and made["density"] == a["density"]
        )
        assert a["staleness"] == a["window"] - a["version"] >= 0
        assert made["time"] < a["time"] <= window["close"]
        if a["window"]:
            assert a["time"] > windows[a["window"] - 1]["close"]
            assert made["time"] <= window["start"]
    assert max(a["staleness"] for a in arrivals) >= 3  # restored clients are slower
    in_flight = len(sent) - len(arrivals)
    assert windows[29]["in_flight"] == in_flight - len([d for d in sent.values() if d["version"] == 30])


def test_a_client_waits_for_its_answer_before_the_next_dispatch() -> None:
    world = World((1.0, 0.5, 0.2, 0.1), windows=25, trigger="time")
    world.run()
    busy: set[int] = set()
    for r in world.log:
        if r["type"] == "dispatch":
            assert r["client"] not in busy
            busy.add(r["client"])
        elif r["type"] == "arrival":
            busy.remove(r["client"])


def test_windows_follow_the_published_clock() -> None:
    world = World(FedGMRConfig().initial_densities(10), windows=4, client_jitter=0.0, server_jitter=0.0)
    end = world.run()
    assert end["time"] == pytest.approx(4 * window_seconds(37.2), abs=1e-9)
    for before, after in pairwise(world.records("window")):
        assert after["start"] == before["end"]
        assert after["arrivals"] == 10


def test_the_time_trigger_has_the_published_mean_densities() -> None:
    world = World(
        FedGMRConfig().initial_densities(10), windows=20, interval=1, trigger="time", validation_fraction=0.0
    )
    world.run()
    found = [r["mean_density"] for r in world.records("window")]
    expected = [0.21] * 4 + [0.24] * 4 + [0.31] * 4 + [0.55] * 4 + [1.0] * 4
    assert found == pytest.approx(expected, abs=1e-12)
    assert {r["cause"] for r in world.records("restoration")} == {"time"}


def test_restored_clients_hold_what_the_server_has() -> None:
    """After the last rung every sub-model is the whole model, and both candidates are the same."""
    world = World(
        (1.0, 0.1), windows=12, interval=1, trigger="time", time_fractions=(0.5,), time_floors=(1.0,)
    )
    world.run()
    late = [r for r in world.records("dispatch") if r["density"] == 1.0]
    assert all(r["support"] == world.layout.size and r["full_masked_norm_sq"] == 0.0 for r in late)
    last = world.records("evaluation")[-1]
    assert last["global"] == last["scaled"]


# -- budgets and the schedule ----------------------------------------------------------------------


@pytest.mark.parametrize(("windows", "interval"), [(7, 3), (6, 1), (5, 10)])
def test_evaluations_come_when_fedml_has_them(windows: int, interval: int) -> None:
    world = World(windows=windows, test_interval=interval)
    end = world.run()
    expected = [r + 1 for r in range(windows) if r % interval == 0 or r == windows - 1]
    assert [r["window"] for r in world.records("evaluation")] == expected
    assert (end["windows"], end["reason"]) == (windows, "windows")
    assert len(world.records("window")) == windows


def test_a_time_budget_ends_the_run_after_the_window_that_reaches_it() -> None:
    world = World(windows=1000, time_budget=60.0)
    end = world.run()
    ends = [r["end"] for r in world.records("window")]
    assert end["reason"] == "time_budget" and end["time"] == ends[-1]
    assert ends[-1] >= 60.0 > ends[-2] and end["windows"] == len(ends)
    assert world.records("evaluation")[-1]["window"] == len(ends)


def test_validation_comes_every_interval_and_not_at_the_end() -> None:
    world = World(windows=9, interval=3)
    world.run()
    assert [r["window"] for r in world.records("validation")] == [3, 6]


def test_with_fewer_clients_in_flight_the_rest_wait() -> None:
    world = World((1.0, 0.5, 0.2, 0.1, 0.05), windows=20, in_flight=2)
    world.run()
    assert all(r["in_flight"] + r["arrivals"] == 2 for r in world.records("window"))
    assert {r["client"] for r in world.records("dispatch")} == {0, 1, 2, 3, 4}


def test_the_recorded_learning_rate_is_that_of_the_window() -> None:
    world = World((1.0, 0.5, 0.1), windows=10, warmup_windows=5, trigger="time", interval=1, rate=0.2)
    world.run()
    expected = [0.2 * min(1.0, (t + 1) / 5) for t in range(10)]
    assert [r["learning_rate"] for r in world.records("window")] == pytest.approx(expected)


# -- data ------------------------------------------------------------------------------------------


class Watched:
    """Samples that note which of them are read, and in which phase of the run."""

    phase = "setup"

    def __init__(self, base: TensorSamples) -> None:
        self.base = base
        self.read: dict[str, set[int]] = {}

    def __len__(self) -> int:
        return len(self.base)

    def take(self, index: np.ndarray) -> Batch:
        self.read.setdefault(Watched.phase, set()).update(index.tolist())
        return self.base.take(index)


class Phased(BuiltinTrainer):
    """Tells `Watched` whether it is training or measuring."""

    def train(self, *args: Any, **keywords: Any) -> LocalStats:
        Watched.phase = "train"
        return super().train(*args, **keywords)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Metrics:
        Watched.phase = "evaluate"
        return super().evaluate(model, batches)


def test_triggers_look_at_held_out_samples_and_never_at_the_test_set() -> None:
    """The test set is read for evaluation records only; validation and training samples are disjoint."""
    reads: list[int] = []
    world: World

    def test_set() -> Iterator[Batch]:
        reads.append(len(world.records("window")))
        yield data(20, 99).take(np.arange(20))

    watched = [Watched(data(40, i)) for i in range(3)]
    world = World(
        (1.0, 0.5, 0.1), windows=20, interval=2, patience=1, trigger="mixed", evaluate="validation",
        samples=watched, trainer=Phased(), test=test_set, validation_fraction=0.25,
    )  # fmt: skip
    world.run()
    assert world.records("restoration") and world.records("validation")
    evaluated = [r["window"] for r in world.records("evaluation")]
    assert sorted(set(reads)) == evaluated and len(reads) <= 2 * len(evaluated)
    for samples in watched:
        held, used = samples.read["evaluate"], samples.read["train"]
        assert len(held) == 10 and not held & used


def test_without_a_validation_split_there_is_no_validation_record() -> None:
    world = World(windows=7, validation_fraction=0.0, trigger="time")
    world.run()
    assert world.records("validation") == [] and world.records("restoration")


def test_validation_records_are_metrics_of_both_candidates_and_of_every_sub_model() -> None:
    world = World((1.0, 0.5, 0.1), windows=4, trigger="none", validation_fraction=0.3)
    seen: list[dict[str, Any]] = []
    expected: list[dict[str, Any]] = []

    def record(fields: dict[str, Any]) -> None:
        if fields["type"] != "validation":
            return
        seen.append(fields)
        server, model = world.server, mlp()
        parts = [world.clients.validation(n) for n in range(3)]
        batches = [p.take(np.arange(len(p))) for p in parts if p is not None]

        def measured(w_D: Tensor, of: list[Batch]) -> dict[str, float]:
            world.layout.scatter(model, w_D)
            model.eval()
            with torch.no_grad():
                x, y = torch.cat([b[0] for b in of]), torch.cat([b[1] for b in of])
                output = model(x)
            right = float((output.argmax(1) == y).double().mean())
            return {"accuracy": right, "loss": float(F.cross_entropy(output, y))}

        coverage_D = torch.zeros(world.layout.size)
        weights = [len(world.clients.train(n)) for n in range(3)]
        masks = [server.ranking.mask(server.ranking.rung(d)) for d in (1.0, 0.5, 0.1)]
        for weight, mask in zip(weights, masks, strict=True):
            coverage_D += weight / sum(weights) * mask
        expected.append(
            {
                "global": measured(server.w_D, batches),
                "scaled": measured(server.w_D * coverage_D, batches),
                "clients": [measured(server.w_D * m, [b]) for m, b in zip(masks, batches, strict=True)],
            }
        )

    world.simulation._record = record
    world.run()
    assert len(seen) == 1
    for got, wanted in zip(seen, expected, strict=True):
        for key in ("accuracy", "loss"):
            assert got["global"][key] == pytest.approx(wanted["global"][key], rel=1e-5)
            assert got["scaled"][key] == pytest.approx(wanted["scaled"][key], rel=1e-5)
            for mine, theirs in zip(got["clients"], wanted["clients"], strict=True):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-5)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("better", ["global", "scaled"])
def test_the_candidate_is_the_better_one_on_validation(metric: Any, better: str) -> None:
    world = World(evaluate="validation", trigger_metric=metric)
    good, bad = Metrics(0.9, 0.1, 5), Metrics(0.2, 3.0, 5)
    both = {"global": good if better == "global" else bad, "scaled": good if better == "scaled" else bad}
    assert world.simulation.examiner.choose(both) == better  # type: ignore[arg-type]
    fixed = World(evaluate="global", trigger_metric=metric)
    assert fixed.simulation.examiner.choose(both) == "global"  # type: ignore[arg-type]


def test_the_shipped_metrics_are_those_of_the_candidate() -> None:
    for evaluate, which in (("global", "global"), ("coverage_scaled", "scaled")):
        world = World(windows=4, evaluate=evaluate)
        end = world.run()
        assert end["shipped"] == which
        for r in world.records("evaluation"):
            assert (
                r["candidate"] == which
                and r["accuracy"] == r[which]["accuracy"]
                and r["loss"] == r[which]["loss"]
            )
        assert any(r["global"] != r["scaled"] for r in world.records("evaluation"))


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("splitting", [True, False])
def test_bytes_add_up(splitting: bool) -> None:
    world = World(
        (1.0, 0.5, 0.1), windows=12, trigger="time", megabytes=10.0, incremental_splitting=splitting
    )
    world.run()
    up = down = 0.0
    for window in world.records("window"):
        t = window["window"]
        arrived = [a["bytes_up"] for a in world.records("arrival") if a["window"] == t]
        sent = [d["bytes_down"] for d in world.records("dispatch") if d["version"] == t]
        assert window["bytes_up"] == pytest.approx(sum(arrived))
        assert window["bytes_down"] == pytest.approx(sum(sent))
        through = max(sent, default=0.0) if splitting else sum(sent)
        assert window["server_bytes_down"] == pytest.approx(through)
        up, down = up + window["bytes_up"], down + window["bytes_down"]
        for e in world.records("evaluation"):
            if e["window"] == t + 1:
                assert (e["bytes_up"], e["bytes_down"]) == (pytest.approx(up), pytest.approx(down))
    for r in world.records("dispatch"):
        assert r["bytes_down"] == pytest.approx(10e6 * r["density"])
    for r in world.records("arrival"):
        assert r["bytes_up"] == pytest.approx(10e6 * r["density"])


def test_payloads_by_support_are_shares_of_the_coordinates() -> None:
    world = World((1.0, 0.1), windows=2, payload_rule="support", megabytes=10.0)
    world.run()
    for r in world.records("dispatch"):
        assert r["bytes_down"] == pytest.approx(10e6 * r["support"] / world.layout.size)


# -- clients that misbehave ------------------------------------------------------------------------


class Poisonous(BuiltinTrainer):
    """Client 1 returns NaN from its second dispatch on; client 2 says it saw no sample once."""

    def train(
        self, model: nn.Module, batches: Any, masks: Any, *, learning_rate: float, client: int
    ) -> LocalStats:
        stats = super().train(model, batches, masks, learning_rate=learning_rate, client=client)
        if client == 1:
            with torch.no_grad():
                next(iter(model.parameters()))[0, 0] = float("nan")
        return stats._replace(samples=0) if client == 2 else stats


@pytest.mark.parametrize("form", ["delta", "replacement"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_values_travel_in_a_narrow_type_both_ways(form: str, kind: str) -> None:
    """Clients start from rounded weights, the server merges rounded updates; sums are not rounded."""
    dtype = getattr(torch, kind)
    world = World(payload_dtype=kind, update_form=form, trigger="none")
    uploads: list[UploadArrived] = []
    handle = world.server.handle

    def watch(event: Any) -> Any:
        if isinstance(event, UploadArrived):
            uploads.append(event)
        return handle(event)

    world.server.handle = watch  # type: ignore[method-assign]
    world.simulation.start()
    sent: dict[int, Dispatch] = {}
    for _ in range(4):
        sent.update(world.simulation.pending)
        world.simulation.step()
    assert len(uploads) >= 4 and not torch.equal(world.server.w_D, world.server.w_D.to(dtype).float())
    stop, buffers = world.server.ranking.ends[0], world.layout.size - world.layout.parameters
    for upload in uploads:
        start_S = sent[upload.dispatch].values_S
        for values_S in (start_S, upload.values_S):
            assert values_S.dtype == torch.float32 and torch.equal(values_S, values_S.to(dtype).float())
        change_S = (upload.values_S if form == "delta" else upload.values_S - start_S).double()
        assert buffers > 0
        change_S[stop - buffers : stop] = 0.0
        assert upload.change_sq == pytest.approx(float(change_S.square().sum()), rel=1e-12)


def test_a_weight_too_large_for_the_payload_is_an_error_and_not_an_infinity() -> None:
    model = mlp()
    with torch.no_grad():
        next(model.parameters())[0, 0] = 1e5
    with pytest.raises(WireError, match="GMR-722 weight=100000 does not fit payload_dtype=float16"):
        World(model=model, payload_dtype="float16").simulation.start()
    World(model=model, payload_dtype="bfloat16").simulation.start()


def test_a_client_that_returns_nan_is_rejected_and_the_run_goes_on() -> None:
    world = World((1.0, 1.0, 0.5), windows=6, trainer=Poisonous())
    end = world.run()
    assert torch.isfinite(world.server.w_D).all()
    rejected = world.records("rejected")
    assert {(r["client"], r["code"]) for r in rejected} == {(1, "GMR-403"), (2, "GMR-404")}
    assert end["rejected"] == len(rejected) == 12
    assert {a["client"] for a in world.records("arrival")} == {0}
    assert [r["client"] for r in world.records("dispatch")].count(1) == 6  # it gets its next chance


def test_a_rejected_client_does_not_touch_the_model() -> None:
    """The same run without the poisonous clients' uploads, bit for bit."""

    class Honest(BuiltinTrainer):
        def train(self, model: nn.Module, batches: Any, masks: Any, **keywords: Any) -> LocalStats:
            stats = super().train(model, batches, masks, **keywords)
            return stats if keywords["client"] == 0 else stats._replace(samples=0)

    poisoned = World((1.0, 1.0, 0.5), windows=6, trainer=Poisonous())
    honest = World((1.0, 1.0, 0.5), windows=6, trainer=Honest())
    assert poisoned.run()["model_sha256"] == honest.run()["model_sha256"]


def test_an_exception_of_the_trainer_stops_the_run() -> None:
    class Broken(BuiltinTrainer):
        def train(self, *args: Any, **keywords: Any) -> LocalStats:
            raise ZeroDivisionError("user's bug")

    with pytest.raises(ZeroDivisionError, match="user's bug"):
        World(trainer=Broken()).run()


# -- the run log -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_scope": "buffer", "update_form": "replacement"},
        {"probe": True, "probe_interval": 1},
        {"trigger": "gradient"},
        {
            "trigger": "mixed",
            "patience": 1,
            "interval": 1,
            "evaluate": "validation",
            "trigger_metric": "loss",
        },
        {"trainer": Poisonous(), "schedule": "sync"},
        {"trainer": BuiltinTrainer(loss="bce", optimizer="adam"), "loss": "bce"},
    ],
    ids=["default", "buffer", "probe", "gradient", "mixed", "poisonous", "bce"],
)
def test_every_record_is_of_the_schema(options: dict[str, Any]) -> None:
    world = World(windows=10, **options)
    end = world.run()
    assert problems({**end, "wall_seconds": 1.0}) == [] and end["type"] == "end"
    for fields in world.log:
        assert problems(fields) == [], fields
        assert json.loads(encode(fields)) == fields  # as the writer of the run log encodes it
    assert "header" not in {r["type"] for r in world.log} and "end" not in {r["type"] for r in world.log}
    for t, window in enumerate(world.records("window")):
        position = world.log.index(window)
        assert window["window"] == t
        mine = [i for i, r in enumerate(world.log) if r["type"] == "arrival" and r["window"] == t]
        assert len(mine) == window["arrivals"] and all(i < position for i in mine)
        clients = [world.log[i]["client"] for i in mine]
        assert clients == sorted(clients)


def test_the_log_names_only_documented_types() -> None:
    world = World(windows=10, probe=True, trigger="mixed", patience=1, interval=1, trainer=Poisonous())
    world.run()
    kinds = {r["type"] for r in world.log}
    assert kinds == set(RECORDS) - {"header", "client", "defence", "end"}


# -- stopping and going on -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"trigger": "time"},
        {"update_scope": "buffer", "update_form": "replacement", "trigger": "time"},
        {"score": "weight_change", "patience": 1},
        {"in_flight": 2, "trigger": "mixed"},
    ],
    ids=str,
)
def test_a_run_restored_in_every_window_ends_with_the_same_bits(options: dict[str, Any]) -> None:
    """Server and clock through JSON and new objects; the caller keeps the dispatches that are out."""
    reference = World((1.0, 0.5, 0.1), model=dropping(), **options)
    expected = reference.run()
    world = World((1.0, 0.5, 0.1), model=dropping(), **options)
    end = world.simulation.start()
    while end is None:
        state, clock = snapshot(world.server), json.loads(json.dumps(world.network.state()))
        pending, log = world.simulation.pending, world.log
        other = World((1.0, 0.5, 0.1), model=dropping(), **options)
        restore(other.server, Snapshot(json.loads(json.dumps(state.meta)), state.tensors))
        other.network.load_state(clock)
        other.simulation.pending = pending
        other.simulation.bytes_up, other.simulation.bytes_down = (
            world.simulation.bytes_up,
            world.simulation.bytes_down,
        )
        other.simulation._window_down = world.simulation._window_down
        other.log.extend(log)
        world = other
        end = world.simulation.step()
    assert end == expected and world.log == reference.log


# -- the gradient trigger --------------------------------------------------------------------------


def test_the_gradient_trigger_restores_and_says_why() -> None:
    world = World((1.0, 0.1, 0.1), windows=15, interval=2, trigger="gradient", patience=1)
    world.run()
    causes = {r["cause"] for r in world.records("restoration")}
    assert causes <= {"gradient"}
    assert all(r["client"] is not None for r in world.records("restoration"))


def test_gradient_votes_compare_the_masked_gradients_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float]] = []

    def spy(held: float, gained: float, seconds: float, after: float) -> bool:
        asked.append((held, gained))
        return True

    monkeypatch.setattr("fedgmr_plugin.engine.probing.restoring_pays", spy)
    world = World((1.0, 0.5, 0.1), windows=4, trigger="gradient", validation_fraction=0.2, probe_samples=1000)
    server = world.server
    assert world.simulation._votes() == [False, True, True]  # nothing is left at density 1
    model = mlp().eval()
    loss = torch.zeros(())
    for n in range(3):
        part = world.clients.train(n)
        x, y = part.take(np.arange(len(part)))
        loss = loss + F.cross_entropy(model(x), y) / 3
    loss.backward()
    grad_P = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]).double()
    held = {
        d: server.ranking.mask(server.ranking.rung(d))[: world.layout.parameters]
        for d in (0.1, 0.2, 0.5, 1.0)
    }
    for got, (now, after) in zip(asked[-2:], ((0.5, 1.0), (0.1, 0.2)), strict=True):
        inside = float(grad_P[held[now]].square().sum())
        gained = float(grad_P[held[after] & ~held[now]].square().sum())
        assert got == pytest.approx((inside, gained), rel=1e-4, abs=1e-9) and gained > 0


def test_gradient_votes_compare_the_seconds_of_the_clients_own_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T(d) is the time of this client's flight: where computing dominates, more density costs little."""
    asked: list[tuple[float, float]] = []

    def spy(held: float, gained: float, seconds: float, after: float) -> bool:
        asked.append((seconds, after))
        return False

    monkeypatch.setattr("fedgmr_plugin.engine.probing.restoring_pays", spy)
    world = World(
        (1.0, 0.5, 0.1), trigger="gradient", compute_slowdown=(1.0, 40.0, 7.0), compute_density_exponent=0.5
    )
    world.simulation._votes()
    wanted = [
        37.2 * d * (1 / min(10.0, 20 * d0) + 1 / (5 * d0)) + 0.5 * slow * d**0.5
        for d0, slow, densities in ((0.5, 40.0, (0.5, 1.0)), (0.1, 7.0, (0.1, 0.2)))
        for d in densities
    ]
    assert [s for pair in asked[-2:] for s in pair] == pytest.approx(wanted)


def test_seeds_of_measuring_do_not_change_between_evaluations() -> None:
    """A model with noise at evaluation gives the same metrics for the same weights, at any time."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with isolated_rng(0):
                self.hidden, self.out = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.dropout(torch.tanh(self.hidden(x)), 0.5, training=True))

    world = World(model=Noisy())
    batches = [data(30, 5).take(np.arange(30))]
    first = world.simulation.bench.measure(world.server.w_D, batches)
    torch.manual_seed(derive(0, "elsewhere"))
    assert world.simulation.bench.measure(world.server.w_D, batches) == first


# -- memory ----------------------------------------------------------------------------------------------


class Inventory(BuiltinTrainer):
    """Notes which vectors as long as the model exist while a client trains."""

    def train(self, model: nn.Module, *args: Any, **options: Any) -> LocalStats:
        size = build_layout(model).size
        tensors = [o for o in gc.get_objects() if type(o) is Tensor and o.shape == (size,)]
        seen.append({t.untyped_storage().data_ptr() for t in tensors if t.dtype == torch.float32})
        return super().train(model, *args, **options)


seen: list[set[int]] = []


@pytest.mark.parametrize("options", [{}, {"mask_interval": 2}, {"update_form": "replacement"}])
def test_a_training_takes_no_vector_but_the_global_one_and_the_next_merges_room(
    options: dict[str, Any],
) -> None:
    world = World((0.5, 0.2, 0.1), trainer=Inventory(), windows=7, test_interval=2, **options)
    own: list[set[int]] = []

    def noted(dispatch: Dispatch) -> LocalUpdate:
        own.append({v.data_ptr() for v in (world.server.ranked_D, world.server.spare_D) if v is not None})
        return world.simulation.bench.train(dispatch)

    world.simulation._executor = InTurn(noted)
    seen.clear()
    gc.collect()
    world.run()
    assert len(seen) == len(own) > 9
    assert all(len(mine) == 2 and there <= mine for there, mine in zip(seen, own, strict=True))


def test_a_training_in_a_lent_vector_gives_the_same_bits() -> None:
    alone, lent = World(), World()
    room_D = torch.full((lent.layout.size,), float("nan"))
    alone.simulation.bench.room = lambda: None
    lent.simulation.bench.room = lambda: room_D
    assert alone.run() == lent.run()
    assert not room_D.isnan().any()
