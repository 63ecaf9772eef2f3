"""FedML's device messages, and the signed note that mask-aware devices exchange inside them.

FedML's cross-device messages are JSON objects on MQTT topics: server to device
``fedml_{run}_{server}_{device}``, device to server ``fedml_{run}_{device}``. Ours are the same messages with
two more fields, which FedML's own devices ignore: ``fedgmr``, the note (JSON text), and ``fedgmr_mac``,
HMAC-SHA-256 of topic, line feed and note under the device's key, hex. A receiver believes the note and
nothing else (``docs/device-protocol.md``).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol.header import MOST_INTEGER, MOST_SEGMENTS, shown
from fedgmr_plugin.protocol.pieces import Piece

#: Version of the notes.
PROTOCOL = 1
#: Longest message, bytes.
MOST_MESSAGE = 2**18

# FedML's message types.
INIT, SYNC, MODEL, STATUS, CHECK, FINISH = 1, 2, 3, 5, 6, 7

_HEX = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class StatusNote:
    """A device says that it is there, and what it is doing; repeated while it is.

    Attributes:
        run: FedML's ``run_id``; in the other notes the server's token, which no other run has.
        state: ``ONLINE``, ``OFFLINE`` or ``FINISHED``.
        working: dispatch that it works on.
        answered: last dispatch that it answered.
        samples: its training samples, 1 at least.
        up, down: measured bandwidth, MB/s.
    """

    run: str
    device: int
    sequence: int
    state: str
    working: int | None = None
    answered: int | None = None
    samples: int | None = None
    up: float | None = None
    down: float | None = None


@dataclass(frozen=True)
class AnswerNote:
    """A device's update lies in the store, as an ``update`` message of the wire format.

    Attributes:
        dispatch: that it answers.
        update: the object.
    """

    run: str
    device: int
    sequence: int
    dispatch: int
    update: Piece


@dataclass(frozen=True)
class TaskNote:
    """A dispatch to a device.

    Attributes:
        dispatch, client, version, density, count, scale: as in `fedgmr_plugin.engine.events.Dispatch`.
        ranking: digest.
        form: what the server merges: ``delta`` for x_K - x_0, ``replacement`` for x_K.
        size: coordinates of the model, D.
        cuts: ends of the increments.
        values, masks: the increments, and the packed mask of each.
    """

    run: str
    device: int
    sequence: int
    dispatch: int
    client: int
    version: int
    density: float
    count: int
    scale: float
    ranking: str
    form: Literal["delta", "replacement"]
    size: int
    cuts: tuple[int, ...]
    values: tuple[Piece, ...]
    masks: tuple[Piece, ...]


@dataclass(frozen=True)
class FinishNote:
    """The run is over."""

    run: str
    device: int
    sequence: int


Note = StatusNote | AnswerNote | TaskNote | FinishNote
_KINDS: dict[str, type[Any]] = {
    "status": StatusNote,
    "answer": AnswerNote,
    "task": TaskNote,
    "finish": FinishNote,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
N = TypeVar("N", bound=Note)


def to_device(run: str, server: int, device: int) -> str:
    """Topic of messages to a device."""
    return f"fedml_{run}_{server}_{device}"


def to_server(run: str, device: int) -> str:
    """Topic of a device's messages."""
    return f"fedml_{run}_{device}"


def sign(note: Note, topic: str, key: bytes | None, message: Mapping[str, Any]) -> bytes:
    """FedML's `message` with the note in it, as it is published on `topic`; unsigned without a key."""
    return signed({"kind": _NAMES[type(note)], **asdict(note)}, topic, key, message)


def signed(
    fields: Mapping[str, Any], topic: str, key: bytes | None, message: Mapping[str, Any] | None = None
) -> bytes:
    """A `message` with a note of these fields in it; see `sign`."""
    text = json.dumps({"protocol": PROTOCOL, **fields}, sort_keys=True)
    found = {**(message or {}), "fedgmr": text}
    if key is not None:
        found["fedgmr_mac"] = _mac(key, topic, text)
    return json.dumps(found).encode()


def plain_message(kind: int, server: int, device: int, fields: Mapping[str, Any]) -> bytes:
    """A message of the server as FedML's own devices know it."""
    return json.dumps({"msg_type": kind, "sender": server, "receiver": device, **fields}).encode()


def parse(payload: bytes) -> dict[str, Any]:
    """A message as a JSON object of bounded length.

    Raises:
        WireError: GMR-741.
    """
    if len(payload) > MOST_MESSAGE:
        raise WireError("GMR-741", f"bytes={len(payload)} are more than {MOST_MESSAGE}")
    found = _json(payload)
    if not isinstance(found, dict):
        raise WireError("GMR-741", "the message is no JSON object")
    return found


