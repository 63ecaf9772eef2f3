"""Fuzz the reader of FedML clients' pickles: no crash, no hang, nothing run, no memory above twice the model.

    python -m benchmarks.fuzz_pickle [--count 1000000] [--seed 0]

Mutations are of bytes, and of opcodes: in the pickle and in the streams of storages within it. Every case can
be made again from its seed and number, which an error names. The test-suite runs 20,000 of them.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import math
import pickle
import pickletools
import random
import re
import struct
import sys
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol.fedml_pickle import Expected, read_message, read_model

#: Bytes beside twice the model: opcodes, texts and the memo of a model as small as the fuzzer's.
SLACK = 3 * 2**20
#: What Python reports when code is run, found or fetched.
FORBIDDEN = frozenset(
    {
        "compile",
        "exec",
        "import",
        "open",
        "os.system",
        "os.posix_spawn",
        "pickle.find_class",
        "socket.connect",
        "subprocess.Popen",
        "marshal.loads",
        "ctypes.dlopen",
    }
)


class BrokenPromise(Exception):
    """The reader let something escape, ran something, or took too much memory."""


class Audit:
    """Records the forbidden events of Python's audit trail while it is entered."""

    _installed: Audit | None = None

    def __init__(self) -> None:
        self.active = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    @classmethod
    def of_process(cls) -> Audit:
        """The one of this process: a hook cannot be taken away."""
        cls._installed = cls._installed or cls()
        return cls._installed

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event in FORBIDDEN:
            self.seen.append(event)

    def __enter__(self) -> Audit:
        self.seen = []
        self.active = True
        return self

    def __exit__(self, *error: object) -> None:
        self.active = False


# -- valid streams -----------------------------------------------------------------------------------------


def state_dict() -> dict[str, Tensor]:
    """A small model's: a matrix, a buffer of integers, a transposed view, a parameter."""
    torch.manual_seed(0)
    found: dict[str, Tensor] = nn.Linear(3, 4).state_dict()
    found["num_batches_tracked"] = torch.tensor(7)
    found["view"] = torch.arange(12.0).reshape(3, 4).t()
    found["flag"] = torch.tensor([True, False])
    found["parameter"] = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    return found


