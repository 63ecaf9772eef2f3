"""The tables of the page."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedgmr_plugin.config import FedGMRConfig, effective
from fedgmr_plugin.protocol.runlog import RunLog
from fedgmr_plugin.report.groups import Group, Named, between, options
from fedgmr_plugin.report.summary import Summary
from fedgmr_plugin.report.svg import swatch
from fedgmr_plugin.report.text import NONE, escape, megabytes, name, number, percent, seconds, written
from fedgmr_plugin.report.tracks import ClassFigures, class_figures

#: Restorations up to which their table is open when the page is.
OPEN_ROWS = 40
#: Configuration keys that differ between runs without meaning anything.
UNSHOWN = ("run_name", "output_dir", "progress")


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


def hashes(runs: Sequence[Named], summaries: Sequence[Summary]) -> str:
    """What identifies each run: seed, the log's and the model's SHA-256."""
    rows = [
        [
            name(run.label),
            str(s.seed),
            f"<code>{digest(run.run)}</code>" if s.finished else "unfinished",
            f"<code>{escape(s.model_sha256)}</code>" if s.model_sha256 else NONE,
        ]
        for run, s in zip(runs, summaries, strict=True)
    ]
    head = ["Run", "Seed", "Log<small>sha-256</small>", "Model<small>sha-256</small>"]
    return table("Seeds and hashes", head, rows, text=(0, 2, 3))


def digest(run: RunLog) -> str:
    """SHA-256 of a run's log."""
    found = hashlib.sha256()
    with run.path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def client_classes(group: Group) -> str:
    """What became of each client class of one group; means over its seeds."""
    found: dict[float, list[tuple[int, ClassFigures]]] = {}
    for run in group.runs:
        for one, figures in class_figures(run.run):
            found.setdefault(one.density, []).append((len(one.clients), figures))
    rows = []
    for density in sorted(found, reverse=True):
        sizes, each = zip(*found[density], strict=True)
        rows.append(
            [
                f"{density:g}",
                number(_mean(sizes)),
                number(_mean([f.samples for f in each])),
                number(_mean([f.final_density for f in each]), 2),
                _whole([f.full_at for f in each]),
                number(_mean([f.uploads for f in each])),
                number(_mean([f.mean_staleness for f in each if f.mean_staleness is not None]), 2),
                megabytes(_mean([f.megabytes_up for f in each])),
                megabytes(_mean([f.megabytes_down for f in each])),
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
    over = "" if group.alone else f", means over {len(group.runs)} seeds"
    return table(f"Client classes of {name(group.label)}{over}", head, rows)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _whole(times: Sequence[float | None]) -> str:
    """When the clients of a class had the whole model: the median of the seeds in which they got it."""
    known = [time for time in times if time is not None]
    if not known:
        return "never"
    middle = float(np.median(known))
    some = "" if len(known) == len(times) else f" <small>({len(known)} of {len(times)} seeds)</small>"
    return ("the start" if middle == 0 else seconds(middle)) + some


def restorations(runs: Sequence[Named], *, is_open: bool = True) -> str:
    """Every restoration of each run with its cause, under a line that counts them; open if few and wanted."""
    without = [run for run in runs if not run.run.count("restoration")]
    shown = "".join(_restorations(run, is_open) for run in runs if run not in without)
    names = ", ".join(name(run.label) for run in without)
    return shown + (f"<p>{names}: no density was restored.</p>" if names else "")


def _restorations(run: Named, is_open: bool) -> str:
    records = run.run.records("restoration")
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
    body = table(f"Restorations of {name(run.label)}", head, rows, text=(2, 4))
    opened = " open" if is_open and len(records) <= OPEN_ROWS else ""
    return f"<details{opened}><summary>{name(run.label)}: {counted}</summary>{body}</details>"


def configuration(runs: Sequence[Named]) -> str:
    """What differs between the runs (or from the defaults, for one run), and all keys, folded."""
    configured = [options(run.run) for run in runs]
    keys = sorted(dict.fromkeys(key for one in configured for key in one), key=_group)
    if len(runs) > 1:
        different = [key for key in keys if len({written(one.get(key, ...)) for one in configured}) > 1]
        rows = [[_key(key), *(_cell(one, key) for one in configured)] for key in different]
        head = ["Key", *(name(run.label) for run in runs)]
        text = tuple(range(len(head)))
        shown = table("Keys that differ", head, rows, text=text) if rows else "<p>All keys are equal.</p>"
        rest = [[_key(key), _cell(configured[0], key)] for key in keys if key not in different]
        return shown + _folded("Keys that are equal", ["Key", "Value"], rest)
    defaults = effective(FedGMRConfig())
    changed = [key for key in keys if key in defaults and key not in UNSHOWN]
    changed = [key for key in changed if written(configured[0][key]) != written(defaults[key])]
    rows = [[_key(key), _cell(configured[0], key), escape(written(defaults[key]))] for key in changed]
    shown = (
        table("Keys set to other than their defaults", ["Key", "Value", "Default"], rows, text=(0, 1, 2))
        if rows
        else "<p>Every key has its default.</p>"
    )
    return shown + _folded(
        "All keys", ["Key", "Value"], [[_key(key), _cell(configured[0], key)] for key in keys]
    )


def differences(groups: Sequence[Group]) -> str:
    """What differs between groups of several seeds, and all keys that do not, folded."""
    configured = [options(group.runs[0].run) for group in groups]
    keys = sorted(between(groups), key=_group)
    rows = [[_key(key), *(_cell(one, key) for one in configured)] for key in keys]
    head = ["Key", *(name(group.label) for group in groups)]
    shown = ""
    if rows:
        caption = "Keys that differ between the configurations"
        shown = table(caption, head, rows, text=tuple(range(len(head))))
    elif len(groups) > 1:
        shown = "<p>No key differs between the configurations.</p>"
    equal = sorted((key for key in configured[0] if key not in keys and key not in UNSHOWN), key=_group)
    caption = f"{'All' if len(groups) == 1 else 'Other'} keys, of {groups[0].runs[0].label}"
    rest = [[_key(key), _cell(configured[0], key)] for key in equal]
    return shown + _folded(caption, ["Key", "Value"], rest)


def versions(runs: Sequence[Named]) -> str:
    """Package versions and devices; one column if they are the same in all runs."""
    found = [carried_out(run.run) for run in runs]
    same = all(one == found[0] for one in found)
    columns = found[:1] if same else found
    head = ["Package<small>and device</small>", *(["Version"] if same else [name(run.label) for run in runs])]
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


def carried_out(run: RunLog) -> dict[str, Any]:
    """What a run was carried out with: versions by package, and the device where the log names it."""
    device = run.header["device"]
    return {**run.header["versions"], **({} if device is None else {"device": device})}


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
    return escape(written(options[key])) if key in options else NONE
