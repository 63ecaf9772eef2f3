"""What a run would have to log, or to do otherwise, for more of the table to be decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from theory.bounds import BOUNDS
from theory.checks.conditions import Condition
from theory.frame import Frame
from theory.options import LATER
from theory.verdict import Finding, Verdict

#: Equations that need ``terms`` records, shares of merged uploads, and several seeds.
_TERMS = frozenset((5, 6, *range(9, 12), *range(15, 26)))
_MERGED = frozenset((8, 26, 27, 28))
_SEEDS = frozenset((4, 7, *range(31, 36)))


def advice(frame: Frame, conditions: Mapping[str, Condition], findings: Sequence[Finding]) -> tuple[str, ...]:
    """Sentences, each with an option and the rows that it would decide; none where nothing is left open.

    A row is left out where the run's update form excludes it. No row is promised a verdict other than
    UNDETERMINED: a hypothesis may still be refuted, a constant unknown.
    """
    form = {name for name in ("DELTA", "REPL") if conditions[name].met is False}
    unsettled = {
        int(f.equation)
        for f in findings
        if f.equation and f.verdict is Verdict.UNDETERMINED and f.name in BOUNDS
        and not form & set(BOUNDS[f.name].hypotheses)
    }  # fmt: skip
    analysed, probed = conditions["ALG"].met is True, len(frame.log["probe"]) > 0
    lines = []
    if not probed:
        descent = set() if frame.statistics_move else {2, 3}
        rows = unsettled & (descent | (_TERMS if analysed else set()))
        shown = [*([] if frame.statistics_move else ["A4"]), *([listed(rows)] if rows else [])]
        if shown:
            lines.append(f"{probing(frame)} would show {' and '.join(shown)}")
    if not analysed:
        more = f", with probes also {listed(unsettled & _TERMS)}" if unsettled & _TERMS else ""
        lines.append(
            f"{listed(unsettled & _MERGED)} are about another merge than this run's "
            f"({conditions['ALG'].reason}): a run as analysed would show them{more}"
        )
    if unsettled & _SEEDS:
        lines.append(
            f"{listed(unsettled & _SEEDS)} are about expectations: give several seeds of one configuration"
            + ("" if analysed and probed else ", as analysed and probed")
        )
    return tuple(lines)


def probing(frame: Frame) -> str:
    """What gives this run probes: options that do not refuse each other, or another framework's records."""
    log = frame.log
    if not log.is_plugins:
        return "`probe` records of every window (docs/run-log.md)"
    changes = ["`probe: true`", "`probe_interval: 1`"]
    if log.config("payload_dtype") not in (None, LATER["payload_dtype"]):
        changes.append(f"`payload_dtype: {LATER['payload_dtype']}`")
    trainer = ""
    if log.number("local_steps") is None and log.config("local_steps") != "epochs":
        trainer = " and the built-in trainer instead of this run's own"
    return f"probes ({', '.join(changes)} in fedgmr_args{trainer})"


def listed(equations: Iterable[int]) -> str:
    """Equation numbers for reading, stretches of three or more contracted: ``(2), (5) to (8)``."""
    parts: list[str] = []
    stretch: list[int] = []
    for number in [*sorted(equations), -1]:
        if stretch and number != stretch[-1] + 1:
            whole = [f"({n})" for n in stretch]
            parts += [f"{whole[0]} to {whole[-1]}"] if len(stretch) > 2 else whole
            stretch = []
        stretch.append(number)
    return ", ".join(parts)
