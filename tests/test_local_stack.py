"""The local stack: services answer and come back, nothing outlives it, the guide's files do as it says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedgmr_plugin.errors import HostError
from fedgmr_plugin.protocol.storekeys import answer_key, probe_key, sent_key
from fedgmr_plugin.runtimes.devices.connection import Bucket
from fedgmr_plugin.runtimes.devices.store import S3Store
from fedgmr_plugin.runtimes.local import broker as broker_module
from fedgmr_plugin.runtimes.local import groups, keeper, mqtt, ports, record
from fedgmr_plugin.runtimes.local import stack as stack_module
from fedgmr_plugin.runtimes.local import storage as storage_module
from fedgmr_plugin.runtimes.local.broker import Broker
from fedgmr_plugin.runtimes.local.processes import Supervisor
from fedgmr_plugin.runtimes.local.stack import Connection, Stack, connection, stop_recorded
from fedgmr_plugin.runtimes.local.storage import Storage

REPOSITORY = Path(__file__).resolve().parent.parent
GUIDE = REPOSITORY / "docs" / "self-hosting.md"

needs_broker = pytest.mark.skipif(
    broker_module.find("mosquitto") is None, reason="mosquitto is not installed (apt-get install mosquitto)"
)
needs_passwords = pytest.mark.skipif(
    not broker_module.can_check_passwords(), reason="mosquitto_passwd is not installed"
)
needs_storage = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("moto", "flask_cors")),
    reason='moto\'s server is not installed (pip install "fedgmr[local]")',
)
needs_paho = pytest.mark.skipif(importlib.util.find_spec("paho") is None, reason="paho-mqtt is not installed")

SLEEP = ["sleep", "60"]


def until(true: Callable[[], Any], seconds: float = 5.0) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    return groups.started(pid) is None


# -- processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with Supervisor(tmp_path / "stack") as made:
        yield made


def test_output_and_exit_code_of_a_process_are_kept(supervisor: Supervisor) -> None:
    supervisor.start("child", ["sh", "-c", "cat; echo out; echo err >&2; exit 3"])  # cat: nothing to read
    assert until(lambda: supervisor.poll("child") is not None)
    assert supervisor.poll("child") == 3
    assert supervisor.log("child").read_text() == "out\nerr\n"
    assert supervisor.running() == {}
    assert not (supervisor.folder / record.NAME).exists()


def test_a_process_has_the_environment_and_folder_it_was_given(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    env = {"PATH": os.environ["PATH"], "COLOUR": "red"}
    for _ in range(2):
        supervisor.start("child", ["sh", "-c", "echo $COLOUR; pwd"], env=env, cwd=tmp_path)
        assert until(lambda: supervisor.poll("child") == 0)
    assert supervisor.log("child").read_text() == f"red\n{tmp_path}\n" * 2


def test_a_whole_group_is_ended_and_what_ignores_sigterm_is_killed(supervisor: Supervisor) -> None:
    supervisor.start("deaf", ["sh", "-c", "trap '' TERM; sleep 60 & echo $!; wait; wait; sleep 60"])
    assert until(lambda: supervisor.log("deaf").read_text().endswith("\n"))
    grandchild = int(supervisor.log("deaf").read_text())
    assert not gone(grandchild)
    supervisor.stop("deaf", patience=0.3)
    assert supervisor.poll("deaf") == -signal.SIGKILL
    assert until(lambda: gone(grandchild))


def test_what_an_ended_process_leaves_behind_is_killed(supervisor: Supervisor) -> None:
    supervisor.start("parent", ["sh", "-c", "sleep 60 & echo $!"])
    assert until(lambda: supervisor.poll("parent") == 0)
    assert until(lambda: gone(int(supervisor.log("parent").read_text())))


def test_restart_kill_and_pause(supervisor: Supervisor) -> None:
    first = supervisor.start("child", SLEEP)
    second = supervisor.restart("child")
    assert first != second and gone(first) and supervisor.running() == {"child": second}
    supervisor.kill("child")
    assert supervisor.poll("child") == -signal.SIGKILL
    third = supervisor.restart("child")
    supervisor.pause("child")
    assert until(lambda: Path(f"/proc/{third}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    supervisor.stop("child")  # a suspended process is woken to end
    assert supervisor.poll("child") == -signal.SIGTERM


def test_what_cannot_be_done_is_refused(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start("child", SLEEP)
    with pytest.raises(HostError, match="GMR-514 process='child' runs already"):
        supervisor.start("child", SLEEP)
    with pytest.raises(HostError, match="GMR-514 process='x' cannot start: no program 'no-such-program'"):
        supervisor.start("x", ["no-such-program"])
    with pytest.raises(HostError, match="GMR-514 process='x' was never started"):
        supervisor.restart("x")
    with pytest.raises(HostError, match="GMR-514 process='x' does not run"):
        supervisor.pause("x")
    with pytest.raises(HostError, match="GMR-514 .* has running processes: child"):
        Supervisor(supervisor.folder)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="GMR-514 .*file/stack cannot be made"):
        Supervisor(tmp_path / "file" / "stack")


PARENT = """
import sys, time
from fedgmr_plugin.runtimes.local.processes import Supervisor
with Supervisor(sys.argv[1]) as supervisor:
    supervisor.start("child", ["sh", "-c", "sleep 60 & echo $!; wait"])
    print(supervisor.running()["child"], flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_supervisor(tmp_path: Path, number: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        log = tmp_path / "child.log"
        assert until(lambda: log.read_text().endswith("\n"))
        grandchild = int(log.read_text())
        assert os.getpgid(grandchild) == child and os.getsid(child) == child
        os.killpg(parent.pid, number)
    assert until(lambda: gone(child) and gone(grandchild))


def test_a_supervisor_killed_before_it_recorded_a_child_leaves_none(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from fedgmr_plugin.runtimes.local.processes import Supervisor\n"
        "Supervisor._tell = lambda self, fields: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Supervisor(sys.argv[1]).start('child', ['touch', sys.argv[1] + '/begun'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    time.sleep(0.3)
    assert not (tmp_path / "begun").exists()


def test_the_keeper_knows_what_is_left() -> None:
    reader, writer = os.pipe()
    leaders = [groups.Leader(5, "a"), groups.Leader(6, "b")]
    text = b"".join(json.dumps(leader._asdict()).encode() + b"\n" for leader in leaders)
    os.write(writer, text + b'{"ended": 5}\n{"cut sh')
    os.close(writer)
    assert keeper.watch(reader, os.getppid()) == [groups.Leader(6, "b")]
    assert keeper.watch(reader, -1) == []  # the parent is another: no look at the pipe
    os.close(reader)


def test_a_detached_process_is_stopped_by_its_record(tmp_path: Path) -> None:
    with Supervisor(tmp_path, detached=True) as supervisor:
        pid = supervisor.start("child", SLEEP)
    assert not gone(pid)
    assert stop_recorded(tmp_path) == ["child"]
    assert gone(pid) and stop_recorded(tmp_path) == []
    assert supervisor.poll("child") == -signal.SIGTERM


def test_a_recycled_number_is_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        record.write(tmp_path, {"child": groups.Leader(other.pid, "another boot:1")})
        assert stop_recorded(tmp_path) == []
        assert other.poll() is None and not gone(other.pid)
    finally:
        other.kill()
        other.wait()


def test_starts_are_told_apart_without_proc() -> None:
    ours = groups._started_by_ps(os.getpid())
    assert ours is not None and re.search(r"\d\d:\d\d:\d\d \d{4}$", ours)
    ended = subprocess.Popen(["true"])
    assert until(lambda: gone(ended.pid))  # a zombie
    assert groups._started_by_ps(ended.pid) is None
    ended.wait()
    assert groups._started_by_ps(ended.pid) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "processes": {"a": 1}}']
)
def test_a_damaged_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / record.NAME).write_text(content)
    with pytest.raises(HostError, match=r"GMR-514 .*processes\.json cannot be read"):
        stop_recorded(tmp_path)


