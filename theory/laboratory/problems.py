"""Federated problems with exact gradients: N clients, D coordinates, float64.

`Quadratic` and `Logistic` know their smoothness, noise and infimum; `ReluNetwork` is there because
its smoothness does not exist, so that what the checker says of it can be tried too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: Computed constants are moved this far (relative) to the safe side.
_ROUNDING = 1e-12


class Problem(Protocol):
    """What the laboratory asks of a problem: N clients, D coordinates."""

    @property
    def clients(self) -> int:
        """N."""
        ...

    @property
    def size(self) -> int:
        """D."""
        ...

    @property
    def start(self) -> Floats:
        """w_0, ``[D]``."""
        ...

    @property
    def prunable(self) -> Bools:
        """Which coordinates masks may leave out, ``[D]``."""
        ...

    @property
    def rows(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Biases dropped with their unit, each as ``(bias index, indices of the unit's weights)``."""
        ...

    @property
    def smoothness(self) -> float | None:
        """An L that holds for every F_n (a scalar), or None where there is none."""
        ...

    @property
    def noise_sq(self) -> float:
        """A bound sigma^2 on the variance of `noisy` (a scalar)."""
        ...

    @property
    def infimum(self) -> float:
        """A lower bound of F, exact for the convex problems (a scalar)."""
        ...

    def loss(self, client: int, w: Floats) -> float:
        """F_n(w)."""
        ...

    def grad(self, client: int, w: Floats) -> Floats:
        """grad F_n(w), ``[D]``."""
        ...

    def noisy(self, client: int, w: Floats, rng: np.random.Generator) -> Floats:
        """An unbiased estimate of `grad`, ``[D]``."""
        ...


def mean_loss(problem: Problem, w: Floats) -> float:
    """F(w) = (1/N) sum F_n(w)."""
    return float(np.mean([problem.loss(n, w) for n in range(problem.clients)]))


def client_grads(problem: Problem, w: Floats) -> Floats:
    """All grad F_n(w), ``[N, D]``; their mean over the first axis is grad F(w)."""
    return np.stack([problem.grad(n, w) for n in range(problem.clients)])


@dataclass(frozen=True)
class Quadratic:
    """``F_n(w) = 1/2 (w - a_n)' Q_n (w - a_n)`` with Gaussian noise of total variance sigma^2.

    Args:
        hessian_NDD: symmetric, positive semidefinite.
        centre_ND: a_n.
        start: w_0, ``[D]``.
        sigma: sqrt(sigma^2).
        prunable: ``[D]``; everything when absent.
    """

    hessian_NDD: Floats
    centre_ND: Floats
    start: Floats
    sigma: float = 0.0
    dense: int = 0
    rows: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @classmethod
    def random(
        cls, rng: np.random.Generator, *, clients: int, size: int, smoothness: float = 1.0,
        spread: float = 1.0, sigma: float = 0.0, dense: int = 0, alike: bool = False,
    ) -> Quadratic:  # fmt: skip
        """Random Hessians whose largest eigenvalue is `smoothness`, and centres `spread` apart.

        The last `dense` coordinates are never pruned; `alike` gives every client one Hessian.
        """
        hessians = []
        for _ in range(1 if alike else clients):
            basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
            spectrum = np.sort(rng.uniform(0.05, 1.0, size)) * smoothness
            spectrum[-1] = smoothness
            hessian = (basis * spectrum) @ basis.T
            hessians.append((hessian + hessian.T) / 2)
        centre = rng.standard_normal(size) + spread * rng.standard_normal((clients, size))
        hessian_NDD = np.stack(hessians * clients if alike else hessians)
        return cls(hessian_NDD, centre, 3.0 * rng.standard_normal(size), sigma, dense)

    @property
    def clients(self) -> int:
        """N."""
        return len(self.centre_ND)

    @property
    def size(self) -> int:
        """D."""
        return int(self.centre_ND.shape[1])

    @property
    def prunable(self) -> Bools:
        """All but the last `dense` coordinates, ``[D]``."""
        return np.arange(self.size) < self.size - self.dense

    @property
    def smoothness(self) -> float | None:
        """The largest eigenvalue of any Q_n (a scalar)."""
        return float(np.linalg.eigvalsh(self.hessian_NDD).max()) * (1 + _ROUNDING)

    @property
    def noise_sq(self) -> float:
        """sigma^2, the total variance of `noisy` (a scalar)."""
        return self.sigma**2

    @property
    def optimum(self) -> Floats:
        """A minimiser of F, ``[D]``."""
        pull = np.einsum("nij,nj->i", self.hessian_NDD, self.centre_ND)
        return np.asarray(np.linalg.lstsq(self.hessian_NDD.sum(axis=0), pull, rcond=None)[0])

    @property
    def infimum(self) -> float:
        """F at `optimum`, the least value of F (a scalar)."""
        return mean_loss(self, self.optimum) * (1 - _ROUNDING)

    def loss(self, client: int, w: Floats) -> float:
        """F_n(w), a scalar, for w ``[D]``."""
        offset = w - self.centre_ND[client]
        return float(0.5 * offset @ self.hessian_NDD[client] @ offset)

    def grad(self, client: int, w: Floats) -> Floats:
        """grad F_n(w) = Q_n (w - a_n), ``[D]``."""
        return np.asarray(self.hessian_NDD[client] @ (w - self.centre_ND[client]))

    def noisy(self, client: int, w: Floats, rng: np.random.Generator) -> Floats:
        """The gradient with Gaussian noise, variance sigma^2/D a coordinate, ``[D]``."""
        noise = rng.standard_normal(self.size) * (self.sigma / np.sqrt(self.size))
        return np.asarray(self.grad(client, w) + noise)


