"""`fedgmr keys 1 2 3 --out keys.json`: a fresh secret key for each device."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

import click


@click.command()
@click.argument("devices", nargs=-1, type=int, required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("keys.json"))
@click.option("--each", is_flag=True, help="Also write key_ID.json beside it for each device.")
def keys(devices: tuple[int, ...], out: Path, each: bool) -> None:
    """Write a file of one secret key for each of DEVICES, readable by its owner only.

    The server gets the whole file (`device_keys`), each device a file of its own with its own line.
    """
    written = write_keys(out, devices)
    click.echo(f"wrote {out}: {len(written)} keys. Keep it secret.")
    for device, key in written.items() if each else ():
        own = out.with_name(f"key_{device}.json")
        _write(own, {device: key})
        click.echo(f"wrote {own}, for device {device} alone")


def write_keys(path: Path, devices: tuple[int, ...]) -> dict[str, str]:
    """Write the file; an existing one is not overwritten. Returns the keys by the devices' ids.

    Raises:
        ClickException: it exists or cannot be written.
    """
    keys = {str(device): secrets.token_hex(32) for device in devices}
    _write(path, keys)
    return keys


def _write(path: Path, keys: dict[str, str]) -> None:
    content = json.dumps(keys, indent=1)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(content + "\n")