def note_of(message: Mapping[str, Any], topic: str, key: bytes | None, kind: type[N]) -> N | None:
    """The note of a parsed message, authentic where there is a key; None where it has none.

    Raises:
        WireError: GMR-741 for a note that is not understood, GMR-743 for one that is not authentic.
    """
    if message.get("fedgmr") is None:
        return None
    fields = read_signed(message, topic, key)
    if fields.pop("kind", None) != _NAMES[kind]:
        raise WireError("GMR-741", f"the note is no {_NAMES[kind]}")
    rules = _RULES[kind]
    if set(fields) != set(rules):
        raise WireError("GMR-741", f"fields={shown(sorted(set(fields) ^ set(rules)))} missing or unknown")
    return kind(**{name: rule(name, fields[name]) for name, rule in rules.items()})


def read_signed(message: Mapping[str, Any], topic: str, key: bytes | None) -> dict[str, Any]:
    """The fields of a parsed message's note, authentic where there is a key, and not checked otherwise.

    Raises:
        WireError: as `note_of`.
    """
    text = message.get("fedgmr")
    if not isinstance(text, str):
        raise WireError("GMR-741", "the note is no text")
    if key is not None:
        mac = message.get("fedgmr_mac")
        if not isinstance(mac, str) or not _HEX.fullmatch(mac):
            raise WireError("GMR-743", "the message is not signed")
        if not hmac.compare_digest(mac, _mac(key, topic, text)):
            raise WireError("GMR-743", f"topic={topic} signed with another key, or changed on its way")
    fields = _json(text.encode(errors="replace"))
    if not isinstance(fields, dict) or fields.pop("protocol", None) != PROTOCOL:
        raise WireError("GMR-741", f"the note is not of protocol {PROTOCOL}")
    return fields


def _json(text: bytes) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise WireError("GMR-741", f"not JSON: {type(error).__name__}") from error


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _mac(key: bytes, topic: str, text: str) -> str:
    return hmac.new(key, f"{topic}\n{text}".encode(errors="replace"), hashlib.sha256).hexdigest()


# -- fields ------------------------------------------------------------------------------------------------

_Rule = Callable[[str, Any], Any]


def _wrong(name: str, value: Any) -> WireError:
    return WireError("GMR-741", f"{name}={shown(value)} is not what it must be")


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST_INTEGER:
        raise _wrong(name, value)
    return value


def _positive(name: str, value: Any) -> int:
    if _integer(name, value) < 1:
        raise _wrong(name, value)
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(name, value)
    if not (0 < value < 1e300 and math.isfinite(value)):
        raise _wrong(name, value)
    return float(value)


def _density(name: str, value: Any) -> float:
    if _number(name, value) > 1:
        raise _wrong(name, value)
    return float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise _wrong(name, value)
    return value


def _state(name: str, value: Any) -> str:
    if value not in ("ONLINE", "OFFLINE", "FINISHED"):
        raise _wrong(name, value)
    return str(value)


def _form(name: str, value: Any) -> str:
    if value not in ("delta", "replacement"):
        raise _wrong(name, value)
    return str(value)


def _ranking(name: str, value: Any) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise _wrong(name, value)
    return value


def _piece(name: str, value: Any) -> Piece:
    if not isinstance(value, list) or len(value) != 3:
        raise _wrong(name, value)
    key, size, digest = value
    if not isinstance(digest, str) or not _HEX.fullmatch(digest):
        raise _wrong(name, value)
    return Piece(_text(name, key), _integer(name, size), digest)


def _several(rule: _Rule) -> _Rule:
    def several(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not 0 < len(value) <= MOST_SEGMENTS:
            raise _wrong(name, value)
        return tuple(rule(name, item) for item in value)

    return several


def _optional(rule: _Rule) -> _Rule:
    return lambda name, value: None if value is None else rule(name, value)


_SENDER: dict[str, _Rule] = {"run": _text, "device": _integer, "sequence": _integer}
_RULES: dict[type[Any], dict[str, _Rule]] = {
    StatusNote: {
        **_SENDER,
        "state": _state,
        "working": _optional(_integer),
        "answered": _optional(_integer),
        "samples": _optional(_positive),
        "up": _optional(_number),
        "down": _optional(_number),
    },
    AnswerNote: {**_SENDER, "dispatch": _integer, "update": _piece},
    TaskNote: {
        **_SENDER,
        **dict.fromkeys(("dispatch", "client", "version", "count", "size"), _integer),
        "density": _density,
        "scale": _number,
        "ranking": _ranking,
        "form": _form,
        "cuts": _several(_integer),
        "values": _several(_piece),
        "masks": _several(_piece),
    },
    FinishNote: _SENDER,
}
