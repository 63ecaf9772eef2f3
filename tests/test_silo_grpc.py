"""What comes over gRPC: nothing of a stranger is kept, and of a silo no more than a bound."""

from __future__ import annotations

import hashlib
import json
import pickle
import queue
import socket
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.errors import ConfigError, HostError, WireError
from fedgmr_plugin.protocol.fedml_pickle import read_model
from fedgmr_plugin.protocol.notes import (
    MODEL,
    MOST_MESSAGE,
    STATUS,
    AnswerNote,
    StatusNote,
    sign,
    to_device,
    to_server,
)
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.runtimes import host
from fedgmr_plugin.runtimes.devices.hands import ThreadedHands
from fedgmr_plugin.runtimes.devices.inbox import Inbox
from fedgmr_plugin.runtimes.silos.objects import MOST_OBJECTS, Objects

pytest.importorskip("grpc", reason="grpcio is not installed")
import grpc

from fedgmr_plugin.runtimes.local.ports import free_port
from fedgmr_plugin.runtimes.silos import grpc as grpc_module
from fedgmr_plugin.runtimes.silos.grpc import GrpcLink, Outbox, Peer, most_bytes, peers

host.prepare()

from fedgmr_plugin.runtimes.silos import client  # noqa: E402
from fedgmr_plugin.runtimes.silos import server as server_module  # noqa: E402

KEYS = {n: bytes([n]) * 32 for n in (1, 2)}
TOKEN = "0123456789abcdef"
MODEL_BYTES = 4 * (50 * 40 + 40)


def link(keys: dict[int, bytes] | None = KEYS, *, plain: bool = False) -> GrpcLink:
    """A server's, of two silos; it is not started."""
    state = nn.Linear(50, 40).state_dict()
    expected = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
    hears = {to_server("7", n): None if keys is None else keys[n] for n in (1, 2)}
    rows = {n: Peer("127.0.0.1", 1) for n in (0, 1, 2)}
    objects = Objects(most_bytes(expected))
    return GrpcLink("7", 0, 0, rows, Inbox(), objects, expected, hears, plain=plain)


def piece_of(content: bytes, key: str = "answer") -> Piece:
    return Piece(key, len(content), hashlib.sha256(content).hexdigest())


def frame(payload: bytes, objects: list[tuple[str, bytes]], topic: str) -> bytes:
    head = {"topic": topic, "payload": payload.decode(), "objects": [[k, len(c)] for k, c in objects]}
    text = json.dumps(head).encode()
    return b"".join([b"FGM1", struct.pack("<I", len(text)), text, *(c for _, c in objects)])


def answer(content: bytes, sequence: int, key: bytes | None, device: int = 1, name: str = "answer") -> bytes:
    topic = to_server("7", device)
    note = AnswerNote(TOKEN, device, sequence, sequence, piece_of(content, name))
    return frame(sign(note, topic, key, {"msg_type": MODEL}), [(name, content)], topic)


def test_an_authentic_answer_is_there_to_be_fetched() -> None:
    server = link()
    server._arrived(answer(b"update", 1, KEYS[1]))
    assert server._inbox.qsize() == 1 and server._objects.get(piece_of(b"update")) == b"update"
    server._objects.delete(["answer"])
    assert server._objects.held() == 0


@pytest.mark.parametrize(
    "what", ["unsigned", "another key", "other topic", "not announced", "no note", "longer"]
)
def test_nothing_of_a_stranger_is_kept(what: str) -> None:
    server = link()
    topic, content = to_server("7", 1), bytes(500)
    signed = sign(AnswerNote(TOKEN, 1, 1, 1, piece_of(content)), topic, KEYS[1], {"msg_type": MODEL})
    data, code = {
        "unsigned": (answer(content, 1, None), "GMR-743"),
        "another key": (answer(content, 1, KEYS[2]), "GMR-743"),
        "other topic": (frame(signed, [("answer", content)], to_server("7", 9)), "GMR-742"),
        "not announced": (frame(signed, [("answer", content), ("more", content)], topic), "GMR-746"),
        "no note": (frame(b'{"msg_type": 3}', [("answer", content)], topic), "GMR-746"),
        "longer": (frame(signed, [("answer", content + b"x")], topic), "GMR-746"),
    }[what]
    server._arrived(data)
    assert server._objects.held() == 0 and server._inbox.qsize() == 0
    assert dict(server.dropped) == {code: 1}


