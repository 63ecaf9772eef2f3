"""The bounds in expectation (equations 4, 7, 31 to 35), over the seeds that are given.

An expectation is not a property of one run. With R runs of one configuration the difference
``bound - measured`` of each run is a sample; the bound HOLDS if a 99 % Student interval of its mean
lies at or above zero, is VIOLATED if it lies below, and is UNDETERMINED otherwise. One run decides only
where there is no noise (sigma^2 = 0), because then it is its own expectation: the windows of one run
depend on each other and are no sample.

A log cannot establish A2. Where a bound that rests on it fails, a wrong sigma^2 is as likely a reason as
any, so the verdict is UNDETERMINED, and VIOLATED only where the log refutes a hypothesis outright.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from theory.bounds import BOUNDS
from theory.checks.conditions import contraction, fresh
from theory.checks.run import ACROSS_MOMENTS, Bools, Floats, Run
from theory.errors import MissingData
from theory.estimators import Estimate
from theory.frame import STATISTICS, gather, rows_of
from theory.numeric import evaluate
from theory.symbols import WindowMean
from theory.verdict import VACUOUS_FACTOR, Finding, Verdict

#: 99.5 % quantiles of Student's t for 1 to 20 degrees of freedom.
_T995 = (
    63.657, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169,
    3.106, 3.055, 3.012, 2.977, 2.947, 2.921, 2.898, 2.878, 2.861, 2.845,
)  # fmt: skip
_Z995 = 2.5758293035489004


#: Measured side, bound (each one value, or one a window or arrival), and the constants that were measured.
_Sides = tuple[Floats, Floats, tuple[str, ...]]
_Build = Callable[[Run, dict[str, Estimate], str], _Sides]


def student(degrees: int) -> float:
    """99.5 % quantile of Student's t (Cornish-Fisher above 20 degrees of freedom)."""
    if degrees <= len(_T995):
        return _T995[degrees - 1]
    return _Z995 + (_Z995**3 + _Z995) / (4 * degrees)


def expectations(runs: Sequence[Run]) -> Iterator[Finding]:
    """Every bound in expectation."""
    shared = {name: _shared(name, [run.constants[name] for run in runs]) for name in runs[0].constants}
    builders: dict[str, _Build] = {
        "noise": _noise,
        "expectation": _expectation,
        "drift_a_priori": _a_priori,
        "change_a_priori": _a_priori,
        "corollary": _corollary,
        "corollary_weighted": _corollary,
        "corollary_nested": _corollary,
    }
    for name, build in builders.items():
        yield _decide(name, runs, shared, build)


def _shared(name: str, found: Sequence[Estimate]) -> Estimate:
    """One constant for all runs: the largest, but the mean of the measured variances."""
    known = [estimate for estimate in found if estimate.known]
    if len(known) < len(found):
        return found[0] if not known else next(e for e in found if not e.known)
    if name == "sigma_sq" and found[0].kind != "given":
        return found[0]._replace(value=float(np.mean([e.value for e in found])))
    return min(found, key=lambda e: e.value) if name == "F_inf" else max(found, key=lambda e: e.value)


