"""Long vectors in pieces that stay in a processor's cache.

Legend: B coordinates of one piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Coordinates of a piece on a CPU, chosen by measurement (benchmarks/NOTES.md): Python's share shows in
#: smaller ones, and larger ones leave the cache of smaller processors.
BLOCK = 2**19


def blocks(start: int, stop: int, like: Tensor) -> Iterator[slice]:
    """`start` to `stop` in pieces of at most `BLOCK`; in one piece on another device than the CPU."""
    step = BLOCK if like.device.type == "cpu" else max(stop - start, 1)
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


def distance_sq(a_D: Tensor, b_D: Tensor) -> float:
    """||a - b||^2 of two vectors; differences in their type, squares and their sum in float64."""
    total = 0.0
    for at in blocks(0, a_D.numel(), a_D):
        step_B = (a_D[at] - b_D[at]).to(torch.float64)
        total += float(torch.dot(step_B, step_B))
    return total
