"""`fedgmr new DIR`: a script and a commented configuration that run as they are."""

from __future__ import annotations

import string
import textwrap
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import click
import yaml

from fedgmr_plugin.config import FedGMRConfig

#: What the example sets, and why; everything else stays at its default.
EXAMPLE: dict[str, tuple[Any, str]] = {
    "model_megabytes": (26.0, "Pretend a model as large as the paper's for FEMNIST, so that links matter."),
    "interval": (10, "Check often: the run is short."),
    "patience": (2, "Restore soon after progress stops."),
    "method": ("fedgmr+buffer", "Restored clients arrive seldom: average what everybody uploaded last."),
}
_WINDOWS = 150
_WIDTH = 108


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
def new(directory: Path, force: bool) -> None:
    """Write main.py and fedml_config.yaml into DIRECTORY, to start from.

    They train on scikit-learn's handwritten digits, offline, in less than a minute.
    """
    files = {directory / name: text for name, text in project().items()}
    existing = [str(path) for path in files if path.exists()]
    if existing and not force:
        exist = "exists" if len(existing) == 1 else "exist"
        raise click.ClickException(f"{' and '.join(existing)} {exist} already; --force overwrites")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
            click.echo(f"wrote {path}")
    except OSError as error:
        raise click.ClickException(f"cannot write {error.filename}: {error.strerror}") from error
    click.echo(f"Next: cd {directory} && python main.py --cf fedml_config.yaml")


def project() -> dict[str, str]:
    """Names and contents of the files that `fedgmr new` writes."""
    folder = resources.files("fedgmr_plugin.cli") / "templates"
    yaml_text = string.Template((folder / "fedml_config.yaml.txt").read_text(encoding="utf-8"))
    return {
        "main.py": (folder / "main.py.txt").read_text(encoding="utf-8"),
        "fedml_config.yaml": yaml_text.substitute(windows=_WINDOWS, options=options(EXAMPLE)),
    }


def options(chosen: Mapping[str, tuple[Any, str]], indent: str = "  ") -> str:
    """The lines of a ``fedgmr_args`` section: `chosen` options first, all others commented out.

    Every option has its description above it, and the value that it has with those chosen.

    Args:
        chosen: option to (value, reason).
    """
    blocks = []
    for name, (value, reason) in chosen.items():
        default = _flow(FedGMRConfig.model_fields[name].default)
        blocks.append(
            [*_commented(f"{reason} {_description(name)} Default: {default}."), f"{name}: {_flow(value)}"]
        )
    others = FedGMRConfig(**{name: value for name, (value, _) in chosen.items()})
    for name in FedGMRConfig.model_fields:
        if name not in chosen:
            blocks.append([*_commented(_description(name)), f"# {name}: {_flow(getattr(others, name))}"])
    lines = [line for block in blocks for line in ["", *block]]
    return "\n".join(indent + line if line else "" for line in lines[1:])


def _description(name: str) -> str:
    return FedGMRConfig.model_fields[name].description or ""


def _commented(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("...").removesuffix("\n")
