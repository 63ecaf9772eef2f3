"""Long vectors in pieces that stay in a processor's cache.

Legend: B coordinates of one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: Coordinates of a piece on a CPU, chosen by measurement (benchmarks/NOTES.md): Python's share shows in
#: smaller ones, and larger ones leave the cache of smaller processors.
BLOCK = 2**19


def block_length(like: Tensor) -> int:
    """Coordinates of a piece of a vector: `BLOCK` on a CPU, all of the vector on another device."""
    return BLOCK if like.device.type == "cpu" else max(like.numel(), 1)


def blocks(start: int, stop: int, like: Tensor) -> Iterator[slice]:
    """`start` to `stop`, of a vector, in pieces of at most `block_length`."""
    step = block_length(like)
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


def sum_sq(v: Tensor, base: Tensor | None = None, parts: Sequence[slice] = (slice(None),)) -> float:
    """||v||^2 or ||v - base||^2 over `parts` of vectors; differences in their type, the rest in float64."""
    sums = []
    for part in parts:
        for at in blocks(*part.indices(v.numel())[:2], v):
            v_B = (v[at] if base is None else v[at] - base[at]).to(torch.float64)
            sums.append(torch.dot(v_B, v_B))
    return float(sum(torch.stack(sums).tolist())) if sums else 0.0
