"""A run's processes as threads of this one: its end, its store, and how often its server wakes up."""

from __future__ import annotations

import errno
import io
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import Mock, patch

import pytest
import torch
from botocore.exceptions import ClientError
from torch import nn

from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.errors import ConfigError, HostError, RunLogError, WireError
from fedgmr_plugin.protocol.journal import Entry, Journal, read
from fedgmr_plugin.protocol.notes import (
    FINISH,
    STATUS,
    SYNC,
    FinishNote,
    StatusNote,
    plain_message,
    sign,
    to_device,
    to_server,
)
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.protocol.runlog import RunLogWriter, read_run
from fedgmr_plugin.runtimes import host, resume
from fedgmr_plugin.runtimes import progress as progress_module
from fedgmr_plugin.runtimes.devices import hands as hands_module
from fedgmr_plugin.runtimes.devices.connection import Bucket
from fedgmr_plugin.runtimes.devices.hands import ThreadedHands
from fedgmr_plugin.runtimes.devices.inbox import Inbox
from fedgmr_plugin.runtimes.devices.store import S3Store, Unreachable
from fedgmr_plugin.runtimes.progress import Progress
from fedgmr_plugin.runtimes.silos.objects import Objects
from fedgmr_plugin.runtimes.trainer import FedMLTrainer
from theory.check import check_runs
from theory.verdict import Verdict

host.prepare()

from fedgmr_plugin.runtimes.devices import client as client_module  # noqa: E402
from fedgmr_plugin.runtimes.devices import live_run as live_module  # noqa: E402
from fedgmr_plugin.runtimes.devices import server as server_module  # noqa: E402
from fedgmr_plugin.runtimes.devices.client import DeviceProcess, Parts  # noqa: E402
from fedgmr_plugin.runtimes.devices.device import Device  # noqa: E402
from fedgmr_plugin.runtimes.devices.live_run import LiveRun, _Journals  # noqa: E402
from fedgmr_plugin.runtimes.devices.plain import PlainOffice  # noqa: E402
from fedgmr_plugin.runtimes.devices.plain_device import PlainDevice  # noqa: E402
from fedgmr_plugin.runtimes.devices.server import Transport, assemble_live, prepare_server  # noqa: E402


class Line:
    """One process's connection to a broker in memory."""

    refused: HostError | None = None

    def __init__(self, world: World, topics: Sequence[str], inbox: Inbox) -> None:
        self._world, self.connected = world, threading.Event()
        self.connected.set()
        for topic in topics:
            world.inboxes[topic] = inbox

    def publish(self, topic: str, payload: bytes, *, at_most_once: bool = False) -> None:
        inbox = self._world.inboxes.get(topic)
        if inbox is not None:
            inbox.put((topic, payload))

    def keep(self, topic: str, payload: bytes) -> None:
        self._world.kept[topic] = payload

    def say_when_gone(self, topic: str, payload: Any) -> None: ...
    def start(self) -> None: ...
    def stop(self, patience: float = 5.0) -> None: ...
    def claim(self) -> bool:
        return True


class World:
    """A broker and a store in memory, and a run's configuration.

    Attributes:
        place: torch device of the server's model and of the devices'.
    """

    place = "cpu"

    def __init__(self, folder: Path, windows: int = 4, **options: Any) -> None:
        self.store, self.inboxes = Objects(), dict[str, Inbox]()
        self.kept: dict[str, bytes] = {}
        self.options = {
            "densities": [1.0, 0.5],
            "window_slack": 0.05,
            "validation_fraction": 0.3,
            "heartbeat_seconds": 0.5,
            "device_authentication": "off",
            "output_dir": str(folder),
            "run_name": "live",
            "progress": False,
            **options,
        }
        self.args = SimpleNamespace(
            run_id="7",
            client_id_list=[1, 2],
            client_num_in_total=2,
            client_num_per_round=2,
            comm_round=windows,
            random_seed=0,
            epochs=1,
            batch_size=8,
            client_optimizer="sgd",
            learning_rate=0.1,
            weight_decay=0.0,
            frequency_of_the_test=2,
            dataset="none",
            federated_optimizer="fedgmr",
            fedgmr_args=self.options,
        )

    def data(self, seed: int) -> list[Any]:
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
        return [(x, x[:, :3].argmax(1))]

    def model(self) -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

    def server(self) -> LiveRun:
        setup = prepare_server(self.args, self.place, self.data(99), self.model())
        return assemble_live(setup, None, self.transport)

    def transport(self, desk: Any, inbox: Inbox) -> Transport:
        return Transport(Line(self, desk.topics, inbox), self.store)

    def process(self, n: int, folder: Path | None = None) -> DeviceProcess:
        return DeviceProcess(
            self.args,
            n,
            self.data(n),
            self.model(),
            self.place,
            folder=folder,
            transport=lambda hears, inbox: (Line(self, [hears], inbox), self.store),
        )

    def device(self, n: int) -> threading.Thread:
        thread = threading.Thread(target=self.process(n).run, daemon=True)
        thread.start()
        return thread


@pytest.mark.parametrize("is_served", [False, True])
def test_a_device_that_hears_nothing_of_a_server_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_served: bool
) -> None:
    monkeypatch.setattr(client_module, "_UNHEARD", 0.5)
    world = World(tmp_path, windows=30, window_slack=0.1)
    run, process = world.server(), world.process(1)
    device = threading.Thread(target=process.run, daemon=True)
    if is_served:
        devices = [device, world.device(2)]
        device.start()
        run.train()
        for thread in devices:
            thread.join(20)
    else:
        device.start()
        time.sleep(1.5)
        process.device.finished = True
        device.join(10)
    said = [r.getMessage() for r in caplog.records if "nothing has been heard" in r.getMessage()]
    assert len(said) == (0 if is_served else 1)
    assert is_served or "run_id=7 for" in said[0]


def test_a_silo_that_was_started_as_another_one_ends_before_it_trains(tmp_path: Path) -> None:
    """It has another one's file, or rank: its samples would count as the other one's."""
    world = World(tmp_path, windows=30, window_slack=0.1)
    run, samples = world.server(), Slow()
    process = DeviceProcess(
        world.args,
        1,
        Parts(lambda client: samples, 40, BuiltinTrainer(), client=1),
        world.model(),
        transport=lambda hears, inbox: (Line(world, [hears], inbox), world.store),
    )

    def interrupt() -> None:
        raise KeyboardInterrupt

    def serve() -> None:
        with suppress(KeyboardInterrupt):
            run.train()

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    with pytest.raises(ConfigError, match="GMR-112 --rank 2 was given, but silo 1 is number 1 in"):
        process.run()
    assert samples.taken == 0
    until(lambda: run.office.status()[0]["state"] == "away")
    run.inbox.put(interrupt)
    server.join(20)


@pytest.mark.parametrize("missing", [[], [2], [1, 2]])
def test_a_server_that_waits_says_once_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: list[int]
) -> None:
    """Who is missing may have another key or id, or no right at the broker, and believe to be there."""
    monkeypatch.setattr(live_module, "_UNHEARD", 0.5)
    world = World(tmp_path, windows=4, window_slack=0.1, clients_at_start=2)
    run = world.server()

    def stop() -> None:
        time.sleep(2.5)
        run.inbox.put(interrupt)

    def interrupt() -> None:
        raise KeyboardInterrupt

    processes = [world.process(n) for n in (1, 2) if n not in missing]
    threads = [threading.Thread(target=process.run, daemon=True) for process in processes]
    for thread in threads:
        thread.start()
    if missing:
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run.train()
    else:
        run.train()
    for process in processes:
        process.device.finished = process.device.finished or bool(missing)
    for thread in threads:
        thread.join(20)
    said = [r.getMessage() for r in caplog.records if "of the devices" in r.getMessage()]
    assert len(said) == (1 if missing else 0)
    assert not missing or f"of the devices {missing}, and the run waits for clients_at_start=2 (" in said[0]


