"""The algebra of the derivations, by sympy: every step that is an identity is one."""

from __future__ import annotations

import pytest
import sympy
from sympy import Rational, Symbol, simplify

import fedgmr_plugin
from theory import symbols as s
from theory.bounds import BOUNDS, IDENTITY
from theory.citation import ENTRIES, cite
from theory.symbols import TABLE
from theory.terms import HYPOTHESES


def zero(expression: sympy.Expr) -> bool:
    return simplify(sympy.expand(expression)) == 0


def test_error_is_the_square_of_minus_step_over_gamma_minus_gradient() -> None:
    g, step, gamma = sympy.symbols("g step gamma", real=True, nonzero=True)
    square = (-step / gamma - g) ** 2
    values = {s.step_sq: step**2, s.grad_dot_step: g * step, s.grad_sq: g**2, s.gamma: gamma}
    ours = IDENTITY.subs(values)
    assert zero(square - ours)


def test_descent_from_the_descent_lemma() -> None:
    """F' = F + <g,d> + L/2 ||d||^2 leaves exactly gamma/2 (1 - gamma L) ||d/gamma||^2 of slack."""
    smooth = Symbol("l", real=True)
    bound = BOUNDS["descent"]
    after = s.F + s.grad_dot_step + smooth / 2 * s.step_sq
    slack = (bound.rhs - bound.lhs).subs(s.e_sq, IDENTITY).subs(s.F_next, after)
    assert zero(slack - s.gamma / 2 * (1 - s.gamma * smooth) * s.step_sq / s.gamma**2)


def test_the_slacks_that_intervals_evaluate_are_the_differences() -> None:
    descent = BOUNDS["descent"]
    assert zero((descent.rhs - descent.lhs).subs(s.e_sq, IDENTITY) - descent.difference)
    telescoped = BOUNDS["telescoped"]
    inside = sympy.expand((s.gamma * s.e_sq - s.gamma * s.grad_sq).subs(s.e_sq, IDENTITY))
    total = s.WindowSum(s.gamma)
    assert zero(telescoped.difference * total - 2 * (s.F_0 - s.F_T) - s.WindowSum(inside))
    for bound in BOUNDS.values():
        if bound.slack is None:
            assert zero(bound.difference - (bound.rhs - bound.lhs))


def test_telescoped_is_the_sum_of_descents() -> None:
    """2/gamma times I0, summed over two windows of one gamma, is I1."""
    f0, f1, f2, g0, g1, e0, e1 = sympy.symbols("f0 f1 f2 g0 g1 e0 e1", real=True)
    descent = BOUNDS["descent"]
    slack = descent.rhs - descent.lhs
    windows = ((f0, f1, g0, e0), (f1, f2, g1, e1))
    rows = [slack.subs({s.F: f, s.F_next: n, s.grad_sq: g, s.e_sq: e}) for f, n, g, e in windows]
    mean = 2 * (f0 - f2) / (2 * s.gamma) + (e0 + e1) / 2 - (g0 + g1) / 2
    assert zero(sum(rows) / s.gamma - mean)


def test_expectation_step() -> None:
    """-gamma <g, g+b> + L gamma^2 ||g+b||^2 <= gamma/2 (||b||^2 - ||g||^2) as soon as 2 L gamma <= 1."""
    g, b, gamma, L = sympy.symbols("g b gamma L", real=True)
    left = -gamma * g * (g + b) + L * gamma**2 * (g + b) ** 2
    right = -gamma / 2 * g**2 + gamma / 2 * b**2
    assert zero(right - left - gamma / 2 * (1 - 2 * L * gamma) * (g + b) ** 2)


def test_noise_coefficient_is_twice_what_one_window_pays() -> None:
    """One window pays L gamma^2 E||z||^2; dividing by gamma/2 gives 2 L gamma sigma^2/K sum pibar^2."""
    noise, rhs = BOUNDS["noise"].rhs, BOUNDS["expectation"].rhs
    coefficient = rhs.coeff(s.WindowMean(s.ArrivalSum(s.pibar**2)))
    assert zero(coefficient - (s.L * s.gamma**2 * s.sigma_sq / s.K) / (s.gamma / 2))
    assert zero(noise - s.sigma_sq / s.K * s.ArrivalSum(s.pibar**2))


