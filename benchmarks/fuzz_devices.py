"""Fuzz the server of a run with devices: histories of everything a field may do, and hostile messages.

    python -m benchmarks.fuzz_devices --histories 10000 --cases 100000 --json FILE

Histories are those of `benchmarks.device_histories`. A hostile case is one message or one object of a device,
on its whole way through the server: topic, JSON, signature, sequence, store, wire format (or model file),
admission. Nothing may escape but a refusal with a code of the catalogue, counted for its device; the model's
bytes stay what they are; memory stays below twice the model and `SLACK` or `MESSAGE_SLACK`. Every case can be
made again from seed and number, which an error names. The test-suite runs some of both.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import hmac
import json
import logging
import pickle
import random
import shutil
import struct
import tempfile
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from torch import nn

from benchmarks import device_stage as stage
from benchmarks.device_histories import BrokenPromise, Histories, require
from benchmarks.measure import machine
from fedgmr_plugin import __version__
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.errors import CATALOGUE
from fedgmr_plugin.protocol.header import Header, Outcome
from fedgmr_plugin.protocol.messages import PayloadOrder
from fedgmr_plugin.protocol.notes import AnswerNote, Note, StatusNote, sign, to_server
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.protocol.storekeys import answer_key, file_key
from fedgmr_plugin.protocol.wire import Message, encode

RESULTS = Path(__file__).parent / "results" / "fuzz_devices.json"
#: Bytes beside twice the model, for an object and what it is announced by.
SLACK = 3 * 2**19
#: And for a message: 256 KiB of JSON as Python's objects.
MESSAGE_SLACK = 12 * 2**20
#: Steps of a history.
STEPS = 20
_MANY = 2**50


def model() -> nn.Module:
    """66,368 parameters."""
    with isolated_rng(0):
        return nn.Sequential(nn.Linear(3, 256), nn.ReLU(), nn.Linear(256, 250), nn.ReLU(), nn.Linear(250, 3))


# -- what is attacked --------------------------------------------------------------------------------------


class Target:
    """A server with three devices whose work is out; no window can close, so its model must not change.

    Args:
        plain: whether the devices are FedML's own, which send model files.
    """

    def __init__(self, folder: Path, *, plain: bool = False) -> None:
        self.objects: dict[str, bytes] = {}
        self.now, self._sequence = 1024.0, 0
        self.peak = 0
        options: dict[str, Any] = (
            {"device_authentication": "off", "device_submodel": "masked"} if plain else {}
        )
        config = stage.configuration(
            checkpoint_seconds=None, answer_deadline=1e9, trigger="none", validation_fraction=0.0, **options
        )
        self.plain = plain
        self.hands = stage.StageHands(self.objects, lambda topic, payload: None, self._next, at_once=True)
        self.run = stage.live_run(folder, config, 1000, self.hands, lambda: self.now, make=model)
        self.writer = stage.opened(self.run)
        self.office, self.server, self.desk = self.run.office, self.run.office.server, self.run.office.desk
        for n in range(stage.DEVICES):
            self._appears(n)
        self.w = self.server.w_D.numpy().tobytes()
        require(len(self.server.flights) == stage.DEVICES)

    def close(self) -> None:
        self.writer.close()
        self.office.journal.close()  # type: ignore[union-attr]

    def _appears(self, n: int) -> None:
        if self.plain:
            message = {"msg_type": 5, "sender": n + 1, "client_status": "ONLINE"}
            self.hear(to_server(stage.RUN, n + 1), json.dumps(message).encode())
        else:
            self.say(StatusNote(stage.RUN, n + 1, self.next_sequence(), "ONLINE", samples=5))

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def say(self, note: Note, kind: int = 5) -> None:
        """An authentic message."""
        topic = to_server(stage.RUN, note.device)
        self.hear(
            topic, sign(note, topic, stage.KEYS[note.device], {"msg_type": kind, "sender": note.device})
        )

    def hear(self, topic: str, payload: bytes) -> None:
        self._next((topic, payload))

    def _next(self, item: Any) -> None:
        self.now += 1 / 1024
        self.run.inbox.put(item)
        with self._measured():
            self.run._next(self.office)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Note the most memory that was taken meanwhile."""
        if tracemalloc.is_tracing():
            yield
            return
        tracemalloc.start()
        try:
            yield
        finally:
            self.peak = max(self.peak, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    def pass_time(self) -> None:
        """Whoever was refused gets another sub-model."""
        self.now += 2.5
        self.run._next(self.office)

    def fetch_all(self) -> None:
        while self.hands.fetches:
            with self._measured():
                self.hands.fetched(0)

    def dispatch_of(self, n: int) -> int:
        """The dispatch that a client works on."""
        own = [d for d, f in self.server.flights.items() if f.client == n and d not in self.server.staged]
        if not own:
            self.pass_time()
            own = [d for d, f in self.server.flights.items() if f.client == n and d not in self.server.staged]
        require(bool(own), "no work for a device after a refusal", n)
        return max(own)

    def counted(self) -> Counter[tuple[int, str]]:
        """Refusals so far, by client (-1 for strangers) and code."""
        found = {(n, code): c for n, codes in enumerate(self.desk.refused) for code, c in codes.items()}
        return Counter(found | {(-1, code): c for code, c in self.desk.strangers.items()})


# -- hostile objects ---------------------------------------------------------------------------------------


def update(
    target: Target, n: int, dispatch: int, values_S: torch.Tensor | None = None, **changes: Any
) -> Message:
    """A sound answer to a dispatch, or one with other fields."""
    flight = target.server.flights[dispatch]
    cuts = PayloadOrder.by_rung(flight.ranking, flight.rung).cuts
    if values_S is None:
        values_S = torch.full((cuts[-1],), 0.25)
    header = Header(
        "update",
        target.office.token,
        flight.version,
        flight.ranking.digest,
        target.server.layout.size,
        cuts,
        client=n,
        dispatch=dispatch,
        outcome=Outcome(5.0, 2, 0.5),
    )
    return Message(replace(header, **changes), values_S)


def joined(tree: Any, body: bytes) -> bytes:
    """A message of a header that nobody has checked."""
    head = json.dumps(tree, separators=(",", ":")).encode()
    return len(head).to_bytes(8, "little") + head + body


def parted(data: bytes) -> tuple[Any, bytes]:
    """Header and body of a message."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _junk(dice: random.Random) -> Any:
    """A value of any type."""
    return dice.choice(
        [
            None,
            True,
            False,
            -1,
            0,
            2**53,
            2**70,
            10**400,
            0.5,
            -0.0,
            1e308,
            "",
            "x" * 300,
            "\ud800",
            "NaN",
            [],
            {},
            *[[[[]]], {"a": 1}, "0" * 64, "../../etc/passwd", [1, 2, 3], "\x00", "-1", "1e999"],
        ]
    )


def not_finite(dice: random.Random, target: Target, n: int, dispatch: int) -> bytes:
    message = update(target, n, dispatch)
    values_S = message.values.clone()
    bad = [float("nan"), float("inf"), float("-inf"), 3e38, -1e20]
    for _ in range(dice.randint(1, 5)):
        values_S[dice.randrange(len(values_S))] = dice.choice(bad)
    return bytes(encode(update(target, n, dispatch, values_S)))


def other_fields(dice: random.Random, target: Target, n: int, dispatch: int) -> bytes:
    """A header that claims something else than was asked for: shape, run, owner, mask, type, samples."""
    tree, body = parted(bytes(encode(update(target, n, dispatch))))
    fields = tree["__metadata__"]
    name = dice.choice(
        ["cuts", "run", "client", "dispatch", "ranking", "size", "start", "kind", "samples", "shape"]
    )
    if name == "shape":
        count = dice.choice([0, 1, 2**40, 7])
        tree["values"]["shape"] = [count]
        tree["values"]["data_offsets"] = [0, dice.choice([0, 4 * count, 2**60])]
    elif name == "samples":
        fields[name] = dice.choice(["0", "-1.0", "nan", "inf", "1e300", "-0.0", "1e-400"])
    elif name == "ranking":
        fields[name] = f"{dice.getrandbits(64):016x}"
    elif name == "cuts":
        cuts = sorted(dice.randrange(2**20) for _ in range(dice.randint(1, 40)))
        fields[name] = ",".join(map(str, cuts))
    elif name in ("client", "dispatch"):
        fields[name] = str(int(fields[name]) + dice.choice([1, 2, 1000]))
    elif name == "run":
        fields[name] = f"{dice.getrandbits(64):016x}"
    elif name == "kind":
        fields[name] = dice.choice(["dispatch", "increment", "", "UPDATE"])
    else:
        fields[name] = str(dice.choice([1, 3, 2**40, 2**52]))
    return joined(tree, body)


def junk_fields(dice: random.Random, target: Target, n: int, dispatch: int) -> bytes:
    """A header with a value of another type, a field too many, or one missing."""
    tree, body = parted(bytes(encode(update(target, n, dispatch))))
    node = dice.choice([tree, tree["__metadata__"], tree["values"]])
    name = dice.choice([*node, "mask", "weights", "__proto__"])
    if dice.random() < 0.3 and name in node:
        del node[name]
    else:
        junk = _junk(dice)
        if node.get(name, ...) == junk:
            junk = [junk]
        node[name] = junk
    return joined(tree, body)


def flipped(dice: random.Random, target: Target, n: int, dispatch: int) -> bytes:
    """A sound message with bytes changed, cut off or added: where only values change, it may be taken."""
    data = bytearray(encode(update(target, n, dispatch)))
    end = 8 + int.from_bytes(data[:8], "little") if dice.random() < 0.7 else len(data)
    for _ in range(dice.randint(1, 6)):
        data[dice.randrange(end)] = dice.randrange(256)
    change = dice.random()
    if change < 0.2:
        del data[dice.randrange(len(data)) :]
    elif change < 0.4:
        data += dice.randbytes(dice.randint(1, 100))
    return bytes(data)


@functools.cache
def _archive(compress: Callable[[bytes, int], bytes]) -> bytes:
    return compress(bytes(2**24), 1)


def bomb(dice: random.Random, target: Target, n: int, dispatch: int) -> bytes:
    """What is small and unpacks to much: archives, and masks whose packed code says so."""
    kind = dice.randrange(5)
    if kind == 0:
        return _archive(gzip.compress)
    if kind == 1:
        return _archive(zlib.compress)
    if kind == 2:
        return (
            b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, 100, 2**32 - 1, 4, 0) + bytes(200)
        )
    tree, body = parted(bytes(encode(update(target, n, dispatch))))
    inner = zlib.compress(bytes(2**22), 9)[:60_000]
    chunks = dice.choice([1, 2, 3])
    code = b"".join(
        struct.pack("<BBHH", dice.choice([3, 4, 5]), dice.randrange(16), 7, len(inner)) + inner
        for _ in range(chunks)
    )
    tree["mask"] = {"dtype": "U8", "shape": [len(code)], "data_offsets": [len(body), len(body) + len(code)]}
    return joined(dict(sorted(tree.items())), body + code)


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit(3)",))


def pickled(dice: random.Random, target: Target, n: int, dispatch: int) -> bytes:
    content = dice.choice([Evil(), {"w": Evil()}, [Evil()] * 3, {"w": [0.5] * 100}])
    return pickle.dumps(content, dice.randint(0, 5))


def noise(dice: random.Random, target: Target, n: int, dispatch: int) -> bytes:
    size = dice.choice([0, 1, 7, 8, 9, 100, 5000])
    return (
        dice.choice([0, 10, 2**16, 2**40]).to_bytes(8, "little") if dice.random() < 0.5 else b""
    ) + dice.randbytes(size)


def deep(dice: random.Random, target: Target, n: int, dispatch: int) -> bytes:
    """A header of brackets, or of one endless list."""
    count = dice.choice([100, 10_000, 60_000])
    text = dice.choice(
        [b"[" * count, b'{"a":' * (count // 5), b'{"__metadata__":' + b"[1," * (count // 3), b"9" * count]
    )
    return len(text).to_bytes(8, "little") + text


OBJECTS: dict[str, Callable[[random.Random, Target, int, int], bytes]] = {
    "values that are not finite": not_finite,
    "header: other claims": other_fields,
    "header: other types and keys": junk_fields,
    "header: deep and long": deep,
    "bytes flipped, cut, added": flipped,
    "archives and mask bombs": bomb,
    "pickles": pickled,
    "random bytes": noise,
}
#: Objects that may be sound by chance.
_MAY_BE_SOUND = {"bytes flipped, cut, added", "header: other types and keys"}


# -- hostile messages --------------------------------------------------------------------------------------


def attack_with_object(dice: random.Random, target: Target, kind: str) -> str:
    n = dice.randint(1, 2)
    dispatch = target.dispatch_of(n)
    content = OBJECTS[kind](dice, target, n, dispatch)
    target.objects[answer_key(stage.RUN, target.office.token, dispatch, n + 1)] = content
    piece = Piece(
        answer_key(stage.RUN, target.office.token, dispatch, n + 1),
        len(content),
        hashlib.sha256(content).hexdigest(),
    )
    target.say(AnswerNote(target.office.token, n + 1, target.next_sequence(), dispatch, piece), 3)
    target.fetch_all()
    return "maybe" if kind in _MAY_BE_SOUND else "refused"


def attack_with_another_object(dice: random.Random, target: Target, kind: str) -> str:
    """What lies in the store is not what was announced, or what was announced cannot be."""
    n = dice.randint(1, 2)
    dispatch = target.dispatch_of(n)
    token = target.office.token
    content = bytes(encode(update(target, n, dispatch)))
    key, size, digest = (
        answer_key(stage.RUN, token, dispatch, n + 1),
        len(content),
        hashlib.sha256(content).hexdigest(),
    )
    target.objects[key] = content
    lie = dice.randrange(6)
    if lie == 0:
        target.objects[key] = content[: dice.randrange(len(content))] + b"!"
    elif lie == 1:
        digest = hashlib.sha256(dice.randbytes(8)).hexdigest()
    elif lie == 2:
        size = dice.choice([2**52, 2**40, 10 * size])
    elif lie == 3:
        del target.objects[key]
    elif lie == 4:
        key = dice.choice(
            [
                f"{token}/values/0",
                answer_key(stage.RUN, token, dispatch, 1),
                "../x",
                next(iter(target.objects)),
            ]
        )
        require(key != answer_key(stage.RUN, token, dispatch, n + 1))
    else:
        token = f"{dice.getrandbits(64):016x}"
    target.say(AnswerNote(token, n + 1, target.next_sequence(), dispatch, Piece(key, size, digest)), 3)
    target.fetch_all()
    target.objects.pop(answer_key(stage.RUN, target.office.token, dispatch, n + 1), None)
    return "refused"


def random_message(dice: random.Random, target: Target, kind: str) -> str:
    topic = dice.choice(
        [to_server(stage.RUN, dice.randint(0, 5)), "", "fedml_7_", "fedml_7_" + "9" * 40, "#", "fedml_7_1\n"]
    )
    target.hear(topic, dice.randbytes(dice.choice([0, 1, 20, 3000])))
    return "refused"


def large_message(dice: random.Random, target: Target, kind: str) -> str:
    """Deep, long and repetitive JSON, by itself and as the text of a signed note."""
    count = dice.choice([1000, 40_000, 130_000, 250_000, 262_144])
    text = dice.choice(
        [
            "[" * count,
            '{"a":' * (count // 5) + "1" + "}" * (count // 5),
            "[" + "[]," * (count // 3) + "1]",
            "[" + "{}," * (count // 3) + "1]",
            "{" + ",".join(f'"{i}":{i}' for i in range(count // 12)) + "}",
            "1" * count,
            '"' + "x" * count + '"',
            '"' + "\\ud800" * (count // 6) + '"',
            "[NaN, Infinity]",
            "-" * count,
        ]
    )
    topic = to_server(stage.RUN, 2)
    how = dice.randrange(3)
    if how == 0:
        target.hear(topic, text.encode())
    elif how == 1:
        target.hear(topic, b'{"msg_type": 5, "fedgmr": ' + text.encode() + b"}")
    else:
        target.hear(topic, resigned(topic, stage.KEYS[2], text, {"msg_type": 5}))
    return "refused"


def resigned(topic: str, key: bytes, text: str, message: dict[str, Any]) -> bytes:
    """A message whose note is any text, signed as a device with a key can."""
    found = json.loads(sign(StatusNote(stage.RUN, 2, 1, "ONLINE"), topic, key, message))
    found["fedgmr"] = text
    found["fedgmr_mac"] = hmac.new(
        key, f"{topic}\n{text}".encode(errors="replace"), hashlib.sha256
    ).hexdigest()
    return json.dumps(found).encode()


def changed_message(dice: random.Random, target: Target, kind: str) -> str:
    """An authentic message, changed on its way."""
    topic = to_server(stage.RUN, 2)
    note = StatusNote(stage.RUN, 2, _MANY + target.next_sequence(), "ONLINE", samples=5)
    sound = sign(note, topic, stage.KEYS[2], {"msg_type": 5, "sender": 2})
    data = bytearray(sound)
    inside = data.index(b"kind")
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(inside, len(data) - 2)
        if dice.random() < 0.8:  # within JSON's grammar, mostly
            while not chr(data[place]).isalnum():
                place = dice.randrange(inside, len(data) - 2)
            data[place] = ord(dice.choice("0123456789abcdef".replace(chr(data[place]), "")))
        else:
            data[place] = (data[place] + dice.randint(1, 255)) % 256
    if dice.random() < 0.2:
        del data[dice.randrange(len(data)) :]
    target.hear(topic, bytes(data))
    try:
        is_same = json.loads(data) == json.loads(sound)  # only white space
    except (ValueError, RecursionError):
        is_same = False
    return "maybe" if is_same else "refused"


def note_of_a_traitor(dice: random.Random, target: Target, kind: str) -> str:
    """A device with a key signs a note with fields of any type and value."""
    topic = to_server(stage.RUN, 3)
    if dice.random() < 0.5:
        fields: dict[str, Any] = {
            "protocol": 1,
            "kind": "status",
            **asdict(StatusNote(stage.RUN, 3, target.next_sequence(), "ONLINE")),
        }
        message: dict[str, Any] = {"msg_type": 5, "sender": 3}
    else:
        note = AnswerNote(target.office.token, 3, target.next_sequence(), 10**6, Piece("k", 5, "0" * 64))
        fields, message = {"protocol": 1, "kind": "answer", **asdict(note)}, {"msg_type": 3, "sender": 3}
    fields["sequence"] = target.next_sequence()
    for _ in range(dice.randint(1, 3)):
        where = dice.choice([fields, fields, message])
        name = dice.choice([*where, "extra"])
        if name == "sequence":
            continue
        if dice.random() < 0.2:
            where.pop(name, None)
        else:
            where[name] = _junk(dice)
    text = json.dumps(fields)
    target.hear(topic, resigned(topic, stage.KEYS[3], text, message))
    target.fetch_all()
    return "maybe"


_TRAITOR = "messages: signed by a traitor"  # who may say that it leaves
MESSAGES: dict[str, Callable[[random.Random, Target, str], str]] = {
    "messages: random bytes": random_message,
    "messages: deep and long": large_message,
    "messages: changed on their way": changed_message,
    _TRAITOR: note_of_a_traitor,
    "objects that were not announced": attack_with_another_object,
    **dict.fromkeys(OBJECTS, attack_with_object),
}


# -- model files -------------------------------------------------------------------------------------------


def attack_with_a_file(dice: random.Random, target: Target, kind: str) -> str:
    """One of FedML's own devices sends a model file with bytes changed, cut off, or of another kind."""
    n = dice.randint(1, 2)
    target.dispatch_of(n)
    file = next(
        content
        for key, content in target.objects.items()
        if key.startswith(file_key(stage.RUN, target.office.token, ""))
    )
    data = bytearray(file)
    how = dice.randrange(4)
    if how == 0:
        del data[dice.randrange(len(data)) :]
    elif how == 1:
        for _ in range(dice.randint(1, 8)):
            place = dice.randrange(200) if dice.random() < 0.3 else len(data) - 1 - dice.randrange(3000)
            data[place] = dice.randrange(256)
    elif how == 2:
        data = bytearray(dice.randbytes(dice.choice([0, 4, 100, 4000])))
    else:
        data = bytearray(pickle.dumps(Evil()))
    answer = f"fedml_{stage.RUN}_{n + 1}_answer"
    target.objects[answer] = bytes(data)
    message = {"msg_type": 3, "sender": n + 1, "num_samples": 5, "model_params": answer}
    target.hear(to_server(stage.RUN, n + 1), json.dumps(message).encode())
    target.fetch_all()
    return "maybe"


MODEL_FILES = "model files of FedML's devices"


# -- running them ------------------------------------------------------------------------------------------


class Found:
    """What came of cases."""

    def __init__(self) -> None:
        self.cases: Counter[str] = Counter()
        self.taken: Counter[str] = Counter()
        self.codes: dict[str, Counter[str]] = {}
        self.peak = 0
        self.peaks: dict[str, int] = {}

    def add(self, other: Found) -> None:
        self.cases += other.cases
        self.taken += other.taken
        self.peak = max(self.peak, other.peak)
        self.peaks = {kind: max(self.peaks.get(kind, 0), peak) for kind, peak in other.peaks.items()}
        for kind, codes in other.codes.items():
            self.codes[kind] = self.codes.get(kind, Counter()) + codes


def one_case(target: Target, dice: random.Random, kind: str, found: Found) -> bool:
    """Carry out a case; whether the server is as before but for its counts.

    Raises:
        BrokenPromise: it was not refused as it must be, or memory went too high.
        Exception: whatever the server let escape.
    """
    staged = len(target.server.staged)
    attack = attack_with_a_file if kind == MODEL_FILES else MESSAGES[kind]
    if kind in (MODEL_FILES, "objects that were not announced", *OBJECTS):
        for n in (1, 2):
            target.dispatch_of(n)
    before = target.counted()
    target.peak = 0
    expected = attack(dice, target, kind)
    refused = target.counted() - before
    codes = Counter({code: count for (_, code), count in refused.items()})
    require(set(codes) <= set(CATALOGUE), "a code that is not in the catalogue", codes)
    require(sum(codes.values()) <= 1, "counted more than once", codes)
    require(target.server.w_D.numpy().tobytes() == target.w, "the model has changed")
    require(target.server.version == 0 and not target.office.paused)
    taken = len(target.server.staged) - staged
    if expected == "refused":
        require(sum(codes.values()) == 1 and taken == 0, "was not refused", codes, taken)
    elif expected == "maybe" and not codes:
        require(taken <= 1)
    most = 2 * 4 * target.server.layout.size + (MESSAGE_SLACK if kind.startswith("messages") else SLACK)
    require(target.peak <= most, "memory", target.peak, most)
    found.cases[kind] += 1
    found.taken[kind] += not codes
    found.codes.setdefault(kind, Counter()).update(codes)
    found.peak = max(found.peak, target.peak)
    found.peaks[kind] = max(found.peaks.get(kind, 0), target.peak)
    waits = target.server.away <= set(target.office.live.retries)
    require(waits or kind == _TRAITOR, "whoever was refused is not tried again", target.server.away)
    return not taken and waits


def run_cases(first: int, last: int, seed: int) -> Found:
    """Cases `first` to `last` - 1, on as many servers as they use up."""
    kinds = list(MESSAGES)
    try:
        import MNN  # noqa: F401
    except ImportError:
        pass
    else:
        kinds.append(MODEL_FILES)
    found = Found()
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    targets: dict[bool, Target] = {}
    made = 0
    try:
        for number in range(first, last):
            dice = random.Random(f"{seed}:{number}")
            kind = kinds[number % len(kinds)]
            plain = kind == MODEL_FILES
            if plain not in targets:
                made += 1
                targets[plain] = Target(folder / str(made), plain=plain)
            try:
                as_before = one_case(targets[plain], dice, kind, found)
            except Exception as error:
                raise BrokenPromise(f"seed {seed}, case {number} ({kind}): {error!r}") from error
            if not as_before or number % 2000 < 2:
                targets.pop(plain).close()
                shutil.rmtree(folder / str(made), ignore_errors=True)
    finally:
        for target in targets.values():
            target.close()
        shutil.rmtree(folder, ignore_errors=True)
    return found


def run_histories(count: int, seed: int, steps: int = STEPS) -> Counter[str]:
    """Histories that hypothesis makes from a seed; what happened in them."""
    Histories.totals = Counter()
    hypothesis.seed(seed)(Histories)
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=count,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    return Histories.totals


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)