@pytest.mark.parametrize(("sent", "own"), [("model", "bfloat16"), ("bfloat16", "model")])
def test_a_device_whose_file_has_another_payload_type_refuses_what_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: str, own: str
) -> None:
    world = World(tmp_path, payload_dtype=sent, densities=[1.0, 1.0])
    monkeypatch.setattr(
        world, "model", lambda: nn.Sequential(nn.Linear(6, 6000), nn.ReLU(), nn.Linear(6000, 3))
    )
    run = world.server()

    def serve() -> None:
        with pytest.raises(HostError, match="enough"):
            run.train()

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    world.options["payload_dtype"] = own
    process = world.process(1)
    device = threading.Thread(target=process.run, daemon=True)
    device.start()
    for _ in range(400):
        if process.device.refused:
            break
        time.sleep(0.05)
    assert set(process.device.refused) == {"GMR-708"}
    process.device.finished = True
    device.join(10)
    run.link.refused = HostError("GMR-515", "enough")
    server.join(10)


def others(world: World) -> list[str]:
    """Store what is not this run's, though its name is near."""
    keys = [
        "fedml_7/sent/ffff/values-0",
        "fedml_7/answers/1/ffff-0",
        "fedml_77/sent/x",
        "fedml_7_9_x",
        "other",
    ]
    for key in keys:
        world.store.put(Piece(key, 1, ""), b"x")
    return keys


def test_nothing_of_a_run_is_left_in_the_store(tmp_path: Path) -> None:
    world = World(tmp_path)
    kept = others(world)
    world.store.put(Piece("fedml_7_1_late", 1, ""), b"x")  # of one of FedML's own devices
    world.store.put(Piece("fedml_7/probes/2/0f", 1, ""), b"x")  # of a device that was killed meanwhile
    run = world.server()
    world.store.put(Piece(f"fedml_7/answers/2/{run.office.token}-99", 1, ""), b"x")  # of a late device
    devices = [world.device(n) for n in (1, 2)]
    run.train()
    for device in devices:
        device.join(20)
    assert read_run(tmp_path / "live").end is not None
    assert sorted(world.store.keys("")) == sorted(kept)


def test_a_dense_device_that_comes_late_is_no_violation(tmp_path: Path) -> None:
    """It fetches masks that are in the store already: its bytes are more than the server's."""
    world = World(tmp_path, windows=10, interval=20)
    world.args.training_type = "cross_device"
    run = world.server()
    server = threading.Thread(target=run.train, daemon=True)
    server.start()
    devices = [world.device(2)]
    while run.office.server.version < 3:
        assert server.is_alive()
        time.sleep(0.01)
    devices.append(world.device(1))
    for thread in (server, *devices):
        thread.join(30)
    assert unviolated(tmp_path)["server_bytes"] is Verdict.HOLDS


def test_sub_models_in_place_of_those_that_are_overdue_are_no_violation(tmp_path: Path) -> None:
    """Both devices lose their first one; two more leave in the same window."""
    world = World(tmp_path, windows=3, answer_deadline=1.0, retry_seconds=0.2)
    world.args.training_type = "cross_device"
    run, devices = world.server(), []
    for n in (1, 2):
        process = world.process(n)
        device, real = process.device, process.device._train

        def train(sent: Any, then: Any, device: Any = device, real: Any = real) -> None:
            if sent.dispatch < 2:
                device.working = None
            else:
                real(sent, then)

        device._train = train
        devices.append(threading.Thread(target=process.run, daemon=True))
        devices[-1].start()
    run.train()
    for thread in devices:
        thread.join(20)
    log = read_run(tmp_path / "live")
    assert [r["version"] for r in log.records("dispatch")][:4] == [0] * 4
    assert unviolated(tmp_path)["capacity"] is Verdict.HOLDS


def test_another_sub_model_in_the_window_of_a_refused_answer_is_no_violation(tmp_path: Path) -> None:
    world = World(tmp_path, windows=3, window_slack=1.0, retry_seconds=0.1)
    world.args.training_type = "cross_device"
    run, process = world.server(), world.process(1)
    device, real = process.device, process.device._train

    def train(sent: Any, then: Any) -> None:
        if sent.count == 0:
            real(sent, lambda update: then(update._replace(values_S=update.values_S * float("nan"))))
        else:
            real(sent, then)

    device._train = train
    devices = [threading.Thread(target=process.run, daemon=True), world.device(2)]
    devices[0].start()
    run.train()
    for thread in devices:
        thread.join(20)
    log = read_run(tmp_path / "live")
    assert [(r["client"], r["code"]) for r in log.records("rejected")] == [(0, "GMR-403")]
    assert [r["version"] for r in log.records("dispatch") if r["client"] == 0][:2] == [0, 0]
    assert unviolated(tmp_path)["one_in_flight"] is Verdict.HOLDS


def test_an_answer_that_was_overdue_for_windows_is_no_violation(tmp_path: Path) -> None:
    world = World(tmp_path, windows=6, answer_deadline=0.4, retry_seconds=0.1)
    world.args.training_type = "cross_device"
    run, process = world.server(), world.process(2)
    real = process.device._train  # type: ignore[union-attr]

    def train(sent: Any, then: Any) -> None:
        def later(update: Any) -> None:
            threading.Thread(target=wait, args=(update,), daemon=True).start()

        def wait(update: Any) -> None:
            while run.office.server.version < 3:
                time.sleep(0.02)
            process._inbox.put(lambda: then(update))

        real(sent, later)

    process.device._train = train  # type: ignore[union-attr]
    slow = threading.Thread(target=process.run, daemon=True)
    slow.start()
    server = threading.Thread(target=run.train, daemon=True)
    server.start()
    while not run.office.server.overdue:
        time.sleep(0.02)
    devices = [slow, server, world.device(1)]
    for thread in devices:
        thread.join(30)
    log = read_run(tmp_path / "live")
    assert max(r["staleness"] for r in log.records("arrival") if r["client"] == 1) > 1
    unviolated(tmp_path)


def test_densities_that_were_measured_are_no_violation(tmp_path: Path) -> None:
    world = World(tmp_path, densities=[0.5, 0.2], measured_densities=True, client_upload=1e-6)
    world.args.training_type = "cross_device"
    run = world.server()
    devices = [world.device(n) for n in (1, 2)]
    run.train()
    for thread in devices:
        thread.join(20)
    log = read_run(tmp_path / "live")
    assert {r["density"] for r in log.records("dispatch")} == {1.0}
    unviolated(tmp_path)


def test_a_server_that_is_refused_its_place_begins_nothing(tmp_path: Path) -> None:
    """As one whose gRPC port is another's."""
    run = World(tmp_path).server()

    def refuse() -> None:
        raise HostError("GMR-517", "another process listens there")

    run.link.start = refuse  # type: ignore[method-assign]
    with pytest.raises(HostError, match="GMR-517"):
        run.train()
    assert list((tmp_path / "live").iterdir()) == [] and not run.hands._thread.is_alive()


