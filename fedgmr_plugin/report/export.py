"""The table of groups as CSV and as LaTeX, for spreadsheets and papers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from fedgmr_plugin.report.groups import clock
from fedgmr_plugin.report.results import Comparisons, Result
from fedgmr_plugin.report.text import clean, latex

#: First characters of a cell that spreadsheets take for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

#: Columns of the CSV file; accuracies are shares of 1, cells without a value empty.
COLUMNS = (
    "group",
    "runs",
    "seeds",
    "budget_seconds",
    "evaluations",
    "accuracy_mean",
    "accuracy_low",
    "accuracy_high",
    "accuracy_iqm",
    "target_accuracy",
    "seeds_that_reached_it",
    "median_seconds_to_target",
    "median_bytes_to_target",
    "mean_staleness",
    "mean_bytes",
    "against",
    "pairs",
    "difference_mean",
    "difference_low",
    "difference_high",
    "p_holm",
    "verdict",
)


def to_csv(rows: Sequence[Result], comparisons: Comparisons | None, last: int = 1) -> str:
    """One line for each group under `COLUMNS`, numbers in full precision.

    A text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for place, row in enumerate(rows):
        first = row.summaries[0]
        compared = comparisons.others[place] if comparisons else None
        cells: list[object] = [
            row.group.label,
            "; ".join(run.run.name for run in row.group.runs),
            " ".join(str(summary.seed) for summary in row.summaries),
            first.budget_seconds,
            last,
            *row.accuracy[:3],
            row.iqm,
            first.target_accuracy,
            row.reached,
            row.seconds,
            row.megabytes * 1e6,
            row.staleness.value,
            row.traffic * 1e6,
        ]
        if comparisons and compared:
            found = compared.difference
            against = rows[comparisons.reference].group.label
            cells += [against, found.n, found.value, found.low, found.high, compared.p, compared.verdict]
        else:
            cells += [None] * (len(COLUMNS) - len(cells))
        writer.writerow([_cell(value) for value in cells])
    return file.getvalue()


def to_latex(rows: Sequence[Result], comparisons: Comparisons | None, last: int = 1) -> str:
    """A ``tabular`` for booktabs, one line for each group, under comments that say what the numbers are."""
    first = rows[0].summaries[0]
    kind = clock([run.run for row in rows for run in row.group.runs])
    budget, target = "the last evaluation", "the target"
    if first.budget_seconds is not None:
        budget = f"{first.budget_seconds:.0f} {kind} seconds"
    if first.target_accuracy is not None:
        target = rf"{100 * first.target_accuracy:.1f}\,\%"
    notes = [
        r"Needs \usepackage{booktabs}. Made by fedgmr report from the run logs alone.",
        f"Accuracy: test set, at {budget}" + (f", mean of {last} evaluations" if last > 1 else "") + ";",
        "mean over seeds and half of its 95 % interval (Student's t).",
        f"{kind.capitalize()} seconds and MB (up and down) to the target: median over seeds; in brackets how "
        "many reached it, if not all.",
        "Staleness: mean over seeds of a run's mean, in windows.",
    ]
    head = ["", "seeds", r"accuracy (\%)", f"s to {target}", f"MB to {target}", "staleness"]
    if comparisons:
        against = rows[comparisons.reference].group.label
        notes.append(
            f"Difference: accuracy minus that of {latex(against)}, paired by seed, percentage points; "
            "its 95 % interval."
        )
        head.append("difference")
    lines = [f"% {note}" for note in notes]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule"]
    lines += [" & ".join(head) + r" \\", r"\midrule"]
    for place, row in enumerate(rows):
        cells = [
            latex(row.group.label),
            str(len(row.summaries)),
            _mean(row),
            _median(row.seconds, row),
            _median(row.megabytes, row),
            "--" if math.isnan(row.staleness.value) else f"{row.staleness.value:.2f}",
        ]
        if comparisons:
            compared = comparisons.others[place]
            cells.append("--" if compared is None else _difference(*compared.difference[:3]))
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _cell(value: object) -> object:
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else ""
    if isinstance(value, str):
        text = " ".join(clean(value).split())
        return "'" + text if text.startswith(_FORMULA) else text
    return value


def _mean(row: Result) -> str:
    if math.isnan(row.accuracy.value):
        return "--"
    half = "" if math.isnan(row.accuracy.half) else rf" \pm {100 * row.accuracy.half:.2f}"
    return f"${100 * row.accuracy.value:.2f}{half}$"


def _median(value: float, row: Result) -> str:
    some = "" if row.reached == len(row.summaries) else f" ({row.reached}/{len(row.summaries)})"
    return ("--" if not math.isfinite(value) else f"{value:.0f}") + some


def _difference(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "--"
    spread = "" if math.isnan(low) else rf"\;[{100 * low:+.2f}, {100 * high:+.2f}]"
    return f"${100 * value:+.2f}{spread}$"
