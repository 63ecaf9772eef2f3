"""What of a sub-model must travel to a process that has parts of it.

Legend: S places of one payload, in the order of its ranking.

A process remembers the longest payload of each of the last versions that it was sent, and the server which
those are. Sub-models of one version are prefixes of each other, so another one of it is there already, or
lacks its end. Of the version before, everything behind the last place that has changed is there. Both sides
follow the rule below, so neither ever asks.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.kernels.blocks import blocks

#: Versions that are remembered.
KEPT = 2
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Parts(NamedTuple):
    """How a payload is put together.

    Attributes:
        base: remembered version of whose payload it takes the places from `changed` on; None for none.
        changed: first so many places travel.
        kept: places that the base has; those behind travel too.
    """

    base: int | None
    changed: int
    kept: int

    def travelling(self, values_S: Tensor) -> Tensor:
        """The places of a payload that travel."""
        if self.changed >= self.kept:
            return values_S
        return torch.cat((values_S[: self.changed], values_S[self.kept :]))

    def joined(self, sent: Tensor, base: Tensor | None, size: int) -> Tensor:
        """The payload of `size` places."""
        if base is None or self.changed >= self.kept:
            return sent
        if not len(sent):
            return base[:size]
        values_S = sent.new_empty(size)
        values_S[: self.changed] = sent[: self.changed]
        values_S[self.changed : self.kept] = base[self.changed : self.kept]
        values_S[self.kept :] = sent[self.changed :]
        return values_S


class Remembered:
    """The payloads that one process has."""

    def __init__(self) -> None:
        self._of_version: OrderedDict[int, tuple[str, Tensor]] = OrderedDict()

    def parts(self, sent: Dispatch) -> Parts:
        """The shortest way to make `sent`'s payload of those that are there."""
        size = len(sent.values_S)
        best, least = Parts(None, size, size), size
        for version, (ranking, held_S) in self._of_version.items():
            if ranking != sent.ranking.digest:
                continue
            kept = min(size, len(held_S))
            changed = 0
            if version != sent.version:
                changed = last_difference(sent.values_S[:kept], held_S[:kept])
            if changed + size - kept < least:
                best, least = Parts(version, changed, kept), changed + size - kept
        return best

    def payload(self, version: int | None) -> Tensor | None:
        """The one remembered of a version."""
        return None if version is None else self._of_version[version][1]

    def remember(self, version: int, ranking: str, values_S: Tensor) -> None:
        """It has been sent, or has arrived."""
        known = self._of_version.get(version)
        if known is None or known[0] != ranking or len(known[1]) < len(values_S):
            self._of_version[version] = ranking, values_S
        self._of_version.move_to_end(version)
        if len(self._of_version) > KEPT:
            self._of_version.popitem(last=False)


def last_difference(a: Tensor, b: Tensor) -> int:
    """Number of places up to the last one whose bits differ; 0 if none does."""
    a, b = (t.view(_BITS[t.dtype]) for t in (a, b))
    for at in reversed(list(blocks(0, len(a), a))):
        differs = a[at] != b[at]
        if bool(differs.any()):
            return at.start + int(differs.nonzero()[-1]) + 1
    return 0
