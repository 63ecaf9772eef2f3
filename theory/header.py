"""The door for a log's header: every key that `theory` reads has the type and range that it relies on.

Unknown keys pass, and so do missing and null ones in the log of another framework. The plugin
(``method: fedgmr``) writes every key of ``docs/run-log.md``, and its options have the ranges and words of
``docs/configuration.md`` (`theory.options`). What is well-formed but untrue is the business of
`theory.checks.promises`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from theory.errors import LogError, shown
from theory.options import HOST, LATER, OPTIONS, contradiction
from theory.rules import (
    COUNT,
    DENSITY,
    FLAG,
    FRACTION,
    INT,
    NUMBER,
    OBJECT,
    OBJECTS,
    POSITIVE,
    SHAPE,
    SHARE,
    SIZE,
    STEPS,
    TEXT,
    Rule,
    list_of,
    word,
)
from theory.schema import PLUGIN, PLUGIN_TYPES, ROUNDOFF

#: No header needs more levels of nesting.
_DEEPEST = 32

_NULLABLE_DENSITIES = list_of(lambda value: value is None or DENSITY.test(value), "densities in (0, 1]")

#: Keys of the header.
HEADER: dict[str, Rule] = {
    "method": TEXT, "run_name": TEXT, "seed": INT, "config": OBJECT, "fedml": OBJECT,
    "client_samples": SHAPE, "densities": _NULLABLE_DENSITIES, "layout": OBJECT, "model_megabytes": SIZE,
    "eta": SIZE, "local_steps": POSITIVE, "windows": COUNT, "time_budget": SIZE, "versions": OBJECT,
}  # fmt: skip

#: Keys of ``config`` (the method's options) that the checks read.
CONFIG: dict[str, Rule] = {
    **dict.fromkeys(
        ("aggregation", "update_form", "update_scope", "score", "staleness", "trigger", "density_step",
         "loss", "payload_rule", "payload_dtype", "evaluate"), TEXT,
    ),
    **dict.fromkeys(("mixing", "dense_start", "prune_biases", "incremental_splitting", "probe"), FLAG),
    **dict.fromkeys(
        ("server_step", "layer_floor", "staleness_exponent", "hinge_slope", "hinge_delay", "client_momentum",
         "gradient_clip", "density_min", "density_increment", "time_budget", "model_megabytes",
         "aggregation_seconds"), NUMBER,
    ),
    "interval": POSITIVE, "warmup_windows": COUNT, "local_steps": STEPS,
    "density_ladder": _NULLABLE_DENSITIES, "time_floors": _NULLABLE_DENSITIES,
    "time_fractions": list_of(SHARE.test, "numbers in [0, 1]"), "validation_fraction": FRACTION,
    "probe_interval": POSITIVE, "workers": POSITIVE,
}  # fmt: skip

#: Keys of ``fedml`` (the host's options) that the checks read.
FEDML: dict[str, Rule] = {
    "weight_decay": NUMBER, "client_optimizer": TEXT, "learning_rate": NUMBER, "comm_round": INT,
    "client_num_in_total": INT, "random_seed": INT, "aggregation_hooks": FLAG,
    "client_num_per_round": POSITIVE, "frequency_of_the_test": POSITIVE,
}  # fmt: skip

_DTYPE = Rule(
    lambda value: isinstance(value, str) and value.removeprefix("torch.") in ROUNDOFF,
    f"one of {', '.join(ROUNDOFF)}",
)

#: Keys of ``layout``, and of each of its layers.
LAYOUT: dict[str, Rule] = {"size": POSITIVE, "prunable": COUNT, "dtype": _DTYPE, "layers": OBJECTS}
LAYER: dict[str, Rule] = {"name": TEXT, "kind": TEXT, "size": COUNT, "shape": SHAPE}

#: Keys of the plugin's header that may be null.
_NULLABLE = ("local_steps", "time_budget")
#: What the plugin's layouts have beyond `LAYOUT` and `LAYER`.
_PLUGIN_DTYPE, _PLUGIN_KIND = word(*PLUGIN_TYPES), word("prunable", "dense", "bias", "buffer")

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
    if not POSITIVE.test(clients):
        raise refuse(f"header: clients={shown(clients)} is not {POSITIVE.wanted}")
    layout = record.get("layout")
    complaint = _complaint(record, HEADER, "") or _complaint(record.get("config"), CONFIG, "config.")
    complaint = complaint or _complaint(record.get("fedml"), FEDML, "fedml.") or _layout_complaint(layout)
    if not complaint and record.get("method") == PLUGIN:
        complaint = _plugin_complaint(record)
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


def _plugin_complaint(record: Mapping[str, Any]) -> str:
    """Why the plugin cannot have written the header (which passed the rules for any), in words; or ''."""
    config, fedml, layout = (record.get(key) or {} for key in ("config", "fedml", "layout"))
    needed = (
        ("", record, [key for key in HEADER if key not in _NULLABLE]),
        ("config.", config, [key for key in CONFIG if not OPTIONS[key].test(None) and key not in LATER]),
        ("fedml.", fedml, list(HOST)),
        ("layout.", layout, list(LAYOUT)),
    )
    for prefix, values, keys in needed:
        if missing := next((key for key in keys if values.get(key) is None), None):
            return f"{prefix}{missing} is missing"
    absent = next((key for key in _NULLABLE if key not in record), None)
    if absent is not None:
        return f"{absent} is missing"
    empty = {key: OPTIONS[key].wanted for key in OPTIONS if key in config and config[key] is None}
    if null := next((key for key in empty if not OPTIONS[key].test(None)), None):
        return f"config.{null}=None is not {empty[null]}"
    found = _complaint(config, OPTIONS, "config.") or _complaint(fedml, HOST, "fedml.")
    found = found or _complaint(layout, {"dtype": _PLUGIN_DTYPE}, "layout.")
    for number, layer in enumerate(layout["layers"]):
        found = found or _complaint(layer, {"kind": _PLUGIN_KIND}, f"layout.layers[{number}].")
    return found or contradiction(config)
