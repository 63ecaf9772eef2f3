"""One run of an experiment, in a process of its own.

    FOLDER/experiment.json              the experiment as it runs
    FOLDER/METHOD-SEED/problem.json     what the run trains

A run that was interrupted goes on from its checkpoint; one of another problem or of other options is moved
aside.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.errors import FedGMRError, RunLogError
from fedgmr_plugin.protocol.runlog import LOG_NAME
from fedgmr_plugin.runtimes import resume
from fedgmr_plugin.runtimes.experiment import Experiment, problem_of, run_name
from fedgmr_plugin.runtimes.launch import simulate
from fedgmr_plugin.runtimes.uncaught import tell

#: An experiment as it runs, in the folder of its runs.
DESCRIPTION = "experiment.json"
#: What one run trains, in its own directory.
PROBLEM = "problem.json"
#: Exit status of a run's process where no method could train: its data or model cannot be made.
NO_PROBLEM = 3
#: Seconds between looks at the campaign.
_LOOK = 0.5


def train(
    experiment: Experiment, method: str, seed: int, folder: Path, made: tuple[list[Any], nn.Module]
) -> None:
    """Carry out one run in this process, from its last checkpoint where it was interrupted.

    A directory of a run of another problem or of other options is moved aside.

    Args:
        made: what the problem makes of the seed.

    Raises:
        FedGMRError: everything that a run raises; GMR-604 if another process trains it.
    """
    name = run_name(method, seed)
    run = folder / name
    dataset, model = made
    options = {
        **experiment.options(method),
        "progress": False,
        "output_dir": str(folder),
        "run_name": name,
    }

    def go_on() -> None:
        begun = (run / LOG_NAME).exists()
        run.mkdir(exist_ok=True)
        (run / PROBLEM).write_text(_problem(experiment), encoding="utf-8")
        with resume.resuming(run) if begun else nullcontext():
            simulate(dataset, model, options, seed, **experiment.train_args)

    if (run / LOG_NAME).exists() and (resume.has_ended(run) or not _has_problem(run, experiment)):
        move_aside(run)
    try:
        go_on()
    except RunLogError as error:
        if error.code not in ("GMR-605", "GMR-606"):
            raise
        move_aside(run)
        go_on()


def _problem(experiment: Experiment) -> str:
    """What a run trains, which its own log does not tell."""
    return json.dumps({"problem": experiment.problem, "with": experiment.arguments}, indent=1) + "\n"


def _has_problem(run: Path, experiment: Experiment) -> bool:
    try:
        return json.loads((run / PROBLEM).read_text(encoding="utf-8")) == json.loads(_problem(experiment))
    except (OSError, ValueError):
        return False


def move_aside(run: Path) -> Path:
    """Give a run's directory another name, the first that is free; returns it."""
    number = 1
    while (other := run.with_name(f"{run.name}.old{number}")).exists():
        number += 1
    return run.rename(other)


def is_finished(experiment: Experiment, method: str, seed: int, folder: Path) -> bool:
    """Whether `folder` has the run, to its end, of the problem and options that the experiment has now."""
    run = folder / run_name(method, seed)
    if not (run / LOG_NAME).exists() or not resume.has_ended(run) or not _has_problem(run, experiment):
        return False
    try:
        with (run / LOG_NAME).open("rb") as log:
            header = json.loads(log.readline())
        config, fedml = dict(header["config"]), dict(header["fedml"])
    except (ValueError, TypeError, KeyError):  # a damaged log is nobody's run
        return False
    wanted = experiment.config(method).model_dump(mode="json")
    found = {**FedGMRConfig().model_dump(mode="json"), **config}  # older logs lack newer options
    same = all(found[key] == value for key, value in wanted.items() if key not in resume.FREE_OPTIONS)
    return same and all(fedml.get(k) == v for k, v in experiment.keys(seed).items())


def main(folder: str, method: str, seed: str, campaign: str = "") -> None:
    """One run of the experiment that is described in `folder`.

    Args:
        campaign: pid of the process that starts this one, with which it ends; empty without one.
    """
    # A shell that begins a campaign in the background lets its processes ignore what ends them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if campaign:
        threading.Thread(target=_end_with, args=(int(campaign),), daemon=True).start()
    text = (Path(folder) / DESCRIPTION).read_text(encoding="utf-8")
    experiment = Experiment.model_validate_json(text)
    try:
        dataset, model = problem_of(experiment)(int(seed), **experiment.arguments)
    except Exception as error:  # noqa: BLE001  (whatever the user's function raises)
        if isinstance(error, FedGMRError):
            tell(error)
        else:
            traceback.print_exc()
        sys.exit(NO_PROBLEM)
    try:
        train(experiment, method, int(seed), Path(folder), (dataset, model))
    except FedGMRError as error:
        tell(error)
        sys.exit(NO_PROBLEM if error.code == "GMR-302" else 1)


def _end_with(campaign: int) -> None:
    """Interrupt this process when its campaign has gone, however that ended."""
    while os.getppid() == campaign:
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main(*sys.argv[1:])
