"""Strangers and impostors among real devices: they are not heard, and the honest ones finish."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.samples import BatchPlan, TensorSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol.desk import Replays
from fedgmr_plugin.protocol.header import Header, Outcome
from fedgmr_plugin.protocol.messages import PayloadOrder
from fedgmr_plugin.protocol.notes import (
    AnswerNote,
    FinishNote,
    StatusNote,
    TaskNote,
    note_of,
    parse,
    sign,
    to_device,
    to_server,
)
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.protocol.storekeys import answer_key
from fedgmr_plugin.protocol.wire import Message, encode
from fedgmr_plugin.runtimes.devices.device import Device
from fedgmr_plugin.runtimes.devices.field import TOKEN, Field, Problem
from fedgmr_plugin.runtimes.devices.loopback import Loopback
from fedgmr_plugin.runtimes.devices.memory import Memory

KEYS = {n: bytes([n]) * 32 for n in (1, 2, 3)}
OTHER = b"x" * 32


def mlp() -> nn.Module:
    with isolated_rng(5):
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def samples(client: int, count: int = 40) -> TensorSamples:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(client))
    return TensorSamples(x, x[:, :3].argmax(1))


PROBLEM = Problem(mlp, samples, samples(999), samples(998), BatchPlan(8, 2, 1, True, 3), 0.3)


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    """Three devices, of which 1 and 2 are honest; the third's messages come from the test."""
    config = FedGMRConfig(
        densities=(1.0, 0.5, 0.5), interval=3, window_slack=0.1, answer_deadline=5.0, retry_seconds=2.0
    )
    field = Field(PROBLEM, config, tmp_path, 3, 8, Loopback(0), KEYS).begin()
    field.device(0)
    field.device(1)
    yield field
    field.kill()


def status(device: int, sequence: int, **fields: Any) -> StatusNote:
    return StatusNote(run="7", device=device, sequence=sequence, state="ONLINE", samples=40, **fields)


def hear(
    field: Field, topic_of: int, note: StatusNote | AnswerNote, key: bytes | None, kind: int = 5
) -> None:
    topic = to_server("7", topic_of)
    field.office.message(topic, sign(note, topic, key, {"msg_type": kind, "sender": note.device}))


def refused(field: Field, client: int) -> dict[str, int]:
    return dict(field.office.desk.refused[client])


def test_an_impostor_is_not_heard(field: Field, caplog: pytest.LogCaptureFixture) -> None:
    own = to_server("7", 3)
    hear(field, 3, status(3, 1), OTHER)
    hear(field, 3, status(3, 2), None)
    field.office.message(own, json.dumps({"msg_type": 5, "sender": 3, "client_status": "ONLINE"}).encode())
    changed = json.loads(sign(status(3, 3), own, KEYS[3], {"msg_type": 5}))
    changed["fedgmr"] = changed["fedgmr"].replace("40", "41")
    field.office.message(own, json.dumps(changed).encode())
    moved = sign(status(3, 4), own, KEYS[3], {"msg_type": 5})
    field.office.message(to_server("7", 1), moved)  # signed for another topic
    hear(field, 3, status(1, 5), KEYS[3])  # an honest key, somebody else's name
    hear(field, 3, StatusNote("8", 3, 6, "ONLINE"), KEYS[3])  # of another run
    field.office.message(to_server("7", 9), moved)
    assert refused(field, 2) == {"GMR-743": 4, "GMR-747": 2} and refused(field, 0) == {"GMR-743": 1}
    assert dict(field.office.desk.strangers) == {"GMR-742": 1}
    for topic in (own, to_server("7", 1)):
        assert caplog.text.count(f"a message on {topic} is refused: GMR-743") == 1, "told of once"
    assert 2 in field.office.server.away and 2 not in field.office.seen
    field.run()
    assert {r["client"] for r in field.records("arrival")} == {0, 1}


TOPICS = [
    to_server("7", 1),
    to_server("7", 2),
    to_server("71", 1),
    to_device("7", 0, 1),
    to_device("7", 1, 1),
]


