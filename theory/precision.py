"""How far a logged number may be from the true one: the tolerance model of the checker.

Let u be the unit roundoff of the model's type (2^-24 for float32, 2^-53 for float64) and D its size.

=============== =========================================== =========================================
class           fields                                      error allowed
=============== =========================================== =========================================
exact           counts, densities, versions, weights         0
reduction       squared norms of stored vectors, summed in   2 D 2^-53, relative
                float64
stored step     a step against the merge rule                u (4 ||w|| + (|A| + 3) sum pibar ||change||)
                                                             in norm: w is rounded when stored, sums of
                                                             |A| changes in its type
loss            F(w_t), F(w_{t+1})                           SLACK u |F|
gradient        ||grad F||^2 and differences of gradients    SLACK u * (largest gradient norm) in norm
slope           <grad F, Delta>                              SLACK u ||grad F|| ||Delta||
share           pibar, a quotient of summed weights          8 u, relative
clock, bytes    seconds and bytes                            1e-9, relative
=============== =========================================== =========================================

The reduction bound is rigorous. The loss and gradient bounds are a model: back-propagation has no
a-priori error bound that is both rigorous and useful, so `SLACK` = 64 stands for the few dozen
roundings that typically accumulate; it can be raised (``fedgmr-theory check --slack``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.intervals import Interval
from theory.log import RunLog
from theory.schema import ROUNDOFF, SLACK

Floats = NDArray[np.float64]

#: Relative error of clocks and byte counts.
CLOCK = 1e-9


@dataclass(frozen=True)
class Precision:
    """Error model of one run.

    Attributes:
        roundoff: u.
        size: D.
        slack: see `SLACK`.
    """

    roundoff: float = 2.0**-24
    size: float = 1e7
    slack: float = SLACK

    @classmethod
    def of(cls, log: RunLog, slack: float = SLACK) -> Precision:
        """From the header's layout; float32 and 10^7 coordinates where it does not say."""
        dtype, size = log.layout("dtype"), log.layout("size")
        roundoff = ROUNDOFF[(dtype or "float32").removeprefix("torch.")]
        return cls(roundoff, 1e7 if size is None else float(size), slack)

    def reduction(self, value: ArrayLike) -> Interval:
        """A squared norm of a stored vector."""
        x = np.asarray(value, dtype=np.float64)
        return Interval.around(x, np.abs(x) * (2.0 * self.size * 2.0**-53))

    def share(self, value: ArrayLike) -> Interval:
        """A share pibar_n."""
        x = np.asarray(value, dtype=np.float64)
        return Interval.around(x, np.abs(x) * (8 * self.roundoff))

    def stored(self, value: ArrayLike, model_sq: ArrayLike, summed: ArrayLike = 0.0) -> Interval:
        """A squared step that was computed as ``sum pi * change`` and then stored with the model.

        Args:
            model_sq: ||w||^2.
            summed: (|A| + 3) sum pibar ||change||.
        """
        error = self.roundoff * (4 * np.sqrt(np.asarray(model_sq)) + np.asarray(summed))
        return _norm_error(value, error, self.reduction(value))

    def gradient(self, value: ArrayLike, scale_sq: ArrayLike) -> Interval:
        """A squared norm of (differences of) gradients whose own squared norms are up to `scale_sq`."""
        scale = np.sqrt(np.maximum(np.asarray(scale_sq, dtype=np.float64), 0))
        return _norm_error(value, self.slack * self.roundoff * scale, self.reduction(value))

    def loss(self, value: ArrayLike) -> Interval:
        """A mean loss."""
        x = np.asarray(value, dtype=np.float64)
        return Interval.around(x, np.abs(x) * (self.slack * self.roundoff))

    def slope(self, value: ArrayLike, grad_sq: ArrayLike, step_sq: ArrayLike) -> Interval:
        """An inner product of a gradient and a step."""
        size = np.sqrt(np.asarray(grad_sq, dtype=np.float64) * np.asarray(step_sq, dtype=np.float64))
        return Interval.around(value, size * (self.slack * self.roundoff))


def _norm_error(value: ArrayLike, error: Floats, base: Interval) -> Interval:
    """Squared norms whose unsquared norms are wrong by at most `error`."""
    x = np.asarray(value, dtype=np.float64)
    radius = 2 * np.sqrt(np.maximum(x, 0)) * error + error**2
    return Interval(np.maximum(base.lo - radius, 0), base.hi + radius, x)
