"""One run with real clients: its office, its journal, its loop."""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedgmr_plugin.engine.snapshot import Snapshot, restore_live, snapshot_live
from fedgmr_plugin.errors import HostError, RunLogError
from fedgmr_plugin.protocol.checkpoint import Checkpoint
from fedgmr_plugin.protocol.journal import Entry, Journal, read, sync
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.protocol.presence import Presence
from fedgmr_plugin.protocol.runlog import RunLogWriter
from fedgmr_plugin.protocol.storekeys import is_of_run, is_sent, run_prefixes
from fedgmr_plugin.runtimes.devices.hands import ThreadedHands
from fedgmr_plugin.runtimes.devices.office import Content, Office
from fedgmr_plugin.runtimes.recorded import RecordedRun
from fedgmr_plugin.runtimes.setup import Setup

_log = logging.getLogger(__name__)
#: What a status display reads, in the run's directory.
STATUS = "devices.json"
TOKEN = "token"
#: FedML's names of the run: what devices hear of it by, and their ids, in the order of the clients.
CLIENTS = "clients.json"
#: The initial global vector, for a replay.
INITIAL = "initial.safetensors"
_JOURNALS = "journal"
#: Seconds that devices are told of the end, at most.
_FAREWELL = 10.0
_STATUS_SECONDS = 1.0
#: Seconds between two looks at whether there is another server, before the run begins.
_POLL = 0.05
#: Seconds for which a run that is over deletes its objects, at most.
_SWEEP = 10.0
#: Seconds after which it is said, once, that too few devices are there.
_UNHEARD = 30.0


class Connected(Protocol):
    """A link that can be started and stopped, as `fedgmr_plugin.runtimes.devices.mqtt.MqttLink`."""

    refused: HostError | None
    connected: threading.Event

    def publish(self, topic: str, payload: bytes, *, at_most_once: bool = False) -> None: ...
    def keep(self, topic: str, payload: bytes) -> None: ...
    def start(self) -> None: ...
    def claim(self) -> bool: ...
    def stop(self, patience: float = 5.0) -> None: ...


class Clock:
    """Seconds since a run began, without those in which there was no server."""

    def __init__(self) -> None:
        self.start(0.0)

    def start(self, at: float) -> None:
        """Go on from second `at`."""
        self._at, self._then = at, time.monotonic()

    def __call__(self) -> float:
        return self._at + time.monotonic() - self._then


