"""Reading run logs: columns, lines, and everything that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theory.errors import LogError
from theory.log import parse, read_log

HEADER = {"type": "header", "schema": "1.0", "clients": 2}
DISPATCH = {"type": "dispatch", "dispatch": 0, "client": 0, "version": 0, "density": 0.5}
WINDOW = {"type": "window", "window": 0, "arrivals": 0}


def lines(*records: Any) -> list[bytes]:
    return [r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in records]


def test_columns_codes_and_lines() -> None:
    second = {**DISPATCH, "dispatch": 1, "ranking": "b", "norm_sq": 2}
    log = parse(
        lines(
            HEADER, {**DISPATCH, "ranking": "a"}, WINDOW, second, {**second, "dispatch": 2, "ranking": None}
        )
    )
    table = log["dispatch"]
    assert table["dispatch"].tolist() == [0, 1, 2]
    assert table.codes["ranking"].tolist() == [0, 1, -1] and table.texts["ranking"] == ("a", "b")
    assert np.isnan(table["norm_sq"][0]) and table["norm_sq"][1] == 2
    assert table.line.tolist() == [2, 4, 5]
    assert not table.logged("norm_sq") and table.logged("density") and not log["arrival"].logged("window")
    assert log.clients == 2 and not log.ended and not log.torn


def test_unknown_keys_and_types_are_ignored() -> None:
    log = parse(lines(HEADER, {**DISPATCH, "new": [1]}, {"type": "novelty", "x": 1}, {"type": "end"}))
    assert len(log["dispatch"]) == 1 and log.ended


def test_vectors_and_nested_objects() -> None:
    probe = {"type": "probe", "window": 0, "client_grad_sq": [1.0, 2.0]}
    terms = {
        "type": "terms", "window": 0, "gamma": 1.0, "gram": [[1, 2], [3, 4]],
        "arrivals": [{"dispatch": 0, "client": 1, "pibar": 0.5}],
    }  # fmt: skip
    log = parse(lines(HEADER, {**probe, "client_grad_sq": None}, probe, terms))
    assert (
        log["probe"]["client_grad_sq"].shape == (2, 2) and np.isnan(log["probe"]["client_grad_sq"][0]).all()
    )
    assert log["terms"]["gram"].tolist() == [[1, 2, 3, 4]]
    assert log["term_arrivals"]["pibar"].tolist() == [0.5] and log["term_arrivals"]["window"].tolist() == [0]


def test_a_torn_last_line_is_tolerated() -> None:
    log = parse([*lines(HEADER, WINDOW), b'{"type": "win'])
    assert log.torn and len(log["window"]) == 1


def test_a_whole_last_line_without_newline_counts() -> None:
    log = parse([*lines(HEADER), json.dumps(WINDOW).encode()])
    assert not log.torn and len(log["window"]) == 1


@pytest.mark.parametrize(
    ("records", "code", "line"),
    [
        ([], "GMR-602", 0),
        ([b'{"type": "header"'], "GMR-602", 0),
        ([WINDOW], "GMR-602", 1),
        ([{**HEADER, "schema": "2.0"}], "GMR-603", 1),
        ([{"type": "header", "clients": 2}], "GMR-603", 1),
        ([{**HEADER, "clients": 0}], "GMR-602", 1),
        ([{**HEADER, "clients": True}], "GMR-602", 1),
        ([{**HEADER, "clients": 2.0}], "GMR-602", 1),
        ([HEADER, HEADER], "GMR-602", 2),
        ([HEADER, b'{"type": "win\n', WINDOW], "GMR-602", 2),
        ([HEADER, b'{"type": "win\n'], "GMR-602", 2),
        ([HEADER, b"\n", WINDOW], "GMR-602", 2),
        ([HEADER, b"[1]\n"], "GMR-602", 2),
        ([HEADER, b"\xff\xfe\n"], "GMR-602", 2),
        ([HEADER, b'{"type": "window", "window": 0, "arrivals": NaN}\n'], "GMR-602", 2),
        ([HEADER, b'{"type": "window", "window": 0, "arrivals": Infinity}\n'], "GMR-602", 2),
        ([HEADER, b'{"type": "window", "window": 0, "arrivals": 1e999}\n'], "GMR-602", 2),
        ([HEADER, b'{"type": "window", "window": 0, "arrivals": ' + b"9" * 400 + b"}\n"], "GMR-602", 2),
        ([HEADER, {**WINDOW, "window": "0"}], "GMR-602", 2),
        ([HEADER, {**WINDOW, "window": True}], "GMR-602", 2),
        ([HEADER, {**WINDOW, "window": [0]}], "GMR-602", 2),
        ([HEADER, {"type": "window", "arrivals": 0}], "GMR-602", 2),
        ([HEADER, {**DISPATCH, "ranking": 3}], "GMR-602", 2),
        ([HEADER, {"window": 0}], "GMR-602", 2),
        ([HEADER, {"type": 3}], "GMR-602", 2),
        ([HEADER, {"type": "end"}, WINDOW], "GMR-602", 3),
        ([HEADER, {"type": "probe", "window": 0, "client_grad_sq": 3}], "GMR-602", 2),
        ([HEADER, {"type": "probe", "window": 0, "client_grad_sq": [1, "x"]}], "GMR-602", 2),
        (
            [HEADER, *({"type": "probe", "window": 0, "client_grad_sq": [1] * n} for n in (2, 3))],
            "GMR-602",
            2,
        ),
        ([HEADER, {"type": "terms", "window": 0, "gamma": 1, "arrivals": [3]}], "GMR-602", 2),
        ([HEADER, {"type": "terms", "window": 0, "gamma": 1, "arrivals": [{"client": 0}]}], "GMR-602", 2),
        ([HEADER, b"[" * 100_000 + b"\n"], "GMR-602", 2),
    ],
)
def test_bad_logs(records: list[Any], code: str, line: int) -> None:
    with pytest.raises(LogError) as caught:
        parse(lines(*records), name="run.jsonl")
    assert caught.value.code == code
    assert caught.value.line == line
    assert str(caught.value).startswith(code)


def test_reading_files_and_directories(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    file.write_bytes(b"".join(lines(HEADER, WINDOW)))
    assert len(read_log(tmp_path)["window"]) == len(read_log(file)["window"]) == 1
    with pytest.raises(LogError, match="GMR-601"):
        read_log(tmp_path / "nothing")


@given(st.integers(0, 400))
def test_cutting_a_log_anywhere_never_reads_more(cut: int) -> None:
    """A prefix of a good log is read as its whole records, or refused if the header itself is cut."""
    records = [HEADER, *({**WINDOW, "window": t} for t in range(6))]
    raw = b"".join(lines(*records))[:cut]
    pieces = raw.splitlines(keepends=True)
    try:
        log = parse(pieces)
    except LogError:
        assert cut < len(lines(HEADER)[0]) - 1
        return
    assert len(log["window"]) in (raw.count(b"\n") - 1, raw.count(b"\n"))
    assert log["window"]["window"].tolist() == list(range(len(log["window"])))


def test_many_records_cross_chunks() -> None:
    """Columns are built in chunks of 4096; codes and vectors survive the seams."""
    count = 9000
    records = [{**DISPATCH, "dispatch": i, "ranking": f"r{i % 3}"} for i in range(count)]
    probes = [
        {"type": "probe", "window": t, "client_gap_sq": None if t < 5000 else [1, t]} for t in range(5001)
    ]
    log = parse(lines(HEADER, *records, *probes))
    assert np.array_equal(log["dispatch"]["dispatch"], np.arange(count))
    assert np.array_equal(log["dispatch"].codes["ranking"], np.arange(count) % 3)
    assert log["probe"]["client_gap_sq"].shape == (5001, 2) and log["probe"]["client_gap_sq"][-1, 1] == 5000
