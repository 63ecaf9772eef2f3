"""Where each tensor of a model lives in the flat global vector, and what may be pruned.

Legend: D coordinates of the vector (parameters first, floating-point buffers last), D_p of them prunable.

Prunable are the weights of convolution, linear (attention projections included) and embedding layers,
except those of the last linear layer, 1x1 shortcut convolutions, and what the user names. Biases follow
their weight rows ("bias pruning"); everything else is in every sub-model. See the method page, section 2.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear  # an attention's output projection

from fedgmr_plugin.errors import ModelError

Kind = Literal["prunable", "dense", "bias", "buffer"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
#: Tensors of at least so many coordinates are lent memory instead of being copied, if it is aligned so.
_LENT_SIZE, _ALIGNMENT = 2**17, 64
_SHORTCUT_NAMES = ("shortcut", "downsample", "skip", "residual_conv")


@dataclass(frozen=True)
class Entry:
    """One tensor of the model in the flat vector.

    Attributes:
        name: its name in ``model.state_dict()``.
        kind: ``prunable``, ``dense``, ``bias`` (dropped with its weight row) or ``buffer``.
        shape: its shape.
        offset: its first coordinate.
        size: its number of coordinates.
        rows: for ``bias``, the entry name of the weight whose rows it belongs to.
        output_axis: for ``prunable``, the axis of output units (1 for transposed convolutions).
        groups: for ``prunable``, the number of groups of the convolution.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    offset: int
    size: int
    rows: str | None = None
    output_axis: int = 0
    groups: int = 1

    @property
    def slice(self) -> slice:
        """Coordinates of the entry."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class ModelLayout:
    """The flat vector's map; equal for equal architectures.

    Attributes:
        entries: parameters in registration order, then floating-point buffers.
        aliases: further names of an entry (tied weights), as (name, entry name).
        dtype: the parameters' floating-point type.
    """

    entries: tuple[Entry, ...]
    aliases: tuple[tuple[str, str], ...]
    dtype: torch.dtype

    @cached_property
    def size(self) -> int:
        """D."""
        return sum(e.size for e in self.entries)

    @cached_property
    def parameters(self) -> int:
        """Coordinates that are parameters: the first ones; buffers follow."""
        return sum(e.size for e in self.entries if e.kind != "buffer")

    @cached_property
    def prunable(self) -> int:
        """D_p."""
        return sum(e.size for e in self.entries if e.kind == "prunable")

    @cached_property
    def by_name(self) -> dict[str, Entry]:
        """Entries by name."""
        return {e.name: e for e in self.entries}

    def of_kind(self, kind: Kind) -> Iterator[Entry]:
        """Entries of one kind, in order."""
        return (e for e in self.entries if e.kind == kind)

    def views(self, flat_D: Tensor) -> dict[str, Tensor]:
        """Entry name to a view of `flat_D` [D] in the entry's shape."""
        return {e.name: flat_D[e.slice].view(e.shape) for e in self.entries}

    @torch.no_grad()
    def gather(self, model: nn.Module, out: Tensor | None = None) -> Tensor:
        """The model's parameters and floating-point buffers as one vector [D], copied."""
        tensors = _tensors(model)
        flat = torch.empty(self.size, dtype=self.dtype, device=tensors[0][1].device) if out is None else out
        _copy(list(zip(self.views(flat).values(), (tensor for _, tensor in tensors), strict=True)))
        return flat

    @torch.no_grad()
    def scatter(self, model: nn.Module, flat_D: Tensor) -> None:
        """Copy `flat_D` [D] into the model's parameters and floating-point buffers."""
        tensors = (tensor for _, tensor in _tensors(model))
        _copy(list(zip(tensors, self.views(flat_D).values(), strict=True)))

    @contextmanager
    def placed(self, model: nn.Module, flat_D: Tensor) -> Iterator[None]:
        """Inside, `model` holds what `flat_D` [D] did; on leaving, `flat_D` holds what `model` does.

        Meanwhile large tensors of the CPU *are* their part of `flat_D`, which saves two copies. Afterwards
        they have their own memory again, with what it held before.
        """
        own: list[tuple[Tensor, Tensor, Tensor]] = []
        views = list(self.views(flat_D).values())
        try:
            with torch.no_grad():
                copied = []
                for view, (_, tensor) in zip(views, _tensors(model), strict=True):
                    if _may_be(tensor, view):
                        own.append((tensor, view, tensor.data))
                        tensor.data = view
                    else:
                        copied.append((tensor, view))
                _copy(copied)
            yield
            with torch.no_grad():
                pairs = zip(views, (tensor for _, tensor in _tensors(model)), strict=True)
                _copy([(view, t) for view, t in pairs if t.data_ptr() != view.data_ptr()])
        finally:
            for tensor, view, memory in own:
                if tensor.data_ptr() == view.data_ptr():
                    tensor.data = memory

    def state_dict(self, model: nn.Module, flat_D: Tensor) -> dict[str, Tensor]:
        """A ``state_dict`` of `model` with the values of `flat_D` [D]; integer buffers as in `model`."""
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        views = self.views(flat_D)
        names = {**dict(self.aliases), **{name: name for name in views}}
        for name in state:
            if name in names:
                state[name] = views[names[name]].detach().clone()
        return state

    @torch.no_grad()
    def from_state_dict(self, state: dict[str, Tensor], like_D: Tensor) -> Tensor:
        """The vector [D] of a ``state_dict``; tensors that it lacks are taken from `like_D`."""
        flat = like_D.clone()
        views = self.views(flat)
        for name, entry in (*self.aliases, *((name, name) for name in views)):
            if name in state:
                views[entry].copy_(state[name])
        return flat


