"""Which uploads may be merged: one per dispatch, from its client, of its shape, with finite values."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgmr_plugin.engine.events import UploadArrived
from fedgmr_plugin.errors import UpdateRejected
from fedgmr_plugin.kernels.masks import Ranking

#: Refusals that still answer their dispatch: the client is free again.
ANSWERED = frozenset({"GMR-402", "GMR-403", "GMR-404", "GMR-407"})
#: Largest sample count that is believed: integers up to it are exact in float64.
MOST_SAMPLES = 2.0**53


@dataclass(frozen=True, eq=False)
class InFlight:
    """A dispatch that has not been answered."""

    client: int
    version: int
    density: float
    ranking: Ranking
    rung: int


@dataclass(frozen=True, eq=False)
class Admitted:
    """An upload that passed admission, with the dispatch that it answers."""

    flight: InFlight
    upload: UploadArrived

    @property
    def order(self) -> tuple[int, int]:
        """Canonical order of sums."""
        return self.upload.client, self.upload.dispatch


def admit(
    upload: UploadArrived,
    flights: Mapping[int, InFlight],
    staged: Container[int],
    dtype: torch.dtype,
    *,
    oldest: int = 0,
) -> Admitted:
    """Check an upload.

    Args:
        flights: dispatches not answered yet, by number.
        staged: dispatches whose upload waits for the window's close.
        dtype: type of the global vector.
        oldest: first version whose answers are merged.

    Raises:
        UpdateRejected: GMR-401 to GMR-404, GMR-406 or GMR-407.
    """
    flight = flights.get(upload.dispatch)
    if flight is None or upload.dispatch in staged:
        raise UpdateRejected("GMR-401", f"dispatch={upload.dispatch} is not in flight")
    if flight.client != upload.client:
        raise UpdateRejected(
            "GMR-406", f"client={upload.client} answers dispatch={upload.dispatch} of client {flight.client}"
        )
    if flight.version < oldest:
        raise UpdateRejected("GMR-407", f"version={flight.version} is older than {oldest}")
    wanted: tuple[int, ...] = (flight.ranking.ends[flight.rung],)
    if upload.sent_S is not None:
        if tuple(upload.sent_S.shape) != wanted:
            raise UpdateRejected("GMR-402", f"names of {tuple(upload.sent_S.shape)} instead of {wanted}")
        wanted = (int(torch.count_nonzero(upload.sent_S)),)
    if tuple(upload.values_S.shape) != wanted:
        raise UpdateRejected("GMR-402", f"shape={tuple(upload.values_S.shape)} instead of {wanted}")
    if upload.values_S.dtype != dtype:
        raise UpdateRejected("GMR-402", f"dtype={upload.values_S.dtype} instead of {dtype}")
    if not 0 < upload.samples <= MOST_SAMPLES:
        raise UpdateRejected("GMR-404", f"samples={upload.samples} is not in (0, {MOST_SAMPLES:g}]")
    if not _is_moderate(upload.values_S):
        raise UpdateRejected("GMR-403", "the update holds NaN, infinity, or a value whose square overflows")
    return Admitted(flight, upload)


def _is_moderate(values_S: Tensor) -> bool:
    """Whether no value is NaN, infinite, or so large that its square overflows."""
    if values_S.numel() == 0:
        return True
    limit = math.sqrt(torch.finfo(values_S.dtype).max)
    low, high = torch.aminmax(values_S)  # NaN, if there is one
    return float(low) >= -limit and float(high) <= limit