def test_a_signature_is_of_the_topic_and_the_note() -> None:
    """As docs/device-protocol.md has it; under one key, what is said in one place is said nowhere else."""
    for note in (status(1, 1), AnswerNote(TOKEN, 1, 2, 3, Piece("k", 1, "0" * 64)), FinishNote(TOKEN, 1, 4)):
        for topic in TOPICS:
            message = parse(sign(note, topic, KEYS[1], {"msg_type": 5}))
            signed = f"{topic}\n{message['fedgmr']}".encode()
            assert message["fedgmr_mac"] == hmac.new(KEYS[1], signed, hashlib.sha256).hexdigest()
            assert note_of(message, topic, KEYS[1], type(note)) == note
            for other in set(TOPICS) - {topic}:
                with pytest.raises(WireError) as refused:
                    note_of(message, other, KEYS[1], type(note))
                assert refused.value.code == "GMR-743"


def test_a_genuine_message_is_not_heard_on_another_topic(field: Field) -> None:
    """Two devices that share a key by mistake are not mistaken for each other."""
    field.office.desk._keys = {**KEYS, 3: KEYS[2]}
    payload = sign(status(2, 2**43), to_server("7", 2), KEYS[2], {"msg_type": 5, "sender": 2})
    before = dict(field.office.desk.refused[2])
    field.office.message(to_server("7", 3), payload)
    assert field.office.desk.refused[2] - Counter(before) == {"GMR-743": 1}


def test_a_replayed_message_changes_nothing(field: Field) -> None:
    field.until(lambda: field.office.server.version == 2)
    before = len(field.records("client"))
    for topic, payload in list(field.world.published):
        if topic in field.office.desk.topics:
            field.office.message(topic, payload)
    assert len(field.records("client")) == before
    assert all({"GMR-744"} <= set(refused(field, n)) <= {"GMR-744", "GMR-745"} for n in (0, 1))
    field.run()
    merged = [r["dispatch"] for r in field.records("arrival")]
    assert len(merged) == len(set(merged))


def test_a_flood_of_strangers_uses_up_nobodys_rate(field: Field) -> None:
    field.until(lambda: field.office.server.version == 1)
    for n in range(2000):
        hear(field, 1, status(1, n), OTHER)
    field.run()
    assert refused(field, 0)["GMR-743"] == 2000 and "GMR-745" not in refused(field, 0)
    assert 0 in {r["client"] for r in field.records("arrival") if r["window"] > 1}


def test_a_flood_of_what_was_recorded_uses_up_nobodys_rate(field: Field) -> None:
    field.until(lambda: field.office.server.version == 1)
    recorded = next(payload for topic, payload in field.world.published if topic == "fedml_7_1")
    for _ in range(2000):
        field.office.message("fedml_7_1", recorded)
    field.run()
    assert refused(field, 0)["GMR-744"] == 2000 and "GMR-745" not in refused(field, 0)
    assert 0 in {r["client"] for r in field.records("arrival") if r["window"] > 1}


def test_a_flood_of_a_device_is_cut(field: Field) -> None:
    for n in range(500):
        hear(field, 3, status(3, n), KEYS[3])
    assert refused(field, 2)["GMR-745"] >= 440


BOMBS = {
    "random": bytes(random.Random(0).randbytes(300)),
    "empty": b"",
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
    "zip": b"PK\x03\x04" + bytes(400),
    "long header": (2**40).to_bytes(8, "little") + bytes(50),
}


@pytest.mark.parametrize("payload", BOMBS.values(), ids=BOMBS)
def test_a_device_with_a_key_cannot_send_rubbish(field: Field, payload: bytes) -> None:
    hear(field, 3, status(3, 1), KEYS[3])
    (dispatch,) = [d for d, f in field.office.server.flights.items() if f.client == 2]
    w_D = field.office.server.w_D.clone()
    piece = Piece(answer_key("7", TOKEN, dispatch, 3), len(payload), hashlib.sha256(payload).hexdigest())
    field.world.objects[piece.key] = payload
    hear(field, 3, AnswerNote(TOKEN, 3, 2, dispatch, piece), KEYS[3], 3)
    field.until(lambda: bool(field.records("rejected")))
    (record,) = field.records("rejected")
    assert record["client"] == 2 and record["code"].startswith("GMR-7")
    if field.office.server.version == 0:
        assert torch.equal(field.office.server.w_D, w_D)
    field.run()
    assert {r["client"] for r in field.records("arrival")} == {0, 1}


