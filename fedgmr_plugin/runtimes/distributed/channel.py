"""Messages between the server's process and one that trains for it.

The processes are of one job and one program: nothing here is for strangers, whose messages have a format of
their own (`fedgmr_plugin.protocol.wire`). Nothing is pickled all the same.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

Buffer = bytearray | memoryview

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.int8, torch.int16, torch.uint8)
}


class Gone(Exception):
    """The other process does not answer any more; why, as far as it is known."""


class Frame(NamedTuple):
    """One message: JSON-able `head` with a ``kind``, and a vector `values`, empty where nothing travels."""

    head: dict[str, Any]
    values: Tensor


def frame(kind: str, values: Tensor | None = None, **head: Any) -> Frame:
    """A message."""
    return Frame({"kind": kind, **head}, torch.empty(0) if values is None else values)


def text_frame(kind: str, text: str, **head: Any) -> Frame:
    """A message whose values are a text of any length."""
    data = bytearray(text.encode() or b" ")
    return frame(kind, torch.frombuffer(data, dtype=torch.uint8), **head)


def text_of(message: Frame) -> str:
    """The text of a `text_frame`."""
    return message.values.cpu().numpy().tobytes().decode(errors="replace")


class Channel(Protocol):
    """To one process and from it, in order; one thread may send while another receives.

    Attributes:
        name: of the other process, for messages.
    """

    name: str

    def send(self, message: Frame) -> None:
        """Return when `message` is on its way and its memory may be used again.

        Raises:
            Gone: there is nobody to take it.
        """
        ...

    def receive(self) -> Frame:
        """The next message.

        Raises:
            Gone: none will come.
        """
        ...

    def close(self) -> None:
        """No more messages: end what this side holds of the other."""
        ...


def head_bytes(message: Frame) -> bytes:
    """The head as JSON, with type and number of the values."""
    dtype = str(message.values.dtype).removeprefix("torch.")
    data = json.dumps([message.head, dtype, message.values.numel()], separators=(",", ":")).encode()
    return data + b" " * (-(4 + len(data)) % 8)  # what follows is aligned


def head_of(data: bytes) -> tuple[dict[str, Any], torch.dtype, int]:
    """What `head_bytes` wrote."""
    head, dtype, count = json.loads(data)
    return head, _DTYPES[dtype], count


def packed(message: Frame) -> memoryview:
    """A message as bytes, of memory of its own."""
    head = head_bytes(message)
    start = 4 + len(head)
    view = np.empty(start + message.values.numel() * message.values.itemsize, dtype=np.uint8)
    view[:start] = np.frombuffer(len(head).to_bytes(4, "little") + head, dtype=np.uint8)
    if message.values.numel():
        values = torch.from_numpy(view[start:])
        values.copy_(message.values.detach().contiguous().view(torch.uint8))
    return view.data


def unpacked(data: Buffer) -> Frame:
    """The message; its values are a view of `data`."""
    start = 4 + int.from_bytes(data[:4], "little")
    head, dtype, count = head_of(bytes(data[4:start]))
    if not count:
        return Frame(head, torch.empty(0, dtype=dtype))
    return Frame(head, torch.frombuffer(data, dtype=dtype, offset=start))
