"""The MQTT connection of one process: it stays, or comes back."""

from __future__ import annotations

import logging
import queue
import ssl
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import paho.mqtt.client as mqtt

from fedgmr_plugin.errors import ConfigError, HostError
from fedgmr_plugin.protocol.notes import MOST_MESSAGE
from fedgmr_plugin.protocol.presence import Presence
from fedgmr_plugin.runtimes.devices.connection import Broker

_log = logging.getLogger(__name__)
#: At least once: the protocol does not mind duplicates, and half the packets of FedML's "exactly once".
_QOS = 1
#: Return code of a subscription that is refused (MQTT 3.1.1, section 3.9.3).
_DENIED = 128
_REFUSALS = {1: "protocol version", 2: "client identifier", 4: "user or password", 5: "not authorised"}


class MqttLink:
    """Publishes, and puts what arrives into a queue as (topic, payload).

    Args:
        broker: where.
        topics: to subscribe to.
        inbox: gets messages, and calls to be made in its owner's thread; a message that does not fit into it
            is dropped, for its sender to repeat, and counted in `dropped`.

    Raises:
        ConfigError: GMR-112 if a file of `broker` cannot be used.
    """

    def __init__(self, broker: Broker, topics: Sequence[str], inbox: queue.Queue[Any]) -> None:
        self._broker, self._topics, self._inbox = broker, list(topics), inbox
        self.refused: HostError | None = None
        self.connected = threading.Event()
        self.dropped = 0
        self._client = _Client(client_id=f"fedgmr-{uuid.uuid4().hex[:16]}", clean_session=True)
        self._client.max_queued_messages_set(100_000)
        self._client.reconnect_delay_set(1, 30)
        if broker.user is not None:
            self._client.username_pw_set(broker.user, broker.password)
        if broker.ca is not None or broker.certificate is not None:
            self._client.tls_set_context(_context(broker))
        self._was_connected, self._told = False, ""
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = lambda client, userdata: self._failed(sys.exc_info()[1])
        self._client.on_broken = self._failed
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message
        self._client.on_subscribe = self._on_subscribe
        self._asked: set[int | None] = set()  # subscriptions without which this process waits in vain
        self._renew_will: Callable[[], None] | None = None
        self._presence: Presence | None = None
        self._sign_of_life: mqtt.MQTTMessageInfo | None = None
        self._kept: Callable[[str, bytes], None] | None = None

    def start(self) -> None:
        """Connect, now or as soon as there is a broker; returns at once."""
        self._client.connect_async(self._broker.host, self._broker.port, self._broker.keepalive)
        self._client.loop_start()

    def say_when_gone(self, topic: str, payload: Callable[[], bytes]) -> None:
        """What the broker is to publish when the connection breaks; to be told before `start`.

        Args:
            payload: makes the message: now, and after each connect, as a call in the inbox, for the next one.
                Each is heard once.
        """
        self._renew_will = lambda: self._client.will_set(topic, payload(), qos=_QOS)
        self._renew_will()

    def watch(self, presence: Presence) -> None:
        """Ask for other servers after each connect, and answer theirs at once; to be told before `start`."""
        self._presence = presence

    def claim(self) -> bool:
        """Whether this process serves its run from now on: had anybody said that it does, it would be known.

        The broker acknowledges what it is sent in order. So when it acknowledges what was sent after the wait
        for others, the connection has lived through all of it.
        """
        if self._presence is None or self._presence.serves:
            return True
        sent = self._sign_of_life
        if not self._presence.is_alone():
            self._sign_of_life = None
        elif sent is None or sent.rc != mqtt.MQTT_ERR_SUCCESS:
            self._sign_of_life = self._client.publish(self._presence.topic, b"", qos=_QOS)  # nobody reads it
        elif sent.is_published():
            return self._presence.begin()
        return False

    def hear_kept(self, receive: Callable[[str, bytes], None]) -> None:
        """Have `receive` called, in the inbox's owner's thread, with what the broker kept; before `start`."""
        self._kept = receive

    def publish(self, topic: str, payload: bytes, *, at_most_once: bool = False) -> None:
        """Send a message, now or when the connection is back.

        Args:
            at_most_once: without a receipt, and so never again: it is lost where the connection breaks, or is
                not there, or the receiver's own breaks.
        """
        self._client.publish(topic, payload, qos=0 if at_most_once else _QOS)

    def keep(self, topic: str, payload: bytes) -> None:
        """Send a message that the broker keeps for whoever subscribes later; an empty one removes it."""
        self._client.publish(topic, payload, qos=_QOS, retain=True)

    def stop(self, patience: float = 5.0) -> None:
        """Disconnect when everything published has been acknowledged, or after `patience` seconds."""
        deadline = threading.Event()
        waited = 0.0
        while self.connected.is_set() and self._client._out_messages and waited < patience:
            deadline.wait(0.02)
            waited += 0.02
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, client: Any, userdata: Any, flags: Any, code: int) -> None:
        if code == 0:
            for start in range(0, len(self._topics), 100):
                _, mid = client.subscribe([(topic, _QOS) for topic in self._topics[start : start + 100]])
                self._asked.add(mid)
            if self._presence is not None:
                client.subscribe(self._presence.topic, _QOS)
                client.publish(self._presence.topic, self._presence.ask(), qos=_QOS)
            if self._renew_will is not None:
                self._inbox.put(self._renew_will)
            self.connected.set()
            self._was_connected, self._told = True, ""
            self.refused = None
            _log.info("connected to the broker at %s:%d", self._broker.host, self._broker.port)
        elif code in _REFUSALS:
            self.refused = HostError(
                "GMR-515", f"the broker at {self._broker.host}:{self._broker.port} refuses: {_REFUSALS[code]}"
            )
        else:
            self._failed(ConnectionError(f"it answers with return code {code}"))

    def _on_subscribe(self, client: Any, userdata: Any, mid: int, granted: Sequence[int]) -> None:
        if mid in self._asked and any(quality >= _DENIED for quality in granted):
            there = f"the broker at {self._broker.host}:{self._broker.port}"
            self.refused = HostError(
                "GMR-515", f"{there} does not let this process hear its topics: its rights"
            )
        self._asked.discard(mid)

    def _failed(self, error: BaseException | None) -> None:
        """A connection was not made, or broke."""
        problem = _problem(error)
        there = f"the broker at {self._broker.host}:{self._broker.port}"
        if problem is not None and not self._was_connected:  # else the right one may come back
            self.refused = HostError("GMR-515", f"{there} {problem}")
        elif str(error) != self._told:
            self._told = str(error)
            _log.warning("%s cannot be reached, trying again: %s%s", there, error, self._hint(error))

    def _hint(self, error: BaseException | None) -> str:
        """What a connection probably breaks of while TLS is agreed on."""
        speaks_tls = self._broker.ca is not None or self._broker.certificate is not None
        is_cut = isinstance(error, (ssl.SSLError, ConnectionResetError, BrokenPipeError))
        return "; does it speak TLS at this port?" if speaks_tls and is_cut else ""

    def _on_disconnect(self, client: Any, userdata: Any, code: int) -> None:
        was_connected = self.connected.is_set()
        self.connected.clear()
        if self._presence is not None:
            self._presence.lost()
        if code == 0:
            return
        if was_connected:
            _log.warning("the broker is gone; reconnecting")
        elif self.refused is None and not self._told:
            self._failed(ConnectionError("it answers nothing; does it want TLS (MQTT_TLS_CA), or not?"))

    def _on_message(self, client: Any, userdata: Any, message: Any) -> None:
        topic, payload = message.topic, message.payload
        if not payload or len(payload) > MOST_MESSAGE:
            return
        if message.retain:  # of another time, perhaps of another run
            if self._kept is not None:
                receive = self._kept
                self._inbox.put(lambda: receive(topic, payload))
            return
        if self._presence is not None and topic == self._presence.topic:
            answer = self._presence.heard(payload)
            if answer is not None:
                client.publish(topic, answer, qos=_QOS)
            return
        try:
            self._inbox.put_nowait((topic, payload))
        except queue.Full:
            self.dropped += 1
            level = logging.WARNING if self.dropped == 1 else logging.DEBUG  # no flood of the log
            _log.log(level, "more messages than can be read: dropped=%d", self.dropped)


