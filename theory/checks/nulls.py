"""Is the log consistent with itself? Nulls: the plugin writes one only where a number was not finite.

A number is finite where others of the same records bound it, by Cauchy-Schwarz, the triangle inequality or as
one of their parts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from theory.frame import Bools, Floats, Frame, gather, rows_of
from theory.judge import Place, law
from theory.schema import TERMS
from theory.verdict import Finding, undetermined


def nulls(frame: Frame) -> Iterator[Finding]:
    """The one law of this module."""
    title = "only numbers that were not finite are null"
    if not frame.log.is_plugins:
        yield undetermined("nulls", "log", title, "another framework's log: any number may be missing")
        return
    found = {"probe": _probe(frame), "terms": _terms(frame), "evaluation": _evaluation(frame)}
    parts = [(frame.log[kind].line, frame.log[kind]["window"], rows) for kind, rows in found.items()]
    line, window, bad = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    if len(line) == 0:
        yield undetermined("nulls", "log", title, "no probes, terms or evaluations")
        return
    order = np.argsort(line)
    yield law("nulls", title, bad[order], Place(line[order], window[order]), detail="null, but bounded")


def _silent(bounded: Floats, *by: Floats) -> Bools:
    """Where `bounded` is null although none of `by` is."""
    return np.asarray(np.isnan(bounded) & ~np.isnan(sum(by)))


def _probe(frame: Frame) -> Bools:
    table = frame.log["probe"]
    grad, following = table["grad_sq"], table["grad_next_sq"]
    return np.asarray(
        _silent(table["grad_dot_step"], grad, table["step_sq"])
        | _silent(table["grad_change_sq"], grad, following)
        | _silent(table["grad_uncovered_sq"], grad)
    )


def _terms(frame: Frame) -> Bools:
    table, probe = frame.log["terms"], frame.log["probe"]
    rows, count = rows_of(probe["window"], table["window"]), len(TERMS)
    squares = [table[f"{name}_sq"] for name in TERMS]
    grad, step, slope = (gather(probe[key], rows) for key in ("grad_sq", "step_sq", "grad_dot_step"))
    bad = _silent(table["e_sq"], grad, step, slope) | _silent(table["U_sq"], grad)
    bad |= _silent(table["b_sq"], *squares) | _silent(table["residual_sq"], *squares, table["e_sq"])
    if table["gram"].shape[1] == count**2:
        for square, own in zip(squares, table["gram"][:, :: count + 1].T, strict=True):
            bad |= np.isnan(square) != np.isnan(own)
    return bad


def _evaluation(frame: Frame) -> Bools:
    table, bad = frame.log["evaluation"], np.zeros(len(frame.log["evaluation"]), dtype=bool)
    named = table.text("candidate")
    for key in ("accuracy", "loss"):
        for which in ("global", "scaled"):
            bad |= np.asarray(named == which, dtype=bool) & _silent(table[key], table[f"{which}.{key}"])
    return bad
