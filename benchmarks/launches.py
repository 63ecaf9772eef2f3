"""What a GPU would be told to do for a window: kernel launches and waits, counted without a GPU.

    python -m benchmarks.bench launches

On a device that counts (`benchmarks.elsewhere`), in a process of its own: torch cannot unlearn a device. The
window is that of `benchmarks.batched`, but for its batches, whose size changes no count. Where launches take
longer than kernels, the ratio of launches is about that of times.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.batched import CLIENTS, MODELS, Model, simulation
from benchmarks.elsewhere import NAME, Work, counting, register
from benchmarks.measure import Row
from fedgmr_plugin.engine.batched import Batched

#: Windows of a run before one is counted.
_WARM = 1


def measure() -> list[Row]:
    """The rows of this benchmark."""
    job = [sys.executable, "-m", "benchmarks.launches"]
    root = Path(__file__).resolve().parents[1]
    told = subprocess.run(job, cwd=root, check=True, capture_output=True, text=True).stdout
    rows = []
    for name, counts in json.loads(told).items():
        (turn, turn_waits), (together, waits), window = (counts[k] for k in ("in turn", "together", "window"))
        detail = f"{together:,} launches and {waits} waits, one after another {turn:,} and {turn_waits}"
        what = f"launches, {CLIENTS} clients of {name} together"
        rows.append(Row(what, "one after another", together / turn, "", detail))
        detail = f"and {window[1]} waits, {window[2]} clients trained together"
        rows.append(Row(f"launches of a window, {name}", "", window[0], "", detail))
    return rows


def counts_of(which: Model) -> dict[str, Any]:
    """Launches and waits of ten clients' training, either way, and of a whole window."""
    _, make, shape, classes = which
    torch.manual_seed(0)
    x = torch.rand(40, *shape).to(NAME)
    y = torch.randint(classes, (40,)).to(NAME)
    run = simulation(make().to(NAME), x, y, batch=2)
    run.start()
    sent = list(run.pending.values())

    def in_turn() -> None:
        for dispatch in sent:
            run.bench.train(dispatch)

    def warm(work: Callable[[], Any]) -> Work:
        work()
        with counting() as counted:
            work()
        return counted

    told = {"in turn": warm(in_turn), "together": warm(lambda: Batched(run.bench, CLIENTS).finish(sent))}
    counts: dict[str, Any] = {
        name: (work.launches.total(), work.waits.total()) for name, work in told.items()
    }
    for _ in range(_WARM):
        run.step()
    pending = set(run.pending)
    with counting() as window:
        run.step()
    arrived = len(pending - set(run.pending))
    counts["window"] = window.launches.total(), window.waits.total(), arrived
    return counts


def main() -> None:
    """The process that has the device."""
    torch.set_num_threads(1)
    keeps = register()
    print(json.dumps({which[0]: counts_of(which) for which in MODELS}))
    del keeps


if __name__ == "__main__":
    main()
