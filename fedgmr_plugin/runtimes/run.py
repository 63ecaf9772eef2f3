"""A simulated run: the engine on its virtual clock, with checkpoints on the way.

FedML constructs a runtime with its five objects and calls it; `fedgmr_plugin.runtimes.setup` has translated
them, and the engine does the work.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fedgmr_plugin.config import FedGMRConfig, effective
from fedgmr_plugin.engine.network import VirtualNetwork
from fedgmr_plugin.engine.restricted import Shares, rows_of
from fedgmr_plugin.engine.samples import Batch
from fedgmr_plugin.engine.seeds import derive, isolated_rng
from fedgmr_plugin.engine.server import MaskFamily, Plan, Server
from fedgmr_plugin.engine.simulate import Executor, Simulation
from fedgmr_plugin.engine.snapshot import Snapshot, restore_simulation, snapshot_simulation
from fedgmr_plugin.engine.trainer import BuiltinTrainer, Metrics
from fedgmr_plugin.engine.workbench import Evaluator
from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.kernels.cost import cost_of_layer, macs_per_weight
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.kernels.rounding import PAYLOAD_TYPES
from fedgmr_plugin.kernels.width import rank_widths
from fedgmr_plugin.protocol.checkpoint import FOLDER, Checkpoint
from fedgmr_plugin.protocol.runlog import LOG_NAME, RunLogWriter
from fedgmr_plugin.protocol.schema import SCHEMA
from fedgmr_plugin.protocol.sizes import MessageSizes
from fedgmr_plugin.runtimes import resume
from fedgmr_plugin.runtimes.aggregator import AggregatorBridge
from fedgmr_plugin.runtimes.command import next_run
from fedgmr_plugin.runtimes.distributed.pool import PATIENCE, Workers
from fedgmr_plugin.runtimes.merge_hooks import MergeHooks
from fedgmr_plugin.runtimes.recorded import RecordedRun
from fedgmr_plugin.runtimes.settings import as_mapping, security
from fedgmr_plugin.runtimes.setup import Setup, dense_megabytes, last_layer, links
from fedgmr_plugin.runtimes.trainer import is_known

_PACKAGES = ("fedgmr", "fedml", "torch", "torchvision", "numpy")


@dataclass
class Run(RecordedRun):
    """A simulated run.

    Attributes:
        sizes: what dispatches move.
        executor: who trains; this process, one client after another, where None.
    """

    sizes: MessageSizes = field(default_factory=MessageSizes)
    executor: Executor | None = None

    @property
    def simulation(self) -> Simulation:
        """The engine."""
        return cast(Simulation, self.course)

    def _advance(self, writer: RunLogWriter, checkpoint: Checkpoint | None) -> dict[str, Any]:
        seconds = self.simulation.config.checkpoint_seconds
        if checkpoint is None:
            end = self.simulation.start()
        else:
            restore_simulation(self.simulation, Snapshot(checkpoint.meta["simulation"], checkpoint.tensors))
            self.sizes.load_state(checkpoint.meta["sizes"])
            end = None
        saved = time.monotonic()
        while end is None:
            end = self.simulation.step()
            if end is None and seconds is not None and time.monotonic() - saved >= seconds:
                meta, tensors = snapshot_simulation(self.simulation)
                self._save_checkpoint(writer, {"simulation": meta, "sizes": self.sizes.state()}, tensors)
                saved = time.monotonic()
        return end

    @contextmanager
    def _helped(self) -> Iterator[None]:
        """End the processes that train with the run: at leisure, or at once where it failed."""
        patience: float | None = PATIENCE
        try:
            yield
            patience = None
        finally:
            if isinstance(self.executor, Workers):
                self.executor.close(patience)


class Serving(NamedTuple):
    """A run's server and what of the user's takes part in it.

    Attributes:
        evaluate: with the user's ServerAggregator; None without one.
        hooked: whether FedML's or the user's hooks may change uploads or the merged vector.
    """

    server: Server
    evaluate: Evaluator | None
    hooked: bool


def serving(setup: Setup, server_aggregator: Any = None, home: torch.device | None = None) -> Serving:
    """The server of a run.

    Args:
        server_aggregator: a user's own, honoured.
        home: where the global vector and what arrives are; where the model is, by default.

    Raises:
        ConfigError, HostError: what the aggregator is refused for.
    """
    config, keys, layout, model, data = setup.config, setup.keys, setup.layout, setup.model, setup.data
    bridge = AggregatorBridge(
        server_aggregator,
        model,
        setup.args,
        setup.device,
        train_loaders=data.train_loaders,
        test_loaders=data.test_loaders,
    )
    bridge.check(min(config.min_updates, keys.in_flight), keys.clients)
    hooks = MergeHooks(bridge, layout, model, config, keys.seed) if bridge.active else None
    server = Server(
        config,
        Plan(keys.seed, keys.windows, keys.in_flight, keys.test_interval, setup.counts, _layer_costs(setup)),
        layout,
        layout.gather(model).to(home or setup.device),
        before_merge=hooks.before if hooks else None,
        after_merge=hooks.after if hooks else None,
        masks=_masks(setup),
        shares=_shares(setup),
    )

    def evaluate(model: nn.Module, batches: Iterable[Batch]) -> Metrics:
        """The trainer measures where the user's `test` returns no metrics."""
        metrics = bridge.test(model, batches, round_index=server.version - 1)
        return metrics if is_known(metrics) else setup.trainer.evaluate(model, batches)

    return Serving(server, evaluate if bridge.user_defined else None, hooks is not None)


