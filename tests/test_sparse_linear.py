"""The linear layer on a support is the dense layer with a masked weight, twice differentiable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fedgmr_plugin.kernels import sparse_linear as module
from fedgmr_plugin.kernels.sparse_linear import Support, available, flat_index, sparse_linear, support

pytestmark = pytest.mark.skipif(not available(), reason="this torch has no MKL")
few = settings(max_examples=max(15, settings().max_examples // 3))


@pytest.fixture(autouse=True, params=["sampled", "in blocks"])
def gradient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way to the weight's gradient, at any density and size."""
    monkeypatch.setattr(module, "DENSE_GRADIENT", 2.0 if request.param == "sampled" else 0.0)
    monkeypatch.setattr(module, "_BLOCK", 12)


@st.composite
def masks(draw: st.DrawFn, most: int = 9) -> Tensor:
    """bool [O, I] with, often, empty and full rows and columns, or nothing, or everything."""
    rows, columns = draw(st.integers(1, most)), draw(st.integers(1, most))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.rand(rows, columns, generator=g) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    for value in (False, True):
        mask[draw(st.lists(st.integers(0, rows - 1), max_size=2))] = value
        mask[:, draw(st.lists(st.integers(0, columns - 1), max_size=2))] = value
    return mask


def where_of(mask: Tensor) -> Support:
    return support((mask.shape[0], mask.shape[1]), flat_index(mask))


def weight_of(mask: Tensor, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(mask.shape, generator=g, dtype=torch.float64) * mask


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-12, atol=1e-13)


@given(mask=masks())
def test_a_support_lists_rows_and_columns(mask: Tensor) -> None:
    rows, columns = mask.shape
    where = where_of(mask)
    by_row = [(i, j) for i in range(rows) for j in range(columns) if mask[i, j]]
    by_column = [(i, j) for j in range(columns) for i in range(rows) if mask[i, j]]
    assert where.shape == (rows, columns)
    assert where.index_E.tolist() == [i * columns + j for i, j in by_row]
    assert where.column_E.tolist() == [j for _, j in by_row]
    assert where.row_E.tolist() == [i for i, _ in by_column]
    assert where.row_ends.tolist() == [sum(i < r for i, _ in by_row) for r in range(rows + 1)]
    assert where.column_ends.tolist() == [sum(j < c for _, j in by_row) for c in range(columns + 1)]
    assert [by_row[e] for e in where.by_column_E.tolist()] == by_column
    step = where.block_rows
    assert where.place_E.tolist() == [(i % step) * columns + j for i, j in by_row]
    stops = [min(r + step, rows) for r in range(0, rows, step)]
    assert list(where.block_ends) == [sum(i < stop for i, _ in by_row) for stop in stops]
    tensors = {t for t in where if isinstance(t, Tensor)}
    assert where.index_E.dtype == torch.int64
    assert {t.dtype for t in tensors - {where.index_E}} == {torch.int32}


@pytest.mark.parametrize("columns", [2**15 - 1, 2**15, 2**15 + 1, 70_000])
def test_columns_of_any_width_are_sorted(columns: int) -> None:
    """Keys of 16 bits end at 2^15 columns."""
    mask = torch.zeros(3, columns, dtype=torch.bool)
    mask[[0, 0, 1, 1, 2, 2], [0, columns - 1, 2**14, columns - 2, 1, columns - 1]] = True
    where = where_of(mask)
    assert where.row_E.tolist() == [0, 2, 1, 1, 0, 2]
    assert where.column_ends[-1] == 6 and where.column_ends[columns - 1] == 4
    x, w = torch.ones(2, columns, dtype=torch.float64), weight_of(mask)
    assert close(sparse_linear(x, w.view(-1)[where.index_E], w, None, where), x @ w.T)


def test_an_index_counts_a_view_in_its_own_order() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert flat_index(mask.t()).tolist() == [0, 3, 4, 5]
    assert flat_index(torch.zeros(2, 2, dtype=torch.bool)).tolist() == []


LEADS: list[tuple[int, ...]] = [(), (1,), (6,), (2, 3), (0,), (2, 0)]


