"""Why a value of a YAML file is refused: its code, what it is, what it must be, and how to write it.

The words are made from the JSON schema of the key, so that no message can differ from what is checked.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedgmr_plugin.errors import ConfigError

Schema = Mapping[str, Any]


def refusal(name: str, value: Any, schema: Schema, *, where: str) -> ConfigError:
    """Why one value is refused, in terms of what its schema allows.

    Args:
        name: how the message calls it, such as ``densities[1]``.
        schema: JSON schema that the value does not fit.
        where: where the value came from.
    """
    forms = list(_forms(schema))
    types = {form.get("type") for form in forms}
    choices = [choice for form in forms for choice in _choices(form)]
    allowed = describe(schema)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    hint = ""
    if isinstance(value, float) and not math.isfinite(value) and types & {"number", "integer"}:
        code, text = "GMR-104", f"is not finite; it must be {allowed}"
    elif number and ("number" in types or ("integer" in types and isinstance(value, int))):
        code, text = "GMR-104", f"is outside {_interval(next(f for f in forms if f.get('type') != 'null'))}"
        if 2 <= value <= 100 and forms[0].get("maximum", forms[0].get("exclusiveMaximum")) == 1:
            hint = f"It is a share, not per cent: {value / 100:g}?"
    elif isinstance(value, (list, tuple) if "array" in types else Mapping) and types & {"array", "object"}:
        code, text = "GMR-104", f"has too few elements; it must be {allowed}"
    elif isinstance(value, str) and "string" in types and not choices:
        code, text = "GMR-102", f"has another form; it must be {allowed}"
    elif isinstance(value, str) and choices:
        code, text = "GMR-103", f"is unknown; it must be {allowed}"
        guess = closest(value, choices)
        hint = f"Did you mean `{guess}`?" if guess else ""
    else:
        code, text = "GMR-102", f"is {kind_of(value)}; it must be {allowed}"
        hint = _rewrite(value, types, choices)
    return ConfigError(code, f"{name}={shown(value)} {text}", where=where, hint=hint)


def innermost(places: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The places of what is wrong, each once, without those of lists and sections that are wrong for it."""
    outer = {place[:end] for place in places for end in range(len(place))}
    return [place for place in dict.fromkeys(places) if place not in outer]


def items_of(schema: Schema) -> Schema:
    """The schema of a list's elements."""
    found: Schema = next(form["items"] for form in _forms(schema) if form.get("type") == "array")
    return found


def describe(schema: Schema) -> str:
    """What a JSON schema lets a value be, in words."""
    return ", or ".join(map(_allowed, _forms(schema)))


def _forms(schema: Schema) -> Iterator[Schema]:
    """The alternatives of a JSON schema."""
    yield from schema.get("anyOf", [schema])


def _choices(form: Schema) -> list[str]:
    """The words that one alternative allows; empty if it is not a choice."""
    return [form["const"]] if "const" in form else list(form.get("enum", []))


def _allowed(form: Schema) -> str:
    """One alternative of a JSON schema in words."""
    kind = form.get("type")
    words = [f"`{choice}`" for choice in _choices(form)]
    if words:
        return words[0] if len(words) == 1 else "one of " + ", ".join(words)
    if kind == "array":
        least = f" with at least {form['minItems']} element" if form.get("minItems") else ""
        return f"a list{least}, each element {_allowed(form['items'])}"
    if kind == "object":
        least = f" with at least {form['minProperties']} key" if form.get("minProperties") else ""
        each = form.get("additionalProperties")
        return f"a section{least}" + (f", each value {_allowed(each)}" if isinstance(each, Mapping) else "")
    if kind == "string" and form.get("examples"):
        return f"text such as `{form['examples'][0]}`"
    if kind in ("number", "integer"):
        return f"a {'whole ' if kind == 'integer' else ''}number in {_interval(form)}"
    return {"boolean": "`true` or `false`", "string": "text", "null": "null"}[str(kind)]


def _interval(form: Schema) -> str:
    """Range of a number in interval notation."""
    low = f"({form['exclusiveMinimum']:g}" if "exclusiveMinimum" in form else f"[{form.get('minimum', 0):g}"
    if "exclusiveMaximum" in form:
        return f"{low}, {form['exclusiveMaximum']:g})"
    return f"{low}, {form['maximum']:g}]" if "maximum" in form else f"{low}, inf)"


def kind_of(value: object) -> str:
    """What a YAML value is, in words."""
    if value is None:
        return "empty (null)"
    names = {bool: "a boolean", int: "a whole number", float: "a fraction", str: "text"}
    for kind, name in names.items():
        if isinstance(value, kind):
            return name
    if isinstance(value, (list, tuple)):
        return "a list"
    return "a section" if isinstance(value, Mapping) else f"of type {type(value).__name__}"


def shown(value: object) -> str:
    """A value as it could stand in YAML, cut to 60 characters."""
    try:
        text = repr(value) if isinstance(value, float) else json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):  # YAML allows keys, and circles, that JSON does not
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _rewrite(value: object, types: set[Any], choices: Sequence[str]) -> str:
    """How to write a value of the wrong type; empty where there is nothing to suggest."""
    numeric = types & {"number", "integer"}
    if isinstance(value, str) and numeric:
        text = value.strip().replace("_", "")
        if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", text):
            mantissa, exponent = re.split("[eE]", text)
            power = int(exponent)
            if "number" not in types and float(text).is_integer():
                return f"YAML reads {value} as text: write {int(float(text))}."
            dotted = mantissa if "." in mantissa else f"{mantissa}.0"
            return f"YAML reads {value} as text: write {dotted}e{power:+d}."
        if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text):
            return f"Write {text} without quotes."
    if value is False and "none" in choices:
        return "YAML reads off and no as false: write none."
    if value is False and "off" in choices:
        return 'YAML reads off as false: write it in quotes, "off".'
    if isinstance(value, float) and "integer" in types and value.is_integer():
        return f"Write {int(value)}."
    if "array" in types and not isinstance(value, (bool, Mapping)) and value is not None:
        return f"Write a list: [{shown(value)}]."
    if types <= {"string", "null"} and not isinstance(value, (Mapping, list, tuple, str, type(None))):
        return f'Write it in quotes: "{value}".'
    return ""


def closest(word: str, words: Iterable[str]) -> str:
    """The word that was probably meant, or an empty string."""
    return next(iter(difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)), "")
