"""The MQTT connection of one process, at a real broker: over TLS, with passwords, and broken."""

from __future__ import annotations

import datetime
import errno
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fedgmr_plugin.errors import ConfigError, HostError
from fedgmr_plugin.protocol.desk import Desk
from fedgmr_plugin.protocol.notes import STATUS, StatusNote, sign, to_server
from fedgmr_plugin.protocol.presence import PATIENCE, Presence
from fedgmr_plugin.runtimes.devices.connection import Broker as Where
from fedgmr_plugin.runtimes.devices.inbox import Inbox
from fedgmr_plugin.runtimes.devices.mqtt import MqttLink
from fedgmr_plugin.runtimes.local import broker as broker_module
from fedgmr_plugin.runtimes.local import ports
from fedgmr_plugin.runtimes.local.broker import Broker
from fedgmr_plugin.runtimes.local.processes import Supervisor

pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
from paho.mqtt import client as mqtt
from paho.mqtt.client import Client as Paho

if broker_module.find("mosquitto") is None:
    pytest.skip("mosquitto is not installed (apt-get install mosquitto)", allow_module_level=True)

KEYS = {1: bytes(32)}
USERS = {"server": "one", "7": "two"}


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with Supervisor(tmp_path / "stack") as made:
        yield made


@pytest.fixture
def where(supervisor: Supervisor) -> Where:
    broker = Broker(supervisor)
    broker.start()
    return Where("127.0.0.1", broker.port)


class Wills:
    """What a device says when it is gone, signed anew each time."""

    def __init__(self) -> None:
        self.made = 0
        self.topic = to_server("7", 1)

    def __call__(self) -> bytes:
        self.made += 1
        note = StatusNote("7", 1, self.made, "OFFLINE")
        return sign(note, self.topic, KEYS[1], {"msg_type": STATUS, "sender": 1})


def test_a_device_that_drops_twice_is_gone_twice(where: Where) -> None:
    desk, wills = Desk("7", 0, (1,), KEYS), Wills()
    heard, calls = Inbox(), Inbox()
    server, device = MqttLink(where, desk.topics, heard), MqttLink(where, [], calls)
    device._client.reconnect_delay_set(1, 1)
    device.say_when_gone(wills.topic, wills)
    server.start()
    device.start()
    for time_ in (1.0, 2.0, 3.0):
        until(server.connected.is_set)
        until(device.connected.is_set)
        calls.get(timeout=5)()  # what the device's own thread does
        device._client.socket().shutdown(socket.SHUT_RDWR)  # without a word
        topic, payload = heard.get(timeout=10)
        client, said = desk.read(topic, payload, time_)
        assert client == 0 and isinstance(said, StatusNote) and said.state == "OFFLINE"
        until(lambda: not device.connected.is_set() or not calls.empty())
    assert desk.refused[0].total() == 0
    device.stop()
    server.stop()


def test_what_the_broker_retained_is_of_another_time(where: Where) -> None:
    heard = Inbox()
    link, other = MqttLink(where, ["t"], heard), Paho()
    other.connect(where.host, where.port)
    other.loop_start()
    other.publish("t", b"old", qos=1, retain=True).wait_for_publish(10)
    link.start()
    until(link.connected.is_set)
    time.sleep(0.5)  # the retained one comes first
    other.publish("t", b"new", qos=1).wait_for_publish(10)
    assert heard.get(timeout=10) == ("t", b"new")
    link.stop()
    other.disconnect()
    other.loop_stop()


