"""The server of a run with real devices, between their messages and the engine.

    message -> Desk (authentic?) -> joined, left, or an answer to fetch
    fetched object -> wire format (sound?) -> upload, or refused
    event -> journal (on the disk) -> Live (windows, merges) -> dispatches -> objects and messages

Everything here happens in one thread, and nothing here waits: what takes time is given to `Hands`, and comes
back as another call. What is kept is the checkpoint and the journal since; see ``docs/guarantees.md``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedgmr_plugin.engine.events import ClientJoined, ClientLeft, Dispatch, UploadArrived, UploadRefused
from fedgmr_plugin.engine.examiner import Examiner
from fedgmr_plugin.engine.live import Live, LiveEvent, Tick
from fedgmr_plugin.engine.server import Server
from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol.desk import RESERVED, Desk, PlainAnswer, PlainStatus, Said
from fedgmr_plugin.protocol.header import MOST_HEADER, Kind
from fedgmr_plugin.protocol.history import SEQUENCE, entry_of, event_of, is_number, number_entry
from fedgmr_plugin.protocol.journal import Entry, Journal
from fedgmr_plugin.protocol.messages import PayloadOrder, upload
from fedgmr_plugin.protocol.notes import AnswerNote, FinishNote, StatusNote, TaskNote, to_device
from fedgmr_plugin.protocol.pieces import Piece, Pieces
from fedgmr_plugin.protocol.storekeys import answer_key
from fedgmr_plugin.protocol.wire import Limits, decode

_log = logging.getLogger(__name__)

_UPDATES: tuple[Kind, ...] = ("update",)
#: Dispatches of a device that are remembered while none of them is answered.
_REMEMBERED = 64
Content = bytes | bytearray | memoryview
#: Called with an object's content, or with why there is none.
Fetched = Callable[[bytearray | WireError], None]


class Hands(Protocol):
    """Carries things to and from the store and the devices, in the order given, as long as it takes."""

    def put(self, piece: Piece, content: Content) -> None:
        """Store an object."""
        ...

    def publish(
        self,
        topic: str,
        payload: bytes,
        then: Callable[[], None] | None = None,
        *,
        at_most_once: bool = False,
    ) -> None:
        """Send a message, after everything that was given before it; then call `then`, as `fetch` does.

        Args:
            at_most_once: where a connection breaks, the message may be lost, but never arrives twice.
        """
        ...

    def fetch(self, piece: Piece, then: Fetched) -> None:
        """Get an object of exactly that length and digest; `then` is called in the server's thread."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects, after everything that was given before."""
        ...

    def unsent(self) -> list[tuple[Piece, Content]]:
        """Objects that are lost with this process: not stored yet, or in its memory only."""
        ...

    def undeleted(self) -> list[str]:
        """Keys of objects that have not been removed yet."""
        ...

    def is_stuck(self) -> bool:
        """Whether the store has been away for seconds, or the broker is: what is given only waits for it."""
        ...


@dataclass(frozen=True)
class Task:
    """What a dispatch says besides its sub-model; see `fedgmr_plugin.engine.events.Dispatch`."""

    count: int
    scale: float


