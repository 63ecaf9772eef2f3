"""The server's door: who is who, and which messages of devices are believed.

A message is refused, counted and forgotten where it is not understood, is not signed with its device's key,
comes too often, is a replay, or speaks for somebody else. Nothing is allocated for it beyond its own bytes.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol.header import shown
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

#: Numbers that a server may have used since it wrote one down: a minute's worth, where they follow the clock.
RESERVED = 60_000
#: Replay window: sequence numbers this far below the highest one are refused unread.
WINDOW = 64


class Replays:
    """Each sequence number once, in any order within a window (as in IPsec, RFC 4303 section 3.4.3)."""

    def __init__(self, highest: int = -1, seen: int = 0) -> None:
        self.highest, self._seen = highest, seen  # bit i: highest - i was seen

    def check(self, sequence: int) -> None:
        """Take in a sequence number.

        Raises:
            WireError: GMR-744 if it was seen, or is too old to know.
        """
        ahead = sequence - self.highest
        if ahead > 0:
            self._seen = ((self._seen << ahead) | 1) & (2**WINDOW - 1) if ahead < WINDOW else 1
            self.highest = sequence
            return
        if -ahead >= WINDOW or self._seen >> -ahead & 1:
            raise WireError("GMR-744", f"sequence={sequence} after {self.highest}")
        self._seen |= 1 << -ahead

    @property
    def state(self) -> list[int]:
        """JSON-able arguments of the constructor."""
        return [self.highest, self._seen]


class Bucket:
    """Token bucket: `burst` messages at once, `rate` a second in the long run."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._then = burst, 0.0

    def take(self, now: float) -> None:
        """One message at second `now`, which does not decrease.

        Raises:
            WireError: GMR-745 if there are too many.
        """
        self._left = min(self._burst, self._left + (now - self._then) * self._rate)
        self._then = now
        if self._left < 1:
            raise WireError("GMR-745", f"more than {self._rate:g} messages a second")
        self._left -= 1


@dataclass(frozen=True)
class PlainAnswer:
    """A device that knows nothing of masks has put its model into the store under `key`.

    Attributes:
        index: ``client_idx`` of the message that it answers, where it repeats it.
    """

    key: str
    samples: int
    index: int | None = None


@dataclass(frozen=True)
class PlainStatus:
    """Such a device says that it is there (``ONLINE``), or not."""

    state: str


Said = StatusNote | AnswerNote | PlainStatus | PlainAnswer


