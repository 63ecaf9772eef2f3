"""Going on with a run that was interrupted.

A run's directory remembers the command that started it. `fedgmr resume` runs that command again; the runtime,
when it is built, finds that it is to go on in that directory, and loads the last checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fedgmr_plugin.errors import RunLogError
from fedgmr_plugin.protocol.runlog import read_run

COMMAND = "command.json"
#: Keys of the header that are compared elsewhere or not at all, and options that change no bit of the model.
_FREE = frozenset({"type", "versions", "run_name", "config"})
_FREE_OPTIONS = frozenset({"run_name", "output_dir", "progress", "workers", "checkpoint_seconds"})

_resuming: list[Path] = []


class Command(NamedTuple):
    """How a run was started: the script's path, its arguments, and the working directory."""

    script: str
    arguments: list[str]
    folder: str


def remember(run: Path) -> None:
    """Note in a run's directory the command of this process."""
    command = Command(os.path.abspath(sys.argv[0]), sys.argv[1:], os.getcwd())
    (run / COMMAND).write_text(json.dumps(command._asdict(), indent=1) + "\n", encoding="utf-8")


def command_of(run: Path) -> Command:
    """The command that started a run which has not ended.

    Raises:
        RunLogError: GMR-601 to GMR-603 for its log; GMR-604 if it is finished or was not started by a script.
    """
    if read_run(run).end is not None:
        raise RunLogError("GMR-604", "the run is finished", where=str(run))
    try:
        command = Command(**json.loads((run / COMMAND).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunLogError("GMR-604", f"{COMMAND} cannot be read: {error}", where=str(run)) from error
    if not (command.script.endswith(".py") and os.path.isfile(command.script)):
        raise RunLogError("GMR-604", f"script={command.script!r} is no Python file", where=str(run / COMMAND))
    return command


@contextmanager
def resuming(run: Path) -> Iterator[None]:
    """While active, a run that is built goes on in the directory `run`."""
    _resuming.append(run.absolute())
    try:
        yield
    finally:
        _resuming.clear()


def directory() -> Path | None:
    """Where a run that is built now is to go on, if it is."""
    return _resuming[-1] if _resuming else None


def check_same_run(run: Path, header: Mapping[str, Any]) -> None:
    """Refuse to continue `run` with a script that describes another one.

    Raises:
        RunLogError: GMR-606 with everything that differs.
    """
    before, now = read_run(run).header, json.loads(json.dumps(header))
    differ = [
        f"{key}: {_short(before.get(key))} became {_short(now[key])}"
        for key in now
        if key not in _FREE and before.get(key) != now[key]
    ]
    differ += [
        f"fedgmr_args.{key}: {_short(before['config'].get(key))} became {_short(value)}"
        for key, value in now["config"].items()
        if key not in _FREE_OPTIONS and before["config"].get(key) != value
    ]
    if differ:
        raise RunLogError("GMR-606", "; ".join(differ), where=str(run))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
