"""The report: right numbers, a page that stands alone, and nothing that a log says taken for markup."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgmr_plugin.errors import RunLogError
from fedgmr_plugin.protocol import RunLog, RunLogWriter, read_run
from fedgmr_plugin.report import (
    default_target,
    render,
    scales,
    summarise,
    summarise_all,
    svg,
    tables,
    text,
    tracks,
)
from fedgmr_plugin.report.figures import Figures
from fedgmr_plugin.report.groups import grouped, named
from fedgmr_plugin.report.svg import Axis, Series

HOSTILE = "</title><script>alert('x')</script>\"'&\u202e\ud800\0 onload=x"


def header(**changes: Any) -> dict[str, Any]:
    record = {
        "type": "header",
        "schema": "1.0",
        "method": "fedgmr",
        "run_name": "run",
        "seed": 1,
        "config": {"trigger": "time", "interval": 2, "density_ladder": [0.05, 0.5, 1.0]},
        "fedml": {"learning_rate": 0.1},
        "versions": {"fedgmr": "0.1.0"},
        "clients": 3,
        "client_samples": [100, 200, 300],
        "densities": [1.0, 0.5, 0.5],
        "layout": {"size": 10, "prunable": 8, "dtype": "float32", "layers": []},
        "model_megabytes": 4.0,
        "eta": 0.1,
        "local_steps": 5,
        "windows": 4,
        "time_budget": None,
    }
    return {**record, **changes}


def dispatch(number: int, client: int, time: float, density: float, size: float = 2e6) -> dict[str, Any]:
    zeros = dict.fromkeys(("norm_sq", "masked_norm_sq", "full_norm_sq", "full_masked_norm_sq"), 0.0)
    known = {
        "dispatch": number,
        "client": client,
        "version": 0,
        "density": density,
        "ranking": "r",
        "support": 1,
    }
    return {"type": "dispatch", **known, "time": time, "bytes_down": size, **zeros}


def arrival(window: int, client: int, staleness: int, size: float = 1e6) -> dict[str, Any]:
    return {
        "type": "arrival",
        "window": window,
        "dispatch": 0,
        "client": client,
        "version": window - staleness,
        "staleness": staleness,
        "density": 0.5,
        "time": 1.0,
        "bytes_up": size,
        "samples": 10,
        "weight": 10.0,
        "pibar": None,
        "drift_sq": None,
        "change_sq": 0.0,
        "steps": 5,
        "train_loss": None,
    }


def window(number: int, end: float, density: float, up: float = 3e6, down: float = 5e6) -> dict[str, Any]:
    return {
        "type": "window",
        "window": number,
        "start": end - 1,
        "close": end - 0.5,
        "end": end,
        "arrivals": 1,
        "gamma_min": 1,
        "uncovered": 0,
        "coverage": 1.0,
        "step_sq": 0.1,
        "in_flight": 0,
        "mean_density": density,
        "density_floor": 0.02,
        "bytes_up": up,
        "bytes_down": down,
        "server_bytes_down": down,
        "learning_rate": 0.1,
    }


def evaluation(
    number: int, time: float, accuracy: float | None, loss: float | None = 1.0, **changes: Any
) -> dict[str, Any]:
    both = {"accuracy": accuracy, "loss": loss}
    return {
        "type": "evaluation",
        "window": number,
        "time": time,
        "candidate": "scaled",
        **both,
        "global": {"accuracy": None if accuracy is None else accuracy / 2, "loss": loss},
        "scaled": both,
        "samples": 100,
        "bytes_up": number * 3e6,
        "bytes_down": number * 5e6,
        "metrics": {},
        **changes,
    }


def restoration(
    number: int, time: float, client: int | None, after: float, cause: str = "time"
) -> dict[str, Any]:
    known = {"window": number, "time": time, "client": client, "cause": cause}
    return {"type": "restoration", **known, "before": 0.5, "after": after, "floor": 0.1}


def end(windows: int, time: float) -> dict[str, Any]:
    known = {"windows": windows, "time": time, "reason": "windows", "model_sha256": "ab" * 32}
    return {"type": "end", **known, "shipped": "scaled", "wall_seconds": 1.0, "rejected": 1}


def rejected(number: int) -> dict[str, Any]:
    return {
        "type": "rejected",
        "window": number,
        "dispatch": 9,
        "client": 1,
        "code": "GMR-401",
        "message": "x",
    }


def example(**changes: Any) -> list[dict[str, Any]]:
    """Four windows of three clients, two of which are restored."""
    return [
        header(**changes),
        *(dispatch(n, n, 0.0, d) for n, d in enumerate((1.0, 0.5, 0.5))),
        arrival(0, 0, 0),
        window(0, 10.0, 0.5),
        arrival(1, 0, 0),
        arrival(1, 1, 1),
        rejected(1),
        window(1, 20.0, 0.5),
        restoration(2, 20.0, 1, 1.0),
        restoration(2, 20.0, None, 0.1, "server_plateau"),
        evaluation(2, 20.0, 0.4),
        arrival(2, 0, 0),
        arrival(2, 2, 2),
        window(2, 30.0, 0.75),
        restoration(3, 30.0, 2, 1.0, "client_plateau"),
        evaluation(3, 30.0, 0.8),
        arrival(3, 0, 0),
        window(3, 40.0, 1.0),
        evaluation(4, 40.0, 0.7),
        end(4, 40.0),
    ]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Any]:
    """Writes records to a file of its own and reads it."""
    count = iter(range(1000))

    def make(records: list[dict[str, Any]]) -> RunLog:
        path = tmp_path / f"run{next(count)}" / "run.jsonl"
        with RunLogWriter(path) as writer:
            for record in records:
                writer.write(record)
        return read_run(path)

    yield make


# -- numbers ---------------------------------------------------------------------------------------


def test_summary_of_the_example(log: Any) -> None:
    s = summarise(log(example()), 0.75)
    assert s.name == "run" and s.method == "fedgmr" and s.seed == 1 and s.clients == 3
    assert s.finished and s.windows == 4 and s.virtual_seconds == 40.0 and s.rejected == 1
    assert (s.budget_seconds, s.accuracy, s.last_accuracy) == (40.0, 0.7, 0.7)
    assert (s.target_accuracy, s.seconds_to_target) == (0.75, 30.0)
    assert (s.megabytes_up, s.megabytes_down) == (12.0, 20.0)
    assert s.mean_density == (0.5 + 0.5 + 0.75 + 1.0) / 4
    assert s.mean_staleness == 3 / 6
    assert s.model_sha256 == "ab" * 32
    json.dumps(s._asdict(), allow_nan=False)


@pytest.mark.parametrize(
    ("target", "time"), [(0.4, 20.0), (0.41, 30.0), (0.8, 30.0), (0.81, None), (None, 30.0)]
)
def test_time_to_a_target_is_that_of_the_first_evaluation_that_reaches_it(
    log: Any, target: float | None, time: float | None
) -> None:
    s = summarise(log(example()), target)
    assert s.seconds_to_target == time
    if target is None:
        assert s.target_accuracy == pytest.approx(0.95 * 0.7)


@pytest.mark.parametrize(
    ("budget", "accuracy"), [(19.0, None), (20.0, 0.4), (29.9, 0.4), (30.0, 0.8), (1e9, 0.7)]
)
def test_accuracy_at_a_budget_is_the_last_one_until_then(
    log: Any, budget: float, accuracy: float | None
) -> None:
    assert summarise(log(example()), budget=budget).accuracy == accuracy


def test_the_window_in_which_the_budget_ends_counts(log: Any) -> None:
    s = summarise(log(example(time_budget=38.0)))
    assert (s.budget_seconds, s.accuracy) == (38.0, 0.7)


def test_runs_are_compared_at_a_time_until_which_all_were_evaluated(log: Any) -> None:
    short = [r for r in example(run_name="short") if not (r["type"] == "evaluation" and r["window"] == 4)]
    runs = [log(example()), log(short)]
    first, second = summarise_all(runs)
    assert first.budget_seconds == second.budget_seconds == 30.0
    assert first.accuracy == second.accuracy == 0.8
    assert (first.last_accuracy, second.last_accuracy) == (0.7, 0.8)
    assert first.target_accuracy == second.target_accuracy == default_target(runs) == 0.95 * 0.8


def test_a_run_without_anything(log: Any) -> None:
    s = summarise(log([header()]))
    assert (s.finished, s.windows, s.virtual_seconds, s.megabytes_up, s.rejected) == (False, 0, 0.0, 0.0, 0)
    assert [s.accuracy, s.last_accuracy, s.target_accuracy, s.mean_density, s.mean_staleness] == [None] * 5
    assert summarise(log([header()]), 0.5).seconds_to_target is None


def test_density_steps(log: Any) -> None:
    times, densities = tracks.density_steps(log(example()))
    assert times.tolist() == [0.0, 20.0, 30.0, 40.0]
    assert densities.tolist() == [[1, 0.5, 0.5], [1, 1, 0.5], [1, 1, 1], [1, 1, 1]]


def test_clients_start_with_the_density_of_their_first_dispatch(log: Any) -> None:
    records = [
        header(),
        *(dispatch(n, n, 0.0, 1.0) for n in range(3)),
        dispatch(3, 1, 5.0, 0.25),
        window(0, 9.0, 1.0),
    ]
    times, densities = tracks.density_steps(log(records))
    assert times.tolist() == [0.0, 9.0] and densities.tolist() == [[1, 1, 1]] * 2


def test_classes(log: Any) -> None:
    run = log(example())
    dense, half = tracks.classes(run)
    assert (dense.density, dense.clients, half.density, half.clients) == (1.0, (0,), 0.5, (1, 2))
    (_, first), (_, f) = tracks.class_figures(run)
    assert (f.samples, f.final_density, f.uploads, f.mean_staleness, f.full_at) == (500, 1.0, 2, 1.5, 30.0)
    assert (f.megabytes_up, f.megabytes_down) == (2.0, 4.0)
    assert first.full_at == 0.0


def test_staleness_by_window(log: Any) -> None:
    records = [r for r in example() if not (r["type"] == "arrival" and r["window"] == 3)]
    end_time, mean = tracks.staleness_by_window(log(records))
    assert end_time.tolist() == [10.0, 20.0, 30.0, 40.0]
    np.testing.assert_array_equal(mean, [0.0, 0.5, 1.0, np.nan])


# -- the page --------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags nest, and gathers what the tests ask about."""

    VOID = ("meta",)

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.counts: dict[str, int] = {}
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += [(tag, key, value) for key, value in attrs]
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def check(page: str) -> Page:
    """What holds for every page."""
    assert page.startswith("<!DOCTYPE html>")
    page.encode("utf-8")
    parsed = Page(page)
    tags = parsed.counts
    assert "script" not in tags and not {"link", "img", "iframe", "object", "a", "use", "image"} & set(tags)
    for tag, key, value in parsed.attributes:
        assert not key.startswith("on"), (tag, key)
        assert key not in ("src", "href", "xlink:href", "srcset", "action", "data", "style"), (
            tag,
            key,
            value,
        )
        assert "nan" not in (value or "").lower().split() and "inf" not in (value or "").lower().split()
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert len(parsed.ids) == len(set(parsed.ids))
    for _, key, value in parsed.attributes:
        if key == "aria-labelledby":
            assert set((value or "").split()) <= set(parsed.ids)
    assert tags["table"] == tags["caption"]
    assert tags["h1"] == 1
    for number in re.findall(r' (?:[xy][12]?|cx|cy|width|height)="([^"]+)"', page[page.index("<main>") :]):
        assert math.isfinite(float(number))
    for path in re.findall(r' d="([^"]+)"', page):
        assert re.fullmatch(r"([MLHV]-?[\d.]+( -?[\d.]+)?)+", path), path[:80]
    return parsed


