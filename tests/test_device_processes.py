"""FedML's cross-device runtime for real: Mosquitto, an S3 server, and processes that are killed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedgmr_plugin.cli.local import write_project
from fedgmr_plugin.protocol.runlog import read_run
from fedgmr_plugin.runtimes.local.stack import Stack

pytest.importorskip("moto", reason="moto, the local S3 server, is not installed")
pytest.importorskip("MNN", reason="FedML's cross-device server needs MNN")
if shutil.which("mosquitto") is None and not Path("/usr/sbin/mosquitto").exists():
    pytest.skip("Mosquitto is not installed", allow_module_level=True)

PYTHON = [sys.executable, "-m", "fedgmr_plugin"]
FILES = ["main.py", "--cf", "fedml_config.yaml"]
#: What a slow device adds to the script, and what one that sends garbage does.
SLOW = """
import time
from fedgmr_plugin.engine.trainer import BuiltinTrainer
_train = BuiltinTrainer.train
def train(self, *given, **named):
    time.sleep(1.5)
    return _train(self, *given, **named)
BuiltinTrainer.train = train
"""
GARBAGE = """
import os
from fedgmr_plugin.runtimes.devices import device
_encode = device.encode
_turn = [0]
def encode(message, out=None):
    _turn[0] += 1
    if _turn[0] % 3 == 0:
        return memoryview(os.urandom(500))
    message.values.fill_(float("nan"))
    return _encode(message, out)
