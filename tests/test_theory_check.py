"""The checker end to end, on laboratory logs whose truth is known."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from theory.bounds import BOUNDS
from theory.check import Report, check_logs
from theory.checks.expectation import student
from theory.laboratory import Logistic, Problem, Quadratic, ReluNetwork, Schedule, simulate
from theory.laboratory import records as lab
from theory.log import RunLog, parse
from theory.strategies import runs
from theory.verdict import Verdict

HOLDS, VIOLATED, UNDETERMINED, VACUOUS = Verdict
SCHEDULE = Schedule(
    windows=30,
    densities=(1.0, 0.5, 0.2),
    delays=(0, 1, 2),
    delay_grows=True,
    interval=5,
    staleness="polynomial",
    restorations=((10, 2, 0.5), (20, 2, 1.0)),
)
UNIFORM = Schedule(windows=24, densities=(1.0, 0.5, 0.25), delays=(0, 1, 1), interval=1)


def quadratic(sigma: float = 0.3, **more: Any) -> Quadratic:
    return Quadratic.random(np.random.default_rng(0), clients=3, size=12, sigma=sigma, dense=2, **more)


def run(problem: Problem, schedule: Schedule, *drop: str) -> RunLog:
    """The log of a laboratory run, without the record types or ``type.key`` in `drop`."""
    out = []
    for record in simulate(problem, schedule).records:
        if record["type"] in drop:
            continue
        out.append(lab.line({k: v for k, v in record.items() if f"{record['type']}.{k}" not in drop}))
    return parse(out)


def verdicts(report: Report) -> dict[str, Verdict]:
    found = [*report.runs[0].findings, *report.expectations]
    return {finding.name: finding.verdict for finding in found}


@settings(max_examples=150)
@given(runs())
def test_true_logs_are_never_violated(drawn: tuple[Quadratic, Schedule]) -> None:
    """Whatever the schedule: no law of the log and no inequality fails on a true log."""
    problem, schedule = drawn
    report = check_logs([parse(simulate(problem, schedule).lines())])
    too_long = ("A4", "A4E", "descent", "telescoped", "expectation")
    assert [f for f in report.violated() if f.name not in too_long] == []
    assert 2 * schedule.gamma * (problem.smoothness or 0) > 1 or report.violated() == ()
    assert all(f.verdict is not UNDETERMINED or f.reason for f in report.runs[0].findings)


def test_gradients_off_an_empty_mask_have_no_proportion() -> None:
    """Nothing that is logged is as large as the gradient at m w = 0."""
    problem = Quadratic(
        np.full((1, 1, 1), 1 / 64), np.full((1, 1), 1.25), np.full(1, 1.25), sigma=0.0, dense=0
    )
    schedule = Schedule(windows=1, eta=0.25, local_steps=1, densities=(0.25,), delays=(0,), samples=(0.125,))
    report = check_logs([parse(simulate(problem, schedule).lines())])
    assert verdicts(report)["terms_scale"] is HOLDS and report.violated() == ()


@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_everything_that_can_be_decided_holds(form: str) -> None:
    report = check_logs([run(quadratic(), replace(SCHEDULE, form=form))])
    found = verdicts(report)
    assert report.status() == 0
    other = {"delta": ("split_replacement", "residual"), "replacement": ("split_delta", "update")}[form]
    open_ones = {"A1", "A2", "A3", "A5", "TOPK", "NEST", "UNIF", "REPL" if form == "delta" else "DELTA"}
    open_ones |= {"floored_topk", "expectation", "drift_a_priori", "change_a_priori", *other}
    open_ones |= {"evaluated_bytes", "evaluated_metrics", "candidates", "payload"}
    open_ones |= {"due_records", "file_order", "capacity", "refusals", "shares_logged", "nulls"}
    open_ones |= {"noise", "corollary", "corollary_weighted", "corollary_nested"}
    assert {name for name, verdict in found.items() if verdict is UNDETERMINED} == open_ones
    assert {name for name, verdict in found.items() if verdict is VIOLATED} == set()
    assert report["mask"].certificate and report["descent"].checks == 30
    assert set(BOUNDS) - {"stalled_step", "restored_step", "restore_when"} <= set(found)


def test_bounds_are_evaluated_with_the_right_numbers() -> None:
    """Two findings against sums made by hand from the trace."""
    problem = quadratic()
    trace = simulate(problem, SCHEDULE)
    report = check_logs([parse(trace.lines())])
    L = problem.smoothness or 0.0
    by_hand = [L**2 * sum(p["pibar"] * p["mask_sq"] for p in found.parts) for found in trace.decompositions]
    assert report["mask"].bound == pytest.approx(np.mean(by_hand), rel=1e-12)
    assert report["mask"].measured == pytest.approx(
        np.mean([d.M @ d.M for d in trace.decompositions]), rel=1e-9
    )
    updates = [sum(p["pibar"] * p["change_sq"] for p in found.parts) for found in trace.decompositions]
    assert report["update"].bound == pytest.approx(np.mean(updates), rel=1e-12)


def test_without_probes_and_terms_nothing_is_claimed_about_gradients() -> None:
    report = check_logs([run(quadratic(), SCHEDULE, "probe", "terms", "constants")])
    found = verdicts(report)
    for name in (
        "descent",
        "telescoped",
        "mask",
        "staleness",
        "drift",
        "heterogeneity",
        "expectation",
        "A4",
        "A5",
    ):
        assert found[name] is UNDETERMINED, name
    for name in ("update", "topk", "aged_topk", "coverage", "nested_coverage", "rank_gap", "rank_restored"):
        assert found[name] is HOLDS, name


@pytest.mark.parametrize(
    ("drop", "check", "word"),
    [
        ("probe.grad_dot_step", "descent", "probe"),
        ("arrival.pibar", "update", "pibar"),
        ("window.gamma_min", "fewest_holders", "gamma_min"),
        ("window.gamma_min", "coverage", "pibar"),
        ("dispatch.norm_sq", "topk", "TOPK"),
        ("window.step_sq", "path", "step_sq"),
        ("header.config", "ALG", "config"),
        ("header.layout", "support", "layout"),
        ("dispatch.ranking", "NEST", "ranking"),
        ("end", "complete", "stopped"),
    ],
)
def test_what_is_not_logged_is_undetermined(drop: str, check: str, word: str) -> None:
    finding = check_logs([run(quadratic(), SCHEDULE, drop)])[check]
    assert finding.verdict is UNDETERMINED
    assert word in finding.reason


def test_a_minimal_log_is_checked() -> None:
    """Only what the schema demands: laws that need nothing else hold, all else is open, nothing crashes."""
    keep = {
        "header": ("schema", "clients"),
        "dispatch": ("dispatch", "client", "version", "density"),
        "arrival": ("window", "dispatch", "client", "version", "staleness"),
        "window": ("window", "arrivals"),
        "probe": ("window",),
        "terms": ("window", "gamma"),
    }
    out = [
        lab.line({"type": r["type"], **{k: r[k] for k in keep[r["type"]]}})
        for r in simulate(quadratic(), SCHEDULE).records
        if r["type"] in keep
    ]
    report = check_logs([parse(out)])
    assert report.status() == 0
    assert report["matched"].verdict is report["staleness_count"].verdict is HOLDS
    inequalities = [f for f in report.runs[0].findings if f.group == "inequality"]
    assert all(f.verdict is UNDETERMINED for f in inequalities)


def test_an_empty_run_is_checked() -> None:
    log = parse([b'{"type":"header","schema":"1.0","clients":1}\n'])
    report = check_logs([log])
    assert report.status() == 0
    assert all(f.verdict in (UNDETERMINED, HOLDS) for f in report.runs[0].findings)


def test_a_step_beyond_one_over_L_refutes_A4_and_I0() -> None:
    """eta K L = 2.4: the objective rises, and the finding says that this is no counterexample."""
    problem = quadratic(sigma=0.0, spread=0.0, alike=True)
    dense = Schedule(windows=6, eta=2.4, local_steps=1, densities=(1.0,) * 3, delays=(0,) * 3)
    report = check_logs([run(problem, dense)])
    assert report["A4"].verdict is VIOLATED and report["A4E"].verdict is VIOLATED
    assert report["descent"].verdict is VIOLATED
    assert "no counterexample" in report["descent"].reason
    witness = report["descent"].witness
    assert witness is not None and witness.window == 0 and witness.lhs is not None and witness.rhs is not None
    assert witness.lhs > witness.rhs
    assert (
        report.status() == 1
        and report.status(accept=["A4", "A4E", "descent", "telescoped", "expectation"]) == 0
    )


def test_a_bound_that_holds_under_a_refuted_hypothesis_is_not_called_verified() -> None:
    """gamma just above 1/(2L): I2's numbers may be fine, but A4E is refuted, so it is not HOLDS."""
    problem = quadratic(sigma=0.0)
    logs = [run(problem, replace(UNIFORM, eta=0.3, seed=seed)) for seed in range(3)]
    report = check_logs(logs)
    assert report["A4E"].verdict is VIOLATED
    assert report["expectation"].verdict is UNDETERMINED and "A4E is refuted" in report["expectation"].reason


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_expectations_over_seeds(sigma: float) -> None:
    problem = quadratic(sigma=sigma)
    given = {"L": problem.smoothness or 0.0, "sigma_g_sq": 60.0, "G_sq": 900.0, "W_sq": 400.0}
    logs = [run(problem, replace(UNIFORM, seed=seed)) for seed in range(6)]
    report = check_logs(logs, given=given)
    for name in ("expectation", "corollary", "corollary_weighted", "corollary_nested", "change_a_priori"):
        finding = report[name]
        assert finding.verdict in (HOLDS, VACUOUS), (name, finding.reason)
        assert finding.certificate and finding.bound is not None and finding.measured is not None
        assert finding.bound > finding.measured
    single = check_logs(logs[:1], given=given)
    assert (single["expectation"].verdict is HOLDS) == (sigma == 0.0)


