"""The cheap ways of a client's step are the same step: sparse layers, thin parameters, faster formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedgmr_plugin.engine import client, compact, formats
from fedgmr_plugin.engine.client import (
    Batch,
    BatchList,
    BatchPlan,
    BuiltinTrainer,
    LocalStats,
    TensorSamples,
    train_dispatch,
)
from fedgmr_plugin.engine.compact import Masks, leaves_of
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.formats import fast_formats
from fedgmr_plugin.kernels import build_layout, rank, scores
from fedgmr_plugin.kernels.sparse_linear import flat_index, sparse_linear, support

few = settings(max_examples=max(10, settings().max_examples // 3), deadline=None)
ALL = [{}, {"momentum": 0.9}, {"weight_decay": 0.3}, {"gradient_clip": 0.05}, {"optimizer": "adam"}]


@pytest.fixture(autouse=True)
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of any size are worth it here."""
    monkeypatch.setattr(compact, "THIN_SIZE", 1)
    monkeypatch.setattr(compact, "_CHUNK", 16)


# -- the kernel ------------------------------------------------------------------------------------


@few
@given(
    lead=st.sampled_from([(), (1,), (7,), (3, 4), (0,)]),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    share=st.floats(0, 1),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_a_sparse_layer_is_the_dense_one(
    lead: tuple[int, ...],
    rows: int,
    columns: int,
    share: float,
    has_bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Output and all gradients: 1e-12 in float64; in float32 24 roundings of sums of at most 12 terms."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    mask = torch.rand(rows, columns, generator=g) < share
    where = support((rows, columns), flat_index(mask))
    w = (draw(rows, columns) * mask).requires_grad_()
    values_E = w.detach().view(-1)[where.index_E].requires_grad_()
    bias = draw(rows).requires_grad_() if has_bias else None
    x, dy = draw(*lead, columns).requires_grad_(), draw(*lead, rows)
    extra = [] if bias is None else [bias]
    got = sparse_linear(x, values_E, w, bias, where)
    got_grads = torch.autograd.grad(got, [x, values_E, *extra], dy)
    wanted = F.linear(x, w, bias)
    dx, dw, *rest = torch.autograd.grad(wanted, [x, w, *extra], dy)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert got.is_contiguous() and torch.equal(where.index_E, mask.view(-1).nonzero().squeeze(1))
    for a, b in zip([got, *got_grads], [wanted, dx, dw.reshape(-1)[where.index_E], *rest], strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_a_sparse_layers_bits_do_not_depend_on_threads_or_time() -> None:
    torch.manual_seed(0)
    mask = torch.rand(512, 700) < 0.05
    where = support((512, 700), flat_index(mask))
    values_E = torch.randn(len(where.index_E), requires_grad=True)
    x, dy = torch.randn(20, 700, requires_grad=True), torch.randn(20, 512)
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4, 1):
            torch.set_num_threads(count)
            y = sparse_linear(x, values_E, torch.zeros(512, 700), None, where)
            seen.append((y, *torch.autograd.grad(y, [x, values_E], dy)))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


# -- training --------------------------------------------------------------------------------------


def stack(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)


def masks_of(model: nn.Module, share: float, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=g) < share for n, p in model.named_parameters() if p.dim() > 1}


def batches_of(count: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    g = torch.Generator().manual_seed(5)
    return [
        (torch.randn(5, *shape, generator=g, dtype=dtype), torch.randint(0, 3, (5,), generator=g))
        for _ in range(count)
    ]


def trained(
    model: nn.Module,
    masks: dict[str, Tensor],
    batches: Sequence[Batch],
    case: dict[str, Any],
    *,
    thin: float,
    sparse: float,
    quick: bool = False,
) -> tuple[list[Tensor], LocalStats]:
    """x_K and the report of a training of `model`, with the thresholds at `thin` and `sparse`."""
    x_0 = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "THIN_DENSITY", thin)
        patch.setattr(compact, "SPARSE_DENSITY", sparse)
        if not quick:
            patch.setattr(client, "fast_formats", lambda model: nullcontext())
        stats = BuiltinTrainer(**case).train(model, batches, masks, learning_rate=0.1, client=0)
    x_K = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), x_0, strict=True):
            parameter.copy_(value)
    assert all("forward" not in m.__dict__ for m in model.modules())
    return x_K, stats


