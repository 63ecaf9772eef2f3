"""Going on with a run that was interrupted.

A run's directory remembers the command that started it. `fedgmr resume` runs that command again; the first
run that it builds goes on in that directory, from the last checkpoint whose log is there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import torch

from fedgmr_plugin.errors import RunLogError
from fedgmr_plugin.protocol.checkpoint import Checkpoint, latest
from fedgmr_plugin.protocol.runlog import LOG_NAME
from fedgmr_plugin.runtimes.command import Command

COMMAND = "command.json"
#: Its key beside the command: CPU threads of torch, for a run that leaves them as they are.
_THREADS = "cpu_threads"
#: Keys of the header that are compared elsewhere or not at all, and options that change no bit of the model.
_FREE = frozenset({"type", "schema", "versions", "device", "run_name", "config", "fedml"})
FREE_OPTIONS = frozenset(
    {"run_name", "output_dir", "progress", "workers", "checkpoint_seconds", "server_patience"}
)

_resuming: list[Path] = []


def remember(run: Path, command: Command) -> None:
    """Note in a run's directory the command that started it."""
    noted = {**command._asdict(), _THREADS: torch.get_num_threads()}
    (run / COMMAND).write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")


def command_of(run: Path) -> Command:
    """The command that started a run which has not ended.

    Raises:
        RunLogError: GMR-604 if it is finished, or cannot be started again.
    """

    def refuse(problem: str) -> RunLogError:
        return RunLogError("GMR-604", problem, where=str(run))

    if not (run / LOG_NAME).is_file():
        raise RunLogError("GMR-601", f"{LOG_NAME} is missing", where=str(run))
    if has_ended(run):
        raise refuse("the run is finished")
    try:
        given = json.loads((run / COMMAND).read_text(encoding="utf-8"))
        command = Command(**{key: value for key, value in given.items() if key != _THREADS})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise refuse(f"{COMMAND} cannot be read: {error}") from error
    script, arguments, folder, number = command
    texts = isinstance(arguments, list) and all(isinstance(a, str) for a in [script, folder, *arguments])
    if not texts or not isinstance(number, int):
        raise refuse(f"{COMMAND} is not what fedgmr writes")
    if not script or not os.path.isfile(script):
        raise refuse(f"script={script!r} is no Python file" if script else "no script started it")
    if number != 1:
        raise refuse(f"it was run {number} of its script, which would start with run 1 again")
    if not os.path.isdir(folder):
        raise refuse(f"folder={folder!r}, where its script was started, is gone")
    return command


def has_ended(run: Path) -> bool:
    """Whether the last complete line of the log is its `end` record."""
    with (run / LOG_NAME).open("rb") as log:
        log.seek(max(log.seek(0, os.SEEK_END) - 2**16, 0))
        lines = [line for line in log.read().split(b"\n") if line.strip()]
    try:
        return bool(lines) and json.loads(lines[-1])["type"] == "end"
    except (ValueError, KeyError, TypeError):
        return False


@contextmanager
def resuming(run: Path) -> Iterator[None]:
    """While active, the first run that is built goes on in the directory `run`."""
    _resuming.append(run.absolute())
    try:
        yield
    finally:
        _resuming.clear()


def take() -> Path | None:
    """Where the run that is built now is to go on, if it is; asked once."""
    return _resuming.pop() if _resuming else None


@contextmanager
def locked(run: Path, busy: str = "another process trains this run", hint: str = "") -> Iterator[None]:
    """Keep other processes from training in a run's directory.

    Args:
        busy, hint: what is said where one does, and the next step; GMR-604's own where empty.

    Raises:
        RunLogError: GMR-604 if one does.
    """
    descriptor = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise RunLogError("GMR-604", busy, where=str(run), hint=hint) from error
    finally:
        os.close(descriptor)


def checkpoint_of(run: Path, header: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint to go on from; None where the run is to begin anew.

    Args:
        header: of the run that the script describes now.

    Raises:
        RunLogError: GMR-604 if the run has ended meanwhile, GMR-605 if no checkpoint fits the log, GMR-606 if
            the script describes another run.
    """
    if has_ended(run):
        raise RunLogError("GMR-604", "the run is finished", where=str(run))
    log = (run / LOG_NAME).read_bytes()
    try:
        before = json.loads(log.split(b"\n", 1)[0])
    except ValueError:
        return None
    _check_same(before, header, run)
    _compare_threads(run, header)

    def misfit(meta: Mapping[str, Any]) -> str:
        size = meta["log_bytes"]
        if hashlib.sha256(log[:size]).hexdigest() != meta["log_sha256"] or size > len(log):
            return "it is not of this log"
        return ""

    return latest(run, misfit)


def _check_same(before: Mapping[str, Any], header: Mapping[str, Any], run: Path) -> None:
    """Refuse to continue a run with a script that describes another one."""
    now = json.loads(json.dumps(header))
    differ = [
        f"{key}: {_short(before.get(key))} became {_short(now[key])}"
        for key in now
        if key not in _FREE and before.get(key) != now[key]
    ]
    fedml = before.get("fedml") or {}
    differ += [
        f"{key}: {_short(fedml.get(key))} became {_short(now['fedml'].get(key))}"
        for key in (now["fedml"] | fedml)
        if fedml.get(key) != now["fedml"].get(key)
    ]
    options = before.get("config") or {}
    differ += [
        f"fedgmr_args.{key}: {_short(options.get(key))} became {_short(value)}"
        for key, value in now["config"].items()
        if key not in FREE_OPTIONS and options.get(key) != value
    ]
    if differ:
        raise RunLogError("GMR-606", "; ".join(differ), where=str(run))


def _compare_threads(run: Path, header: Mapping[str, Any]) -> None:
    """Warn where ``cpu_threads: 0`` now amounts to another number: another launcher, or another machine."""
    if header["config"].get("cpu_threads") != 0:
        return
    with suppress(OSError, ValueError, TypeError, KeyError):
        noted, now = json.loads((run / COMMAND).read_text(encoding="utf-8")), torch.get_num_threads()
        before = noted[_THREADS]
        if before != now:
            click.echo(
                f"warning: cpu_threads=0: torch had {before} threads when the run began, and has {now} now: "
                "the run's bits may not be those without an interruption",
                err=True,
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
