"""Is the log consistent with itself? Values: supports, norms, coverage, weights, probes.

As in `theory.checks.structure`, these are laws of the schema and of the merge rule; real numbers are
compared through the tolerance model of `theory.precision`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from theory.checks.structure import close, place_of
from theory.frame import Bools, Floats, Frame, gather, rows_of
from theory.intervals import Interval, total
from theory.judge import law
from theory.verdict import Finding, undetermined

#: Scores whose masks keep exactly int(d * D_p) prunable coordinates.
UNSTRUCTURED = ("magnitude", "weight_change", "per_cost", "random")


def values(frame: Frame) -> Iterator[Finding]:
    """All laws about logged values."""
    yield support(frame)
    yield nested_support(frame)
    yield nested_norm(frame)
    yield norms(frame)
    yield norm_path(frame)
    yield learning_rate(frame)
    yield single_step(frame)
    yield weights(frame)
    yield shares(frame)
    yield nested_shares(frame)
    yield fewest_holders(frame)
    yield nested_holders(frame)
    yield coverage(frame)
    yield uncovered(frame)
    yield probe_step(frame)
    yield probe_cauchy(frame)
    yield probe_chain(frame)
    yield probe_clients(frame)


def differ(a: Interval, b: Interval) -> Bools:
    """Whether the intervals have no point in common (False where a value is missing)."""
    return np.asarray((a.hi < b.lo) | (b.hi < a.lo))


def support(frame: Frame) -> Finding:
    """A sub-model of density d has int(d D_p) prunable coordinates and at most all others."""
    title, table = "the support fits the density", frame.log["dispatch"]
    size, prunable = frame.log.layout("size"), frame.log.layout("prunable")
    if frame.log.config("score") not in UNSTRUCTURED or size is None or prunable is None:
        return undetermined("support", "log", title, "score or layout is not logged")
    others = float(size) - float(prunable)
    low = frame.kept + (
        0.0 if frame.log.config("prune_biases") is not False else _unbuffered(frame) - prunable
    )
    bad = (table["support"] < low) | (table["support"] > frame.kept + others)
    return law(
        "support", title, bad, place_of(frame, "dispatch"), applies=~np.isnan(table["support"]),
        lhs=table["support"], rhs=np.where(table["support"] < low, low, frame.kept + others),
    )  # fmt: skip


def nested_support(frame: Frame) -> Finding:
    """Within one ranking, a larger density has the larger support, an equal one an equal support."""
    title, table = "masks of one ranking are nested (supports)", frame.log["dispatch"]
    code, known = table.codes["ranking"], ~np.isnan(table["support"]) & (table.codes["ranking"] >= 0)
    bad, other = _unordered(
        known, (code.astype(np.float64),), table["density"], table["support"], rising=True
    )
    return law(
        "nested_support", title, bad, place_of(frame, "dispatch"), applies=known, lhs=table["support"],
        rhs=gather(table["support"], other), detail="against the next density of the same ranking",
    )  # fmt: skip


def nested_norm(frame: Frame) -> Finding:
    """Of one model and one ranking, a larger density leaves out less, an equal one the same."""
    title, table = "masks of one ranking are nested (norms)", frame.log["dispatch"]
    code = table.codes["ranking"].astype(np.float64)
    worst = np.zeros(len(table), dtype=bool)
    witness = np.full(len(table), -1, dtype=np.int64)
    applies = np.zeros(len(table), dtype=bool)
    lhs = np.full(len(table), np.nan)
    for key in ("masked_norm_sq", "full_masked_norm_sq"):
        known = ~np.isnan(table[key]) & (code >= 0)
        box = frame.precision.reduction(table[key])
        bad, other = _unordered(known, (table["version"], code), table["density"], box, rising=False)
        fresh = bad & ~worst
        witness, lhs = np.where(fresh, other, witness), np.where(fresh, table[key], lhs)
        worst, applies = worst | bad, applies | known
    return law(
        "nested_norm", title, worst, place_of(frame, "dispatch"), applies=applies, lhs=lhs,
        rhs=gather(table["masked_norm_sq"], witness), detail="norm left out, against the next density",
    )  # fmt: skip


def _unordered(
    known: Bools, groups: tuple[Floats, ...], density: Floats, value: Floats | Interval, *, rising: bool
) -> tuple[Bools, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Rows whose value is not monotone in density against the next sparser row of the same group."""
    box = value if isinstance(value, Interval) else Interval(value)
    rows = np.flatnonzero(known)
    order = rows[np.lexsort((density[rows], *(group[rows] for group in reversed(groups))))]
    bad = np.zeros(len(known), dtype=bool)
    other = np.full(len(known), -1, dtype=np.int64)
    if len(order) < 2:
        return bad, other
    a, b = order[:-1], order[1:]
    same = np.logical_and.reduce([group[a] == group[b] for group in groups])
    equal = same & (density[a] == density[b])
    below, above = box.hi[b] < box.lo[a], box.lo[b] > box.hi[a]
    wrong = (same & (below if rising else above)) | (equal & (below | above))
    bad[b[wrong]] = True
    other[b[wrong]] = a[wrong]
    return bad, other