def assemble(setup: Setup, server_aggregator: Any = None, executor: Executor | None = None) -> Run:
    """The run, with its server in this process.

    Args:
        server_aggregator: a user's own, honoured.
        executor: who trains; this process, one client after another, where None.

    Raises:
        ConfigError, HostError: what the aggregator is refused for, or a directory that is taken.
    """
    config, keys, data = setup.config, setup.keys, setup.data
    server, evaluate, hooked = serving(setup, server_aggregator)
    megabytes = dense_megabytes(config, setup.layout)
    sizes = MessageSizes(PAYLOAD_TYPES[config.payload_dtype])
    resumed = resume.take()
    run: Run
    simulation = Simulation(
        server,
        VirtualNetwork(config, setup.densities, megabytes, links(config, setup.densities, keys.seed)),
        setup.bench,
        lambda: data.test,
        lambda fields: run.record(fields),
        executor=executor,
        evaluate=evaluate,
        sizes=sizes if config.payload_rule == "encoded" else lambda sent: None,
    )
    directory = resumed or run_directory(config)  # nothing is refused from here on
    header = run_header(setup, directory.name, megabytes, hooked=hooked)
    report = fedml_metrics(setup.args)
    run = Run(
        simulation,
        setup.model,
        header,
        directory,
        report,
        next_run(),
        resumed=resumed is not None,
        sizes=sizes,
        executor=executor,
    )
    return run


def _masks(setup: Setup) -> MaskFamily | None:
    """The family of masks that needs more than scores."""
    if setup.config.score not in ("width", "rolling_width"):
        return None
    rank_widths(setup.model, setup.layout, (1.0,))  # refuses a model without widths now
    rolls = setup.config.score == "rolling_width"

    def by_width(w_D: Tensor, densities: Sequence[float], version: int) -> Ranking:
        ranking = rank_widths(setup.model, setup.layout, densities, first=version if rolls else 0)
        return ranking.to(w_D.device)

    return by_width


def _shares(setup: Setup) -> Shares | None:
    """What of a client's uploads counts: of the last layer, the rows of its classes."""
    if not setup.config.label_masks:
        return None
    layer, classes = last_layer(setup.model, setup.data), setup.bench.training.classes

    @cache
    def of(client: int) -> Tensor | None:
        is_known_C = classes(client)
        if is_known_C is None or bool(is_known_C.all()):
            return None
        return rows_of(setup.layout, layer, is_known_C)

    return of


