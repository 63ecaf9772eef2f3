"""Does restoration pay? FedGMR, the same without GMR, and dense FedAvg on Fashion-MNIST at one budget.

    python -m benchmarks.fashion_mnist run   [--seeds 1 2 3] [--jobs 2] [--budget 70000]
    python -m benchmarks.fashion_mnist table

Ten clients of high heterogeneity, Dirichlet(0.6) label skew, the fast client has least data; all 60,000
training images, all 10,000 test images; `strided_cnn`; clock of the paper's FEMNIST setting (S = 25.98 MB).
Each run goes through FedML's own single-process simulator in a process of its own, one thread each. Runs of
one seed share initial weights, partition, batches per client and dispatch, and bandwidth draws.

A run's figure is the mean test accuracy of the shipped model (chosen without the test set) over its last
`LAST` evaluations within the budget. Methods are compared seed by seed: mean difference and its 95 % interval
(Student's t over seeds). Settings (patience, buffer, form, staleness) were chosen by validation accuracy on
seed 0, which is not among the seeds reported. One run takes about 18 minutes of one core (FedAvg 4).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "fashion_mnist.json"
RUNS = Path("fedgmr_runs") / "fashion_mnist"
#: Evaluations that a run's figure is the mean of.
LAST = 8

COMMON: dict[str, Any] = {
    "heterogeneity": "high",
    "model_megabytes": 25.98,
    "trigger": "none",
    "interval": 25,
    "patience": 15,
    "validation_fraction": 0.05,
}
BUFFERED = {"update_scope": "buffer", "update_form": "replacement", "staleness": "constant"}
METHODS: dict[str, dict[str, Any]] = {
    "fedgmr": {**BUFFERED, "trigger": "plateau"},
    "fedgmr_arrivals": {"trigger": "plateau"},
    "frozen_buffered": {**BUFFERED},
    "frozen": {},
    "fedavg": {"dense_start": True, "schedule": "sync", "update_form": "replacement"},
    "gradient": {**BUFFERED, "trigger": "gradient"},
}
#: What runs unless `--methods` says otherwise.
COMPARED = ("fedgmr", "fedgmr_arrivals", "frozen_buffered", "fedavg")
TITLES = {
    "fedgmr": "FedGMR (buffer, replacement form)",
    "fedgmr_arrivals": "FedGMR (arrivals, delta form, polynomial staleness)",
    "frozen": "without GMR (arrivals, delta form)",
    "frozen_buffered": "without GMR (buffer, replacement form)",
    "fedavg": "dense FedAvg, synchronous",
    "gradient": "FedGMR, gradient trigger",
}


def train(method: str, seed: int, budget: float) -> None:
    """One run, in this process."""
    from benchmarks import data, models
    from fedgmr_plugin.runtimes.launch import simulate

    options = {
        **COMMON,
        **METHODS[method],
        "time_budget": budget,
        "output_dir": str(RUNS),
        "run_name": name(method, seed),
    }
    section = {"name": "fashion_mnist", "split": "dirichlet", "alpha": 0.6}
    dataset = data.dataset(section, 10, 20, seed, test_batch=500)
    model = models.build("strided_cnn", dataset[-1], seed)
    interval = 2 if method == "fedavg" else 50
    simulate(dataset, model, options, seed, frequency_of_the_test=interval)


def name(method: str, seed: int) -> str:
    """Name of a run's directory."""
    return f"{method}-{seed}"


def run_all(methods: list[str], seeds: list[int], budget: float, jobs: int) -> None:
    """All runs that `RESULTS` does not have yet, at most `jobs` at a time; each is added when it ends."""
    results = load(budget)
    known = {(run["method"], run["seed"]) for run in results["runs"]}
    waiting = deque((m, s) for s in seeds for m in methods if (m, s) not in known)
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    while waiting or running:
        while waiting and len(running) < jobs:
            method, seed = waiting.popleft()
            print(f"start {name(method, seed)}", flush=True)
            path = RUNS / name(method, seed)
            if path.exists():
                path.rename(path.with_name(f"{path.name}-before-{int(time.time())}"))
            command = [
                sys.executable,
                "-m",
                "benchmarks.fashion_mnist",
                "one",
                method,
                str(seed),
                str(budget),
            ]
            running[method, seed] = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        time.sleep(1)
        for (method, seed), process in list(running.items()):
            if process.poll() is None:
                continue
            del running[method, seed]
            if process.returncode:
                raise SystemExit(f"{name(method, seed)} failed with status {process.returncode}")
            results["runs"].append(summary(method, seed))
            save(results)
    print(table())


def load(budget: float) -> dict[str, Any]:
    """`RESULTS` without the runs whose options differ from today's; none of them if the budget does."""
    results: dict[str, Any] = {"budget": budget, "last": LAST, "machine": machine(), "runs": []}
    if RESULTS.exists():
        before = json.loads(RESULTS.read_text(encoding="utf-8"))
        if before["budget"] == budget:
            results["runs"] = [
                r for r in before["runs"] if r["options"] == {**COMMON, **METHODS[r["method"]]}
            ]
    return results