def test_a_run_that_sweeps_still_keeps_others_from_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects of another run of this `run_id`, whose names do not tell it, would be swept too."""
    world, done = World(tmp_path, windows=1), list[str]()
    run = world.server()
    monkeypatch.setattr(run.hands, "sweep", lambda *given: done.append("swept"))
    monkeypatch.setattr(run.link, "stop", lambda: done.append("gone"))
    devices = [world.device(n) for n in (1, 2)]
    run.train()
    for device in devices:
        device.join(20)
    assert done[:2] == ["swept", "gone"]


@pytest.mark.parametrize("is_taken", [False, True])
def test_who_gives_way_leaves_the_objects_that_the_other_needs(tmp_path: Path, is_taken: bool) -> None:
    """They may have one token: both went on with one run, on two machines."""
    world = World(tmp_path)
    run = world.server()
    run.office.journal = Journal(tmp_path / "journal")
    run._kept = []
    run.presence = Mock(taken_by="process 1 on another machine" if is_taken else "")
    world.store.put(Piece(f"fedml_7/sent/{run.office.token}/values-0", 1, ""), b"x")
    run._sweep()
    assert len(world.store) == int(is_taken)
    run.office.journal.close()


def test_what_an_earlier_server_had_ordered_is_removed_but_for_what_is_needed(tmp_path: Path) -> None:
    office, removed = World(tmp_path).server().office, list[str]()
    office._hands = Mock(delete=removed.extend)
    with patch.object(type(office), "needed", return_value=frozenset("b")):
        office.abandon("abc")
    assert removed == ["a", "c"]


def test_all_pages_of_a_bucket_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store = S3Store(Bucket("http://127.0.0.1:1", "b", "k", "s"))

    def page(Bucket: str, Prefix: str, ContinuationToken: str = "0") -> dict[str, Any]:
        n = int(ContinuationToken)
        contents = {"Contents": [{"Key": f"{Prefix}{n}"}]} if n != 1 else {}
        return {**contents, "IsTruncated": n < 2, "NextContinuationToken": str(n + 1)}

    monkeypatch.setattr(store, "_client", SimpleNamespace(list_objects_v2=page))
    assert store.keys("a/") == ["a/0", "a/2"]


@pytest.mark.parametrize("digest", ["", "0" * 64], ids=["not announced", "announced"])
def test_an_object_that_ends_too_early_is_got_again(monkeypatch: pytest.MonkeyPatch, digest: str) -> None:
    """FedML's own devices announce no digest: what is missing would be zeros."""
    store = S3Store(Bucket("http://127.0.0.1:1", "b", "k", "s"))
    cut = {"ContentLength": 10, "Body": io.BytesIO(b"12345")}
    monkeypatch.setattr(store, "_client", SimpleNamespace(get_object=lambda **named: cut))
    with pytest.raises(Unreachable, match="key=a ended after 5 of 10 bytes"):
        store.get(Piece("a", 10, digest))


def test_objects_that_stay_are_told_of_or_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """S3 answers with an error for each object that it did not delete, and no other."""
    store, errors = S3Store(Bucket("http://127.0.0.1:1", "b", "k", "s")), list[dict[str, str]]()
    refused, alone = ClientError({"Error": {"Code": "AccessDenied"}}, "DeleteObject"), list[str]()

    def delete_object(Bucket: str, Key: str) -> None:
        alone.append(Key)
        if Key == "a":
            raise refused

    client = SimpleNamespace(
        delete_objects=lambda **named: {"Errors": list(errors)}, delete_object=delete_object
    )
    monkeypatch.setattr(store, "_client", client)
    store.delete(["a"])
    assert alone == [] and not caplog.text
    errors += [{"Key": key, "Code": "AccessDenied"} for key in "ba"]
    store.delete(["a", "b"])
    store.delete(["a"])
    assert alone == ["b", "a"] * 2 and caplog.text.count("key=a stays in the store: GMR-515") == 1
    client.delete_objects = Mock(side_effect=refused)
    store.delete(["c", "d"])
    assert alone[4:] == ["c", "d"]
    client.delete_objects = lambda **named: {"Errors": list(errors)}
    errors.append({"Key": "b", "Code": "InternalError"})
    with pytest.raises(Unreachable, match="delete_objects"):
        store.delete(["a", "b"])


