"""The few numbers that a run comes down to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedgmr_plugin.protocol.runlog import RunLog
from fedgmr_plugin.report.statistics import to_target

Array = NDArray[np.float64]

#: Share of the best run's last accuracy that is the target where none is given.
TARGET_SHARE = 0.95


class Summary(NamedTuple):
    """One run in numbers; None where the log does not tell.

    Attributes:
        name, method, seed, clients: from the header.
        finished: the run ended by itself.
        windows: windows merged.
        virtual_seconds: virtual time at its end (or at the end of the log).
        budget_seconds: virtual time at which `accuracy` is taken.
        accuracy: of the shipped candidate at its last evaluation until then (or the mean of the last few), in
            [0, 1].
        last_accuracy: at its last evaluation of all.
        target_accuracy: accuracy to reach.
        seconds_to_target: virtual time of the first evaluation that reaches it.
        megabytes_to_target: traffic up and down until that evaluation, 10^6 bytes.
        megabytes_up, megabytes_down: simulated traffic of the clients, 10^6 bytes.
        mean_density: mean over windows of the clients' mean density.
        mean_staleness: mean over merged uploads, in windows.
        rejected: uploads refused.
        model_sha256: of the final global vector.
    """

    name: str
    method: str
    seed: int
    clients: int
    finished: bool
    windows: int
    virtual_seconds: float
    budget_seconds: float | None
    accuracy: float | None
    last_accuracy: float | None
    target_accuracy: float | None
    seconds_to_target: float | None
    megabytes_to_target: float | None
    megabytes_up: float
    megabytes_down: float
    mean_density: float | None
    mean_staleness: float | None
    rejected: int
    model_sha256: str | None


def evaluations(run: RunLog, key: str = "accuracy") -> tuple[Array, Array]:
    """Virtual time [E] (seconds) and one metric [E] of the run's evaluations, NaN where not recorded.

    The window in which the time budget ends is still completed; its evaluation counts at the budget.
    """
    time = run.column("evaluation", "time")
    budget = run.header["time_budget"]
    return (time if budget is None else np.minimum(time, budget)), run.column("evaluation", key)


def common_budget(runs: Sequence[RunLog]) -> float | None:
    """The largest virtual time until which every run was evaluated; None if one never was."""
    last = [time[np.isfinite(value) & np.isfinite(time)] for time, value in map(evaluations, runs)]
    if not last or any(len(time) == 0 for time in last):
        return None
    return float(min(time[-1] for time in last))


def default_target(runs: Sequence[RunLog]) -> float | None:
    """`TARGET_SHARE` of the best last accuracy among the runs; None without an accuracy."""
    last = [_last(evaluations(run)[1]) for run in runs]
    known = [accuracy for accuracy in last if accuracy is not None]
    return TARGET_SHARE * max(known) if known else None


def summarise(
    run: RunLog, target: float | None = None, *, budget: float | None = None, last: int = 1
) -> Summary:
    """The run in numbers.

    Args:
        target: accuracy to reach, in [0, 1]; `default_target` of this run alone where None.
        budget: virtual seconds at which the accuracy is taken; the run's last evaluation where None.
        last: evaluations until then that the accuracy is the mean of, or as many as there are.

    Raises:
        RunLogError: GMR-602 if a value that is needed has the wrong type.
    """
    header, end = run.header, run.end
    target = default_target([run]) if target is None else target
    budget = common_budget([run]) if budget is None else budget
    time, accuracy = evaluations(run)
    until = accuracy if budget is None else accuracy[time <= budget]
    sent = run.column("evaluation", "bytes_up") + run.column("evaluation", "bytes_down")
    goal = math.inf if target is None else target
    reached = to_target(np.where(np.isfinite(time), accuracy, np.nan), goal, time, sent)
    ends = run.column("window", "end")
    return Summary(
        name=run.name,
        method=method_of(header),
        seed=header["seed"],
        clients=header["clients"],
        finished=end is not None,
        windows=run.count("window"),
        virtual_seconds=_last(ends) or 0.0,
        budget_seconds=budget,
        accuracy=_mean(until[np.isfinite(until)][-last:]),
        last_accuracy=_last(accuracy),
        target_accuracy=target,
        seconds_to_target=_known(reached.seconds),
        megabytes_to_target=_known(reached.bytes / 1e6),
        megabytes_up=float(np.nansum(run.column("window", "bytes_up"))) / 1e6,
        megabytes_down=float(np.nansum(run.column("window", "bytes_down"))) / 1e6,
        mean_density=_mean(run.column("window", "mean_density")),
        mean_staleness=_mean(run.column("arrival", "staleness").astype(np.float64)),
        rejected=run.count("rejected"),
        model_sha256=None if end is None else end["model_sha256"],
    )


def summarise_all(runs: Sequence[RunLog], target: float | None = None, *, last: int = 1) -> list[Summary]:
    """Every run in numbers, with one target and one budget for all, so that they compare."""
    target = default_target(runs) if target is None else target
    budget = common_budget(runs)
    return [summarise(run, target, budget=budget, last=last) for run in runs]


def _last(values: Array) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Array) -> float | None:
    mean = float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
    return mean if math.isfinite(mean) else None


def method_of(header: Mapping[str, Any]) -> str:
    """The method of a run: the one that was configured, else what wrote the log."""
    return str(header["config"].get("method", header["method"]))