def _decide(
    name: str, runs: Sequence[Run], shared: dict[str, Estimate],
    build: _Build,
) -> Finding:  # fmt: skip
    first, bound = runs[0], BOUNDS[name]
    silent = shared["sigma_sq"].known and shared["sigma_sq"].value == 0
    if reason := _not_seeds(runs) or ("" if silent else _copied(runs)):
        return first.undecided(name, reason)
    for run in runs:
        if reason := _inapplicable(name, run):
            return first.undecided(name, reason)
    try:
        sides = [build(run, shared, name) for run in runs]
    except MissingData as error:
        return first.undecided(name, str(error))
    below = sides[0][2]
    lhs = np.array([float(side[0].mean()) for side in sides])
    rhs = np.array([float(side[1].mean()) for side in sides])
    samples = rhs - lhs
    if len(runs) > 1 and not silent and samples.any() and not samples.std():
        return first.undecided(name, "the runs give one and the same value: noise would make them differ")
    premises = {key: _worst(key, runs) for key in bound.hypotheses if key in first.assumed}
    refuted = [key for key, verdict in premises.items() if verdict is Verdict.VIOLATED]
    verdict, reason = _verdict(samples, float(lhs.mean()), float(rhs.mean()), silent=silent)
    if verdict is Verdict.VIOLATED and below:
        verdict, reason = Verdict.UNDETERMINED, f"it fails with {', '.join(below)} measured, not given"
    elif verdict is Verdict.VIOLATED and not refuted and premises.get("A2") is Verdict.UNDETERMINED:
        verdict = Verdict.UNDETERMINED
        reason += "; it fails, but hypothesis A2 (with this sigma^2) is not established on this run"
    elif verdict in (Verdict.HOLDS, Verdict.VACUOUS) and refuted:
        verdict = Verdict.UNDETERMINED
        reason = f"the numbers satisfy it, but hypothesis {', '.join(refuted)} is refuted"
    elif verdict is Verdict.VIOLATED and refuted:
        reason += f"; hypothesis {', '.join(refuted)} is refuted, so this is no counterexample"
    if bound.rhs.has(WindowMean) and (stopped := next(filter(None, map(_stopped, runs)), "")):
        verdict, reason = Verdict.UNDETERMINED, stopped
    if below and verdict in (Verdict.HOLDS, Verdict.VACUOUS):
        reason = "; ".join(
            part for part in (reason, f"with {', '.join(below)} measured: no certificate") if part
        )
    size = max(abs(float(rhs.mean())), abs(float(lhs.mean())), 1e-300)
    return Finding(
        name, "expectation", bound.title, verdict, float(lhs.mean()), float(rhs.mean()),
        float(samples.mean()) / size, len(samples), 0, not below,
        {key: value.value for key, value in premises.items()}, None, reason, bound.number,
    )  # fmt: skip


def _verdict(samples: Floats, lhs: float, rhs: float, *, silent: bool) -> tuple[Verdict, str]:
    """From samples of bound minus measured."""
    count, mean = len(samples), float(samples.mean())
    close = 1e-9 * max(abs(lhs), abs(rhs))
    if count == 1 and not silent:
        word = "above" if mean >= 0 else "below"
        return (
            Verdict.UNDETERMINED,
            f"one run is no expectation (here the bound lies {word} the measured value)",
        )
    half = 0.0 if count == 1 else student(count - 1) * float(samples.std(ddof=1)) / np.sqrt(count)
    text = f"mean of bound - measured over {count} samples: {mean:.4g} +- {half:.2g} (99 %)"
    if mean - half >= -close and not (half == 0 and abs(mean) <= close and rhs == lhs):
        vacuous = rhs > VACUOUS_FACTOR * max(lhs, 0.0)
        return (Verdict.VACUOUS if vacuous else Verdict.HOLDS), text
    if mean + half < -close:
        return Verdict.VIOLATED, text
    return (Verdict.HOLDS, text) if lhs == rhs == 0 else (Verdict.UNDETERMINED, text)


def _worst(key: str, runs: Sequence[Run]) -> Verdict:
    found = [run.assumed[key].verdict for run in runs]
    order = (Verdict.VIOLATED, Verdict.UNDETERMINED, Verdict.VACUOUS, Verdict.HOLDS)
    return min(found, key=order.index)


#: Header and configuration keys in which seeds of one configuration may differ.
_FREE = ("seed", "run_name", "output_dir", "progress", "type", "versions", "random_seed")


