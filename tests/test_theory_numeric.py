"""Both sides of every bound against formulas written here by hand, on exact fractions.

These oracles do not share a line with `theory.bounds`: a constant, sign or exponent that changes there
without changing here fails, in particular one that only loosens a bound, which no inequality test sees.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import log, pi
from typing import Any

import numpy as np
import pytest

from theory import numeric
from theory.bounds import BOUNDS
from theory.intervals import Interval, constant_interval, evaluate, evaluate_iv

Q = Fraction

#: One value for every symbol: dyadic, all different, arrays of axis arrival with three entries.
VALUES: dict[str, Any] = {
    "L": Q(3, 2), "K": Q(4), "T": Q(8), "eta": Q(1, 16), "gamma": Q(1, 4), "sigma_sq": Q(5, 8),
    "sigma_g_sq": Q(7, 4), "G_sq": Q(11, 2), "W_sq": Q(13, 4), "F_0": Q(9), "F_T": Q(3),
    "F_inf": Q(1, 2), "Phi": Q(5, 2), "P_max": Q(9, 4), "H_max": Q(11, 8), "tau_max": Q(3),
    "kappa": Q(5, 4), "D_p": Q(64), "k_floor": Q(8), "phi_floor": Q(1, 8), "F": Q(17, 4),
    "F_next": Q(15, 4), "grad_sq": Q(19, 8), "grad_dot_step": Q(-3, 8), "step_sq": Q(5, 16),
    "e_sq": Q(21, 8), "b_sq": Q(23, 8), "z_sq": Q(3, 16), "D_sq": Q(1, 8), "M_sq": Q(3, 8),
    "S_sq": Q(5, 64), "H_sq": Q(7, 8), "U_sq": Q(9, 64), "rho_sq": Q(11, 64),
    "grad_uncovered_sq": Q(13, 64), "A": Q(3), "Gamma": Q(2), "weight_sum": Q(8), "weight_dense": Q(2),
    "q": Q(3, 4), "k": Q(24), "d": Q(3, 8), "theta": Q(5, 8), "q_0": Q(7, 8), "prunable_sq": Q(25, 8),
    "masked_sq": Q(27, 16), "ranked_sq": Q(29, 8), "age": Q(5), "aged_path_sq": Q(31, 32),
    "decrease": Q(1, 32), "masked_grad_sq": Q(33, 16), "restored_grad_sq": Q(35, 16), "seconds": Q(2),
    "seconds_restored": Q(6), "pibar": [Q(1, 2), Q(1, 4), Q(3, 4)], "rank": [Q(1), Q(2), Q(4)],
    "rank_0": [Q(2), Q(4), Q(1)], "tau": [Q(0), Q(2), Q(3)], "path_sq": [Q(0), Q(1, 4), Q(3, 8)],
    "stale_sq": [Q(0), Q(5, 8), Q(7, 8)], "mask_sq": [Q(0), Q(9, 8), Q(11, 8)],
    "drift_sq": [Q(1, 16), Q(3, 16), Q(5, 16)], "gap_sq": [Q(13, 8), Q(15, 8), Q(17, 8)],
    "change_sq": [Q(19, 16), Q(21, 16), Q(23, 16)], "bias_sq": [Q(0), Q(1, 64), Q(3, 64)],
    "M_n_sq": [Q(0), Q(25, 16), Q(27, 16)], "S_n_sq": [Q(0), Q(29, 16), Q(31, 16)],
    "D_n_sq": [Q(33, 32), Q(35, 32), Q(37, 32)],
}  # fmt: skip

#: Symbols of axis dispatch that stand inside a sum over arrivals in some bounds.
SUMMED: dict[str, list[Fraction]] = {
    "q": [Q(0), Q(1, 2), Q(3, 4)], "q_0": [Q(1, 4), Q(3, 4), Q(7, 8)], "theta": [Q(0), Q(5, 8), Q(7, 8)],
    "prunable_sq": [Q(25, 8), Q(27, 8), Q(29, 8)],
}  # fmt: skip

V = VALUES
a, b, c = range(3)


def dot(*factors: list[Fraction]) -> Fraction:
    return sum((Q(np.prod([f[i] for f in factors])) for i in range(3)), Q(0))


def ranked(values: list[Fraction], ranks: list[Fraction]) -> Fraction:
    return sum((v / r for v, r in zip(values, ranks, strict=True)), Q(0))


def left_out() -> list[Fraction]:
    """theta W^2 + beta^2 of each arrival."""
    return [SUMMED["theta"][i] * V["W_sq"] + V["bias_sq"][i] for i in range(3)]


def start() -> Fraction:
    return 2 * (V["F_0"] - V["F_inf"]) / (V["gamma"] * V["T"])


def split() -> Fraction:
    return V["D_sq"] + V["M_sq"] + V["S_sq"] + V["H_sq"]


def corollary(shares_sq: Fraction | float, gap: Fraction, p: Fraction) -> Fraction | float:
    L2, g2 = V["L"] ** 2, V["gamma"] ** 2
    return (
        start()
        + 2 * V["L"] * V["gamma"] * V["sigma_sq"] / V["K"] * shares_sq
        + 4 * L2 * gap
        + 4 * p * V["sigma_g_sq"]
        + Q(4, 3) * L2 * g2 * V["G_sq"] * p
        + 4 * L2 * g2 * V["G_sq"] * p * p * V["tau_max"] * V["tau_max"]
        + V["U_sq"]
    )


#: name -> (left side, right side), written out. Windows: one window of three arrivals, so means are values.
ORACLES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "descent": lambda: (V["F_next"], V["F"] - V["gamma"] * V["grad_sq"] / 2 + V["gamma"] * V["e_sq"] / 2),
    "telescoped": lambda: (
        V["grad_sq"], (2 * (V["F_0"] - V["F_T"]) + V["gamma"] * V["e_sq"]) / V["gamma"],
    ),
    "noise": lambda: (V["z_sq"], V["sigma_sq"] / V["K"] * dot(V["pibar"], V["pibar"])),
    "split_delta": lambda: (V["b_sq"], 4 * split() + V["U_sq"]),
    "split_replacement": lambda: (
        V["b_sq"], 5 * split() + 5 * V["rho_sq"] / (V["gamma"] * V["gamma"]) + V["U_sq"],
    ),
    "expectation": lambda: (
        V["grad_sq"],
        start() + 2 * V["L"] * V["gamma"] * V["sigma_sq"] / V["K"] * dot(V["pibar"], V["pibar"]) + V["b_sq"],
    ),
    "update": lambda: (V["step_sq"], dot(V["pibar"], V["change_sq"])),
    "mask_merge": lambda: (V["M_sq"], dot(V["pibar"], V["M_n_sq"])),
    "mask_lipschitz": lambda: (V["M_n_sq"], [V["L"] * V["L"] * x for x in V["mask_sq"]]),
    "mask": lambda: (V["M_sq"], V["L"] * V["L"] * dot(V["pibar"], V["mask_sq"])),
    "topk": lambda: (V["masked_sq"], V["q"] * V["prunable_sq"]),
    "floored_topk": lambda: (V["masked_sq"], Q(7, 8) * (64 - 24) / Q(64 - 8) * V["prunable_sq"]),
    "aged_topk": lambda: (
        V["masked_sq"], 2 * V["theta"] * V["ranked_sq"] + 2 * V["age"] * V["aged_path_sq"],
    ),
    "density_gap": lambda: (
        V["M_sq"],
        V["L"] * V["L"]
        * (dot(V["pibar"], SUMMED["theta"], SUMMED["prunable_sq"]) + dot(V["pibar"], V["bias_sq"])),
    ),
    "staleness_merge": lambda: (V["S_sq"], dot(V["pibar"], V["S_n_sq"])),
    "staleness_lipschitz": lambda: (V["S_n_sq"], [V["L"] * V["L"] * x for x in V["stale_sq"]]),
    "staleness": lambda: (V["S_sq"], V["L"] * V["L"] * dot(V["pibar"], V["stale_sq"])),
    "path": lambda: (V["stale_sq"], [t * p for t, p in zip(V["tau"], V["path_sq"], strict=True)]),
    "drift_merge": lambda: (V["D_sq"], dot(V["pibar"], V["D_n_sq"])),
    "drift_lipschitz": lambda: (V["D_n_sq"], [V["L"] * V["L"] * x for x in V["drift_sq"]]),
    "drift": lambda: (V["D_sq"], V["L"] * V["L"] * dot(V["pibar"], V["drift_sq"])),
    "heterogeneity": lambda: (V["H_sq"], dot(V["pibar"], V["gap_sq"])),
    "uncovered": lambda: (V["U_sq"], V["grad_uncovered_sq"]),
    "residual": lambda: (V["rho_sq"], dot(V["pibar"], V["stale_sq"])),
    "coverage": lambda: ([p * V["Gamma"] for p in V["pibar"]], V["kappa"]),
    "nested_coverage": lambda: (sum(V["pibar"]), 1 + log(4)),
    "rank_gap": lambda: (dot(V["pibar"], SUMMED["q"]), V["kappa"] * ranked(SUMMED["q"], V["rank"])),
    "average_restored": lambda: (sum(SUMMED["q"]) / 3, sum(SUMMED["q_0"]) / 3),
    "rank_restored": lambda: (ranked(SUMMED["q"], V["rank"]), ranked(SUMMED["q_0"], V["rank_0"])),
    "drift_a_priori": lambda: (V["drift_sq"], Q(0 + 1 + 4 + 9, 4) * V["eta"] * V["eta"] * V["G_sq"]),
    "change_a_priori": lambda: (V["change_sq"], 16 * V["eta"] * V["eta"] * V["G_sq"]),
    "corollary": lambda: (V["grad_sq"], corollary(Q(3, 4), sum(left_out()) / 2, V["Phi"])),
    "corollary_weighted": lambda: (
        V["grad_sq"], corollary(dot(V["pibar"], V["pibar"]), dot(V["pibar"], left_out()), V["P_max"]),
    ),
    "corollary_nested": lambda: (
        V["grad_sq"], corollary(pi * pi / 6, ranked(left_out(), V["rank"]), V["H_max"]),
    ),
    "stalled_step": lambda: (V["decrease"], Q(3, 2) * V["eta"] * V["masked_grad_sq"]),
    "restored_step": lambda: (V["eta"] * V["restored_grad_sq"] / 2, V["decrease"]),
    "restore_when": lambda: (3 * V["masked_grad_sq"] * 6 / 2, V["restored_grad_sq"]),
}  # fmt: skip

_SUM_INSIDE = ("density_gap", "rank_gap", "average_restored", "rank_restored")


def values_for(name: str) -> dict[str, Any]:
    """Values of every symbol, in the shapes that bound `name` wants."""
    values = {**VALUES, **SUMMED} if name in _SUM_INSIDE or name.startswith("corollary") else dict(VALUES)
    arrays = {key: np.array(value, dtype=np.float64) for key, value in values.items()}
    if "WindowMean" in str(BOUNDS[name].rhs) or "WindowSum" in str(BOUNDS[name].rhs):
        windowed = ("grad_sq", "e_sq", "b_sq", "U_sq", "A", "Gamma")
        arrays |= {key: arrays[key][None] for key in windowed}
        if name == "telescoped":
            arrays["gamma"] = arrays["gamma"][None]
        arrays |= {key: value[None] for key, value in arrays.items() if value.shape == (3,)}
    return arrays


def test_every_bound_has_an_oracle() -> None:
    assert set(ORACLES) == set(BOUNDS)


@pytest.mark.parametrize("name", list(BOUNDS))
def test_both_sides(name: str) -> None:
    expected = ORACLES[name]()
    arrays = values_for(name)
    for side, want in zip(("lhs", "rhs"), expected, strict=True):
        found = np.asarray(numeric.function(name, side)(**arrays))
        assert np.allclose(found, np.array(want, dtype=np.float64), rtol=1e-14, atol=0), (name, side)


@pytest.mark.parametrize("name", list(BOUNDS))
def test_interval_evaluations_contain_the_oracle(name: str) -> None:
    """`Interval` encloses the exact value of both sides, tightly."""
    bound, expected = BOUNDS[name], ORACLES[name]()
    arrays = values_for(name)
    reductions = {
        "ArrivalSum": lambda x: Interval(x.lo.sum(-1) * (1 - 1e-15), x.hi.sum(-1) * (1 + 1e-15)),
        "WindowSum": lambda x: Interval(x.lo.sum(-1), x.hi.sum(-1)),
        "WindowMean": lambda x: Interval(x.lo.mean(-1), x.hi.mean(-1)),
        "log": Interval.log,
    }
    for expression, want in zip((bound.lhs, bound.rhs), expected, strict=True):
        boxes = {key: Interval(value) for key, value in arrays.items()}
        found = evaluate(expression, boxes, reductions, constant_interval)
        exact = np.array(want, dtype=np.float64)
        assert np.all(found.lo <= exact * (1 + 1e-15)) and np.all(exact * (1 - 1e-15) <= found.hi)
        assert np.all(found.hi - found.lo <= 1e-12 * np.abs(exact) + 1e-300)


@pytest.mark.parametrize("name", [n for n, bound in BOUNDS.items() if "WindowMean" not in str(bound.rhs)])
def test_the_precise_evaluation_contains_the_oracle(name: str) -> None:
    """mpmath.iv on the same values: exact inputs give an interval of the working precision's width."""
    bound, expected = BOUNDS[name], ORACLES[name]()
    pairs: dict[str, Any] = {}
    for key, value in values_for(name).items():
        rows = [(float(x), float(x)) for x in value.ravel()]
        pairs[key] = rows if value.ndim else rows[0]
    for expression, want in zip((bound.lhs, bound.rhs), expected, strict=True):
        if isinstance(want, list):
            pairs |= {key: rows[1] for key, rows in pairs.items() if isinstance(rows, list)}
            want = want[1]
        box = evaluate_iv(expression, pairs)
        assert box.delta <= abs(want) * 1e-40
        assert float(box.a) == pytest.approx(float(want), rel=1e-15)


def test_missing_values_are_named() -> None:
    with pytest.raises(TypeError, match="mask_sq, pibar"):
        numeric.mask(L=1.0)
    with pytest.raises(AttributeError):
        numeric.no_such_bound  # noqa: B018


def test_docstrings_carry_meaning_axis_and_unit() -> None:
    text = numeric.mask.__doc__
    assert "equation 11" in text and "axis arrival" in text and "weight^2" in text


def test_windows_are_means_over_the_last_axis() -> None:
    """Two windows with different arrivals, padded with zeros."""
    pibar = np.array([[0.5, 0.5], [1.0, 0.0]])
    common = {"F_0": 3.0, "F_inf": 1.0, "gamma": 0.5, "T": 2.0, "L": 1.0, "sigma_sq": 2.0, "K": 1.0}
    found = numeric.expectation(pibar=pibar, b_sq=[1.0, 3.0], **common)
    assert found == 2 * 2 / (0.5 * 2) + 2 * 0.5 * 2 * ((0.5 + 1.0) / 2) + 2.0
