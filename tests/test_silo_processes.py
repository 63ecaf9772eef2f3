"""FedML's cross-silo runtime for real, by the files and commands of docs/silos.md: over MQTT and S3, and over
gRPC, with FedML's own clients and ours. Every process has a folder of its own, as if it were a machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedgmr_plugin.protocol.runlog import read_run
from fedgmr_plugin.runtimes.local.ports import free_port
from fedgmr_plugin.runtimes.local.processes import Supervisor
from fedgmr_plugin.runtimes.local.stack import Stack
from theory.check import check_runs
from theory.verdict import Verdict

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "silos.md").read_text(encoding="utf-8")
FILES = REPOSITORY / "examples" / "silos"
HAS_BROKER = shutil.which("mosquitto") is not None or Path("/usr/sbin/mosquitto").exists()
WINDOWS = 6


def shown(language: str) -> list[str]:
    """Contents of the page's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


def commands() -> list[list[str]]:
    """The page's commands, without their comments."""
    lines = re.findall(r"^\$ (.*)$", "".join(shown("console")), re.M)
    return [re.sub(r"\s+#.*", "", line).split() for line in lines]


def test_the_page_has_a_command_for_keys_for_the_server_and_for_each_silo() -> None:
    keys, *started = commands()
    assert keys == ["fedgmr", "keys", "1", "2", "--each"]
    assert [command[:3] for command in started] == [["python", "main.py", "--cf"]] * 3
    assert [command[-4:] for command in started] == [
        ["--rank", "0", "--role", "server"],
        *(["--rank", n, "--role", "client"] for n in "12"),
    ]


def test_the_page_shows_every_file() -> None:
    named = re.findall(r"^```\{literalinclude\} \.\./examples/silos/(\S+)$", PAGE, re.M)
    assert sorted(named) == sorted(path.name for path in FILES.iterdir() if path.is_file())


@pytest.mark.parametrize("transport", ["mqtt", "grpc"])
def test_server_and_silos_differ_in_what_is_theirs(transport: str) -> None:
    server, silo = (
        yaml.safe_load((FILES / f"{side}_{transport}.yaml").read_text(encoding="utf-8"))
        for side in ("server", "silo")
    )
    own = {"fedgmr_args", "comm_args", "train_args"}
    assert {name: server[name] for name in server if name not in own} == {
        name: silo[name] for name in silo if name not in own
    }
    assert {**server["train_args"], "client_id_list": "[1]"} == silo["train_args"]
    assert server["comm_args"].keys() == silo["comm_args"].keys()


