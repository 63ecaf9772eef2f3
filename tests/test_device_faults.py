"""Promises of a run with devices when something breaks: server, device, memory, clock, disk."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.course import model_sha256
from fedgmr_plugin.engine.events import ClientLeft, UploadArrived
from fedgmr_plugin.engine.replay import Comparison, Replay
from fedgmr_plugin.engine.samples import BatchPlan, TensorSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.snapshot import Snapshot, restore_live, snapshot_live
from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol.history import event_of
from fedgmr_plugin.protocol.journal import Entry, Journal, read
from fedgmr_plugin.protocol.notes import SYNC
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.runtimes.devices import field as field_module
from fedgmr_plugin.runtimes.devices import office as office_module
from fedgmr_plugin.runtimes.devices.device import Device
from fedgmr_plugin.runtimes.devices.field import Field, Problem
from fedgmr_plugin.runtimes.devices.loopback import Faults, Loopback
from fedgmr_plugin.runtimes.devices.memory import Memory
from fedgmr_plugin.runtimes.devices.office import Office

KEYS = {n: bytes([n]) * 32 for n in range(1, 9)}
DAY = 86_400.0


def mlp() -> nn.Module:
    with isolated_rng(5):
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def samples(client: int, count: int = 40) -> TensorSamples:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(100 + client))
    teacher = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    return TensorSamples(x, (x @ teacher).argmax(1))


PROBLEM = Problem(mlp, samples, samples(999, 60), samples(998, 60), BatchPlan(8, 2, 1, True, 3), 0.3)
OPTIONS: dict[str, Any] = {
    "densities": (1.0, 0.5, 0.2),
    "interval": 3,
    "patience": 1,
    "window_slack": 0.1,
    "answer_deadline": 8.0,
    "retry_seconds": 3.0,
}


def make(
    folder: Path,
    windows: int = 8,
    faults: Faults | None = None,
    seed: int = 0,
    seconds: Callable[[int], float] = lambda n: 0.4 + 0.3 * n,
    **options: Any,
) -> Field:
    config = FedGMRConfig(**{**OPTIONS, **options})
    folder.mkdir(exist_ok=True)
    world = Loopback(seed, faults)
    return Field(PROBLEM, config, folder, 3, windows, world, KEYS, seconds=seconds, rate=100.0)


def start(field: Field, folder: Path | None = None) -> Field:
    field.begin()
    for n in range(field.count):
        field.device(n, None if folder is None else Memory.load(folder / str(n)))
    return field


def each_is_once(field: Field) -> None:
    """No dispatch is trained or merged twice."""
    arrivals = [r["dispatch"] for r in field.records("arrival")]
    assert len(arrivals) == len(set(arrivals))
    assert len(field.trained) == len(set(field.trained))


def replayed(field: Field) -> Comparison:
    server, examiner = field.parts()
    return Replay(server, examiner, field.trainer_bench().train).run(json.loads(json.dumps(field.log)))


@pytest.mark.parametrize("kept", [True, False])
def test_a_server_that_goes_on_takes_no_earlier_answer_again(tmp_path: Path, kept: bool) -> None:
    """Every earlier message of every device comes once more, be its object still there (the server was killed
    before it was removed) or not, and numbers that a checkpoint would refuse are heard."""
    field = start(make(tmp_path, 12))
    objects: dict[str, bytes] = {}
    for window in (3, 6, 9):
        while field.office.server.version < window:
            field.world.step()
            objects |= field.world.objects
        field.kill()
        field.restart()
        if kept:
            field.world.objects = objects | field.world.objects
        topics = field.office.desk.topics
        again = [(topic, payload) for topic, payload in field.world.published if topic in topics]
        office = field.office
        for n, message in enumerate(again):  # a device may not send all at once
            field.world.at(field.world.now + 0.01 * n, partial(office.message, *message))
    field.run()
    each_is_once(field)
    assert not field.records("rejected")
    assert sum(c["GMR-745"] for c in field.office.desk.refused) == 0
    assert not replayed(field).differences


@pytest.mark.parametrize("hours", [1.0, 1000.0])
def test_a_server_that_goes_on_with_its_clock_set_back_is_heard(tmp_path: Path, hours: float) -> None:
    """On another machine, or before its clock is set."""
    field = start(make(tmp_path, 9))
    make_office = field._make_office

    def late() -> Office:
        office = make_office()
        office.desk._wall = lambda: int((field.world.now - 3600 * hours) * 1000)
        return office

    field._make_office = late  # type: ignore[method-assign]
    for version in (3, 6):
        field.until(lambda v=version: field.office.server.version >= v)  # type: ignore[misc]
        field.kill()
        field.restart()
    field.run(60)
    each_is_once(field)
    refused = sum(device.refused["GMR-744"] for device in field.devices.values())  # type: ignore[union-attr]
    assert refused <= 4, "what the servers that were killed said last"


@pytest.mark.parametrize("kills", [1, 2])
@pytest.mark.parametrize("when", ["dispatched", "reminded"])
def test_a_server_that_says_something_once_in_many_minutes_is_heard_with_its_clock_set_back(
    tmp_path: Path, when: str, kills: int
) -> None:
    """It is killed just after messages whose numbers are far above those of the messages before."""
    options: dict[str, Any] = {"answer_deadline": 3000.0, "seconds": lambda n: 400.0 + n}
    field = start(make(tmp_path, 3, **options))
    make_office = field._make_office

    def late() -> Office:
        office = make_office()
        office.desk._wall = lambda: int((field.world.now - DAY) * 1000)
        return office

    field._make_office = late  # type: ignore[method-assign]
    if when == "dispatched":
        field.until(lambda: field.office.server.version == 1)
    else:
        field.until(lambda: field.world.now > 300)
        for n in range(field.count):  # they have lost their memory
            field.device(n)
    now = field.world.now
    field.until(lambda: field.world.now > now + 3)  # what it said is there
    for _ in range(kills):
        field.kill()
        field.restart()
        now = field.world.now
        field.until(lambda now=now: field.world.now > now + 3)  # type: ignore[misc]
    assert not any(device.refused for device in field.devices.values())  # type: ignore[union-attr]
    field.run(6000)
    assert not any(device.refused for device in field.devices.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("returns", [1.0, 6.0])
def test_a_device_that_leaves_after_it_was_refused_is_gone(
    tmp_path: Path, returns: float, killed: bool
) -> None:
    """Its next sub-model waits for `retry_seconds`, or until it is there."""
    field = start(make(tmp_path, 8, answer_deadline=1000.0, retry_seconds=4.0))
    field.until(lambda: field.office.server.version == 2)
    field.until(lambda: any(flight.client == 0 for flight in field.office.server.flights.values()))
    office = field.office
    flight = next(d for d, flight in office.server.flights.items() if flight.client == 0)
    office._refuse(0, flight, WireError("GMR-710", "rubbish"))
    device, then = field.devices[0], field.world.now
    assert isinstance(device, Device)
    field.world.deliver(device.speaks, device.last_will())
    field.stop(0)
    field.until(lambda: field.world.now > then + 0.5)
    if killed:
        meta, tensors = snapshot_live(field.office.live)
        assert meta["live"]["gone"] == [0]
        server, examiner = field.parts()
        other = Office(
            server, examiner, field.log.append, office.desk, office.pieces, "", field.hands, field.clock
        )
        restore_live(other.live, Snapshot(json.loads(json.dumps(meta)), tensors))
        assert other.live.gone == {0}
        field.kill()
        field.restart()
    field.until(lambda: field.world.now > then + returns)
    dispatches = [r for r in field.records("dispatch") if r["client"] == 0 and r["time"] > then]
    assert not dispatches and 0 in field.office.server.away
    field.device(0, device.memory)
    if returns < 4.0:  # it is there again, and waits no less
        field.until(lambda: field.world.now > then + 3.5)
        assert 0 in field.office.server.away
    field.until(lambda: 0 not in field.office.server.away, then + 8.0)
    field.run()
    each_is_once(field)
    assert not replayed(field).differences


def test_who_left_before_there_were_enough_to_begin_is_not_counted(tmp_path: Path) -> None:
    field = make(tmp_path, 4, clients_at_start=3).begin()
    device = field.device(0)
    field.until(lambda: 0 in field.office.live.early)
    field.world.deliver(device.speaks, device.last_will())
    memory = field.stop(0)
    for n in (1, 2):
        field.device(n)
    field.until(lambda: field.world.now > 20)
    assert set(field.office.live.early) == {1, 2} and not field.records("dispatch")
    field.device(0, memory)
    field.run()
    assert {r["client"] for r in field.records("arrival")} == {0, 1, 2}


def test_a_task_that_was_lost_is_told_again_to_a_device_that_repeats_its_last_answer(tmp_path: Path) -> None:
    """It says nothing else until it hears of its next task, and does not wait for that until its deadline."""
    field = start(make(tmp_path, 4, answer_deadline=1000.0))
    deliver, lost = field.world.deliver, []

    def lose(topic: str, payload: bytes, **how: bool) -> None:
        is_second = topic == field.devices[0].hears and json.loads(payload)["msg_type"] == SYNC
        if is_second and not lost:
            lost.append(payload)
        else:
            deliver(topic, payload, **how)

    field.world.deliver = lose  # type: ignore[method-assign]
    field.until(lambda: bool(lost))
    then = field.world.now
    trained = len([n for n, _ in field.trained if n == 0])
    field.until(lambda: len([n for n, _ in field.trained if n == 0]) > trained, then + 3 * field.heartbeat)
    field.run()
    each_is_once(field)


def test_a_checkpoint_knows_the_number_that_was_written_down(tmp_path: Path) -> None:
    """The last event before it made no message, and after it there were messages of no event."""
    field = start(make(tmp_path, 3, answer_deadline=3000.0, seconds=lambda n: 2000.0))
    field.until(lambda: field.world.now > 500)
    field.office.tick()
    field.office._apply([ClientLeft(0, field.clock())])
    state = field.office.state()
    field.kill()
    office = field._make_office()
    office.load_state(state, {})
    office.desk._wall = lambda: 0
    office.desk.go_on_above(office._written)
    assert office.desk.coming > 500_000


@pytest.mark.parametrize("restarted", [True, False])
def test_a_new_run_of_the_same_name_takes_in_who_waits_with_an_answer_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    """The last run's server is gone for good; its devices still give their answers, or are started again."""
    last = start(make(tmp_path / "last"), tmp_path)
    last.until(lambda: last.office.server.version == 2)
    last.kill()
    last.world.at(last.world.now + 20, lambda: None)
    last.until(lambda: last.world.now > 15)
    monkeypatch.setattr(field_module, "TOKEN", "f" * 16)
    new = make(tmp_path / "new", 4)
    new.world = last.world
    new.office = new._make_office()
    new.begin()
    for n in range(new.count):
        old = last.devices[n]
        assert isinstance(old, Device)
        assert old.memory.update is not None
        if restarted:
            last.stop(n)
            new.device(n, Memory.load(tmp_path / str(n)))
    new.run()
    assert {r["client"] for r in new.records("arrival")} == {0, 1, 2}
    each_is_once(new)


