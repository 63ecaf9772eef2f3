"""The theory checked on real runs: the demonstration's digits in delta form, probed in every window.

    python benchmarks/theory_digits.py [--output DIR] [--seconds 900]

Trains a small CNN on ten clients of high heterogeneity at two learning rates, with the whole training data
as probe set, checks each run, and prints one table in Markdown. Takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace

from theory.check import RunReport, check_runs
from theory.gap import density_gap
from theory.log import read_log
from theory.verdict import Finding

RATES = (0.1, 0.01)


def train(folder: Path, name: str, rate: float, seconds: float) -> Path:
    """One run of the demonstration with a probe in every window."""
    import torch

    from fedgmr_plugin.datasets import DigitsCNN, digits
    from fedgmr_plugin.runtimes.demo import COMMON
    from fedgmr_plugin.runtimes.registration import register

    register()
    import fedml

    options = {
        "time_budget": seconds,
        "probe": True,
        "probe_interval": 1,
        "probe_samples": 10_000,
        "progress": False,
        "update_scope": "arrivals",
        "update_form": "delta",
        "trigger": "time",
    }
    args = SimpleNamespace(
        training_type="simulation",
        backend="sp",
        random_seed=0,
        dataset="digits",
        federated_optimizer="fedgmr",
        client_num_in_total=10,
        client_num_per_round=10,
        comm_round=100_000,
        epochs=1,
        batch_size=20,
        client_optimizer="sgd",
        learning_rate=rate,
        weight_decay=0.0,
        frequency_of_the_test=50,
        using_gpu=False,
        enable_wandb=False,
        using_mlops=False,
        rank=0,
        run_id="0",
        fedgmr_args={**COMMON, **options, "output_dir": str(folder), "run_name": name},
    )
    args = fedml.init(args, should_init_logs=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitsCNN()
    fedml.FedMLRunner(args, fedml.device.get_device(args), digits(seed=0), model).run()
    return folder / name


def cell(finding: Finding) -> str:
    """Verdict, and both sides where there are any."""
    if finding.measured is None or finding.bound is None:
        return finding.verdict.value
    return f"{finding.verdict.value}: {finding.measured:.3g} against {finding.bound:.3g}"


def rows(report: RunReport, expectations: dict[str, Finding], path: Path) -> dict[str, str]:
    """The table's column of one run."""
    gap, constants = density_gap(read_log(path)), report.constants
    laws = [f for f in report.findings if f.group == "log"]
    found = {
        "laws of the log that hold": f"{sum(f.verdict.value == 'HOLDS' for f in laws)} of {len(laws)}",
        "violated laws": str(sum(f.verdict.value == "VIOLATED" for f in laws)),
        "L, from below": f"{constants['L'].value:.3g}",
        "A4 along the probed steps": f"{report['A4'].verdict.value}: {report['A4'].reason or 'every window'}",
    }
    for name in (
        "descent",
        "telescoped",
        "update",
        "floored_topk",
        "aged_topk",
        "nested_coverage",
        "rank_gap",
    ):
        found[f"({report[name].equation}) {name}"] = cell(report[name])
    weighted = expectations["corollary_weighted"]
    if weighted.bound is not None and weighted.measured:
        found["(34) over its measured side"] = f"{weighted.bound / weighted.measured:.3g}"
    found["mask distance over mask + drift + staleness"] = f"{gap.total('distance_share') or 0:.3f}"
    found["mean mask distance, density gap"] = (
        f"{gap.total('distance') or 0:.3g}, {gap.total('gap') or 0:.3g}"
    )
    return found


def main() -> None:
    """Trains, checks, prints."""
    parser = argparse.ArgumentParser(description="The theory checked on the digits demonstration.")
    parser.add_argument("--output", type=Path, help="keep the runs here")
    parser.add_argument("--seconds", type=float, default=900.0, help="virtual seconds of each run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        columns = {}
        for rate in RATES:
            path = train(folder, f"rate-{rate:g}", rate, options.seconds)
            report = check_runs([path])
            columns[f"rate {rate:g}"] = rows(report.runs[0], {f.name: f for f in report.expectations}, path)
    print("| | " + " | ".join(columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for key in next(iter(columns.values())):
        print(f"| {key} | " + " | ".join(column.get(key, "-") for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
