"""Reads the header of a message and trusts nothing of it.

Each field is checked with an error of its own; then the header is spelled again, and must be what was read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast, get_args

import torch

from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol.header import DTYPES, FORMAT, MOST_RUN, Header, Kind, Outcome, Task, build, shown

_INTEGER = re.compile(r"0|[1-9][0-9]{0,15}")
_CUTS = re.compile(rf"(?:(?:{_INTEGER.pattern})(?:,(?:{_INTEGER.pattern}))*)?")
_OPENING = re.compile(rb"[\[{]")
_MOST_OPENING = 8 + MOST_RUN  # a name may be made of them


def parse(data: bytes) -> Header:
    """Read the canonical bytes of a header.

    Args:
        data: at most `MOST_HEADER` bytes, without the length before them.

    Raises:
        WireError: GMR-703 to GMR-709 or GMR-712.
    """
    tree = _json(data)
    _expect_keys("the header", tree, ("__metadata__", "values"), ("mask",))
    fields = _object("__metadata__", tree["__metadata__"])
    if fields.get("format") != FORMAT:
        raise WireError("GMR-706", f"format={shown(fields.get('format'))} instead of {FORMAT!r}")
    for name, value in fields.items():
        if not isinstance(value, str):
            raise WireError("GMR-707", f"{shown(name)}={shown(value)} is not text")
    kind = fields.get("kind")
    if kind not in get_args(Kind):
        raise WireError("GMR-707", f"kind={shown(kind)} is none of {', '.join(get_args(Kind))}")
    header = _header(cast(Kind, kind), fields, *_tensors(tree))
    if build(header) != data:
        raise WireError("GMR-704", "the header is not spelled canonically")
    return header


_COMMON = ("cuts", "format", "kind", "ranking", "run", "size", "start", "version")
_ADDRESS = ("client", "dispatch")
_REQUIRED: dict[Kind, tuple[str, ...]] = {
    "dispatch": (*_COMMON, *_ADDRESS, "count", "density", "learning_rate_scale"),
    "increment": _COMMON,
    "update": (*_COMMON, *_ADDRESS, "samples", "steps"),
}
_OPTIONAL: dict[Kind, tuple[str, ...]] = {
    "dispatch": (),
    "increment": _ADDRESS,
    "update": ("train_loss", "drift_sq", "change_sq"),
}


def _header(kind: Kind, fields: Mapping[str, str], dtype: torch.dtype, count: int, mask_bytes: int) -> Header:
    """The fields as a header; ranges are left to `check`."""
    _expect_keys(f"the metadata of a message of kind {kind}", fields, _REQUIRED[kind], _OPTIONAL[kind])
    if not _CUTS.fullmatch(fields["cuts"]):
        raise WireError("GMR-707", f"cuts={shown(fields['cuts'])} is no list of integers")
    task = outcome = None
    if kind == "dispatch":
        scale = _number(fields, "learning_rate_scale")
        task = Task(_number(fields, "density"), _integer(fields, "count"), scale)
    if kind == "update":
        optional = {name: _number(fields, name) for name in _OPTIONAL[kind] if name in fields}
        outcome = Outcome(_number(fields, "samples"), _integer(fields, "steps"), **optional)
    header = Header(
        kind=kind,
        run=fields["run"],
        version=_integer(fields, "version"),
        ranking=fields["ranking"],
        size=_integer(fields, "size"),
        cuts=tuple(int(cut) for cut in fields["cuts"].split(",") if cut),
        start=_integer(fields, "start"),
        dtype=dtype,
        mask_bytes=mask_bytes,
        client=_integer(fields, "client") if "client" in fields else None,
        dispatch=_integer(fields, "dispatch") if "dispatch" in fields else None,
        task=task,
        outcome=outcome,
    )
    if header.count != count:
        raise WireError("GMR-712", f"values={count} for the slice [{header.start}, {header.stop})")
    return header


def _tensors(tree: Mapping[str, Any]) -> tuple[torch.dtype, int, int]:
    """Type and number of the values, and length of the mask, after a look at the whole directory."""
    name, count, begin, end = _tensor("values", tree["values"])
    if name not in DTYPES:
        raise WireError("GMR-708", f"dtype={shown(name)} of the values is none of {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    if (begin, end) != (0, count * dtype.itemsize):
        raise WireError("GMR-709", f"data_offsets=[{begin}, {end}] for {count} values of type {name}")
    if "mask" not in tree:
        return dtype, count, 0
    name, length, begin, stop = _tensor("mask", tree["mask"])
    if (name, begin, stop) != ("U8", end, end + length) or not length:
        raise WireError("GMR-709", f"data_offsets=[{begin}, {stop}] for {length} bytes of mask behind {end}")
    return dtype, count, length


def _tensor(name: str, entry: Any) -> tuple[str, int, int, int]:
    """Type, length and offsets of one vector of the directory."""
    entry = _object(name, entry)
    _expect_keys(f"tensor {name}", entry, ("data_offsets", "dtype", "shape"), ())
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape, 1) or not _naturals(offsets, 2):
        raise WireError("GMR-709", f"tensor {name}: shape={shown(shape)}, data_offsets={shown(offsets)}")
    return entry["dtype"] if isinstance(entry["dtype"], str) else "", shape[0], offsets[0], offsets[1]


def _naturals(value: Any, length: int) -> bool:
    """Whether `value` is a list of that many integers >= 0."""
    return isinstance(value, list) and len(value) == length and all(type(x) is int and x >= 0 for x in value)


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WireError("GMR-707", f"{name}={shown(value)} is not an object")
    return value


def _expect_keys(
    what: str, found: Mapping[str, Any], required: Sequence[str], optional: Sequence[str]
) -> None:
    missing = [key for key in required if key not in found]
    unknown = [key for key in found if key not in required and key not in optional]
    if missing or unknown:
        named = [f"lacks {key}" for key in missing] + [f"has {shown(key)}" for key in unknown[:4]]
        raise WireError("GMR-705", f"{what} {', '.join(named)}")


def _integer(fields: Mapping[str, str], name: str) -> int:
    if not _INTEGER.fullmatch(fields[name]):
        raise WireError("GMR-707", f"{name}={shown(fields[name])} is no integer in [0, 2^53)")
    return int(fields[name])


def _number(fields: Mapping[str, str], name: str) -> float:
    try:
        number = float(fields[name])
    except ValueError as error:
        raise WireError("GMR-707", f"{name}={shown(fields[name])} is no number") from error
    if not math.isfinite(number):
        raise WireError("GMR-707", f"{name}={shown(fields[name])} is not finite")
    return number


# -- JSON without its liberties ----------------------------------------------------------------------------


def _json(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`: no repeated key, no float, no long integer, few brackets."""
    if len(_OPENING.findall(data)) > _MOST_OPENING:
        raise WireError("GMR-703", "the header nests too deep")
    try:
        tree = _DECODER.decode(data.decode("utf-8"))
    except ValueError as error:
        raise WireError("GMR-703", f"the header is not JSON as the format has it: {error}") from error
    if not isinstance(tree, dict):
        raise WireError("GMR-703", "the header is not a JSON object")
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def _short_integer(digits: str) -> int:
    if len(digits) > 16:
        raise ValueError("an integer has more than 16 digits")
    return int(digits)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text[:16]} is not allowed")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_short_integer, parse_float=_refuse, parse_constant=_refuse
)
