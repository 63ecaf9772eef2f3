"""FedML clients' pickles: read to the bit as FedML reads them, and nothing but data is read."""

from __future__ import annotations

import builtins
import contextlib
import io
import math
import os
import pickle
import pickletools
import queue
import struct
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import fuzz_pickle
from benchmarks.fuzz_pickle import expectation
from benchmarks.measure import Calls
from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol import fedml_pickle
from fedgmr_plugin.protocol.fedml_pickle import Expected, most_bytes, read_message, read_model
from fedgmr_plugin.runtimes import host

host.prepare()

from fedml.core.distributed.communication.message import Message  # noqa: E402
from fedml.core.distributed.communication.s3.remote_storage import S3Storage  # noqa: E402

PROTOCOLS = (2, 3, 4, 5)


# -- FedML's own functions ---------------------------------------------------------------------------------


class Bucket:
    """What FedML's S3Storage needs of boto3's client."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def upload_fileobj(self, Fileobj: Any, Bucket: str, Key: str, Callback: Any) -> None:
        self.objects[Key] = Fileobj.read()

    def download_fileobj(self, Fileobj: Any, Bucket: str, Key: str, Callback: Any) -> None:
        Fileobj.write(self.objects[Key])

    def head_object(self, Bucket: str, Key: str) -> dict[str, int]:
        return {"ContentLength": len(self.objects[Key])}

    def generate_presigned_url(self, *arguments: Any, **more: Any) -> str:
        return "url"


@pytest.fixture(scope="module")
def storage() -> Any:
    found = object.__new__(S3Storage)
    found.bucket_name, found.aws_s3_client = "b", Bucket()
    return found


def fedml_sends(storage: Any, model: Any) -> bytes:
    storage.write_model("sent", model)
    return bytes(storage.aws_s3_client.objects["sent"])


def fedml_reads(storage: Any, data: bytes) -> Any:
    storage.aws_s3_client.objects["read"] = data
    return storage.read_model("read")


@pytest.fixture(scope="module")
def grpc_manager() -> Iterator[Any]:
    """FedML's gRPC module, without the network where grpcio is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        package = "fedml.core.distributed.communication.grpc"
        for name in ("grpc", f"{package}.grpc_comm_manager_pb2", f"{package}.grpc_comm_manager_pb2_grpc"):
            patch.setitem(sys.modules, name, MagicMock())
        import fedml.core.distributed.communication.grpc as parent

        for name in ("grpc_comm_manager_pb2", "grpc_comm_manager_pb2_grpc"):
            patch.setattr(parent, name, MagicMock(), raising=False)
        for name in ("grpc_server", "grpc_comm_manager"):
            patch.delitem(sys.modules, f"{package}.{name}", raising=False)
        from fedml.core.distributed.communication.grpc import grpc_comm_manager

        yield grpc_comm_manager
        for name in ("grpc_server", "grpc_comm_manager"):
            sys.modules.pop(f"{package}.{name}", None)


def grpc_sends(module: Any, message: Message) -> bytes:
    manager = object.__new__(module.GRPCCommManager)
    manager.client_rank = manager.client_id = 1
    manager.opts = []
    address = SimpleNamespace(ingress_ip=None, grpc_server_ip="127.0.0.1", grpc_server_port=8890)
    manager.grpc_mappings = {0: address, 1: address}
    request = SimpleNamespace()
    module.grpc_comm_manager_pb2.CommRequest = lambda: request
    manager.send_message(message)
    return bytes(request.message)


def grpc_reads(module: Any, data: bytes) -> Any:
    manager = object.__new__(module.GRPCCommManager)
    manager.is_running, manager.grpc_mappings = True, {1: None}
    manager.grpc_servicer = SimpleNamespace(message_q=queue.Queue())
    manager.grpc_servicer.message_q.put(data)
    got: list[Any] = []

    def receive(kind: Any, message: Any) -> None:
        got.append(message)
        manager.is_running = False

    manager._observers = [SimpleNamespace(receive_message=receive)]
    manager.message_handling_subroutine()
    return got[0]


