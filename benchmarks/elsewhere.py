"""A second torch device, which has the CPU's kernels, mixes with nothing, and counts what it is asked to do.

Whether tensors of a GPU ever meet tensors of the CPU does not need a GPU to be seen, nor how many kernels it
would be told to launch. Here, torch has a device ``elsewhere``, whose tensors hold one of the CPU each. An
operation on tensors of both devices fails as it does between CPU and GPU; one on tensors of this device
computes what the CPU does, to the bit. Registering a device cannot be undone: do it in a process of its own.

A *launch* is an operation that writes a tensor of the device: one kernel of a GPU, or a few (a sort, a
convolution's gradients, long lists of tensors; lists whose tensors lie differently in memory count one by
one). A *wait* is one whose result the CPU reads, or that takes a tensor from the CPU's ordinary memory: a GPU
has to end what it was told before. Neither says how long a kernel takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "elsewhere"
aten = torch.ops.aten
#: Operations between devices. Indices may be on the CPU.
_BETWEEN = {
    aten.copy_.default,
    aten._copy_from.default,
    aten._to_copy.default,
    aten._foreach_copy_.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
}


#: Operations that only make room, or look at memory in another way without saying so in their schema.
_NO_LAUNCH = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "detach", "_local_scalar_dense"),
}
#: Operations whose result has a size, or is a number, that the CPU has to know.
_WAITS = {"_local_scalar_dense", "nonzero", "bincount", "_unique2", "unique_dim", "masked_select", "equal"}


class Work:
    """What the device was asked to do.

    Attributes:
        launches: operations that write, by name.
        waits: operations that the CPU waits for, by name.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()


_watching: list[Work] = []


@contextmanager
def counting() -> Iterator[Work]:
    """Counts what the device is asked to do inside."""
    work = Work()
    _watching.append(work)
    try:
        yield work
    finally:
        _watching.remove(work)


def _note(name: str, *, launches: int, waits: int) -> None:
    for work in _watching:
        work.launches[name] += launches
        work.waits[name] += waits


class Elsewhere(Tensor):
    """A tensor of the second device.

    Attributes:
        held: one of the CPU, with the values.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        form = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, held.size(), device=torch.device(NAME, 0), **form
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Elsewhere:
        copied = Elsewhere(self.held.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            copied._is_param = True  # type: ignore[attr-defined]  # what makes it a parameter to torch
        memo[id(self)] = copied
        return copied

    # What torch takes from the memory of a tensor, without an operation.

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        _note("tolist", launches=0, waits=1)
        return self.held.tolist()


def computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operation that has a tensor of the second device, or is to have one.

    Raises:
        RuntimeError: it has tensors of both, and not only numbers of the CPU.
    """
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = {id(t.held): t for t in tensors if isinstance(t, Elsewhere)}
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim() > 0]
    if there and here and function not in _BETWEEN:
        shapes = [tuple(t.shape) for t in here]
        raise RuntimeError(
            f"{function}: all tensors must be on one device, but of shape {shapes} are on the CPU"
        )
    wanted = kwargs.get("device")
    if wanted is not None and torch.device(wanted).type == NAME:
        stays, kwargs = True, {**kwargs, "device": torch.device("cpu")}
    elif function is aten.copy_.default:
        stays = isinstance(args[0], Elsewhere)
    else:
        stays = wanted is None
    if _watching:
        name = function._schema.name.removeprefix("aten::")
        _note(
            name,
            launches=0 if function.is_view or name in _NO_LAUNCH else _kernels(name, args),
            waits=name in _WAITS or bool(here or not stays) or _has_mask(name, args),
        )
    result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not stays:
        return result

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return there[id(value)] if id(value) in there else Elsewhere(value)

    return tree_map(moved, result)


def _kernels(name: str, args: Any) -> int:
    """Launches of an operation: one; of lists of tensors that do not lie alike in memory, one for each."""
    lists = [value for value in args if isinstance(value, list | tuple)]
    if not lists or not name.startswith("_foreach"):
        return 1
    forms = [[(t.shape, t.stride()) for t in tensors if isinstance(t, Tensor)] for tensors in lists]
    is_fast = all(form == forms[0] for form in forms) and all(_is_dense(*form) for form in forms[0])
    return 1 if is_fast else len(forms[0])


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor fills its memory, in whatever order of its axes."""
    filled = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride != filled:
            return False
        filled *= size
    return True


def _has_mask(name: str, args: Any) -> bool:
    """Whether an operation indexes by a mask, whose true elements have to be counted first."""
    indices = args[1] if name in ("index", "index_put", "index_put_") else ()
    return any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in indices)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def register() -> list[torch.library.Library]:
    """Make torch know the device for as long as what is returned lives."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    own = torch.library.Library("aten", "IMPL")
    rest = torch.library.Library("_", "IMPL")

    def empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
        return Elsewhere(
            torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)
        )

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
        _held(to).copy_(_held(source))
        return to

    own.impl("empty.memory_format", empty, "PrivateUse1")
    own.impl("empty_strided", empty_strided, "PrivateUse1")
    own.impl("_copy_from", copy_from, "PrivateUse1")
    rest.fallback(lambda function, *args, **kwargs: computed(function, args, kwargs), "PrivateUse1")
    return [own, rest]
