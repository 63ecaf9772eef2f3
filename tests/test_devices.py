"""Real devices on a loopback world: the whole protocol, with every fault of a field."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.replay import Comparison, Replay
from fedgmr_plugin.engine.samples import BatchPlan, TensorSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.protocol.schema import problems
from fedgmr_plugin.runtimes.devices.client import measure_bandwidth
from fedgmr_plugin.runtimes.devices.field import Field, Problem
from fedgmr_plugin.runtimes.devices.loopback import Faults, Loopback, LoopbackHands
from fedgmr_plugin.runtimes.devices.server import measured_by
from fedgmr_plugin.runtimes.devices.store import Unreachable
from fedgmr_plugin.runtimes.silos.objects import Objects

KEYS = {n: bytes([n]) * 32 for n in range(1, 9)}


def mlp() -> nn.Module:
    with isolated_rng(5):
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))


def samples(client: int, count: int = 60) -> TensorSamples:
    """The class is where a random projection is largest."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(100 + client))
    teacher = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    return TensorSamples(x, (x @ teacher).argmax(1))


PROBLEM = Problem(mlp, samples, samples(999, 150), samples(998, 200), BatchPlan(8, 4, 1, True, 3), 0.3)


def make(
    folder: Path,
    devices: int = 4,
    windows: int = 12,
    faults: Faults | None = None,
    seed: int = 0,
    **options: Any,
) -> Field:
    common: dict[str, Any] = {
        "densities": (1.0, 0.5, 0.2, 0.1)[:devices],
        "interval": 3,
        "patience": 1,
        "window_slack": 0.1,
        "answer_deadline": 10.0,
        "retry_seconds": 3.0,
    }
    config = FedGMRConfig(**{**common, **options})
    world = Loopback(seed, faults)
    return Field(
        PROBLEM, config, folder, devices, windows, world, KEYS, seconds=lambda n: 0.2 + 0.3 * n, rate=100.0
    )


def start(field: Field) -> Field:
    field.begin()
    for n in range(field.count):
        field.device(n)
    return field


def test_devices_train_to_the_end(tmp_path: Path) -> None:
    field = start(make(tmp_path))
    end = field.run()
    assert end["windows"] == 12 and end["rejected"] == 0
    assert [p for r in field.log for p in problems(r)] == []
    accuracy = [r["accuracy"] for r in field.records("evaluation")]
    assert accuracy[-1] > 0.8 > accuracy[0]
    assert len(field.trained) == len(set(field.trained))
    arrivals = [r["dispatch"] for r in field.records("arrival")]
    assert len(arrivals) == len(set(arrivals))
    assert field.records("restoration")


def test_no_device_can_make_a_model_that_nobody_can_be_sent(tmp_path: Path) -> None:
    """Each of its changes fits the type that values travel in, and their sum does not."""
    field = make(tmp_path, 2, 8, payload_dtype="float16", schedule="buffered")
    bench = field.trainer_bench()

    def train(sent: Dispatch) -> LocalUpdate:
        update = bench.train(sent)
        return update if sent.client else update._replace(values_S=torch.full_like(update.values_S, 6e4))

    field._trains = train
    end = start(field).run()
    refused = {(r["code"], r["message"]) for r in field.records("rejected") if r["client"] == 0}
    assert end["windows"] == 8
    assert ("GMR-403", "the merged model would not fit payload_dtype=float16") in refused
    assert float(field.office.server.w_D.abs().max()) <= 65504.0


def test_who_waited_for_the_others_joins_when_the_run_begins(tmp_path: Path) -> None:
    """Times in the log do not decrease, whoever came first."""
    field = make(tmp_path, 2, 4, clients_at_start=2).begin()
    field.device(0)
    field.until(lambda: field.world.now > 5.0)
    field.device(1)
    field.run()
    joined = [r["time"] for r in field.records("client")[:2]]
    assert joined[0] == joined[1] > 5.0


def test_a_late_answer_brings_the_next_sub_model_with_it(tmp_path: Path) -> None:
    """The device need not say once more that it is there."""
    field = make(tmp_path, 2, 40, answer_deadline=2.0, densities=(0.5, 1.0))
    field.seconds, field.heartbeat = (lambda n: 0.3 if n else 5.0), 30.0
    start(field)
    field.until(lambda: [r["client"] for r in field.records("arrival")].count(0) > 1)
    states = [r["state"] for r in field.records("client") if r["client"] == 0]
    assert states[:3] == ["joined", "overdue", "joined"]
    first, second = [r["time"] for r in field.records("dispatch") if r["client"] == 0][:2]
    assert second - first < 7.0


def replayed(field: Field) -> Comparison:
    """The run's log through the engine in one process, as another process would read it."""
    other = make(field.folder, field.count, field.windows)
    other.config = field.config
    server, examiner = other.parts()
    bench = other.trainer_bench()
    return Replay(server, examiner, bench.train).run(json.loads(json.dumps(field.log)))


