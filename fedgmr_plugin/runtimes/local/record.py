"""The processes of a folder, in `processes.json`: who they are, so that another process can stop them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedgmr_plugin.errors import HostError
from fedgmr_plugin.runtimes.local import groups

NAME = "processes.json"
#: Name of the file that has a stack's connection settings, with its passwords, and what is in it.
CONNECTION = "connection.json"
CONNECTION_KEYS = frozenset({"customized_training_mqtt_config", "customized_training_s3_config"})
VERSION = 1


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file at once, readable by its owner alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write(folder: Path, leaders: Mapping[str, groups.Leader]) -> None:
    """Record the processes that run; the file is removed with the last one."""
    if leaders:
        processes = {name: leader._asdict() for name, leader in leaders.items()}
        write_json(folder / NAME, {"version": VERSION, "processes": processes})
    else:
        (folder / NAME).unlink(missing_ok=True)


def read(folder: Path) -> dict[str, groups.Leader]:
    """The recorded processes, whether or not they still run; none without a record.

    Raises:
        HostError: GMR-514 if the record is damaged or of another version.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version={content['version']!r}")
        return {
            str(name): groups.Leader(int(fields["pid"]), str(fields["started"]))
            for name, fields in content["processes"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        hint = "Look for the processes with `ps`, end them by hand, and delete the file."
        raise HostError("GMR-514", f"{path} cannot be read: {error!r}", hint=hint) from error


def running(folder: Path) -> dict[str, groups.Leader]:
    """The recorded processes that still run.

    Raises:
        HostError: GMR-514 if the record is damaged or of another version.
    """
    return {name: leader for name, leader in read(folder).items() if groups.lives(leader)}


def stop_recorded(folder: Path | str, *, patience: float = 5.0) -> list[str]:
    """Stop what a supervisor, of this or another process, started in a folder, and forget how to reach it.

    A recorded number that now belongs to another process is left alone.

    Args:
        patience: seconds from SIGTERM to SIGKILL.

    Returns:
        names of those that ran.

    Raises:
        HostError: GMR-514 if the record is damaged or of another version.
    """
    leaders = read(Path(folder))
    ended = groups.end(leaders.values(), patience)
    write(Path(folder), {})
    forget_connection(Path(folder))
    return [name for name, leader in leaders.items() if leader in ended]


def forget_connection(folder: Path) -> None:
    """Remove a stack's connection settings; another file of that name stays."""
    path = folder / CONNECTION
    try:
        is_ours = set(json.loads(path.read_text(encoding="utf-8"))) == CONNECTION_KEYS
    except (OSError, ValueError, TypeError):
        return
    if is_ours:
        path.unlink(missing_ok=True)