class _Client(mqtt.Client):
    """paho's client, whose thread outlives every connection: paho's own dies of time-outs and TLS alerts."""

    on_broken: Callable[[OSError], None]

    def _sock_recv(self, bufsize: int) -> Any:
        with self._connection():
            return super()._sock_recv(bufsize)

    def _sock_send(self, buf: Any) -> Any:
        with self._connection():
            return super()._sock_send(buf)

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            yield
        except (BlockingIOError, ConnectionError):
            raise
        except OSError as error:
            self.on_broken(error)
            raise ConnectionError(str(error)) from error


def _context(broker: Broker) -> ssl.SSLContext:
    """What the broker is checked with, and what this process shows it."""
    try:
        context = ssl.create_default_context(cafile=broker.ca)
    except OSError as error:
        raise ConfigError("GMR-112", f"MQTT_TLS_CA={broker.ca}: {error}") from error
    if broker.certificate is not None:
        try:
            context.load_cert_chain(broker.certificate, broker.key)
        except OSError as error:
            files = f"MQTT_TLS_CERT={broker.certificate}, MQTT_TLS_KEY={broker.key}"
            raise ConfigError("GMR-112", f"{files}: {error}") from error
    return context


def _problem(error: BaseException | None) -> str | None:
    """What is wrong with a broker that will not be better the next time; None where it may."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and "ALERT" in str(error.reason):
        return f"refuses this process: {error.reason}"
    return None
