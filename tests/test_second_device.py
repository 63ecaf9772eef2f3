"""Runs on another device than the CPU: nothing of one device meets what is on the other.

The device is one that torch is taught in a process of its own (benchmarks/elsewhere.py). What it computes is
what the CPU computes, so the models must be equal, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TIME = {"trigger": "time"}
PRIVACY = {
    "mechanism_type": "gaussian",
    "epsilon": 0.5,
    "delta": 1e-5,
    "sensitivity": 1e-3,
    "clipping_norm": None,
    "clip_threshold": 1.0,
}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "convolutions": {"model": "convolutions", "options": TIME},
    "large layers": {"model": "large", "options": {**TIME, "probe": True}},
    "adam": {"keys": {"client_optimizer": "adam"}},
    "clipped": {
        "options": {"gradient_clip": 0.5, "client_momentum": 0.5, "proximal": 0.1},
    },
    "buffer": {
        "options": {**TIME, "update_scope": "buffer", "update_form": "replacement"},
    },
    "global average": {"options": {**TIME, "aggregation": "global_average"}},
    "plain average": {
        "options": {**TIME, "aggregation": "plain_average", "update_form": "replacement"},
    },
    "decoupled": {"options": {**TIME, "upload": "decoupled", "download": "decoupled"}},
    "narrow values": {"options": {**TIME, "payload_dtype": "bfloat16"}},
    "score of change": {"options": {"score": "weight_change", "layer_floor": 0.05}},
    "random score": {"options": {"score": "random"}},
    "score per cost": {
        "options": {"score": "per_cost", "payload_rule": "encoded", "model_megabytes": None},
    },
    "gradient trigger": {"options": {"trigger": "gradient", "probe": True}},
    "label masks": {"options": {**TIME, "label_masks": True}},
    "clients together": {"options": {**TIME, "batch_clients": 4}},
    "a trainer of one's own": {"own_trainer": True},
    "central privacy": {
        "keys": {**PRIVACY, "enable_dp": True, "dp_solution_type": "cdp"},
    },
    "a defence": {
        "model": "convolutions",
        "options": {"schedule": "sync", "min_updates": 3},
        "keys": {"enable_defense": True, "defense_type": "norm_diff_clipping", "norm_bound": 0.5},
    },
    "another defence": {
        "options": {"schedule": "sync", "min_updates": 4},
        "keys": {"enable_defense": True, "defense_type": "trimmed_mean", "beta": 0.2},
    },
    "killed and resumed": {
        "model": "convolutions",
        "options": {**TIME, "checkpoint_seconds": 0.0},
        "killed_after": 7,
    },
    **{
        method: {"options": {"method": method}}
        for method in ("fedbuff", "heterofl+gmr", "fjord+gmr", "fedrolex+gmr", "fiarse+gmr")
    },
    "live": {"run": "live"},
    "live, buffer": {"run": "live", "options": {"update_scope": "buffer", "update_form": "replacement"}},
    "live, model files": {"run": "live", "options": {"device_submodel": "masked"}},
    "live, smaller model files": {"run": "live", "options": {"device_submodel": "width", "score": "width"}},
    "live, restored": {"run": "live", "options": {**TIME, "interval": 1, "payload_dtype": "bfloat16"}},
}
#: Rounding differs where the CPU sums in blocks and other devices do not.
ROUNDED = {"large layers": 1e-6}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, dict[str, Any]]:
    """What each case came to, by one process."""
    folder = tmp_path_factory.mktemp("elsewhere")
    job = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "second_device.py"), str(folder)],
        input=json.dumps({**CASES, "mixed": {"run": "mixed"}}),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert job.returncode == 0, job.stderr[-3000:]
    told: dict[str, dict[str, Any]] = json.loads((folder / "told.json").read_text())
    return told


@pytest.mark.parametrize("case", CASES)
def test_the_model_stays_on_its_device_and_is_the_one_of_the_cpu(
    outcomes: dict[str, dict[str, Any]], case: str
) -> None:
    found = outcomes[case]
    assert "error" not in found, found["error"]
    assert found["place"] == ["elsewhere:0"]
    if CASES[case].get("run") != "live":  # on a real clock, who comes first may differ
        assert found["distance"] <= ROUNDED.get(case, 0.0)


def test_merges_of_several_rankings_are_among_them(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes["convolutions"]["several_rankings"] > 0 and outcomes["buffer"]["several_rankings"] > 0


def test_what_a_gpu_is_told_does_not_grow_with_the_model(outcomes: dict[str, dict[str, Any]]) -> None:
    small, *larger = outcomes["counts"].values()
    assert all(counts == small for counts in larger)


def test_a_trainer_of_ones_own_never_waits_between_steps(outcomes: dict[str, Any]) -> None:
    assert outcomes["waits of steps"] == 0


def test_clients_together_are_fewer_launches_and_waits(outcomes: dict[str, dict[str, Any]]) -> None:
    for counts in outcomes["counts"].values():
        (launches, waits), (turn, turn_waits) = counts["together"], counts["in turn"]
        assert 3 * launches < turn and 3 * waits < turn_waits


def test_what_mixes_devices_fails(outcomes: dict[str, dict[str, Any]]) -> None:
    assert "aten.mul_.Tensor: all tensors must be on one device" in outcomes["mixed"]["error"]