def test_the_record_is_its_owners_alone(supervisor: Supervisor) -> None:
    supervisor.start("child", SLEEP)
    assert (supervisor.folder / record.NAME).stat().st_mode & 0o777 == 0o600
    assert supervisor.folder.stat().st_mode & 0o777 == 0o700


# -- services ----------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_not_free() -> None:
    port = ports.free_port()
    with socket.socket() as taken:
        taken.bind((ports.HOST, port))
        taken.listen()
        assert not ports.is_free(port)
        assert mqtt.handshake(port, timeout=0.1) is None  # listens, and never answers
    assert ports.is_free(port)
    assert mqtt.handshake(port, timeout=0.1) is None


def test_missing_services_are_named_with_the_line_that_installs_them(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "find", lambda program: None)
    with pytest.raises(
        HostError, match=r"(?s)GMR-512 .*sudo apt-get install mosquitto.*brew install mosquitto"
    ):
        Broker(supervisor)
    monkeypatch.setattr(storage_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HostError, match=r'(?s)GMR-513 moto, .*pip install "fedgmr\[local\]"'):
        Storage(supervisor)


@needs_broker
def test_a_race_for_a_port_is_retried_and_a_given_port_is_not(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = ports.free_port()
    with socket.socket() as taken:
        taken.bind((ports.HOST, 0))
        taken.listen()
        busy = taken.getsockname()[1]
        offered = iter([busy, free])
        monkeypatch.setattr(ports, "free_port", lambda: next(offered))
        broker = Broker(supervisor)
        broker.start()
        assert broker.port == free
        broker.stop()
        with pytest.raises(HostError, match=rf"GMR-512 mosquitto does not answer on port={busy}: .*in use"):
            Broker(supervisor, port=busy).start()


@needs_broker
@needs_passwords
@pytest.mark.parametrize("users", [{"": "x"}, {"a:b": "x"}, {"a": "x\ny"}])
def test_names_that_would_break_the_password_file_are_refused(
    supervisor: Supervisor, users: dict[str, str]
) -> None:
    with pytest.raises(HostError, match="GMR-512 user="):
        Broker(supervisor, users=users)


@needs_broker
def test_without_passwords_the_broker_takes_anyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_module._broker, "can_check_passwords", lambda: False)
    monkeypatch.setattr(storage_module.importlib.util, "find_spec", lambda name: object())
    stack = Stack(tmp_path / "stack")
    with stack.processes:
        stack.broker.start()
        assert not stack.has_passwords
        assert mqtt.handshake(stack.broker.port) == 0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack")) as made:
        yield made