def test_the_page_of_one_run(log: Any) -> None:
    page = render([log(example())], "One run", target=0.75)
    parsed = check(page)
    assert "After 40.0 s the shipped model has 70.0 % on the test set." in parsed.text.replace(text.THIN, " ")
    for heading in (
        "Accuracy against virtual time",
        "Accuracy against bytes",
        "Density",
        "Staleness of the uploads",
    ):
        assert heading in parsed.text
    for said in (
        "1 by time",
        "1 by client plateau",
        "1 by server plateau",
        "server’s floor",
        "@inproceedings",
    ):
        assert said in parsed.text
    assert "as given" in parsed.text and "unfinished" not in parsed.text
    assert page == render([log(example())], "One run", target=0.75)


def test_the_page_of_several_runs(log: Any) -> None:
    other = example(
        run_name="other", config={"trigger": "none", "interval": 2}, seed=2, versions={"torch": "2"}
    )
    parsed = check(render([log(example()), log(other)], "Two runs"))
    assert "Keys that differ" in parsed.text
    differing = tables.configuration(named([log(example()), log(other)])).split("<details>")[0]
    keys = re.findall(r"<code>(.*?)</code>", differing)
    assert keys == ["trigger", "density_ladder", "run: seed"]
    said = parsed.text.replace(text.THIN, " ")
    assert "95 % of the best last accuracy" in said
    assert "66.5 % was first reached at 30.0 s (by run, other)." in said


