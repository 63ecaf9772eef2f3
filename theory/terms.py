"""The exact decomposition of one window's error, and the hypotheses, as data (derivation 1).

    e_t := -(w_{t+1} - w_t)/gamma - grad F(w_t) = z + D + M + S + H + U - rho/gamma             (1)

is an identity, not a bound. On a covered coordinate j each term is a convex combination over the
arrivals with weights pi_nj; on an uncovered one only U is not zero.
"""

from __future__ import annotations

from typing import NamedTuple

from theory import symbols as s
from theory.symbols import Expr


class Term(NamedTuple):
    """One term of the decomposition (1)."""

    name: str
    square: Expr
    definition: str
    meaning: str
    vanishes: str


TERMS: tuple[Term, ...] = (
    Term(
        "z", s.z_sq, r"\sum_n \pi_n * \tfrac1K\sum_{k<K}\bigl(g_n^k - \nabla F_n(x_n^k)\bigr)",
        "minibatch noise, averaged over the K local steps", "full gradients",
    ),
    Term(
        "D", s.D_sq, r"\sum_n \pi_n * \tfrac1K\sum_{k<K}\bigl(\nabla F_n(x_n^k) - \nabla F_n(m_n w_s)\bigr)",
        "local drift: gradients are taken along the local path", "K = 1, or a small step",
    ),
    Term(
        "M", s.M_sq, r"\sum_n \pi_n * \bigl(\nabla F_n(m_n w_s) - \nabla F_n(w_s)\bigr)",
        "mask error: gradients are taken at the sub-model", "density 1",
    ),
    Term(
        "S", s.S_sq, r"\sum_n \pi_n * \bigl(\nabla F_n(w_s) - \nabla F_n(w_t)\bigr)",
        "staleness: gradients are taken at an old model", "no delay",
    ),
    Term(
        "H", s.H_sq, r"\sum_n \pi_n * \nabla F_n(w_t) - \nabla F(w_t)\ \text{on } C_t",
        "heterogeneity: the arrivals are not the average client",
        "equal clients, or all of them with weights 1/N",
    ),
    Term(
        "U", s.U_sq, r"-\nabla F(w_t)\ \text{off } C_t",
        "coordinates that no arrival holds", "a full-density client arrives",
    ),
    Term(
        "rho", s.rho_sq, r"\sum_n \pi_n * (w_s - w_t)\ \text{on } C_t",
        "replacement residual: stale weights overwrite newer ones",
        "the delta form (it is absent), or no delay",
    ),
)  # fmt: skip

#: ||e_t||^2 from what a probe logs: expand ||-Delta/gamma - grad F||^2.
E_FROM_PROBE: Expr = s.step_sq / s.gamma**2 + 2 * s.grad_dot_step / s.gamma + s.grad_sq


class Hypothesis(NamedTuple):
    """A condition that bounds rest on."""

    name: str
    statement: str
    how: str


HYPOTHESES: dict[str, Hypothesis] = {
    h.name: h
    for h in (
        Hypothesis(
            "ALG",
            "the run is the algorithm analysed: mask-aware averaging over this window's arrivals, no mixing, "
            "plain masked SGD (no momentum, weight decay or clipping) with one eta and one K in a window",
            "read from the header and from the arrivals",
        ),
        Hypothesis(
            "A1",
            "every F_n is L-smooth, and F >= F_inf",
            "cannot be proved by a log; refuted by a measured smoothness above L, or a loss below F_inf",
        ),
        Hypothesis(
            "A2",
            "minibatch noise has conditional mean zero and variance at most sigma^2, is uncorrelated across "
            "clients, and arrival sets, masks and weights do not depend on noise in flight",
            "cannot be proved by a log; refuted by a measured variance above a given sigma^2, or <grad F, z> "
            "whose mean over windows is not zero",
        ),
        Hypothesis(
            "A3",
            "E||g||^2 <= G^2 given all but the noise in flight, and ||w_s|| <= W on prunable coordinates",
            "cannot be proved by a log; refuted by measured values above given G and W",
        ),
        Hypothesis(
            "A4", "gamma <= 1/L (pointwise form)", "exact along every probed step; refuted by measured L"
        ),
        Hypothesis("A4E", "gamma <= 1/(2L) (expectation form)", "refuted by measured L; proved by a given L"),
        Hypothesis(
            "A5",
            "||grad F_n(w_t) - grad F(w_t)||^2 <= sigma_g^2 for every client and window",
            "cannot be proved by a log; refuted by a measured gap above a given sigma_g^2",
        ),
        Hypothesis(
            "TOPK", "masks keep the largest magnitudes of the very model that is sent", "header and rankings"
        ),
        Hypothesis(
            "NEST", "the masks of a window's arrivals are nested (one ranking, or density 1)", "rankings"
        ),
        Hypothesis("UNIF", "all aggregation weights of a window are equal", "arrival.weight"),
        Hypothesis("DELTA", "the server averages changes (delta form)", "header"),
        Hypothesis("REPL", "the server averages weights (replacement form)", "header"),
    )
}
