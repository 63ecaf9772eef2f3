"""Every symbol of the theory, once: name, LaTeX, meaning, unit, axis, and where a log holds it.

Squared norms are symbols of their own (``M_sq`` is ``||M_t||^2``), because that is what a log
records and because a square root would only add rounding. The *axis* of a symbol says what it is
indexed by: ``run`` (one number), ``window`` (one per window t), ``arrival`` (one per client n in A_t)
or ``dispatch`` (one per sub-model sent). Units: a *weight* is the unit of a coordinate of w, a
*loss* that of F; a gradient has loss/weight, L has loss/weight^2, gamma has weight^2/loss.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import sympy

Axis = Literal["run", "window", "arrival", "dispatch"]
Expr = Any  # sympy ships no types


class SymbolInfo(NamedTuple):
    """What one symbol stands for."""

    symbol: Expr
    latex: str
    meaning: str
    unit: str
    axis: Axis
    assumption: str
    field: str


class ArrivalSum(sympy.Function):  # type: ignore[misc]
    """Sum over the clients n that arrive in the window, of a quantity of axis ``arrival``."""

    nargs = 1

    def _latex(self, printer: Any, exp: str | None = None) -> str:
        body = rf"\sum_{{n \in A_t}} {printer.parenthesize(self.args[0], 40)}"
        return body if exp is None else rf"\left({body}\right)^{{{exp}}}"


class WindowSum(sympy.Function):  # type: ignore[misc]
    """Sum over the windows t = 0..T-1, of a quantity of axis ``window``."""

    nargs = 1

    def _latex(self, printer: Any, exp: str | None = None) -> str:
        body = rf"\sum_{{t<T}} {printer.parenthesize(self.args[0], 40)}"
        return body if exp is None else rf"\left({body}\right)^{{{exp}}}"


class WindowMean(sympy.Function):  # type: ignore[misc]
    """Mean over the windows t = 0..T-1, of a quantity of axis ``window``."""

    nargs = 1

    def _latex(self, printer: Any, exp: str | None = None) -> str:
        body = rf"\frac1T\sum_{{t<T}} {printer.parenthesize(self.args[0], 40)}"
        return body if exp is None else rf"\left({body}\right)^{{{exp}}}"


#: name -> SymbolInfo; filled by `_define`, read-only for everybody else.
TABLE: dict[str, SymbolInfo] = {}


def _define(
    name: str, latex: str, meaning: str, unit: str, axis: Axis, field: str, *, sign: str = "nonnegative"
) -> Expr:
    assumptions = {"real": True} if sign == "real" else {sign: True}
    symbol = sympy.Symbol(name, **assumptions)
    TABLE[name] = SymbolInfo(symbol, latex, meaning, unit, axis, sign, field)
    return symbol


_G2, _W2 = "loss^2/weight^2", "weight^2"

# -- run ------------------------------------------------------------------------------------------
L = _define("L", "L", "smoothness of every F_n", "loss/weight^2", "run", "constants.L", sign="positive")
K = _define("K", "K", "local steps", "1", "run", "header.local_steps", sign="positive")
T = _define("T", "T", "windows", "1", "run", "number of window records", sign="positive")
eta = _define(
    "eta", r"\eta", "local step size", "weight^2/loss", "run", "window.learning_rate", sign="positive"
)
sigma_sq = _define(
    "sigma_sq", r"\sigma^2", "bound on the variance of one minibatch gradient", _G2, "run", "probe.noise_sq"
)
sigma_g_sq = _define(
    "sigma_g_sq", r"\sigma_g^2", "bound on ||grad F_n - grad F||^2", _G2, "run", "probe.client_gap_sq"
)
G_sq = _define("G_sq", "G^2", "bound on E||g||^2 of a minibatch gradient", _G2, "run", "arrival.change_sq")
W_sq = _define("W_sq", "W^2", "bound on ||w_s||^2 over prunable coordinates", _W2, "run", "dispatch.norm_sq")
F_0 = _define("F_0", "F(w_0)", "objective at the start", "loss", "run", "probe.loss", sign="real")
F_T = _define("F_T", "F(w_T)", "objective at the end", "loss", "run", "probe.loss_next", sign="real")
F_inf = _define("F_inf", r"F_{\inf}", "lower bound of F", "loss", "run", "constants.F_inf", sign="real")
Phi = _define("Phi", r"\Phi", "largest |A_t| / Gamma_t", "1", "run", "window.arrivals, window.gamma_min")
P_max = _define("P_max", r"\hat P", "largest sum of pibar_n over a window", "1", "run", "arrival.pibar")
H_max = _define(
    "H_max",
    r"H_{\hat A}",
    "harmonic number 1 + 1/2 + ... of the largest |A_t|",
    "1",
    "run",
    "window.arrivals",
)
tau_max = _define("tau_max", r"\tau_{\max}", "largest staleness", "windows", "run", "arrival.staleness")
kappa = _define(
    "kappa", r"\kappa", "largest over smallest aggregation weight of a window", "1", "run", "arrival.weight"
)
D_p = _define("D_p", "D_p", "prunable coordinates", "1", "run", "header.layout.prunable", sign="positive")
k_floor = _define(
    "k_floor", "k_f", "coordinates that the per-layer floor keeps", "1", "run", "header.layout.layers"
)
phi_floor = _define(
    "phi_floor", r"\varphi", "smallest kept share of a layer's floor", "1", "run", "header.layout.layers"
)

# -- window ---------------------------------------------------------------------------------------
gamma = _define(
    "gamma", r"\gamma", "step of a window, eta * K", "weight^2/loss", "window", "terms.gamma", sign="positive"
)
F = _define("F", "F(w_t)", "objective", "loss", "window", "probe.loss", sign="real")
F_next = _define(
    "F_next", "F(w_{t+1})", "objective after the window", "loss", "window", "probe.loss_next", sign="real"
)
grad_sq = _define("grad_sq", r"\|\nabla F(w_t)\|^2", "squared gradient norm", _G2, "window", "probe.grad_sq")
grad_dot_step = _define(
    "grad_dot_step", r"\langle\nabla F(w_t), \Delta_t\rangle", "slope along the step", "loss", "window",
    "probe.grad_dot_step", sign="real",
)  # fmt: skip
step_sq = _define(
    "step_sq", r"\|\Delta_t\|^2", "squared step, Delta_t = w_{t+1} - w_t", _W2, "window", "window.step_sq"
)
e_sq = _define("e_sq", r"\|e_t\|^2", "squared error of the step as a gradient", _G2, "window", "terms.e_sq")
b_sq = _define("b_sq", r"\|b_t\|^2", "the error without the noise z_t", _G2, "window", "terms.b_sq")
z_sq = _define("z_sq", r"\|z_t\|^2", "minibatch noise", _G2, "window", "terms.z_sq")
D_sq = _define("D_sq", r"\|D_t\|^2", "local drift", _G2, "window", "terms.D_sq")
M_sq = _define("M_sq", r"\|M_t\|^2", "mask error", _G2, "window", "terms.M_sq")
S_sq = _define("S_sq", r"\|S_t\|^2", "staleness error", _G2, "window", "terms.S_sq")
H_sq = _define("H_sq", r"\|H_t\|^2", "heterogeneity on covered coordinates", _G2, "window", "terms.H_sq")
U_sq = _define("U_sq", r"\|U_t\|^2", "gradient on uncovered coordinates", _G2, "window", "terms.U_sq")
rho_sq = _define("rho_sq", r"\|\rho_t\|^2", "replacement residual", _W2, "window", "terms.rho_sq")
grad_uncovered_sq = _define(
    "grad_uncovered_sq", r"\Bigl(\sum_{j\notin C_t}(\partial_jF(w_t))^2\Bigr)",
    "gradient on uncovered coordinates", _G2, "window", "probe.grad_uncovered_sq",
)  # fmt: skip
A = _define("A", "|A_t|", "arrivals", "1", "window", "window.arrivals")
Gamma = _define(
    "Gamma",
    r"\Gamma_t",
    "fewest holders of a covered coordinate",
    "1",
    "window",
    "window.gamma_min",
    sign="positive",
)
weight_sum = _define(
    "weight_sum",
    r"\sum_k c_k",
    "all aggregation weights",
    "samples",
    "window",
    "arrival.weight",
    sign="positive",
)
weight_dense = _define(
    "weight_dense", "c_{(1)}", "aggregation weight of the densest clients", "samples", "window",
    "arrival.weight", sign="positive",
)  # fmt: skip

# -- arrival --------------------------------------------------------------------------------------
pibar = _define(
    "pibar", r"\bar\pi_n", "largest share of client n on a coordinate", "1", "arrival", "arrival.pibar"
)
rank = _define(
    "rank", r"r_n", "rank of d_n in A_t, densest first", "1", "arrival", "arrival.density", sign="positive"
)
tau = _define("tau", r"\tau_n", "staleness t - s", "windows", "arrival", "arrival.staleness")
path_sq = _define(
    "path_sq",
    r"\Bigl(\sum_{r=s}^{t-1}\|\Delta_r\|^2\Bigr)",
    "squared steps since dispatch",
    _W2,
    "arrival",
    "window.step_sq",
)
stale_sq = _define(
    "stale_sq",
    r"\|w_t - w_s\|^2",
    "squared distance since dispatch",
    _W2,
    "arrival",
    "terms.arrivals.stale_sq",
)
mask_sq = _define(
    "mask_sq",
    r"\|w_s - m_n w_s\|^2",
    "mask distance, all coordinates",
    _W2,
    "arrival",
    "dispatch.full_masked_norm_sq",
)
drift_sq = _define(
    "drift_sq",
    r"\Bigl(\tfrac1K\sum_{k<K}\|x_n^k - x_n^0\|^2\Bigr)",
    "mean squared drift",
    _W2,
    "arrival",
    "arrival.drift_sq",
)
gap_sq = _define(
    "gap_sq",
    r"\|\nabla F_n(w_t) - \nabla F(w_t)\|^2",
    "gradient dissimilarity",
    _G2,
    "arrival",
    "probe.client_gap_sq",
)
M_n_sq = _define(
    "M_n_sq", r"\|m_n a_n^M\|^2", "client n's own mask error, grad F_n(m w_s) - grad F_n(w_s)", _G2,
    "arrival", "terms.arrivals.M_sq",
)  # fmt: skip
S_n_sq = _define(
    "S_n_sq", r"\|m_n a_n^S\|^2", "client n's own staleness error, grad F_n(w_s) - grad F_n(w_t)", _G2,
    "arrival", "terms.arrivals.S_sq",
)  # fmt: skip
D_n_sq = _define(
    "D_n_sq", r"\|m_n a_n^D\|^2", "client n's own drift error, mean_k grad F_n(x_k) - grad F_n(x_0)",
    _G2, "arrival", "terms.arrivals.D_sq",
)  # fmt: skip
rank_0 = _define(
    "rank_0",
    r"r_n^0",
    "rank of the initial density in A_t",
    "1",
    "arrival",
    "header.densities",
    sign="positive",
)
change_sq = _define(
    "change_sq", r"\|m_n(x_n^K - x_n^0)\|^2", "squared update", _W2, "arrival", "arrival.change_sq"
)
bias_sq = _define(
    "bias_sq", r"\beta_n^2", "squared norm of the dropped biases of w_s", _W2, "arrival",
    "dispatch.full_masked_norm_sq - masked_norm_sq",
)  # fmt: skip

# -- dispatch (also gathered to the arrival that answers it) ----------------------------------------
q = _define("q", "q_n", "pruned share 1 - k_n/D_p, k_n = floor(d_n D_p)", "1", "dispatch", "dispatch.density")
q_0 = _define("q_0", "q_n^0", "pruned share at the initial density", "1", "dispatch", "header.densities")
theta = _define(
    "theta", r"\theta_n", "share of ||w||^2 that the mask may leave out: q_n, or equation 13's",
    "1", "dispatch", "dispatch.density",
)  # fmt: skip
k = _define("k", "k_n", "kept prunable coordinates", "1", "dispatch", "dispatch.density")
d = _define("d", "d_n", "density", "1", "dispatch", "dispatch.density", sign="positive")
prunable_sq = _define(
    "prunable_sq",
    r"\|w_s\|_{\mathcal P}^2",
    "squared norm on prunable coordinates",
    _W2,
    "dispatch",
    "dispatch.norm_sq",
)
masked_sq = _define(
    "masked_sq", r"\|w_s - m_nw_s\|_{\mathcal P}^2", "mask distance, prunable coordinates", _W2, "dispatch",
    "dispatch.masked_norm_sq",
)  # fmt: skip
ranked_sq = _define(
    "ranked_sq", r"\|w_v\|_{\mathcal P}^2", "squared norm when the ranking was made (window v)", _W2,
    "dispatch", "dispatch.norm_sq",
)  # fmt: skip
age = _define(
    "age", "(s - v)", "windows since the ranking was made", "windows", "dispatch", "dispatch.version"
)
aged_path_sq = _define(
    "aged_path_sq", r"\Bigl(\sum_{r=v}^{s-1}\|\Delta_r\|^2\Bigr)", "squared steps since the ranking", _W2,
    "dispatch", "window.step_sq",
)  # fmt: skip

# -- restoring one sub-model (a single masked step) --------------------------------------------------
decrease = _define(
    "decrease", r"F(w) - F(w - \eta\, m \nabla F(w))", "decrease of one step", "loss", "run", "", sign="real"
)
masked_grad_sq = _define(
    "masked_grad_sq", r"\|m\nabla F(w)\|^2", "squared gradient inside the mask", _G2, "run", ""
)
restored_grad_sq = _define(
    "restored_grad_sq",
    r"\|\nabla_J F(w)\|^2",
    "squared gradient on the coordinates to restore",
    _G2,
    "run",
    "",
)
seconds = _define(
    "seconds", "T(d)", "virtual seconds of a window at density d", "s", "run", "", sign="positive"
)
seconds_restored = _define(
    "seconds_restored", "T(d')", "the same at the restored density", "s", "run", "", sign="positive"
)


def latex(expression: Expr) -> str:
    """LaTeX of an expression, in the symbols' own notation."""
    names = {info.symbol: info.latex for info in TABLE.values()}
    return str(sympy.latex(expression, symbol_names=names))
