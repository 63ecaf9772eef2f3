"""A run from Python, without a YAML file: what the demonstration and the benchmarks start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from fedgmr_plugin.runtimes.registration import register

#: FedML's keys of a single-process run; `simulate` changes what a caller names.
KEYS: dict[str, Any] = {
    "training_type": "simulation",
    "backend": "sp",
    "federated_optimizer": "fedgmr",
    "dataset": "custom",
    "client_num_in_total": 10,
    "client_num_per_round": 10,
    "comm_round": 1_000_000,
    "epochs": 1,
    "batch_size": 20,
    "client_optimizer": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 0.0,
    "frequency_of_the_test": 10,
    "using_gpu": False,
    "enable_wandb": False,
    "using_mlops": False,
    "rank": 0,
    "run_id": "0",
}


def simulate(dataset: list[Any], model: nn.Module, options: dict[str, Any], seed: int, **keys: Any) -> None:
    """Run FedGMR through FedML's own single-process simulator.

    Args:
        dataset: FedML's 8-element list.
        model: the global model; holds the shipped model afterwards.
        options: `fedgmr_args`.
        seed: FedML's ``random_seed``.
        keys: FedML's keys that differ from `KEYS`.
    """
    register()
    import fedml

    args = SimpleNamespace(**{**KEYS, **keys, "random_seed": seed, "fedgmr_args": options})
    args = fedml.init(args, should_init_logs=False)
    fedml.FedMLRunner(args, fedml.device.get_device(args), dataset, model).run()