class Office:
    """One run's server.

    Args:
        server: not started yet.
        examiner: measures its models.
        record: receives every record of the run log but the header, in order.
        desk, pieces: of the run.
        token: name of this run that no other has, 16 hex digits; part of every object's key.
        hands: carries objects and messages.
        clock: seconds since the run began; does not decrease.
        measured: density of a device from its bandwidth (up, down; MB/s); None where the configuration says.
    """

    def __init__(
        self,
        server: Server,
        examiner: Examiner,
        record: Callable[[dict[str, Any]], None],
        desk: Desk,
        pieces: Pieces,
        token: str,
        hands: Hands,
        clock: Callable[[], float],
        measured: Callable[[float | None, float | None], float | None] = lambda up, down: None,
    ) -> None:
        self.live = Live(server, examiner, self._recorded, self._send)
        self.server, self.desk, self.pieces, self.token = server, desk, pieces, token
        self.journal: Journal | None = None
        self.end: dict[str, Any] | None = None
        self.tasks: dict[int, Task] = {}
        self.seen: dict[int, float] = {}  # client to the second of its last message
        self.waiting: list[LiveEvent] = []  # what could not be written down yet
        self.paused = ""  # why
        self.received: dict[int, int] = {}  # client to the bytes of its updates, since this server began
        self._unauthentic: set[str] = set()  # devices' topics of which a message was told of
        self._farewells: set[int] = set()  # clients that know of the end
        self._gone: set[int] = set()  # clients whose connection broke after it
        self._record = record
        self._hands, self._clock, self._measured = hands, clock, measured
        self._fetching: set[int] = set()  # dispatches whose answer is on its way
        self._needless: list[str] = []
        self._left_behind: dict[
            int, list[int]
        ] = {}  # client to the dispatches whose answer may lie in the store
        self._past: dict[str, tuple[Piece, Content]] = {}  # what the past put, while it is repeated
        self._version = server.version
        self._written = 0  # number of messages that was written down last

    # -- beginning ------------------------------------------------------------------------------------

    def begin(self, journal: Journal) -> None:
        """Begin a new run."""
        self.end = self.live.start()
        self.journal = journal

    def resume(
        self, entries: Iterable[Entry], journal: Journal, unsent: Sequence[tuple[Piece, Content]]
    ) -> None:
        """Go on: the engine is as at a checkpoint (or has not started), and `entries` happened since.

        Args:
            journal: where the next events are written.
            unsent: objects that were in no store at the checkpoint that outlives a process.
        """
        for piece, content in unsent:
            self._hands.put(piece, content)
        if self.server.phase == "ready":
            self.end = self.live.start()
        for entry in entries:
            self._written = int(entry.head.get(SEQUENCE, 0))
            if not is_number(entry):
                self._take(event_of(entry))
        self.desk.go_on_above(self._written)
        self.journal = journal
        self._note_number()  # else one that follows this server, too, would say what devices have heard
        for piece, content in self._past.values():
            self._hands.put(piece, content)
        self._past = {}
        if self.end is not None:
            self._finish_all()
        for dispatch in list(self.live.deadlines) if self.end is None else ():
            self._tell_again(dispatch)

    def abandon(self, keys: Iterable[str]) -> None:
        """Remove objects whose removal an earlier server had ordered and not lived to see."""
        needed = self.needed()
        self._hands.delete([key for key in keys if key not in needed])

    def hello(self) -> None:
        """Say that the server is there, to devices that do not say by themselves that they are."""

    # -- what happens ---------------------------------------------------------------------------------

    def message(self, topic: str, payload: bytes) -> None:
        """A message of a device, or of a stranger."""
        now = self._clock()
        try:
            client, said = self.desk.read(topic, payload, now)
        except WireError as refusal:
            level = logging.DEBUG
            if refusal.code == "GMR-743" and topic not in self._unauthentic:
                self._unauthentic.add(topic)
                level = logging.WARNING
            _log.log(level, "a message on %s is refused: %s", topic, refusal)
            return
        self.seen[client] = now
        if self.end is not None:
            answered = [said.dispatch] if isinstance(said, AnswerNote) else []
            self._delete_answers(client, [*self._left_behind.get(client, []), *answered])
            self._heard_after_end(client, said)
        elif not isinstance(said, PlainAnswer) and any(
            client == getattr(event, "client", None) for event in self.waiting
        ):
            return  # paused: what it said before comes first, and it will say this again
        elif isinstance(said, StatusNote):
            self._status(client, said, now)
        elif isinstance(said, AnswerNote):
            self._answer(client, said, now)
        else:
            self._plain(client, said, now)

    def _heard_after_end(self, client: int, said: Said) -> None:
        """Tell a device of the end, but for one that knows of it, or whose connection is gone."""
        state = said.state if isinstance(said, (StatusNote, PlainStatus)) else "ONLINE"
        if state == "FINISHED":
            self._farewells.add(client)
        elif state == "OFFLINE":
            self._gone.add(client)
        else:
            self._gone.discard(client)
            self._finish(client)

    def tick(self) -> None:
        """Do what has become due."""
        now = self._clock()
        due = self.live.next_tick()
        is_due = due is not None and due <= now and not any(isinstance(e, Tick) for e in self.waiting)
        if self.waiting or is_due:
            self._apply([Tick(now)] if is_due else [])

    def next_tick(self) -> float | None:
        """Second at which `tick` is to be called at the latest; None while nothing is waited for."""
        if self.end is not None:
            return None
        return self._clock() + 1.0 if self.waiting else self.live.next_tick()

    def _status(self, client: int, note: StatusNote, now: float) -> None:
        if note.state != "ONLINE":
            self._apply([ClientLeft(client, now)])
        elif self._hands.is_stuck():
            return  # it will say this again; until then nothing would reach it
        elif self._is_late(client, note.working):
            return  # another dispatch would only wait behind this one, until both are too old
        elif client in self.server.away:
            self._welcome(client, now, self._measured(note.up, note.down), note.samples)
        else:
            self._remind(client, note.working)

    def _join(self, client: int, now: float, knows: int | None = None) -> None:
        """A device gives an answer that is not waited for: it is there, and has nothing to do."""
        self._remind(client, knows)
        if client in self.server.away:
            self._welcome(client, now)

    def _welcome(
        self, client: int, now: float, density: float | None = None, samples: int | None = None
    ) -> None:
        if self._is_new(client):
            self._apply([ClientJoined(client, now, density, samples)])

    def _is_late(self, client: int, working: int | None) -> bool:
        """Whether a device still works on the dispatch that it did not answer in time: its answer counts."""
        if working is None or working not in self.server.overdue:
            return False
        return self.server.flights[working].client == client

    def _is_new(self, client: int) -> bool:
        """Whether it would change anything that a client who is away joins."""
        waits = client in self.live.retries and client not in self.live.gone
        return not waits and client not in self.live.early

    def _answer(self, client: int, note: AnswerNote, now: float) -> None:
        flight = self.server.flights.get(note.dispatch)
        if (
            note.run != self.token
        ):  # of an earlier run of this name, whose server is gone: it is free for this one
            self.desk.count(client, "GMR-713")
            self._join(client, now)
        elif flight is not None and flight.client != client:
            self.desk.count(client, "GMR-406")
        elif flight is None:
            self._delete_answers(client, [note.dispatch])  # the device has stored it again
            self._join(client, now, note.dispatch)
        elif note.update.key != self._answer_key(note.dispatch, client):
            self.desk.count(client, "GMR-747")
        elif note.dispatch in self.server.staged:
            self._hands.delete([note.update.key])
        elif note.dispatch not in self._fetching:
            most = 8 + MOST_HEADER + flight.ranking.ends[flight.rung] * self._dtype.itemsize
            if note.update.size > most:
                problem = f"bytes={note.update.size} of an update that has {most} at most"
                self._refuse(client, note.dispatch, WireError("GMR-710", problem), [note.update.key])
                return
            self._fetching.add(note.dispatch)
            self._hands.fetch(note.update, lambda content: self._fetched(client, note, content))

    def _plain(self, client: int, said: PlainStatus | PlainAnswer, now: float) -> None:
        """A device that knows nothing of masks: not with this office."""
        self.desk.count(client, "GMR-748")

    def _fetched(self, client: int, note: AnswerNote, content: bytearray | WireError) -> None:
        self._fetching.discard(note.dispatch)
        flight = self.server.flights.get(note.dispatch)
        if flight is None or note.dispatch in self.server.staged or self.end is not None:
            return
        if isinstance(content, WireError):
            self.desk.count(client, content.code)  # the device announces it again
            return
        now = self._clock()
        try:
            message = decode(content, self._limits(note.dispatch))
            order = PayloadOrder.by_rung(flight.ranking, flight.rung)
            arrived = upload(message, order, dtype=self.server.layout.dtype, time=now)
            if (arrived.dispatch, arrived.client) != (note.dispatch, client):
                raise WireError(
                    "GMR-747", f"an update of dispatch={arrived.dispatch}, client={arrived.client}"
                )
        except WireError as refusal:
            self._refuse(client, note.dispatch, refusal, [note.update.key])
            return
        self.received[client] = self.received.get(client, 0) + len(content)
        events: list[LiveEvent] = [arrived]
        if client in self.server.away:
            events.append(ClientJoined(client, now))
        self._apply(events)

    def _delete_answers(self, client: int, dispatches: Iterable[int]) -> None:
        self._hands.delete([self._answer_key(dispatch, client) for dispatch in dispatches])

    def _answer_key(self, dispatch: int, client: int) -> str:
        return answer_key(self.desk.run, self.token, dispatch, self.desk.devices[client])

    def _limits(self, dispatch: int) -> Limits:
        flight = self.server.flights[dispatch]
        cuts = PayloadOrder.by_rung(flight.ranking, flight.rung).cuts
        return Limits(
            size=self.server.layout.size,
            dtypes=(self._dtype,),
            kinds=_UPDATES,
            run=self.token,
            known={flight.ranking.digest: cuts},
        )

    @property
    def _dtype(self) -> torch.dtype:
        """Type in which values travel."""
        return self.pieces.dtype or self.server.layout.dtype

    def _refuse(self, client: int, dispatch: int, refusal: WireError, needless: Sequence[str] = ()) -> None:
        refused = UploadRefused(dispatch, client, self._clock(), refusal.code, refusal.message)
        self._apply([refused], needless)

    # -- events ---------------------------------------------------------------------------------------

    def _apply(self, events: Sequence[LiveEvent], needless: Sequence[str] = ()) -> None:
        """Write events down, then let them happen; where the disk is full they wait, in their order.

        Args:
            needless: objects that are not needed once the events are written down.
        """
        if self.journal is None:
            raise RuntimeError("the run has not begun")
        self.waiting += [_finite(event) for event in events]
        self._needless += needless
        number = self.desk.coming
        try:
            self.journal.append([self._entry(event) for event in self.waiting])
        except OSError as error:
            if not self.paused:
                _log.warning("paused: %s; events wait until they can be written", error)
            self.paused = str(error)
            return
        if self.paused:
            _log.warning("the journal can be written again: going on")
        self.paused, self._written = "", number
        ready, self.waiting = self.waiting, []
        needless, self._needless = self._needless, []
        for event in ready:
            self._take(event)
        self._hands.delete(needless)

    def _entry(self, event: LiveEvent) -> Entry:
        """An event as it is written down."""
        entry = entry_of(event)
        return Entry({**entry.head, SEQUENCE: self.desk.coming}, entry.payload)

    def _note_number(self) -> bool:
        """Whether a message may leave that belongs to no event: a server that goes on would go on above it.

        Numbers follow the clock, so the next one is written down where nothing has been for half of what a
        server that goes on leaves free.
        """
        number = self.desk.coming
        if self.journal is not None and number > self._written + RESERVED // 2:
            try:
                self.journal.append([number_entry(self.live.now, number)])
            except OSError as error:
                _log.debug("no number can be written down: %s", error)
                return False
            self._written = number
        return True

    def _recorded(self, fields: dict[str, Any]) -> None:
        """A record of the run log; refusals are counted for their device, wherever they were found."""
        if fields["type"] == "rejected":
            self.desk.count(fields["client"], fields["code"])
        self._record(fields)

    def _take(self, event: LiveEvent) -> None:
        if self.end is not None:
            return
        if isinstance(event, ClientJoined) and event.client in self.server.away:
            self.pieces.forget_client(event.client)
        self.end = self.live.handle(event)
        if isinstance(event, (UploadArrived, UploadRefused)):
            self._forget_answers(event.client, event.dispatch)
        if self.server.version != self._version:
            self._version = self.server.version
            self.tasks = {d: task for d, task in self.tasks.items() if d in self.server.flights}
            gone = self._drop_unused()
            self._past = {key: kept for key, kept in self._past.items() if key not in gone}
            self._hands.delete(gone)
        if self.end is not None and self.journal is not None:
            self._finish_all()

    def _forget_answers(self, client: int, answered: int) -> None:
        """Remove a client's answers to `answered` and to dispatches that its device has left behind.

        Devices store their last answer again until they go on, so the object of `answered` may come back; it
        is removed once more with the next answer.
        """
        asked = [d for d in self._left_behind.get(client, []) if d <= answered]
        gone = [d for d in asked if d == answered or d not in self.server.flights]
        self._delete_answers(client, gone)
        kept = [d for d in self._left_behind.get(client, []) if d not in gone or d == answered]
        self._left_behind[client] = kept

    def _forget_oldest(self, client: int) -> None:
        """Remove what a device that never answers may have stored long ago, and count on it no more."""
        asked = self._left_behind[client]
        gone = [d for d in asked[:-_REMEMBERED] if d not in self.server.flights]
        self._delete_answers(client, gone)
        self._left_behind[client] = [d for d in asked if d not in gone]

    # -- to devices -----------------------------------------------------------------------------------

    def _send(self, sent: Dispatch) -> tuple[float, float]:
        parcel = self.pieces.of(sent)
        self.tasks[sent.dispatch] = Task(sent.count, sent.learning_rate_scale)
        self._left_behind.setdefault(sent.client, []).append(sent.dispatch)
        self._forget_oldest(sent.client)
        for piece, content in parcel.new:
            self._put(piece, content)
        if self.journal is not None:  # else the past is repeated, and what is still out is told at its end
            self._tell(sent.dispatch)
        return float(parcel.received), float(sum(piece.size for piece, _ in parcel.new))

    def _put(self, piece: Piece, content: Content) -> None:
        """Store an object; while the past is repeated, at its end, and only what is still needed then."""
        if self.journal is None:
            self._past[piece.key] = piece, content
        else:
            self._hands.put(piece, content)

    def _drop_unused(self) -> list[str]:
        """Forget objects that no dispatch in flight needs; their keys. At the end of the run, all of them."""
        if self.end is not None:
            answers = [
                self._answer_key(d, client) for client, asked in self._left_behind.items() for d in asked
            ]
            return self.pieces.drop_unused(()) + answers
        return self.pieces.drop_unused({(f.version, f.ranking.digest) for f in self.server.flights.values()})

    def _remind(self, client: int, knows: int | None) -> None:
        """Tell a device its dispatch again if it knows of another one or of none."""
        for dispatch in self.live.deadlines:
            flight = self.server.flights[dispatch]
            is_missing = flight.client == client and dispatch != knows and dispatch not in self._fetching
            if is_missing and self._note_number():
                self._tell(dispatch)

    def _tell_again(self, dispatch: int) -> None:
        """Tell a dispatch that an earlier server may have told: a device trains each once."""
        self._tell(dispatch)

    def _tell(self, dispatch: int) -> None:
        flight, task = self.server.flights[dispatch], self.tasks[dispatch]
        values, masks = self.pieces.found(flight.version, flight.ranking, flight.rung)
        note = TaskNote(
            run=self.token,
            device=self.desk.devices[flight.client],
            sequence=self.desk.next_sequence(),
            dispatch=dispatch,
            client=flight.client,
            version=flight.version,
            density=flight.density,
            count=task.count,
            scale=task.scale,
            ranking=flight.ranking.digest,
            form=self.server.config.update_form,
            size=self.server.layout.size,
            cuts=PayloadOrder.by_rung(flight.ranking, flight.rung).cuts,
            values=values,
            masks=masks,
        )
        fields = {"model_params": values[0].key, "client_idx": str(flight.client)}
        self._hands.publish(*self.desk.write(note, flight.client, fields))

    def _finish_all(self) -> None:
        """Tell everybody of the end."""
        for client in range(len(self.desk.devices)):
            self._finish(client)

    def _finish(self, client: int) -> None:
        self._hands.publish(*self._farewell(client))

    def _farewell(self, client: int) -> tuple[str, bytes]:
        """Topic and bytes of the end of the run, for a client."""
        note = FinishNote(self.token, self.desk.devices[client], self.desk.next_sequence())
        return self.desk.write(note, client, {"client_idx": str(client)})

    def kept_topics(self) -> list[str]:
        """Topics of devices that believe what the broker keeps for them."""
        return [to_device(self.desk.run, self.desk.server, device) for device in self.desk.devices]

    def farewells(self) -> list[tuple[str, bytes]]:
        """Topic and bytes of the end, for the broker to keep for those who have not heard it."""
        return [
            self._farewell(client)
            for client in range(len(self.desk.devices))
            if client not in self._farewells
        ]

    # -- what is seen from outside ---------------------------------------------------------------------

    def unsent(self) -> list[tuple[Piece, Content]]:
        """Objects that no store has that outlives this process."""
        return self._hands.unsent()

    def undeleted(self) -> list[str]:
        """Keys of objects that are still to be removed from the store."""
        return self._hands.undeleted()

    def needed(self) -> frozenset[str]:
        """Names of the objects that dispatches in flight need."""
        return self.pieces.keys

    def somebody_works(self) -> bool:
        """Whether a device that was heard of has not said that it knows of the end, and may be there."""
        return bool(set(self.seen) - self._farewells - self._gone)

    def status(self) -> list[dict[str, Any]]:
        """One row for each device: what a display shows."""
        flights = {f.client: (d, f) for d, f in self.server.flights.items() if d not in self.server.overdue}
        now = self._clock()
        rows = []
        for client, device in enumerate(self.desk.devices):
            dispatch, flight = flights.get(client, (None, None))
            if client in self._farewells:
                state = "finished"
            elif dispatch in self.server.staged:
                state = "uploaded"
            elif flight is not None and client not in self.server.away:
                state = "training"
            else:
                state = "away" if client in self.server.away else "idle"
            rows.append(
                {
                    "device": device,
                    "state": state,
                    "density": self.server.gmr.densities[client],
                    "staleness": None if flight is None else self.server.version - flight.version,
                    "bytes_up": self.received.get(client, 0),
                    "refused": sum(self.desk.refused[client].values()),
                    "seen": None if client not in self.seen else now - self.seen[client],
                }
            )
        return rows

    # -- state ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON-able state beyond the engine's; `load_state` restores it."""
        return {
            "token": self.token,
            "desk": self.desk.state(),
            "number": self._written,
            "pieces": self.pieces.state(),
            "tasks": [[d, task.count, task.scale] for d, task in self.tasks.items()],
            "asked": [[client, asked] for client, asked in self._left_behind.items()],
        }

    def tensors(self) -> dict[str, Tensor]:
        """What belongs to `state` and is no JSON."""
        return {}

    def load_state(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` and `tensors` returned; there may be more tensors."""
        self.desk.load_state(state["desk"])
        self._written = state.get("number", 0)
        self.pieces.load_state(state["pieces"])
        self.tasks = {d: Task(count, scale) for d, count, scale in state["tasks"]}
        self._left_behind = {client: list(asked) for client, asked in state.get("asked", [])}
        self._version = self.server.version


def _finite(event: LiveEvent) -> LiveEvent:
    """An event as its journal can hold it: measures that overflowed are unknown."""
    if not isinstance(event, UploadArrived):
        return event
    measured = {name: getattr(event, name) for name in ("train_loss", "drift_sq", "change_sq")}
    lost: dict[str, Any] = {
        name: None for name, value in measured.items() if value is not None and not math.isfinite(value)
    }
    return replace(event, **lost) if lost else event