# -- killed at any event -----------------------------------------------------------------------------------


def eventful(folder: Path, **options: Any) -> Field:
    """A run with everything: losses, a device that dies and returns, refusals, restorations."""
    field = make(folder, 20, Faults(loss=0.15, duplicate=0.2, most=0.4), **options)
    start(field)
    field.until(lambda: field.office.server.version == 4)
    field.stop(2)
    field.until(lambda: any(r["state"] == "overdue" for r in field.records("client")))
    field.device(2)
    field.until(lambda: 1 in {f.client for f in field.office.server.flights.values()})
    own = next(d for d, f in field.office.server.flights.items() if f.client == 1)
    refuse(field, 1, own)
    field.run()
    return field


def refuse(field: Field, client: int, dispatch: int) -> None:
    """The client answers with rubbish."""
    field.office._refuse(client, dispatch, WireError("GMR-710", "rubbish"))


def continued(folder: Path, field: Field, past: list[Entry], rest: list[Entry]) -> tuple[Field, str]:
    """A fresh server that goes on from `past`, and then hears the rest."""
    other = make(folder)
    other.windows, other.config = field.windows, field.config
    other.office = other._make_office()
    journal = folder / "again"
    journal.unlink(missing_ok=True)
    with Journal(journal) as file:
        other.office.resume(past, file, [])
        for entry in rest:
            other.office._take(event_of(entry))
    return other, model_sha256(other.office.server.w_D)