@pytest.mark.parametrize("keys", [KEYS, None])
def test_what_one_silo_sends_is_bounded_by_twice_the_model(keys: dict[int, bytes] | None) -> None:
    """The oldest goes; what another silo sent is still there."""
    server = link(keys)
    own = None if keys is None else KEYS[1]
    server._arrived(answer(b"theirs", 1, None if keys is None else KEYS[2], 2, "two"))
    most = 2 * MODEL_BYTES + 2**21
    for n in range(60):
        server._arrived(answer(bytes([n]) * 200_000, n, own, name=f"answer-{n}"))
        assert server._objects.held() <= most + len(b"theirs")
    assert server._objects.get(piece_of(b"theirs", "two")) == b"theirs"
    last = piece_of(bytes([59]) * 200_000, "answer-59")
    assert len(server._objects.get(last)) == 200_000
    with pytest.raises(WireError, match="GMR-746"):
        server._objects.get(piece_of(bytes(200_000), "answer-0"))
    for n in range(2 * MOST_OBJECTS):
        server._arrived(answer(b"%d" % n, n, own, name=f"small-{n}"))
    assert len(server._objects) <= MOST_OBJECTS + 1


def test_a_clients_own_objects_are_bounded_too() -> None:
    objects = Objects(own=1000)
    for n in range(10):
        objects.put(piece_of(bytes([n]) * 400, f"a{n}"), bytes([n]) * 400)
        objects.put(piece_of(bytes([n]) * 400, f"a{n}"), bytes([n]) * 400)  # again: counted once
        assert objects.held() <= 1000
    assert objects.get(piece_of(bytes([9]) * 400, "a9")) == bytes([9]) * 400


def test_what_a_server_sends_is_in_its_checkpoint() -> None:
    """No store keeps it: silos would wait for it in vain, once the server was killed."""
    server = link()
    hands = ThreadedHands(server._objects, server, server._inbox)
    server._objects.put(piece_of(b"increment", "values-0"), b"increment")
    server._objects.receive("topic", piece_of(b"answer"), b"answer")
    hands.put(piece_of(b"mask", "mask-0"), b"mask")
    assert hands.unsent() == [
        (piece_of(b"increment", "values-0"), b"increment"),
        (piece_of(b"mask", "mask-0"), b"mask"),
    ]
    server._objects.delete(["values-0"])
    assert [piece.key for piece, _ in hands.unsent()] == ["mask-0"]


def test_what_waits_for_somebody_who_is_away_is_bounded() -> None:
    """A silo repeats its answer every heartbeat; what is sent when the server is back is the newest."""
    outbox = Outbox(1000)
    for n in range(100):
        outbox.put(bytes([n]) * 300)
    found = []
    while not outbox.empty():
        found.append(outbox.get())
    assert found == [bytes([n]) * 300 for n in (97, 98, 99)]
    outbox.put(bytes(5000))  # one alone may be longer
    assert outbox.get() == bytes(5000)
    outbox.put(None)
    assert outbox.get() is None


def test_bombs_are_dropped() -> None:
    server = link()
    topic = to_server("7", 1)
    heads: list[Any] = [
        [],
        {},
        {"topic": topic},
        {"topic": topic, "payload": "{}", "objects": [["k", 2**60]]},
    ]
    heads += [{"topic": topic, "payload": "x" * (MOST_MESSAGE + 1), "objects": []}, "[" * 50_000]
    for head in heads:
        text = head.encode() if isinstance(head, str) else json.dumps(head).encode()
        server._arrived(b"FGM1" + struct.pack("<I", len(text)) + text)
    for data in (b"", b"FGM1", b"FGM1\xff\xff\xff\xff{}", b"FGM1" + struct.pack("<I", 2**21) + b" " * 2**21):
        server._arrived(data)
    assert server._objects.held() == 0 and server._inbox.qsize() == 0
    assert sum(server.dropped.values()) == len(heads) + 4