@pytest.mark.parametrize(
    "code", ["NoSuchKey", "AccessDenied", "InvalidObjectState", "InvalidRequest", "KMS.DisabledException"]
)
def test_an_object_that_is_missing_ends_nobody(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """S3 says that access is denied where one may read an object, but not list the bucket."""
    store = S3Store(Bucket("http://127.0.0.1:1", "b", "k", "s"))

    def refuse(**named: Any) -> Any:
        raise ClientError({"Error": {"Code": code}}, "Operation")

    monkeypatch.setattr(store, "_client", SimpleNamespace(get_object=refuse, put_object=refuse))
    with pytest.raises(WireError, match="GMR-746"):
        store.get(Piece("k", 1, ""))
    if code == "AccessDenied":
        with pytest.raises(HostError, match="GMR-515"):
            store.put(Piece("k", 1, ""), b"x")


class Broken(Exception):
    """Something that ends a run."""


def break_after_window(window: int, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until a window is recorded, and fail there."""
    record = run.record

    def breaking(fields: dict[str, Any]) -> None:
        record(fields)
        if fields["type"] == "window" and fields["window"] == window:
            raise Broken

    monkeypatch.setattr(run, "record", breaking)
    with pytest.raises(Broken):
        run.train()


@pytest.mark.parametrize("seconds", [None, 0.0])
def test_an_interrupted_run_leaves_what_going_on_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float | None
) -> None:
    """With checkpoints their objects, without any none: the journal stores them again."""
    world = World(tmp_path, 12, checkpoint_seconds=seconds)
    kept = others(world)
    run = world.server()
    devices = [world.device(n) for n in (1, 2)]
    break_after_window(6, run, monkeypatch)
    left = world.store.keys(f"fedml_7/sent/{run.office.token}/")
    assert bool(left) == (seconds is not None) and set(kept) <= set(world.store.keys(""))
    with resume.resuming(tmp_path / "live"):
        again = world.server()
    assert again.office.token == run.office.token
    again.train()
    for device in devices:
        device.join(20)
    end = read_run(tmp_path / "live").end
    assert end is not None and end["windows"] == 12
    assert sorted(world.store.keys("")) == sorted(kept)


def test_a_run_that_is_interrupted_as_it_goes_on_leaves_what_its_checkpoint_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, needed = World(tmp_path, 12, checkpoint_seconds=0.0), set[str]()
    run = world.server()
    devices = [world.device(n) for n in (1, 2)]
    break_after_window(6, run, monkeypatch)
    with resume.resuming(tmp_path / "live"):
        again = world.server()
    load = again.office.load_state

    def loading(*state: Any) -> None:
        load(*state)
        needed.update(again.office.needed())

    monkeypatch.setattr(again.office, "load_state", loading)
    monkeypatch.setattr(again, "_loop", Mock(side_effect=Broken))
    with pytest.raises(Broken):
        again.train()
    needed &= again.office.needed()  # the journal stores the rest again, or removes it
    assert needed and needed <= set(world.store.keys(""))
    with resume.resuming(tmp_path / "live"):
        world.server().train()
    for device in devices:
        device.join(20)


def test_a_checkpoint_says_what_is_still_to_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, removed = World(tmp_path, 12, checkpoint_seconds=0.0), list[str]()
    run = world.server()
    monkeypatch.setattr(run.hands, "undeleted", lambda: ["a"])
    devices = [world.device(n) for n in (1, 2)]
    break_after_window(6, run, monkeypatch)
    with resume.resuming(tmp_path / "live"):
        again = world.server()
    monkeypatch.setattr(again.office, "abandon", removed.extend)
    again.train()
    for device in devices:
        device.join(20)
    assert removed == ["a"]


def test_where_the_last_checkpoint_is_damaged_the_one_before_it_and_the_journals_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: the same one serves again, with what happened before the one that is damaged, and since."""
    world, folder, lines = World(tmp_path, 12, checkpoint_seconds=0.0), tmp_path / "live", b""
    run = world.server()
    devices = [world.device(n) for n in (1, 2)]
    for window in (6, 8):
        break_after_window(window, run, monkeypatch)
        log = (folder / "run.jsonl").read_bytes()
        assert log.startswith(lines)
        lines = log
        *_, last = sorted((folder / "checkpoints").glob("*.safetensors"))
        last.write_bytes(b"damaged")
        with resume.resuming(folder):
            run = world.server()
    run.train()
    for device in devices:
        device.join(20)
    assert len(list((folder / "checkpoints").glob("*.damaged"))) == 2
    end = read_run(folder).end
    assert (folder / "run.jsonl").read_bytes().startswith(lines) and end is not None and end["windows"] == 12


@pytest.mark.parametrize("checkpoints", [0.0, None])
def test_a_run_does_not_go_on_with_its_devices_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: float | None
) -> None:
    """A silo answers without a number: it would be credited with what another one was sent."""
    world = World(tmp_path, 12, checkpoint_seconds=checkpoints)
    run = world.server()
    devices = [world.device(n) for n in (1, 2)]
    break_after_window(3, run, monkeypatch)
    before = (tmp_path / "live" / "run.jsonl").read_bytes()
    world.args.client_id_list = [2, 1]
    with resume.resuming(tmp_path / "live"):
        run = world.server()
    with pytest.raises(RunLogError, match=r"GMR-606 client_id_list: \[1, 2\] became \[2, 1\]"):
        run.train()
    assert (tmp_path / "live" / "run.jsonl").read_bytes() == before
    world.args.client_id_list = [1, 2]
    with resume.resuming(tmp_path / "live"):
        world.server().train()
    for device in devices:
        device.join(20)


@pytest.mark.parametrize(("key", "before", "now"), [("run_id", "7", "8"), ("server_id", 0, 3)])
def test_a_run_does_not_go_on_where_its_devices_do_not_hear_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, before: Any, now: Any
) -> None:
    world = World(tmp_path, 12)
    run = world.server()
    devices = [world.device(n) for n in (1, 2)]
    break_after_window(3, run, monkeypatch)
    setattr(world.args, key, now)
    with resume.resuming(tmp_path / "live"):
        run = world.server()
    with pytest.raises(RunLogError, match=f"GMR-606 {key}: {before} became {now}"):
        run.train()
    setattr(world.args, key, before)
    names = tmp_path / "live" / "clients.json"
    names.write_text(json.dumps(json.loads(names.read_text())["client_id_list"]))  # as an older release did
    with resume.resuming(tmp_path / "live"):
        world.server().train()
    for device in devices:
        device.join(20)


def test_a_run_goes_on_from_its_own_initial_model_whatever_its_script_makes_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first checkpoint the journal has changes of the weights that the run began with."""
    world, folder = World(tmp_path, 12, checkpoint_seconds=None), tmp_path / "live"
    run = world.server()
    devices = [world.device(n) for n in (1, 2)]
    break_after_window(6, run, monkeypatch)
    w_D = run.office.server.w_D.clone()
    before = (folder / "run.jsonl").read_bytes(), (folder / "initial.safetensors").read_bytes()
    monkeypatch.setattr(world, "model", lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)))
    with resume.resuming(folder):
        again = world.server()
    loop = again._loop

    def looping(*given: Any) -> None:
        assert torch.equal(again.office.server.w_D, w_D)
        loop(*given)

    monkeypatch.setattr(again, "_loop", looping)
    again.train()
    for device in devices:
        device.join(20)
    assert (folder / "run.jsonl").read_bytes().startswith(before[0])
    assert (folder / "initial.safetensors").read_bytes() == before[1]


def test_a_run_whose_initial_model_is_damaged_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, 12, checkpoint_seconds=None)
    run = world.server()
    devices = [world.device(n) for n in (1, 2)]
    break_after_window(3, run, monkeypatch)
    initial = tmp_path / "live" / "initial.safetensors"
    sound = initial.read_bytes()
    initial.write_bytes(sound[:100])
    with (
        resume.resuming(tmp_path / "live"),
        pytest.raises(RunLogError, match=r"GMR-606 initial\.safetensors"),
    ):
        world.server()
    initial.write_bytes(sound)
    with resume.resuming(tmp_path / "live"):
        world.server().train()
    for device in devices:
        device.join(20)


def test_a_journal_that_is_missing_before_another_one_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its events would be left out, and what followed them taken in."""
    world = World(tmp_path, 12, checkpoint_seconds=0.0)
    run = world.server()
    devices = [world.device(n) for n in (1, 2)]
    break_after_window(6, run, monkeypatch)
    *_, last = sorted((tmp_path / "live" / "checkpoints").glob("*.safetensors"))
    last.write_bytes(b"damaged")
    first, *_ = sorted((tmp_path / "live" / "journal").iterdir())
    first.rename(tmp_path / first.name)
    with resume.resuming(tmp_path / "live"):
        run = world.server()
    monkeypatch.setattr(run, "_loop", Mock(side_effect=Broken))
    with pytest.raises(RunLogError, match=f"GMR-607 {first.name} is missing, a later one is there"):
        run.train()
    (tmp_path / first.name).rename(first)
    with resume.resuming(tmp_path / "live"):
        world.server().train()
    for device in devices:
        device.join(20)


def test_a_journal_behind_those_that_were_moved_away_is_read(tmp_path: Path) -> None:
    """As the hint of GMR-607 has it: the run goes on from its checkpoint alone, and may be killed again."""
    for entry in range(2):
        journals = _Journals(tmp_path, 7)
        past = journals.entries(range(7, journals.last + 1))
        assert [found.head for found in past] == [{"entry": before} for before in range(entry)]
        with journals.next() as journal:
            journal.append([Entry({"entry": entry})])


def test_a_journal_that_cannot_be_made_leaves_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journals = _Journals(tmp_path, 0)
    with monkeypatch.context() as full:
        full.setattr(
            live_module, "Journal", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        )
        with pytest.raises(OSError, match="No space"):
            journals.next()
    journals.next().close()
    assert list(journals.entries(range(journals.last + 1))) == []


@pytest.mark.parametrize("seconds", [None, 0.0])
def test_the_clock_goes_on_where_the_journal_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float | None
) -> None:
    """Not where the last checkpoint was made: what happened since would be in the future."""
    world = World(tmp_path, 12, checkpoint_seconds=seconds)
    run = world.server()
    devices = [world.device(n) for n in (1, 2)]
    break_after_window(6, run, monkeypatch)
    (journal, *_) = sorted((tmp_path / "live" / "journal").glob("*"), reverse=True)
    last = max(float(entry.head["time"]) for entry in read(journal))
    with resume.resuming(tmp_path / "live"):
        again = world.server()
    start, started = again.clock.start, list[float]()

    def noted(at: float) -> None:
        started.append(at)
        start(at)

    monkeypatch.setattr(again.clock, "start", noted)
    again.train()
    for device in devices:
        device.join(20)
    assert started == [last] and last > 0.0


