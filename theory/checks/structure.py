"""Is the log consistent with itself? Structure: numbers, order, matching, clocks, counts.

Every function takes a `Frame` and returns findings of group ``log``. They are laws of the schema
(``docs/run-log.md``), not of the theory: a log that breaks one was not written by the method, or was
changed afterwards, and no bound checked on it means anything.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from theory.frame import Bools, Floats, Frame, Ints, gather, rows_of
from theory.judge import Place, law
from theory.precision import CLOCK
from theory.verdict import Finding, Verdict, undetermined


def structure(frame: Frame) -> Iterator[Finding]:
    """All structural laws."""
    yield complete(frame)
    yield windows(frame)
    yield dispatch_order(frame)
    yield clients_known(frame)
    yield matched(frame)
    yield applied_once(frame)
    yield one_in_flight(frame)
    yield staleness(frame)
    yield densities(frame)
    yield restorations(frame)
    yield mean_density(frame)
    yield clock(frame)
    yield causality(frame)
    yield counts(frame)
    yield uploaded_bytes(frame)
    yield downloaded_bytes(frame)


def place_of(frame: Frame, table: str) -> Place:
    """Witness columns of a table."""
    t = frame.log[table]
    none = np.zeros(0)
    columns = [t.columns.get(key, none) for key in ("window", "client", "dispatch")]
    if table == "dispatch":
        columns[0] = t["version"]
    return Place(t.line, *columns)


def complete(frame: Frame) -> Finding:
    """The log has its ``end`` record, and the counts there are right."""
    log, title = frame.log, "the log is whole"
    if not log.ended:
        cut = "its last line is cut" if log.torn else "it has no `end` record"
        return undetermined("complete", "log", title, f"the run was stopped: {cut}")
    end = log["end"]
    logged, counted = end["windows"], np.array([float(frame.windows)])
    rejected = end["rejected"]
    bad = (logged != counted) & ~np.isnan(logged)
    bad_rejected = (rejected != len(log["rejected"])) & ~np.isnan(rejected)
    if bad_rejected.any() and not bad.any():
        logged, counted, bad = rejected, np.array([float(len(log["rejected"]))]), bad_rejected
    return law(
        "complete", title, bad, place_of(frame, "end"), lhs=logged, rhs=counted, detail="records counted"
    )


def windows(frame: Frame) -> Finding:
    """Windows are numbered 0, 1, 2, ..."""
    expected = np.arange(frame.windows, dtype=np.float64)
    return law(
        "windows", "windows are consecutive", frame.window_number != expected, place_of(frame, "window"),
        lhs=frame.window_number, rhs=expected,
    )  # fmt: skip


def dispatch_order(frame: Frame) -> Finding:
    """Dispatches are numbered 0, 1, 2, ... and their versions never fall."""
    table = frame.log["dispatch"]
    expected = np.arange(len(table), dtype=np.float64)
    falls = np.concatenate([[False], np.diff(table["version"]) < 0])
    return law(
        "dispatch_order", "dispatches are consecutive", (table["dispatch"] != expected) | falls,
        place_of(frame, "dispatch"), lhs=table["dispatch"], rhs=expected,
    )  # fmt: skip


def clients_known(frame: Frame) -> Finding:
    """Client numbers are 0 .. N-1."""
    table = frame.log["dispatch"]
    client = table["client"]
    bad = (client < 0) | (client >= frame.log.clients) | (client != np.floor(client))
    return law("clients", "clients are 0 .. N-1", bad, place_of(frame, "dispatch"), lhs=client)


def matched(frame: Frame) -> Finding:
    """Every arrival answers a dispatch of the same client, version and density."""
    table = frame.log["arrival"]
    bad = frame.arrival_dispatch < 0
    lhs = np.where(bad, table["dispatch"], np.nan)
    rhs = np.full(len(table), np.nan)
    for key in ("client", "version", "density"):
        own, sent = table[key], frame.sent(key)
        differs = (own != sent) & ~np.isnan(own) & ~bad
        lhs, rhs = np.where(differs, own, lhs), np.where(differs, sent, rhs)
        bad |= differs
    return law(
        "matched",
        "every arrival answers its dispatch (client, version, density)",
        bad,
        place_of(frame, "arrival"),
        lhs=lhs,
        rhs=rhs,
        detail="arrival against dispatch",
    )


def applied_once(frame: Frame) -> Finding:
    """No dispatch is answered twice."""
    number = frame.log["arrival"]["dispatch"]
    first = rows_of(number, number)
    return law(
        "applied_once", "each dispatch is applied at most once", first != np.arange(len(number)),
        place_of(frame, "arrival"), lhs=number,
    )  # fmt: skip


def one_in_flight(frame: Frame) -> Finding:
    """No sub-model is answered after the client was sent the next one (one that never is was lost).

    After an answer that was merged the next one leaves with a later version; after a refused one perhaps not.
    """
    sent, got, refused = frame.log["dispatch"], frame.log["arrival"], frame.log["rejected"]
    answered = np.full(len(sent), np.inf)
    for table, least in ((refused, 0), (got, 1)):
        rows = rows_of(sent["dispatch"], table["dispatch"])
        known = rows >= 0
        answered[rows[known]] = table["window"][known] + least
    order = np.lexsort((sent["dispatch"], sent["client"]))
    same = np.concatenate([[False], np.diff(sent["client"][order]) == 0])
    before = np.concatenate([[-np.inf], answered[order][:-1]])
    bad = np.zeros(len(sent), dtype=bool)
    bad[order] = same & np.isfinite(before) & (before > sent["version"][order])
    return law(
        "one_in_flight", "a client has one sub-model at a time", bad, place_of(frame, "dispatch"),
        lhs=sent["version"], detail="sent before the previous one was answered",
    )  # fmt: skip


def staleness(frame: Frame) -> Finding:
    """tau = t - s >= 0, with s of the dispatch itself."""
    table = frame.log["arrival"]
    version = np.where(frame.arrival_dispatch >= 0, frame.sent("version"), table["version"])
    expected = table["window"] - version
    bad = (table["staleness"] != expected) | (expected < 0)
    return law(
        "staleness_count", "staleness is window minus version", bad, place_of(frame, "arrival"),
        lhs=table["staleness"], rhs=expected,
    )  # fmt: skip


def densities(frame: Frame) -> Finding:
    """Densities lie in (0, 1] and never fall, from the header's on."""
    table = frame.log["dispatch"]
    density, client = table["density"], table["client"]
    order = np.lexsort((table["dispatch"], client))
    first = np.concatenate([[True], np.diff(client[order]) != 0])
    start = frame.header_density(client[order])
    before = np.where(first, start, np.concatenate([[np.nan], density[order][:-1]]))
    lower = np.zeros(len(table))
    lower[order] = np.where(np.isnan(before), 0.0, before)
    bad = (density < lower) | (density <= 0) | (density > 1)
    return law(
        "density_order", "a client's density is in (0, 1] and never falls", bad, place_of(frame, "dispatch"),
        lhs=density, rhs=lower,
    )  # fmt: skip


