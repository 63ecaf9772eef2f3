"""`fedgmr demo`, on a budget of a few windows."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from fedgmr_plugin.cli import main
from fedgmr_plugin.protocol.runlog import read_run
from fedgmr_plugin.runtimes import demo, registration


def test_the_demonstration_trains_compares_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fedgmr", "demo"])
    monkeypatch.setitem(demo.COMMON, "time_budget", 60.0)
    try:
        result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path)], catch_exceptions=False)
    finally:
        registration.unregister()
    assert result.exit_code == 0
    names = [contender.name for contender in demo.CONTENDERS]
    runs = {name: read_run(tmp_path / "001" / name) for name in names}
    assert all(run.end is not None and run.end["time"] >= 60 for run in runs.values())
    sha = runs["fedgmr"].end["model_sha256"]  # type: ignore[index]
    assert f"model sha256: {sha}" in result.output
    table = result.output.split("virtual seconds (trained in")[1].splitlines()
    for contender in demo.CONTENDERS:
        assert any(line.startswith(contender.title) and "%" in line for line in table)
    restored = {name: run.count("restoration") for name, run in runs.items()}
    assert table[2].endswith("restored") and "how often a client's density was raised" in result.output
    for line, name in zip(table[3:7], names, strict=True):
        assert line.split()[-1] == str(restored[name])
    page = (tmp_path / "001" / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and str((tmp_path / "001" / "report.html").resolve()) in result.output