def norms(frame: Frame) -> Finding:
    """Masked norms are parts of full ones; density 1 leaves nothing out; one version has one norm."""
    title, table = "the norms of a dispatch fit together", frame.log["dispatch"]
    part = frame.precision.reduction
    keys = ("norm_sq", "masked_norm_sq", "full_norm_sq", "full_masked_norm_sq")
    norm, masked, full, full_masked = (part(table[key]) for key in keys)
    bad = (
        (masked.lo > norm.hi)
        | (full_masked.lo > full.hi)
        | (masked.lo > full_masked.hi)
        | (norm.lo > full.hi)
    )
    bad |= ((full_masked - masked).lo > (full - norm).hi) | (norm.lo < 0)
    bad |= (table["density"] == 1) & ((masked.lo > 0) | (full_masked.lo > 0))
    first = rows_of(table["version"], table["version"])
    bad |= differ(norm, norm[first]) | differ(full, full[first])
    known = ~np.isnan(table["norm_sq"]) & ~np.isnan(table["masked_norm_sq"])
    return law(
        "norms", title, bad, place_of(frame, "dispatch"), applies=known, lhs=table["masked_norm_sq"],
        rhs=table["norm_sq"], detail="masked against full norm", reason="norms are not logged",
    )  # fmt: skip


def norm_path(frame: Frame) -> Finding:
    """``| ||w_t|| - ||w_s|| |`` is at most the length of the path between the two versions."""
    title, table = "model norms move no further than the steps", frame.log["dispatch"]
    version, first = np.unique(table["version"], return_index=True)
    norm_sq = frame.precision.reduction(table["full_norm_sq"][first])
    low, high = np.sqrt(np.maximum(norm_sq.lo, 0)), np.sqrt(np.maximum(norm_sq.hi, 0))
    path = frame.precision.reduction(frame.path_sq(version[:-1], version[1:])) * Interval(np.diff(version))
    far = np.maximum(low[1:] - high[:-1], low[:-1] - high[1:])
    limit = np.sqrt(path.hi) * (1 + 1e-12) + frame.precision.roundoff * 4 * high[1:]
    bad = np.concatenate([[False], far > limit])
    known = np.concatenate([[False], ~np.isnan(far) & ~np.isnan(limit)])
    place = place_of(frame, "dispatch")
    rows = type(place)(place.line[first], version, np.zeros(0), table["dispatch"][first])
    return law(
        "norm_path",
        title,
        bad[: len(first)],
        rows,
        applies=known[: len(first)],
        lhs=np.concatenate([[np.nan], far])[: len(first)],
        rhs=np.concatenate([[np.nan], limit])[: len(first)],
        reason="step_sq and full_norm_sq are not logged",
    )


