"""Random histories of a run with devices, beside a plain account of what must come of them.

Hypothesis chooses what happens, step by step: messages delivered, twice, late, in another order, never, or
retained by the broker; forged ones; objects lost; devices that restart with or without their memory, leave
and return; time that passes beyond deadlines; a full disk; checkpoints, damaged ones, crashes that lose what
was not carried out, and servers that go on from the disk. After it, everything is let go, and the run has to
come to its end. `python -m benchmarks.fuzz_devices` runs many, the test-suite some.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from benchmarks import device_stage as stage
from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.course import model_sha256
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.replay import Replay
from fedgmr_plugin.errors import CATALOGUE
from fedgmr_plugin.protocol import journal as journal_module
from fedgmr_plugin.protocol.checkpoint import FOLDER
from fedgmr_plugin.protocol.notes import StatusNote, sign, to_server
from fedgmr_plugin.protocol.runlog import encode
from fedgmr_plugin.protocol.storekeys import answer_key, is_of_run, sent_key
from fedgmr_plugin.runtimes.devices.device import Device
from fedgmr_plugin.runtimes.devices.live_run import LiveRun
from fedgmr_plugin.runtimes.devices.memory import Memory

#: Sequence numbers this far below the highest are refused: written down here once more, on purpose.
WINDOW = 64
_FAST = Path("/dev/shm")
picks = st.integers(0, 2**20)


class BrokenPromise(AssertionError):
    """A history after which the server is not what it promises to be."""


def require(condition: bool, *what: Any) -> None:
    """A promise; unlike `assert`, also kept under -O."""
    if not condition:
        raise BrokenPromise(*what)


class Account:
    """What must come of a history, from what the devices did and what the log says was merged.

    Args:
        exponent: of the weight by staleness.
        keeps: whether the last answer of every client is merged again in every window.
    """

    def __init__(self, exponent: float, *, keeps: bool = False) -> None:
        self.exponent, self.keeps = exponent, keeps
        self.kept: dict[int, int] = {}  # client to its last dispatch that was merged
        self.updates: dict[int, tuple[int, int, np.ndarray, np.ndarray, float]] = {}
        self.models: list[np.ndarray] = []  # of each version
        self.lines: list[str] = []  # of the run log
        self.place = 0  # of the next one: behind the end, but while the past is repeated
        self.merged: set[int] = set()
        self.late = 0  # of them, after other windows
        self._arrived: list[dict[str, Any]] = []

    def trained(self, sent: Dispatch, update: LocalUpdate) -> None:
        """A device has trained."""
        model = self.models[sent.version]
        index_S = sent.index_S.numpy()
        require(bool((model[index_S] == sent.values_S.numpy()).all()), "a device trained another model", sent)
        values_S = update.values_S.double().numpy()
        found = (sent.client, sent.version, index_S, values_S, update.stats.samples)
        self.updates.setdefault(sent.dispatch, found)
        require(self.updates[sent.dispatch][:2] == found[:2], "one number, two dispatches", sent.dispatch)

    def record(self, record: dict[str, Any], w_D: torch.Tensor, version: int) -> None:
        """A record of the run log; `w_D` is the server's vector by now."""
        line = encode(record)
        if self.place < len(self.lines):
            require(self.lines[self.place] == line, "the past was repeated differently", record)
            self.place += 1
            if record["type"] == "window":
                require(bool((self.models[version] == w_D.numpy()).all()), "another model", version)
            return
        self.lines.append(line)
        self.place += 1
        if record["type"] == "arrival":
            require(record["dispatch"] not in self.merged, "merged twice", record)
            self.merged.add(record["dispatch"])
            self.late += record["staleness"] > 0
            self._arrived.append(record)
        elif record["type"] == "window":
            require(version == len(self.models), "versions are counted up one by one", version)
            self._compare(w_D, version)

    def _compare(self, w_D: torch.Tensor, version: int) -> None:
        """The mean of the changes, coordinate by coordinate, weighted by staleness and samples."""
        before = self.models[version - 1].astype(np.float64)
        top, bottom = np.zeros_like(before), np.zeros_like(before)
        for record in self._arrived:
            client, sent, *_ = self.updates[record["dispatch"]]
            require((client, sent) == (record["client"], record["version"]), "another device's", record)
            weight = self._weight(record["dispatch"], version)
            require(math.isclose(record["weight"], weight), "another weight", record, weight)
        merged = [record["dispatch"] for record in self._arrived]
        if self.keeps and merged:
            self.kept |= {self.updates[number][0]: number for number in sorted(merged)}
            merged = list(self.kept.values())
        for number in merged:
            weight, (_, _, index_S, values_S, _) = self._weight(number, version), self.updates[number]
            top[index_S] += weight * values_S
            bottom[index_S] += weight
        self._arrived = []
        wanted = before + np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
        found = w_D.numpy()
        require(np.allclose(found, wanted, rtol=1e-6, atol=1e-6), "the sum is another one", version)
        require(bool((found[bottom == 0] == before[bottom == 0]).all()), "what nobody holds moved", version)
        self.models.append(found.copy())

    def _weight(self, number: int, version: int) -> float:
        """Weight of an update in the merge that made a version."""
        _, sent, _, _, samples = self.updates[number]
        return samples * (1.0 + version - 1 - sent) ** -self.exponent


