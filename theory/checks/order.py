"""Is the log consistent with itself? Order: which records are due, once and where, and how many can be out.

As in `theory.checks.structure`, these are laws of the schema (``docs/run-log.md``). Where a run was cut, what
follows its last window may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from theory.checks.conditions import ANALYSED
from theory.checks.structure import place_of
from theory.frame import Bools, Floats, Frame, gather, rows_of
from theory.judge import Place, law
from theory.verdict import Finding, Verdict, undetermined

#: Options that decide whether a merge is decomposed into ``terms``.
_MERGE = ("aggregation", "update_scope", "mixing", "server_step")
#: Record type -> column that says which window it belongs to, and its place after the window before (0 to 9).
_STAGES = {
    "dispatch": ("version", -1), "rejected": ("window", 1), "arrival": ("window", 1),
    "window": ("window", 2), "probe": ("window", 3), "terms": ("window", 4),
    "evaluation": ("window", -5), "validation": ("window", -4), "restoration": ("window", -3),
}  # fmt: skip
#: Refusals that answer a dispatch of the very client, and the one of another client's.
_OWN, _OTHERS = ("GMR-402", "GMR-403", "GMR-404", "GMR-407", "GMR-408"), "GMR-406"
_CODES = ("GMR-401", *_OWN, "GMR-405", _OTHERS)


def order(frame: Frame) -> Iterator[Finding]:
    """All laws of this module."""
    yield due_records(frame)
    yield file_order(frame)
    yield capacity(frame)
    yield refusals(frame)
    yield shares_logged(frame)


def due_records(frame: Frame) -> Finding:
    """Probes, terms, validations and evaluations are there when the options promise them, and once."""
    title, lines, windows = "records are written when they are due, once", [], []
    promised = {kind: due for kind, due in _due(frame).items() if due is not None}
    if not frame.consecutive or not promised:
        return undetermined("due_records", "log", title, "the header does not say when records are due")
    last = frame.windows - 1
    for kind, due in promised.items():
        table, shift = frame.log[kind], 1.0 if kind in ("evaluation", "validation") else 0.0
        logged = table["window"] - shift
        repeated = rows_of(logged, logged) != np.arange(len(logged))
        stray = repeated | (rows_of(np.flatnonzero(due) * 1.0, logged) < 0)
        owed = due & (rows_of(logged, frame.window_number) < 0)
        owed[last:] &= frame.log.ended
        lines += [table.line[stray], frame.log["window"].line[owed]]
        windows += [logged[stray], frame.window_number[owed]]
    place = Place(np.concatenate(lines), np.concatenate(windows))
    if not len(place.line):
        every = np.zeros(sum(int(due.sum()) for due in promised.values()) + 1, dtype=bool)
        return law("due_records", title, every, place)
    kinds = [kind for kind in promised for _ in range(2)]
    what = next(kind for kind, part in zip(kinds, lines, strict=True) if len(part))
    return law("due_records", title, np.ones(len(place.line), dtype=bool), place, detail=f"{what} records")


def _due(frame: Frame) -> dict[str, Bools | None]:
    """Windows after which a record of each type is due, ``[W]``; None where the header does not say."""
    config, t = frame.log.config, np.arange(frame.windows)
    final = t == frame.windows - 1
    interval, often = config("interval"), frame.log.fedml("frequency_of_the_test")
    every = config("probe_interval") or interval
    probe = None
    if config("probe") is not None and every is not None:
        probe = (t % every == 0) & config("probe")
    held = _held_out(frame)
    validation = None
    if interval is not None and held is not None:
        validation = ((t + 1) % interval == 0) & ~(final & frame.log.ended) & held
    return {
        "probe": probe,
        "terms": None if probe is None else _decomposed(frame, probe),
        "evaluation": None if often is None else _tested(frame, often) | final,
        "validation": validation,
    }


def _tested(frame: Frame, often: int) -> Bools:
    """Windows after which the model is evaluated, whatever else happens, ``[W]``."""
    every = frame.log.config("evaluation_seconds")
    if every is None:
        return np.asarray(np.arange(frame.windows) % often == 0)
    passed = np.floor_divide(frame.log["window"]["end"], every)
    return np.asarray(np.diff(passed, prepend=0.0) > 0)


def _decomposed(frame: Frame, probed: Bools) -> Bools | None:
    """Probed windows whose merge the plugin decomposes: all steps watched, and made at the window's rate."""
    log, config = frame.log, frame.log.config
    plain = all(config(key) in ANALYSED[key] for key in _MERGE)
    if not plain or frame.hooked:
        return np.zeros_like(probed)
    if not log.is_plugins or not _unhooked(frame) or log.number("local_steps") is None:
        return None
    rate = log["window"]["learning_rate"]
    dispatched = gather(rate, rows_of(frame.window_number, log["arrival"]["version"]))
    same = (frame.least(dispatched) == rate) & (frame.most(dispatched) == rate)
    return np.asarray(probed & same & (log["window"]["arrivals"] > 0))


def _unhooked(frame: Frame) -> bool:
    """Whether no hooks of the host were active: the header says so, or there are terms, which need that."""
    said = frame.log.fedml("aggregation_hooks")
    return said is False or (said is None and len(frame.log["terms"]) > 0)


