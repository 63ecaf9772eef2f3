"""Masks under a layer floor, aged rankings, unequal weights: what the plugin's own runs look like."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from theory.check import check_logs
from theory.checks.conditions import contraction, floor_bounds, fresh, weight_ratio
from theory.checks.expectation import harmonic, student
from theory.frame import Frame
from theory.laboratory import Quadratic, Schedule, ranking, simulate
from theory.laboratory import records as lab
from theory.log import parse
from theory.verdict import Verdict

LAYERS = (40, 60)


def floored_log(
    floor: float = 0.1, factor: float = 1.0, densities: tuple[float, ...] = (1.0, 0.5, 0.2, 0.05)
) -> bytes:
    """Dispatches of one random model under a floor; `factor` scales the norms left out."""
    w = np.random.default_rng(0).standard_normal(100)
    order = ranking(w, np.ones(100, dtype=bool), floor=floor, layers=LAYERS)
    layers = [{"kind": "prunable", "size": n} for n in LAYERS]
    header = {
        "type": "header", "schema": "1.0", "clients": len(densities),
        "config": {"score": "magnitude", "layer_floor": floor, "interval": 10},
        "layout": {"size": 100, "prunable": 100, "dtype": "float64", "layers": layers},
    }  # fmt: skip
    rows: list[dict[str, Any]] = [header]
    for n, d in enumerate(densities):
        gone = w[order[int(d * 100) :]]
        rows.append(
            {
                "type": "dispatch", "dispatch": n, "client": n, "version": 0, "density": d, "ranking": "a",
                "norm_sq": float(w @ w), "masked_norm_sq": factor * float(gone @ gone),
            }
        )  # fmt: skip
    return b"".join(map(lab.line, rows))


def frame(raw: bytes) -> Frame:
    return Frame.of(parse(raw.splitlines(keepends=True)))


def test_floor_bounds_and_contraction() -> None:
    run = frame(floored_log())
    assert floor_bounds(run) == (0.1, 10.0, 100.0)
    factor = contraction(run)
    assert factor[0] == 0.0
    assert factor[1] == pytest.approx(0.9 * 50 / 90, rel=1e-15)
    assert factor[2] == pytest.approx(0.9 * 80 / 90, rel=1e-15)
    assert np.isnan(factor[3])  # 5 coordinates: fewer than the floor's 10
    assert fresh(run).all()


def test_contraction_at_the_floor_and_under_other_scores() -> None:
    at_the_floor = contraction(frame(floored_log(densities=(0.1,))))
    assert at_the_floor.tolist() == pytest.approx([0.9], rel=1e-15)
    random = contraction(frame(floored_log(0.0).replace(b'"magnitude"', b'"random"')))
    assert random[0] == 0.0 and np.isnan(random[1:]).all()


def test_floors_that_do_not_divide_the_layers_are_bounded_either_way() -> None:
    """A floor of 0.07: 2 or 3 of 40 and 4 or 5 of 60, whichever way it is rounded."""
    least, most, prunable = floor_bounds(frame(floored_log(0.07))) or (0.0, 0.0, 0.0)
    assert (least, most, prunable) == (2 / 40, 3 + 5, 100)
    tiny = floor_bounds(frame(floored_log(0.001)))
    assert tiny == (0.0, 2.0, 100.0)


def test_no_floor_bound_without_a_floor() -> None:
    assert floor_bounds(frame(floored_log(0.0))) is None
    assert contraction(frame(floored_log(0.0)))[1] == 0.5


def test_floored_topk_is_judged_and_its_violation_found() -> None:
    found = check_logs([parse(floored_log().splitlines(keepends=True))])
    assert found["floored_topk"].verdict is Verdict.HOLDS and found["floored_topk"].checks == 2
    assert found["topk"].verdict is Verdict.UNDETERMINED and "layer_floor" in found["topk"].reason
    forged = check_logs([parse(floored_log(factor=4.0).splitlines(keepends=True))])["floored_topk"]
    assert forged.verdict is Verdict.VIOLATED
    assert forged.witness is not None and forged.witness.dispatch == 2


def aged_log(interval: int = 3, jump: float = 1.0) -> list[dict[str, Any]]:
    problem = Quadratic.random(np.random.default_rng(2), clients=3, size=30, sigma=0.5)
    schedule = Schedule(windows=9, eta=0.1, densities=(1.0, 0.5, 0.2), delays=(0, 0, 0), interval=interval)
    records = simulate(problem, schedule).records
    for record in records:
        if record["type"] == "dispatch" and record["version"] == 4 and record["client"] == 2:
            record["masked_norm_sq"] *= jump
            record["full_masked_norm_sq"] *= jump
    return records


def test_aged_rankings() -> None:
    records = aged_log()
    log = parse(map(lab.line, records))
    run = Frame.of(log)
    assert fresh(run).tolist() == [v % 3 == 0 for v in log["dispatch"]["version"]]
    found = check_logs([log])
    sent = [r for r in records if r["type"] == "dispatch" and r["density"] < 1]
    aged = [r for r in sent if r["version"] % 3]
    assert found["topk"].checks == len(sent) - len(aged) and found["aged_topk"].checks == len(aged)
    assert found["topk"].verdict is found["aged_topk"].verdict is Verdict.HOLDS
    norms = {r["version"]: r["norm_sq"] for r in sent}
    steps = [r["step_sq"] for r in records if r["type"] == "window"]
    limits = []
    for r in aged:
        v = r["version"] // 3 * 3
        q = 1 - int(r["density"] * 30) / 30
        limits.append(2 * q * norms[v] + 2 * (r["version"] - v) * sum(steps[v : r["version"]]))
    assert found["aged_topk"].bound == pytest.approx(np.mean(limits), rel=1e-9)
    broken = check_logs([parse(map(lab.line, aged_log(jump=40.0)))])["aged_topk"]
    assert broken.verdict is Verdict.VIOLATED and broken.witness is not None and broken.witness.window == 4


def test_a_logged_ranking_version_wins() -> None:
    records = aged_log()
    for record in records:
        if record["type"] == "dispatch":
            record["ranking_version"] = record["version"] // 3 * 3
        if record["type"] == "header":
            del record["config"]["interval"]
    run = Frame.of(parse(map(lab.line, records)))
    assert np.array_equal(run.ranking_version, run.log["dispatch"]["version"] // 3 * 3)
    bare = [{k: v for k, v in r.items() if k != "ranking_version"} for r in records]
    assert np.isnan(Frame.of(parse(map(lab.line, bare))).ranking_version).all()


def test_weight_ratios() -> None:
    problem = Quadratic.random(np.random.default_rng(2), clients=3, size=6)
    schedule = Schedule(windows=4, densities=(1.0, 0.5, 0.5), delays=(0, 0, 1), samples=(3.0, 2.0, 8.0))
    log = parse(simulate(problem, schedule).lines())
    assert weight_ratio(Frame.of(log)).tolist() == [1.5, 4.0, 1.5, 4.0]
    found = check_logs([log])
    assert found["UNIF"].verdict is Verdict.UNDETERMINED and "4" in found["UNIF"].reason
    assert found["coverage"].verdict is Verdict.HOLDS and found["rank_gap"].verdict is Verdict.HOLDS
    assert found["corollary"].verdict is Verdict.UNDETERMINED and "UNIF" in found["corollary"].reason
    idle = parse(simulate(problem, Schedule(windows=3, delays=(2, 2, 2))).lines())
    assert weight_ratio(Frame.of(idle)).tolist() == [1.0, 1.0, 1.0]


def test_counting_bounds_against_sums_by_hand() -> None:
    """Two nested arrivals, weights 3 (dense) and 2 (half): shares 3/3 and 2/5."""
    problem = Quadratic.random(np.random.default_rng(2), clients=2, size=10)
    schedule = Schedule(windows=3, densities=(1.0, 0.5), delays=(0, 0), samples=(3.0, 2.0))
    found = check_logs([parse(simulate(problem, schedule).lines())])
    assert found["nested_coverage"].measured == pytest.approx(1.4, rel=1e-12)
    assert found["nested_coverage"].bound == pytest.approx(1 + np.log(5 / 3), rel=1e-12)
    assert found["rank_gap"].measured == pytest.approx(0.4 * 0.5, rel=1e-12)
    assert found["rank_gap"].bound == pytest.approx(1.5 * 0.5 / 2, rel=1e-12)
    assert found["coverage"].measured == pytest.approx((1.0 + 0.4) / 2, rel=1e-12)
    assert found["coverage"].bound == pytest.approx(1.5, rel=1e-12)


def test_restoration_bounds_against_sums_by_hand() -> None:
    problem = Quadratic.random(np.random.default_rng(2), clients=3, size=20)
    schedule = Schedule(windows=3, densities=(0.75, 0.5, 0.25), delays=(0, 0, 0), restorations=((2, 2, 1.0),))
    found = check_logs([parse(simulate(problem, schedule).lines())])
    assert found["average_restored"].checks == 1
    assert found["average_restored"].measured == pytest.approx((0.25 + 0.5 + 0.0) / 3)
    assert found["average_restored"].bound == pytest.approx((0.25 + 0.5 + 0.75) / 3)
    assert found["rank_restored"].measured == pytest.approx(0.0 / 1 + 0.25 / 2 + 0.5 / 3)
    assert found["rank_restored"].bound == pytest.approx(0.25 / 1 + 0.5 / 2 + 0.75 / 3)


def test_windows_with_one_arrival_count() -> None:
    problem = Quadratic.random(np.random.default_rng(2), clients=2, size=20)
    schedule = Schedule(windows=3, densities=(0.5, 0.5), delays=(0, 9), restorations=((1, 0, 0.75),))
    found = check_logs([parse(simulate(problem, schedule).lines())])
    assert found["nested_coverage"].checks == found["rank_gap"].checks == 3
    assert found["average_restored"].checks == 2
    assert found["average_restored"].measured == pytest.approx(0.25)
    assert found["average_restored"].bound == pytest.approx(0.5)


def test_expectations_against_sums_by_hand() -> None:
    """I2 and the three corollaries of one noiseless run, from its records."""
    problem = Quadratic.random(np.random.default_rng(3), clients=3, size=20, spread=0.3)
    schedule = Schedule(windows=10, eta=0.02, densities=(1.0, 0.5, 0.25), delays=(0, 1, 1), interval=1)
    trace = simulate(problem, schedule)
    given = {"sigma_g_sq": 40.0, "G_sq": 900.0, "W_sq": 800.0}
    report = check_logs([parse(trace.lines())], given=given)
    L, gamma, T = problem.smoothness or 0.0, schedule.gamma, 10
    probes = [r for r in trace.records if r["type"] == "probe"]
    start = 2 * (probes[0]["loss"] - problem.infimum) / (gamma * T)
    uncovered = np.mean([p["grad_uncovered_sq"] for p in probes])
    bias = np.mean([float(d.bias @ d.bias) for d in trace.decompositions])
    assert report["expectation"].measured == pytest.approx(np.mean([p["grad_sq"] for p in probes]), rel=1e-12)
    assert report["expectation"].bound == pytest.approx(start + bias, rel=1e-12)

    arrivals: list[list[dict[str, Any]]] = [[] for _ in range(T)]
    for r in trace.records:
        if r["type"] == "arrival":
            arrivals[r["window"]].append({**r, "q": 1 - int(r["density"] * 20) / 20})
    windows = [r for r in trace.records if r["type"] == "window"]
    base = [start, uncovered]

    def total(p: float, gap: float) -> float:
        tail = 4 / 3 * L**2 * gamma**2 * 900 * p + 4 * L**2 * gamma**2 * 900 * p**2 * 1
        return sum(base) + 4 * L**2 * 800 * gap + 4 * p * 40 + tail

    phi = max(w["arrivals"] / w["gamma_min"] for w in windows)
    uniform = np.mean(
        [sum(a["q"] for a in rows) / w["gamma_min"] for rows, w in zip(arrivals, windows, strict=True)]
    )
    assert report["corollary"].bound == pytest.approx(total(phi, float(uniform)), rel=1e-9)
    shares = max(sum(a["pibar"] for a in rows) for rows in arrivals)
    weighted = np.mean([sum(a["pibar"] * a["q"] for a in rows) for rows in arrivals])
    assert report["corollary_weighted"].bound == pytest.approx(total(shares, float(weighted)), rel=1e-9)
    ordered = [sorted(a["q"] for a in rows) for rows in arrivals]
    ranked = np.mean([sum(q / i for i, q in enumerate(rows, 1)) for rows in ordered])
    assert report["corollary_nested"].bound == pytest.approx(
        total(1 + 1 / 2 + 1 / 3, float(ranked)), rel=1e-9
    )


def test_a_priori_bounds_by_hand() -> None:
    problem = Quadratic.random(np.random.default_rng(3), clients=2, size=6)
    schedule = Schedule(windows=5, eta=0.02, local_steps=3, densities=(1.0, 1.0), delays=(0, 0))
    found = check_logs([parse(simulate(problem, schedule).lines())], given={"G_sq": 1000.0})
    assert found["drift_a_priori"].bound == pytest.approx((0 + 1 + 4) / 3 * 0.02**2 * 1000)
    assert found["change_a_priori"].bound == pytest.approx((3 * 0.02) ** 2 * 1000)
    assert found["drift_a_priori"].verdict is found["change_a_priori"].verdict is Verdict.HOLDS


def test_noise_by_hand() -> None:
    problem = Quadratic.random(np.random.default_rng(3), clients=2, size=6, sigma=0.5)
    schedule = Schedule(
        windows=60, eta=0.02, local_steps=4, densities=(1.0, 0.5), delays=(0, 0), samples=(3.0, 1.0)
    )
    seeds = [parse(simulate(problem, replace(schedule, seed=seed)).lines()) for seed in range(4)]
    found = check_logs(seeds)["noise"]
    assert found.bound == pytest.approx(0.25 / 4 * (1 + 1 / 16), rel=1e-12)
    assert found.verdict is Verdict.HOLDS


def test_harmonic_numbers() -> None:
    assert harmonic(0) == 0 and harmonic(1) == 1 and harmonic(3) == pytest.approx(11 / 6)
    exact = float((1 / np.arange(1, 20_001)).sum())
    assert exact <= harmonic(20_000) <= exact + 1e-8
    assert harmonic(10_000) == pytest.approx(float((1 / np.arange(1, 10_001)).sum()), rel=1e-15)
    assert student(1) > student(2) > student(20) > student(21) > student(1000) > 2.5758


def test_i1_takes_the_longest_run_of_probes() -> None:
    problem = Quadratic.random(np.random.default_rng(3), clients=2, size=6)
    records = simulate(problem, Schedule(windows=20, densities=(1.0, 0.5), delays=(0, 1))).records
    kept = [r for r in records if r["type"] != "probe" or r["window"] in (0, 1, 5, 6, 7, 8, 12, 14, 15, 16)]
    found = check_logs([parse(map(lab.line, kept))])["telescoped"]
    assert found.verdict is Verdict.HOLDS and "windows 5 to 8" in found.reason
    probes = {r["window"]: r for r in records if r["type"] == "probe"}
    inside = [probes[t] for t in (5, 6, 7, 8)]
    assert found.measured == pytest.approx(np.mean([p["grad_sq"] for p in inside]), rel=1e-9)
    gamma = 0.05 * 2
    errors = [p["step_sq"] / gamma**2 + 2 * p["grad_dot_step"] / gamma + p["grad_sq"] for p in inside]
    by_hand = 2 * (inside[0]["loss"] - inside[-1]["loss_next"]) / (4 * gamma) + np.mean(errors)
    assert found.bound == pytest.approx(by_hand, rel=1e-9)
    pairs = [r for r in records if r["type"] != "probe" or r["window"] in (0, 2, 4)]
    assert check_logs([parse(map(lab.line, pairs))])["telescoped"].verdict is Verdict.UNDETERMINED