def restorations(frame: Frame) -> Finding:
    """Each dispatch has the density that the header and the restorations before it give the client."""
    title = "densities follow the restorations"
    table, raised = frame.log["dispatch"], frame.log["restoration"]
    if not frame.knows_densities:
        return undetermined("restorations", "log", title, "densities are not in the header")
    expected = frame.header_density(table["client"])
    events = raised.take(~np.isnan(raised["client"]) & ~np.isnan(raised["after"]))
    client = np.concatenate([events["client"], table["client"]])
    when = np.concatenate([events["window"], table["version"]])
    is_dispatch = np.arange(len(client)) >= len(events)
    order = np.lexsort((is_dispatch, when, client))
    latest = np.maximum.accumulate(np.where(is_dispatch[order], -1, np.arange(len(order))))
    event = np.full(len(client), -1)
    event[order] = np.where(latest >= 0, order[latest], -1)
    last = event[is_dispatch]
    own = (last >= 0) & (client[last] == table["client"])
    expected = np.where(own, gather(events["after"], np.where(own, last, -1)), expected)
    return law(
        "restorations", title, table["density"] != expected, place_of(frame, "dispatch"),
        lhs=table["density"], rhs=expected,
    )  # fmt: skip


def mean_density(frame: Frame) -> Finding:
    """A window's mean density is that of the header and the restorations up to it."""
    title = "the mean density follows the restorations"
    window, raised = frame.log["window"], frame.log["restoration"]
    if not (frame.knows_densities and window.logged("mean_density")):
        problem = "densities or mean_density are not logged, or they were measured"
        return undetermined("mean_density", "log", title, problem)
    events = raised.take(
        ~np.isnan(raised["client"]) & ~np.isnan(raised["after"]) & ~np.isnan(raised["before"])
    )
    order = np.argsort(events["window"], kind="stable")
    gains = np.concatenate([[0.0], np.cumsum((events["after"] - events["before"])[order])])
    at = np.searchsorted(events["window"][order], window["window"], side="right")
    total = frame.header_density(np.arange(frame.log.clients, dtype=np.float64)).sum()
    expected = (total + gains[at]) / frame.log.clients
    return law(
        "mean_density", title, ~close(window["mean_density"], expected), place_of(frame, "window"),
        lhs=window["mean_density"], rhs=expected,
    )  # fmt: skip


