"""The average density gap of a run: measured, bounded, against frozen densities, and its price.

All series have one value a window, ``[W]``; nan where nothing arrived or something is not logged.

* ``distance``: ``sum pibar_n ||w_s - m_n w_s||^2``, what the masks really left out (equation 11 over L^2);
* ``gap``: ``sum pibar_n q_n ||w_s||^2`` over prunable coordinates, the density gap that bounds it;
* ``frozen``: the same arrivals and shares, had every client kept its initial density. The shares are
  those logged: with the shares that frozen masks would have, the gap is *not* monotone in general
  (``docs/derivations/05-restoration.md``), which ``frozen_reshared`` shows where masks are nested;
* ``average`` and ``average_frozen``: the plain averages of q_n, which restoration can only lower.

A counterfactual "on the same arrivals" leaves out the price: restored sub-models are slower. That is
shown beside it, as staleness and arrivals by density.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.checks.identity import window_of
from theory.frame import Frame, gather, rows_of
from theory.log import RunLog

Floats = NDArray[np.float64]


class Price(NamedTuple):
    """Arrivals of one density: how many and how stale (mean, windows).

    ``restored`` counts those of clients that started sparser, ``restored_staleness`` is their mean.
    """

    density: float
    arrivals: int
    staleness: float
    restored: int
    restored_staleness: float | None


@dataclass(frozen=True)
class DensityGap:
    """See the module. ``mask_error`` and ``mask_share`` need ``terms`` records.

    Attributes:
        window: window numbers.
        distance, gap, frozen, frozen_reshared: weight^2. average, average_frozen: dimensionless.
        mask_error: ||M_t||^2 (loss^2/weight^2). mask_share: its share of the sum of all squared terms.
        distance_share: mask distance over mask distance + drift + staleness path, which needs no gradient.
        density: mean density of the N clients. staleness: mean over the window's arrivals. arrivals: |A_t|.
        shares_logged: pibar is logged; equal shares 1/|A_t| were used where it is not.
        price: one entry for each density that arrived.
    """

    name: str
    window: Floats
    distance: Floats
    gap: Floats
    frozen: Floats
    frozen_reshared: Floats
    average: Floats
    average_frozen: Floats
    mask_error: Floats
    mask_share: Floats
    distance_share: Floats
    density: Floats
    staleness: Floats
    arrivals: Floats
    shares_logged: bool
    price: tuple[Price, ...]

    def total(self, series: str) -> float | None:
        """Mean of a series over the windows where it is known; None where it never is."""
        values: Floats = getattr(self, series)
        known = values[np.isfinite(values)]
        return float(known.mean()) if len(known) else None

    @property
    def saving(self) -> float | None:
        """``1 - gap/frozen`` in total: the share of the density gap that restoration removed."""
        both = ~np.isnan(self.gap) & ~np.isnan(self.frozen)
        frozen = float(self.frozen[both].sum())
        return 1.0 - float(self.gap[both].sum()) / frozen if frozen > 0 else None

    def as_dict(self, *, series: bool = True) -> dict[str, Any]:
        """JSON form: totals, price, and the series (null for nan)."""
        names = [
            key
            for key, kind in self.__dataclass_fields__.items()
            if kind.type == "Floats" and key != "window"
        ]
        data: dict[str, Any] = {
            "name": self.name,
            "shares_logged": self.shares_logged,
            "saving": self.saving,
            "totals": {key: self.total(key) for key in names},
            "price": [entry._asdict() for entry in self.price],
        }
        if series:
            data["series"] = {key: _nullable(getattr(self, key)) for key in ("window", *names)}
        return data


@np.errstate(all="ignore")
def density_gap(log: RunLog) -> DensityGap:
    """Measures one run."""
    frame = Frame.of(log)
    arrival, table = log["arrival"], log["window"]
    count = np.maximum(table["arrivals"], 1)
    busy = np.where(table["arrivals"] > 0, 0.0, np.nan)
    equal = 1.0 / gather(count, frame.arrival_window)
    shares_logged = arrival.logged("pibar")
    pibar = arrival["pibar"] if shares_logged else equal
    q, frozen_q = gather(frame.pruned_share, frame.arrival_dispatch), frame.frozen_share
    norm, left_out = frame.sent("norm_sq"), frame.sent("full_masked_norm_sq")
    left_out = np.where(np.isnan(left_out), frame.sent("masked_norm_sq"), left_out)

    def over_window(values: Floats) -> Floats:
        return np.asarray(frame.per_window(values) + busy)

    path = arrival["staleness"] * frame.arrival_path_sq
    parts = over_window(pibar * left_out), over_window(pibar * arrival["drift_sq"]), over_window(pibar * path)
    whole = parts[0] + parts[1] + parts[2]
    error, share = _mask_error(frame)
    return DensityGap(
        name=log.name or log.path,
        window=frame.window_number,
        distance=parts[0],
        gap=over_window(pibar * q * norm),
        frozen=over_window(pibar * frozen_q * norm),
        frozen_reshared=np.where(frame.nested, over_window(_frozen_shares(frame) * frozen_q * norm), np.nan),
        average=over_window(q * equal),
        average_frozen=over_window(frozen_q * equal),
        mask_error=error,
        mask_share=share,
        distance_share=np.divide(parts[0], whole, out=np.full(frame.windows, np.nan), where=whole > 0),
        density=table["mean_density"],
        staleness=over_window(arrival["staleness"] * equal),
        arrivals=table["arrivals"],
        shares_logged=shares_logged,
        price=_prices(frame),
    )


def _frozen_shares(frame: Frame) -> Floats:
    """pibar_n that nested masks of the initial densities would have given, ``[A]``."""
    weight, start = frame.log["arrival"]["weight"], frame.initial_density
    order = np.lexsort((-start, frame.arrival_window))
    result = np.full(len(weight), np.nan)
    if not len(order):
        return result
    rows, densities = frame.arrival_window[order], start[order]
    breaks = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))
    for begin, end in zip(breaks, [*breaks[1:], len(order)], strict=True):
        heavier = np.cumsum(weight[order[begin:end]])
        last = np.searchsorted(-densities[begin:end], -densities[begin:end], side="right") - 1
        result[order[begin:end]] = weight[order[begin:end]] / heavier[last]
    return result


def _mask_error(frame: Frame) -> tuple[Floats, Floats]:
    """``||M_t||^2`` and its share of all squared terms, ``[W]``."""
    error, share = np.full(frame.windows, np.nan), np.full(frame.windows, np.nan)
    table, rows = frame.log["terms"], window_of(frame)
    if len(table):
        rho = np.nan_to_num(table["rho_sq"]) / table["gamma"] ** 2
        whole = sum(table[f"{term}_sq"] for term in ("z", "D", "M", "S", "H", "U")) + rho
        error[rows] = table["M_sq"]
        share[rows] = np.divide(table["M_sq"], whole, out=np.full(len(table), np.nan), where=whole > 0)
    return error, share


def _prices(frame: Frame) -> tuple[Price, ...]:
    """Staleness by density, sparse to dense."""
    density, tau = frame.sent("density"), frame.log["arrival"]["staleness"]
    known = np.unique(density[~np.isnan(density)])
    rows = rows_of(known, density)
    risen = density > frame.initial_density
    entries = []
    for i, value in enumerate(known):
        own, raised = tau[rows == i], tau[(rows == i) & risen]
        mean = float(raised.mean()) if len(raised) else None
        entries.append(Price(float(value), len(own), float(own.mean()), len(raised), mean))
    return tuple(entries)


def _nullable(values: Floats) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
