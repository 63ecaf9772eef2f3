"""Results of `fedgmr bench`, kept: from runs to a file of figures, and from that to the tables of the docs.

    fedgmr bench benchmarks/experiments/omniglot.yaml --reduced -o runs
    python -m benchmarks.collect runs --json benchmarks/results/omniglot_reduced.json
    python -m benchmarks.collect --table benchmarks/results/omniglot_reduced.json

A run's figure is the mean test accuracy of the shipped model over its last evaluations. Methods are compared
with the experiment's `against` seed by seed (Student's t, p corrected for all comparisons after Holm).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import machine
from fedgmr_plugin.protocol.runlog import read_run
from fedgmr_plugin.report import statistics
from fedgmr_plugin.runtimes.experiment import DESCRIPTION, Experiment, is_finished, run_name

#: Points of a curve that are kept, at most.
POINTS = 60


def collect(folder: Path) -> dict[str, Any]:
    """The figures of all finished runs of an experiment's folder."""
    text = (folder / DESCRIPTION).read_text(encoding="utf-8")
    experiment = Experiment.model_validate_json(text)
    runs = [
        figures(folder, method, seed, experiment.last)
        for method in experiment.methods
        for seed in seeds_of(folder, method)
        if is_finished(experiment, method, seed, folder)
    ]
    return {"experiment": json.loads(text), "machine": machine(), "runs": runs}


def seeds_of(folder: Path, method: str) -> list[int]:
    """Seeds of the runs that a folder has of a method."""
    names = [path.name for path in folder.glob(f"{method}-*") if path.is_dir()]
    return sorted(int(n.rpartition("-")[2]) for n in names if n.rpartition("-")[2].isdigit())


def figures(folder: Path, method: str, seed: int, last: int) -> dict[str, Any]:
    """One run in numbers."""
    log = read_run(folder / run_name(method, seed))
    accuracy, seconds = log.column("evaluation", "accuracy"), log.column("evaluation", "time")
    kept = np.unique(np.linspace(0, len(accuracy) - 1, POINTS).round().astype(int))
    end = log.end or {}
    return {
        "method": method,
        "seed": seed,
        "accuracy": float(np.mean(accuracy[-last:])),
        "windows": log.count("window"),
        "uploads": log.count("arrival"),
        "mean_staleness": float(np.mean(log.column("arrival", "staleness"))),
        "final_density": float(log.column("window", "mean_density")[-1]),
        "megabytes_up": float(log.column("evaluation", "bytes_up")[-1]) / 1e6,
        "megabytes_down": float(log.column("evaluation", "bytes_down")[-1]) / 1e6,
        "model_sha256": end.get("model_sha256"),
        "wall_seconds": end.get("wall_seconds"),
        "versions": log.header["versions"],
        "curve": [[round(float(seconds[i])), round(float(accuracy[i]), 4)] for i in kept],
    }


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    experiment = Experiment.model_validate(results["experiment"])
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for run in results["runs"]:
        runs.setdefault(run["method"], {})[run["seed"]] = run
    against = runs.get(experiment.against or "", {})
    compared = {m: _difference(of, against) for m, of in runs.items() if m != experiment.against}
    corrected = dict(zip(compared, statistics.holm([d.p for d in compared.values()]), strict=True))
    lines = [
        f"| method | seeds | accuracy % | against {experiment.against}, points [95 %] | verdict | windows "
        "| uploads | staleness | density | GB up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, of in runs.items():
        mean = statistics.mean([run["accuracy"] for run in of.values()])
        half = "" if math.isnan(mean.half) else f" ± {100 * mean.half:.2f}"
        difference, verdict = "", ""
        if method in compared:
            d = compared[method]
            span = "" if math.isnan(d.low) else f" [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
            difference = f"{100 * d.value:+.2f}{span}"
            verdict = statistics.verdict(d, float(corrected[method]))
        lines.append(
            f"| {method} | {mean.n} | {100 * mean.value:.2f}{half} | {difference} | {verdict} | "
            + " | ".join(_means(of))
            + " |"
        )
    return "\n".join(lines)


def _difference(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> statistics.Difference:
    seeds = sorted(ours.keys() & theirs.keys())
    return statistics.paired(
        [ours[seed]["accuracy"] for seed in seeds], [theirs[seed]["accuracy"] for seed in seeds]
    )


def _means(of: dict[int, dict[str, Any]]) -> Iterator[str]:
    def mean(key: str) -> float:
        return float(np.mean([run[key] for run in of.values()]))

    yield f"{mean('windows'):,.0f}"
    yield f"{mean('uploads'):,.0f}"
    yield f"{mean('mean_staleness'):.2f}"
    yield f"{mean('final_density'):.2f}"
    yield f"{mean('megabytes_up') / 1000:.1f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="folder of `fedgmr bench`")
    parser.add_argument("--json", type=Path, help="file of figures to write")
    parser.add_argument("--table", type=Path, help="file of figures to print")
    options = parser.parse_args()
    if options.table is not None:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    if options.folder is None:
        parser.error("a folder, or --table FILE")
    results = collect(options.folder)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