class Silos:
    """The processes of a run between silos.

    Args:
        transport: mqtt or grpc.
        connect: writes into a process's `comm_args` where broker and store are on this machine.
        silos: number of them.
        is_masked: whether they are FedML's own clients.
        windows: after which the run ends.
        options: of the server, besides the page's.
    """

    def __init__(
        self,
        folder: Path,
        processes: Supervisor,
        transport: str,
        connect: Callable[[dict[str, Any]], None] = lambda comm_args: None,
        silos: int = 2,
        *,
        is_masked: bool = False,
        windows: int = WINDOWS,
        **options: Any,
    ) -> None:
        self.windows, self.options = windows, options
        self.folder, self.processes, self.transport, self.silos = folder, processes, transport, silos
        self.env = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
        }
        rows = (FILES / "grpc.csv").read_text(encoding="utf-8")
        rows += "".join(f"{n},{n},silo{n}.example.org,889{n}\n" for n in range(3, silos + 1))
        rows = re.sub(r"[\w.]+\.example\.org,889\d", lambda _: f"127.0.0.1,{free_port()}", rows)
        if not is_masked:
            keys = [*commands()[0][1:-1], *map(str, range(3, silos + 1)), "--each"]
            self._done([sys.executable, "-m", "fedgmr_plugin", *keys])
        for rank in range(silos + 1):
            place = self.place(rank)
            place.mkdir()
            shutil.copy(FILES / "main.py", place)
            (place / "grpc.csv").write_text(rows, encoding="utf-8")
            name = self._file(rank)
            settings = yaml.safe_load((FILES / name).read_text(encoding="utf-8"))
            connect(settings["comm_args"])
            self._adapt(settings, rank, is_masked)
            (place / name).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
            if not is_masked:
                key = "keys.json" if rank == 0 else f"key_{rank}.json"
                shutil.copy(folder / key, place)

    def _adapt(self, settings: dict[str, Any], rank: int, is_masked: bool) -> None:
        """What the page says differs from the files, and what makes a test short."""
        train = settings["train_args"]
        train["comm_round"] = self.windows
        if self.silos > 2:
            train |= dict.fromkeys(("client_num_in_total", "client_num_per_round", "worker_num"), self.silos)
        if rank > 0:
            train["client_id_list"] = f"[{rank}]"
            settings["fedgmr_args"] |= {"device_keys": f"key_{rank}.json", "heartbeat_seconds": 2.0}
        else:
            train["client_id_list"] = json.dumps(list(range(1, self.silos + 1)))
            settings["fedgmr_args"] |= {"window_slack": 0.1, "retry_seconds": 2.0, "progress": False}
            settings["fedgmr_args"] |= self.options
        if is_masked:
            of_server, of_silo = map(yaml.safe_load, shown("yaml"))
            for section, options in (of_silo if rank else of_server).items():
                settings[section] |= options
            del settings["fedgmr_args"]["device_keys"]
            if rank:
                del settings["fedgmr_args"]

    def place(self, rank: int) -> Path:
        return self.folder / f"machine_{rank}"

    def _file(self, rank: int) -> str:
        """The page's commands name the files of one transport; the other's have the same names otherwise."""
        command = commands()[1 + min(rank, 2)]
        return command[3].replace("_mqtt", f"_{self.transport}")

    def _done(self, command: list[str]) -> None:
        subprocess.run(command, cwd=self.folder, env=self.env, check=True, capture_output=True)

    def start(self, rank: int) -> None:
        _, script, cf, _, *rest = commands()[1 + min(rank, 2)]
        rest[1] = str(rank)
        command = [sys.executable, script, cf, self._file(rank), *rest]
        self.processes.start(self.name(rank), command, cwd=self.place(rank), env=self.env)

    def name(self, rank: int) -> str:
        return f"client{rank}" if rank else "server0"

    def wait(self, condition: Callable[[], Any], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def over(self, rank: int, seconds: float = 120.0) -> None:
        self.wait(lambda: self.processes.poll(self.name(rank)) is not None, seconds)
        assert self.processes.poll(self.name(rank)) == 0, self.logs()

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*[0-9].log"))
        )

    @property
    def run(self) -> Path:
        return self.place(0) / "fedgmr_runs" / "silos"

    def status(self) -> list[dict[str, Any]]:
        """What the server shows of each silo."""
        try:
            found: list[dict[str, Any]] = json.loads((self.run / "devices.json").read_text())["devices"]
        except (OSError, ValueError, KeyError):
            return []
        return found

    def replay(self) -> str:
        command = [sys.executable, "-m", "fedgmr_plugin", "replay", str(self.run)]
        self.processes.start("replay", command, cwd=self.folder.parent, env=self.env)
        self.wait(lambda: self.processes.poll("replay") is not None)
        return self.processes.log("replay").read_text()

    def check(self, clients: set[int]) -> None:
        """The server came to its end, with what these clients sent and nothing else."""
        self.over(0)
        log = read_run(self.run)
        findings = check_runs([self.run]).runs[0].findings
        assert not [f.name for f in findings if f.verdict is Verdict.VIOLATED]
        assert log.end is not None and log.end["windows"] == self.windows and log.end["rejected"] == 0
        accuracy = [r["accuracy"] for r in log.records("evaluation")]
        assert accuracy[-1] > accuracy[0]
        assert {r["client"] for r in log.records("arrival")} == clients
        assert {r["client"] for r in log.records("dispatch")} == clients
        for client in clients:
            self.over(client + 1, 30)


Make = Callable[..., Silos]


@pytest.fixture
def make(request: pytest.FixtureRequest, tmp_path: Path, transport: str) -> Iterator[Make]:
    """Makes the processes of one transport."""
    if transport == "grpc":
        pytest.importorskip("grpc", reason="grpcio is not installed")
        with Supervisor(tmp_path) as processes:
            yield lambda **given: Silos(tmp_path, processes, "grpc", **given)
        return
    if not HAS_BROKER:
        pytest.skip("Mosquitto is not installed")
    pytest.importorskip("moto", reason="moto, the local S3 server, is not installed")
    with Stack(tmp_path) as stack:

        def connect(comm_args: dict[str, Any]) -> None:
            for name, settings in stack.connection().section()["comm_args"].items():
                comm_args[name].pop("MQTT_TLS_CA", None)  # a private broker has no certificate
                assert comm_args[name].keys() == settings.keys()
                comm_args[name] = settings

        yield lambda **given: Silos(tmp_path, stack.processes, "mqtt", connect, **given)