def stock(sender: int, state: Any) -> bytes:
    """As FedML's own clients pickle a message."""
    message = pytest.importorskip("fedml.core.distributed.communication.message").Message(3, sender, 0)
    message.add_params("model_params", state)
    message.add_params("num_samples", 5)
    for name, value in {"sender_ip": "10.0.0.1", "sender_port": 5}.items():
        message.add_params(name, value)
    return pickle.dumps(message)


def test_fedmls_own_clients_are_bounded_and_no_stranger_gets_a_row() -> None:
    server = link(None, plain=True)
    state = OrderedDict(nn.Linear(50, 40).state_dict())
    for _ in range(300):
        server._arrived(stock(1, state))
    assert server._objects.held() <= 2 * MODEL_BYTES + 2**21
    before = server._objects.held()
    server._arrived(stock(9, state))
    assert server._objects.held() == before and set(server._peers) == {0, 1, 2}
    assert server.dropped["GMR-742"] == 1
    topic, payload = server._inbox.get_nowait()
    key = json.loads(payload)["model_params"]
    assert topic == to_server("7", 1) and key.startswith(f"{topic}_")
    _, payload = [server._inbox.get_nowait() for _ in range(server._inbox.qsize())][-1]
    key = json.loads(payload)["model_params"]
    found = read_model(server._objects.get(Piece(key, 2**20, "")), server._expected)
    assert torch.equal(found["weight"], state["weight"])


@pytest.mark.parametrize("plain", [True, False])
def test_the_other_kind_of_message_is_not_read(plain: bool) -> None:
    server = link(None, plain=plain)
    data = answer(b"update", 1, None) if plain else stock(1, nn.Linear(50, 40).state_dict())
    server._arrived(data)
    assert server._objects.held() == 0 and server._inbox.qsize() == 0
    assert dict(server.dropped) == {"GMR-741" if plain else "GMR-748": 1}


def test_the_inbox_holds_so_many_bytes_of_messages_and_every_call() -> None:
    inbox = Inbox(most=10_000)
    inbox.put_nowait(("t", b"x" * 5000))
    with pytest.raises(queue.Full):
        inbox.put_nowait(("t", b"x" * 5000))
    inbox.put(lambda: None)
    assert inbox.get_nowait() == ("t", b"x" * 5000)
    inbox.put_nowait(("t", b"x" * 5000))
    assert callable(inbox.get(timeout=1)) and inbox.get_nowait()[0] == "t" and inbox.empty()
    with pytest.raises(queue.Full):
        for _ in range(200):
            inbox.put_nowait(("t", b""))


def test_messages_beyond_the_inbox_are_dropped_with_a_code() -> None:
    server = link()
    topic = to_server("7", 1)
    for n in range(40):
        note = StatusNote("7", 1, n, "ONLINE")
        payload = sign(note, topic, KEYS[1], {"msg_type": STATUS, "padding": "x" * 200_000})
        server._inbox._most = 2**20
        server._arrived(frame(payload, [], topic))
    assert server._inbox.qsize() == 5 and dict(server.dropped) == {"GMR-745": 35}


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("0,0,127.0.0.1,1\n1,1,127.0.0.1,2\n1,2,127.0.0.1,3\n", "two rows"),
        ("0,0,127.0.0.1,65536\n", "grpc_server_port=65536"),
        ("0,0,127.0.0.1,0\n", "grpc_server_port=0"),
        ("0,0,,8890\n", "grpc_server_ip=''"),
        ("0,0\n", "TypeError"),
        ("0,0,127.0.0.1,x\n", "ValueError"),
    ],
)
def test_a_row_that_is_no_address_is_refused(tmp_path: Path, rows: str, problem: str) -> None:
    file = tmp_path / "peers.csv"
    file.write_text(f"eid,rank,grpc_server_ip,grpc_server_port\n{rows}")
    with pytest.raises(ConfigError, match=problem) as refused:
        peers(str(file))
    assert refused.value.code == "GMR-112"


