"""What a server writes down: the records of the run log (its page has their fields), from what it knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedgmr_plugin.engine.admission import Admitted
from fedgmr_plugin.engine.events import Dispatch, Record, UploadArrived, UploadRefused, WindowClosed
from fedgmr_plugin.engine.measures import Norms
from fedgmr_plugin.kernels.aggregate import Coverage
from fedgmr_plugin.kernels.density import Restoration

#: Nobody holds anything: no update was merged.
NOBODY = Coverage(0, 0, 0, ())


def client(
    state: str, number: int, version: int, time: float, density: float, samples: int, dispatch: int | None
) -> Record:
    """A client that came, left, or is `dispatch`'s and overdue."""
    return _record(
        "client",
        window=version,
        time=time,
        client=number,
        state=state,
        dispatch=dispatch,
        density=density,
        samples=samples,
    )


def rejected(version: int, upload: UploadArrived | UploadRefused, code: str, message: str) -> Record:
    """An upload that is not merged."""
    return _record(
        "rejected",
        window=version,
        dispatch=upload.dispatch,
        client=upload.client,
        code=code,
        message=message,
    )


def arrival(admitted: Admitted, version: int, weight: float, pibar: float | None) -> Record:
    """An upload that is merged in window `version` with c_n = `weight`; `pibar` is its mean share of w."""
    flight, upload = admitted.flight, admitted.upload
    return _record(
        "arrival",
        window=version,
        dispatch=upload.dispatch,
        client=upload.client,
        version=flight.version,
        staleness=version - flight.version,
        density=flight.density,
        time=upload.time,
        bytes_up=upload.bytes_up,
        samples=upload.samples,
        weight=weight,
        pibar=pibar,
        drift_sq=upload.drift_sq,
        change_sq=upload.change_sq,
        steps=upload.steps,
        train_loss=upload.train_loss,
    )


def layers(version: int, held: Sequence[int]) -> Record:
    """How many coordinates of each layer the updates of a window held [L]."""
    return _record("layers", window=version, held=held)


def defence(version: int, updates: int, reduced: int, undefended: float) -> Record:
    """What `norm_bound` and `trim` did to the updates of a window."""
    return _record("defence", window=version, updates=updates, scaled=reduced, undefended=undefended)


def window(
    version: int,
    event: WindowClosed,
    *,
    arrivals: int,
    updates: int,
    parameters: int,
    coverage: Coverage,
    moved: float,
    in_flight: int,
    mean_density: float,
    density_floor: float,
) -> Record:
    """A window that merged `updates`, of a model of `parameters`, by a step of squared norm `moved`."""
    return _record(
        "window",
        window=version,
        start=event.start,
        close=event.close,
        end=event.end,
        arrivals=arrivals,
        gamma_min=coverage.least_holders,
        uncovered=coverage.uncovered if updates else parameters,
        coverage=coverage.held / (parameters * updates) if updates else 0.0,
        step_sq=moved,
        in_flight=in_flight,
        mean_density=mean_density,
        density_floor=density_floor,
    )


def restoration(version: int, time: float, change: Restoration, floor: float) -> Record:
    """A client's density that was restored."""
    return _record(
        "restoration",
        window=version,
        time=time,
        client=change.client,
        cause=change.cause,
        before=change.before,
        after=change.after,
        floor=floor,
    )


def dispatch(sent: Dispatch, time: float, prunable: Norms, parameters: Norms) -> Record:
    """A sub-model that leaves, with the norms of what it is cut from."""
    return _record(
        "dispatch",
        dispatch=sent.dispatch,
        client=sent.client,
        version=sent.version,
        density=sent.density,
        ranking=sent.ranking.digest,
        support=sent.ranking.ends[sent.rung],
        time=time,
        norm_sq=prunable.total,
        masked_norm_sq=prunable.masked[sent.rung],
        full_norm_sq=parameters.total,
        full_masked_norm_sq=parameters.masked[sent.rung],
    )


def _record(kind: str, **fields: Any) -> Record:
    return Record({"type": kind, **fields})
