"""The events of a run with real clients as entries of its journal, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from fedgmr_plugin.engine.events import ClientJoined, ClientLeft, UploadArrived, UploadRefused
from fedgmr_plugin.engine.live import LiveEvent, Tick
from fedgmr_plugin.errors import RunLogError
from fedgmr_plugin.protocol.journal import Entry

_EVENTS: dict[str, type[Any]] = {
    "joined": ClientJoined,
    "left": ClientLeft,
    "refused": UploadRefused,
    "tick": Tick,
    "upload": UploadArrived,
}
_NAMES = {kind: name for name, kind in _EVENTS.items()}
_TYPES = {"<f4": torch.float32, "<f8": torch.float64}


#: What the entry of an upload, and of a refused one, says besides its event, of clients that know nothing of
#: masks: whether its client numbers its answers, and the name of this one.
NUMBERED, ANSWER = "numbered", "answer"
#: What every entry says besides: the number that the server's next message has at least.
SEQUENCE = "sequence"
#: The entry that says nothing but this, and when: no event, but messages go out.
_NUMBER = "number"
_BESIDES = frozenset({NUMBERED, ANSWER, SEQUENCE})


def entry_of(event: LiveEvent) -> Entry:
    """An event, to the bit: values as they are, numbers in their shortest form that reads back the same."""
    if not isinstance(event, UploadArrived):
        return Entry({"event": _NAMES[type(event)], **asdict(event)})
    fields = {k: v for k, v in vars(event).items() if k != "values_S"}
    values = event.values_S.detach().cpu().contiguous().numpy()
    dtype = values.dtype.newbyteorder("<").str
    return Entry({"event": "upload", "dtype": dtype, **fields}, values.astype(dtype).tobytes())


def number_entry(time: float, sequence: int) -> Entry:
    """The entry of a number that messages have from second `time` on; it is no event."""
    return Entry({"event": _NUMBER, "time": time, SEQUENCE: sequence})


def is_number(entry: Entry) -> bool:
    """Whether an entry is one of `number_entry`."""
    return entry.head.get("event") == _NUMBER


def event_of(entry: Entry) -> LiveEvent:
    """The event of an entry.

    Raises:
        RunLogError: GMR-607 if it is none.
    """
    head = {name: value for name, value in entry.head.items() if name not in _BESIDES}
    try:
        kind = _EVENTS[head.pop("event")]
        if kind is UploadArrived:
            dtype = head.pop("dtype")
            array = np.frombuffer(bytearray(entry.payload), dtype=dtype)
            head["values_S"] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).to(_TYPES[dtype])
        event: LiveEvent = kind(**head)
    except (KeyError, TypeError, ValueError) as error:
        raise RunLogError("GMR-607", f"an entry is no event of this release: {error}") from error
    return event