class Desk:
    """Reads devices' messages and writes theirs.

    Args:
        run: FedML's ``run_id``.
        server: FedML's ``server_id``.
        devices: FedML's ids of the devices, in the order of the clients.
        keys: each device's key; None where devices are not authenticated, which alone lets devices in that
            know nothing of notes.
        rate, burst: messages of one device a second, and at once.
        wall_clock: milliseconds of the day's clock, for sequence numbers: a server that was started again
            goes on above those that devices know.
    """

    def __init__(
        self,
        run: str,
        server: int,
        devices: Sequence[int],
        keys: Mapping[int, bytes] | None,
        *,
        rate: float = 5.0,
        burst: float = 50.0,
        wall_clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.run, self.server, self.devices, self._keys = run, server, tuple(devices), keys
        self.clients = {device: client for client, device in enumerate(self.devices)}
        self.refused: list[Counter[str]] = [Counter() for _ in self.devices]
        self.strangers: Counter[str] = Counter()
        self._replays = [Replays() for _ in self.devices]
        self._wills = [Replays() for _ in self.devices]
        self._wall = wall_clock
        self._buckets = [Bucket(rate, burst) for _ in self.devices]
        self._sequence = 0
        self._topic = re.compile(rf"fedml_{re.escape(run)}_(\d{{1,18}})")

    # -- reading --------------------------------------------------------------------------------------

    @property
    def topics(self) -> list[str]:
        """Topics on which devices write."""
        return list(self.keys_by_topic)

    @property
    def keys(self) -> Mapping[int, bytes]:
        """Each device's key; none where devices are not authenticated."""
        return self._keys or {}

    @property
    def keys_by_topic(self) -> dict[str, bytes | None]:
        """Key with which the notes on each topic are signed; None where devices are not authenticated."""
        keys = self._keys or {}
        return {to_server(self.run, device): keys.get(device) for device in self.devices}

    def read(self, topic: str, payload: bytes, now: float) -> tuple[int, Said]:
        """Client and content of a message.

        Args:
            now: second of its arrival, which does not decrease.

        Raises:
            WireError: GMR-741 to GMR-745, GMR-747; it has been counted.
        """
        match = self._topic.fullmatch(topic)
        client = None if match is None else self.clients.get(int(match[1]))
        try:
            if client is None:
                raise WireError("GMR-742", f"topic={shown(topic)} is no device's of this run")
            said = self._said(client, topic, parse(payload))
            if isinstance(said, (StatusNote, AnswerNote)):
                # The broker sends a last will long after it was signed: it has a sequence of its own.
                is_will = isinstance(said, StatusNote) and said.state == "OFFLINE"
                (self._wills if is_will else self._replays)[client].check(said.sequence)
            # Authentic, and heard for the first time: nobody uses up a device's rate but itself.
            self._buckets[client].take(now)
            return client, said
        except WireError as refusal:
            (self.strangers if client is None else self.refused[client])[refusal.code] += 1
            raise

    def _said(self, client: int, topic: str, message: dict[str, Any]) -> Said:
        device = self.devices[client]
        kind = message.get("msg_type")
        if kind not in (MODEL, STATUS) or isinstance(kind, bool):
            raise WireError("GMR-741", f"msg_type={shown(kind)} is not for a server")
        key = None if self._keys is None else self._keys[device]
        note: StatusNote | AnswerNote | None
        if kind == STATUS:
            note = note_of(message, topic, key, StatusNote)
        else:
            note = note_of(message, topic, key, AnswerNote)
        if note is None:
            if self._keys is not None:
                raise WireError("GMR-743", "the message has no note")
            return self._plain(device, kind, message)
        if note.device != device or (isinstance(note, StatusNote) and note.run != self.run):
            raise WireError("GMR-747", f"device={note.device} of run={shown(note.run)} on topic={topic}")
        return note

    def _plain(self, device: int, kind: int, message: dict[str, Any]) -> PlainStatus | PlainAnswer:
        if str(message.get("sender")) != str(device):
            raise WireError("GMR-747", f"sender={shown(message.get('sender'))} on the topic of {device}")
        if kind == STATUS:
            state = message.get("client_status")
            if state not in ("ONLINE", "OFFLINE", "FINISHED"):
                raise WireError("GMR-741", f"client_status={shown(state)}")
            return PlainStatus(state)
        samples, name = message.get("num_samples"), message.get("model_params")
        if isinstance(samples, str) and samples.isdecimal() and len(samples) < 16:
            samples = int(samples)
        if isinstance(samples, bool) or not isinstance(samples, int) or not 0 < samples < 2**53:
            raise WireError("GMR-741", f"num_samples={shown(samples)}")
        if not isinstance(name, str) or not 0 < len(name) <= 512:
            raise WireError("GMR-741", f"model_params={shown(name)}")
        index = message.get("client_idx")
        if isinstance(index, str) and index.isdecimal() and len(index) < 16:
            index = int(index)
        if index is not None and (
            isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 2**53
        ):
            raise WireError("GMR-741", f"client_idx={shown(index)}")
        return PlainAnswer(name, samples, index)

    def count(self, client: int, code: str) -> None:
        """Note a refusal that was found later."""
        self.refused[client][code] += 1

    # -- writing --------------------------------------------------------------------------------------

    @property
    def coming(self) -> int:
        """Number that the server's next message would have now."""
        return max(self._sequence + 1, self._wall())

    def next_sequence(self) -> int:
        """Number of the server's next message."""
        self._sequence = self.coming
        return self._sequence

    def go_on_above(self, sequence: int) -> None:
        """After a restart: devices know numbers up to `sequence` and some more, whatever the clock says.

        The server that was killed had written down `sequence`, and used fewer than `RESERVED` above it.
        """
        known = max(self._sequence, sequence)
        self._sequence = known + RESERVED if known and self._wall() <= known + RESERVED else known

    def write(self, note: TaskNote | FinishNote, client: int, fields: Mapping[str, Any]) -> tuple[str, bytes]:
        """Topic and bytes of a message to a client.

        Args:
            fields: FedML's, besides type, sender and receiver.
        """
        device = self.devices[client]
        topic = to_device(self.run, self.server, device)
        kind = FINISH if isinstance(note, FinishNote) else SYNC if note.count else INIT
        message = {"msg_type": kind, "sender": self.server, "receiver": device, **fields}
        return topic, sign(note, topic, None if self._keys is None else self._keys[device], message)

    # -- state ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON-able state; `load_state` restores it."""
        return {
            "sequence": self._sequence,
            "replays": [r.state for r in self._replays],
            "wills": [r.state for r in self._wills],
            "refused": [dict(counts) for counts in self.refused],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._sequence = state["sequence"]
        self._replays = [Replays(*values) for values in state["replays"]]
        self._wills = [Replays(*values) for values in state["wills"]]
        self.refused = [Counter(counts) for counts in state["refused"]]
