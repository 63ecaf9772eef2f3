"""Text for the page: escaping of whatever a log says, and numbers as readers expect them."""

from __future__ import annotations

import html
import json
import math
import unicodedata
from itertools import groupby
from typing import Any

#: Narrow no-break space between groups of three digits.
THIN = "\u202f"
#: Stands where nothing was recorded.
NONE = "–"


def clean(value: object) -> str:
    """Text that any UTF-8 file can hold: control characters and lone surrogates become U+FFFD."""
    return "".join(
        "\ufffd" if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t" else char
        for char in str(value)
    )


def escape(value: object) -> str:
    """`value` as HTML text or attribute value."""
    return html.escape(clean(value), quote=True)


def name(value: object) -> str:
    """A name from a log as HTML, kept from turning the direction of the text around it."""
    return f"<bdi>{escape(value)}</bdi>"


#: Characters that LaTeX reads as commands.
_COMMANDS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': "''",
    **{char: "\\" + char for char in "{}$&#_%"},
}


def latex(value: object) -> str:
    """`value` as LaTeX text on one line; what is invisible or turns the direction becomes a question mark."""
    plain = "".join(
        "?" if unicodedata.category(char)[0] == "C" else " " if char.isspace() else char
        for char in str(value).replace("\n", " ").replace("\t", " ")
    )
    return "".join(_COMMANDS.get(char, char) for char in plain)


def shorten(text: str, length: int) -> str:
    """`text` cut to `length` characters, the last one an ellipsis where something was cut."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def number(value: float | None, digits: int = 0) -> str:
    """A number with `digits` decimals and grouped thousands; a dash if there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:,.{digits}f}".replace(",", THIN)
    if float(f"{value:.{digits}f}") == 0:
        text = text.lstrip("-")
    return text.replace("-", "\u2212")


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 in per cent."""
    return number(None if share is None else 100 * share, digits) + ("" if share is None else f"{THIN}%")


def seconds(value: float | None) -> str:
    """Virtual seconds; one decimal below 1000."""
    if value is None or not math.isfinite(value):
        return NONE
    return number(value, 1 if abs(value) < 1000 else 0) + f"{THIN}s"


def megabytes(value: float | None) -> str:
    """Bytes given in MB (10^6 bytes); one decimal below 1000."""
    return number(value, 1 if value is not None and abs(value) < 1000 else 0)


def written(value: object) -> str:
    """A value of a configuration: JSON, text without quotes; the same for 1 and 1.0."""
    if value is ...:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        texts = [json.dumps(_plain(item), ensure_ascii=False) for item in value]
        runs = [(text, len(list(same))) for text, same in groupby(texts)]
        parts = [f"{text} × {n}" if n > 2 else ", ".join([text] * n) for text, n in runs]
        return f"[{', '.join(parts)}]"
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """A number that is whole as an int, so that 1 and 1.0 read the same."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    return value
