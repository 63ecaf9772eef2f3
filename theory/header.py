"""The door for a log's header: every key that `theory` reads has the type and range that it relies on.

Unknown keys pass, and so do missing and null ones; what is well-formed but untrue is the business of
`theory.checks.promises`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from theory.errors import LogError, shown

#: Integers above this are no numbers of a run, and no float64 either.
_LARGEST = 2**1000


#: No header needs more levels of nesting.
_DEEPEST = 32


class Rule(NamedTuple):
    """A test of one value, and what it asks for, in words."""

    test: Callable[[Any], bool]
    wanted: str


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < _LARGEST


def _is_number(value: Any) -> bool:
    return _is_int(value) or (type(value) is float and abs(value) < float("inf"))


def _list_of(test: Callable[[Any], bool], wanted: str) -> Rule:
    return Rule(lambda value: isinstance(value, list) and all(map(test, value)), f"a list of {wanted}")


_TEXT = Rule(lambda value: isinstance(value, str), "a string")
_FLAG = Rule(lambda value: isinstance(value, bool), "true or false")
_INT = Rule(_is_int, "an integer")
_COUNT = Rule(lambda value: _is_int(value) and value >= 0, "an integer of at least 0")
_POSITIVE = Rule(lambda value: _is_int(value) and value >= 1, "an integer of at least 1")
_NUMBER = Rule(_is_number, "a number")
_SIZE = Rule(lambda value: _is_number(value) and value >= 0, "a number of at least 0")
_OBJECT = Rule(lambda value: isinstance(value, dict), "an object")
_OBJECTS = _list_of(lambda value: isinstance(value, dict), "objects")
_SHAPE = _list_of(lambda value: _is_int(value) and value >= 0, "integers of at least 0")
_DENSITIES = _list_of(
    lambda value: value is None or (_is_number(value) and 0 < value <= 1), "densities in (0, 1]"
)
_STEPS = Rule(
    lambda value: _POSITIVE.test(value) or value == "epochs", 'an integer of at least 1 or "epochs"'
)

#: Keys of the header.
HEADER: dict[str, Rule] = {
    "method": _TEXT, "run_name": _TEXT, "seed": _INT, "config": _OBJECT, "fedml": _OBJECT,
    "client_samples": _SHAPE, "densities": _DENSITIES, "layout": _OBJECT, "model_megabytes": _SIZE,
    "eta": _SIZE, "local_steps": _POSITIVE, "windows": _COUNT, "time_budget": _SIZE,
}  # fmt: skip

#: Keys of ``config`` (the method's options) that the checks read.
CONFIG: dict[str, Rule] = {
    **dict.fromkeys(
        ("aggregation", "update_form", "update_scope", "score", "staleness", "trigger", "density_step",
         "loss", "payload_rule", "payload_dtype", "evaluate"), _TEXT,
    ),
    **dict.fromkeys(("mixing", "dense_start", "prune_biases", "incremental_splitting", "probe"), _FLAG),
    **dict.fromkeys(
        ("server_step", "layer_floor", "staleness_exponent", "hinge_slope", "hinge_delay", "client_momentum",
         "gradient_clip", "density_min", "density_increment", "time_budget", "model_megabytes",
         "aggregation_seconds"), _NUMBER,
    ),
    "interval": _POSITIVE, "warmup_windows": _COUNT, "local_steps": _STEPS,
    "density_ladder": _DENSITIES, "time_floors": _DENSITIES,
}  # fmt: skip

#: Keys of ``fedml`` (the host's options) that the checks read.
FEDML: dict[str, Rule] = {
    "weight_decay": _NUMBER, "client_optimizer": _TEXT, "learning_rate": _NUMBER, "comm_round": _INT,
    "client_num_in_total": _INT, "random_seed": _INT, "aggregation_hooks": _FLAG,
}  # fmt: skip

#: Keys of ``layout``, and of each of its layers.
LAYOUT: dict[str, Rule] = {"size": _POSITIVE, "prunable": _COUNT, "dtype": _TEXT, "layers": _OBJECTS}
LAYER: dict[str, Rule] = {"name": _TEXT, "kind": _TEXT, "size": _COUNT, "shape": _SHAPE}

#: Lists with one entry for each client.
_PER_CLIENT = ("client_samples", "densities")


def checked_header(record: dict[str, Any], path: str) -> dict[str, Any]:
    """`record`, if it is a header that the checks can rely on.

    Raises:
        LogError: GMR-602, a key with another type or out of range; GMR-603, another schema.
    """

    def refuse(message: str, code: str = "GMR-602") -> LogError:
        return LogError(code, message, path=path, line=1)

    if _depth(record) > _DEEPEST:
        raise refuse(f"header: it is nested more than {_DEEPEST} deep")
    if record.get("type") != "header":
        raise refuse(f"the first record is {shown(record.get('type'))}, not a header")
    schema = record.get("schema")
    if not isinstance(schema, str) or schema.split(".")[0] != "1":
        raise refuse(f"schema={shown(schema)}, this release reads 1.x", "GMR-603")
    clients = record.get("clients")
    if not _POSITIVE.test(clients):
        raise refuse(f"header: clients={shown(clients)} is not {_POSITIVE.wanted}")
    layout = record.get("layout")
    complaint = _complaint(record, HEADER, "") or _complaint(record.get("config"), CONFIG, "config.")
    complaint = complaint or _complaint(record.get("fedml"), FEDML, "fedml.") or _layout_complaint(layout)
    if complaint:
        raise refuse(f"header: {complaint}")
    for key in _PER_CLIENT:
        if record.get(key) is not None and len(record[key]) != clients:
            raise refuse(f"header: {key} has {len(record[key])} entries, but clients={clients}")
    return record


def _depth(value: Any) -> int:
    """Levels of nesting, at most one more than are allowed."""
    level, depth = [value], 0
    while level and depth <= _DEEPEST:
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level, depth = [entry for entries in inner for entry in entries], depth + 1
    return depth


def _complaint(values: Mapping[str, Any] | None, rules: Mapping[str, Rule], prefix: str) -> str:
    """The first value that breaks its rule, in words; '' if none does."""
    for key, rule in rules.items():
        value = (values or {}).get(key)
        if value is not None and not rule.test(value):
            return f"{prefix}{key}={shown(value)} is not {rule.wanted}"
    return ""


def _layout_complaint(layout: Mapping[str, Any] | None) -> str:
    complaint = _complaint(layout, LAYOUT, "layout.")
    layers = (layout or {}).get("layers") or ()
    for number, layer in enumerate(() if complaint else layers):
        prefix = f"layout.layers[{number}]."
        missing = [key for key in ("kind", "size") if layer.get(key) is None]
        if missing:
            return f"{prefix}{missing[0]} is missing"
        if found := _complaint(layer, LAYER, prefix):
            return found
    return complaint
