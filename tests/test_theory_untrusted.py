"""Logs are untrusted: whatever stands in one field, the answer is a verdict or a refusal, at once."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from theory.cli import main
from theory.errors import LogError
from theory.header import CONFIG, FEDML, HEADER, LAYOUT
from theory.laboratory import Quadratic, Schedule, simulate
from theory.laboratory import records as lab
from theory.log import parse

Records = list[dict[str, Any]]
Path_ = tuple[str | int, ...]

#: What a field may be replaced by: other types, signs, sizes, and text that no terminal or page should see.
VALUES: tuple[Any, ...] = (
    None, -1, 0, 1e308, -1e308, "x", [], {}, [1, 2], "NaN", 10**400, 10**12, True, 1e-308, [None], [{}],
    [[1]], 2.5, "\ud800\x1b[2J</title>",
)  # fmt: skip


def good() -> Records:
    problem = Quadratic.random(np.random.default_rng(0), clients=3, size=8, sigma=0.2, dense=2)
    schedule = Schedule(windows=5, restorations=((3, 2, 0.5),), samples=(2.0, 3.0, 4.0))
    records = simulate(problem, schedule).records
    records[0]["fedml"] = {
        "weight_decay": 0.0,
        "client_optimizer": "sgd",
        "learning_rate": 0.05,
        "comm_round": 5,
    }
    metrics = {"global": {"accuracy": 0.5, "loss": 1.0}, "scaled": {"accuracy": 0.5, "loss": 1.0}}
    merged = {"window": 5, "time": 5.0, "candidate": "global", **metrics}
    records[-1:-1] = [
        {"type": "validation", **merged, "clients": []},
        {"type": "evaluation", **merged, "accuracy": 0.5, "loss": 1.0, "bytes_up": None, "bytes_down": None},
        {"type": "rejected", "window": 1, "dispatch": 9, "client": 7, "code": "GMR-401", "message": "x"},
    ]
    return records


def fields(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every key and the first two entries of every list, at any depth."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value[:2]):
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from fields(inner, (*path, key))


def replaced(records: Records, number: int, path: Path_, value: Any) -> Records:
    changed = copy.copy(records)
    changed[number] = inner = copy.deepcopy(records[number])
    for key in path[:-1]:
        inner = inner[key]  # type: ignore[index]
    inner[path[-1]] = value  # type: ignore[index]
    return changed


def answer(file: Path, records: Records, *options: object) -> int:
    """The exit status of ``check`` on a log; fails on anything but a verdict or a refusal."""
    file.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    result = CliRunner().invoke(main, ["check", str(file), *map(str, options)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2) and "Traceback" not in result.output
    assert "\x1b" not in result.output
    result.output.encode()
    return result.exit_code


KINDS = tuple(dict.fromkeys(record["type"] for record in good()))


@pytest.mark.parametrize("kind", KINDS)
def test_any_field_may_be_anything(kind: str, tmp_path: Path) -> None:
    """Six values a field, in turn, so that every value meets every record; all of them in the header."""
    records = good()
    number = next(i for i, record in enumerate(records) if record["type"] == kind)
    seen, file = set(), tmp_path / "run.jsonl"
    for i, path in enumerate(fields(records[number])):
        chosen = VALUES if kind == "header" else islice(cycle(VALUES), 6 * i, 6 * i + 6)
        seen |= {answer(file, replaced(records, number, path, value)) for value in chosen}
    assert 2 in seen, "nothing was refused"


@pytest.mark.parametrize("kind", KINDS)
def test_pages_and_json_survive_too(kind: str, tmp_path: Path) -> None:
    records = good()
    number = next(i for i, record in enumerate(records) if record["type"] == kind)
    for i, path in enumerate(fields(records[number])):
        changed = replaced(records, number, path, VALUES[7 * i % len(VALUES)])
        answer(tmp_path / "run.jsonl", changed, "--json", "--html", tmp_path / "page.html")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("layout.layers", [1, 2], "layout.layers=[1, 2] is not a list of objects"),
        ("layout.layers", [{"kind": "prunable"}], "layout.layers[0].size is missing"),
        ("layout.size", -1, "layout.size=-1 is not an integer of at least 1"),
        ("clients", 1000000000, "densities has 3 entries, but clients=1000000000"),
        ("clients", 2.0, "clients=2.0 is not an integer"),
        ("densities", [1, 2, 3], "densities=[1, 2, 3] is not a list of densities in (0, 1]"),
        ("config", [1], "config=[1] is not an object"),
        ("config.interval", 0, "config.interval=0 is not an integer of at least 1"),
        ("config.mixing", 0, "config.mixing=0 is not true or false"),
        ("config.local_steps", "x", "config.local_steps='x' is not an integer of at least 1 or \"epochs\""),
        ("fedml.client_optimizer", 3, "fedml.client_optimizer=3 is not a string"),
        ("eta", -0.1, "eta=-0.1 is not a number of at least 0"),
        ("run_name", {"a": [[[[1]]]]}, "run_name={'a': [[...]]} is not a string"),
    ],
)  # fmt: skip
def test_a_malformed_header_is_refused_by_name(key: str, value: Any, words: str) -> None:
    records = replaced(good(), 0, tuple(key.split(".")), value)
    with pytest.raises(LogError, match="GMR-602 header") as refused:
        parse([lab.line(record) for record in records])
    assert words in str(refused.value) and refused.value.line == 1


def test_what_the_header_does_not_say_is_no_error() -> None:
    for key, rules in (("config", CONFIG), ("fedml", FEDML), ("layout", LAYOUT)):
        parse([lab.line({"type": "header", "schema": "1.0", "clients": 1, key: dict.fromkeys(rules)})])
    parse([lab.line({"type": "header", "schema": "1.0", "clients": 1, **dict.fromkeys(HEADER)})])


def test_a_header_may_not_nest_without_end() -> None:
    deep: Any = 1
    for _ in range(100):
        deep = {"x": [deep]}
    with pytest.raises(LogError, match="nested more than 32 deep"):
        parse([lab.line({"type": "header", "schema": "1.0", "clients": 1, "config": deep})])


def test_a_matrix_is_square() -> None:
    records = good()
    number = next(i for i, record in enumerate(records) if record["type"] == "terms")
    with pytest.raises(LogError, match="is not a square matrix"):
        parse([lab.line(r) for r in replaced(records, number, ("gram",), [[0.0] * 49])])


def test_no_number_takes_memory() -> None:
    """Large numbers in the header and in records, and one long vector among many missing, within 1 GB."""
    changes: list[tuple[int, Path_, Any]] = [
        (0, ("layout", "size"), 10**15), (0, ("layout", "prunable"), 10**15), (0, ("windows",), 10**15),
        (0, ("config", "interval"), 10**15), (0, ("layout", "layers", 0, "size"), 10**15),
    ]  # fmt: skip
    records = good()
    huge = [replaced(records, *change) for change in changes]
    nameless = {key: value for key, value in records[0].items() if key != "densities"}
    huge.append([{**nameless, "clients": 10**9}, *records[1:]])
    huge.append([{**nameless, "clients": 10**9, "config": {"dense_start": True}}, *records[1:]])
    huge += [
        replaced(records, i, (key,), 10**15)
        for i, record in enumerate(records)
        for key in ("window", "version", "dispatch", "client", "arrivals", "windows")
        if key in record
        and i in {next(j for j, r in enumerate(records) if r["type"] == kind) for kind in KINDS}
    ]
    wide = {"type": "probe", "window": 0, "client_grad_sq": [1] * 200_000}
    huge.append([records[0], wide, *({"type": "probe", "window": t} for t in range(1, 4000))])
    code = """
import json, resource, sys
from theory.check import check_logs
from theory.errors import LogError
from theory.gap import density_gap
from theory.log import parse
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
for line in sys.stdin:
    try:
        log = parse([json.dumps(record).encode() + b"\\n" for record in json.loads(line)])
        check_logs([log]), density_gap(log)
    except LogError:
        pass
status = open("/proc/self/status").read()  # ru_maxrss would count the parent's memory before exec
print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""
    text = "\n".join(json.dumps(run) for run in huge)
    done = subprocess.run(
        [sys.executable, "-c", code], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 50 < int(done.stdout) < 1000
