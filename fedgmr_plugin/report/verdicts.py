"""Verdicts of the theory check beside a run: ``fedgmr-theory check RUN --json -o RUN/theory.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedgmr_plugin.protocol.runlog import RunLog
from fedgmr_plugin.report.groups import Named
from fedgmr_plugin.report.tables import table
from fedgmr_plugin.report.text import NONE, escape, name

#: Name of the file in a run's directory, and the most bytes of it that are read.
FILE_NAME, MOST_BYTES = "theory.json", 16_000_000
WORDS = ("HOLDS", "VIOLATED", "UNDETERMINED", "VACUOUS")


class Finding(NamedTuple):
    """One check: name, group (``log``, ``assumption``, ...), title, verdict, reason, equation's number."""

    name: str
    group: str
    title: str
    verdict: str
    reason: str
    equation: str


class Verdicts(NamedTuple):
    """What was found beside a run: findings, or why there are none that can be shown."""

    findings: tuple[Finding, ...] = ()
    problem: str = ""


def read_verdicts(run: RunLog) -> Verdicts | None:
    """The findings of the file beside the run's log; None if there is no such file."""
    file = run.path.parent / FILE_NAME
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > MOST_BYTES:
            return Verdicts(problem=f"{FILE_NAME} is larger than {MOST_BYTES} bytes")
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return Verdicts(problem=f"{FILE_NAME} cannot be read: {type(error).__name__}")
    try:
        return Verdicts(_findings(data, run.name))
    except (KeyError, TypeError, ValueError):
        return Verdicts(problem=f"{FILE_NAME} is not what fedgmr-theory check --json writes about this run")


def _findings(data: Any, name: str) -> tuple[Finding, ...]:
    """The findings about the run of that name.

    Raises:
        KeyError, TypeError, ValueError: the data have another form, or are about other runs.
    """
    about = [run for run in data["runs"] if run["name"] == name]
    if len(about) != 1:
        raise ValueError(name)
    found = []
    for item in about[0]["findings"]:
        texts = [item[key] for key in Finding._fields]
        if not all(isinstance(text, str) for text in texts) or item["verdict"] not in WORDS:
            raise ValueError(name)
        found.append(Finding(*texts))
    return tuple(found)


def theory(runs: Sequence[Named], verdicts: Sequence[Verdicts | None]) -> str:
    """Verdicts of the theory check, run beside run; empty where no run has any."""
    shown = [(run, one) for run, one in zip(runs, verdicts, strict=True) if one is not None]
    notes = "".join(
        f'<p class="quiet">{name(run.label)}: {escape(one.problem)}.</p>' for run, one in shown if one.problem
    )
    known = [(run, {f.name: f for f in one.findings}) for run, one in shown if not one.problem]
    every = {check: f for _, found in known for check, f in found.items()}
    laws = [check for check, f in every.items() if f.group == "log"]
    decided: list[list[str]] = []
    open_: list[list[str]] = []
    if laws:
        decided.append(["Laws of the log", *(_counted(found, laws) for _, found in known)])
    for check, f in every.items():
        if f.group != "log":
            where = f" ({escape(f.equation)})" if f.equation else ""
            label = f"{escape(f.title)} <small><code>{escape(check)}</code>{where}</small>"
            told = any(found[check].verdict != "UNDETERMINED" for _, found in known if check in found)
            rows = decided if told else open_
            rows.append([label, *(_verdict(found.get(check)) for _, found in known)])
    head = ["Check", *(name(run.label) for run, _ in known)]
    text = tuple(range(len(head)))
    body = table("Verdicts of fedgmr-theory check", head, decided, text=text) if decided else ""
    if open_:
        caption = f"UNDETERMINED by every log ({len(open_)})"
        body += f"<details><summary>{caption}</summary>{table(caption, head, open_, text=text)}</details>"
    legend = (
        '<p class="quiet">VACUOUS: it holds, by a bound too loose to say anything. UNDETERMINED: the log '
        "does not decide it. Rest the pointer on a verdict for its reason.</p>"
    )
    return body + (legend if body else "") + notes


def _verdict(finding: Finding | None) -> str:
    if finding is None:
        return NONE
    word = finding.verdict if finding.verdict != "VIOLATED" else "<strong>VIOLATED</strong>"
    return f'<span title="{escape(finding.reason)}">{word}</span>' if finding.reason else word


def _counted(found: Mapping[str, Finding], checks: Sequence[str]) -> str:
    """How often each verdict was given, the violated ones by name."""
    own = [found[check] for check in checks if check in found]
    counts = Counter(f.verdict for f in own)
    bad = [f.name for f in own if f.verdict == "VIOLATED"]
    text = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
    return text + (f": <strong>{escape(', '.join(bad))}</strong>" if bad else "")
