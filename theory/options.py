"""The plugin's options and the host's, with what they can be: the door for headers of ``method: fedgmr``.

Kept by hand beside ``docs/configuration.md``, because `theory` imports nothing of the plugin; a test
compares the two. Options that the checks do not read may be missing, and so may those in `LATER`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from theory.rules import (
    ABOVE_ZERO,
    COUNT,
    DENSITY,
    FLAG,
    FRACTION,
    INT,
    POSITIVE,
    SHARE,
    SIZE,
    STEPS,
    TEXT,
    Rule,
    at_least,
    list_of,
    or_null,
    word,
)

_DENSITIES = list_of(DENSITY.test, "densities in (0, 1]")
_LADDER = list_of(DENSITY.test, "at least one density in (0, 1]", least=1)

_SUBMODEL = ("heterofl", "fjord", "fedrolex", "fiarse")

#: ``config``: option -> what it can be.
OPTIONS: dict[str, Rule] = {
    "method": word(
        "fedgmr", "fedgmr+buffer", "fedavg", "fedprox", "fedasync", "fedbuff",
        *(f"{name}{form}" for name in _SUBMODEL for form in ("", "+aux", "+gmr")),
    ),
    "heterogeneity": word("high", "medium", "low", "none"),
    "densities": or_null(_DENSITIES),
    "density_ladder": _LADDER,
    "density_step": word("ladder", "fixed", "proportional"),
    "score": word("magnitude", "weight_change", "per_cost", "random", "width", "rolling_width"),
    "mask_interval": or_null(POSITIVE),
    "dense_layers": list_of(TEXT.test, "strings"),
    "trigger": word("plateau", "time", "mixed", "gradient", "none"),
    "trigger_metric": word("accuracy", "loss"),
    "time_fractions": list_of(SHARE.test, "numbers in [0, 1]"),
    "time_floors": _DENSITIES,
    "validation_fraction": FRACTION,
    "upload": word("full", "decoupled"),
    "download": word("full", "decoupled"),
    "schedule": word("async", "sync", "buffered"),
    "aggregation": word("mask_aware", "global_average", "plain_average"),
    "update_form": word("delta", "replacement"),
    "update_scope": word("arrivals", "buffer"),
    "staleness": word("constant", "polynomial", "hinge"),
    "evaluate": word("coverage_scaled", "global", "validation"),
    "local_steps": STEPS,
    "loss": word("cross_entropy", "bce"),
    "local_objective": word("plain", "ordered_dropout", "straight_through"),
    "staleness_exponent": Rule(lambda x: SIZE.test(x) and x <= 10, "a number in [0, 10]"),
    "workers": Rule(lambda x: POSITIVE.test(x) and x <= 256, "an integer from 1 to 256"),
    "payload_rule": word("density", "support", "encoded"),
    "payload_dtype": word("model", "bfloat16", "float16"),
    "compute_slowdown": or_null(list_of(ABOVE_ZERO.test, "numbers above 0")),
    "checkpoint_seconds": or_null(SIZE),
    "staleness_limit": or_null(COUNT),
    "norm_bound": or_null(ABOVE_ZERO),
    "trim": Rule(lambda x: SIZE.test(x) and x < 0.5, "a number in [0, 0.5)"),
    "window_limit": or_null(ABOVE_ZERO),
    "evaluation_seconds": or_null(ABOVE_ZERO),
    "device_submodel": word("wire", "width", "masked"),
    "device_authentication": word("hmac", "off"),
    "probe_interval": or_null(POSITIVE),
    **dict.fromkeys(("density_min", "density_increment"), DENSITY),
    **dict.fromkeys(("layer_floor", "client_momentum"), SHARE),
    **dict.fromkeys(
        ("time_budget", "gradient_clip", "model_megabytes", "lost_after", "server_patience"),
        or_null(ABOVE_ZERO),
    ),
    **dict.fromkeys(
        ("server_step", "hinge_slope", "client_download", "client_upload", "server_upload",
         "server_download", "answer_deadline", "heartbeat_seconds"), ABOVE_ZERO,
    ),
    **dict.fromkeys(
        ("plateau_delta", "plateau_after", "hinge_delay", "client_jitter", "server_jitter",
         "compute_seconds", "compute_density_exponent", "window_slack", "aggregation_seconds",
         "retry_seconds", "proximal"), SIZE,
    ),
    **dict.fromkeys(
        ("interval", "patience", "top_k", "min_updates", "jitter_draws", "probe_samples", "clients_at_start",
         "batch_clients"),
        POSITIVE,
    ),
    **dict.fromkeys(("warmup_windows", "cpu_threads"), COUNT),
    **dict.fromkeys(
        ("dense_start", "prune_biases", "mixing", "shuffle", "incremental_splitting", "probe", "progress",
         "measured_densities", "staleness_normalised", "label_masks"),
        FLAG,
    ),
    **dict.fromkeys(("bandwidth_traces", "trace_family", "run_name", "device_keys"), or_null(TEXT)),
    "output_dir": TEXT,
}  # fmt: skip

#: Options that the plugin's first logs do not have, and what was so without them.
LATER: dict[str, Any] = {
    "method": "fedgmr",
    "mask_interval": None,
    "local_objective": "plain",
    "proximal": 0.0,
    "staleness_normalised": True,
    "label_masks": False,
    "upload": "full",
    "download": "full",
    "top_k": 1,
    "evaluation_seconds": None,
    "payload_dtype": "model",
    "plateau_after": 0.0,
    "workers": 1,
    "batch_clients": 1,
    "staleness_limit": None,
    "norm_bound": None,
    "trim": 0.0,
    "answer_deadline": 600.0,
    "lost_after": None,
    "server_patience": None,
    "window_limit": None,
    "retry_seconds": 30.0,
    "clients_at_start": 1,
    "heartbeat_seconds": 15.0,
    "measured_densities": False,
    "device_submodel": "wire",
    "device_authentication": "hmac",
    "device_keys": None,
}

#: ``fedml``: the host's keys that a run always uses -> what they can be.
HOST: dict[str, Rule] = {
    "random_seed": INT,
    "comm_round": at_least(1),
    "client_num_in_total": POSITIVE,
    "client_num_per_round": POSITIVE,
    "epochs": POSITIVE,
    "batch_size": POSITIVE,
    "client_optimizer": word("sgd", "adam"),
    "learning_rate": ABOVE_ZERO,
    "weight_decay": SIZE,
    "frequency_of_the_test": POSITIVE,
}


def contradiction(config: Mapping[str, Any]) -> str:
    """Two options that cannot stand together, in words; '' if there are none. All that it reads are there."""
    config = {**LATER, **config}
    ladder, fractions, floors = (config[k] for k in ("density_ladder", "time_fractions", "time_floors"))
    if ladder[-1] != 1 or any(b <= a for a, b in pairwise(ladder)):
        return "config.density_ladder does not increase to 1"
    if len(fractions) != len(floors):
        return f"config.time_floors has {len(floors)} entries, but time_fractions {len(fractions)}"
    if any(b <= a for a, b in pairwise(fractions)) or any(b < a for a, b in pairwise(floors)):
        return "config.time_fractions or time_floors do not increase"
    split = config["validation_fraction"] > 0
    if not split and (config["trigger"] in ("plateau", "mixed") or config["evaluate"] == "validation"):
        return "config.validation_fraction=0, but trigger or evaluate need a validation split"
    if config["aggregation"] == "plain_average" and config["update_form"] == "delta":
        return "config.aggregation=plain_average, but update_form=delta"
    if config["probe"] and config["payload_dtype"] != "model":
        return "config.probe=true, but values travel in another type"
    if config["payload_rule"] == "encoded" and config.get("model_megabytes") is not None:
        return "config.payload_rule=encoded, but model_megabytes is given"
    return ""