@few
@given(
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    case=st.sampled_from(ALL),
    sparse=st.sampled_from([0.0, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_thin_parameters_train_as_masked_ones(
    share: float, seed: int, case: dict[str, Any], sparse: float, dtype: torch.dtype
) -> None:
    """Equal to 1e-12 in float64; in float32 to 1e-4 (Adam divides by small square roots)."""
    model = stack(dtype)
    masks, batches = masks_of(model, share, seed), batches_of(4, 4, dtype=dtype)
    wanted, report = trained(model, masks, batches, case, thin=0.0, sparse=0.0)
    got, stats = trained(model, masks, batches, case, thin=1.0, sparse=sparse)
    again, _ = trained(model, masks, batches, case, thin=1.0, sparse=sparse)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for a, b, c, (name, _) in zip(got, wanted, again, model.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance) and torch.equal(a, c)
        if name in masks:
            assert (a[~masks[name]] == 0).all()
    assert stats.train_loss == pytest.approx(report.train_loss, rel=1e-5)
    assert stats.drift_sq == pytest.approx(report.drift_sq, rel=1e-5, abs=1e-12)


class Own(nn.Module):
    """3-D inputs, a weight of two layers that is used once more, and a gradient in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            x = x.clone().requires_grad_()
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        (slope,) = torch.autograd.grad(hidden.square().sum(), x, create_graph=True)
        scale = self.first.weight.square().sum()
        result: Tensor = self.out(hidden + 0.1 * slope).mean(1) * scale
        return result


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("sparse", [0.0, 1.0])
def test_every_use_of_a_thin_weight_counts(case: dict[str, Any], sparse: float) -> None:
    torch.manual_seed(1)
    model = Own().double()
    masks, batches = masks_of(model, 0.4, 3), batches_of(3, 2, 4)
    wanted, _ = trained(model, masks, batches, case, thin=0.0, sparse=0.0)
    got, _ = trained(model, masks, batches, case, thin=1.0, sparse=sparse)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def sparse_layers(model: nn.Module) -> list[str]:
    """Names of the layers that compute on their values."""
    with leaves_of(model, masks_of(model, 0.1, 0)):
        return [n for n, m in model.named_modules() if "forward" in m.__dict__]


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_only_plain_linear_layers_compute_on_their_values() -> None:
    plain = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3))
    assert sparse_layers(plain) == ["0", "1"]
    assert sparse_layers(nn.Sequential(Doubled(20, 20), nn.Conv1d(2, 2, 3))) == []
    parametrised = nn.Sequential(nn.Linear(20, 20))
    nn.utils.parametrizations.weight_norm(parametrised[0])
    assert sparse_layers(parametrised) == []
    hooked = nn.Sequential(nn.Linear(20, 20))
    hooked[0].weight.register_hook(lambda grad: 2 * grad)
    assert sparse_layers(hooked) == []
    compiled = nn.Sequential(nn.Linear(20, 20))
    compiled.compile()
    assert sparse_layers(compiled) == []
    replaced = nn.Sequential(nn.Linear(20, 20))
    replaced[0].forward = lambda x: x  # type: ignore[method-assign]
    with leaves_of(replaced, masks_of(replaced, 0.1, 0)):
        pass
    assert "forward" in replaced[0].__dict__


def test_inputs_of_another_kind_are_computed_densely() -> None:
    model = stack(torch.float32)
    masks = masks_of(model, 0.1, 0)
    for n, p in model.named_parameters():
        if n in masks:
            p.data.mul_(masks[n])
    x = torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = model(x)
        with leaves_of(model, masks):
            assert "forward" in model[0].__dict__ and torch.equal(model(x), wanted)


def test_the_model_is_whole_after_an_error() -> None:
    model = stack()

    class Bad(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            yield from batches_of(1, 4)
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        trained(model, masks_of(model, 0.1, 0), Bad(), {}, thin=1.0, sparse=1.0)
    assert all("forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_watching_shows_every_step_and_changes_no_bit(
    density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watched model holds x_k: the last x_k seen differs from the first, and the result is the same."""
    model = stack(torch.float32)
    layout = build_layout(model)
    w_D = layout.gather(model)
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), (density,))
    monkeypatch.setattr(compact, "SPARSE_DENSITY", 0.3)
    x = torch.randn(30, 4)
    seen: list[Tensor] = []

    def run(on_step: Any) -> Tensor:
        sent = Dispatch(0, 0, 0, 0, density, ranking, 0, w_D[ranking.support(0)])
        return train_dispatch(
            sent,
            model=model,
            layout=layout,
            trainer=BuiltinTrainer(),
            samples=TensorSamples(x, torch.arange(30) % 3),
            plan=BatchPlan(5, 3, 1, True, 0),
            learning_rate=0.1,
            form="replacement",
            on_step=on_step,
        ).values_S

    alone = run(None)
    watched = run(lambda: seen.append(layout.gather(model)[ranking.support(0)]))
    assert torch.equal(alone, watched) and len(seen) == 3
    assert torch.equal(seen[0], w_D[ranking.support(0)])
    assert not torch.equal(seen[1], seen[0]) and not torch.equal(seen[2], seen[1])


def test_lists_of_batches_say_whether_they_are_watched() -> None:
    data = TensorSamples(torch.zeros(1), torch.zeros(1))
    assert BatchList(data, [], lambda: None).watched and not BatchList(data, []).watched


def test_masks_remember_what_was_asked_for_until_a_mask_is_replaced() -> None:
    masks = Masks({"w": torch.tensor([[True, False], [True, True]])})
    copied = masks.copy()
    assert copied == masks and copied.support("w") is masks.support("w") and masks.share("w") == 0.75
    copied["w"] = torch.tensor([[True, False], [False, False]])
    assert copied.index("w").tolist() == [0] and masks.index("w").tolist() == [0, 2, 3]


# -- formats ---------------------------------------------------------------------------------------


def images(*head: nn.Module, units: int) -> nn.Sequential:
    return nn.Sequential(*head, nn.Flatten(), nn.Linear(units, 3))


def cnn(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    normed = [
        nn.Conv2d(32, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
    ]  # its bias would have no gradient
    wide = nn.Sequential(*normed, nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return images(narrow, wide, units=16).to(dtype)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_faster_formats_compute_the_same(case: dict[str, Any]) -> None:
    model, batches = cnn(), batches_of(3, 1, 8, 8)
    masks = masks_of(model, 0.5, 0)
    wanted, _ = trained(model, masks, batches, case, thin=0.0, sparse=0.0)
    got, _ = trained(model, masks, batches, case, thin=0.0, sparse=0.0, quick=True)
    for a, b in zip(got, wanted, strict=True):
        assert a.stride() == b.stride() and torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_a_relu_after_the_pooling_gives_the_same_bits() -> None:
    """With ties, zeros of both signs and windows without a positive value."""
    torch.manual_seed(0)
    model = images(nn.ReLU(), nn.MaxPool2d(3, 2, 1), units=5 * 4 * 4)
    x = torch.randint(-2, 3, (6, 5, 8, 8)).float().mul(torch.randint(0, 2, (6, 5, 8, 8)) * 2 - 1.0)
    x.requires_grad_()
    wanted = model(x)
    (grad,) = torch.autograd.grad(wanted.square().sum(), x)
    with fast_formats(model):
        assert "forward" in model[0].__dict__
        got = model(x)
        (other,) = torch.autograd.grad(got.square().sum(), x)
    assert torch.equal(got, wanted) and torch.equal(other, grad)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 2, 3), nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.conv(x).view(len(x), -1))
        return result


def test_only_plain_stacks_change_their_format() -> None:
    relu = nn.ReLU()

    def hooked() -> nn.Sequential:
        model = images(nn.Conv2d(1, 2, 3), units=72)
        model[0].register_forward_hook(lambda *_: None)
        return model

    untouched = [
        Views(),
        images(nn.Conv2d(1, 2, 3), nn.Dropout(), units=72),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(1, 2, 3), Views()),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(2)),
        images(nn.MaxPool2d(2, return_indices=True), units=16),
        hooked(),
        nn.Sequential(relu, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 4), relu),
    ]
    trained(Views(), {}, batches_of(1, 1, 8, 8, dtype=torch.float32), {}, thin=0.0, sparse=0.0, quick=True)
    for model in untouched:
        with fast_formats(model):
            assert all("forward" not in m.__dict__ for m in model.modules()), model
    shared = images(nn.Conv2d(1, 2, 3), relu, nn.MaxPool2d(2), relu, units=18)
    with fast_formats(shared):
        assert "forward" not in relu.__dict__ and "forward" in shared[0].__dict__
    with pytest.raises(RuntimeError), fast_formats(shared):
        raise RuntimeError
    assert all("forward" not in m.__dict__ for m in shared.modules())
    assert formats.WIDE_CHANNELS == 32
