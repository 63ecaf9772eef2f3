"""`fedgmr bench EXPERIMENT`: every method of an experiment on equal terms, and a report of them."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

if TYPE_CHECKING:
    from fedgmr_plugin.report.results import Table
    from fedgmr_plugin.runtimes.campaign import Campaign, Status
    from fedgmr_plugin.runtimes.experiment import Experiment

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("experiment", type=_FILE)
@click.option("--methods", metavar="NAME,...", help="Methods to run; all of the experiment's by default.")
@click.option("--seeds", metavar="SEED,...", help="Seeds to run; the experiment's by default.")
@click.option(
    "--budget",
    metavar="SECONDS",
    type=click.FloatRange(0, min_open=True),
    help="Virtual seconds of every run, instead of the experiment's.",
)
@click.option(
    "--set",
    "changes",
    metavar="KEY=VALUE",
    multiple=True,
    help="Another value in the experiment, such as fedgmr_args.heterogeneity=low; may be repeated.",
)
@click.option("--variant", metavar="NAME", help="Run a variant that the experiment names.")
@click.option("--reduced", is_flag=True, help="Run the experiment's reduced form.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    help="Runs at the same time, of one thread each; one for each core by default.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the runs; fedgmr_bench/EXPERIMENT by default.",
)
@click.option("--list", "only_list", is_flag=True, help="Say what would run, and what is finished.")
def bench(
    experiment: Path,
    methods: str | None,
    seeds: str | None,
    budget: float | None,
    changes: tuple[str, ...],
    variant: str | None,
    reduced: bool,
    jobs: int,
    output: Path | None,
    only_list: bool,
) -> None:
    """Run the methods of an EXPERIMENT file on equal terms, and compare them.

    The same command goes on where it was interrupted; runs that are finished are not repeated. It ends with
    a table, and report.html, table.csv and table.tex in the folder of the runs.
    """
    from fedgmr_plugin.runtimes.campaign import Campaign
    from fedgmr_plugin.runtimes.experiment import load, problem_of

    chosen = load(experiment)
    if variant is not None:
        chosen = chosen.as_varied(variant)
    if reduced:
        chosen = chosen.as_reduced()
    for change in changes:
        chosen = _changed(chosen, change)
    if budget is not None:
        chosen = chosen.changed("fedgmr_args.time_budget", budget)
    names = _chosen(methods, list(chosen.methods), str, "--methods")
    numbers = _chosen(seeds, None, int, "--seeds") if seeds else list(chosen.seeds)
    chosen.check(str(experiment))
    problem_of(chosen)
    form = [experiment.stem, *([variant] if variant else []), *(["reduced"] if reduced else [])]
    folder = output or Path("fedgmr_bench") / "-".join(form)
    campaign = Campaign(chosen, folder, names, numbers, jobs, _teller())
    if only_list:
        _list(campaign)
        return
    try:
        campaign.run()
    except KeyboardInterrupt:
        click.echo("\ninterrupted; the same command goes on", err=True)
        sys.exit(130)
    _show_failures(campaign)
    if campaign.runs():
        _report(chosen, campaign.runs(), folder)
    if campaign.failed:
        sys.exit(1)


def _changed(experiment: Experiment, change: str) -> Experiment:
    """The experiment with KEY=VALUE, a value as YAML has it."""
    key, equals, text = change.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        equals = ""
    if not equals:
        raise click.BadParameter(f"{change!r} is not KEY=VALUE", param_hint="--set")
    return experiment.changed(key, value)


def _chosen(
    given: str | None, known: list[str] | None, kind: Callable[[str], object], option: str
) -> list[Any]:
    """The values of a list with commas; all that are known where nothing is given."""
    if given is None:
        return list(known or ())
    words = [word.strip() for word in given.split(",") if word.strip()]
    try:
        values = [kind(word) for word in words]
    except ValueError:
        raise click.BadParameter(f"{given} is not a list of numbers", param_hint=option) from None
    unknown = [value for value in values if known is not None and value not in known]
    if unknown or not values:
        raise click.BadParameter(
            f"{unknown[0] if unknown else given!r} is not one of {', '.join(known or ())}", param_hint=option
        )
    return values


def _teller() -> Callable[[Status], None]:
    """Shows a campaign's status: a line that is written again on a terminal, else a line for each run."""
    said: list[tuple[int, int]] = []

    def tell(status: Status) -> None:
        running = ", ".join(f"{name} {share:.0%}" for name, share in status.running)
        left = "" if status.seconds_left is None else f", {_duration(status.seconds_left)} left"
        failed = f", {status.failed} failed" if status.failed else ""
        line = f"{status.done} of {status.total} runs{failed}{left}" + (f": {running}" if running else "")
        if sys.stderr.isatty():
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            click.echo("\r" + line[:width].ljust(width), err=True, nl=False)
            if status.done + status.failed == status.total:
                click.echo(err=True)
        elif said[-1:] != [(status.done, status.failed)]:
            said.append((status.done, status.failed))
            click.echo(line, err=True)

    return tell


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def _list(campaign: Campaign) -> None:
    finished = {run.name for run in campaign.runs()}
    for task in campaign.tasks:
        click.echo(f"{'finished' if task.name in finished else 'to run':9} {task.name}")