device.encode = encode
"""
#: A stack of layers, which has widths.
STACK = """from torch import nn
from fedgmr_plugin.datasets import digits
def make_model(args):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )
"""


class Local:
    """A local stack with a project, and the processes of a run."""

    def __init__(self, folder: Path, stack: Stack, repository: Path) -> None:
        self.folder, self.stack = folder, stack
        self.env = {
            **os.environ,
            "PYTHONPATH": str(repository),
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
        }

    @property
    def run(self) -> Path:
        return self.folder / "fedgmr_runs" / "local"

    def prepare(self, devices: int, windows: int, **options: Any) -> None:
        write_project(self.folder, devices, windows, self.stack.connection().section()["comm_args"])
        config = self.folder / "fedml_config.yaml"
        extra = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in options.items())
        config.write_text(config.read_text() + extra)

    def server(self, *command: str) -> None:
        self.stack.run("server", [*PYTHON, *(command or FILES)], cwd=self.folder, env=self.env)

    def device(self, n: int, extra: str = "") -> None:
        script = self.folder / f"main_{n}.py"
        script.write_text((self.folder / "main.py").read_text() + extra)
        command = [*PYTHON, "device", script.name, *FILES[1:], "--id", str(n)]
        self.stack.run(f"device-{n}", command, cwd=self.folder, env=self.env)

    def wait(self, condition: Callable[[], Any], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def window(self) -> int:
        try:
            return int(json.loads((self.run / "devices.json").read_text())["window"])
        except (OSError, ValueError, KeyError):
            return -1

    def ended(self) -> bool:
        return self.stack.processes.poll("server") is not None

    def objects(self) -> list[str]:
        """What is left in the store."""
        storage = self.stack.storage
        found = storage.client().list_objects_v2(Bucket=storage.bucket)
        return [item["Key"] for item in found.get("Contents", ())]

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-2500:]}"
            for path in sorted(self.folder.glob("*.log"))
            if path.name not in ("broker.log", "storage.log")
        )


@pytest.fixture
def local(tmp_path: Path, repository: Path) -> Iterator[Local]:
    with Stack(tmp_path) as stack:
        yield Local(tmp_path, stack, repository)


def replay(local: Local) -> str:
    local.stack.run("replay", [*PYTHON, "replay", str(local.run)], cwd=local.folder, env=local.env)
    local.wait(lambda: local.stack.processes.poll("replay") is not None)
    return local.stack.processes.log("replay").read_text()


def test_a_field_with_every_trouble_trains_to_the_end(local: Local) -> None:
    """One device is slow, one dies and comes back, one sends garbage, the server is killed, broker and store
    go away for a while; the log still replays to the same model in one process."""
    local.prepare(4, 100, answer_deadline=6.0, retry_seconds=2.0, checkpoint_seconds=2.0)
    local.server()
    local.device(1)
    local.device(2, SLOW)
    local.device(3)
    local.device(4, GARBAGE)
    local.wait(lambda: local.window() >= 4)
    local.stack.processes.kill("device-3")
    local.stack.processes.kill("server")
    local.wait(local.ended)
    local.stack.broker.restart()
    local.server("resume", str(local.run))
    local.wait(lambda: local.window() >= 8)
    local.device(3)
    local.stack.storage.pause()
    time.sleep(2)
    local.stack.storage.resume()
    local.wait(local.ended)
    assert local.stack.processes.poll("server") == 0, local.logs()
    log = read_run(local.run)
    assert log.end is not None and log.end["windows"] == 100
    assert local.objects() == []
    assert log.records("evaluation")[-1]["accuracy"] > 0.7
    rejected = {(r["client"], r["code"]) for r in log.records("rejected")}
    assert rejected and {client for client, _ in rejected} == {3}, rejected
    arrivals = {r["client"] for r in log.records("arrival")}
    assert arrivals == {0, 1, 2}
    dispatches = [r["dispatch"] for r in log.records("arrival")]
    assert len(dispatches) == len(set(dispatches))
    told = replay(local)
    assert "(the same)" in told, told
    for n in (1, 2, 3):
        local.wait(lambda n=n: local.stack.processes.poll(f"device-{n}") == 0, 20)  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["width", "masked"])
def test_fedmls_own_devices_over_a_real_broker(local: Local, kind: str) -> None:
    options = {"device_submodel": kind, "device_authentication": "off"}
    if kind == "width":
        options["score"] = "width"
    local.prepare(2, 30, **options)
    script = local.folder / "main.py"
    _, rest = script.read_text().split("def make_model(args):", 1)
    script.write_text(STACK + "def train_data" + rest.split("def train_data", 1)[1])
    local.device(1)
    local.device(2)
    local.server()
    local.wait(local.ended)
    assert local.stack.processes.poll("server") == 0, local.logs()
    assert not (local.run / "journal").exists()
    assert local.objects() == []
    log = read_run(local.run)
    sizes = {r["density"]: r["bytes_down"] for r in log.records("dispatch")}
    assert (len(set(sizes.values())) > 1) == (kind == "width")
    first, *_, last = log.records("evaluation")
    assert last["loss"] < first["loss"] and last["accuracy"] > max(first["accuracy"], 0.3)


def test_one_server_for_each_run_and_an_end_for_who_was_away(local: Local) -> None:
    """A second server is refused; one that goes on with a killed one's run is not. A device that was killed
    before the end learns of it when it is started again."""
    local.prepare(2, 50, answer_deadline=3.0, retry_seconds=1.0, checkpoint_seconds=1.0)
    local.server()
    local.device(1, SLOW)
    local.device(2, SLOW)
    local.wait(lambda: local.window() >= 2)
    config = (local.folder / "fedml_config.yaml").read_text()
    other = local.folder / "other.yaml"
    other.write_text(config.replace('run_name: "local"', 'run_name: "other"'))
    command = [*PYTHON, "main.py", "--cf", other.name]
    local.stack.run("other", command, cwd=local.folder, env=local.env)
    local.wait(lambda: local.stack.processes.poll("other") is not None)
    told = local.stack.processes.log("other").read_text()
    assert local.stack.processes.poll("other") != 0 and "GMR-517 run_id=" in told, told
    assert not (local.folder / "fedgmr_runs" / "other" / "run.jsonl").exists()
    local.stack.processes.kill("server")
    local.wait(local.ended)
    local.server("resume", str(local.run))
    before = local.window()
    local.wait(lambda: local.window() > before + 1)
    local.stack.processes.kill("device-2")
    local.wait(local.ended)
    assert local.stack.processes.poll("server") == 0, local.logs()
    local.device(2)
    for n in (1, 2):
        local.wait(lambda n=n: local.stack.processes.poll(f"device-{n}") == 0, 30)  # type: ignore[misc]
