"""The MQTT connection of one process, at a real broker: over TLS, with passwords, and broken."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedgmr_plugin.protocol.desk import Desk
from fedgmr_plugin.protocol.notes import STATUS, StatusNote, sign, to_server
from fedgmr_plugin.runtimes.devices.connection import Broker as Where
from fedgmr_plugin.runtimes.devices.inbox import Inbox
from fedgmr_plugin.runtimes.devices.mqtt import MqttLink
from fedgmr_plugin.runtimes.local import broker as broker_module
from fedgmr_plugin.runtimes.local.broker import Broker
from fedgmr_plugin.runtimes.local.processes import Supervisor

pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
if broker_module.find("mosquitto") is None:
    pytest.skip("mosquitto is not installed (apt-get install mosquitto)", allow_module_level=True)

KEYS = {1: bytes(32)}


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
