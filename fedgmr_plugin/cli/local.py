"""`fedgmr local up`: a broker, a store, a server and devices on this machine, as real processes."""

from __future__ import annotations

import json
import string
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import click
import yaml

from fedgmr_plugin.cli.keys import write_keys

FOLDER = Path("fedgmr_local")
_RUNS = "fedgmr_runs"
_FILES = _SCRIPT, _CONFIG, _KEYS = "main.py", "fedml_config.yaml", "keys.json"
_SERVICES = ("broker", "storage")
_POLL_SECONDS = 0.5
_HEAD = ("device", "state", "density", "staleness", "uploaded", "refused", "last seen")


@click.group()
def local() -> None:
    """Run FedML's cross-device runtime on this machine: broker, store, server and devices."""


@local.command()
@click.option("--devices", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--windows", type=click.IntRange(1), default=30, show_default=True)
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
@click.option("--detach", is_flag=True, help="Leave everything running until `fedgmr local down`.")
def up(devices: int, windows: int, folder: Path, detach: bool) -> None:
    """Train handwritten digits on DEVICES processes of this machine, over MQTT and S3.

    A private Mosquitto and a private S3 server are started on free loopback ports, and stopped at the end.
    """
    from fedgmr_plugin.runtimes.local.stack import Stack

    folder = folder.absolute()
    refuse_foreign(folder)
    python = [sys.executable, "-m", "fedgmr_plugin"]
    with Stack(folder, detached=detach) as stack:
        write_project(folder, devices, windows, stack.connection().section()["comm_args"])
        files = [_SCRIPT, "--cf", _CONFIG]
        stack.run("server", [*python, *files], cwd=folder)
        names = {f"device-{n}": str(n) for n in range(1, devices + 1)}
        for name, number in names.items():
            stack.run(name, [*python, "device", *files, "--id", number], cwd=folder)
        run = folder / _RUNS / "local"
        if detach:
            click.echo(
                f"running; logs and the run are in {folder}\nto stop: fedgmr local down --folder {folder}"
            )
            return
        watch(stack.processes, run, list(names))
        for name in names:
            _wait(stack, name)
    _tell_end(run)


@local.command()
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
def down(folder: Path) -> None:
    """Stop everything that `fedgmr local up --detach` left running in FOLDER."""
    from fedgmr_plugin.runtimes.local.stack import stop_recorded

    stopped = stop_recorded(folder.absolute())
    click.echo(f"stopped: {', '.join(stopped)}" if stopped else f"nothing runs in {folder}")


def refuse_foreign(folder: Path) -> None:
    """Let nobody lose a script, a configuration or keys of their own.

    Raises:
        ClickException: the folder has some that `write_project` did not write.
    """
    script = folder / _SCRIPT
    theirs = [name for name in _FILES if (folder / name).exists()]
    if theirs and not (script.is_file() and script.read_bytes() == _template(_SCRIPT).encode()):
        raise click.ClickException(
            f"{folder} has a {theirs[0]} of yours, or one that was changed, which would be lost: choose "
            "another --folder. To run a script of your own, see docs/devices.md, on several machines."
        )


def _template(name: str) -> str:
    kept = resources.files("fedgmr_plugin.cli") / "templates" / f"devices_{name.removeprefix('fedml_')}.txt"
    return kept.read_text(encoding="utf-8")


def write_project(folder: Path, devices: int, windows: int, connection: dict[str, Any]) -> None:
    """Script, configuration and keys of a local run; those of an earlier one are replaced."""
    (folder / _SCRIPT).write_text(_template(_SCRIPT), encoding="utf-8")
    keys = folder / _KEYS
    keys.unlink(missing_ok=True)
    ids = tuple(range(1, devices + 1))
    write_keys(keys, ids)
    section = yaml.safe_dump(connection, sort_keys=False)
    text = string.Template(_template(_CONFIG)).substitute(
        run_id=str(time.time_ns() // 1_000_000),
        ids=json.dumps(list(ids)),
        devices=devices,
        windows=windows,
        connection="".join(f"  {line}\n" for line in section.splitlines()),
        deadline=30.0,
        keys=keys.name,
    )
    if (folder / _RUNS / "local").exists():
        _move_away(folder / _RUNS / "local")
    config = folder / _CONFIG
    config.touch(mode=0o600)
    config.write_text(text + '  run_name: "local"\n  progress: false\n', encoding="utf-8")


def _move_away(run: Path) -> None:
    number = 1
    while (target := run.with_name(f"local-{number:03d}")).exists():
        number += 1
    run.rename(target)


def watch(processes: Any, run: Path, devices: list[str]) -> None:
    """Show the run, and which processes ended before it, until its server has ended.

    Args:
        processes: their `Supervisor`.
        run: folder of the run.
        devices: names of their processes.

    Raises:
        ClickException: the server failed, or without the processes that ended it cannot go on.
    """
    shown, said = 0, -1
    dead: dict[str, str] = {}
    while True:
        code = processes.poll("server")
        if code:
            raise click.ClickException(_ended(processes, "server", code))
        for name in (*_SERVICES, *devices) if code is None else ():
            status = processes.poll(name)
            if name in dead or status is None or (status == 0 and name in devices):
                continue
            dead[name], shown = _ended(processes, name, status), 0
            if name in _SERVICES:
                raise click.ClickException(f"nothing reaches anybody any more: {dead[name]}")
            click.echo(dead[name], err=True)
        if all(name in dead for name in devices):
            raise click.ClickException("no device is left")
        found = _status(run)
        if found is not None and sys.stdout.isatty():
            lines = table(found)
            click.echo(f"\x1b[{shown}F\x1b[J" * bool(shown) + "\n".join(lines))
            shown = len(lines)
        elif found is not None and found["window"] // 5 != said:
            said = found["window"] // 5
            click.echo(f"window {found['window']} of {found['windows']}, {found['time']:.0f} s")
        if code is not None:
            return
        time.sleep(_POLL_SECONDS)


def _ended(processes: Any, name: str, status: int) -> str:
    return f"{name} ended with status {status}; its log is {processes.log(name)}"


def table(status: dict[str, Any]) -> list[str]:
    """The live table: one line for the run, one for each device."""
    state = f"paused: {status['paused']}" if status["paused"] else ""
    lines = [f"window {status['window']} of {status['windows']}, {status['time']:.0f} s  {state}".rstrip()]
    lines.append("  ".join(f"{name:>9}" for name in _HEAD))
    for row in status["devices"]:
        cells = (
            row["device"],
            row["state"],
            f"{row['density']:g}",
            "-" if row["staleness"] is None else row["staleness"],
            f"{row['bytes_up'] / 1e6:.2f} MB",
            row["refused"],
            "never" if row["seen"] is None else f"{row['seen']:.0f} s ago",
        )
        lines.append("  ".join(f"{cell!s:>9}" for cell in cells))
    return lines


def _status(run: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((run / "devices.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _wait(stack: Any, name: str, patience: float = 15.0) -> None:
    deadline = time.monotonic() + patience
    while stack.processes.poll(name) is None and time.monotonic() < deadline:
        time.sleep(0.1)


def _tell_end(run: Path) -> None:
    from fedgmr_plugin.protocol.runlog import read_run

    log = read_run(run)
    last = log.records("evaluation")[-1]
    click.echo(f"run: {run}")
    click.echo(f"final accuracy: {100 * last['accuracy']:.1f} % after {last['window']} windows")
    if log.end is not None:
        click.echo(f"model sha256: {log.end['model_sha256']}")
