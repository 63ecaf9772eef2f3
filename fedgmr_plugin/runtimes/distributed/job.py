"""This process among those of its job: which rank it is, and how the job ends when one fails.

Nothing here imports mpi4py or torch: it is asked before they are there, and when they never will be.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedgmr_plugin.errors import ConfigError, HostError

#: Variables in which launchers say the rank, by FedML's backend. Slurm's own are in scripts too that it did
#: not start as ranks.
_RANK = {
    "MPI": ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
    "NCCL": ("RANK",),
}
#: How the backends that need several processes are started.
LAUNCH = {
    "MPI": "mpirun -np 3 python -m fedgmr_plugin main.py --cf fedml_config.yaml",
    "NCCL": "torchrun --nproc_per_node=3 -m fedgmr_plugin main.py --cf fedml_config.yaml",
}
#: Variables in which launchers say how many ranks are on this machine.
_HERE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
#: Seconds that other ranks leave to rank 0 to say what all of them would say.
_COURTESY = 2.0

_unfinished: list[bool] = []
_rehearsing: list[bool] = []
_ours: list[str] = []


def rank() -> int:
    """Rank of this process as its launcher says; 0 without one."""
    names = [name for names in _RANK.values() for name in names]
    return next((int(os.environ[n]) for n in names if os.environ.get(n, "").isdigit()), 0)


def local_rank() -> int:
    """Rank of this process among those of its machine, as its launcher says; its rank where none does."""
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
    return next((int(os.environ[n]) for n in names if os.environ.get(n, "").isdigit()), rank())


def is_launched(backend: str) -> bool:
    """Whether a launcher for FedML's `backend` started this process."""
    return any(os.environ.get(name, "").isdigit() for name in _RANK[backend])


def require_launcher(backend: str) -> None:
    """Refuse to wait for ranks that nobody started.

    Raises:
        HostError: GMR-508.
    """
    if not is_launched(backend) and not _rehearsing:
        raise HostError(
            "GMR-508",
            f"backend={backend!r}, but this process is alone: no launcher started it",
            hint=f"Start it with: {LAUNCH[backend]}",
        )


@contextmanager
def rehearsal() -> Iterator[None]:
    """While active, one process may stand for a job that is only planned."""
    _rehearsing.append(True)
    try:
        yield
    finally:
        _rehearsing.pop()


def check(backend: str, settings: Mapping[Any, Any], path: str) -> None:
    """Refuse what FedML would stumble over when it joins a job.

    Args:
        settings: of the YAML file at `path`.

    Raises:
        ConfigError: GMR-107. HostError: GMR-508, GMR-509.
    """
    require_launcher(backend)
    if not _rehearsing:
        _ours.append(backend)
        must_finish()
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


def must_finish() -> None:
    """From now on, a process that ends without `finished` takes its job with it: the others would wait."""
    if not _unfinished:
        atexit.register(_at_exit)
        _unfinished.append(True)


def finished() -> None:
    """The run that `must_finish` announced is over, in all ranks."""
    _unfinished.clear()
    atexit.unregister(_at_exit)


def _at_exit() -> None:
    if _unfinished:
        abandon(1)


def abandon(status: int) -> None:
    """End all ranks of an MPI job, this one included; torchrun does so by itself.

    Without MPI, or where this rank is the only one, return.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.Get_size() == 1:
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    mpi.COMM_WORLD.Abort(status)