@pytest.mark.parametrize("options", [{}, {"update_form": "replacement", "update_scope": "buffer"}])
def test_the_log_replayed_gives_the_same_model(tmp_path: Path, options: dict[str, Any]) -> None:
    field = make(tmp_path, faults=Faults(loss=0.2, duplicate=0.2), **options).begin()
    for n in range(4):
        field.device(n)
    field.until(lambda: field.office.server.version == 3)
    field.stop(2)
    field.until(lambda: len(field.records("client")) > 6)
    field.device(2)
    end = field.run()
    found = replayed(field)
    assert (found.where, found.differences) == ("", [])
    assert found.end is not None and found.end["model_sha256"] == end["model_sha256"]
    assert found.records > 60
    assert field.records("layers")
    field.log[:] = [record for record in field.log if record["type"] != "layers"]  # an older release's log
    found = replayed(field)
    assert (found.where, found.differences) == ("", []) and found.end is not None


@pytest.mark.parametrize(("merged", "own"), [("replacement", "delta"), ("delta", "replacement")])
def test_updates_have_the_form_that_the_server_merges(tmp_path: Path, merged: Any, own: Any) -> None:
    """A device has a file of its own, which may say otherwise."""
    field = make(tmp_path, update_form=merged).begin()
    with mock.patch.object(field, "config", field.config.model_copy(update={"update_form": own})):
        for n in range(4):
            field.device(n)
    end, found = field.run(), replayed(field)
    assert (found.where, found.differences) == ("", [])
    assert found.end is not None and found.end["model_sha256"] == end["model_sha256"]


def test_nothing_is_fetched_twice_where_every_message_comes_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that is told again changes nothing, whatever of it is still on its way."""
    field = make(tmp_path, faults=Faults(duplicate=1.0, most=2.0), answer_deadline=60.0)
    fetched: list[tuple[LoopbackHands, str]] = []
    real = LoopbackHands.fetch

    def fetch(hands: LoopbackHands, piece: Piece, then: Any) -> None:
        fetched.append((hands, piece.key))
        real(hands, piece, then)

    monkeypatch.setattr(LoopbackHands, "fetch", fetch)
    start(field).run(20_000)
    assert len(fetched) == len(set(fetched)) > 60


@pytest.mark.parametrize("loss", [0.0, 0.1, 0.3, 0.5])
def test_a_lossy_field_comes_to_its_end(tmp_path: Path, loss: float) -> None:
    faults = Faults(loss=loss, duplicate=loss, most=2.0)
    field = start(make(tmp_path, faults=faults, seed=round(10 * loss), answer_deadline=60.0))
    field.run(20_000)
    arrivals = [r["dispatch"] for r in field.records("arrival")]
    assert len(arrivals) == len(set(arrivals))
    assert len(field.trained) == len(set(field.trained)), "a dispatch was trained twice"
    accuracy = [r["accuracy"] for r in field.records("evaluation")]
    assert accuracy[-1] > accuracy[0]


@pytest.mark.parametrize(
    "options", [{"device_submodel": "width", "score": "width"}, {"device_submodel": "masked"}]
)
@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_fedmls_own_devices_take_part(tmp_path: Path, options: dict[str, Any], form: str) -> None:
    pytest.importorskip("MNN")
    field = make(tmp_path, device_authentication="off", update_form=form, windows=20, **options)
    field.keys = None
    field.office = field._make_office()
    field.begin()
    for n in range(4):
        field.plain_device(n)
    end = field.run()
    assert end["rejected"] == 0 and end["windows"] == 20
    accuracy = [r["accuracy"] for r in field.records("evaluation")]
    assert accuracy[-1] > accuracy[0] + 0.2
    sizes = {r["density"]: r["bytes_down"] for r in field.records("dispatch")}
    if options["device_submodel"] == "width":
        assert sizes[0.1] < sizes[0.5] < sizes[1.0]
    else:
        assert len(set(sizes.values())) == 1


def test_densities_begin_where_the_measured_bandwidth_is() -> None:
    density = measured_by(FedGMRConfig(measured_densities=True, client_upload=5.0))
    rates = [None, 0.01, 0.25, 0.6, 2.6, 5.0, 80.0]
    assert [density(up, None) for up in rates] == [None, 0.05, 0.05, 0.1, 0.5, 1.0, 1.0]
    assert measured_by(FedGMRConfig())(80.0, 80.0) is None


def test_a_device_measures_its_bandwidth_by_one_object() -> None:
    class Slow(Objects):
        def put(self, piece: Piece, content: Any) -> None:
            time.sleep(0.02)
            super().put(piece, content)

    store = Slow()
    up, down = measure_bandwidth(store, "probe", 100_000)
    assert up is not None and down is not None and 1 < up < 5.1 and down > up
    assert len(store) == 0

    class Away(Objects):
        def put(self, piece: Piece, content: Any) -> None:
            raise Unreachable("nobody is there")

    assert measure_bandwidth(Away(), "probe") == (None, None)
