"""What the checker must not say of good runs: false verdicts, numbers that nobody logged, wrong reasons."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from theory import estimators
from theory.bounds import BOUNDS
from theory.check import Report, check_logs
from theory.frame import HOOKED, STATISTICS, Frame
from theory.intervals import Interval
from theory.judge import Case, Place, judge
from theory.laboratory import Quadratic, Schedule, simulate
from theory.laboratory import records as lab
from theory.log import parse
from theory.verdict import VACUOUS_FACTOR, Verdict

HOLDS, VIOLATED, UNDETERMINED, VACUOUS = Verdict
Records = list[dict[str, Any]]
SCHEDULE = Schedule(windows=24, densities=(1.0, 0.5, 0.2), delays=(0, 1, 2), interval=4)


def good(schedule: Schedule = SCHEDULE, sigma: float = 0.3) -> Records:
    problem = Quadratic.random(np.random.default_rng(0), clients=3, size=12, sigma=sigma, dense=2)
    return simulate(problem, schedule).records


def check(*runs: Records, **given: float) -> Report:
    return check_logs([parse([lab.line(record) for record in run]) for run in runs], given=given)


# -- buffers -----------------------------------------------------------------------------------------


def with_statistics(records: Records) -> Records:
    """The same run of a model with batch normalisation, whose statistics move the losses and gradients."""
    layout = records[0]["layout"]
    layout["size"] += 4
    layout["layers"].append({"name": "running", "kind": "buffer", "size": 4, "shape": [4]})
    for record in records:
        if record["type"] == "dispatch":
            record["support"] += 4
            record["bytes_down"] += 32.0
        if record["type"] == "arrival":
            record["bytes_up"] += 32.0
        if record["type"] == "window":
            sent = sum(r["type"] == "dispatch" and r["version"] == record["window"] for r in records)
            record["bytes_up"] += 32.0 * record["arrivals"]
            record["bytes_down"] += 32.0 * sent
            record["server_bytes_down"] = record["bytes_down"]
        if record["type"] == "probe":
            record["loss_next"] += 5.0
            record["grad_change_sq"] *= 9
    probes = [r for r in records if r["type"] == "probe"]
    for before, after in pairwise(probes):
        after["loss"] = before["loss_next"]
    return records


def test_moving_statistics_leave_descent_open() -> None:
    found = check(with_statistics(good()), L=1.0)
    for name in (
        "A4",
        "A4E",
        "descent",
        "telescoped",
        "staleness",
        "staleness_lipschitz",
        "drift",
        "expectation",
    ):
        assert found[name].verdict is UNDETERMINED, name
        assert STATISTICS in found[name].reason, name
    assert found["mask"].verdict in (HOLDS, VACUOUS) and found["A1"].verdict is UNDETERMINED


def test_moving_statistics_are_no_smoothness() -> None:
    plain = [record for record in good() if record["type"] != "constants"]
    run = Frame.of(parse([lab.line(record) for record in plain]))
    moved = Frame.of(parse([lab.line(record) for record in with_statistics(plain)]))
    assert np.isnan(estimators.directional_smoothness(moved).lo).all()
    assert np.isnan(estimators.gradient_smoothness(moved).lo).all()
    assert 0 < estimators.smoothness(moved).value <= estimators.smoothness(run).value

    masks, stale, drift = np.split(estimators.client_smoothness(moved).lo, 3)
    assert np.isfinite(masks).any(), "a mask is measured at one moment"
    assert np.isnan(stale).all() and np.isnan(drift).all()
    assert all(np.isfinite(part).any() for part in np.split(estimators.client_smoothness(run).lo, 3))


def test_a_share_too_large_for_its_coverage_is_found() -> None:
    """(8) multiplies: of three equal holders none has more than a third."""
    records = good(Schedule(windows=6, densities=(1.0, 1.0, 1.0), delays=(0, 0, 0)))
    window = next(r for r in records if r["type"] == "window" and r["gamma_min"] >= 2)
    arrived = [r for r in records if r["type"] == "arrival" and r["window"] == window["window"]]
    assert len(arrived) >= 2 and check(records)["coverage"].verdict is HOLDS
    arrived[0]["pibar"] = 1.0
    assert check(records)["coverage"].verdict is VIOLATED


# -- hooks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [True, False, None])
def test_hooks_of_the_host_leave_the_merge_open(active: bool | None) -> None:
    records = good()
    records[0]["fedml"] = {} if active is None else {"aggregation_hooks": active}
    if active:
        for record in records:
            if record["type"] == "window":
                record["step_sq"] *= 4
                record["gamma_min"] = 0
            if record["type"] == "probe":
                record["step_sq"] *= 4
                record["grad_dot_step"] *= 2
    found = check([r for r in records if r["type"] not in ("terms", "constants")])
    assert found["ALG"].verdict is (UNDETERMINED if active else HOLDS)
    for name in ("update", "fewest_holders", "nested_holders", "mean_coverage", "shares", "coverage"):
        assert found[name].verdict is (UNDETERMINED if active else HOLDS), name
        assert (HOOKED in found[name].reason) == bool(active), name
    assert (HOOKED in " ".join(found.runs[0].advice)) == bool(active)
    assert not {f.name for f in found.violated()} - {"A4", "A4E", "descent", "telescoped", "norm_path"}


# -- a lower bound of L ------------------------------------------------------------------------------


def test_what_holds_with_a_measured_smoothness_holds_with_the_true_one() -> None:
    """float32 widens every slope; the value that decides stays below the true constant."""
    records = [record for record in good() if record["type"] != "constants"]
    records[0]["layout"]["dtype"] = "float32"
    run = Frame.of(parse([lab.line(record) for record in records]))
    problem = Quadratic.random(np.random.default_rng(0), clients=3, size=12, sigma=0.3, dense=2)
    found = estimators.smoothness(run)
    assert found.kind == "lower bound" and found.value == found.low < found.high
    assert found.value <= (problem.smoothness or 0.0)


# -- what is printed ---------------------------------------------------------------------------------


def test_the_measured_side_is_the_logged_number() -> None:
    """Whatever the rounding of a small term: its mean is that of the log, and so is what is vacuous."""
    records = good()
    records[0]["layout"]["dtype"] = "float32"
    terms = [record for record in records if record["type"] == "terms"]
    for record in terms:
        record["scale_sq"] = max(record["scale_sq"], 1.0)
    found = check(records)
    for name, key in (("mask", "M_sq"), ("staleness", "S_sq"), ("drift", "D_sq"), ("heterogeneity", "H_sq")):
        assert found[name].measured == pytest.approx(np.mean([r[key] for r in terms]), rel=1e-12), name


def interval_case(lhs: Interval, rhs: float, premises: dict[str, Verdict]) -> Case:
    values = {"M_n_sq": lhs, "L": Interval(1.0), "mask_sq": Interval(np.array([rhs]))}
    return Case(BOUNDS["mask_lipschitz"], values, Place(np.array([1])), premises=premises)


def test_a_bound_is_vacuous_against_the_logged_number() -> None:
    wide = Interval(np.array([0.0]), np.array([10.0]), np.array([1e-3]))
    found = judge(interval_case(wide, 100.0, {}))
    assert found.measured == 1e-3 and found.verdict is VACUOUS
    assert VACUOUS_FACTOR * 5.0 > 100.0


def test_numbers_that_tie_are_not_said_to_satisfy_a_bound() -> None:
    tie = Interval(np.array([1.0]), np.array([3.0]))
    found = judge(interval_case(tie, 2.0, {"A1": VIOLATED}))
    assert found.verdict is UNDETERMINED
    assert "satisfy" not in found.reason and "agree within rounding" in found.reason
    assert "hypothesis A1 is refuted" in found.reason


# -- expectations ------------------------------------------------------------------------------------

EXPECTED = ("noise", "expectation", "corollary_weighted")


def seeds(count: int = 3, **more: Any) -> list[Records]:
    flat = replace(SCHEDULE, delays=(0, 0, 0), interval=1, eta=0.01, local_steps=1, **more)
    return [good(replace(flat, seed=seed)) for seed in range(count)]


def test_one_run_is_no_expectation() -> None:
    found = check(*seeds(1))["noise"]
    assert found.verdict is UNDETERMINED and found.checks == 1 and "one run" in found.reason


def test_a_wrong_variance_is_no_violated_theorem() -> None:
    """Few probes cannot refute A2, and nothing can prove it."""
    runs = seeds(3, windows=8)
    found = check(*runs, sigma_sq=1e-6)
    assert found["A2"].verdict is UNDETERMINED
    assert found["noise"].verdict is UNDETERMINED and "A2" in found["noise"].reason


@pytest.mark.parametrize("forged", ["twice", "another seed", "no seed", "one number"])
def test_one_run_given_twice_is_one_sample(forged: str) -> None:
    first, second = seeds(1)[0], seeds(1)[0]
    if forged in ("another seed", "one number"):
        second[0]["seed"] = 99
    if forged == "one number":
        next(r for r in second if r["type"] == "terms")["z_sq"] *= 1.0000001
    if forged == "no seed":
        del first[0]["seed"], second[0]["seed"]
    found = check(first, second)
    for name in EXPECTED:
        assert found[name].verdict is UNDETERMINED, name
    assert "the same" in found["noise"].reason


def test_runs_without_noise_are_their_own_expectation() -> None:
    quiet = [good(replace(SCHEDULE, seed=seed), sigma=0.0) for seed in range(2)]
    assert check(*quiet, sigma_sq=0.0)["noise"].verdict is HOLDS


@pytest.mark.parametrize("reason", ["windows", "time_budget"])
def test_a_mean_over_windows_needs_their_number_in_advance(reason: str) -> None:
    runs = seeds()
    for run in runs:
        run[-1]["reason"] = reason
    found = check(*runs)["expectation"]
    assert ("T is fixed in advance" in found.reason) == (reason == "time_budget")
    assert found.verdict is (UNDETERMINED if reason == "time_budget" else HOLDS)
