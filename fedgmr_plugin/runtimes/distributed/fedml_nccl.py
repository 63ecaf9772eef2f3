"""What FedML's wheel lacks for `backend: "NCCL"`: the modules that its own code imports there.

`supply` adds them where they are absent, `withdraw` takes them away. With them `fedml.init` joins the process
group, and FedML's own ``FedAvg`` runs under that backend: as the case of our engine in which every density is
1 and every window waits for everybody, so each client starts from the global model.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from typing import Any

import torch.distributed as dist

from fedgmr_plugin.runtimes.distributed import job

_PACKAGE = "fedml.simulation.nccl"
_supplied: list[str] = []


def supply() -> None:
    """Add the modules where FedML does not have them; a second call changes nothing."""
    if _supplied or importlib.util.find_spec(_PACKAGE) is not None:
        return
    content: dict[str, dict[str, Any]] = {
        "": {},
        ".base_framework": {},
        ".base_framework.common": {"FedML_NCCL_Similulation_init": join},
        ".fedavg": {},
        ".fedavg.FedAvgAPI": {"FedML_FedAvg_NCCL": FedAvg},
    }
    for name, names in content.items():
        module = types.ModuleType(_PACKAGE + name, "Supplied by fedgmr.")
        module.__path__ = []
        vars(module).update(names)
        sys.modules[module.__name__] = module
        parent, _, last = module.__name__.rpartition(".")
        setattr(sys.modules[parent], last, module)
        _supplied.append(module.__name__)


def withdraw() -> None:
    """Take away what `supply` added."""
    for name in reversed(_supplied):
        parent, _, last = name.rpartition(".")
        delattr(sys.modules[parent], last)
        del sys.modules[name]
    _supplied.clear()


def join(args: Any) -> Any:
    """What ``fedml.init`` asks for: this process's place in the process group, in `args`.

    A process that no launcher started is rank 0 of 1 and joins nothing; constructing a simulator is refused
    there. Without ``gpu_mapping_key`` or ``gpu_mapping_file``, each rank takes the GPU of its local rank.

    Raises:
        HostError: GMR-508 where the variables that say so are not torchrun's.
    """
    if job.is_launched("NCCL") and not dist.is_initialized():
        job.require_torchrun()
        dist.init_process_group("gloo")
    joined = dist.is_initialized()
    args.process_id = args.rank = dist.get_rank() if joined else 0
    args.worker_num = dist.get_world_size() if joined else 1
    args.local_rank = job.local_rank()
    args.role = "client" if args.rank else "server"
    args.comm = None
    for name in ("gpu_mapping_key", "gpu_mapping_file"):
        if not hasattr(args, name):
            setattr(args, name, None)
    return args


class FedAvg:
    """FedML's ``FedAvg`` over the ranks of the process group; `train` carries it out.

    Arguments are those with which FedML constructs it. Rounds, clients a round, epochs and batch size are
    FedML's; so is the trainer, unless one is given. Which clients a round has, and in which order their
    samples come, is drawn by our seed tree. Of `fedgmr_args` those count that say where the run is written.
    """

    def __init__(
        self,
        args: Any,
        process_id: int,
        worker_number: int,
        comm: Any,
        device: Any,
        dataset: Any,
        model: Any,
        model_trainer: Any = None,
        **_: Any,
    ) -> None:
        from fedml.ml.trainer.trainer_creator import create_model_trainer

        from fedgmr_plugin.runtimes.distributed import ranks
        from fedgmr_plugin.runtimes.settings import options

        given = copy.copy(args)
        config = options(args)
        given.fedgmr_args = {
            **{name: getattr(config, name) for name in job.RECORDING},
            "heterogeneity": "none",
            "schedule": "sync",
            "trigger": "none",
            "validation_fraction": 0,
            "staleness": "constant",
            "local_steps": "epochs",
            "update_form": "replacement",
        }
        trainer = model_trainer or create_model_trainer(model, given)
        self._part = ranks.build("NCCL", given, device, dataset, model, trainer)

    def train(self) -> None:
        """This rank's part of the run."""
        self._part.train()
