"""`fedgmr explain`: the catalogue of error codes."""

from __future__ import annotations

import difflib

import click

from fedgmr_plugin.errors import CATALOGUE


@click.command()
@click.argument("code", required=False)
def explain(code: str | None) -> None:
    """Explain an error CODE, such as GMR-104 or just 104; list all codes without one."""
    if code is None:
        for known, entry in CATALOGUE.items():
            click.echo(f"{known}  {entry.title}")
        return
    known = code.strip().upper()
    known = known if known.startswith("GMR-") else f"GMR-{known.removeprefix('GMR')}"
    if known not in CATALOGUE:
        near = difflib.get_close_matches(known, CATALOGUE, n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise click.BadParameter(f"{code} is not an error code.{hint}", param_hint="CODE")
    entry = CATALOGUE[known]
    click.echo(f"{known}  {entry.title}\n\n{click.wrap_text(entry.meaning, 88)}\n")
    click.echo(click.wrap_text(entry.remedy, 88, initial_indent="-> ", subsequent_indent="   "))
