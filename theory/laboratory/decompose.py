"""The exact decomposition of one window's error (derivation 1); A arrivals, D coordinates, K steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from theory.laboratory.problems import Bools, Floats, Problem, client_grads

Form = Literal["delta", "replacement"]


class Arrival(NamedTuple):
    """One upload, with everything that a real server cannot see.

    Attributes:
        client: n.
        weight: c_n > 0.
        mask_D: m_n.
        start_D: w_s, the server's model when the sub-model was sent.
        path_KD: x_0 .. x_{K-1}, with x_0 = m_n w_s.
        grads_KD: the minibatch gradients taken there.
        end_D: x_K.
    """

    client: int
    weight: float
    mask_D: Bools
    start_D: Floats
    path_KD: Floats
    grads_KD: Floats
    end_D: Floats

    @property
    def drift_sq(self) -> float:
        """mean over k of ||x_k - x_0||^2."""
        return float(np.square(self.path_KD - self.path_KD[0]).sum(axis=1).mean())

    @property
    def change_sq(self) -> float:
        """||x_K - x_0||^2."""
        return _sq(self.end_D - self.path_KD[0])


class Decomposition(NamedTuple):
    """Equation 1 for one window; every vector has shape ``[D]``.

    `parts` has for each arrival the squared norms ``D_sq, M_sq, S_sq, mask_sq, stale_sq, drift_sq,
    gap_sq, change_sq`` and ``pibar``; `scale_sq` is the largest squared norm of a gradient that entered.
    """

    grad: Floats
    e: Floats
    z: Floats
    D: Floats
    M: Floats
    S: Floats
    H: Floats
    U: Floats
    rho: Floats
    gamma: float
    parts: list[dict[str, float]]
    scale_sq: float

    @property
    def terms(self) -> dict[str, Floats]:
        """The seven terms, in the order of `theory.schema.TERMS`."""
        return {"z": self.z, "D": self.D, "M": self.M, "S": self.S, "H": self.H, "U": self.U, "rho": self.rho}

    @property
    def bias(self) -> Floats:
        """b_t, the error without the noise."""
        return self.D + self.M + self.S + self.H + self.U - self.rho / self.gamma

    @property
    def residual(self) -> Floats:
        """What is left of the identity; rounding."""
        return self.e - self.z - self.bias


def local_steps(
    problem: Problem, client: int, start_D: Floats, mask_D: Bools, *, eta: float, steps: int,
    weight: float = 1.0, rng: np.random.Generator,
) -> Arrival:  # fmt: skip
    """K masked SGD steps from ``m * w_s`` (method page, section 4)."""
    x = np.where(mask_D, start_D, 0.0)
    path, grads = [], []
    for _ in range(steps):
        grad = problem.noisy(client, x, rng)
        path.append(x)
        grads.append(grad)
        x = x - eta * np.where(mask_D, grad, 0.0)
    return Arrival(client, weight, mask_D, start_D, np.stack(path), np.stack(grads), x)


def shares(arrivals: Sequence[Arrival], size: int) -> Floats:
    """pi_nj, ``[A, D]``: client n's share of coordinate j; zero columns where nobody holds it."""
    if not arrivals:
        return np.zeros((0, size))
    held = np.stack([a.weight * a.mask_D for a in arrivals])
    total = held.sum(axis=0)
    return np.asarray(np.divide(held, total, out=np.zeros_like(held), where=total > 0))


def merge(w: Floats, arrivals: Sequence[Arrival], form: Form) -> Floats:
    """w_{t+1} (method page, section 5): mask-aware averaging of changes or of weights."""
    pi = shares(arrivals, len(w))
    if form == "delta":
        return w + sum(
            (p * (a.end_D - a.path_KD[0]) for p, a in zip(pi, arrivals, strict=True)), np.zeros_like(w)
        )
    merged = sum((p * a.end_D for p, a in zip(pi, arrivals, strict=True)), np.zeros_like(w))
    return np.where(pi.sum(axis=0) > 0, merged, w)


def decompose(
    problem: Problem, w: Floats, arrivals: Sequence[Arrival], *, gamma: float, form: Form
) -> Decomposition:
    """Every term of equation 1 at model `w`, from exact gradients."""
    grads_ND = client_grads(problem, w)
    grad = grads_ND.mean(axis=0)
    pi = shares(arrivals, len(w))
    covered = pi.sum(axis=0) > 0
    z, drift, masked, stale, rho = (np.zeros_like(w) for _ in range(5))
    hetero = np.where(covered, -grad, 0.0)
    parts: list[dict[str, float]] = []
    scale = float(np.square(grads_ND).sum(axis=1).max())
    for p, a in zip(pi, arrivals, strict=True):
        exact = np.stack([problem.grad(a.client, x) for x in a.path_KD])
        at_start, at_masked = problem.grad(a.client, a.start_D), exact[0]
        scale = max(scale, _sq(at_start), float(np.square(exact).sum(axis=1).max()))
        own_drift = (exact - at_masked).mean(axis=0)
        own_mask, own_stale = at_masked - at_start, at_start - grads_ND[a.client]
        z += p * (a.grads_KD - exact).mean(axis=0)
        drift += p * own_drift
        masked += p * own_mask
        stale += p * own_stale
        hetero += p * grads_ND[a.client]
        if form == "replacement":
            rho += p * (a.start_D - w)
        parts.append(
            {
                "pibar": float(p.max()),
                "D_sq": _sq(own_drift * a.mask_D),
                "M_sq": _sq(own_mask * a.mask_D),
                "S_sq": _sq(own_stale * a.mask_D),
                "mask_sq": _sq(a.start_D[~a.mask_D]),
                "stale_sq": _sq(w - a.start_D),
                "drift_sq": a.drift_sq,
                "gap_sq": _sq(grads_ND[a.client] - grad),
                "change_sq": a.change_sq,
            }
        )
    error = -(merge(w, arrivals, form) - w) / gamma - grad
    uncovered = np.where(covered, 0.0, -grad)
    return Decomposition(grad, error, z, drift, masked, stale, hetero, uncovered, rho, gamma, parts, scale)


def _sq(x: Floats) -> float:
    return float(x @ x)