def table(path: Path = RESULTS) -> str:
    """The committed figures."""
    found = json.loads(path.read_text(encoding="utf-8"))
    h, c = found["histories"], found["cases"]
    cases = sum(kind["cases"] for kind in c["kinds"].values())
    taken = sum(kind["taken"] for kind in c["kinds"].values())
    codes = {code for kind in c["kinds"].values() for code in kind["refused"]}
    peaks = f"{c['peak_bytes_of_objects'] / 1e6:.2f}, {c['peak_bytes'] / 1e6:.2f} MB"
    rows = (
        (
            "histories",
            f"{h['histories']:,}, of {h['steps']} steps each: {h['broken_promises']} broken promises",
        ),
        (
            "in them",
            f"{h['crashes']:,} crashes, {h['checkpoints']:,} checkpoints, "
            f"{h.get('damaged checkpoints', 0):,} of them damaged, "
            f"{h['windows']:,} windows, {h['merged']:,} updates merged",
        ),
        (
            "hostile messages and objects",
            f"{cases:,}: {c['escapes']} escapes; {taken:,} were sound by chance",
        ),
        ("refused with", f"{len(codes)} different codes"),
        (
            "most memory for an object, for a message",
            f"{peaks}, with a model of {c['model_bytes'] / 1e6:.2f} MB",
        ),
    )
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> None:
    """Run what is asked for and write the figures, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--histories", type=int, default=0)
    parser.add_argument("--cases", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="each with a part, and a seed of its own")
    parser.add_argument(
        "--json", type=Path, help="written after each part; figures of the other kind are kept"
    )
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(table())
        return
    with get_context("spawn").Pool(given.processes, _quiet) as pool:
        if given.histories:
            seeds = range(given.seed, given.seed - (-given.histories // _EACH))
            totals: Counter[str] = Counter()
            for part in _timed(pool.imap_unordered(_history_part, seeds)):
                totals.update(part)
                _write(given.json, "histories", _of_histories(totals, given))
        if given.cases:
            parts = [(i, min(i + 1000, given.cases), given.seed) for i in range(0, given.cases, 1000)]
            found, seconds = Found(), 0.0
            for of_part, took in _timed(pool.imap_unordered(_case_part, parts)):
                found.add(of_part)
                seconds += took
                _write(given.json, "cases", _of_cases(found, seconds, given))


#: Histories of one seed: hypothesis slows down with what it remembers.
_EACH = 100


def _timed(parts: Iterator[Any]) -> Iterator[Any]:
    started = time.perf_counter()
    for number, part in enumerate(parts, 1):
        print(f"part {number} after {time.perf_counter() - started:.0f} s", flush=True)
        yield part


def _history_part(seed: int) -> Counter[str]:
    started = time.process_time()
    totals = Counter(run_histories(_EACH, seed))
    totals["cpu_seconds"] = round(time.process_time() - started)
    return totals


def _case_part(part: tuple[int, int, int]) -> tuple[Found, float]:
    started = time.process_time()
    return run_cases(*part), time.process_time() - started


def _write(path: Path | None, kind: str, figures: dict[str, Any]) -> None:
    results = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    results |= {"machine": machine(), "fedgmr": __version__, "hypothesis": hypothesis.__version__}
    results[kind] = figures
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _of_histories(totals: Counter[str], given: argparse.Namespace) -> dict[str, Any]:
    codes = {key: n for key, n in sorted(totals.items()) if key.startswith("GMR-")}
    counts = {key: n for key, n in sorted(totals.items()) if not key.startswith("GMR-")}
    figures = {"asked": given.histories, "first_seed": given.seed, "steps": STEPS, **counts}
    return {**figures, "refused": codes, "broken_promises": 0}


def _of_cases(found: Found, seconds: float, given: argparse.Namespace) -> dict[str, Any]:
    kinds = {
        kind: {
            "cases": n,
            "taken": found.taken[kind],
            "refused": dict(sorted(found.codes[kind].items())),
            "peak_bytes": found.peaks[kind],
        }
        for kind, n in found.cases.items()
    }
    return {
        "asked": given.cases,
        "seed": given.seed,
        "escapes": 0,
        "kinds": kinds,
        "model_bytes": 4 * sum(p.numel() for p in model().parameters()),
        "peak_bytes": found.peak,
        "peak_bytes_of_objects": max(n for kind, n in found.peaks.items() if not kind.startswith("messages")),
        "slack_bytes": SLACK,
        "slack_bytes_of_messages": MESSAGE_SLACK,
        "cpu_seconds": round(seconds),
    }


if __name__ == "__main__":
    main()
