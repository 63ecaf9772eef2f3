"""Is the log consistent with itself? Echoes: what one record says and others say again.

Counts of dispatches in flight, rankings, times, sums of bytes, and the model that is evaluated and shipped.
As in `theory.checks.structure`, these are laws of the schema (``docs/run-log.md``).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from theory.checks.structure import below, close, place_of
from theory.frame import Floats, Frame, gather, rows_of
from theory.judge import Place, law
from theory.verdict import Finding, undetermined


def echoes(frame: Frame) -> Iterator[Finding]:
    """All laws of this module."""
    yield in_flight(frame)
    yield one_ranking(frame)
    yield stamps(frame)
    yield server_bytes(frame)
    yield evaluated_bytes(frame)
    yield candidates(frame)
    yield evaluated_metrics(frame)


def in_flight(frame: Frame) -> Finding:
    """Dispatches still out: at least those answered later, at most one a client that was not answered.

    A sub-model that was lost is in no record, hence no equality. A real client's is not counted while it is
    overdue, though it may be answered in the end.
    """
    title, table, sent = "dispatches in flight fit those answered", frame.log["window"], frame.log["dispatch"]
    answered = np.full(len(sent), np.inf)
    known = frame.arrival_dispatch >= 0
    answered[frame.arrival_dispatch[known]] = frame.log["arrival"]["window"][known]
    order = np.lexsort((sent["dispatch"], sent["client"]))
    same = np.diff(sent["client"][order]) == 0
    replaced = np.full(len(sent), np.inf)
    replaced[order[:-1][same]] = sent["version"][order[1:][same]]
    certain = np.isfinite(answered) & (not frame.log.is_live)
    least = _open_at(table["window"], sent["version"][certain], answered[certain])
    most = _open_at(table["window"], sent["version"], np.minimum(answered, replaced))
    logged = table["in_flight"]
    return law(
        "in_flight", title, (logged < least) | (logged > most), place_of(frame, "window"),
        applies=~np.isnan(logged), lhs=logged, rhs=np.where(logged < least, least, most),
        reason="in_flight is not logged",
    )  # fmt: skip


def _open_at(window: Floats, start: Floats, stop: Floats) -> Floats:
    """How many of the spans ``start <= t < stop`` each window t is in."""
    begun = np.searchsorted(np.sort(start), window, side="right")
    over = np.searchsorted(np.sort(np.maximum(start, stop)), window, side="right")
    return np.asarray(begun - over, dtype=np.float64)


def one_ranking(frame: Frame) -> Finding:
    """All sub-models between two rebuilds of the masks are cut from one ranking."""
    title, table, interval = "one ranking an interval", frame.log["dispatch"], frame.log.config("interval")
    rebuilt = frame.log.config("mask_interval") or interval
    code = table.codes["ranking"].astype(np.float64)
    if interval is None or not np.isnan(table["ranking_version"]).all():
        return undetermined("one_ranking", "log", title, "interval is not logged, or rankings are dated")
    spans = np.floor(table["version"] / interval) + np.floor(table["version"] / rebuilt)
    span = np.where(code < 0, np.nan, spans)
    first = rows_of(span, span)
    return law(
        "one_ranking", title, gather(code, first) != code, place_of(frame, "dispatch"),
        applies=(code >= 0) & (first >= 0), lhs=table["dispatch"], rhs=gather(table["dispatch"], first),
        detail="another ranking than an earlier dispatch of the interval", reason="rankings are not logged",
    )  # fmt: skip


def stamps(frame: Frame) -> Finding:
    """What happens after window t bears the time of its end; dispatches leave between two ends."""
    title, lines, windows, sides = "records bear the time of their window", [], [], []
    for kind in ("dispatch", "validation", "restoration", "evaluation"):
        table = frame.log[kind]
        merged = table["version" if kind == "dispatch" else "window"]
        least = _time_after(frame, merged)
        most = _end_of(frame, merged) if kind == "dispatch" else least
        lines.append(table.line)
        windows.append(merged)
        sides.append((table["time"], least, most))
    when, least, most = (np.concatenate(part) for part in zip(*sides, strict=True))
    window = np.concatenate(windows)
    unknown = (rows_of(frame.window_number, window - 1) < 0) & (window != 0) & (frame.windows > 0)
    early = below(when, least)
    known = unknown | (~np.isnan(when) & ~(np.isnan(least) & np.isnan(most)))
    return law(
        "stamps", title, unknown | early | below(most, when), Place(np.concatenate(lines), window),
        applies=known, lhs=when, rhs=np.where(early, least, most),
        detail="time against its window's (or no such window)", reason="times are not logged",
    )  # fmt: skip


def _end_of(frame: Frame, window: Floats) -> Floats:
    """The end of each window; nan where unknown."""
    return gather(frame.window_end, rows_of(frame.window_number, window))


def _time_after(frame: Frame, merged: Floats) -> Floats:
    """The end of window ``merged - 1``; the first start where nothing is merged yet, nan where unknown."""
    start = frame.log["window"]["start"]
    return np.where(merged == 0, start[0] if len(start) else np.nan, _end_of(frame, merged - 1))


def server_bytes(frame: Frame) -> Finding:
    """The server's uplink carries each sub-model, or under incremental splitting each increment once.

    With decoupled downloads something between: what is sent to one client alone is not told apart. Real
    clients fetch from a store, where what an earlier window put may be still: no more than they received.
    """
    title, log = "the server's bytes are its sub-models'", frame.log
    table, sent = log["window"], log["dispatch"]
    splits, rows = log.config("incremental_splitting"), rows_of(frame.window_number, sent["version"])
    if splits and log.config("download") == "decoupled":
        splits = None
    if not table.logged("server_bytes_down") or not sent.logged("bytes_down"):
        return undetermined("server_bytes", "log", title, "server_bytes_down or bytes_down is not logged")
    inside = rows >= 0
    summed = np.bincount(rows[inside], weights=sent["bytes_down"][inside], minlength=frame.windows) * 1.0
    largest = np.zeros(frame.windows)
    np.maximum.at(largest, rows[inside], sent["bytes_down"][inside])
    logged = table["server_bytes_down"]
    least, most = summed if splits is False else largest, largest if splits else summed
    if log.is_live:
        least, most = np.zeros(frame.windows), summed
    expected = np.clip(logged, least, most)
    return law(
        "server_bytes", title, ~close(logged, expected), place_of(frame, "window"), lhs=logged, rhs=expected
    )


def evaluated_bytes(frame: Frame) -> Finding:
    """An evaluation's bytes are the sums over the windows merged so far."""
    title, table, window = "an evaluation's bytes add up", frame.log["evaluation"], frame.log["window"]
    rows = np.where(frame.consecutive & (table["window"] <= frame.windows), table["window"], -1)
    bad, known = np.zeros(len(table), dtype=bool), np.zeros(len(table), dtype=bool)
    lhs, rhs = np.full(len(table), np.nan), np.full(len(table), np.nan)
    for key in ("bytes_up", "bytes_down"):
        expected = gather(np.concatenate([[0.0], np.cumsum(window[key])]), rows.astype(np.int64))
        seen = ~np.isnan(table[key]) & ~np.isnan(expected)
        differs = seen & ~close(table[key], expected)
        lhs, rhs = np.where(differs, table[key], lhs), np.where(differs, expected, rhs)
        bad, known = bad | differs, known | seen
    return law(
        "evaluated_bytes", title, bad, place_of(frame, "evaluation"), applies=known, lhs=lhs, rhs=rhs,
        reason="no evaluations, or bytes are not logged",
    )  # fmt: skip


