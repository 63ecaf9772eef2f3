"""Verdicts over samples of bound minus measured, and stretches of probed windows: case by case, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from theory.checks.descent import longest_run
from theory.checks.expectation import _verdict, student
from theory.verdict import VACUOUS_FACTOR, Verdict


def verdict(samples: list[float], lhs: float, rhs: float, silent: bool = False) -> Verdict:
    return _verdict(np.array(samples), lhs, rhs, silent=silent)[0]


def test_one_run_says_only_on_which_side_the_bound_lies() -> None:
    for sample, word in ((0.0, "above"), (0.5, "above"), (-0.5, "below")):
        found, text = _verdict(np.array([sample]), 10.0, 10.0 + sample, silent=False)
        assert found is Verdict.UNDETERMINED and f"lies {word} the" in text
    assert verdict([0.5], 10.0, 10.5, silent=True) is Verdict.HOLDS  # without noise one run is enough
    assert verdict([-0.5], 10.0, 9.5, silent=True) is Verdict.VIOLATED


def test_the_interval_is_student_s() -> None:
    """t(0.995, 2) = 9.925 and t(0.995, 1) = 63.66."""
    assert student(2) == pytest.approx(9.925, abs=5e-4) and student(1) == pytest.approx(63.657, abs=5e-4)
    assert "over 3 samples: 2 +- 5.7 (99 %)" in _verdict(np.array([1.0, 2.0, 3.0]), 10, 12, silent=False)[1]
    assert "over 2 samples: 2 +- 64 (99 %)" in _verdict(np.array([1.0, 3.0]), 10, 12, silent=False)[1]


@pytest.mark.parametrize(
    ("samples", "lhs", "rhs", "wanted"),
    [
        ([1.9, 2.0, 2.1], 10.0, 12.0, Verdict.HOLDS),  # 2 +- 0.57
        ([1.0, 2.0, 3.0], 10.0, 12.0, Verdict.UNDETERMINED),  # 2 +- 5.7
        ([-1.9, -2.0, -2.1], 10.0, 8.0, Verdict.VIOLATED),
        ([-4.0, -3.0, -2.0], 10.0, 7.0, Verdict.UNDETERMINED),  # -3 +- 5.7
    ],
)
def test_it_needs_the_whole_interval(samples: list[float], lhs: float, rhs: float, wanted: Verdict) -> None:
    assert verdict(samples, lhs, rhs) is wanted


def test_agreement_to_nine_digits_is_no_violation() -> None:
    lhs, close = 5.0, 1e-9 * 5.0
    assert verdict([-0.8 * close] * 2, lhs, lhs - 0.8 * close) is Verdict.HOLDS
    assert verdict([-close] * 2, lhs, lhs - close) is Verdict.HOLDS
    assert verdict([-1.2 * close] * 2, lhs, lhs - 1.2 * close) is Verdict.VIOLATED
    assert verdict([1e-12] * 2, lhs, lhs + 1e-12) is Verdict.HOLDS


def test_two_equal_sides_decide_nothing_unless_both_are_zero() -> None:
    assert verdict([0.0, 0.0], 5.0, 5.0) is Verdict.UNDETERMINED
    assert (
        verdict([5e-9, 5e-9], 5.0, 5.0) is Verdict.UNDETERMINED
    )  # equal means, a difference within rounding
    assert verdict([0.0, 0.0], 1.0, 1.0) is Verdict.UNDETERMINED
    assert verdict([0.0, 0.0], 0.0, 0.0) is Verdict.HOLDS


def test_a_bound_is_vacuous_above_a_thousand_times_what_it_bounds() -> None:
    assert VACUOUS_FACTOR == 1000
    assert verdict([999.0] * 2, 1.0, 1000.0) is Verdict.HOLDS
    assert verdict([999.5] * 2, 1.0, 1000.5) is Verdict.VACUOUS
    assert verdict([599.5] * 2, 0.5, 600.0) is Verdict.VACUOUS
    assert verdict([1.0] * 2, -0.5, 0.5) is Verdict.VACUOUS  # nothing measured


@pytest.mark.parametrize(
    ("windows", "wanted"),
    [
        ([], None),
        ([4], None),
        ([1, 3, 5], None),
        ([4, 5], slice(0, 2)),
        ([5, 6, 9], slice(0, 2)),
        ([1, 3, 4, 7, 8, 9, 20], slice(3, 6)),
        ([1, 2, 5, 6], slice(0, 2)),  # the first of equals
    ],
)
def test_the_longest_run_of_windows(windows: list[int], wanted: slice | None) -> None:
    assert longest_run(np.array(windows, dtype=float)) == wanted
