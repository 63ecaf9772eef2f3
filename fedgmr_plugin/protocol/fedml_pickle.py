"""What FedML's stock cross-silo clients send, read without unpickling it.

Over S3 a client's upload is ``pickle.dumps(state_dict)``, over gRPC ``pickle.dumps(message)`` with the state
dict among the message's parameters. `read_model` and `read_message` walk such a stream as data
(`picklestream`), give a closed list of globals a meaning of their own (here and in `pickletensor`), compare
the tensors with those of the server's model, and only then allocate: once the model, and at most once more
its size where protocol 2 wrote a storage as a text.

What is not promised: that the values are finite or make sense; that is the business of admission.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol.picklestream import (
    MOST_TEXT,
    Budget,
    Buffer,
    LongText,
    Ordered,
    Vocabulary,
    kind,
    read_pickle,
)
from fedgmr_plugin.protocol.pickletensor import (
    Storage,
    TensorView,
    copy,
    read_storage,
    rebuild,
    rebuild_parameter,
    refused,
)

#: Shape and type of every tensor of a state dict, by name:
#: ``{name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}``.
Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

#: Most containers within one another, in a value of a message.
MOST_DEPTH = 16
#: Parameter of a message that holds the model.
MODEL = "model_params"

_MESSAGE = "fedml.core.distributed.communication.message.Message"
_SLACK = 65_536
_OPCODES = (8192, 192)  # for a message and its `_metadata`, and for each tensor; torch needs about 120
_NUMBERS = {
    "b1": "<?",
    "i1": "<b",
    "i2": "<h",
    "i4": "<i",
    "i8": "<q",
    "u1": "<B",
    "u2": "<H",
    "u4": "<I",
    "u8": "<Q",
    "f2": "<e",
    "f4": "<f",
    "f8": "<d",
}


def most_bytes(expected: Expected) -> int:
    """Longest pickle that is read unless the caller says otherwise: what a transport may reject unread.

    Twice the model, since protocol 2 takes 1.5 bytes for one, 1 KiB a tensor, and 64 KiB.
    """
    heads = sum(1024 + 4 * len(name) for name in expected)
    return 2 * _model_bytes(expected) + heads + _SLACK


def read_model(buffer: Buffer, expected: Expected, *, most: int | None = None) -> dict[str, Tensor]:
    """Read a pickled state dict, as FedML's ``S3Storage.write_model`` sends it.

    Args:
        buffer: the pickle, of protocol 2 to 5. It is not kept.
        expected: the server's state dict; the sender's must have exactly these names, shapes and types.
        most: longest pickle that is read, bytes; `most_bytes` without it. A tensor that is a small part of
            its storage is pickled with all of the storage, and needs more.

    Returns:
        The tensors in the order of `expected`, contiguous, on the CPU, without gradients, each in memory of
        its own.

    Raises:
        WireError: GMR-724 to GMR-730; nothing of the pickle is to be used.
    """
    tree, budget = _read(buffer, expected, most)
    return _model(tree, expected, budget)


def read_message(buffer: Buffer, expected: Expected, *, most: int | None = None) -> dict[str, Any]:
    """Read a pickled message, as FedML's ``GRPCCommManager.send_message`` sends it.

    Args:
        buffer: the pickle.
        expected: as for `read_model`.
        most: as for `read_model`.

    Returns:
        The message's parameters: None, bool, int, float, str, and lists, tuples and dicts of them. NumPy's
        scalars become Python's. Where there is ``model_params``, it is what `read_model` returns.

    Raises:
        WireError: GMR-724 to GMR-730; nothing of the message is to be used.
    """
    tree, budget = _read(buffer, expected, most)
    if type(tree) is not _Message or tree.parameters is None:
        raise refused(f"{kind(tree)} instead of a message")
    plain = {name: _plain(value, budget, 1) for name, value in tree.parameters.items() if name != MODEL}
    if MODEL in tree.parameters:
        plain[MODEL] = _model(tree.parameters[MODEL], expected, budget)
    return plain


def _read(buffer: Buffer, expected: Expected, most: int | None) -> tuple[Any, Budget]:
    """The whole buffer as a tree of plain values and views of tensors."""
    view = memoryview(buffer).cast("B")
    limit = most_bytes(expected) if most is None else most
    if len(view) > limit:
        raise WireError("GMR-727", f"bytes={len(view)} of a pickle, but {limit} are the most")
    texts = sum(256 + 8 * len(name) for name in expected)
    opcodes = _OPCODES[0] + _OPCODES[1] * len(expected)
    budget = Budget(opcodes, text=texts + 2 * _SLACK, depth=MOST_DEPTH + 2, transcoded=2 * len(view) + 2**20)
    tree, end = read_pickle(view, 0, _vocabulary(budget), budget)
    if end != len(view):
        raise WireError("GMR-724", f"bytes={len(view)} of a pickle that ends at {end}")
    return tree, budget


def _model_bytes(expected: Expected) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in expected.values())


def _model(tree: Any, expected: Expected, budget: Budget) -> dict[str, Tensor]:
    """Compare a state dict with the server's, then copy its tensors."""
    if type(tree) not in (dict, Ordered):
        raise refused(f"{kind(tree)} instead of a state dict")
    missing = [name for name in expected if name not in tree]
    unknown = [name for name in tree if name not in expected]
    if missing or unknown:
        named = [f"lacks {name}" for name in missing[:4]] + [f"has {name[:60]!r}" for name in unknown[:4]]
        raise WireError("GMR-730", f"the model {', '.join(named)}")
    largest = max(_model_bytes(expected), _SLACK)
    for name, (shape, dtype) in expected.items():
        found = tree[name]
        if type(found) is not TensorView:
            raise refused(f"{name} is {kind(found)} instead of a tensor")
        if found.shape != tuple(shape) or found.storage.dtype != dtype:
            had = f"{found.storage.dtype} {found.shape[:8]}"
            raise WireError("GMR-730", f"{name} is {had} instead of {dtype} {tuple(shape)}")
        if type(found.storage.data) is LongText and found.storage.length > largest:
            raise WireError("GMR-727", f"{name} lies in a storage of {found.storage.length} bytes")
    return {name: copy(tree[name], budget) for name in expected}


