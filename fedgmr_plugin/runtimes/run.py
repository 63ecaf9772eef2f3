"""One run of the method, whoever trains: its log, its checkpoints, its progress, its model.

FedML constructs a runtime with its five objects and calls it; `fedgmr_plugin.runtimes.setup` has translated
them, and the engine does the work.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from fedgmr_plugin.config import FedGMRConfig, effective
from fedgmr_plugin.engine.client import Batch, BuiltinTrainer, Metrics
from fedgmr_plugin.engine.network import VirtualNetwork
from fedgmr_plugin.engine.seeds import derive, isolated_rng
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.simulate import Simulation
from fedgmr_plugin.engine.snapshot import Snapshot, restore_simulation, snapshot_simulation
from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.kernels.cost import cost_of_layer, macs_per_weight
from fedgmr_plugin.kernels.rounding import PAYLOAD_TYPES
from fedgmr_plugin.protocol.checkpoint import FOLDER, Checkpoint, save
from fedgmr_plugin.protocol.runlog import LOG_NAME, RunLogWriter
from fedgmr_plugin.protocol.schema import SCHEMA
from fedgmr_plugin.protocol.sizes import MessageSizes
from fedgmr_plugin.runtimes import resume
from fedgmr_plugin.runtimes.aggregator import AggregatorBridge
from fedgmr_plugin.runtimes.command import Command, next_run
from fedgmr_plugin.runtimes.distributed.pool import PATIENCE, Workers
from fedgmr_plugin.runtimes.merge_hooks import MergeHooks
from fedgmr_plugin.runtimes.progress import Progress
from fedgmr_plugin.runtimes.settings import as_mapping
from fedgmr_plugin.runtimes.setup import Setup, dense_megabytes, links
from fedgmr_plugin.runtimes.trainer import is_known

_log = logging.getLogger(__name__)
_PACKAGES = ("fedgmr", "fedml", "torch", "torchvision", "numpy")


@dataclass
class Run:
    """One run, constructed and validated; `train` carries it out.

    Attributes:
        directory: where the run log, the effective configuration and the model are written.
        resumed: whether it goes on with an interrupted run.
        workers: who trains, where it is not this process alone.
        again: the command that continues it.
        end: the run's `end` record after `train`.
    """

    simulation: Simulation
    model: nn.Module
    header: dict[str, Any]
    directory: Path
    on_record: Callable[[dict[str, Any]], None]
    sizes: MessageSizes
    command: Command
    resumed: bool = False
    again: str = "fedgmr resume"
    workers: Workers | None = None
    end: dict[str, Any] | None = None
    _writer: RunLogWriter | None = None

    def train(self) -> None:
        """Run to the end of the budget; the model given to FedML then holds what is shipped.

        Where `fedgmr resume` goes on with an interrupted run, from its last checkpoint.

        Raises:
            RunLogError: GMR-604 if another process trains in the run's directory; GMR-604 to GMR-606 if the
                run to go on with cannot be continued.
        """
        started = time.monotonic()
        self.directory.mkdir(parents=True, exist_ok=True)
        with resume.locked(self.directory):
            checkpoint = self._prepare()
            writer = RunLogWriter(
                self.directory,
                overwrite=self.resumed,
                resume_at=None if checkpoint is None else checkpoint.meta["log_bytes"],
            )
            with writer, Progress(self.header) as progress:
                self._writer, self._progress = writer, progress
                with threads(self.simulation.config.cpu_threads), self._workers_ended(), self._way_on():
                    end = self._advance(writer, checkpoint)
                    self._save_model()
                    self.end = {**end, "wall_seconds": time.monotonic() - started}
                    writer.write(self.end)
        _log.info("model sha256: %s", end["model_sha256"])
        progress.close_with(self.end, self.directory)

    def _save_model(self) -> None:
        """What is shipped, in the model that FedML was given and in the run's directory."""
        server = self.simulation.server
        shipped = server.model(server.candidate)
        self.simulation.bench.place(shipped)
        state = server.layout.state_dict(self.model, shipped)
        draft = self.directory / "model.draft"
        save_file({k: v.cpu().contiguous() for k, v in state.items()}, str(draft))
        draft.rename(self.directory / "model.safetensors")

    @contextmanager
    def _way_on(self) -> Iterator[None]:
        """Say how to continue where training is interrupted."""
        try:
            yield
        except BaseException:
            if self.command.script and self.command.run == 1:
                path = shlex.quote(str(self.directory))
                click.echo(f"interrupted; to continue: {self.again} {path}", err=True)
            raise

    def _prepare(self) -> Checkpoint | None:
        """Make the run's directory ready; the checkpoint to go on from, if there is one."""
        checkpoint = None
        if self.resumed:
            checkpoint = resume.checkpoint_of(self.directory, self.header)
        else:
            resume.remember(self.directory, self.command)
        self._write_config()
        return checkpoint

    def _advance(self, writer: RunLogWriter, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """The run from its beginning or from `checkpoint`, with checkpoints on the way; its `end` record."""
        seconds = self.simulation.config.checkpoint_seconds
        if checkpoint is None:
            writer.write(self.header)
            end = self.simulation.start()
        else:
            restore_simulation(self.simulation, Snapshot(checkpoint.meta["simulation"], checkpoint.tensors))
            self.sizes.load_state(checkpoint.meta["sizes"])
            end = None
        saved = time.monotonic()
        while end is None:
            end = self.simulation.step()
            if end is None and seconds is not None and time.monotonic() - saved >= seconds:
                self._save_checkpoint(writer)
                saved = time.monotonic()
        return end

    def _save_checkpoint(self, writer: RunLogWriter) -> None:
        """A run goes on without a checkpoint that cannot be written."""
        meta, tensors = snapshot_simulation(self.simulation)
        size, digest = writer.sync()
        state = {"simulation": meta, "sizes": self.sizes.state(), "log_bytes": size, "log_sha256": digest}
        try:
            save(self.directory, self.simulation.server.version, state, tensors)
        except OSError as error:
            _log.warning("%s", error)

    @contextmanager
    def _workers_ended(self) -> Iterator[None]:
        """End the processes that train with the run: at leisure, or at once where it failed."""
        patience: float | None = PATIENCE
        try:
            yield
            patience = None
        finally:
            if self.workers is not None:
                self.workers.close(patience)

    def record(self, fields: dict[str, Any]) -> None:
        """Observer of the simulation: the run log, the progress line, FedML's own metrics."""
        if self._writer is not None:
            self._writer.write(fields)
            self._progress.record(fields)
        self.on_record(fields)

    def _write_config(self) -> None:
        fedml = {key: value for key, value in self.header["fedml"].items() if key != "aggregation_hooks"}
        content = {"fedml": fedml, "fedgmr_args": self.header["config"]}
        text = yaml.safe_dump(content, sort_keys=False)
        (self.directory / "config.yaml").write_text(text, encoding="utf-8")


def assemble(setup: Setup, server_aggregator: Any = None, workers: Workers | None = None) -> Run:
    """The run, with its server in this process.

    Args:
        server_aggregator: a user's own, honoured.
        workers: who trains; this process where None.

    Raises:
        ConfigError, HostError: what the aggregator is refused for, or a directory that is taken.
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
    bridge.check(config.min_updates, keys.clients)
    hooks = MergeHooks(bridge, layout, model, config, keys.seed) if bridge.active else None
    server = Server(
        config,
        Plan(keys.seed, keys.windows, keys.in_flight, keys.test_interval, setup.counts, _layer_costs(setup)),
        layout,
        layout.gather(model),
        before_merge=hooks.before if hooks else None,
        after_merge=hooks.after if hooks else None,
    )
    megabytes = dense_megabytes(config, layout)
    sizes = MessageSizes(PAYLOAD_TYPES[config.payload_dtype])

    def evaluate(model: nn.Module, batches: Iterable[Batch]) -> Metrics:
        """With the user's ServerAggregator; with the trainer where its `test` returns no metrics."""
        metrics = bridge.test(model, batches, round_index=server.version - 1)
        return metrics if is_known(metrics) else setup.trainer.evaluate(model, batches)

    resumed = resume.take()
    directory = resumed or run_directory(config)
    run: Run
    simulation = Simulation(
        server,
        VirtualNetwork(config, setup.densities, megabytes, links(config, setup.densities, keys.seed)),
        setup.bench,
        lambda: data.test,
        lambda fields: run.record(fields),
        executor=workers,
        evaluate=evaluate if bridge.user_defined else None,
        sizes=sizes if config.payload_rule == "encoded" else lambda sent: None,
    )
    header = _header(setup, directory.name, megabytes, hooked=hooks is not None)
    report = _fedml_metrics(setup.args)
    run = Run(
        simulation,
        model,
        header,
        directory,
        report,
        sizes,
        next_run(),
        resumed=resumed is not None,
        workers=workers,
    )
    return run


def _layer_costs(setup: Setup) -> tuple[float, ...] | None:
    """Cost of one weight of each prunable layer, for the score that asks for it."""
    if setup.config.score != "per_cost":
        return None
    with isolated_rng(derive(setup.keys.seed, "costs")):
        example = next(iter(setup.data.test))[0][:2].to(setup.device)
        return tuple(cost_of_layer(setup.layout, macs_per_weight(setup.model, setup.layout, example)))


def _header(setup: Setup, name: str, megabytes: float, *, hooked: bool) -> dict[str, Any]:
    """The run log's first record."""
    config, keys, layout = setup.config, setup.keys, setup.layout
    return {
        "type": "header",
        "schema": SCHEMA,
        "method": "fedgmr",
        "run_name": name,
        "seed": keys.seed,
        "config": effective(config),
        "fedml": {**as_mapping(keys), "aggregation_hooks": hooked},
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
    }


def run_directory(config: FedGMRConfig) -> Path:
    """The directory of a new run: `run_name` in `output_dir`, or the next free number.

    Raises:
        ConfigError: GMR-110 if the named run exists already.
    """
    parent = Path(config.output_dir)
    if config.run_name is not None:
        directory = parent / config.run_name
        if (directory / LOG_NAME).exists() or (directory / FOLDER).exists():
            raise ConfigError("GMR-110", f"run_name={config.run_name}: {directory} has a run already")
        return directory
    taken = [int(p.name[4:]) for p in parent.glob("run-*") if p.name[4:].isdigit()]
    return parent / f"run-{max(taken, default=0) + 1:03d}"


def _fedml_metrics(args: Any) -> Callable[[dict[str, Any]], None]:
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


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` CPU threads; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
