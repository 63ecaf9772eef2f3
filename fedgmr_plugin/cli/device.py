"""`fedgmr device main.py --cf fedml_config.yaml --id 1`: one device of a run."""

from __future__ import annotations

import logging
from pathlib import Path

import click


@click.command()
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--cf", "config", required=True, help="FedML's YAML file, as the server has it.")
@click.option("--id", "device_id", type=int, required=True, help="One of the ids in `client_id_list`.")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of what the device remembers across restarts; `fedgmr_device_ID` by default.",
)
@click.option("--keys", help="JSON file of this device's key, instead of the YAML's `device_keys`.")
def device(script: Path, config: str, device_id: int, state: Path | None, keys: str | None) -> None:
    """Take part in a run as one device, until the server says that it is over.

    SCRIPT defines make_model(args) and train_data(args, client). FedML is not needed on a device.
    """
    from fedgmr_plugin.runtimes.devices.client import DeviceProcess
    from fedgmr_plugin.runtimes.devices.connection import device_ids
    from fedgmr_plugin.runtimes.devices.project import arguments, load_project
    from fedgmr_plugin.runtimes.settings import SECTION

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    project, args = load_project(script), arguments(config)
    if keys is not None:
        setattr(args, SECTION, {**(getattr(args, SECTION, None) or _section(config)), "device_keys": keys})
    ids = device_ids(args)
    if device_id not in ids:
        raise click.BadParameter(f"{device_id} is not in client_id_list: {list(ids)}", param_hint="--id")
    data = project.train_data(args, ids.index(device_id))
    folder = state or Path(f"fedgmr_device_{device_id}")
    DeviceProcess(args, device_id, data, project.make_model(args), folder=folder).run()
    click.echo(f"device {device_id}: the run is over")


def _section(path: str) -> dict[str, object]:
    """The options of a YAML file."""
    from fedgmr_plugin.runtimes import config_file
    from fedgmr_plugin.runtimes.settings import SECTION

    return config_file.load(path).get(SECTION, {})