def s3(stack: Stack, keys: tuple[str, str] | None = None) -> Any:
    """A client as FedML makes it (no region), without retries."""
    boto3 = pytest.importorskip("boto3")
    from botocore.client import Config

    shown = stack.connection().customized_training_s3_config
    key, secret = keys or (shown["CN_S3_AKI"], shown["CN_S3_SAK"])
    return boto3.client(
        "s3",
        endpoint_url=shown["CN_S3_ENDPOINT"],
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        config=Config(signature_version="s3v4", retries={"max_attempts": 0}, read_timeout=1),
    )


def refused(call: Callable[..., Any], **arguments: Any) -> str:
    """The code with which S3 refuses a call."""
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError) as error:
        call(**arguments)
    return str(error.value.response["Error"]["Code"])


@needs_broker
@needs_storage
def test_the_broker_asks_for_the_password_and_comes_back_on_its_port(stack: Stack) -> None:
    shown = stack.connection().customized_training_mqtt_config
    port, user, password = shown["BROKER_PORT"], shown["MQTT_USER"], shown["MQTT_PWD"]
    assert mqtt.handshake(port, user, password) == 0
    if stack.has_passwords:
        assert mqtt.handshake(port) == mqtt.handshake(port, user, "wrong") == 5
    stack.broker.stop()
    assert mqtt.handshake(port, user, password) is None
    stack.broker.start()
    assert stack.connection().customized_training_mqtt_config == shown
    assert mqtt.handshake(port, user, password) == 0
    stack.broker.pause()
    assert mqtt.handshake(port, user, password, timeout=0.1) is None
    stack.broker.resume()
    assert mqtt.handshake(port, user, password) == 0