@pytest.mark.parametrize(
    "options", [{}, {"update_scope": "buffer", "update_form": "replacement", "score": "weight_change"}]
)
def test_killed_at_any_event_it_ends_with_the_same_log_and_model(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    field = eventful(tmp_path / "a", **options)
    entries = list(read(field.journal))
    kinds = {entry.head["event"] for entry in entries}
    assert 60 <= len(entries) <= 300 and kinds == {"joined", "refused", "tick", "upload"}, (
        len(entries),
        kinds,
    )
    assert field.records("restoration") and field.records("rejected") and field.records("validation")
    step = 3 if options else 1
    for cut in range(0, len(entries) + 1, step):
        other, digest = continued(tmp_path / "b", field, entries[:cut], entries[cut:])
        assert other.office.end == field.office.end, cut
        assert other.log == field.log, cut
        assert field.office.end is not None and digest == field.office.end["model_sha256"], cut


def test_a_checkpoint_at_any_event_and_the_rest_give_the_same_log_and_model(tmp_path: Path) -> None:
    field = eventful(tmp_path / "a")
    entries = list(read(field.journal))
    first = make(tmp_path / "b")
    first.windows, first.config = field.windows, field.config
    first.office = first._make_office()
    first.office.live.start()
    with Journal(tmp_path / "c") as journal:
        first.office.journal = journal
        for cut, entry in enumerate(entries):
            if cut % 3 == 0 and first.office.end is None:
                other = from_checkpoint(tmp_path / "d", field, first.office, entries[cut:])
                assert other.office.end == field.office.end, cut
                assert first.log + other.log == field.log, cut
            first.office._take(event_of(entry))
    assert first.log == field.log


def from_checkpoint(folder: Path, field: Field, office: Office, rest: list[Entry]) -> Field:
    """A fresh server that goes on from a checkpoint of `office`: half of the rest is its journal."""
    meta, tensors = snapshot_live(office.live)
    tensors.update(office.tensors())
    kept = json.loads(json.dumps({"live": meta, "office": office.state()}))
    other = make(folder)
    other.windows, other.config = field.windows, field.config
    other.office = other._make_office()
    restore_live(other.office.live, Snapshot(kept["live"], tensors))
    other.office.load_state(kept["office"], tensors)
    assert other.office._left_behind == office._left_behind, "answers that may still be in the store"
    journal = folder / "again"
    journal.unlink(missing_ok=True)
    with Journal(journal) as file:
        half = len(rest) // 2
        other.office.resume(rest[:half], file, [])
        for entry in rest[half:]:
            other.office._take(event_of(entry))
    return other


def test_what_a_server_tells_after_a_crash_is_in_the_store(tmp_path: Path) -> None:
    """What was journaled but never stored is stored again: devices can always fetch their dispatch."""
    field = start(make(tmp_path))
    for version in (1, 3, 4, 6):
        field.until(lambda v=version: field.office.server.version == v)  # type: ignore[misc]
        field.kill()
        field.world.objects.clear()
        field.restart()
        needed = {
            piece.key
            for d in field.office.live.deadlines
            for part in field.office.pieces.found(
                field.office.server.flights[d].version,
                field.office.server.flights[d].ranking,
                field.office.server.flights[d].rung,
            )
            for piece in part
        }
        assert needed <= set(field.world.objects)
    field.run()
    each_is_once(field)
    assert replayed(field).differences == []


# -- devices that die --------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_device_that_dies_around_its_training_trains_nothing_twice(tmp_path: Path, moment: str) -> None:
    field = start(make(tmp_path / "s"), tmp_path)
    field.until(lambda: field.office.server.version == 2)
    device = field.devices[0]
    assert isinstance(device, Device)
    trained = len(field.trained)
    if moment == "before":
        field.until(lambda: device.working is not None and bool(device._wanted))
    elif moment == "during":
        field.until(lambda: len([t for t in field.trained[trained:] if t[0] == 0]) == 1)
        assert device.working is not None
    else:
        answers = device.memory.answered
        field.until(lambda: device.memory.answered != answers)
        for key in [k for k in field.world.objects if "/answers/1/" in k]:
            del field.world.objects[key]  # it had not reached the store
    field.stop(0)
    field.until(lambda now=field.world.now: field.world.now > now + 1)  # type: ignore[misc]
    answered = device.memory.answered
    again = field.device(0, Memory.load(tmp_path / "0"))
    assert again.memory.answered == answered
    end = field.run()
    arrivals = [r["dispatch"] for r in field.records("arrival")]
    assert len(arrivals) == len(set(arrivals)) and end["rejected"] == 0
    twice = {t for t in field.trained if field.trained.count(t) > 1}
    assert len(twice) <= (1 if moment == "during" else 0)  # what was not finished is trained anew
    if moment == "after":
        assert (0, answered) in field.trained and answered in arrivals
    assert replayed(field).differences == []


def test_a_device_that_trained_for_long_has_all_its_patience(tmp_path: Path) -> None:
    """Its server may have said nothing since the task."""
    field = start(make(tmp_path, 100, seconds=lambda n: 3.0 if n else 50.0))
    device = field.devices[0]
    field.until(lambda: device.trained == 1)
    assert device.waits_since() == field.world.now >= 50.0


def test_all_devices_die_and_return_days_later(tmp_path: Path) -> None:
    field = start(make(tmp_path / "s"), tmp_path)
    field.until(lambda: field.office.server.version == 3)
    for n in range(3):
        field.stop(n)
    field.until(lambda: field.world.now > 3 * DAY, 4 * DAY)
    version = field.office.server.version
    assert version <= 4 and field.office.server.away == {0, 1, 2}
    for n in range(3):
        field.device(n, Memory.load(tmp_path / str(n)))
    end = field.run(4 * DAY)
    assert end["windows"] == 8
    arrivals = [r["dispatch"] for r in field.records("arrival")]
    assert len(arrivals) == len(set(arrivals))
    assert replayed(field).differences == []


def test_late_work_is_merged_with_its_staleness(tmp_path: Path) -> None:
    slow = [False]
    field = start(make(tmp_path / "s", 60, seconds=lambda n: 14.0 if n == 2 and slow[0] else 0.4))
    slow[0] = True
    field.until(lambda: any(r["state"] == "overdue" for r in field.records("client")))
    late = next(r["dispatch"] for r in field.records("client") if r["state"] == "overdue")
    slow[0] = False
    field.run()
    found = [r for r in field.records("arrival") if r["dispatch"] == late]
    sent = next(r for r in field.records("dispatch") if r["dispatch"] == late)
    assert [r["staleness"] for r in found] == [found[0]["window"] - sent["version"]]
    assert found[0]["staleness"] > 3 and found[0]["weight"] < found[0]["samples"]
    each_is_once(field)


def test_a_device_that_always_needs_several_deadlines_is_merged_all_the_same(tmp_path: Path) -> None:
    """It gets no other dispatch before it has answered, so none of its work is too old when it comes."""
    field = start(make(tmp_path, 60, seconds=lambda n: 25.0 if n == 2 else 2.0))  # the deadline is 8 s
    field.run()
    trained = sum(n == 2 for n, _ in field.trained)
    merged = [r for r in field.records("arrival") if r["client"] == 2]
    assert len(merged) >= 4 and trained - len(merged) <= 1, (trained, len(merged))
    assert len([r for r in field.records("dispatch") if r["client"] == 2]) - len(merged) <= 1
    assert replayed(field).differences == []


def test_a_device_that_cannot_remember_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each of its tasks would say it again."""
    (tmp_path / "state").write_text("no folder")
    memory = Memory(tmp_path / "state")
    for _ in range(3):
        memory.save()
    (tmp_path / "state").unlink()
    memory.save()
    (tmp_path / "state" / "device.draft").mkdir()
    memory.save()
    assert caplog.text.count("would not remember") == 2


@pytest.mark.parametrize("damage", ["torn answer", "other answer", "torn state", "empty state", "no folder"])
def test_a_damaged_memory_is_never_believed(tmp_path: Path, damage: str) -> None:
    field = start(make(tmp_path / "s"), tmp_path)
    field.until(lambda: field.office.server.version == 2)
    device = field.devices[0]
    answered = device.memory.answered
    field.until(lambda: device.memory.answered > answered)
    field.stop(0)
    folder = tmp_path / "0"
    answer, state = folder / "answer.bin", folder / "device.json"
    if damage == "torn answer":
        answer.write_bytes(answer.read_bytes()[:-5])
    elif damage == "other answer":
        answer.write_bytes(bytes(len(answer.read_bytes())))
    elif damage == "torn state":
        state.write_text(state.read_text()[:-9])
    elif damage == "empty state":
        state.write_text("")
    else:
        answer.unlink()
        state.unlink()
    memory = Memory.load(folder)
    assert memory.update is None and memory.answered == -1
    field.device(0, memory)
    end = field.run()
    assert end["rejected"] == 0 and end["windows"] == 8
    arrivals = [r["dispatch"] for r in field.records("arrival")]
    assert len(arrivals) == len(set(arrivals))
    assert replayed(field).differences == []


def test_a_device_remembers_its_run_from_its_first_task_on(tmp_path: Path) -> None:
    field = start(make(tmp_path / "s"), tmp_path)
    device = field.devices[0]
    field.until(lambda: device.memory.token != "")
    assert device.memory.answered == -1
    assert Memory.load(tmp_path / "0").token == device.memory.token == field.office.token


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "7",
        '{"token": 1}',
        '{"token":"a","reserved":1,"answered":1,"update":["a",1],"heard":[1,2]}',
        '{"token":"a","reserved":1e999,"answered":1,"update":null,"heard":[1,2]}',
        '{"token":"a","reserved":1,"answered":1,"update":[1,2,3],"heard":[1,2]}',
        '{"token":"a","reserved":1,"answered":1,"update":"abc","heard":[1,2]}',
        "[" * 100_000,
        "\ud800",
    ],
)
def test_no_state_file_breaks_a_device(tmp_path: Path, text: str) -> None:
    (tmp_path / "device.json").write_bytes(text.encode(errors="surrogatepass"))
    memory = Memory.load(tmp_path)
    assert memory.update is None and memory.next_sequence(5) >= 5


def test_a_device_whose_clock_jumps_back_is_still_heard(tmp_path: Path) -> None:
    field = start(make(tmp_path / "s"), tmp_path)
    field.until(lambda: field.office.server.version == 2)
    field.stop(0)
    again = field.device(0, Memory.load(tmp_path / "0"))
    again._wall = lambda: 0
    trained = len(field.trained)
    end = field.run()
    assert end["windows"] == 8
    assert any(n == 0 for n, _ in field.trained[trained:])
    assert field.office.desk.refused[0]["GMR-744"] == 0


def test_a_device_that_was_restarted_often_and_loses_its_memory_is_heard_at_once(tmp_path: Path) -> None:
    field = start(make(tmp_path / "s"), tmp_path)
    field.until(lambda: field.office.server.version == 2)
    for _ in range(5):
        field.device(0, Memory.load(tmp_path / "0"))
        field.until(lambda now=field.world.now: field.world.now > now + 0.2)  # type: ignore[misc]
    field.device(0, Memory(tmp_path / "elsewhere"))
    now = field.world.now
    trained = len(field.trained)
    field.until(lambda: any(n == 0 for n, _ in field.trained[trained:]), now + 20)
    assert field.office.desk.refused[0]["GMR-744"] == 0
    field.run()


def test_sequence_numbers_follow_the_clock_and_never_repeat(tmp_path: Path) -> None:
    memory = Memory.load(tmp_path)
    used = [memory.next_sequence(1_000_000)]
    for now in (1_000_050, 1_200_000, 5, 6, 1_200_010, 1_600_000):  # milliseconds at each restart
        memory = Memory.load(tmp_path)
        used += [memory.next_sequence(now), memory.next_sequence(now + 1)]
    assert used == sorted(set(used))
    assert used[-1] == 1_600_001


def test_sequence_numbers_do_not_run_away_from_a_clock_that_is_set_back(tmp_path: Path) -> None:
    """A device that loses its memory then is refused for no longer than its clock was ahead."""
    memory = Memory.load(tmp_path)
    assert memory.next_sequence(1_000_000) == 1_000_000
    assert [memory.next_sequence(now) for now in range(5, 5 + 1000)] == list(range(1_000_001, 1_001_001))


def test_a_device_remembers_which_answer_was_not_heard(tmp_path: Path) -> None:
    piece = Piece("k", 3, "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae")
    Memory(tmp_path, "t", answered=4, update=piece, content=b"foo").save(with_answer=True)
    found = Memory.load(tmp_path)
    assert (found.update, found.content, found.answered, found.token) == (piece, b"foo", 4, "t")


def test_measures_that_overflow_do_not_break_the_journal(tmp_path: Path) -> None:
    """The change of a model file of huge values has no finite square, and the journal holds JSON."""
    field = start(make(tmp_path))
    field.until(lambda: bool(field.office.live.deadlines))
    dispatch = next(iter(field.office.live.deadlines))
    flight = field.office.server.flights[dispatch]
    values_S = torch.full((flight.ranking.ends[flight.rung],), 3e38)
    now = field.clock()
    huge = UploadArrived(dispatch, flight.client, values_S, 5, now, change_sq=math.inf, drift_sq=math.nan)
    field.office._apply([huge])
    assert [r["code"] for r in field.records("rejected")] == ["GMR-403"]
    field.run()
    other, digest = continued(tmp_path / "b", field, list(read(field.journal)), [])
    assert field.office.end is not None and digest == field.office.end["model_sha256"]
    assert other.log == field.log


# -- what is left in the store ------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_nothing_is_left_in_the_store(tmp_path: Path, loss: float) -> None:
    """Devices store their answer again while they wait; refused answers lie there too."""
    slow = lambda n: 7.0 if n == 0 else 0.3  # noqa: E731
    field = make(tmp_path, 12, Faults(loss=loss, duplicate=loss), seconds=slow, answer_deadline=20.0)
    field.heartbeat = 0.5  # so the fast devices repeat their answer, and store it again, while 0 trains
    start(field)
    field.until(lambda: 2 in {f.client for f in field.office.server.flights.values()})
    refuse(field, 2, next(d for d, f in field.office.server.flights.items() if f.client == 2))
    field.until(lambda: field.office.server.version == 8)
    needed = {(f.version, f.ranking.digest) for f in field.office.server.flights.values()}
    answers = [key for key in field.world.objects if "/answers/" in key]
    assert len(answers) <= 2 * field.count, "the last of each device, and one that it stored again"
    versions = {key.split("values-")[1].split("-")[0] for key in field.world.objects if "values-" in key}
    assert versions <= {str(version) for version, _ in needed}
    field.run()
    field.until(lambda: all(d.finished for d in field.devices.values() if isinstance(d, Device)))
    while field.world.step():  # what is still on its way
        pass
    assert sorted(field.world.objects) == []


def test_a_device_that_never_answers_leaves_nothing_behind_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is restarted again and again; what it may have stored long ago is removed, and known no more."""
    monkeypatch.setattr(office_module, "_REMEMBERED", 3)
    field = make(tmp_path, 100, seconds=lambda n: 1e9 if n == 2 else 3.0, answer_deadline=5.0)
    start(field)
    sent, stored = set[int](), f"fedml_7/answers/3/{field.office.token}-"
    while len(sent) < 12:
        flights = field.office.server.flights.items()
        now = {d for d, flight in flights if flight.client == 2} - sent
        for dispatch in now:
            field.world.objects[f"{stored}{dispatch}"] = b"x"
        sent |= now
        if 2 in field.office.server.away:
            field.device(2)
        field.until(lambda now=field.world.now: field.world.now > now + 1.0)  # type: ignore[misc]
    known, flights_ = field.office._left_behind[2], field.office.server.flights
    assert len([d for d in known if d not in flights_]) <= 3 and len(known) < 12
    assert {key for key in field.world.objects if key.startswith(stored)} <= {f"{stored}{d}" for d in known}
    assert {d for d, flight in flights_.items() if flight.client == 2} <= set(known)


# -- a full disk -------------------------------------------------------------------------------------------


def test_a_full_disk_pauses_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = start(make(tmp_path / "s"))
    real = os.write

    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def partly(descriptor: int, data: Any) -> int:
        if len(data) < 40:
            full(descriptor, data)
        return real(descriptor, bytes(data)[:30])

    for version, write in ((2, full), (4, partly), (5, full)):
        field.until(lambda v=version: field.office.server.version >= v)  # type: ignore[misc]
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            field.until(lambda: bool(field.office.paused))
            before = field.office.server.version
            until = field.world.now + 30
            field.until(lambda u=until: field.world.now > u)  # type: ignore[misc]
            assert field.office.paused and field.office.waiting
            assert field.office.server.version == before
        field.until(lambda: not field.office.paused)
    end = field.run()
    assert end["windows"] == 8 and end["rejected"] == 0 and not field.office.waiting
    each_is_once(field)
    found = replayed(field)
    assert found.differences == [] and found.end is not None
    assert found.end["model_sha256"] == end["model_sha256"]
    other, digest = continued(tmp_path / "b", field, list(read(field.journal)), [])
    assert other.log == field.log and digest == end["model_sha256"]
