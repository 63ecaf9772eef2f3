"""`fedgmr plan --cf fedml_config.yaml`: what a run will cost, before it trains."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from fedgmr_plugin.cli.run import run_script
from fedgmr_plugin.errors import HostError


@click.command()
@click.argument("script", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--cf", "path", required=True, type=click.Path(dir_okay=False), help="FedML's YAML file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(script: str | None, path: str, as_json: bool) -> None:
    """Sizes, seconds and windows of each client at each density, without training.

    SCRIPT is the program that builds the model and hands it to FedML; it runs up to the point where training
    would begin. By default `main.py` beside the YAML file; without one, the YAML's own model and data set.
    """
    answer = _plan(script, path)
    click.echo(json.dumps(answer.as_dict(), indent=2) if as_json else table(answer))


def _plan(script: str | None, path: str) -> Any:
    from fedgmr_plugin.runtimes import config_file, planning, registration

    kind = config_file.flatten(config_file.load(path)).get("training_type")
    if kind in ("cross_device", "cross_silo"):
        raise HostError(
            "GMR-502",
            f"training_type={kind!r} has a real clock, which cannot be planned",
            where=os.path.abspath(path),
            hint='Plan the same options with `training_type: "simulation"` and `backend: "sp"`.',
        )
    beside = Path(path).resolve().parent / "main.py"
    script = script or (str(beside) if beside.is_file() else None)
    arguments = ["--cf", path]
    silenced = io.StringIO()  # FedML replaces the write method of whatever sys.stdout is
    with planning.instead_of_training(), contextlib.redirect_stdout(silenced), _without_chatter():
        try:
            if script is not None:
                run_script(script, arguments)
            else:
                sys.argv = ["fedgmr", *arguments]
                registration.register()
                planning.fedml_simulation()
        except planning.Planned as planned:
            return planned.plan
    raise HostError(
        "GMR-502",
        f"{script or 'FedML'} ended without starting fedgmr in one of FedML's simulators",
        where=os.path.abspath(path),
        hint='Set `federated_optimizer: "fedgmr"` and `training_type: "simulation"`.',
    )


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Nothing is logged below a warning: FedML reports its own steps as INFO."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def table(plan: Any) -> str:
    """A `RunPlan` for a terminal."""
    lines = [
        f"model  {plan.coordinates:,} coordinates, {plan.prunable:,} prunable, {plan.model_megabytes:.2f} MB",
        f"window {plan.window_seconds:.2f} s, mean density at the start {plan.mean_density:.3f}",
        f"about {plan.windows:,} windows; {_restoration(plan)}",
        "",
        f"{'layer':<40} {'kind':<9} {'size':>12}",
        *(f"{layer['name']:<40} {layer['kind']:<9} {layer['size']:>12,}" for layer in plan.layers),
        "",
        f"{'density':>8} {'coordinates':>12} {'share':>8} {'MB down':>9} {'MB up':>9}",
        *(
            f"{s.density:>8g} {s.coordinates:>12,} {s.share:>8.3f} {s.megabytes_down:>9.3f} "
            f"{s.megabytes_up:>9.3f}"
            for s in plan.sub_models
        ),
        "",
        "one flight (download, training, upload): seconds, and windows in brackets",
    ]
    rungs = sorted({d for group in plan.classes for d in list(group.seconds)[1:]})
    columns = ["start", *(f"d = {rung:g}" for rung in rungs)]
    lines.append(f"{'clients':<22}" + "".join(f"{column:>18}" for column in columns))
    for group in plan.classes:
        own = next(iter(group.seconds))
        name = f"{len(group.clients)} of class {group.initial_density:g}"
        name += f" at {own:g}" if own != group.initial_density else ""
        cells = [_flight(group, own), *(_flight(group, rung) if rung > own else "" for rung in rungs)]
        lines.append(f"{name:<22}" + "".join(f"{cell:>18}" for cell in cells))
    for finding in plan.findings:
        lines += ["", f"{finding['code']} {finding['message']}"]
    return "\n".join(lines)


def _restoration(plan: Any) -> str:
    first = plan.first_restoration
    if first is None:
        return "no density is ever raised"
    if first >= plan.windows:
        return f"no density is raised before window {first:,}, hence in this run none (interval, patience)"
    return f"no density is raised before window {first:,}"


def _flight(group: Any, density: float) -> str:
    seconds, windows = group.seconds[density], group.windows[density]
    return "not heard of" if seconds is None else f"{seconds:.2f} ({windows:.2f})"
