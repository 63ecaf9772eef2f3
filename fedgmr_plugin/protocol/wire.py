"""Messages between server and client as bytes (format: ``docs/wire-format.md``).

Legend: D coordinates of the model, S places of one payload.

One message is one safetensors file: ``values`` and, where the receiver cannot know it, a packed ``mask``.
`decode` allocates nothing before it has compared what the message claims with what the receiver expects.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol.header import (
    MOST_HEADER,
    Header,
    Kind,
    build,
)
from fedgmr_plugin.protocol.headerparse import parse
from fedgmr_plugin.protocol.mask import Mask, unpack
from fedgmr_plugin.protocol.maskcode import most_bytes

Buffer = bytes | bytearray | memoryview


class Message(NamedTuple):
    """A header and its bytes.

    Attributes:
        values: [stop - start] in payload order, of type ``header.dtype``. After `decode` it is a view of the
            buffer where that can be written to.
        mask: which coordinates they are; None where the receiver knows.
    """

    header: Header
    values: Tensor
    mask: Mask | None = None


@dataclass(frozen=True)
class Limits:
    """What a receiver expects; a message that claims anything else is refused before any allocation.

    Attributes:
        size: coordinates of its model, D.
        dtypes: types of values that it takes. The narrow ones, bfloat16 and float16, must be asked for.
        kinds: kinds of message that it takes.
        run: name of its run; None takes any.
        known: cuts of the payload order that it knows, from place 0, by digest of the ranking. A message
            without a mask must fit them. None leaves that to the caller.
        segments: most segments of a mask that travels; each costs a pass over D coordinates.
        finite: refuse NaN and infinity, at the price of one pass over the values.
    """

    size: int
    dtypes: Collection[torch.dtype] = (torch.float32,)
    kinds: Collection[Kind] = get_args(Kind)
    run: str | None = None
    known: Mapping[str, Sequence[int]] | None = None
    segments: int = 16
    finite: bool = False

    @property
    def most_bytes(self) -> int:
        """Longest message that can be valid: what a transport may reject unread."""
        values = self.size * max(dtype.itemsize for dtype in self.dtypes)
        return 8 + MOST_HEADER + values + self.segments * most_bytes(self.size)


def encode(message: Message, out: Buffer | None = None) -> memoryview:
    """The canonical bytes of a message. Values are copied once, straight from where they are.

    A narrow ``header.dtype`` rounds to nearest even on the way; NaN and infinity stay what they are.

    Args:
        out: writable buffer to use again and again, at least `encoded_length` bytes; fresh memory without it.

    Returns:
        The bytes, a view of `out` or of fresh memory; ``bytes(...)`` where a transport insists.

    Raises:
        WireError: the header cannot be sent (GMR-705, GMR-707, GMR-708, GMR-712), or a finite value
            overflows the narrower type (GMR-722).
        ValueError: values or mask do not fit the header, or `out` is read-only or too short.
    """
    header, values, mask = message
    code = b"" if mask is None else mask.code
    if tuple(values.shape) != (header.count,):
        raise ValueError(f"shape={tuple(values.shape)} for the slice [{header.start}, {header.stop})")
    if mask is not None and (mask.start, mask.cuts, mask.segment_F.size) != (
        header.start,
        header.cuts,
        header.size - header.start,
    ):
        raise ValueError(f"the mask has cuts={mask.cuts} from {mask.start}, the header {header.cuts}")
    head = build(replace(header, mask_bytes=len(code)) if header.mask_bytes != len(code) else header)
    body = 8 + len(head)
    mask_start = body + header.value_bytes
    length = mask_start + len(code)
    # Not bytes or bytearray: NumPy asks for huge pages, which halves the time of tens of megabytes and more.
    view = np.empty(length, dtype=np.uint8).data if out is None else memoryview(out).cast("B")
    if view.readonly or len(view) < length:
        raise ValueError(f"out has {len(view)} bytes, readonly={view.readonly}, for a message of {length}")
    view = view[:length]
    view[:body] = len(head).to_bytes(8, "little") + head
    sent = _tensor(view[body:mask_start], header.dtype, copy=False)
    sent.copy_(values.detach())
    if sent.dtype != values.dtype:
        _check_overflow(values, sent)
    view[mask_start:] = code
    return view


def encoded_length(header: Header) -> int:
    """Bytes of a message with this header (``mask_bytes`` included), without making them.

    Raises:
        WireError: the header cannot be sent.
    """
    return 8 + len(build(header)) + header.value_bytes + header.mask_bytes


def decode(buffer: Buffer, limits: Limits) -> Message:
    """Read one message.

    Values are viewed where the buffer can be written to (a bytearray), and copied once where not (bytes).
    A mask takes D bytes and its own length besides; nothing else grows with the message.

    Raises:
        WireError: GMR-701 to GMR-721; nothing of the message is to be used.
    """
    view = memoryview(buffer).cast("B")
    header, body = _read_header(view)
    _compare(header, limits)
    length = body + header.value_bytes + header.mask_bytes
    if len(view) < length:
        raise WireError("GMR-701", f"bytes={len(view)} of a message of {length}")
    if len(view) > length:
        raise WireError("GMR-710", f"bytes={len(view)} for a message of {length}")
    mask_start = body + header.value_bytes
    mask = None
    if header.mask_bytes:
        mask = unpack(view[mask_start:], header.size, header.start, header.cuts)
    values = _tensor(view[body:mask_start], header.dtype, copy=view.readonly)
    if limits.finite and not _all_finite(values):
        raise WireError("GMR-721", f"values of a message of kind {header.kind} hold NaN or infinity")
    return Message(header, values, mask)


def apply(message: Message, into_S: Tensor, held: int = 0) -> int:
    """Copy the values into their slice of the payload, converting a narrow type on the way.

    Increments compose: ``held = apply(increment, payload_S, held)`` until `held` is the whole.

    Args:
        into_S: a payload, or a global vector in payload order, of at least `stop` places.
        held: places of it that are filled already.

    Returns:
        Places that are filled now.

    Raises:
        WireError: GMR-723 if the slice starts beyond `held`.
        ValueError: `into_S` is too short.
    """
    header = message.header
    if header.start > held:
        raise WireError("GMR-723", f"start={header.start} where {held} places are held")
    if header.stop > into_S.numel():
        raise ValueError(f"{into_S.numel()} places for the slice [{header.start}, {header.stop})")
    into_S[header.start : header.stop].copy_(message.values)
    return max(held, header.stop)


# -- reading -----------------------------------------------------------------------------------------------


def _read_header(view: memoryview) -> tuple[Header, int]:
    """The header, and where the bytes of the values start."""
    if len(view) < 8:
        raise WireError("GMR-701", f"bytes={len(view)} are no message")
    length = int.from_bytes(view[:8], "little")
    if length > MOST_HEADER:
        raise WireError("GMR-702", f"header={length} bytes, but {MOST_HEADER} are the most")
    if len(view) < 8 + length:
        raise WireError("GMR-701", f"bytes={len(view)} of a message with a header of {length}")
    return parse(bytes(view[8 : 8 + length])), 8 + length


def _compare(header: Header, limits: Limits) -> None:
    """What the header claims against what the receiver expects."""
    if header.kind not in limits.kinds:
        raise WireError("GMR-714", f"kind={header.kind} is none of {', '.join(limits.kinds)}")
    if limits.run is not None and header.run != limits.run:
        raise WireError("GMR-713", f"run={header.run!r} instead of {limits.run!r}")
    if header.size != limits.size:
        raise WireError("GMR-711", f"size={header.size} instead of {limits.size}")
    if header.dtype not in limits.dtypes:
        raise WireError("GMR-708", f"dtype={header.dtype} is none of {', '.join(map(str, limits.dtypes))}")
    if header.mask_bytes and len(header.cuts) > limits.segments:
        raise WireError("GMR-712", f"segments={len(header.cuts)} of a mask are more than {limits.segments}")
    if limits.known is None or header.mask_bytes:
        return
    known = limits.known.get(header.ranking)
    if known is None:
        raise WireError("GMR-715", f"ranking={header.ranking} is not known")
    inside = tuple(cut for cut in known if header.start < cut <= header.stop)
    if inside != header.cuts or (header.start and header.start not in known):
        raise WireError("GMR-715", f"ranking={header.ranking} is known with cuts={tuple(known)[:8]}")


def _tensor(view: memoryview, dtype: torch.dtype, *, copy: bool) -> Tensor:
    """The vector that the bytes are, or a copy of it."""
    if not len(view):  # NumPy's copy of nothing has no stride, which torch does not take for another type
        return torch.empty(0, dtype=dtype)
    array = np.frombuffer(view, dtype=np.uint8)
    return torch.from_numpy(array.copy() if copy else array).view(dtype)


def _check_overflow(values: Tensor, sent: Tensor) -> None:
    """GMR-722 if a finite one of `values` is infinite in `sent`."""
    if _all_finite(sent):
        return
    lost = values.detach()[torch.isinf(sent).to(values.device)]
    lost = lost[torch.isfinite(lost)]
    if lost.numel():
        worst = float(lost.abs().max())
        raise WireError("GMR-722", f"value={worst:g} does not fit {sent.dtype}")


def _all_finite(values: Tensor) -> bool:
    """One pass without a temporary: NaN goes through minimum and maximum."""
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
