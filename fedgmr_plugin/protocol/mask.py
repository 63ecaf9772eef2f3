"""Which coordinates the payload of a message holds, as an array and packed.

Legend: D coordinates of the model, F of them free (not among the first `start` of the payload order), U of
those not in an earlier segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgmr_plugin.errors import WireError
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.protocol.maskcode import decode_set, encode_set


@dataclass(frozen=True, eq=False)
class Mask:
    """Which coordinates a slice of the payload order holds.

    Attributes:
        start: first place of the slice.
        cuts: ends of its segments, as in `Header`.
        segment_F: uint8 [F], segment of each free coordinate in increasing order; ``len(cuts)`` where none.
        code: the same, packed.
    """

    start: int
    cuts: tuple[int, ...]
    segment_F: NDArray[np.uint8]
    code: bytes

    @staticmethod
    def of(ranking: Ranking, tops: Sequence[int], held: int | None = None) -> Mask:
        """The mask of a ranking's rungs above `held`, up to ``tops[-1]``.

        Args:
            tops: ascending last rung of each segment. One segment, ``(rung,)``, has the fewest bytes; one
                segment per rung makes the payload order that of `Ranking.order_D`.
            held: rung that the receiver holds already.

        Raises:
            ValueError: `tops` do not ascend above `held`, or a segment is empty.
        """
        bounds = (-1 if held is None else held, *tops)
        cuts = tuple(ranking.ends[top] for top in tops)
        start = 0 if held is None else ranking.ends[held]
        if not tops or any(a >= b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"tops={tuple(tops)} do not ascend above held={held}")
        if any(a >= b for a, b in itertools.pairwise((start, *cuts))):
            raise ValueError(f"a segment of tops={tuple(tops)} has no coordinate")
        rung_F = ranking.rung_D.cpu().numpy()
        if held is not None:
            rung_F = rung_F[rung_F > held]
        segment_of_rung = np.searchsorted(tops, np.arange(len(ranking.ends) + 1)).astype(np.uint8)
        segment_F = segment_of_rung[rung_F]
        return Mask(start, cuts, segment_F, _pack(segment_F, len(cuts)))

    def coordinates(self, holds_D: Tensor | None = None) -> Tensor:
        """int64 [stop - start]: coordinates in payload order.

        Args:
            holds_D: bool [D], true on the first `start` places; may be left out where `start` is 0.

        Raises:
            ValueError: `holds_D` does not leave F coordinates free.
        """
        segments = range(len(self.cuts))
        index = torch.from_numpy(np.concatenate([np.flatnonzero(self.segment_F == s) for s in segments]))
        if holds_D is None and self.start == 0:
            return index
        free_F = torch.zeros(0, dtype=torch.int64) if holds_D is None else (~holds_D).nonzero().squeeze(1)
        if free_F.numel() != self.segment_F.size:
            raise ValueError(f"{free_F.numel()} coordinates are free, but the mask has {self.segment_F.size}")
        return free_F[index]


def _pack(segment_F: NDArray[np.uint8], segments: int) -> bytes:
    """Segment by segment, the set of its coordinates among those of no earlier one."""
    parts = []
    for segment in range(segments):
        member = segment_F == segment
        parts.append(encode_set(member))
        if segment + 1 < segments:
            segment_F = segment_F[~member]
    return b"".join(parts)


def unpack(view: memoryview, size: int, start: int, cuts: tuple[int, ...]) -> Mask:
    """The mask in `view`, which must hold nothing else. The caller bounds `size` and the number of segments.

    Args:
        size: coordinates of the model, D.
        start, cuts: the slice, as in `Header`.

    Raises:
        WireError: GMR-716 to GMR-720.
    """
    segments = len(cuts)
    position = 0
    segment_F = np.full(0, segments, dtype=np.uint8)
    for segment, (low, high) in enumerate(itertools.pairwise((start, *cuts))):
        member, used = decode_set(view[position:], size - low, high - low)
        position += used
        if segment == 0:
            segment_F = np.where(member, np.uint8(0), np.uint8(segments))
        else:
            free = segment_F == segments
            segment_F[free] = np.where(member, np.uint8(segment), np.uint8(segments))
    if position != len(view):
        raise WireError("GMR-716", f"bytes={len(view) - position} are left over behind the mask")
    return Mask(start, cuts, segment_F, bytes(view))
