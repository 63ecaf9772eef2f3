"""What attackers cost, and what the defences save: two of ten clients send harm, on handwritten digits.

    python -m benchmarks.byzantine --json benchmarks/results/byzantine.json      (--table prints the table)

Two attacks: *flip*, the change times -5; *noise*, Gaussian noise ten times the change's size. Attackers are
the clients 8 and 9, of the lowest density. Everybody's last update takes part in every merge (`update_scope`
``buffer``), so that there is somebody to be outvoted by; three seeds each, IID data, accuracy of the shipped
model on the test set at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine
from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.datasets import DigitsCNN, digits
from fedgmr_plugin.engine.client import BatchPlan, BuiltinTrainer, LocalUpdate, in_batches, split
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.network import LogNormalLinks, VirtualNetwork
from fedgmr_plugin.engine.seeds import isolated_rng, torch_generator
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.simulate import Simulation
from fedgmr_plugin.engine.workbench import Clients, Training, Workbench
from fedgmr_plugin.kernels.layout import build_layout
from fedgmr_plugin.runtimes.data import read_dataset

RESULTS = Path(__file__).parent / "results" / "byzantine.json"
CLIENTS, WINDOWS = 10, 80
ATTACKERS = frozenset({8, 9})
SEEDS = range(3)
ATTACKS = ("none", "flip", "noise")
DEFENCES: dict[str, dict[str, Any]] = {
    "none": {},
    "norm_bound": {"norm_bound": 1.5},
    "trim": {"trim": 0.25},
    "both": {"norm_bound": 1.5, "trim": 0.25},
}
DENSITIES = {"everybody dense": "none", "high heterogeneity": "high"}


class Attacked:
    """Trains clients one after another, some of which send something else."""

    def __init__(self, bench: Workbench, attack: str, seed: int) -> None:
        self._bench, self._attack, self._seed = bench, attack, seed

    def begin(self, sent: Dispatch) -> None:
        """Nothing."""

    def finish(self, sent: Sequence[Dispatch]) -> list[LocalUpdate]:
        """The updates, harmful where they come from attackers."""
        return [self._harmed(d, self._bench.train(d)) for d in sent]

    def _harmed(self, sent: Dispatch, update: LocalUpdate) -> LocalUpdate:
        if self._attack in ("none", "absent") or sent.client not in ATTACKERS:
            return update
        change_S = update.values_S
        if self._attack == "flip":
            return update._replace(values_S=-5.0 * change_S)
        generator = torch_generator(self._seed, "attack", sent.dispatch)
        size = 10.0 * change_S.square().mean().sqrt()
        return update._replace(values_S=size * torch.randn(len(change_S), generator=generator))


def accuracy(
    attack: str,
    options: dict[str, Any],
    heterogeneity: str,
    seed: int,
    *,
    windows: int = WINDOWS,
    held: float = 0.0,
) -> tuple[float, float]:
    """Accuracy at the end of one run, and the mean share of weights that could not be defended.

    Args:
        held: share of every client's data that is kept from training and measures the model in the test
            set's place, for choices.
    """
    clients = CLIENTS - len(ATTACKERS) if attack == "absent" else CLIENTS
    densities = FedGMRConfig(heterogeneity=heterogeneity).initial_densities(CLIENTS)[:clients]
    config = FedGMRConfig(
        densities=densities,
        update_scope="buffer",
        staleness="constant",
        trigger="time",
        interval=5,
        validation_fraction=0.0,
        **options,
    )
    data = read_dataset(digits(CLIENTS, alpha=None, seed=seed), CLIENTS)
    parts = [split(data.clients[n], held, seed, n) for n in range(clients)]
    tested = data.test if held == 0.0 else [b for _, part in parts if part for b in in_batches(part, 256)]
    with isolated_rng(seed):
        model = DigitsCNN()
    layout = build_layout(model)
    counts = tuple(len(own) for own, _ in parts)
    training = Training(BuiltinTrainer(), BatchPlan(20, 5, 1, True, seed), 0.1)
    bench = Workbench(config, layout, model, Clients(lambda n: parts[n][0], 0.0, seed, clients), training)
    server = Server(config, Plan(seed, windows, clients, windows, counts), layout, layout.gather(model))
    network = VirtualNetwork(config, densities, 26.0, LogNormalLinks(config, densities, seed))
    found: list[float] = []
    undefended: list[float] = []

    def record(fields: dict[str, Any]) -> None:
        if fields["type"] == "evaluation":
            found.append(fields["accuracy"])
        elif fields["type"] == "defence":
            undefended.append(fields["undefended"])

    Simulation(server, network, bench, lambda: tested, record, executor=Attacked(bench, attack, seed)).run()
    return found[-1], statistics.mean(undefended) if undefended and config.trim else 0.0


def measure() -> dict[str, Any]:
    """Every attack against every defence."""
    runs = []
    for name, heterogeneity in DENSITIES.items():
        for attack in ATTACKS:
            for defence, options in DEFENCES.items():
                for seed in SEEDS:
                    reached, undefended = accuracy(attack, options, heterogeneity, seed)
                    runs.append(
                        {
                            "densities": name,
                            "attack": attack,
                            "defence": defence,
                            "seed": seed,
                            "accuracy": reached,
                            "undefended": undefended,
                        }
                    )
                print(name, attack, defence, [r["accuracy"] for r in runs[-len(SEEDS) :]], flush=True)
    return {"machine": machine(), "windows": WINDOWS, "runs": runs}


def table(path: Path = RESULTS) -> str:
    """Mean accuracy in per cent by attack and defence, and the mean undefended share."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    lines = [
        "| clients | attack | none | norm_bound | trim | both |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in DENSITIES:
        for attack in ATTACKS:
            cells = []
            for defence in DEFENCES:
                found = [
                    r for r in runs if (r["densities"], r["attack"], r["defence"]) == (name, attack, defence)
                ]
                cells.append(f"{100 * statistics.mean(r['accuracy'] for r in found):.1f}")
            lines.append(f"| {name} | {attack} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    torch.set_num_threads(1)
    found = measure()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
