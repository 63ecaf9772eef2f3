"""Devices that know nothing of masks: each is sent a model, trains it, and sends a model back.

They answer no number, so the server remembers what each was sent: one dispatch at a time. A device that says
that it is online while its dispatch is out is not sent it again, because FedML's devices say so at any time;
the deadline decides. Nobody can sign here: `device_authentication` must be off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from fedgmr_plugin.engine.admission import InFlight
from fedgmr_plugin.engine.events import ClientJoined, ClientLeft, Dispatch, UploadArrived
from fedgmr_plugin.engine.live import LiveEvent
from fedgmr_plugin.errors import ModelError, WireError
from fedgmr_plugin.kernels.blocks import sum_sq
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.protocol.desk import PlainAnswer, PlainStatus
from fedgmr_plugin.protocol.notes import CHECK, FINISH, INIT, SYNC, StatusNote, plain_message, to_device
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.protocol.storekeys import file_key, is_file_answer
from fedgmr_plugin.runtimes.devices.office import Content, Office, Task


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
    """

    def __init__(self, *given: Any, codec: Codec, steps: int = 0, **named: Any) -> None:
        super().__init__(*given, **named)
        self._codec, self._steps = codec, steps
        self._files: dict[tuple[int, str, int], Piece] = {}  # (version, ranking, rung) to its file
        self.values: dict[tuple[int, str, int], Tensor] = {}  # and to what it holds [S]
        self._asked: dict[int, float] = {}  # client to the second at which it was asked whether it is there

    # -- devices come and go --------------------------------------------------------------------------

    def hello(self) -> None:
        """Ask everybody whether they are there: who came first was not heard."""
        for client in range(len(self.desk.devices)):
            self._ask(client)

    def tick(self) -> None:
        super().tick()
        now = self._clock()
        for client in self.server.away if self.end is None else ():
            if now - self._asked.get(client, now) >= self.server.config.retry_seconds:
                self._ask(client)

    def next_tick(self) -> float | None:
        due = super().next_tick()
        soon = self._clock() + 1.0
        return soon if due is None else min(due, soon)

    def _ask(self, client: int) -> None:
        self._asked[client] = self._clock()
        device = self.desk.devices[client]
        topic = to_device(self.desk.run, self.desk.server, device)
        message = plain_message(CHECK, self.desk.server, device, {"client_idx": str(client)})
        self._hands.publish(topic, message)

    def _plain(self, client: int, said: PlainStatus | PlainAnswer, now: float) -> None:
        if isinstance(said, PlainAnswer):
            self._answered(client, said)
        elif said.state != "ONLINE":
            self._apply([ClientLeft(client, now)])
        elif client in self.server.away and self._is_new(client):
            self._apply([ClientJoined(client, now, fresh=True)])

    def _status(self, client: int, note: StatusNote, now: float) -> None:
        self._plain(client, PlainStatus(note.state), now)

    def _answered(self, client: int, said: PlainAnswer) -> None:
        dispatch = self._outstanding(client)
        if dispatch is None or dispatch in self._fetching:
            self.desk.count(client, "GMR-401")
            return
        if not is_file_answer(said.key, self.desk.run, (self.desk.devices[client],)):
            self.desk.count(client, "GMR-747")  # what it names is not its own to have read, and deleted
            return
        flight = self.server.flights[dispatch]
        most = self._codec.most_bytes(flight.ranking, flight.rung)
        self._fetching.add(dispatch)
        self._hands.fetch(
            Piece(said.key, most, ""), lambda content: self._got(client, dispatch, said, content)
        )

    def _outstanding(self, client: int) -> int | None:
        """The dispatch that a device's next answer is to: the one that it got last, while unanswered."""
        own = [
            d for d, f in self.server.flights.items() if f.client == client and d not in self.server.staged
        ]
        return max(own, default=None)

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
        change_S = values_S - sent_S
        if self.server.config.update_form == "delta":
            values_S = change_S
        return UploadArrived(
            dispatch=dispatch,
            client=flight.client,
            values_S=values_S,
            samples=samples,
            time=now,
            bytes_up=float(size),
            steps=self._steps,
            change_sq=sum_sq(change_S),
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

    def _tell(self, dispatch: int) -> None:
        flight, task = self.server.flights[dispatch], self.tasks[dispatch]
        file = self._files[flight.version, flight.ranking.digest, flight.rung]
        device = self.desk.devices[flight.client]
        kind = SYNC if task.count else INIT
        fields = {"model_params": file.key, "client_idx": str(flight.client), "client_os": "AndroidClient"}
        message = plain_message(kind, self.desk.server, device, fields)
        self._hands.publish(to_device(self.desk.run, self.desk.server, device), message)

    def _finish(self, client: int) -> None:
        device = self.desk.devices[client]
        message = plain_message(FINISH, self.desk.server, device, {"client_idx": str(client)})
        self._hands.publish(to_device(self.desk.run, self.desk.server, device), message)

    def _drop_unused(self) -> list[str]:
        used = {(f.version, f.ranking.digest, f.rung) for f in self.server.flights.values()}
        gone = [key for key in self._files if key not in used]
        for key in gone:
            del self.values[key]
        return [self._files.pop(key).key for key in gone]

    def needed(self) -> frozenset[str]:
        return frozenset(file.key for file in self._files.values())

    # -- state ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        files = [[*key, piece] for key, piece in self._files.items()]
        return {**super().state(), "files": files}

    def tensors(self) -> dict[str, Tensor]:
        return {f"sent.{v}.{digest}.{rung}": t for (v, digest, rung), t in self.values.items()}

    def load_state(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().load_state(state, tensors)
        self._files = {(v, digest, rung): Piece(*p) for v, digest, rung, p in state["files"]}
        self.values = {key: tensors["sent.{}.{}.{}".format(*key)] for key in self._files}
