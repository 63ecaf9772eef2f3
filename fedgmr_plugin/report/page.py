"""One self-contained HTML page from one or more run logs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from fedgmr_plugin.protocol.runlog import RunLog
from fedgmr_plugin.report import comparison, dots, tables
from fedgmr_plugin.report.figures import Figures
from fedgmr_plugin.report.groups import Group, Named, clock, named
from fedgmr_plugin.report.results import Comparisons, Result, tabulate
from fedgmr_plugin.report.style import STYLE
from fedgmr_plugin.report.summary import TARGET_SHARE, Summary, method_of
from fedgmr_plugin.report.text import escape, name, number, percent, seconds
from fedgmr_plugin.report.verdicts import Verdicts, theory

#: The page may load nothing and run nothing, whatever a log holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
#: Runs up to which the tables of each are open.
OPEN_RUNS = 3
#: Groups that the first sentence names at most.
NAMED = 4


def render(
    runs: Sequence[RunLog],
    title: str,
    *,
    target: float | None = None,
    against: str | None = None,
    last: int = 1,
    verdicts: Sequence[Verdicts | None] | None = None,
    notes: str = "",
) -> str:
    """The report of `runs` as one HTML page without references to anything outside it.

    The page depends on the logs (and verdicts) alone: the same logs give the same bytes.

    Args:
        runs: at least one; compared with each other where there are several. Those that differ only in their
            seed are one group: a mean with its interval.
        title: heading of the page; any text.
        target: accuracy in [0, 1] whose virtual time is tabled; 95 % of the best last accuracy where None.
        against: name of the group, or of one of its runs, that the others are compared with by seed; the one
            of the best mean accuracy where None.
        last: evaluations that a run's accuracy is the mean of.
        verdicts: of the theory check, one for each run, or None where there are none.
        notes: what a reader has to know, such as where hyper-parameters come from; any text, for the heading.

    Raises:
        ValueError: `runs` is empty, or `against` names no group.
        RunLogError: GMR-602 if a log holds values of the wrong type.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    rows, comparisons, _ = tabulate(runs, target=target, against=against, last=last)
    groups = [row.group for row in rows]
    pens = {run.label: (group.colour, group.dash) for group in groups for run in group.runs}
    shown = [run._replace(colour=pens[run.label][0], dash=pens[run.label][1]) for run in named(runs)]
    known = {run.label: one for row in rows for run, one in zip(row.group.runs, row.summaries, strict=True)}
    summaries = [known[run.label] for run in shown]
    figures = Figures(groups, dots.order(rows), None if comparisons is None else comparisons.reference)
    compared = "" if comparisons is None else comparison.comparisons(rows, comparisons)
    fold = figures.seeds and len(runs) > OPEN_RUNS
    single = _summary(shown, summaries, target, last, fold=fold)
    if figures.seeds:
        summary = _group_lede(rows, comparisons) + comparison.groups(rows) + compared + single
    else:
        summary = _lede(shown, summaries, target) + single + compared
    classes = "".join(map(tables.client_classes, groups))
    sections = [
        ("Summary", summary),
        (figures.metric.capitalize(), _metric(figures, rows, comparisons)),
        ("Density", _densities(figures)),
        ("Participation", _folded(figures, "Every client of each configuration", figures.participation())),
        ("Client classes", _fold("Every class of each configuration", classes) if figures.many else classes),
        (
            "Coverage",
            _side_by_side(figures, [figures.coverage(), figures.covered()])
            + _folded(figures, "Every layer of each configuration", figures.by_layer()),
        ),
        ("Staleness", _side_by_side(figures, [figures.staleness_histogram(), figures.staleness_by_time()])),
        ("Traffic", _side_by_side(figures, [figures.traffic("bytes_up"), figures.traffic("bytes_down")])),
        ("Restorations", tables.restorations(shown, is_open=len(runs) <= OPEN_RUNS)),
        ("Theory", theory(shown, verdicts or [None] * len(runs))),
        ("Configuration", tables.differences(groups) if figures.seeds else tables.configuration(shown)),
        ("Versions and hashes", _mixed(groups) + tables.versions(shown) + tables.hashes(shown, summaries)),
        ("Citation", _citation(shown)),
    ]
    body = "".join(
        f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections if content
    )
    about = f'<p class="quiet">{escape(notes)}</p>' if notes else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>"
        f"<header><h1>{name(title)}</h1><p>{_subtitle(shown)}</p>{about}</header><main>{body}</main>"
        f"<footer>Made by fedgmr from the run logs alone. Times are {_TIMES[clock(runs)]}; "
        "1 MB is 10<sup>6</sup> bytes.</footer></body></html>\n"
    )