def test_the_end_that_cannot_be_written_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on when there is space; until then, `fedgmr resume` can, too."""
    monkeypatch.setattr(live_module, "_STATUS_SECONDS", 0.1)
    world = World(tmp_path, windows=2)
    run = world.server()
    write, tried = RunLogWriter.write, list[bool]()

    def full(writer: RunLogWriter, record: Mapping[str, Any]) -> None:
        if record["type"] == "end" and len(tried) < 3:
            tried.append(run.end is None and (tmp_path / "live" / "journal").is_dir())
            raise OSError(errno.ENOSPC, "no space")
        write(writer, record)

    monkeypatch.setattr(RunLogWriter, "write", full)
    devices = [world.device(n) for n in (1, 2)]
    run.train()
    for device in devices:
        device.join(20)
    assert tried == [True] * 3 and read_run(tmp_path / "live").end is not None and run.end is not None


def test_a_run_that_could_not_write_its_end_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happened since the last checkpoint is not removed before the end is written down."""
    world = World(tmp_path, windows=3)
    run = world.server()
    monkeypatch.setattr(run, "_write_end", Mock(side_effect=KeyboardInterrupt))
    devices = [world.device(n) for n in (1, 2)]
    with pytest.raises(KeyboardInterrupt):
        run.train()
    for device in devices:
        device.join(20)
    assert list((tmp_path / "live" / "journal").iterdir()) != []
    with resume.resuming(tmp_path / "live"):
        world.server().train()
    end = read_run(tmp_path / "live").end
    assert end is not None and end["windows"] == 3


def test_nothing_is_left_to_do_when_the_end_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind its end nobody goes on with a run: whoever is away has to find it, and the store to be empty."""
    world, seen = World(tmp_path, windows=2, answer_deadline=2.0, clients_at_start=1), list[Any]()
    run = world.server()
    write, stop = run._write_end, run.link.stop

    def written(writer: RunLogWriter, end: dict[str, Any]) -> None:
        seen.append((set(world.kept), world.store.keys("")))
        write(writer, end)

    def stopped() -> None:
        seen.append("gone")
        stop()

    monkeypatch.setattr(run, "_write_end", written)
    monkeypatch.setattr(run.link, "stop", stopped)
    device = world.device(1)
    run.train()
    device.join(20)
    assert seen[:2] == ["gone", ({to_device("7", 0, n) for n in (1, 2)}, [])]
    assert seen[2:] == ["gone"]  # `train`'s own
    assert all(world.kept[to_device("7", 0, n)] == b"" for n in [1]) and world.kept[to_device("7", 0, 2)]


def test_a_server_that_was_killed_while_it_swept_goes_on_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, windows=3, checkpoint_seconds=0.0)
    run = world.server()
    monkeypatch.setattr(run.hands, "sweep", Mock(side_effect=Broken))
    devices = [world.device(n) for n in (1, 2)]
    with pytest.raises(Broken):
        run.train()
    for device in devices:
        device.join(20)
    lines = (tmp_path / "live" / "run.jsonl").read_bytes()
    world.store.put(Piece(f"fedml_7/answers/2/{run.office.token}-99", 1, ""), b"x")
    with resume.resuming(tmp_path / "live"):
        world.server().train()
    assert (tmp_path / "live" / "run.jsonl").read_bytes().startswith(lines)
    end = read_run(tmp_path / "live").end
    assert end is not None and end["windows"] == 3 and world.store.keys("") == []


def test_log_and_model_are_on_the_disk_before_the_journals_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut at the end leaves either the end, or what goes on to it."""
    synchronised: dict[str, bytes] = {}
    fsync, remove, seen = os.fsync, live_module.shutil.rmtree, list[dict[str, bytes]]()

    def noted(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synchronised[place.name] = place.read_bytes() if place.is_file() else b""
        if place.is_dir():
            synchronised[place.name] = " ".join(sorted(path.name for path in place.iterdir())).encode()
        fsync(descriptor)

    def removed(folder: Path, **named: Any) -> None:
        seen.append(dict(synchronised))
        remove(folder, **named)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(live_module.shutil, "rmtree", removed)
    world = World(tmp_path, windows=2)
    run = world.server()
    devices = [world.device(n) for n in (1, 2)]
    run.train()
    for device in devices:
        device.join(20)
    (then,) = seen
    assert then["run.jsonl"] == (tmp_path / "live" / "run.jsonl").read_bytes()
    assert then["model.draft"] == (tmp_path / "live" / "model.safetensors").read_bytes()
    assert b"model.safetensors" in then["live"]


@pytest.mark.parametrize("trouble", ["away", "slow"])
def test_a_store_that_does_not_answer_keeps_no_run_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    assert live_module._SWEEP == 10.0, "as docs/guarantees.md has it"
    monkeypatch.setattr(live_module, "_SWEEP", 0.2)
    never = threading.Event()

    def keys(prefix: str) -> list[str]:
        if trouble == "slow":
            never.wait()
        raise Unreachable("nobody is there")

    world = World(tmp_path)
    monkeypatch.setattr(world.store, "keys", keys)
    run = world.server()
    devices = [world.device(n) for n in (1, 2)]
    run.train()
    never.set()
    for device in devices:
        device.join(20)
    assert read_run(tmp_path / "live").end is not None


# -- idle --------------------------------------------------------------------------------------------------


class Enough(Exception):
    """The time of a test is over."""


class Sleeping(Inbox):
    """Time goes on only while somebody waits for something to arrive."""

    now, until = 0.0, 0.0
    waits: ClassVar[list[float]] = []

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        try:
            return super().get(False)
        except queue.Empty:
            waited = (timeout if timeout is not None else float("inf")) if block else 0.0
            Sleeping.waits.append(waited)
            Sleeping.now += waited
            if Sleeping.now >= Sleeping.until or len(Sleeping.waits) > 5000:
                raise Enough from None
            raise


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> type[Sleeping]:
    """A fake clock for servers and devices, ten minutes long."""
    Sleeping.now, Sleeping.until, Sleeping.waits = 0.0, 600.0, []
    clock = SimpleNamespace(monotonic=lambda: Sleeping.now)
    for module in (live_module, client_module):
        monkeypatch.setattr(module, "time", clock)
    for module in (server_module, client_module):
        monkeypatch.setattr(module, "Inbox", Sleeping)
    return Sleeping


@pytest.mark.parametrize(
    "scene", ["nobody", "silent", "gone", "refused", "full disk", "full disk at the end"]
)
def test_an_idle_server_wakes_up_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asleep: type[Sleeping], scene: str
) -> None:
    """Nothing is polled: whatever the server waits for, it sleeps until then, or for a second."""
    world = World(tmp_path, answer_deadline=60.0, retry_seconds=7.0)
    run = world.server()
    for sequence, state in enumerate(("ONLINE", "OFFLINE")[: {"nobody": 0, "gone": 2}.get(scene, 1)], 1):
        for n in (1, 2):
            topic = to_server("7", n)
            note = StatusNote("7", n, sequence, state, samples=40 if state == "ONLINE" else None)
            run.inbox.put((topic, sign(note, topic, None, {"msg_type": STATUS, "sender": n})))

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def refuse() -> None:
        for dispatch, flight in list(run.office.server.flights.items()):
            run.office._refuse(flight.client, dispatch, WireError("GMR-710", "too long"))

    def end() -> None:
        monkeypatch.setattr(RunLogWriter, "write", full)
        run._unwritten.append({})
        run.office.end = {}

    if scene == "full disk":
        monkeypatch.setattr(Journal, "append", full)
    elif scene == "refused":
        run.inbox.put(refuse)
    elif scene == "full disk at the end":
        run.inbox.put(end)
    with pytest.raises(Enough):
        run.train()
    assert asleep.now >= 600 and len(asleep.waits) <= 640
    assert max(asleep.waits) <= 1.0
    dispatches = len(read_run(tmp_path / "live").records("dispatch"))
    assert (dispatches > 0) == (scene not in ("nobody", "full disk"))