def candidates(frame: Frame) -> Finding:
    """An evaluation names the model chosen by the options or the last validation; the last is shipped."""
    title, log = "what is shipped was chosen before", frame.log
    validated, evaluated, end = log["validation"], log["evaluation"], log["end"]
    line = np.concatenate([evaluated.line, end.line])
    chosen = np.concatenate([evaluated.text("candidate"), end.text("shipped")])
    fixed = {"global": "global", "coverage_scaled": "scaled"}.get(log.config("evaluate") or "")
    earlier = np.concatenate([[fixed], validated.text("candidate")])
    expected = earlier[np.searchsorted(validated.line, line)]
    if len(evaluated) and len(end):
        expected[-1] = evaluated.text("candidate")[-1]
    known = np.array(
        [a is not None and b is not None for a, b in zip(chosen, expected, strict=True)], dtype=bool
    )
    return law(
        "candidates", title, np.asarray(chosen != expected, dtype=bool), Place(line), applies=known,
        reason="no evaluations, or nothing chose their model",
    )  # fmt: skip


def evaluated_metrics(frame: Frame) -> Finding:
    """An evaluation's accuracy and loss are those of the model that it names."""
    title, table = "an evaluation reports the model it names", frame.log["evaluation"]
    named = table.text("candidate")
    bad, known = np.zeros(len(table), dtype=bool), np.zeros(len(table), dtype=bool)
    lhs, rhs = np.full(len(table), np.nan), np.full(len(table), np.nan)
    for key in ("accuracy", "loss"):
        pair = (table[f"global.{key}"], table[f"scaled.{key}"])
        of = np.where(named == "global", pair[0], np.where(named == "scaled", pair[1], np.nan))
        differs = (table[key] != of) & ~(np.isnan(table[key]) | np.isnan(of))
        lhs, rhs = np.where(differs, table[key], lhs), np.where(differs, of, rhs)
        bad, known = bad | differs, known | ~np.isnan(of)
    return law(
        "evaluated_metrics", title, bad, place_of(frame, "evaluation"), applies=known, lhs=lhs, rhs=rhs,
        detail="against the same of the candidate", reason="no evaluations of a named candidate",
    )  # fmt: skip
