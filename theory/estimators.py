"""Estimates of the theory's constants from one run, each with what kind of number it is.

``exact``: it is the quantity on this run. ``lower bound``: the true constant is a supremum that
includes this run, so it can only be larger. ``estimate``: a statistic, with a bootstrap interval.
``given``: taken from the log's ``constants`` record or from the user. A bound made with a lower
bound of L is not a certificate, whatever its verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.frame import Frame, gather, rows_of
from theory.intervals import Interval

Floats = NDArray[np.float64]
Kind = Literal["exact", "lower bound", "estimate", "given"]

#: Seed of the bootstrap, so that a report can be reproduced.
BOOTSTRAP_SEED = 20251205
#: Losses that cannot be negative.
NONNEGATIVE_LOSSES = ("cross_entropy", "bce")


class Estimate(NamedTuple):
    """One constant.

    Attributes:
        name: symbol.
        value: the number to use; nan when the log cannot tell.
        kind: see the module.
        low, high: rounding interval (exact, lower bound) or 95 % bootstrap interval (estimate).
        samples: measurements that entered.
        note: how it was measured.
    """

    name: str
    value: float
    kind: Kind
    low: float
    high: float
    samples: int
    note: str

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return bool(np.isfinite(self.value))


def bootstrap(
    values: Floats, statistic: Callable[[Floats], float], rng: np.random.Generator, *, draws: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:  # fmt: skip
    """Percentile interval of a statistic of a time series, by the moving-block bootstrap.

    Blocks of ``n^(1/3)`` consecutive values are drawn with replacement (Kuensch 1989), because values
    of neighbouring windows are not independent. Nothing is promised for fewer than about 20 values.
    """
    n = len(values)
    if n < 2:
        return float("nan"), float("nan")
    block = max(1, round(n ** (1 / 3)))
    starts = rng.integers(n - block + 1, size=(draws, -(-n // block)))
    index = (starts[..., None] + np.arange(block)).reshape(draws, -1)[:, :n]
    results = np.array([statistic(values[row]) for row in index])
    low, high = np.quantile(results, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def directional_smoothness(frame: Frame) -> Interval:
    """``L_dir = 2 (F' - F - <grad F, Delta>) / ||Delta||^2`` of each probe, ``[P]``: all that I0 needs.

    Exact for the step taken (it may be negative); nan where `_apart` is.
    """
    table, p = frame.log["probe"], frame.precision
    step = _apart(frame, table["step_sq"])
    slope = p.slope(table["grad_dot_step"], table["grad_sq"], table["step_sq"])
    with np.errstate(invalid="ignore"):
        return (p.loss(table["loss_next"]) - p.loss(table["loss"]) - slope) * 2.0 / p.reduction(step)


def gradient_smoothness(frame: Frame) -> Interval:
    """``||grad F(w_{t+1}) - grad F(w_t)|| / ||Delta_t||`` of each probe, ``[P]``; a lower bound of L."""
    table = frame.log["probe"]
    scale = np.maximum(table["grad_sq"], table["grad_next_sq"])
    step = _apart(frame, table["step_sq"])
    return _ratio(frame.precision.gradient(table["grad_change_sq"], scale), frame.precision.reduction(step))


def client_smoothness(frame: Frame) -> Interval:
    """The same of single clients, from terms records: along masks, delays and local paths, ``[3 E]``.

    A mask leaves the buffers alone, so its gradients can be compared in every model.
    """
    table = frame.log["term_arrivals"]
    terms = frame.log["terms"]
    scale = gather(terms["scale_sq"], rows_of(terms["window"], table["window"]))
    parts = []
    for error, distance in (("M_sq", "mask_sq"), ("S_sq", "stale_sq"), ("D_sq", "drift_sq")):
        base = _apart(frame, table[distance], still=distance == "mask_sq")
        parts.append(_ratio(frame.precision.gradient(table[error], scale), frame.precision.reduction(base)))
    return Interval(np.concatenate([x.lo for x in parts]), np.concatenate([x.hi for x in parts]))


def _apart(frame: Frame, distance_sq: Floats, *, still: bool = False) -> Floats:
    """Squared distances of points whose losses and gradients can be compared.

    nan where they are zero or not logged, and everywhere if the model's buffers move between the points,
    which they do unless they stand `still`.
    """
    comparable = (distance_sq > 0) & (still or not frame.statistics_move)
    return np.where(comparable, distance_sq, np.nan)


def _ratio(change_sq: Interval, step_sq: Interval) -> Interval:
    """sqrt(change/step), outward."""
    with np.errstate(invalid="ignore", divide="ignore"):
        square = change_sq / step_sq
        return Interval(
            np.sqrt(np.maximum(square.lo, 0)) * (1 - 1e-15),
            np.sqrt(square.hi) * (1 + 1e-15),
            np.sqrt(square.nominal),
        )


def smoothness(frame: Frame) -> Estimate:
    """L: given, else the largest measured slope of a gradient, at its lower rounding end.

    So it is a lower bound of L, and what holds with it holds with L.
    """
    if "L" in frame.given:
        return _given(frame, "L")
    parts = [directional_smoothness(frame), gradient_smoothness(frame), client_smoothness(frame)]
    low = np.concatenate([x.lo for x in parts])
    high = np.concatenate([x.hi for x in parts])
    seen = np.isfinite(low) & np.isfinite(high)
    if not seen.any():
        moved = "; where buffers move, only masks show it" if frame.statistics_move else ""
        return _unknown("L", f"no probe with a step that is not zero{moved}")
    top, bottom = float(high[seen].max()) * (1 + 1e-12), float(low[seen].max())
    return Estimate(
        "L", max(bottom, 0.0), "lower bound", bottom, top, int(seen.sum()), "largest over probed steps"
    )


def noise(frame: Frame) -> Estimate:
    """sigma^2: given, else the mean over probes of ``1/2 ||g(b1) - g(b2)||^2``.

    For batches drawn without replacement from n samples this overestimates the variance of one drawn
    with replacement by n/(n-1); it is a mean over clients and windows, where (A2) wants a supremum.
    """
    if "sigma_sq" in frame.given:
        return _given(frame, "sigma_sq")
    values = frame.log["probe"]["noise_sq"]
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return _unknown("sigma_sq", "noise_sq is not logged")
    low, high = bootstrap(values, lambda x: float(x.mean()), np.random.default_rng(BOOTSTRAP_SEED))
    return Estimate("sigma_sq", float(values.mean()), "estimate", low, high, len(values), "mean over probes")


def dissimilarity(frame: Frame) -> Estimate:
    """sigma_g^2: given, else the largest ``||grad F_n - grad F||^2`` over probes and clients."""
    if "sigma_g_sq" in frame.given:
        return _given(frame, "sigma_g_sq")
    return _largest("sigma_g_sq", frame.log["probe"]["client_gap_sq"], "largest over probes and clients")


def gradient_bound(frame: Frame) -> Estimate:
    """G^2: given, else the largest mean gradient of an upload, ``change_sq / (eta K)^2``.

    By Jensen that is at most the mean of the ``||g||^2`` along the local path, a sample of what (A3)
    bounds in expectation: an estimate, and neither above nor below for certain.
    """
    if "G_sq" in frame.given:
        return _given(frame, "G_sq")
    local = gather(frame.eta * frame.steps, frame.arrival_window)
    values = frame.log["arrival"]["change_sq"] / local**2
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return _unknown("G_sq", "change_sq, eta or K is not logged")
    low, high = bootstrap(values, lambda x: float(x.max()), np.random.default_rng(BOOTSTRAP_SEED), draws=200)
    return Estimate("G_sq", float(values.max()), "estimate", low, high, len(values), "largest over uploads")


def weight_bound(frame: Frame) -> Estimate:
    """W^2: given, else the largest ``||w_s||^2`` over the models that were sent (all that the proof uses)."""
    if "W_sq" in frame.given:
        return _given(frame, "W_sq")
    found = _largest("W_sq", frame.log["dispatch"]["norm_sq"], "largest over models sent")
    return found._replace(kind="exact")


def infimum(frame: Frame) -> Estimate:
    """F_inf: given, else 0 for losses that cannot be negative."""
    if "F_inf" in frame.given:
        return _given(frame, "F_inf")
    loss = frame.log.config("loss")
    if loss in NONNEGATIVE_LOSSES:
        return Estimate("F_inf", 0.0, "exact", 0.0, 0.0, 0, f"{loss} is not negative")
    return _unknown("F_inf", "the loss is not known to be bounded below; give F_inf")


def staleness_bound(frame: Frame) -> Estimate:
    """tau_max over the run."""
    return _largest("tau_max", frame.log["arrival"]["staleness"], "over arrivals")._replace(kind="exact")


def coverage_ratio(frame: Frame) -> Estimate:
    """Phi, the largest |A_t| / Gamma_t."""
    table = frame.log["window"]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(table["arrivals"] > 0, table["arrivals"] / table["gamma_min"], 0.0)
    return _largest("Phi", ratio, "over windows")._replace(kind="exact")


def share_sum(frame: Frame) -> Estimate:
    """P_max, the largest sum of pibar_n in a window."""
    return _largest("P_max", frame.per_window(frame.log["arrival"]["pibar"]), "over windows")._replace(
        kind="exact"
    )


def constants(frame: Frame) -> dict[str, Estimate]:
    """Every constant, by name."""
    found = (
        smoothness(frame), noise(frame), dissimilarity(frame), gradient_bound(frame), weight_bound(frame),
        infimum(frame), staleness_bound(frame), coverage_ratio(frame), share_sum(frame),
    )  # fmt: skip
    return {estimate.name: estimate for estimate in found}


def _given(frame: Frame, name: str) -> Estimate:
    value = frame.given[name]
    return Estimate(name, value, "given", value, value, 0, "given")


def _unknown(name: str, note: str) -> Estimate:
    nan = float("nan")
    return Estimate(name, nan, "estimate", nan, nan, 0, note)


def _largest(name: str, values: Floats, note: str) -> Estimate:
    seen = values[~np.isnan(values)]
    if seen.size == 0:
        return _unknown(name, "not logged")
    top = float(seen.max())
    return Estimate(name, top, "lower bound", top, top, int(seen.size), note)
