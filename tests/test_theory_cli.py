"""``fedgmr-theory`` from the outside: exit statuses, files, and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result

from theory.bounds import BOUNDS
from theory.check import check_runs
from theory.cli import main
from theory.laboratory import Quadratic, Schedule, simulate


def write(path: Path, *, seed: int = 0, eta: float = 0.05, sigma: float = 0.2) -> Path:
    problem = Quadratic.random(np.random.default_rng(0), clients=3, size=10, sigma=sigma)
    schedule = Schedule(windows=12, seed=seed, eta=eta, restorations=((6, 2, 1.0),))
    path.write_bytes(b"".join(simulate(problem, schedule).lines()))
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_check_a_good_run(tmp_path: Path) -> None:
    run = write(tmp_path / "run.jsonl")
    result = call("check", tmp_path, "--html", tmp_path / "out.html")
    assert result.exit_code == 0, result.output
    assert "0 VIOLATED" in result.output and "laws of the log" in result.output
    assert json.loads(call("check", run, "--json").output)["runs"][0]["path"] == str(run)
    page = (tmp_path / "out.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert page.count("<svg") == 2 and all(name in page for name in ("mask", "descent", "A4E"))
    ElementTree.fromstring(page.removeprefix("<!doctype html>").replace('<meta charset="utf-8">', ""))


def test_what_is_printed_can_go_to_a_file(tmp_path: Path) -> None:
    run = write(tmp_path / "run.jsonl")
    for command in ("check", "gap"):
        for flags in ((), ("--json",)):
            printed = call(command, run, *flags).output
            result = call(command, run, *flags, "--output", tmp_path / "out")
            assert (result.exit_code, result.output) == (0, "")
            assert (tmp_path / "out").read_text() == printed


@pytest.mark.parametrize(
    ("command", "option"), [("check", "-o"), ("check", "--html"), ("gap", "-o"), ("gap", "--svg")]
)
def test_a_file_that_cannot_be_written_exits_with_two(tmp_path: Path, command: str, option: str) -> None:
    run = write(tmp_path / "run.jsonl")
    for place in (tmp_path / "no" / "out", run / "out", tmp_path):
        result = call(command, run, option, place)
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
        assert str(place) in result.output


def test_verbose_lists_the_laws(tmp_path: Path) -> None:
    run = write(tmp_path / "run.jsonl")
    assert "applied_once" not in call("check", run).output
    assert "applied_once" in call("check", run, "--verbose").output


def test_violations_exit_with_one(tmp_path: Path) -> None:
    run = write(tmp_path / "run.jsonl")
    lines = run.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if '"arrival"' in line and '"staleness":1' in line)
    lines[at] = lines[at].replace('"staleness":1', '"staleness":2')
    run.write_text("".join(lines))
    result = call("check", run)
    assert result.exit_code == 1
    assert f"line {at + 1}" in result.output and "2 against 1" in result.output
    assert "1 VIOLATED: staleness_count" in result.output
    assert call("check", run, "--accept", "staleness_count").exit_code == 0


def test_unreadable_logs_exit_with_two(tmp_path: Path) -> None:
    run = write(tmp_path / "run.jsonl")
    run.write_bytes(run.read_bytes().replace(b'"type":"window"', b'"type":"window', 1))
    for arguments in (("check", run), ("gap", run), ("check", tmp_path / "nothing")):
        result = call(*arguments)
        assert result.exit_code == 2, result.output
        assert "GMR-60" in result.output
    assert call("check").exit_code == 2


def test_a_truncated_last_line_is_readable_but_not_whole(tmp_path: Path) -> None:
    run = write(tmp_path / "run.jsonl")
    run.write_bytes(run.read_bytes()[:-5])
    result = call("check", run)
    assert result.exit_code == 0 and "its last line is cut" in result.output


def test_given_constants(tmp_path: Path) -> None:
    run = write(tmp_path / "run.jsonl")
    assert call("check", run, "--given", "L=0.01").exit_code == 1
    for bad in (
        "l=1",
        "L",
        "L=one",
        "L=-1",
        "L=nan",
        "L=inf",
        "L=1e999",
        "sigma_sq=-1e-9",
        "F_inf=-inf",
        "=1",
        "",
    ):
        result = call("check", run, "--given", bad)
        assert result.exit_code == 2 and "--given" in result.output
    assert "did you mean sigma_sq?" in call("check", run, "--given", "sigma=1").output
    for given, fault in (
        ("l=2", "'l' is no constant: did you mean L?"),
        ("L=abc", "'abc' is not a number"),
        ("L", "'L' is not NAME=NUMBER"),
        ("L=-1", "L=-1.0 is not a finite number of at least 0"),
    ):
        assert f"--given: {fault}" in call("check", run, "--given", given).output
    assert call("check", run, "--given", "F_inf=-1").exit_code == 0
    with pytest.raises(ValueError, match="finite"):
        check_runs([run], given={"L": float("nan")})


def test_only_checks_can_be_accepted(tmp_path: Path) -> None:
    run = write(tmp_path / "run.jsonl")
    result = call("check", run, "--accept", "nosuch")
    assert result.exit_code == 2 and "nested_shares" in result.output and "mask_merge" in result.output
    assert "did you mean planned_end?" in call("check", run, "--accept", "planed_end").output


def test_a_table_says_what_would_decide_more(tmp_path: Path) -> None:
    """Without probes: the option that writes them. With another merge: which rows are about it."""
    run = write(tmp_path / "run.jsonl")
    assert "would show" not in call("check", run).output
    lines = run.read_text().splitlines(keepends=True)
    bare = [line for line in lines if not line.startswith(('{"type":"probe"', '{"type":"terms"'))]
    run.write_text("".join(bare))
    advised = json.loads(call("check", run, "--json").output)["runs"][0]["advice"]
    assert "A4 and (2), (3), (5), (9)" in advised[0]
    assert "`probe` records" in advised[0] and "fedgmr_args" not in advised[0]
    run.write_text("".join(bare).replace('"update_scope":"arrivals"', '"update_scope":"buffer"'))
    found = call("check", run, "--verbose").output
    assert "(8), (26) to (28) are about another merge than this run's (update_scope='buffer')" in found
    assert "does not apply to update_scope=buffer" in found
    assert not any(f"{word} is not logged" in found for word in ("gamma_min", "uncovered", "pibar"))


def test_several_seeds(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{seed}.jsonl", seed=seed) for seed in range(4)]
    result = call("check", *files)
    assert result.exit_code == 0
    assert "over 4 samples" in result.output


def test_gap(tmp_path: Path) -> None:
    run = write(tmp_path / "run.jsonl")
    result = call("gap", run, "--svg", tmp_path / "gap.svg")
    assert result.exit_code == 0 and "frozen densities" in result.output
    assert json.loads(call("gap", run, "--json").output)[0]["saving"] > 0
    ElementTree.fromstring((tmp_path / "gap.svg").read_text())
    assert call("gap", run, run, "--svg", tmp_path / "gap.svg").exit_code == 2
    assert call("gap", run, run).output.count("share of the gap") == 2


def test_terms() -> None:
    everything = call("terms").output
    assert all(f"{name}: " in everything for name in BOUNDS)
    one = call("terms", "mask", "--json")
    data = json.loads(one.output)
    assert [b["name"] for b in data["bounds"]] == ["mask"]
    assert data["bounds"][0]["python"] == "theory.numeric.mask(L, mask_sq, pibar)"
    assert set(data["symbols"]) == {"L", "M_sq", "mask_sq", "pibar"}
    assert call("terms", "--cite", "topk").output.count("@") == 2
    assert call("terms", "nothing").exit_code == 2


@pytest.mark.parametrize(
    "module", ["theory", "theory.check", "theory.gap", "theory.cli", "theory.laboratory"]
)
def test_imports_stay_alone(module: str, repository: Path) -> None:
    """No torch, no FedML, no plugin, no hypothesis; `import theory` alone takes no numpy either."""
    code = f"import sys, {module}; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository,
        env={"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(out.stdout.split())
    assert not loaded & {"torch", "fedml", "fedgmr_plugin", "hypothesis", "matplotlib", "scipy"}
    if module in ("theory", "theory.cli"):
        assert "sympy" not in loaded


def test_public_names() -> None:
    import theory

    for name in theory.__all__:
        assert getattr(theory, name) is not None
    with pytest.raises(AttributeError):
        theory.nothing  # noqa: B018


def test_another_framework(tmp_path: Path, repository: Path) -> None:
    """The example writes a log from a plain numpy loop, and the checker follows it."""
    log = tmp_path / "run.jsonl"
    script = repository / "examples" / "theory_from_another_framework.py"
    subprocess.run([sys.executable, str(script), str(log)], check=True, cwd=tmp_path)
    result = call("check", log, "--json")
    assert result.exit_code == 0, result.output
    findings = json.loads(result.output)["runs"][0]["findings"]
    found = {finding["name"]: finding["verdict"] for finding in findings}
    for name in (
        "matched",
        "weights",
        "nested_shares",
        "topk",
        "update",
        "coverage",
        "rank_gap",
        "ALG",
        "UNIF",
    ):
        assert found[name] == "HOLDS", name
    assert "density gap" in call("gap", log).output