@needs_broker
@needs_storage
def test_objects_are_private_and_survive_a_pause_and_a_planned_stop(stack: Stack) -> None:
    import urllib.error
    import urllib.request

    from botocore.exceptions import ConnectionError, ReadTimeoutError

    client, bucket = s3(stack), stack.storage.bucket
    client.put_object(Bucket=bucket, Key="a/b c", Body=b"model", Metadata={"round": "3"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{stack.storage.endpoint}/{bucket}/a/b%20c")
    key, secret = stack.storage.keys
    assert (
        refused(s3(stack, (key, "wrong")).get_object, Bucket=bucket, Key="a/b c") == "SignatureDoesNotMatch"
    )
    assert (
        refused(s3(stack, ("wrong", secret)).get_object, Bucket=bucket, Key="a/b c") == "InvalidAccessKeyId"
    )

    stack.storage.pause()
    with pytest.raises(ReadTimeoutError):
        client.get_object(Bucket=bucket, Key="a/b c")
    stack.storage.resume()
    shown = stack.connection()
    stack.storage.stop()
    with pytest.raises(ConnectionError):
        client.get_object(Bucket=bucket, Key="a/b c")
    stack.storage.start()
    assert stack.connection() == shown
    answer = client.get_object(Bucket=bucket, Key="a/b c")
    assert (answer["Body"].read(), answer["Metadata"]) == (b"model", {"round": "3"})
    assert not (stack.folder / "objects").exists()

    stack.processes.kill("storage")
    stack.storage.start()
    assert stack.connection() == shown
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0


@needs_broker
@needs_storage
def test_another_process_finds_and_stops_a_detached_stack(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="GMR-514 no broker and storage run"):
        connection(tmp_path)
    with Stack(tmp_path, detached=True) as stack:
        shown = stack.connection()
        device = stack.run("device", SLEEP)
    assert connection(tmp_path) == shown
    assert (tmp_path / "connection.json").stat().st_mode & 0o777 == 0o600
    assert stop_recorded(tmp_path) == ["broker", "storage", "device"]
    assert gone(device) and not (tmp_path / "connection.json").exists()
    assert mqtt.handshake(stack.broker.port) is None


@needs_broker
@needs_storage
def test_an_error_in_the_block_stops_a_detached_stack_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "PATIENCE", 0.0)
    stack = Stack(tmp_path, detached=True)
    with pytest.raises(HostError, match="GMR-513 moto does not answer"):
        stack.start()
    assert stack.processes.running() == {}


# -- the guide ---------------------------------------------------------------------------------------------


def guide(language: str, first: str = "") -> list[str]:
    """The guide's code blocks of a language, those that begin with a line of this text."""
    text = GUIDE.read_text(encoding="utf-8")
    return [b for b in re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S) if b.startswith(first)]


def test_the_guide_names_exactly_the_keys_that_fedml_is_given() -> None:
    (block,) = guide("yaml")
    section = yaml.safe_load(block)["comm_args"]
    shown = Connection({}, {})._replace(**{name: section[name] for name in Connection._fields})
    names = [list(part) for part in shown]
    assert names == [
        ["BROKER_HOST", "BROKER_PORT", "MQTT_USER", "MQTT_PWD", "MQTT_KEEPALIVE"],
        ["CN_S3_AKI", "CN_S3_SAK", "CN_REGION_NAME", "BUCKET_NAME", "CN_S3_ENDPOINT"],
    ]
    assert Connection._fields == ("customized_training_mqtt_config", "customized_training_s3_config")


class Secured:
    """A Mosquitto with the guide's files, but for its folder, name and ports."""

    def __init__(self, folder: Path, supervisor: Supervisor) -> None:
        self.folder, self.tls, self.plain = folder, ports.free_port(), ports.free_port()
        for first in ("# certificates", "# passwords"):
            (script,) = guide("bash", first)
            subprocess.run(["bash", "-c", self.here(script)], cwd=folder, check=True, capture_output=True)
        (acl,) = guide("text", "# /etc/mosquitto/fedgmr.acl\n")
        (folder / "fedgmr.acl").write_text(acl)
        (configuration,) = guide("text", "# /etc/mosquitto/conf.d/fedgmr.conf\n")
        as_root = "user root\n" if os.geteuid() == 0 else ""  # else it may not read pytest's folders
        path = folder / "fedgmr.conf"
        path.write_text(as_root + self.here(configuration) + "\nlog_dest stderr\nlog_type all\n")
        lines = (folder / "fedgmr.credentials").read_text().splitlines()
        self.credentials = dict(line.split(":", 1) for line in lines)
        program = broker_module.find("mosquitto")
        assert program is not None
        supervisor.start("broker", [program, "-c", str(path)])
        self.log = supervisor.log("broker")
        server = ("server", self.credentials["server"])
        assert until(lambda: mqtt.handshake(self.plain, *server) == 0), self.log.read_text()

    def here(self, text: str) -> str:
        text = text.replace("/etc/mosquitto/", f"{self.folder}/").replace("broker.example.org", "localhost")
        return text.replace("listener 8883", f"listener {self.tls}").replace(
            "listener 1883", f"listener {self.plain}"
        )

    def connect(self, user: str = "", password: str = "", *, tls: bool = True) -> Client:
        return Client(self, user, password, tls)


