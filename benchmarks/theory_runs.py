"""The theory checked on real runs: digits at two learning rates and Fashion-MNIST, probed with exact terms.

    python -m benchmarks.theory_runs [--output DIR] [--runs digits-0.25 ...]

Ten clients of high heterogeneity, delta form over the arrivals of each window (the form that the theorem is
about), restored by the ``time`` trigger. The probe set is all training data of the digits, and 64 images a
client of Fashion-MNIST. Prints one table in Markdown; about five minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from theory.check import RunReport, check_runs
from theory.gap import density_gap
from theory.log import RunLog, read_log
from theory.schema import TERMS
from theory.verdict import Finding

#: Bounds that are shown; the whole table comes from `fedgmr-theory check`.
BOUNDS = (
    "descent", "telescoped", "split_delta", "update", "mask_merge", "mask", "floored_topk", "aged_topk",
    "density_gap", "staleness_merge", "staleness", "path", "drift_merge", "drift", "heterogeneity",
    "uncovered", "nested_coverage", "rank_gap", "average_restored", "rank_restored",
)  # fmt: skip


class Task(NamedTuple):
    """One run: data, learning rate, virtual seconds, windows between probes, probe samples a client."""

    data: str
    rate: float
    seconds: float
    probe_interval: int
    probe_samples: int


TASKS = {
    "digits-0.25": Task("digits", 0.25, 900.0, 1, 10_000),
    "digits-0.01": Task("digits", 0.01, 900.0, 1, 10_000),
    "fashion-0.1": Task("fashion_mnist", 0.1, 7_000.0, 10, 64),
}


def train(folder: Path, name: str) -> Path:
    """One run."""
    from torch import nn

    from benchmarks import data, models
    from benchmarks.fashion_mnist import COMMON as FASHION
    from benchmarks.payloads import COMMON as DIGITS
    from fedgmr_plugin.datasets import DigitsCNN, digits
    from fedgmr_plugin.engine.seeds import isolated_rng
    from fedgmr_plugin.runtimes.launch import simulate

    task = TASKS[name]
    options: dict[str, Any] = {
        "time_budget": task.seconds,
        "probe": True,
        "probe_interval": task.probe_interval,
        "probe_samples": task.probe_samples,
        "progress": False,
        "workers": 1,
        "update_scope": "arrivals",
        "update_form": "delta",
        "trigger": "time",
        "output_dir": str(folder),
        "run_name": name,
    }
    if task.data == "digits":
        with isolated_rng(0):
            model: nn.Module = DigitsCNN()
        dataset, common = digits(seed=0), DIGITS
    else:
        section = {"name": "fashion_mnist", "split": "dirichlet", "alpha": 0.6}
        dataset, common = data.dataset(section, 10, 20, 0, test_batch=500), FASHION
        model = models.build("strided_cnn", dataset[-1], 0)
    simulate(dataset, model, {**common, **options}, 0, learning_rate=task.rate, frequency_of_the_test=50)
    return folder / name


def cell(finding: Finding) -> str:
    """Verdict, and both sides where there are any."""
    if finding.measured is None or finding.bound is None:
        return finding.verdict.value
    return f"{finding.verdict.value}: {finding.measured:.3g} against {finding.bound:.3g}"


def energies(log: RunLog) -> str:
    """Mean squared norms of the seven terms, as shares of their sum."""
    terms = log["terms"]
    means = [float(np.nanmean(terms[f"{term}_sq"])) for term in TERMS]
    return ", ".join(
        f"{term} {100 * x / sum(means):.0f} %" for term, x in zip(TERMS, means, strict=True) if x
    )


def rows(report: RunReport, expectations: dict[str, Finding], path: Path) -> dict[str, str]:
    """The table's column of one run."""
    log = read_log(path)
    gap, constants = density_gap(log), report.constants
    laws = [f for f in report.findings if f.group == "log"]
    found = {
        "laws of the log that hold": f"{sum(f.verdict.value == 'HOLDS' for f in laws)} of {len(laws)}",
        "violated laws": str(sum(f.verdict.value == "VIOLATED" for f in laws)),
        "L, from below": f"{constants['L'].value:.3g}",
        "A4 along the probed steps": f"{report['A4'].verdict.value}: {report['A4'].reason or 'every window'}",
    }
    found |= {f"({report[name].equation}) {name}": cell(report[name]) for name in BOUNDS}
    weighted = expectations["corollary_weighted"]
    if weighted.bound is not None and weighted.measured:
        found["(34) over its measured side"] = f"{weighted.bound / weighted.measured:.3g}"
    found["squared terms, shares"] = energies(log)
    found["mask distance over mask + drift + staleness"] = f"{gap.total('distance_share') or 0:.3f}"
    distance = gap.distance
    for title, part in (("first", distance[: len(distance) // 4]), ("last", distance[-len(distance) // 4 :])):
        found[f"mask distance, {title} quarter"] = f"{float(np.nanmean(part)):.3g}"
    found["mean mask distance, density gap, with frozen densities"] = ", ".join(
        f"{gap.total(name) or 0:.3g}" for name in ("distance", "gap", "frozen")
    )
    return found


def main() -> None:
    """Trains, checks, prints."""
    parser = argparse.ArgumentParser(description="The theory checked on real runs.")
    parser.add_argument("--output", type=Path, help="keep the runs here, and check those that are there")
    parser.add_argument("--runs", nargs="+", default=list(TASKS), choices=list(TASKS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        columns = {}
        for name in options.runs:
            path = folder / name
            report = check_runs([path if (path / "run.jsonl").exists() else train(folder, name)])
            columns[name] = rows(report.runs[0], {f.name: f for f in report.expectations}, path)
    print("| | " + " | ".join(columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for key in next(iter(columns.values())):
        print(f"| {key} | " + " | ".join(column.get(key, "-") for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
