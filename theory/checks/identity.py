"""Are the ``terms`` records consistent: does the identity close, and do they agree with the rest?

The Gram matrix of the seven terms makes the identity (equation 1) checkable from scalars: with
c = (1, 1, 1, 1, 1, 1, -1/gamma), ``||e||^2 = c' Gram c``, and the probe gives ``||e||^2`` independently.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from theory.bounds import IDENTITY
from theory.checks.structure import place_of
from theory.checks.values import differ
from theory.frame import Bools, Floats, Frame, Ints, gather, rows_of
from theory.intervals import Interval
from theory.judge import Place, law
from theory.numeric import evaluate
from theory.schema import TERMS
from theory.verdict import Finding, undetermined

#: Terms whose errors add up in the residual of the identity.
_ADDED = 8.0
#: How many times the squared gradient that the log accounts for (`accounted_sq`) a ``scale_sq`` counts in
#: tolerances, and may be at all. Gradients off the masks and single steps of a local path are in no other
#: number; real runs have up to 1.2, diverging ones 60.
_COUNTED, _BELIEVED = 64.0, 1e6


def term_laws(frame: Frame) -> Iterator[Finding]:
    """All laws of the terms records."""
    if len(frame.log["terms"]) == 0:
        yield undetermined(
            "terms_identity", "log", "the decomposition closes", "no terms records", equation="1"
        )
        return
    yield identity(frame)
    yield gram(frame)
    yield against_probe(frame)
    yield against_window(frame)
    yield against_header(frame)
    yield against_arrivals(frame)
    yield scale(frame)


def window_of(frame: Frame) -> Ints:
    """Window row of each terms record."""
    return rows_of(frame.window_number, frame.log["terms"]["window"])


def error_norm(frame: Frame) -> Floats:
    """How far each term's vector may be off, in norm, ``[terms]`` (see `theory.precision`)."""
    table, p = frame.log["terms"], frame.precision
    model = gather(frame.model_sq, window_of(frame))
    stored = np.where(np.isnan(model), 0.0, np.sqrt(np.maximum(model, 0)) / table["gamma"])
    size = np.where(np.isnan(table["scale_sq"]), table["e_sq"], table["scale_sq"])
    size = np.fmin(size, _COUNTED * accounted_sq(frame))
    return np.asarray(p.slack * p.roundoff * (np.sqrt(np.maximum(size, 0)) + stored))


def accounted_sq(frame: Frame) -> Floats:
    """The largest squared gradient of a record that other numbers show, ``[terms]``; nan where they do not.

    On a client's mask the triangle inequality leads from its gradient at w_t, which the probe logs, over
    w_s and m w_s to its local path: ``||g_n|| + ||S_n|| + ||M_n|| + ||D_n||``.
    """
    table, entries, probe = frame.log["terms"], frame.log["term_arrivals"], frame.log["probe"]
    rows, own = rows_of(probe["window"], table["window"]), probe["client_grad_sq"]
    here = gather(own.max(axis=1) if own.shape[1] else np.full(len(own), np.nan), rows)
    away = sum(np.sqrt(np.maximum(entries[f"{name}_sq"], 0)) for name in "SMD")
    farthest = np.full(len(table), -np.inf)
    at = rows_of(table["window"], entries["window"])
    np.maximum.at(farthest, at, np.broadcast_to(away, at.shape))
    return np.asarray((np.sqrt(here) + np.where(np.isfinite(farthest), farthest, np.nan)) ** 2)


def scale(frame: Frame) -> Finding:
    """``scale_sq`` is no less than the probe's largest gradient, and not out of all proportion.

    Where the log accounts for nothing (all gradients are 0 on the masks) there is no proportion.
    """
    title, table, probe = "the gradients' scale fits the probe", frame.log["terms"], frame.log["probe"]
    logged, own = table["scale_sq"], probe["client_grad_sq"]
    largest = own.max(axis=1) if own.shape[1] else np.full(len(own), np.nan)
    least = gather(largest, rows_of(probe["window"], table["window"]))
    most = _BELIEVED * accounted_sq(frame)
    small = frame.precision.gradient(logged, logged).hi < frame.precision.gradient(least, least).lo
    return law(
        "terms_scale", title, small | ((logged > most) & (most > 0)), place_of(frame, "terms"), lhs=logged,
        rhs=np.where(small, least, most), applies=~np.isnan(logged + least),
        reason="scale_sq or the clients' gradients are not logged",
    )  # fmt: skip