class Client:
    """paho's client, with what it was answered and sent."""

    def __init__(self, broker: Secured, user: str, password: str, tls: bool) -> None:
        from paho.mqtt.client import Client as Paho

        self.code: int | None = None
        self.granted: list[int] = []
        self.received: list[tuple[str, bytes]] = []
        self.paho = Paho(client_id=f"FedML_CS_42_{user}", clean_session=True)
        self.paho.on_connect = lambda client, data, flags, code: setattr(self, "code", code)
        self.paho.on_subscribe = lambda client, data, mid, granted: self.granted.extend(granted)
        self.paho.on_message = lambda client, data, message: self.received.append(
            (message.topic, message.payload)
        )
        if user:
            self.paho.username_pw_set(user, password)
        if tls:
            self.paho.tls_set(ca_certs=str(broker.folder / "certs" / "ca.crt"))
        self.paho.connect("localhost" if tls else "127.0.0.1", broker.tls if tls else broker.plain)
        self.paho.loop_start()
        assert until(lambda: self.code is not None)

    def subscribe(self, *topics: str) -> list[int]:
        self.granted = []
        for topic in topics:
            self.paho.subscribe(topic, qos=2)
        assert until(lambda: len(self.granted) == len(topics))
        return self.granted

    def publish(self, topic: str) -> None:
        self.paho.publish(topic, b"{}", qos=2).wait_for_publish(5)

    def close(self) -> None:
        self.paho.disconnect()
        self.paho.loop_stop()


@pytest.fixture
def secured(supervisor: Supervisor, tmp_path: Path) -> Secured:
    return Secured(tmp_path, supervisor)


@needs_broker
@needs_passwords
@needs_paho
@pytest.mark.filterwarnings("ignore:ssl.PROTOCOL_TLS is deprecated:DeprecationWarning")
def test_the_guides_broker_keeps_devices_apart(secured: Secured) -> None:
    passwords = secured.credentials
    trusting = ssl.create_default_context(cafile=str(secured.folder / "certs" / "ca.crt"))
    over_tls = {"host": "localhost", "context": trusting}
    for user, password in [("", ""), ("7", "wrong"), ("7", passwords["8"]), ("nobody", "")]:
        assert mqtt.handshake(secured.tls, user, password, **over_tls) == 5
        assert mqtt.handshake(secured.plain, user, password) == 5
    assert mqtt.handshake(secured.tls, "7", passwords["7"], **over_tls) == 0
    assert mqtt.handshake(secured.tls, "7", passwords["7"]) is None  # without TLS
    with (
        pytest.raises(ssl.SSLCertVerificationError),
        socket.create_connection(("localhost", secured.tls)) as raw,
    ):
        ssl.create_default_context().wrap_socket(raw, server_hostname="localhost")  # without ca.crt

    server = secured.connect("server", passwords["server"], tls=False)
    seven = secured.connect("7", passwords["7"])
    eight = secured.connect("8", passwords["8"])
    assert server.code == seven.code == eight.code == 0
    assert server.subscribe("fedml_42_7", "fedml_42_8", "flclient/active") == [2, 2, 2]
    own = ["fedml_42_0_7", "flserver_agent/7/start_train"]
    assert seven.subscribe(*own) == [2, 2]
    assert eight.subscribe("fedml_42_0_8") == [2]
    others = ["fedml_42_0_8", "fedml_42_8", "flserver_agent/8/start_train"]
    seven.subscribe(*others, "+", "#")  # granted: what would arrive is dropped

    for topic in ("fedml_42_8", "fedml_42_0_8", "fedml_42_0_7", "flserver/active", "fedml_42_7"):
        seven.publish(topic)  # in this order: when the last has come, the others would have
    assert until(lambda: server.received)
    seven.publish("flclient/active")
    assert until(lambda: len(server.received) == 2)
    assert [topic for topic, _ in server.received] == ["fedml_42_7", "flclient/active"]
    assert len(re.findall(r"Denied PUBLISH from FedML_CS_42_7", secured.log.read_text())) == 4
    assert eight.received == []

    for topic in ("fedml_42_0_8", *own):
        server.publish(topic)
    assert until(lambda: {topic for topic, _ in seven.received} == set(own))
    assert until(lambda: eight.received == [("fedml_42_0_8", b"{}")])
    time.sleep(0.1)
    assert [topic for topic, _ in seven.received if topic not in own] == []
    for client in (server, seven, eight):
        client.close()


