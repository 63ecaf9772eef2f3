"""Estimators: values on problems with known constants, kinds, and intervals that cover."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
import pytest

from theory import estimators
from theory.estimators import bootstrap
from theory.frame import Frame
from theory.intervals import Interval
from theory.laboratory import Logistic, Quadratic, Schedule, simulate
from theory.log import parse

SCHEDULE = Schedule(
    windows=60, densities=(1.0, 0.5, 0.25), delays=(0, 1, 2), eta=0.04, local_steps=2, interval=5
)


def frame(problem: Quadratic | Logistic, schedule: Schedule = SCHEDULE, *, given: bool = False) -> Frame:
    lines = simulate(problem, schedule).lines()
    return Frame.of(parse(lines if given else [line for line in lines if b'"constants"' not in line]))


def quadratic(**more: float) -> Quadratic:
    return Quadratic.random(np.random.default_rng(1), clients=3, size=10, smoothness=1.5, **more)  # type: ignore[arg-type]


def test_smoothness_is_a_lower_bound_and_is_attained_by_an_isotropic_problem() -> None:
    found = estimators.smoothness(frame(quadratic(sigma=0.3)))
    assert found.kind == "lower bound" and 0.2 < found.value <= 1.5 * (1 + 1e-9)
    assert found.low <= found.value and found.samples > 60
    isotropic = replace(quadratic(), hessian_NDD=np.stack([0.7 * np.eye(10)] * 3))
    assert estimators.smoothness(frame(isotropic)).value == pytest.approx(0.7, rel=1e-9)


def test_directional_smoothness_is_exact() -> None:
    problem = quadratic()
    trace = simulate(problem, SCHEDULE)
    slopes = estimators.directional_smoothness(Frame.of(parse(trace.lines())))
    hessian = problem.hessian_NDD.mean(axis=0)
    for t in (0, 10, 40):
        step = trace.models[t + 1] - trace.models[t]
        want = step @ hessian @ step / (step @ step)
        assert slopes.lo[t] <= want * (1 + 1e-9) and want * (1 - 1e-9) <= slopes.hi[t]
        assert slopes.hi[t] - slopes.lo[t] < 1e-6


def test_gradient_smoothness_is_exact() -> None:
    problem = quadratic()
    trace = simulate(problem, SCHEDULE)
    slopes = estimators.gradient_smoothness(Frame.of(parse(trace.lines())))
    hessian = problem.hessian_NDD.mean(axis=0)
    step = trace.models[8] - trace.models[7]
    want = np.linalg.norm(hessian @ step) / np.linalg.norm(step)
    assert slopes.lo[7] <= want * (1 + 1e-9) and want * (1 - 1e-9) <= slopes.hi[7]


def test_client_smoothness_sees_single_clients() -> None:
    """One client is ten times as curved as the others: the mean hides it, the terms records do not."""
    base = quadratic()
    scale = np.array([1.0, 1.0, 10.0])[:, None, None]
    problem = replace(base, hessian_NDD=base.hessian_NDD * scale)
    run = frame(problem, replace(SCHEDULE, eta=0.01))
    mean_only = max(
        np.nanmax(estimators.directional_smoothness(run).hi),
        np.nanmax(estimators.gradient_smoothness(run).hi),
    )
    single = np.nanmax(estimators.client_smoothness(run).hi)
    assert problem.smoothness is not None
    assert mean_only < single <= problem.smoothness * (1 + 1e-9)


def test_noise_estimates_sigma_squared() -> None:
    found = estimators.noise(frame(quadratic(sigma=0.6), replace(SCHEDULE, windows=200)))
    assert found.kind == "estimate" and found.samples == 200
    assert found.low < 0.36 < found.high
    assert found.value == pytest.approx(0.36, rel=0.1)


def test_given_constants_win() -> None:
    problem = quadratic(sigma=0.6)
    run = frame(problem, given=True)
    assert (
        estimators.smoothness(run).kind == "given" and estimators.smoothness(run).value == problem.smoothness
    )
    assert estimators.noise(run).value == problem.noise_sq
    assert estimators.infimum(run).value == problem.infimum
    assert Frame.of(run.log, {"L": 9.0}).given["L"] == 9.0


def test_bounds_over_the_run_are_exact() -> None:
    problem = quadratic()
    trace = simulate(problem, SCHEDULE)
    run = Frame.of(parse(trace.lines()))
    models = np.stack(trace.models)
    sent = sorted({r["version"] for r in trace.records if r["type"] == "dispatch"})
    assert estimators.weight_bound(run).value == pytest.approx(
        np.square(models[sent]).sum(axis=1).max(), rel=1e-12
    )
    assert estimators.weight_bound(run).kind == "exact"
    assert estimators.staleness_bound(run).value == 2
    windows = [r for r in trace.records if r["type"] == "window"]
    assert estimators.coverage_ratio(run).value == max(r["arrivals"] / r["gamma_min"] for r in windows)
    sums = [sum(p["pibar"] for p in d.parts) for d in trace.decompositions]
    assert estimators.share_sum(run).value == pytest.approx(max(sums), rel=1e-12)
    gaps = [p["gap_sq"] for d in trace.decompositions for p in d.parts]
    assert estimators.dissimilarity(run).value >= max(gaps) * (1 - 1e-12)
    assert estimators.dissimilarity(run).kind == "lower bound"


def test_the_gradient_bound_is_the_largest_mean_gradient() -> None:
    trace = simulate(quadratic(), SCHEDULE)
    run = Frame.of(parse(trace.lines()))
    largest = max(r["change_sq"] for r in trace.records if r["type"] == "arrival")
    assert estimators.gradient_bound(run).value == pytest.approx(largest / SCHEDULE.gamma**2, rel=1e-12)
    assert estimators.gradient_bound(run).kind == "estimate"


def test_infimum_of_known_losses() -> None:
    lines = simulate(quadratic(), replace(SCHEDULE, windows=2)).lines()
    bare = [line for line in lines if b'"constants"' not in line]
    assert not estimators.infimum(Frame.of(parse(bare))).known
    bare[0] = bare[0].replace(b'"aggregation"', b'"loss":"cross_entropy","aggregation"')
    assert estimators.infimum(Frame.of(parse(bare))).value == 0.0


def block_bootstrap(values: np.ndarray, statistic: Any, seed: int, draws: int) -> tuple[float, float]:
    """The moving-block bootstrap once more, as a loop."""
    n, rng = len(values), np.random.default_rng(seed)
    block = max(1, round(n ** (1 / 3)))
    per_draw = -(-n // block)
    starts = rng.integers(0, n - block + 1, size=(draws, per_draw))
    results = []
    for row in starts:
        drawn = [values[s + i] for s in row for i in range(block)][:n]
        results.append(statistic(np.array(drawn)))
    return float(np.quantile(results, 0.025)), float(np.quantile(results, 0.975))


def test_the_bootstrap_against_a_loop() -> None:
    values = np.random.default_rng(3).standard_normal(30)
    found = bootstrap(values, lambda x: float(x.mean()), np.random.default_rng(5), draws=40)
    assert found == pytest.approx(block_bootstrap(values, np.mean, 5, 40), rel=1e-12)
    wide = bootstrap(values, lambda x: float(x.mean()), np.random.default_rng(5), draws=400, level=0.5)
    assert wide[1] - wide[0] < found[1] - found[0]
    assert np.isfinite(bootstrap(np.array([1.0, 2.0]), float_mean, np.random.default_rng(0))).all()
    three = bootstrap(np.array([1.0, 2.0, 4.0]), float_mean, np.random.default_rng(0), draws=50)
    assert three == pytest.approx(block_bootstrap(np.array([1.0, 2.0, 4.0]), np.mean, 0, 50))


def float_mean(x: np.ndarray) -> float:
    return float(x.mean())


def test_reported_intervals_are_reproducible() -> None:
    run = frame(quadratic(sigma=0.6))
    noise = run.log["probe"]["noise_sq"]
    found = estimators.noise(run)
    assert (found.low, found.high) == pytest.approx(
        block_bootstrap(noise, np.mean, 20251205, 1000), rel=1e-12
    )
    local = SCHEDULE.eta * SCHEDULE.local_steps
    grads = run.log["arrival"]["change_sq"] / local**2
    found = estimators.gradient_bound(run)
    assert (found.low, found.high) == pytest.approx(block_bootstrap(grads, np.max, 20251205, 200), rel=1e-12)


def test_rounding_intervals_of_measured_smoothness() -> None:
    """Exact enclosures: of a square root, of a change whose scale is the larger gradient, of every client."""
    box = estimators._ratio(
        Interval(np.array([2.0, 8.0]), np.array([3.0, 9.0])), Interval(np.array([1.0, 4.0]))
    )
    for i, (low, high) in enumerate(((2.0, 3.0), (2.0, 2.25))):
        with mpmath.workdps(40):
            assert mpmath.mpf(float(box.lo[i])) <= mpmath.sqrt(low) and mpmath.sqrt(high) <= mpmath.mpf(
                float(box.hi[i])
            )
        assert box.lo[i] == pytest.approx(low**0.5, rel=1e-14) and box.hi[i] == pytest.approx(
            high**0.5, rel=1e-14
        )
    rounding = Interval(np.array([-1e-9]), np.array([4.0]))
    assert estimators._ratio(rounding, Interval(np.array([1.0]))).lo[0] == 0.0

    lines = simulate(quadratic(sigma=0.3), SCHEDULE).lines()
    assert b'"float64"' in lines[0]
    run = Frame.of(parse([lines[0].replace(b'"float64"', b'"float32"'), *lines[1:]]))
    probe, p = run.log["probe"], run.precision
    change = p.gradient(probe["grad_change_sq"], np.maximum(probe["grad_sq"], probe["grad_next_sq"]))
    step = p.reduction(probe["step_sq"])
    found = estimators.gradient_smoothness(run)
    moved = probe["step_sq"] > 0
    assert np.allclose(found.hi[moved] ** 2, (change.hi / step.lo)[moved], rtol=1e-12)
    assert np.allclose(found.lo[moved] ** 2, (change.lo / step.hi)[moved], rtol=1e-12)
    single = estimators.client_smoothness(run)
    known = np.isfinite(single.lo)
    assert known.any() and np.all(single.lo[known] < single.hi[known])


def test_smoothness_is_a_lower_bound_and_reports_both_ends() -> None:
    run = frame(quadratic(sigma=0.3))
    parts = [
        estimators.directional_smoothness(run),
        estimators.gradient_smoothness(run),
        estimators.client_smoothness(run),
    ]
    low = max(float(np.nanmax(x.lo[np.isfinite(x.lo)])) for x in parts)
    high = max(float(np.nanmax(x.hi[np.isfinite(x.hi)])) for x in parts)
    found = estimators.smoothness(run)
    assert found.value == found.low == low and found.high == high * (1 + 1e-12)
    assert found.value < high


def test_windows_without_a_step_say_nothing_about_smoothness() -> None:
    late = replace(SCHEDULE, windows=4, delays=(2, 2, 2))
    run = frame(quadratic(), late)
    assert run.log["probe"]["step_sq"].tolist()[:2] == [0.0, 0.0]
    assert np.isnan(estimators.directional_smoothness(run).lo[:2]).all()
    assert np.isnan(estimators.gradient_smoothness(run).lo[:2]).all()
    assert estimators.smoothness(run).known


def test_coverage_of_windows_with_several_holders_and_with_none() -> None:
    same = replace(SCHEDULE, windows=6, densities=(0.5, 0.5, 0.5), delays=(1, 1, 2))
    run = frame(quadratic(), same)
    table = run.log["window"]
    assert table["arrivals"].tolist() == [0, 2, 1, 2, 0, 3] and table["gamma_min"].tolist() == [
        0,
        2,
        1,
        2,
        0,
        3,
    ]
    assert estimators.coverage_ratio(run).value == 1.0
    idle = frame(quadratic(), replace(SCHEDULE, windows=2, delays=(5, 5, 5)))
    assert estimators.coverage_ratio(idle).value == 0.0
    alone = frame(quadratic(), replace(SCHEDULE, windows=3, delays=(0, 9, 9)))
    assert estimators.coverage_ratio(alone).value == 1.0


def test_counts_and_kinds_of_what_is_not_measured() -> None:
    run = Frame.of(
        parse([b'{"type":"header","schema":"1.0","clients":1,"config":{"loss":"bce"}}\n']), {"L": 2.0}
    )
    given = estimators.smoothness(run)
    assert (given.low, given.high, given.samples, given.kind) == (2.0, 2.0, 0, "given")
    floor = estimators.infimum(run)
    assert (floor.value, floor.low, floor.high, floor.samples, floor.kind) == (0.0, 0.0, 0.0, 0, "exact")
    assert estimators.noise(run).samples == 0


def test_nothing_logged_is_unknown() -> None:
    run = Frame.of(parse([b'{"type":"header","schema":"1.0","clients":1}\n']))
    for name, found in estimators.constants(run).items():
        assert not found.known and found.note, name


def test_the_bootstrap_covers_and_is_reproducible() -> None:
    """A 95 % interval of the mean of an autocorrelated series holds the truth in most of 200 series."""
    rng = np.random.default_rng(11)
    hits = 0
    for i in range(200):
        noise = rng.standard_normal(120)
        series = noise.copy()
        for t in range(1, len(series)):
            series[t] = 0.3 * series[t - 1] + noise[t]
        low, high = bootstrap(series, lambda x: float(x.mean()), np.random.default_rng(i), draws=300)
        hits += low <= 0.0 <= high
    assert 0.85 <= hits / 200 <= 1.0
    again = [bootstrap(series, lambda x: float(x.mean()), np.random.default_rng(0)) for _ in range(2)]
    assert again[0] == again[1]
    assert np.isnan(bootstrap(np.ones(1), float, np.random.default_rng(0))).all()
