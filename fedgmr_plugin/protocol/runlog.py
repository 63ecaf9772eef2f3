"""Reads and writes ``run.jsonl``, the record of one run (schema: ``docs/run-log.md``)."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fedgmr_plugin.errors import RunLogError
from fedgmr_plugin.protocol.schema import OPTIONAL, RECORDS, SCHEMA, TYPES, problems

#: Name of the log inside a run's directory.
LOG_NAME = "run.jsonl"

Row = tuple[Any, ...]


def _plain(value: object) -> object:
    """NumPy's scalars and arrays as Python's, for the JSON encoder."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot stand in a run log")


def _finite(value: Any) -> Any:
    """`value` with every number that is not finite replaced by None, at any depth."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = _plain(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_plain)


def encode(record: Mapping[str, Any]) -> str:
    """One line of the log, without its line end: keys in the schema's order, null for NaN and infinity.

    Raises:
        ValueError: the record does not fit the schema; the message names every key.
    """
    found = problems(record)
    if found:
        raise ValueError(f"{record.get('type')} record refused: " + "; ".join(found))
    keys = RECORDS[record["type"]]
    ordered = {"type": record["type"], **{key: record[key] for key in keys if key in record}}
    try:
        return _ENCODER.encode(ordered)
    except ValueError:
        return _ENCODER.encode(_finite(ordered))


class RunLogWriter:
    """Writes the records of one run, each flushed as soon as it is written.

    A crash therefore loses at most the line being written. The first record must be the header, and
    nothing may follow ``end``. Not safe for concurrent threads.

    Args:
        path: file to create (parents are made), or an existing directory, which gets ``run.jsonl``.
        overwrite: replace an existing log; without it an existing log is left alone.

        resume_at: go on behind so many bytes of an existing log, whose rest is cut off.

    Raises:
        FileExistsError: the log exists, and neither `overwrite` nor `resume_at` is given.
        RunLogError: GMR-602 if the log is shorter than `resume_at`.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, resume_at: int | None = None) -> None:
        target = Path(path)
        if target.is_dir():
            target = target / LOG_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path = target
        self._last = ""
        self._digest = hashlib.sha256()
        if resume_at is not None:
            if target.stat().st_size < resume_at:
                raise RunLogError("GMR-602", f"it lost bytes: {resume_at} were written", where=str(target))
            os.truncate(target, resume_at)
            self._digest.update(target.read_bytes())
            self._last = "before"
        mode = "a" if resume_at is not None else "w" if overwrite else "x"
        self._file = open(target, f"{mode}b", buffering=0)  # noqa: SIM115
        self._size = resume_at or 0
        self._is_torn = False  # whether something lies behind `_size`

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Raises:
            ValueError: the record does not fit the schema, comes before the header or after ``end``,
                or is a second header. Nothing is written.
            OSError: there is no space, or the disk fails. Nothing is written; it may be tried again.
        """
        kind = record.get("type")
        if (kind == "header") != (self._last == ""):
            raise ValueError(f"{kind} record out of place: the header comes first, and once")
        if self._last == "end":
            raise ValueError(f"{kind} record after the end of the run")
        # A lone surrogate becomes its JSON escape, so any Python string can be written.
        line = (encode(record) + "\n").encode("utf-8", errors="backslashreplace")
        self._append(line)
        self._size += len(line)
        self._digest.update(line)
        self._last = str(kind)

    def _append(self, line: bytes) -> None:
        """Write a line whole, or leave the log as it was."""
        if self._is_torn:
            self._file.truncate(self._size)
        self._is_torn = True
        left = memoryview(line)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(self._size)
            self._is_torn = False
            raise
        self._is_torn = False

    def sync(self) -> tuple[int, str]:
        """Have what was written so far on the disk; returns its bytes and their SHA-256."""
        os.fsync(self._file.fileno())
        return self._size, self._digest.hexdigest()

    #: A writer is an observer of the engine.
    record = write

    def close(self) -> None:
        """Close the file; further writes fail."""
        self._file.close()

    def __enter__(self) -> RunLogWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _named(name: str, among: Mapping[str, Any], what: str) -> Any:
    """What stands under a name; a KeyError that helps where nothing does."""
    if name not in among:
        near = difflib.get_close_matches(name, among, n=1)
        guess = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(among)}"
        raise KeyError(f"no {what} is called {name!r}; {guess}")
    return among[name]


class RunLog:
    """The records of one run, as columns or as dictionaries.

    Attributes:
        path: the file that was read.
        header: the header record.
        end: the end record; None if the run did not end by itself (it is running, or was stopped).
        torn: the last line was incomplete and has been left out.
    """

    def __init__(self, path: Path, header: dict[str, Any], rows: dict[str, list[Row]], torn: bool) -> None:
        self.path = path
        self.header = header
        self.torn = torn
        self._rows = rows
        ends = self.records("end")
        self.end: dict[str, Any] | None = ends[0] if ends else None

    def __repr__(self) -> str:
        end = "still going or stopped" if self.end is None else f"{self.end['windows']} windows"
        return f"<RunLog {self.name!r} at {str(self.path)!r}: {end}>"

    @property
    def name(self) -> str:
        """The run's name, from the header."""
        return str(self.header["run_name"])

    def count(self, kind: str) -> int:
        """Number of records of one type.

        Raises:
            KeyError: there is no such type.
        """
        _named(kind, RECORDS, "type of record")
        return len(self._rows[kind])

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of one type as dictionaries (known keys only), in the order of the file.

        Raises:
            KeyError: there is no such type.
            RunLogError: GMR-602 if a value has another type than the schema says.
        """
        keys = tuple(_named(kind, RECORDS, "type of record"))
        found = [dict(zip(keys, row, strict=True)) for row in self._rows[kind]]
        for number, record in enumerate(found):
            wrong = problems({"type": kind, **record})
            if wrong:
                self._damaged(f"{kind} record {number}: {'; '.join(wrong)}")
        return found

    def column(self, kind: str, key: str) -> NDArray[Any]:
        """One key of all records of a type, in the order of the file.

        Args:
            kind: record type, such as ``"window"``.
            key: key of that type; ``"global.accuracy"`` reaches into an object.

        Returns:
            int64 [records] for ``int``; float64 [records] for numbers, with NaN for null; float64
            [records, n] for lists of numbers; object [records] for everything else.

        Raises:
            KeyError: there is no such type, or key of it.
            RunLogError: GMR-602 if a value has another type than the schema says.
        """
        outer, _, inner = key.partition(".")
        keys = _named(kind, RECORDS, "type of record")
        word = _named(outer, keys, f"key of {kind} records")
        place = list(keys).index(outer)
        values = self._checked([row[place] for row in self._rows[kind]], word, kind, outer)
        if inner:
            word = "number"
            inside = [None if value is None else value.get(inner) for value in values]
            values = self._checked(inside, word, kind, key)
        if word == "int":
            return self._array(values, np.int64, kind, key)
        if word in ("number", "number or null", "int or null", "[number]", "[int]"):
            column = self._array(values, np.float64, kind, key)
            if np.isinf(column).any():
                self._damaged(f"a value of {key} in a {kind} record is not finite")
            return column
        objects = np.empty(len(values), dtype=object)
        for number, value in enumerate(values):
            objects[number] = value
        return objects

    def columns(self, kind: str, *keys: str) -> dict[str, NDArray[Any]]:
        """Several columns of one record type, by key."""
        return {key: self.column(kind, key) for key in keys}

    def _checked(self, values: list[Any], word: str, kind: str, key: str) -> list[Any]:
        """`values`, each of the type that the word says."""
        test = TYPES[word]
        for number, value in enumerate(values):
            if not test(value):
                self._damaged(f"{kind} record {number}: {key}={value!r} is not of type {word}")
        return values

    def _array(self, values: Sequence[Any], dtype: Any, kind: str, key: str) -> NDArray[Any]:
        try:
            return np.array(values, dtype=dtype)
        except (ValueError, OverflowError) as error:
            self._damaged(f"{key} of the {kind} records is not an array: {error}")

    def _damaged(self, message: str) -> NoReturn:
        raise RunLogError("GMR-602", message, where=str(self.path))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_GETTERS: dict[str, Callable[[Mapping[str, Any]], Row]] = {
    kind: itemgetter(*keys) for kind, keys in RECORDS.items()
}


def find_log(path: str | Path) -> Path:
    """The log file that `path` means: the file itself, or ``run.jsonl`` in a run's directory.

    Raises:
        RunLogError: GMR-601; for a directory of runs the message lists them.
    """
    given = Path(path)
    if given.is_dir():
        log = given / LOG_NAME
        if log.is_file():
            return log
        runs = sorted(entry.parent.name for entry in given.glob(f"*/{LOG_NAME}"))
        hint = f"It holds runs, name one of them: {', '.join(runs[:8])}." if runs else ""
        raise RunLogError("GMR-601", f"no {LOG_NAME} in this directory", where=str(given), hint=hint)
    if not given.is_file():
        raise RunLogError("GMR-601", "no such run directory or file", where=str(given))
    return given


def read_run(path: str | Path) -> RunLog:
    """Read a run directory or a log file.

    Accepts any schema 1.x: record types and keys that this release does not know are left out. A last
    line without its line end that is not a whole record is left out too, and `RunLog.torn` is set;
    every other damage is an error, because a silent gap would falsify what is computed from the log.

    Raises:
        RunLogError: GMR-601 no log there, GMR-602 damaged (with the line), GMR-603 other schema.
    """
    file = find_log(path)
    rows: dict[str, list[Row]] = {kind: [] for kind in RECORDS}
    header: dict[str, Any] | None = None
    torn = False
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    record = _parse(line, f"{file}, line {number}")
                except RunLogError:
                    if line.endswith(b"\n") or header is None:
                        raise
                    torn = True
                    break
                if header is None:
                    header = _checked_header(record, f"{file}, line {number}")
                _add(rows, record, f"{file}, line {number}")
    except OSError as error:
        raise RunLogError("GMR-601", f"cannot be read: {error.strerror}", where=str(file)) from error
    if header is None:
        raise RunLogError("GMR-602", "the file is empty: the header is missing", where=str(file))
    return RunLog(file, header, rows, torn)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    """The object on one line (GMR-602 if there is none)."""
    try:
        record = _DECODER.decode(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunLogError("GMR-602", f"not valid JSON: {error}", where=where) from error
    if not isinstance(record, dict) or not isinstance(record.get("type"), str):
        raise RunLogError("GMR-602", "not an object with a `type`", where=where)
    for key in OPTIONAL.get(record["type"], ()):
        record.setdefault(key, None)
    return record


def _checked_header(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The header's known keys, after a look at its schema (GMR-603) and at every key's type (GMR-602)."""
    if record["type"] != "header":
        raise RunLogError(
            "GMR-602", f"the header is missing: the first record is of type {record['type']!r}", where=where
        )
    schema = record.get("schema")
    if not isinstance(schema, str) or not re.fullmatch(r"1\.[0-9]+", schema):
        message = f"schema={schema!r}, but this release reads 1.x (and writes {SCHEMA})"
        raise RunLogError("GMR-603", message, where=where)
    known = {key: value for key, value in record.items() if key in RECORDS["header"]}
    found = problems({"type": "header", **known})
    if found:
        raise RunLogError("GMR-602", "header: " + "; ".join(found), where=where)
    return known


def _add(rows: dict[str, list[Row]], record: dict[str, Any], where: str) -> None:
    """File `record` under its type; unknown types are left out."""
    kind = record["type"]
    if kind not in rows:
        return
    if rows["end"] or (kind == "header" and rows["header"]):
        message = f"a {kind} record where none can be (two runs in one file?)"
        raise RunLogError("GMR-602", message, where=where)
    try:
        rows[kind].append(_GETTERS[kind](record))
    except KeyError as error:
        raise RunLogError("GMR-602", f"{kind} record without the key {error}", where=where) from error
