"""The run log's records, keys and types: the single source of what the writer writes.

``docs/run-log.md`` lists the same keys in the same order with the same types (a test compares
them). Type words are those of that page. Every number may be ``null``: that is how a value that is
not finite is written; ``number or null`` marks the keys that are null by design.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

#: Version that the writer writes; the reader accepts every version with the same major number.
SCHEMA = "1.2"

#: Record type to its keys, in the order in which they are written (`type` comes first everywhere).
RECORDS: dict[str, dict[str, str]] = {
    "header": {
        "schema": "string",
        "method": "string",
        "run_name": "string",
        "seed": "int",
        "config": "object",
        "fedml": "object",
        "versions": "object",
        "clients": "int",
        "client_samples": "[int]",
        "densities": "[number]",
        "layout": "object",
        "model_megabytes": "number",
        "eta": "number",
        "local_steps": "int or null",
        "windows": "int",
        "time_budget": "number or null",
        "device": "string or null",
    },
    "dispatch": {
        "dispatch": "int",
        "client": "int",
        "version": "int",
        "density": "number",
        "ranking": "string",
        "support": "int",
        "time": "number",
        "bytes_down": "number",
        "norm_sq": "number",
        "masked_norm_sq": "number",
        "full_norm_sq": "number",
        "full_masked_norm_sq": "number",
    },
    "arrival": {
        "window": "int",
        "dispatch": "int",
        "client": "int",
        "version": "int",
        "staleness": "int",
        "density": "number",
        "time": "number",
        "bytes_up": "number",
        "samples": "number",
        "weight": "number",
        "pibar": "number or null",
        "drift_sq": "number or null",
        "change_sq": "number",
        "steps": "int",
        "train_loss": "number or null",
    },
    "rejected": {
        "window": "int",
        "dispatch": "int",
        "client": "int",
        "code": "string",
        "message": "string",
    },
    "client": {
        "window": "int",
        "time": "number",
        "client": "int",
        "state": "string",
        "dispatch": "int or null",
        "density": "number",
        "samples": "int",
    },
    "layers": {
        "window": "int",
        "held": "[int]",
    },
    "window": {
        "window": "int",
        "start": "number",
        "close": "number",
        "end": "number",
        "arrivals": "int",
        "gamma_min": "int",
        "uncovered": "int",
        "coverage": "number",
        "step_sq": "number",
        "in_flight": "int",
        "mean_density": "number",
        "density_floor": "number",
        "bytes_up": "number",
        "bytes_down": "number",
        "server_bytes_down": "number",
        "learning_rate": "number",
    },
    "defence": {
        "window": "int",
        "updates": "int",
        "scaled": "int",
        "undefended": "number",
    },
    "validation": {
        "window": "int",
        "time": "number",
        "global": "object or null",
        "scaled": "object or null",
        "clients": "[object or null]",
        "candidate": "string",
    },
    "restoration": {
        "window": "int",
        "time": "number",
        "client": "int or null",
        "cause": "string",
        "before": "number",
        "after": "number",
        "floor": "number",
    },
    "evaluation": {
        "window": "int",
        "time": "number",
        "candidate": "string",
        "accuracy": "number or null",
        "loss": "number or null",
        "global": "object",
        "scaled": "object",
        "samples": "int",
        "bytes_up": "number",
        "bytes_down": "number",
        "metrics": "object",
    },
    "probe": {
        "window": "int",
        "loss": "number",
        "loss_next": "number",
        "grad_sq": "number",
        "grad_next_sq": "number",
        "grad_dot_step": "number",
        "grad_change_sq": "number",
        "step_sq": "number",
        "grad_uncovered_sq": "number",
        "client_grad_sq": "[number]",
        "client_gap_sq": "[number]",
        "noise_sq": "number",
    },
    "terms": {
        "window": "int",
        "form": "string",
        "gamma": "number",
        "z_sq": "number",
        "D_sq": "number",
        "M_sq": "number",
        "S_sq": "number",
        "H_sq": "number",
        "U_sq": "number",
        "rho_sq": "number",
        "e_sq": "number",
        "b_sq": "number",
        "residual_sq": "number",
        "scale_sq": "number",
        "grad_dot": "[number]",
        "gram": "[[number]]",
        "arrivals": "[object]",
    },
    "end": {
        "windows": "int",
        "time": "number",
        "reason": "string",
        "model_sha256": "string",
        "shipped": "string",
        "wall_seconds": "number",
        "rejected": "int",
    },
}

#: Keys that older logs and other writers lack; they are then read as null.
OPTIONAL: dict[str, frozenset[str]] = {"header": frozenset({"device"})}


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return value is None or _is_int(value) or isinstance(value, (float, np.floating))


def _is_list_of(test: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(test, value))


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


def _or_null(test: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or test(value)


#: Type word to its test.
TYPES: dict[str, Callable[[object], bool]] = {
    "int": _is_int,
    "int or null": _or_null(_is_int),
    "number": _is_number,
    "number or null": _is_number,
    "string": lambda value: isinstance(value, str),
    "string or null": lambda value: value is None or isinstance(value, str),
    "object": _is_object,
    "object or null": _or_null(_is_object),
    "[int]": _is_list_of(_is_int),
    "[number]": _is_list_of(_is_number),
    "[[number]]": _is_list_of(_is_list_of(_is_number)),
    "[object]": _is_list_of(_is_object),
    "[object or null]": _is_list_of(_or_null(_is_object)),
}


def problems(record: Mapping[str, Any]) -> list[str]:
    """What keeps `record` from being a record of this schema; empty if nothing does.

    Finds an unknown type, missing keys that are not `OPTIONAL`, unknown keys and values of another type. The
    contents of nested objects are free.
    """
    kind = record.get("type")
    keys = RECORDS.get(kind) if isinstance(kind, str) else None
    if keys is None:
        return [f"type={kind!r} is not one of {', '.join(RECORDS)}"]
    optional = OPTIONAL.get(str(kind), frozenset())
    found = [f"key {key} is missing" for key in keys if key not in record and key not in optional]
    found += [f"key {key} is unknown" for key in record if key not in keys and key != "type"]
    found += [
        f"{key}={record[key]!r} is not of type {word}"
        for key, word in keys.items()
        if key in record and not TYPES[word](record[key])
    ]
    return found