@pytest.mark.parametrize("is_connected", [True, False])
def test_an_idle_device_wakes_up_once_a_second(
    asleep: type[Sleeping], tmp_path: Path, is_connected: bool
) -> None:
    world = World(tmp_path, heartbeat_seconds=15.0)
    process = world.process(1)
    if not is_connected:
        process._inbox.put(process._link.connected.clear)
    with pytest.raises(Enough):
        process.run()
    assert asleep.now >= 600 and len(asleep.waits) <= 640 and max(asleep.waits) <= 1.0


@pytest.mark.parametrize("who", ["device", "server", "server that has not begun"])
def test_whom_the_broker_refuses_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asleep: type[Sleeping], who: str
) -> None:
    """Its password, its rights or its trust in the broker are wrong: nothing would ever arrive."""
    monkeypatch.setattr(Line, "refused", HostError("GMR-515", "the broker refuses"))
    monkeypatch.setattr(Line, "claim", lambda line: who == "server")
    world = World(tmp_path)
    with pytest.raises(HostError, match="GMR-515 the broker refuses"):
        world.process(1).run() if who == "device" else world.server().train()
    assert (tmp_path / "live" / "run.jsonl").exists() == (who == "server")


@pytest.mark.parametrize("where", ["put", "get", "delete", "publish"])
def test_an_error_that_nobody_expected_ends_the_run(where: str) -> None:
    """Otherwise everything behind it would be waited for without end."""

    def fail(*given: Any, **how: Any) -> Any:
        raise ZeroDivisionError

    inbox = Inbox()
    store, link = Objects(), Line(World(Path()), [], inbox)
    setattr(link if where == "publish" else store, where, fail)
    hands = ThreadedHands(store, link, inbox)
    hands.start()
    {
        "put": lambda: hands.put(Piece("k", 1, ""), b"x"),
        "get": lambda: hands.fetch(Piece("k", 1, ""), lambda content: None),
        "delete": lambda: hands.delete(["k"]),
        "publish": lambda: hands.publish("t", b"x"),
    }[where]()
    with pytest.raises(ZeroDivisionError):
        inbox.get(timeout=5)()
    hands.close()


def test_who_publishes_is_told_when_it_has_left_behind_what_was_given_before() -> None:
    inbox, order, stored = Inbox(), list[Any](), threading.Event()
    store, link = Objects(), Line(World(Path()), [], inbox)
    store.put = lambda *given: stored.wait(5)  # type: ignore[method-assign]
    link.publish = lambda *given, **how: order.append(how)  # type: ignore[method-assign]
    hands = ThreadedHands(store, link, inbox)
    hands.start()
    hands.put(Piece("k", 1, ""), b"x")
    hands.publish("t", b"x", lambda: order.append("told"), at_most_once=True)
    assert inbox.empty() and not order
    stored.set()
    inbox.get(timeout=5)()
    assert order == [{"at_most_once": True}, "told"]
    hands.close()


class Slow:
    """Samples that take their time."""

    def __init__(self) -> None:
        self.taken = 0

    def __len__(self) -> int:
        return 40

    def take(self, index: Any) -> Any:
        self.taken += 1
        time.sleep(0.05)
        x = torch.zeros(len(index), 6)
        return x, torch.zeros(len(index), dtype=torch.int64)


class Loops:
    """A user's trainer, which catches whatever its data raise."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get_model_params(self) -> Any:
        return self.model.state_dict()

    def set_model_params(self, params: Any) -> None:
        self.model.load_state_dict(params)

    def train(self, data: Any, device: Any, args: Any) -> None:
        try:
            for _ in data:
                pass
        except Exception:  # noqa: BLE001  # a user's trainer that catches everything
            self.train(data, device, args)


@pytest.mark.parametrize("end", ["finish", "interrupt"])
@pytest.mark.parametrize("own", [False, True])
def test_a_device_whose_run_is_over_trains_no_more(tmp_path: Path, own: bool, end: str) -> None:
    """Its process would only end with that training, which may take hours."""
    world, slow = World(tmp_path, local_steps=400), Slow()
    trainer: Any = BuiltinTrainer()
    if own:
        trainer = FedMLTrainer(Loops(world.model()), world.args)
    topic = to_device("7", 0, 1)
    process = DeviceProcess(
        world.args,
        1,
        Parts(lambda client: slow, 40, trainer),
        world.model(),
        transport=lambda hears, inbox: (Line(world, [hears], inbox), world.store),
    )
    run = world.server()

    def serve() -> None:
        with suppress(KeyboardInterrupt):
            run.train()

    server = threading.Thread(target=serve, daemon=True)
    server.start()

    def over() -> None:
        until(lambda: slow.taken > 0)
        if end == "interrupt":
            process._inbox.put(interrupt)
        else:
            note = FinishNote(run.office.token, 1, 2**50)
            process._inbox.put((topic, sign(note, topic, None, {"msg_type": FINISH})))

    def interrupt() -> None:
        raise KeyboardInterrupt

    threading.Thread(target=over, daemon=True).start()
    if end == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            process.run()
    else:
        process.run()
    (thread,) = process._trainer._threads
    thread.join(2.0)
    assert not thread.is_alive() and slow.taken < 100
    if end == "interrupt":  # nobody waits for its answer until the deadline
        until(lambda: run.office.status()[0]["state"] == "away")
    run.inbox.put(interrupt)
    server.join(20)


def unviolated(folder: Path) -> dict[str, Verdict]:
    """Verdicts of the theory's check of the run in `folder`, none of which says violated."""
    findings = check_runs([folder / "live"]).runs[0].findings
    assert not [f for f in findings if f.verdict is Verdict.VIOLATED]
    return {f.name: f.verdict for f in findings}


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_waits_for_the_store_is_not_given_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a night without a store, a device's answer would be stored hundreds of times, its server's
    reminders by the million fill the memory."""
    there = threading.Event()
    puts: list[Piece] = []

    class Away(Objects):
        def put(self, piece: Piece, content: Any) -> None:
            if not there.is_set():
                raise Unreachable("away")
            puts.append(piece)

    monkeypatch.setattr(hands_module, "_FIRST_WAIT", hands_module._STUCK_WAIT)
    monkeypatch.setattr(hands_module, "_LONGEST_WAIT", hands_module._STUCK_WAIT)
    world, now = World(tmp_path), [0.0]
    world.store = Away()
    process, run = world.process(1), world.server()
    run.record = lambda fields: None  # type: ignore[method-assign]
    device, office = process.device, run.office
    assert isinstance(device, Device)
    device.memory.update, device.memory.content = Piece("k", 1, "0" * 64), b"x"
    device._clock = lambda: now[0]
    assert not process._hands.is_stuck()
    for hands in (process._hands, run.hands):
        hands.start()
    office.begin(Journal(tmp_path / "journal"))
    device.begin()
    until(process._hands.is_stuck)
    for n in range(100):
        now[0] += 15.0
        device.tick()
        note = StatusNote("7", 1, n, "ONLINE")
        office.desk._buckets[0].take = lambda now: None  # type: ignore[method-assign]
        office.message(to_server("7", 1), sign(note, to_server("7", 1), None, {"msg_type": STATUS}))
        if n == 0:  # it has joined
            until(run.hands.is_stuck)
    assert len(process._hands._jobs) == 2 and len(run.hands._jobs) < 8
    there.set()
    assert process._hands.flush(20) and run.hands.flush(20)
    assert not process._hands.is_stuck() and len(puts) == len(set(puts))
    process._link.connected.clear()
    repeats = device._repeats
    for _ in range(100):
        now[0] += 15.0
        device.tick()
    assert process._hands.flush(5) and device._repeats == repeats and device.next_tick() == now[0] + 1.0
    process._link.connected.set()
    now[0] += 1.0
    device.tick()
    assert process._hands.flush(5) and device._repeats == repeats + 1
    for hands in (process._hands, run.hands):
        hands.close()
    assert office.journal is not None
    office.journal.close()


@pytest.mark.parametrize("wrong", [{"client_idx": "x"}, {"client_idx": [1]}, {"model_params": "none"}, {}])
def test_what_anybody_may_send_does_not_end_a_device_that_checks_no_signature(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    """Neither a message that is not understood nor a model file that is none."""
    world = World(tmp_path, device_submodel="masked")
    device = world.device(1)
    while to_device("7", 0, 1) not in world.inboxes:
        time.sleep(0.01)
    world.store.put(Piece("file", 4, ""), b"file")
    inbox = world.inboxes[to_device("7", 0, 1)]
    for _ in range(20):
        inbox.put((to_device("7", 0, 1), plain_message(SYNC, 0, 1, {"model_params": "file", **wrong})))
    device.join(1)
    assert device.is_alive()
    inbox.put((to_device("7", 0, 1), plain_message(FINISH, 0, 1, {})))
    device.join(10)
    assert not device.is_alive()


def test_a_devices_folder_belongs_to_one_process(tmp_path: Path) -> None:
    """Two would use one another's sequence numbers, and train everything twice."""
    world = World(tmp_path)
    process = world.process(1, tmp_path / "state")
    with pytest.raises(HostError, match="another process") as found:
        world.process(1, tmp_path / "state")
    assert found.value.code == "GMR-514"
    topic = to_device("7", 0, 1)
    world.inboxes[topic] = process._inbox
    note = FinishNote("0" * 16, 1, 1)
    process._inbox.put((topic, sign(note, topic, None, {"msg_type": FINISH})))
    process.run()
    world.process(1, tmp_path / "state")