_TIMES = {
    "virtual": "virtual seconds of the simulated network",
    "wall": "wall seconds since the run began, without those in which there was no server",
    "virtual or wall": "virtual seconds of the simulated network, and wall seconds of runs with real devices",
}


def _group_lede(rows: Sequence[Result], comparisons: Comparisons | None) -> str:
    """The result over seeds in a sentence or two."""
    known = [row for row in rows if row.accuracy.n]
    if not known:
        return '<p class="lede">No evaluation with an accuracy was recorded.</p>'
    best = max(known, key=lambda row: row.accuracy.value)
    budget, count = best.summaries[0].budget_seconds, best.accuracy.n
    text = "" if budget is None else f"After {seconds(budget)} "
    text += f"{name(best.group.label)} has "
    text += f"{comparison.interval(best.accuracy)} on the test set"
    text += f" (mean of {count} seeds, 95 % interval)" if count > 1 else ""
    text += ", the best mean." if len(rows) > 1 else "."
    if comparisons is not None:
        against = rows[comparisons.reference].group
        for verdict in ("better", "worse"):
            found = [
                row.group.label
                for row, one in zip(rows, comparisons.others, strict=True)
                if one is not None and one.verdict == verdict
            ]
            if found:
                which = ", ".join(map(name, found))
                if len(found) > NAMED:
                    which = (
                        "all others" if len(found) == len(rows) - 1 else f"{len(found)} of {len(rows) - 1}"
                    )
                text += f" {verdict.capitalize()} than {name(against.label)}, seed by seed: {which}."
    return f'<p class="lede">{text}</p>'


def _mixed(groups: Sequence[Group]) -> str:
    """A warning for each group whose runs were made with different versions, or on different devices."""
    return "".join(
        f"<p>The runs of {name(group.label)} are one group although their versions or devices differ.</p>"
        for group in groups
        if any(tables.carried_out(run.run) != tables.carried_out(group.runs[0].run) for run in group.runs)
    )


def _subtitle(runs: Sequence[Named]) -> str:
    headers = [run.run.header for run in runs]
    parts = [f"{len(runs)} run{'s' if len(runs) > 1 else ''}"]
    for key, unit in (
        ("clients", "clients"),
        ("time_budget", f"{clock([run.run for run in runs])} seconds planned"),
        ("windows", "windows planned"),
        ("model_megabytes", "MB model"),
    ):
        if key == "windows" and any(header["time_budget"] is not None for header in headers):
            continue  # then so many windows are no plan
        values = {header[key] for header in headers}
        value = values.pop()
        if not values and value is not None:
            parts.append(f"{number(value, 1 if key == 'model_megabytes' else 0)} {unit}")
    methods = sorted({method_of(header) for header in headers})
    return escape(" · ".join([*parts, ", ".join(methods)]))


def _lede(runs: Sequence[Named], summaries: Sequence[Summary], target: float | None) -> str:
    """The result in a sentence or two."""
    rated = [(s.accuracy, run, s) for run, s in zip(runs, summaries, strict=True) if s.accuracy is not None]
    if not rated:
        return '<p class="lede">No evaluation with an accuracy was recorded.</p>'
    accuracy, run, s = max(rated, key=lambda item: item[0])
    text = f"After {seconds(s.budget_seconds)} "
    if len(runs) > 1:
        text += f"the best run is {name(run.label)} with {percent(accuracy)} on the test set."
    else:
        text += f"the shipped model has {percent(accuracy)} on the test set."
    times = [x.seconds_to_target for x in summaries if x.seconds_to_target is not None]
    if times and s.target_accuracy is not None:
        first = [r for r, x in zip(runs, summaries, strict=True) if x.seconds_to_target == min(times)]
        text += f" {percent(s.target_accuracy)} was first reached at {seconds(min(times))}"
        text += f" (by {', '.join(name(r.label) for r in first)})." if len(runs) > 1 else "."
    elif target is not None:
        text += f" The target of {percent(target)} was not reached."
    return f'<p class="lede">{text}</p>'


