"""`fedgmr local`, `fedgmr keys` and `fedgmr device` as commands."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from fedgmr_plugin.cli import main
from fedgmr_plugin.cli.local import refuse_foreign, table, watch, write_project
from fedgmr_plugin.config import FedGMRConfig, parse
from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.runtimes.devices.connection import MQTT, S3, connection, device_keys, services
from fedgmr_plugin.runtimes.devices.project import arguments, load_project
from fedgmr_plugin.runtimes.local.record import running
from fedgmr_plugin.runtimes.settings import fedml_keys, options

CONNECTION: dict[str, Any] = {
    "customized_training_mqtt_config": {"BROKER_HOST": "127.0.0.1", "BROKER_PORT": 1883, "MQTT_USER": ""},
    "customized_training_s3_config": {
        "CN_S3_AKI": "a",
        "CN_S3_SAK": "b",
        "BUCKET_NAME": "c",
        "CN_S3_ENDPOINT": "http://127.0.0.1:9",
    },
}


def test_keys_are_secret_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    runner = CliRunner()
    assert runner.invoke(main, ["keys", "3", "5", "--out", str(path)]).exit_code == 0
    content = json.loads(path.read_text())
    assert set(content) == {"3", "5"} and len(set(content.values())) == 2
    assert all(len(bytes.fromhex(key)) == 32 for key in content.values())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = runner.invoke(main, ["keys", "3", "--out", str(path)])
    assert again.exit_code == 1 and "cannot write" in again.output
    assert json.loads(path.read_text()) == content


def test_each_device_has_a_file_of_its_own_key(tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["keys", "3", "5", "--each", "--out", str(tmp_path / "all.json")])
    assert found.exit_code == 0 and "key_5.json, for device 5 alone" in found.output
    whole = json.loads((tmp_path / "all.json").read_text())
    assert {p.name for p in tmp_path.iterdir()} == {"all.json", "key_3.json", "key_5.json"}
    for device in ("3", "5"):
        own = tmp_path / f"key_{device}.json"
        assert json.loads(own.read_text()) == {device: whole[device]}
        assert stat.S_IMODE(own.stat().st_mode) == 0o600


def test_a_local_project_is_one_that_server_and_devices_accept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, 3, 7, CONNECTION)
    args = arguments("fedml_config.yaml")
    config, keys, here = options(args), fedml_keys(args), connection(args)
    assert (keys.clients, keys.windows, here.devices) == (3, 7, (1, 2, 3))
    assert services(args)[0].user is None
    assert set(device_keys(config, here.devices, "") or {}) == {1, 2, 3}
    project = load_project("main.py")
    assert len(project.train_data(args, 0)) and len(project.test_data(args))
    assert stat.S_IMODE((tmp_path / "fedml_config.yaml").stat().st_mode) == 0o600
    section = yaml.safe_load((tmp_path / "fedml_config.yaml").read_text())["fedgmr_args"]
    assert parse(section, where="here").run_name == "local"
    (tmp_path / "fedgmr_runs" / "local").mkdir(parents=True)
    write_project(tmp_path, 2, 7, CONNECTION)
    assert (tmp_path / "fedgmr_runs" / "local-001").is_dir() and connection(arguments("fedml_config.yaml"))


def told(section: str, **wrong: Any) -> Any:
    """What a configuration with other values of the broker, the store, or the run names."""
    changed = {**CONNECTION[section], **wrong} if section else {}
    args = SimpleNamespace(
        **{"client_id_list": "[1, 2]", **CONNECTION, **({section: changed} if section else wrong)}
    )
    connection(args)
    return services(args)


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ("", {"server_id": "abc"}),
        ("", {"client_id_list": [1.5, 2]}),
        ("", {"client_id_list": [True, 2]}),
        ("", {"client_id_list": [10**18]}),
        ("", {"client_id_list": [-1]}),
        ("", {"client_id_list": "[" * 100_000}),
        ("", {"run_id": "a/b"}),
        (MQTT, {"BROKER_PORT": 0}),
        (MQTT, {"BROKER_PORT": True}),
        (MQTT, {"BROKER_PORT": "x"}),
        (MQTT, {"MQTT_KEEPALIVE": "abc"}),
        (MQTT, {"MQTT_KEEPALIVE": 65_536}),
        (MQTT, {"BROKER_HOST": ""}),
        (MQTT, {"MQTT_TLS_CAFILE": "ca.crt"}),
        (MQTT, {"MQTT_TLS_KEY": "7.key"}),
        (S3, {"CN_S3_ENDPOINT": "localhost:9000"}),
        (S3, {"CN_S3_ENDPOINT": 5}),
        (S3, {"BUCKET_NAME": "my bucket"}),
        (S3, {"BUCKET_NAME": None}),
    ],
)
def test_what_is_wrong_with_a_connection_is_told(section: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as found:
        told(section, **wrong)
    assert found.value.code == "GMR-112" and next(iter(wrong)) in str(found.value)


def test_numbers_may_be_names_and_names_numbers() -> None:
    """The guide calls a broker's users by their devices' ids."""
    broker, _ = told(MQTT, MQTT_USER=7, MQTT_PWD=1234, BROKER_PORT="1883", MQTT_KEEPALIVE="30")
    assert (broker.user, broker.password, broker.port, broker.keepalive) == ("7", "1234", 1883, 30)
    assert told(S3, CN_S3_ENDPOINT="")[1].endpoint is None


def test_the_table_has_a_line_for_each_device() -> None:
    row = {"device": 3, "state": "training", "density": 0.05, "staleness": 2, "bytes_up": 2_500_000}
    rows = [
        {**row, "refused": 1, "seen": 4.2},
        {**row, "device": 4, "staleness": None, "refused": 0, "seen": None},
    ]
    status = {"window": 3, "windows": 9, "time": 12.0, "paused": "no space", "devices": rows}
    head, names, first, second = table(status)
    assert head == "window 3 of 9, 12 s  paused: no space"
    assert names.split()[:4] == ["device", "state", "density", "staleness"]
    assert first.split() == ["3", "training", "0.05", "2", "2.50", "MB", "1", "4", "s", "ago"]
    assert second.split()[-2:] == ["0", "never"]


class Ended:
    """A supervisor whose processes end one after the other: at each look at the server one more."""

    def __init__(self, *ends: dict[str, int]) -> None:
        self.ends = list(ends)
        self.codes: dict[str, int] = {}

    def poll(self, name: str) -> int | None:
        if name == "server" and self.ends:
            self.codes |= self.ends.pop(0)
        return self.codes.get(name)

    def log(self, name: str) -> str:
        return f"{name}.log"


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        (({}, {"device-1": -9}, {"device-2": 1}), "no device is left"),
        (({"broker": -11},), "nothing reaches anybody any more: broker ended with status -11"),
        (({"storage": 0},), "nothing reaches anybody any more: storage ended with status 0"),
        (({"device-1": -9}, {"server": 2}), "server ended with status 2; its log is server.log"),
    ],
)
def test_without_what_a_run_needs_it_ends(
    ends: tuple[dict[str, int], ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedgmr_plugin.cli.local._POLL_SECONDS", 0.0)
    with pytest.raises(click.ClickException, match=told):
        watch(Ended(*ends), tmp_path, ["device-1", "device-2"])


def test_a_device_that_ends_is_told_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedgmr_plugin.cli.local._POLL_SECONDS", 0.0)
    ends: list[dict[str, int]] = [{}, {"device-1": -9}, {}, {"device-2": 0}, {"server": 0, "broker": -15}]
    watch(Ended(*ends), tmp_path, ["device-1", "device-2"])
    assert capsys.readouterr().err == "device-1 ended with status -9; its log is device-1.log\n"


def test_a_device_that_is_not_in_the_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, 2, 5, CONNECTION)
    found = CliRunner().invoke(main, ["device", "main.py", "--cf", "fedml_config.yaml", "--id", "9"])
    assert found.exit_code == 2 and "9 is not in client_id_list: [1, 2]" in found.output


def test_a_script_without_its_functions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, 2, 5, CONNECTION)
    (tmp_path / "other.py").write_text("def make_model(args): ...\n")
    found = CliRunner().invoke(main, ["device", "other.py", "--cf", "fedml_config.yaml", "--id", "1"])
    assert found.exit_code == 2 and "GMR-113 train_data, test_data not defined" in found.output


def test_a_real_clock_cannot_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, 2, 5, CONNECTION)
    found = CliRunner().invoke(main, ["plan", "--cf", "fedml_config.yaml"])
    assert found.exit_code == 2 and "GMR-502 training_type='cross_device' has a real clock" in found.output


@pytest.mark.parametrize("name", ["main.py", "fedml_config.yaml", "keys.json"])
def test_nobodys_own_files_are_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine\n")
    found = CliRunner().invoke(main, ["local", "up", "--folder", str(tmp_path)])
    assert found.exit_code == 1 and f"has a {name} of yours" in found.output
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine\n"]


def test_a_script_that_was_changed_is_not_replaced(tmp_path: Path) -> None:
    refuse_foreign(tmp_path)
    write_project(tmp_path, 2, 5, CONNECTION)
    refuse_foreign(tmp_path)
    script = tmp_path / "main.py"
    script.write_text(script.read_text() + "# mine\n")
    with pytest.raises(click.ClickException, match="changed"):
        refuse_foreign(tmp_path)


@pytest.mark.parametrize("change", [{}, {"version": 1}])
def test_nothing_is_left_that_knows_a_password(tmp_path: Path, change: dict[str, Any]) -> None:
    """Also where the stack died by itself; a file of somebody else's stays."""
    path = tmp_path / "connection.json"
    path.write_text(json.dumps({**CONNECTION, **change}))
    for content in (None, "{", "3", "[]"):
        path.write_text(content) if content is not None else None
        found = CliRunner().invoke(main, ["local", "down", "--folder", str(tmp_path)])
        assert found.exit_code == 0 and path.exists() == bool(change or content)


