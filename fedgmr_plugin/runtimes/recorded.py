"""A run's directory, whoever trains: its log, its progress line, its model, how it is continued."""

from __future__ import annotations

import logging
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from fedgmr_plugin.engine.course import Course
from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.protocol.checkpoint import Checkpoint, save
from fedgmr_plugin.protocol.journal import sync
from fedgmr_plugin.protocol.runlog import LOG_NAME, RunLogWriter
from fedgmr_plugin.runtimes import resume
from fedgmr_plugin.runtimes.command import Command
from fedgmr_plugin.runtimes.progress import Progress

_log = logging.getLogger(__name__)


@dataclass
class RecordedRun(ABC):
    """One run, constructed and validated; `train` carries it out.

    Attributes:
        course: the engine.
        model: that FedML was given; holds what is shipped at the end.
        header: the run log's first record.
        directory: where the run log, the effective configuration and the model are written.
        on_record: is told every record, besides the log.
        command: that started it.
        resumed: whether it goes on with an interrupted run.
        again: the command that continues it.
        end: the run's `end` record after `train`.
    """

    course: Course
    model: nn.Module
    header: dict[str, Any]
    directory: Path
    on_record: Callable[[dict[str, Any]], None]
    command: Command
    resumed: bool = False
    again: str = "fedgmr resume"
    end: dict[str, Any] | None = None
    _writer: RunLogWriter | None = None

    @abstractmethod
    def _advance(self, writer: RunLogWriter, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """The run from its beginning or from `checkpoint`, with checkpoints on the way; its `end` record."""

    @contextmanager
    def _helped(self) -> Iterator[None]:
        """Whatever works for the run, ended with it."""
        yield

    def train(self) -> None:
        """Run to the end of the budget; the model given to FedML then holds what is shipped.

        Where `fedgmr resume` goes on with an interrupted run, from its last checkpoint.

        Raises:
            ConfigError: GMR-110 if the run's directory cannot be made, or has a run that this is not to
                continue: its own, where it is called again.
            RunLogError: GMR-604 if another process trains in the run's directory; GMR-604 to GMR-606 if the
                run to go on with cannot be continued.
        """
        started = time.monotonic()
        self._claim()
        with resume.locked(self.directory):
            checkpoint = self._prepare()
            writer = RunLogWriter(
                self.directory,
                overwrite=self.resumed,
                resume_at=None if checkpoint is None else checkpoint.meta["log_bytes"],
            )
            with writer, Progress(self.header) as progress:
                self._writer, self._progress = writer, progress
                with threads(self.course.config.cpu_threads), self._helped(), self._way_on():
                    if checkpoint is None:
                        writer.write(self.header)
                    end = self._advance(writer, checkpoint)
                    self._save_model()
                    end = {**end, "wall_seconds": time.monotonic() - started}
                    self._write_end(writer, end)
                    self.end = end
        _log.info("model sha256: %s", end["model_sha256"])
        progress.close_with(self.end, self.directory)

    def record(self, fields: dict[str, Any]) -> None:
        """Observer of the engine: the run log, the progress line, FedML's own metrics."""
        if self._writer is not None:
            self._writer.write(fields)
            self._progress.record(fields)
        self.on_record(fields)

    def _claim(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{self.directory} cannot be made: {error.strerror}"
            raise ConfigError("GMR-110", reason, where="fedgmr_args.output_dir") from error
        if self.end is not None or (not self.resumed and (self.directory / LOG_NAME).exists()):
            raise ConfigError("GMR-110", f"{self.directory} has a run already", where="fedgmr_args.run_name")

    def _save_model(self) -> None:
        """What is shipped, in the model that FedML was given and in the run's directory."""
        server = self.course.server
        shipped = server.model(server.candidate)
        self.course.bench.place(shipped)
        state = server.layout.state_dict(self.model, shipped)
        draft = self.directory / "model.draft"
        save_file({k: v.cpu().contiguous() for k, v in state.items()}, str(draft))
        sync(draft)
        draft.rename(self.directory / "model.safetensors")
        sync(self.directory)

    def _write_end(self, writer: RunLogWriter, end: dict[str, Any]) -> None:
        """Write the log's last record, behind which nobody goes on with the run."""
        writer.write(end)

    @contextmanager
    def _way_on(self) -> Iterator[None]:
        """Say how to continue where training is interrupted, or fails."""
        try:
            yield
        except BaseException as error:
            if self.command.script and self.command.run == 1:
                what = "interrupted; to continue"
                if isinstance(error, Exception):
                    what = "failed; to continue when the cause is repaired"
                click.echo(f"{what}: {self.again} {shlex.quote(str(self.directory))}", err=True)
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

    def _save_checkpoint(self, writer: RunLogWriter, meta: dict[str, Any], tensors: Any) -> bool:
        """Whether a checkpoint could be written; a run goes on without one that cannot."""
        try:
            size, digest = writer.sync()
            state = {**meta, "log_bytes": size, "log_sha256": digest}
            save(self.directory, self.course.server.version, state, tensors)
        except OSError as error:
            _log.warning("%s", error)
            return False
        return True

    def _write_config(self) -> None:
        fedml = {key: value for key, value in self.header["fedml"].items() if key != "aggregation_hooks"}
        content = {"fedml": fedml, "fedgmr_args": self.header["config"]}
        text = yaml.safe_dump(content, sort_keys=False)
        (self.directory / "config.yaml").write_text(text, encoding="utf-8")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` CPU threads; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
