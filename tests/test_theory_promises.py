"""Forged promises and echoes: what the header says, and what one record says after another, is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from theory.check import check_logs
from theory.laboratory import Quadratic, Schedule, simulate
from theory.laboratory import records as lab
from theory.log import parse
from theory.verdict import Finding, Verdict

Records = list[dict[str, Any]]


def good() -> Records:
    """A laboratory run as the plugin would log it: with evaluations, validations, and both configurations."""
    problem = Quadratic.random(np.random.default_rng(0), clients=4, size=20, sigma=0.2, dense=3)
    schedule = Schedule(
        windows=16, densities=(1.0, 0.5, 0.2, 0.2), delays=(0, 0, 1, 2), interval=4,
        restorations=((8, 2, 0.5), (8, 3, 0.5)), samples=(4.0, 3.0, 2.0, 5.0),
    )  # fmt: skip
    records = simulate(problem, schedule).records
    header = records[0]
    header["fedml"] = {"learning_rate": schedule.eta, "comm_round": 16, "client_num_in_total": 4}
    header["config"] |= {
        "time_budget": None, "density_ladder": [0.2, 0.5, 1.0],
        "time_floors": [0.2, 0.5, 1.0], "density_step": "ladder", "incremental_splitting": False,
    }  # fmt: skip
    for merged in (4, 8, 12, 16):
        own = {"accuracy": merged / 32, "loss": 1 / merged}
        stamp = {"window": merged, "time": float(merged), "candidate": "scaled" if merged < 12 else "global"}
        both = {"global": own, "scaled": {**own, "accuracy": merged / 64}}
        shown = both["global" if merged > 12 else "scaled"]
        windows = [r for r in records if r["type"] == "window" and r["window"] < merged]
        moved = {key: sum(r[key] for r in windows) for key in ("bytes_up", "bytes_down")}
        evaluation = {"type": "evaluation", **stamp, **both, **shown, **moved}
        evaluation["candidate"] = "global" if merged > 12 else "scaled"
        validation = {"type": "validation", **stamp, **both, "clients": [None] * 4}
        after = records.index(windows[-1]) + 1
        records[after:after] = [evaluation, validation] if merged < 16 else [evaluation]
    records[-1]["shipped"] = "global"
    header["config"] |= {"payload_rule": "support", "aggregation_seconds": 0.25, "evaluate": "validation"}
    header["model_megabytes"] = 8 * 20 / 1e6
    return records


def check(records: Records) -> dict[str, Finding]:
    return {f.name: f for f in check_logs([parse([lab.line(r) for r in records])]).runs[0].findings}


def violated(records: Records) -> set[str]:
    return {name for name, finding in check(records).items() if finding.verdict is Verdict.VIOLATED}


def first(records: Records, kind: str, **want: Any) -> dict[str, Any]:
    return next(r for r in records if r["type"] == kind and all(r[k] == v for k, v in want.items()))


def test_the_good_log_keeps_every_promise() -> None:
    found = check(good())
    assert {name for name, finding in found.items() if finding.verdict is Verdict.VIOLATED} == set()
    for name in {name for _, name in FORGERIES}:
        assert found[name].verdict is Verdict.HOLDS, name


def put(kind: str, key: str, value: Any, **where: Any) -> Callable[[Records], None]:
    """Forges one value; a function of the old one, or a constant."""

    def forge(records: Records) -> None:
        target = first(records, kind, **where)
        *outer, last = key.split(".")
        for part in outer:
            target = target[part]
        target[last] = value(target[last]) if callable(value) else value

    return forge


def cut(*, adjusted: bool, reason: str = "windows", time: float = 12.0) -> Callable[[Records], None]:
    """The last four windows are taken out, and `end` says so, or agrees with it."""

    def forge(records: Records) -> None:
        end = records[-1]
        records[:] = [*records[: records.index(first(records, "window", window=11)) + 3], end]
        end |= {"windows": 12 if adjusted else 16, "reason": reason, "time": time, "shipped": "scaled"}

    return forge


def scaled_layers(records: Records) -> None:
    records[0]["layout"]["layers"][0]["size"] += 1
    records[0]["layout"]["layers"][1]["size"] -= 1


def late_budget(records: Records) -> None:
    """The header promises that the run stops at 9.5 s; it went on to 16 s."""
    records[0]["time_budget"] = records[0]["config"]["time_budget"] = 9.5


def unpromised_budget(records: Records) -> None:
    records[0]["time_budget"] = 100.0


def epochs(records: Records) -> None:
    records[0]["config"]["local_steps"] = "epochs"


def other_ranking(records: Records) -> None:
    """A dispatch gets a ranking of its own, and with it leaves every comparison of nested masks."""
    first(records, "dispatch", client=1, version=5)["ranking"] = "0123456789abcdef"


def earlier_restoration(records: Records) -> None:
    """A false `before` beside a mean density that was forged to fit."""
    first(records, "restoration", client=2)["before"] = 0.3
    for record in records:
        if record["type"] == "window" and record["window"] >= 8:
            record["mean_density"] -= 0.1 / 4


def fixed_model(records: Records) -> None:
    """Options that ship the scaled model, and no validation that could have chosen another."""
    records[0]["config"]["evaluate"] = "coverage_scaled"
    records[:] = [record for record in records if record["type"] != "validation"]


def two_floors(records: Records) -> None:
    first(records, "restoration", client=2)["floor"] = 0.2


def fewer_bytes(records: Records) -> None:
    """An upload's bytes, and every sum that they enter."""
    first(records, "arrival", window=5, client=1)["bytes_up"] -= 8
    first(records, "window", window=5)["bytes_up"] -= 8
    for record in records:
        if record["type"] == "evaluation" and record["window"] > 5:
            record["bytes_up"] -= 8