def update(field: Field, dispatch: int, value: float, /, **changes: Any) -> bytes:
    """An answer to a dispatch, which says that it is of whoever was sent it."""
    flight = field.office.server.flights[dispatch]
    cuts = PayloadOrder.by_rung(flight.ranking, flight.rung).cuts
    header = Header(
        *("update", TOKEN, flight.version, flight.ranking.digest, field.layout.size, cuts),
        client=flight.client,
        dispatch=dispatch,
        outcome=Outcome(40.0),
    )
    return bytes(encode(Message(replace(header, **changes), torch.full((cuts[-1],), value))))


@pytest.mark.parametrize("whose", ["dispatch", "client", "both"])
def test_an_update_that_speaks_for_another_device_is_refused(field: Field, whose: str) -> None:
    """Its note is right, and its object is its own: only what is in it is not."""
    hear(field, 3, status(3, 1), KEYS[3])
    while len(field.office.server.flights) < 3:
        field.world.step()
    dispatches = {f.client: d for d, f in field.office.server.flights.items()}
    theirs = {"dispatch": dispatches[1], "client": 1}
    changes = theirs if whose == "both" else {whose: theirs[whose]}
    payload = update(field, dispatches[2], 1e3, **changes)
    piece = Piece(answer_key("7", TOKEN, dispatches[2], 3), len(payload), hashlib.sha256(payload).hexdigest())
    field.world.objects[piece.key] = payload
    hear(field, 3, AnswerNote(TOKEN, 3, 2, dispatches[2], piece), KEYS[3], 3)
    field.until(lambda: bool(field.records("rejected")))
    (record,) = field.records("rejected")
    assert (record["client"], record["dispatch"], record["code"]) == (2, dispatches[2], "GMR-747")
    field.run()
    assert [r["dispatch"] for r in field.records("arrival")].count(dispatches[1]) == 1
    assert float(field.office.server.w_D.abs().max()) < 100


def test_what_admission_refuses_is_counted_for_its_device(field: Field) -> None:
    hear(field, 3, status(3, 1), KEYS[3])
    (dispatch,) = [d for d, f in field.office.server.flights.items() if f.client == 2]
    payload = update(field, dispatch, float("nan"))
    piece = Piece(answer_key("7", TOKEN, dispatch, 3), len(payload), hashlib.sha256(payload).hexdigest())
    field.world.objects[piece.key] = payload
    hear(field, 3, AnswerNote(TOKEN, 3, 2, dispatch, piece), KEYS[3], 3)
    field.until(lambda: bool(field.records("rejected")))
    assert refused(field, 2) == {"GMR-403": 1}
    assert piece.key not in field.world.objects


def test_only_a_devices_own_object_is_taken(field: Field) -> None:
    hear(field, 3, status(3, 1), KEYS[3])
    (dispatch,) = [d for d, f in field.office.server.flights.items() if f.client == 2]
    theirs = next(iter(field.world.objects))
    hear(field, 3, AnswerNote(TOKEN, 3, 2, dispatch, Piece(theirs, 10, "0" * 64)), KEYS[3], 3)
    huge = Piece(answer_key("7", TOKEN, dispatch, 3), 2**40, "0" * 64)
    other = AnswerNote("f" * 16, 3, 3, dispatch, huge)
    hear(field, 3, other, KEYS[3], 3)
    assert refused(field, 2) == {"GMR-747": 1, "GMR-713": 1} and theirs in field.world.objects
    hear(field, 3, AnswerNote(TOKEN, 3, 4, dispatch, huge), KEYS[3], 3)
    assert refused(field, 2)["GMR-710"] == 1
    field.run()


@pytest.mark.parametrize("refusal", [False, True])
def test_an_answer_that_was_read_or_refused_is_deleted(field: Field, refusal: bool) -> None:
    hear(field, 3, status(3, 1), KEYS[3])
    (dispatch,) = [d for d, f in field.office.server.flights.items() if f.client == 2]
    piece = Piece(answer_key("7", TOKEN, dispatch, 3), 3, hashlib.sha256(b"bad").hexdigest())
    if refusal:
        field.world.objects[piece.key] = b"bad"
        hear(field, 3, AnswerNote(TOKEN, 3, 2, dispatch, piece), KEYS[3], 3)
        field.until(lambda: bool(field.records("rejected")))
        assert piece.key not in field.world.objects
    field.run()
    late = {answer_key("7", TOKEN, d, f.client + 1) for d, f in field.office.server.flights.items()}
    assert {key for key in field.world.objects if "/answers/" in key} <= late