class Hearing:
    """Which of a device's genuine notes must be taken in."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, bool], set[int]] = {}

    def code(self, payload: bytes) -> str | None:
        """Code with which a genuine message is refused now; None where it is taken in."""
        note = json.loads(json.loads(payload)["fedgmr"])
        key = note["device"], note.get("state") == "OFFLINE"
        seen, number = self.seen.setdefault(key, set()), note["sequence"]
        if number in seen or (seen and max(seen) - number >= WINDOW):
            return "GMR-744"
        seen.add(number)
        return None

    def copy(self) -> Hearing:
        other = Hearing()
        other.seen = {key: set(numbers) for key, numbers in self.seen.items()}
        return other


class Histories(RuleBasedStateMachine):
    """One run; see the module."""

    totals: ClassVar[Counter[str]] = Counter()

    @initialize(
        windows=st.sampled_from([2, 4, 6]),
        options=st.sampled_from(
            [
                {},
                {"window_limit": 4.0},
                {"schedule": "sync"},
                {"min_updates": 2},
                {"staleness_limit": 2},
                {"update_scope": "buffer"},
            ]
        ),
        start=st.integers(1, 2),
    )
    def begin(self, windows: int, options: dict[str, Any], start: int) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=_FAST if _FAST.is_dir() else None))
        self.windows = windows
        self.config = stage.configuration(checkpoint_seconds=None, clients_at_start=start, **options)
        self.now = 1024.0
        self.objects = _Store(lambda: self.run is not None and self.office.end is not None)
        self.up: list[tuple[str, bytes]] = []
        self.down: list[tuple[int, bytes]] = []
        self.past_up: list[tuple[str, bytes]] = []
        self.past_down: list[tuple[int, bytes]] = []
        self.retained: dict[int, bytes] = {}  # client to the last message to it
        keeps = self.config.update_scope == "buffer"
        self.account = Account(self.config.staleness_exponent, keeps=keeps)
        self.account.models.append(stage.LAYOUT.gather(stage.model()).numpy().copy())
        self.hearing = Hearing()
        self.kept: list[tuple[Hearing, int]] = []  # at each checkpoint, and records before it
        self.devices: dict[int, Device] = {}
        self.hands: dict[int, stage.StageHands] = {}
        self.trainings: list[tuple[int, Device, Dispatch, Any]] = []
        self.began: dict[int, list[int]] = {n: [] for n in range(stage.DEVICES)}
        self.wills: dict[int, bytes] = {}
        self.full = False
        self.version = self.saved = self.breaths = 0
        self.run: LiveRun | None = None
        self._open()
        for n in range(stage.DEVICES):
            self._start(n)
        self.totals["histories"] += 1

    # -- the server ---------------------------------------------------------------------------------

    @property
    def office(self) -> Any:
        require(self.run is not None)
        return self.run.office  # type: ignore[union-attr]

    def _open(self) -> None:
        self.server_hands = stage.StageHands(self.objects, self._published, self._called, at_once=False)
        self.run = stage.live_run(
            self.folder / "run",
            self.config,
            self.windows,
            self.server_hands,
            lambda: self.now,
            on_record=self._record,
        )
        self.writer = stage.opened(self.run)

    def _record(self, record: dict[str, Any]) -> None:
        server = self.office.server
        self.account.record(record, server.w_D, server.version)

    def _published(self, topic: str, payload: bytes) -> None:
        n = int(topic.rsplit("_", 1)[1]) - 1
        self.down.append((n, payload))
        self.retained[n] = payload

    def _called(self, action: Any) -> None:
        """What a fetch of the server's calls back with, by the inbox."""
        self._next(action)

    def _next(self, item: Any) -> None:
        require(self.run is not None)
        self.now += 1 / 1024  # no two things happen at the same time
        self.run.inbox.put(item)  # type: ignore[union-attr]
        with Disk(self.full):
            self.run._next(self.office)  # type: ignore[union-attr]

    def _hear(self, topic: str, payload: bytes, code: str | None) -> None:
        """The server is given a message, and must count it as `code` says."""
        desk = self.office.desk
        before = sum((*desk.refused, desk.strangers), Counter())
        seen = dict(self.office.seen)
        self._next((topic, payload))
        refused = sum((*desk.refused, desk.strangers), Counter()) - before
        require(set(refused) <= set(CATALOGUE), "a refusal without a code of the catalogue", refused)
        require(sum(refused.values()) <= 1, "one message, several refusals", refused)
        if code is not None:
            require(refused == {code: 1}, "refused otherwise than it must be", refused, code)
            require(self.office.seen == seen, "a refused message was heard")
        else:
            require(not set(refused) & {"GMR-741", "GMR-742", "GMR-743", "GMR-744", "GMR-745"}, refused)
        self.totals.update(refused)

    # -- the devices --------------------------------------------------------------------------------

    def _start(self, n: int) -> None:
        self._stop(n)
        hands = stage.StageHands(
            self.objects, lambda topic, payload: self._says(n, topic, payload), at_once=True
        )

        def train(sent: Dispatch, then: Any) -> None:
            self.began[n].append(sent.dispatch)
            self.trainings.append((n, device, sent, then))

        memory = Memory.load(self.folder / f"device{n}")
        device = stage.device(n, hands, memory, lambda: self.now, train)
        self.devices[n], self.hands[n] = device, hands
        self.wills[n] = device.last_will()
        device.begin()

    def _stop(self, n: int) -> None:
        self.devices.pop(n, None)
        self.hands.pop(n, None)
        self.trainings = [t for t in self.trainings if t[0] != n]

    def _says(self, n: int, topic: str, payload: bytes) -> None:
        self.up.append((topic, payload))

    # -- messages -----------------------------------------------------------------------------------

    @precondition(lambda self: self.run and self.up)
    @rule(pick=picks, again=st.booleans())
    def deliver(self, pick: int, again: bool) -> None:
        """To the server, in any order; it may come once more."""
        place = pick % len(self.up)
        topic, payload = self.up[place] if again else self.up.pop(place)
        self.past_up.append((topic, payload))
        self._hear(topic, payload, self.hearing.code(payload))

    @precondition(lambda self: self.down)
    @rule(pick=picks, again=st.booleans())
    def deliver_to_a_device(self, pick: int, again: bool) -> None:
        place = pick % len(self.down)
        n, payload = self.down[place] if again else self.down.pop(place)
        self.past_down.append((n, payload))
        if n in self.devices:
            self.devices[n].message(self.devices[n].hears, payload)

    @precondition(lambda self: self.run and self.past_up)
    @rule(pick=picks)
    def replay(self, pick: int) -> None:
        topic, payload = self.past_up[pick % len(self.past_up)]
        self._hear(topic, payload, self.hearing.code(payload))

    @precondition(lambda self: self.past_down)
    @rule(pick=picks)
    def replay_to_a_device(self, pick: int) -> None:
        n, payload = self.past_down[pick % len(self.past_down)]
        if n in self.devices:
            self.devices[n].message(self.devices[n].hears, payload)

    @precondition(lambda self: self.run and self.past_up)
    @rule(pick=picks, kind=st.sampled_from(["key", "unsigned", "changed", "moved", "stranger", "torn"]))
    def forge(self, pick: int, kind: str) -> None:
        topic, payload = self.past_up[pick % len(self.past_up)]
        message = json.loads(payload)
        n = message["sender"]
        code = "GMR-743"
        if kind == "key":
            note = StatusNote(stage.RUN, n, 2**50, "OFFLINE")
            payload = sign(note, topic, b"x" * 32, {"msg_type": 5, "sender": n})
        elif kind == "unsigned":
            payload = json.dumps({k: v for k, v in message.items() if k != "fedgmr_mac"}).encode()
        elif kind == "changed":
            payload = json.dumps({**message, "fedgmr": message["fedgmr"] + " "}).encode()
        elif kind == "moved":
            topic = to_server(stage.RUN, n % stage.DEVICES + 1)
        elif kind == "stranger":
            topic, code = to_server(stage.RUN, 77), "GMR-742"
        else:
            payload, code = payload[: pick % len(payload)], "GMR-741"
        self._hear(topic, payload, code)

    @precondition(lambda self: self.up)
    @rule(pick=picks)
    def lose(self, pick: int) -> None:
        self.up.pop(pick % len(self.up))

    @precondition(lambda self: self.down)
    @rule(pick=picks)
    def lose_to_a_device(self, pick: int) -> None:
        self.down.pop(pick % len(self.down))

    # -- objects ------------------------------------------------------------------------------------

    @precondition(lambda self: self.run and self.server_hands.jobs)
    @rule(most=st.sampled_from([1, 2, 5, 1000]))
    def work(self, most: int) -> None:
        """The server's puts, messages and deletes, in their order."""
        self.server_hands.work(most)

    @precondition(lambda self: self.run and self.server_hands.fetches)
    @rule(pick=picks, lost=st.booleans())
    def fetched(self, pick: int, lost: bool) -> None:
        self.server_hands.fetched(pick % len(self.server_hands.fetches), lost=lost and pick % 3 == 0)

    @precondition(lambda self: any(h.fetches for h in self.hands.values()))
    @rule(pick=picks, lost=st.booleans())
    def fetched_by_a_device(self, pick: int, lost: bool) -> None:
        hands = [h for h in self.hands.values() if h.fetches][0 if pick % 2 else -1]
        hands.fetched(pick % len(hands.fetches), lost=lost and pick % 3 == 0)

    @precondition(lambda self: any(h.fetches for h in self.hands.values()))
    @rule()
    def everything_is_fetched_by_devices(self) -> None:
        for hands in list(self.hands.values()):
            while hands.fetches:
                hands.fetched(0)

    # -- devices ------------------------------------------------------------------------------------

    @precondition(lambda self: self.trainings)
    @rule(pick=picks)
    def train(self, pick: int) -> None:
        _, _, sent, then = self.trainings.pop(pick % len(self.trainings))
        update = stage.answer(sent)
        self.account.trained(sent, update)
        self.totals["trainings"] += 1
        then(update)

    @rule(n=st.integers(0, stage.DEVICES - 1), forgets=st.sampled_from([False, False, True]))
    def restart(self, n: int, forgets: bool) -> None:
        """Under the same name, whether it ran or not."""
        self._stop(n)
        self.now += 1 / 8  # no device starts within a millisecond
        if forgets:
            shutil.rmtree(self.folder / f"device{n}", ignore_errors=True)
        self._start(n)
        if n in self.retained:  # a broker that keeps messages, and does not say that it does
            self.devices[n].message(self.devices[n].hears, self.retained[n])

    @precondition(lambda self: len(self.devices) > 1)
    @rule(pick=picks, silently=st.booleans())
    def leave(self, pick: int, silently: bool) -> None:
        n = sorted(self.devices)[pick % len(self.devices)]
        self._stop(n)
        if not silently:
            self.up.append((to_server(stage.RUN, n + 1), self.wills[n]))

    # -- time ---------------------------------------------------------------------------------------

    @rule(steps=st.sampled_from([128, 512, 2048, 4096, 9000, 20_000]))
    def wait(self, steps: int) -> None:
        """Up to twenty seconds: beyond windows, retries, deadlines."""
        self.now += steps / 1024
        self._tick()

    def _tick(self) -> None:
        if self.run is not None:
            with Disk(self.full):
                self.run._next(self.office)
        for device in list(self.devices.values()):
            device.tick()

    @precondition(lambda self: self.run)
    @rule(times=st.sampled_from([1, 1, 2, 4]))
    def everything_arrives(self, times: int) -> None:
        """For once nothing goes wrong."""
        for _ in range(times):
            self._breathe()

    # -- disk ---------------------------------------------------------------------------------------

    @precondition(lambda self: not self.full)
    @rule()
    def fill_the_disk(self) -> None:
        self.full = True

    @precondition(lambda self: self.full)
    @rule()
    def make_space(self) -> None:
        self.full = False

    @precondition(lambda self: self.run and self.office.end is None and self.version > self.saved)
    @rule()
    def checkpoint(self) -> None:
        """Where there was a window since the last one, as in `LiveRun`'s loop."""
        require(self.run is not None)
        with Disk(self.full):
            made = sorted(self._checkpoints())
            self.run._checkpoint(self.office, self.writer)  # type: ignore[union-attr]
        if sorted(self._checkpoints()) != made:
            self.kept = [*self.kept, (self.hearing.copy(), len(self.account.lines))][-2:]
            self.saved = self.version
            self.totals["checkpoints"] += 1

    def _checkpoints(self) -> list[Path]:
        return list((self.folder / "run" / FOLDER).glob("*.safetensors"))

    @precondition(lambda self: self.run)
    @rule(damage=st.booleans(), torn=st.integers(0, 60), carried_out=st.integers(0, 3))
    def crash_and_go_on(self, damage: bool, torn: int, carried_out: int) -> None:
        """The server is gone, with everything that it has not written down; another one goes on."""
        self.server_hands.work(carried_out)
        version, w_D = self.office.server.version, self.office.server.w_D.clone()
        self.writer.close()
        journal = self.office.journal
        journal.close()
        self.run = None
        if torn:  # the beginning of an entry that was being written
            with journal.path.open("ab") as file:
                file.write(
                    (b"FGJ1" + (40).to_bytes(8, "little") + (2**20).to_bytes(8, "little") + bytes(60))[:torn]
                )
        kept = self.kept
        if damage and len(kept) == 2:
            newest = max(self._checkpoints(), key=lambda p: (int(p.name[:8]), p.stat().st_mtime_ns))
            content = bytearray(newest.read_bytes())
            content[torn * 37 % len(content)] ^= 0x11
            newest.write_bytes(content)
            kept = self.kept = kept[:1]
            self.totals["damaged checkpoints"] += 1
        self.hearing = kept[-1][0].copy() if kept else Hearing()
        self.account.place = kept[-1][1] if kept else 0
        self._open()
        require(self.account.place == len(self.account.lines), "records are missing after a crash")
        require(self.office.server.version == version, "the version went back", version)
        require(torch.equal(self.office.server.w_D, w_D), "another model after a crash", version)
        self.totals["crashes"] += 1

    # -- what always holds ----------------------------------------------------------------------------

    @invariant()
    def a_version_never_goes_back(self) -> None:
        if self.run is not None:
            require(self.office.server.version >= self.version, "the version went back")
            self.version = self.office.server.version

    @invariant()
    def the_log_is_on_the_disk(self) -> None:
        if self.run is not None and not self.full:
            written = (self.folder / "run" / "run.jsonl").read_text().splitlines()[1:]
            require(written == self.account.lines, "the log is not what was recorded")

    # -- what holds when everything has been let go -----------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        try:
            if self.run is not None:  # else a rule has failed
                self._settle()
        finally:
            if self.run is not None and self.office.journal is not None:
                self.writer.close()
                self.office.journal.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _settle(self) -> None:
        """No more faults: everybody who lives gets work, the run ends, and the store is empty."""
        self.full = False
        for n in range(stage.DEVICES):
            if n not in self.devices and len(self.devices) < self.config.clients_at_start:
                self._start(n)
        live = set(self.devices)
        before = {n: len(self.began[n]) for n in live}
        deadline = self.now + 90
        while self.office.end is None and any(len(self.began[n]) == before[n] for n in live):
            require(self.now < deadline, "no work for", [n for n in live if len(self.began[n]) == before[n]])
            self._breathe()
        self._store_holds_only_what_is_needed()
        deadline = self.now + 60 * self.windows
        while self.office.end is None:
            require(self.now < deadline, "the run does not end", self.office.server.version)
            self._breathe()
        require(self.office.server.version == self.windows)
        for _ in range(12):
            self._breathe()
        require(all(device.finished for device in self.devices.values()), "a device was not told of the end")
        self._store_holds_nothing_but_what_is_swept()
        require(self.office.end["model_sha256"] == model_sha256(torch.from_numpy(self.account.models[-1])))
        self._replays_to_the_same()
        self.totals["windows"] += self.windows
        self.totals["merged"] += len(self.account.merged)
        self.totals["merged late"] += self.account.late

    def _breathe(self) -> None:
        """Half a second, before which everything arrives."""
        self._arrive()
        self.breaths += 1
        self.now += 0.5
        self._tick()

    def _arrive(self) -> None:
        """Everything that is on its way arrives, and what follows from it."""
        while self.server_hands.jobs or self.up or self.down or self._trained() or self._fetching():
            self.server_hands.work()
            for messages, deliver in ((self.up, self.deliver_now), (self.down, self.deliver_to_a_device_now)):
                while messages:
                    deliver(*messages.pop(0))  # type: ignore[arg-type]
            for hands in (self.server_hands, *self.hands.values()):
                while hands.fetches:
                    hands.fetched(0)
            while self._trained():
                self.train(pick=self.trainings.index(self._trained()[0]))

    def _trained(self) -> list[tuple[int, Device, Dispatch, Any]]:
        """Trainings that are over: the more often the lower the number of the device."""
        return [training for training in self.trainings if self.breaths % (training[0] + 1) == 0]

    def _fetching(self) -> bool:
        return any(hands.fetches for hands in (self.server_hands, *self.hands.values()))

    def deliver_now(self, topic: str, payload: bytes) -> None:
        self._hear(topic, payload, self.hearing.code(payload))

    def deliver_to_a_device_now(self, n: int, payload: bytes) -> None:
        if n in self.devices:
            self.devices[n].message(self.devices[n].hears, payload)

    def _store_holds_only_what_is_needed(self) -> None:
        """Sub-models in flight, and answers that may still be taken or that their device still repeats."""
        office = self.office
        self._breathe()
        self._arrive()
        if office.end is not None:
            return
        token, needed = office.token, []
        for dispatch, flight in office.server.flights.items():
            digest = flight.ranking.digest
            names = f"values-{flight.version}-{digest}-", f"mask-{digest}-"
            needed += [sent_key(stage.RUN, token, name) for name in names]
            needed.append(answer_key(stage.RUN, token, dispatch, flight.client + 1))
        for n, device in self.devices.items():
            needed.append(answer_key(stage.RUN, token, device.memory.answered, n + 1))
        dead = [n + 1 for n in range(stage.DEVICES) if n not in self.devices]
        needed += [answer_key(stage.RUN, token, 0, n).removesuffix("0") for n in dead]
        left = [k for k in self.objects if not k.startswith(tuple(needed))]
        require(not left, "objects that nobody needs are left in the store", sorted(left))

    def _store_holds_nothing_but_what_is_swept(self) -> None:
        """That is answers of devices that came back after the end, and whose farewell was lost."""
        left = sorted(set(self.objects) - self.objects.late)
        require(not left, "objects are left in the store", left)
        swept = [k for k in self.objects if is_of_run(k, stage.RUN, self.office.token, stage.KEYS)]
        require(len(swept) == len(self.objects), "objects that no sweep finds", sorted(self.objects))

    def _replays_to_the_same(self) -> None:
        """The log through the engine in one process."""
        other = stage.live_run(
            self.folder / "other", self.config, self.windows, self.server_hands, lambda: self.now
        )
        records = [json.loads(line) for line in self.account.lines]
        found = Replay(other.office.server, other.office.live.examiner, stage.answer).run(records)
        require(not found.differences, "the replay differs", found.where, found.differences)


class _Store(dict[str, bytes]):
    """Objects by their names; `late` are the names of those that were put when `is_over`."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        super().__init__()
        self._is_over, self.late = is_over, set[str]()

    def __setitem__(self, key: str, content: bytes) -> None:
        (self.late.add if self._is_over() else self.late.discard)(key)
        super().__setitem__(key, content)


class Disk:
    """While active and full, nothing can be written to a journal."""

    def __init__(self, full: bool) -> None:
        self._full = full

    def __enter__(self) -> None:
        self._real = journal_module._write
        if self._full:

            def refuse(descriptor: int, piece: Any) -> None:
                os.write(descriptor, bytes(piece)[:3])  # a part fits
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            journal_module._write = refuse

    def __exit__(self, *error: object) -> None:
        journal_module._write = self._real