def _layer_costs(setup: Setup) -> tuple[float, ...] | None:
    """Cost of one weight of each prunable layer, for the score that asks for it."""
    if setup.config.score != "per_cost":
        return None
    with isolated_rng(derive(setup.keys.seed, "costs")):
        example = next(iter(setup.data.test))[0][:2].to(setup.device)
        return tuple(cost_of_layer(setup.layout, macs_per_weight(setup.model, setup.layout, example)))


def run_header(setup: Setup, name: str, megabytes: float, *, hooked: bool) -> dict[str, Any]:
    """The run log's first record."""
    config, keys, layout = setup.config, setup.keys, setup.layout
    kind = getattr(setup.args, "training_type", None)
    live = {"training_type": kind} if kind in ("cross_device", "cross_silo") else {}
    return {
        "type": "header",
        "schema": SCHEMA,
        "method": "fedgmr",
        "run_name": name,
        "seed": keys.seed,
        "config": effective(config),
        "fedml": {**as_mapping(keys), "aggregation_hooks": hooked, **security(setup.args), **live},
        "versions": {"python": platform.python_version(), **_versions()},
        "clients": keys.clients,
        "client_samples": list(setup.counts),
        "densities": list(setup.densities),
        "layout": {
            "size": layout.size,
            "prunable": layout.prunable,
            "dtype": str(layout.dtype).removeprefix("torch."),
            "layers": [
                {"name": e.name, "kind": e.kind, "size": e.size, "shape": list(e.shape)}
                for e in layout.entries
            ],
        },
        "model_megabytes": megabytes,
        "eta": keys.learning_rate,
        "local_steps": setup.steps if isinstance(setup.trainer, BuiltinTrainer) else None,
        "windows": keys.windows,
        "time_budget": config.time_budget,
        "device": device_name(setup.device),
    }


def device_name(device: torch.device) -> str:
    """What clients train on, such as ``cuda: NVIDIA H200``; of a CPU as much as the system tells."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return device.type
    found = ""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        names = re.findall(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE)
        found = names[0].strip() if names else ""
    return f"cpu: {found or platform.processor() or platform.machine() or 'unknown'}"


def run_directory(config: FedGMRConfig) -> Path:
    """The directory of a new run: `run_name` in `output_dir`, or the next free number.

    A number is taken by making its directory, so that runs that begin at the same time have different ones.

    Raises:
        ConfigError: GMR-110 if the named run exists already, or a numbered directory cannot be made.
    """
    parent = Path(config.output_dir)
    if config.run_name is not None:
        directory = parent / config.run_name
        if (directory / LOG_NAME).exists() or (directory / FOLDER).exists():
            raise ConfigError("GMR-110", f"run_name={config.run_name}: {directory} has a run already")
        return directory
    taken = [int(p.name[4:]) for p in parent.glob("run-*") if p.name[4:].isdigit()]
    number = max(taken, default=0) + 1
    while True:
        directory = parent / f"run-{number:03d}"
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            if directory.is_dir():  # another run was faster
                number += 1
                continue
            reason = f"{directory} cannot be made: {error.strerror}"
            raise ConfigError("GMR-110", reason, where="fedgmr_args.output_dir") from error
        return directory


def fedml_metrics(args: Any) -> Callable[[dict[str, Any]], None]:
    """Evaluations go where FedML's own algorithms send theirs: its tracking, and wandb if enabled."""

    def report(fields: dict[str, Any]) -> None:
        if fields["type"] != "evaluation":
            return
        metrics = {"Test/Acc": fields["accuracy"], "Test/Loss": fields["loss"]}
        if getattr(args, "using_mlops", False):  # FedML's tracking reaches for its cloud otherwise too
            from fedml import mlops

            for name, value in metrics.items():
                mlops.log({name: value, "round": fields["window"]})
        if getattr(args, "enable_wandb", False):
            import wandb

            wandb.log({**metrics, "round": fields["window"]})

    return report


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
