"""When to restore: the ``gradient`` trigger against ``plateau``, and both against the best time in hindsight.

    python -m benchmarks.triggers run [--seeds 3] [--windows 800]     # about 15 minutes on one core
    python -m benchmarks.triggers table

Two problems of `theory.laboratory`, ten clients of densities 1, .5, .2, .1 and six times .05, whose flights
take one window at their initial density and proportionally more once restored. Each policy decides every
`INTERVAL` windows through the plugin's own kernel. The ``plateau`` policies look at each client's loss on its
sub-model and at F(w). The ``gradient`` policies compare squared gradients on the coordinates held and gained,
at w as the plugin does, at m w, where the client really starts, or of the client's own F_n there; Lemma 1
asks for a factor of 3 over the price in seconds, smaller factors are heuristics.

Hindsight is the best, seed by seed, of two sweeps: everybody is restored to 1 at once, or rung by rung in
equal steps until then. A run's figure is F(w) - inf F over its last tenth (inf F = 0 for the ReLU network).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedgmr_plugin.kernels import density as gmr
from theory.laboratory import Logistic, Problem, ReluNetwork, Schedule, client_grads, mean_loss, simulate
from theory.laboratory.masks import mask, ranking
from theory.laboratory.problems import Floats
from theory.laboratory.simulate import Restorer

RESULTS = Path(__file__).parent / "results" / "triggers.json"
DENSITIES = (1.0, 0.5, 0.2, 0.1) + (0.05,) * 6
INTERVAL = 10
#: Shares of the run at which the reference restores everybody; 1 is never.
SWEEP = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)
PATIENCES = (2, 5, 10)
#: Where the gradient is taken, and the factor asked for.
GRADIENTS = (
    ("w", 3.0),
    ("w", 0.3),
    ("m w", 3.0),
    ("m w", 1.0),
    ("m w", 0.3),
    ("own m w", 1.0),
    ("own m w", 0.3),
)


def problem(kind: str, seed: int) -> Problem:
    """A logistic regression of 200 coordinates or a ReLU network of 40 hidden units."""
    rng = np.random.default_rng([seed, 7])
    if kind == "logistic":
        return Logistic.random(rng, clients=10, size=200, samples=100, batch=10)
    return ReluNetwork.random(rng, clients=10, inputs=10, hidden=40, samples=50, batch=10)


def gradient_votes(
    task: Problem, w: Floats, densities: Sequence[float], rules: gmr.GMRRules, *, point: str, factor: float
) -> list[bool]:
    """Whether restoring pays, for each client; its flight takes d / d0 windows."""
    order = ranking(w, task.prunable)
    at_w = client_grads(task, w).mean(axis=0)
    votes = []
    for n, (now, first) in enumerate(zip(densities, DENSITIES, strict=True)):
        more = gmr.next_density(rules, now)
        held, larger = mask(task, order, now), mask(task, order, more)
        grad = at_w
        if point != "w":
            grads = client_grads(task, np.where(held, w, 0.0))
            grad = grads[n] if point.startswith("own") else grads.mean(axis=0)
        inside, gained = float(np.square(grad[held]).sum()), float(np.square(grad[larger & ~held]).sum())
        seconds = (now / first, more / first * factor / 3.0)  # the kernel asks for 3
        votes.append(now < 1 and gmr.restoring_pays(inside, gained, *seconds))
    return votes


class Policy:
    """The plugin's check, made every `INTERVAL` windows; `votes` for the ``gradient`` trigger."""

    def __init__(self, task: Problem, rules: gmr.GMRRules, **gradient: Any) -> None:
        self.task, self.rules, self.gradient = task, rules, gradient
        self.state = gmr.start(rules, DENSITIES)

    def __call__(self, merged: int, w: Floats, densities: Sequence[float]) -> list[tuple[int, float]]:
        if merged == 0 or merged % INTERVAL:
            return []
        votes: list[bool] = []
        losses: list[float | None] = []
        if self.gradient:
            votes = gradient_votes(self.task, w, densities, self.rules, **self.gradient)
        else:
            order = ranking(w, self.task.prunable)
            cut = [np.where(mask(self.task, order, d), w, 0.0) for d in densities]
            losses = [self.task.loss(n, x) for n, x in enumerate(cut)]
        seen = gmr.Observation(0.0, mean_loss(self.task, w), losses, votes)
        self.state, _ = gmr.step(self.rules, self.state, seen)
        return [(n, d) for n, d in enumerate(self.state.densities) if d > densities[n]]


