"""This process among those of its job: which rank it is, and how the job ends when one fails.

Nothing here imports mpi4py or torch: it is asked before they are there, and when they never will be.
"""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

from fedgmr_plugin.errors import ConfigError, HostError

#: Variables in which MPI's launchers say rank and number of ranks. Slurm's own are in scripts too that it did
#: not start as ranks.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
)
#: Those of torchrun; one alone can be anybody's.
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Launchers by FedML's backend.
_STARTER = {"MPI": "mpirun", "NCCL": "torchrun"}
#: How the backends that need several processes are started.
LAUNCH = {
    "MPI": "mpirun -np 3 python -m fedgmr_plugin main.py --cf fedml_config.yaml",
    "NCCL": "torchrun --nproc_per_node=3 -m fedgmr_plugin main.py --cf fedml_config.yaml",
}
#: Variables in which launchers say how many ranks are on this machine.
_HERE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
#: Options that say how a run is written down: those of `fedgmr_args` that FedML's FedAvg takes here too.
RECORDING = frozenset({"run_name", "output_dir", "progress", "checkpoint_seconds"})
#: Seconds that other ranks leave to rank 0 to say what all of them would say.
_COURTESY = 2.0

_unfinished: list[str] = []
_rehearsing: list[bool] = []
_ours: list[str] = []
_status: list[int] = []
_absent: list[str] = []
_left: list[tuple[Sequence[int], Sequence[threading.Thread]]] = []


def rank() -> int:
    """Rank of this process as its launcher says; 0 without one."""
    names = [name for name, _ in _MPI] + ["RANK"] * (not _missing())
    return _first(names, 0)


def local_rank() -> int:
    """Rank of this process among those of its machine, as its launcher says; its rank where none does."""
    return _first(("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"), rank())


def size(backend: str) -> int:
    """Number of ranks, as the launcher for FedML's `backend` says; 1 where it does not."""
    return _first(["WORLD_SIZE"] if backend == "NCCL" else [name for _, name in _MPI], 1)


def is_launched(backend: str) -> bool:
    """Whether a launcher for FedML's `backend` started this process."""
    names = ["RANK"] if backend == "NCCL" else [name for name, _ in _MPI]
    return any(os.environ.get(name, "").isdigit() for name in names)


def require_torchrun() -> None:
    """Refuse a ``RANK`` that is somebody else's, before torch looks for the ranks that it belongs to.

    Raises:
        HostError: GMR-508.
    """
    missing = _missing()
    if missing:
        raise HostError(
            "GMR-508",
            f"RANK={os.environ.get('RANK')}, but {', '.join(missing)} missing: torchrun, which sets all, "
            "did not start this process",
            hint=f"Start it with: {LAUNCH['NCCL']}",
        )


def _missing() -> list[str]:
    """Variables of torchrun that are not set, or to no number where one is due."""
    given = {name: os.environ.get(name, "") for name in _TORCHRUN}
    return [
        name for name in _TORCHRUN if not (given[name].isdigit() or (name == "MASTER_ADDR" and given[name]))
    ]


def _first(names: Sequence[str], default: int) -> int:
    """The first of the variables that is a number."""
    return next((int(os.environ[n]) for n in names if os.environ.get(n, "").isdigit()), default)


def require_launcher(backend: str) -> None:
    """Refuse to wait for ranks that nobody started.

    Raises:
        HostError: GMR-508.
    """
    if is_launched(backend) or _rehearsing:
        return
    other = next((starter for name, starter in _STARTER.items() if is_launched(name)), None)
    problem = f"{other} started this process" if other else "this process is alone: no launcher started it"
    raise HostError(
        "GMR-508", f"backend={backend!r}, but {problem}", hint=f"Start it with: {LAUNCH[backend]}"
    )


def refuse_copies(backend: object, path: str) -> None:
    """Refuse a run of one process where a launcher started several: each would train all of it.

    Args:
        backend: of the YAML file at `path`.

    Raises:
        HostError: GMR-508.
    """
    for other, starter in _STARTER.items():
        if is_launched(other) and size(other) > 1 and not _rehearsing:
            raise HostError(
                "GMR-508",
                f"backend={backend!r}, but {starter} started {size(other)} processes: "
                "each of them would train the whole run",
                where=path,
                hint=f'Write `backend: "{other}"` in comm_args, or start one process without {starter}.',
            )


@contextmanager
def rehearsal() -> Iterator[None]:
    """While active, one process may stand for a job that is only planned."""
    _rehearsing.append(True)
    try:
        yield
    finally:
        _rehearsing.pop()


