"""`fedgmr report`: one HTML page, or a summary as JSON, from run logs."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("runs", metavar="RUN [RUN ...]", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write; report.html in the first run's directory by default.",
)
@click.option(
    "--target",
    metavar="ACC",
    type=click.FloatRange(0, 1, min_open=True),
    help="Accuracy in (0, 1] whose virtual time is tabled; 95 % of the best run's last accuracy by default.",
)
@click.option("--title", help="Heading of the page; the runs' names by default.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the runs' summaries as JSON; the page is written only if --output is given too.",
)
def report(
    runs: tuple[str, ...], output: Path | None, target: float | None, title: str | None, as_json: bool
) -> None:
    """Make one self-contained HTML page that shows and compares runs.

    A RUN is a run's directory, or its run.jsonl. A run that is still going can be reported too.
    """
    from fedgmr_plugin.protocol import read_run
    from fedgmr_plugin.report import render, summarise_all

    logs = [read_run(path) for path in runs]
    if as_json:
        click.echo(json.dumps([summary._asdict() for summary in summarise_all(logs, target)], indent=2))
    if output is None and as_json:
        return
    if title is None:
        names = [log.name for log in logs]
        title = ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more runs"
    page = render(logs, title, target=target)
    place = output or logs[0].path.parent / "report.html"
    try:
        place.write_text(page, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{place} cannot be written: {error.strerror}") from error
    if not as_json:
        click.echo(f"{place} ({len(logs)} run{'s' if len(logs) > 1 else ''})")