def term_sq(frame: Frame, key: str) -> Interval:
    """A squared norm of the terms records with its error, ``[terms]``."""
    value, error = frame.log["terms"][key], error_norm(frame)
    if key == "rho_sq":
        error = error * frame.log["terms"]["gamma"]
    radius = 2 * np.sqrt(np.maximum(value, 0)) * error + error**2
    exact = value == 0
    return Interval(
        np.where(exact, 0.0, np.maximum(value - radius, 0.0)),
        np.where(exact, 0.0, value + radius * (1 + 1e-9)),
        value,
    )


def identity(frame: Frame) -> Finding:
    """The residual of equation 1 is rounding."""
    table = frame.log["terms"]
    limit = (_ADDED * error_norm(frame)) ** 2
    known = ~np.isnan(table["residual_sq"])
    return law(
        "terms_identity", "the decomposition closes", table["residual_sq"] > limit, place_of(frame, "terms"),
        applies=known, lhs=table["residual_sq"], rhs=limit, reason="residual_sq is not logged",
    )  # fmt: skip


def gram(frame: Frame) -> Finding:
    """The Gram matrix has the squares on its diagonal, is consistent, and sums to e and b."""
    title, table = "the terms' inner products fit together", frame.log["terms"]
    if table["gram"].shape[1] != len(TERMS) ** 2:
        return undetermined("terms_gram", "log", title, "gram is not logged")
    products = table["gram"].reshape(-1, len(TERMS), len(TERMS))
    error = error_norm(frame)
    squares = np.stack([table[f"{name}_sq"] for name in TERMS], axis=1)
    scale = np.sqrt(np.maximum(squares, 0)).max(axis=1)
    slack = _ADDED * (2 * scale * error + error**2) + 1e-9 * scale**2
    diagonal = np.abs(np.einsum("tii->ti", products) - squares).max(axis=1) > slack
    skew = np.abs(products - products.transpose(0, 2, 1)).max(axis=(1, 2)) > slack
    size = np.sqrt(np.maximum(squares, 0))
    cauchy = (np.abs(products) > size[:, :, None] * size[:, None, :] + slack[:, None, None]).any(axis=(1, 2))
    off = np.delete(products[:, TERMS.index("U"), :], TERMS.index("U"), axis=1)
    split = np.abs(off).max(axis=1) > slack
    c = np.ones((len(table), len(TERMS)))
    c[:, TERMS.index("rho")] = -1 / table["gamma"]
    e = np.einsum("ti,tij,tj->t", c, products, c)
    c[:, TERMS.index("z")] = 0
    b = np.einsum("ti,tij,tj->t", c, products, c)
    weight = (np.abs(c) * size).sum(axis=1) + size[:, 0]
    sum_slack = _ADDED * (2 * weight * error + error**2) + 1e-9 * weight**2
    sums = (np.abs(e - table["e_sq"]) > sum_slack) | (np.abs(b - table["b_sq"]) > sum_slack)
    bad = diagonal | skew | cauchy | split | sums
    return law(
        "terms_gram", title, bad, place_of(frame, "terms"), applies=~np.isnan(e), lhs=table["e_sq"], rhs=e,
        detail="||e||^2 against its Gram form",
    )  # fmt: skip


def against_probe(frame: Frame) -> Finding:
    """``||e||^2``, ``<grad F, e>`` and ``||U||^2`` are what the probe of the same window gives."""
    title, table, probe = "the terms agree with the probe", frame.log["terms"], frame.log["probe"]
    rows = rows_of(probe["window"], table["window"])
    grad, step = gather(probe["grad_sq"], rows), gather(probe["step_sq"], rows)
    expected = evaluate(
        IDENTITY, {
            "grad_sq": grad, "step_sq": step, "gamma": table["gamma"],
            "grad_dot_step": gather(probe["grad_dot_step"], rows),
        },
    )  # fmt: skip
    error = _ADDED * error_norm(frame)
    reach = np.sqrt(np.maximum(table["e_sq"], 0)) + np.sqrt(grad) + np.sqrt(step) / table["gamma"]
    slack = 2 * reach * error + error**2 + frame.precision.size * 2.0**-52 * reach**2
    uncovered = gather(probe["grad_uncovered_sq"], rows)
    bad = (np.abs(expected - table["e_sq"]) > slack) | (np.abs(uncovered - table["U_sq"]) > slack)
    if table["grad_dot"].shape[1] == len(TERMS):
        weight = np.ones((len(table), len(TERMS)))
        weight[:, TERMS.index("rho")] = -1 / table["gamma"]
        along = (weight * table["grad_dot"]).sum(axis=1)
        slope = -gather(probe["grad_dot_step"], rows) / table["gamma"] - grad
        bad |= np.abs(along - slope) > slack
    return law(
        "terms_probe",
        title,
        bad,
        place_of(frame, "terms"),
        applies=~np.isnan(expected) & ~np.isnan(table["e_sq"]),
        lhs=table["e_sq"],
        rhs=expected,
        detail="||e||^2 against the probe",
        reason="no probe of the same window",
    )


