"""The run log: what is written is read back, and what is damaged is refused at its line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgmr_plugin.errors import RunLogError
from fedgmr_plugin.protocol import RunLog, RunLogWriter, read_run
from fedgmr_plugin.protocol.schema import RECORDS, SCHEMA, TYPES, problems

SAMPLES: dict[str, Any] = {
    "int": 3,
    "int or null": None,
    "number": 0.5,
    "number or null": None,
    "string": "text",
    "string or null": None,
    "object": {"accuracy": 0.25},
    "object or null": None,
    "[int]": [1, 2],
    "[number]": [1.0, 0.05],
    "[[number]]": [[1.0, 0.05], [2.0, 3.0]],
    "[object]": [{"client": 1}],
    "[object or null]": [None, {"accuracy": 1.0}],
}


def sample(kind: str, **changes: Any) -> dict[str, Any]:
    """A valid record of one type."""
    record = {"type": kind, **{key: SAMPLES[word] for key, word in RECORDS[kind].items()}}
    if kind == "header":
        record["schema"] = SCHEMA
    return {**record, **changes}


def write(path: Path, *records: dict[str, Any]) -> Path:
    with RunLogWriter(path) as writer:
        for record in records:
            writer.write(record)
    return path


def lines(*records: dict[str, Any]) -> list[bytes]:
    return [json.dumps(record).encode() + b"\n" for record in records]


def values(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Records of one type with arbitrary contents."""
    number = st.one_of(st.floats(), st.integers(-(2**60), 2**60))
    integer = st.integers(-(2**62), 2**62)
    plain = st.dictionaries(
        st.text(max_size=4), st.one_of(number, st.text(max_size=4), st.none()), max_size=3
    )
    words: dict[str, st.SearchStrategy[Any]] = {
        "int": integer,
        "int or null": st.none() | integer,
        "number": number,
        "number or null": st.none() | number,
        "string": st.text(max_size=8),
        "string or null": st.none() | st.text(max_size=8),
        "object": plain,
        "object or null": st.none() | plain,
        "[int]": st.lists(integer, max_size=3),
        "[number]": st.lists(number, max_size=3),
        "[[number]]": st.lists(st.lists(number, max_size=2), max_size=2),
        "[object]": st.lists(plain, max_size=3),
        "[object or null]": st.lists(st.none() | plain, max_size=3),
    }
    return st.fixed_dictionaries(
        {"type": st.just(kind), **{key: words[word] for key, word in RECORDS[kind].items()}}
    )