def test_runs_that_are_no_seeds_are_not_averaged() -> None:
    problem = quadratic()
    first = run(problem, UNIFORM)
    same_seed = check_logs([first, run(problem, UNIFORM)])["expectation"]
    assert same_seed.verdict is UNDETERMINED and "same seed" in same_seed.reason
    other = check_logs([first, run(problem, replace(UNIFORM, eta=0.04, seed=1))])["expectation"]
    assert other.verdict is UNDETERMINED and "different configurations" in other.reason


def test_the_nested_corollary_is_sharper_than_the_uniform_one() -> None:
    """Six clients of distinct densities: Phi = 6, but the harmonic number of 6 is 2.45."""
    problem = Quadratic.random(np.random.default_rng(1), clients=6, size=40, spread=0.5)
    schedule = Schedule(windows=10, eta=0.02, densities=(1.0, 0.8, 0.6, 0.4, 0.2, 0.1), delays=(0,) * 6)
    report = check_logs([run(problem, schedule)], given={"sigma_g_sq": 50.0, "G_sq": 900.0, "W_sq": 900.0})
    nested, uniform = report["corollary_nested"], report["corollary"]
    assert nested.verdict is HOLDS and uniform.verdict is HOLDS
    assert nested.bound is not None and uniform.bound is not None and nested.bound < 0.6 * uniform.bound


