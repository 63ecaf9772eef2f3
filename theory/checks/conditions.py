"""Which structural conditions does this run meet: the algorithm, the form, the masks, the weights?

A condition that is not met is no fault of the run; it says which bounds do not apply. So its finding
(group ``condition``) is HOLDS, or UNDETERMINED with the reason, and never VIOLATED.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from theory.errors import shown
from theory.frame import Bools, Floats, Frame
from theory.options import LATER
from theory.terms import HYPOTHESES
from theory.verdict import Finding, Verdict, undetermined


class Condition(NamedTuple):
    """Whether one condition is met.

    Attributes:
        name: key of `HYPOTHESES`.
        met: for all rows; None where the log cannot tell.
        rows: where it is met: ``[W]`` (NEST, UNIF, ALG) or ``[S]`` (TOPK); None for the whole run.
        reason: in words.
        checks: rows looked at.
    """

    name: str
    met: bool | None
    rows: Bools | None
    reason: str
    checks: int = 1

    @property
    def complaint(self) -> str:
        """Why a bound that needs the condition is not checked; '' where it is met."""
        if self.met:
            return ""
        return (
            f"condition {self.name} {'cannot be told' if self.met is None else 'is not met'}: {self.reason}"
        )

    @property
    def finding(self) -> Finding:
        """The condition as a row of the report."""
        title = HYPOTHESES[self.name].statement
        if self.met:
            return Finding(
                self.name, "condition", title, Verdict.HOLDS, checks=self.checks, reason=self.reason
            )
        prefix = "cannot be told: " if self.met is None else "not met: "
        return undetermined(self.name, "condition", title, prefix + self.reason, checks=self.checks)


def conditions(frame: Frame) -> dict[str, Condition]:
    """Every structural condition, by name."""
    found = (algorithm(frame), form(frame, "delta", "DELTA"), form(frame, "replacement", "REPL"))
    return {c.name: c for c in (*found, top_k(frame), nested(frame), uniform(frame))}


#: config key -> values under which the run is the algorithm analysed.
ANALYSED: dict[str, tuple[Any, ...]] = {
    "aggregation": ("mask_aware",),
    "update_scope": ("arrivals",),
    "mixing": (False,),
    "server_step": (1,),
    "client_momentum": (0,),
    "gradient_clip": (None,),
}


#: Options that make clients minimise something else than the loss that is analysed.
OBJECTIVES = ("local_objective", "proximal", "label_masks")


def algorithm(frame: Frame) -> Condition:
    """ALG: read off the header and the arrivals."""
    log, busy = frame.log, frame.log["window"]["arrivals"] > 0
    rows = ~busy | ~np.isnan(frame.gamma)
    config = log.header.get("config")
    if config is None:
        return Condition("ALG", None, rows, "the header has no config")
    departures = [
        f"{key}={shown(config[key])}"
        for key, ok in ANALYSED.items()
        if key in config and config[key] not in ok
    ]
    if log.fedml("weight_decay") not in (None, 0):
        departures.append(f"weight_decay={log.fedml('weight_decay')}")
    if (log.fedml("client_optimizer") or "sgd").lower() != "sgd":
        departures.append(f"client_optimizer={shown(log.fedml('client_optimizer'))}")
    other = [key for key in OBJECTIVES if config.get(key, LATER[key]) != LATER[key]]
    departures += [f"{key}={shown(config[key])}" for key in other]
    if frame.hooked:
        departures.append(frame.hook)
    if departures:
        return Condition("ALG", False, np.zeros_like(rows), ", ".join(departures))
    missing = [key for key in ANALYSED if key not in config]
    if missing:
        return Condition("ALG", None, rows, f"config does not say {', '.join(missing)}")
    if not rows.all():
        steps = log["arrival"].logged("steps")
        why = (
            "arrivals made different numbers of local steps"
            if steps
            else "eta or the local steps are not logged"
        )
        return Condition("ALG", False if steps else None, rows, f"{why} in {int((~rows).sum())} windows")
    return Condition("ALG", True, rows, "as the header says", int(busy.sum()))


def form(frame: Frame, wanted: str, name: str) -> Condition:
    """DELTA or REPL."""
    if frame.form is None:
        return Condition(name, None, None, "the update form is not logged")
    return Condition(name, frame.form == wanted, None, f"update_form={frame.form}")


def top_k(frame: Frame) -> Condition:
    """TOPK: magnitude ranking without a layer floor, made on the very model that is sent."""
    score, floor = frame.log.config("score"), frame.log.config("layer_floor")
    dispatch = frame.log["dispatch"]
    dense = dispatch["density"] == 1
    if dense.all():
        return Condition("TOPK", True, dense, "every sub-model is the whole model", len(dispatch))
    if score != "magnitude" or floor not in (0, None):
        known = None if score is None else False
        return Condition("TOPK", known, dense, f"score={shown(score)}, layer_floor={floor}")
    rows = dense | fresh(frame)
    if np.isnan(frame.ranking_version[~dense]).any():
        return Condition("TOPK", None, rows, "the age of the rankings is not known")
    count = int((~rows).sum())
    reason = (
        f"{count} of {int((~dense).sum())} sub-models were cut from an older ranking"
        if count
        else "fresh rankings"
    )
    return Condition("TOPK", count == 0, rows, reason, len(rows))


def contraction(frame: Frame) -> Floats:
    """theta_n of each dispatch, ``[S]``: the share of ``||w_v||^2`` that its mask leaves out at most.

    w_v is the model that the ranking was made of. 1 - k/D_p for top-k masks (equation 12), the floored factor
    under a layer floor (equation 13), 0 at density 1; nan where none follows (another score, a sub-model
    smaller than the floor).
    """
    dense = frame.log["dispatch"]["density"] == 1
    bounds = floor_bounds(frame)
    if bounds is not None:
        least, most, prunable = bounds
        floored = (1 - least) * (prunable - frame.kept) / (prunable - most)
        return np.where(dense, 0.0, np.where(frame.kept >= most, floored, np.nan))
    plain = frame.log.config("score") == "magnitude" and frame.log.config("layer_floor") in (0, None)
    return np.where(dense, 0.0, frame.pruned_share if plain else np.nan)


def fresh(frame: Frame) -> Bools:
    """Dispatches whose ranking was made of the very model that they send, ``[S]``."""
    return np.asarray(frame.log["dispatch"]["version"] == frame.ranking_version)


def floor_bounds(frame: Frame) -> tuple[float, float, float] | None:
    """(least kept share of a layer, most coordinates kept by the floor, D_p), however shares are rounded.

    None unless the ranking is by magnitude under a layer floor and the layers are logged.
    """
    floor = frame.log.config("layer_floor") or 0
    if not 0 < floor <= 1 or frame.log.config("score") != "magnitude":
        return None
    sizes = np.array([size for size in frame.log.layers("prunable") if size])
    if not len(sizes):
        return None
    most = float(np.ceil(floor * sizes).clip(1).sum())
    return float((np.floor(floor * sizes) / sizes).min()), most, float(sizes.sum())


def nested(frame: Frame) -> Condition:
    """NEST: the arrivals of a window share a ranking."""
    several = frame.log["window"]["arrivals"] > 1
    if not several.any():
        return Condition("NEST", True, frame.nested, "no window has two arrivals", 0)
    if (frame.log["dispatch"].codes["ranking"] < 0).all():
        return Condition("NEST", None, frame.nested, "rankings are not logged")
    if frame.lacks_rows:
        reason = "label_masks=true: a client's mask lacks the rows of classes that its data do not have"
        return Condition("NEST", False, frame.nested, reason, int(several.sum()))
    count = int((several & ~frame.nested).sum())
    reason = (
        f"{count} of {int(several.sum())} windows merge masks of different rankings"
        if count
        else "one ranking each"
    )
    return Condition("NEST", count == 0, frame.nested, reason, int(several.sum()))


def uniform(frame: Frame) -> Condition:
    """UNIF: one weight in each window."""
    if not frame.log["arrival"].logged("weight"):
        return Condition("UNIF", None, None, "weight is not logged")
    kappa = weight_ratio(frame)
    rows = ~(kappa > 1)
    count = int((~rows).sum())
    reason = (
        f"{count} windows have unequal weights (largest ratio {np.nanmax(kappa):.3g})"
        if count
        else "one weight"
    )
    return Condition("UNIF", count == 0, rows, reason, len(rows))


def weight_ratio(frame: Frame) -> Floats:
    """kappa_t, the largest over the smallest weight of each window, ``[W]``; 1 where nothing arrived."""
    weight = frame.log["arrival"]["weight"]
    low, high = frame.least(weight), frame.most(weight)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.isinf(low), 1.0, high / low)
