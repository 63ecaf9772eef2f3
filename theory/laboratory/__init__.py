"""A numpy laboratory: problems with known constants, a reference simulation, exact terms."""

from __future__ import annotations

from theory.laboratory.decompose import Arrival, Decomposition, decompose, local_steps, merge, shares
from theory.laboratory.masks import digest, mask, ranking
from theory.laboratory.problems import Logistic, Problem, Quadratic, ReluNetwork, client_grads, mean_loss
from theory.laboratory.simulate import Schedule, Trace, simulate

__all__ = [
    "Arrival",
    "Decomposition",
    "Logistic",
    "Problem",
    "Quadratic",
    "ReluNetwork",
    "Schedule",
    "Trace",
    "client_grads",
    "decompose",
    "digest",
    "local_steps",
    "mask",
    "mean_loss",
    "merge",
    "ranking",
    "shares",
    "simulate",
]