@dataclass
class LiveRun(RecordedRun):
    """A run with devices.

    Attributes:
        office: its server.
        hands, link: of the office; started and stopped here.
        inbox: what comes from them.
        clock: of the office.
        presence: tells whether another process serves the same run; None where the link cannot.
    """

    office: Office = field(kw_only=True)
    hands: ThreadedHands = field(kw_only=True)
    link: Connected = field(kw_only=True)
    inbox: queue.Queue[Any] = field(kw_only=True)
    clock: Clock = field(kw_only=True)
    presence: Presence | None = field(default=None, kw_only=True)
    _unwritten: list[dict[str, Any]] = field(default_factory=list, init=False)
    _problem: str = field(default="", init=False)
    _parted: bool = field(default=False, init=False)
    _opened: float = field(default=0.0, init=False)
    _told_unheard: bool = field(default=False, init=False)

    def train(self) -> None:
        """As `RecordedRun.train`, once it is certain that no other process serves this run.

        Raises:
            HostError: GMR-517 if one does, or has the port; GMR-515 if the broker refuses.
        """
        self._claim()
        self.link.start()
        try:
            while not self.link.claim():
                self._give_way()
                time.sleep(_POLL)
            super().train()
        finally:
            self.link.stop()

    def _give_way(self) -> None:
        """Stop where another process serves this run, or the broker is not to be had."""
        if self.presence is not None and self.presence.taken_by:
            desk = self.office.desk
            raise HostError(
                "GMR-517", f"run_id={desk.run}, server_id={desk.server} is served by {self.presence.taken_by}"
            )
        if self.link.refused is not None:
            raise self.link.refused

    def _prepare(self) -> Checkpoint | None:
        """As `RecordedRun._prepare`, for the same clients."""
        self._check_clients()
        return super()._prepare()

    def record(self, fields: dict[str, Any]) -> None:
        """As `RecordedRun.record`; where the disk is full, the log is written when there is space again."""
        self._unwritten.append(fields)
        self._write_down()
        self._progress.record(fields)
        self.on_record(fields)

    def _write_down(self) -> bool:
        """Whether all records are in the log now."""
        before, self._problem = self._problem, ""
        while self._unwritten and self._writer is not None:
            try:
                self._writer.write(self._unwritten[0])
            except OSError as error:
                self._problem = str(error)
                if not before:
                    _log.warning("the run log waits until it can be written: %s", error)
                return False
            del self._unwritten[0]
        return True

    def _save_model(self) -> None:
        """As `RecordedRun._save_model`, when there is space."""
        _when_there_is_space("the model", super()._save_model)

    def _write_end(self, writer: RunLogWriter, end: dict[str, Any]) -> None:
        """As `RecordedRun._write_end`, when there is space."""
        _when_there_is_space("the end of the log", lambda: writer.write(end))
        _when_there_is_space("the end of the log", writer.sync)  # the journals are removed behind it

    def _advance(self, writer: RunLogWriter, checkpoint: Checkpoint | None) -> dict[str, Any]:
        self._open(checkpoint)
        self._loop(self.office, writer)
        if self.office.end is None:
            raise RuntimeError("the loop ended before the run")
        self._part()  # before the end is written down, behind which nobody goes on with it
        return self.office.end

    def _open(self, checkpoint: Checkpoint | None) -> None:
        """Begin the run, or go on from `checkpoint` and the journals behind it."""
        office = self.office
        if checkpoint is None:
            _write_whole(self.directory / CLIENTS, json.dumps(self._names).encode())
            _write_whole(self.directory / TOKEN, office.token.encode())
            _write_whole(self.directory / INITIAL, save({"w": office.server.w_D.cpu().contiguous()}))
        first = 0 if checkpoint is None else checkpoint.meta["journal"]
        self._journals = _Journals(self.directory / _JOURNALS, first)
        # Their names are to be there after a power cut.
        for folder in (self.directory, self.directory.parent):
            sync(folder)
        self._kept: list[frozenset[str]] = []  # what a server needs that goes on from a kept checkpoint
        unsent: list[tuple[Piece, Content]] = []
        if checkpoint is not None:
            meta, tensors = checkpoint.meta, checkpoint.tensors
            restore_live(office.live, Snapshot(meta["live"], tensors))
            office.load_state(meta["office"], tensors)
            self._kept = [office.needed()]
            contents = [tensors[f"unsent.{i}"].numpy().tobytes() for i in range(len(meta["unsent"]))]
            unsent = [(Piece(*p), content) for p, content in zip(meta["unsent"], contents, strict=True)]
        past = range(first, self._journals.last + 1) if self.resumed else range(0)
        times = (float(entry.head["time"]) for entry in self._journals.entries(past))
        self.clock.start(max(office.live.now, max(times, default=0.0)))
        if self.resumed:
            office.resume(self._journals.entries(past), self._journals.next(), unsent)
            office.abandon([] if checkpoint is None else checkpoint.meta.get("undeleted", []))
        else:
            office.begin(self._journals.next())
            for topic in office.kept_topics():
                self.link.keep(topic, b"")  # the end of an earlier run of this name
        office.hello()
        self._opened = time.monotonic()

    @property
    def _names(self) -> dict[str, Any]:
        """What the devices of this run know it by, and who they are."""
        desk = self.office.desk
        return {"run_id": desk.run, "server_id": desk.server, "client_id_list": list(desk.devices)}

    def _check_clients(self) -> None:
        """Refuse to go on with other clients, or where they do not hear it.

        What one device was sent, another would be believed to answer; and devices of another ``run_id`` or
        ``server_id`` would wait without end.

        Raises:
            RunLogError: GMR-606.
        """
        path = self.directory / CLIENTS
        if not self.resumed or not path.exists():
            return
        found, now = json.loads(path.read_text(encoding="utf-8")), self._names
        before = {"client_id_list": found} if isinstance(found, list) else found  # of an older release
        differ = [
            f"{name}: {_short(value)} became {_short(now[name])}"
            for name, value in before.items()
            if now[name] != value
        ]
        if differ:
            raise RunLogError("GMR-606", "; ".join(differ), where=str(self.directory))

    @contextmanager
    def _helped(self) -> Iterator[None]:
        self.hands.start()
        try:
            yield
        finally:
            self._part()
            if self.office.journal is not None:
                self.office.journal.close()
            if self.end is not None:  # written down: nobody goes on with this run
                shutil.rmtree(self.directory / _JOURNALS, ignore_errors=True)

    def _part(self) -> None:
        """Take leave of devices and store, once; where the run is over, say so and leave nothing there."""
        if self._parted:
            return
        if self.office.end is not None:
            self.hands.flush(_FAREWELL)
            for topic, payload in self.office.farewells():
                self.link.keep(topic, payload)
        self.hands.close()
        self._sweep()  # while the link lives no other server begins whose devices' objects would go too
        self.link.stop()
        self._parted = True

    def _sweep(self) -> None:
        """Delete the run's objects; where it was interrupted, those that going on does not need."""
        office = self.office
        if office.journal is None or (self.presence is not None and self.presence.taken_by):
            return  # nothing was stored, or the other one needs it
        run, token, ids = office.desk.run, office.token, frozenset(office.desk.devices)
        server = office.desk.server
        if office.end is not None:
            is_needless = lambda key: is_of_run(key, run, token, ids, server)  # noqa: E731
        else:
            kept = frozenset().union(*self._kept)
            is_needless = lambda key: is_sent(key, run, token) and key not in kept  # noqa: E731
        self.hands.sweep(run_prefixes(run), is_needless, _SWEEP)

    def _loop(self, office: Office, writer: RunLogWriter) -> None:
        seconds = self.course.config.checkpoint_seconds
        saved = shown = time.monotonic()
        version = office.server.version
        self._show(office)
        while office.end is None or not self._write_down():
            self._next(office)
            self._write_down()
            now = time.monotonic()
            if office.server.version != version:
                version = office.server.version
                if seconds is not None and now - saved >= seconds and office.end is None:
                    self._checkpoint(office, writer)
                    saved = now
            if now - shown >= _STATUS_SECONDS:
                self._show(office)
                shown = now
        self._show(office)
        deadline = time.monotonic() + _FAREWELL
        while office.somebody_works() and time.monotonic() < deadline:
            self._next(office)
        self._show(office)

    def _next(self, office: Office) -> None:
        """Wait for the next thing that happens, a second at most, and let it happen."""
        if self.presence is not None and self.presence.taken_by and office.end is None:
            self._give_way()
        due = office.next_tick()
        wait = _STATUS_SECONDS if due is None else min(max(due - self.clock(), 0.0), _STATUS_SECONDS)
        try:
            item = self.inbox.get(timeout=wait) if wait > 0 else self.inbox.get_nowait()
            if callable(item):
                item()
            else:
                office.message(*item)
        except queue.Empty:
            if self.link.refused is not None:
                raise self.link.refused from None
        if office.end is None:
            office.tick()
            self._tell_unheard(office)

    def _tell_unheard(self, office: Office) -> None:
        """Say, once, whom the run waits for: who is missing may believe to be there."""
        if self._told_unheard or time.monotonic() - self._opened < _UNHEARD:
            return
        self._told_unheard = True
        wanted, joined = office.server.config.clients_at_start, len(office.live.early)
        devices = office.desk.devices
        missing = [devices[client] for client in range(len(devices)) if client not in office.seen]
        if not missing or (office.live.begun and office.seen):
            return
        waits = f", and the run waits for clients_at_start={wanted} ({joined} joined)"
        _log.warning(
            "nothing has been heard for %.0f seconds of the devices %s%s: they are not there, their key, id "
            "or run_id is another, or the broker gives them, or this server, no right to their topics",
            *(_UNHEARD, _short(missing), "" if office.live.begun else waits),
        )

    def _checkpoint(self, office: Office, writer: RunLogWriter) -> None:
        """A checkpoint, and a new journal behind it; none where the disk is full."""
        if not self._write_down():
            return
        try:
            journal = self._journals.next()
        except OSError as error:
            _log.warning("no checkpoint: %s", error)
            return
        before, office.journal = office.journal, journal
        if before is not None:
            before.close()
        meta, tensors = snapshot_live(office.live)
        tensors.update(office.tensors())
        unsent = office.unsent()
        for i, (_, content) in enumerate(unsent):
            tensors[f"unsent.{i}"] = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
        state = {
            "live": meta,
            "office": office.state(),
            "journal": self._journals.last,
            "unsent": [list(piece) for piece, _ in unsent],
            "undeleted": office.undeleted(),
        }
        self._kept.append(office.needed())
        if self._save_checkpoint(writer, state, tensors):
            self._journals.checkpointed()
            self._kept = self._kept[-2:]
        else:
            self._kept.pop()

    def _show(self, office: Office) -> None:
        """Write what a status display reads."""
        server = office.server
        content = {
            "run": self.directory.name,
            "window": server.version,
            "windows": server.plan.windows,
            "time": office.live.now,
            "paused": office.paused or self._problem,
            "ended": office.end is not None,
            "devices": office.status(),
        }
        draft = self.directory / f"{STATUS}.draft"
        try:
            draft.write_text(json.dumps(content), encoding="utf-8")
            draft.rename(self.directory / STATUS)
        except OSError:
            try:  # where the disk is full there may be room in the old one's place, and this is to be seen
                draft.unlink(missing_ok=True)
                (self.directory / STATUS).write_text(json.dumps(content), encoding="utf-8")
            except OSError as error:
                _log.debug("no status: %s", error)