# -- what is equal -----------------------------------------------------------------------------------------


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit, NaN and signs of zero included."""
    b = b.detach().contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def raw(tensor: Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return bytes(flat.view(torch.uint8).numpy())


def same_model(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return list(found) == list(wanted) and all(same(found[name], wanted[name]) for name in wanted)


DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


@st.composite
def tensors(draw: st.DrawFn, pool: list[Tensor]) -> Tensor:
    """A tensor in a storage of its own or one that another has: cut, transposed, stretched."""
    dtype = draw(st.sampled_from(DTYPES))
    shared = [tensor for tensor in pool if tensor.dtype == dtype]
    if shared and draw(st.booleans()):
        base = draw(st.sampled_from(shared))
    else:
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        seed = draw(st.integers(0, 99))
        count = math.prod(shape) * dtype.itemsize
        base = torch.empty(shape, dtype=dtype)
        if count:
            bits = np.random.default_rng(seed).integers(0, 2 if dtype is torch.bool else 256, count, np.uint8)
            base = torch.from_numpy(bits).view(dtype).reshape(shape)
    for _ in range(draw(st.integers(0, 3))):
        if not base.dim():
            break
        axis = draw(st.integers(0, base.dim() - 1))
        how = draw(st.sampled_from(["transpose", "step", "narrow", "select", "expand"]))
        if how == "transpose":
            base = base.transpose(axis, 0)
        elif how == "step":
            base = base[(slice(None),) * axis + (slice(None, None, 2),)]
        elif how == "narrow" and base.shape[axis] > 1:
            base = base.narrow(axis, 1, base.shape[axis] - 1)
        elif how == "select" and base.shape[axis]:
            base = base.select(axis, 0)
        elif how == "expand" and base.dim() < 5:
            base = base.unsqueeze(axis).expand(*base.shape[:axis], 3, *base.shape[axis:])
    pool.append(base)
    if dtype.is_floating_point and draw(st.booleans()):
        return nn.Parameter(base, requires_grad=draw(st.booleans()))
    return base


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    pool: list[Tensor] = []
    names = draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), unique=True, max_size=6)
    )
    found = draw(st.sampled_from([dict, OrderedDict]))()
    for name in names:
        again = draw(st.booleans()) and found
        found[name] = draw(st.sampled_from(list(found.values()))) if again else draw(tensors(pool))
    return found


@given(st.data(), st.sampled_from(PROTOCOLS))
@settings(max_examples=300)
def test_a_model_is_what_fedml_would_read(storage: Any, data: st.DataObject, protocol: int) -> None:
    model = data.draw(state_dicts())
    sent = pickle.dumps(model, protocol)
    found = read_model(sent, expectation(model), most=10**6)
    assert same_model(found, fedml_reads(storage, sent))
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in found.values())
    homes = [tensor.untyped_storage().data_ptr() for tensor in found.values() if tensor.numel()]
    assert len(set(homes)) == len(homes)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.LSTM(8, 3))


def test_a_client_over_s3_is_read(storage: Any) -> None:
    model = network().state_dict()
    sent = fedml_sends(storage, model)
    expected = expectation(model)
    for buffer in (sent, bytearray(sent), memoryview(sent)):
        found = read_model(buffer, expected)
        assert same_model(found, fedml_reads(storage, sent))
        assert list(found) == list(expected)
    assert len(sent) < most_bytes(expected)
    assert found["1.num_batches_tracked"].dtype == torch.int64


def test_what_is_read_does_not_hold_the_buffer() -> None:
    model = network().state_dict()
    sent = bytearray(pickle.dumps(model))
    found = read_model(sent, expectation(model))
    sent[:] = bytes(len(sent))
    sent.clear()  # a view of it would forbid that
    assert same_model(found, model)
    found["1.bias"].add_(1)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(json_values, st.booleans(), st.sampled_from(PROTOCOLS))
@settings(max_examples=200)
@example(value="\N{SNOWMAN}", with_model=True, protocol=2)
def test_a_message_is_what_fedml_would_read(
    grpc_manager: Any, value: Any, with_model: bool, protocol: int
) -> None:
    model = {"w": torch.arange(6.0).reshape(2, 3)}
    message = Message(3, 1, 0)
    message.add_params("value", value)
    if with_model:
        message.add_params("model_params", model)
    sent = pickle.dumps(message, protocol)
    found = read_message(sent, expectation(model))
    wanted = grpc_reads(grpc_manager, sent).get_params()
    if with_model:
        assert same_model(found.pop("model_params"), wanted.pop("model_params"))
    assert found == wanted
    assert repr(found) == repr(wanted)


def test_a_client_over_grpc_is_read(grpc_manager: Any) -> None:
    model = network().state_dict()
    message = Message(3, 1, 0)
    message.add_params("model_params", model)
    message.add_params("num_samples", np.int64(120))
    sent = grpc_sends(grpc_manager, message)
    found = read_message(sent, expectation(model))
    assert same_model(found.pop("model_params"), model)
    assert type(found["num_samples"]) is int
    assert found == {
        "msg_type": 3,
        "sender": 1,
        "receiver": 0,
        "num_samples": 120,
        "sender_rank": 1,
        "sender_ip": "127.0.0.1",
        "sender_port": 8890,
    }
    status = Message(5, 1, 0)
    status.add_params("client_status", "ONLINE")
    found = read_message(grpc_sends(grpc_manager, status), expectation(model))
    assert found["client_status"] == "ONLINE" and "model_params" not in found


@pytest.mark.parametrize("name", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_scalars_become_numbers(name: str, protocol: int) -> None:
    scalars = [getattr(np, name)(77), np.float16(0.5), np.float32(0.1), np.float64(-0.25), np.bool_(True)]
    message = Message(3, 1, 0)
    message.add_params("value", scalars)
    found = read_message(pickle.dumps(message, protocol), {})["value"]
    assert found == [scalar.item() for scalar in scalars]
    assert [type(value) for value in found] == [int, float, float, float, bool]


@pytest.mark.parametrize("place", ["cuda:0", "cuda:3", "mps", "mps:0", "cpu", "xpu:1"])
def test_a_storage_from_any_device_is_read_as_the_cpus(place: str) -> None:
    model = {"w": torch.arange(4.0)}
    sent = with_storage(pickle.dumps(model), lambda inner: inner.replace(text2("cpu"), text2(place)))
    assert same_model(read_model(sent, expectation(model)), model)


def test_any_byte_but_zero_is_true() -> None:
    model = {"w": torch.tensor([True, False, True])}
    sent = with_storage(pickle.dumps(model), lambda inner: inner[:-3] + b"\x02\x00\xff")
    assert read_model(sent, expectation(model))["w"].view(torch.uint8).tolist() == [1, 0, 1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("share", ["whole", "strided"])
def test_memory_stays_below_twice_the_model(protocol: int, share: str) -> None:
    size = 600_000
    model = {"a": torch.randn(size), "b": torch.randn(1000, 200).t(), "c": torch.tensor(3)}
    if share == "strided":
        model["a"] = torch.randn(600, 1000).t()
    sent = pickle.dumps(model, protocol)
    tracemalloc.start()
    try:
        found = read_model(sent, expectation(model))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 2 * 4 * (size + 200_000) + 2**18
    assert same_model(found, model)


def test_large_models_take_long_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """BINBYTES8 and BINUNICODE8, which CPython writes beyond 4 GiB."""
    model = {"w": torch.arange(9.0)}
    sent = pickle.dumps(model, 4)
    at = sent.index(b"B", sent.index(b"_load_from_bytes"))
    length = sent[at + 1 : at + 5]
    assert int.from_bytes(length, "little") > 255
    longer = sent[:at] + b"\x8e" + length + bytes(4) + sent[at + 5 :]
    assert same_model(read_model(unframed(longer), expectation(model)), model)
    text = pickle.dumps(model, 2)
    at = text.index(b"X", text.index(b"encode"))
    longer = text[:at] + b"\x8d" + text[at + 1 : at + 5] + bytes(4) + text[at + 5 :]
    assert same_model(read_model(b"\x80\x04" + longer[2:], expectation(model)), model)


# -- attacks -----------------------------------------------------------------------------------------------

MODEL: dict[str, Tensor] = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(5)}
EXPECTED = expectation(MODEL)
MESSAGE = "fedml.core.distributed.communication.message"


def unframed(data: bytes) -> bytes:
    """Without its first FRAME, whose length would no longer be right."""
    return data[:2] + data[11:] if data[2] == 0x95 else data


def with_storage(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The first storage's stream of a pickle of protocol 4, changed."""
    at, old = next((at, arg) for _, arg, at in pickletools.genops(data) if isinstance(arg, bytes))
    inner, end = change(old), data.index(old, at) + len(old)
    return unframed(data[:at] + b"B" + len(inner).to_bytes(4, "little") + inner + data[end:])