def learning_rate(frame: Frame) -> Finding:
    """The learning rate of a window is the header's, to which it rises linearly over the warm-up."""
    title, table = "the learning rate is the header's", frame.log["window"]
    eta, warm = frame.log.number("eta"), frame.log.config("warmup_windows") or 0
    logged = table["learning_rate"]
    if eta is None or len(table) == 0 or np.isnan(logged).all():
        return undetermined("learning_rate", "log", title, "eta or learning_rate is not logged")
    expected = eta * np.minimum(1.0, (table["window"] + 1) / warm) if warm else np.full(len(logged), eta)
    return law(
        "learning_rate", title, ~close(logged, expected), place_of(frame, "window"),
        applies=~np.isnan(logged), lhs=logged, rhs=expected,
    )  # fmt: skip


def single_step(frame: Frame) -> Finding:
    """The first local iterate is x_0, so one local step has no drift; steps are whole and positive."""
    title, table = "one local step does not drift", frame.log["arrival"]
    steps, drift = table["steps"], table["drift_sq"]
    bad = (steps < 1) | (steps != np.floor(steps)) | ((steps == 1) & (drift > 0)) | (drift < 0)
    return law(
        "single_step", title, bad, place_of(frame, "arrival"), applies=~np.isnan(steps), lhs=drift,
        rhs=np.zeros(len(steps)), reason="steps are not logged",
    )  # fmt: skip


def weights(frame: Frame) -> Finding:
    """c_n = s(tau) * samples, with the header's staleness function, or samples where it scales changes."""
    title, table = "weights follow staleness and samples", frame.log["arrival"]
    kind, config = frame.log.config("staleness"), frame.log.config
    tau = table["staleness"]
    with np.errstate(invalid="ignore", divide="ignore"):
        if kind == "constant" or config("staleness_normalised") is False:
            factor = np.ones(len(tau))
        elif kind == "polynomial" and config("staleness_exponent") is not None:
            factor = (1.0 + tau) ** -float(config("staleness_exponent"))
        elif kind == "hinge" and None not in (config("hinge_slope"), config("hinge_delay")):
            slope, delay = float(config("hinge_slope")), float(config("hinge_delay"))
            factor = np.where(tau <= delay, 1.0, 1.0 / (slope * (tau - delay) + 1.0))
        else:
            return undetermined("weights", "log", title, "the staleness function is not logged")
    expected = factor * table["samples"]
    known = ~np.isnan(expected) & ~np.isnan(table["weight"])
    bad = np.abs(table["weight"] - expected) > 1e-6 * np.abs(expected)
    if config("norm_bound") is not None:  # which bounds samples too
        bad &= table["weight"] > expected
    return law(
        "weights", title, bad | (table["weight"] <= 0), place_of(frame, "arrival"), applies=known,
        lhs=table["weight"], rhs=expected, reason="weight or samples are not logged",
    )  # fmt: skip


def shares(frame: Frame) -> Finding:
    """``c_n / sum c <= pibar_n <= 1``: a coordinate that all hold gives the least share."""
    title, table = "shares lie between their weight and one", frame.log["arrival"]
    weight_sum = gather(frame.per_window(table["weight"]), frame.arrival_window)
    least = table["weight"] / weight_sum
    pibar, known = table["pibar"], ~np.isnan(table["pibar"]) & (frame.sent("support") != 0)
    known &= not frame.hooked
    bad = (pibar > 1 + 1e-6) | (pibar <= 0) | (pibar < least * (1 - 1e-6))
    return law(
        "shares", title, bad, place_of(frame, "arrival"), applies=known, lhs=pibar,
        rhs=np.where(pibar > 1, 1.0, least), reason=frame.unmerged("pibar is not logged"),
    )  # fmt: skip


def nested_shares(frame: Frame) -> Finding:
    """With nested masks ``pibar_n = c_n / (weight of the clients whose mask contains n's)``, exactly."""
    title, table = "shares of nested masks", frame.log["arrival"]
    heavy, _ = frame.holders
    nested = np.zeros(len(table), dtype=bool)
    inside = frame.arrival_window >= 0
    nested[inside] = frame.nested[frame.arrival_window[inside]]
    expected = table["weight"] / heavy
    known = nested & ~np.isnan(expected) & ~np.isnan(table["pibar"]) & (frame.sent("support") != 0)
    known &= not frame.hooked
    bad = np.abs(table["pibar"] - expected) > 1e-6 * expected
    return law(
        "nested_shares",
        title,
        bad,
        place_of(frame, "arrival"),
        applies=known,
        lhs=table["pibar"],
        rhs=expected,
        reason=frame.unmerged("no window whose arrivals share one ranking has weight and pibar"),
    )


