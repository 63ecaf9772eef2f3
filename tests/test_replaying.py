"""What a replay between silos takes from the server's script, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedgmr_plugin.errors import DataError, RunLogError
from fedgmr_plugin.protocol import RunLogWriter
from fedgmr_plugin.runtimes import host

host.prepare()

from fedml import FedMLRunner  # noqa: E402

from fedgmr_plugin.runtimes.registration import unregister  # noqa: E402
from fedgmr_plugin.runtimes.replaying import Script, replay  # noqa: E402
from fedgmr_plugin.runtimes.silos.data import SiloSamples  # noqa: E402
from fedgmr_plugin.runtimes.silos.rebuilding import rebuild  # noqa: E402
from fedgmr_plugin.runtimes.trainer import FedMLTrainer  # noqa: E402

SCRIPT = """
import torch
from types import SimpleNamespace
from fedml import FedMLRunner

def data(seed):
    return [(torch.randn(20, 6), torch.zeros(20, dtype=torch.int64))]

if __name__ == "__main__":
    dataset = [0, 0, None, data(0), {}, {n: data(n) for n in range(SILOS)}, {}, 3]
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3))
    FedMLRunner(SimpleNamespace(), None, dataset, model, TRAINER).run()
    raise SystemExit("not reached")
"""


def settle(args: Any, submodel: str = "wire") -> None:
    keys = {"random_seed": 0, "client_num_in_total": 3, "client_num_per_round": 3, "comm_round": 2}
    keys |= {"batch_size": 4, "learning_rate": 0.1, "dataset": "none", "epochs": 1, "client_optimizer": "sgd"}
    keys |= {"weight_decay": 0.0, "frequency_of_the_test": 1, "client_id_list": [1, 2, 3]}
    keys["fedgmr_args"] = {"device_submodel": submodel, "device_authentication": "off"}
    for key, value in keys.items():
        setattr(args, key, value)


def script(folder: Path, text: str, submodel: str = "wire") -> Script:
    path = folder / "main.py"
    path.write_text(text)
    return Script(str(path), [], "", lambda args: settle(args, submodel))


@pytest.mark.parametrize("trainer", ["None", "object()"])
def test_the_script_is_run_until_it_has_given_everything(tmp_path: Path, trainer: str) -> None:
    before = FedMLRunner.__init__
    found = rebuild(script(tmp_path, SCRIPT.replace("SILOS", "3").replace("TRAINER", trainer)))
    assert FedMLRunner.__init__ is before
    assert found.setup.keys.clients == 3 and len(found.samples(2)) == 20
    assert found.model is not found.setup.model
    assert (found.trainer is None) if trainer == "None" else isinstance(found.trainer, FedMLTrainer)


@pytest.mark.parametrize(
    ("text", "submodel", "problem"),
    [
        ("print('hello')", "wire", "constructs no FedMLRunner"),
        (SCRIPT.replace("SILOS", "1").replace("TRAINER", "None"), "wire", "the data of 1 of 3 silos"),
        (SCRIPT.replace("SILOS", "3").replace("TRAINER", "None"), "masked", "FedML's own clients"),
    ],
)
def test_what_cannot_be_replayed_is_told(tmp_path: Path, text: str, submodel: str, problem: str) -> None:
    with pytest.raises(RunLogError, match=f"GMR-608.*{problem}"):
        rebuild(script(tmp_path, text, submodel))


def test_a_simulation_is_not_replayed(tmp_path: Path) -> None:
    header = {
        "type": "header", "schema": "1.0", "method": "fedgmr", "run_name": "x", "seed": 0, "config": {},
        "fedml": {}, "versions": {}, "clients": 1, "client_samples": [10], "densities": [1.0], "layout": {},
        "model_megabytes": 1.0, "eta": 0.1, "local_steps": 5, "windows": 1, "time_budget": None,
    }  # fmt: skip
    with RunLogWriter(tmp_path) as log:
        log.write(header)
    try:
        with pytest.raises(RunLogError, match="GMR-608 this is a simulation"):
            replay(tmp_path)
    finally:
        unregister()


def test_a_silo_may_have_its_own_data_only() -> None:
    own = [(torch.zeros(5, 6), torch.zeros(5, dtype=torch.int64))]
    assert len(SiloSamples({4: own})(7)) == 5
    two = SiloSamples({4: own, 2: [*own, *own]})
    assert (len(two(0)), len(two(1))) == (10, 5)
    with pytest.raises(DataError, match="GMR-302 client 2"):
        two(2)
