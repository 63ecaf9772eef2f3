"""Columns of numbers and texts built from JSON records, in chunks so that memory stays small."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.errors import LogError, shown
from theory.schema import METRICS, Key

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NUMBERS = frozenset((int, float, type(None)))
_TEXTS = frozenset((str, type(None)))
_CHUNK = 4096
#: Numbers that may be made up (as nan) for records without a vector: a short log must not fill the memory.
_MOST_PADDING = 20_000_000


class Stray(NamedTuple):
    """A number outside the range of its key: line, key, value, and how many more there are in its records."""

    line: int
    key: str
    value: float
    more: int


@dataclass(frozen=True)
class Table:
    """All records of one type, by column.

    Attributes:
        columns: key -> float64 ``[rows]`` or ``[rows, n]``; nan where absent, and where a number that may be
            absent lies outside its key's range.
        codes: text key -> int64 ``[rows]``, index into `texts`, -1 where absent.
        texts: text key -> the distinct values in order of first appearance.
        line: int64 ``[rows]``, one-based line number in the log.
        strays: numbers outside their key's range.
    """

    columns: dict[str, Floats] = field(default_factory=dict)
    codes: dict[str, Ints] = field(default_factory=dict)
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    line: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    strays: tuple[Stray, ...] = ()

    def __len__(self) -> int:
        return len(self.line)

    def __getitem__(self, key: str) -> Floats:
        return self.columns[key]

    def logged(self, *keys: str) -> bool:
        """Whether there is a row and every row has a value for each of `keys`."""
        return len(self) > 0 and not any(np.isnan(self.columns[key]).any() for key in keys)

    def text(self, key: str) -> NDArray[np.object_]:
        """A text column, ``[rows]`` of str or None."""
        return np.array([*self.texts[key], None], dtype=object)[self.codes[key]]

    def take(self, rows: NDArray[Any]) -> Table:
        """The rows chosen by an index or boolean array."""
        return Table(
            {key: column[rows] for key, column in self.columns.items()},
            {key: code[rows] for key, code in self.codes.items()},
            self.texts,
            self.line[rows],
        )


class Builder:
    """Collects the records of one type and turns them into a `Table`.

    Args:
        keys: the schema of the record type.
        path: file name, for errors.
        label: record type, for errors.
    """

    def __init__(self, keys: dict[str, Key], path: str, label: str) -> None:
        self._keys = {key: spec for key, spec in keys.items() if spec.kind != "objects"}
        self._columns: dict[str, Key] = {}
        for key, spec in self._keys.items():
            parts = {f"{key}.{part}": inner for part, inner in METRICS.items()}
            self._columns |= parts if spec.kind == "metrics" else {key: spec}
        self._path, self._label = path, label
        self._rows: list[dict[str, Any]] = []
        self._lines: list[int] = []
        self._chunks: dict[str, list[Floats]] = {k: [] for k, s in self._columns.items() if s.kind != "text"}
        self._codes: dict[str, list[Ints]] = {k: [] for k, s in self._keys.items() if s.kind == "text"}
        self._index: dict[str, dict[str | None, int]] = {k: {None: -1} for k in self._codes}
        self._line_chunks: list[Ints] = []
        self._strays: list[Stray] = []

    def add(self, record: dict[str, Any], line: int) -> None:
        """Appends one record; its values are checked when its chunk is full."""
        self._rows.append(record)
        self._lines.append(line)
        if len(self._rows) == _CHUNK:
            self._flush()

    def table(self) -> Table:
        """The finished table."""
        self._flush()
        columns = {key: self._joined(key, chunks) for key, chunks in self._chunks.items()}
        codes = {k: np.concatenate(c) if c else np.zeros(0, np.int64) for k, c in self._codes.items()}
        texts = {k: tuple(t for t in index if t is not None) for k, index in self._index.items()}
        lines = np.concatenate(self._line_chunks) if self._line_chunks else np.zeros(0, np.int64)
        return Table(columns, codes, texts, lines, tuple(self._strays))

    def _joined(self, key: str, chunks: list[Floats]) -> Floats:
        flat = self._columns[key].kind == "number"
        if flat:
            return np.concatenate(chunks) if chunks else np.zeros(0)
        width = max((chunk.shape[1] for chunk in chunks), default=0)
        self._check_padding(key, width * sum(len(c) for c in chunks if c.shape[1] != width))
        wide = [c if c.shape[1] == width else np.full((len(c), width), np.nan) for c in chunks]
        if any(c.shape[1] not in (0, width) for c in chunks):
            raise self._error(f"{key} has not the same length in every record", 0)
        return np.concatenate(wide) if wide else np.zeros((0, 0))

    def _flush(self) -> None:
        if not self._rows:
            return
        for key, spec in self._keys.items():
            raw = [row.get(key) for row in self._rows]
            if spec.required and None in raw:
                raise self._error(f"{key} is missing", raw.index(None))
            if spec.kind == "text":
                self._codes[key].append(self._text(raw, key))
            elif spec.kind == "number":
                self._append(key, self._numbers(raw, key))
            elif spec.kind == "metrics":
                objects = self._objects(raw, key)
                for part in METRICS:
                    name = f"{key}.{part}"
                    self._append(name, self._numbers([value.get(part) for value in objects], name))
            else:
                self._append(key, self._vectors(raw, key, nested=spec.kind == "matrix"))
        self._line_chunks.append(np.array(self._lines, dtype=np.int64))
        self._rows, self._lines = [], []

    def _check_padding(self, key: str, cells: int) -> None:
        if cells > _MOST_PADDING:
            raise self._error(f"{key} is long, and missing in most records", 0)

    def _append(self, key: str, column: Floats) -> None:
        """Adds a chunk of a column, without the numbers outside the key's range."""
        spec = self._columns[key]
        outside = (column < spec.low) | (column > spec.high)
        rows = np.flatnonzero(outside if column.ndim == 1 else outside.any(axis=1))
        if len(rows):
            first = column[rows[0]][outside[rows[0]]]
            line = self._lines[int(rows[0])]
            self._strays.append(Stray(line, key, float(np.ravel(first)[0]), len(rows) - 1))
            if not spec.required:
                column = np.where(outside, np.nan, column)
        self._chunks[key].append(column)

    def _objects(self, raw: list[Any], key: str) -> list[dict[str, Any]]:
        for row, value in enumerate(raw):
            if value is not None and not isinstance(value, dict):
                raise self._error(f"{key}={shown(value)} is not an object", row)
        return [value or {} for value in raw]

    def _error(self, message: str, row: int) -> LogError:
        line = self._lines[row] if self._lines else 0
        return LogError("GMR-602", f"{self._label}: {message}", path=self._path, line=line)

    def _numbers(self, raw: list[Any], key: str, width: int = 1) -> Floats:
        if not set(map(type, raw)) <= _NUMBERS:
            i = next(i for i, value in enumerate(raw) if type(value) not in _NUMBERS)
            raise self._error(f"{key}={shown(raw[i])} is not a number", i // width)
        try:
            column = np.array(raw, dtype=np.float64)
        except OverflowError:
            column = np.array([_as_float(value) for value in raw])
        infinite = np.flatnonzero(np.isinf(column))
        if len(infinite):
            raise self._error(f"{key} is too large for a double", int(infinite[0]) // width)
        return column

    def _text(self, raw: list[Any], key: str) -> Ints:
        if not set(map(type, raw)) <= _TEXTS:
            i = next(i for i, value in enumerate(raw) if type(value) not in _TEXTS)
            raise self._error(f"{key}={shown(raw[i])} is not a string", i)
        index = self._index[key]
        return np.array([index.setdefault(value, len(index) - 1) for value in raw], dtype=np.int64)

    def _vectors(self, raw: list[Any], key: str, *, nested: bool) -> Floats:
        vectors: list[list[Any]] = []
        for row, value in enumerate(raw):
            if nested and isinstance(value, list):
                if not all(isinstance(line, list) and len(line) == len(value) for line in value):
                    raise self._error(f"{key}={shown(value)} is not a square matrix", row)
                value = [entry for line in value for entry in line]
            if value is not None and not isinstance(value, list):
                raise self._error(f"{key}={shown(value)} is not a list", row)
            vectors.append(value or [])
        width = max(map(len, vectors))
        self._check_padding(key, len(vectors) * width - sum(map(len, vectors)))
        for row, vector in enumerate(vectors):
            if len(vector) not in (0, width):
                raise self._error(f"{key} has {len(vector)} entries, others have {width}", row)
        flat = [entry for vector in vectors for entry in (vector or [None] * width)]
        return self._numbers(flat, key, max(width, 1)).reshape(len(raw), width)


def _as_float(value: float | None) -> float:
    if value is None:
        return math.nan
    return math.inf if isinstance(value, int) and abs(value) >= 2**1000 else float(value)