def check(backend: str, settings: Mapping[Any, Any], options: Mapping[Any, Any], path: str) -> None:
    """Refuse what FedML, or the ranks, would stumble over when they have joined a job.

    Args:
        settings: of the YAML file at `path`.
        options: its `fedgmr_args`.

    Raises:
        ConfigError: GMR-106, GMR-107. HostError: GMR-508, GMR-509.
    """
    require_launcher(backend)
    if not _rehearsing:
        _ours.append(backend)
        must_finish(backend)
    check_workers(backend, options)
    if backend != "MPI":
        return
    wanted = ["gpu_mapping_key"] + ["gpu_mapping_file"] * bool(settings.get("using_gpu"))
    missing = [name for name in wanted if name not in settings]
    if missing:
        raise ConfigError(
            "GMR-107",
            f"{', '.join(missing)} missing: FedML's MPI simulator reads it, on the CPU too",
            where=path,
            hint="Add it to device_args, `gpu_mapping_key: null` where there is no GPU.",
        )
    try:
        importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise HostError("GMR-509", f"import mpi4py.MPI failed: {error}", where=path) from error


def check_workers(backend: str, options: Mapping[str, object]) -> None:
    """Refuse processes of `workers`, or clients trained together, beside the ranks.

    Args:
        options: `fedgmr_args`, or those of them that are given.

    Raises:
        ConfigError: GMR-106.
    """
    for key in ("workers", "batch_clients"):
        count = options.get(key)
        if isinstance(count, int) and count > 1:
            raise ConfigError(
                "GMR-106",
                f"{key}={count}: with backend={backend!r} the ranks train, one client at a time each",
                where=f"fedgmr_args.{key}",
            )


def again(backend: str, size: int) -> str:
    """The command that continues a run of `size` ranks, without the run's directory."""
    here = next((int(os.environ[n]) for n in _HERE if os.environ.get(n, "").isdigit()), size)
    if here != size:
        return f"(with this job's launcher and its options) {sys.executable} -m fedgmr_plugin resume"
    launcher = f"mpirun -np {size} python" if backend == "MPI" else f"torchrun --nproc_per_node={size}"
    return f"{launcher} -m fedgmr_plugin resume"


def after_rank_0() -> None:
    """Let rank 0 speak first: what ends all ranks is then said once."""
    if rank() > 0:
        time.sleep(_COURTESY)


def is_ours() -> bool:
    """Whether this process is to be a rank of a run of fedgmr, so that what ends it must end the others."""
    return bool(_ours)


def must_finish(backend: str) -> None:
    """From now on, a process that ends without `finished` takes its job with it: the others would wait."""
    if not _unfinished:
        atexit.register(_at_exit)
        _unfinished.append(backend)


def finished(silent: Sequence[int] | None = None, waiting: Sequence[threading.Thread] = ()) -> None:
    """The run that `must_finish` announced is over.

    Args:
        silent: where some ranks do not answer, the ids of those of their processes that are of this machine.
            They are ended when this process ends; under MPI the others are too.
        waiting: threads of ours that wait for these ranks.
    """
    _unfinished.clear()
    if silent is None:
        atexit.unregister(_at_exit)
    else:
        _left.append((silent, waiting))


def leave_behind(name: str) -> None:
    """Note that a rank has not come to the end of a run: this job can have no other one."""
    _absent.append(name)


def require_everybody() -> None:
    """Refuse another run of a job that has left a rank behind.

    Raises:
        HostError: GMR-510.
    """
    if _absent:
        raise HostError(
            "GMR-510",
            f"{', '.join(_absent)} did not come to the end of the run before",
            hint="Start another job for this run.",
        )


def give_up(status: int) -> NoReturn:
    """End this rank, whose job ends for a reason that another one says."""
    _status.append(status)
    sys.exit(status)


def leave() -> NoReturn:
    """End this process at once, whatever its other threads are at, as one that has done its part.

    Under MPI that takes until the other ranks have come to their end.
    """
    mpi = _mpi_in_use()
    if mpi is not None:
        mpi.Finalize()
    _flush()
    os._exit(0)


def _at_exit() -> None:
    if _left:
        abandon(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's answer to what follows
        silent, waiting = _left[0]
        for process in silent:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for thread in waiting:  # one that torch wakes later, in an interpreter that is gone, would abort it
            thread.join(_COURTESY)
    elif _unfinished:
        if not _status and not hasattr(sys, "last_value"):  # nothing else was said
            click.echo(f"rank {rank()} ends before its run has ended, and the job with it", err=True)
        status = _status[0] if _status else 1
        abandon(status)
        if _unfinished[0] == "NCCL" and not _missing() and size("NCCL") > 1:
            _flush()
            os._exit(status)  # torchrun waits for ever where one rank's status is 0 and another waits for it


def abandon(status: int) -> None:
    """End all ranks of an MPI job, this one included; torchrun does so by itself after a status other than 0.

    Without MPI, or where this rank is the only one, return.
    """
    _status.append(status)
    mpi = _mpi_in_use()
    if mpi is None or mpi.COMM_WORLD.Get_size() == 1:
        return
    _flush()
    mpi.COMM_WORLD.Abort(status)


def _mpi_in_use() -> Any:
    """mpi4py's module where MPI is in use; else None."""
    mpi = sys.modules.get("mpi4py.MPI")
    return None if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() else mpi


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