@dataclass(frozen=True)
class Logistic:
    """Ridge-regularised logistic regression; minibatches are drawn with replacement.

    Args:
        x_NMD: features of M samples a client. y_NM: labels, -1 or 1.
        ridge: >= 0. batch: minibatch size; 0 takes full gradients.
    """

    x_NMD: Floats
    y_NM: Floats
    start: Floats
    ridge: float = 0.01
    batch: int = 4
    dense: int = 0
    rows: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @classmethod
    def random(
        cls, rng: np.random.Generator, *, clients: int, size: int, samples: int = 20, batch: int = 4,
        shift: float = 0.5, dense: int = 0,
    ) -> Logistic:  # fmt: skip
        """Gaussian features around client means `shift` apart, labels from a noisy common teacher."""
        teacher = rng.standard_normal(size)
        means = shift * rng.standard_normal((clients, 1, size))
        x = means + rng.standard_normal((clients, samples, size))
        y = np.where(x @ teacher + rng.logistic(size=(clients, samples)) > 0, 1.0, -1.0)
        return cls(x, y, rng.standard_normal(size), batch=batch, dense=dense)

    @property
    def clients(self) -> int:
        """N."""
        return len(self.y_NM)

    @property
    def size(self) -> int:
        """D."""
        return int(self.x_NMD.shape[2])

    @property
    def prunable(self) -> Bools:
        """All but the last `dense` coordinates, ``[D]``."""
        return np.arange(self.size) < self.size - self.dense

    @property
    def smoothness(self) -> float | None:
        """A quarter of the largest eigenvalue of any client's second moments, plus the ridge (a scalar)."""
        gram = np.einsum("nmi,nmj->nij", self.x_NMD, self.x_NMD) / self.y_NM.shape[1]
        return float(np.linalg.eigvalsh(gram).max() / 4 + self.ridge) * (1 + _ROUNDING)

    @property
    def noise_sq(self) -> float:
        """The worst client's mean squared feature norm over the batch size; 0 without batches (a scalar)."""
        if self.batch == 0:
            return 0.0
        return float(np.square(self.x_NMD).sum(axis=2).mean(axis=1).max() / self.batch)

    @property
    def infimum(self) -> float:
        """F at `optimum`, the least value of F (a scalar)."""
        return mean_loss(self, self.optimum) * (1 - _ROUNDING)

    @property
    def optimum(self) -> Floats:
        """The minimiser of F, by Newton's method, ``[D]``."""
        w: Floats = np.zeros(self.size)
        for _ in range(50):
            p = _sigmoid(self.x_NMD @ w)
            curvature = np.einsum("nm,nmi,nmj->ij", p * (1 - p), self.x_NMD, self.x_NMD) / p.size
            grad = client_grads(self, w).mean(axis=0)
            w = w - np.linalg.solve(curvature + self.ridge * np.eye(self.size), grad)
        return w

    def loss(self, client: int, w: Floats) -> float:
        """F_n(w) over all M samples, ridge included, a scalar, for w ``[D]``."""
        margin = self.y_NM[client] * (self.x_NMD[client] @ w)
        return float(np.logaddexp(0, -margin).mean() + 0.5 * self.ridge * w @ w)

    def grad(self, client: int, w: Floats) -> Floats:
        """grad F_n(w) over all M samples, ``[D]``."""
        return self._grad(self.x_NMD[client], self.y_NM[client], w)

    def noisy(self, client: int, w: Floats, rng: np.random.Generator) -> Floats:
        """The gradient over one batch drawn with replacement, ``[D]``."""
        if self.batch == 0:
            return self.grad(client, w)
        index = rng.integers(self.y_NM.shape[1], size=self.batch)
        return self._grad(self.x_NMD[client, index], self.y_NM[client, index], w)

    def _grad(self, x: Floats, y: Floats, w: Floats) -> Floats:
        return np.asarray(-(y * _sigmoid(-y * (x @ w))) @ x / len(y) + self.ridge * w)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


