"""A linear layer that works on the support of its weight only: forward, both gradients, nothing dense.

Legend: b rows of the input (all leading axes), I input features, O output units, S support of W [O, I],
E = |S|.

    Y = X W^T + c        dX = dY W        dW_S = (dY^T X)_S        dc = sum_b dY

W lives in compressed rows (values in coordinate order) for Y, in compressed columns (the same values,
permuted) for dX. dW is sampled where the support is very thin, one dot product over b for each of the E
coordinates; else it is made densely, some rows at a time in the cache, and its support is kept. Results
differ from the dense layer's in rounding only. Needs torch's MKL; see `available`.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Smallest density at which the weight's gradient is made densely, and coordinates of it at a time. Measured:
#: benchmarks/NOTES.md, "Client step".
DENSE_GRADIENT = 0.07
_BLOCK = 2**18


class Support(NamedTuple):
    """Coordinates of one weight matrix [O, I] that may be non-zero.

    Attributes:
        shape: (O, I).
        index_E: int64 [E], coordinates in the flattened matrix, strictly increasing.
        row_ends, column_E: int32 [O + 1], [E]: compressed rows.
        column_ends, row_E: int32 [I + 1], [E]: compressed columns.
        by_column_E: int32 [E], positions in `index_E` in the order of the columns.
        block_rows: rows of a block; the last may have fewer.
        block_ends: ends of the blocks in `index_E`.
        place_E: int32 [E], `index_E` counted from the start of its block.
    """

    shape: tuple[int, int]
    index_E: Tensor
    row_ends: Tensor
    column_E: Tensor
    column_ends: Tensor
    row_E: Tensor
    by_column_E: Tensor
    block_rows: int
    block_ends: tuple[int, ...]
    place_E: Tensor


def available() -> bool:
    """Whether this build of torch multiplies compressed rows on the CPU."""
    return bool(torch.backends.mkl.is_available())


def flat_index(mask: Tensor) -> Tensor:
    """int64 [E]: where the bool `mask` (CPU, any shape) is true, in the flattened tensor, increasing."""
    return torch.from_numpy(np.flatnonzero(mask.contiguous().numpy()))


def support(shape: tuple[int, int], index_E: Tensor) -> Support:
    """The compressed rows and columns of the coordinates `index_E` of a matrix of `shape` (O, I)."""
    rows, columns = shape
    row_ends = torch.searchsorted(index_E, torch.arange(rows + 1) * columns, out_int32=True)
    column_E = index_E % columns
    key_E = column_E.to(torch.int16 if columns <= 2**15 else torch.int32)
    sorted_E, by_column_E = torch.sort(key_E, stable=True)
    edges = torch.arange(columns + 1)
    column_ends = torch.searchsorted(sorted_E.to(torch.int64), edges, out_int32=True)
    row_E = (index_E[by_column_E] // columns).to(torch.int32)
    block_rows = max(1, min(rows, _BLOCK // columns))
    stops = torch.tensor([*range(block_rows, rows, block_rows), rows])
    return Support(
        shape,
        index_E,
        row_ends,
        column_E.to(torch.int32),
        column_ends,
        row_E,
        by_column_E.to(torch.int32),
        block_rows,
        tuple(row_ends[stops].tolist()),
        (index_E % (block_rows * columns)).to(torch.int32),
    )


def sparse_linear(x: Tensor, values_E: Tensor, weight: Tensor, bias: Tensor | None, where: Support) -> Tensor:
    """Y [..., O] of X [..., I], differentiable in X, `values_E` and `bias`.

    Args:
        values_E: W on its support, in the order of ``where.index_E``.
        weight: W [O, I] itself, equal to `values_E` on the support and 0 elsewhere. It is looked at only
            where a gradient is to be differentiated again, and gets a gradient of its own there: a leaf's
            total gradient on S is that of `values_E` plus that of `weight` on S.
    """
    y: Tensor = _SparseLinear.apply(x, values_E, weight, bias, where)  # type: ignore[no-untyped-call]  # torch does not type it
    return y


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values_E: Tensor, weight: Tensor, bias: Tensor | None, where: Support
    ) -> Tensor:
        ctx.save_for_backward(x, values_E, weight)
        ctx.where, ctx.has_bias = where, bias is not None
        rows, columns = where.shape
        w = torch.sparse_csr_tensor(where.row_ends, where.column_E, values_E, where.shape)
        y = (w @ x.reshape(-1, columns).t()).t().contiguous()
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, values_E, weight), where = grads, ctx.saved_tensors, ctx.where
        rows, columns = where.shape
        dy_bO, x_bI = dy.reshape(-1, rows), x.reshape(-1, columns)
        dx = dvalues_E = None
        if torch.is_grad_enabled():  # to be differentiated again
            dx = dy @ weight
            dvalues_E = (dy_bO.t() @ x_bI).reshape(-1)[where.index_E]
        else:
            if ctx.needs_input_grad[0]:
                w_T = torch.sparse_csr_tensor(
                    where.column_ends,
                    where.row_E,
                    values_E.index_select(0, where.by_column_E),
                    (columns, rows),
                )
                dx = (w_T @ dy_bO.t()).t().contiguous().view(x.shape)
            if ctx.needs_input_grad[1]:
                dvalues_E = _on_support(dy_bO, x_bI, where)
        return dx, dvalues_E, None, dy_bO.sum(0) if ctx.has_bias else None, None


def _on_support(dy_bO: Tensor, x_bI: Tensor, where: Support) -> Tensor:
    """(dY^T X)_S [E]."""
    (rows, columns), entries = where.shape, len(where.index_E)
    if entries < DENSE_GRADIENT * rows * columns:
        dw = torch.sparse_csr_tensor(where.row_ends, where.column_E, x_bI.new_zeros(entries), where.shape)
        sampled: Tensor = torch.sparse.sampled_addmm(dw, dy_bO.t(), x_bI, beta=0.0, out=dw).values()
        return sampled
    dw_E, room = x_bI.new_empty(entries), x_bI.new_empty(where.block_rows, columns)
    start = 0
    for dy_bB, stop in zip(dy_bO.split(where.block_rows, dim=1), where.block_ends, strict=True):
        dw_BI = torch.mm(dy_bB.t(), x_bI, out=room[: dy_bB.shape[1]])
        torch.index_select(dw_BI.view(-1), 0, where.place_E[start:stop], out=dw_E[start:stop])
        start = stop
    return dw_E


# At the first compressed tensor torch says, once per process, that they are in beta: here, to nobody.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), [], (1, 1))
