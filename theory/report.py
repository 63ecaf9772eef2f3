"""Reports as text, and as a self-contained HTML page (no script, no network)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from theory.check import GROUPS, Report, RunReport
from theory.gap import DensityGap
from theory.plot import Line, chart
from theory.verdict import Finding, Verdict

_TITLES = {
    "log": "Is the log consistent?",
    "assumption": "Assumptions",
    "condition": "Conditions",
    "inequality": "Inequalities, window by window",
    "expectation": "Bounds in expectation",
}
_COLOUR = {
    Verdict.HOLDS: "#d9f2e3",
    Verdict.VIOLATED: "#fbd5d5",
    Verdict.UNDETERMINED: "#eeeeee",
    Verdict.VACUOUS: "#fdf0cf",
}
_STYLE = (
    "body{font:14px/1.45 sans-serif;max-width:72em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}"
    "th,td{padding:.2em .6em;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}svg{max-width:100%}"
)
_HEAD = ("eq.", "check", "verdict", "measured", "bound", "margin", "checks", "remark")


def text(report: Report, *, verbose: bool = False) -> str:
    """A table for the terminal. Laws of the log that hold are counted, not listed, unless `verbose`."""
    lines: list[str] = []
    for run in report.runs:
        lines.append(f"{run.path}" + (f"  ({run.name})" if run.name else ""))
        lines += _constants_text(run)
        for group in GROUPS[:-1]:
            lines += _group_text(group, [f for f in run.findings if f.group == group], verbose)
    lines += _group_text("expectation", list(report.expectations), verbose)
    lines += _advice_text(report)
    bad = report.violated()
    lines.append("")
    lines.append(f"{len(bad)} VIOLATED" + (f": {', '.join(f.name for f in bad)}" if bad else ""))
    return "\n".join(lines)


def _advice_text(report: Report) -> list[str]:
    """What would decide more, said once for all runs that it is true of."""
    sentences = dict.fromkeys(sentence for run in report.runs for sentence in run.advice)
    return ["", "What would decide more", *(f"  {sentence}" for sentence in sentences)] if sentences else []


def _constants_text(run: RunReport) -> list[str]:
    rows = [(e.name, _number(e.value if e.known else None), e.kind, e.note) for e in run.constants.values()]
    return ["", "Constants", *(f"  {n:<11}{v:>12}  {k:<12}{note}" for n, v, k, note in rows)]


def _group_text(group: str, findings: Sequence[Finding], verbose: bool) -> list[str]:
    lines = ["", _TITLES[group]]
    hidden = 0
    for f in findings:
        if group == "log" and f.verdict is Verdict.HOLDS and not verbose:
            hidden += 1
            continue
        sides = (
            f"{_number(f.measured):>12}{_number(f.bound):>12}"
            if group in ("inequality", "expectation")
            else ""
        )
        number = f"({f.equation})" if f.equation else ""
        lines.append(
            f"  {f.verdict.value:<13}{number:<5}{f.name:<21}{sides}{f.checks:>8}  {_remark(f)}".rstrip()
        )
    if hidden:
        lines.append(f"  HOLDS        {hidden} laws of the log")
    return lines


def _remark(finding: Finding) -> str:
    parts = [finding.reason] if finding.reason else []
    if finding.witness is not None:
        parts.append(f"first: {finding.witness}")
    return "; ".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def gap_text(gaps: Sequence[DensityGap]) -> str:
    """Totals and price of each run."""
    lines: list[str] = []
    for gap in gaps:
        lines.append(f"{gap.name}: means over {len(gap.window)} windows")
        rows = (
            ("mask distance, measured", "distance"),
            ("density gap (its bound for top-k masks)", "gap"),
            ("  with frozen densities, same shares", "frozen"),
            ("  with frozen densities and their own shares", "frozen_reshared"),
            ("average of 1 - k/D_p", "average"),
            ("  with frozen densities", "average_frozen"),
            ("mask error ||M||^2", "mask_error"),
            ("  its share of all squared terms", "mask_share"),
            ("mask distance over mask + drift + staleness", "distance_share"),
            ("staleness", "staleness"),
            ("arrivals", "arrivals"),
        )
        lines += [f"  {label:<46}{_number(gap.total(series)):>12}" for label, series in rows]
        lines.append(f"  {'share of the gap that restoration removed':<46}{_number(gap.saving):>12}")
        if not gap.shares_logged:
            lines.append("  pibar is not logged for every arrival: equal shares were used")
        head = f"  {'density':>9}{'arrivals':>10}{'staleness':>11}"
        lines.append(f"{head}{'of them restored':>18}{'staleness':>11}")
        for p in gap.price:
            risen = f"{p.restored:>18}{_number(p.restored_staleness):>11}"
            lines.append(f"  {p.density:>9.3g}{p.arrivals:>10}{p.staleness:>11.3g}{risen}")
        lines.append("")
    return "\n".join(lines).rstrip()


def gap_charts(gap: DensityGap) -> list[str]:
    """SVG charts of one run: the gap and its counterfactual, and the price."""
    t = gap.window
    first = chart(
        f"{gap.name}: average density gap",
        [
            Line("mask distance", t, gap.distance),
            Line("density gap", t, gap.gap),
            Line("frozen densities", t, gap.frozen, dashed=True),
            Line("frozen, own shares", t, gap.frozen_reshared, dashed=True),
        ],
        x_label="window",
        y_label="squared weights",
    )
    second = chart(
        f"{gap.name}: what it costs",
        [
            Line("staleness (windows)", t, gap.staleness),
            Line("arrivals", t, gap.arrivals),
            Line("mean density", t, gap.density),
        ],
        x_label="window",
        y_label="",
    )
    return [svg for svg in (first, second) if svg]


def html(report: Report, gaps: Sequence[DensityGap] = ()) -> str:
    """A page with every table and chart."""
    body = [html_section(report, gaps)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Theory check</title>'
        f"<style>{_STYLE}</style></head><body><h1>Theory check</h1>{''.join(body)}</body></html>\n"
    )


def html_section(report: Report, gaps: Sequence[DensityGap] = ()) -> str:
    """The same as one ``<section>``, for another page."""
    parts = ['<section class="theory">']
    for run in report.runs:
        parts.append(f"<h2>{escape(run.name or run.path)}</h2>")
        for group in GROUPS[:-1]:
            parts.append(_group_html(group, [f for f in run.findings if f.group == group]))
    parts.append(_group_html("expectation", list(report.expectations)))
    parts += [f"<p>{escape(sentence.strip())}</p>" for sentence in _advice_text(report)[1:]]
    parts += [svg for gap in gaps for svg in gap_charts(gap)]
    return "".join(parts) + "</section>"


def _group_html(group: str, findings: Sequence[Finding]) -> str:
    head = "".join(f"<th>{escape(label)}</th>" for label in _HEAD)
    rows = []
    for f in findings:
        numbers = "".join(f'<td class="n">{_number(value)}</td>' for value in (f.measured, f.bound, f.margin))
        rows.append(
            f'<tr style="background:{_COLOUR[f.verdict]}"><td>{f.equation}</td>'
            f'<td title="{escape(f.title)}">{escape(f.name)}</td><td>{f.verdict.value}</td>{numbers}'
            f'<td class="n">{f.checks}</td><td>{escape(_remark(f))}</td></tr>'
        )
    body = "".join(rows)
    return f"<h3>{_TITLES[group]}</h3><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