FORGERIES: list[tuple[Callable[[Records], None], str]] = [
    (cut(adjusted=True), "planned_end"),
    (cut(adjusted=True, reason="time_budget"), "planned_end"),
    (cut(adjusted=True, reason="bored"), "planned_end"),
    (cut(adjusted=False), "complete"),
    (put("end", "time", 15.0), "planned_end"),
    (put("header", "windows", 12), "planned_end"),
    (put("header", "windows", 12), "header"),
    (late_budget, "planned_end"),
    (unpromised_budget, "header"),
    (put("header", "layout.prunable", 16), "layout"),
    (put("header", "layout.size", 21), "layout"),
    (scaled_layers, "layout"),
    (put("header", "layout.layers", lambda old: [{**old[0], "shape": [2, 2]}, old[1]]), "layout"),
    (put("header", "local_steps", 3), "local_steps"),
    (put("header", "local_steps", 3), "header"),
    (epochs, "header"),
    (put("header", "fedml.learning_rate", 0.1), "header"),
    (put("header", "fedml.client_num_in_total", 5), "header"),
    (put("arrival", "steps", 6, window=5, client=1), "local_steps"),
    (put("header", "config.trigger", "none"), "trigger"),
    (put("header", "config.trigger", "plateau"), "trigger"),
    (put("restoration", "cause", "gradient"), "trigger"),
    (put("restoration", "client", 4), "trigger"),
    (earlier_restoration, "restored_densities"),
    (put("restoration", "after", 0.4), "restored_densities"),
    (put("restoration", "floor", 0.2, client=3), "density_floor"),
    (put("window", "density_floor", 0.3, window=3), "density_floor"),
    (put("window", "density_floor", 0.1, window=15), "density_floor"),
    (put("header", "config.density_min", 0.05), "density_floor"),
    (put("window", "in_flight", 3, window=6), "in_flight"),
    (put("window", "in_flight", 0, window=6), "in_flight"),
    (put("window", "in_flight", 5, window=6), "in_flight"),
    (put("probe", "noise_sq", -1, window=6), "ranges"),
    (put("probe", "client_gap_sq", lambda old: [*old[:3], -1.0], window=6), "ranges"),
    (put("dispatch", "bytes_down", -8.0, version=6), "ranges"),
    (put("evaluation", "global.accuracy", 1.5, window=8), "ranges"),
    (put("terms", "scale_sq", -1.0, window=6), "ranges"),
    (other_ranking, "one_ranking"),
    (put("dispatch", "time", 6.5, version=6, client=0), "clock"),
    (put("dispatch", "time", 7.5, version=6, client=3), "stamps"),
    (put("evaluation", "time", 6.0, window=8), "stamps"),
    (put("evaluation", "window", 40, window=8), "stamps"),
    (put("validation", "time", 9.0, window=8), "stamps"),
    (put("restoration", "time", 7.0), "stamps"),
    (put("window", "server_bytes_down", 8.0, window=6), "server_bytes"),
    (put("header", "config.incremental_splitting", True), "server_bytes"),
    (put("evaluation", "bytes_up", lambda old: old / 2, window=8), "evaluated_bytes"),
    (put("evaluation", "bytes_down", lambda old: old - 8, window=12), "evaluated_bytes"),
    (put("evaluation", "accuracy", 0.9, window=16), "evaluated_metrics"),
    (put("evaluation", "loss", 0.0, window=4), "evaluated_metrics"),
    (put("evaluation", "candidate", "scaled", window=16), "candidates"),
    (put("end", "shipped", "scaled"), "candidates"),
    (fixed_model, "candidates"),
    (two_floors, "density_floor"),
    (fewer_bytes, "payload"),
    (put("header", "model_megabytes", 1.0), "payload"),
    (put("window", "close", 6.7, window=6), "clock"),
    (
        put("terms", "arrivals", lambda old: [{**old[0], "gap_sq": old[0]["gap_sq"] * 1.01}, *old[1:]]),
        "terms_arrivals",
    ),
    (put("terms", "grad_dot", lambda old: [old[0] + 0.01, *old[1:]], window=6), "terms_probe"),
]