@dataclass(frozen=True)
class Finding:
    """Something about a model that matters for sub-models.

    Attributes:
        code: GMR-2xx.
        severity: ``error`` (cannot run) or ``note``.
        message: what was found, naming the parameters.
    """

    code: str
    severity: Literal["error", "note"]
    message: str


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy into the first of each pair what the second one holds."""
    if pairs:
        to, source = zip(*pairs, strict=True)
        torch._foreach_copy_(to, source)


def _may_be(tensor: Tensor, view: Tensor) -> bool:
    """Whether `tensor` may have the memory of `view` for a while, and compute the same bits with it."""
    return (
        tensor.numel() >= _LENT_SIZE
        and tensor.device.type == view.device.type == "cpu"
        and tensor.dtype == view.dtype
        and tensor.is_contiguous()
        and view.data_ptr() % _ALIGNMENT == tensor.data_ptr() % _ALIGNMENT == 0
    )


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, tensor) of unique parameters, then of unique floating-point buffers in the state."""
    persistent = model.state_dict(keep_vars=True)
    parameters = list(model.named_parameters())
    buffers = [(n, b) for n, b in model.named_buffers() if n in persistent and b.is_floating_point()]
    return [*parameters, *buffers]


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; those of a tensor without memory are not known."""
    if tensor.is_meta or not tensor.numel():
        return True
    ends = torch.stack(torch.aminmax(tensor.detach()))  # NaN, if there is one
    return bool(ends.isfinite().all())


def build_layout(model: nn.Module, dense_layers: Sequence[str] = ()) -> ModelLayout:
    """Classify the tensors of `model`.

    Args:
        model: any module whose parameters share one floating-point type.
        dense_layers: shell patterns of parameter names that are never pruned.

    Raises:
        ModelError: the first error that `validate` finds.
    """
    for finding in validate(model, dense_layers):
        if finding.severity == "error":
            raise ModelError(finding.code, finding.message, where=type(model).__name__)
    return _layout(model, dense_layers)


def _layout(model: nn.Module, dense_layers: Sequence[str]) -> ModelLayout:
    names: dict[int, str] = {}
    aliases: list[tuple[str, str]] = []
    kept_dense: set[int] = set()  # tensors that the user names, under any of their names
    for name, tensor in model.state_dict(keep_vars=True).items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in dense_layers):
            kept_dense.add(id(tensor))
        if id(tensor) in names:
            aliases.append((name, names[id(tensor)]))
        else:
            names[id(tensor)] = name

    # A parametrised weight (weight norm, say) is computed anew at each use: it is not in the model's state.
    owners = [owner for owner in _weights(model) if id(owner.weight) in names]
    kept_dense |= {
        id(owner.weight) for owner in owners if owner.dense
    }  # a tied weight is dense if one use is
    prunable = {id(owner.weight): owner for owner in owners if id(owner.weight) not in kept_dense}
    rows = {
        id(owner.bias): names[id(owner.weight)]
        for owner in owners
        if id(owner.weight) in prunable and owner.bias is not None and id(owner.bias) not in kept_dense
    }

    entries: list[Entry] = []
    offset = 0
    parameter_ids = {id(p) for p in model.parameters()}
    for name, tensor in _tensors(model):
        kind: Kind = "dense" if id(tensor) in parameter_ids else "buffer"
        weight_row: str | None = None
        axis, groups = 0, 1
        if id(tensor) in prunable:
            kind, axis, groups = "prunable", prunable[id(tensor)].output_axis, prunable[id(tensor)].groups
        elif id(tensor) in rows:
            kind, weight_row = "bias", rows[id(tensor)]
        size = tensor.numel()
        entries.append(Entry(name, kind, tuple(tensor.shape), offset, size, weight_row, axis, groups))
        offset += size
    dtype = next((t.dtype for _, t in _tensors(model)), torch.float32)
    return ModelLayout(tuple(entries), tuple(aliases), dtype)


@dataclass(frozen=True)
class _Weight:
    name: str
    weight: Tensor
    bias: Tensor | None
    dense: bool
    output_axis: int = 0
    groups: int = 1


def _weights(model: nn.Module) -> list[_Weight]:
    """Weights that the prunable rule speaks of; `dense` marks its exceptions."""
    linear = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]
    found: list[_Weight] = []
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, _CONVOLUTIONS + _TRANSPOSED):
            leaf_names = name.lower().split(".")
            pointwise = all(k == 1 for k in module.kernel_size)
            shortcut = pointwise and any(s in part for part in leaf_names for s in _SHORTCUT_NAMES)
            axis = 1 if isinstance(module, _TRANSPOSED) else 0
            # With groups, axis 1 of a transposed convolution does not list every output unit: its bias stays.
            bias = None if axis == 1 and module.groups > 1 else module.bias
            found.append(_Weight(f"{prefix}weight", module.weight, bias, shortcut, axis, module.groups))
        elif isinstance(module, nn.Linear):
            last = bool(linear) and name == linear[-1]
            found.append(_Weight(f"{prefix}weight", module.weight, module.bias, last))
        elif isinstance(module, _EMBEDDINGS):
            found.append(_Weight(f"{prefix}weight", module.weight, None, False))
        elif isinstance(module, nn.MultiheadAttention):
            if module._qkv_same_embed_dim:
                found.append(
                    _Weight(f"{prefix}in_proj_weight", module.in_proj_weight, module.in_proj_bias, False)
                )
            else:
                for part in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                    found.append(_Weight(f"{prefix}{part}", getattr(module, part), None, False))
    return found


def validate(model: nn.Module, dense_layers: Sequence[str] = ()) -> list[Finding]:
    """All findings about `model`, errors first; an empty list means that nothing is remarkable."""
    errors: list[Finding] = []
    notes: list[Finding] = []
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [n for n, p in tensors if nn.parameter.is_lazy(p)]
    empty = [n for n, p in model.named_parameters() if n not in lazy and p.numel() == 0]
    if lazy or empty:
        return [Finding("GMR-204", "error", f"parameters without elements: {', '.join(lazy + empty)}")]
    other = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if other:
        return [Finding("GMR-212", "error", f"entries that are no tensors: {', '.join(other)}")]
    types = sorted({str(t.dtype).removeprefix("torch.") for _, t in _tensors(model)})
    if len(types) > 1 or (types and types[0] not in ("float32", "float64")):
        errors.append(Finding("GMR-202", "error", f"parameter types are {', '.join(types)}"))
        return errors
    infinite = [name for name, tensor in _tensors(model) if not _is_finite(tensor)]
    if infinite:
        errors.append(Finding("GMR-213", "error", f"NaN or infinity in {', '.join(infinite)}"))
    layout = _layout(model, dense_layers)
    if layout.prunable == 0:
        errors.append(Finding("GMR-201", "error", "the model has no prunable weight"))
    if layout.aliases:
        pairs = ", ".join(f"{a} = {b}" for a, b in layout.aliases)
        notes.append(Finding("GMR-203", "note", f"tied tensors: {pairs}"))
    integers = [n for n, b in model.named_buffers() if not b.is_floating_point() and n in model.state_dict()]
    if integers:
        notes.append(Finding("GMR-205", "note", f"integer buffers stay as they are: {', '.join(integers)}"))
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        notes.append(Finding("GMR-206", "note", "the model uses batch normalisation"))
    return errors + notes
