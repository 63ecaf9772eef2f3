"""What attackers cost, and what the defences save: two of ten clients send harm, on handwritten digits.

    python -m benchmarks.byzantine --json benchmarks/results/byzantine.json      (--table prints the tables)
    python -m benchmarks.byzantine --what choice --json benchmarks/results/byzantine.json
    python -m benchmarks.byzantine --what costs --json benchmarks/results/byzantine.json

Two attacks: *flip*, the change times -5; *noise*, Gaussian noise ten times the change's size. Attackers are
the clients 8 and 9, of the lowest density. Everybody's last update takes part in every merge (`update_scope`
``buffer``), so that there is somebody to be outvoted by; three seeds each, IID data, accuracy of the shipped
model on the test set at the end.

``choice`` compares other options under *flip*, and twice as many windows, on a fifth of every client's data
that is held out of training. ``costs`` measures the best of them on the test set, against *absent*: the two
clients and their data are not there, so that it shows what the lost data cost by themselves.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import machine
from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.datasets import DigitsCNN, digits
from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.network import LogNormalLinks, VirtualNetwork
from fedgmr_plugin.engine.samples import BatchPlan, in_batches, split
from fedgmr_plugin.engine.seeds import isolated_rng, torch_generator
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.simulate import Simulation
from fedgmr_plugin.engine.trainer import BuiltinTrainer
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
#: What `--choose` chooses among, besides `both`.
CANDIDATES: dict[str, dict[str, Any]] = {
    "smaller bound": {"norm_bound": 1.0, "trim": 0.25},
    "trim more": {"norm_bound": 1.5, "trim": 0.4},
    "smaller bound, trim more": {"norm_bound": 1.0, "trim": 0.4},
    "trim more, no bound": {"trim": 0.4},
    "longer step": {"norm_bound": 1.5, "trim": 0.25, "server_step": 1.5},
    "smaller bound, trim more, longer step": {"norm_bound": 1.0, "trim": 0.4, "server_step": 1.5},
    "longest step": {"norm_bound": 1.5, "trim": 0.4, "server_step": 2.0},
}
OPTIONS = {**DEFENCES, **CANDIDATES, "step": {"server_step": 2.0}}
#: Share of every client's data that `--choose` keeps from training.
HELD = 0.2
#: Attack, options and name of each row of the table of costs.
COSTS = (
    ("none", "none", "nobody attacks"),
    ("none", "step", "nobody attacks, `server_step: 2`"),
    ("absent", "none", "the two attackers are not there, nor their data"),
    ("flip", "both", "flip, `norm_bound: 1.5`, `trim: 0.25`"),
    ("flip", "longest step", "flip, `norm_bound: 1.5`, `trim: 0.4`, `server_step: 2`"),
    ("noise", "longest step", "noise, the same"),
    ("none", "longest step", "nobody attacks, the same"),
)


class Job(NamedTuple):
    """One run.

    Attributes:
        held: as of `accuracy`.
    """

    densities: str
    attack: str
    defence: str
    seed: int
    windows: int = WINDOWS
    held: float = 0.0


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


def done(job: Job) -> dict[str, Any]:
    """Carry out one run, in a process of its own."""
    torch.set_num_threads(1)
    reached, undefended = accuracy(
        job.attack,
        OPTIONS[job.defence],
        DENSITIES[job.densities],
        job.seed,
        windows=job.windows,
        held=job.held,
    )
    found = {**job._asdict(), "accuracy": reached, "undefended": undefended}
    print(found, flush=True)
    return found


def measure(jobs: Sequence[Job], processes: int) -> dict[str, Any]:
    """The runs, several at once."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        runs = pool.map(done, jobs, chunksize=1)
    torch.set_num_threads(1)
    return {"machine": machine(), "windows": WINDOWS, "runs": runs}


def jobs_of(what: str) -> list[Job]:
    """The runs of a table, ``runs`` or ``costs``; or those of a ``choice``, on data that are no test data."""
    if what == "runs":
        return [Job(*each) for each in product(DENSITIES, ATTACKS, DEFENCES, SEEDS)]
    if what == "costs":
        rows = product(DENSITIES, COSTS, SEEDS)
        return [Job(name, attack, defence, seed) for name, (attack, defence, _), seed in rows]
    found = [
        Job(name, *row, seed, windows, HELD)
        for row, windows in (
            (("none", "none"), WINDOWS),
            (("none", "none"), 2 * WINDOWS),
            (("flip", "both"), 2 * WINDOWS),
        )
        for name, seed in product(DENSITIES, SEEDS)
    ]
    choice = product(DENSITIES, ["flip"], ["both", *CANDIDATES], SEEDS)
    return found + [Job(*each, WINDOWS, HELD) for each in choice]


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


def cost_table(path: Path = RESULTS) -> str:
    """What attacks cost with and without the chosen options: mean accuracy, and points less than without."""
    runs = json.loads(path.read_text(encoding="utf-8"))["costs"]["runs"]

    def reached(name: str, attack: str, defence: str) -> float:
        wanted = name, attack, defence
        found = [r["accuracy"] for r in runs if (r["densities"], r["attack"], r["defence"]) == wanted]
        return 100 * statistics.mean(found)

    lines = [f"| | {' | '.join(DENSITIES)} |", "| --- | --- | --- |"]
    for attack, defence, label in COSTS:
        cells = []
        for name in DENSITIES:
            own, usual = reached(name, attack, defence), reached(name, "none", "none")
            cells.append(f"{own:.1f}" if label == COSTS[0][2] else f"{own:.1f} ({own - usual:+.1f})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def choice_table(path: Path = RESULTS) -> str:
    """Mean accuracy on the data held out of training, of what `--what choice` chose among."""
    runs = json.loads(path.read_text(encoding="utf-8"))["choice"]["runs"]
    lines = [f"| {{key}}`norm_bound`, {{key}}`trim`, {{key}}`server_step` | {' | '.join(DENSITIES)} |"]
    lines.append("| --- | --- | --- |")
    for defence in ("both", *CANDIDATES):
        given = OPTIONS[defence]
        label = f"{given.get('norm_bound', 'none')}, {given['trim']}, {given.get('server_step', 1.0)}"
        cells = []
        for name in DENSITIES:
            wanted = name, "flip", defence, WINDOWS
            keys = ("densities", "attack", "defence", "windows")
            found = [r["accuracy"] for r in runs if tuple(r[k] for k in keys) == wanted]
            cells.append(f"{100 * statistics.mean(found):.1f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=("runs", "costs", "choice"), default="runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n\n".join((table(), cost_table(), choice_table())))
        return
    found = measure(jobs_of(arguments.what), arguments.jobs)
    if arguments.json is not None:
        is_there = arguments.json.exists()
        before = json.loads(arguments.json.read_text(encoding="utf-8")) if is_there else {}
        new = found if arguments.what == "runs" else {arguments.what: found}
        arguments.json.write_text(json.dumps({**before, **new}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
