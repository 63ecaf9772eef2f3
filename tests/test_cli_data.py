"""The commands that read and explain: report, explain, schema, and the group that finds them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from fedgmr_plugin import __version__
from fedgmr_plugin.cli import COMMANDS, Entry, main
from fedgmr_plugin.config import json_schema
from fedgmr_plugin.errors import CATALOGUE, ConfigError
from fedgmr_plugin.protocol import RunLogWriter


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="fedgmr")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fedgmr_plugin", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def write_run(directory: Path, name: str, accuracies: list[float]) -> Path:
    """A run with one window and evaluation of 10 s for each accuracy."""
    both = {"accuracy": None, "loss": None}
    with RunLogWriter(directory / "run.jsonl") as writer:
        writer.write(
            {
                "type": "header",
                "schema": "1.0",
                "method": "fedgmr",
                "run_name": name,
                "seed": 0,
                "config": {},
                "fedml": {},
                "versions": {},
                "clients": 1,
                "client_samples": [10],
                "densities": [1.0],
                "layout": {},
                "model_megabytes": 1.0,
                "eta": 0.1,
                "local_steps": 5,
                "windows": len(accuracies),
                "time_budget": None,
            }
        )
        for number, accuracy in enumerate(accuracies):
            end = 10.0 * (number + 1)
            names = ("start", "close", "end", "coverage", "step_sq", "mean_density", "density_floor")
            more = ("bytes_up", "bytes_down", "server_bytes_down", "learning_rate")
            counts = dict.fromkeys(("arrivals", "gamma_min", "uncovered", "in_flight"), 0)
            numbers = dict.fromkeys((*names, *more), end)
            writer.write({"type": "window", "window": number, **counts, **numbers})
            writer.write(
                {
                    "type": "evaluation",
                    "window": number + 1,
                    "time": end,
                    "candidate": "global",
                    "accuracy": accuracy,
                    "loss": None,
                    "global": both,
                    "scaled": both,
                    "samples": 1,
                    "bytes_up": 0,
                    "bytes_down": 0,
                    "metrics": {},
                }
            )
    return directory


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Directories of two runs."""
    (tmp_path / "with space").mkdir()
    return [
        str(write_run(tmp_path / "with space" / "a", "first", [0.2, 0.5, 0.8])),
        str(write_run(tmp_path / "b", "second", [0.4, 0.6])),
    ]


# -- the group -------------------------------------------------------------------------------------


def test_help_lists_the_installed_commands_without_loading_them() -> None:
    code = (
        "import sys\n"
        "from fedgmr_plugin.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'fedml', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("report", "explain", "schema"):
        assert f"  {name} " in done.stdout and COMMANDS[name].summary in done.stdout


@pytest.mark.parametrize("name", ["report", "explain", "schema"])
def test_every_command_has_help(name: str) -> None:
    result = call(name, "--help")
    assert result.exit_code == 0 and f"fedgmr {name}" in result.output
    assert result.output == call(name, "-h").output


def test_every_installed_command_loads() -> None:
    context = click.Context(main)
    for name in main.list_commands(context):
        assert main.get_command(context, name) is not None


def test_version() -> None:
    assert call("--version").output == f"fedgmr, version {__version__}\n"


def test_an_unknown_command_is_refused_with_the_nearest_name() -> None:
    result = call("repot")
    assert result.exit_code == 2
    assert "No such command 'repot'" in result.output and "report" in result.output.split("repot", 1)[1]


def test_a_missing_module_hides_its_command_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "ghost", Entry("fedgmr_plugin.cli.ghost:ghost", "Not installed."))
    assert "ghost" not in call("--help").output
    assert call("ghost").exit_code == 2
    assert call("explain", "104").exit_code == 0


def test_a_module_that_cannot_be_imported_names_the_cause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "fedgmr_broken_command.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(COMMANDS, "broken", Entry("fedgmr_broken_command:broken", "Broken."))
    result = call("broken")
    assert result.exit_code == 1
    assert "a_module_that_is_not_there" in result.output and "fedgmr doctor" in result.output
    assert "Broken." in call("--help").output