def expectation(model: dict[str, Tensor]) -> Expected:
    """What a server with this model expects."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.items()}


EXPECTED = expectation(state_dict())


def examples() -> list[bytes]:
    """State dicts and messages in every protocol, and a large text instead of bytes."""
    message_type = importlib.import_module("fedml.core.distributed.communication.message").Message
    found = []
    for protocol in (2, 3, 4, 5):
        message = message_type(3, 1, 0)
        message.add_params("model_params", OrderedDict(state_dict()))
        message.add_params("num_samples", 120)
        message.add_params("list", [1.5, None, {"a": (True, "b")}])
        found += [pickle.dumps(state_dict(), protocol), pickle.dumps(message, protocol)]
    # The keys of storages are their addresses; one that is always the same makes cases that are.
    return [re.sub(rb"(?<=X\x0e\0\0\0)[0-9]{14}", b"1" * 14, data) for data in found]


# -- mutations ---------------------------------------------------------------------------------------------

_EVIL = (
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"cbuiltins\ngetattr\n",
    b"ctorch\nload\n",
    b"\x8c\x02os\x8c\x06system\x93",
    b"\x82\x01",
    b"\x83\x01\x00",
    b"\x84\x01\x00\x00\x00",
    b"Pid\n",
    b"Q",
    b"R",
    b"b",
    b"\x81",
    b"\x92",
    b"o",
    b"ios\nsystem\n",
    b"2",
    b"0",
    b"(" * 40,
    b"]" * 100,
    b"\x85" * 200,
    b"\x94" * 50,
    b"h\x00",
    b"j\xff\xff\xff\xff",
    b"r\xff\xff\xff\xff",
    b"\x8a\xff",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8d" + b"\xff" * 8,
    b"\x8e" + b"\xff" * 8,
    b"\x96" + b"\x10" + b"\0" * 7,
    b"\x95" + b"\xff" * 8,
    b"X\xff\xff\xff\xff",
    b"J\xff\xff\xff\xff",
    b"\x8a\x09" + b"\xff" * 8 + b"\x7f",
    b"N",
    b"\x88",
    b")",
    b"}",
    b"\x8f",
    b"\x97",
    b"\x98",
    b"G" + struct.pack(">d", float("nan")),
)


@functools.lru_cache(maxsize=32)
def _opcodes(data: bytes) -> tuple[bytes, ...]:
    starts = [at for _, _, at in pickletools.genops(data)]
    return tuple(data[a:b] for a, b in itertools.pairwise([*starts, len(data)]))


def opcodes(data: bytes) -> list[bytes]:
    """The spelling of each opcode of a valid pickle."""
    return list(_opcodes(data))


def _flip(random: random.Random, data: bytes, others: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5, 30))):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def _bit(random: random.Random, data: bytes, others: list[bytes]) -> bytes:
    changed = bytearray(data)
    changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(random: random.Random, data: bytes, others: list[bytes]) -> bytes:
    return data[: random.randrange(len(data))]


def _insert(random: random.Random, data: bytes, others: list[bytes]) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + random.choice((random.randbytes(random.randrange(1, 9)), *_EVIL)) + data[at:]


def _splice(random: random.Random, data: bytes, others: list[bytes]) -> bytes:
    other = random.choice(others)
    return data[: random.randrange(len(data))] + other[random.randrange(len(other)) :]


def _program(random: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Opcodes dropped, doubled, swapped, replaced or added, so that the stream stays readable for longer."""
    steps = opcodes(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(1, len(steps))
        kind = random.randrange(6)
        if kind == 0:
            del steps[at]
        elif kind == 1:
            steps.insert(at, steps[at])
        elif kind == 2:
            other = random.randrange(1, len(steps))
            steps[at], steps[other] = steps[other], steps[at]
        elif kind == 3:
            steps[at] = random.choice(_EVIL)
        elif kind == 4:
            steps.insert(at, random.choice(_EVIL))
        else:
            steps[at] = random.choice(steps)
        if len(steps) < 2:
            break
    return b"".join(steps)


def _number(random: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A small integer (a size, a stride, an offset, a count) becomes another one."""
    steps = opcodes(data)
    places = [at for at, step in enumerate(steps) if step[:1] == b"K"]
    number = random.choice((0, 1, 2, 5, 255, -1, 2**31 - 1, 2**62, 2**63 - 1, -(2**63), 10**12))
    steps[random.choice(places)] = b"\x8a\x09" + number.to_bytes(9, "little", signed=True)
    return b"".join(steps)


def _within(random: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A storage's stream is mutated, and the length before it put right."""
    steps = opcodes(data)
    places = [at for at, step in enumerate(steps) if step[:1] in (b"B", b"C")]
    if not places:
        return _flip(random, data, others)
    at = random.choice(places)
    inner = steps[at][5 if steps[at][:1] == b"B" else 2 :]
    changed = random.choice((_flip, _bit, _cut, _insert, _splice))(random, inner, [inner])
    steps[at] = b"B" + len(changed).to_bytes(4, "little") + changed
    return b"".join(steps)


Reader = Callable[[bytes, Expected], dict[str, Any]]
Mutation = Callable[[random.Random, bytes, list[bytes]], bytes]
MUTATIONS: tuple[Mutation, ...] = (_flip, _bit, _cut, _insert, _splice, _program, _program, _number, _within)


def case(seeds: list[bytes], seed: int, number: int) -> tuple[bytes, int]:
    """The case of that number, and the place of the example that it was made of."""
    draw = random.Random(f"{seed}:{number}")
    place = draw.randrange(len(seeds))
    return draw.choice(MUTATIONS)(draw, seeds[place], seeds), place


# -- the check ---------------------------------------------------------------------------------------------


def check(
    data: bytes, expected: Expected = EXPECTED, read: Reader = read_model, *, memory: bool = True
) -> dict[str, Any] | None:
    """Read `data`; what was accepted, or None.

    Raises:
        BrokenPromise: code was run, memory went above twice the model, or tensors differ from the expected.
        Exception: whatever the reader lets escape besides `WireError`.
    """
    found, peak, audit = None, 0, Audit.of_process()
    if memory:
        tracemalloc.start()
    try:
        with audit:
            found = read(data, expected)
    except WireError:
        pass
    finally:
        if memory:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    if audit.seen:
        raise BrokenPromise(f"{', '.join(audit.seen[:5])} while reading")
    if peak > 2 * sum(math.prod(shape) * dtype.itemsize for shape, dtype in expected.values()) + SLACK:
        raise BrokenPromise(f"{peak} bytes of memory")
    model = found if found is None or read is read_model else found.get("model_params")
    if model is not None and expectation(model) != dict(expected):
        raise BrokenPromise("another model than expected was accepted")
    return found


def cases(seed: int, count: int) -> Iterator[tuple[int, bytes, Reader]]:
    """Numbered cases, and the function that they are for; every eighth time it is the other one."""
    seeds = examples()
    readers: tuple[Reader, Reader] = (read_model, read_message)
    for number in range(count):
        data, place = case(seeds, seed, number)
        yield number, data, readers[(place + (number % 8 == 0)) % 2]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the reader of FedML clients' pickles.")
    parser.add_argument("--count", type=int, default=1_000_000, help="cases")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other cases")
    options = parser.parse_args()
    from fedgmr_plugin.runtimes import host

    host.prepare()
    start, accepted, slowest = time.perf_counter(), 0, 0.0
    for number, data, read in cases(options.seed, options.count):
        begin = time.perf_counter()
        try:
            accepted += check(data, read=read, memory=number % 16 == 0) is not None
        except Exception:
            print(f"seed={options.seed}, case={number}: {data.hex()}")
            raise
        slowest = max(slowest, time.perf_counter() - begin)
    passed = time.perf_counter() - start
    print(f"{options.count} cases in {passed:.0f} s, {accepted} accepted, slowest {slowest:.3f} s")


if __name__ == "__main__":
    main()