def fewest_holders(frame: Frame) -> Finding:
    """1 <= Gamma_t <= |A_t|, and 0 only where nothing arrived."""
    title, table = "Gamma_t is at most |A_t|", frame.log["window"]
    fewest, arrivals = table["gamma_min"], table["arrivals"]
    empty = frame.per_window((frame.sent("support") != 0) * 1.0) == 0
    bad = (fewest > arrivals) | ((fewest < 1) & ~empty) | (fewest < 0)
    return law(
        "fewest_holders", title, bad, place_of(frame, "window"), lhs=fewest, rhs=arrivals,
        applies=~np.isnan(fewest) & frame.arrivals_only, reason=frame.unmerged("gamma_min is not logged"),
    )  # fmt: skip


def nested_holders(frame: Frame) -> Finding:
    """With nested masks, Gamma_t is the number of arrivals with the largest mask."""
    title, table = "Gamma_t of nested masks", frame.log["window"]
    _, many = frame.holders
    expected = frame.least(many, frame.sent("support") != 0)
    known = frame.nested & np.isfinite(expected) & ~np.isnan(table["gamma_min"]) & frame.arrivals_only
    return law(
        "nested_holders", title, table["gamma_min"] != expected, place_of(frame, "window"), applies=known,
        lhs=table["gamma_min"], rhs=expected,
        reason=frame.unmerged("no window whose arrivals share one ranking"),
    )  # fmt: skip


def coverage(frame: Frame) -> Finding:
    """Mean coverage times |A_t| D is the sum of the supports (both without buffers, which are all sent)."""
    title, table = "coverage is the mean support", frame.log["window"]
    held = frame.per_window(frame.sent("support") - sum(frame.log.layers("buffer")))
    found = held / (_unbuffered(frame) * np.maximum(table["arrivals"], 1))
    known = ~np.isnan(found) & ~np.isnan(table["coverage"]) & frame.arrivals_only
    bad = np.abs(found - table["coverage"]) > 1e-6 * found
    return law(
        "mean_coverage", title, bad, place_of(frame, "window"), applies=known, lhs=table["coverage"],
        rhs=found,
        reason=frame.unmerged("coverage or support is not logged"),
    )  # fmt: skip


def uncovered(frame: Frame) -> Finding:
    """A full-density arrival covers everything; nested masks leave what the largest leaves."""
    title, table = "uncovered coordinates fit the arrivals", frame.log["window"]
    size = _unbuffered(frame)
    widest, densest = np.maximum(frame.most(frame.sent("support")), 0.0), frame.most(frame.sent("density"))
    exact = frame.nested & ~np.isnan(widest) & np.isfinite(size)
    left = size - np.maximum(widest - sum(frame.log.layers("buffer")), 0.0)
    expected = np.where(densest == 1, 0.0, np.where(exact, left, np.nan))
    known = ~np.isnan(table["uncovered"]) & ~np.isnan(expected) & frame.arrivals_only
    return law(
        "uncovered_count", title, table["uncovered"] != expected, place_of(frame, "window"), applies=known,
        lhs=table["uncovered"], rhs=expected, reason=frame.unmerged("uncovered or support is not logged"),
    )  # fmt: skip


def probe_step(frame: Frame) -> Finding:
    """A probe's step is the window's."""
    title, table = "probes and windows agree on the step", frame.log["probe"]
    reduction = frame.precision.reduction
    step = gather(frame.log["window"]["step_sq"], frame.probe_window)
    bad = differ(reduction(table["step_sq"]), reduction(step)) | (frame.probe_window < 0)
    return law(
        "probe_step",
        title,
        bad,
        place_of(frame, "probe"),
        lhs=table["step_sq"],
        rhs=step,
        reason="no probes",
        applies=(~np.isnan(step) & ~np.isnan(table["step_sq"])) | (frame.probe_window < 0),
    )


