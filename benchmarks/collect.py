"""Results of `fedgmr bench`, kept: from runs to a file of figures, and from that to the tables of the docs.

    fedgmr bench benchmarks/experiments/omniglot.yaml --reduced -o runs
    python -m benchmarks.collect runs --json benchmarks/results/reduced/omniglot.json
    python -m benchmarks.collect --table benchmarks/results/reduced/omniglot.json
    python -m benchmarks.collect --across benchmarks/results/reduced/*.json --methods fedgmr,fedgmr_decoupled

A run's figure is the mean test accuracy of the shipped model over its last evaluations. Methods are compared
with the experiment's `against` seed by seed (Student's t, p corrected for all comparisons of a table after
Holm); `+gmr` forms with `+aux` forms and with those that their authors describe. A file of figures of the
same experiment is added to: runs that the folder lacks stay.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import machine
from benchmarks.published import NON_IID
from fedgmr_plugin.protocol.runlog import read_run
from fedgmr_plugin.report import statistics
from fedgmr_plugin.runtimes.experiment import Experiment, run_name
from fedgmr_plugin.runtimes.trial import DESCRIPTION, is_finished

#: Points of a curve that are kept, at most.
POINTS = 60
#: Shares of the budget at which curves are tabled.
HORIZONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

Runs = dict[str, dict[int, dict[str, Any]]]


def collect(folder: Path, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The figures of all finished runs of an experiment's folder.

    Args:
        earlier: figures of the same problem and options, whose runs are kept where the folder has none.

    Raises:
        ValueError: `earlier` are the figures of another experiment.
    """
    text = (folder / DESCRIPTION).read_text(encoding="utf-8")
    experiment = Experiment.model_validate_json(text)
    runs = [
        figures(folder, method, seed, experiment.last)
        for method in experiment.methods
        for seed in seeds_of(folder, method)
        if is_finished(experiment, method, seed, folder)
    ]
    description = json.loads(text)
    if earlier is not None:
        if not _agree(earlier["experiment"], description):
            raise ValueError(f"{folder} has runs of another experiment than the file of figures")
        have = {(run["method"], run["seed"]) for run in runs}
        runs += [run for run in earlier["runs"] if (run["method"], run["seed"]) not in have]
        description["methods"] = earlier["experiment"]["methods"] | description["methods"]
        order = list(description["methods"])
        runs.sort(key=lambda run: (order.index(run["method"]), run["seed"]))
    return {"experiment": description, "machine": machine(), "runs": runs}


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether runs of two experiments can stand in one table: methods of one name are the same."""
    shared = one["methods"].keys() & other["methods"].keys()
    return all(one[k] == other[k] for k in ("problem", "with", "train_args", "fedgmr_args", "last")) and all(
        one["methods"][method] == other["methods"][method] for method in shared
    )


def seeds_of(folder: Path, method: str) -> list[int]:
    """Seeds of the runs that a folder has of a method."""
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    ends = (name.rpartition("-")[2] for name in names)
    seeds = {int(end) for end in ends if end.isdecimal()}
    return sorted(seed for seed in seeds if run_name(method, seed) in names)


def figures(folder: Path, method: str, seed: int, last: int) -> dict[str, Any]:
    """One run in numbers."""
    log = read_run(folder / run_name(method, seed))
    accuracy, seconds = log.column("evaluation", "accuracy"), log.column("evaluation", "time")
    kept = np.unique(np.linspace(0, len(accuracy) - 1, POINTS).round().astype(int))
    end = log.end or {}
    restored = log.column("restoration", "time")
    return {
        "method": method,
        "seed": seed,
        "accuracy": float(np.mean(accuracy[-last:])),
        "windows": log.count("window"),
        "uploads": log.count("arrival"),
        "mean_staleness": float(np.mean(log.column("arrival", "staleness"))),
        "restored": [float(restored[0]), float(restored[-1])] if len(restored) else None,
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
    runs = _by_method(results)
    against = runs.get(experiment.against or "", {})
    compared = {m: _difference(of, against) for m, of in runs.items() if m != experiment.against}
    corrected = dict(zip(compared, statistics.holm([d.p for d in compared.values()]), strict=True))
    lines = [
        f"| method | seeds | accuracy % | against {experiment.against}, points [95 %] | verdict | windows "
        "| uploads | staleness | restored, s | density | GB up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, of in runs.items():
        mean = statistics.mean([run["accuracy"] for run in of.values()])
        half = "" if math.isnan(mean.half) else f" ± {100 * mean.half:.2f}"
        difference, verdict = "", ""
        if method in compared:
            difference = _shown(compared[method])
            if difference:
                verdict = statistics.verdict(compared[method], float(corrected[method]))
        lines.append(
            f"| {method} | {mean.n} | {100 * mean.value:.2f}{half} | {difference} | {verdict} | "
            + " | ".join(_means(of))
            + " |"
        )
    return "\n".join(lines)


def across(results: Mapping[str, dict[str, Any]], methods: Sequence[str]) -> str:
    """The same methods on several problems, each compared with the first of them, as Markdown.

    Args:
        results: figures by name of the problem; those that lack one of the methods are left out.
    """
    first, *others = methods
    titles = [f" {method} %, points against {first} |" for method in others]
    lines = [
        f"| problem | seeds | {first} % |" + "".join(titles),
        "| --- | --- | --- |" + " --- |" * len(others),
    ]
    for name, figures_of in results.items():
        runs = _by_method(figures_of)
        if not runs.keys() >= set(methods):
            continue
        cells = [f"{len(runs[first])}", f"{_percent(runs[first])}"]
        cells += [f"{_percent(runs[m])}, {_shown(_difference(runs[m], runs[first]))}" for m in others]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(of: dict[int, dict[str, Any]]) -> str:
    return f"{100 * float(np.mean([run['accuracy'] for run in of.values()])):.2f}"


def pairs(results: dict[str, Any]) -> str:
    """What the parts of FedGMR do to each sub-model method, as Markdown."""
    runs = _by_method(results)
    compared = {
        (better, base): _difference(runs[better], runs[base])
        for better in runs
        if better.endswith("+gmr")
        for base in (better.removesuffix("+gmr"), better.replace("+gmr", "+aux"))
        if base in runs
    }
    corrected = statistics.holm([d.p for d in compared.values()])
    lines = ["| method | against | difference, points [95 %] | verdict |", "| --- | --- | --- | --- |"]
    for ((better, base), d), p in zip(compared.items(), corrected, strict=True):
        lines.append(f"| {better} | {base} | {_shown(d)} | {statistics.verdict(d, float(p))} |")
    return "\n".join(lines)


def beside_the_paper(results: dict[str, Any], experiment: str) -> str:
    """Our accuracies and the paper's, each also against FedGMR's own, as Markdown.

    Args:
        experiment: of the paper, a key of `published.NON_IID`.
    """
    theirs, runs = NON_IID[experiment], _by_method(results)
    ours = {m: 100 * float(np.mean([run["accuracy"] for run in of.values()])) for m, of in runs.items()}
    lines = [
        "| method | ours % | paper % | ours - FedGMR, points | paper - FedGMR, points |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method, value in ours.items():
        if method in theirs:
            paper = theirs[method]
            apart = "|  |  |"
            if method != "fedgmr" and "fedgmr" in ours:
                apart = f"| {value - ours['fedgmr']:+.1f} | {paper - theirs['fedgmr']:+.1f} |"
            lines.append(f"| {method} | {value:.1f} | {paper:.1f} {apart}")
    return "\n".join(lines)


def horizons(results: dict[str, Any]) -> str:
    """Accuracy at shares of the budget, the mean over seeds of the last evaluation before, as Markdown."""
    experiment = Experiment.model_validate(results["experiment"])
    whole = max(run["curve"][-1][0] for run in results["runs"])  # of runs that end after some windows
    budget = float(experiment.fedgmr_args.get("time_budget") or whole)
    times = [share * budget for share in HORIZONS]
    lines = [
        "| accuracy % at virtual second | " + " | ".join(f"{time:,.0f}" for time in times) + " |",
        "| --- |" + " --- |" * len(times),
    ]
    for method, of in _by_method(results).items():
        cells = []
        for time in times:
            found = [_before(run["curve"], time) for run in of.values()]
            known = [value for value in found if value is not None]
            cells.append(f"{100 * float(np.mean(known)):.1f}" if len(known) == len(found) else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _before(curve: list[list[float]], time: float) -> float | None:
    """The last value of a curve at or before a time; None where there is none."""
    return next((value for at, value in reversed(curve) if at <= time), None)


def _by_method(results: dict[str, Any]) -> Runs:
    runs: Runs = {}
    for run in results["runs"]:
        runs.setdefault(run["method"], {})[run["seed"]] = run
    return runs


def _shown(d: statistics.Difference) -> str:
    if not d.n:
        return ""
    span = "" if math.isnan(d.low) else f" [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
    return f"{100 * d.value:+.2f}{span}"


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
    spans = [run["restored"] for run in of.values() if run["restored"] is not None]
    yield " to ".join(f"{seconds:,.0f}" for seconds in np.mean(spans, axis=0)) if spans else ""
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
    parser.add_argument("--across", type=Path, nargs="+", help="files of figures of several problems")
    parser.add_argument("--methods", default="fedgmr,fedgmr_decoupled,frozen", help="for --across")
    parser.add_argument("--paper", choices=sorted(NON_IID), help="experiment of the paper to print beside")
    options = parser.parse_args()
    try:
        _carry_out(options, parser)
    except OSError as error:
        parser.error(str(error))


def _carry_out(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if options.across is not None:
        read = {path.stem: _read(path) for path in options.across}
        methods = options.methods.split(",")
        for name, results in read.items():
            if lacking := [method for method in methods if method not in _by_method(results)]:
                print(f"{name} left out: it has no run of {', '.join(lacking)}", file=sys.stderr)
        print(across(read, methods))
        return
    if options.table is not None:
        _print(_read(options.table), options.paper)
        return
    if options.folder is None:
        parser.error("a folder, --table FILE or --across FILE ...")
    kept = options.json is not None and options.json.exists()
    try:
        results = collect(options.folder, _read(options.json) if kept else None)
    except ValueError as error:
        parser.error(str(error))
    if not results["runs"]:
        parser.error(f"{options.folder} has no finished run of its experiment")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _print(results, options.paper)


def _read(file: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return results


def _print(results: dict[str, Any], paper: str | None) -> None:
    methods = {run["method"] for run in results["runs"]}
    has_pairs = any({m.removesuffix("+gmr"), m.replace("+gmr", "+aux")} & methods - {m} for m in methods)
    for part in (table, *((pairs,) if has_pairs else ()), horizons):
        print(part(results), end="\n\n")
    if paper is not None:
        print(beside_the_paper(results, paper))


if __name__ == "__main__":
    main()
