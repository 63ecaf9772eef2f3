"""What values that travel in bfloat16 or float16 do to the accuracy of a run.

    python -m benchmarks.payloads run [--seeds 3]     # about 5 minutes
    python -m benchmarks.payloads table

FedGMR as `fedgmr demo` runs it (handwritten digits, ten clients of high heterogeneity), with `payload_dtype`
model, bfloat16 and float16. *Same clock*: the narrow values are given twice the size, so that flights,
windows and batches are those of the wide ones and rounding is all that differs. *Own clock*: half the bytes
take half the time. A run's figure is the mean test accuracy of its last `LAST` evaluations.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgmr_plugin.datasets import DigitsCNN, digits
from fedgmr_plugin.protocol.runlog import read_run
from fedgmr_plugin.runtimes.launch import simulate

#: Ten clients of high heterogeneity on the clock of the paper's FEMNIST setting (S = 25.98 MB).
COMMON: dict[str, Any] = {
    "method": "fedgmr+buffer",
    "heterogeneity": "high",
    "model_megabytes": 25.98,
    "time_budget": 1600.0,
    "interval": 10,
    "patience": 3,
    "trigger_metric": "loss",
    "validation_fraction": 0.15,
}
RESULTS = Path(__file__).parent / "results" / "payloads.json"
LAST = 4
#: (payload_dtype, factor on the model's size) of each row.
WAYS = (("model", 1), ("bfloat16", 2), ("float16", 2), ("bfloat16", 1), ("float16", 1))


def one(folder: Path, kind: str, factor: int, seed: int) -> dict[str, Any]:
    """One run on the digits."""
    name = f"{kind}-{factor}-{seed}"
    options = {
        **COMMON,
        "payload_dtype": kind,
        "model_megabytes": factor * COMMON["model_megabytes"],
        "progress": False,
        "output_dir": str(folder),
        "run_name": name,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsCNN()
    simulate(digits(seed=seed), model, options, seed, frequency_of_the_test=10)
    log = read_run(folder / name)
    return {
        "payload_dtype": kind,
        "factor": factor,
        "seed": seed,
        "accuracy": float(np.mean(log.column("evaluation", "accuracy")[-LAST:])),
        "uploads": log.count("arrival"),
        "megabytes_up": float(np.sum(log.column("window", "bytes_up"))) / 1e6 / factor,
    }


def table() -> str:
    """The results as Markdown."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = [
        "| values travel as | clock | accuracy % (seeds) | difference, points | uploads | MB up |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, factor in WAYS:
        own = [r for r in runs if (r["payload_dtype"], r["factor"]) == (kind, factor)]
        wide = {r["seed"]: r["accuracy"] for r in runs if r["payload_dtype"] == "model"}
        each = ", ".join(f"{100 * r['accuracy']:.1f}" for r in own)
        gain = 100 * np.mean([r["accuracy"] - wide[r["seed"]] for r in own])
        uploads, megabytes = (np.mean([r[key] for r in own]) for key in ("uploads", "megabytes_up"))
        clock = "same" if kind == "model" or factor == 2 else "own"
        lines.append(
            f"| {kind.replace('model', 'float32')} | {clock} "
            f"| **{100 * np.mean([r['accuracy'] for r in own]):.1f}** ({each}) "
            f"| {'' if kind == 'model' else f'{gain:+.1f}'} | {uploads:,.0f} | {megabytes:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Accuracy with values that travel in half the bytes")
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--seeds", type=int, default=3)
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "run":
        with tempfile.TemporaryDirectory() as folder:
            found = [one(Path(folder), *way, seed) for seed in range(options.seeds) for way in WAYS]
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
