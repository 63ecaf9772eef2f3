"""The server of a run with devices, stopped anywhere and anyhow, goes on to the same bits from its disk."""

from __future__ import annotations

import errno
import json
import os
import queue
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import device_stage as stage
from fedgmr_plugin.engine.live import LiveEvent
from fedgmr_plugin.engine.replay import Replay
from fedgmr_plugin.engine.snapshot import snapshot_live
from fedgmr_plugin.protocol import checkpoint, journal, runlog
from fedgmr_plugin.protocol.history import is_number
from fedgmr_plugin.protocol.runlog import LOG_NAME
from fedgmr_plugin.runtimes.devices import live_run
from fedgmr_plugin.runtimes.devices.live_run import LiveRun
from fedgmr_plugin.runtimes.devices.loopback import Faults, Loopback, LoopbackHands
from fedgmr_plugin.runtimes.devices.memory import Memory

WINDOWS = 68
CONFIG = stage.configuration(checkpoint_seconds=0.0)


class Killed(BaseException):
    """The process is gone: nothing catches this."""


class WorldInbox(queue.Queue[Any]):
    """An inbox of a server in a `Loopback`: to wait at it is to let the world go on.

    Args:
        look: called with the number of the item that is waited for.
    """

    def __init__(self, world: Loopback, look: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._world, self._look = world, look

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        self._look()
        until = self._world.now + (timeout or 0.0)
        self._world.at(until, lambda: None)
        while self.empty() and self._world.now < until and self._world.step():
            pass
        return super().get(block=False)


class ServerHands(LoopbackHands):
    """A server's hands in a `Loopback`, whose fetches end in its inbox."""

    inbox: queue.Queue[Any]

    def fetch(self, piece: Any, then: Any) -> None:
        self.world.get(piece, lambda content: self.inbox.put(lambda: then(content)))

    def start(self) -> None: ...
    def close(self) -> None: ...
    def sweep(self, prefixes: Any, is_needless: Any, patience: float) -> None: ...
    def flush(self, patience: float) -> bool:
        return True


class Whole(NamedTuple):
    """An uninterrupted run.

    Attributes:
        events: what its journal was given, in order.
        images: the disk before each event, how many events had taken effect, and the engine's state.
        log, model: what came of it.
    """

    events: list[LiveEvent]
    images: list[tuple[Path, int, Any]]
    log: list[str]
    model: bytes


def in_a_world(
    folder: Path, look: Callable[[], None] = lambda: None, windows: int = WINDOWS
) -> tuple[LiveRun, Loopback, dict[int, Any]]:
    """A run whose three devices live in a lossy world; device 2 leaves and returns."""
    world = Loopback(4, Faults(loss=0.15, duplicate=0.2, most=0.4))
    inbox = WorldInbox(world, look)
    hands = ServerHands(world)
    hands.inbox = inbox
    run = stage.live_run(folder, CONFIG, windows, hands, lambda: world.now, inbox)
    for topic in run.office.desk.topics:
        world.subscribe(topic, lambda topic, payload: inbox.put((topic, payload)))
    devices: dict[int, Any] = {}

    def begin(n: int) -> None:
        own = LoopbackHands(world)

        def train(sent: Any, then: Any) -> None:
            world.at(world.now + 0.4 + 0.3 * n, lambda: None if own.cut else then(stage.answer(sent)))

        device = stage.device(n, own, Memory(), world.clock, train)
        devices[n] = device, own
        world.subscribe(device.hears, device.message)
        device.begin()
        beat(n, device)

    def beat(n: int, device: Any) -> None:
        if devices[n][0] is device and not device.finished:
            device.tick()
            world.at(device.next_tick(), lambda: beat(n, device))

    def leave(n: int) -> None:
        device, own = devices[n]
        own.cut = True
        world.unsubscribe(device.hears, device.message)
        devices[n] = None, own

    for n in range(stage.DEVICES):
        begin(n)
    world.at(6.0, lambda: leave(2))
    world.at(17.0, lambda: begin(2))
    return run, world, devices


def result(folder: Path) -> tuple[list[str], bytes]:
    """The log without the end's wall time, and the model."""
    lines = (folder / LOG_NAME).read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    assert last.pop("wall_seconds") >= 0 and last["type"] == "end"
    return [*lines[:-1], json.dumps(last)], (folder / "model.safetensors").read_bytes()


def state_of(run: LiveRun) -> tuple[str, dict[str, bytes]]:
    """The engine's whole state."""
    meta, tensors = snapshot_live(run.office.live)
    return json.dumps(meta), {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Two hundred events and more, every one with the disk as it was before it."""
    folder = tmp_path_factory.mktemp("whole")
    events: list[LiveEvent] = []
    images: list[tuple[Path, int, Any]] = []

    def look() -> None:
        if not images or images[-1][1] < len(events):
            image = folder / f"{len(images)}"
            shutil.copytree(folder / "run", image)
            images.append((image, len(events), state_of(run)))

    run, _, _ = in_a_world(folder / "run", look)
    take = run.office._take
    run.office._take = lambda event: (events.append(event), take(event))[1]  # type: ignore[method-assign]
    run.train()
    log, model = result(folder / "run")
    kinds = {type(event).__name__ for event in events}
    assert kinds == {"ClientJoined", "Tick", "UploadArrived"} and len(images) >= 200, (kinds, len(events))
    assert any('"restoration"' in line for line in log) and any('"overdue"' in line for line in log)
    return Whole(events, images, log, model)


class Feed(queue.Queue[Any]):
    """Gives a server the rest of the events, as its devices and its clock would."""

    def __init__(self, events: list[LiveEvent]) -> None:
        super().__init__()
        self.events, self.run, self.patience = events, None, 20

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        assert self.run is not None
        if not self.events:  # all given: what was not written down at once is written now
            self.patience -= 1
            assert self.patience > 0, "the run does not end with the same events"
            raise queue.Empty
        event = self.events.pop(0)
        return lambda: self.run.office._apply([event])  # type: ignore[attr-defined]


def go_on(folder: Path, events: list[LiveEvent]) -> LiveRun:
    """A server that goes on from the disk, and hears `events`."""
    feed = Feed(list(events))
    world = Loopback()
    hands = ServerHands(world)
    hands.inbox = feed
    feed.run = stage.live_run(folder, CONFIG, WINDOWS, hands, lambda: 0.0, feed)  # type: ignore[assignment]
    assert feed.run is not None
    feed.run.train()
    return feed.run


def test_killed_at_each_of_its_events_it_goes_on_from_the_disk_to_the_same_bits(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the process dies, the machine does not
    for place, (image, count, state) in enumerate(whole.images):
        folder = tmp_path / str(place)
        shutil.copytree(image, folder)
        if place % 20 == 0:
            go_on(folder, whole.events[count:])
            assert result(folder) == (whole.log, whole.model), f"killed after event {count}"
        else:  # the engine is as it was, to the bit, and so is the log: the rest follows as above
            run = stage.live_run(folder, CONFIG, WINDOWS, LoopbackHands(Loopback()), lambda: 0.0)
            with stage.opened(run), run.office.journal or nullcontext():
                assert state_of(run) == state, f"killed after event {count}"
                lines = (folder / LOG_NAME).read_text(encoding="utf-8").splitlines()
                assert lines == whole.log[: len(lines)] and len(lines) >= lines_of(image)
        shutil.rmtree(folder)


def lines_of(folder: Path) -> int:
    """Lines of a log."""
    path = folder / LOG_NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_the_run_and_its_journal_are_found_after_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every folder on the way to the journal has its name on the disk before the first event."""
    names: dict[Path, set[str]] = {}
    real = os.fsync

    def fsync(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if place.is_dir():
            names[place] = {path.name for path in place.iterdir()}
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    run = stage.live_run(tmp_path / "runs" / "one", CONFIG, WINDOWS, LoopbackHands(Loopback()), lambda: 0.0)
    with stage.opened(run), run.office.journal or nullcontext():
        here = tmp_path / "runs" / "one"
        assert "one" in names[tmp_path / "runs"]
        assert {"journal", live_run.TOKEN, live_run.INITIAL} <= names[here]
        assert names[here / "journal"] == {"00000000.journal"}


# -- fail points -------------------------------------------------------------------------------------------


class Points:
    """Every call that changes the disk, counted; one of them fails.

    Args:
        at: number of the call that fails; -1 for none.
        how: ``killed`` before it, ``torn`` in the midst of it (what was to be synchronised loses its end), or
            ``error``: the disk refuses, once.
    """

    def __init__(self, at: int = -1, how: str = "killed") -> None:
        self.at, self.how, self.names = at, how, []  # type: tuple[int, str, list[str]]

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            self.names.append(name)
            if len(self.names) - 1 != self.at:
                return call(*given, **named)
            if self.how == "error":
                raise OSError(errno.ENOSPC, "No space left on device")
            if self.how == "torn" and name == "fsync":
                lose_the_end(given[0])
            elif self.how == "torn":
                call(given[0], bytes(given[1])[: len(given[1]) // 2])
            raise Killed(name)

        return wrapped

    @contextmanager
    def active(self) -> Iterator[Points]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", self.wrap("write", os.write))
            patch.setattr(os, "fsync", self.wrap("fsync", os.fsync))
            patch.setattr(Path, "rename", self.wrap("rename", Path.rename))
            patch.setattr(Path, "unlink", self.wrap("unlink", Path.unlink))
            patch.setattr(checkpoint, "save_file", self.wrap("save", checkpoint.save_file))
            patch.setattr(journal.Journal, "__init__", self.wrap("open", journal.Journal.__init__))
            append = self.wrap("log", runlog.RunLogWriter._append)
            patch.setattr(runlog.RunLogWriter, "_append", append)
            yield self


def lose_the_end(descriptor: int) -> None:
    """Cut a few bytes off an open file, but not off the log, whose records are synchronised many at once."""
    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    if path.is_file() and path.name != LOG_NAME:
        os.truncate(path, max(path.stat().st_size - 5, 0))


class Stopped(BaseException):
    """Everything that was to be given has been given."""


class Part(Feed):
    """Some events, after which the server is stopped."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        assert self.run is not None
        if not self.events and not self.run.office.waiting and not self.run._unwritten:  # type: ignore[attr-defined]
            raise Stopped
        return super().get(block, timeout)


class Numbers:
    """How many events had taken effect when each journal was begun."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder / "journal"
        found = checkpoint.latest(folder)
        first = 0 if found is None else found.meta["journal"]
        later = [int(path.stem) for path in self.folder.glob("*.journal") if int(path.stem) >= first]
        self.begun = {max(later): count - self._entries(max(later))}

    def _entries(self, number: int) -> int:
        entries = journal.read(self.folder / f"{number:08d}.journal")
        return sum(not is_number(entry) for entry in entries)

    def in_effect(self) -> int:
        """Events that are written down."""
        last = max(self.begun)
        return self.begun[last] + self._entries(last)

    @contextmanager
    def noted(self) -> Iterator[None]:
        following = live_run._Journals.next

        def note(journals: Any) -> Any:
            before = self.in_effect()
            found = following(journals)
            self.begun[journals.last] = before
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(live_run._Journals, "next", note)
            yield


def give(folder: Path, events: list[LiveEvent], points: Points | None = None) -> LiveRun:
    """A server that goes on from the disk, hears `events`, and is stopped; `points` are those of its loop."""
    feed = Part(list(events))
    world = Loopback()
    hands = ServerHands(world)
    hands.inbox = feed
    run = stage.live_run(folder, CONFIG, WINDOWS, hands, lambda: 0.0, feed)
    feed.run = run  # type: ignore[assignment]
    if points is not None:
        loop = run._loop

        def watched(*given: Any) -> None:
            with points.active():
                loop(*given)

        run._loop = watched  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        run.train()
    return run


STRETCH = 7
#: Calls in whose midst something can be lost.
TEARS = ("write", "log", "fsync")


def stretch(whole: Whole) -> int:
    """A place in the middle from which windows close and checkpoints are made."""
    return next(
        place
        for place in range(len(whole.images) // 2, len(whole.images))
        if json.loads(whole.images[place + STRETCH][2][0])["server"]["version"]
        >= json.loads(whole.images[place][2][0])["server"]["version"] + 3
    )


@pytest.mark.parametrize("how", ["killed", "torn", "error"])
def test_whatever_call_to_the_disk_fails_it_goes_on_to_the_same_bits(
    whole: Whole, tmp_path: Path, how: str
) -> None:
    place = stretch(whole)
    image, count, _ = whole.images[place]
    after, until, state = whole.images[place + STRETCH]
    shutil.copytree(image, tmp_path / "dry")
    points = Points()
    give(tmp_path / "dry", whole.events[count:until], points)
    assert {"write", "fsync", "rename", "unlink", "save", "open", "log"} <= set(points.names)
    places = [i for i, name in enumerate(points.names) if how != "torn" or name in TEARS]
    assert len(places) > 30
    for at in places:
        folder = tmp_path / str(at)
        shutil.copytree(image, folder)
        numbers, failing = Numbers(folder, count), Points(at, how)
        with numbers.noted():
            try:
                run = give(folder, whole.events[count:until], failing)
                assert how == "error", points.names[at]
            except Killed:
                if at % 2:  # the machine lost power: what was not synchronised of the log is gone, too
                    kept = checkpoint.latest(folder)
                    assert kept is not None
                    os.truncate(folder / LOG_NAME, kept.meta["log_bytes"] + at % 3)
                assert count <= numbers.in_effect() <= until
                run = give(folder, whole.events[numbers.in_effect() : until])
        found = f"{how} at call {at}, {points.names[at]}"
        assert state_of(run) == state, found
        lines = (folder / LOG_NAME).read_text(encoding="utf-8").splitlines()
        assert lines == whole.log[: lines_of(after)], found
        shutil.rmtree(folder)


def beginning(folder: Path, points: Points) -> None:
    """A new run, with `points` where it begins."""
    run = stage.live_run(folder, CONFIG, WINDOWS, ServerHands(Loopback()), lambda: 0.0)
    begin = run._open

    def watched(found: Any) -> None:
        with points.active():
            begin(found)
        raise Stopped

    run._open = watched  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        run.train()


@pytest.mark.parametrize("how", ["killed", "torn"])
def test_killed_while_it_begins_it_begins_again(whole: Whole, tmp_path: Path, how: str) -> None:
    """The run's token, its clients and its initial model are whole, or not there and made again."""
    dry = Points()
    beginning(tmp_path / "dry", dry)
    assert dry.names.count("rename") == 3 and "open" in dry.names
    for at, name in enumerate(dry.names):
        if how == "torn" and name not in TEARS:
            continue
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            beginning(folder, Points(at, how))
        run = give(folder, whole.events[:8])
        assert len((folder / "token").read_text()) == 16, name
        assert json.loads((folder / "clients.json").read_text()) == run._names, name
        initial = load_file(folder / "initial.safetensors")["w"]
        assert torch.equal(initial, stage.LAYOUT.gather(stage.model())), name


# -- a full disk -------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("a disk of its own takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_on_a_disk_that_is_really_full_the_run_pauses_and_goes_on(disk: Path) -> None:
    seen: list[str] = []
    run, world, _ = in_a_world(disk / "run", windows=30)

    def fill() -> None:
        with (disk / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def look(version: int) -> None:
        run._show(run.office)
        seen.append(json.loads((disk / "run" / "devices.json").read_text())["paused"])
        assert run.office.server.version - version <= 3, "it went on without a journal"

    def pause(begin: float, end: float) -> None:
        world.at(begin, fill)
        world.at(begin + 5.0, lambda: world.at(end - 0.1, lambda v=run.office.server.version: look(v)))
        world.at(end, (disk / "filler").unlink)

    pause(3.0, 40.0)
    pause(60.0, 90.0)
    run.train()
    assert len(seen) == 2 and all("No space left" in reason for reason in seen), seen
    log, _ = result(disk / "run")
    records = [json.loads(line) for line in log]
    merged = [r["dispatch"] for r in records if r["type"] == "arrival"]
    assert len(merged) == len(set(merged)) and records[-1]["windows"] == 30
    other = stage.live_run(disk / "other", CONFIG, 30, LoopbackHands(world), lambda: 0.0)
    found = Replay(other.office.server, other.office.live.examiner, stage.answer).run(records)
    assert found.differences == [] and found.end is not None
    assert found.end["model_sha256"] == records[-1]["model_sha256"]
