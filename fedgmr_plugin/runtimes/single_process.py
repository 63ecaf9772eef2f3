"""FedGMR in FedML's single-process simulator.

FedML constructs the runtime with its five objects and calls `train`. Everything of FedML is translated here
(arguments, data, trainer, aggregator); everything of FedGMR happens in `fedgmr_plugin.engine`.
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
from torch import Tensor, nn

from fedgmr_plugin.config import FedGMRConfig, effective
from fedgmr_plugin.engine.client import Batch, BatchPlan, BuiltinTrainer, LocalTrainer, Metrics
from fedgmr_plugin.engine.network import Links, LogNormalLinks, TraceLinks, VirtualNetwork
from fedgmr_plugin.engine.seeds import derive, isolated_rng
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.simulate import Clients, Simulation, Training
from fedgmr_plugin.engine.snapshot import Snapshot, restore_simulation, snapshot_simulation
from fedgmr_plugin.errors import ConfigError, DataError
from fedgmr_plugin.kernels.aggregate import MaskedUpdate
from fedgmr_plugin.kernels.cost import cost_of_layer, macs_per_weight
from fedgmr_plugin.kernels.layout import ModelLayout, build_layout, validate
from fedgmr_plugin.kernels.rounding import PAYLOAD_TYPES
from fedgmr_plugin.protocol.checkpoint import FOLDER, Checkpoint, save
from fedgmr_plugin.protocol.runlog import LOG_NAME, RunLogWriter
from fedgmr_plugin.protocol.schema import SCHEMA
from fedgmr_plugin.protocol.sizes import MessageSizes
from fedgmr_plugin.runtimes import resume
from fedgmr_plugin.runtimes.aggregator import AggregatorBridge
from fedgmr_plugin.runtimes.command import Command, next_run
from fedgmr_plugin.runtimes.data import FederatedData, read_dataset
from fedgmr_plugin.runtimes.progress import Progress
from fedgmr_plugin.runtimes.settings import FedMLKeys, as_mapping, fedml_keys, options
from fedgmr_plugin.runtimes.traces import load_traces
from fedgmr_plugin.runtimes.trainer import FedMLTrainer, is_known
from fedgmr_plugin.runtimes.workers import Workers

_log = logging.getLogger(__name__)
_PACKAGES = ("fedgmr", "fedml", "torch", "torchvision", "numpy")
#: Data sets for which FedML has trainers of its own that are not plain classification.
_FEDML_TRAINED = ("stackoverflow_lr", "fed_shakespeare", "stackoverflow_nwp")


@dataclass
class SingleProcess:
    """One run, constructed and validated; `train` carries it out.

    Attributes:
        directory: where the run log, the effective configuration and the model are written.
        resumed: whether it goes on with an interrupted run.
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
                with _threads(self.simulation.config.cpu_threads), self._workers_ended(), self._way_on():
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
        self.simulation.place(shipped)
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
                click.echo(f"interrupted; to continue: fedgmr resume {path}", err=True)
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
        try:
            yield
        finally:
            if self.workers is not None:
                self.workers.close()

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


