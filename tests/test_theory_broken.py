"""Broken logs: each forgery is found, at the right place, by the check that should find it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from theory.check import check_logs
from theory.laboratory import Quadratic, ReluNetwork, Schedule, simulate
from theory.laboratory import records as lab
from theory.log import parse
from theory.verdict import Finding, Verdict

Records = list[dict[str, Any]]


def good(form: str = "delta") -> Records:
    problem = Quadratic.random(np.random.default_rng(0), clients=4, size=20, sigma=0.2, dense=3)
    schedule = Schedule(
        windows=16,
        form="delta" if form == "delta" else "replacement",
        densities=(1.0, 0.6, 0.3, 0.3),
        delays=(0, 0, 1, 2),
        interval=4,
        restorations=((8, 2, 0.6),),
        staleness="polynomial",
        samples=(4.0, 3.0, 2.0, 5.0),
    )
    return simulate(problem, schedule).records


def check(records: Records) -> dict[str, Finding]:
    report = check_logs([parse([lab.line(record) for record in records])])
    return {finding.name: finding for finding in report.runs[0].findings}


def first(records: Records, kind: str, **want: Any) -> dict[str, Any]:
    return next(r for r in records if r["type"] == kind and all(r[k] == v for k, v in want.items()))


def violated(records: Records) -> set[str]:
    return {name for name, finding in check(records).items() if finding.verdict is Verdict.VIOLATED}


def test_the_good_log_is_good() -> None:
    assert violated(good()) == violated(good("replacement")) == set()


def forged_density(records: Records) -> dict[str, Any]:
    target = first(records, "dispatch", client=1, version=5)
    target["density"] = 0.9
    return {"window": 5, "client": 1}


def forged_density_everywhere(records: Records) -> dict[str, Any]:
    """The forger also changes the arrival; the restorations and the support still tell."""
    target = first(records, "dispatch", client=1, version=5)
    first(records, "arrival", dispatch=target["dispatch"])["density"] = target["density"] = 0.9
    return {"window": 5, "client": 1}


def lowered_density(records: Records) -> dict[str, Any]:
    first(records, "dispatch", client=1, version=5)["density"] = 0.5
    return {"window": 5, "client": 1}


def non_nested_support(records: Records) -> dict[str, Any]:
    sparse = first(records, "dispatch", client=2, version=0)
    sparse["support"] = first(records, "dispatch", client=1, version=0)["support"] + 1
    return {}


def non_nested_mask(records: Records) -> dict[str, Any]:
    """A larger mask of the same ranking that leaves out more."""
    sparse, dense = (
        first(records, "dispatch", client=2, version=0),
        first(records, "dispatch", client=1, version=0),
    )
    for key in ("masked_norm_sq", "full_masked_norm_sq"):
        dense[key] = sparse[key] * 1.01
    return {"window": 0, "client": 1}


def staleness_off_by_one(records: Records) -> dict[str, Any]:
    target = first(records, "arrival", client=3, window=5)
    target["staleness"] += 1
    return {"window": 5, "client": 3}


def version_off_by_one(records: Records) -> dict[str, Any]:
    target = first(records, "arrival", client=3, window=5)
    target["version"] += 1
    target["staleness"] -= 1
    return {"window": 5, "client": 3}


def swapped_clients(records: Records) -> dict[str, Any]:
    a, b = first(records, "arrival", client=0, window=6), first(records, "arrival", client=1, window=6)
    a["client"], b["client"] = 1, 0
    return {"window": 6, "client": 1}


def swapped_updates(records: Records) -> dict[str, Any]:
    """Two uploads change places, dispatch and all: the weights and shares no longer fit their densities."""
    a, b = first(records, "arrival", client=0, window=6), first(records, "arrival", client=1, window=6)
    for key in ("client", "dispatch", "density", "samples"):
        a[key], b[key] = b[key], a[key]
    return {"window": 6}


def wrong_learning_rate(records: Records) -> dict[str, Any]:
    first(records, "window", window=4)["learning_rate"] *= 1.1
    return {"window": 4}


def wrong_learning_rate_everywhere(records: Records) -> dict[str, Any]:
    """Header and windows agree on a false rate; the terms records do not."""
    for record in records:
        if record["type"] == "header":
            record["eta"] *= 2
        if record["type"] == "window":
            record["learning_rate"] *= 2
    return {"window": 0}


def applied_twice(records: Records) -> dict[str, Any]:
    target = first(records, "arrival", client=0, window=3)
    position = records.index(first(records, "window", window=4))
    records.insert(position, {**target, "window": 4, "staleness": 4 - target["version"]})
    return {"window": 4, "client": 0}


def merged_before_arrival(records: Records) -> dict[str, Any]:
    first(records, "arrival", client=0, window=3)["time"] = 9.0
    return {"window": 3, "client": 0}


def unknown_dispatch(records: Records) -> dict[str, Any]:
    first(records, "arrival", client=0, window=3)["dispatch"] = 999
    return {"window": 3, "client": 0}


def lost_arrival(records: Records) -> dict[str, Any]:
    records.remove(first(records, "arrival", client=0, window=3))
    return {"window": 3}


def lost_window(records: Records) -> dict[str, Any]:
    records.remove(first(records, "window", window=7))
    return {"window": 8}


def late_dispatch(records: Records) -> dict[str, Any]:
    """A client is sent a second sub-model while the first is out."""
    target = first(records, "dispatch", client=3, version=0)
    position = records.index(first(records, "arrival", window=1))
    records.insert(position, {**target, "version": 1, "dispatch": 4})
    for record in records[position + 1 :]:
        if record["type"] in ("dispatch", "arrival") and record["dispatch"] >= 4:
            record["dispatch"] += 1
    return {"window": 1, "client": 3}


def time_runs_backwards(records: Records) -> dict[str, Any]:
    first(records, "window", window=5)["start"] = 0.0
    return {"window": 5}


def wrong_weight(records: Records) -> dict[str, Any]:
    first(records, "arrival", client=3, window=5)["weight"] = 5.0
    return {"window": 5, "client": 3}


def wrong_share(records: Records) -> dict[str, Any]:
    first(records, "arrival", client=1, window=7)["pibar"] *= 0.9
    return {"window": 7, "client": 1}


def share_above_one(records: Records) -> dict[str, Any]:
    first(records, "arrival", client=0, window=5)["pibar"] = 1.2
    return {"window": 5, "client": 0}


def too_many_holders(records: Records) -> dict[str, Any]:
    first(records, "window", window=5)["gamma_min"] = 9
    return {"window": 5}


def wrong_holders(records: Records) -> dict[str, Any]:
    first(records, "window", window=6)["gamma_min"] = 2
    return {"window": 6}


def wrong_coverage(records: Records) -> dict[str, Any]:
    first(records, "window", window=6)["coverage"] *= 0.99
    return {"window": 6}


def wrong_uncovered(records: Records) -> dict[str, Any]:
    first(records, "window", window=6)["uncovered"] = 1
    return {"window": 6}


def wrong_bytes_up(records: Records) -> dict[str, Any]:
    first(records, "window", window=6)["bytes_up"] += 8
    return {"window": 6}


def wrong_bytes_down(records: Records) -> dict[str, Any]:
    first(records, "dispatch", client=0, version=6)["bytes_down"] += 8
    return {"window": 6}


def wrong_norm(records: Records) -> dict[str, Any]:
    target = first(records, "dispatch", client=1, version=6)
    target["norm_sq"] *= 1.001
    return {"window": 6}


def model_jumps(records: Records) -> dict[str, Any]:
    """All norms of a version are 40 % too large: the model cannot have moved so far."""
    for record in records:
        if record["type"] == "dispatch" and record["version"] == 6:
            for key in ("norm_sq", "masked_norm_sq", "full_norm_sq", "full_masked_norm_sq"):
                record[key] *= 1.4
    return {"window": 6}


def dense_model_leaves_out(records: Records) -> dict[str, Any]:
    first(records, "dispatch", client=0, version=6)["masked_norm_sq"] = 0.1
    return {"window": 6, "client": 0}


def wrong_mean_density(records: Records) -> dict[str, Any]:
    first(records, "window", window=6)["mean_density"] += 0.01
    return {"window": 6}


def drift_of_one_step(records: Records) -> dict[str, Any]:
    first(records, "arrival", client=1, window=5)["steps"] = 1
    return {"window": 5, "client": 1}


def step_too_long(records: Records) -> dict[str, Any]:
    """The server moved further than its uploads: a merge that is not normalised per coordinate."""
    for kind in ("window", "probe"):
        first(records, kind, window=6)["step_sq"] *= 9
    return {"window": 6}


def probe_of_another_step(records: Records) -> dict[str, Any]:
    first(records, "probe", window=6)["step_sq"] *= 1.01
    return {"window": 6}


def impossible_slope(records: Records) -> dict[str, Any]:
    first(records, "probe", window=6)["grad_dot_step"] *= 50
    return {"window": 6}


def broken_chain(records: Records) -> dict[str, Any]:
    first(records, "probe", window=6)["loss_next"] += 0.01
    return {"window": 6}


def gaps_of_another_client(records: Records) -> dict[str, Any]:
    first(records, "probe", window=6)["client_gap_sq"][1] *= 1.1
    return {"window": 6}


def open_identity(records: Records) -> dict[str, Any]:
    first(records, "terms", window=6)["residual_sq"] = 1e-6
    return {"window": 6}


def forged_term(records: Records) -> dict[str, Any]:
    first(records, "terms", window=6)["H_sq"] *= 1.01
    return {"window": 6}


def forged_error(records: Records) -> dict[str, Any]:
    """e_sq and the Gram matrix agree with each other, but not with the probe."""
    target = first(records, "terms", window=6)
    target["gram"] = (np.array(target["gram"]) * 1.01).tolist()
    for key in ("e_sq", "b_sq", *(f"{name}_sq" for name in ("z", "D", "M", "S", "H", "U", "rho"))):
        target[key] *= 1.01
    return {"window": 6}


def forged_term_arrival(records: Records) -> dict[str, Any]:
    target = next(r for r in records if r["type"] == "terms" and r["window"] >= 4 and len(r["arrivals"]) > 2)
    target["arrivals"][1]["mask_sq"] *= 1.1
    return {"window": target["window"], "client": 1}


def mask_error_too_large(records: Records) -> dict[str, Any]:
    """A client whose own mask error exceeds L times its mask distance."""
    target = next(r for r in records if r["type"] == "terms" and len(r["arrivals"]) > 2)
    target["arrivals"][1]["M_sq"] = target["arrivals"][1]["mask_sq"] * 1.5
    return {"window": target["window"], "client": 1}


def truncated_run(records: Records) -> dict[str, Any]:
    del records[-1]
    records.remove(first(records, "window", window=15))
    return {}


FORGERIES: list[tuple[Callable[[Records], dict[str, Any]], set[str]]] = [
    (forged_density, {"matched", "restorations"}),
    (forged_density_everywhere, {"restorations", "support"}),
    (lowered_density, {"density_order"}),
    (non_nested_support, {"nested_support"}),
    (non_nested_mask, {"nested_norm"}),
    (staleness_off_by_one, {"staleness_count"}),
    (version_off_by_one, {"matched", "staleness_count"}),
    (swapped_clients, {"matched"}),
    (swapped_updates, {"nested_shares"}),
    (wrong_learning_rate, {"learning_rate"}),
    (wrong_learning_rate_everywhere, {"terms_gamma"}),
    (applied_twice, {"applied_once"}),
    (merged_before_arrival, {"causality"}),
    (unknown_dispatch, {"matched"}),
    (lost_arrival, {"counts"}),
    (lost_window, {"windows"}),
    (late_dispatch, {"one_in_flight"}),
    (time_runs_backwards, {"clock"}),
    (wrong_weight, {"weights"}),
    (wrong_share, {"nested_shares"}),
    (share_above_one, {"shares"}),
    (too_many_holders, {"fewest_holders"}),
    (wrong_holders, {"nested_holders"}),
    (wrong_coverage, {"mean_coverage"}),
    (wrong_uncovered, {"uncovered_count"}),
    (wrong_bytes_up, {"bytes_up"}),
    (wrong_bytes_down, {"bytes_down"}),
    (wrong_norm, {"norms"}),
    (model_jumps, {"norm_path"}),
    (dense_model_leaves_out, {"norms"}),
    (wrong_mean_density, {"mean_density"}),
    (drift_of_one_step, {"single_step"}),
    (step_too_long, {"update"}),
    (probe_of_another_step, {"probe_step"}),
    (impossible_slope, {"probe_cauchy"}),
    (broken_chain, {"probe_chain"}),
    (gaps_of_another_client, {"probe_clients"}),
    (open_identity, {"terms_identity"}),
    (forged_term, {"terms_gram"}),
    (forged_error, {"terms_probe"}),
    (forged_term_arrival, {"terms_arrivals"}),
    (mask_error_too_large, {"mask_lipschitz"}),
]


@pytest.mark.parametrize(("forge", "expected"), FORGERIES, ids=[forge.__name__ for forge, _ in FORGERIES])
def test_forgeries_are_found(forge: Callable[[Records], dict[str, Any]], expected: set[str]) -> None:
    records = copy.deepcopy(good())
    place = forge(records)
    found = check(records)
    assert {name for name in expected if found[name].verdict is not Verdict.VIOLATED} == set()
    for name in expected:
        witness = found[name].witness
        assert witness is not None and str(witness)
    main = found[
        sorted(expected)[0] if len(expected) == 1 else next(n for n in found if n in expected)
    ].witness
    assert main is not None
    for key, value in place.items():
        assert getattr(main, key) == value, (key, str(main))
    if main.line:
        assert 1 <= main.line <= len(records)


def test_witnesses_name_the_line() -> None:
    records = copy.deepcopy(good())
    target = first(records, "arrival", client=3, window=5)
    target["staleness"] += 1
    witness = check(records)["staleness_count"].witness
    assert witness is not None and witness.line == records.index(target) + 1
    assert (witness.lhs, witness.rhs) == (target["staleness"], target["staleness"] - 1)


def test_a_truncated_run_is_never_a_pass() -> None:
    records = copy.deepcopy(good())
    truncated_run(records)
    found = check(records)["complete"]
    assert found.verdict is Verdict.UNDETERMINED and "no `end` record" in found.reason
    lines = [lab.line(record) for record in good()]
    torn = check_logs([parse([*lines[:-1], lines[-1][:20]])])["complete"]
    assert torn.verdict is Verdict.UNDETERMINED and "cut" in torn.reason


def test_end_counts_are_checked() -> None:
    records = copy.deepcopy(good())
    records[-1]["windows"] = 99
    assert "complete" in violated(records)
    records = copy.deepcopy(good())
    records[-1]["rejected"] = 1
    assert "complete" in violated(records)


def test_a_dense_start_overrides_the_headers_densities() -> None:
    """With dense_start the header's densities are bandwidth classes, and every sub-model is whole."""
    problem = Quadratic.random(np.random.default_rng(0), clients=2, size=6)
    records = simulate(problem, Schedule(windows=3, densities=(1.0, 1.0), delays=(0, 0))).records
    records[0]["densities"] = [1.0, 0.5]
    del records[0]["config"]["density_min"]
    assert violated(records) == {"restorations", "mean_density"}
    records[0]["config"]["dense_start"] = True
    assert violated(records) == set()