def test_more_clients_at_the_start_than_there_are_would_be_waited_for_without_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clients_at_start=3 are more than client_num_in_total=2"):
        World(tmp_path, clients_at_start=3).server()


@pytest.mark.parametrize(("fedml", "unit"), [({"training_type": "cross_device"}, "wall"), ({}, "virtual")])
def test_the_terminal_says_whose_seconds_they_are(
    tmp_path: Path, fedml: dict[str, str], unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    bars: list[dict[str, Any]] = []
    real = progress_module.tqdm
    monkeypatch.setattr(progress_module, "tqdm", lambda **named: (bars.append(named), real(**named))[1])
    monkeypatch.setattr(progress_module, "say", told.append)
    options = {"progress": True, "trigger": "none", "dense_start": True}
    header = {"run_name": "x", "fedml": fedml, "config": options, "windows": 3, "time_budget": 9.0}
    header["densities"] = [1.0]
    with Progress(header) as progress:
        progress.close_with({"windows": 3, "time": 8.0, "model_sha256": "ab"}, tmp_path)
    assert f"(3 windows, 8 {unit} seconds)" in told[0] and bars[0]["unit"] == f"{unit} s"


def test_fedmls_own_devices_know_no_warm_up(tmp_path: Path) -> None:
    """The run log would say that their learning rate rose."""
    with pytest.raises(ConfigError, match=r"GMR-106 warmup_windows=4: with device_submodel=masked"):
        World(tmp_path, device_submodel="masked", warmup_windows=4).server()
    World(tmp_path, warmup_windows=4).server()


@pytest.mark.parametrize("submodel", ["width", "masked"])
@pytest.mark.parametrize("options", [{"proximal": 0.1}, {"method": "fedprox"}])
def test_fedmls_own_devices_know_no_proximal_term(
    tmp_path: Path, submodel: str, options: dict[str, Any]
) -> None:
    width = {"score": "width"} if submodel == "width" else {}
    world = World(tmp_path, device_submodel=submodel, **width, **options)
    with pytest.raises(ConfigError, match=r"GMR-106 .*proximal=0.0?1.*: with device_submodel"):
        world.server()


@pytest.mark.parametrize("option", ["workers", "batch_clients"])
def test_a_server_of_devices_trains_nobody(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=f"GMR-106 .*{option}=2: devices train"):
        World(tmp_path, **{option: 2}).server()


@pytest.mark.parametrize("given", [{"device_submodel": "masked"}, {"backend": "GRPC"}, {}])
def test_densities_are_measured_where_there_is_something_to_measure(
    tmp_path: Path, given: dict[str, str]
) -> None:
    world = World(tmp_path, measured_densities=True)
    world.options |= {key: value for key, value in given.items() if key != "backend"}
    world.args.backend = given.get("backend", "MQTT_S3_MNN")
    if not given:
        world.server()
        return
    with pytest.raises(ConfigError, match="GMR-106 measured_densities=true"):
        world.server()


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("heterofl", r"label_masks=true \(of method=heterofl\) needs"),
        ("fjord", r"local_objective=ordered_dropout \(of method=fjord\) is known"),
        ("fiarse", r"local_objective=straight_through \(of method=fiarse\) is known"),
        ("fedgmr", r"label_masks=true needs"),
    ],
)
def test_what_only_the_method_sets_is_refused_in_the_methods_name(
    tmp_path: Path, method: str, problem: str
) -> None:
    given = {"label_masks": True} if method == "fedgmr" else {}
    with pytest.raises(ConfigError, match=f"GMR-106 .*{problem}"):
        World(tmp_path, method=method, **given).server()


def test_mask_aware_devices_train_with_the_proximal_term(tmp_path: Path) -> None:
    """The longer the training, the more it holds back; 0 is FedAvg."""
    trainers = [World(tmp_path, proximal=mu).process(1)._bench.training.trainer for mu in (0.0, 0.25)]
    assert [trainer.proximal for trainer in trainers] == [0.0, 0.25]  # type: ignore[attr-defined]
    World(tmp_path, proximal=0.25).server()


# -- the end of the run, for who was away ------------------------------------------------------------------


def end_of(world: World, token: str, n: int = 1, **changed: Any) -> tuple[str, bytes]:
    topic = to_device("7", 0, n)
    note = FinishNote(**{"run": token, "device": n, "sequence": 5, **changed})
    return topic, sign(note, topic, None, {"msg_type": FINISH, "sender": 0, "receiver": n})


