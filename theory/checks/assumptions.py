"""Which assumptions (A1 to A5) does this run satisfy, refute, or leave open?

A log can refute an assumption. It can confirm one only where everything that enters is logged (A4
along the probed steps; A4E and A5 with a given constant). What cannot be seen is UNDETERMINED, with
what was measured.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from theory import estimators
from theory.frame import STATISTICS, Frame, gather
from theory.judge import Place, law
from theory.terms import HYPOTHESES
from theory.verdict import Finding, Verdict, Witness, undetermined

#: |mean| / standard error from which <grad F, z> is not zero-mean (a false alarm in 10^6 runs or so).
DRIFT_OF_NOISE = 5.0


def assumptions(frame: Frame) -> dict[str, Finding]:
    """A finding for every assumption, by name."""
    checks: dict[str, Callable[[Frame], Finding]] = {
        "A1": smooth,
        "A2": unbiased,
        "A3": bounded,
        "A4": step_pointwise,
        "A4E": step_expected,
        "A5": similar,
    }
    return {name: check(frame) for name, check in checks.items()}


def _open(name: str, reason: str) -> Finding:
    return undetermined(name, "assumption", HYPOTHESES[name].statement, reason)


def _holds(name: str, reason: str, checks: int = 1) -> Finding:
    return Finding(
        name, "assumption", HYPOTHESES[name].statement, Verdict.HOLDS, checks=checks, reason=reason
    )


def _refuted(name: str, reason: str, witness: Witness | None = None, checks: int = 1) -> Finding:
    return Finding(
        name,
        "assumption",
        HYPOTHESES[name].statement,
        Verdict.VIOLATED,
        checks=checks,
        witness=witness,
        reason=reason,
    )


def _law(name: str, fails: np.ndarray, place: Place, **extra: object) -> Finding:  # type: ignore[type-arg]
    return law(name, HYPOTHESES[name].statement, fails, place, group="assumption", **extra)  # type: ignore[arg-type]


def smooth(frame: Frame) -> Finding:
    """A1: refuted by a slope of a gradient above a given L, or a loss below F_inf."""
    probe = frame.log["probe"]
    lowest = estimators.infimum(frame)
    place = Place(probe.line, probe["window"])
    if lowest.known and len(probe):
        loss = frame.precision.loss(probe["loss"])
        found = _law(
            "A1", loss.hi < lowest.value, place, lhs=np.full(len(probe), lowest.value), rhs=probe["loss"],
            detail="a loss below F_inf",
        )  # fmt: skip
        if found.verdict is Verdict.VIOLATED:
            return found
    measured = estimators.smoothness(Frame(frame.log, {}, frame.slack))
    if "L" not in frame.given:
        least = f"; L >= {measured.low:.6g} on this run" if measured.known else ""
        return _open("A1", f"L is not given, and no log can prove one{least}")
    for slopes in (estimators.directional_smoothness(frame), estimators.gradient_smoothness(frame)):
        found = _law(
            "A1",
            slopes.lo > frame.given["L"],
            place,
            lhs=slopes.nominal,
            rhs=np.full(len(probe), frame.given["L"]),
            applies=~np.isnan(slopes.lo),
            detail="measured smoothness against L",
        )
        if found.verdict is Verdict.VIOLATED:
            return found
    if measured.known and measured.low > frame.given["L"]:
        return _refuted(
            "A1", f"a client's gradients differ by {measured.low:.6g} times the distance, more than L"
        )
    return _open("A1", f"L={frame.given['L']:.6g} is not contradicted by {measured.samples} measurements")


def unbiased(frame: Frame) -> Finding:
    """A2: refuted by measured noise above a given sigma^2, or by <grad F, z> with a mean."""
    terms, given = frame.log["terms"], frame.given.get("sigma_sq")
    measured = estimators.noise(Frame(frame.log, {}, frame.slack))
    if given is not None and measured.known and measured.low > given * (1 + 1e-9) and measured.samples >= 20:
        return _refuted(
            "A2", f"measured variance {measured.value:.6g} (95 %: from {measured.low:.6g}) > sigma^2"
        )
    if len(terms) and terms["grad_dot"].shape[1] == 7:
        products = terms["grad_dot"][:, 0]
        products = products[~np.isnan(products)]
        spread = float(products.std(ddof=1)) if len(products) > 1 else 0.0
        if len(products) >= 20 and spread > 0:
            score = float(products.mean()) / (spread / np.sqrt(len(products)))
            if abs(score) > DRIFT_OF_NOISE:
                return _refuted(
                    "A2", f"<grad F, z> has a mean {score:.1f} standard errors from 0", None, len(products)
                )
            return _open(
                "A2", f"<grad F, z> averages to {score:.1f} standard errors: not contradicted, not proved"
            )
    return _open(
        "A2", "conditional means cannot be seen in a log (sampling without replacement breaks it slightly)"
    )


def bounded(frame: Frame) -> Finding:
    """A3: refuted by ||w_s||^2 above a given W^2; E||g||^2 cannot be seen."""
    dispatch = frame.log["dispatch"]
    if "W_sq" in frame.given:
        norm = frame.precision.reduction(dispatch["norm_sq"])
        found = _law(
            "A3",
            norm.lo > frame.given["W_sq"],
            Place(dispatch.line, dispatch["version"], dispatch["client"]),
            lhs=dispatch["norm_sq"],
            rhs=np.full(len(dispatch), frame.given["W_sq"]),
            applies=~np.isnan(dispatch["norm_sq"]),
            detail="||w_s||^2 against W^2",
        )
        if found.verdict is Verdict.VIOLATED:
            return found
    largest, grad = estimators.weight_bound(frame), estimators.gradient_bound(frame)
    return _open(
        "A3",
        f"an expectation cannot be seen in a log; here W^2 = {largest.value:.6g}, G^2 about {grad.value:.6g}",
    )


def step_pointwise(frame: Frame) -> Finding:
    """A4 along the probed steps: gamma L_dir <= 1, exactly what I0 needs."""
    probe = frame.log["probe"]
    gamma = gather(frame.gamma, frame.probe_window)
    slopes = estimators.directional_smoothness(frame)
    known = ~np.isnan(slopes.lo) & ~np.isnan(gamma)
    found = _law(
        "A4",
        slopes.lo * gamma > 1,
        Place(probe.line, probe["window"]),
        applies=known,
        lhs=slopes.nominal * gamma,
        rhs=np.ones(len(probe)),
        detail="gamma L_dir against 1",
        reason=STATISTICS if frame.statistics_move else "no probes, or gamma is not known",
    )
    if found.verdict is Verdict.HOLDS and (slopes.hi[known] * gamma[known] > 1).any():
        return _open("A4", "gamma L_dir is 1 within rounding at a probe")
    return found


def step_expected(frame: Frame) -> Finding:
    """A4E: gamma <= 1/(2L), with L given or measured from below."""
    if frame.statistics_move:
        return _open("A4E", STATISTICS)
    gamma = frame.gamma[~np.isnan(frame.gamma)]
    smooth_at = estimators.smoothness(frame)
    if len(gamma) == 0 or not smooth_at.known:
        return _open("A4E", "gamma or L is not known")
    product = 2 * float(gamma.max()) * (smooth_at.value if smooth_at.kind == "given" else smooth_at.low)
    source = "given" if smooth_at.kind == "given" else "measured from below"
    text = f"2 gamma L = {product:.6g}, with L {source}"
    if product > 1:
        i = int(np.nanargmax(frame.gamma))
        where = Witness(
            window=int(frame.window_number[i]), line=frame.line("window", i), lhs=product, rhs=1.0,
            detail="2 gamma L against 1",
        )  # fmt: skip
        return _refuted("A4E", text, where)
    if smooth_at.kind == "given":
        return _holds("A4E", text)
    return _open("A4E", text)


def similar(frame: Frame) -> Finding:
    """A5: measured gaps against a given sigma_g^2."""
    probe = frame.log["probe"]
    gap = probe["client_gap_sq"]
    measured = estimators.dissimilarity(Frame(frame.log, {}, frame.slack))
    if not measured.known:
        return _open("A5", "client_gap_sq is not logged")
    if "sigma_g_sq" not in frame.given:
        return _open("A5", f"sigma_g^2 is not given; >= {measured.value:.6g} on this run")
    largest = gap.max(axis=1)
    box = frame.precision.gradient(largest, np.maximum(probe["client_grad_sq"].max(axis=1), largest))
    found = _law(
        "A5",
        box.lo > frame.given["sigma_g_sq"],
        Place(probe.line, probe["window"], gap.argmax(axis=1) * 1.0),
        lhs=largest,
        rhs=np.full(len(probe), frame.given["sigma_g_sq"]),
        applies=~np.isnan(largest),
    )
    every = len(np.unique(probe["window"])) == frame.windows
    if found.verdict is Verdict.HOLDS and not every:
        return _open("A5", "not every window is probed")
    return found