def test_nothing_from_a_log_becomes_markup(log: Any) -> None:
    records = example(
        run_name=HOSTILE,
        method=HOSTILE,
        config={HOSTILE: HOSTILE, "trigger": [HOSTILE], "score": {HOSTILE: 1}},
        fedml={HOSTILE: [HOSTILE]},
        versions={HOSTILE: HOSTILE, "a": [1]},
    )
    for record in records:
        if record["type"] == "restoration":
            record["cause"] = HOSTILE
        if record["type"] == "evaluation":
            record["candidate"] = HOSTILE
        if record["type"] == "end":
            record |= {"model_sha256": '"><script>', "reason": HOSTILE, "shipped": HOSTILE}
    runs = [log(records), log(records)]
    for chosen in (runs[:1], runs):
        page = render(chosen, HOSTILE)
        parsed = check(page)
        assert "<script" not in page.lower()
        assert "alert('x')" in parsed.text  # shown as text
        assert "\0" not in page


def unfinished() -> list[dict[str, Any]]:
    return example()[:-1]


ODD: dict[str, list[dict[str, Any]]] = {
    "header only": [header()],
    "no header numbers": [header(model_megabytes=None, eta=None, local_steps=None, time_budget=None)],
    "no clients": [header(clients=0, densities=[], client_samples=[], versions={}, config={}, fedml={})],
    "null densities": [header(densities=[None, 0.5, 1.0]), *example()[1:]],
    "one window": [header(), arrival(0, 0, 0), window(0, 10.0, 0.5), evaluation(1, 10.0, 0.3), end(1, 10.0)],
    "one window, not evaluated": [header(), arrival(0, 0, 0), window(0, 10.0, 0.5)],
    "no evaluation": [r for r in example() if r["type"] != "evaluation"],
    "no arrival": [r for r in example() if r["type"] != "arrival"],
    "unfinished": unfinished(),
    "no accuracy": [
        evaluation(r["window"], r["time"], None, 2.0) if r["type"] == "evaluation" else r for r in example()
    ],
    "neither accuracy nor loss": [
        evaluation(r["window"], r["time"], None, None) if r["type"] == "evaluation" else r for r in example()
    ],
    "no time": [header(), window(0, math.nan, math.nan), evaluation(1, math.nan, 0.5), end(1, math.nan)],
    "accuracy 0": [header(), window(0, 0.0, 0.0), evaluation(1, 0.0, 0.0), end(1, 0.0)],
    "huge numbers": [header(), window(0, 1e300, 1.0, 1e300, 1e300), evaluation(1, 1e300, 1.0, 1e308)],
    "unknown clients": [
        header(),
        dispatch(0, 77, 0.0, 1.0),
        restoration(1, 1.0, 99, 1.0),
        restoration(1, 1.0, -1, 1.0),
    ],
    "restoration without numbers": [header(), restoration(1, math.nan, 1, math.nan)],
    "stale": [header(), *(arrival(0, 0, tau) for tau in (0, 3, 500)), window(0, 10.0, 0.5)],
    "arrivals of windows that were not closed": [
        header(),
        arrival(7, 0, 0),
        window(0, 10.0, 0.5),
        arrival(8, 0, 1),
    ],
    "many restorations": [
        header(),
        window(0, 1.0, 0.5),
        *(restoration(i, float(i), i % 3, 0.5) for i in range(200)),
        window(1, 300.0, 0.5),
    ],
}


