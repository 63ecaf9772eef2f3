"""The header of a message: every field, its range, and its canonical bytes (``docs/wire-format.md``).

A header has exactly one spelling: sorted keys, no spaces, decimal integers, shortest round-trip floats,
padded with blanks to a multiple of 8 bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from fedgmr_plugin.errors import WireError

Kind = Literal["dispatch", "increment", "update"]

#: Version of the format, which is in every header. Any change of the format changes it.
FORMAT = "fedgmr 1"
#: Longest header that is read, bytes.
MOST_HEADER = 65_536
#: Most segments in one message.
MOST_SEGMENTS = 254
#: Integers of a header are below this, so that any JSON reader holds them exactly.
MOST_INTEGER = 2**53
#: Most characters of a run's name.
MOST_RUN = 128

#: Types of values by their name in safetensors.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Task:
    """What a client is to know besides the weights.

    Attributes:
        density: d_n, in (0, 1].
        count: dispatches made to this client before.
        learning_rate_scale: factor on the learning rate, > 0 (warm-up).
    """

    density: float
    count: int = 0
    learning_rate_scale: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What a client reports besides its values; fields as in the run log's `arrival` record.

    Attributes:
        samples: training samples processed.
        steps: local steps made.
        train_loss: mean loss of those steps; None where unknown or not finite, as for the next two.
        drift_sq: mean squared distance from the dispatched weights along the steps.
        change_sq: squared length of the whole change.
    """

    samples: float
    steps: int = 0
    train_loss: float | None = None
    drift_sq: float | None = None
    change_sq: float | None = None


@dataclass(frozen=True)
class Header:
    """Everything about a message but its bytes.

    The payload of a message is the slice [`start`, `stop`) of the payload order: the coordinates of the
    first segment, increasing, then those of the second, and so on.

    Attributes:
        kind: ``dispatch`` (to one client), ``increment`` (to all that hold the slice) or ``update``.
        run: name of the run, 1 to 128 characters.
        version: windows merged before the dispatch, s.
        ranking: `Ranking.digest` of the family that the mask belongs to.
        size: coordinates of the whole model, D.
        start: first place of the slice.
        cuts: ends of the segments in (start, stop], increasing; the last is `stop`. Empty only in a
            dispatch whose values all come by increments.
        dtype: type of the values on the wire.
        mask_bytes: length of the mask; 0 where the receiver knows it.
        client: receiver or sender n; None in an increment for everybody.
        dispatch: number of the dispatch; None together with `client`.
        task: of a dispatch.
        outcome: of an update.
    """

    kind: Kind
    run: str
    version: int
    ranking: str
    size: int
    cuts: tuple[int, ...]
    start: int = 0
    dtype: torch.dtype = torch.float32
    mask_bytes: int = 0
    client: int | None = None
    dispatch: int | None = None
    task: Task | None = None
    outcome: Outcome | None = None

    @property
    def stop(self) -> int:
        """End of the slice."""
        return self.cuts[-1] if self.cuts else self.start

    @property
    def count(self) -> int:
        """Number of values."""
        return self.stop - self.start

    @property
    def value_bytes(self) -> int:
        """Length of the values, bytes."""
        return self.count * self.dtype.itemsize


