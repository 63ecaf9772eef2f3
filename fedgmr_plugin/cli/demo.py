"""`fedgmr demo`: a first curve in a minute."""

from __future__ import annotations

import time
from pathlib import Path

import click

from fedgmr_plugin.protocol.runlog import read_run
from fedgmr_plugin.report import render, summarise_all

_READING = """
accuracy: mean of the last {last} evaluations; restored: how often a client's density was raised.
The network is tiny: of the hidden layer's 1,024 weights a client of density .05 has 51, and without
GMR that capacity is the limit. docs/results.md has larger networks and other data. One seed
(another: --seed); a run completes the window in which its budget ends."""


@click.command()
@click.option(
    "--output", default="demo_runs", show_default=True, help="Directory for the runs and the report."
)
@click.option("--seed", default=0, show_default=True, help="Root of the seed tree.")
def demo(output: str, seed: int) -> None:
    """Train FedGMR on handwritten digits beside baselines; write a report."""
    from fedgmr_plugin.runtimes.demo import LAST, run_demo
    from fedgmr_plugin.runtimes.progress import say

    directory = next_free(Path(output))
    started = time.monotonic()
    finished = []
    for contender, path in run_demo(directory, seed):
        finished.append((contender, read_run(path)))
    runs = [run for _, run in finished]
    report = directory / "report.html"
    report.write_text(render(runs, title="FedGMR on handwritten digits", last=LAST), encoding="utf-8")

    budget = runs[0].header["time_budget"]
    rows = summarise_all(runs, last=LAST)
    target = rows[0].target_accuracy or 0.0
    say(f"\nAfter {budget:,.0f} virtual seconds (trained in {time.monotonic() - started:.0f} s):\n")
    goal = f"to {100 * target:.1f} %"
    say(f"{'':<22}{'accuracy':>10}{goal:>12}{'MB up':>9}{'MB down':>9}{'density':>9}{'restored':>10}")
    for (contender, run), row in zip(finished, rows, strict=True):
        reached = f"{row.seconds_to_target:,.0f} s" if row.seconds_to_target is not None else "never"
        say(
            f"{contender.title:<22}{_percent(row.accuracy):>10}{reached:>12}{row.megabytes_up:>9,.0f}"
            f"{row.megabytes_down:>9,.0f}{_number(row.mean_density):>9}{run.count('restoration'):>10}"
        )
    say(_READING.format(last=LAST))
    say(f"report: {report.resolve()}")


def next_free(parent: Path) -> Path:
    """`parent`/001, or the first number that is not taken."""
    number = 1
    while (parent / f"{number:03d}").exists():
        number += 1
    directory = parent / f"{number:03d}"
    directory.mkdir(parents=True)
    return directory


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
