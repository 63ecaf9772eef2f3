"""When to restore: the ``gradient`` trigger against ``plateau``, and both against the best time in hindsight.

    python -m benchmarks.triggers lab [--seeds 10] [--windows 1200]
    python -m benchmarks.triggers table

Laboratory: ten clients of densities 1, .5, .2, .1 and six times .05, whose flights take one window at their
initial density and proportionally more when they are restored. Each policy sees what the plugin's triggers
see, every `INTERVAL` windows, through the same decision kernel. The reference is a sweep: everybody is
restored to 1 at one time, for every time in `SWEEP`; the best of it, seed by seed, is hindsight.

A run's figure is F(w) - inf F (logistic problem) or F(w) (ReLU network), averaged over its last tenth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
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
SWEEP = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PATIENCES = (2, 5, 10)


def problem(kind: str, seed: int) -> Problem:
    """A logistic regression of 200 coordinates or a ReLU network of 40 hidden units."""
    rng = np.random.default_rng([seed, 7])
    if kind == "logistic":
        return Logistic.random(rng, clients=10, size=200, samples=100, batch=10)
    return ReluNetwork.random(rng, clients=10, inputs=10, hidden=40, samples=50, batch=10)


def policy(kind: str, task: Problem, seconds: Sequence[float], rules: gmr.GMRRules) -> Restorer:
    """A restorer that makes the plugin's check every `INTERVAL` windows."""
    state = gmr.start(rules, DENSITIES)

    def restore(merged: int, w: Floats, densities: Sequence[float]) -> list[tuple[int, float]]:
        nonlocal state
        if merged == 0 or merged % INTERVAL:
            return []
        order = ranking(w, task.prunable)
        votes: list[bool] = []
        losses: list[float | None] = []
        if kind == "gradient":
            grad = client_grads(task, w).mean(axis=0)
            for d, unit in zip(densities, seconds, strict=True):
                more = gmr.next_density(rules, d)
                held, gained = (float(np.square(grad[mask(task, order, x)]).sum()) for x in (d, more))
                pays = gmr.restoring_pays(held, gained - held, unit * d, unit * more)
                votes.append(d < 1 and pays)
        else:
            losses = [task.loss(n, np.where(mask(task, order, d), w, 0.0)) for n, d in enumerate(densities)]
        seen = gmr.Observation(0.0, mean_loss(task, w), losses, votes)
        state, done = gmr.step(rules, state, seen)
        return [(r.client, r.after) for r in done if r.client is not None] + [
            (n, d) for n, d in enumerate(state.densities) if d > densities[n]
        ]

    return restore


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


def laboratory(seeds: int, windows: int) -> dict[str, Any]:
    """All policies on both problems."""
    found: dict[str, Any] = {}
    for kind, rate in (("logistic", 0.1), ("relu", 0.05)):
        runs: dict[str, list[dict[str, float]]] = {}
        for seed in range(seeds):
            task = problem(kind, seed)
            infimum = task.infimum
            seconds = [1.0 / d for d in DENSITIES]  # one window at the initial density
            for share in SWEEP:
                at = round(share * windows)

                def once(merged: int, w: Floats, d: Sequence[float], at: int = at) -> list[tuple[int, float]]:
                    return [(n, 1.0) for n in range(10)] if merged == at else []

                runs.setdefault(f"at {share:g}", []).append(run(task, windows, seed, rate, once))
            for name in ("gradient", *(f"plateau {p}" for p in PATIENCES)):
                trigger, _, patience = name.partition(" ")
                rules = gmr.GMRRules(
                    trigger="gradient" if trigger == "gradient" else "plateau",
                    patience=int(patience or 5),
                    higher_is_better=False,
                )
                restorer = policy(trigger, task, seconds, rules)
                runs.setdefault(name, []).append(run(task, windows, seed, rate, restorer))
            for each in runs.values():
                each[-1]["loss"] -= infimum
            print(kind, seed, {n: round(r[-1]["loss"], 4) for n, r in runs.items()}, flush=True)
        found[kind] = runs
    return found


def table() -> str:
    """The results as Markdown: loss, its excess over hindsight, and when half was restored."""
    content = json.loads(RESULTS.read_text(encoding="utf-8"))["laboratory"]
    lines = []
    for kind, runs in content.items():
        sweep = np.array([[r["loss"] for r in runs[f"at {s:g}"]] for s in SWEEP])
        best = sweep.min(axis=0)
        when = np.array(SWEEP)[sweep.argmin(axis=0)]
        lines += [
            f"| {kind} | loss above the infimum | excess over hindsight | half restored at |",
            "| --- | --- | --- | --- |",
        ]
        lines.append(f"| hindsight | {best.mean():.4f} | 0 % | {np.median(when):.2f} |")
        for name in ("at 0", "at 1", "gradient", *(f"plateau {p}" for p in PATIENCES)):
            loss = np.array([r["loss"] for r in runs[name]])
            excess, half = 100 * (loss / best - 1), np.median([r["half"] for r in runs[name]])
            title = {"at 0": "dense from the start", "at 1": "never"}.get(name, name)
            lines.append(f"| {title} | {loss.mean():.4f} | {np.median(excess):.0f} % | {half:.2f} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="When to restore: gradient and plateau against hindsight")
    commands = parser.add_subparsers(dest="command", required=True)
    lab = commands.add_parser("lab")
    lab.add_argument("--seeds", type=int, default=10)
    lab.add_argument("--windows", type=int, default=1200)
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "lab":
        found = {"windows": options.windows, "laboratory": laboratory(options.seeds, options.windows)}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