def _plain(value: Any, budget: Budget, depth: int) -> Any:
    """A value of a message; the budget bounds what containers that hold each other multiply to."""
    budget.spend_opcode()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth > MOST_DEPTH:
        raise WireError("GMR-727", f"depth={depth} of a value")
    if type(value) in (list, tuple):
        items = [_plain(item, budget, depth + 1) for item in value]
        return items if type(value) is list else tuple(items)
    if type(value) in (dict, Ordered):
        return {key: _plain(item, budget, depth + 1) for key, item in value.items()}
    if type(value) is LongText:
        raise WireError("GMR-727", f"a text of {len(value.view)} bytes, but {MOST_TEXT} are the most")
    raise refused(f"{kind(value)} in a message")


# -- what the globals mean ---------------------------------------------------------------------------------


class _Message:
    """FedML's Message while it is read."""

    def __init__(self) -> None:
        self.parameters: dict[str, Any] | None = None


class _NumpyType(NamedTuple):
    """numpy.dtype of a scalar."""

    name: str


def _ordered(arguments: tuple[Any, ...]) -> Ordered:
    if arguments:
        raise refused(f"an OrderedDict of {len(arguments)} arguments")
    return Ordered()


def _encode(arguments: tuple[Any, ...]) -> memoryview | LongText:
    """``_codecs.encode``: how protocol 2 writes bytes. Long ones are made when they are needed."""
    if len(arguments) != 2 or type(arguments[1]) is not str or arguments[1] != "latin1":
        raise refused("bytes that are no Latin-1 text")
    text = arguments[0]
    if type(text) is LongText:
        return text
    if type(text) is not str:
        raise refused(f"bytes of {kind(text)}")
    try:
        return memoryview(text.encode("latin-1"))
    except UnicodeEncodeError as error:
        raise WireError("GMR-724", "a text does not stand for bytes") from error


def _numpy_type(arguments: tuple[Any, ...]) -> _NumpyType:
    if len(arguments) != 3 or type(arguments[0]) is not str or arguments[0] not in _NUMBERS:
        raise refused("a NumPy type that is no plain number")
    if arguments[1] is not False or arguments[2] is not True:
        raise refused(f"a NumPy type with {kind(arguments[1])}, {kind(arguments[2])}")
    return _NumpyType(arguments[0])


def _scalar(arguments: tuple[Any, ...]) -> bool | int | float:
    if len(arguments) != 2 or type(arguments[0]) is not _NumpyType or type(arguments[1]) is not memoryview:
        raise refused("a NumPy scalar without type or bytes")
    layout, data = _NUMBERS[arguments[0].name], arguments[1]
    if len(data) != struct.calcsize(layout):
        raise refused(f"a NumPy scalar of type {arguments[0].name} in {len(data)} bytes")
    found: bool | int | float = struct.unpack(layout, data)[0]
    return found


def _build(target: Any, state: Any) -> None:
    """BUILD would set attributes; three objects have any, and none is set by name."""
    if type(target) is Ordered:  # versions of modules, which nobody needs
        if type(state) is not dict or list(state) != ["_metadata"]:
            raise refused(f"an OrderedDict with {kind(state)}")
    elif type(target) is _NumpyType:
        if type(state) is not tuple or len(state) != 8 or type(state[1]) is not str:
            raise refused(f"a NumPy type with {kind(state)}")
        if state[1] not in ("<", "|") or any(item is not None for item in state[2:5]):
            raise refused(f"a NumPy type of byte order {state[1][:8]!r}, or with fields")
    elif type(target) is _Message and target.parameters is None:
        names = {"type", "sender_id", "receiver_id", "msg_params"}
        if type(state) is not dict or state.keys() != names or type(state["msg_params"]) is not dict:
            raise refused(f"a message with {kind(state)}")
        target.parameters = state["msg_params"]
        for attribute, name in (("sender_id", "sender"), ("receiver_id", "receiver")):
            _check_same(state[attribute], target.parameters.get(name), name)
    else:
        raise WireError("GMR-726", f"BUILD of {kind(target)}")


def _check_same(attribute: Any, parameter: Any, name: str) -> None:
    """FedML reads a sender here as an attribute and there as a parameter; they must not differ."""
    if type(attribute) not in (int, str) or type(parameter) not in (int, str) or attribute != parameter:
        raise refused(f"{name}={kind(parameter)} of a message from {kind(attribute)}")


def _vocabulary(budget: Budget) -> Vocabulary:
    """The globals that are read; streams of storages within the pickle share its budget."""

    def storage(arguments: tuple[Any, ...]) -> Storage:
        if len(arguments) != 1:
            raise refused(f"a storage of {len(arguments)} arguments")
        return read_storage(arguments[0], budget)

    return Vocabulary(
        call={
            "collections.OrderedDict": _ordered,
            "torch.storage._load_from_bytes": storage,
            "torch._utils._rebuild_tensor_v2": rebuild,
            "torch._utils._rebuild_parameter": rebuild_parameter,
            "_codecs.encode": _encode,
            "numpy.dtype": _numpy_type,
            "numpy.core.multiarray.scalar": _scalar,
            "numpy._core.multiarray.scalar": _scalar,
        },
        create={_MESSAGE: _Message},
        values={},
        build=_build,
    )
