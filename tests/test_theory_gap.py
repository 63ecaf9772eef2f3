"""The density gap against hand-made sums, its counterfactual, and its price."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from theory.gap import DensityGap, density_gap
from theory.laboratory import Quadratic, Schedule, Trace, simulate
from theory.log import parse
from theory.plot import Line, chart
from theory.strategies import runs

GMR = Schedule(
    windows=24,
    densities=(1.0, 0.5, 0.25, 0.25),
    delays=(0, 0, 1, 1),
    delay_grows=True,
    interval=4,
    restorations=((8, 2, 0.5), (8, 3, 0.5), (16, 1, 1.0), (16, 2, 1.0), (16, 3, 1.0)),
)


def run(schedule: Schedule = GMR) -> tuple[Trace, DensityGap]:
    problem = Quadratic.random(np.random.default_rng(0), clients=4, size=16, sigma=0.1, dense=2)
    trace = simulate(problem, schedule)
    return trace, density_gap(parse(trace.lines()))


def test_series_against_sums_by_hand() -> None:
    trace, gap = run()
    sent = {r["dispatch"]: r for r in trace.records if r["type"] == "dispatch"}
    for t in (0, 5, 9, 17):
        rows = [r for r in trace.records if r["type"] == "arrival" and r["window"] == t]
        dispatches = [sent[r["dispatch"]] for r in rows]
        pibar = [r["pibar"] for r in rows]
        q = [1 - int(d["density"] * 14) / 14 for d in dispatches]
        q0 = [1 - int(GMR.densities[r["client"]] * 14) / 14 for r in rows]
        norm = [d["norm_sq"] for d in dispatches]
        left = [d["full_masked_norm_sq"] for d in dispatches]
        assert gap.distance[t] == pytest.approx(np.dot(pibar, left), rel=1e-12)
        assert gap.gap[t] == pytest.approx(sum(np.multiply(np.multiply(pibar, q), norm)), rel=1e-12)
        assert gap.frozen[t] == pytest.approx(sum(np.multiply(np.multiply(pibar, q0), norm)), rel=1e-12)
        assert gap.average[t] == pytest.approx(np.mean(q), rel=1e-12)
        assert gap.average_frozen[t] == pytest.approx(np.mean(q0), rel=1e-12)
        assert gap.staleness[t] == pytest.approx(np.mean([r["staleness"] for r in rows]), rel=1e-12)
        assert gap.arrivals[t] == len(rows)
        found = trace.decompositions[t]
        whole = sum(float(v @ v) for v in found.terms.values())
        assert gap.mask_error[t] == pytest.approx(float(found.M @ found.M), rel=1e-12)
        assert gap.mask_share[t] == pytest.approx(float(found.M @ found.M) / whole, rel=1e-9)


@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_shares_of_the_error_against_sums_by_hand(form: str) -> None:
    """Every window, small errors included; windows without arrivals have no gap."""
    late = replace(GMR, form="delta" if form == "delta" else "replacement", delays=(2, 1, 3, 2), eta=0.02)
    problem = Quadratic.random(
        np.random.default_rng(0), clients=4, size=16, smoothness=0.2, spread=0.1, dense=2
    )
    trace = simulate(problem, late)
    gap = density_gap(parse(trace.lines()))
    steps = [r["step_sq"] for r in trace.records if r["type"] == "window"]
    assert (
        gap.arrivals[0] == 0
        and np.isnan(gap.gap[0])
        and np.isnan(gap.average[0])
        and np.isnan(gap.staleness[0])
    )
    small = 0
    for t, found in enumerate(trace.decompositions):
        squares = {name: float(v @ v) for name, v in found.terms.items()}
        whole = sum(v for name, v in squares.items() if name != "rho") + squares["rho"] / found.gamma**2
        small += whole < 1
        assert gap.mask_share[t] == pytest.approx(squares["M"] / whole, rel=1e-9)
        rows = [r for r in trace.records if r["type"] == "arrival" and r["window"] == t]
        if not rows:
            continue
        parts = [0.0, 0.0, 0.0]
        for r, part in zip(rows, found.parts, strict=True):
            path = sum(steps[r["version"] : t])
            parts[0] += part["pibar"] * part["mask_sq"]
            parts[1] += part["pibar"] * part["drift_sq"]
            parts[2] += part["pibar"] * r["staleness"] * path
        assert gap.distance_share[t] == pytest.approx(parts[0] / sum(parts), rel=1e-9)
        assert gap.staleness[t] == pytest.approx(np.mean([r["staleness"] for r in rows]))
    assert small > 2 and any(len(d.parts) == 1 for d in trace.decompositions)
    assert np.nanmax(gap.staleness) >= 2


def test_a_dense_run_has_no_gap_to_save() -> None:
    _, gap = run(replace(GMR, densities=(1.0,) * 4, restorations=()))
    assert gap.saving is None and gap.total("gap") == 0.0
    tiny = replace(GMR, restorations=((8, 2, 0.5),))
    problem = Quadratic.random(np.random.default_rng(0), clients=4, size=16, sigma=0.0, dense=2)
    small = replace(problem, start=1e-3 * problem.start, centre_ND=1e-3 * problem.centre_ND)
    found = density_gap(parse(simulate(small, tiny).lines()))
    assert float(np.nansum(found.frozen)) < 1 and found.saving is not None and 0 < found.saving < 1


def test_restoration_closes_the_gap_and_costs_staleness() -> None:
    _, gap = run()
    assert np.nanmax(gap.gap[20:]) == 0.0 and np.nanmin(gap.frozen) > 0
    assert gap.saving is not None and 0.1 < gap.saving < 1
    by_density = {entry.density: entry for entry in gap.price}
    sparse, full = by_density[0.25], by_density[1.0]
    assert sparse.staleness == 1 and sparse.restored == 0 and sparse.restored_staleness is None
    assert by_density[0.5].restored_staleness == 2.0
    assert full.restored_staleness is not None and full.restored_staleness > full.staleness
    assert sum(entry.arrivals for entry in gap.price) == np.nansum(gap.arrivals)


def test_frozen_densities_save_nothing() -> None:
    _, gap = run(replace(GMR, restorations=()))
    assert gap.saving == 0.0
    assert np.array_equal(gap.gap, gap.frozen, equal_nan=True)
    assert np.allclose(
        gap.frozen_reshared[~np.isnan(gap.frozen_reshared)], gap.gap[~np.isnan(gap.frozen_reshared)]
    )


def test_the_gap_can_exceed_its_reshared_counterfactual() -> None:
    """Three equal clients, one restored to .5: with their own shares the frozen masks do better."""
    problem = Quadratic.random(np.random.default_rng(0), clients=3, size=40)
    schedule = Schedule(
        windows=4, densities=(0.05,) * 3, delays=(0, 0, 0), restorations=((2, 0, 0.5),), interval=1, eta=0.001
    )
    gap = density_gap(parse(simulate(problem, schedule).lines()))
    assert gap.gap[3] > gap.frozen_reshared[3]
    assert gap.gap[3] <= gap.frozen[3] and gap.average[3] < gap.average_frozen[3]


@settings(max_examples=200)
@given(runs())
def test_laws(drawn: tuple[Quadratic, Schedule]) -> None:
    """gap <= frozen and average <= average_frozen in every window, 0 where every arrival is dense."""
    problem, schedule = drawn
    trace = simulate(problem, schedule)
    gap = density_gap(parse(trace.lines()))
    known = ~np.isnan(gap.gap)
    assert np.all(gap.gap[known] <= gap.frozen[known] * (1 + 1e-12))
    assert np.all(gap.average[known] <= gap.average_frozen[known] + 1e-12)
    for t in np.flatnonzero(known):
        rows = [r for r in trace.records if r["type"] == "arrival" and r["window"] == t]
        if all(r["density"] == 1 for r in rows):
            assert gap.gap[t] == gap.distance[t] == 0
    if schedule.interval == 1 and not problem.dense:
        assert np.all(gap.distance[known] <= gap.gap[known] * (1 + 1e-12) + 1e-12)


def test_without_shares_equal_ones_are_used_and_said() -> None:
    problem = Quadratic.random(np.random.default_rng(0), clients=4, size=16)
    lines = [line.replace(b'"pibar"', b'"other"') for line in simulate(problem, GMR).lines()]
    gap = density_gap(parse(lines))
    assert not gap.shares_logged and gap.total("gap") is not None


def test_json_and_charts() -> None:
    _, gap = run()
    data = json.loads(json.dumps(gap.as_dict(), allow_nan=False))
    assert set(data["totals"]) >= {"gap", "frozen", "distance"} and len(data["series"]["window"]) == 24
    assert "series" not in gap.as_dict(series=False)


def test_charts_are_well_formed_svg() -> None:
    from xml.etree import ElementTree

    x = np.arange(5000.0)
    y = np.sin(x / 50) + 2
    y[100:200] = np.nan
    svg = chart(
        "a <title> & more", [Line("one", x, y), Line("two", x, y / 2, True)], x_label="x", y_label="y"
    )
    root = ElementTree.fromstring(svg)
    lines = [e for e in root if e.tag.endswith("polyline")]
    assert len(lines) == 4 and all(len(e.attrib["points"].split()) <= 600 for e in lines)
    xs = [float(p.split(",")[0]) for e in lines for p in e.attrib["points"].split()]
    assert min(xs) >= 64 and max(xs) <= 720
    assert chart("empty", [Line("none", x, np.full(5000, np.nan))], x_label="", y_label="") == ""
    flat = chart("flat", [Line("c", x[:3], np.full(3, 2.0))], x_label="", y_label="", log_y=True)
    assert ElementTree.fromstring(flat) is not None