def test_an_error_raised_on_purpose_ends_a_command_with_status_2(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def failing() -> None:
        raise ConfigError("GMR-104", "x=3 is outside (0, 1]", where="here")

    module = type(sys)("fedgmr_failing_command")
    module.failing = failing  # type: ignore[attr-defined]
    module.__spec__ = type(sys.__spec__)("fedgmr_failing_command", None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "fedgmr_failing_command", module)
    monkeypatch.setitem(COMMANDS, "failing", Entry("fedgmr_failing_command:failing", "Fails."))
    result = call("failing")
    assert result.exit_code == 2
    assert result.output == str(ConfigError("GMR-104", "x=3 is outside (0, 1]", where="here")) + "\n"


# -- report ----------------------------------------------------------------------------------------


def test_report_writes_beside_the_first_run(runs: list[str]) -> None:
    result = call("report", *runs)
    place = Path(runs[0]) / "report.html"
    assert result.exit_code == 0, result.output
    assert str(place) in result.output and "2 runs" in result.output
    page = place.read_text(encoding="utf-8")
    assert "<title>first, second</title>" in page
    assert not (Path(runs[1]) / "report.html").exists()


def test_report_takes_files_and_an_output(runs: list[str], tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    result = call(
        "report",
        str(Path(runs[1]) / "run.jsonl"),
        "--output",
        str(place),
        "--title",
        "<b>",
        "--target",
        "0.5",
    )
    assert result.exit_code == 0, result.output
    page = place.read_text(encoding="utf-8")
    assert "<title>&lt;b&gt;</title>" in page and "as given" in page
    assert not (Path(runs[1]) / "report.html").exists()


def test_report_as_json(runs: list[str], tmp_path: Path) -> None:
    result = call("report", *runs, "--json", "--target", "0.6")
    assert result.exit_code == 0, result.output
    first, second = json.loads(result.output)
    assert (first["name"], first["seconds_to_target"], first["accuracy"], first["last_accuracy"]) == (
        "first",
        30.0,
        0.5,
        0.8,
    )
    assert (second["name"], second["seconds_to_target"], second["accuracy"]) == ("second", 20.0, 0.6)
    assert first["budget_seconds"] == second["budget_seconds"] == 20.0
    assert not (Path(runs[0]) / "report.html").exists()
    place = tmp_path / "both.html"
    assert json.loads(call("report", *runs, "--json", "-o", str(place)).output)
    assert place.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "Missing argument"),
        (["RUN", "--target", "0"], 2, "--target"),
        (["RUN", "--target", "80"], 2, "--target"),
        (["RUN", "--output", "ABSENT/page.html"], 1, "cannot be written"),
        (["ABSENT"], 2, "GMR-601"),
        (["RUN", "ABSENT"], 2, "GMR-601"),
        (["PARENT"], 2, "It holds runs, name one of them: b."),
        (["DAMAGED"], 2, "line 2"),
        (["OTHER"], 2, "GMR-603"),
    ],
)
def test_report_refuses(
    runs: list[str], tmp_path: Path, arguments: list[str], status: int, said: str
) -> None:
    damaged, other = tmp_path / "damaged.jsonl", tmp_path / "other.jsonl"
    good = (Path(runs[0]) / "run.jsonl").read_text().splitlines(keepends=True)
    damaged.write_text("".join([good[0], good[1][:50], *good[1:]]))
    other.write_text(good[0].replace('"schema": "1.0"', '"schema": "2.0"'))
    names = {"RUN": runs[0], "ABSENT": str(tmp_path / "absent"), "PARENT": str(tmp_path)}
    names |= {"DAMAGED": str(damaged), "OTHER": str(other)}
    filled = []
    for argument in arguments:
        for name, path in names.items():
            argument = argument.replace(name, path)
        filled.append(argument)
    result = call("report", *filled)
    assert result.exit_code == status
    assert said in result.output
    assert "Traceback" not in result.output


def test_errors_go_to_standard_error_without_a_trace(tmp_path: Path) -> None:
    done = command("report", str(tmp_path / "absent"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("GMR-601 ") and "Traceback" not in done.stderr


# -- explain and schema ----------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["GMR-104", "gmr-104", "104", " gmr104 "])
def test_explain(code: str) -> None:
    result = call("explain", code)
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    entry = CATALOGUE["GMR-104"]
    assert words == f"GMR-104 {entry.title} {entry.meaning} -> {entry.remedy}"


def test_explain_all() -> None:
    result = call("explain")
    assert [line.split()[0] for line in result.output.splitlines()] == list(CATALOGUE)
    for code in CATALOGUE:
        assert call("explain", code).exit_code == 0


@pytest.mark.parametrize("code", ["999", "GMR-", "x", "--", ""])
def test_explain_refuses_what_is_not_a_code(code: str) -> None:
    result = call("explain", "--", code)
    assert result.exit_code == 2 and "is not an error code" in result.output


def test_schema() -> None:
    result = call("schema")
    assert result.exit_code == 0
    shown: dict[str, Any] = json.loads(result.output)
    assert shown == json_schema()
