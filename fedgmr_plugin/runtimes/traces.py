"""Measured bandwidth: time and throughput arrays from an .npz file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedgmr_plugin.errors import DataError

Trace = tuple[NDArray[np.float64], NDArray[np.float64]]


def load_traces(path: str, family: str | None = None) -> list[Trace]:
    """Traces of an .npz file as (times in seconds [n], rates [n]).

    The file holds the concatenated arrays ``time_s`` and ``mbit_s``, cut by ``offset`` [traces + 1], and
    optionally ``family`` [traces]. Rates are relative: a client's trace is scaled to the client's mean rate.
    Nothing is unpickled.

    Args:
        family: keep only traces whose family is this.

    Raises:
        DataError: GMR-303 if the file is missing, lacks an array, or holds a trace that cannot be followed.
    """
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise DataError("GMR-303", f"bandwidth_traces={path} cannot be read: {error}", where=path) from error
    missing = [name for name in ("time_s", "mbit_s", "offset") if name not in arrays]
    if missing or (family is not None and "family" not in arrays):
        raise DataError(
            "GMR-303", f"bandwidth_traces={path} lacks {', '.join(missing or ['family'])}", where=path
        )
    time_s, rate = arrays["time_s"].astype(np.float64), arrays["mbit_s"].astype(np.float64)
    offset = arrays["offset"].astype(np.int64)
    if time_s.shape != rate.shape or offset.ndim != 1 or len(offset) < 2 or offset[-1] > len(time_s):
        raise DataError(
            "GMR-303", f"bandwidth_traces={path} has arrays that do not fit each other", where=path
        )
    traces = []
    for i, (start, stop) in enumerate(pairwise(offset.tolist())):
        if family is not None and str(arrays["family"][i]) != family:
            continue
        time, value = time_s[start:stop], rate[start:stop]
        if not _usable(time, value):
            raise DataError(
                "GMR-303", f"trace {i} needs increasing times and rates >= 0 that are not all 0", where=path
            )
        traces.append((time, value))
    if not traces:
        raise DataError("GMR-303", f"no trace of family {family!r}", where=f"{path}: trace_family")
    return traces


def _usable(time: NDArray[np.float64], value: NDArray[np.float64]) -> bool:
    if len(time) < 2 or not (np.isfinite(time).all() and np.isfinite(value).all()):
        return False
    return bool((np.diff(time) > 0).all() and (value >= 0).all() and value.sum() > 0)