def check(header: Header) -> None:
    """Check every field's range and the fields against each other.

    Raises:
        WireError: GMR-705, GMR-707, GMR-708 or GMR-712.
    """
    wanted = {"dispatch": (True, False), "increment": (False, False), "update": (False, True)}
    if header.kind not in wanted:
        raise WireError("GMR-707", f"kind={header.kind!r} is none of {', '.join(get_args(Kind))}")
    if (header.task is not None, header.outcome is not None) != wanted[header.kind]:
        raise WireError("GMR-705", f"a dispatch has a task, an update an outcome; this is {header.kind}")
    missing = (header.client is None, header.dispatch is None)
    if missing != (False, False) and (header.kind != "increment" or missing != (True, True)):
        raise WireError("GMR-705", f"client={header.client} with dispatch={header.dispatch}")
    if header.mask_bytes and (header.kind == "update" or not header.count):
        raise WireError("GMR-705", "a mask in an update, or in a message without values")
    if header.dtype not in _NAMES:
        raise WireError("GMR-708", f"dtype={header.dtype} cannot be sent")
    if not 0 < len(header.run) <= MOST_RUN or any(0xD800 <= ord(c) < 0xE000 for c in header.run):
        raise WireError("GMR-707", f"run={header.run[:MOST_RUN]!r} is no name of 1 to {MOST_RUN} characters")
    if not _DIGEST.fullmatch(header.ranking):
        raise WireError("GMR-707", f"ranking={shown(header.ranking)} is no digest")
    for name, value in _integers(header).items():
        if not 0 <= value < MOST_INTEGER:
            raise WireError("GMR-707", f"{name}={value} is not in [0, 2^53)")
    for name, number, low, high in _numbers(header):
        if not low < number <= high:
            raise WireError("GMR-707", f"{name}={number} is not in its range")
    _check_slice(header)


def _check_slice(header: Header) -> None:
    bounds = (header.start, *header.cuts)
    if len(header.cuts) > MOST_SEGMENTS:
        raise WireError("GMR-712", f"segments={len(header.cuts)} are more than {MOST_SEGMENTS}")
    if any(a >= b for a, b in itertools.pairwise(bounds)) or header.stop > header.size:
        raise WireError("GMR-712", f"cuts={shown(bounds)} do not increase within size={header.size}")
    if not header.cuts and header.kind != "dispatch":
        raise WireError("GMR-712", f"an {header.kind} without values")
    if header.kind == "update" and header.start:
        raise WireError("GMR-712", f"start={header.start} in an update, which holds all of its dispatch")


def _integers(header: Header) -> dict[str, int]:
    """The integer fields that are present, by name in the header."""
    found: dict[str, int | None] = {
        "client": header.client,
        "count": header.task.count if header.task else None,
        "dispatch": header.dispatch,
        "size": header.size,
        "start": header.start,
        "steps": header.outcome.steps if header.outcome else None,
        "version": header.version,
    }
    return {name: value for name, value in found.items() if value is not None}


def _numbers(header: Header) -> list[tuple[str, float, float, float]]:
    """The float fields that are present: name, value, excluded lower end, included upper end."""
    most = torch.finfo(torch.float64).max
    found: list[tuple[str, float | None, float, float]] = []
    if header.task:
        found.append(("density", header.task.density, 0.0, 1.0))
        found.append(("learning_rate_scale", header.task.learning_rate_scale, 0.0, most))
    if header.outcome:
        found += [
            (name, getattr(header.outcome, name), -math.inf, most)
            for name in ("samples", "train_loss", "drift_sq", "change_sq")
        ]
    return [(name, value, low, high) for name, value, low, high in found if value is not None]


def build(header: Header) -> bytes:
    """The canonical bytes of a header, its padding included.

    Raises:
        WireError: the header cannot be sent; see `check`.
    """
    check(header)
    fields = {
        "cuts": ",".join(map(str, header.cuts)),
        "format": FORMAT,
        "kind": header.kind,
        "ranking": header.ranking,
        "run": header.run,
        **{name: str(value) for name, value in _integers(header).items()},
        **{name: repr(float(number)) for name, number, _, _ in _numbers(header)},
    }
    end = header.value_bytes
    tree: dict[str, Any] = {
        "__metadata__": fields,
        "values": {"data_offsets": [0, end], "dtype": _NAMES[header.dtype], "shape": [header.count]},
    }
    if header.mask_bytes:
        offsets = [end, end + header.mask_bytes]
        tree["mask"] = {"data_offsets": offsets, "dtype": "U8", "shape": [header.mask_bytes]}
    text = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode("ascii")
    return text.ljust(-(-len(text) // 8) * 8)


def shown(value: Any) -> str:
    """The beginning of a value that a stranger sent."""
    try:
        text = repr(value)
    except RecursionError:  # JSON may nest deeper than Python can show
        text = type(value).__name__
    return text if len(text) <= 40 else text[:37] + "..."
