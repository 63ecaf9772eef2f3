"""The pointwise inequalities on one run: each bound of `theory.bounds` with the run's numbers.

Windows without what a bound needs are left out; a bound that no window can serve is UNDETERMINED and
says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from theory import estimators
from theory.bounds import BOUNDS
from theory.conditions import Condition, weight_ratio
from theory.consistency import place_of
from theory.consistency_terms import error_norm, term_sq, window_of
from theory.frame import Frame, gather, rows_of
from theory.intervals import Interval
from theory.judge import Case, Place, judge, law
from theory.terms import HYPOTHESES
from theory.verdict import Finding, Verdict, undetermined

Floats = NDArray[np.float64]
_CONDITIONS = ("ALG", "TOPK", "NEST", "UNIF", "DELTA", "REPL")
_TOLERANCE = 1e-9


class Inequalities:
    """Builds the cases of one run.

    Args:
        frame: the run.
        assumed: findings of `theory.assumptions.assumptions`.
        conditions: of `theory.conditions.conditions`.
    """

    def __init__(self, frame: Frame, assumed: Mapping[str, Finding], conditions: Mapping[str, Condition]) -> None:
        self.frame, self.assumed, self.conditions = frame, assumed, conditions
        self.constants = estimators.constants(frame)

    def findings(self) -> Iterator[Finding]:
        """Every pointwise inequality, in the order of the equation numbers."""
        yield self.descent()
        yield self.telescoped()
        yield self.split("split_delta", "DELTA")
        yield self.split("split_replacement", "REPL")
        yield self.update()
        for part in ("mask", "staleness", "drift"):
            yield self.merged(part)
            yield self.lipschitz(part)
            yield self.lipschitz_merged(part)
            if part == "mask":
                yield self.topk()
                yield self.floored()
                yield self.aged()
                yield self.density_gap()
            elif part == "staleness":
                yield self.path()
        yield self.heterogeneity()
        yield self.uncovered()
        yield self.residual()
        yield self.coverage()
        yield self.nested_coverage()
        yield self.rank_gap()
        yield self.restored("average_restored")
        yield self.restored("rank_restored")

    # -- helpers -----------------------------------------------------------------------------------

    def missing(self, name: str) -> str:
        """Why the conditions of a bound are not met, or ''."""
        for key in BOUNDS[name].hypotheses:
            if key in _CONDITIONS and self.conditions[key].met is False and self.conditions[key].rows is None:
                return f"condition {key} is not met: {self.conditions[key].reason}"
            if key == "ALG" and self.conditions[key].met is False:
                return f"condition {key} is not met: {self.conditions[key].reason}"
        return ""

    def premises(self, name: str) -> dict[str, Verdict]:
        """The verdicts of a bound's assumptions."""
        return {key: self.assumed[key].verdict for key in BOUNDS[name].hypotheses if key in self.assumed}

    def undecided(self, name: str, reason: str) -> Finding:
        """UNDETERMINED, with a reason."""
        bound = BOUNDS[name]
        return undetermined(name, "inequality", bound.title, reason, equation=bound.number)

    def L(self) -> tuple[dict[str, Interval], tuple[str, ...]]:
        """The value of L, and the names of constants that are known from below only."""
        smooth = self.constants["L"]
        if not smooth.known:
            return {}, ()
        return {"L": Interval(smooth.value)}, () if smooth.kind == "given" else ("L",)

    @cached_property
    def probe_gamma(self) -> Floats:
        """gamma of each probe's window."""
        return gather(self.frame.gamma, self.frame.probe_window)

    @cached_property
    def probe_values(self) -> dict[str, Interval]:
        """The symbols of I0, one a probe."""
        table, p = self.frame.log["probe"], self.frame.precision
        grad, step = p.gradient(table["grad_sq"], table["grad_sq"]), p.reduction(table["step_sq"])
        slope = p.slope(table["grad_dot_step"], table["grad_sq"], table["step_sq"])
        gamma = Interval(self.probe_gamma)
        with np.errstate(invalid="ignore", divide="ignore"):
            error = step * gamma**-2 + slope * 2.0 / gamma + grad
        return {
            "F": p.loss(table["loss"]), "F_next": p.loss(table["loss_next"]), "grad_sq": grad, "step_sq": step,
            "grad_dot_step": slope, "gamma": gamma, "e_sq": error.clip_low(0.0),
        }  # fmt: skip

    # -- descent ------------------------------------------------------------------------------------

    def descent(self) -> Finding:
        """I0, at every probe."""
        table = self.frame.log["probe"]
        return judge(
            Case(
                BOUNDS["descent"], self.probe_values, place_of(self.frame, "probe"),
                applies=table["step_sq"] > 0, premises=self.premises("descent"),
                reason="no probes, or gamma is not known",
            )
        )  # fmt: skip

    def telescoped(self) -> Finding:
        """I1, over the longest stretch of consecutive probed windows."""
        frame, table = self.frame, self.frame.log["probe"]
        span = _longest_run(table["window"])
        if span is None or np.isnan(self.probe_gamma[span]).any():
            return self.undecided("telescoped", "no two consecutive windows are probed (probe_interval: 1)")
        values = {name: box[span] for name, box in self.probe_values.items()}
        values |= {"F_0": values["F"][0], "F_T": values["F_next"][-1]}
        first, last = int(table["window"][span][0]), int(table["window"][span][-1])
        place = Place(table.line[span][:1], table["window"][span][:1])
        finding = judge(
            Case(
                BOUNDS["telescoped"], values, place, premises=self.premises("telescoped"),
                note=f"windows {first} to {last} of {frame.windows}",
            )
        )  # fmt: skip
        return finding

    def split(self, name: str, condition: str) -> Finding:
        """||b||^2 from the terms."""
        if reason := self.missing(name):
            return self.undecided(name, reason)
        values = {key: term_sq(self.frame, key) for key in ("b_sq", "D_sq", "M_sq", "S_sq", "H_sq", "U_sq", "rho_sq")}
        values["gamma"] = Interval(self.frame.log["terms"]["gamma"])
        none = (values["b_sq"].hi == values["U_sq"].hi) & (values["b_sq"].lo == values["U_sq"].lo)
        return judge(
            Case(
                BOUNDS[name], values, place_of(self.frame, "terms"), attained=none, premises=self.premises(name),
                reason="no terms records",
            )
        )  # fmt: skip

    # -- terms ---------------------------------------------------------------------------------------

    @cached_property
    def term_segment(self) -> NDArray[np.int64]:
        """The terms record of each entry of term_arrivals."""
        return rows_of(self.frame.log["terms"]["window"], self.frame.log["term_arrivals"]["window"])

    @cached_property
    def single_share(self) -> NDArray[np.bool_]:
        """Terms records whose shares sum to one: merging is then an average, and bounds can be attained."""
        pibar = self.frame.log["term_arrivals"]["pibar"]
        count = len(self.frame.log["terms"])
        sums = np.bincount(self.term_segment, weights=pibar, minlength=count) if len(pibar) else np.zeros(count)
        return sums <= 1 + _TOLERANCE

    def entry(self, key: str) -> Interval:
        """A column of term_arrivals with its error."""
        table, p = self.frame.log["term_arrivals"], self.frame.precision
        if key in ("mask_sq", "stale_sq", "drift_sq"):
            return p.reduction(table[key])
        if key == "pibar":
            return Interval.around(table[key], 2.0**-50)
        error = gather(error_norm(self.frame), self.term_segment)
        value = table[key]
        radius = np.where(value == 0, 0.0, 2 * np.sqrt(np.maximum(value, 0)) * error + error**2)
        return Interval(np.maximum(value - radius, 0.0), value + radius)

    def term_case(self, name: str, values: dict[str, Interval], **extra: object) -> Finding:
        """A bound on one term, summed over the arrivals of each terms record."""
        if reason := self.missing(name):
            return self.undecided(name, reason)
        case = Case(
            BOUNDS[name], values, place_of(self.frame, "terms"), segment=self.term_segment,
            premises=self.premises(name), reason="no terms records, or arrivals without the fields needed",
            **extra,  # type: ignore[arg-type]
        )  # fmt: skip
        return judge(case)

    def merged(self, part: str) -> Finding:
        """A merged term from the clients' own (convexity)."""
        letter = {"mask": "M", "staleness": "S", "drift": "D"}[part]
        values = {
            f"{letter}_sq": term_sq(self.frame, f"{letter}_sq"), "pibar": self.entry("pibar"),
            f"{letter}_n_sq": self.entry(f"{letter}_sq"),
        }  # fmt: skip
        return self.term_case(f"{part}_merge", values, attained=self.single_share)

    def lipschitz(self, part: str) -> Finding:
        """A client's own term from a distance (smoothness)."""
        name = f"{part}_lipschitz"
        letter, distance = {"mask": "M", "staleness": "S", "drift": "D"}[part], _DISTANCE[part]
        smooth, below = self.L()
        if not smooth:
            return self.undecided(name, "L is neither given nor measured")
        table = self.frame.log["term_arrivals"]
        values = {**smooth, f"{letter}_n_sq": self.entry(f"{letter}_sq"), distance: self.entry(distance)}
        place = Place(table.line, table["window"], table["client"], table["dispatch"])
        return judge(
            Case(
                BOUNDS[name], values, place, applies=values[distance].hi > 0, premises=self.premises(name),
                below=below, reason="no terms records, or no client with such a distance",
            )
        )  # fmt: skip

    def lipschitz_merged(self, part: str) -> Finding:
        """A merged term from the clients' distances."""
        letter, distance = {"mask": "M", "staleness": "S", "drift": "D"}[part], _DISTANCE[part]
        smooth, below = self.L()
        if not smooth:
            return self.undecided(part, "L is neither given nor measured")
        values = {
            **smooth, f"{letter}_sq": term_sq(self.frame, f"{letter}_sq"), "pibar": self.entry("pibar"),
            distance: self.entry(distance),
        }  # fmt: skip
        return self.term_case(part, values, below=below)

    def update(self) -> Finding:
        """||Delta||^2 from the uploads, without any probe."""
        if reason := self.missing("update"):
            return self.undecided("update", reason)
        frame, table, arrival = self.frame, self.frame.log["window"], self.frame.log["arrival"]
        inside = frame.arrival_window >= 0
        model = np.where(np.isnan(frame.model_sq), 0.0, frame.model_sq)
        values = {
            "step_sq": frame.precision.stored(table["step_sq"], model),
            "pibar": Interval.around(arrival["pibar"][inside], 2.0**-50),
            "change_sq": frame.precision.reduction(arrival["change_sq"][inside]),
        }  # fmt: skip
        sums = frame.per_window(arrival["pibar"])
        found = judge(
            Case(
                BOUNDS["update"], values, place_of(frame, "window"), segment=frame.arrival_window[inside],
                applies=table["arrivals"] > 0, attained=sums <= 1 + _TOLERANCE, premises=self.premises("update"),
                reason="step_sq, pibar or change_sq is not logged",
            )
        )  # fmt: skip
        return found if found.verdict is Verdict.VIOLATED else self._single(found)

    def _single(self, found: Finding) -> Finding:
        """With one arrival the step *is* its change: an identity, which a wrong record breaks either way."""
        frame, table, arrival = self.frame, self.frame.log["window"], self.frame.log["arrival"]
        change = frame.precision.reduction(frame.per_window(arrival["change_sq"]))
        model = np.where(np.isnan(frame.model_sq), 0.0, frame.model_sq)
        step = frame.precision.stored(table["step_sq"], model)
        apart = (step.hi < change.lo) | (change.hi < step.lo)
        single = (table["arrivals"] == 1) & ~np.isnan(step.lo) & ~np.isnan(change.lo)
        equal = law(
            "update", BOUNDS["update"].title, apart, place_of(frame, "window"), applies=single, lhs=table["step_sq"],
            rhs=change.mid, group="inequality", detail="one arrival: the step is its change",
        )  # fmt: skip
        return equal if equal.verdict is Verdict.VIOLATED else found

    # -- masks ---------------------------------------------------------------------------------------

    def _mask_case(self, name: str, values: dict[str, Interval], rows: NDArray[np.bool_], reason: str) -> Finding:
        return judge(
            Case(
                BOUNDS[name], values, place_of(self.frame, "dispatch"), applies=rows,
                premises=self.premises(name), reason=reason,
            )
        )  # fmt: skip

    @cached_property
    def mask_values(self) -> dict[str, Interval]:
        """The symbols of the mask bounds, one a dispatch."""
        frame, table, reduction = self.frame, self.frame.log["dispatch"], self.frame.precision.reduction
        age = np.maximum(table["version"] - frame.ranking_version, 0.0)
        path = frame.path_sq(frame.ranking_version, table["version"])
        return {
            "masked_sq": reduction(table["masked_norm_sq"]), "prunable_sq": reduction(table["norm_sq"]),
            "q": Interval(frame.pruned_share), "k": Interval(frame.kept), "age": Interval(age),
            "ranked_sq": reduction(frame.norm_at_ranking), "aged_path_sq": reduction(path),
        }  # fmt: skip

    def topk(self) -> Finding:
        """Top-k contraction, where the ranking is fresh."""
        sparse = self.frame.log["dispatch"]["density"] < 1
        rows, reason = self.conditions["TOPK"].rows, self.conditions["TOPK"].reason
        fresh = sparse & (np.zeros_like(sparse) if rows is None else rows)
        return self._mask_case("topk", self.mask_values, fresh, f"no sub-model fits the hypothesis: {reason}")

    def floored(self) -> Finding:
        """The same under a per-layer floor, from the layers' sizes."""
        frame, floor = self.frame, self.frame.log.config("layer_floor")
        layers = frame.log.layout("layers")
        if not isinstance(floor, (int, float)) or floor <= 0 or frame.log.config("score") != "magnitude":
            return self.undecided("floored_topk", "the run has no layer floor over magnitudes")
        if not isinstance(layers, list):
            return self.undecided("floored_topk", "layout.layers is not logged")
        sizes = np.array([x["size"] for x in layers if x.get("kind") == "prunable"], dtype=np.float64)
        most = float(np.ceil(floor * sizes).clip(1).sum())
        values = {
            **self.mask_values, "phi_floor": Interval(float((np.floor(floor * sizes) / sizes).min())),
            "k_floor": Interval(most), "D_p": Interval(float(sizes.sum())),
        }  # fmt: skip
        dispatch = frame.log["dispatch"]
        rows = (dispatch["density"] < 1) & (dispatch["version"] == frame.ranking_version) & (frame.kept >= most)
        return self._mask_case("floored_topk", values, rows, "no sub-model is fresh and larger than the floor")

    def aged(self) -> Finding:
        """The same for rankings older than the model."""
        frame, table = self.frame, self.frame.log["dispatch"]
        if frame.log.config("score") != "magnitude" or frame.log.config("layer_floor") not in (0, None):
            return self.undecided("aged_topk", "the ranking is not by magnitude alone")
        rows = (table["density"] < 1) & (table["version"] > frame.ranking_version)
        return self._mask_case("aged_topk", self.mask_values, rows, "no sub-model was cut from an older ranking")

    def density_gap(self) -> Finding:
        """The mask error against the average density gap: terms records whose arrivals are all top-k."""
        smooth, below = self.L()
        if not smooth:
            return self.undecided("density_gap", "L is neither given nor measured")
        frame, entries, dispatch = self.frame, self.frame.log["term_arrivals"], self.frame.log["dispatch"]
        rows = rows_of(dispatch["dispatch"], entries["dispatch"])
        reduction = frame.precision.reduction
        bias = reduction(dispatch["full_masked_norm_sq"]) - reduction(dispatch["masked_norm_sq"])
        values = {
            **smooth, "M_sq": term_sq(frame, "M_sq"), "pibar": self.entry("pibar"),
            "q": Interval(gather(frame.pruned_share, rows)),
            "prunable_sq": reduction(gather(dispatch["norm_sq"], rows)),
            "bias_sq": Interval(gather(bias.lo, rows), gather(bias.hi, rows)).clip_low(0.0),
        }  # fmt: skip
        top = self.conditions["TOPK"].rows
        fresh = gather((np.zeros(len(dispatch)) if top is None else top).astype(np.float64), rows)
        count = len(frame.log["terms"])
        stale = np.bincount(self.term_segment, weights=fresh != 1, minlength=count) if len(rows) else np.zeros(count)
        sparse = np.bincount(self.term_segment, weights=values["q"].mid > 0, minlength=count) if len(rows) else stale
        return self.term_case("density_gap", values, below=below, applies=(stale == 0) & (sparse > 0))

    # -- staleness, heterogeneity, coverage -----------------------------------------------------------

    def path(self) -> Finding:
        """||w_t - w_s||^2 from the steps between; an identity when tau is 0 or 1."""
        frame, table = self.frame, self.frame.log["term_arrivals"]
        rows = rows_of(frame.log["arrival"]["dispatch"], table["dispatch"])
        tau = gather(frame.log["arrival"]["staleness"], rows)
        path = gather(frame.arrival_path_sq, rows)
        values = {
            "stale_sq": self.entry("stale_sq"), "tau": Interval(tau), "path_sq": frame.precision.reduction(path),
        }  # fmt: skip
        place = Place(table.line, table["window"], table["client"], table["dispatch"])
        reason = "no terms records, or step_sq is not logged"
        found = judge(Case(BOUNDS["path"], values, place, attained=tau <= 1, reason=reason))
        if found.verdict is Verdict.VIOLATED:
            return found
        apart = (values["stale_sq"].hi < values["path_sq"].lo) | (values["path_sq"].hi < values["stale_sq"].lo)
        equal = law(
            "path", BOUNDS["path"].title, apart, place, applies=tau <= 1, lhs=table["stale_sq"], rhs=path,
            group="inequality", detail="one window: the distance is the step",
        )  # fmt: skip
        return equal if equal.verdict is Verdict.VIOLATED else found

    def heterogeneity(self) -> Finding:
        """||H||^2 from the clients' gaps."""
        values = {
            "H_sq": term_sq(self.frame, "H_sq"), "pibar": self.entry("pibar"), "gap_sq": self.entry("gap_sq"),
        }  # fmt: skip
        return self.term_case("heterogeneity", values, attained=self.single_share)

    def uncovered(self) -> Finding:
        """||U||^2 is the gradient off C_t, and 0 when everything is covered."""
        frame, table = self.frame, self.frame.log["terms"]
        rows = rows_of(frame.log["probe"]["window"], table["window"])
        probe = gather(frame.log["probe"]["grad_uncovered_sq"], rows)
        covered = gather(frame.log["window"]["uncovered"], window_of(frame)) == 0
        reference = np.where(covered, 0.0, probe)
        error = error_norm(frame)
        radius = np.where(reference == 0, 0.0, 2 * np.sqrt(np.maximum(reference, 0)) * error + error**2)
        values = {"U_sq": term_sq(frame, "U_sq"), "grad_uncovered_sq": Interval.around(reference, radius)}
        return self.term_case("uncovered", values)

    def residual(self) -> Finding:
        """||rho||^2 from the distances since dispatch."""
        values = {
            "rho_sq": term_sq(self.frame, "rho_sq"), "pibar": self.entry("pibar"), "stale_sq": self.entry("stale_sq"),
        }  # fmt: skip
        return self.term_case("residual", values, attained=self.single_share)

    def _combinatorial(self, name: str, build: Callable[[], tuple[Floats, Floats, NDArray[np.bool_], Place]]) -> Finding:
        """Bounds made of counts and weights alone, compared with a relative tolerance of 1e-9."""
        if reason := self.missing(name):
            return self.undecided(name, reason)
        bound = BOUNDS[name]
        lhs, rhs, rows, place = build()
        known = rows & ~np.isnan(lhs) & ~np.isnan(rhs)
        found = law(
            name, bound.title, lhs > rhs * (1 + _TOLERANCE), place, applies=known, lhs=lhs, rhs=rhs,
            group="inequality", reason="pibar, weight or rankings are not logged, or no window qualifies",
        )  # fmt: skip
        if found.checks == 0:
            return self.undecided(name, found.reason)
        margin = float(((rhs - lhs)[known] / np.maximum(np.abs(rhs[known]), 1e-300)).min())
        extra = {"measured": float(lhs[known].mean()), "bound": float(rhs[known].mean()), "margin": margin}
        return Finding(**{**vars(found), **extra, "equation": bound.number})

    def coverage(self) -> Finding:
        """pibar Gamma <= kappa."""

        def build() -> tuple[Floats, Floats, NDArray[np.bool_], Place]:
            frame, arrival = self.frame, self.frame.log["arrival"]
            fewest = gather(frame.log["window"]["gamma_min"], frame.arrival_window)
            kappa = gather(weight_ratio(frame), frame.arrival_window)
            return arrival["pibar"] * fewest, kappa, np.ones(len(arrival), dtype=bool), place_of(frame, "arrival")

        return self._combinatorial("coverage", build)

    def nested_coverage(self) -> Finding:
        """sum pibar <= 1 + log(sum c / c of the densest)."""

        def build() -> tuple[Floats, Floats, NDArray[np.bool_], Place]:
            frame, arrival = self.frame, self.frame.log["arrival"]
            heavy, _ = frame.holders
            densest = np.full(frame.windows, np.inf)
            inside = frame.arrival_window >= 0
            np.minimum.at(densest, frame.arrival_window[inside], heavy[inside])
            with np.errstate(divide="ignore", invalid="ignore"):
                limit = 1 + np.log(frame.per_window(arrival["weight"]) / densest)
            busy = frame.log["window"]["arrivals"] > 0
            return frame.per_window(arrival["pibar"]), limit, frame.nested & busy, place_of(frame, "window")

        return self._combinatorial("nested_coverage", build)

    def rank_gap(self) -> Finding:
        """sum pibar q <= kappa sum q / rank."""

        def build() -> tuple[Floats, Floats, NDArray[np.bool_], Place]:
            frame, pibar = self.frame, self.frame.log["arrival"]["pibar"]
            q = gather(frame.pruned_share, frame.arrival_dispatch)
            lhs, by_rank = frame.per_window(pibar * q), frame.per_window(q / frame.rank)
            busy = frame.log["window"]["arrivals"] > 0
            return lhs, weight_ratio(frame) * by_rank, frame.nested & busy, place_of(frame, "window")

        return self._combinatorial("rank_gap", build)

    def restored(self, name: str) -> Finding:
        """The density gap of a window against its value with every density at its initial value."""

        def build() -> tuple[Floats, Floats, NDArray[np.bool_], Place]:
            frame = self.frame
            now, frozen = gather(frame.pruned_share, frame.arrival_dispatch), frozen_share(frame)
            raised = frame.per_window((now < frozen).astype(np.float64)) > 0
            if name == "average_restored":
                count = np.maximum(frame.log["window"]["arrivals"], 1)
                lhs, rhs = frame.per_window(now) / count, frame.per_window(frozen) / count
            else:
                lhs = frame.per_window(now / frame.rank)
                rhs = frame.per_window(frozen / frame.rank_of(initial_density(frame)))
            return lhs, rhs, raised, place_of(frame, "window")

        found = self._combinatorial(name, build)
        if found.checks == 0:
            return self.undecided(name, "no arrival has been restored, or the header has no densities")
        return found