def test_a_false_constant_is_refuted() -> None:
    problem = quadratic()
    log = run(problem, SCHEDULE, "constants")
    assert check_logs([log], given={"L": 0.5})["A1"].verdict is VIOLATED
    assert check_logs([log], given={"F_inf": 1e6})["A1"].verdict is VIOLATED
    assert check_logs([log], given={"W_sq": 1e-6})["A3"].verdict is VIOLATED
    assert check_logs([log], given={"sigma_g_sq": 1e-6})["A5"].verdict is VIOLATED
    assert check_logs([log], given={"sigma_sq": 1e-4})["A2"].verdict is VIOLATED
    assert check_logs([log], given={"L": 0.02})["mask_lipschitz"].verdict is VIOLATED
    seeds = [run(problem, replace(SCHEDULE, seed=seed), "constants") for seed in range(3)]
    assert check_logs(seeds, given={"sigma_sq": 1e-4})["noise"].verdict is VIOLATED
    assert check_logs([log], given={"sigma_g_sq": 1e6})["A5"].verdict is HOLDS


def test_a_measured_constant_is_no_certificate() -> None:
    problem = ReluNetwork.random(np.random.default_rng(0), clients=3, inputs=4, hidden=6)
    report = check_logs([run(problem, SCHEDULE)])
    assert report["A1"].verdict is UNDETERMINED and "L >=" in report["A1"].reason
    assert report["mask"].verdict is HOLDS and not report["mask"].certificate
    assert "no certificate" in report["mask"].reason
    assert report["mask_lipschitz"].verdict is UNDETERMINED
    assert report["mask_merge"].certificate


def test_an_undersized_measured_constant_does_not_violate() -> None:
    """Without terms of single clients, the measured L may be too small; that is no violation."""
    problem = Logistic.random(np.random.default_rng(2), clients=3, size=6)
    log = run(problem, SCHEDULE, "constants")
    for record in ("M_sq", "S_sq", "D_sq"):
        log["term_arrivals"].columns[record][:] = np.nan
    log["terms"].columns["M_sq"][:] *= 1e6
    finding = check_logs([log])["mask"]
    assert finding.verdict is UNDETERMINED and "from below only" in finding.reason


def test_a_bound_a_thousand_times_too_large_is_vacuous() -> None:
    report = check_logs([run(quadratic(), replace(SCHEDULE, eta=0.002))], given={"L": 100.0})
    assert report["mask"].verdict is VACUOUS and report.status() == 0


def test_ties_are_left_open() -> None:
    """One dimension, F = L w^2 / 2: the staleness error *is* its bound, so rounding cannot decide."""
    one = Quadratic(np.full((2, 1, 1), 0.3), np.array([[0.1], [0.4]]), np.array([1.7]))
    late = Schedule(windows=8, eta=0.1, local_steps=1, densities=(1.0, 1.0), delays=(0, 1))
    finding = check_logs([run(one, late)], given={"L": 0.3})["staleness_lipschitz"]
    assert finding.ties == finding.checks > 0
    assert finding.verdict is UNDETERMINED and "within rounding" in finding.reason


def test_json_has_no_nan_and_round_trips() -> None:
    report = check_logs([run(quadratic(), SCHEDULE)])
    data = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    names = [finding["name"] for finding in data["runs"][0]["findings"]]
    assert len(names) == len(set(names))
    assert {f["verdict"] for f in data["runs"][0]["findings"]} <= {v.value for v in Verdict}


def test_student_quantiles() -> None:
    """Against mpmath's incomplete beta function."""
    import mpmath

    for degrees in (1, 2, 5, 10, 20, 40, 200):
        t = student(degrees)
        x = degrees / (degrees + t * t)
        upper = mpmath.betainc(degrees / 2, 0.5, 0, x, regularized=True) / 2
        assert float(upper) == pytest.approx(0.005, rel=2e-2)
