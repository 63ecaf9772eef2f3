"""What a client's local step costs at each density.

    python -m benchmarks.bench client_step
    python -m benchmarks.client_step 0.2        # where the time of a step at that density goes

Everything that is compared runs in one process, in turn, on one thread; times are medians over `ROUNDS`
rounds. What was tried on the way is in `benchmarks/NOTES.md`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, profiler
from torch.nn import functional as F

from benchmarks.measure import Row
from benchmarks.models import conv2
from fedgmr_plugin.engine.client import parameter_masks
from fedgmr_plugin.engine.samples import Batch
from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.kernels import ModelLayout, build_layout, rank, scores
from fedgmr_plugin.kernels.width import rank_widths

ROUNDS = 7
STEPS = 5  # local steps of a dispatch: what is done once per dispatch is shared among them
BATCH = 20
RATE = 0.01
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)


def plain_steps(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Local training without FedGMR, as anybody writes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def masked_steps(model: nn.Module, batches: Sequence[Batch], masks: Mapping[str, Tensor] | None) -> None:
    """Masked training by the formulas, dense: gradients filled with 0, the drift by whole vectors."""
    parameters = list(model.parameters())
    masked = [(p, ~masks[n]) for n, p in model.named_parameters() if masks and n in masks]
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    drift = torch.zeros((), dtype=torch.float64)
    for k, (x, y) in enumerate(batches):
        if k:
            moved = torch._foreach_sub([p.detach() for p in parameters], start)
            drift += torch.stack(torch._foreach_norm(moved, 2, dtype=torch.float64)).square().sum()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for parameter, is_masked in masked:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(is_masked, 0.0)
        optimizer.step()


def step_rows(
    rounds: int = ROUNDS, densities: Sequence[float] = DENSITIES, *, by_width: bool = False
) -> list[dict[str, Any]]:
    """Conv2 on 28 x 28 images: milliseconds per step, and per dispatch, at each density.

    Sub-models have the largest weights, or the first units of each layer (`by_width`).
    """
    model, layout, w_D = _initial()
    if by_width:
        ranking = rank_widths(model, layout, densities)
    else:
        ranking = rank(layout, w_D, scores("magnitude", layout, w_D), densities)
    batches = _batches()
    trainer, own, rows = BuiltinTrainer(), conv2(), []
    for density in densities:
        mask_D = ranking.mask(ranking.rung(density))
        masks = parameter_masks(layout, mask_D)
        for each in (model, own):
            layout.scatter(each, w_D * mask_D)

        def ours(masks: dict[str, Tensor] | None = masks) -> None:
            trainer.train(own, batches, masks, learning_rate=RATE, client=0)

        seconds = in_turn(
            {
                "plain": lambda: plain_steps(model, batches),
                "masked": lambda masks=masks: masked_steps(model, batches, masks),
                "ours": ours,
            },
            rounds,
        )
        per_step = {name: 1e3 * statistics.median(s) / STEPS for name, s in seconds.items()}
        rows.append(
            {
                "what": "conv2 step",
                "density": density,
                **{f"{name}_ms": value for name, value in per_step.items()},
                "of_plain": ratio(seconds["ours"], seconds["plain"]),
                "of_masked": ratio(seconds["ours"], seconds["masked"]),
            }
        )
    return rows


def _initial() -> tuple[nn.Module, ModelLayout, Tensor]:
    """Conv2, its layout and its weights [D]."""
    torch.manual_seed(0)
    model = conv2()
    layout = build_layout(model)
    return model, layout, layout.gather(model)


def _batches() -> list[Batch]:
    """Those of one dispatch."""
    x, y = torch.rand(STEPS * BATCH, 1, 28, 28), torch.randint(62, (STEPS * BATCH,))
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def profile(density: float, repeats: int = 8) -> dict[str, list[tuple[str, float]]]:
    """torch's operations that a dispatch of our steps, and of plain ones, spends its time in, with shares."""
    model, layout, w_D = _initial()
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), (density,))
    masks, batches, trainer = parameter_masks(layout, ranking.mask(0)), _batches(), BuiltinTrainer()
    layout.scatter(model, w_D * ranking.mask(0))
    shares = {}
    for name, work in {
        "ours": lambda: trainer.train(model, batches, masks, learning_rate=RATE, client=0),
        "plain": lambda: plain_steps(model, batches),
    }.items():
        work()
        with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as watched:
            for _ in range(repeats):
                work()
        times = {event.key: event.self_cpu_time_total for event in watched.key_averages()}
        whole = sum(times.values())
        shares[name] = sorted(((key, time / whole) for key, time in times.items()), key=lambda part: -part[1])
    return shares


def in_turn(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every task, `rounds` times; the tasks take turns, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(rounds + 1):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            if round_:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of a/b over rounds: what slows a round down slows both."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def measure(rounds: int = ROUNDS) -> list[Row]:
    """The goals: a step of Conv2 at low density against the dense step that anybody writes."""
    torch.set_num_threads(1)
    goals = {0.05: "<= 0.5", 0.1: "<= 1", 0.2: "<= 1"}
    rows = [("", row) for row in step_rows(rounds)]
    rows += [(", width", row) for row in step_rows(rounds, tuple(goals), by_width=True)]
    return [
        Row(
            f"a step of Conv2 at density {row['density']:g}{kind}",
            "plain dense step",
            row["of_plain"],
            goals.get(row["density"], ""),
            f"{row['ours_ms']:.1f} ms, plain {row['plain_ms']:.1f}, by the formulas {row['masked_ms']:.1f}",
        )
        for kind, row in rows
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for whose, parts in profile(float(sys.argv[1])).items():
        print(whose, *(f"{share:6.1%}  {name}" for name, share in parts[:12]), sep="\n")
