"""`fedgmr schema`: the JSON schema of the ``fedgmr_args`` section."""

from __future__ import annotations

import json

import click


@click.command()
def schema() -> None:
    """Print the JSON schema of fedgmr_args: every key, its range, default and meaning."""
    from fedgmr_plugin.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