_DISTANCE = {"mask": "mask_sq", "staleness": "stale_sq", "drift": "drift_sq"}


def initial_density(frame: Frame) -> Floats:
    """d_n^0 of each arrival, ``[A]``; nan where the header has none."""
    start = frame.log.header.get("densities")
    client = frame.log["arrival"]["client"]
    if not isinstance(start, list) or not all(isinstance(d, (int, float)) for d in start):
        return np.full(len(client), np.nan)
    values = np.array(start, dtype=np.float64)
    known = (client >= 0) & (client < len(values))
    return np.where(known, values[np.where(known, client, 0).astype(np.int64)], np.nan)


def frozen_share(frame: Frame) -> Floats:
    """q_n at the initial density, ``[A]``."""
    density, prunable = initial_density(frame), frame.log.layout("prunable")
    if not isinstance(prunable, (int, float)) or not prunable:
        return 1.0 - density
    return 1.0 - np.floor(density * prunable) / prunable


def _longest_run(windows: Floats) -> slice | None:
    """The longest stretch of consecutive windows (in log order) of at least two probes."""
    if len(windows) < 2:
        return None
    breaks = np.flatnonzero(np.diff(windows) != 1)
    starts = np.concatenate([[0], breaks + 1])
    stops = np.concatenate([breaks + 1, [len(windows)]])
    best = int(np.argmax(stops - starts))
    if stops[best] - starts[best] < 2:
        return None
    return slice(int(starts[best]), int(stops[best]))


def described(name: str) -> str:
    """The statement of a hypothesis."""
    return HYPOTHESES[name].statement