def _summary(
    runs: Sequence[Named], summaries: Sequence[Summary], target: float | None, last: int, *, fold: bool
) -> str:
    """The summary table, folded if wanted, and what has to be known to read it."""
    first = summaries[0]
    notes = []
    if first.budget_seconds is not None:
        notes.append(
            f"Accuracies are the shipped candidate’s on the test set. {seconds(first.budget_seconds)} is "
            + (
                "the last time until which every run was evaluated."
                if len(runs) > 1
                else "the last evaluation’s time."
            )
            + (f" They are means of the last {last} evaluations until then." if last > 1 else "")
        )
    if first.target_accuracy is not None:
        share = f"{TARGET_SHARE:.0%}".replace("%", " %")
        whose = "the best last accuracy" if len(runs) > 1 else "the last accuracy"
        origin = "as given" if target is not None else f"{share} of {whose}"
        notes.append(
            f"The target is {percent(first.target_accuracy)} ({origin}); its time is that of the first "
            "evaluation that reaches it."
        )
    for run, s in zip(runs, summaries, strict=True):
        if run.run.torn:
            notes.append(f"The last line of {name(run.label)} was incomplete and has been left out.")
        elif not s.finished:
            notes.append(f"{name(run.label)} has no end record: it is still running, or was stopped.")
    quiet = "".join(f'<p class="quiet">{note}</p>' for note in notes)
    caption = "Every run in numbers" if len(runs) > 1 else "The run in numbers"
    body = f"<div>{tables.summary(runs, summaries, caption)}</div>"
    return (f"<details><summary>{caption}</summary>{body}</details>" if fold else body) + quiet


def _metric(figures: Figures, rows: Sequence[Result], found: Comparisons | None) -> str:
    """The figures of the metric; of many groups all accuracies, an overview, and panels, some folded."""
    if not figures.many:
        shown = [figures.metric_by_time(), figures.metric_by_bytes(), figures.metric_late()]
        return _grid([figure for figure in shown if figure])
    ranked = dots.figure(rows, None if found is None else found.reference, ident="dots")
    overview = _grid([figure for figure in (ranked, figures.metric_by_time()) if figure])
    by_bytes = f"{figures.metric.capitalize()} against bytes"
    return overview + figures.metric_panels() + _fold(by_bytes, figures.metric_by_bytes())


def _densities(figures: Figures) -> str:
    """Mean densities, and those of each group's client classes; of many groups, where they change."""
    groups = figures.groups
    if not figures.many:
        density = [figures.mean_densities(), *map(figures.densities, range(len(groups)))]
        return _grid(density if len(groups) > 1 else density[::-1])
    moving = [n for n, g in enumerate(groups) if any(run.run.count("restoration") for run in g.runs)]
    each = _fold(
        "Client classes of the configurations that restore", _grid([*map(figures.densities, moving)])
    )
    return figures.mean_densities() + (each if moving else "")


def _folded(figures: Figures, caption: str, content: Sequence[str]) -> str:
    """Figures beside each other, folded where there are many groups."""
    return _fold(caption, _grid(content)) if figures.many and content else _grid(content)


def _fold(caption: str, content: str) -> str:
    return f"<details><summary>{escape(caption)}</summary><div>{content}</div></details>"


def _side_by_side(figures: Figures, content: Sequence[str]) -> str:
    """Figures beside each other, or below each other where they consist of panels."""
    return "".join(content) if figures.many else _grid(content)


def _grid(figures: Sequence[str]) -> str:
    return "" if not figures else f'<div class="grid">{"".join(figures)}</div>'


def _citation(runs: Sequence[Named]) -> str:
    """BibTeX of what the runs build on, their methods included, if the package can make it."""
    try:
        citation = importlib.import_module("fedgmr_plugin.citation")
    except ImportError:
        return ""
    methods = [run.run.header["config"].get("method") for run in runs]
    text = citation.cite(*(method for method in methods if isinstance(method, str)))
    what = "this run is" if len(runs) == 1 else "these runs are"
    return f"<p>If {what} part of a publication, please cite:</p><pre>{escape(text)}</pre>"
