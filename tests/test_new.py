"""`fedgmr new`: a script and a configuration that run as they are."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from fedgmr_plugin.cli.new import EXAMPLE, new, options, project
from fedgmr_plugin.config import FedGMRConfig, parse
from fedgmr_plugin.runtimes import config_file

#: Keys without which FedML's single-process simulator does not start.
FEDML_KEYS = {
    "training_type",
    "random_seed",
    "dataset",
    "model",
    "federated_optimizer",
    "client_num_in_total",
    "client_num_per_round",
    "comm_round",
    "epochs",
    "batch_size",
    "client_optimizer",
    "learning_rate",
    "weight_decay",
    "frequency_of_the_test",
    "using_gpu",
    "backend",
    "enable_wandb",
}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(new, [str(a) for a in arguments])


def test_writes_both_files_and_says_what_comes_next(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    result = invoke(target)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        f"wrote {target / 'main.py'}",
        f"wrote {target / 'fedml_config.yaml'}",
        f"Next: cd {target} && python main.py --cf fedml_config.yaml",
    ]
    assert {p.name: p.read_text() for p in target.iterdir()} == project()


@pytest.mark.parametrize("name", ["main.py", "fedml_config.yaml"])
def test_existing_files_are_overwritten_only_with_force(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "other").write_text("mine")
    result = invoke(tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path / name} exists already; --force overwrites" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "other"])
    assert (tmp_path / name).read_text() == "mine"
    assert invoke(tmp_path, "--force").exit_code == 0
    assert (tmp_path / name).read_text() == project()[name]
    assert (tmp_path / "other").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke(tmp_path / "file" / "below")
    assert result.exit_code == 1 and "cannot write" in result.output


def test_the_script_is_python_and_registers_before_it_imports_fedml() -> None:
    source = project()["main.py"]
    tree = ast.parse(source)
    assert source.index("fedgmr_plugin.register()") < source.index("\nimport fedml ")
    assert ast.get_docstring(tree)


def test_the_configuration_is_complete_and_valid(tmp_path: Path) -> None:
    path = tmp_path / "fedml_config.yaml"
    path.write_text(project()["fedml_config.yaml"])
    sections = config_file.load(str(path))
    assert config_file.flatten(sections).keys() >= FEDML_KEYS
    assert sections["train_args"]["federated_optimizer"] == "fedgmr"
    config = parse(sections["fedgmr_args"], where="test")
    assert config == FedGMRConfig(**{name: value for name, (value, _) in EXAMPLE.items()})
    assert sum(len(keys) for keys in sections.values()) == len(config_file.flatten(sections))


def test_every_option_is_shown_once_with_its_value() -> None:
    lines = options(EXAMPLE).splitlines()
    assert all(len(line) <= 110 for line in project()["fedml_config.yaml"].splitlines())
    shown = [
        m[1]
        for line in lines
        if (m := re.match(r"  (?:# )?([a-z_]+): ", line))
        if m[1] in FedGMRConfig.model_fields
    ]
    assert sorted(shown) == sorted(FedGMRConfig.model_fields)
    uncommented = [
        line.replace("# ", "", 1)
        if re.match(r"  # [a-z_]+: ", line) and line.split()[1][:-1] in shown
        else line
        for line in lines
    ]
    section = yaml.safe_load("fedgmr_args:\n" + "\n".join(uncommented))["fedgmr_args"]
    assert set(section) == set(FedGMRConfig.model_fields)
    chosen = {name: value for name, (value, _) in EXAMPLE.items()}
    assert parse(section, where="test") == FedGMRConfig(**chosen)


def test_every_option_is_described() -> None:
    text = " ".join(line.strip().removeprefix("# ") for line in options({}).splitlines())
    for name, field in FedGMRConfig.model_fields.items():
        assert field.description and " ".join(field.description.split()) in text, name


def test_the_example_says_what_it_changes() -> None:
    text = " ".join(options(EXAMPLE).split()).replace("# ", "")
    for name, (value, reason) in EXAMPLE.items():
        default = FedGMRConfig.model_fields[name].default
        shown = default if isinstance(default, str) else json.dumps(default)
        assert reason in text and f"Default: {shown}." in text
        assert FedGMRConfig.model_fields[name].default != value


def test_it_runs_as_it_is(tmp_path: Path, repository: Path) -> None:
    """With fewer windows; everything else is what a user gets."""
    assert invoke(tmp_path).exit_code == 0
    config = tmp_path / "fedml_config.yaml"
    text, count = re.subn(r"comm_round: \d+", "comm_round: 3", config.read_text())
    assert count == 1
    config.write_text(text)
    result = subprocess.run(
        [sys.executable, "main.py", "--cf", "fedml_config.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (log,) = tmp_path.glob("fedgmr_runs/*/run.jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[0]["clients"] == 10 and records[-1]["type"] == "end" and records[-1]["windows"] == 3