@pytest.mark.parametrize("number", range(len(FORGERIES)))
def test_forged_promises_are_found(number: int) -> None:
    forge, law = FORGERIES[number]
    records = good()
    forge(records)
    found = check(records)[law]
    assert found.verdict is Verdict.VIOLATED, found
    assert found.witness is not None and str(found.witness)
    assert 1 <= found.witness.line <= len(records)


def test_a_run_may_end_by_its_time_budget() -> None:
    """At the first window that ends beyond it, with fewer windows than planned."""
    records = good()
    cut(adjusted=True, reason="time_budget")(records)
    records[0]["time_budget"] = records[0]["config"]["time_budget"] = 11.5
    assert violated(records) == set()
    records[-1]["reason"] = "windows"
    assert violated(records) == {"planned_end"}
    del records[-1]["reason"]
    assert violated(records) == set()
    records[-1]["time"] = 11.5
    assert violated(records) == {"planned_end"}


def test_a_run_without_end_may_still_go_on_too_long() -> None:
    records = good()[:-1]
    assert check(records)["planned_end"].verdict is Verdict.UNDETERMINED
    late_budget(records)
    witness = check(records)["planned_end"].witness
    assert witness is not None and witness.window == 10 and (witness.lhs, witness.rhs) == (11.0, 9.5)


def test_whole_epochs_promise_no_number_of_steps() -> None:
    records = good()
    records[0]["local_steps"], records[0]["config"]["local_steps"] = None, "epochs"
    first(records, "arrival", window=5, client=1)["steps"] = 6
    found = check(records)
    assert found["local_steps"].verdict is Verdict.UNDETERMINED and "header" not in violated(records)


def test_a_trainer_of_its_own_promises_no_number_of_steps() -> None:
    records = good()
    records[0]["local_steps"] = None
    first(records, "arrival", window=5, client=1)["steps"] = 6
    assert not {"local_steps", "header"} & violated(records)


@pytest.mark.parametrize(
    ("kind", "dtype", "size", "holds"),
    [
        ("model", "float32", 26.0, True),
        ("bfloat16", "float32", 13.0, True),
        ("float16", "float64", 6.5, True),
        ("float16", "float32", 26.0, False),
        ("model", "float32", 13.0, False),
    ],
)
def test_narrow_values_travel_in_fewer_megabytes(kind: str, dtype: str, size: float, holds: bool) -> None:
    records = good()
    records[0]["config"] |= {"model_megabytes": 26.0, "payload_dtype": kind}
    records[0]["layout"]["dtype"], records[0]["model_megabytes"] = dtype, size
    assert ("header" not in violated(records)) == holds


def test_uploads_that_were_refused_cost_bytes_too() -> None:
    """The window's bytes hold them, the arrivals do not."""
    records = good()
    window = first(records, "window", window=6)
    window["bytes_up"] += 80
    for record in records:
        if record["type"] == "evaluation" and record["window"] > 6:
            record["bytes_up"] += 80
    assert violated(records) == {"bytes_up"}
    refused = {
        "type": "rejected",
        "window": 6,
        "dispatch": 99,
        "client": 1,
        "code": "GMR-403",
        "message": "nan",
    }
    records.insert(records.index(window), refused)
    records[-1]["rejected"] = 1
    assert violated(records) == set()
    window["bytes_up"] -= 160
    assert "bytes_up" in violated(records)


def test_a_lost_sub_model_leaves_room() -> None:
    """It is in flight until its client is sent the next; no record says when it was lost."""
    records = good()
    lost = first(records, "arrival", client=3, window=5)
    for record in records:
        if record["type"] == "arrival" and record["dispatch"] == lost["dispatch"]:
            found = check([r for r in records if r is not record])
    assert found["in_flight"].verdict is Verdict.HOLDS


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({"density_step": "ladder", "density_ladder": [0.1, 0.3, 1.0]}, 0.1, 0.3),
        ({"density_step": "ladder", "density_ladder": [0.1, 0.3, 1.0]}, 0.3, 1.0),
        ({"density_step": "fixed", "density_increment": 0.25}, 0.2, 0.45),
        ({"density_step": "fixed", "density_increment": 0.25}, 0.9, 1.0),
        ({"density_step": "proportional", "density_increment": 0.1}, 0.1, 0.2),
        ({"density_step": "proportional", "density_increment": 0.1}, 0.5, 0.7),
    ],
)
def test_a_client_rises_by_one_step(options: dict[str, Any], before: float, after: float) -> None:
    header = {"type": "header", "schema": "1.0", "clients": 1, "densities": [before]}
    rise = {"type": "restoration", "window": 1, "client": 0, "cause": "client_plateau", "before": before}
    for value, verdict in ((after, Verdict.HOLDS), ((before + after) / 2, Verdict.VIOLATED)):
        records = [{**header, "config": {"trigger": "plateau", **options}}, {**rise, "after": value}]
        assert check(records)["restored_densities"].verdict is verdict


def test_the_documentation_counts_right() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "theory.md").read_text(encoding="utf-8")
    assert f"{len(FORGERIES)} forged promises" in page
