"""How densities and staleness went, client class by client class, from a run log."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedgmr_plugin.protocol.runlog import RunLog

Array = NDArray[np.float64]


class ClientClass(NamedTuple):
    """Clients that start with the same density."""

    density: float
    clients: tuple[int, ...]


class ClassFigures(NamedTuple):
    """What became of one class: counts, means over its uploads, MB (10^6 bytes), virtual seconds."""

    samples: int
    final_density: float
    uploads: int
    mean_staleness: float | None
    megabytes_up: float
    megabytes_down: float
    full_at: float | None


def classes(run: RunLog) -> list[ClientClass]:
    """The run's client classes, densest first."""
    initial = run.header["densities"]
    values = sorted({density for density in initial if density is not None}, reverse=True)
    return [ClientClass(d, tuple(n for n, own in enumerate(initial) if own == d)) for d in values]


def density_steps(run: RunLog) -> tuple[Array, Array]:
    """Virtual times [k] (seconds, from 0 to the end of the log) and densities from then on [k, N].

    A client starts with the density of its first dispatch, which is not its class's where
    ``dense_start`` is set, and otherwise with that of the header.
    """
    current = np.array(run.header["densities"], dtype=np.float64)
    sent, density = run.column("dispatch", "client"), run.column("dispatch", "density")
    for client, first in zip(*np.unique(sent, return_index=True), strict=True):
        if 0 <= client < len(current) and np.isfinite(density[first]):
            current[client] = density[first]
    times, rows = [0.0], [current.copy()]
    for record in run.records("restoration"):
        client, after, time = record["client"], record["after"], record["time"]
        if client is None or after is None or time is None or not 0 <= client < len(current):
            continue
        current[client] = after
        if time == times[-1]:
            rows[-1] = current.copy()
        else:
            times.append(float(time))
            rows.append(current.copy())
    ends = run.column("window", "end")
    finish = float(np.nanmax(ends)) if np.isfinite(ends).any() else times[-1]
    if finish > times[-1]:
        times.append(finish)
        rows.append(current.copy())
    return np.array(times), np.array(rows)


def class_figures(run: RunLog) -> list[tuple[ClientClass, ClassFigures]]:
    """What became of the clients of each class, densest first."""
    arrival = run.columns("arrival", "client", "staleness", "bytes_up")
    dispatch = run.columns("dispatch", "client", "bytes_down")
    times, densities = density_steps(run)
    samples = run.header["client_samples"]
    found = []
    for group in classes(run):
        mine = np.isin(arrival["client"], group.clients)
        sent = np.isin(dispatch["client"], group.clients)
        own = densities[:, list(group.clients)]
        full = np.flatnonzero((own >= 1).all(axis=1))
        figures = ClassFigures(
            samples=sum(samples[n] for n in group.clients if n < len(samples)),
            final_density=float(own[-1].mean()),
            uploads=int(mine.sum()),
            mean_staleness=float(arrival["staleness"][mine].mean()) if mine.any() else None,
            megabytes_up=float(np.nansum(arrival["bytes_up"][mine])) / 1e6,
            megabytes_down=float(np.nansum(dispatch["bytes_down"][sent])) / 1e6,
            full_at=float(times[full[0]]) if len(full) else None,
        )
        found.append((group, figures))
    return found


def staleness_by_window(run: RunLog) -> tuple[Array, Array]:
    """Virtual time [W] (end of the window, seconds) and mean staleness [W] of its uploads (NaN: none)."""
    window, end = run.column("window", "window"), run.column("window", "end")
    arrival = run.columns("arrival", "window", "staleness")
    if not len(window):
        return np.array([]), np.array([])
    order = np.argsort(window, kind="stable")
    place = np.searchsorted(window[order], arrival["window"])
    known = place < len(window)
    known[known] = window[order][place[known]] == arrival["window"][known]
    slot = order[place[known]]
    count = np.bincount(slot, minlength=len(window))
    total = np.bincount(slot, weights=arrival["staleness"][known], minlength=len(window))
    mean = np.full(len(window), np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    return end, mean


def held(run: RunLog, key: str) -> tuple[Array, Array]:
    """A number of the window records as steps: it holds from a window's start to its end."""
    start, end, value = run.columns("window", "start", "end", key).values()
    return np.append(start, end[-1:]), np.append(value, value[-1:])


def coordinates(run: RunLog) -> int:
    """Coordinates of the model that are no buffers."""
    layout = run.header["layout"]
    layers = [layer for layer in layout.get("layers") or [] if isinstance(layer, dict)]
    sizes = [layer.get("size") for layer in layers if layer.get("kind") != "buffer"]
    known = [size for size in sizes if isinstance(size, int)]
    size = sum(known) or layout.get("size")
    return size if isinstance(size, int) else 1
