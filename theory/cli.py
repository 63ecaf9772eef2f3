"""``fedgmr-theory``: check runs, measure their density gap, print the terms.

Exit status: 0, 1 when something is VIOLATED, 2 when a log cannot be read or the call is wrong.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from theory.errors import LogError
from theory.schema import CONSTANTS, SLACK

_RUNS = click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN ...]")
_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


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
        name, _, number = value.partition("=")
        if name not in CONSTANTS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(CONSTANTS)}", param_hint="--given")
        try:
            given[name] = float(number)
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is not NAME=NUMBER", param_hint="--given") from error
    return given


@main.command()
@_RUNS
@click.option("--json", "json_file", type=_FILE, help="Write the findings as JSON.")
@click.option("--html", "html_file", type=_FILE, help="Write a page with tables and charts.")
@click.option(
    "--given", multiple=True, metavar="NAME=NUMBER", help="A known constant: L, sigma_sq, F_inf, ..."
)
@click.option("--accept", multiple=True, metavar="CHECK", help="A VIOLATED check that keeps exit status 0.")
@click.option("--slack", type=click.FloatRange(min=1), default=SLACK, show_default=True,
              help="Roundings of a gradient that the tolerance model allows for.")  # fmt: skip
@click.option("--verbose", is_flag=True, help="List the laws of the log that hold, too.")
@click.pass_context
def check(
    ctx: click.Context, runs: tuple[str, ...], json_file: Path | None, html_file: Path | None,
    given: tuple[str, ...], accept: tuple[str, ...], slack: float, verbose: bool,
) -> None:  # fmt: skip
    """Judge every assumption and inequality on RUN (a log or a run's directory).

    Several runs are taken as seeds of one configuration, over which expectations are judged.
    """
    from theory import report as render
    from theory.check import check_logs
    from theory.gap import density_gap
    from theory.log import read_log

    logs = [read_log(run) for run in runs]
    report = check_logs(logs, given=_given(given), slack=slack)
    click.echo(render.text(report, verbose=verbose))
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if html_file is not None:
        html_file.write_text(render.html(report, [density_gap(log) for log in logs]), encoding="utf-8")
    ctx.exit(report.status(accept))


@main.command()
@_RUNS
@click.option("--json", "json_file", type=_FILE, help="Write totals and series as JSON.")
@click.option("--svg", "svg_file", type=_FILE, help="Write the chart of the (one) run.")
def gap(runs: tuple[str, ...], json_file: Path | None, svg_file: Path | None) -> None:
    """Measure the average density gap of each RUN, against frozen densities and with its price."""
    from theory import report as render
    from theory.gap import density_gap
    from theory.log import read_log

    if svg_file is not None and len(runs) != 1:
        raise click.UsageError("--svg takes one run")
    gaps = [density_gap(read_log(run)) for run in runs]
    click.echo(render.gap_text(gaps))
    if json_file is not None:
        data = [entry.as_dict() for entry in gaps]
        json_file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if svg_file is not None:
        charts = render.gap_charts(gaps[0])
        svg_file.write_text(
            (charts or ["<svg xmlns='http://www.w3.org/2000/svg'/>"])[0] + "\n", encoding="utf-8"
        )


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
