"""FedML's gRPC transport, for FedML's own clients and for ours: no broker, no store, objects travel along.

FedML's messages are pickled `Message` objects; they are read without unpickling. Ours are frames: ``FGM1``,
the length of a JSON head (4 bytes, little-endian), the head (message, topic, and key and length of each
object), and the objects.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import hmac
import json
import logging
import pickle
import queue
import socket
import struct
import threading
import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

from fedgmr_plugin.errors import ConfigError, HostError, WireError
from fedgmr_plugin.protocol.fedml_pickle import read_message, read_model
from fedgmr_plugin.protocol.notes import (
    FINISH,
    INIT,
    MODEL,
    MOST_MESSAGE,
    STATUS,
    SYNC,
    AnswerNote,
    FinishNote,
    StatusNote,
    TaskNote,
    note_of,
    parse,
    to_device,
    to_server,
)
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.runtimes.silos.objects import Objects

_log = logging.getLogger(__name__)
_MAGIC = b"FGM1"
#: Seconds for which a message is tried again while its receiver cannot be reached.
_PATIENCE = 60.0
#: Seconds that one try may take, besides those of its bytes at the slowest bandwidth, bytes a second.
_CALL_SECONDS, _SLOWEST = 30.0, 50_000
_PORT_HINT = (
    "End the process that has the port, or change this row of the file that grpc_ipconfig_path names."
)
#: gRPC lets processes share a port, and its connections at random, unless it is told not to.
_EXCLUSIVE = ("grpc.so_reuseport", 0)
#: Metadata of a call, by which a stranger's is refused before anything of it is read: HMAC-SHA-256 under the
#: silo's key (32 bytes) of ``fedgmr-call``, a line feed and the topic; the topic.
_CALL = "fedgmr-call-bin"
#: Longest head of a frame: a message, and escapes.
_MOST_HEAD = 4 * MOST_MESSAGE
_NOTES: dict[object, type[Any]] = {
    INIT: TaskNote,
    SYNC: TaskNote,
    MODEL: AnswerNote,
    STATUS: StatusNote,
    FINISH: FinishNote,
}
#: Why a frame is not read where FedML's own are heard, and a pickle where ours are.
_OTHERS = {True: ("GMR-741", "a frame among FedML's own clients"), False: ("GMR-748", "no frame of fedgmr")}


class Peer(NamedTuple):
    """A row of FedML's ``grpc_ipconfig_path``: where a process of the run is reached.

    Attributes:
        listens: address at which it listens, where that is another one (FedML's ``ingress_ip`` is `host`).
        rank: its ``--rank``, where the file says it.
    """

    host: str
    port: int
    listens: str = ""
    rank: int | None = None


def peers(path: str) -> dict[int, Peer]:
    """The processes of a run by FedML's id.

    Raises:
        ConfigError: GMR-112.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        found = [(int(row["eid"]), _peer(row)) for row in rows]
        if len(dict(found)) < len(found):
            raise ValueError("an eid has two rows")
        return dict(found)
    except (OSError, KeyError, ValueError, TypeError) as error:
        problem = f"grpc_ipconfig_path={path}: {type(error).__name__}: {error}"
        raise ConfigError("GMR-112", problem, where=path) from error


def _peer(row: Mapping[str, str]) -> Peer:
    """A row's process.

    Raises:
        ValueError, KeyError, TypeError: it has none.
    """
    listens, port = row["grpc_server_ip"], int(row["grpc_server_port"])
    if not listens or not 0 < port < 2**16:
        raise ValueError(f"grpc_server_ip={listens!r}, grpc_server_port={port} is no address")
    rank = int(row["rank"]) if row.get("rank") else None
    return Peer(row.get("ingress_ip") or listens, port, listens, rank)


def most_bytes(expected: Mapping[str, Any]) -> int:
    """Longest message that is read, and the most that is kept of one sender: twice the model, and 2 MiB."""
    return 2 * sum(_size(e) for e in expected.values()) + 2**21


class Outbox:
    """Messages for one receiver, in order; of several that have more than `most` bytes the oldest go."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._waiting: deque[tuple[bytes | None, object]] = deque()
        self._sent: object = None  # what the message is about that was given out last
        self._changed = threading.Condition()

    def put(self, data: bytes | None, about: object = None) -> None:
        """Add a message; None is the last.

        Args:
            about: what `holds` finds it by; None for nothing.
        """
        with self._changed:
            self._waiting.append((data, about))
            self._bytes += len(data or b"")
            while self._bytes > self._most and len(self._waiting) > 1:
                self._bytes -= len(self._waiting.popleft()[0] or b"")
            self._changed.notify()

    def get(self) -> bytes | None:
        """Wait for the next message; the last one has been sent, or given up."""
        with self._changed:
            self._sent = None
            self._changed.wait_for(lambda: self._waiting)
            data, self._sent = self._waiting.popleft()
            self._bytes -= len(data or b"")
            return data

    def holds(self, about: object) -> bool:
        """Whether such a message waits, or is on its way."""
        with self._changed:
            return about is not None and any(about == a for a in (self._sent, *(a for _, a in self._waiting)))

    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting


class GrpcLink:
    """As `fedgmr_plugin.runtimes.devices.mqtt.MqttLink`, over FedML's gRPC service.

    Nothing is kept of a message before its note is found to be authentic and to announce the objects that
    come with it. A refused message is counted in `dropped` under its code.

    Args:
        run, me, server: FedML's ``run_id``, this process's id and the server's.
        peers: where everybody listens.
        inbox: gets what arrives as (topic, payload).
        objects: what is sent along, and what came along.
        expected: names, shapes and types of the model, for FedML's pickles.
        hears: topics of those who may send, and the key with which each signs; None where nobody does.
        plain: whether the others are FedML's own.
    """

    def __init__(
        self,
        run: str,
        me: int,
        server: int,
        peers: Mapping[int, Peer],
        inbox: queue.Queue[Any],
        objects: Objects,
        expected: Mapping[str, Any],
        hears: Mapping[str, bytes | None],
        *,
        plain: bool,
    ) -> None:
        self.refused: HostError | None = None
        self.connected = threading.Event()
        self._run, self._me, self._server_id = run, me, server
        self._peers, self._inbox, self._objects, self._plain = dict(peers), inbox, objects, plain
        self._expected, self._hears = expected, dict(hears)
        self.dropped: Counter[str] = Counter()
        self._outboxes: dict[int, Outbox] = {}
        self._stopped = threading.Event()
        self._grpc, self._messages, self._service = _grpc()
        self._most = most_bytes(expected)
        self._listener: Any = None

    def start(self) -> None:
        """Listen.

        Raises:
            HostError: GMR-517 if another process has the port, GMR-515 if it cannot be had.
        """
        options = [
            ("grpc.max_receive_message_length", self._most),
            ("grpc.max_send_message_length", self._most),
            _EXCLUSIVE,
        ]
        me = self._peers[self._me]
        host = me.listens or me.host
        if _is_taken(host, me.port):
            who = "the server" if self._me == self._server_id else f"silo {self._me}"
            problem = (
                f"another process listens at {host}:{me.port}: {who} of run_id={self._run}, or some other"
            )
            raise HostError("GMR-517", problem, hint=_PORT_HINT)
        waiting = max(64, 4 * len(self._peers))  # others are told to come back later
        self._listener = self._grpc.server(
            futures.ThreadPoolExecutor(4), options=options, maximum_concurrent_rpcs=waiting
        )
        self._listener.add_generic_rpc_handlers((self._handler(),))
        try:
            self._listener.add_insecure_port(f"{host}:{me.port}")
        except RuntimeError as error:
            problem = f"{host}:{me.port} cannot be listened on"
            raise HostError("GMR-515", problem, hint=_PORT_HINT) from error
        self._listener.start()
        self.connected.set()

    def claim(self) -> bool:
        """Whether this process serves its run from now on: it has the port, alone."""
        return True

    def say_when_gone(self, topic: str, payload: Callable[[], bytes]) -> None:
        """There is no broker that could say it."""

    def publish(self, topic: str, payload: bytes, *, at_most_once: bool = False) -> None:
        """Send a message to whom its topic names, with the objects that it speaks of.

        A task, a model or an answer that is on its way already is not sent again: links are slow, and what
        is sent to a silo that is away waits for it.

        Args:
            at_most_once: not promised here: a call that breaks before its answer is made again.
        """
        message = json.loads(payload)
        receiver = int(message["receiver"])
        if receiver not in self._outboxes:
            box = Outbox(self._most)
            self._outboxes[receiver] = box
            threading.Thread(
                target=self._send_all, args=(receiver, box), name=f"fedgmr-grpc-{receiver}", daemon=True
            ).start()
        box = self._outboxes[receiver]
        if self._plain:
            model = message.get("model_params")
            if not box.holds(model):
                box.put(self._pickled(message), model)
            return
        note = note_of(message, topic, None, _NOTES[message["msg_type"]])
        about = (type(note), note.run, note.dispatch) if isinstance(note, (TaskNote, AnswerNote)) else None
        if not box.holds(about):
            box.put(self._framed(topic, payload, _announced(note)), about)

    def keep(self, topic: str, payload: bytes) -> None:
        """Nothing is kept: there is no broker."""

    def stop(self, patience: float = 5.0) -> None:
        """Stop listening, when what was published has been sent, or after `patience` seconds."""
        if self._stopped.is_set():
            return
        deadline = time.monotonic() + patience
        while any(not box.empty() for box in self._outboxes.values()) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(1.0)  # whoever said farewell last is still waiting for our answer, and dies without it
        self._stopped.set()
        for box in self._outboxes.values():
            box.put(None)
        if self._listener is not None:
            self._listener.stop(3.0).wait(5.0)

    # -- sending --------------------------------------------------------------------------------------

    def _send_all(self, receiver: int, box: Outbox) -> None:
        while (data := box.get()) is not None:
            self._send(receiver, data)

    def _send(self, receiver: int, data: bytes) -> None:
        """Send, again and again while nobody is there; given up in the end, for the protocol to repeat."""
        peer = self._peers.get(receiver)
        if peer is None:
            _log.warning("process %d is not in grpc_ipconfig_path", receiver)
            return
        deadline, wait = time.monotonic() + _PATIENCE, 0.25
        options = [("grpc.max_send_message_length", self._most), ("grpc.enable_http_proxy", 0)]
        seconds = _CALL_SECONDS + len(data) / _SLOWEST
        request = self._messages.CommRequest()
        request.client_id, request.message = self._me, data
        while not self._stopped.is_set():
            with self._grpc.insecure_channel(f"{peer.host}:{peer.port}", options=options) as channel:
                try:
                    stub = self._service.gRPCCommManagerStub(channel)
                    stub.sendMessage(request, timeout=seconds, metadata=self._known_by(receiver))
                    return
                except self._grpc.RpcError as error:
                    if time.monotonic() > deadline:
                        _log.warning("process %d cannot be reached: %s", receiver, error)
                        return
            self._stopped.wait(wait)
            wait = min(2 * wait, 5.0)

    def _pickled(self, message: dict[str, Any]) -> bytes:
        """As FedML's own processes send it."""
        from fedml.core.distributed.communication.message import Message

        me = self._peers[self._me]
        sent = Message(message["msg_type"], message["sender"], message["receiver"])
        key = message.get("model_params")
        for name, value in message.items():
            sent.add_params(name, value)
        if key:
            content = self._objects.get(Piece(str(key), self._most, ""))
            sent.add_params("model_params", read_model(content, self._expected))
        for name, value in {"sender_rank": 0, "sender_ip": me.host, "sender_port": me.port}.items():
            sent.add_params(name, value)
        return pickle.dumps(sent)

    def _framed(self, topic: str, payload: bytes, pieces: Sequence[Piece]) -> bytes:
        contents = [self._objects.get(piece) for piece in pieces]
        head = {
            "topic": topic,
            "payload": payload.decode(),
            "objects": [[piece.key, len(content)] for piece, content in zip(pieces, contents, strict=True)],
        }
        text = json.dumps(head).encode()
        return b"".join([_MAGIC, struct.pack("<I", len(text)), text, *contents])

    # -- receiving ------------------------------------------------------------------------------------

    def _arrived(self, data: bytes) -> None:
        """In a thread of gRPC's: what is sound goes to the inbox."""
        try:
            is_frame = data[:4] == _MAGIC
            if is_frame == self._plain:
                raise WireError(*_OTHERS[is_frame])
            topic, payload = self._unframed(data) if is_frame else self._unpickled(data)
            self._inbox.put_nowait((topic, payload))
        except WireError as error:
            self._drop(error)
        except (ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
            self._drop(WireError("GMR-741", f"not a message: {type(error).__name__}"))
        except queue.Full:
            self._drop(WireError("GMR-745", "more messages than can be read"))

    def _handler(self) -> Any:
        """FedML's service; a message is asked for, as a stream of one, when it is known who calls."""

        def send(requests: Iterator[Any], context: Any) -> Any:
            if not self._is_known(dict(context.invocation_metadata()).get(_CALL, b"")):
                self._drop(WireError("GMR-743", f"a call of {context.peer()}, which has no key of this run"))
                context.abort(self._grpc.StatusCode.UNAUTHENTICATED, "GMR-743")
            for request in requests:
                self._arrived(request.message)
                break
            return self._messages.CommResponse()

        method = self._grpc.stream_unary_rpc_method_handler(
            send, self._messages.CommRequest.FromString, self._messages.CommResponse.SerializeToString
        )
        return self._grpc.method_handlers_generic_handler("gRPCCommManager", {"sendMessage": method})

    def _is_known(self, given: bytes) -> bool:
        """Whether somebody calls who has a key of this run; everybody where nobody signs."""
        if None in self._hears.values():
            return True
        topic = given[32:].decode(errors="replace")
        key = self._hears.get(topic)
        return key is not None and hmac.compare_digest(given[:32], _call_mac(key, topic))

    def _known_by(self, receiver: int) -> tuple[tuple[str, bytes], ...]:
        """The metadata with which this process calls another one."""
        if self._me == self._server_id:
            hears, topic = to_server(self._run, receiver), to_device(self._run, self._me, receiver)
        else:
            hears, topic = to_device(self._run, receiver, self._me), to_server(self._run, self._me)
        key = self._hears.get(hears)
        return () if key is None else ((_CALL, _call_mac(key, topic) + topic.encode()),)

    def _drop(self, refusal: WireError) -> None:
        self.dropped[refusal.code] += 1
        level = logging.WARNING if self.dropped[refusal.code] == 1 else logging.DEBUG  # no flood of the log
        _log.log(level, "a message is dropped: %s", refusal)

    def _unframed(self, data: bytes) -> tuple[str, bytes]:
        topic, text, objects = _parted(memoryview(data))
        if topic not in self._hears:
            raise WireError("GMR-742", f"topic={topic[:80]!r} is nobody's whom this process hears")
        payload = text.encode()
        message = parse(payload)
        kind = _NOTES.get(message.get("msg_type"))
        if kind is None:
            raise WireError("GMR-741", f"msg_type={str(message.get('msg_type'))[:20]}")
        pieces = {p.key: p for p in _announced(note_of(message, topic, self._hears[topic], kind))}
        for key, content in objects:
            if key not in pieces or len(content) != pieces[key].size:
                raise WireError("GMR-746", f"key={key[:80]!r} of {len(content)} bytes was not announced")
        for key, content in objects:
            self._objects.receive(topic, pieces[key], bytes(content))
        return topic, payload

    def _unpickled(self, data: bytes) -> tuple[str, bytes]:
        found = read_message(data, self._expected)
        model = found.pop("model_params", None)
        sender = int(found["sender"])
        origin = to_server(self._run, sender)
        topic = origin
        if self._me != self._server_id:
            topic = to_device(self._run, self._server_id, self._me)
        if topic not in self._hears:
            raise WireError("GMR-742", f"sender={sender} is nobody whom this process hears")
        if sender not in self._peers and "sender_ip" in found:
            self._peers[sender] = Peer(str(found["sender_ip"]), int(found["sender_port"]))
        if model is not None:
            key = f"{topic}_{uuid.uuid4()}"
            content = pickle.dumps(OrderedDict(model))
            self._objects.receive(topic, Piece(key, len(content), ""), content)
            found["model_params"] = key
        payload = json.dumps(found, default=str).encode()
        if len(payload) > MOST_MESSAGE:
            raise WireError("GMR-741", f"bytes={len(payload)} are more than {MOST_MESSAGE}")
        return topic, payload


def _call_mac(key: bytes, topic: str) -> bytes:
    return hmac.new(key, f"fedgmr-call\n{topic}".encode(errors="replace"), hashlib.sha256).digest()


def _is_taken(host: str, port: int) -> bool:
    """Whether a process listens at one of the addresses of `host`; gRPC is content with one that is free."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return False  # gRPC tells it better
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the past may linger
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return True
    return False


def _parted(data: memoryview) -> tuple[str, str, list[tuple[str, memoryview]]]:
    """Topic, message and objects of a frame.

    Raises:
        WireError: GMR-701, GMR-741; ValueError, KeyError, TypeError or struct.error if it is none.
    """
    (length,) = struct.unpack_from("<I", data, 4)
    if length > _MOST_HEAD:
        raise WireError("GMR-741", f"bytes={length} of a head, but {_MOST_HEAD} are the most")
    head = json.loads(bytes(data[8 : 8 + length]))
    at = 8 + length
    objects: list[tuple[str, memoryview]] = []
    for key, size in head["objects"]:
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(data) - at:
            raise WireError("GMR-701", f"object={str(key)[:40]} is cut short")
        objects.append((str(key), data[at : at + size]))
        at += size
    return str(head["topic"]), str(head["payload"]), objects


def _announced(note: StatusNote | AnswerNote | TaskNote | FinishNote | None) -> tuple[Piece, ...]:
    """The objects that a note speaks of."""
    if isinstance(note, TaskNote):
        return (*note.values, *note.masks)
    return (note.update,) if isinstance(note, AnswerNote) else ()


def _size(expected: Any) -> int:
    shape, dtype = expected
    count = 1
    for n in shape:
        count *= n
    return count * int(dtype.itemsize)


def _grpc() -> tuple[Any, Any, Any]:
    """gRPC and FedML's generated modules.

    Raises:
        HostError: GMR-516 without gRPC.
    """
    try:
        import grpc
        from fedml.core.distributed.communication.grpc import grpc_comm_manager_pb2 as messages
        from fedml.core.distributed.communication.grpc import grpc_comm_manager_pb2_grpc as service
    except ImportError as error:
        raise HostError("GMR-516", f"gRPC cannot be imported: {error}") from error
    return grpc, messages, service