def test_the_end_is_kept_for_whoever_was_away(tmp_path: Path) -> None:
    """Device 2 dies during the run; when it is back it ends. Device 1 heard it: nothing is kept for it."""
    world = World(tmp_path, answer_deadline=2.0, retry_seconds=0.5, windows=12)
    run = world.server()
    server = threading.Thread(target=run.train, daemon=True)
    away = world.process(2, tmp_path / "two")
    stopped = threading.Event()
    real = away._next

    def next_() -> None:
        if away.device.trained >= 1:
            world.inboxes.pop(away.device.hears, None)
            stopped.set()
            raise Enough
        real()

    away._next = next_  # type: ignore[method-assign]

    def leave() -> None:
        with pytest.raises(Enough):
            away.run()

    threading.Thread(target=leave, daemon=True).start()
    other = world.device(1)
    server.start()
    assert stopped.wait(60)
    server.join(60)
    other.join(60)
    assert run.end is not None and not other.is_alive()
    assert set(world.kept) == {to_device("7", 0, 1), to_device("7", 0, 2)}
    assert world.kept[to_device("7", 0, 1)] == b"", "the end of an earlier run is removed at the beginning"
    back = world.process(2, tmp_path / "two")
    back._inbox.put(lambda: back.device.kept(to_device("7", 0, 2), world.kept[to_device("7", 0, 2)]))
    thread = threading.Thread(target=back.run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and back.device.finished


@pytest.mark.parametrize(
    "wrong",
    [
        "another run",
        "no run",
        "another device",
        "another topic",
        "another key",
        "a task",
        "rubbish",
        "nothing",
    ],
)
def test_only_the_end_of_its_own_run_is_believed_of_what_is_kept(
    tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path)
    device = world.process(1).device
    assert isinstance(device, Device)
    device.memory.token = "" if wrong == "no run" else "a" * 16
    topic, payload = end_of(world, {"another run": "b" * 16, "no run": "b" * 16}.get(wrong, "a" * 16))
    if wrong == "another device":
        topic, payload = end_of(world, "a" * 16, device=2)
    elif wrong == "another topic":
        topic = to_device("7", 0, 2)
    elif wrong == "another key":
        device._key = bytes(32)
    elif wrong == "a task":
        payload = payload.replace(b'"msg_type": 7', b'"msg_type": 2')
    elif wrong == "rubbish":
        payload = payload[:-4]
    elif wrong == "nothing":
        payload = b"{}"
    device.kept(topic, payload)
    assert not device.finished and not caplog.text
    device._key, device.memory.token = None, "a" * 16
    device.kept(*end_of(world, "a" * 16))
    assert device.finished
    assert "run_id=7, of which this device had a task before, is over" in caplog.text
    assert "give it a run_id of its own, or start its server first" in caplog.text


@pytest.mark.parametrize("said", ["FINISHED", "OFFLINE"])
def test_whose_connection_breaks_at_the_end_has_not_heard_it(tmp_path: Path, said: str) -> None:
    """Nobody waits for it, but the broker keeps the end for it."""
    world = World(tmp_path)
    run = world.server()
    device = world.process(1).device
    office, journal = run.office, Journal(tmp_path / "journal")
    office.begin(journal)
    office.seen, office.end = {0: 0.0, 1: 0.0}, {}
    note = StatusNote(run="7", device=1, sequence=device._sequence(), state=said)
    office.message(device.speaks, sign(note, device.speaks, None, {"msg_type": STATUS}))
    kept = {topic for topic, _ in office.farewells()}
    assert (device.hears in kept) == (said == "OFFLINE")
    assert office.somebody_works()
    note = StatusNote(run="7", device=2, sequence=device._sequence(), state="FINISHED")
    office.message(to_server("7", 2), sign(note, to_server("7", 2), None, {"msg_type": STATUS}))
    assert not office.somebody_works()
    journal.close()


def test_a_run_with_fedmls_own_devices_keeps_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    office = world.server().office
    assert len(office.farewells()) == len(office.kept_topics()) == 2
    assert PlainOffice.farewells(office) == PlainOffice.kept_topics(office) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("submodel", ["wire", "masked"])
def test_a_device_ends_when_its_server_is_silent_for_too_long(tmp_path: Path, submodel: str) -> None:
    world = World(tmp_path, server_patience=1.5, device_submodel=submodel)
    process = world.process(1)
    started = time.monotonic()
    with pytest.raises(
        HostError, match=r"GMR-518 no message of the server of run_id=7 for 1 seconds|for 2 s"
    ):
        process.run()
    assert 1.5 <= time.monotonic() - started < 20


def test_a_device_ends_where_neither_server_nor_store_come_back(tmp_path: Path) -> None:
    world = World(tmp_path, server_patience=1.5)
    process = world.process(1)
    assert isinstance(process.device, Device)
    process.device.working = SimpleNamespace(dispatch=1)  # type: ignore[assignment]
    process.device._wanted = {"x": Piece("x", 1, "")}  # whose fetching is tried for ever
    with pytest.raises(HostError, match="GMR-518"):
        process.run()


def test_a_device_that_stood_still_listens_before_it_ends(tmp_path: Path) -> None:
    process = World(tmp_path, server_patience=500.0).process(1)
    now = time.monotonic()
    process.device.heard_at, process._looked = now - 1000.0, now - 900.0
    process._next()
    assert 90.0 < time.monotonic() - process.device.heard_at < 200.0
    process.device.heard_at, process._looked = now - 1000.0, time.monotonic()
    with pytest.raises(HostError, match="GMR-518"):
        process._next()


def test_a_device_that_works_or_is_spoken_to_does_not_end(tmp_path: Path) -> None:
    world = World(tmp_path)
    process = world.process(1)
    device = process.device
    assert isinstance(device, Device)
    now = device.heard_at
    device._clock = lambda: now + 7.0
    device.kept(*end_of(world, "b" * 16))
    assert device.waits_since() == now, "what the broker kept is of another time"
    device.message(*end_of(world, "b" * 16))
    assert device.waits_since() == now + 7.0
    device.working = task = SimpleNamespace(dispatch=1)  # type: ignore[assignment]
    device._wanted = {key: Piece(key, 1, "") for key in "xy"}
    assert device.waits_since() == now + 7.0, "whoever waits for the store works not"
    device._clock = lambda: now + 8.0
    device._fetched(task, device._wanted["x"], bytearray(1), now)  # type: ignore[arg-type]
    assert device.waits_since() == now + 8.0, "it got something"
    device._wanted = {}
    assert device.waits_since() is None
    device._clock = lambda: now + 9.0
    device.message(*end_of(world, "b" * 16))
    assert device.refused == {"GMR-744": 1} and device.heard_at == now + 8.0
    plain = PlainDevice("7", 0, 1, 5, lambda *given: None, process._hands, lambda: now)
    plain._clock = lambda: now + 7.0
    plain.message(plain.hears, b"{}")
    assert plain.waits_since() == now
    plain.message(plain.hears, b'{"msg_type": 6}')
    assert plain.waits_since() == now + 7.0
    plain._busy = True
    assert plain.waits_since() == now + 7.0
    plain._fetched(0, bytearray())
    assert plain.waits_since() is None
    plain._clock = lambda: now + 9.0
    plain.failed(WireError("GMR-741", "no model"))
    assert plain.waits_since() == now + 9.0
    world.options["server_patience"] = None
    assert world.process(1)._patience is None
