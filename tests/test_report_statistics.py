"""Statistics over seeds, against brute force, SciPy's tests, and what the intervals promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fedgmr_plugin.report import statistics
from fedgmr_plugin.report.statistics import Curves, Difference

Array = NDArray[np.float64]
samples = st.lists(st.floats(-100, 100), min_size=2, max_size=12).map(np.array)
NAN, INF = math.nan, math.inf


# -- means -----------------------------------------------------------------------------------------


@given(samples, st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_of_a_mean_is_scipy_s(values: Array, level: float) -> None:
    found = statistics.mean(values, level)
    error = stats.sem(values)
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * error
    assert found.value == pytest.approx(values.mean()) and found.n == len(values)
    assert found.half == pytest.approx(half, rel=1e-9, abs=1e-12)
    assert found.low + found.half == pytest.approx(found.value, abs=1e-9)


@pytest.mark.parametrize(
    ("values", "value", "count"),
    [([], NAN, 0), ([NAN, INF], NAN, 0), ([2.0], 2.0, 1), ([NAN, 2.0], 2.0, 1)],
)
def test_too_few_values_have_no_interval(values: list[float], value: float, count: int) -> None:
    for found in (statistics.mean(values), statistics.bootstrap(values)):
        assert found.value == pytest.approx(value, nan_ok=True)
        assert math.isnan(found.low) and math.isnan(found.high) and found.n == count


@given(samples)
def test_the_interquartile_mean_is_scipy_s_trimmed_mean(values: Array) -> None:
    assert statistics.iqm(values) == pytest.approx(stats.trim_mean(values, 0.25), abs=1e-9)


def test_the_interquartile_mean_forgets_outliers() -> None:
    assert statistics.iqm([1e9, 1.0, 2.0, 3.0, -1e9, NAN, 2.0, 2.0, 2.0]) == 2.0
    assert statistics.iqm([1.0, 5.0]) == 3.0
    assert math.isnan(statistics.iqm([NAN]))


# -- the bootstrap ---------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=5).map(np.array))
def test_few_values_are_resampled_exhaustively(values: Array) -> None:
    means = sorted(float(np.mean(chosen)) for chosen in itertools.product(values, repeat=len(values)))
    found = statistics.bootstrap(values, resamples=1, seed=7)
    low, high = (means[max(0, math.ceil(q * len(means) - 1e-9) - 1)] for q in (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_with_three_values_the_percentile_interval_is_the_range() -> None:
    found = statistics.bootstrap([0.1, 0.5, 0.2])
    assert (found.low, found.high) == pytest.approx((0.1, 0.5))


def test_many_values_are_resampled_as_scipy_does() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=40)
    ours = statistics.bootstrap(values, resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    interval = theirs.confidence_interval
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), abs=0.02)
    assert ours == statistics.bootstrap(values, resamples=20_000)
    assert ours != statistics.bootstrap(values, resamples=20_000, seed=1)


def test_the_bootstrap_takes_other_statistics() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 1000.0])
    found = statistics.bootstrap(values, statistics.trimmed)
    assert found.value == statistics.iqm(values) == 4.5
    assert found.low < 4.5 < found.high < 500


def test_only_student_s_interval_keeps_its_promise_with_three_seeds() -> None:
    """Coverage over 3000 normal samples of three: 95 % is promised, and the percentile bootstrap has 75 %."""
    rows = np.random.default_rng(0).normal(size=(3000, 3))
    student = np.mean([found.low <= 0 <= found.high for found in map(statistics.mean, rows)])
    drawn = np.mean([found.low <= 0 <= found.high for found in map(statistics.bootstrap, rows)])
    assert student == pytest.approx(0.95, abs=0.012)
    assert drawn == pytest.approx(0.75, abs=0.03)


# -- comparisons -----------------------------------------------------------------------------------


@given(samples, st.integers(0, 2**32 - 1))
def test_the_paired_difference_is_scipy_s_paired_t_test(ours: Array, seed: int) -> None:
    theirs = ours + np.random.default_rng(seed).normal(0.5, 1.0, size=len(ours))
    found, test = statistics.paired(ours, theirs), stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    assert found.value == pytest.approx(np.mean(ours - theirs))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6)
    assert found.p == pytest.approx(test.pvalue, rel=1e-6)
    back = statistics.paired(theirs, ours)
    assert (back.value, back.low, back.high, back.p) == pytest.approx(
        (-found.value, -found.high, -found.low, found.p), rel=1e-6
    )


def test_pairs_that_are_not_whole_are_left_out() -> None:
    found = statistics.paired([1.0, NAN, 3.0, 4.0], [0.0, 0.0, INF, 2.0])
    assert (found.value, found.n) == (1.5, 2)


@pytest.mark.parametrize(
    ("gains", "value", "p"), [([], NAN, NAN), ([1.0], 1.0, NAN), ([0.0] * 3, 0.0, 1.0), ([2.0] * 3, 2.0, 0.0)]
)
def test_differences_without_spread(gains: list[float], value: float, p: float) -> None:
    found = statistics.paired(gains, np.zeros(len(gains)))
    assert (found.value, found.p) == pytest.approx((value, p), nan_ok=True)


@given(st.lists(st.one_of(st.just(NAN), st.floats(0, 1)), max_size=8))
def test_holm_s_correction(p: list[float]) -> None:
    found = statistics.holm(p)
    known = [value for value in p if not math.isnan(value)]
    for place, value in enumerate(p):
        if math.isnan(value):
            assert math.isnan(found[place])
            continue
        below = sorted(known)[: sum(other <= value for other in known)]
        wanted = max((len(known) - rank) * other for rank, other in enumerate(below))
        assert found[place] == pytest.approx(min(1.0, wanted), abs=1e-12)


def test_holm_s_correction_of_an_example() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize(
    ("value", "p", "count", "corrected", "said"),
    [
        (0.1, 0.04, 3, None, "better"),
        (-0.1, 0.04, 3, None, "worse"),
        (0.1, 0.06, 3, None, "not enough seeds to tell"),
        (0.1, 0.04, 3, 0.08, "not enough seeds to tell"),
        (0.1, 0.001, 2, None, "not enough seeds to tell"),
        (0.1, NAN, 1, None, "not enough seeds to tell"),
        (0.0, 1.0, 9, None, "not enough seeds to tell"),
    ],
)
def test_verdicts(value: float, p: float, count: int, corrected: float | None, said: str) -> None:
    assert statistics.verdict(Difference(value, NAN, NAN, p, count), corrected) == said


@given(samples, st.integers(0, 2**32 - 1))
def test_one_comparison_s_verdict_is_that_of_its_interval(ours: Array, seed: int) -> None:
    found = statistics.paired(ours, np.random.default_rng(seed).normal(size=len(ours)))
    outside = found.n >= 3 and not found.low <= 0 <= found.high
    assert (statistics.verdict(found) != "not enough seeds to tell") == outside


# -- targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "found"),
    [(0.4, (2.0, 20.0, 1)), (0.5, (4.0, 40.0, 3)), (0.6, (INF, INF, None)), (0.0, (1.0, 10.0, 0))],
)
def test_a_target_is_reached_at_the_first_evaluation_that_has_it(
    target: float, found: tuple[float, float, int | None]
) -> None:
    accuracy = [0.1, 0.4, NAN, 0.5, 0.2]
    assert statistics.to_target(accuracy, target, [1, 2, 3, 4, 5], [10, 20, 30, 40, 50]) == found


@given(st.lists(st.one_of(st.just(INF), st.floats(0, 100)), min_size=1, max_size=9))
def test_the_median_counts_what_was_never_reached(values: list[float]) -> None:
    found = statistics.median([*values, NAN])
    if sum(map(math.isinf, values)) * 2 >= len(values):
        assert math.isinf(found)
    else:
        assert found == pytest.approx(np.median([min(value, 1e9) for value in values]))
    assert math.isnan(statistics.median([NAN]))


# -- curves ----------------------------------------------------------------------------------------


def test_curves_are_interpolated_where_all_of_them_are_known() -> None:
    curves = [([0, 2, 4], [0.0, 2.0, 2.0]), ([1, 3, 3, 5, 6], [1.0, 9.0, 3.0, 5.0, NAN])]
    found = statistics.align(curves)
    assert found.at.tolist() == [1, 2, 3, 4]
    assert found.values.tolist() == [[1, 2, 2, 2], [1, 2, 3, 4]]


@pytest.mark.parametrize(
    "curves", [[], [([], [])], [([1.0], [NAN])], [([0, 1], [0, 0]), ([], [])], [([0], [1]), ([1], [1])]]
)
def test_curves_without_a_common_range(curves: list[tuple[list[float], list[float]]]) -> None:
    found = statistics.align(curves)
    assert found.at.shape == (0,) and found.values.shape == (len(curves), 0)
    assert statistics.band(found).mean.shape == (0,)


@given(st.integers(1, 4), st.integers(2, 900), st.integers(0, 2**32 - 1))
def test_a_grid_is_bounded_and_keeps_its_ends(curves: int, points: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    given_curves = [
        (np.sort(generator.normal(size=points)), generator.normal(size=points)) for _ in range(curves)
    ]
    found = statistics.align(given_curves, most=100)
    assert len(found.at) <= 100 and (np.diff(found.at) > 0).all()
    if len(found.at) and curves == 1:
        assert (found.at[0], found.at[-1]) == (given_curves[0][0][0], given_curves[0][0][-1])
        np.testing.assert_allclose(found.values[0], np.interp(found.at, *given_curves[0]))


def test_a_band_is_the_interval_at_each_place() -> None:
    values = np.random.default_rng(1).normal(size=(4, 5))
    found = statistics.band(Curves(np.arange(5.0), values))
    for place in range(5):
        one = statistics.mean(values[:, place])
        assert (found.mean[place], found.low[place], found.high[place]) == pytest.approx(one[:3])
    assert found.n == 4
    single = statistics.band(Curves(np.arange(5.0), values[:1]))
    assert single.mean.tolist() == values[0].tolist() and np.isnan(single.low).all()


def test_numbers_that_are_too_large_give_no_interval_and_no_warning() -> None:
    found = statistics.mean([1e308, 1e308, -1e308])
    assert not math.isfinite(found.half)
    statistics.paired([1e308, 1e308], [0.0, 1.0])