class _Journals:
    """The journals of a run, numbered; those that no kept checkpoint needs are removed.

    Args:
        first: number of the first one behind the checkpoint that the run goes on from.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        numbers = [int(path.stem) for path in folder.glob("*.journal") if path.stem.isdecimal()]
        self.last = max([first - 1, *numbers])  # there may be none: moved away, for they were damaged
        self._needed = [min(numbers, default=first)]  # first journal behind each of the last checkpoints

    def entries(self, numbers: Iterable[int]) -> Iterator[Entry]:
        """What happened in these journals, one entry in memory at a time: each may hold a whole model.

        Raises:
            RunLogError: GMR-607 if one is damaged, or missing.
        """
        for number in numbers:
            path = self._path(number)
            if not path.exists():
                raise RunLogError("GMR-607", f"{path.name} is missing, a later one is there", where=str(path))
            yield from read(path)

    def next(self) -> Journal:
        """A new journal behind those that are there."""
        journal = Journal(self._path(self.last + 1))
        self.last += 1
        return journal

    def checkpointed(self) -> None:
        """The last journal begins behind a checkpoint; two generations of them are kept."""
        self._needed = [*self._needed, self.last][-2:]
        for path in self._folder.glob("*.journal"):
            if path.stem.isdecimal() and int(path.stem) < self._needed[0]:
                with suppress(OSError):
                    path.unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.journal"


def _short(value: Any) -> str:
    is_long = isinstance(value, list) and len(value) > 20
    return f"{str(value[:20])[:-1]}, ...]" if is_long else str(value)


def _when_there_is_space(what: str, write: Callable[[], object]) -> None:
    """Write something, again and again until it can be written."""
    before = ""
    while True:
        try:
            write()
            return
        except (OSError, SafetensorError) as error:
            if str(error) != before:
                _log.warning("%s waits until it can be written: %s", what, error)
            before = str(error)
            time.sleep(_STATUS_SECONDS)


def initial_as_before(directory: Path, setup: Setup) -> None:
    """Let the model begin where the interrupted run in `directory` began, whatever its script makes now.

    Where it was killed before its first checkpoint, its journal has changes of that vector.

    Raises:
        RunLogError: GMR-606 if it cannot be read.
    """
    path = directory / INITIAL
    if not path.exists():
        return
    try:
        initial_D = load(path.read_bytes())["w"]
    except (OSError, SafetensorError, KeyError) as error:
        raise RunLogError("GMR-606", f"{INITIAL} cannot be read: {error}", where=str(directory)) from error
    if initial_D.shape == (setup.layout.size,):  # else the log's header has another model, too
        setup.layout.scatter(setup.model, initial_D)


def token_of(directory: Path, resumed: bool) -> str:
    """Name of a run that no other has: drawn at its beginning, kept in its directory."""
    path = directory / TOKEN
    kept = path.read_text(encoding="ascii").strip() if resumed and path.exists() else ""
    return kept or secrets.token_hex(8)


def _write_whole(path: Path, content: bytes) -> None:
    """Bring a file to the disk: whole, or as it was."""
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    sync(path.parent)
