"""`fedgmr report`: one HTML page, a table as CSV or LaTeX, or a summary as JSON, from run logs."""

from __future__ import annotations

import json
from pathlib import Path

import click

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("runs", metavar="RUN [RUN ...]", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o",
    "--output",
    type=_FILE,
    help="File to write; report.html in the first run's directory by default.",
)
@click.option(
    "--target",
    metavar="ACC",
    type=click.FloatRange(0, 1, min_open=True),
    help="Accuracy in (0, 1] whose virtual time is tabled; 95 % of the best run's last accuracy by default.",
)
@click.option(
    "--against",
    metavar="NAME",
    help="Configuration (or one of its runs) that the others are compared with, seed by seed; the one of the "
    "best mean accuracy by default.",
)
@click.option(
    "--last",
    metavar="N",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Evaluations that a run's accuracy is the mean of: the last ones until all runs were evaluated.",
)
@click.option("--title", help="Heading of the page; the runs' names by default.")
@click.option("--csv", "csv_file", type=_FILE, help="Write the table of configurations as CSV, too.")
@click.option("--latex", "latex_file", type=_FILE, help="Write it as a LaTeX tabular (booktabs), too.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the runs' summaries as JSON; the page is written only if --output is given too.",
)
def report(
    runs: tuple[str, ...],
    output: Path | None,
    target: float | None,
    against: str | None,
    last: int,
    title: str | None,
    csv_file: Path | None,
    latex_file: Path | None,
    as_json: bool,
) -> None:
    """Make one self-contained HTML page that shows and compares runs.

    A RUN is a run's directory, or its run.jsonl. Runs that differ only in their seed are one configuration: a
    mean with its 95 % interval. A run that is still going can be reported too.
    """
    from fedgmr_plugin.protocol import read_run
    from fedgmr_plugin.report import render, summarise_all, tabulate
    from fedgmr_plugin.report.export import to_csv, to_latex
    from fedgmr_plugin.report.verdicts import read_verdicts

    logs = [read_run(path) for path in runs]
    try:
        table = tabulate(logs, target=target, against=against, last=last)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--against") from None
    for file, text in ((csv_file, to_csv(*table)), (latex_file, to_latex(*table))):
        if file is not None:
            _write(file, text)
    if as_json:
        click.echo(
            json.dumps([summary._asdict() for summary in summarise_all(logs, target, last=last)], indent=2)
        )
    if output is None and as_json:
        return
    if title is None:
        names = list(dict.fromkeys(row.group.label for row in table.rows))
        title = ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"
    verdicts = [read_verdicts(log) for log in logs]
    page = render(logs, title, target=target, against=against, last=last, verdicts=verdicts)
    place = output or logs[0].path.parent / "report.html"
    _write(place, page)
    if not as_json:
        click.echo(f"{place} ({len(logs)} run{'s' if len(logs) > 1 else ''})")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{file} cannot be written: {error.strerror}") from error