def at_once(when: int, merged: int, w: Floats, densities: Sequence[float]) -> list[tuple[int, float]]:
    """Everybody to 1 in window `when`."""
    return [(n, 1.0) for n in range(len(densities))] if merged == when else []


def in_steps(end: int, merged: int, w: Floats, densities: Sequence[float]) -> list[tuple[int, float]]:
    """Everybody to .1, .2, .5 and 1 at the quarters of `end`."""
    floors = [d for i, d in enumerate((0.1, 0.2, 0.5, 1.0), 1) if merged >= i * end // 4]
    return [(n, floors[-1]) for n, d in enumerate(densities) if floors and d < floors[-1]]


def policies(task: Problem, windows: int) -> dict[str, Restorer]:
    """Everything that is compared, by name."""
    found: dict[str, Restorer] = {"never": lambda merged, w, densities: []}
    for share in SWEEP:
        found[f"at once {share:g}"] = partial(at_once, round(share * windows))
        if share:
            found[f"in steps {share:g}"] = partial(in_steps, round(share * windows))
    for point, factor in GRADIENTS:
        rules = gmr.GMRRules(trigger="gradient")
        found[f"gradient at {point}, factor {factor:g}"] = Policy(task, rules, point=point, factor=factor)
    for patience in PATIENCES:
        rules = gmr.GMRRules(trigger="plateau", patience=patience, higher_is_better=False)
        found[f"plateau, patience {patience}"] = Policy(task, rules)
    return found


def run(task: Problem, windows: int, seed: int, rate: float, restorer: Restorer | None) -> dict[str, float]:
    """One run's figure, and when half of all missing density had been restored (share of the run)."""
    schedule = Schedule(
        windows=windows, eta=rate, local_steps=5, densities=DENSITIES, delays=(1,) * 10,
        delay_grows=True, interval=INTERVAL, seed=seed, probe_interval=windows,
    )  # fmt: skip
    trace = simulate(task, schedule, restorer)
    tail = trace.models[-windows // 10 :]
    restored = [r for r in trace.records if r["type"] == "restoration"]
    missing, half = sum(1 - d for d in DENSITIES), 1.0
    gained = 0.0
    for record in restored:
        gained += record["after"] - record["before"]
        if gained >= missing / 2:
            half = record["window"] / windows
            break
    return {"loss": float(np.mean([mean_loss(task, w) for w in tail])), "half": half}


def study(seeds: int, windows: int) -> dict[str, Any]:
    """All policies on both problems."""
    found: dict[str, Any] = {}
    for kind, rate in (("logistic", 0.1), ("relu", 0.05)):
        runs: dict[str, list[dict[str, float]]] = {}
        for seed in range(seeds):
            task = problem(kind, seed)
            infimum = task.infimum
            for name, restorer in policies(task, windows).items():
                result = run(task, windows, seed, rate, restorer)
                result["loss"] -= infimum
                runs.setdefault(name, []).append(result)
                print(f"{kind} {seed}  {name:32}  {result['loss']:.4f}  {result['half']:.2f}", flush=True)
        found[kind] = runs
    return {"windows": windows, "seeds": seeds, "problems": found}


def table() -> str:
    """The results as Markdown: loss, its ratio to hindsight, and when half of the density was restored."""
    content = json.loads(RESULTS.read_text(encoding="utf-8"))["problems"]
    lines = []
    for kind, runs in content.items():
        loss = {name: np.array([r["loss"] for r in each]) for name, each in runs.items()}
        half = {name: float(np.median([r["half"] for r in each])) for name, each in runs.items()}
        swept = [name for name in loss if name.startswith(("at once", "in steps"))]
        best = np.min([loss[name] for name in swept], axis=0)
        when = min(swept, key=lambda name: loss[name].mean())
        lines += [f"| {kind} | loss | times hindsight | half restored at |", "| --- | --- | --- | --- |"]
        lines.append(f"| hindsight (on average {when}) | {best.mean():.4f} | 1 | {half[when]:.2f} |")
        for name in ("never", "at once 0", *(n for n in loss if n.startswith(("gradient", "plateau")))):
            title = {"at once 0": "dense from the start"}.get(name, name)
            ratio = float(np.exp(np.log(loss[name] / best).mean()))
            lines.append(f"| {title} | {loss[name].mean():.4f} | {ratio:.2f} | {half[name]:.2f} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="When to restore: gradient and plateau against hindsight")
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--seeds", type=int, default=3)
    runner.add_argument("--windows", type=int, default=800)
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "run":
        found = study(options.seeds, options.windows)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
