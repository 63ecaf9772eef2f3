"""From FedML's `args` to what a run needs: our options, and FedML's keys with FedML's meaning.

FedML flattens the sections of its YAML into attributes, so the `fedgmr_args` section is read from the file
again: only there can a misspelt key be seen.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from fedgmr_plugin.config import FedGMRConfig, parse
from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.runtimes import config_file

SECTION = "fedgmr_args"
#: Names near one of these can only have been meant to be the section's.
_MISSPELT = (SECTION, "gmr_args", "fedgmr", "gmr")


#: What turns on FedML's attacks, defences and differential privacy, which of them, and what
#: ``fedml.core.security`` and ``fedml.core.dp`` of FedML 0.9.6 read then.
SECURITY = {
    "enable_attack": "attack_type",
    "enable_defense": "defense_type",
    "enable_dp": "dp_solution_type",
}
_SECURITY_READS = (
    "C", "alpha", "attack_base", "attack_mode", "attack_prob", "attack_round_num",
    "attack_training_rounds", "batch_num", "beta", "bound_param", "bucket_size", "bucketing_batch_size",
    "byzantine_client_num", "clip_threshold", "clipping", "clipping_norm", "cosine_similarity_bound",
    "delta", "enable_rdp_accountant", "epsilon", "gaussian_mu", "gaussian_sigma", "krum_param_m",
    "lambda_param", "lazy_worker_num", "malicious_client_id", "max_grad_norm", "mechanism_type", "mode",
    "noise_multiplier", "norm_bound", "option_type", "original_class_list", "poison_end_round_id",
    "poison_start_round_id", "poisoned_training_round", "pretraining_round_num",
    "ratio_of_poisoned_client", "rdp_alpha", "robust_threshold", "scale_factor_S", "sensitivity",
    "sigma", "stddev", "target_class_list", "tau", "thresh", "to_keep_higher_scores",
    "train_data_num_in_total", "trim_param_b",
)  # fmt: skip


class FedMLKeys(NamedTuple):
    """FedML's own keys, checked.

    Attributes:
        seed: ``random_seed``, root of the seed tree.
        windows: ``comm_round``.
        clients: ``client_num_in_total``, N.
        in_flight: ``client_num_per_round``, clients that train at the same time.
        epochs: ``epochs``, used with ``local_steps: epochs``.
        batch_size: ``batch_size``.
        optimizer: ``client_optimizer``.
        learning_rate: ``learning_rate``, eta.
        weight_decay: ``weight_decay``, lambda: the optimizer adds lambda w to the gradient.
        test_interval: ``frequency_of_the_test``, windows.
        dataset: ``dataset``; FedML picks a trainer by it.
    """

    seed: int
    windows: int
    clients: int
    in_flight: int
    epochs: int
    batch_size: int
    optimizer: Literal["sgd", "adam"]
    learning_rate: float
    weight_decay: float
    test_interval: int
    dataset: str


def options(args: Any, source: str = "args") -> FedGMRConfig:
    """The `fedgmr_args` of a run: ``args.fedgmr_args`` if a program set it, else the YAML file's section.

    Args:
        args: FedML's arguments.
        source: where `args` come from, for messages.

    Raises:
        ConfigError: GMR-100 to GMR-106, GMR-108, GMR-109; GMR-101 also for a misspelt section.
    """
    given = getattr(args, SECTION, None)
    where = f"{source}: {SECTION}"
    path = getattr(args, "yaml_config_file", "")
    if given is None and path:
        given, where = _section(config_file.load(path), path), f"{path}: {SECTION}"
    config = given if isinstance(given, FedGMRConfig) else parse(given, where=where)
    clients = getattr(args, "client_num_in_total", None)
    if isinstance(clients, int):
        config.check_clients(clients, where=where)
    return config


def check_file(args: Any, source: str) -> None:
    """Refuse wrong values of the keys that a YAML file has, before FedML and the program act on them.

    Raises:
        ConfigError: as `options` and `fedml_keys` do, but none for a missing key.
    """
    options(args, source)
    given = vars(args)
    clients = {key: given[key] for key in ("client_num_in_total", "client_num_per_round") if key in given}
    either = next(iter(clients.values()), 1)
    stand_in = {"comm_round": 1, "batch_size": 1, "learning_rate": 1.0}
    both = {"client_num_in_total": either, "client_num_per_round": either}
    fedml_keys(SimpleNamespace(**{**stand_in, **both, **given}))


def _section(sections: config_file.Sections, path: str) -> Any:
    """The options' section; None without one.

    Raises:
        ConfigError: GMR-101 if another section can only have been meant to be it.
    """
    if SECTION not in sections:
        for name in sections:
            if difflib.get_close_matches(name.lower(), _MISSPELT, cutoff=0.85):
                raise ConfigError(
                    "GMR-101",
                    f"section {name!r} is not {SECTION}, so its options would be ignored",
                    where=f"{path}: {name}",
                    hint=f"Did you mean `{SECTION}`?",
                )
    return sections.get(SECTION)


def fedml_keys(args: Any) -> FedMLKeys:
    """FedML's keys, each checked.

    Raises:
        ConfigError: GMR-107 for missing keys (all of them at once), GMR-102 to GMR-104 for a wrong value.
    """
    path = getattr(args, "yaml_config_file", "") or "args"
    names = ("comm_round", "client_num_in_total", "client_num_per_round", "batch_size", "learning_rate")
    missing = [name for name in names if getattr(args, name, None) is None]
    if missing:
        hint = f"Add {'it' if len(missing) == 1 else 'them'} to the section `train_args`."
        raise ConfigError("GMR-107", f"{', '.join(missing)} missing", where=path, hint=hint)

    def whole(name: str, least: int, default: int | None = None) -> int:
        value = getattr(args, name, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError("GMR-102", f"{name}={value!r} is not a whole number", where=f"{path}: {name}")
        if value < least:
            raise ConfigError("GMR-104", f"{name}={value} is below {least}", where=f"{path}: {name}")
        return value

    def real(name: str, default: float | None, positive: bool) -> float:
        value = getattr(args, name, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            hint = "Write it with a dot, such as 1.0e-3." if isinstance(value, str) else ""
            raise ConfigError(
                "GMR-102", f"{name}={value!r} is not a number", where=f"{path}: {name}", hint=hint
            )
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            wanted = "greater than 0" if positive else "at least 0"
            raise ConfigError("GMR-104", f"{name}={value} is not {wanted}", where=f"{path}: {name}")
        return float(value)

    clients = whole("client_num_in_total", 1)
    in_flight = whole("client_num_per_round", 1)
    if in_flight > clients:
        raise ConfigError(
            "GMR-104",
            f"client_num_per_round={in_flight} is more than client_num_in_total={clients}",
            where=f"{path}: client_num_per_round",
        )
    optimizer = str(getattr(args, "client_optimizer", "sgd")).lower()
    if optimizer not in ("sgd", "adam"):
        raise ConfigError(
            "GMR-103",
            f"client_optimizer={optimizer!r} is not sgd or adam",
            where=f"{path}: client_optimizer",
        )
    return FedMLKeys(
        seed=whole("random_seed", 0, 0),
        windows=whole("comm_round", 1),
        clients=clients,
        in_flight=in_flight,
        epochs=whole("epochs", 1, 1),
        batch_size=whole("batch_size", 1),
        optimizer="adam" if optimizer == "adam" else "sgd",
        learning_rate=real("learning_rate", None, True),
        weight_decay=real("weight_decay", 0.0, False),
        test_interval=whole("frequency_of_the_test", 1, 1),
        dataset=str(getattr(args, "dataset", "")),
    )


def security(args: Any) -> dict[str, Any]:
    """FedML's keys of attacks, defences and differential privacy, where any is on; for the run log."""
    on = {switch: kind for switch, kind in SECURITY.items() if getattr(args, switch, False)}
    if not on:
        return {}
    simple = (bool, int, float, str, list, type(None))
    given = {key: getattr(args, key) for key in (*on.values(), *_SECURITY_READS) if hasattr(args, key)}
    return dict.fromkeys(on, True) | {key: v for key, v in given.items() if isinstance(v, simple)}


def as_mapping(keys: FedMLKeys) -> Mapping[str, Any]:
    """FedML's keys under FedML's names, for the run log."""
    return {
        "random_seed": keys.seed,
        "comm_round": keys.windows,
        "client_num_in_total": keys.clients,
        "client_num_per_round": keys.in_flight,
        "epochs": keys.epochs,
        "batch_size": keys.batch_size,
        "client_optimizer": keys.optimizer,
        "learning_rate": keys.learning_rate,
        "weight_decay": keys.weight_decay,
        "frequency_of_the_test": keys.test_interval,
        "dataset": keys.dataset,
    }