def _not_seeds(runs: Sequence[Run]) -> str:
    """Why the runs are not independent seeds of one configuration, or ''."""
    headers = [run.frame.log.header for run in runs]
    seeds = [header["seed"] for header in headers if header.get("seed") is not None]
    if len(set(map(str, seeds))) < len(seeds):
        return "two of the runs have the same seed"

    def fixed(mapping: Mapping[str, Any]) -> dict[str, Any]:
        inner = {k: fixed(v) for k, v in mapping.items() if isinstance(v, dict)}
        rest = {k: v for k, v in mapping.items() if k not in _FREE}
        return {**rest, **{k: v for k, v in inner.items() if k in rest}}

    if any(fixed(header) != fixed(headers[0]) for header in headers[1:]):
        return "the runs have different configurations"
    return ""


#: Columns that noise makes different in every run: table and key.
_NOISY = (("arrival", "change_sq"), ("window", "step_sq"), ("probe", "loss"))


def _copied(runs: Sequence[Run]) -> str:
    """Whether two runs have the same records, in words, or ''; independent seeds never have."""
    for table, key in _NOISY:
        columns = [run.frame.log[table][key] for run in runs]
        seen = [column.tobytes() for column in columns if np.nan_to_num(column).any()]
        if len(set(seen)) < len(seen):
            return f"two of the runs have the same {table}.{key} throughout: they are one run, not two seeds"
    return ""


def _stopped(run: Run) -> str:
    """Why the number of windows of a run was not fixed in advance, or ''."""
    log = run.frame.log
    planned = log.number("windows")
    early = planned is not None and run.frame.windows < planned
    if not early and "time_budget" not in log["end"].text("reason"):
        return ""
    return "hypothesis `T is fixed in advance` is not met: a run ended before its planned windows"


def _inapplicable(name: str, run: Run) -> str:
    """The condition that keeps a bound from applying to a whole run, or ''."""
    if name in ACROSS_MOMENTS and run.frame.statistics_move:
        return STATISTICS
    for key in BOUNDS[name].hypotheses:
        if key in run.conditions and key != "TOPK" and run.conditions[key].met is not True:
            return run.conditions[key].complaint
    return ""


def _constant(shared: dict[str, Estimate], name: str) -> float:
    if not shared[name].known:
        raise MissingData(f"{name} is not known: {shared[name].note}")
    return shared[name].value


def _measured(shared: dict[str, Estimate], *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if shared[name].kind not in ("given", "exact"))


def _one(values: Floats, name: str) -> float:
    """The one value of a quantity that the theory takes as constant."""
    seen = np.unique(values[~np.isnan(values)])
    if len(seen) != 1:
        raise MissingData(f"{name} is not one known number over the run")
    return float(seen[0])


def _every_window(run: Run, table: str, key: str) -> Floats:
    """A column of probes or terms, one value for each window."""
    rows = rows_of(run.frame.log[table]["window"], run.frame.window_number)
    values = gather(run.frame.log[table][key], rows)
    if len(values) == 0 or np.isnan(values).any():
        raise MissingData(f"{table} records with {key} are needed in every window")
    return values


def _sum(run: Run, values: Floats) -> Floats:
    """Sum over the arrivals of each window; raises where one is missing."""
    result = run.frame.per_window(values)
    if np.isnan(result).any():
        raise MissingData("pibar is not logged for every arrival")
    return result


def _noise(run: Run, shared: dict[str, Estimate], name: str) -> _Sides:
    """Equation 4, window by window."""
    lhs = _every_window(run, "terms", "z_sq")
    steps = _one(run.frame.steps, "K")
    shares = _sum(run, run.frame.log["arrival"]["pibar"] ** 2)
    rhs = _constant(shared, "sigma_sq") / steps * shares
    return lhs, rhs, _measured(shared, "sigma_sq")


def _expectation(run: Run, shared: dict[str, Estimate], name: str) -> _Sides:
    """I2."""
    pibar = run.frame.log["arrival"]["pibar"]
    rhs = evaluate(
        BOUNDS[name].rhs,
        {
            **_start(run, shared), "L": _constant(shared, "L"), "sigma_sq": _constant(shared, "sigma_sq"),
            "K": _one(run.frame.steps, "K"), "pibar": pibar, "b_sq": _every_window(run, "terms", "b_sq"),
        },
        {"ArrivalSum": run.frame.per_window},
    )  # fmt: skip
    _sum(run, pibar)
    lhs = _every_window(run, "probe", "grad_sq")
    return np.array([lhs.mean()]), np.atleast_1d(rhs), _measured(shared, "L", "sigma_sq")


