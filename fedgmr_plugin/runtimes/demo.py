"""The demonstration: FedGMR, the same without GMR, and dense FedAvg, through FedML's own simulator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedgmr_plugin.datasets import DigitsCNN, digits
from fedgmr_plugin.runtimes.launch import simulate


class Contender(NamedTuple):
    """One run of the demonstration: its name and what it changes in `COMMON`."""

    name: str
    title: str
    options: dict[str, Any]


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
    "workers": min(4, os.cpu_count() or 1),
}
CONTENDERS = (
    Contender("fedgmr", "FedGMR", {}),
    Contender("frozen", "the same without GMR", {"trigger": "none"}),
    Contender(
        "fedavg",
        "dense FedAvg",
        {"trigger": "none", "dense_start": True, "schedule": "sync"},
    ),
)


def run_demo(output_dir: Path, seed: int) -> Iterator[tuple[Contender, Path]]:
    """Train the contenders one after another on scikit-learn's digits; yields each run's directory.

    Same initial weights, same partition (Dirichlet 0.6, the fast client has least data), same batches per
    client and dispatch, same bandwidth draws.
    """
    for contender in CONTENDERS:
        options = {**COMMON, **contender.options, "output_dir": str(output_dir), "run_name": contender.name}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DigitsCNN()
        interval = 1 if contender.name == "fedavg" else 10
        simulate(digits(seed=seed), model, options, seed, frequency_of_the_test=interval)
        yield contender, output_dir / contender.name