def test_a_process_listens_where_its_row_says_and_is_reached_at_its_ingress(tmp_path: Path) -> None:
    """`ingress_ip` is of the router before it: no address of this machine."""
    rows = tmp_path / "peers.csv"
    row = f"0,0,127.0.0.1,{free_port()},192.0.2.1"
    rows.write_text(f"eid,rank,grpc_server_ip,grpc_server_port,ingress_ip\n{row}\n1,1,127.0.0.1,1,\n")
    found = peers(str(rows))
    assert found[0].host == "192.0.2.1" and found[1].host == "127.0.0.1"
    server = link()
    server._peers = found
    server.start()
    with socket.create_connection(("127.0.0.1", found[0].port), timeout=5):
        pass
    server.stop(0.0)


@pytest.mark.parametrize(
    ("first", "second", "who"),
    [
        (("127.0.0.1", 0), ("127.0.0.1", 0), "the server of run_id=7"),
        (("127.0.0.1", 1), ("127.0.0.1", 1), "silo 1 of run_id=7"),
        (("0.0.0.0", 0), ("127.0.0.1", 0), "the server"),
        (("127.0.0.1", 0), ("0.0.0.0", 0), "the server"),
        (("127.0.0.1", 0), ("localhost", 0), "the server"),
        (("localhost", 0), ("127.0.0.1", 0), "the server"),
        (None, ("127.0.0.1", 0), "the server"),
    ],
)
def test_a_port_is_of_one_process(first: tuple[str, int] | None, second: tuple[str, int], who: str) -> None:
    """gRPC would let two share it. The first may be FedML's own, which shares (None)."""
    port = free_port()
    if first is None:
        shared = grpc.server(futures.ThreadPoolExecutor(1))
        shared.add_insecure_port(f"127.0.0.1:{port}")
        shared.start()
        stop = lambda: shared.stop(0).wait()  # noqa: E731
    else:
        own = at(*first, port)
        own.start()
        stop = lambda: own.stop(0.0)  # noqa: E731
    with pytest.raises(HostError, match=f"another process listens at {second[0]}:{port}: {who}") as found:
        at(*second, port).start()
    assert found.value.code == "GMR-517"
    stop()
    again = at(*second, port)
    again.start()
    again.stop(0.0)


def test_of_two_that_look_at_once_one_gets_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds it free before the other listens."""
    monkeypatch.setattr(grpc_module, "_is_taken", lambda host, port: False)
    port = free_port()
    first, second = at("127.0.0.1", 0, port), at("127.0.0.1", 0, port)
    first.start()
    with pytest.raises(HostError, match="GMR-515"):
        second.start()
    first.stop(0.0)


def at(host: str, me: int, port: int) -> GrpcLink:
    """A process's, at an address; not started."""
    made = link()
    made._peers[me], made._me = Peer(host, port), me
    if me:
        made._hears = {to_device("7", 0, me): KEYS[me]}
    return made


def test_calls_of_strangers_that_never_end_keep_nobody_from_being_heard() -> None:
    """Without a key they end before anything of them is read; four would be all that is read at a time."""
    server, silo, never = at("127.0.0.1", 0, free_port()), at("127.0.0.1", 1, free_port()), threading.Event()
    server.start()
    address = f"127.0.0.1:{server._peers[0].port}"
    silo._peers[0] = server._peers[0]

    def nothing() -> Iterator[bytes]:
        never.wait()
        yield from ()

    with grpc.insecure_channel(address) as channel:
        call: Any = channel.stream_unary("/gRPCCommManager/sendMessage", lambda sent: sent, lambda got: got)
        name, own = silo._known_by(0)[0]
        metadata = [None, [(name, own[:-1] + b"2")], [(name, b"")], [(name, b"\xff" * 64)]]
        slow = [call.future(nothing(), metadata=metadata[n % 4]) for n in range(12)]
        for future in slow:
            with suppress(grpc.FutureTimeoutError):
                assert future.exception(timeout=1).code() is grpc.StatusCode.UNAUTHENTICATED
        sending = threading.Thread(target=silo._send, args=(0, answer(b"x", 1, KEYS[1])), daemon=True)
        sending.start()
        sending.join(5)
        assert not sending.is_alive() and server._inbox.qsize() == 1
        assert server.dropped == {"GMR-743": 12}
        never.set()
    server.stop(0.0)
    silo.stop(0.0)


