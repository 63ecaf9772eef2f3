"""Reads a run log (JSONL, schema 1.x) into numpy columns.

Reading fails with `LogError` on anything that is not the documented format. One thing is forgiven: a
last line without its newline that does not parse, as a run leaves behind when it is cut while
writing; it sets `RunLog.torn`. What is inconsistent but well-formed is the checker's business.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theory.columns import Builder, Table
from theory.errors import LogError, plain, shown
from theory.header import checked_header
from theory.schema import PLUGIN, RECORDS, TERM_ARRIVAL, WRITTEN, Key, never_null


@dataclass(frozen=True)
class RunLog:
    """One run.

    Attributes:
        path: file that was read.
        header: the header record, as parsed.
        tables: record type -> `Table`; also ``term_arrivals``, the objects inside ``terms`` records.
        torn: the last line was cut.
        ended: the log has its ``end`` record.
    """

    path: str
    header: dict[str, Any]
    tables: dict[str, Table]
    torn: bool
    ended: bool

    def __getitem__(self, kind: str) -> Table:
        return self.tables[kind]

    @property
    def clients(self) -> int:
        """N."""
        return int(self.header["clients"])

    @property
    def is_plugins(self) -> bool:
        """Whether the plugin wrote it, which writes every key of ``docs/run-log.md``."""
        return bool(self.header.get("method") == PLUGIN)

    @property
    def is_live(self) -> bool:
        """Whether its clients were real: they come and go, and its clock is this world's."""
        return self.is_plugins and self.fedml("training_type") in ("cross_device", "cross_silo")

    @property
    def name(self) -> str:
        """The run's name, fit for a terminal or a page; '' where the log does not say."""
        return plain(self.header.get("run_name") or "")

    def config(self, key: str) -> Any:
        """The effective option `key`, or None where the log does not say."""
        return (self.header.get("config") or {}).get(key)

    def fedml(self, key: str) -> Any:
        """The host's option `key`, or None where the log does not say."""
        return (self.header.get("fedml") or {}).get(key)

    def layout(self, key: str) -> Any:
        """``size``, ``prunable``, ``dtype`` or ``layers`` of the header's layout, or None."""
        return (self.header.get("layout") or {}).get(key)

    def layers(self, kind: str | None = None) -> list[float]:
        """Sizes of the layers (those of one `kind`); none where the log does not say."""
        return [float(x["size"]) for x in self.layout("layers") or () if kind in (None, x["kind"])]

    def number(self, key: str) -> float | None:
        """The header's number `key`, or None where the log does not say."""
        value = self.header.get(key)
        return None if value is None else float(value)


def read_log(path: str | Path) -> RunLog:
    """Reads a log file, or ``run.jsonl`` in a run's directory.

    Raises:
        LogError: GMR-601 no such file; GMR-602 damaged; GMR-603 another schema.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "run.jsonl"
    if not file.is_file():
        raise LogError("GMR-601", f"no run log at {str(path)!r}", path=str(file))
    try:
        with file.open("rb") as stream:
            return parse(stream, name=str(file))
    except OSError as error:
        raise LogError("GMR-601", f"cannot be read: {error.strerror}", path=str(file)) from error


def parse(lines: Iterable[bytes], *, name: str = "<memory>") -> RunLog:
    """Parses the lines of a log, each with its newline; see `read_log`."""
    builders = {kind: Builder(keys, name, kind) for kind, keys in RECORDS.items()}
    nested = Builder({**TERM_ARRIVAL, "window": Key(required=True)}, name, "terms.arrivals")
    header: dict[str, Any] | None = None
    torn = ended = False
    written: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
    for number, record in _records(lines, name):
        if record is None:
            torn = True
            break
        kind = record.get("type")
        if header is None:
            header = checked_header(record, name)
            written = _written(header)
            continue
        if not isinstance(kind, str) or kind == "header" or ended:
            raise LogError("GMR-602", f"type={shown(kind)} has no place here", path=name, line=number)
        if kind in builders:
            if (needed := written.get(kind)) and (missing := _missing(record, *needed)):
                raise LogError("GMR-602", f"{kind}: {missing}", path=name, line=number)
            builders[kind].add(record, number)
        if kind == "terms":
            _add_objects(nested, record, number, name, strict=bool(written))
        ended = kind == "end"
    if header is None:
        raise LogError("GMR-602", "the log has no header", path=name)
    tables = {kind: builder.table() for kind, builder in builders.items()}
    return RunLog(name, header, {**tables, "term_arrivals": nested.table()}, torn, ended)


def _written(header: dict[str, Any]) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """Record type -> keys that the plugin always writes, and those of them that are never null."""
    if header.get("method") != PLUGIN:
        return {}
    dtype = header["layout"]["dtype"]
    return {
        kind: (frozenset(" ".join(keys).split()), never_null(kind, dtype)) for kind, keys in WRITTEN.items()
    }


def _missing(record: dict[str, Any], keys: frozenset[str], present: frozenset[str]) -> str:
    """The first of `keys` that is absent, or of `present` that is null, in words; '' if there is none."""
    if not keys <= record.keys():
        return f"{min(keys - record.keys())} is missing"
    null = [key for key in present if record[key] is None]
    return f"{min(null)} is null" if null else ""


def _records(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields (line number, record); record None stands for a torn last line."""
    decode = json.JSONDecoder(parse_constant=_refuse_constant).decode
    torn = 0
    for number, line in enumerate(lines, start=1):
        if torn:
            raise LogError("GMR-602", "not valid JSON", path=name, line=torn)
        try:
            record = decode(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if line.endswith(b"\n"):
                raise LogError("GMR-602", f"not valid JSON ({error})", path=name, line=number) from error
            torn = number
            continue
        if not isinstance(record, dict):
            raise LogError("GMR-602", "not a JSON object", path=name, line=number)
        yield number, record
    if torn:
        yield torn, None


def _refuse_constant(token: str) -> float:
    raise ValueError(f"{token} is not JSON")


def _add_objects(nested: Builder, record: dict[str, Any], line: int, name: str, *, strict: bool) -> None:
    """Adds the arrivals of a terms record; `strict` wants every key of each."""
    entries = record.get("arrivals")
    if entries is None:
        return
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise LogError("GMR-602", "terms: arrivals is not a list of objects", path=name, line=line)
    complete = set(TERM_ARRIVAL) if strict else set()
    for entry in entries:
        if absent := complete - entry.keys():
            message = f"terms: {min(absent)} is missing in arrivals"
            raise LogError("GMR-602", message, path=name, line=line)
        nested.add({**entry, "window": record.get("window")}, line)