@pytest.mark.parametrize("transport", ["mqtt", "grpc"])
@pytest.mark.parametrize("submodel", ["wire", "masked"])
def test_silos_train_to_the_end(make: Make, transport: str, submodel: str) -> None:
    """`masked` are FedML's own clients, the others sign; one comes before the server where they do not die of
    it."""
    silos = make(is_masked=submodel == "masked")
    if transport == "mqtt":
        silos.start(1)
        time.sleep(4)
        silos.start(0)
    else:
        silos.start(0)
        silos.wait(silos.status)
        silos.start(1)
    silos.start(2)
    silos.check({0, 1})
    told = silos.replay()
    if submodel == "wire":
        assert told.splitlines()[-1].endswith("(the same)"), told  # and not as a line of FedML's log
    else:
        assert "GMR-608" in told and "FedML's own clients" in told, told


@pytest.mark.parametrize("transport", ["mqtt", "grpc"])
def test_a_silo_with_another_key_is_refused_and_nothing_of_it_is_applied(make: Make, transport: str) -> None:
    silos = make(silos=3)
    (silos.place(3) / "key_3.json").write_text(json.dumps({"3": "00" * 32}))
    silos.start(0)
    silos.wait(silos.status)
    silos.start(3)
    if transport == "mqtt":
        silos.wait(lambda: silos.status()[2]["refused"] > 0)
    else:  # refused before it reaches the server's desk
        silos.wait(lambda: "GMR-743" in silos.processes.log("server0").read_text())
    silos.start(1)
    silos.start(2)
    silos.check({0, 1})
    assert silos.status()[2]["state"] == "away" and silos.status()[2]["seen"] is None
    assert silos.processes.poll("client3") is None  # it was told nothing, not even the end
    assert silos.replay().splitlines()[-1].endswith("(the same)")


@pytest.mark.parametrize("transport", ["mqtt", "grpc"])
def test_a_server_that_was_killed_goes_on_to_the_same_bits(make: Make, transport: str) -> None:
    """Behind a checkpoint, while silos work: over gRPC what it had sent them is gone with its memory."""
    silos = make(windows=15, checkpoint_seconds=0)
    for rank in range(3):
        silos.start(rank)
    silos.wait(lambda: len(list(silos.run.glob("checkpoints/*.safetensors"))) > 0)
    silos.processes.kill("server0")
    command = [sys.executable, "-m", "fedgmr_plugin", "resume", str(silos.run)]
    silos.processes.start("server0", command, cwd=silos.folder, env=silos.env)
    silos.check({0, 1})
    assert silos.replay().splitlines()[-1].endswith("(the same)")


@pytest.mark.parametrize("transport", ["mqtt"])
def test_fedmls_own_silos_go_on_with_a_server_that_was_killed(make: Make, transport: str) -> None:
    """What they answered while it was away is lost; they are told again, long before any deadline. Over gRPC
    they end with the server."""
    silos = make(is_masked=True, windows=10, checkpoint_seconds=0)
    for rank in range(3):
        silos.start(rank)
    silos.wait(lambda: len(windows_of(silos.run)) >= 3)
    silos.processes.kill("server0")
    time.sleep(3)
    command = [sys.executable, "-m", "fedgmr_plugin", "resume", str(silos.run)]
    silos.processes.start("server0", command, cwd=silos.folder, env=silos.env)
    silos.check({0, 1})


@pytest.mark.parametrize("transport", ["mqtt", "grpc"])
def test_fedmls_own_silo_that_was_started_again_goes_on(make: Make, transport: str) -> None:
    """The run waits for it: what it had when it was killed, it is told again."""
    silos = make(is_masked=True, windows=10)
    silos.start(0)
    silos.wait(silos.status)
    for rank in (1, 2):
        silos.start(rank)
    for windows in (3, 5):
        silos.wait(lambda n=windows: len(windows_of(silos.run)) >= n)  # type: ignore[misc]
        silos.processes.kill("client1")
        silos.start(1)
    silos.check({0, 1})


def windows_of(run: Path) -> list[str]:
    """The `window` records of a run that goes on."""
    log = run / "run.jsonl"
    return re.findall(r'"type": ?"window"', log.read_text(encoding="utf-8")) if log.exists() else []
