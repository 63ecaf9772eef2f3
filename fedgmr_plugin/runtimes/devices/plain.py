"""Devices that know nothing of masks: each is sent a model, trains it, and sends a model back.

Which dispatch is an answer to? Nobody signs or numbers answers here, so it has to follow from what FedML's
devices do (``android/fedmlsdk``, ClientManager and TrainingExecutor; ``cross_silo/client``):

(a) A phone repeats the ``client_idx`` of the message that it trained for, does not use it otherwise, and
    reads it when the download is complete. A silo uses it to choose its data, and repeats nothing.
(b) Each training gives a file of a new name: a name that comes twice is one answer, delivered twice. So the
    names of the last `REMEMBERED` answers of each device are in journal and checkpoint.
(c) A second message of type 1 is ignored. Others are trained one after the other, where a phone keeps only
    the newest that waits: not every message is answered, so answers cannot be counted off against messages.
(d) Whatever trains when the process ends is lost. A started process says ``ONLINE``, and again whenever
    it is asked: hearing it of a phone does not tell that nothing is being trained.
(e) A silo does one thing after another, training included: before it replies, it has answered all that it
    was sent before. But its broker hands over what it says only after another round trip (QoS 2): where a
    message comes in between, an ``ONLINE`` waits until that is trained, and comes just before the answer.

Hence four rules.

1.  *One at a time.* While an answer is owed nothing else is sent, however late it is: at `answer_deadline`
    the slot is free and the others go on, but the device gets its next sub-model with its answer (or its
    refusal). It owes no longer after `lost_after` seconds, or once it has said ``ONLINE`` unasked, if it
    is known to number its answers (one that starts when it is asked says so twice, and one whose broker
    keeps its session replies to each question of a long absence).
2.  *Numbered.* ``client_idx`` says, besides the client n of N, which of its dispatches this is:
    n + N (count + 1). An answer that repeats it is credited to that dispatch, or to none (GMR-401). By (a)
    this is right whatever was lost or late or came twice, unless a message comes while an older one's
    file is still being downloaded: that takes a download longer than `lost_after`, or a message that the
    broker delivers once more after its answer, when a connection broke.
3.  *Without number* (silos, and apps that repeat nothing) an answer is credited to the dispatch that was sent
    last. By rule 1 the others were answered, or are lost, so this is right for whoever answers within
    `lost_after` or never, and trains a message once. So a server that goes on does not tell a dispatch
    again to a client that is not known to number its answers, unless it is a phone's first (c); and what is
    sent to a silo arrives once at most (over gRPC but for a call that breaks before its answer).
4.  *Silos are asked.* One that owes an answer and has been silent for `retry_seconds` may have lost what it
    was sent, or its answer. It is asked, and again after twice as long. What it says first may be older than
    what it was told, or come before the answer (e); so it is asked once more `retry_seconds` later, and if
    it replies, it works on nothing: it is told again, or gets another sub-model if it was late.

A phone that loses its sub-model is therefore idle for `lost_after`, at the most, and the answers of a device
that needs longer than that are of no use, in the end. Nobody can sign here:
`device_authentication` must be off.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fedgmr_plugin.engine.admission import InFlight
from fedgmr_plugin.engine.client import parameter_parts
from fedgmr_plugin.engine.events import ClientJoined, ClientLeft, Dispatch, UploadArrived, UploadRefused
from fedgmr_plugin.engine.live import LiveEvent
from fedgmr_plugin.errors import ModelError, WireError
from fedgmr_plugin.kernels.blocks import sum_sq
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.protocol.desk import PlainAnswer, PlainStatus
from fedgmr_plugin.protocol.history import ANSWER, NUMBERED
from fedgmr_plugin.protocol.journal import Entry, Journal
from fedgmr_plugin.protocol.notes import CHECK, FINISH, INIT, SYNC, StatusNote, plain_message, to_device
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.protocol.storekeys import file_key, is_file_answer
from fedgmr_plugin.runtimes.devices.office import Content, Office, Task

#: ``client_idx`` stays below: FedML's devices read it as a 32-bit number.
_MOST_INDEX = 2**31
#: Deadlines after which what was not answered is lost, where `lost_after` is not given.
_LOST = 3
#: Names of each device's last answers that are remembered.
REMEMBERED = 64
#: Seconds between two questions to one device whether it is there, at least.
_ASK_SECONDS = 1.0


class Codec(Protocol):
    """How a sub-model is written for a device, and read from it."""

    def encode(self, values_S: Tensor, ranking: Ranking, rung: int) -> bytes:
        """The sub-model as a file; equal sub-models give equal bytes."""
        ...

    def decode(self, content: Content, ranking: Ranking, rung: int) -> Tensor:
        """The trained weights [S] of a file, in the order of the ranking.

        Raises:
            WireError, ModelError: it is no such file.
        """
        ...

    def most_bytes(self, ranking: Ranking, rung: int) -> int:
        """Length of the longest file that can be valid."""
        ...


class PlainOffice(Office):
    """One run's server for such devices; see `Office`.

    Args:
        codec: of the files.
        steps: local steps that devices make, for the run log; 0 where unknown.
        numbered: whether ``client_idx`` may number dispatches; false for silos, which choose data by it.
    """

    def __init__(
        self, *given: Any, codec: Codec, steps: int = 0, numbered: bool = True, **named: Any
    ) -> None:
        super().__init__(*given, **named)
        self._codec, self._steps, self._numbered = codec, steps, numbered
        config = self.server.config
        self._patience = config.lost_after or _LOST * config.answer_deadline
        self._told: dict[int, float] = {}  # dispatch to the second at which it was told
        self._numbering: set[int] = set()  # clients that repeat ``client_idx``
        self._restarted: set[int] = set()  # clients that have lost what they were told last
        self._unanswered: Counter[int] = Counter()  # client to how often it was asked, and has not replied
        self._heard: dict[int, list[str]] = {}  # client to the names of its last answers
        self._names: dict[int, str] = {}  # dispatch to the name of its answer
        self._files: dict[tuple[int, str, int], Piece] = {}  # (version, ranking, rung) to its file
        self.values: dict[tuple[int, str, int], Tensor] = {}  # and to what it holds [S]
        never = dict.fromkeys(range(len(self.desk.devices)), -math.inf)
        self._asked = never  # client to the second at which it was asked whether it is there
        self._online_at = never.copy()  # client to the second at which it said so

    # -- devices come and go --------------------------------------------------------------------------

    def resume(
        self, entries: Iterable[Entry], journal: Journal, unsent: Sequence[tuple[Piece, Content]]
    ) -> None:
        super().resume(self._learning(entries), journal, unsent)
        now = self._clock()  # when they were told is not known: not after this
        self._told = dict.fromkeys(self.server.flights, now) | self._told

    def _learning(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The same entries; who numbers its answers, and which were heard, is learnt from them."""
        for entry in entries:
            if ANSWER in entry.head:
                self._remember(int(entry.head["client"]), str(entry.head[ANSWER]))
            if NUMBERED in entry.head:
                self._learn(int(entry.head["client"]), bool(entry.head[NUMBERED]))
            yield entry

    def _learn(self, client: int, numbers: bool) -> None:
        if numbers:
            self._numbering.add(client)
        else:
            self._numbering.discard(client)

    def _remember(self, client: int, name: str) -> None:
        self._heard[client] = [*self._heard.get(client, ()), name][-REMEMBERED:]

    def _entry(self, event: LiveEvent) -> Entry:
        entry = super()._entry(event)
        head = dict(entry.head)
        if isinstance(event, (UploadArrived, UploadRefused)) and event.dispatch in self._names:
            head[ANSWER] = self._names[event.dispatch]
        if isinstance(event, UploadArrived):
            head[NUMBERED] = event.client in self._numbering
        return Entry(head, entry.payload)

    def hello(self) -> None:
        """Ask everybody whether they are there: who came first was not heard."""
        now = self._clock()
        for client in range(len(self.desk.devices)):
            self._asked[client] = now
            self._ask(client)

    def tick(self) -> None:
        super().tick()
        if self.end is not None or self._hands.is_stuck():
            return
        now = self._clock()
        wait = max(self.server.config.retry_seconds, _ASK_SECONDS)
        late = self._owing() if self.server.overdue else set()
        away = {client for client in self.server.away - late if now - self._asked[client] >= wait}
        silent = set() if self._numbered else self._silent_for(wait, now)
        for client in sorted(away | silent):
            self._asked[client] = now
            self._ask(client)

    def _silent_for(self, wait: float, now: float) -> set[int]:
        """Silos that are to be asked (rule 4)."""
        silent = set()
        for client, dispatch in self._owed().items():
            since, asked = max(self._told[dispatch], self._online_at[client]), self._asked[client]
            if now - max(since, asked) >= max(wait, asked - since):
                silent.add(client)
        return silent

    def next_tick(self) -> float | None:
        due = super().next_tick()
        soon = self._clock() + 1.0
        return soon if due is None else min(due, soon)

    def _ask(self, client: int) -> None:
        self._unanswered[client] += 1
        device = self.desk.devices[client]
        topic = to_device(self.desk.run, self.desk.server, device)
        message = plain_message(CHECK, self.desk.server, device, {"client_idx": str(client)})
        self._hands.publish(topic, message)

    def _plain(self, client: int, said: PlainStatus | PlainAnswer, now: float) -> None:
        if isinstance(said, PlainAnswer):
            self._answered(client, said)
        elif said.state != "ONLINE":
            self._apply([ClientLeft(client, now)])
        else:
            self._online(client, now)

    def _online(self, client: int, now: float) -> None:
        if not self._numbered:
            self._silo_online(client, now)
        elif self._unanswered[client]:
            self._unanswered[client] -= 1
        elif client in self._numbering and client in self._owed():
            self._restarted.add(client)
        if client in self.server.away and self._is_new(client) and client not in self._owing():
            self._apply([ClientJoined(client, now, fresh=client in self._restarted)])

    def _silo_online(self, client: int, now: float) -> None:
        """Rule 4."""
        newest = self._owed().get(client)
        if newest is not None and self._told[newest] < self._online_at[client] < self._asked[client]:
            if newest in self.server.overdue:
                self._restarted.add(client)
            else:
                self._tell(newest, SYNC)
        self._online_at[client] = now

    def _owed(self) -> dict[int, int]:
        """Client to the newest of its dispatches of which no answer is on its way."""
        answered = self.server.staged.keys() | self._unwritten() | self._fetching
        flights = sorted(self.server.flights.items())
        return {flight.client: dispatch for dispatch, flight in flights if dispatch not in answered}

    def _owing(self) -> set[int]:
        """Clients that may still work on a dispatch that they did not answer in time."""
        now, flights = self._clock(), self.server.flights
        late = {flights[d].client for d in self.server.overdue if now - self._told[d] < self._patience}
        return late - self._restarted

    def _status(self, client: int, note: StatusNote, now: float) -> None:
        self._plain(client, PlainStatus(note.state), now)

    def _answered(self, client: int, said: PlainAnswer) -> None:
        dispatch = self._answered_by(client, said)
        if dispatch is None or dispatch in self._fetching or said.key in self._heard.get(client, ()):
            self.desk.count(client, "GMR-401")
            return
        if not is_file_answer(said.key, self.desk.run, (self.desk.devices[client],), self.desk.server):
            self.desk.count(client, "GMR-747")  # what it names is not its own to have read, and deleted
            return
        flight = self.server.flights[dispatch]
        most = self._codec.most_bytes(flight.ranking, flight.rung)
        self._fetching.add(dispatch)
        self._names[dispatch] = said.key
        self._remember(client, said.key)
        self._hands.fetch(
            Piece(said.key, most, ""), lambda content: self._got(client, dispatch, said, content)
        )

    def _answered_by(self, client: int, said: PlainAnswer) -> int | None:
        """The dispatch that an answer is to, by rules 2 and 3; None if that is not waited for."""
        own = self._outstanding(client)
        if not self._numbered or said.index is None or said.index < len(self.desk.devices):
            return max(own, default=None)
        self._learn(client, True)
        return next((d for d in own if self._index(d) == said.index), None)

    def _outstanding(self, client: int) -> list[int]:
        """A client's dispatches that are not answered, be the answer merged or yet to be written down."""
        flights, staged = self.server.flights, self.server.staged
        answered = self._unwritten()
        return [d for d, f in flights.items() if f.client == client and d not in staged and d not in answered]

    def _unwritten(self) -> set[int]:
        """Dispatches whose answers wait until they can be written down."""
        return {e.dispatch for e in self.waiting if isinstance(e, (UploadArrived, UploadRefused))}

    def _index(self, dispatch: int) -> int:
        """``client_idx`` of a dispatch: its client modulo their number, FedML's index, and which it is."""
        client, clients = self.server.flights[dispatch].client, len(self.desk.devices)
        if not self._numbered:
            return client
        return client + clients * (1 + self.tasks[dispatch].count % (_MOST_INDEX // clients - 1))

    def _got(self, client: int, dispatch: int, said: PlainAnswer, content: bytearray | WireError) -> None:
        self._fetching.discard(dispatch)
        flight = self.server.flights.get(dispatch)
        if flight is None or dispatch in self.server.staged or self.end is not None:
            return
        now = self._clock()
        try:
            if isinstance(content, WireError):
                raise content
            values_S = self._codec.decode(content, flight.ranking, flight.rung)
        except (WireError, ModelError) as refusal:
            self._refuse(client, dispatch, WireError(refusal.code, refusal.message), [said.key])
            return
        self._unanswered[client] = 0  # it has replied to what it was asked before, or never will
        self.received[client] = self.received.get(client, 0) + len(content)
        arrived = self._upload(dispatch, flight, values_S, said.samples, len(content), now)
        events: list[LiveEvent] = [arrived]
        if client in self.server.away:
            events.append(ClientJoined(client, now, samples=said.samples))
        self._apply(events, [said.key])

    def _upload(
        self, dispatch: int, flight: InFlight, values_S: Tensor, samples: int, size: int, now: float
    ) -> UploadArrived:
        sent_S = self.values[flight.version, flight.ranking.digest, flight.rung]
        parts = parameter_parts(flight.ranking, self.server.layout)
        change_sq = sum_sq(values_S, sent_S, parts)
        if self.server.config.update_form == "delta":
            for part in parts:
                values_S[part] -= sent_S[part]
        return UploadArrived(
            dispatch=dispatch,
            client=flight.client,
            values_S=values_S,
            samples=samples,
            time=now,
            bytes_up=float(size),
            steps=self._steps,
            change_sq=change_sq,
        )

    # -- to devices -----------------------------------------------------------------------------------

    def _send(self, sent: Dispatch) -> tuple[float, float]:
        key = sent.version, sent.ranking.digest, sent.rung
        self.tasks[sent.dispatch] = Task(sent.count, sent.learning_rate_scale)
        new = key not in self._files
        if new:
            content = self._codec.encode(sent.values_S, sent.ranking, sent.rung)
            name = f"{sent.version}-{sent.ranking.digest}-{sent.rung}"
            self._files[key] = Piece(file_key(self.desk.run, self.token, name), len(content), "")
            self.values[key] = sent.values_S
            self._put(self._files[key], content)
        if self.journal is not None:
            self._tell(sent.dispatch)
        size = float(self._files[key].size)
        return size, size if new else 0.0

    def _tell_again(self, dispatch: int) -> None:
        is_first = self._numbered and self.tasks[dispatch].count == 0
        if is_first or self.server.flights[dispatch].client in self._numbering:
            self._tell(dispatch)

    def _tell(self, dispatch: int, kind: int | None = None) -> None:
        flight, task = self.server.flights[dispatch], self.tasks[dispatch]
        file = self._files[flight.version, flight.ranking.digest, flight.rung]
        device = self.desk.devices[flight.client]
        kind = kind or (SYNC if task.count else INIT)
        index = str(self._index(dispatch))
        fields = {"model_params": file.key, "client_idx": index, "client_os": "AndroidClient"}
        self._told[dispatch] = math.inf  # until it has left: it may wait for its file to be stored
        self._restarted.discard(flight.client)
        message = plain_message(kind, self.desk.server, device, fields)
        topic = to_device(self.desk.run, self.desk.server, device)
        once = not self._numbered  # rule 3; what is lost comes back by rule 4
        self._hands.publish(topic, message, lambda: self._left(dispatch), at_most_once=once)

    def _left(self, dispatch: int) -> None:
        if dispatch in self._told:
            self._told[dispatch] = self._clock()

    def _finish(self, client: int) -> None:
        device = self.desk.devices[client]
        message = plain_message(FINISH, self.desk.server, device, {"client_idx": str(client)})
        self._hands.publish(to_device(self.desk.run, self.desk.server, device), message)

    def kept_topics(self) -> list[str]:
        return []  # these devices take nothing that is retained

    def farewells(self) -> list[tuple[str, bytes]]:
        return []

    def _drop_unused(self) -> list[str]:
        used = {(f.version, f.ranking.digest, f.rung) for f in self.server.flights.values()}
        gone = [key for key in self._files if key not in used]
        self._told = {d: told for d, told in self._told.items() if d in self.server.flights}
        self._names = {d: name for d, name in self._names.items() if d in self.server.flights}
        for key in gone:
            del self.values[key]
        return [self._files.pop(key).key for key in gone]

    def needed(self) -> frozenset[str]:
        return frozenset(file.key for file in self._files.values())

    # -- state ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        files = [[*key, piece] for key, piece in self._files.items()]
        # What is not written down yet is to be heard again.
        lost = {self._names.get(d) for d in (*self._fetching, *self._unwritten())}
        heard = [[client, [n for n in names if n not in lost]] for client, names in self._heard.items()]
        return {**super().state(), "files": files, "numbering": sorted(self._numbering), "heard": heard}

    def tensors(self) -> dict[str, Tensor]:
        return {f"sent.{v}.{digest}.{rung}": t for (v, digest, rung), t in self.values.items()}

    def load_state(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().load_state(state, tensors)
        self._files = {(v, digest, rung): Piece(*p) for v, digest, rung, p in state["files"]}
        self.values = {key: tensors["sent.{}.{}.{}".format(*key)] for key in self._files}
        self._numbering = set(state["numbering"])
        self._heard = {client: list(names) for client, names in state.get("heard", [])}