@dataclass(frozen=True)
class ReluNetwork:
    """One hidden ReLU layer with squared loss: ``F_n = mean 1/2 (v . relu(W x + b) - y)^2``.

    Coordinates are W (prunable, row by row), then b, then v. A hidden unit's bias is dropped with its
    whole row. Its gradient jumps where a unit switches, so no L exists.
    """

    x_NMI: Floats
    y_NM: Floats
    start: Floats
    hidden: int
    batch: int = 4

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        *,
        clients: int,
        inputs: int,
        hidden: int,
        samples: int = 16,
        batch: int = 4,
    ) -> ReluNetwork:
        """Random features, targets from a smooth function that differs a little between clients."""
        x = rng.standard_normal((clients, samples, inputs))
        slope = rng.standard_normal(inputs) + 0.3 * rng.standard_normal((clients, inputs))
        y = np.tanh(np.einsum("nmi,ni->nm", x, slope))
        start = rng.standard_normal(hidden * (inputs + 2)) / np.sqrt(inputs)
        return cls(x, y, start, hidden, batch)

    @property
    def clients(self) -> int:
        """N."""
        return len(self.y_NM)

    @property
    def size(self) -> int:
        """D = hidden * (inputs + 2)."""
        return self.hidden * (int(self.x_NMI.shape[2]) + 2)

    @property
    def prunable(self) -> Bools:
        """The weights W, without b and v, ``[D]``."""
        return np.arange(self.size) < self.hidden * int(self.x_NMI.shape[2])

    @property
    def rows(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Each hidden unit's bias with the indices of its weights."""
        inputs = int(self.x_NMI.shape[2])
        first_bias = self.hidden * inputs
        return tuple(
            (first_bias + unit, tuple(range(unit * inputs, (unit + 1) * inputs)))
            for unit in range(self.hidden)
        )

    @property
    def smoothness(self) -> float | None:
        """None: the gradient jumps where a unit switches."""
        return None

    @property
    def noise_sq(self) -> float:
        """Infinite with batches, for no bound is known, else 0 (a scalar)."""
        return float("inf") if self.batch else 0.0

    @property
    def infimum(self) -> float:
        """0, below which no squared loss lies."""
        return 0.0

    def loss(self, client: int, w: Floats) -> float:
        """F_n(w) over all M samples, a scalar, for w ``[D]``."""
        return float(0.5 * np.square(self._forward(self.x_NMI[client], self.y_NM[client], w)[2]).mean())

    def grad(self, client: int, w: Floats) -> Floats:
        """grad F_n(w) over all M samples, ``[D]`` (0 as the slope of a unit at its kink)."""
        return self._grad(self.x_NMI[client], self.y_NM[client], w)

    def noisy(self, client: int, w: Floats, rng: np.random.Generator) -> Floats:
        """The gradient over one batch drawn with replacement, ``[D]``."""
        if self.batch == 0:
            return self.grad(client, w)
        index = rng.integers(self.y_NM.shape[1], size=self.batch)
        return self._grad(self.x_NMI[client, index], self.y_NM[client, index], w)

    def _forward(self, x: Floats, y: Floats, w: Floats) -> tuple[Floats, Floats, Floats]:
        weights, bias, top = self._split(w)
        before = x @ weights.T + bias
        return before, top, np.maximum(before, 0) @ top - y

    def _split(self, w: Floats) -> tuple[Floats, Floats, Floats]:
        inputs = int(self.x_NMI.shape[2])
        cut = self.hidden * inputs
        return w[:cut].reshape(self.hidden, inputs), w[cut : cut + self.hidden], w[cut + self.hidden :]

    def _grad(self, x: Floats, y: Floats, w: Floats) -> Floats:
        before, top, error = self._forward(x, y, w)
        back = (error[:, None] * top) * (before > 0) / len(y)
        return np.concatenate(
            [(back.T @ x).ravel(), back.sum(axis=0), np.maximum(before, 0).T @ error / len(y)]
        )