def test_local_drift_constant() -> None:
    """mean over k < K of k^2 is (K-1)(2K-1)/6, which is below K^2/3."""
    k, K = sympy.symbols("k K", integer=True, positive=True)
    mean = sympy.summation(k**2, (k, 0, K - 1)) / K
    assert zero(BOUNDS["drift_a_priori"].rhs.subs(s.K, K) - mean * s.eta**2 * s.G_sq)
    gap = sympy.expand(K**2 / 3 - mean)
    assert all(gap.subs(K, n) > 0 for n in range(1, 50))
    assert zero(gap - (K / 2 - Rational(1, 6)))


def test_corollary_constants_come_from_the_term_bounds() -> None:
    """4 (from the split) times each term's bound, with the a-priori estimates inserted."""
    rhs = sympy.expand(BOUNDS["corollary"].rhs)
    drift = 4 * s.L**2 * s.Phi * (s.K**2 / 3 * s.eta**2 * s.G_sq)
    assert zero(rhs.coeff(s.Phi, 1).coeff(s.G_sq) - (drift / s.Phi / s.G_sq).subs(s.eta, s.gamma / s.K))
    change = BOUNDS["change_a_priori"].rhs.subs(s.eta, s.gamma / s.K)
    stale = 4 * s.L**2 * s.Phi * s.tau_max * s.tau_max * s.Phi * change
    assert zero(rhs.coeff(s.Phi, 2) - (stale / s.Phi**2))
    assert rhs.coeff(s.sigma_g_sq) == 4 * s.Phi


def test_weighted_corollary_with_uniform_shares_is_the_corollary() -> None:
    """pibar = 1/Gamma for every arrival turns equation 34 into 33, up to P_max -> Phi."""
    weighted = BOUNDS["corollary_weighted"].rhs
    square, gap = s.ArrivalSum(s.pibar**2), s.ArrivalSum(s.pibar * (s.theta * s.W_sq + s.bias_sq))
    uniform = weighted.subs(
        {square: s.A / s.Gamma**2, gap: s.ArrivalSum(s.theta * s.W_sq + s.bias_sq) / s.Gamma}
    )
    assert zero(uniform.subs(s.P_max, s.Phi) - BOUNDS["corollary"].rhs)


def test_restoration_criterion() -> None:
    """(eta/2) ||g_J||^2 / T(d') >= (3/2) eta ||m g||^2 / T(d) is equation 38."""
    gained = BOUNDS["restored_step"].lhs / s.seconds_restored
    spent = BOUNDS["stalled_step"].rhs / s.seconds
    criterion = BOUNDS["restore_when"]
    assert zero((gained - spent) * s.seconds_restored * 2 / s.eta - (criterion.rhs - criterion.lhs))


@pytest.mark.parametrize("name", list(BOUNDS))
def test_bounds_are_well_formed(name: str) -> None:
    bound = BOUNDS[name]
    assert set(bound.hypotheses) <= set(HYPOTHESES)
    assert set(bound.source) <= {*ENTRIES, "ours"}
    known = {info.symbol for info in TABLE.values()}
    assert (bound.lhs.free_symbols | bound.rhs.free_symbols) <= known
    assert bound.latex.count("{") == bound.latex.count("}")
    assert (r" \le " in bound.latex) == (bound.relation == "<=")


def test_equation_numbers_are_consecutive_and_every_symbol_is_described() -> None:
    assert [int(bound.number) for bound in BOUNDS.values()] == list(range(2, len(BOUNDS) + 2))
    for name, info in TABLE.items():
        assert info.symbol.name == name and info.meaning and info.unit and info.latex


def test_citations_follow_the_bounds() -> None:
    assert cite(["topk"]).count("@") == 2 and "stich2018" in cite(["topk"])
    assert cite(["heterogeneity"]).count("@") == 1 and "2512.05372" in cite(["heterogeneity"])
    assert all(key in cite() for key in ENTRIES)
    assert ENTRIES["ma2026fedgmr"] in fedgmr_plugin.cite()
    with pytest.raises(KeyError):
        cite(["nothing"])
