"""One run whose server notes what travelled and who trained: what `benchmarks.ranks` starts.

    [mpirun -np N | torchrun ...] python -m fedgmr_plugin benchmarks/ranks_job.py --cf CONFIG

Rank 0 writes its figures as JSON to the file that the configuration names as `figures`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fedgmr_plugin

fedgmr_plugin.register()

import fedml  # noqa: E402

from benchmarks import models, updates  # noqa: E402
from fedgmr_plugin.datasets import fedml_dataset  # noqa: E402
from fedgmr_plugin.runtimes.distributed import forks, pool, ranks  # noqa: E402
from fedgmr_plugin.runtimes.distributed.channel import Channel, Frame  # noqa: E402


class Noted:
    """A channel that notes the values that pass.

    Attributes:
        longest: bytes of the longest payload of each version that was trained at its other end.
        updates: bytes of the values of its updates.
        rankings: bytes of the rankings that it was sent.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel, self.name = channel, channel.name
        self.longest: defaultdict[int, int] = defaultdict(int)
        self.updates = self.rankings = 0

    def send(self, message: Frame) -> None:
        """See `Channel`."""
        head, values = message
        if head["kind"] == "task":
            version = head["task"][2]
            self.longest[version] = max(self.longest[version], head["size"] * values.itemsize)
        elif head["kind"] == "ranking":
            self.rankings += values.nbytes
        self._channel.send(message)

    def receive(self) -> Frame:
        """See `Channel`."""
        message = self._channel.receive()
        if message.head["kind"] == "update":
            self.updates += message.values.nbytes
        return message

    def close(self) -> None:
        """See `Channel`."""
        self._channel.close()


class NotedPool(pool.Pool):
    """A pool over noted channels; `last` is the one that was made last."""

    last: NotedPool | None = None

    def __init__(self, channels: Sequence[Channel], *others: Any, **named: Any) -> None:
        self.noted = [Noted(channel) for channel in channels]
        NotedPool.last = self
        super().__init__(self.noted, *others, **named)


def dataset() -> list[Any]:
    """The clients of `benchmarks.updates`, with a test set of 100 images."""
    parts = updates.clients()
    train = torch.cat([p.x for p in parts]).numpy(), torch.cat([p.y for p in parts]).numpy()
    rows = torch.arange(len(train[1])).split(len(parts[0].y))
    test = train[0][:100], train[1][:100]
    return fedml_dataset(train, test, [r.numpy() for r in rows], updates.BATCH, classes=10)


def figures(run: Any) -> dict[str, Any]:
    """What rank 0 has noted; seconds and bytes."""
    found = {"wall": run.end["wall_seconds"], "windows": run.end["windows"], "sha": run.end["model_sha256"]}
    if NotedPool.last is not None:
        noted = NotedPool.last.noted
        found |= {
            "busy": dict(NotedPool.last.busy),
            "traffic": dict(NotedPool.last.traffic),
            "floor": sum(sum(c.longest.values()) + c.updates for c in noted),
            "rankings": sum(c.rankings for c in noted),
        }
    return found


def main() -> None:
    """The job of one rank."""
    forks.Pool = ranks.Pool = NotedPool  # type: ignore[misc]
    args = fedml.init()
    torch.manual_seed(0)
    runner = fedml.FedMLRunner(args, fedml.device.get_device(args), dataset(), models.small_cnn())
    runner.run()
    simulator = runner.runner
    part = getattr(simulator, "fl_trainer", None) or simulator.simulator
    run = getattr(part, "run", part)
    if hasattr(run, "end"):
        Path(args.figures).write_text(json.dumps(figures(run)), encoding="utf-8")


if __name__ == "__main__":
    main()