def test_an_answer_that_nobody_needs_is_removed_however_often_it_is_stored(field: Field) -> None:
    """A device stores its answer again and again while it hears nothing."""
    hear(field, 3, status(3, 1), KEYS[3])
    (dispatch,) = [d for d, f in field.office.server.flights.items() if f.client == 2]
    payload, objects = update(field, dispatch, 0.0), field.world.objects
    piece = Piece(answer_key("7", TOKEN, dispatch, 3), len(payload), hashlib.sha256(payload).hexdigest())

    def give(sequence: int) -> None:
        objects[piece.key] = payload
        hear(field, 3, AnswerNote(TOKEN, 3, sequence, dispatch, piece), KEYS[3], 3)

    give(2)
    field.until(lambda: dispatch in field.office.server.staged)
    assert piece.key not in objects, "it was read"
    give(3)
    assert piece.key not in objects, "it waits for its window"
    field.until(lambda: dispatch not in field.office.server.flights)
    give(4)
    assert piece.key not in objects, "it was merged"
    objects[piece.key] = payload
    field.run()
    assert piece.key not in objects, "the run is over"
    give(5)
    assert piece.key not in objects, "and was so before"


def test_a_device_that_signs_nothing_names_only_its_own_files(tmp_path: Path) -> None:
    pytest.importorskip("MNN")
    options = {"device_submodel": "masked", "device_authentication": "off"}
    config = FedGMRConfig(
        densities=(1.0, 0.5), window_slack=0.1, answer_deadline=50.0, lost_after=50.0, **options
    )
    field = Field(PROBLEM, config, tmp_path, 2, 6, Loopback(0)).begin()
    field.plain_device(1)
    own = to_server("7", 1)
    say = {"sender": 1, "msg_type": 5, "client_status": "ONLINE"}
    field.office.message(own, json.dumps(say).encode())
    (dispatch,) = [d for d, f in field.office.server.flights.items() if f.client == 0]
    sent = next(key for key in field.world.objects if key.startswith("fedml_7_sent_"))
    others = {sent: field.world.objects[sent], "fedml_7_2_aa": b"two", "fedml_8_1_aa": b"8", "other": b"x"}
    others["fedml_7/answers/1/0-0"] = others["fedml_7_1_2_aa"] = b"y"
    field.world.objects.update(others)
    fetched: list[str] = []
    real = field.world.get
    field.world.get = lambda piece, then: (fetched.append(piece.key), real(piece, then))[1]  # type: ignore[method-assign]
    for key in others:
        message = {"sender": 1, "msg_type": 3, "num_samples": 5, "model_params": key}
        field.office.message(own, json.dumps(message).encode())
        field.until(lambda t=field.world.now: field.world.now > t + 1)  # type: ignore[misc]
    assert refused(field, 0) == {"GMR-747": len(others)} and not set(fetched) & (set(others) - {sent})
    assert dispatch in field.office.server.flights and not field.records("rejected")
    assert {key: field.world.objects.get(key) for key in others} == others
    field.plain_device(0)
    field.run()
    assert {r["client"] for r in field.records("arrival")} == {0, 1}


def test_an_object_that_was_exchanged_is_not_read_and_the_device_heals_it(field: Field) -> None:
    done = [0]
    real = field.world.get

    def get(piece: Piece, then: Any) -> None:
        if "/answers/" in piece.key and done[0] < 3:
            done[0] += 1
            field.world.objects[piece.key] = b"exchanged" if done[0] == 1 else bytes(piece.size)
        real(piece, then)

    field.world.get = get  # type: ignore[method-assign]
    field.run()
    assert done[0] == 3 and not field.records("rejected")
    assert sum(refused(field, n).get("GMR-746", 0) for n in (0, 1)) >= 3


@given(st.lists(st.integers(0, 200), max_size=60))
def test_every_number_counts_once(numbers: list[int]) -> None:
    window, taken = Replays(), set()
    for number in numbers:
        highest = max(taken, default=-1)
        try:
            window.check(number)
        except WireError as error:
            assert error.code == "GMR-744"
            assert number in taken or highest - number >= 64
            window = Replays(*window.state)
            continue
        assert number not in taken and highest - number < 64
        taken.add(number)