def text(value: str) -> bytes:
    raw = value.encode()
    return b"\x8c" + bytes([len(raw)]) + raw


def text2(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def integer(value: int) -> bytes:
    return b"\x8a\x0b" + value.to_bytes(11, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def program(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def model_of(value: bytes) -> bytes:
    """A state dict whose `w` is that value."""
    return program(b"}(", text("n"), VALID_N, text("w"), value, b"u")


def legacy(
    *,
    storage: bytes = b"ctorch\nFloatStorage\n",
    elements: int = 6,
    count: int | None = None,
    place: str = "cpu",
    key: str = "1",
    keys: tuple[str, ...] = ("1",),
    body: bytes | None = None,
    magic: int = 0x1950A86A20F9469CFC6C,
    version: int = 1001,
    little: bytes = b"\x88",
    more: bytes = b"N",
    word: str = "storage",
) -> bytes:
    """The stream of a storage, with whatever lie."""
    system = b"\x80\x02}" + text2("little_endian") + little + b"s."
    claim = (
        b"\x80\x02(" + text2(word) + storage + text2(key) + text2(place) + integer(elements) + more + b"tQ."
    )
    listed = b"\x80\x02](" + b"".join(map(text2, keys)) + b"e."
    head = b"\x80\x02" + integer(magic) + b".\x80\x02" + integer(version) + b"." + system + claim + listed
    count = elements if count is None else count
    body = torch.arange(6.0).numpy().tobytes() if body is None else body
    return head + struct.pack("<Q", count % 2**64) + body


def loaded(inner: bytes) -> bytes:
    return (
        name("torch.storage", "_load_from_bytes") + b"B" + len(inner).to_bytes(4, "little") + inner + b"\x85R"
    )


HOOKS = name("collections", "OrderedDict") + b")R"


def tensor(
    inner: bytes | None = None,
    offset: int = 0,
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    gradient: bytes = b"\x89",
    hooks: bytes = HOOKS,
    more: bytes = b"",
    function: str = "_rebuild_tensor_v2",
) -> bytes:
    sizes = b"".join(b"(" + b"".join(map(integer, values)) + b"t" for values in (shape, strides))
    inside = loaded(legacy() if inner is None else inner) + integer(offset) + sizes + gradient + hooks + more
    return name("torch._utils", function) + b"(" + inside + b"tR"


VALID_N = tensor(
    legacy(storage=b"ctorch\nLongStorage\n", elements=1, body=struct.pack("<q", 5)), shape=(), strides=()
)


def message_of(state: bytes) -> bytes:
    return program(name(MESSAGE, "Message"), b")\x81", state, b"b")


def state_of(parameters: bytes, sender: bytes = b"K\x01") -> bytes:
    return (
        b"}("
        + text("type")
        + text("3")
        + text("sender_id")
        + sender
        + text("receiver_id")
        + b"K\x00"
        + text("msg_params")
        + parameters
        + b"u"
    )


def parameters_of(value: bytes) -> bytes:
    return b"}(" + text("sender") + b"K\x01" + text("receiver") + b"K\x00" + text("value") + value + b"u"


def test_a_message_is_no_model() -> None:
    with pytest.raises(WireError, match="GMR-728 _Message instead of a state dict"):
        read_model(pickle.dumps(Message(3, 1, 0)), EXPECTED)


def test_the_attacks_start_from_what_is_accepted() -> None:
    assert same_model(read_model(model_of(tensor()), EXPECTED), {"w": MODEL["w"], "n": MODEL["n"]})
    assert read_message(message_of(state_of(parameters_of(b"K\x07"))), {})["value"] == 7


class Run:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Slots(dict):  # type: ignore[type-arg]
    """Pickles with a state, which BUILD would set."""


SLOTS = Slots()
SLOTS.update(MODEL)
SLOTS.__dict__["load"] = "x"
EVIL_ORDERED: Any = OrderedDict(MODEL)
EVIL_ORDERED.update_hook = "x"
HALF = b"\x80\x02" + integer(0x1950A86A20F9469CFC6C) + b"."
LISTS = b"]\x94" + b"".join(b"](" + (b"h" + bytes([i])) * 10 + b"e\x94" for i in range(12))
ONE_DTYPE = name("numpy", "dtype")
SCALAR = name("numpy.core.multiarray", "scalar")
PARAMETER = name("torch._utils", "_rebuild_parameter")


def zipped(model: Any) -> bytes:
    out = io.BytesIO()
    torch.save(model, out)
    return out.getvalue()


ATTACKS: list[tuple[str, str, bytes]] = [
    # functions and classes that no message needs
    ("os.system", "GMR-726", pickle.dumps({"w": Run(os.system, "false")})),
    ("os.system at the top", "GMR-726", pickle.dumps(Run(os.system, "false"))),
    ("os.system, protocol 2", "GMR-726", pickle.dumps(Run(os.system, "false"), 2)),
    ("eval", "GMR-726", pickle.dumps(Run(eval, "1/0"))),
    ("exec", "GMR-726", pickle.dumps(Run(exec, "1/0"))),
    ("getattr", "GMR-726", pickle.dumps(Run(getattr, Run(__import__, "os"), "system"))),
    ("__import__", "GMR-726", pickle.dumps(Run(__import__, "antigravity"))),
    ("torch.load", "GMR-726", pickle.dumps(Run(torch.load, "x"))),
    ("torch.hub", "GMR-726", program(name("torch.hub", "load"))),
    ("a name within an allowed module", "GMR-726", program(name("collections", "namedtuple"))),
    ("a dotted name", "GMR-726", program(name("collections", "OrderedDict.__init__.__globals__"))),
    ("a dotted module", "GMR-726", program(name("torch._utils._rebuild_tensor_v2", "__globals__"))),
    ("a dot moved", "GMR-726", program(name("torch", "storage._load_from_bytes"), b"\x85")),
    ("another class of FedML", "GMR-726", program(name("fedml.core.mlops", "MLOpsStatus"))),
    ("builtins.dict", "GMR-726", pickle.dumps(Run(dict))),
    ("bytes, protocol 2", "GMR-726", pickle.dumps(Run(bytes), 2)),
    ("quantised", "GMR-726", program(name("torch._utils", "_rebuild_qtensor"))),
    ("sparse", "GMR-726", pickle.dumps({"w": torch.eye(2).to_sparse(), "n": MODEL["n"]})),
    ("meta", "GMR-726", pickle.dumps({"w": torch.ones(2, 3, device="meta"), "n": MODEL["n"]})),
    ("a storage type outside of storages", "GMR-726", program(name("torch", "FloatStorage"))),
    ("a call within a storage", "GMR-726", model_of(tensor(legacy(storage=b"cos\nsystem\n")))),
    ("OrderedDict in a storage", "GMR-726", model_of(tensor(legacy(storage=b"ccollections\nOrderedDict\n")))),
    ("NEWOBJ of a function", "GMR-726", program(name("collections", "OrderedDict"), b")\x81")),
    ("REDUCE of a class", "GMR-726", program(name(MESSAGE, "Message"), b")R")),
    ("REDUCE of a number", "GMR-726", program(b"K\x01)R")),
    ("REDUCE of a text", "GMR-726", program(text("collections.OrderedDict"), b")R")),
    ("NEWOBJ of a number", "GMR-726", program(b"K\x01)\x81")),
    ("BUILD of a dict", "GMR-726", program(b"}}b")),
    ("BUILD of a symbol", "GMR-726", program(name("collections", "OrderedDict"), b"}b")),
    ("BUILD of a tensor", "GMR-726", model_of(tensor() + b"}b")),
    (
        "BUILD of a message twice",
        "GMR-726",
        message_of(state_of(parameters_of(b"N")) + b"b" + state_of(b"}")),
    ),
    ("a subclass of dict", "GMR-726", pickle.dumps(SLOTS)),
    # opcodes that no message needs
    ("EXT1", "GMR-725", program(b"\x82\x01")),
    ("EXT2", "GMR-725", program(b"\x83\x01\x00")),
    ("EXT4", "GMR-725", program(b"\x84\x01\x00\x00\x00")),
    ("INST", "GMR-725", program(b"(ios\nsystem\n")),
    ("OBJ", "GMR-725", program(b"(", name("collections", "OrderedDict"), b"o")),
    ("NEWOBJ_EX", "GMR-725", program(name("collections", "OrderedDict"), b")}\x92")),
    ("a persistent id", "GMR-725", program(b"K\x01Q")),
    ("a persistent id, a line", "GMR-725", program(b"Pid\n")),
    ("a bytearray", "GMR-725", pickle.dumps(bytearray(b"x"), 5)),
    ("a buffer out of band", "GMR-725", program(b"\x97")),
    ("a set", "GMR-725", pickle.dumps({"w"})),
    ("a frozen set", "GMR-725", pickle.dumps(frozenset("w"))),
    ("DUP", "GMR-725", program(b"K\x012\x86")),
    ("POP", "GMR-725", program(b"K\x01K\x010")),
    ("POP_MARK", "GMR-725", program(b"(1K\x01")),
    ("LONG4", "GMR-725", program(b"\x8b\xff\xff\xff\x7f")),
    ("a second PROTO", "GMR-725", program(b"\x80\x04K\x01")),
    ("an unknown opcode", "GMR-725", program(b"\xff")),
    ("protocol 0", "GMR-725", pickle.dumps({"w": 1}, 0)),
    ("protocol 1", "GMR-725", pickle.dumps({"w": 1}, 1)),
    ("protocol 6", "GMR-725", b"\x80\x06K\x01."),
    ("no pickle", "GMR-725", b"{}"),
    ("torch.save", "GMR-725", zipped(MODEL)),
    # damage
    ("nothing", "GMR-724", b""),
    ("one byte", "GMR-724", b"\x80"),
    ("no STOP", "GMR-724", b"\x80\x04K\x01"),
    ("bytes behind", "GMR-724", pickle.dumps(MODEL) + b"x"),
    ("two pickles", "GMR-724", pickle.dumps(MODEL) * 2),
    ("an empty stack", "GMR-724", program()),
    ("values left over", "GMR-724", program(b"K\x01K\x01")),
    ("a mark left open", "GMR-724", program(b"(K\x01")),
    ("no mark", "GMR-724", program(b"K\x01t")),
    ("a pop beyond the mark", "GMR-724", program(b"K\x01(\x85")),
    ("APPEND to a tuple", "GMR-724", program(b")K\x01a")),
    ("APPENDS to a dict", "GMR-724", program(b"}(K\x01e")),
    ("SETITEM in a list", "GMR-724", program(b"]K\x01K\x01s")),
    ("SETITEMS of three", "GMR-724", program(b"}(", text("a"), b"K\x01", text("b"), b"u")),
    ("SETITEM in a message", "GMR-724", program(name(MESSAGE, "Message"), b")\x81", text("a"), b"K\x01s")),
    ("STACK_GLOBAL of numbers", "GMR-724", program(b"K\x01K\x02\x93")),
    ("a name without end", "GMR-724", program(b"c" + b"x" * 1000)),
    ("arguments as a list", "GMR-724", program(name("collections", "OrderedDict"), b"]R")),
    ("a memo never filled", "GMR-724", program(b"h\x07")),
    ("a memo to be made large", "GMR-724", program(b"K\x01r\xff\xff\xff\xff")),
    ("a memo far away", "GMR-724", program(b"j\xff\xff\xff\xff")),
    ("not UTF-8", "GMR-724", program(b"\x8c\x01\xff")),
    ("a lone surrogate", "GMR-724", pickle.dumps("\ud800")),
    ("a text of 4 GiB", "GMR-724", program(b"X\xff\xff\xff\xff")),
    ("a text of 2^64", "GMR-724", program(b"\x8d" + b"\xff" * 8)),
    ("bytes of 2^64", "GMR-724", program(b"\x8e" + b"\xff" * 8)),
    ("a frame of 2^64", "GMR-724", program(b"\x95" + b"\xff" * 8)),
    # limits
    ("bytes", "GMR-727", pickle.dumps({"w": bytes(200_000)})),
    ("a long integer", "GMR-727", pickle.dumps(2**200)),
    ("many marks", "GMR-727", program(b"(" * 1000)),
    ("many opcodes", "GMR-727", program(b"K\x01" * 20_000, b"\x85" * 20_000)),
    ("many texts", "GMR-727", program(text("x" * 255) * 600)),
    ("a text as a value", "GMR-727", message_of(state_of(parameters_of(text2("x" * 2000))))),
    ("lists of lists", "GMR-727", message_of(state_of(parameters_of(b"(" + LISTS + b"t")))),
    ("deep tuples", "GMR-727", message_of(state_of(parameters_of(b")" + b"\x85" * 5000)))),
    ("deep lists", "GMR-727", message_of(state_of(parameters_of(b"]" * 5000 + b"a" * 4999)))),
    ("a list in itself", "GMR-727", message_of(state_of(parameters_of(b"]\x94h\x00a")))),
    (
        "a dict in itself",
        "GMR-727",
        message_of(state_of(parameters_of(b"}\x94" + text("a") + b"h\x00s"))),
    ),
    # allowed parts, put together as nobody does
    ("a number as a key", "GMR-728", program(b"}K\x01K\x01s")),
    ("a tuple as a key", "GMR-728", program(b"})K\x01s")),
    ("a key twice", "GMR-728", program(b"}(", text("w"), b"K\x01", text("w"), b"K\x01u")),
    ("a list", "GMR-728", pickle.dumps([MODEL])),
    ("a tensor alone", "GMR-728", pickle.dumps(MODEL["w"])),
    ("a number for a tensor", "GMR-728", pickle.dumps({"w": 1, "n": MODEL["n"]})),
    ("a storage for a tensor", "GMR-728", model_of(loaded(legacy()))),
    ("a symbol for a tensor", "GMR-728", model_of(name("collections", "OrderedDict"))),
    ("OrderedDict of pairs", "GMR-728", program(name("collections", "OrderedDict"), b"]\x85R")),
    ("OrderedDict with attributes", "GMR-728", pickle.dumps(EVIL_ORDERED)),
    ("a storage of a number", "GMR-728", model_of(name("torch.storage", "_load_from_bytes") + b"K\x01\x85R")),
    ("a storage of nothing", "GMR-728", model_of(name("torch.storage", "_load_from_bytes") + b")R")),
    ("a tensor of nothing", "GMR-728", model_of(name("torch._utils", "_rebuild_tensor_v2") + b")R")),
    ("a negative size", "GMR-728", model_of(tensor(shape=(2, -3)))),
    ("a negative stride", "GMR-728", model_of(tensor(strides=(3, -1)))),
    ("a negative offset", "GMR-728", model_of(tensor(offset=-1))),
    ("an offset beyond", "GMR-728", model_of(tensor(offset=1))),
    ("a stride beyond", "GMR-728", model_of(tensor(strides=(4, 1)))),
    ("a huge stride", "GMR-728", model_of(tensor(strides=(2**61, 1)))),
    ("a huge shape", "GMR-728", model_of(tensor(shape=(2**61, 3)))),
    ("a huge shape of no memory", "GMR-728", model_of(tensor(shape=(2**40, 2**40), strides=(0, 0)))),
    ("a wrapping shape", "GMR-728", model_of(tensor(shape=(2**61, 8), strides=(8, 1)))),
    ("a size beyond an index", "GMR-728", model_of(tensor(shape=(2**80, 3)))),
    ("many dimensions", "GMR-728", model_of(tensor(shape=(1,) * 40, strides=(1,) * 40))),
    ("fewer strides", "GMR-728", model_of(tensor(strides=(1,)))),
    ("a gradient of 1", "GMR-728", model_of(tensor(gradient=b"K\x01"))),
    ("hooks", "GMR-728", model_of(tensor(hooks=HOOKS + text("a") + b"K\x01s"))),
    ("hooks that are a dict", "GMR-728", model_of(tensor(hooks=b"}"))),
    ("a conjugate", "GMR-728", pickle.dumps({"w": torch.ones(2, dtype=torch.complex64).conj()})),
    ("a type that torch cannot load", "GMR-726", pickle.dumps({"w": torch.ones(2, 3, dtype=torch.uint16)})),
    (
        "an untyped storage",
        "GMR-726",
        model_of(tensor(legacy(storage=b"ctorch.storage\nUntypedStorage\n", elements=24))),
    ),
    ("a tensor with flags", "GMR-728", model_of(tensor(more=b"}"))),
    ("a parameter of a number", "GMR-728", model_of(PARAMETER + b"K\x01\x89" + HOOKS + b"\x87R")),
    ("a parameter with hooks", "GMR-728", model_of(PARAMETER + tensor() + b"\x89}\x87R")),
    (
        "encode to another code",
        "GMR-728",
        program(name("_codecs", "encode"), text("a"), text("utf7"), b"\x86R"),
    ),
    ("encode of bytes", "GMR-728", program(name("_codecs", "encode"), b"C\x01a", text("latin1"), b"\x86R")),
    (
        "encode beyond Latin-1",
        "GMR-724",
        program(name("_codecs", "encode"), text("\u20ac"), text("latin1"), b"\x86R"),
    ),
    ("an object type of NumPy", "GMR-728", program(ONE_DTYPE, text("O8"), b"\x89\x88\x87R")),
    ("a structured type of NumPy", "GMR-728", program(ONE_DTYPE, b"](\x89\x89e\x89\x88\x87R")),
    ("a copied type of NumPy", "GMR-728", program(ONE_DTYPE, text("f8"), b"\x88\x88\x87R")),
    ("a NumPy array", "GMR-726", pickle.dumps({"w": np.ones(3), "n": MODEL["n"]})),
    (
        "a big-endian scalar",
        "GMR-728",
        pickle.dumps(np.dtype(">f8").type(1).newbyteorder() and np.dtype(">f8")),
    ),
    (
        "a scalar too short",
        "GMR-728",
        program(SCALAR, ONE_DTYPE, text("f8"), b"\x89\x88\x87R", b"C\x01a\x86R"),
    ),
    ("a scalar without type", "GMR-728", program(SCALAR, b"K\x01C\x01a\x86R")),
    ("NumPy's state", "GMR-728", program(ONE_DTYPE, text("f8"), b"\x89\x88\x87R}b")),
    ("a message without state", "GMR-728", program(name(MESSAGE, "Message"), b")\x81")),
    ("a message with arguments", "GMR-728", program(name(MESSAGE, "Message"), b"K\x01\x85\x81")),
    ("a message of other attributes", "GMR-728", message_of(b"}" + text("msg_params") + b"}s")),
    ("a message with setattr", "GMR-728", message_of(b"N" + state_of(parameters_of(b"N")) + b"\x86")),
    ("a message of a list", "GMR-728", message_of(state_of(b"]"))),
    ("another sender", "GMR-728", message_of(state_of(parameters_of(b"N"), sender=b"K\x02"))),
    ("a sender that equals", "GMR-728", message_of(state_of(parameters_of(b"N"), sender=b"\x88"))),
    ("a dict for a message", "GMR-728", pickle.dumps({"msg_type": 3})),
    ("bytes as a value", "GMR-728", message_of(state_of(parameters_of(b"C\x01a")))),
    ("a tensor as a value", "GMR-728", message_of(state_of(parameters_of(tensor())))),
    (
        "a symbol as a value",
        "GMR-728",
        message_of(state_of(parameters_of(name("collections", "OrderedDict")))),
    ),
    (
        "a message as a value",
        "GMR-728",
        message_of(state_of(parameters_of(name(MESSAGE, "Message") + b")\x81"))),
    ),
    # storages
    ("a zip", "GMR-729", model_of(tensor(zipped(torch.ones(2, 3))))),
    ("a zip bomb", "GMR-729", model_of(tensor(b"PK\x03\x04" + bytes(40)))),
    ("another magic number", "GMR-729", model_of(tensor(legacy(magic=1)))),
    ("another version", "GMR-729", model_of(tensor(legacy(version=1002)))),
    ("big-endian", "GMR-729", model_of(tensor(legacy(little=b"\x89")))),
    ("1 for true", "GMR-729", model_of(tensor(legacy(little=b"K\x01")))),
    ("another key", "GMR-729", model_of(tensor(legacy(keys=("2",))))),
    ("two keys", "GMR-729", model_of(tensor(legacy(keys=("1", "2"))))),
    ("no key", "GMR-729", model_of(tensor(legacy(keys=())))),
    ("a place unknown", "GMR-729", model_of(tensor(legacy(place="meta")))),
    ("a place that is a path", "GMR-729", model_of(tensor(legacy(place="cuda:0/../x")))),
    ("a module", "GMR-729", model_of(tensor(legacy(word="module")))),
    ("a view", "GMR-729", model_of(tensor(legacy(more=b"(K\x01t")))),
    ("a text for a type", "GMR-729", model_of(tensor(legacy(storage=text2("torch.FloatStorage"))))),
    ("a negative count", "GMR-729", model_of(tensor(legacy(elements=-6)))),
    ("two counts", "GMR-729", model_of(tensor(legacy(count=5)))),
    ("BUILD in a storage", "GMR-729", model_of(tensor(legacy(storage=b"ctorch\nFloatStorage\n}b")))),
    ("a quantised storage", "GMR-726", model_of(tensor(legacy(storage=b"ctorch\nQInt8Storage\n")))),
    ("a huge count", "GMR-724", model_of(tensor(legacy(elements=2**61)))),
    ("a wrapping count", "GMR-729", model_of(tensor(legacy(elements=2**64 + 6)))),
    ("too few elements", "GMR-724", model_of(tensor(legacy(body=bytes(23))))),
    ("too many elements", "GMR-724", model_of(tensor(legacy(body=bytes(25))))),
    ("no elements", "GMR-724", model_of(tensor(legacy(body=b"")))),
    ("half a head", "GMR-724", model_of(tensor(HALF))),
    ("a storage in a storage", "GMR-729", model_of(tensor(legacy(storage=b"K\x01Q")))),
    # other models
    ("a name less", "GMR-730", pickle.dumps({"w": MODEL["w"]})),
    ("a name more", "GMR-730", pickle.dumps({**MODEL, "x": MODEL["n"]})),
    ("another name", "GMR-730", pickle.dumps({"w": MODEL["w"], "m": MODEL["n"]})),
    ("an empty model", "GMR-730", pickle.dumps({})),
    ("another shape", "GMR-730", pickle.dumps({**MODEL, "w": MODEL["w"].t()})),
    ("another number of dimensions", "GMR-730", pickle.dumps({**MODEL, "w": MODEL["w"].flatten()})),
    ("another type", "GMR-730", pickle.dumps({**MODEL, "w": MODEL["w"].double()})),
    ("a shape of no memory", "GMR-730", model_of(tensor(shape=(2**30, 2**30), strides=(0, 0)))),
]


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Whatever would unpickle, evaluate or start something fails the test."""
    seen: list[str] = []

    def trap(what: str) -> Callable[..., Any]:
        def spring(*arguments: Any, **more: Any) -> Any:
            seen.append(what)
            raise AssertionError(what)

        return spring

    with pytest.MonkeyPatch.context() as patch, fuzz_pickle.Audit.of_process() as audit:
        for owner, attribute in (
            (pickle, "load"),
            (pickle, "loads"),
            (pickle, "Unpickler"),
            (torch, "load"),
            (torch.storage, "_load_from_bytes"),
            (torch._utils, "_rebuild_tensor_v2"),
            (builtins, "eval"),
            (builtins, "exec"),
            (os, "system"),
        ):
            patch.setattr(owner, attribute, trap(attribute))
        yield
    assert not seen and not audit.seen


@pytest.mark.parametrize(("code", "data"), [a[1:] for a in ATTACKS], ids=[a[0] for a in ATTACKS])
def test_a_lie_is_refused_with_its_own_code(code: str, data: bytes) -> None:
    reader = (
        read_message if b"msg_params" in data or b"a message" in data or b"msg_type" in data else read_model
    )
    with nothing_runs(), pytest.raises(WireError, match=code) as caught, Calls() as calls:
        reader(data, EXPECTED)
    assert calls.count < 200_000
    assert len(str(caught.value)) < 600
    with nothing_runs(), pytest.raises(WireError):
        (read_model if reader is read_message else read_message)(data, EXPECTED)


def test_the_traps_work(storage: Any) -> None:
    """They spring where somebody unpickles."""
    data = pickle.dumps(OrderedDict(a=1))
    audit = fuzz_pickle.Audit.of_process()
    with audit:
        fedml_reads(storage, data)
    assert "pickle.find_class" in audit.seen
    with pytest.raises(AssertionError), nothing_runs(), contextlib.suppress(AssertionError):
        fedml_reads(storage, data)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_stream_cut_anywhere_is_refused(protocol: int) -> None:
    for read, sent in ((read_model, MODEL), (read_message, Message(3, 1, 0))):
        data = pickle.dumps(sent, protocol)
        with nothing_runs():
            for length in range(len(data)):
                with pytest.raises(WireError):
                    read(data[:length], EXPECTED)


@pytest.mark.parametrize("length", range(0, len(legacy()), 7))
def test_a_storage_cut_anywhere_is_refused(length: int) -> None:
    with pytest.raises(WireError):
        read_model(model_of(tensor(legacy()[:length])), EXPECTED)


def test_storages_as_texts_are_bounded() -> None:
    """Protocol 2: a text that is no Latin-1, of another length, or read again and again."""
    big = {"w": torch.zeros(3000)}
    expected = expectation(big)
    sent = pickle.dumps(big, 2)
    zeros = b"\xc2\x80" * 10  # ten bytes of value 128
    at = sent.index(bytes(2000)) + 1000
    for changed in (
        sent[:at] + "\u20ac".encode() + sent[at + 3 :],
        sent[:at] + b"\xff" + sent[at + 1 :],
        sent[:at] + zeros + sent[at + 20 :],
    ):
        with pytest.raises(WireError, match="GMR-724 a text"):
            read_model(changed, expected)
    big = {"w": torch.zeros(300_000)}
    part = {"w": big["w"][:7]}
    with pytest.raises(WireError, match="GMR-727"):
        read_model(pickle.dumps(part, 2), expectation(part), most=10**7)
    shared = pickle.dumps(part, 4)
    assert same_model(read_model(shared, expectation(part), most=10**7), part)
    with pytest.raises(WireError, match="GMR-727 bytes="):
        read_model(shared, expectation(part), most=1000)
    names = {f"w{i}": big["w"] for i in range(9)}
    with pytest.raises(WireError, match="GMR-727 transcoded"):
        read_model(pickle.dumps(names, 2), expectation(names))
    assert same_model(read_model(pickle.dumps(names, 4), expectation(names)), names)


def test_nothing_is_allocated_before_the_comparison() -> None:
    """A model of another name or shape costs nothing, however large its other tensors are."""
    size = 500_000
    big = {"w": torch.zeros(size), "n": torch.tensor(1)}
    sent = pickle.dumps(big)
    for wanted in ({**big, "n": torch.zeros(2)}, {**big, "x": big["n"]}, {"w": big["w"]}):
        tracemalloc.start()
        try:
            with pytest.raises(WireError, match="GMR-730"):
                read_model(sent, expectation(wanted), most=10**8)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2**20


def test_opcodes_suffice_for_deep_models() -> None:
    """Many small modules, most without parameters."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Dropout()) for _ in range(200)])
    for protocol in PROTOCOLS:
        data = pickle.dumps(model.state_dict(), protocol)
        assert same_model(read_model(data, expectation(model.state_dict())), model.state_dict())


# -- mutations ---------------------------------------------------------------------------------------------

CASES = 20_000


def test_no_mutation_escapes(storage: Any) -> None:
    most = 0
    audit = fuzz_pickle.Audit.of_process()
    for number, data, read in fuzz_pickle.cases(seed=1, count=CASES):
        with Calls() as calls:
            found = fuzz_pickle.check(data, read=read, memory=number % 32 == 0)
        most = max(most, calls.count)
        if found is not None and read is read_model and number % 8 == 0:
            wanted = fedml_reads(storage, data)
            wanted["flag"] = wanted["flag"].view(torch.uint8) != 0
            assert same_model(found, {name: wanted[name] for name in found}), number
    assert most < 200_000
    assert not audit.active


def test_the_examples_of_the_fuzzer_are_accepted() -> None:
    for data in fuzz_pickle.examples():
        read = read_message if b"msg_params" in data else read_model
        assert fuzz_pickle.check(data, read=read) is not None


def test_a_broken_promise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    data = fuzz_pickle.examples()[0]

    def runs(data: bytes, expected: Expected) -> dict[str, Any]:
        compile("1", "x", "eval")
        return {}

    def hoards(data: bytes, expected: Expected) -> dict[str, Any]:
        bytes(20_000_000)
        return {"msg_type": 3}

    with pytest.raises(fuzz_pickle.BrokenPromise, match="compile"):
        fuzz_pickle.check(data, read=runs)
    with pytest.raises(fuzz_pickle.BrokenPromise, match="memory"):
        fuzz_pickle.check(data, read=hoards)
    with pytest.raises(fuzz_pickle.BrokenPromise, match="another model"):
        fuzz_pickle.check(data, read=lambda data, expected: {"model_params": {}})
    with pytest.raises(ZeroDivisionError):
        fuzz_pickle.check(data, read=lambda data, expected: {"x": 1 // 0})


@given(st.binary(max_size=200))
def test_no_noise_escapes(data: bytes) -> None:
    for start in (b"", b"\x80\x04"):
        assert fuzz_pickle.check(start + data + b".", memory=False) is None


def test_a_read_does_nothing_for_each_element() -> None:
    """Of the order of copying the elements; benchmarks/fuzz_pickle.py and docs give figures."""
    model = {"w": torch.randn(2_000_000)}
    sent = pickle.dumps(model)
    expected = expectation(model)
    with Calls() as calls:
        read_model(sent, expected)
    assert calls.count < 10_000


def test_the_vocabulary_is_closed() -> None:
    budget = fedml_pickle.Budget(1, 1, 1, 1)
    vocabulary = fedml_pickle._vocabulary(budget)
    names = {*vocabulary.call, *vocabulary.create, *vocabulary.values}
    assert not {
        name
        for name in names
        if name.split(".")[0] not in ("collections", "torch", "_codecs", "numpy", "fedml")
    }
    assert len(names) == 9
