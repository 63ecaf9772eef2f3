"""Is the log consistent with itself? Promises: what the header announces and the records must keep.

As in `theory.checks.structure`, these are laws of the schema (``docs/run-log.md``). A law whose fields
are not logged, or whose option another framework does not have, is UNDETERMINED.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from theory.checks.structure import below, close, place_of
from theory.frame import Floats, Frame, gather, rows_of
from theory.judge import Place, law
from theory.verdict import Finding, Verdict, Witness, undetermined

#: What is compared, and its two values in the header; null is not compared.
_Pair = tuple[str, float | None, float | None]

#: Causes of the restorations of single clients by their own plateau, of the server's floor, and by schedule.
_CLIENT, _SERVER, _TIME, _GRADIENT = "client_plateau", "server_plateau", "time", "gradient"

#: Values of ``trigger``, and the causes of the restorations that each makes.
CAUSES: dict[str, tuple[str, ...]] = {
    "none": (),
    "plateau": (_CLIENT, _SERVER),
    "time": (_TIME,),
    "mixed": (_CLIENT, _SERVER, _TIME),
    "gradient": (_GRADIENT,),
}


#: Bytes of a value.
_BYTES = {"float32": 4, "float64": 8}


def promises(frame: Frame) -> Iterator[Finding]:
    """All laws of this module."""
    yield ranges(frame)
    yield layout(frame)
    yield header(frame)
    yield planned_end(frame)
    yield local_steps(frame)
    yield payload(frame)
    yield trigger(frame)
    yield restored_densities(frame)
    yield density_floor(frame)


def ranges(frame: Frame) -> Finding:
    """No count, size or squared norm is negative, and no share above 1 (`theory.schema.RECORDS`)."""
    title, tables = "numbers lie in their ranges", frame.log.tables
    strays = sorted((stray, kind) for kind, table in tables.items() for stray in table.strays)
    checks = sum(map(len, tables.values()))
    if not strays:
        return Finding("ranges", "log", title, Verdict.HOLDS, checks=checks)
    first, kind = strays[0]
    witness = Witness(line=first.line, detail=f"{kind}.{first.key} = {first.value:.9g}")
    count = sum(1 + stray.more for stray, _ in strays)
    return Finding(
        "ranges", "log", title, Verdict.VIOLATED, checks=checks, witness=witness, reason=f"{count} do not"
    )


def layout(frame: Frame) -> Finding:
    """D and D_p are the sums over the layers, and a layer's size is the product of its shape."""
    title, log = "the layout adds up", frame.log
    layers = log.layout("layers")
    if layers is None:
        return undetermined("layout", "log", title, "layout.layers is not logged")
    pairs: list[_Pair] = [
        ("layout.size against its layers", log.layout("size"), sum(log.layers())),
        ("layout.prunable against its layers", log.layout("prunable"), sum(log.layers("prunable"))),
    ]
    for i, layer in enumerate(layers):
        if layer.get("shape") is not None:
            pairs.append((f"layers[{i}] against its shape", layer["size"], prod(map(float, layer["shape"]))))
    return _told_twice("layout", title, pairs)


def header(frame: Frame) -> Finding:
    """What the header says twice, it says alike: its own keys, the method's options and the host's."""
    log = frame.log
    config = log.header.get("config") or {}
    pairs: list[_Pair] = [
        ("eta against fedml.learning_rate", log.number("eta"), log.fedml("learning_rate")),
        ("windows against fedml.comm_round", log.number("windows"), log.fedml("comm_round")),
        ("clients against fedml.client_num_in_total", log.clients, log.fedml("client_num_in_total")),
        ("seed against fedml.random_seed", log.number("seed"), log.fedml("random_seed")),
        ("model_megabytes against config", log.number("model_megabytes"), _travelling_megabytes(frame)),
    ]
    title, steps = "the header agrees with itself", config.get("local_steps")
    if steps != "epochs":  # a header's null stands for a trainer that chooses its own number
        pairs.append(("local_steps against config", log.number("local_steps"), steps))
    pairs.append(("time_budget against config", log.number("time_budget"), config.get("time_budget")))
    if one_sided := _null_on_one_side(log.header, config):
        witness = Witness(line=1, detail=one_sided)
        return Finding("header", "log", title, Verdict.VIOLATED, checks=1, witness=witness, reason="1 fails")
    return _told_twice("header", title, pairs)


