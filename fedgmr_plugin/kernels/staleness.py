"""How much a late upload counts: s(tau), tau in windows. See the method page, section 5."""

from __future__ import annotations

import sys
from typing import Literal

Staleness = Literal["constant", "polynomial", "hinge"]


def staleness_weight(
    kind: Staleness, tau: int, *, exponent: float = 0.6, slope: float = 10.0, delay: float = 4.0
) -> float:
    """s(tau) in (0, 1], with s(0) = 1 and s never increasing (dimensionless).

    ``constant`` 1; ``polynomial`` (1 + tau)^-exponent; ``hinge`` 1 up to `delay`, then
    1 / (slope (tau - delay) + 1), both as in FedAsync (Xie et al., 2019).

    Args:
        tau: windows between dispatch and arrival, >= 0.
    """
    if kind == "constant":
        return 1.0
    if kind == "polynomial":
        return max(float((1.0 + tau) ** -exponent), sys.float_info.min)
    return 1.0 if tau <= delay else 1.0 / (slope * (tau - delay) + 1.0)
