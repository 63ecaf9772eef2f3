"""Runs that differ only in their seed: groups, intervals, comparisons, and the tables for papers."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedgmr_plugin.cli import main
from fedgmr_plugin.protocol import RunLog, RunLogWriter, read_run
from fedgmr_plugin.report import export, layers, raster, render, tabulate, text, verdicts
from fedgmr_plugin.report.families import panels
from fedgmr_plugin.report.figures import Figures
from fedgmr_plugin.report.groups import between, grouped, stem
from fedgmr_plugin.report.results import compare

HOSTILE = "</title><script>alert('x')</script>\"'&\u202e\0 \\input{x} 100% $a_b^c~# onload=x"


def header(name: str, seed: int, **changes: Any) -> dict[str, Any]:
    record = {
        "type": "header",
        "schema": "1.1",
        "method": "fedgmr",
        "run_name": name,
        "seed": seed,
        "config": {"trigger": "time", "run_name": name, "output_dir": f"out/{name}"},
        "fedml": {"learning_rate": 0.1, "random_seed": seed},
        "versions": {"fedgmr": "0.1.0"},
        "clients": 3,
        "client_samples": [100, 200 + seed, 300 - seed],
        "densities": [1.0, 0.5, 0.5],
        "layout": {"size": 10, "prunable": 8, "dtype": "float32", "layers": []},
        "model_megabytes": 4.0,
        "eta": 0.1,
        "local_steps": 5,
        "windows": 4,
        "time_budget": None,
    }
    return {**record, **changes}


def arrival(window: int, client: int, staleness: int, time: float) -> dict[str, Any]:
    known = {"window": window, "dispatch": 0, "client": client, "version": window - staleness}
    numbers = {"staleness": staleness, "density": 0.5, "time": time, "bytes_up": 1e6, "samples": 10}
    rest = {"weight": 1.0, "pibar": None, "drift_sq": None, "change_sq": 0.0, "steps": 5, "train_loss": None}
    return {"type": "arrival", **known, **numbers, **rest}


def window(number: int, end: float, uncovered: int = 0) -> dict[str, Any]:
    times = {"window": number, "start": end - 10, "close": end - 0.5, "end": end}
    counts = {"arrivals": 1, "gamma_min": 1, "uncovered": uncovered, "coverage": 0.5, "step_sq": 0.1}
    rest = {"in_flight": 0, "mean_density": 0.5, "density_floor": 0.02}
    sent = {"bytes_up": 3e6, "bytes_down": 5e6, "server_bytes_down": 5e6, "learning_rate": 0.1}
    return {"type": "window", **times, **counts, **rest, **sent}


def evaluation(number: int, time: float, accuracy: float | None) -> dict[str, Any]:
    both = {"accuracy": accuracy, "loss": 1.0}
    known = {"window": number, "time": time, "candidate": "global", **both, "global": both, "scaled": both}
    sent = {"bytes_up": number * 3e6, "bytes_down": number * 5e6}
    return {"type": "evaluation", **known, "samples": 100, **sent, "metrics": {}}


def records(
    name: str, seed: int, accuracies: Sequence[float | None], shift: float = 0.0, **changes: Any
) -> list[dict[str, Any]]:
    """A run that is evaluated every ten seconds, `shift` later."""
    found = [header(name, seed, **changes)]
    for number, accuracy in enumerate(accuracies):
        time = 10.0 * (number + 1) + shift
        found += [arrival(number, number % 3, number % 2, time - 1), window(number, time)]
        found.append(evaluation(number + 1, time, accuracy))
    known = {"windows": len(accuracies), "time": 10.0 * len(accuracies) + shift, "reason": "windows"}
    rest = {"model_sha256": f"{seed:064x}", "shipped": "global", "wall_seconds": 1.0, "rejected": 0}
    return [*found, {"type": "end", **known, **rest}]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Any]:
    """Writes a run as `records` does and reads it."""
    count = iter(range(1000))

    def make(*given: Any, **changes: Any) -> RunLog:
        path = tmp_path / f"{next(count)}" / "run.jsonl"
        with RunLogWriter(path) as writer:
            for record in records(*given, **changes):
                writer.write(record)
        return read_run(path)

    yield make


NONE = {"config": {"trigger": "none", "run_name": "x"}}


@pytest.fixture
def two(log: Any) -> list[RunLog]:
    """Two configurations, three seeds each; ours is better by 0.2, 0.21 and 0.22 at the end."""
    ours = [log(f"ours-{seed}", seed, [0.3, 0.5 + seed / 100, 0.7 + 0.02 * seed]) for seed in (1, 2, 3)]
    theirs = [log(f"base_s{seed}", seed, [0.2, 0.3, 0.5 + 0.01 * seed], **NONE) for seed in (3, 1, 2)]
    return [ours[0], theirs[0], *ours[1:], *theirs[1:]]


# -- groups ----------------------------------------------------------------------------------------


def test_runs_that_differ_only_in_the_seed_are_one_group(two: list[RunLog]) -> None:
    ours, base = grouped(two)
    assert (ours.label, base.label) == ("ours", "base")
    assert [run.run.name for run in ours.runs] == ["ours-1", "ours-2", "ours-3"]
    assert list(base.by_seed) == [1, 2, 3]
    assert between([ours, base]) == ["trigger"]
    assert {(run.colour, run.dash) for run in ours.runs} == {(ours.colour, ours.dash)}
    assert (ours.colour, ours.dash) != (base.colour, base.dash)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"trigger": "none"}},
        {"fedml": {"learning_rate": 0.2}},
        {"method": "other"},
        {"eta": 0.2},
        {"clients": 4},
        {"windows": 5},
        {"time_budget": 30.0},
        {"layout": {"size": 11, "prunable": 8, "dtype": "float32", "layers": []}},
    ],
)
def test_everything_else_parts_them(log: Any, changes: dict[str, Any]) -> None:
    assert len(grouped([log("a-1", 1, [0.5]), log("a-2", 2, [0.5], **changes)])) == 2


def test_where_a_run_writes_and_how_it_is_carried_out_part_nobody(log: Any) -> None:
    config = {"trigger": "time", "output_dir": "elsewhere", "workers": 4, "progress": False}
    other = log("a-2", 2, [0.5], config=config, versions={"fedgmr": "0.2.0"}, densities=[0.5, 0.5, 1.0])
    (group,) = grouped([log("a-1", 1, [0.5]), other])
    assert not group.alone
    assert "are one group although their versions or devices differ" in render(
        [run.run for run in group.runs], "x"
    )


def test_a_seed_that_comes_twice_starts_a_group_of_its_own(log: Any) -> None:
    """The script may differ where the options do not: then names tell."""
    runs = [log(name, seed, [0.5]) for name in ("mine", "yours") for seed in (1, 2)]
    labels = [(group.label, len(group.runs)) for group in grouped(runs)]
    assert labels == [("mine", 2), ("yours", 2)]
    again = grouped([log("run", 1, [0.5]), log("run", 1, [0.5]), log("run", 2, [0.5])])
    assert [[run.run.header["seed"] for run in group.runs] for group in again] == [[1, 2], [1]]
    assert len({group.label for group in again}) == 2


def test_groups_of_one_name_are_named_by_what_differs(log: Any) -> None:
    runs = [
        log(f"run-00{i}", i % 2, [0.5], config={"trigger": t}) for i, t in enumerate(["time", "none"] * 2)
    ]
    runs = [
        log(f"run-00{number}", seed, [0.5], config={"trigger": trigger})
        for number, (trigger, seed) in enumerate([("time", 1), ("time", 2), ("none", 1), ("none", 2)])
    ]
    assert [group.label for group in grouped(runs)] == ["trigger=time", "trigger=none"]


@pytest.mark.parametrize(
    ("name", "seed", "short"),
    [
        ("fedgmr-3", 3, "fedgmr"),
        ("fedgmr_seed3", 3, "fedgmr"),
        ("fedgmr-seed=3", 3, "fedgmr"),
        ("fedgmr.s3", 3, "fedgmr"),
        ("run-003", 3, "run"),
        ("run-13", 3, "run-13"),
        ("fedgmr-3", 4, "fedgmr-3"),
        ("methods3", 3, "methods"),
        ("3", 3, "3"),
        ("a-0", 0, "a"),
        ("a--1", -1, "a"),
        ("(?", 1, "(?"),
    ],
)
def test_a_name_s_stem(name: str, seed: int, short: str) -> None:
    assert stem(name, seed) == short


# -- numbers ---------------------------------------------------------------------------------------


def test_seconds_of_a_live_run_are_not_called_virtual(log: Any, two: list[RunLog]) -> None:
    kinds = ("cross_device", "cross_silo")
    live = [log(kind, 1, [0.5, 0.6], fedml={"training_type": kind}, time_budget=40.0) for kind in kinds]
    shown = render(live, "live") + export.to_latex(*tabulate(live)[:2])
    assert "virtual" not in shown.lower()
    for wanted in ("wall seconds since the run began", "40 wall seconds planned", "wall time (s)"):
        assert wanted in shown
    assert "Wall seconds and MB" in shown
    assert "wall" not in render(two, "simulated") and "virtual seconds" in render(two, "simulated")
    assert "wall seconds of runs with real devices" in render([*two, *live], "both")


def test_the_table_is_what_numpy_and_scipy_say(two: list[RunLog]) -> None:
    table = tabulate(two, target=0.51)
    ours, base = table.rows
    final = np.array([0.72, 0.74, 0.76])
    assert ours.accuracy.value == pytest.approx(final.mean())
    assert ours.accuracy.half == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(final))
    assert (ours.seconds, ours.megabytes, ours.reached) == (20.0, 16.0, 3)
    assert (base.seconds, base.megabytes, base.reached) == (30.0, 24.0, 3)
    assert ours.staleness.value == pytest.approx(1 / 3) and ours.traffic == 24.0
    assert table.comparisons is not None and table.comparisons.reference == 0
    found = table.comparisons.others[1]
    assert table.comparisons.others[0] is None and found is not None
    test = stats.ttest_rel(np.array([0.51, 0.52, 0.53]), final)
    assert found.difference.value == pytest.approx(-0.22)
    assert (found.difference.n, found.p) == (3, pytest.approx(test.pvalue))
    assert found.verdict == "worse"


def test_the_time_to_a_target_that_some_seeds_miss(two: list[RunLog]) -> None:
    ours, base = tabulate(two, target=0.73).rows
    assert (ours.seconds, ours.reached) == (30.0, 2)
    assert (base.seconds, base.reached) == (math.inf, 0)
    assert ">in 1 of 3 seeds</td>" in render(two, "x", target=0.75)
    page = render(two, "x", target=0.73).replace(text.THIN, " ")
    assert "30.0 s <small>(2 of 3)</small>" in page and ">not reached</td>" in page


def test_an_accuracy_may_be_the_mean_of_the_last_evaluations(two: list[RunLog]) -> None:
    ours, base = tabulate(two, last=2).rows
    assert ours.accuracy.value == pytest.approx(np.mean([0.51, 0.72, 0.52, 0.74, 0.53, 0.76]))
    assert base.accuracy.value == pytest.approx(np.mean([0.3, 0.51, 0.3, 0.52, 0.3, 0.53]))
    assert tabulate(two, last=99).rows[0].accuracy.value < ours.accuracy.value
    assert "means of the last 2 evaluations" in render(two, "x", last=2)
    assert "mean of 2 evaluations" in export.to_latex(*tabulate(two, last=2))


def test_against_a_named_group(two: list[RunLog]) -> None:
    rows = tabulate(two).rows
    for name in ("base", "base_s2"):
        found = compare(rows, name)
        assert found is not None and found.reference == 1 and found.chosen
        assert found.others[0] is not None and found.others[0].verdict == "better"
    with pytest.raises(ValueError, match="no group; there are ours, base"):
        compare(rows, "bas")
    page = render(two, "x", against="base")
    assert "Accuracy against <bdi>base</bdi>, paired by seed" in page and "as asked for" in page
    assert "Better than <bdi>base</bdi>, seed by seed: <bdi>ours</bdi>." in page


def test_several_comparisons_are_corrected(log: Any, two: list[RunLog]) -> None:
    third = [log(f"third-{s}", s, [0.2, 0.3, 0.5 + 0.02 * s], config={"trigger": "mixed"}) for s in (1, 2, 3)]
    found = tabulate([*two, *third]).comparisons
    assert found is not None
    p = [one.difference.p for one in found.others if one is not None]
    assert max(one.p for one in found.others if one is not None) == pytest.approx(max(max(p), 2 * min(p)))
    assert "corrected for 2 comparisons after Holm" in render([*two, *third], "x")


def test_too_few_seeds_say_so(log: Any, two: list[RunLog]) -> None:
    few = [run for run in two if run.header["seed"] != 3]
    found = tabulate(few).comparisons
    assert found is not None and found.others[1] is not None
    assert found.others[1].verdict == "not enough seeds to tell"
    assert "not enough seeds to tell" in render(few, "x")
    unpaired = tabulate([two[0], two[2], log("other-9", 9, [0.1], **NONE)]).comparisons
    assert unpaired is not None and unpaired.others[1] is not None
    assert (unpaired.others[1].difference.n, unpaired.others[1].verdict) == (0, "not enough seeds to tell")
    render([two[0], two[2], log("other-9", 9, [0.1], **NONE)], "x")


def test_single_runs_are_compared_only_if_asked(two: list[RunLog]) -> None:
    singles = two[:2]
    assert tabulate(singles).comparisons is None
    assert tabulate(singles, against="base_s3").comparisons is not None
    assert "paired by seed" not in render(singles, "x")
    assert tabulate(two[:1], against="ours-1").comparisons is None


def test_groups_without_an_accuracy(log: Any) -> None:
    runs = [log(f"a-{seed}", seed, [None, None]) for seed in (1, 2)]
    table = tabulate(runs)
    assert math.isnan(table.rows[0].accuracy.value) and table.comparisons is None
    assert "Loss against virtual time" in render(runs, "x")
    export.to_csv(*table), export.to_latex(*table)


# -- the page --------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag


def test_the_page_shows_means_bands_and_every_seed(two: list[RunLog]) -> None:
    page = render(two, "x")
    figure = Figures(grouped(two)).metric_by_time()
    assert figure.count('class="b s') == 2
    assert figure.count('stroke-width="0.9"') == 6
    assert "95 % interval of the mean, Student’s t" in figure and "3 seeds)" in figure
    assert "Every configuration over its seeds" in page
    assert "Keys that differ between the configurations" in page
    assert page == render([read_run(run.path) for run in two], "x")


def test_two_seeds_have_a_mean_without_a_band(two: list[RunLog]) -> None:
    few = [run for run in two if run.header["seed"] != 3]
    figure = Figures(grouped(few)).metric_by_time()
    assert 'class="b s' not in figure and "Band" not in figure


def test_seeds_that_were_evaluated_at_other_times_are_interpolated(log: Any) -> None:
    runs = [log(f"a-{seed}", seed, [0.2, 0.4, 0.6], shift=2.0 * seed) for seed in range(3)]
    figure = Figures(grouped(runs)).metric_by_time()
    notes = re.findall(r"<title>(a at .*?)</title>", figure.replace(text.THIN, " "))
    # between 14 s, when the last seed begins, and 30 s, when the first ends
    assert notes[0].startswith("a at 14.0: 24.0 %") and notes[-1].startswith("a at 30.0: 56.0 %")


def test_hashes_and_seeds_identify_every_run(two: list[RunLog]) -> None:
    import hashlib

    page = render(two, "x")
    for run in two:
        assert hashlib.sha256(run.path.read_bytes()).hexdigest() in page
        assert run.end is not None and run.end["model_sha256"] in page


def test_coverage_counts_what_no_update_held(log: Any) -> None:
    run = log("a", 1, [0.5])
    line = json.dumps(window(0, 10.0, uncovered=4))
    lines = run.path.read_text().splitlines(keepends=True)
    run.path.write_text("".join(line + "\n" if '"type": "window"' in one else one for one in lines))
    figure = Figures(grouped([read_run(run.path)])).covered()
    assert "from 0.6 to 0.6" in figure


def test_nothing_from_a_log_becomes_markup(log: Any) -> None:
    runs = [
        log(f"{HOSTILE}{kind}-{seed}", seed, [0.4, 0.5], config={"trigger": HOSTILE + kind, HOSTILE: kind})
        for kind in "ab"
        for seed in (1, 2, 3)
    ]
    (runs[0].path.parent / "theory.json").write_text(
        json.dumps({"runs": [{"name": runs[0].name, "findings": [{**FINDING, "title": HOSTILE}]}]})
    )
    page = render(runs, HOSTILE, verdicts=[verdicts.read_verdicts(run) for run in runs])
    assert "<script" not in page.lower() and "\0" not in page
    for tag, attributes in Tags(page).found:
        assert tag not in ("script", "link", "img", "a", "iframe")
        assert not any(key.startswith("on") or key in ("src", "href", "style") for key in attributes)


# -- participation ---------------------------------------------------------------------------------


def test_the_raster_counts_arrivals_by_client_and_time(log: Any) -> None:
    run = log("a", 1, [0.1] * 6)
    shown = raster.rows(run, 60.0)
    assert [row.label for row in shown] == ["0", "1", "2"]
    assert [row.uploads for row in shown] == [2, 2, 2]
    assert [row.staleness for row in shown] == [0.5, 0.5, 0.5]
    for client, row in enumerate(shown):
        places = [int((10.0 * (n + 1) - 1) / 60.0 * raster.TIMES) for n in (client, client + 3)]
        assert np.flatnonzero(row.arrivals).tolist() == places


@pytest.mark.parametrize(
    "densities", [[1.0] * 100, [0.05] * 50 + [1.0] * 50, list(np.linspace(0.01, 1, 100)), [0.5] * 3, []]
)
def test_no_client_is_left_out_of_the_raster(log: Any, densities: list[float]) -> None:
    densities = [float(density) for density in densities]
    run = log("a", 1, [0.1] * 6, clients=len(densities), densities=densities)
    shown = raster.rows(run, 60.0)
    assert len(shown) <= raster.ROWS + len(set(densities))
    assert len(shown) <= 1.5 * raster.ROWS
    assert sum(row.uploads for row in shown) == (6 if densities else 0)
    page = render([run], "x")
    assert "Who contributed when" in page


@given(st.integers(0, 10**9))
def test_shades_cover_every_number_of_uploads(most: int) -> None:
    edges = raster.levels(most)
    assert 1 <= len(edges) <= raster.SHADES and edges[0] == 1
    assert edges == sorted(set(edges)) and edges[-1] <= max(most, 1)
    assert len(raster.ranges(edges, most)) == len(edges)
    assert raster.opacity(len(edges) - 1, len(edges)) == 1.0


# -- theory ----------------------------------------------------------------------------------------

FINDING = {
    "name": "update",
    "group": "inequality",
    "title": "the update",
    "verdict": "HOLDS",
    "reason": "it does",
    "equation": "3",
}


def test_verdicts_beside_a_run_are_shown(two: list[RunLog]) -> None:
    run = two[0]
    law = {**FINDING, "name": "order", "group": "log", "verdict": "VIOLATED"}
    unknown = {**FINDING, "name": "unknown", "verdict": "UNDETERMINED", "reason": ""}
    data = {"runs": [{"name": run.name, "findings": [FINDING, law, unknown]}], "expectations": []}
    (run.path.parent / "theory.json").write_text(json.dumps(data))
    found = [verdicts.read_verdicts(one) for one in two]
    assert found[0] is not None and len(found[0].findings) == 3 and found[1:] == [None] * 5
    page = render(two, "x", verdicts=found)
    assert '<span title="it does">HOLDS</span>' in page and "1 VIOLATED: <strong>order</strong>" in page
    assert "UNDETERMINED by every log (1)" in page
    assert "<h2>Theory</h2>" not in render(two, "x")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"runs": []}',
        '{"runs": [{"name": "other", "findings": []}]}',
        '{"runs": [{"name": "ours-1", "findings": [{}]}]}',
        json.dumps({"runs": [{"name": "ours-1", "findings": [{**FINDING, "verdict": "PERHAPS"}]}]}),
        json.dumps({"runs": [{"name": "ours-1", "findings": [{**FINDING, "title": 3}]}]}),
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_file_of_another_form_is_named_not_trusted(two: list[RunLog], content: str) -> None:
    (two[0].path.parent / "theory.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    found = verdicts.read_verdicts(two[0])
    assert found is not None and found.problem and not found.findings
    assert "theory.json" in render(two, "x", verdicts=[found, *[None] * 5])


def test_what_the_theory_check_writes_is_read(log: Any) -> None:
    from theory import check, verdict

    run = log("a", 1, [0.5, 0.6])
    findings = (
        verdict.Finding("order", "log", "the order", verdict.Verdict.HOLDS),
        verdict.undetermined("update", "inequality", "the update", "not logged", equation="3"),
    )
    report = check.Report((check.RunReport(str(run.path), run.name, findings, {}),), ())
    (run.path.parent / "theory.json").write_text(json.dumps(report.as_dict()))
    found = verdicts.read_verdicts(run)
    assert found is not None and not found.problem
    assert found.findings[1] == ("update", "inequality", "the update", "UNDETERMINED", "not logged", "3")
    assert set(verdicts.WORDS) == {word.value for word in verdict.Verdict}


# -- tables for papers -----------------------------------------------------------------------------


def test_the_csv_has_every_number_in_full(two: list[RunLog]) -> None:
    table = tabulate(two, target=0.6)
    ours, base = csv.DictReader(io.StringIO(export.to_csv(*table)))
    assert float(ours["accuracy_mean"]) == table.rows[0].accuracy.value
    assert (ours["group"], ours["seeds"], ours["runs"]) == ("ours", "1 2 3", "ours-1; ours-2; ours-3")
    assert (base["median_seconds_to_target"], base["seeds_that_reached_it"]) == ("", "0")
    assert (base["against"], base["verdict"], ours["verdict"]) == ("ours", "worse", "")
    assert float(base["difference_low"]) < float(base["difference_mean"]) < float(base["difference_high"]) < 0


def test_cells_are_no_formulas_and_no_commands(log: Any) -> None:
    runs = [
        log(f"{name}-{seed}", seed, [0.5], config={"k": name})
        for name in ("=1+1", HOSTILE)
        for seed in (1, 2)
    ]
    table = tabulate(runs)
    first, second = csv.DictReader(io.StringIO(export.to_csv(*table)))
    assert first["group"] == "'=1+1" and "\0" not in second["group"]
    page = export.to_latex(*table)
    body = page[page.index(r"\midrule") :]
    assert r"\textbackslash{}input\{x\} 100\% \$a\_b\textasciicircum{}c\textasciitilde{}\#" in body
    assert "\u202e" not in page and "\0" not in page
    assert [line.count(" & ") for line in body.splitlines() if line.endswith(r"\\")] == [6, 6]


def test_the_latex_table(two: list[RunLog]) -> None:
    page = export.to_latex(*tabulate(two, target=0.6))
    lines = page.splitlines()
    start = lines.index(r"\begin{tabular}{lrrrrrr}")
    assert all(line.startswith("% ") for line in lines[:start])
    assert lines[start + 1] == r"\toprule" and lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert lines[start + 4] == r"ours & 3 & $74.00 \pm 4.97$ & 30 & 24 & 0.33 & -- \\"
    assert lines[start + 5].startswith(
        r"base & 3 & $52.00 \pm 2.48$ & -- (0/3) & -- (0/3) & 0.33 & $-22.00\;["
    )


@given(st.text(max_size=30))
def test_latex_text_has_no_command_of_its_own(given_text: str) -> None:
    escaped = text.latex(given_text)
    for command in (
        r"\textbackslash{}",
        r"\textasciitilde{}",
        r"\textasciicircum{}",
        r"\textless{}",
        r"\textgreater{}",
    ):
        escaped = escaped.replace(command, "")
    escaped = re.sub(r"\\[{}$&#_%]", "", escaped)
    assert not set(escaped) & set("\\{}$&#^_~%\n\r")


# -- the command -----------------------------------------------------------------------------------


def test_the_command_writes_page_and_tables(two: list[RunLog], tmp_path: Path) -> None:
    (two[0].path.parent / "theory.json").write_text("{}")
    paths = [str(run.path.parent) for run in two]
    files = {name: tmp_path / f"out.{name}" for name in ("html", "csv", "tex")}
    result = CliRunner().invoke(
        main,
        [
            *("report", *paths, "--against", "base", "--output", str(files["html"])),
            *("--csv", str(files["csv"]), "--latex", str(files["tex"])),
        ],
    )
    assert result.exit_code == 0, result.output
    assert files["csv"].read_text() == export.to_csv(*tabulate(two, against="base"))
    assert files["tex"].read_text() == export.to_latex(*tabulate(two, against="base"))
    page = files["html"].read_text(encoding="utf-8")
    assert "<title>ours, base</title>" in page and "theory.json is not what" in page


@pytest.mark.parametrize(
    ("option", "value", "status", "said"),
    [
        ("--against", "nobody", 2, "names no group; there are ours, base"),
        ("--csv", "ABSENT/a.csv", 1, "cannot be written"),
        ("--latex", "ABSENT/a.tex", 1, "cannot be written"),
    ],
)
def test_the_command_refuses(
    two: list[RunLog], tmp_path: Path, option: str, value: str, status: int, said: str
) -> None:
    paths = [str(run.path) for run in two]
    value = value.replace("ABSENT", str(tmp_path / "absent"))
    result = CliRunner().invoke(main, ["report", *paths, option, value])
    assert result.exit_code == status and said in result.output
    assert not (two[0].path.parent / "report.html").exists()


# -- devices and layers ----------------------------------------------------------------------------


def test_the_device_is_among_the_versions(log: Any) -> None:
    cpu, gpu = "cpu: Some <Processor>", "cuda: NVIDIA H200"
    page = render([log("a-1", 1, [0.5], device=cpu)], "x")
    assert re.search(r"device</th><td>cpu: Some &lt;Processor&gt;</td>", page)
    both = render([log("a-1", 1, [0.5], device=cpu), log("a-2", 2, [0.5], device=gpu)], "x")
    assert "their versions or devices differ" in both
    assert "device</th><td>cpu: Some &lt;Processor&gt;</td><td>cuda: NVIDIA H200</td>" in both
    assert "device</th>" not in render([log("a-1", 1, [0.5])], "x")  # an older log says nothing


LAYERS = [
    {"name": "1.weight", "kind": "prunable", "size": 4},
    {"name": "1.bias", "kind": "bias", "size": 2},
    {"name": "2.weight", "kind": "prunable", "size": 8},
    {"name": "3.running_mean", "kind": "buffer", "size": 2},
]


def with_layers(log: Any, held: list[list[int]], updates: int) -> RunLog:
    """A run of windows of so many updates, with what they hold of the layers."""
    run = log("a-1", 1, [0.5] * len(held), layout={"size": 16, "prunable": 12, "layers": LAYERS})
    text = run.path.read_text().splitlines()
    out = []
    for line in text:
        record = json.loads(line)
        if record["type"] == "window":
            own = held[record["window"]]
            record["coverage"] = sum(own) / (14 * updates)
            out.append({"type": "layers", "window": record["window"], "held": own})
        out.append(record)
    run.path.write_text("".join(json.dumps(record) + "\n" for record in out))
    return read_run(run.path)


def test_coverage_by_layer_is_the_share_of_updates_that_hold_it(log: Any) -> None:
    run = with_layers(log, [[8, 4, 4], [8, 4, 16], [3, 2, 0]], 2)
    found = layers.layers(run)
    assert found is not None and found.names == ("1", "2")
    assert found.end.tolist() == [10.0, 20.0, 30.0]
    assert found.shares.tolist() == [[1.0, 0.25], [1.0, 1.0], [0.375, 0.0]]
    values = layers.binned(found, 60.0)
    per_window = layers.TIMES // 6
    assert values[0].tolist() == [1.0, 0.25] and values[per_window + 1].tolist() == [1.0, 1.0]
    assert values[2 * per_window + 2].tolist() == [0.375, 0.0] and np.isnan(values[-1]).all()
    (chart,) = charts(render([run], "x"), "Coverage by layer")
    assert "1: 37.5\u202f%; 2: 0.0\u202f%" in chart
    assert {float(shade) for shade in re.findall('opacity="([^"]*)"', chart)} == {0.25, 0.4, 1.0}


@pytest.mark.parametrize("held", [[[8, 4]], [[8, 4, 4, 1]], [[0, 0, 0]]])
def test_records_of_layers_that_do_not_fit_are_left_out(log: Any, held: list[list[int]]) -> None:
    run = with_layers(log, held, 2)
    assert layers.layers(run) is None and "Coverage by layer" not in render([run], "x")
    assert layers.layers(log("a-1", 1, [0.5])) is None


def test_many_layers_share_rows(log: Any) -> None:
    many = [{"name": f"{n}.weight", "kind": "prunable", "size": n + 1} for n in range(100)]
    run = log("a-1", 1, [0.5], layout={"size": 5050, "prunable": 5050, "layers": many})
    record = {"type": "layers", "window": 0, "held": [n + 1 for n in range(50)] + [0] * 50}
    text = run.path.read_text().replace('"coverage": 0.5', f'"coverage": {50 * 51 / 2 / 5050}')
    run.path.write_text(text.replace('{"type": "window"', json.dumps(record) + '\n{"type": "window"', 1))
    found = layers.layers(read_run(run.path))
    assert found is not None and len(found.names) <= layers.ROWS and found.names[0] == "0 …"
    assert found.shares[0][0] == 1.0 and found.shares[0][-1] == 0.0
    sizes = [sum(range(start + 1, min(start + 4, 101))) for start in range(0, 100, 3)]
    assert float(found.shares[0] @ np.array(sizes)) == pytest.approx(50 * 51 / 2)


# -- many groups -----------------------------------------------------------------------------------

FORMS = ("", "+aux", "+gmr")
METHODS = [
    *("fedgmr", "fedavg", "fedprox", "fedasync"),
    *(f"{name}{form}" for name in ("heterofl", "fjord", "fiarse") for form in FORMS),
]
DENSE = {"fedavg", "fedprox", "fedasync"}


def of_method(method: str) -> dict[str, Any]:
    return {"config": {"method": method, "dense_start": method in DENSE}}


@pytest.fixture
def many(log: Any) -> list[RunLog]:
    """Thirteen methods of three seeds each; each method is better by 0.02 than the one before it."""
    return [
        log(
            f"{method}-{seed}",
            seed,
            [0.1, 0.2 + seed / 100, 0.4 + 0.02 * n + seed / 100],
            **of_method(method),
        )
        for n, method in enumerate(METHODS)
        for seed in (1, 2, 3)
    ]


def charts(page: str, about: str) -> list[str]:
    """The charts of a page whose title begins so."""
    return re.findall(rf'<svg class="chart[^>]*><title[^>]*>{re.escape(about)}.*?</svg>', page, re.DOTALL)


def test_what_the_whole_axis_hides_is_drawn_once_more(log: Any) -> None:
    """The last half, where groups end close to each other; not of one group, nor where anybody can see it."""
    rise = [0.1, 0.5, 0.8, 0.9]
    close = [[*rise, 0.93, 0.94, 0.95, 0.96], [*rise, 0.92, 0.92, 0.92, 0.92]]
    runs = [
        log(f"{name}-{seed}", seed, values, **changes)
        for name, values, changes in zip("ab", close, ({}, NONE), strict=True)
        for seed in (1, 2)
    ]
    (late,) = charts(render(runs, "x"), "Accuracy in the last half, enlarged")
    assert ">40<" in late and ">80<" in late and ">90<" in late and ">96<" in late
    assert ">0<" not in late and ">10<" not in late and ">20<" not in late
    single = [runs[0], runs[2]]
    (late,) = charts(render(single, "x"), "Accuracy in the last half, enlarged")
    assert "a-1, window 5" in late and "a-1, window 3" not in late
    apart = [log("a-1", 1, [*rise, 0.9, 0.9]), log("b-1", 1, [0.1, 0.1, 0.2, 0.3, 0.4, 0.4], **NONE)]
    none = [log("a-1", 1, [None] * 4), log("b-1", 1, [None] * 4, **NONE)]
    for others in (runs[:2], runs[:1], apart):
        assert not charts(render(others, "x"), "Accuracy in the last half")
    assert charts(render(none, "x"), "Loss against") and not charts(render(none, "x"), "Accuracy in")


def test_forms_of_a_method_are_one_panel(many: list[RunLog]) -> None:
    found = panels(many[::3])
    assert [(panel.title, [METHODS[place] for place in panel.places]) for panel in found] == [
        ("Other methods", ["fedgmr", "fedavg", "fedprox", "fedasync"]),
        ("HeteroFL", [f"heterofl{form}" for form in FORMS]),
        ("FjORD", [f"fjord{form}" for form in FORMS]),
        ("FIARSE", [f"fiarse{form}" for form in FORMS]),
    ]
    (dense, _, _, _) = panels(many[3::3])
    assert dense.title == "Methods of the whole model"


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (["fedgmr"] * 4, [("Configurations", [0, 1, 2, 3])]),
        ([None] * 7, [("Configurations, 1 of 2", [0, 1, 2]), ("Configurations, 2 of 2", [3, 4, 5, 6])]),
        (["a", "b", "c"], [("Configurations", [0, 1, 2])]),
        (["x", "x", "fedavg"], [("x", [0, 1]), ("FedAvg", [2])]),
        (["fedavg", "x", "x", "b"], [("Other methods", [0, 3]), ("x", [1, 2])]),
        ([["a"], "x", "x+gmr"], [("Without a method", [0]), ("x", [1, 2])]),
    ],
)
def test_panels_of_any_groups(log: Any, methods: list[Any], expected: list[tuple[str, list[int]]]) -> None:
    runs = [log("run", 1, [0.5], config={"method": m} if m else {}) for m in methods]
    assert [(panel.title, list(panel.places)) for panel in panels(runs)] == expected


@given(
    st.lists(st.sampled_from(["a", "a+b", "b", "c", "fedavg", "", "heterofl+aux"]), min_size=1, max_size=60)
)
def test_every_group_is_in_one_panel_that_can_show_it(methods: list[str]) -> None:
    found = panels([SimpleNamespace(header={"config": {"method": m}}) for m in methods])  # type: ignore[misc]
    assert sorted(place for panel in found for place in panel.places) == list(range(len(methods)))
    assert all(0 < len(panel.places) < 7 for panel in found)


def test_pens_of_many_groups_say_the_panel_and_tell_all_apart(many: list[RunLog]) -> None:
    groups = grouped(many)
    pens = [(group.colour, group.dash) for group in groups]
    assert len(set(pens)) == len(groups)
    for panel in panels(many[::3]):
        assert len({groups[place].colour for place in panel.places}) == 1


def test_many_groups_are_drawn_in_panels_with_the_others_in_grey(many: list[RunLog]) -> None:
    page = render(many, "x", against="fedgmr", last=1)
    drawn = charts(page, "Accuracy against virtual time, panel by panel")
    assert len(drawn) == len(panels(many[::3]))
    for chart, panel in zip(drawn, panels(many[::3]), strict=True):
        inside = {METHODS[place] for place in panel.places}
        grey = set(re.findall(r'class="l context"[^>]*><title>([^<]*)</title>', chart))
        assert grey == set(METHODS) - inside - {"fedgmr"}
        assert len(re.findall(r'<path class="b s\d"', chart)) == len(inside)  # intervals of its own alone
        limits = re.findall(r'y="[\d.]+" text-anchor="end">(\d+)<', chart)
        assert limits == re.findall(r'y="[\d.]+" text-anchor="end">(\d+)<', drawn[0])  # one axis for all
    for about in ("Mean density", "Coverage", "Staleness over time", "Upload per window"):
        assert len(charts(page, f"{about}: ")) == len(drawn)
    assert "fedgmr" in re.search(r"<h4><bdi>FjORD.*?</ul>", page, re.DOTALL)[0]  # type: ignore[index]
    assert "<script" not in page and len(re.findall('id="figure-', page)) == len(
        set(re.findall(r'id="(figure-[^"]*)"', page))
    )


def test_the_overview_names_the_best_and_the_reference(many: list[RunLog]) -> None:
    (best,) = charts(render(many, "x"), "Accuracy against virtual time, an overview")
    assert len(re.findall('class="l context"', best)) == len(METHODS) - 7
    named = re.findall(r'class="end t\d"[^>]*>([^<]*)<', best)
    assert sorted(named) == sorted(METHODS[-7:])
    page = render(many, "x", against="fedgmr")
    (other,) = charts(page, "Accuracy against virtual time, an overview")
    assert sorted(re.findall(r'class="end t\d"[^>]*>([^<]*)<', other)) == sorted([*METHODS[-6:], "fedgmr"])
    assert "the best 6 and the reference by accuracy" in page


def test_all_accuracies_are_ranked_in_one_figure(many: list[RunLog]) -> None:
    page = render(many, "x", against="fedgmr", last=1)
    (chart,) = charts(page, "Accuracy of all configurations")
    rows = re.findall(r'<text class="t\d"[^>]*y="([\d.]+)"[^>]*>([^<]*)<', chart)
    assert [label for _, label in rows] == METHODS[::-1]
    assert [float(y) for y, _ in rows] == sorted(float(y) for y, _ in rows)
    assert f"{100 * (0.4 + 0.02 * 12 + 0.02):.1f} ± 2.5</text>" in chart  # t of two degrees: 4.303 / sqrt(3)
    assert all(
        len(re.findall("M", path)) == 3 for path in re.findall(r'd="([^"]*)"/?>', chart) if "v10" in path
    )
    axis = re.findall(r'class="rule" x1="([\d.]+)"', chart)
    (reference,) = re.findall(r'class="mark" x1="([\d.]+)"', chart)
    ticks = [int(t) for t in re.findall(r'text-anchor="middle">(\d+)<', chart)]
    share = (float(reference) - float(axis[0])) / (float(axis[-1]) - float(axis[0]))
    assert ticks[0] + share * (ticks[-1] - ticks[0]) == pytest.approx(42.0, abs=0.2)


def test_the_papers_of_the_runs_methods_are_cited(many: list[RunLog], two: list[RunLog]) -> None:
    keys = re.findall(r"@\w+\{(\w+),", render(many, "x"))
    assert keys[3:] == [
        "mcmahan2017fedavg", "li2020fedprox", "xie2020fedasync",
        "diao2021heterofl", "horvath2021fjord", "wu2024fiarse",
    ]  # fmt: skip
    assert len(re.findall(r"@\w+\{(\w+),", render(two, "x"))) == 3


def test_many_single_runs_are_no_means(many: list[RunLog]) -> None:
    page = render(many[::3], "x", against="fedgmr-1")
    assert (
        "As tabled above. Dotted line: fedgmr-1." in page
        and "ver seeds" not in page
        and ".." not in text_of(page)
    )


def text_of(page: str) -> str:
    return re.sub("<style>.*?</style>|<pre>.*?</pre>|<[^>]*>", " ", page, flags=re.DOTALL)


def test_few_groups_are_drawn_as_before(two: list[RunLog]) -> None:
    page = render(two, "x")
    assert 'class="panels"' not in page and 'class="l context"' not in page
