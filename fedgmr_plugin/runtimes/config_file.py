"""FedML's YAML file, checked before FedML reads it.

FedML ignores a missing or broken file and runs with whatever is left; here it is an error. The
file has sections of keys, and FedML flattens them: a section's name means nothing to it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from fedgmr_plugin.errors import ConfigError

Sections = dict[str, dict[str, Any]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError("GMR-108", message, where="the command line")


def path_from(arguments: Sequence[str]) -> str | None:
    """The YAML path that FedML will take from a command line (without the program's name), if any.

    Args:
        arguments: such as ``["--cf", "fedml_config.yaml", "--rank", "0"]``.

    Raises:
        ConfigError: GMR-108 if `--cf` has no value.
    """
    parser = _Parser(add_help=False)
    parser.add_argument("--yaml_config_file", "--cf", dest="path", default="")
    known, _ = parser.parse_known_args(list(arguments))
    return known.path or None


def load(path: str) -> Sections:
    """Read a YAML file of sections.

    Raises:
        ConfigError: GMR-108 if it is missing, unreadable, not YAML, or not sections of keys.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _refused(path, f"is not UTF-8 text (byte {error.start})") from error
    except yaml.YAMLError as error:
        raise _refused(path, f"is not valid YAML: {_without_source(error)}") from error
    if content is None:
        raise _refused(path, "is empty")
    if not isinstance(content, Mapping):
        raise _refused(path, f"is a {type(content).__name__}, not sections of keys")
    for section, keys in content.items():
        if keys is None:
            hint = "Delete its line or give it a key: FedML stops at a section without one."
            raise _refused(path, f"has an empty section {str(section)!r}", hint)
        if not isinstance(keys, Mapping):
            raise _refused(path, f"has {section!r} at its top level, which is not a section of keys")
    return {str(section): dict(keys) for section, keys in content.items()}


def repeated(path: str) -> list[str]:
    """What a readable file says twice, of which YAML keeps the last: sections, and keys within a section."""
    root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return []
    found = _twice(root.value, "section ", "")
    for name, keys in root.value:
        if isinstance(keys, yaml.MappingNode):
            found += _twice(keys.value, "", f" in {name.value}")
    return found


def _twice(pairs: Sequence[tuple[yaml.Node, yaml.Node]], what: str, where: str) -> list[str]:
    lines: dict[str, list[int]] = {}
    for key, _ in pairs:
        lines.setdefault(str(key.value), []).append(key.start_mark.line + 1)
    return [
        f"{what}{key}{where} stands in lines {' and '.join(map(str, at))}: the last counts"
        for key, at in lines.items()
        if len(at) > 1
    ]


def flatten(sections: Sections) -> dict[str, Any]:
    """All keys of all sections, the last of equal keys winning, as in FedML."""
    return {key: value for keys in sections.values() for key, value in keys.items()}


def _without_source(error: yaml.YAMLError) -> str:
    """PyYAML's message on one line; it names the text it was given, and no file."""
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())


def _refused(path: str, problem: str, hint: str = "") -> ConfigError:
    return ConfigError("GMR-108", f"--cf {path} {problem}", where=str(Path(path).absolute()), hint=hint)