def finite(value: Any) -> Any:
    """What a value must read back as."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


# -- the schema ------------------------------------------------------------------------------------


def documented(text: str) -> dict[str, dict[str, str]]:
    """Record type -> key -> type word, from the tables of docs/run-log.md."""
    found: dict[str, dict[str, str]] = {}
    for section in text.split("\n## ")[1:]:
        kind = section.split("\n", 1)[0].strip("` ")
        rows = re.findall(r"^\| (`.+?) \| (.+?) \|.*\|$", section, flags=re.MULTILINE)
        found[kind] = {key: word for keys, word in rows for key in re.findall(r"`(\w+)`", keys)}
    return found


def test_the_documents_list_the_keys_and_types_of_the_code(repository: Path) -> None:
    pages = documented((repository / "docs" / "run-log.md").read_text(encoding="utf-8"))
    for kind, keys in pages.items():
        assert keys.pop("type") == f'`"{kind}"`'
    assert {kind: list(keys.items()) for kind, keys in pages.items()} == {
        kind: list(keys.items()) for kind, keys in RECORDS.items()
    }


def test_every_type_word_has_a_test_and_samples_pass() -> None:
    assert {word for keys in RECORDS.values() for word in keys.values()} == set(TYPES)
    for kind in RECORDS:
        assert problems(sample(kind)) == []


@pytest.mark.parametrize(
    ("word", "good", "bad"),
    [
        ("int", [0, -1, np.int64(3)], [True, 1.0, "1", None, [1]]),
        ("int or null", [0, None], [False, 0.0, "x"]),
        ("number", [0, 0.5, None, np.float32(1)], [True, "0.5", [], {}]),
        ("string", ["", "a"], [None, 1, b"a"]),
        ("string or null", ["", None], [1, b"a", []]),
        ("object", [{}, {"a": 1}], [None, [], "x"]),
        ("object or null", [{}, None], [[], 0]),
        ("[int]", [[], [1, 2], (1,)], [None, 1, [1.5], [None], "12"]),
        ("[number]", [[], [1, 0.5, None]], [None, ["x"], [True]]),
        ("[object or null]", [[], [None, {}]], [[1], {}]),
    ],
)
def test_type_words(word: str, good: list[Any], bad: list[Any]) -> None:
    assert [TYPES[word](value) for value in good] == [True] * len(good)
    assert [TYPES[word](value) for value in bad] == [False] * len(bad)


# -- writing ---------------------------------------------------------------------------------------


@given(st.sampled_from(list(RECORDS)[1:]).flatmap(values), values("header"))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, record: dict[str, Any], header: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("log") / "run.jsonl"
    header["schema"] = "1.0"
    run = read_run(write(path, header, record))
    assert run.records(record["type"]) == [{k: finite(v) for k, v in record.items() if k != "type"}]
    assert {**run.header, "type": "header"} == finite(header)
    assert not run.torn


def test_every_type_in_one_file(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "run.jsonl", *(sample(kind) for kind in RECORDS)))
    assert {kind: run.count(kind) for kind in RECORDS} == dict.fromkeys(RECORDS, 1)
    assert run.end is not None and run.end["reason"] == "text"
    assert run.name == "text"


def test_bytes_are_canonical(tmp_path: Path) -> None:
    record = sample("rejected", message="µ\n→", window=np.int64(7))
    shuffled = dict(reversed(record.items()))
    path = write(tmp_path / "run.jsonl", sample("header"), shuffled)
    last = path.read_bytes().split(b"\n")[1].decode("utf-8")
    assert (
        last
        == '{"type": "rejected", "window": 7, "dispatch": 3, "client": 3, "code": "text", "message": "µ\\n→"}'
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_what_is_not_finite_becomes_null_at_any_depth(tmp_path: Path, bad: float) -> None:
    record = sample("evaluation", accuracy=bad, metrics={"a": [1, {"b": bad}], "c": np.array([1.0, bad])})
    path = write(tmp_path / "run.jsonl", sample("header"), record)
    text = path.read_text().splitlines()[1]
    assert "NaN" not in text and "Infinity" not in text
    read = json.loads(text)
    assert read["accuracy"] is None
    assert read["metrics"] == {"a": [1, {"b": None}], "c": [1.0, None]}


def test_full_precision(tmp_path: Path) -> None:
    number = 0.1 + 0.2
    run = read_run(write(tmp_path / "run.jsonl", sample("header"), sample("window", end=number)))
    assert run.column("window", "end")[0] == number


def test_any_python_text_can_be_written(tmp_path: Path) -> None:
    name = "a\ud800b\u2028c"
    assert read_run(write(tmp_path / "run.jsonl", sample("header", run_name=name))).name == name


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"type": "window"}, "key end is missing"),
        (sample("window", extra=1), "key extra is unknown"),
        (sample("window", arrivals=True), "arrivals=True is not of type int"),
        (sample("window", arrivals="3"), "arrivals='3' is not of type int"),
        ({"type": "surprise"}, "type='surprise' is not one of"),
        ({"window": 1}, "type=None is not one of"),
    ],
)
def test_the_writer_refuses_what_is_not_in_the_schema(
    tmp_path: Path, record: dict[str, Any], said: str
) -> None:
    path = tmp_path / "run.jsonl"
    with RunLogWriter(path) as writer:
        writer.write(sample("header"))
        before = path.read_bytes()
        with pytest.raises(ValueError, match=re.escape(said)):
            writer.write(record)
        assert path.read_bytes() == before
        writer.write(sample("window"))
    assert read_run(path).count("window") == 1


def test_the_writer_keeps_the_order_of_header_and_end(tmp_path: Path) -> None:
    with RunLogWriter(tmp_path / "run.jsonl") as writer:
        with pytest.raises(ValueError, match="header comes first"):
            writer.write(sample("window"))
        writer.record(sample("header"))
        with pytest.raises(ValueError, match="header comes first"):
            writer.write(sample("header"))
        writer.write(sample("end"))
        with pytest.raises(ValueError, match="after the end"):
            writer.write(sample("window"))


def test_records_are_on_disk_at_once(tmp_path: Path) -> None:
    with RunLogWriter(tmp_path / "run.jsonl") as writer:
        writer.write(sample("header"))
        for count in range(1, 4):
            writer.write(sample("window", window=count))
            run = read_run(tmp_path)
            assert run.column("window", "window").tolist() == list(range(1, count + 1))
            assert run.end is None and not run.torn


def test_an_existing_log_is_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "deep" / "run.jsonl", sample("header"))
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        RunLogWriter(path)
    with pytest.raises(FileExistsError):
        RunLogWriter(path.parent)
    assert path.read_bytes() == before
    with RunLogWriter(path, overwrite=True) as writer:
        writer.write(sample("header", run_name="second"))
    assert read_run(path).name == "second"


# -- reading damaged files -------------------------------------------------------------------------


def test_a_last_line_torn_at_any_byte_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    last = sample("rejected", message="µ → \U0001f600", window=2)
    whole = write(path, sample("header"), sample("window"), last).read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in range(start, len(whole) + 1):
        path.write_bytes(whole[:cut])
        run = read_run(path)
        complete = cut >= len(whole) - 1  # only the line end is missing
        assert run.torn == (start < cut and not complete), cut
        assert run.count("rejected") == int(complete)
        assert run.count("window") == 1


def test_a_tail_of_zero_bytes_is_torn(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", sample("header"), sample("window"))
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    run = read_run(path)
    assert run.torn and run.count("window") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\n", "not valid JSON"),
        (b'{"type": "win\n', "not valid JSON"),
        (b'{"type": "window", "end": NaN}\n', "NaN is not JSON"),
        (b'{"type": "window", "end": -Infinity}\n', "-Infinity is not JSON"),
        (b'{"type": "rejected", "message": "\xff"}\n', "not valid JSON"),
        (b"[" * 100_000 + b"\n", "not valid JSON"),
        (b"[1, 2]\n", "not an object"),
        (b'{"window": 3}\n', "not an object with a `type`"),
        (b'{"type": 3}\n', "not an object with a `type`"),
        (b'{"type": "window"}\n', "window record without the key"),
        (lines(sample("header"))[0], "a header record where none can be"),
        (lines(sample("window"))[0].strip() + lines(sample("window"))[0], "not valid JSON"),
    ],
)
@pytest.mark.parametrize("at_end", [False, True])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, said: str, at_end: bool) -> None:
    parts = [*lines(sample("header"), sample("window")), line, *([] if at_end else lines(sample("end")))]
    (tmp_path / "run.jsonl").write_bytes(b"".join(parts))
    with pytest.raises(RunLogError) as caught:
        read_run(tmp_path)
    assert caught.value.code == "GMR-602"
    assert said in caught.value.message
    assert caught.value.where == f"{tmp_path / 'run.jsonl'}, line 3"


def test_nothing_may_follow_the_end(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_bytes(b"".join(lines(sample("header"), sample("end"), sample("window"))))
    with pytest.raises(RunLogError, match="line 3"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the header is missing"),
        (lines(sample("header"))[0][:40], "not valid JSON"),
        (lines(sample("window"))[0], "the header is missing"),
        (b"hello\n", "not valid JSON"),
        (lines(sample("header", clients="ten"))[0], "clients='ten' is not of type int"),
        (lines(sample("header", config=None))[0], "config=None is not of type object"),
        (lines({k: v for k, v in sample("header").items() if k != "eta"})[0], "key eta is missing"),
    ],
)
def test_a_log_needs_its_header(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "run.jsonl").write_bytes(content)
    with pytest.raises(RunLogError) as caught:
        read_run(tmp_path)
    assert caught.value.code == "GMR-602"
    assert said in caught.value.message


@pytest.mark.parametrize("schema", ["1.0", "1.1", "1.27"])
def test_any_minor_version_is_read_without_what_is_unknown(tmp_path: Path, schema: str) -> None:
    header = sample("header", schema=schema, colour="red")
    log = lines(header, {"type": "weather", "sun": 1}, sample("window", moon=2), sample("end"))
    (tmp_path / "run.jsonl").write_bytes(b"".join(log))
    run = read_run(tmp_path)
    assert "colour" not in run.header
    assert run.records("window") == [{k: v for k, v in sample("window").items() if k != "type"}]
    assert run.end is not None


def test_a_key_that_may_be_missing_is_read_as_null(tmp_path: Path) -> None:
    header = sample("header", device="cpu: x")
    assert read_run(write(tmp_path / "new.jsonl", header)).header["device"] == "cpu: x"
    del header["device"]
    old = write(tmp_path / "old.jsonl", header, sample("window"))
    assert b"device" not in old.read_bytes() and read_run(old).header["device"] is None
    with pytest.raises(ValueError, match="device=3 is not of type string or null"):
        write(tmp_path / "wrong.jsonl", {**header, "device": 3})


@pytest.mark.parametrize("schema", ["2.0", "0.9", "1", "1.", "1.x", "11.0", " 1.0", "", 1.0, None])
def test_another_schema_is_refused(tmp_path: Path, schema: Any) -> None:
    (tmp_path / "run.jsonl").write_bytes(b"".join(lines(sample("header", schema=schema))))
    with pytest.raises(RunLogError) as caught:
        read_run(tmp_path)
    assert caught.value.code == "GMR-603"
    assert repr(schema) in caught.value.message


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunLogError) as caught:
        read_run(tmp_path / "absent")
    assert (caught.value.code, caught.value.where) == ("GMR-601", str(tmp_path / "absent"))
    write(tmp_path / "runs" / "first" / "run.jsonl", sample("header"))
    with pytest.raises(RunLogError) as caught:
        read_run(tmp_path / "runs")
    assert caught.value.code == "GMR-601"
    assert "first" in caught.value.hint


# -- columns ---------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunLog:
    metrics = [{"accuracy": 0.5, "loss": None}, {}, {"accuracy": 1}]
    return read_run(
        write(
            tmp_path / "run.jsonl",
            sample("header"),
            *(
                sample("evaluation", window=w, accuracy=a, scaled=m)
                for w, a, m in zip((1, 2, 3), (0.5, None, 1), metrics, strict=True)
            ),
            *(sample("restoration", client=client) for client in (None, 4)),
            *(sample("probe", client_grad_sq=row) for row in ([1.0, 2.0], [3, None])),
            *(sample("validation") for _ in range(2)),
            sample("end"),
        )
    )


def test_columns(run: RunLog) -> None:
    window = run.column("evaluation", "window")
    assert window.dtype == np.int64 and window.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(run.column("evaluation", "accuracy"), [0.5, np.nan, 1.0])
    np.testing.assert_array_equal(run.column("evaluation", "scaled.accuracy"), [0.5, np.nan, 1.0])
    np.testing.assert_array_equal(run.column("restoration", "client"), [np.nan, 4.0])
    np.testing.assert_array_equal(run.column("probe", "client_grad_sq"), [[1.0, 2.0], [3.0, np.nan]])
    assert run.column("evaluation", "scaled").tolist()[1] == {}
    assert run.column("validation", "clients").tolist() == [
        [None, {"accuracy": 1.0}],
        [None, {"accuracy": 1.0}],
    ]
    assert run.column("restoration", "cause").tolist() == ["text", "text"]
    assert run.column("arrival", "staleness").shape == (0,)
    assert list(run.columns("evaluation", "loss", "window")) == ["loss", "window"]
    with pytest.raises(KeyError, match="no key of evaluation records is called 'colour'; there are window, "):
        run.column("evaluation", "colour")
    for read in (run.count, run.records, lambda kind: run.column(kind, "time")):
        with pytest.raises(KeyError, match="no type of record is called 'evaluations'; did you mean 'eval"):
            read("evaluations")
    assert repr(run).startswith("<RunLog '") and str(run.path) in repr(run)


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("window", "1.5", "window=1.5 is not of type int"),
        ("window", "true", "window=True is not of type int"),
        ("window", "99999999999999999999", "not an array"),
        ("accuracy", '"0.5"', "accuracy='0.5' is not of type number"),
        ("accuracy", "1e999", "not finite"),
        ("scaled.accuracy", '{"accuracy": [1]}', "scaled.accuracy=[1] is not of type number"),
        ("scaled.accuracy", "3.5", "scaled=3.5 is not of type object"),
        ("scaled.accuracy", "null", "scaled=None is not of type object"),
    ],
)
def test_a_column_of_another_type_is_refused(tmp_path: Path, key: str, text: str, said: str) -> None:
    outer = key.partition(".")[0]
    record = json.dumps(sample("evaluation", **{outer: "PLACE"})).replace('"PLACE"', text)
    (tmp_path / "run.jsonl").write_bytes(lines(sample("header"))[0] + record.encode() + b"\n")
    run = read_run(tmp_path)
    with pytest.raises(RunLogError) as caught:
        run.column("evaluation", key)
    assert caught.value.code == "GMR-602" and said in caught.value.message


def test_ragged_lists_are_refused(tmp_path: Path) -> None:
    rows = (sample("probe", client_grad_sq=row) for row in ([1.0], [1.0, 2.0]))
    run = read_run(write(tmp_path / "run.jsonl", sample("header"), *rows))
    with pytest.raises(RunLogError, match="not an array"):
        run.column("probe", "client_grad_sq")


def test_records_of_another_type_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_bytes(b"".join(lines(sample("header"), sample("restoration", after="x"))))
    run = read_run(tmp_path)
    with pytest.raises(RunLogError, match="restoration record 0: after='x' is not of type number"):
        run.records("restoration")
    (tmp_path / "run.jsonl").write_bytes(b"".join(lines(sample("header"), sample("end", reason=3))))
    with pytest.raises(RunLogError, match="reason=3 is not of type string"):
        read_run(tmp_path)