def clock(frame: Frame) -> Finding:
    """Windows start, close and end in order; dispatch times never fall."""
    title, table = "virtual time never runs backwards", frame.log["window"]
    sent = frame.log["dispatch"]["time"]
    if not table.logged("close"):
        return undetermined("clock", "log", title, "close is not logged")
    start, close, end = (
        np.where(np.isnan(table[k]), table["close"], table[k]) for k in ("start", "close", "end")
    )
    previous = np.concatenate([[-np.inf], end[:-1]])
    early = below(start, previous)
    pause = frame.log.config("aggregation_seconds")
    bad = early | below(close, start) | below(end, close)
    if pause is not None:
        bad |= np.abs(end - close - pause) > CLOCK * np.maximum(end, 1.0)
    finding = law(
        "clock", title, bad, place_of(frame, "window"), lhs=start, rhs=np.where(early, previous, close)
    )
    if finding.verdict is Verdict.HOLDS and len(sent) and not np.isnan(sent).any():
        falls = np.concatenate([[False], below(sent[1:], sent[:-1])])
        return law("clock", title, falls, place_of(frame, "dispatch"), lhs=sent)
    return finding


def causality(frame: Frame) -> Finding:
    """An upload leaves after its dispatch and is merged after it arrived."""
    title, table = "uploads are merged after they arrive", frame.log["arrival"]
    when, sent = table["time"], frame.sent("time")
    close = gather(frame.log["window"]["close"], frame.arrival_window)
    known = ~np.isnan(when) & ~np.isnan(sent) & ~np.isnan(close)
    late = below(close, when)
    return law(
        "causality", title, late | below(when, sent), place_of(frame, "arrival"), applies=known, lhs=when,
        rhs=np.where(late, close, sent), detail="arrival time against the window's close or the dispatch",
        reason="time and close are not logged",
    )  # fmt: skip


def counts(frame: Frame) -> Finding:
    """|A_t| is the number of arrival records of the window."""
    title, table = "each window has its arrivals", frame.log["window"]
    orphan = frame.arrival_window < 0
    if orphan.any():
        place = place_of(frame, "arrival")
        cut = not frame.log.ended
        applies = ~orphan | (not cut) | (frame.log["arrival"]["window"] < frame.windows)
        finding = law("counts", title, orphan, place, applies=applies, detail="no such window")
        if finding.verdict is Verdict.VIOLATED:
            return finding
    found = frame.per_window(np.ones(len(orphan)))
    return law(
        "counts",
        title,
        table["arrivals"] != found,
        place_of(frame, "window"),
        lhs=table["arrivals"],
        rhs=found,
    )


def uploaded_bytes(frame: Frame) -> Finding:
    """A window's uploaded bytes are those of its arrivals, and of uploads that were refused."""
    arrival, refused = frame.log["arrival"], rows_of(frame.window_number, frame.log["rejected"]["window"])
    more = np.zeros(frame.windows, dtype=bool)
    more[refused[refused >= 0]] = True
    return _bytes(frame, "bytes_up", arrival["bytes_up"], frame.arrival_window, more)


def downloaded_bytes(frame: Frame) -> Finding:
    """A window's downloaded bytes are those of the sub-models of its version."""
    sent = frame.log["dispatch"]
    return _bytes(frame, "bytes_down", sent["bytes_down"], rows_of(frame.window_number, sent["version"]))


def _bytes(frame: Frame, key: str, parts: Floats, rows: Ints, more: Bools | None = None) -> Finding:
    """`more`: windows whose sum may exceed that of the logged parts."""
    title, table = f"{key} of a window is the sum of its parts", frame.log["window"]
    if not table.logged(key) or np.isnan(parts).any():
        return undetermined(key, "log", title, f"{key} is not logged")
    inside = rows >= 0
    found: Floats = np.bincount(rows[inside], weights=parts[inside], minlength=frame.windows) * 1.0
    bad = ~close(table[key], found)
    if more is not None:
        bad &= ~more | below(table[key], found)
    return law(key, title, bad, place_of(frame, "window"), lhs=table[key], rhs=found)


def close(a: Floats, b: Floats) -> Bools:
    """Whether two clocks, byte counts or rates agree within their rounding."""
    return np.asarray(np.abs(a - b) <= CLOCK * np.maximum(np.abs(a), np.abs(b)))


def below(a: Floats, b: Floats) -> Bools:
    """a < b by more than a clock's rounding."""
    return np.asarray((a < b) & ~close(a, b))