def _held_out(frame: Frame) -> bool | None:
    """Whether any client holds out ``int(fraction * n)`` > 0 of its n samples; None where that is open."""
    fraction, trained = frame.log.config("validation_fraction"), frame.log.header.get("client_samples")
    if fraction == 0:
        return False
    if fraction is None or trained is None:
        return None
    for left in trained:
        near = range(int(left / (1 - fraction)) - 2, int(left / (1 - fraction)) + 3)
        whole = [n for n in near if n - int(fraction * n) == left]
        if whole and all(int(fraction * n) > 0 for n in whole):
            return True
    return None


def file_order(frame: Frame) -> Finding:
    """Dispatches, refusals and uploads, the window, its probe, evaluation, validation, restorations."""
    title = "records stand in the order of what happened"
    if not frame.log.is_plugins:
        return undetermined("file_order", "log", title, "another framework's log: any order")
    if frame.log.is_live:
        return undetermined("file_order", "log", title, "real clients: sub-models leave at any time")
    tables = {kind: frame.log[kind] for kind in _STAGES}
    line = np.concatenate([table.line for table in tables.values()])
    stage = np.concatenate([10 * tables[kind][key] + place for kind, (key, place) in _STAGES.items()])
    window = np.concatenate([tables[kind][key] for kind, (key, _) in _STAGES.items()])
    rows = np.argsort(line, kind="stable")
    line, stage, window = line[rows], stage[rows], window[rows]
    early = np.concatenate([[False], stage[1:] < np.maximum.accumulate(stage)[:-1]])[: len(stage)]
    shuffled = [
        table.line[1:][(np.diff(table[key]) == 0) & _falls(table["client"], table["dispatch"])]
        for table, key in ((tables["arrival"], "window"), (tables["dispatch"], "version"))
    ]
    early |= np.isin(line, np.concatenate(shuffled))
    return law("file_order", title, early, Place(line, window), detail="after records that follow it")


def _falls(client: Floats, dispatch: Floats) -> Bools:
    """Neighbours that are not increasing in (client, dispatch)."""
    return np.asarray((np.diff(client) < 0) | ((np.diff(client) == 0) & (np.diff(dispatch) <= 0)))


def capacity(frame: Frame) -> Finding:
    """At most ``client_num_per_round`` sub-models are out; the plugin always sends as many.

    Those of real clients whose deadline passes, or whose answer is refused, count no more, and are followed
    by others before the window closes: there, those that are out when it does are counted.
    """
    title, table = "as many sub-models are out as may be", frame.log["window"]
    most, sent = frame.log.fedml("client_num_per_round"), frame.log["dispatch"]["version"]
    if most is None or not frame.consecutive or not table.logged("in_flight"):
        reason = "client_num_per_round or in_flight is not logged"
        return undetermined("capacity", "log", title, reason)
    version = sent[(sent >= 0) & (sent <= frame.windows)].astype(np.int64)
    left: Floats = np.concatenate([[0.0], table["in_flight"]])
    out = left + np.bincount(version, minlength=frame.windows + 1) * 1.0
    if frame.log.is_live:
        out = left
    bad = out > most
    if frame.log.is_plugins and not frame.log.is_live:
        bad[:-1] |= out[:-1] != most
    line = np.concatenate([table.line[:1], table.line])
    place = Place(line, np.arange(frame.windows + 1.0))
    return law("capacity", title, bad, place, lhs=out, rhs=np.full(len(out), float(most)))


def refusals(frame: Frame) -> Finding:
    """A refused upload has a window of the run and a known code, which agrees with what it claimed."""
    title, table = "refusals fit the dispatches", frame.log["rejected"]
    if not frame.log.is_plugins:
        return undetermined("refusals", "log", title, "another framework's log: its own codes")
    if len(table) == 0:
        return Finding("refusals", "log", title, Verdict.HOLDS, reason="nothing was refused")
    window, code = table["window"], table.text("code")
    rows = rows_of(frame.log["dispatch"]["dispatch"], table["dispatch"])
    sent = {key: gather(frame.log["dispatch"][key], rows) for key in ("client", "version")}
    bad = (window != np.floor(window)) | (window >= frame.windows + (not frame.log.ended))
    unread = np.array([frame.log.is_live and str(c).startswith("GMR-7") for c in code], dtype=bool)
    bad |= ~np.isin(code, _CODES) & ~unread
    answered, foreign = np.isin(code, _OWN), np.asarray(code == _OTHERS, dtype=bool)
    bad |= (answered | foreign) & ((rows < 0) | (sent["version"] > window))
    bad |= (answered & (sent["client"] != table["client"])) | (foreign & (sent["client"] == table["client"]))
    return law(
        "refusals", title, bad, place_of(frame, "rejected"), lhs=table["client"], rhs=sent["client"],
        detail="window, code, or the client against the dispatch's",
    )  # fmt: skip


def shares_logged(frame: Frame) -> Finding:
    """The plugin logs the shares of all of a window's uploads or of none, and of all where it merges them."""
    title, table = "shares are logged for whole windows", frame.log["arrival"]
    if not frame.log.is_plugins:
        return undetermined("shares_logged", "log", title, "another framework's log: any of them")
    silent = np.isnan(table["pibar"])
    known = gather(frame.per_window(~silent * 1.0), frame.arrival_window) > 0
    plain = _unhooked(frame) and not frame.buffered
    bad = (silent & (known | plain)) | (~silent & frame.buffered)
    return law("shares_logged", title, bad, place_of(frame, "arrival"), lhs=table["pibar"])
