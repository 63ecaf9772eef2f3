"""Tensors of a pickle: what torch writes for one, read without torch.load.

A tensor is a storage, an offset, a shape and strides. A storage is pickled as the bytes of a `torch.save`
stream in its *legacy* format, whatever format `torch.save` itself prefers
(``torch.storage.TypedStorage.__reduce__``): five small pickles (magic number, version, system, the storage as
a persistent id, the list of keys), the number of elements, the elements. ``torch.load(weights_only=True)``
would read that stream too, but allocates what the stream claims before anything is compared with the model,
and its unpickler is larger than this file. A stream in the zip format is not something torch writes here.

Until `copy` nothing is allocated: a `TensorView` is a few numbers and a view of the buffer.
"""

from __future__ import annotations

import codecs
import math
import re
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol.picklestream import Budget, LongText, Ordered, Vocabulary, kind, read_pickle

#: Most dimensions of a tensor, NumPy's own bound.
MOST_DIMENSIONS = 32
_MOST_SIZE = 2**62
#: Bytes of text in which the head of a storage must fit; they are about 280.
_HEAD = 4096
_CHUNK = 65_536

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
#: Where the storage was. Its elements are written from the CPU in any case, so they are read as such.
_LOCATION = re.compile(r"(cpu|cuda|mps|xpu|hpu)(:[0-9]{1,4})?")

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
#: A plain NumPy type per width: elements are moved, never computed with.
_WIDTHS = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "<c16"}


class Storage(NamedTuple):
    """The elements of one storage, in the buffer.

    Attributes:
        dtype: their type.
        length: of its elements, bytes.
        data: the stream that holds them.
        start: byte of the stream where they begin.
    """

    dtype: torch.dtype
    length: int
    data: memoryview | LongText
    start: int