def test_a_floor_lifts_the_headers_densities() -> None:
    problem = Quadratic.random(np.random.default_rng(0), clients=2, size=6)
    records = simulate(problem, Schedule(windows=3, densities=(1.0, 0.5), delays=(0, 0))).records
    records[0]["densities"] = [1.0, 0.1]
    floor = records[0]["config"].pop("density_min")
    assert {"restorations", "mean_density"} <= violated(records)
    records[0]["config"]["density_min"] = floor
    assert not {"restorations", "mean_density"} & violated(records)


def test_the_documentation_counts_right() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "theory.md").read_text(encoding="utf-8")
    laws = [f for f in check(good()).values() if f.group == "log"]
    assert f"({len(laws)} laws)" in page and f"{len(FORGERIES)} forged logs" in page


def test_a_replacement_log_read_as_delta_is_found() -> None:
    """The header says one form, the terms records the other."""
    records = copy.deepcopy(good("replacement"))
    records[0]["config"]["update_form"] = "delta"
    assert "terms_form" in violated(records)


def test_mask_error_of_a_network_with_dropped_biases_needs_the_biases() -> None:
    """Where whole rows are masked the full mask distance exceeds the prunable one; both are checked."""
    problem = ReluNetwork.random(np.random.default_rng(0), clients=3, inputs=3, hidden=6)
    schedule = Schedule(windows=6, densities=(1.0, 0.2, 0.1), delays=(0, 0, 0))
    records = simulate(problem, schedule).records
    sent = [r for r in records if r["type"] == "dispatch" and r["density"] < 1]
    assert any(r["full_masked_norm_sq"] > r["masked_norm_sq"] for r in sent)
    assert violated(records) == set()
    next(r for r in sent if r["full_masked_norm_sq"] > r["masked_norm_sq"])["full_masked_norm_sq"] = 0.0
    assert "norms" in violated(records)


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_never_crashes_the_checker(seed: int) -> None:
    """Numbers replaced at random: the checker answers, and its JSON is valid."""
    rng = np.random.default_rng(seed)
    records = copy.deepcopy(good())
    for _ in range(12):
        record = records[int(rng.integers(1, len(records) - 1))]
        keys = [k for k, v in record.items() if type(v) in (int, float)]
        if keys:
            key = keys[int(rng.integers(len(keys)))]
            record[key] = [0, -1, 1e300, -1e300, 1e-300, 7, None][int(rng.integers(6))]
    with np.errstate(all="ignore"):
        report = check_logs([parse([lab.line(record) for record in records])])
    assert report.as_dict()["runs"]