@pytest.mark.parametrize("records", ODD.values(), ids=ODD.keys())
def test_odd_runs_are_reported_too(log: Any, records: list[dict[str, Any]]) -> None:
    run = log(records)
    check(render([run], "odd"))
    check(render([run, log(example())], "odd and even"))
    json.dumps([s._asdict() for s in summarise_all([run, log(example())])], allow_nan=False)


def test_an_unfinished_and_a_torn_run_say_so(log: Any) -> None:
    run = log(unfinished())
    assert "still running, or was stopped" in check(render([run], "x")).text
    run.path.write_bytes(run.path.read_bytes() + b'{"type": "end", "wind')
    page = check(render([read_run(run.path)], "x")).text
    assert "was incomplete and has been left out" in page and "unfinished" in page


def test_without_accuracy_the_loss_is_drawn(log: Any) -> None:
    parsed = check(render([log(ODD["no accuracy"])], "x"))
    assert "Loss against virtual time" in parsed.text
    assert "No evaluation with an accuracy was recorded." in parsed.text


def test_many_runs_and_long_names(log: Any) -> None:
    runs = [
        log(example(run_name=f"{'very long name ' * 12}{i % 3}", config={"interval": i})) for i in range(12)
    ]
    parsed = check(render(runs, "t" * 400))
    assert parsed.counts["figure"] == 4 + 1 + 12 + 12 + 2 + 2 + 2
    labels = [run.label for run in named(runs)]
    assert len(set(labels)) == 12
    assert len({(run.colour, run.dash) for run in named(runs)}) == 12