def against_window(frame: Frame) -> Finding:
    """gamma of a terms record is eta K of its window."""
    table = frame.log["terms"]
    gamma = gather(frame.gamma, window_of(frame))
    bad = np.abs(gamma - table["gamma"]) > 1e-9 * np.abs(gamma)
    return law(
        "terms_gamma", "gamma is eta times K", bad, place_of(frame, "terms"), applies=~np.isnan(gamma),
        lhs=table["gamma"], rhs=gamma, reason="eta or K is not logged",
    )  # fmt: skip


def against_header(frame: Frame) -> Finding:
    """The form of a terms record is the run's."""
    title, table = "the terms are of the run's update form", frame.log["terms"]
    form = frame.log.config("update_form")
    if form is None or (table.codes["form"] < 0).all():
        return undetermined("terms_form", "log", title, "the update form is not logged")
    texts = np.array([*table.texts["form"], ""], dtype=object)
    bad = np.asarray(texts[table.codes["form"]] != form, dtype=bool)
    return law("terms_form", title, bad, place_of(frame, "terms"), applies=table.codes["form"] >= 0)


def against_arrivals(frame: Frame) -> Finding:
    """The arrivals inside a terms record are those of the window, with the same numbers."""
    title, table = "the terms name the arrivals of their window", frame.log["term_arrivals"]
    if len(table) == 0:
        return undetermined("terms_arrivals", "log", title, "terms records list no arrivals")
    arrival, p = frame.log["arrival"], frame.precision
    rows = arrival_of(frame)
    bad: Bools = rows < 0
    bad |= gather(arrival["window"], rows) != table["window"]
    bad |= gather(arrival["client"], rows) != table["client"]
    sent = gather(frame.sent("full_masked_norm_sq"), rows)
    for own, other in ((table["mask_sq"], sent), (table["drift_sq"], gather(arrival["drift_sq"], rows))):
        bad |= differ(p.reduction(own), p.reduction(other))
    pibar = gather(arrival["pibar"], rows)
    bad |= np.abs(table["pibar"] - pibar) > 1e-6 * pibar
    gap, scale = client_gap(frame)
    bad |= differ(p.gradient(table["gap_sq"], scale), p.gradient(gap, scale))
    terms = frame.log["terms"]
    counted = np.bincount(rows_of(terms["window"], table["window"]), minlength=len(terms)) * 1.0
    short = counted != gather(frame.log["window"]["arrivals"], window_of(frame))
    if not bad.any() and np.any(short & (window_of(frame) >= 0)):
        return law("terms_arrivals", title, short, place_of(frame, "terms"), detail="number of arrivals")
    place = Place(table.line, table["window"], table["client"], table["dispatch"])
    return law("terms_arrivals", title, bad, place)


def client_gap(frame: Frame) -> tuple[Floats, Floats]:
    """||grad F_n - grad F||^2 of each entry of `term_arrivals` by the probe, and the gradients' size."""
    table, probe = frame.log["term_arrivals"], frame.log["probe"]
    rows, client = rows_of(probe["window"], table["window"]), table["client"].astype(np.int64)
    gap, scale = np.full(len(table), np.nan), np.full(len(table), np.nan)
    width = min(probe["client_gap_sq"].shape[1], probe["client_grad_sq"].shape[1])
    known = (rows >= 0) & (client >= 0) & (client < width)
    at = rows[known]
    gap[known] = probe["client_gap_sq"][at, client[known]]
    scale[known] = np.maximum(probe["client_grad_sq"][at, client[known]], probe["grad_sq"][at])
    return gap, scale


def arrival_of(frame: Frame) -> Ints:
    """Arrival row of each entry of `term_arrivals`."""
    return rows_of(frame.log["arrival"]["dispatch"], frame.log["term_arrivals"]["dispatch"])