def _start(run: Run, shared: dict[str, Estimate]) -> dict[str, float]:
    loss = _every_window(run, "probe", "loss")
    gamma = _one(run.frame.gamma, "gamma")
    return {
        "F_0": float(loss[0]),
        "F_inf": _constant(shared, "F_inf"),
        "gamma": gamma,
        "T": float(run.frame.windows),
    }


def _a_priori(run: Run, shared: dict[str, Estimate], name: str) -> _Sides:
    """Equations 31 and 32, arrival by arrival."""
    key = {"drift_a_priori": "drift_sq", "change_a_priori": "change_sq"}[name]
    values = run.frame.log["arrival"][key]
    if len(values) == 0 or np.isnan(values).any():
        raise MissingData(f"{key} is not logged for every arrival")
    eta, steps = _one(run.frame.eta, "eta"), _one(run.frame.steps, "K")
    rhs = evaluate(BOUNDS[name].rhs, {"eta": eta, "K": steps, "G_sq": _constant(shared, "G_sq")})
    return values, np.atleast_1d(rhs), _measured(shared, "G_sq")


def _corollary(run: Run, shared: dict[str, Estimate], name: str) -> _Sides:
    """Equations 33 to 35."""
    frame = run.frame
    arrivals, fewest = frame.log["window"]["arrivals"], frame.log["window"]["gamma_min"]
    busy: Bools = arrivals > 0
    most = float(arrivals.max()) if len(arrivals) else 0.0
    pibar = frame.log["arrival"]["pibar"]
    values: dict[str, ArrayLike] = {
        **_start(run, shared), "K": _one(frame.steps, "K"),
        **{key: _constant(shared, key) for key in ("L", "sigma_sq", "sigma_g_sq", "G_sq", "W_sq", "tau_max")},
        "A": arrivals, "Gamma": np.where(busy, fewest, 1.0), "Phi": _constant(shared, "Phi"),
        "P_max": shared["P_max"].value, "H_max": harmonic(most), "pibar": pibar,
        "rank": frame.rank, "theta": gather(mask_factor(run), frame.arrival_dispatch),
        "bias_sq": np.maximum(frame.sent("full_masked_norm_sq") - frame.sent("masked_norm_sq"), 0.0),
        "U_sq": _every_window(run, "probe", "grad_uncovered_sq"),
    }  # fmt: skip
    rhs = evaluate(BOUNDS[name].rhs, values, {"ArrivalSum": frame.per_window})
    if not np.isfinite(rhs):
        raise MissingData("pibar, norms or supports are not logged for every arrival")
    lhs = _every_window(run, "probe", "grad_sq")
    return (
        np.array([lhs.mean()]),
        np.atleast_1d(rhs),
        _measured(shared, "L", "sigma_sq", "sigma_g_sq", "G_sq", "W_sq"),
    )


def harmonic(n: float) -> float:
    """1 + 1/2 + ... + 1/n, from above (exact up to 10,000; then by Euler and Maclaurin)."""
    if n <= 10_000:
        return float(np.sum(1.0 / np.arange(1, n + 1)))
    return float(np.log(n) + np.euler_gamma + 0.5 / n)


def mask_factor(run: Run) -> Floats:
    """The share of ||w_s||^2 that a mask may leave out, ``[S]``: derived where it can be, else measured."""
    table = run.frame.log["dispatch"]
    with np.errstate(invalid="ignore", divide="ignore"):
        measured = np.where(table["norm_sq"] > 0, table["masked_norm_sq"] / table["norm_sq"], 0.0)
    derived = np.where(fresh(run.frame) | (table["density"] == 1), contraction(run.frame), np.nan)
    return np.where(np.isnan(derived), measured, derived)