@pytest.mark.parametrize("keys", [KEYS, None])
def test_server_and_silos_know_each_others_calls(keys: dict[int, bytes] | None) -> None:
    server, silo = link(keys), link(keys)
    silo._me, silo._hears = 1, {to_device("7", 0, 1): None if keys is None else keys[1]}
    for caller, called, id_ in ((server, silo, 1), (silo, server, 0)):
        assert called._is_known(dict(caller._known_by(id_)).get("fedgmr-call-bin", b""))
    assert server._is_known(dict(server._known_by(1)).get("fedgmr-call-bin", b"")) == (keys is None)


def test_a_large_message_has_the_time_that_a_slow_link_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would be begun anew again and again, and never arrive."""
    assert (grpc_module._CALL_SECONDS, grpc_module._SLOWEST) == (30.0, 50_000), "as docs/guarantees.md has it"
    monkeypatch.setattr(grpc_module, "_CALL_SECONDS", 0.5)
    monkeypatch.setattr(grpc_module, "_PATIENCE", 1.0)
    receiver, sender = at("127.0.0.1", 0, free_port()), at("127.0.0.1", 1, free_port())
    receiver.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        slow = threading.Thread(target=trickle, args=(listener, receiver._peers[0].port), daemon=True)
        slow.start()
        sender._peers[0] = Peer("127.0.0.1", listener.getsockname()[1])
        message = answer(b"x" * 1_500_000, 1, KEYS[1])
        sender._send(0, message)
    assert receiver._inbox.qsize() == 1 and not receiver.dropped
    receiver.stop(0.0)
    sender.stop(0.0)


def test_a_model_that_waits_for_a_silo_that_is_away_does_not_wait_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of FedML's own, which train whatever they are sent, as often as they are sent it."""
    monkeypatch.setattr(GrpcLink, "_send_all", lambda *given: None)
    server = link(None, plain=True)
    kept = pickle.dumps(OrderedDict(nn.Linear(50, 40).state_dict()))
    for key in ("a", "b"):
        server._objects.put(Piece(key, len(kept), ""), kept)
    told = {"msg_type": 2, "sender": 0, "receiver": 1}
    for fields in ({"model_params": "a"}, {}, {"model_params": "a"}, {}, {"model_params": "b"}):
        server.publish(to_device("7", 0, 1), json.dumps({**told, **fields}).encode())
    assert [about for _, about in server._outboxes[1]._waiting] == ["a", None, None, "b"]


def test_what_is_on_its_way_over_a_slow_link_is_not_sent_again() -> None:
    """A heartbeat repeats an answer, a reminder a task, while the first is still being sent."""
    receiver, sender = at("127.0.0.1", 0, free_port()), at("127.0.0.1", 1, free_port())
    receiver.start()
    topic = to_server("7", 1)
    sender._objects = Objects()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        slow = threading.Thread(target=trickle, args=(listener, receiver._peers[0].port), daemon=True)
        slow.start()
        sender._peers[0] = Peer("127.0.0.1", listener.getsockname()[1])
        sequence = 0

        def give(dispatch: int) -> None:
            nonlocal sequence
            sequence += 1
            content = bytes([dispatch]) * 500_000
            piece = piece_of(content, f"answer-{dispatch}")
            sender._objects.put(piece, content)
            note = AnswerNote(TOKEN, 1, sequence, dispatch, piece)
            sender.publish(topic, sign(note, topic, KEYS[1], {"msg_type": MODEL, "receiver": 0}))

        for _ in range(4):
            give(1)
            time.sleep(0.1)
        give(2)
        give(2)
        time.sleep(4.0)
        assert receiver._inbox.qsize() == 2, "one of each"
        give(2)
        time.sleep(2.5)
        assert receiver._inbox.qsize() == 3, "it is heard again when it may have been lost"
    receiver.stop(0.0)
    sender.stop(0.0)


