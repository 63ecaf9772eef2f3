"""Tests of one value of a header, each with what it asks for in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

#: Integers above this are no numbers of a run, and no float64 either.
_LARGEST = 2**1000


class Rule(NamedTuple):
    """A test of one value, and what it asks for, in words."""

    test: Callable[[Any], bool]
    wanted: str


def is_int(value: Any) -> bool:
    """A JSON integer that a double can hold."""
    return type(value) is int and abs(value) < _LARGEST


def is_number(value: Any) -> bool:
    """A finite JSON number."""
    return is_int(value) or (type(value) is float and abs(value) < float("inf"))


def list_of(rule: Callable[[Any], bool], wanted: str, *, least: int = 0) -> Rule:
    """A list of at least `least` elements that all pass."""
    return Rule(
        lambda value: isinstance(value, list) and len(value) >= least and all(map(rule, value)),
        f"a list of {wanted}",
    )


def at_least(least: int) -> Rule:
    """An integer of at least `least`."""
    return Rule(lambda value: is_int(value) and value >= least, f"an integer of at least {least}")


def word(*words: str) -> Rule:
    """One of `words`."""
    return Rule(lambda value: isinstance(value, str) and value in words, f"one of {', '.join(words)}")


def or_null(rule: Rule) -> Rule:
    """Null, or what `rule` asks for."""
    return Rule(lambda value: value is None or rule.test(value), f"{rule.wanted} or null")


TEXT = Rule(lambda value: isinstance(value, str), "a string")
FLAG = Rule(lambda value: isinstance(value, bool), "true or false")
INT = Rule(is_int, "an integer")
COUNT = at_least(0)
POSITIVE = at_least(1)
NUMBER = Rule(is_number, "a number")
SIZE = Rule(lambda value: is_number(value) and value >= 0, "a number of at least 0")
ABOVE_ZERO = Rule(lambda value: is_number(value) and value > 0, "a number above 0")
SHARE = Rule(lambda value: is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
FRACTION = Rule(lambda value: is_number(value) and 0 <= value < 1, "a number in [0, 1)")
DENSITY = Rule(lambda value: is_number(value) and 0 < value <= 1, "a number in (0, 1]")
OBJECT = Rule(lambda value: isinstance(value, dict), "an object")
OBJECTS = list_of(OBJECT.test, "objects")
SHAPE = list_of(COUNT.test, "integers of at least 0")
STEPS = Rule(lambda value: POSITIVE.test(value) or value == "epochs", 'an integer of at least 1 or "epochs"')