def test_a_message_for_which_there_is_no_room_is_dropped_and_the_next_one_heard(
    where: Where, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Inbox(most=10_000)
    server, device = MqttLink(where, ["t"], heard), MqttLink(where, [], Inbox())
    server.start()
    until(server.connected.is_set)
    device.start()
    for payload in (b"a" * 6000, b"b" * 6000, b"b" * 6000, b"c"):
        device.publish("t", payload)
    until(lambda: heard.qsize() == 2)
    assert [heard.get()[1][:1] for _ in range(2)] == [b"a", b"c"] and server.dropped == 2
    assert caplog.text.count("more messages than can be read") == 1
    device.stop()
    server.stop()


@pytest.mark.parametrize("call", ["_sock_recv", "_sock_send"])
def test_a_connection_that_times_out_is_made_again(
    where: Where, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """paho's own thread would end here."""
    link = MqttLink(where, [], Inbox())
    link._client.reconnect_delay_set(1, 1)
    link.start()
    until(link.connected.is_set)
    real, lost = getattr(Paho, call), threading.Event()

    def broken(client: Any, what: Any) -> Any:
        if not lost.is_set():
            lost.set()
            raise OSError(errno.ETIMEDOUT, "Connection timed out")
        return real(client, what)

    monkeypatch.setattr(Paho, call, broken)
    link.publish("t", b"")  # it is not sent, or its acknowledgement not read
    until(lost.is_set)
    until(lambda: not link.connected.is_set())
    until(link.connected.is_set)
    link.stop()


def test_a_broker_that_is_not_ready_is_told_of_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """Return code 3: MQTT 3.1.1, section 3.2.2.3."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        link = MqttLink(Where("127.0.0.1", listener.getsockname()[1]), [], Inbox())
        link._client.reconnect_delay_set(1, 1)
        link.start()
        for _ in range(3):
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"\x20\x02\x00\x03")
        link.stop()
    assert link.refused is None
    (record,) = caplog.records
    assert "cannot be reached, trying again: it answers with return code 3" in record.message


# -- TLS ---------------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority in a folder, and what it has signed."""

    def __init__(self, folder: Path, name: str) -> None:
        x509 = pytest.importorskip("cryptography.x509", reason="cryptography is not installed")
        self._x509, self._folder, self._name = x509, folder, name
        folder.mkdir()
        self._key, self._certificate = self._make(name, None)
        self.file = str(folder / "ca.crt")

    def sign(self, name: str, *alternatives: str) -> tuple[str, str]:
        """Files of a certificate and its key."""
        self._make(name, alternatives)
        return str(self._folder / f"{name}.crt"), str(self._folder / f"{name}.key")

    def _make(self, name: str, alternatives: tuple[str, ...] | None) -> tuple[Any, Any]:
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        x509, now = self._x509, datetime.datetime.now(datetime.timezone.utc)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer = subject if alternatives is None else self._certificate.subject
        builder = (
            x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=alternatives is None, path_length=None), critical=True)
        )
        if alternatives:
            names = [
                x509.IPAddress(ipaddress.ip_address(a)) if a[0].isdecimal() else x509.DNSName(a)
                for a in alternatives
            ]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(key if alternatives is None else self._key, hashes.SHA256())
        stem = "ca" if alternatives is None else name
        (self._folder / f"{stem}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (self._folder / f"{stem}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return key, certificate


class Secured:
    """A Mosquitto that asks for a password, over TLS, and where `mutual` for a certificate too."""

    def __init__(self, supervisor: Supervisor, certificate: tuple[str, str], ca: str, mutual: bool) -> None:
        folder, self.port, self.plain = supervisor.folder, ports.free_port(), ports.free_port()
        broker_module.write_passwords(folder / "passwords", USERS)
        lines = [
            "allow_anonymous false",
            f"password_file {folder / 'passwords'}",
            f"listener {self.port} 127.0.0.1",
            f"certfile {certificate[0]}",
            f"keyfile {certificate[1]}",
            *([f"cafile {ca}", "require_certificate true"] if mutual else []),
            f"listener {self.plain} 127.0.0.1",
            "log_dest stderr",
            *(["user root"] if os.geteuid() == 0 else []),
        ]
        (folder / "tls.conf").write_text("\n".join(lines) + "\n")
        program = broker_module.find("mosquitto")
        assert program is not None
        supervisor.start("broker", [program, "-c", str(folder / "tls.conf")])
        until(lambda: not ports.is_free(self.plain))

    def at(self, host: str = "localhost", user: str = "server", **more: Any) -> Where:
        return Where(host, self.port, user, USERS[user], **more)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    if not broker_module.can_check_passwords():
        pytest.skip("mosquitto_passwd is not installed")
    return Authority(tmp_path / "ours", "ours")


@pytest.mark.parametrize("mutual", [False, True])
def test_messages_travel_over_tls_with_passwords(
    supervisor: Supervisor, authority: Authority, mutual: bool, caplog: pytest.LogCaptureFixture
) -> None:
    signed = authority.sign("broker", "localhost", "127.0.0.1")
    broker = Secured(supervisor, signed, authority.file, mutual)
    more: dict[str, Any] = {"ca": authority.file}
    if mutual:
        more["certificate"], more["key"] = authority.sign("7", "seven")
    inbox = Inbox()
    server, device = (
        MqttLink(broker.at(**more), ["t"], inbox),
        MqttLink(broker.at(user="7", **more), [], Inbox()),
    )
    server.start()
    until(server.connected.is_set)
    device.start()
    device.publish("t", b"over TLS")
    assert inbox.get(timeout=10) == ("t", b"over TLS")
    device.stop()
    server.stop()
    assert not caplog.text
    if mutual:
        assert "GMR-515" in str(refusal(broker.at(ca=authority.file)))  # it shows no certificate


def refusal(where: Where) -> HostError:
    """Why a link is told that it cannot connect."""
    link = MqttLink(where, [], Inbox())
    link.start()
    until(lambda: link.refused is not None, 10)
    link.stop()
    assert link.refused is not None and not link.connected.is_set()
    return link.refused


def test_a_broker_that_is_not_trusted_is_refused_clearly(
    supervisor: Supervisor, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Secured(supervisor, authority.sign("broker", "localhost"), authority.file, False)
    other = Authority(tmp_path / "theirs", "theirs")
    for where, problem in (
        (broker.at(ca=other.file), "not trusted"),
        (broker.at("127.0.0.1", ca=authority.file), "not trusted.*127.0.0.1"),
        (broker.at(ca=authority.file)._replace(password="wrong"), "not authorised"),
    ):
        found = refusal(where)
        assert found.code == "GMR-515"
        with pytest.raises(HostError, match=problem):
            raise found
    assert "the broker is gone" not in caplog.text, "it never was there"
    link = MqttLink(broker.at(), [], Inbox())  # without TLS, where it listens for TLS alone
    link.start()
    until(lambda: "it answers nothing; does it want TLS (MQTT_TLS_CA), or not?" in caplog.text)
    link.stop()


def test_a_port_without_tls_is_asked_about(
    where: Where, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    link = MqttLink(where._replace(ca=authority.file), [], Inbox())
    link.start()
    until(lambda: "; does it speak TLS at this port?" in caplog.text)
    link.stop()
    assert link.refused is None, "the right one may come"


def test_a_device_that_was_connected_waits_for_a_broker_that_it_trusts(
    supervisor: Supervisor, authority: Authority, tmp_path: Path
) -> None:
    """Somebody in between can keep it away, but not end it."""
    signed = authority.sign("broker", "localhost")
    broker = Secured(supervisor, signed, authority.file, False)
    link = MqttLink(broker.at(ca=authority.file), [], Inbox())
    link._client.reconnect_delay_set(1, 1)
    failures: list[None] = []
    told = link._client.on_connect_fail
    link._client.on_connect_fail = lambda *given: (told(*given), failures.append(None))
    link.start()
    until(link.connected.is_set)
    supervisor.stop("broker")
    ours, theirs = Path(signed[0]), Authority(tmp_path / "theirs", "theirs").sign("broker", "localhost")
    before = [ours.read_bytes(), Path(signed[1]).read_bytes()]
    for place, file in zip(signed, theirs, strict=True):
        Path(place).write_bytes(Path(file).read_bytes())
    supervisor.restart("broker")
    until(lambda: len(failures) >= 2)
    assert link.refused is None and not link.connected.is_set()
    for place, content in zip(signed, before, strict=True):
        Path(place).write_bytes(content)
    supervisor.restart("broker")
    until(link.connected.is_set)
    link.stop()


@pytest.mark.parametrize("wrong", ["missing", "no certificate"])
def test_tls_files_that_cannot_be_used_are_told(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "ca.crt"
    if wrong != "missing":
        path.write_text("hello")
    with pytest.raises(ConfigError, match=r"GMR-112 MQTT_TLS_CA=.*ca\.crt"):
        MqttLink(Where("localhost", 1, ca=str(path)), [], Inbox())


def test_a_broker_that_lets_a_process_hear_nothing_is_told(
    where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mosquitto with a file of rights grants every subscription; other brokers do not."""
    real = Paho._handle_suback

    def denied(client: Any) -> Any:
        client._in_packet["packet"][-1] = 128  # the last one of those that were asked for together
        return real(client)

    link = MqttLink(where, ["t", "u"], Inbox())
    link.start()
    until(link.connected.is_set)
    time.sleep(0.5)
    assert link.refused is None
    link.stop()
    monkeypatch.setattr(Paho, "_handle_suback", denied)
    link, _ = alone(where, "a")  # what only servers hear of one another may be denied
    until(link.connected.is_set)
    time.sleep(0.5)
    assert link.refused is None and not link._asked
    link.stop()
    link = MqttLink(where, ["t", "u"], Inbox())
    link.start()
    until(lambda: link.refused is not None)
    assert link.refused is not None and link.refused.code == "GMR-515"
    assert "does not let this process hear its topics" in str(link.refused)
    link.stop()


# -- one server, and what the broker keeps -----------------------------------------------------------------


def alone(where: Where, nonce: str) -> tuple[MqttLink, Presence]:
    link, presence = MqttLink(where, [], Inbox()), Presence("7", 0, KEYS.values(), nonce, nonce * 32)
    link.watch(presence)
    link.start()
    return link, presence


def test_a_second_server_hears_of_the_first_and_a_dead_one_is_followed(where: Where) -> None:
    first, serving = alone(where, "c")
    until(serving.is_alone)
    serving.serves = True
    second, refused = alone(where, "a")
    until(lambda: refused.taken_by)
    assert refused.taken_by == "c" and not serving.taken_by
    second.stop()
    first._client.on_message = lambda *given: None  # a process that is dead, whose connection is not
    third, follower = alone(where, "b")
    until(follower.is_alone)
    third.stop()
    first.stop()


class Breaking:
    """A broker that receives messages and breaks the connection instead of saying so."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.where = Where("127.0.0.1", self._listener.getsockname()[1])
        self.connections, self.heard = 0, list[bytes]()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as stream:
                self._one_packet(stream)  # CONNECT
                connection.sendall(b"\x20\x02\x00\x00")
                self.connections += 1
                self.heard.append(self._one_packet(stream))

    @staticmethod
    def _one_packet(stream: Any) -> bytes:
        stream.read(1)
        return bytes(stream.read(stream.read(1)[0]))

    def close(self) -> None:
        self._listener.close()


def test_what_is_to_come_once_at_most_is_not_sent_again_when_the_connection_breaks() -> None:
    broker = Breaking()
    link = MqttLink(broker.where, [], Inbox())
    link._client.reconnect_delay_set(1, 1)
    link.start()
    until(link.connected.is_set)
    link.publish("t", b"once", at_most_once=True)
    until(lambda: broker.connections == 2)
    link.publish("t", b"once or twice")
    until(lambda: len(broker.heard) == 3)
    assert broker.heard[0].endswith(b"once")
    assert broker.heard[1].endswith(broker.heard[2][-13:]) and broker.heard[2].endswith(b"once or twice")
    link.stop(0.0)
    broker.close()


def test_of_two_servers_that_meet_again_one_gives_way(where: Where) -> None:
    first, a = alone(where, "a")
    first._client.reconnect_delay_set(1, 1)
    until(lambda: a._returned is not None)
    a.serves = True
    second, b = alone(where, "b")
    until(lambda: b.taken_by)  # the one answer to its one question: nothing is on its way any more
    b.taken_by, b.serves = "", True
    first._client.socket().shutdown(socket.SHUT_RDWR)
    until(lambda: b.taken_by)
    assert not a.taken_by
    first.stop()
    second.stop()


def test_what_is_kept_comes_to_whoever_connects_later(where: Where) -> None:
    sender = MqttLink(where, [], Inbox())
    sender.start()
    until(sender.connected.is_set)
    sender.keep("t", b"the end")
    sender.keep("u", b"gone")
    sender.keep("u", b"")
    inbox, kept = Inbox(), list[tuple[str, bytes]]()
    link = MqttLink(where, ["t", "u"], inbox)
    link.hear_kept(lambda topic, payload: kept.append((topic, payload)))
    time.sleep(0.5)
    link.start()
    inbox.get(timeout=10)()
    sender.keep("u", b"")  # the removal itself is no message
    sender.publish("u", b"live")
    assert inbox.get(timeout=10) == ("u", b"live")
    assert kept == [("t", b"the end")]
    link.stop()
    sender.stop()


@pytest.mark.parametrize("silent", [False, True])
def test_a_server_begins_only_once_it_was_connected_all_the_while(
    supervisor: Supervisor, where: Where, silent: bool
) -> None:
    """The broker goes while it waits for others to speak up, with a broken connection or without a word."""
    (name,) = supervisor.running()
    link, presence = alone(where, "a")
    link._client.reconnect_delay_set(1, 1)
    until(lambda: presence._returned is not None)
    supervisor.pause(name) if silent else supervisor.stop(name)
    deadline = time.monotonic() + PATIENCE + 0.5
    while time.monotonic() < deadline:
        assert not link.claim()
        time.sleep(0.05)
    supervisor.resume(name) if silent else supervisor.restart(name)
    until(link.claim)
    assert presence.serves
    link.stop()


def test_a_sign_of_life_that_did_not_leave_is_given_again() -> None:
    """The connection may break when it is published: then it proves nothing, and is waited for in vain."""
    link = MqttLink(Where("127.0.0.1", 1), [], Inbox())
    link.watch(mock.Mock(serves=False, topic="t"))
    lost = mock.Mock(rc=mqtt.MQTT_ERR_NO_CONN)
    lost.is_published.side_effect = RuntimeError("Message publish failed")
    sent = mock.Mock(rc=mqtt.MQTT_ERR_SUCCESS)
    sent.is_published.side_effect = [False, True]
    link._client = mock.Mock()
    link._client.publish.side_effect = [lost, sent]
    assert [bool(link.claim()) for _ in range(4)] == [False, False, False, True]


def test_a_refusal_is_over_when_the_broker_takes_the_connection() -> None:
    link = MqttLink(Where("127.0.0.1", 1), ["t"], Inbox())
    client = mock.Mock()
    client.subscribe.return_value = 0, 1
    link._on_connect(client, None, None, 5)
    assert link.refused is not None and not link.connected.is_set()
    link._on_connect(client, None, None, 0)
    assert link.refused is None and link.connected.is_set()