def trickle(listener: socket.socket, port: int) -> None:
    """Forward connections, 500 kB/s towards `port`."""
    while True:
        try:
            near, _ = listener.accept()
        except OSError:
            return
        far = socket.create_connection(("127.0.0.1", port))

        def pass_on(source: socket.socket, sink: socket.socket, wait: float) -> None:
            with suppress(OSError):
                while data := source.recv(25_000):
                    sink.sendall(data)
                    time.sleep(wait)
                sink.shutdown(socket.SHUT_WR)

        for ends in ((near, far, 0.05), (far, near, 0.0)):
            threading.Thread(target=pass_on, args=ends, daemon=True).start()


def test_a_silo_without_a_row_or_with_noise_that_nobody_adds_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "peers.csv").write_text("eid,rank,grpc_server_ip,grpc_server_port\n0,0,127.0.0.1,1\n")
    given = {
        "run_id": "7",
        "rank": 1,
        "client_id_list": "[1]",
        "client_num_in_total": 1,
        "client_num_per_round": 1,
        "comm_round": 2,
        "backend": "GRPC",
        "grpc_ipconfig_path": str(tmp_path / "peers.csv"),
        "fedgmr_args": {"device_authentication": "off", "output_dir": str(tmp_path)},
        **dict.fromkeys(("random_seed", "weight_decay"), 0),
        **dict.fromkeys(("epochs", "batch_size", "frequency_of_the_test"), 1),
        **{
            "client_optimizer": "sgd",
            "learning_rate": 0.1,
            "dataset": "none",
            "federated_optimizer": "fedgmr",
        },
    }
    stack = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    data = {0: [(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))]}
    with pytest.raises(ConfigError, match="no row for silo 1") as found:
        client.build(SimpleNamespace(**given), None, [None] * 5 + [data], stack)
    assert found.value.code == "GMR-112"
    (tmp_path / "peers.csv").write_text(
        "eid,rank,grpc_server_ip,grpc_server_port\n0,0,127.0.0.1,1\n1,1,127.0.0.1,2\n2,2,127.0.0.1,3\n"
    )
    with pytest.raises(ConfigError, match="--rank 2 was given, but the row of silo 1 has rank=1"):
        client.build(SimpleNamespace(**{**given, "rank": 2}), None, [None] * 5 + [data], stack)
    private = SimpleNamespace(**given, enable_dp=True, dp_solution_type="ldp")
    with pytest.raises(ConfigError, match="GMR-106 dp_solution_type=ldp"):
        client.build(private, None, [None] * 5 + [data], stack)
    given["fedgmr_args"] |= {"proximal": 0.1}  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"GMR-106 proximal=0.1 needs the built-in trainer"):
        client.build(SimpleNamespace(**given), None, [None] * 5 + [data], stack, object())


def test_fedmls_own_silos_are_sent_their_index_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """They choose their data by it: it may not number dispatches."""
    asked: list[dict[str, Any]] = []
    setup = SimpleNamespace(
        config=FedGMRConfig(device_submodel="masked", device_authentication="off"), layout=None
    )
    monkeypatch.setattr(server_module, "prepare_server", lambda *given: setup)
    monkeypatch.setattr(server_module, "assemble_live", lambda *given, **named: asked.append(named))
    server_module.build(SimpleNamespace(), None, [None, None, None, [], None, {}, {}, 2], nn.Linear(2, 2))
    assert asked == [{"numbered": False}]


def test_a_server_of_silos_knows_how_many_classes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = SimpleNamespace(config=FedGMRConfig(top_k=2), layout=None)
    monkeypatch.setattr(server_module, "prepare_server", lambda *given: setup)
    monkeypatch.setattr(server_module, "assemble_live", lambda *given, **named: given[0])
    data: list[Any] = [None, None, None, [], None, {}, {}]
    with pytest.raises(ConfigError, match="GMR-106 top_k=2 finds every label right: .*class_num=2"):
        server_module.build(SimpleNamespace(), None, [*data, 2], nn.Linear(2, 2))
    for classes in (3, None):
        server_module.build(SimpleNamespace(), None, [*data, classes], nn.Linear(2, 2))