@needs_broker
@needs_storage
def test_the_guides_policies_keep_devices_apart(stack: Stack) -> None:
    for_server, for_seven, rule = (json.loads(block) for block in guide("json"))
    bucket = stack.storage.bucket
    assert bucket == "fedgmr"
    owned = stack.storage.add_user("server", for_server)
    server, seven = s3(stack, owned), s3(stack, stack.storage.add_user("7", for_seven))
    sent, answer, probe = sent_key("42", "0f", "x"), answer_key("42", "0f", 3, 7), probe_key("42", 7)
    server.put_object(Bucket=bucket, Key=sent, Body=b"s")
    assert seven.get_object(Bucket=bucket, Key=sent)["Body"].read() == b"s"
    for key in (answer, probe):
        seven.put_object(Bucket=bucket, Key=key, Body=b"y")
    assert seven.get_object(Bucket=bucket, Key=probe)["Body"].read() == b"y"
    seven.delete_object(Bucket=bucket, Key=probe)
    for key in (sent, answer_key("42", "0f", 3, 8), probe_key("42", 8)):
        assert refused(seven.put_object, Bucket=bucket, Key=key, Body=b"z") == "AccessDenied"
    assert refused(seven.delete_object, Bucket=bucket, Key=sent) == "AccessDenied"
    endpoint = stack.connection().customized_training_s3_config["CN_S3_ENDPOINT"]
    S3Store(Bucket(endpoint, bucket, *owned)).delete([sent, answer])
    assert server.list_objects_v2(Bucket=bucket)["KeyCount"] == 0

    for key in ("fedml_42_0_7_a", "fedml_42_0_8_a", "fedml_42_8_a"):
        server.put_object(Bucket=bucket, Key=key, Body=b"x")

    assert seven.head_object(Bucket=bucket, Key="fedml_42_0_7_a")["ContentLength"] == 1
    assert seven.get_object(Bucket=bucket, Key="fedml_42_0_7_a")["Body"].read() == b"x"
    seven.put_object(Bucket=bucket, Key="fedml_42_7_b", Body=b"y")
    assert server.get_object(Bucket=bucket, Key="fedml_42_7_b")["Body"].read() == b"y"
    for key in ("fedml_42_0_8_a", "fedml_42_8_a", "fedml_42_7_b"):
        assert refused(seven.get_object, Bucket=bucket, Key=key) == "AccessDenied"
    for key in ("fedml_42_0_7_a", "fedml_42_8_a", "fedml_41_7_a"):
        assert refused(seven.put_object, Bucket=bucket, Key=key, Body=b"z") == "AccessDenied"
    assert refused(seven.list_objects_v2, Bucket=bucket) == "AccessDenied"
    assert refused(seven.delete_object, Bucket=bucket, Key="fedml_42_7_b") == "AccessDenied"
    assert refused(server.put_object, Bucket=bucket, Key="other", Body=b"z") == "AccessDenied"
    assert server.list_objects_v2(Bucket=bucket)["KeyCount"] == 4
    server.delete_object(Bucket=bucket, Key="fedml_42_7_b")

    owner = s3(stack)
    owner.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=rule)
    (stored,) = owner.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert stored == rule["Rules"][0]