def _show_failures(campaign: Campaign) -> None:
    """Why runs failed, each reason once."""
    reasons: dict[str, list[str]] = {}
    for task in campaign.failed:
        own = str(campaign.folder / task.name)  # a name makes no other reason
        reasons.setdefault(_end_of(campaign.folder, task.name).replace(own, ""), []).append(task.name)
    for names in reasons.values():
        log = campaign.folder / f"{names[0]}.log"
        click.echo(f"{_listed(names)} failed; the end of {log}:", err=True)
        click.echo(_end_of(campaign.folder, names[0]), err=True)
    if campaign.skipped:
        idle = _listed([task.name for task in campaign.skipped])
        click.echo(f"{idle} not begun: the data or the model of their seed cannot be used", err=True)


def _end_of(folder: Path, name: str) -> str:
    """What a run's process printed last."""
    lines = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-12:])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _report(experiment: Experiment, runs: list[Path], folder: Path) -> None:
    """The report of finished runs, in files, and its table on the terminal."""
    from fedgmr_plugin.protocol.runlog import read_run
    from fedgmr_plugin.report import render, tabulate, to_csv, to_latex
    from fedgmr_plugin.report.verdicts import read_verdicts

    logs = [read_run(run) for run in runs]
    theirs = [run.name for run in runs if run.name.rpartition("-")[0] == experiment.against]
    against = theirs[0] if theirs else None  # any of its runs names a method
    table = tabulate(logs, against=against, last=experiment.last)
    page = render(
        logs,
        experiment.title,
        against=against,
        last=experiment.last,
        notes=experiment.notes,
        verdicts=[read_verdicts(log) for log in logs],
    )
    for name, text in (("report.html", page), ("table.csv", to_csv(*table)), ("table.tex", to_latex(*table))):
        (folder / name).write_text(text, encoding="utf-8")
    click.echo(_text(table))
    click.echo(f"{folder / 'report.html'} ({len(logs)} runs)")


def _text(table: Table) -> str:
    """The table of configurations in text: accuracy over seeds, and against the reference."""
    width = max(len(row.group.label) for row in table.rows)
    found = table.comparisons
    lines = [
        f"{'':{width}}  seeds   accuracy %" + ("" if found is None else "      difference [95 %]  verdict")
    ]
    for place, row in enumerate(table.rows):
        half = "" if math.isnan(row.accuracy.half) else f" ± {100 * row.accuracy.half:.2f}"
        line = f"{row.group.label:{width}}  {row.accuracy.n:5}  {100 * row.accuracy.value:6.2f}{half:8}"
        compared = None if found is None else found.others[place]
        if compared is not None:
            d = compared.difference
            span = "" if math.isnan(d.low) else f" [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
            line += f"  {100 * d.value:+6.2f}{span:18}  {compared.verdict}"
        lines.append(line.rstrip())
    if found is not None:
        why = "" if found.chosen else ", the best mean, chosen after the fact"
        reference = table.rows[found.reference].group.label
        lines.append(f"difference: points above {reference}{why}; paired by seed")
    return "\n".join(lines)