class TensorView(NamedTuple):
    """A tensor whose elements lie within its storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Claim(NamedTuple):
    """What the persistent id of a storage says."""

    dtype: torch.dtype
    key: str
    elements: int


def refused(what: str) -> WireError:
    """GMR-728."""
    return WireError("GMR-728", what)


# -- storages ----------------------------------------------------------------------------------------------


def read_storage(data: Any, budget: Budget) -> Storage:
    """The storage in a stream as `torch.storage._load_from_bytes` takes it.

    Raises:
        WireError: GMR-724 to GMR-727 or GMR-729.
    """
    if not isinstance(data, memoryview | LongText):
        raise refused(f"a storage in {kind(data)}")
    head = data if isinstance(data, memoryview) else memoryview(_head(data.view))
    if bytes(head[:2]) == b"PK":
        raise WireError("GMR-729", "format=zip, which torch does not write within a pickle")
    magic, at = read_pickle(head, 0, _NO_GLOBALS, budget)
    version, at = read_pickle(head, at, _NO_GLOBALS, budget)
    system, at = read_pickle(head, at, _NO_GLOBALS, budget)
    claim, at = read_pickle(head, at, _STORAGE, budget)
    keys, at = read_pickle(head, at, _NO_GLOBALS, budget)
    if type(magic) is not int or magic != _MAGIC or type(version) is not int or version != _VERSION:
        raise WireError("GMR-729", f"magic={kind(magic)}, version={kind(version)}")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise WireError("GMR-729", "little_endian is not true")
    if type(claim) is not _Claim:
        raise WireError("GMR-729", f"{kind(claim)} instead of a storage")
    if type(keys) is not list or len(keys) != 1 or type(keys[0]) is not str or keys[0] != claim.key:
        raise WireError("GMR-729", "the stream does not hold exactly its own storage")
    if len(head) < at + 8:
        raise WireError("GMR-724", f"bytes={len(head)} end before the number of elements")
    count = int.from_bytes(head[at : at + 8], "little")
    if count != claim.elements:
        raise WireError("GMR-729", f"elements={count} instead of {claim.elements}")
    length = count * claim.dtype.itemsize
    # A text has at least as many bytes as it stands for; `_transcode` finds out whether it has them all.
    if length > len(data if isinstance(data, memoryview) else data.view) - (at + 8):
        raise WireError("GMR-724", f"elements={count} are more than the bytes that are there")
    if isinstance(data, memoryview) and len(data) != at + 8 + length:
        raise WireError("GMR-724", f"bytes={len(data)} of a storage of {at + 8 + length}")
    return Storage(claim.dtype, length, data, at + 8)


def _persistent(value: Any) -> _Claim:
    """The meaning of ``("storage", type, key, location, elements, None)``."""
    if type(value) is not tuple or len(value) != 6:
        raise WireError("GMR-729", "a persistent id that is no storage")
    word, dtype, key, location, count, view = value
    if type(word) is not str or word != "storage" or type(dtype) is not torch.dtype or view is not None:
        raise WireError("GMR-729", f"a persistent id of {kind(word)}, {kind(dtype)}, {kind(view)}")
    if type(key) is not str or type(location) is not str or not _LOCATION.fullmatch(location):
        raise WireError("GMR-729", f"key={kind(key)}, location={kind(location)}")
    if not _natural(count):
        raise WireError("GMR-729", f"elements={kind(count)}")
    return _Claim(dtype, key, count)


def _no_build(target: Any, state: Any) -> None:
    raise WireError("GMR-729", f"BUILD of {kind(target)} within a storage")


_NO_GLOBALS = Vocabulary({}, {}, {}, _no_build)
_STORAGE = Vocabulary({}, {}, _STORAGES, _no_build, _persistent)


# -- tensors -----------------------------------------------------------------------------------------------


def rebuild(arguments: tuple[Any, ...]) -> TensorView:
    """``torch._utils._rebuild_tensor_v2``.

    Not read: ``_rebuild_tensor_v3``, by which torch pickles its youngest types (uint16, float8): torch itself
    cannot load such a storage from a pickle.

    Raises:
        WireError: GMR-728.
    """
    if len(arguments) != 6:
        raise refused(f"a tensor of {len(arguments)} arguments")  # one more says conjugate or negative
    storage, offset, shape, strides, requires_grad, hooks = arguments
    if type(storage) is not Storage or type(requires_grad) is not bool:
        raise refused(f"a tensor of {kind(storage)}, requires_grad={kind(requires_grad)}")
    _no_hooks(hooks)
    if not _natural(offset) or not _naturals(shape) or not _naturals(strides) or len(shape) != len(strides):
        raise refused(f"a tensor with offset={kind(offset)}, {kind(shape)}, {kind(strides)}")
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count >= _MOST_SIZE or (count and (last + 1) * storage.dtype.itemsize > storage.length):
        raise refused(f"shape={shape[:8]}, strides={strides[:8]}, offset={offset} beyond its storage")
    return TensorView(storage, offset, shape, strides)


def rebuild_parameter(arguments: tuple[Any, ...]) -> TensorView:
    """``torch._utils._rebuild_parameter``: the tensor in it."""
    if len(arguments) != 3 or type(arguments[0]) is not TensorView or type(arguments[1]) is not bool:
        raise refused("a parameter that holds no tensor")
    _no_hooks(arguments[2])
    return arguments[0]


def copy(view: TensorView, budget: Budget) -> Tensor:
    """The tensor, contiguous, in memory of its own; takes that and, of a storage in a text, the storage's.

    Raises:
        WireError: GMR-724 or GMR-727.
    """
    count = math.prod(view.shape)
    if not count:
        return torch.empty(view.shape, dtype=view.storage.dtype)
    storage, width = view.storage, view.storage.dtype.itemsize
    source: memoryview | NDArray[np.uint8]
    if isinstance(storage.data, memoryview):
        source = storage.data[storage.start :]
    else:
        budget.spend("transcoded", len(storage.data.view))
        source = _transcode(storage.data.view, storage.start, storage.length)
    flat = np.empty(count * width, dtype=np.uint8)
    if _contiguous(view.shape, view.strides):
        begin = view.offset * width
        flat[:] = np.frombuffer(source, np.uint8, count * width, begin)
    else:
        # NumPy checks shape and strides against the buffer again, and reads elements wherever they lie.
        strides = [n * width if size > 1 else 0 for size, n in zip(view.shape, view.strides, strict=True)]
        element = np.dtype(_WIDTHS[width])
        elements: NDArray[Any] = np.ndarray(view.shape, element, source, view.offset * width, strides)
        np.copyto(flat.view(element).reshape(view.shape), elements)
    if storage.dtype is torch.bool:
        np.not_equal(flat, 0, out=flat.view(np.bool_))  # any other byte would be neither true nor false
    return torch.from_numpy(flat).view(storage.dtype).reshape(view.shape)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _no_hooks(hooks: Any) -> None:
    if type(hooks) is not Ordered or hooks:
        raise refused(f"hooks={kind(hooks)} of a tensor")


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_SIZE


def _naturals(values: Any) -> bool:
    return type(values) is tuple and len(values) <= MOST_DIMENSIONS and all(map(_natural, values))


# -- bytes that protocol 2 wrote as a text -----------------------------------------------------------------


def _head(text: memoryview) -> bytes:
    """The bytes that the beginning of a text stands for."""
    try:
        part = codecs.getincrementaldecoder("utf-8")().decode(bytes(text[:_HEAD]))
        return part.encode("latin-1")
    except UnicodeError as error:
        raise WireError("GMR-724", "a text does not stand for bytes") from error


def _transcode(text: memoryview, skip: int, length: int) -> NDArray[np.uint8]:
    """The `length` bytes that a text stands for behind its first `skip`, chunk by chunk."""
    out = np.empty(length, dtype=np.uint8)
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    for start in range(0, len(text), _CHUNK):
        try:
            part = decoder.decode(bytes(text[start : start + _CHUNK]), final=start + _CHUNK >= len(text))
            found = part.encode("latin-1")
        except UnicodeError as error:
            raise WireError("GMR-724", "a text does not stand for bytes") from error
        if skip:
            dropped = min(skip, len(found))
            found, skip = found[dropped:], skip - dropped
        if done + len(found) > length:
            raise WireError("GMR-724", f"a text stands for more than {length} bytes")
        out[done : done + len(found)] = np.frombuffer(found, np.uint8)
        done += len(found)
    if done != length:
        raise WireError("GMR-724", f"a text stands for {done} bytes instead of {length}")
    return out