def test_a_large_federation_and_a_long_run_stay_small(log: Any) -> None:
    records = [header(clients=400, densities=[0.05] * 200 + [1.0] * 200, client_samples=[1] * 400)]
    for number in range(3000):
        records += [arrival(number, number % 400, number % 5), window(number, 10.0 * (number + 1), 0.5)]
        if number % 2 == 0:
            records.append(evaluation(number + 1, 10.0 * (number + 1), 0.5 + 0.4 * math.sin(number)))
    page = render([log(records)], "large")
    check(page)
    assert len(page) < 300_000


def test_a_log_of_wrong_types_is_refused_not_drawn(log: Any) -> None:
    run = log(example())
    run.path.write_text(run.path.read_text().replace('"accuracy": 0.8', '"accuracy": "0.8"'))
    with pytest.raises(RunLogError, match="GMR-602"):
        render([read_run(run.path)], "x")


def test_no_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        render([], "x")


# -- figures ---------------------------------------------------------------------------------------


def test_a_step_chart_goes_where_the_data_say(log: Any) -> None:
    times, densities = tracks.density_steps(log(example()))
    drawn = svg.chart(
        [Series("d", times, densities[:, 1], kind="steps")],
        Axis("t", 0, 40),
        Axis("d", 0, 1),
        ident="i",
        title="t",
        description="d",
    )
    left, right, top, bottom = svg.LEFT, svg.WIDTH - svg.RIGHT, svg.TOP, svg.HEIGHT - svg.BOTTOM
    middle = (left + right) / 2
    path = f"M{left:.1f} {(top + bottom) / 2:.1f}H{middle:.1f}V{top:.1f}H{right:.1f}"
    assert f' d="{path}"' in drawn


def test_the_mean_density_holds_from_a_window_s_start_to_its_end(log: Any) -> None:
    page = Figures(grouped([log(example())])).mean_densities()
    x = {t: svg.LEFT + t / 40 * (svg.WIDTH - svg.LEFT - svg.RIGHT) for t in (9, 29, 39, 40)}
    y = {d: svg.HEIGHT - svg.BOTTOM - d * (svg.HEIGHT - svg.BOTTOM - svg.TOP) for d in (0.5, 0.75, 1.0)}
    steps = f"M{x[9]:.1f} {y[0.5]:.1f}H.*H{x[29]:.1f}V{y[0.75]:.1f}H{x[39]:.1f}V{y[1.0]:.1f}H{x[40]:.1f}"
    assert re.search(f' d="{steps}"', page)


def test_a_line_is_interrupted_where_nothing_is_known() -> None:
    y = np.array([0.0, 1.0, np.nan, 1.0, 0.0])
    series = [Series("a", np.arange(5.0), y), Series("b", np.array([0.0, np.nan, 2.0, 3.0, 4.0]), y)]
    drawn = svg.chart(series, Axis("x", 0, 4), Axis("y", 0, 1), ident="i", title="t", description="d")
    paths = re.findall(r' d="(M[^"]+)"', drawn)
    assert [path.count("M") for path in paths] == [2, 2]
    assert "nan" not in drawn


def test_histogram_shares(log: Any) -> None:
    page = Figures(grouped([log(example())])).staleness_histogram()
    notes = [note.replace(text.THIN, " ") for note in re.findall(r"<title>(.*?)</title>", page)]
    assert notes == [
        f"run: {share} % of uploads, tau = {tau}" for share, tau in (("66.7", 0), ("16.7", 1), ("16.7", 2))
    ]


finite = st.floats(-1e9, 1e9)