@pytest.mark.parametrize("second", ["ab" * 32, "AB" * 32, "ab " * 32])
def test_a_key_of_two_devices_is_refused(tmp_path: Path, second: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"1": "ab" * 32, "2": "cd" * 32, "3": second}))
    config = FedGMRConfig(device_keys=str(path))
    for devices in ((1, 2, 3), (1, 2)):
        with pytest.raises(ConfigError, match="GMR-111 .*devices 1 and 3 have the same key"):
            device_keys(config, devices, "here")


def test_nothing_to_stop_is_said(tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["local", "down", "--folder", str(tmp_path)])
    assert found.exit_code == 0 and "nothing runs" in found.output


def test_a_detached_stack_is_stopped_by_another_process(tmp_path: Path) -> None:
    pytest.importorskip("moto", reason="moto, the local S3 server, is not installed")
    if shutil.which("mosquitto") is None and not Path("/usr/sbin/mosquitto").exists():
        pytest.skip("Mosquitto is not installed")
    folder = str(tmp_path / "stack")
    runner = CliRunner()
    try:
        up = runner.invoke(main, ["local", "up", "--devices", "2", "--detach", "--folder", folder])
        assert up.exit_code == 0 and "fedgmr local down" in up.output, up.output
        assert {"broker", "storage", "server", "device-1", "device-2"} <= set(running(Path(folder)))
    finally:
        down = runner.invoke(main, ["local", "down", "--folder", folder])
    assert down.exit_code == 0 and "server" in down.output and "device-1" in down.output
    assert running(Path(folder)) == {}
