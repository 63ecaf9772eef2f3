"""Every bound as data: both sides in sympy, hypotheses, equation number, source.

`BOUNDS` is the one place where a constant, a sign or an exponent of the theory is written in code:
the numeric functions, the interval evaluation, the checker and the documentation are made from it.
Equation numbers are those of ``docs/derivations``. All bounds are this project's own derivations,
with standard steps credited in `Bound.source`; none is claimed to be a theorem of the FedGMR paper.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from sympy import Integer, Rational, log, pi

from theory import symbols as s
from theory.symbols import ArrivalSum, Expr, WindowMean, WindowSum
from theory.terms import E_FROM_PROBE


class Bound(NamedTuple):
    """One inequality ``lhs <= rhs`` (or identity ``lhs == rhs``).

    Attributes:
        name: stable name, also the function's name in `theory.numeric`.
        number: equation number in ``docs/derivations``.
        title: what it says, in a line.
        lhs: the measured side.
        rhs: the bound.
        hypotheses: names in `theory.terms.HYPOTHESES`.
        source: citation keys of the steps used (`theory.citation`), ``"ours"`` where there is none.
        relation: ``"<="`` or ``"=="``.
        expectation: it holds for expectations, not for each run.
        slack: rhs - lhs rewritten so that nothing cancels when it is evaluated on intervals.
    """

    name: str
    number: str
    title: str
    lhs: Expr
    rhs: Expr
    hypotheses: tuple[str, ...]
    source: tuple[str, ...] = ("ours",)
    relation: Literal["<=", "=="] = "<="
    expectation: bool = False
    slack: Expr | None = None

    @property
    def difference(self) -> Expr:
        """``rhs - lhs``, in the form that intervals should evaluate."""
        return self.rhs - self.lhs if self.slack is None else self.slack

    @property
    def latex(self) -> str:
        """The relation in LaTeX."""
        sign = r"\le" if self.relation == "<=" else "="
        return f"{s.latex(self.lhs)} {sign} {s.latex(self.rhs)}"


_START: Expr = 2 * (s.F_0 - s.F_inf) / (s.gamma * s.T)
_SPLIT: Expr = s.D_sq + s.M_sq + s.S_sq + s.H_sq

_ALL: tuple[Bound, ...] = (
    Bound(
        "descent", "2", "I0: one window's descent",
        s.F_next,
        s.F - s.gamma / 2 * s.grad_sq + s.gamma / 2 * s.e_sq,
        ("A4",), ("nesterov2018",),
        slack=s.F - s.F_next + s.grad_dot_step + s.step_sq / (2 * s.gamma),
    ),
    Bound(
        "telescoped", "3", "I1: descent over consecutive windows",
        WindowSum(s.gamma * s.grad_sq) / WindowSum(s.gamma),
        (2 * (s.F_0 - s.F_T) + WindowSum(s.gamma * s.e_sq)) / WindowSum(s.gamma),
        ("A4",), ("ours",),
        slack=(2 * (s.F_0 - s.F_T) + WindowSum(s.step_sq / s.gamma + 2 * s.grad_dot_step))
        / WindowSum(s.gamma),
    ),
    Bound(
        "noise", "4", "variance of the merged noise",
        s.z_sq, s.sigma_sq / s.K * ArrivalSum(s.pibar**2),
        ("ALG", "A2"), expectation=True,
    ),
    Bound(
        "split_delta", "5", "the noise-free error from its terms",
        s.b_sq, 4 * _SPLIT + s.U_sq,
        ("ALG", "DELTA"),
    ),
    Bound(
        "split_replacement", "6", "the same in replacement form",
        s.b_sq, 5 * (_SPLIT + s.rho_sq / s.gamma**2) + s.U_sq,
        ("ALG", "REPL"),
    ),
    Bound(
        "expectation", "7", "I2: mean squared gradient",
        WindowMean(s.grad_sq),
        _START
        + 2 * s.L * s.gamma * s.sigma_sq / s.K * WindowMean(ArrivalSum(s.pibar**2))
        + WindowMean(s.b_sq),
        ("ALG", "A1", "A2", "A4E"), expectation=True,
    ),
    Bound(
        "update", "8", "the server's step from the uploads",
        s.step_sq, ArrivalSum(s.pibar * s.change_sq),
        ("ALG", "DELTA"),
    ),
    Bound(
        "mask_merge", "9", "mask error from the clients' own",
        s.M_sq, ArrivalSum(s.pibar * s.M_n_sq), ("ALG",),
    ),
    Bound(
        "mask_lipschitz", "10", "a client's mask error from its mask distance",
        s.M_n_sq, s.L**2 * s.mask_sq, ("A1",),
    ),
    Bound(
        "mask", "11", "mask error from the mask distance",
        s.M_sq, s.L**2 * ArrivalSum(s.pibar * s.mask_sq),
        ("ALG", "A1"), ("ours", "zhou2023"),
    ),
    Bound(
        "topk", "12", "top-k contraction",
        s.masked_sq, s.q * s.prunable_sq,
        ("TOPK",), ("stich2018",),
    ),
    Bound(
        "floored_topk", "13", "top-k contraction under a per-layer floor",
        s.masked_sq, (1 - s.phi_floor) * (s.D_p - s.k) / (s.D_p - s.k_floor) * s.prunable_sq,
        ("TOPK",),
    ),
    Bound(
        "aged_topk", "14", "top-k contraction under an aged ranking",
        s.masked_sq, 2 * s.theta * s.ranked_sq + 2 * s.age * s.aged_path_sq,
        ("TOPK",),
    ),
    Bound(
        "density_gap", "15", "mask error from the average density gap",
        s.M_sq, s.L**2 * ArrivalSum(s.pibar * (s.theta * s.prunable_sq + s.bias_sq)),
        ("ALG", "A1", "TOPK"), ("ours", "stich2018"),
    ),
    Bound(
        "staleness_merge", "16", "staleness error from the clients' own",
        s.S_sq, ArrivalSum(s.pibar * s.S_n_sq), ("ALG",),
    ),
    Bound(
        "staleness_lipschitz", "17", "a client's staleness error from the distance since dispatch",
        s.S_n_sq, s.L**2 * s.stale_sq, ("A1",),
    ),
    Bound(
        "staleness", "18", "staleness error from the distance since dispatch",
        s.S_sq, s.L**2 * ArrivalSum(s.pibar * s.stale_sq),
        ("ALG", "A1"),
    ),
    Bound(
        "path", "19", "distance since dispatch from the steps between",
        s.stale_sq, s.tau * s.path_sq, (), ("nguyen2022",),
    ),
    Bound(
        "drift_merge", "20", "drift error from the clients' own",
        s.D_sq, ArrivalSum(s.pibar * s.D_n_sq), ("ALG",),
    ),
    Bound(
        "drift_lipschitz", "21", "a client's drift error from its local path",
        s.D_n_sq, s.L**2 * s.drift_sq, ("A1",),
    ),
    Bound(
        "drift", "22", "drift error from the local paths",
        s.D_sq, s.L**2 * ArrivalSum(s.pibar * s.drift_sq),
        ("ALG", "A1"),
    ),
    Bound(
        "heterogeneity", "23", "heterogeneity on covered coordinates",
        s.H_sq, ArrivalSum(s.pibar * s.gap_sq),
        ("ALG",),
    ),
    Bound(
        "uncovered", "24", "uncovered coordinates",
        s.U_sq, s.grad_uncovered_sq, ("ALG",), relation="==",
    ),
    Bound(
        "residual", "25", "replacement residual from the distance since dispatch",
        s.rho_sq, ArrivalSum(s.pibar * s.stale_sq),
        ("ALG", "REPL"),
    ),
    Bound(
        "coverage", "26", "largest share from the fewest holders",
        s.pibar * s.Gamma, s.kappa, ("ALG",), ("ours", "zhou2023"),
    ),
    Bound(
        "nested_coverage", "27", "nested masks: shares sum to a logarithm",
        ArrivalSum(s.pibar), 1 + log(s.weight_sum / s.weight_dense),
        ("ALG", "NEST"),
    ),
    Bound(
        "rank_gap", "28", "nested masks: density gap by rank, which restoration can only lower",
        ArrivalSum(s.pibar * s.q), s.kappa * ArrivalSum(s.q / s.rank),
        ("ALG", "NEST"),
    ),
    Bound(
        "average_restored", "29", "restoration lowers the average density gap",
        ArrivalSum(s.q) / s.A, ArrivalSum(s.q_0) / s.A, (),
    ),
    Bound(
        "rank_restored", "30", "restoration lowers the density gap by rank",
        ArrivalSum(s.q / s.rank), ArrivalSum(s.q_0 / s.rank_0), (),
    ),
    Bound(
        "drift_a_priori", "31", "local path of K steps",
        s.drift_sq, (s.K - 1) * (2 * s.K - 1) / Integer(6) * s.eta**2 * s.G_sq,
        ("ALG", "A3"), expectation=True,
    ),
    Bound(
        "change_a_priori", "32", "local update of K steps",
        s.change_sq, s.eta**2 * s.K**2 * s.G_sq, ("ALG", "A3"), expectation=True,
    ),
    Bound(
        "corollary", "33", "a-priori corollary, uniform weights",
        WindowMean(s.grad_sq),
        _START
        + 2 * s.L * s.gamma * s.sigma_sq / s.K * WindowMean(s.A / s.Gamma**2)
        + 4 * s.L**2 * WindowMean(ArrivalSum(s.theta * s.W_sq + s.bias_sq) / s.Gamma)
        + 4 * s.Phi * s.sigma_g_sq
        + Rational(4, 3) * s.L**2 * s.gamma**2 * s.G_sq * s.Phi
        + 4 * s.L**2 * s.gamma**2 * s.G_sq * s.Phi**2 * s.tau_max**2
        + WindowMean(s.U_sq),
        ("ALG", "DELTA", "UNIF", "TOPK", "A1", "A2", "A3", "A4E", "A5"),
        ("ours", "zhou2023", "nguyen2022", "stich2018"), expectation=True,
    ),
    Bound(
        "corollary_weighted", "34", "a-priori corollary, any weights",
        WindowMean(s.grad_sq),
        _START
        + 2 * s.L * s.gamma * s.sigma_sq / s.K * WindowMean(ArrivalSum(s.pibar**2))
        + 4 * s.L**2 * WindowMean(ArrivalSum(s.pibar * (s.theta * s.W_sq + s.bias_sq)))
        + 4 * s.P_max * s.sigma_g_sq
        + Rational(4, 3) * s.L**2 * s.gamma**2 * s.G_sq * s.P_max
        + 4 * s.L**2 * s.gamma**2 * s.G_sq * s.P_max**2 * s.tau_max**2
        + WindowMean(s.U_sq),
        ("ALG", "DELTA", "TOPK", "A1", "A2", "A3", "A4E", "A5"),
        ("ours", "zhou2023", "nguyen2022", "stich2018"), expectation=True,
    ),
    Bound(
        "corollary_nested", "35", "a-priori corollary, uniform weights and nested masks",
        WindowMean(s.grad_sq),
        _START
        + 2 * s.L * s.gamma * s.sigma_sq / s.K * pi**2 / 6
        + 4 * s.L**2 * WindowMean(ArrivalSum((s.theta * s.W_sq + s.bias_sq) / s.rank))
        + 4 * s.H_max * s.sigma_g_sq
        + Rational(4, 3) * s.L**2 * s.gamma**2 * s.G_sq * s.H_max
        + 4 * s.L**2 * s.gamma**2 * s.G_sq * s.H_max**2 * s.tau_max**2
        + WindowMean(s.U_sq),
        ("ALG", "DELTA", "UNIF", "NEST", "TOPK", "A1", "A2", "A3", "A4E", "A5"),
        ("ours", "stich2018"), expectation=True,
    ),
    Bound(
        "stalled_step", "36", "a masked step gains little when the masked gradient is small",
        s.decrease, Rational(3, 2) * s.eta * s.masked_grad_sq, ("A1", "A4"), ("nesterov2018",),
    ),
    Bound(
        "restored_step", "37", "a step on the restored mask gains at least this",
        s.eta / 2 * s.restored_grad_sq, s.decrease, ("A1", "A4"), ("nesterov2018",),
    ),
    Bound(
        "restore_when", "38", "restoring is faster per second from this gradient on",
        3 * s.masked_grad_sq * s.seconds_restored / s.seconds, s.restored_grad_sq, ("A1", "A4"),
    ),
)  # fmt: skip

#: name -> Bound, in the order of the equation numbers.
BOUNDS: dict[str, Bound] = {bound.name: bound for bound in _ALL}

#: (1) squared: ||e_t||^2 from a probe.
IDENTITY: Expr = E_FROM_PROBE