def build(
    args: Any,
    device: Any,
    dataset: Any,
    model: nn.Module,
    client_trainer: Any = None,
    server_aggregator: Any = None,
) -> SingleProcess:
    """A run of FedGMR from what FedML's simulator is constructed with.

    Args:
        args: FedML's arguments.
        device: where clients train and models are evaluated.
        dataset: FedML's 8-element list.
        model: the global model; overwritten during the run, and holds the shipped model at its end.
        client_trainer, server_aggregator: a user's own, honoured.

    Raises:
        ConfigError, ModelError, DataError, HostError: everything wrong with them, before any training.
    """
    config, keys = options(args), fedml_keys(args)
    device = torch.device(device) if device is not None else torch.device("cpu")
    data = read_dataset(dataset, keys.clients)
    counts = _training_samples(config, keys, data)
    densities = config.initial_densities(keys.clients)
    model.to(device)
    layout = build_layout(model, config.dense_layers)
    for finding in validate(model, config.dense_layers):
        _log.info("%s %s", finding.code, finding.message)

    trainer = _trainer(args, keys, config, device, model, client_trainer, data)
    bridge = AggregatorBridge(
        server_aggregator,
        model,
        args,
        device,
        train_loaders=data.train_loaders,
        test_loaders=data.test_loaders,
    )
    bridge.check(config.min_updates, keys.clients)
    hooks = _Hooks(bridge, layout, model, config, keys.seed) if bridge.active else None

    clients = Clients(data.clients.__getitem__, config.validation_fraction, keys.seed, keys.clients)
    costs = None
    if config.score == "per_cost":
        with isolated_rng(derive(keys.seed, "costs")):
            example = next(iter(data.test))[0][:2].to(device)
            costs = tuple(cost_of_layer(layout, macs_per_weight(model, layout, example)))
    plan = Plan(keys.seed, keys.windows, keys.in_flight, keys.test_interval, counts, costs)
    server = Server(
        config,
        plan,
        layout,
        layout.gather(model),
        before_merge=hooks.before if hooks else None,
        after_merge=hooks.after if hooks else None,
    )
    megabytes = dense_megabytes(config, layout)
    sizes = MessageSizes(PAYLOAD_TYPES[config.payload_dtype])
    steps = config.local_steps if isinstance(config.local_steps, int) else None
    batch_plan = BatchPlan(keys.batch_size, steps, keys.epochs, config.shuffle, keys.seed)

    def evaluate(model: nn.Module, batches: Iterable[Batch]) -> Metrics:
        """With the user's ServerAggregator; with the trainer where its `test` returns no metrics."""
        metrics = bridge.test(model, batches, round_index=server.version - 1)
        return metrics if is_known(metrics) else trainer.evaluate(model, batches)

    resumed = resume.take()
    directory = resumed or run_directory(config)
    run: SingleProcess
    workers = None
    if config.workers > 1:
        _check_workers(config, device, trainer)
        workers = Workers(lambda sent: simulation.train(sent), layout, config.workers)
    simulation = Simulation(
        server,
        VirtualNetwork(config, densities, megabytes, links(config, densities, keys.seed)),
        model,
        clients,
        Training(trainer, batch_plan, keys.learning_rate),
        lambda: data.test,
        lambda fields: run.record(fields),
        executor=workers,
        evaluate=evaluate if bridge.user_defined else None,
        sizes=sizes if config.payload_rule == "encoded" else lambda sent: None,
    )
    header = {
        "type": "header",
        "schema": SCHEMA,
        "method": "fedgmr",
        "run_name": directory.name,
        "seed": keys.seed,
        "config": effective(config),
        "fedml": {**as_mapping(keys), "aggregation_hooks": hooks is not None},
        "versions": {"python": platform.python_version(), **_versions()},
        "clients": keys.clients,
        "client_samples": list(counts),
        "densities": list(densities),
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
        "local_steps": steps if isinstance(trainer, BuiltinTrainer) else None,  # others choose their own
        "windows": keys.windows,
        "time_budget": config.time_budget,
    }
    report = _fedml_metrics(args)
    run = SingleProcess(
        simulation, model, header, directory, report, sizes, next_run(), resumed is not None, workers
    )
    return run


def _check_workers(config: FedGMRConfig, device: torch.device, trainer: LocalTrainer) -> None:
    """Raise GMR-106 where forked processes cannot stand in for this one."""
    obstacle = None
    if not isinstance(trainer, BuiltinTrainer):
        obstacle = "a ClientTrainer of its own may remember something between clients"
    elif device.type != "cpu":
        obstacle = f"a process that uses {device} cannot be forked"
    elif config.cpu_threads != 1:
        obstacle = f"each trains on one thread, but cpu_threads={config.cpu_threads}"
    elif config.probe:
        obstacle = "probe=true watches every step, which only the main process can"
    if obstacle:
        raise ConfigError("GMR-106", f"workers={config.workers}: {obstacle}", where="fedgmr_args.workers")


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