def save(results: dict[str, Any]) -> None:
    """Write `RESULTS`, its runs by method and seed."""
    results["runs"].sort(key=lambda run: (list(METHODS).index(run["method"]), run["seed"]))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def summary(method: str, seed: int) -> dict[str, Any]:
    """What `RESULTS` keeps of a finished run."""
    from fedgmr_plugin.protocol.runlog import read_run

    log = read_run(RUNS / name(method, seed))
    accuracy = log.column("evaluation", "accuracy")
    times = log.column("evaluation", "time")
    return {
        "method": method,
        "seed": seed,
        "options": {**COMMON, **METHODS[method]},
        "accuracy": float(np.mean(accuracy[-LAST:])),
        "accuracy_global": float(np.mean(log.column("evaluation", "global.accuracy")[-LAST:])),
        "accuracy_scaled": float(np.mean(log.column("evaluation", "scaled.accuracy")[-LAST:])),
        "loss": float(np.mean(log.column("evaluation", "loss")[-LAST:])),
        "windows": log.count("window"),
        "uploads": log.count("arrival"),
        "restored_by": max(log.column("restoration", "window").tolist(), default=None),
        "mean_density": float(np.mean(log.column("window", "mean_density"))),
        "final_density": float(log.column("window", "mean_density")[-1]),
        "mean_staleness": float(np.mean(log.column("arrival", "staleness"))),
        "gigabytes_up": float(np.sum(log.column("window", "bytes_up"))) / 1e9,
        "wall_seconds": log.end["wall_seconds"] if log.end else None,
        "model_sha256": log.end["model_sha256"] if log.end else None,
        "curve": [
            [round(float(t)), round(float(a), 4)]
            for t, a in zip(times.tolist(), accuracy.tolist(), strict=True)
        ],
    }


def until(run: dict[str, Any], time_s: float) -> float:
    """Mean accuracy of a run's last `LAST` evaluations up to a virtual second."""
    return float(np.mean([a for t, a in run["curve"] if t <= time_s + 100][-LAST:]))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads_per_run": 1,
    }


def table() -> str:
    """The results as Markdown."""
    from scipy import stats

    by_method: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in METHODS}
    for run in json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]:
        by_method[run["method"]][run["seed"]] = run

    def mean(method: str, key: str) -> float:
        return float(np.mean([run[key] for run in by_method[method].values()]))

    lines = [
        "| method | accuracy % (seeds) | w alone % | test loss | uploads | final density |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method in COMPARED:
        each = ", ".join(f"{100 * run['accuracy']:.2f}" for run in by_method[method].values())
        lines.append(
            f"| {TITLES[method]} | **{100 * mean(method, 'accuracy'):.2f}** ({each}) "
            f"| {100 * mean(method, 'accuracy_global'):.2f} | {mean(method, 'loss'):.3f} "
            f"| {mean(method, 'uploads'):,.0f} | {mean(method, 'final_density'):.2f} |"
        )
    lines += ["", "| difference, paired by seed | mean, points | 95 % interval |", "| --- | --- | --- |"]
    for method in COMPARED[1:]:
        pairs = [(by_method["fedgmr"][seed], run) for seed, run in by_method[method].items()]
        gains = 100 * np.array([ours["accuracy"] - theirs["accuracy"] for ours, theirs in pairs])
        half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
        lines.append(
            f"| {TITLES['fedgmr']} - {TITLES[method]} | {gains.mean():+.2f} "
            f"| [{gains.mean() - half:+.2f}, {gains.mean() + half:+.2f}] |"
        )
    times = range(10_000, 70_001, 10_000)
    lines += ["", f"| at virtual second | {' | '.join(f'{t:,}' for t in times)} |", "| --- " * 8 + "|"]
    for method in COMPARED:
        means = [np.mean([until(run, t) for run in by_method[method].values()]) for t in times]
        lines.append(f"| {TITLES[method]} | {' | '.join(f'{100 * m:.1f}' for m in means)} |")
    restored = [run["restored_by"] for run in by_method["fedgmr"].values()]
    lines += ["", f"Last restoration, by seed: window {', '.join(f'{w:,}' for w in restored)}."]
    if by_method["gradient"]:
        lines += [
            "",
            "| gradient trigger, seed | restored | same model as without GMR |",
            "| --- | --- | --- |",
        ]
    for seed, run in by_method["gradient"].items():
        same = run["model_sha256"] == by_method["frozen_buffered"][seed]["model_sha256"]
        restored = "never" if run["restored_by"] is None else f"by window {run['restored_by']:,}"
        lines.append(f"| {seed} | {restored} | {'yes, SHA-256' if same else 'no'} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="FedGMR against its ablation and FedAvg on Fashion-MNIST")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    run.add_argument("--methods", nargs="+", default=COMPARED, choices=list(METHODS))
    run.add_argument("--budget", type=float, default=70_000.0, help="virtual seconds")
    run.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    one = commands.add_parser("one")
    one.add_argument("method")
    one.add_argument("seed", type=int)
    one.add_argument("budget", type=float)
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "one":
        train(options.method, options.seed, options.budget)
    elif options.command == "table":
        print(table())
    else:
        run_all(options.methods, options.seeds, options.budget, options.jobs)


if __name__ == "__main__":
    main()