def probe_cauchy(frame: Frame) -> Finding:
    """Cauchy-Schwarz for the slope, triangle inequality for the change, parts at most the whole."""
    title, table, p = "a probe's numbers fit together", frame.log["probe"], frame.precision
    grad, following = table["grad_sq"], table["grad_next_sq"]
    slope = p.slope(table["grad_dot_step"], grad, table["step_sq"])
    size = p.gradient(grad, grad) * p.reduction(table["step_sq"])
    bad = (slope**2).lo > size.hi
    near = np.abs(np.sqrt(grad) - np.sqrt(following)) ** 2
    far = (np.sqrt(grad) + np.sqrt(following)) ** 2
    change = p.gradient(table["grad_change_sq"], np.maximum(grad, following))
    bad |= (change.hi < p.gradient(near, np.maximum(grad, following)).lo) | (
        change.lo > p.gradient(far, far).hi
    )
    bad |= p.gradient(table["grad_uncovered_sq"], grad).lo > p.gradient(grad, grad).hi
    full = (gather(frame.log["window"]["uncovered"], frame.probe_window) == 0) & (not frame.hooked)
    bad |= full & (table["grad_uncovered_sq"] > 0)
    return law(
        "probe_cauchy", title, bad, place_of(frame, "probe"), lhs=table["grad_dot_step"] ** 2,
        rhs=size.nominal, reason="no probes", detail="slope squared against |grad|^2 |step|^2",
    )  # fmt: skip


def probe_chain(frame: Frame) -> Finding:
    """F and the gradient after a window are those before the next, and finite in both records or neither."""
    title, table, p = "consecutive probes continue each other", frame.log["probe"], frame.precision
    follows = rows_of(table["window"], table["window"] + 1)
    known = follows >= 0
    loss, grad = gather(table["loss"], follows), gather(table["grad_sq"], follows)
    bad = differ(p.loss(table["loss_next"]), p.loss(loss))
    bad |= differ(p.gradient(table["grad_next_sq"], grad), p.gradient(grad, grad))
    if frame.log.is_plugins:
        bad |= np.isnan(table["loss_next"]) != np.isnan(loss)
        bad |= np.isnan(table["grad_next_sq"]) != np.isnan(grad)
    return law(
        "probe_chain", title, bad, place_of(frame, "probe"), applies=known, lhs=table["loss_next"], rhs=loss,
        reason="no two consecutive windows are probed", detail="loss after against loss before the next",
    )  # fmt: skip


def probe_clients(frame: Frame) -> Finding:
    """F is the mean of the F_n, so ``mean ||g_n||^2 - ||g||^2 = mean ||g_n - g||^2`` exactly."""
    title, table, p = "client gradients average to the gradient", frame.log["probe"], frame.precision
    if table["client_grad_sq"].shape[1] == 0 or table["client_gap_sq"].shape[1] == 0:
        return undetermined("probe_clients", "log", title, "client gradients are not logged")
    n = float(table["client_grad_sq"].shape[1])
    own, grad = table["client_grad_sq"], table["grad_sq"]
    scale = own.max(axis=1, keepdims=True)
    left = total(p.gradient(own, scale)) * (1 / n) - p.gradient(grad, scale[:, 0])
    right = total(p.gradient(table["client_gap_sq"], scale)) * (1 / n)
    wide = table["client_grad_sq"].shape[1] != frame.log.clients
    return law(
        "probe_clients",
        title,
        differ(left, right) | wide,
        place_of(frame, "probe"),
        lhs=left.nominal,
        rhs=right.nominal,
        applies=~np.isnan(left.lo) & ~np.isnan(right.lo),
        reason="client gradients are not logged",
    )


def _unbuffered(frame: Frame) -> float:
    """D without buffers; nan where the layout is not logged."""
    size = frame.log.layout("size")
    return float("nan") if size is None else float(size) - sum(frame.log.layers("buffer"))