def _training_samples(config: FedGMRConfig, keys: FedMLKeys, data: FederatedData) -> tuple[int, ...]:
    """Training samples of each client, after the validation split."""
    counts = []
    for n in range(keys.clients):
        size = len(data.clients[n])
        counts.append(size - int(config.validation_fraction * size))
        if counts[-1] < 1:
            raise DataError("GMR-301", f"client {data.ids[n]} has no training sample left of {size}")
    return tuple(counts)


def _trainer(
    args: Any,
    keys: FedMLKeys,
    config: FedGMRConfig,
    device: torch.device,
    model: nn.Module,
    client_trainer: Any,
    data: FederatedData,
) -> LocalTrainer:
    """The user's trainer, FedML's for its language tasks, or the built-in one."""
    if client_trainer is None and keys.dataset in _FEDML_TRAINED:
        from fedml.ml.trainer.trainer_creator import create_model_trainer

        client_trainer = create_model_trainer(model, args)
    if client_trainer is not None:
        if config.probe or config.trigger == "gradient":
            key = "probe=true" if config.probe else "trigger=gradient"
            raise ConfigError(
                "GMR-106",
                f"{key} needs the built-in trainer: a ClientTrainer does not give its loss",
                where="fedgmr_args",
            )
        fallback = BuiltinTrainer(device=device, loss=config.loss)
        return FedMLTrainer(client_trainer, args, device, data=data, fallback=fallback)
    return BuiltinTrainer(
        device=device,
        loss=config.loss,
        optimizer=keys.optimizer,
        momentum=config.client_momentum,
        weight_decay=keys.weight_decay,
        gradient_clip=config.gradient_clip,
    )


def dense_megabytes(config: FedGMRConfig, layout: ModelLayout) -> float:
    """Size S of the dense model as it travels, in MB: given or measured, less for a narrow type."""
    narrow = PAYLOAD_TYPES[config.payload_dtype]
    share = 1.0 if narrow is None else narrow.itemsize / layout.dtype.itemsize
    return share * (config.model_megabytes or layout.size * layout.dtype.itemsize / 1e6)


def links(config: FedGMRConfig, densities: tuple[float, ...], seed: int) -> Links:
    """The simulated links of a run: measured where `bandwidth_traces` is given, else log-normal.

    Raises:
        DataError: GMR-303 for traces that cannot be used.
    """
    if config.bandwidth_traces is None:
        return LogNormalLinks(config, densities, seed)
    return TraceLinks(config, densities, seed, load_traces(config.bandwidth_traces, config.trace_family))


@dataclass(frozen=True)
class _Hooks:
    """FedML's hooks around a merge: sub-models are made dense for them, and cut to their supports again."""

    bridge: AggregatorBridge
    layout: ModelLayout
    model: nn.Module
    config: FedGMRConfig
    seed: int

    def before(self, window: int, w_D: Tensor, updates: list[MaskedUpdate]) -> list[MaskedUpdate]:
        """Dense weights of an update: the server's, with the update's own on its support."""
        is_delta = self.config.update_form == "delta"

        def base_S(index_S: Tensor) -> Tensor:
            return (
                w_D[index_S] * (index_S < self.layout.parameters)
                if is_delta
                else torch.zeros_like(w_D[index_S])
            )

        dense = []
        for update in updates:
            own_D = w_D.clone()
            own_D[update.index_S] = update.values_S + base_S(update.index_S)
            dense.append((update.weight, self.layout.state_dict(self.model, own_D)))
        seed = derive(self.seed, "before_merge", window)
        kept, positions = self.bridge.before(dense, self.layout.state_dict(self.model, w_D), seed=seed)
        result = []
        for (weight, state), n in zip(kept, positions, strict=True):
            index_S = updates[n].index_S
            own_D = self.layout.from_state_dict(state, w_D)
            values_S = own_D[index_S] - base_S(index_S)
            result.append(updates[n]._replace(values_S=values_S, weight=weight))
        return result

    def after(self, window: int, w_D: Tensor) -> Tensor:
        """The merged weights after ``on_after_aggregation``."""
        seed = derive(self.seed, "after_merge", window)
        state = self.bridge.after(self.layout.state_dict(self.model, w_D), seed=seed)
        return self.layout.from_state_dict(state, w_D)


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
def _threads(count: int) -> Iterator[None]:
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