@given(
    mask=masks(),
    lead=st.sampled_from(LEADS),
    has_bias=st.booleans(),
    wanted=st.sets(st.sampled_from("xwb"), min_size=1),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_are_the_dense_layers(
    mask: Tensor, lead: tuple[int, ...], has_bias: bool, wanted: set[str], seed: int
) -> None:
    """For whatever part of the input, the weight and the bias asks for a gradient."""
    where, w = where_of(mask), weight_of(mask, seed)
    g = torch.Generator().manual_seed(seed)
    rows, columns = mask.shape
    x, dy = (torch.randn(*lead, n, generator=g, dtype=torch.float64) for n in (columns, rows))
    bias = torch.randn(rows, generator=g, dtype=torch.float64) if has_bias else None
    values_E = w.view(-1)[where.index_E].requires_grad_("w" in wanted)
    w.requires_grad_("w" in wanted)
    x.requires_grad_("x" in wanted)
    if bias is not None:
        bias.requires_grad_("b" in wanted)
    got, expected = sparse_linear(x, values_E, w, bias, where), F.linear(x, w, bias)
    assert close(got, expected) and got.is_contiguous()
    of = [t for t in (x, bias) if t is not None and t.requires_grad]
    weights = [w] if "w" in wanted else []
    if not of and not weights:
        assert not got.requires_grad
        return
    grads = torch.autograd.grad(got, [*of, *([values_E] if weights else [])], dy)
    dense = list(torch.autograd.grad(expected, [*of, *weights], dy))
    if weights:
        dense[-1] = dense[-1].reshape(-1)[where.index_E]
    assert all(close(a, b) for a, b in zip(grads, dense, strict=True))


_ANY = torch.Generator().manual_seed(0)
STRIDES = {
    "transposed": lambda b, n: torch.randn(n, b, generator=_ANY, dtype=torch.float64).t(),
    "every second column": lambda b, n: torch.randn(b, 2 * n, generator=_ANY, dtype=torch.float64)[:, ::2],
    "every second row": lambda b, n: torch.randn(2 * b, n, generator=_ANY, dtype=torch.float64)[::2],
    "one row": lambda b, n: torch.randn(1, n, generator=_ANY, dtype=torch.float64).expand(b, n),
    "one column": lambda b, n: torch.randn(b, 1, generator=_ANY, dtype=torch.float64).expand(b, n),
    "one number": lambda b, n: torch.randn((), generator=_ANY, dtype=torch.float64).expand(b, n),
}


@pytest.mark.parametrize("of_dy", STRIDES)
@pytest.mark.parametrize("of_x", STRIDES)
def test_inputs_and_gradients_of_any_strides(of_x: str, of_dy: str) -> None:
    """The gradient of a sum, for one, has no strides at all."""
    mask = torch.rand(7, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    where, w = where_of(mask), weight_of(mask).requires_grad_()
    values_E = w.detach().view(-1)[where.index_E].requires_grad_()
    x, dy = STRIDES[of_x](9, 5).detach().requires_grad_(), STRIDES[of_dy](9, 7)
    y, dense = sparse_linear(x, values_E, w, None, where), F.linear(x, w)
    dx, dvalues_E = torch.autograd.grad(y, [x, values_E], dy)
    dx_dense, dw = torch.autograd.grad(dense, [x, w], dy)
    assert close(y, dense) and close(dx, dx_dense) and close(dvalues_E, dw.reshape(-1)[where.index_E])


@few
@given(mask=masks(5), lead=st.sampled_from([(), (3,), (2, 2)]), has_bias=st.booleans())
def test_gradients_are_those_of_finite_differences(
    mask: Tensor, lead: tuple[int, ...], has_bias: bool
) -> None:
    """First and second; `weight` follows the values, as a parameter does."""
    where = where_of(mask)
    values_E = weight_of(mask).view(-1)[where.index_E].requires_grad_()
    x = torch.randn(*lead, mask.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(mask.shape[0], dtype=torch.float64, requires_grad=True) if has_bias else None

    def run(x: Tensor, values_E: Tensor, *rest: Tensor) -> Tensor:
        flat = torch.zeros(mask.numel(), dtype=torch.float64).scatter(0, where.index_E, values_E)
        return sparse_linear(x, values_E, flat.view(mask.shape), rest[0] if rest else None, where)

    inputs = [t for t in (x, values_E, bias) if t is not None and t.numel()]
    if values_E.numel() == 0:
        fixed = values_E.detach()
        assert torch.autograd.gradcheck(lambda x, *rest: run(x, fixed, *rest), inputs)
        return
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@few
@given(mask=masks(), seed=st.integers(0, 999))
def test_a_leafs_second_gradient_is_of_its_values_and_its_weight(mask: Tensor, seed: int) -> None:
    """Of |dy/dx|^2, as a gradient penalty has it."""
    where, w = where_of(mask), weight_of(mask, seed).requires_grad_()
    values_E = w.detach().view(-1)[where.index_E].requires_grad_()
    x = torch.randn(4, mask.shape[1], dtype=torch.float64, requires_grad=True)

    def penalty(y: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(torch.tanh(y).square().sum(), x, create_graph=True)
        return slope.square().sum() + y.sum()

    got = torch.autograd.grad(penalty(sparse_linear(x, values_E, w, None, where)), [x, values_E, w])
    dx, dw = torch.autograd.grad(penalty(F.linear(x, w)), [x, w])
    total_E = got[1] + got[2].reshape(-1)[where.index_E]
    assert torch.allclose(got[0], dx, rtol=1e-10, atol=1e-12)
    assert torch.allclose(total_E, dw.reshape(-1)[where.index_E], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_are_the_same_each_time_and_with_any_number_of_threads(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(300, 500, generator=g) < 0.1
    where = where_of(mask)
    values_E = torch.randn(len(where.index_E), generator=g, dtype=dtype, requires_grad=True)
    x = torch.randn(33, 500, generator=g, dtype=dtype, requires_grad=True)
    bias = torch.randn(300, generator=g, dtype=dtype, requires_grad=True)
    dy, unseen = torch.randn(33, 300, generator=g, dtype=dtype), torch.zeros(300, 500, dtype=dtype)
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 2, 1):
            torch.set_num_threads(count)
            y = sparse_linear(x, values_E, unseen, bias, where)
            seen.append((y, *torch.autograd.grad(y, [x, values_E], dy)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_inputs_are_left_as_they_are() -> None:
    mask = torch.eye(4, dtype=torch.bool)
    where, w = where_of(mask), weight_of(mask)
    values_E = w.view(-1)[where.index_E].requires_grad_()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64)
    tensors = [x, values_E, w, bias, *(t for t in where if isinstance(t, Tensor))]
    before = [t.detach().clone() for t in tensors]
    sparse_linear(x, values_E, w, bias, where).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
