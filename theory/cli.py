"""``fedgmr-theory``: check runs, measure their density gap, print the terms.

Exit status: 0, 1 when something is VIOLATED, 2 when a log cannot be read, a file cannot be written, or the
call is wrong.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import click

from theory.errors import LogError
from theory.schema import CONSTANTS, SLACK, constant_complaint

if TYPE_CHECKING:
    from theory.check import Report

_RUNS = click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN ...]")
_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


class _Unwritable(click.ClickException):
    """A file that was asked for cannot be written."""

    exit_code = 2


class _Group(click.Group):
    """Turns unreadable logs into exit status 2."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except LogError as error:
            click.echo(str(error), err=True)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Check recorded runs against the convergence theory, term by term."""


def _given(values: tuple[str, ...]) -> dict[str, float]:
    given: dict[str, float] = {}
    for value in values:
        name, equals, number = value.partition("=")
        try:
            given[name] = float(number)
        except ValueError:
            wrong = f"{number!r} is not a number" if equals else f"{value!r} is not NAME=NUMBER"
            raise click.BadParameter(wrong, param_hint="--given") from None
        if complaint := constant_complaint(name, given[name]):
            raise click.BadParameter(complaint, param_hint="--given")
    return given


def _accepted(names: tuple[str, ...], report: Report) -> tuple[str, ...]:
    """`names`, all of them checks of the report."""
    findings = [*report.expectations, *(finding for run in report.runs for finding in run.findings)]
    known = list(dict.fromkeys(finding.name for finding in findings))
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise click.BadParameter(
                f"{name!r} is no check: {hint}there are {', '.join(known)}", param_hint="--accept"
            )
    return names


def _write(path: Path | None, text: str) -> None:
    """Writes a file, if there is one to write.

    Raises:
        _Unwritable: it cannot be written.
    """
    if path is None:
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _Unwritable(f"{path} cannot be written: {error.strerror}; name another file") from error


def _json(data: object) -> str:
    return json.dumps(data, indent=1, allow_nan=False)


@main.command()
@_RUNS
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON instead of a table.")
@click.option("-o", "--output", type=_FILE, help="Write what would be printed to this file.")
@click.option("--html", "html_file", type=_FILE, help="Write a page with tables and charts, too.")
@click.option(
    "--given", multiple=True, metavar="NAME=NUMBER", help=f"A known constant: {', '.join(CONSTANTS)}."
)
@click.option("--accept", multiple=True, metavar="CHECK", help="A VIOLATED check that keeps exit status 0.")
@click.option("--slack", type=click.FloatRange(min=1, max=1e6), default=SLACK, show_default=True,
              help="Roundings of a gradient that the tolerance model allows for.")  # fmt: skip
@click.option("--verbose", is_flag=True, help="List the laws of the log that hold, too.")
@click.pass_context
def check(
    ctx: click.Context, runs: tuple[str, ...], as_json: bool, output: Path | None, html_file: Path | None,
    given: tuple[str, ...], accept: tuple[str, ...], slack: float, verbose: bool,
) -> None:  # fmt: skip
    """Judge every assumption and inequality on RUN (a log or a run's directory).

    Several runs are taken as seeds of one configuration, over which expectations are judged.
    """
    from theory import report as render
    from theory.check import check_logs
    from theory.gap import density_gap
    from theory.log import read_log

    known = _given(given)
    logs = [read_log(run) for run in runs]
    report = check_logs(logs, given=known, slack=slack)
    status = report.status(_accepted(accept, report))
    text = _json(report.as_dict()) if as_json else render.text(report, verbose=verbose)
    if html_file is not None:
        _write(html_file, render.html(report, [density_gap(log) for log in logs]))
    _write(output, text + "\n")
    if output is None:
        click.echo(text)
    ctx.exit(status)


@main.command()
@_RUNS
@click.option("--json", "as_json", is_flag=True, help="Print totals and series as JSON instead of a table.")
@click.option("-o", "--output", type=_FILE, help="Write what would be printed to this file.")
@click.option("--svg", "svg_file", type=_FILE, help="Write the chart of the (one) run, too.")
def gap(runs: tuple[str, ...], as_json: bool, output: Path | None, svg_file: Path | None) -> None:
    """Measure the average density gap of each RUN, against frozen densities and with its price."""
    from theory import report as render
    from theory.gap import density_gap
    from theory.log import read_log

    if svg_file is not None and len(runs) != 1:
        raise click.UsageError("--svg takes one run")
    gaps = [density_gap(read_log(run)) for run in runs]
    text = _json([entry.as_dict() for entry in gaps]) if as_json else render.gap_text(gaps)
    if svg_file is not None:
        charts = render.gap_charts(gaps[0]) or ["<svg xmlns='http://www.w3.org/2000/svg'/>"]
        _write(svg_file, charts[0] + "\n")
    _write(output, text + "\n")
    if output is None:
        click.echo(text)


@main.command()
@click.argument("names", nargs=-1, metavar="[BOUND ...]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--cite", "bibtex", is_flag=True, help="Print the BibTeX of what the bounds rest on instead.")
def terms(names: tuple[str, ...], as_json: bool, bibtex: bool) -> None:
    """Print the terms and bounds: LaTeX, hypotheses, source, Python function."""
    from theory.bounds import BOUNDS
    from theory.catalogue import catalogue, text
    from theory.citation import cite

    unknown = [name for name in names if name not in BOUNDS]
    if unknown:
        raise click.BadParameter(f"no bound {', '.join(unknown)}; there are {', '.join(BOUNDS)}")
    if bibtex:
        click.echo(cite(names or None), nl=False)
    elif as_json:
        click.echo(json.dumps(catalogue(names or None), indent=1))
    else:
        click.echo(text(names or None))


if __name__ == "__main__":
    main()