@given(finite, finite, st.integers(2, 9))
def test_ticks_cover_the_range_in_round_steps(a: float, b: float, count: int) -> None:
    low, high = min(a, b), max(a, b)
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-6):
        return
    ticks = scales.nice_ticks(low, high, count)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * (high - low)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert len(ticks) <= count + 3
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-3
    assert all(abs((y - x) - step) <= 1e-3 * step for x, y in pairwise(ticks))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e300])
def test_ticks_of_a_single_value(value: float) -> None:
    ticks = scales.nice_ticks(value, value)
    assert ticks[0] <= value <= ticks[-1] and len(ticks) > 1


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_labels_are_moved_apart_within_the_plot(wanted: list[float]) -> None:
    wanted = sorted(wanted)
    rows = svg._spread(wanted, 14.0, 30.0, 270.0)
    assert len(rows) == len(wanted)
    assert all(30.0 - 1e-6 <= row <= 270.0 + 1e-6 for row in rows)
    assert all(b - a >= 14.0 - 1e-6 for a, b in pairwise(rows))


@given(st.integers(1, 5000), st.integers(0, 2**32 - 1))
def test_thinning_keeps_ends_and_extremes(count: int, seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=count)
    x, kept = scales.thin(np.arange(float(count)), y)
    assert len(x) <= 602
    assert x[0] == 0 and x[-1] == count - 1
    assert kept.min() == y.min() and kept.max() == y.max()
    assert (np.diff(x) > 0).all()
    np.testing.assert_array_equal(kept, y[x.astype(int)])


@given(st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_binned_means_keep_the_mean(each: int, seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=scales.BINS * each)
    x, means = scales.bin_means(np.arange(float(len(y))), y)
    assert len(x) == scales.BINS
    assert means.mean() == pytest.approx(y.mean(), abs=1e-9)


@given(
    st.lists(
        st.tuples(st.floats(0, 1e6), st.one_of(st.just(math.nan), st.floats(-1e6, 1e6))),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from(["line", "steps", "bars"]),
)
def test_everything_is_drawn_inside_the_picture(points: list[tuple[float, float]], kind: Any) -> None:
    points = sorted(points, key=lambda p: p[0])
    x, y = (np.array(values) for values in zip(*points, strict=True))
    low = 0 if kind == "bars" else None
    y = np.abs(y) if kind == "bars" else y
    series = [Series("s", x, y, kind=kind, at_end=True)]
    drawn = svg.chart(series, Axis("x", 0), Axis("y", low), ident="i", title="t", description="d")
    for path in re.findall(r' d="([^"]+)"', drawn):
        for command, a, b in re.findall(r"([MLHV])(-?[\d.]+)(?: (-?[\d.]+))?", path):
            px, py = (float(a), float(b or 0)) if command != "V" else (0.0, float(a))
            assert -0.1 <= px <= svg.WIDTH + 0.1 and -0.1 <= py <= svg.HEIGHT + 0.1
    for top, height in re.findall(r'<rect[^>]* y="([^"]+)"[^>]* height="([^"]+)"', drawn):
        assert float(height) >= 0 and float(top) >= svg.TOP - 0.1


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.number(1234567.0), "1 234 567"),
        (text.number(-1234.5, 1), "−1 234.5"),
        (text.number(-0.0001, 2), "0.00"),
        (text.number(None), "–"),
        (text.number(math.nan), "–"),
        (text.percent(0.8312), "83.1 %"),
        (text.percent(None), "–"),
        (text.seconds(12.34), "12.3 s"),
        (text.seconds(70000.4), "70 000 s"),
        (text.megabytes(25.98), "26.0"),
        (text.shorten("abcdef", 4), "abc…"),
        (text.shorten("abcd", 4), "abcd"),
        (text.escape('<a b="c">&\''), "&lt;a b=&quot;c&quot;&gt;&amp;&#x27;"),
        (text.escape("a\ud800\0\x1bb\n"), "a\ufffd\ufffd\ufffdb\n"),
        (scales.plain(0.25, 0.25), "0.25"),
        (scales.plain(20000.0, 5000.0), "20 000"),
        (scales.as_percent(0.1 + 0.2, 0.1), "30"),
        (scales.as_percent(0.025, 0.025), "2.5"),
        (text.written([1.0, 0.05, 0.05, 0.05, "x"]), '[1, 0.05 × 3, "x"]'),
        (text.written([1, 1]), "[1, 1]"),
        (text.written(2.0), "2"),
        (text.written(True), "true"),
        (text.written(None), "null"),
    ],
)
def test_texts(shown: str, expected: str) -> None:
    assert shown.replace(text.THIN, " ") == expected
