"""Interval arithmetic: results contain every possible value, checked with exact fractions."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import symbols as s
from theory.intervals import Interval, constant_interval, evaluate, evaluate_iv, segment_sum, total

THOROUGH = settings.get_current_profile_name() == "thorough"
EXAMPLES = int(os.environ.get("THEORY_EXAMPLES", 10_000 if THOROUGH else 1_000))
finite = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-9 else x)
radii = st.just(0.0) | st.floats(0, 1e3)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Interval, Fraction]:
    """An interval and a point inside it."""
    centre, radius = draw(finite), draw(radii)
    box = Interval.around(np.array(centre), np.array(radius))
    share = Fraction(draw(st.integers(0, 8)), 8)
    low, high = Fraction(float(box.lo)), Fraction(float(box.hi))
    return box, low + share * (high - low)


def inside(point: Fraction, box: Interval) -> bool:
    return Fraction(float(box.lo)) <= point <= Fraction(float(box.hi))


@settings(max_examples=EXAMPLES)
@given(boxes(), boxes(), st.sampled_from((operator.add, operator.sub, operator.mul)))
def test_ring_operations(a: Any, b: Any, operation: Callable[[Any, Any], Any]) -> None:
    assert inside(operation(a[1], b[1]), operation(a[0], b[0]))


@settings(max_examples=EXAMPLES)
@given(boxes(), boxes())
def test_division(a: Any, b: Any) -> None:
    if float(b[0].lo) <= 0 <= float(b[0].hi):
        result = a[0] / b[0]
        assert float(result.lo) == -np.inf and float(result.hi) == np.inf
    else:
        assert inside(a[1] / b[1], a[0] / b[0])


@settings(max_examples=EXAMPLES)
@given(boxes(), st.integers(0, 5))
def test_powers(a: Any, exponent: int) -> None:
    assert inside(a[1] ** exponent, a[0] ** exponent)


@given(st.floats(1e-6, 1e6))
def test_logarithm(x: float) -> None:
    box = Interval(x).log()
    with mpmath.workprec(200):
        value = mpmath.log(mpmath.mpf(x))
        assert mpmath.mpf(float(box.lo)) <= value <= mpmath.mpf(float(box.hi))


@settings(max_examples=300)
@given(st.lists(st.tuples(finite, st.integers(0, 3)), min_size=1, max_size=30))
def test_segment_sums(rows: list[tuple[float, int]]) -> None:
    values = np.array([x for x, _ in rows])
    segment = np.array([k for _, k in rows], dtype=np.int64)
    sums = segment_sum(Interval(values), segment, 4)
    for k in range(4):
        assert inside(sum((Fraction(x) for x, j in rows if j == k), Fraction(0)), sums[k])
    assert inside(sum((Fraction(x) for x, _ in rows), Fraction(0)), total(Interval(values)))


def test_exact_differences_are_exactly_zero() -> None:
    x = Interval(np.array([0.1, 3.0, -7.25]))
    zero = x - x
    assert np.all(zero.lo == 0) and np.all(zero.hi == 0)
    assert np.all((x * 0.0).hi == 0)


def test_numpy_arrays_defer_to_intervals() -> None:
    result = np.array([1.0, 2.0]) + Interval(np.array([0.5, 0.5]))
    assert isinstance(result, Interval) and result.lo.tolist() == [1.5, 2.5]


def test_constants() -> None:
    third = constant_interval(sympy.Rational(1, 3))
    assert third.lo < third.hi and Fraction(float(third.lo)) < Fraction(1, 3) < Fraction(float(third.hi))
    assert constant_interval(sympy.Integer(4)).lo == constant_interval(sympy.Integer(4)).hi == 4
    pi = constant_interval(sympy.pi)
    assert pi.lo < pi.hi


def test_the_precise_evaluation_settles_what_doubles_cannot() -> None:
    """x^2 - y with y the double next to x^2: undecided in float64 intervals, decided by mpmath.iv."""
    x = 1.0 + 2.0**-30
    y = np.nextafter(x * x, 0)
    expression = s.L**2 - s.eta
    rough = evaluate(expression, {"L": Interval(x), "eta": Interval(y)}, {}, constant_interval)
    assert rough.lo <= 0 < rough.hi
    precise = evaluate_iv(expression, {"L": (x, x), "eta": (y, y)})
    assert precise.a > 0
    assert float(precise.a) == float(Fraction(x) ** 2 - Fraction(float(y)))


def test_the_precision_is_put_back() -> None:
    before = mpmath.iv.prec
    evaluate_iv(s.L**2, {"L": (1.0, 2.0)})
    assert mpmath.iv.prec == before


def test_unknown_nodes_are_refused() -> None:
    with pytest.raises(NotImplementedError):
        evaluate(sympy.sin(s.L), {"L": 1.0}, {}, float)
    with pytest.raises(KeyError):
        evaluate(s.L + s.K, {"L": 1.0}, {}, float)
