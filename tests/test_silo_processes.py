"""FedML's cross-silo runtime for real: over MQTT and S3, and over gRPC, with FedML's own clients and ours."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedgmr_plugin.protocol.runlog import read_run
from fedgmr_plugin.runtimes.local.ports import free_port
from fedgmr_plugin.runtimes.local.processes import Supervisor
from fedgmr_plugin.runtimes.local.stack import Stack

HAS_BROKER = shutil.which("mosquitto") is not None or Path("/usr/sbin/mosquitto").exists()
MAIN = """
import fedgmr_plugin
fedgmr_plugin.register()
import fedml
from fedml import FedMLRunner
from fedgmr_plugin.datasets import DigitsCNN, digits

if __name__ == "__main__":
    args = fedml.init(check_env=False)
    device = fedml.device.get_device(args)
    dataset = digits(clients=args.client_num_in_total, seed=args.random_seed)
    FedMLRunner(args, device, dataset, DigitsCNN()).run()
"""


def config(silos: int, windows: int, connection: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {
        "common_args": {
            "training_type": "cross_silo",
            "scenario": "horizontal",
            "random_seed": 0,
            "using_mlops": False,
            "run_id": str(time.time_ns() // 1_000_000),
        },
        "data_args": {"dataset": "digits"},
        "model_args": {"model": "digits_cnn"},
        "train_args": {
            "federated_optimizer": "fedgmr",
            "client_id_list": json.dumps(list(range(1, silos + 1))),
            "client_num_in_total": silos,
            "client_num_per_round": silos,
            "worker_num": silos,
            "comm_round": windows,
            "epochs": 1,
            "batch_size": 20,
            "client_optimizer": "sgd",
            "learning_rate": 0.1,
            "weight_decay": 0.0,
        },
        "validation_args": {"frequency_of_the_test": 2},
        "device_args": {"using_gpu": False},
        "comm_args": connection,
        "tracking_args": {"enable_tracking": False, "enable_wandb": False},
        "fedgmr_args": {
            "interval": 3,
            "validation_fraction": 0.3,
            "window_slack": 0.1,
            "heartbeat_seconds": 2.0,
            "clients_at_start": silos,
            "min_updates": 2,
            "retry_seconds": 2.0,
            "run_name": "silos",
            "progress": False,
            "device_authentication": "off",
            **options,
        },
    }


class Silos:
    def __init__(self, folder: Path, processes: Supervisor, repository: Path) -> None:
        self.folder, self.processes = folder, processes
        self.env = {**os.environ, "PYTHONPATH": str(repository), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        (folder / "main.py").write_text(MAIN)

    def start(self, rank: int, settings: dict[str, Any]) -> None:
        own = json.loads(json.dumps(settings))
        own["train_args"]["client_id_list"] = (
            settings["train_args"]["client_id_list"] if rank == 0 else f"[{rank}]"
        )
        if rank and settings["fedgmr_args"]["device_submodel"] == "masked":
            own["train_args"]["federated_optimizer"] = "FedAvg"
            del own["fedgmr_args"]
        path = self.folder / f"config_{rank}.yaml"
        path.write_text(yaml.safe_dump(own, sort_keys=False))
        role = "client" if rank else "server"
        command = [sys.executable, "main.py", "--cf", path.name, "--rank", str(rank), "--role", role]
        self.processes.start(role + str(rank), command, cwd=self.folder, env=self.env)

    def wait(self, name: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while self.processes.poll(name) is None:
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*[0-9].log"))
        )

    def replay(self) -> str:
        run = self.folder / "fedgmr_runs" / "silos"
        command = [sys.executable, "-m", "fedgmr_plugin", "replay", str(run)]
        self.processes.start("replay", command, cwd=self.folder.parent, env=self.env)
        self.wait("replay")
        return self.processes.log("replay").read_text()

    def check(self, windows: int, silos: int) -> None:
        self.wait("server0")
        assert self.processes.poll("server0") == 0, self.logs()
        log = read_run(self.folder / "fedgmr_runs" / "silos")
        assert log.end is not None and log.end["windows"] == windows and log.end["rejected"] == 0
        accuracy = [r["accuracy"] for r in log.records("evaluation")]
        assert accuracy[-1] > accuracy[0]
        assert {r["client"] for r in log.records("arrival")} == set(range(silos))
        for rank in range(1, silos + 1):
            self.wait(f"client{rank}", 30)
            assert self.processes.poll(f"client{rank}") == 0, self.logs()


@pytest.fixture
def mqtt(tmp_path: Path, repository: Path) -> Iterator[tuple[Silos, dict[str, Any]]]:
    if not HAS_BROKER:
        pytest.skip("Mosquitto is not installed")
    pytest.importorskip("moto", reason="moto, the local S3 server, is not installed")
    with Stack(tmp_path) as stack:
        connection = {"backend": "MQTT_S3", **stack.connection().section()["comm_args"]}
        yield Silos(tmp_path, stack.processes, repository), connection


@pytest.fixture
def grpc(tmp_path: Path, repository: Path) -> Iterator[tuple[Silos, dict[str, Any]]]:
    pytest.importorskip("grpc", reason="grpcio is not installed")
    rows = ["eid,rank,grpc_server_ip,grpc_server_port"]
    rows += [f"{rank},{rank},127.0.0.1,{free_port()}" for rank in range(3)]
    (tmp_path / "grpc.csv").write_text("\n".join(rows) + "\n")
    with Supervisor(tmp_path) as processes:
        connection = {"backend": "GRPC", "grpc_ipconfig_path": str(tmp_path / "grpc.csv")}
        yield Silos(tmp_path, processes, repository), connection


@pytest.mark.parametrize("transport", ["mqtt", "grpc"])
@pytest.mark.parametrize("submodel", ["wire", "masked"])
def test_silos_train_to_the_end(request: pytest.FixtureRequest, transport: str, submodel: str) -> None:
    """`masked` are FedML's own clients; one comes before the server where they do not die of it."""
    silos, connection = request.getfixturevalue(transport)
    settings = config(2, 6, connection, device_submodel=submodel)
    if transport == "mqtt":
        silos.start(1, settings)
        time.sleep(4)
        silos.start(0, settings)
    else:
        silos.start(0, settings)
        time.sleep(8)
        silos.start(1, settings)
    silos.start(2, settings)
    silos.check(6, 2)
    told = silos.replay()
    if submodel == "wire":
        assert told.splitlines()[-1].endswith("(the same)"), told  # and not as a line of FedML's log
    else:
        assert "GMR-608" in told and "FedML's own clients" in told, told
