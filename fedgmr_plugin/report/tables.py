"""The tables of the page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from fedgmr_plugin.config import FedGMRConfig, effective
from fedgmr_plugin.protocol.runlog import RunLog
from fedgmr_plugin.report.figures import Named
from fedgmr_plugin.report.summary import Summary
from fedgmr_plugin.report.svg import swatch
from fedgmr_plugin.report.text import NONE, escape, megabytes, name, number, percent, seconds
from fedgmr_plugin.report.tracks import class_figures, classes

#: Restorations up to which their table is open when the page is.
OPEN_ROWS = 40
#: Header keys that are compared beside the configurations.
FACTS = ("seed", "clients", "densities", "model_megabytes", "eta", "local_steps", "windows", "time_budget")
#: Configuration keys that differ between runs without meaning anything.
IDLE = ("run_name", "output_dir", "progress")


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int] = (0,)
) -> str:
    """A table; cells are HTML already, and the first of each row is its header.

    Args:
        text: columns that hold text, aligned left; all others are numbers, aligned right.
    """
    kinds = ["" if place in text else ' class="n"' for place in range(len(head))]
    narrow = ' class="narrow"' if len(text) == len(head) else ""
    top = "".join(f'<th scope="col"{kind}>{cell}</th>' for kind, cell in zip(kinds, head, strict=True))
    body = "".join(
        f'<tr><th scope="row"{kinds[0]}>{row[0]}</th>'
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], row[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table" tabindex="0"><table{narrow}><caption>{caption}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def summary(runs: Sequence[Named], summaries: Sequence[Summary], caption: str) -> str:
    """Every run in numbers; the best accuracy and the shortest time are set bold."""
    best = max((s.accuracy for s in summaries if s.accuracy is not None), default=None)
    soonest = min((s.seconds_to_target for s in summaries if s.seconds_to_target is not None), default=None)
    many = len(runs) > 1

    def bold(cell: str, it_is: bool) -> str:
        return f"<strong>{cell}</strong>" if it_is and many else cell

    budget, target = summaries[0].budget_seconds, summaries[0].target_accuracy
    head = [
        "Run",
        "Accuracy" + (f"<small>at {seconds(budget)}</small>" if budget is not None else ""),
        "Accuracy<small>last</small>",
        "Time"
        + (f"<small>to {percent(target)}</small>" if target is not None else "<small>to target</small>"),
        "Up<small>MB</small>",
        "Down<small>MB</small>",
        "Density<small>mean</small>",
        "Staleness<small>mean</small>",
        "Windows",
        "Rejected",
        "Model<small>sha-256</small>",
    ]
    rows = []
    for run, s in zip(runs, summaries, strict=True):
        time = seconds(s.seconds_to_target) if s.seconds_to_target is not None else "not reached"
        sha = (
            f'<code title="{escape(s.model_sha256)}">{escape(s.model_sha256[:10])}</code>'
            if s.model_sha256
            else NONE
        )
        note = "" if s.finished else ' <span class="badge">unfinished</span>'
        rows.append(
            [
                f"{swatch(run.colour, run.dash, 2.4)}{name(run.label)}{note}",
                bold(percent(s.accuracy), s.accuracy is not None and s.accuracy == best),
                percent(s.last_accuracy),
                bold(
                    time if target is not None else NONE,
                    s.seconds_to_target is not None and s.seconds_to_target == soonest,
                ),
                megabytes(s.megabytes_up),
                megabytes(s.megabytes_down),
                number(s.mean_density, 3),
                number(s.mean_staleness, 2),
                number(s.windows),
                number(s.rejected),
                sha,
            ]
        )
    return table(caption, head, rows)


def client_classes(run: Named) -> str:
    """What became of each client class of one run."""
    rows = []
    for group in classes(run.run):
        f = class_figures(run.run, group)
        rows.append(
            [
                f"{group.density:g}",
                number(len(group.clients)),
                number(f.samples),
                number(f.final_density, 2),
                "never" if f.full_at is None else "the start" if f.full_at == 0 else seconds(f.full_at),
                number(f.uploads),
                number(f.mean_staleness, 2),
                megabytes(f.megabytes_up),
                megabytes(f.megabytes_down),
            ]
        )
    head = [
        "Class<small>initial density</small>",
        "Clients",
        "Samples",
        "Density<small>at the end</small>",
        "Whole model<small>from</small>",
        "Uploads",
        "Staleness<small>mean</small>",
        "Up<small>MB</small>",
        "Down<small>MB</small>",
    ]
    return table(f"Client classes of {name(run.label)}", head, rows)


def restorations(run: Named) -> str:
    """Every restoration of one run with its cause, under a line that counts them."""
    records = run.run.records("restoration")
    if not records:
        return f"<p>{name(run.label)}: no density was restored.</p>"
    causes = Counter(str(record["cause"]).replace("_", " ") for record in records)
    counted = ", ".join(f"{count} by {escape(cause)}" for cause, count in causes.most_common())
    rows = [
        [
            seconds(record["time"]),
            number(record["window"]),
            "server’s floor" if record["client"] is None else f"client {number(record['client'])}",
            f"{number(record['before'], 2)} → {number(record['after'], 2)}",
            escape(str(record["cause"]).replace("_", " ")),
            number(record["floor"], 2),
        ]
        for record in records
    ]
    head = ["Time", "Window", "Who", "Density", "Cause", "Floor"]
    is_open = " open" if len(records) <= OPEN_ROWS else ""
    body = table(f"Restorations of {name(run.label)}", head, rows, text=(2, 4))
    return f"<details{is_open}><summary>{name(run.label)}: {counted}</summary>{body}</details>"


def configuration(runs: Sequence[Named]) -> str:
    """What differs between the runs (or from the defaults, for one run), and all keys, folded."""
    options = [_options(run.run) for run in runs]
    keys = sorted(dict.fromkeys(key for one in options for key in one), key=_group)
    if len(runs) > 1:
        different = [key for key in keys if len({_text(one.get(key, ...)) for one in options}) > 1]
        rows = [[_key(key), *(_cell(one, key) for one in options)] for key in different]
        head = ["Key", *(name(run.label) for run in runs)]
        text = tuple(range(len(head)))
        shown = table("Keys that differ", head, rows, text=text) if rows else "<p>All keys are equal.</p>"
        rest = [[_key(key), _cell(options[0], key)] for key in keys if key not in different]
        return shown + _folded("Keys that are equal", ["Key", "Value"], rest)
    defaults = effective(FedGMRConfig())
    changed = [key for key in keys if key in defaults and key not in IDLE]
    changed = [key for key in changed if _text(options[0][key]) != _text(defaults[key])]
    rows = [[_key(key), _cell(options[0], key), escape(_text(defaults[key]))] for key in changed]
    shown = (
        table("Keys set to other than their defaults", ["Key", "Value", "Default"], rows, text=(0, 1, 2))
        if rows
        else "<p>Every key has its default.</p>"
    )
    return shown + _folded(
        "All keys", ["Key", "Value"], [[_key(key), _cell(options[0], key)] for key in keys]
    )


def versions(runs: Sequence[Named]) -> str:
    """Package versions; one column if they are the same in all runs."""
    found = [run.run.header["versions"] for run in runs]
    same = all(one == found[0] for one in found)
    columns = found[:1] if same else found
    head = ["Package", *(["Version"] if same else [name(run.label) for run in runs])]
    packages = list(dict.fromkeys(package for one in columns for package in one))
    rows = [[escape(p), *(escape(one.get(p, NONE)) for one in columns)] for p in packages]
    return (
        table(
            "Packages that the run used" if len(runs) == 1 else "Packages that the runs used",
            head,
            rows,
            text=tuple(range(len(head))),
        )
        if rows
        else "<p>None recorded.</p>"
    )


def _options(run: RunLog) -> dict[str, Any]:
    """All that was configured: `fedgmr_args`, FedML's keys, and what the header adds to them."""
    header = run.header
    own = {key: value for key, value in header["config"].items() if key != "run_name"}
    fedml = {f"FedML: {key}": value for key, value in header["fedml"].items()}
    facts = {f"run: {key}": header[key] for key in FACTS}
    samples = header["client_samples"]
    return {**own, **fedml, **facts, "run: samples": sum(samples) if samples else None}


def _group(key: str) -> int:
    """Order of the kinds of keys: `fedgmr_args`, FedML's, the run's."""
    return ("FedML: ", "run: ").index(key[: key.index(" ") + 1]) + 1 if ": " in key else 0


def _folded(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    body = table(escape(caption), head, rows, text=(0, 1))
    return f"<details><summary>{escape(caption)} ({len(rows)})</summary>{body}</details>"


def _key(key: str) -> str:
    return f"<code>{escape(key)}</code>"


def _cell(options: Mapping[str, Any], key: str) -> str:
    return escape(_text(options[key])) if key in options else NONE


def _text(value: object) -> str:
    """A value as JSON, text without quotes; the same for 1 and 1.0."""
    if value is ...:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        texts = [json.dumps(_plain(item), ensure_ascii=False) for item in value]
        runs = [(text, len(list(same))) for text, same in groupby(texts)]
        parts = [f"{text} × {n}" if n > 2 else ", ".join([text] * n) for text, n in runs]
        return f"[{', '.join(parts)}]"
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """A number that is whole as an int, so that 1 and 1.0 read the same."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    return value