def test_an_older_task_is_not_trained_again(field: Field) -> None:
    device = field.devices[0]
    assert isinstance(device, Device)
    field.until(lambda: device.memory.answered > 2 and device.working is None)
    told = [note_of(parse(p), t, KEYS[1], TaskNote) for t, p in field.world.published if t == device.hears]
    first = told[0]
    assert first is not None and first.dispatch < device.memory.answered
    again = replace(first, sequence=field.office.desk.next_sequence())
    device.message(*field.office.desk.write(again, 0, {}))
    assert device.working is None and not device.refused
    field.run()
    assert len(field.trained) == len(set(field.trained))


def finish(field: Field, device: Device, token: str) -> None:
    """The server's signed farewell, of some run."""
    note = FinishNote(token, device.device, field.office.desk.next_sequence())
    device.message(*field.office.desk.write(note, device.device - 1, {}))


def test_a_farewell_of_another_run_stops_no_device(field: Field) -> None:
    field.until(lambda: field.office.server.version == 2)
    device = field.devices[0]
    assert isinstance(device, Device)
    finish(field, device, "f" * 16)
    assert not device.finished and device.refused == {"GMR-713": 1}
    field.run()
    field.until(lambda: device.finished)


def test_a_farewell_ends_a_device_that_had_no_task(field: Field, tmp_path: Path) -> None:
    """Whether it remembers nothing, or another run of FedML's."""
    piece = Piece("k", 1, "0" * 64)
    other = Memory(tmp_path, token="e" * 16, run="6", answered=3, update=piece, content=b"x")
    for memory in (None, other):
        field.office.end = {}
        device = field.device(2, memory)
        assert device.memory.token == "" and device.memory.update is None and device.memory.answered == -1
        finish(field, device, TOKEN)
        assert device.finished and not device.refused


def test_no_message_breaks_the_server_or_a_device(field: Field) -> None:
    """Random bytes, and every valid message with something changed."""
    field.until(lambda: field.office.server.version == 2)
    valid = list(field.world.published)
    dice = random.Random(1)
    device = next(iter(field.devices.values()))
    values: list[Any] = [None, True, -1, 2**70, 1e308, "", "x" * 300, [], {}, [[[]]], "NaN", 0.5]
    version = field.office.server.version
    for _ in range(4000):
        topic, payload = dice.choice(valid)
        if dice.random() < 0.5:
            data = bytearray(payload)
            for _ in range(dice.randint(1, 4)):
                data[dice.randrange(len(data))] = dice.randrange(256)
            payload = bytes(data[: dice.randint(0, len(data))] if dice.random() < 0.3 else data)
        else:
            message = json.loads(payload)
            inner = json.loads(message["fedgmr"])
            target = dice.choice([message, inner])
            target[dice.choice(sorted(target))] = dice.choice(values)
            if isinstance(message.get("fedgmr"), str):
                message["fedgmr"] = json.dumps(inner)
            payload = json.dumps(message).encode()
        field.office.message(topic, payload)
        field.office.message(dice.choice(field.office.desk.topics), payload)
        device.message(device.hears, payload)
    field.office.message(to_server("7", 1), b"[" * 100_000)
    device.message(device.hears, b"{" * 300_000)
    assert field.office.server.version == version
    field.run()
    assert {r["client"] for r in field.records("arrival")} == {0, 1}


def test_what_is_not_understood_has_its_code(field: Field) -> None:
    own = to_server("7", 3)
    for payload in (b"", b"[]", b"{}", b"x" * 300_000, b'{"msg_type": 5, "fedgmr": 1}'):
        field.office.message(own, payload)
    assert refused(field, 2) == {"GMR-741": 5}


def test_a_device_without_masks_is_told_apart(field: Field) -> None:
    """With authentication off, FedML's plain messages are believed, but this office has nothing for them."""
    field.office.desk._keys = None
    plain = {"msg_type": 5, "sender": 3, "client_status": "ONLINE"}
    field.office.message(to_server("7", 3), json.dumps(plain).encode())
    assert refused(field, 2) == {"GMR-748": 1} and 2 in field.office.server.away
