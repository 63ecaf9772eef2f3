"""The demonstration: FedGMR in two forms, the same without GMR, and dense FedAvg, through FedML's simulator.

The network is so small that the sub-models of slow clients soon stop learning: what they lack is capacity.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedgmr_plugin.datasets import DigitsMLP, digits
from fedgmr_plugin.runtimes.launch import simulate


class Contender(NamedTuple):
    """One run of the demonstration: its name and what it changes in `COMMON`."""

    name: str
    title: str
    options: dict[str, Any]


LEARNING_RATE = 0.3
#: A run's accuracy is the mean of its last evaluations: one alone is told to a point or so on 360 images.
LAST = 5
#: Ten clients of high heterogeneity on the clock of the paper's FEMNIST setting (S = 25.98 MB).
COMMON: dict[str, Any] = {
    "method": "fedgmr+buffer",
    "heterogeneity": "high",
    "model_megabytes": 25.98,
    "time_budget": 5000.0,
    "interval": 10,
    "patience": 3,
    "trigger_metric": "loss",
    "validation_fraction": 0.15,
}
CONTENDERS = (
    Contender("fedgmr", "FedGMR", {}),
    Contender("decoupled", "with decoupled uploads", {"upload": "decoupled"}),
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
            model = DigitsMLP()
        interval = 1 if contender.name == "fedavg" else 20
        simulate(
            digits(seed=seed),
            model,
            options,
            seed,
            frequency_of_the_test=interval,
            learning_rate=LEARNING_RATE,
        )
        yield contender, output_dir / contender.name