def _null_on_one_side(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """A key that is null in the header or its config and a number in the other, in words; '' if none is.

    A number of local steps for whole epochs is one, but not the null of a trainer that chooses its own.
    """
    if "time_budget" in record and "time_budget" in config:
        own, told = record["time_budget"], config["time_budget"]
        if (own is None) != (told is None):
            return f"time_budget={own} against {told} in config"
    if record.get("local_steps") is not None and config.get("local_steps") == "epochs":
        return f"local_steps={record['local_steps']} against epochs in config"
    return ""


def _travelling_megabytes(frame: Frame) -> float | None:
    """S of the options, the plugin's else D times a value's bytes, as it travels: less in a narrower type."""
    told, wide = frame.log.config("model_megabytes"), _BYTES.get(frame.log.layout("dtype"))
    if told is None and frame.log.is_plugins and wide is not None:
        told = frame.log.layout("size") * wide / 1e6
    if told is None or frame.log.config("payload_dtype") not in ("bfloat16", "float16"):
        return None if told is None else float(told)
    return None if wide is None else float(told) * 2 / wide


def _told_twice(name: str, title: str, pairs: Sequence[_Pair]) -> Finding:
    """Pairs of numbers in the header that must be equal; one that is missing is not checked."""
    known = [(what, float(a), float(b)) for what, a, b in pairs if a is not None and b is not None]
    lhs, rhs = np.array([a for _, a, _ in known]), np.array([b for _, _, b in known])
    wrong = next((what for what, a, b in known if a != b), "")
    place = Place(np.ones(len(known), dtype=np.int64))
    return law(name, title, lhs != rhs, place, lhs=lhs, rhs=rhs, detail=wrong, reason="nothing is told twice")


def planned_end(frame: Frame) -> Finding:
    """The run ended where the header says: after its windows, or at the first end beyond the time budget.

    A budget that is reached ends a run at once, before the number of windows is looked at.
    """
    name, title, log, table = "planned_end", "the run ended as planned", frame.log, frame.log["end"]
    planned, ends = log.number("windows"), frame.window_end
    limit = log.number("time_budget")
    budget = np.full(len(ends), np.nan if limit is None else limit)
    spent = ~(below(ends, budget) | np.isnan(ends + budget))
    surplus = np.concatenate([[False], spent[:-1]])[: len(ends)]
    surplus |= np.arange(len(ends)) >= (np.inf if planned is None else planned)
    if surplus.any():
        place, detail = place_of(frame, "window"), "ended after the plan's time budget or number of windows"
        return law(name, title, surplus, place, lhs=ends, rhs=budget, detail=detail)
    if not log.ended or planned is None:
        return undetermined(name, "log", title, "no `end` record, or the header has no windows")
    late, full = bool(spent[-1:].any()), frame.windows == planned
    right = {"windows": full and not late, "time_budget": late, None: full or late}
    if not right.get(table.text("reason")[0], False):
        counted, wanted = np.array([float(frame.windows)]), np.array([planned])
        place, detail = place_of(frame, "end"), "windows against the header's, and not the end of `reason`"
        return law(name, title, np.array([True]), place, lhs=counted, rhs=wanted, detail=detail)
    last = ends[-1:] if len(ends) else np.zeros(1)
    return law(
        name, title, ~close(table["time"], last), place_of(frame, "end"), lhs=table["time"], rhs=last,
        applies=~np.isnan(table["time"] + last), detail="time against the last window's end",
        reason="the end's time is not logged",
    )  # fmt: skip


def local_steps(frame: Frame) -> Finding:
    """Every upload made the K steps of the header (null there stands for whole epochs: any number)."""
    title, table = "uploads made the header's local steps", frame.log["arrival"]
    promised = frame.log.number("local_steps")
    if promised is None:
        return undetermined("local_steps", "log", title, "the header promises no number of steps")
    return law(
        "local_steps", title, table["steps"] != promised, place_of(frame, "arrival"),
        applies=~np.isnan(table["steps"]), lhs=table["steps"], rhs=np.full(len(table), promised),
        reason="steps are not logged",
    )  # fmt: skip


def payload(frame: Frame) -> Finding:
    """A sub-model moves S times its density (``payload_rule`` density) or its share of all coordinates.

    Decoupled uploads and downloads are smaller, by how much the log does not tell.
    """
    title, log = "sub-models move the bytes of their payload rule", frame.log
    rule, megabytes, size = log.config("payload_rule"), log.number("model_megabytes"), log.layout("size")
    sent, came = log["dispatch"], log["arrival"]
    down = sent["density"] if rule == "density" else sent["support"] / (size or np.nan)
    if rule not in ("density", "support") or megabytes is None:
        return undetermined("payload", "log", title, "the log does not say what a sub-model moves")
    up = gather(down, frame.arrival_dispatch)
    up = np.full(len(came), np.nan) if log.config("upload") == "decoupled" else up
    down = np.full(len(sent), np.nan) if log.config("download") == "decoupled" else down
    expected = megabytes * 1e6 * np.concatenate([down, up])
    logged = np.concatenate([sent["bytes_down"], came["bytes_up"]])
    place = Place(np.concatenate([sent.line, came.line]))
    return law(
        "payload", title, ~close(logged, expected), place, applies=~np.isnan(logged + expected), lhs=logged,
        rhs=expected, reason="bytes are not logged",
    )  # fmt: skip


def trigger(frame: Frame) -> Finding:
    """Restorations have the causes that the trigger makes, and name clients that exist."""
    title, table = "restorations come from the trigger", frame.log["restoration"]
    kind = frame.log.config("trigger")
    known = {cause: i for i, cause in enumerate(table.texts["cause"])}
    allowed = np.array([-1, *(known[c] for c in CAUSES.get(kind, known) if c in known)])
    strange = ~np.isin(table.codes["cause"], allowed) | (kind == "none")
    client = table["client"]
    bad = strange | (client >= frame.log.clients) | (client != np.floor(client)) & ~np.isnan(client)
    if len(table) == 0 and kind in CAUSES:
        return Finding("trigger", "log", title, Verdict.HOLDS, reason="no restorations")
    detail = f"trigger={kind}" if kind in CAUSES else ""
    return law(
        "trigger", title, bad, place_of(frame, "restoration"), applies=np.full(len(table), kind in CAUSES),
        lhs=client, detail=detail, reason="trigger is not logged",
    )  # fmt: skip


def restored_densities(frame: Frame) -> Finding:
    """A restoration starts at its client's density, rises, and ends on the rung that the options give."""
    title, table = "restorations rise from the density before", frame.log["restoration"]
    before, after, client = table["before"], table["after"], table["client"]
    cause = table.text("cause")
    order = np.lexsort((np.arange(len(table)), client))
    again = np.diff(client[order], prepend=np.nan) == 0
    earlier = np.concatenate([[np.nan], after[order][:-1]])[: len(table)]
    expected = np.full(len(table), np.nan)
    expected[order] = np.where(again, earlier, frame.header_density(client[order]))
    expected[np.isnan(client)] = np.nan
    bad = ~(after > before) & ~np.isnan(after + before)
    bad |= (before != expected) & ~np.isnan(before + expected)
    rungs = {_SERVER: frame.log.config("density_ladder"), _TIME: frame.log.config("time_floors")}
    for name, ladder in rungs.items():
        if ladder is not None:
            numbers = np.array([rung for rung in ladder if rung is not None], dtype=np.float64)
            bad |= np.asarray(cause == name, dtype=bool) & ~np.isin(after, numbers) & ~np.isnan(after)
    single = np.isin(cause, (_CLIENT, _GRADIENT))
    bad |= single & (np.abs(after - next_density(frame, before)) > 1e-9)
    return law(
        "restored_densities", title, bad, place_of(frame, "restoration"), lhs=before, rhs=expected,
        detail="density before against the client's", reason="no restorations",
    )  # fmt: skip


def next_density(frame: Frame, density: Floats) -> Floats:
    """The density one restoration of a single client above each `density`; nan where no option says it."""
    kind, ladder = frame.log.config("density_step"), frame.log.config("density_ladder")
    increment = frame.log.config("density_increment")
    if kind == "ladder" and ladder is not None:
        rungs = np.sort(np.array([*(rung for rung in ladder if rung is not None), np.inf]))
        above = rungs[np.minimum(np.searchsorted(rungs, density, side="right"), len(rungs) - 1)]
        return np.where(np.isnan(density), np.nan, np.where(np.isinf(above), 1.0, above))
    if kind == "fixed" and increment is not None:
        return np.asarray(np.minimum(1.0, density + increment))
    if kind == "proportional" and increment is not None:
        return np.asarray(np.minimum(1.0, density + np.minimum(density, 2 * increment)))
    return np.full(len(density), np.nan)


def density_floor(frame: Frame) -> Finding:
    """minD starts at ``density_min``, never falls, and is what the last restoration left."""
    name, title = "density_floor", "the density floor follows the restorations"
    table = frame.log["window"]
    events = frame.log["restoration"]
    events = events.take(~np.isnan(events["floor"]))
    order = np.argsort(events["window"], kind="stable")
    start = frame.log.config("density_min")
    floors = np.concatenate([[np.nan if start is None else float(start)], events["floor"][order]])
    expected = floors[np.searchsorted(events["window"][order], table["window"], side="right")]
    logged = table["density_floor"]
    falls = np.concatenate([[False], np.diff(logged) < 0])[: len(logged)]
    at_check = gather(events["floor"], rows_of(events["window"], events["window"]))
    split = events.take(events["floor"] != at_check)
    if len(split):
        place = Place(split.line, split["window"], split["client"])
        everywhere = np.ones(len(split), dtype=bool)
        return law(name, title, everywhere, place, lhs=split["floor"], detail="two floors after one check")
    bad = falls | ((logged != expected) & ~np.isnan(expected))
    return law(
        "density_floor", title, bad, place_of(frame, "window"), applies=~np.isnan(logged), lhs=logged,
        rhs=expected, reason="density_floor is not logged",
    )  # fmt: skip
