"""Errors that `theory` raises on purpose.

TheoryError
|-- LogError       the run log cannot be read (codes GMR-601 to GMR-603, as everywhere in the project)
`-- MissingData    a quantity was asked for that this log does not hold
"""

from __future__ import annotations

from reprlib import Repr
from typing import Any

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist = 2, 3, 4


def shown(value: Any) -> str:
    """A value from a log as a message may show it: short, and without control characters."""
    return _SHORT.repr(value)


def plain(text: str) -> str:
    """Text from a log as a page or a terminal may show it: at most 200 characters, all printable."""
    cut = text if len(text) <= 200 else text[:199] + "~"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


class TheoryError(Exception):
    """Base of the errors of this package."""


class LogError(TheoryError):
    """A run log cannot be read.

    Args:
        code: ``GMR-601`` (not found), ``GMR-602`` (damaged) or ``GMR-603`` (another schema).
        message: what is wrong, with the offending ``name=value``.
        path: the file.
        line: one-based line number, 0 when no single line is to blame.
    """

    def __init__(self, code: str, message: str, *, path: str = "", line: int = 0) -> None:
        self.code = code
        self.message = message
        self.path = path
        self.line = line
        place = f"\n        in {path}" + (f", line {line}" if line else "") if path else ""
        super().__init__(f"{code} {message}{place}")


class MissingData(TheoryError):
    """A quantity needs a field that the log does not hold; the message names the field."""
