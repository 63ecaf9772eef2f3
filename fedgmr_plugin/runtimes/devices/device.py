"""A mask-aware device: FedML's device protocol with our notes (``docs/device-protocol.md``).

    online -> task -> fetch masks and increments -> train -> store the update -> answer, until the next task

It repeats what it said last every heartbeat until the server goes on, trains no dispatch twice, and remembers
its last answer across restarts: an upload that was interrupted is made again, not trained again. Like the
server's office it waits for nothing: `Hands` carry, `train` calls back.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.errors import WireError
from fedgmr_plugin.kernels.layout import ModelLayout
from fedgmr_plugin.protocol.desk import Replays
from fedgmr_plugin.protocol.header import MOST_HEADER, Header, Kind, Outcome, Task, shown
from fedgmr_plugin.protocol.mask import Mask, unpack
from fedgmr_plugin.protocol.maskcode import most_bytes
from fedgmr_plugin.protocol.messages import update_message
from fedgmr_plugin.protocol.notes import (
    FINISH,
    INIT,
    MODEL,
    STATUS,
    SYNC,
    AnswerNote,
    FinishNote,
    StatusNote,
    TaskNote,
    note_of,
    parse,
    sign,
    to_device,
    to_server,
)
from fedgmr_plugin.protocol.pieces import Piece, local_ranking
from fedgmr_plugin.protocol.storekeys import answer_key
from fedgmr_plugin.protocol.wire import Limits, apply, decode, encode
from fedgmr_plugin.runtimes.devices.memory import Memory
from fedgmr_plugin.runtimes.devices.office import Hands

_log = logging.getLogger(__name__)
#: Trains a dispatch and calls back with its update, in the device's thread.
Train = Callable[[Dispatch, Callable[[LocalUpdate], None]], None]
#: Heartbeats without an answer after which an update is put into the store again.
_PUT_AGAIN = 3
#: Seconds between two looks at whether a way to the server is there again.
_LOOK_SECONDS = 1.0
_INCREMENTS: tuple[Kind, ...] = ("increment",)


class Device:
    """One device.

    Args:
        run, server, device: FedML's ``run_id``, ``server_id`` and the device's id.
        key: its key; None where devices are not authenticated.
        layout: map of the global vector of its model.
        samples: its training samples.
        train: how it trains.
        hands: carries objects and messages.
        memory: of this device.
        clock: seconds; does not decrease.
        heartbeat: seconds between repetitions.
        dtype: type in which values travel; the model's own by default.
        wall_clock: milliseconds of the day's clock, for sequence numbers.
    """

    def __init__(
        self,
        run: str,
        server: int,
        device: int,
        key: bytes | None,
        layout: ModelLayout,
        samples: int,
        train: Train,
        hands: Hands,
        memory: Memory,
        clock: Callable[[], float],
        heartbeat: float = 15.0,
        dtype: torch.dtype | None = None,
        wall_clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.run, self.device, self.samples = run, device, samples
        self.hears, self.speaks = to_device(run, server, device), to_server(run, device)
        self.finished = False
        self.heard_at = clock()
        self.working: TaskNote | None = None
        self.next: TaskNote | None = None
        self.trained = 0
        self.refused: Counter[str] = Counter()
        self.up: float | None = None
        self.down: float | None = None
        self.memory = memory
        memory.enter(run)
        self._server, self._key, self._layout, self._dtype = server, key, layout, dtype or layout.dtype
        self._train, self._hands, self._clock, self._wall = train, hands, clock, wall_clock
        self._heartbeat, self._next_beat = heartbeat, 0.0
        self._replays = Replays(*memory.heard)
        self._repeats = 0
        self._masks: tuple[str, list[Mask]] = ("", [])
        self._parts: dict[str, bytearray] = {}
        self._wanted: dict[str, Piece] = {}

    # -- what happens ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Say hello; where an answer was interrupted, give it again."""
        if self.memory.update is not None:
            self._hands.put(self.memory.update, self.memory.content)
        self._beat()

    def tick(self) -> None:
        """Repeat what was said last, where it is time."""
        if self._clock() < self._next_beat or self.finished:
            return
        if self._hands.is_stuck():  # what was said last has not left yet
            self._next_beat = self._clock() + _LOOK_SECONDS
        else:
            self._beat()

    def next_tick(self) -> float:
        """Second at which `tick` is to be called at the latest."""
        return self._next_beat

    def message(self, topic: str, payload: bytes) -> None:
        """A message of the server, or of somebody who pretends to be it."""
        try:
            note = self._believed(topic, payload)
        except WireError as refusal:
            self._refuse(refusal, "a message")
            return
        self.heard_at = self._clock()
        if isinstance(note, FinishNote):
            self._end()
        else:
            self._task(note)

    def kept(self, topic: str, payload: bytes) -> None:
        """A message that the broker kept for this device while it was away, of whatever run and time.

        Only the end of the very run that this device works for is believed.
        """
        try:
            message = parse(payload)
            note = note_of(message, topic, self._key, FinishNote)
        except WireError as refusal:
            _log.debug("what the broker kept is refused: %s", refusal)
            return
        is_end = note is not None and topic == self.hears and message.get("msg_type") == FINISH
        if is_end and (note.run, note.device) == (self.memory.token, self.device):  # type: ignore[union-attr]
            _log.warning(
                "run_id=%s, of which this device had a task before, is over: it ended while the device was "
                "away. If this is to be another run, give it a run_id of its own, or start its server first.",
                self.run,
            )
            self._end()

    def _end(self) -> None:
        self.finished = True
        self._say_status("FINISHED")

    def waits_since(self) -> float | None:
        """Second since which nothing was heard of the server, or got from its store; None in training."""
        return None if self.working is not None and not self._wanted else self.heard_at

    def _refuse(self, refusal: WireError, what: str) -> None:
        self.refused[refusal.code] += 1
        level = logging.WARNING if self.refused[refusal.code] == 1 else logging.DEBUG  # no flood of the log
        _log.log(level, "%s is refused: %s", what, refusal)

    def _believed(self, topic: str, payload: bytes) -> TaskNote | FinishNote:
        message = parse(payload)
        kind = message.get("msg_type")
        if topic != self.hears or kind not in (INIT, SYNC, FINISH):
            raise WireError("GMR-741", f"msg_type={shown(kind)} on {topic} is not for this device")
        note: TaskNote | FinishNote | None
        if kind == FINISH:
            note = note_of(message, topic, self._key, FinishNote)
        else:
            note = note_of(message, topic, self._key, TaskNote)
        if note is None:
            raise WireError("GMR-741", "the server's message has no note: is it FedML's own server?")
        if note.device != self.device:
            raise WireError("GMR-747", f"device={note.device} on the topic of {self.device}")
        self._replays.check(note.sequence)
        if isinstance(note, TaskNote):
            self._check(note)
        elif self.memory.token not in ("", note.run):
            raise WireError("GMR-713", f"the end of run={note.run} instead of {self.memory.token}")
        return note

    def _check(self, note: TaskNote) -> None:
        """What a task claims against this device's model."""
        if note.size != self._layout.size:
            raise WireError("GMR-711", f"size={note.size} of the server, {self._layout.size} of this device")
        rising = list(note.cuts) == sorted(set(note.cuts)) and note.cuts[-1] <= note.size
        if not rising or not len(note.cuts) == len(note.values) == len(note.masks):
            raise WireError("GMR-712", f"cuts={note.cuts[:8]} do not fit {len(note.values)} increments")
        # In the model's own type, which the server may send against this device's file: GMR-708 tells of it.
        most = note.size * max(self._dtype.itemsize, self._layout.dtype.itemsize) + MOST_HEADER + 8
        if any(p.size > most for p in note.values) or any(p.size > most_bytes(note.size) for p in note.masks):
            raise WireError("GMR-710", "an object is longer than the model")

    # -- a task ---------------------------------------------------------------------------------------

    def _task(self, note: TaskNote) -> None:
        if note.run != self.memory.token:
            self.memory.token, self.memory.answered, self.memory.update = note.run, -1, None
            self._save()  # what the broker keeps of this run's end is to be believed after a restart
            self.working = self.next = None
        if note.dispatch == self.memory.answered:
            self._beat()  # the server has not heard the answer
        elif note.dispatch < self.memory.answered:
            return
        elif self.working is None:
            self._begin(note)
        elif note.dispatch > self.working.dispatch:
            self.next = note

    def _begin(self, note: TaskNote) -> None:
        self.working, self._repeats = note, 0
        if self.memory.update is not None:  # the server went on
            self.memory.update, self.memory.content = None, b""
            self._save()
        known = len(self._masks[1]) if self._masks[0] == note.ranking else 0
        pieces = [*note.masks[known:], *note.values]
        self._parts, self._wanted = {}, {p.key: p for p in pieces}
        for piece in pieces:
            started = self._clock()
            self._hands.fetch(piece, lambda content, p=piece, s=started: self._fetched(note, p, content, s))  # type: ignore[misc]

    def _fetched(self, note: TaskNote, piece: Piece, content: bytearray | WireError, started: float) -> None:
        if self.working is not note or piece.key not in self._wanted:
            return
        if isinstance(content, WireError):
            _log.info("dispatch %d: %s", note.dispatch, content.message)
            self._give_up()  # the server tells again what it wants
            return
        self.down = _smoothed(self.down, len(content), self._clock() - started)
        self._parts[piece.key], self.heard_at = content, self._clock()
        del self._wanted[piece.key]
        if self._wanted:
            return
        try:
            sent = self._dispatch(note)
        except WireError as refusal:
            self._refuse(refusal, f"dispatch {note.dispatch}")
            self._give_up()
            return
        self._train(sent, lambda update: self._answer(note, sent, update))

    def _give_up(self) -> None:
        self.working, self._parts, self._wanted = None, {}, {}
        if self.next is not None:
            note, self.next = self.next, None
            self._begin(note)

    def _dispatch(self, note: TaskNote) -> Dispatch:
        """The dispatch that the fetched objects are."""
        masks = list(self._masks[1]) if self._masks[0] == note.ranking else []
        bounds = list(zip((0, *note.cuts), note.cuts, strict=False))
        for (start, stop), piece in list(zip(bounds, note.masks, strict=True))[len(masks) :]:
            masks.append(unpack(memoryview(self._parts[piece.key]), note.size, start, (stop,)))
        ranking = local_ranking(note.cuts, masks[: len(note.cuts)], note.size, note.density)
        values_S = torch.empty(note.cuts[-1], dtype=self._layout.dtype)
        limits = Limits(
            size=note.size,
            dtypes=(self._dtype,),
            kinds=_INCREMENTS,
            run=note.run,
            known={note.ranking: note.cuts},
        )
        held = 0
        for piece in note.values:
            message = decode(self._parts[piece.key], limits)
            if message.header.version != note.version:
                raise WireError("GMR-715", f"version={message.header.version} instead of {note.version}")
            held = apply(message, values_S, held)
        if held != note.cuts[-1]:
            raise WireError("GMR-712", f"the increments hold {held} of {note.cuts[-1]} values")
        self._masks, self._parts = (note.ranking, masks), {}
        rung = len(note.cuts) - 1
        return Dispatch(
            note.dispatch,
            note.client,
            note.version,
            note.count,
            note.density,
            ranking,
            rung,
            values_S,
            note.scale,
            note.form,
        )

    def _answer(self, note: TaskNote, sent: Dispatch, update: LocalUpdate) -> None:
        if self.working is not note or self.finished:
            return
        self.trained += 1
        header = Header(
            kind="dispatch",
            run=note.run,
            version=note.version,
            ranking=note.ranking,
            size=note.size,
            cuts=note.cuts,
            dtype=self._dtype,
            client=note.client,
            dispatch=note.dispatch,
            task=Task(note.density, note.count, note.scale),
        )
        stats = update.stats
        outcome = Outcome(stats.samples, stats.steps, stats.train_loss, stats.drift_sq, update.change_sq)
        content = encode(update_message(header, note.cuts, update.values_S, outcome, dtype=self._dtype))
        key = answer_key(self.run, note.run, note.dispatch, self.device)
        piece = Piece(key, len(content), hashlib.sha256(content).hexdigest())
        self.memory.answered, self.memory.update, self.memory.content = note.dispatch, piece, content
        self._save(with_answer=True)
        self.working, self.heard_at = None, self._clock()
        self._hands.put(piece, content)
        self._beat()
        if self.next is not None:
            following, self.next = self.next, None
            self._begin(following)

    # -- to the server --------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Say what is to be known: the answer until the server goes on, else what this device does."""
        self._next_beat = self._clock() + self._heartbeat
        update = self.memory.update
        if update is None or self.working is not None:
            self._say_status("ONLINE")
            return
        self._repeats += 1
        if self._repeats % _PUT_AGAIN == 0:
            self._hands.put(update, self.memory.content)
        note = AnswerNote(self.memory.token, self.device, self._sequence(), self.memory.answered, update)
        fields = {"msg_type": MODEL, "num_samples": self.samples, "model_params": update.key}
        self._say(note, fields)

    def _say_status(self, state: str) -> None:
        note = StatusNote(
            run=self.run,
            device=self.device,
            sequence=self._sequence(),
            state=state,
            working=None if self.working is None else self.working.dispatch,
            answered=self.memory.answered if self.memory.answered >= 0 else None,
            samples=self.samples,
            up=self.up,
            down=self.down,
        )
        self._say(note, {"msg_type": STATUS, "client_status": state, "client_os": "linux"})

    def last_will(self) -> bytes:
        """The message that the broker sends when the connection breaks; its topic is `speaks`."""
        note = StatusNote(self.run, self.device, self._sequence(), "OFFLINE")
        fields = {"msg_type": STATUS, "client_status": "OFFLINE", "client_os": "linux"}
        return sign(note, self.speaks, self._key, self._addressed(fields))

    def _say(self, note: StatusNote | AnswerNote, fields: dict[str, Any]) -> None:
        self._hands.publish(self.speaks, sign(note, self.speaks, self._key, self._addressed(fields)))

    def _addressed(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {"sender": self.device, "receiver": self._server, **fields}

    def _sequence(self) -> int:
        return self.memory.next_sequence(self._wall())

    def _save(self, *, with_answer: bool = False) -> None:
        highest, seen = self._replays.state
        self.memory.heard = highest, seen
        self.memory.save(with_answer=with_answer)


def _smoothed(before: float | None, size: int, seconds: float) -> float | None:
    """Running mean of a bandwidth in MB/s; short transfers, which measure the delay, are left out."""
    if size < 65_536 or seconds <= 0:
        return before
    rate = size / 1e6 / seconds
    return rate if before is None else 0.7 * before + 0.3 * rate
