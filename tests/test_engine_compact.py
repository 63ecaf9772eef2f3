"""The cheap ways of a client's step are the same step: sparse layers, thin parameters, faster formats."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedgmr_plugin.engine import client, compact, formats, trainer
from fedgmr_plugin.engine.client import RecentMasks, parameter_masks, train_dispatch
from fedgmr_plugin.engine.compact import Leaf, Masks, _OnValues, distance_sq, distances, leaves_of
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.formats import fast_formats
from fedgmr_plugin.engine.samples import Batch, BatchList, BatchPlan, TensorSamples
from fedgmr_plugin.engine.trainer import BuiltinTrainer, LocalStats
from fedgmr_plugin.errors import DataError
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


@pytest.mark.parametrize("density", [0.05, 0.25])
def test_a_sparse_layers_bits_do_not_depend_on_threads_or_time(density: float) -> None:
    torch.manual_seed(0)
    mask = torch.rand(512, 700) < density
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
            patch.setattr(trainer, "fast_formats", lambda model: nullcontext())
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
    replaced[0].forward = lambda x: x  # type: ignore[method-assign]  # what users do
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


# -- what else may happen to a weight --------------------------------------------------------------


def reference(
    model: nn.Module, masks: dict[str, Tensor], batches: Sequence[Batch], case: dict[str, Any]
) -> tuple[float, float, list[list[Tensor]]]:
    """Train `model` densely with torch's own optimizers: (mean loss, drift, x_k before each step and after).

    Weights under masks must be 0; gradients outside are filled with 0.
    """
    parameters = dict(model.named_parameters())
    keys = {"lr": 0.1, "weight_decay": case.get("weight_decay", 0.0)}
    optimizer: torch.optim.Optimizer
    if case.get("optimizer") == "adam":
        optimizer = torch.optim.Adam(parameters.values(), amsgrad=True, **keys)
    else:
        optimizer = torch.optim.SGD(parameters.values(), momentum=case.get("momentum", 0.0), **keys)
    path, losses = [[p.detach().clone() for p in parameters.values()]], []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None and name in masks:
                parameter.grad.masked_fill_(~masks[name], 0.0)
        if "gradient_clip" in case:
            torch.nn.utils.clip_grad_norm_(parameters.values(), case["gradient_clip"])
        optimizer.step()
        losses.append(float(loss.detach()))
        path.append([p.detach().clone() for p in parameters.values()])
    squares = [
        sum(float((a - b).square().sum()) for a, b in zip(x_k, path[0], strict=True)) for x_k in path[:-1]
    ]
    return sum(losses) / len(losses), sum(squares) / len(squares), path


def cut(model: nn.Module, share: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """Masks of `model`'s matrices, applied to it; a row without a weight has no direction to normalise."""
    masks = {n: m for n, m in masks_of(model, share, seed).items() if "parametrizations" not in n}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    return masks


def assert_trains_as_the_reference(
    make: Any, batches: Sequence[Batch], case: dict[str, Any], *, layers: list[str] | None = None
) -> None:
    """For the model that `make` returns, however little of it is left; `layers` are those on values."""
    dense, thin = make(), make()
    masks = cut(dense)
    cut(thin)
    loss, drift, path = reference(dense, masks, batches, case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "THIN_DENSITY", 1.0)
        patch.setattr(compact, "SPARSE_DENSITY", 1.0)
        if layers is not None:
            with leaves_of(thin, masks):
                assert [
                    n for n, m in thin.named_modules() if type(m.__dict__.get("forward")) is _OnValues
                ] == layers
        own = [m.__dict__.get("forward") for m in thin.modules()]
        stats = BuiltinTrainer(**case).train(thin, batches, masks, learning_rate=0.1, client=0)
    for (name, got), wanted in zip(thin.named_parameters(), path[-1], strict=True):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-13), name
        if name in masks:
            assert (got[~masks[name]] == 0).all()
    assert stats.train_loss == pytest.approx(loss, rel=1e-6)
    assert stats.drift_sq == pytest.approx(drift, rel=1e-10)
    assert [m.__dict__.get("forward") for m in thin.modules()] == own


EVERY = [*ALL, {"momentum": 0.9, "weight_decay": 0.1, "gradient_clip": 0.1}]
EVERY += [{"optimizer": "adam", "weight_decay": 0.1, "gradient_clip": 0.1}]


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_training_is_torchs_own_on_masked_gradients(case: dict[str, Any]) -> None:
    assert_trains_as_the_reference(stack, batches_of(5, 4), case, layers=["0", "2", "4"])


class Uses(nn.Module):
    """One linear layer, and a use of it that each test chooses."""

    def __init__(self, use: Any) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net, self.out, self.use = nn.Linear(4, 4), nn.Linear(4, 3), use
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(torch.tanh(self.use(self.net, x)))
        return result


def swapped(net: nn.Linear, x: Tensor) -> Tensor:
    weights = {"weight": 2 * net.weight, "bias": net.bias}
    result: Tensor = torch.func.functional_call(net, weights, (x,))
    return result


def slopes(net: nn.Linear, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(lambda z: torch.tanh(net(z))))(x).sum(-1)


def tangents(net: nn.Linear, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = torch.tanh(net(forward_ad.make_dual(x, torch.ones_like(x))))
        return forward_ad.unpack_dual(y).tangent


def clamped(net: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.weight.clamp_(-0.2, 0.2)
    return net(x)


def clamped_after(net: nn.Linear, x: Tensor) -> Tensor:
    y = net(x.detach()).detach()
    return y + clamped(net, x)


def copied(net: nn.Linear, x: Tensor) -> Tensor:
    other = copy.deepcopy(net)
    other.weight.data.mul_(2)
    return net(x) + copy.deepcopy(other)(x).detach()


USES: dict[str, Any] = {
    "twice": lambda net, x: net(torch.tanh(net(x))),
    "and its weight": lambda net, x: net(x) * net.weight.square().mean(),
    "its weight only": lambda net, x: F.linear(x, net.weight),
    "not at all": lambda net, x: x,
    "recomputed": lambda net, x: checkpoint(net, x, use_reentrant=False),
    "recomputed within backward": lambda net, x: checkpoint(net, x.requires_grad_(), use_reentrant=True),
    "another weight for once": swapped,
    "vmap": lambda net, x: torch.func.vmap(net)(x),
    "jacobians": slopes,
    "forward differentiation": tangents,
    "written before": clamped,
    "written between": clamped_after,
    "copied": copied,
    "no gradient": lambda net, x: net(x).detach(),
    "infinite outside": lambda net, x: x @ net.weight.clamp(min=0).sqrt().where(net.weight > 0, 0.0).T,
}


@pytest.mark.parametrize("case", [{"momentum": 0.9, "weight_decay": 0.1}, {"optimizer": "adam"}], ids=str)
@pytest.mark.parametrize("use", USES)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_any_use_of_a_layer_trains_as_the_reference(use: str, case: dict[str, Any]) -> None:
    assert_trains_as_the_reference(lambda: Uses(USES[use]), batches_of(4, 4), case, layers=["net", "out"])


def test_a_gradient_that_is_infinite_outside_the_mask_moves_nothing_there() -> None:
    """d sqrt(w) / dw at the 0 of a masked weight."""

    def make() -> Uses:
        model = Uses(lambda net, x: x @ net.weight.sqrt().T)
        with torch.no_grad():
            model.net.weight.abs_().add_(1)
        return model

    batches = batches_of(3, 4)
    for case in EVERY[:4]:
        assert_trains_as_the_reference(make, batches, case)
    probe = make()
    masks = cut(probe)
    F.cross_entropy(probe(batches[0][0]), batches[0][1]).backward()
    assert probe.net.weight.grad is not None
    assert not torch.isfinite(probe.net.weight.grad[~masks["net.weight"]]).any()


def tokens(count: int) -> list[Batch]:
    g = torch.Generator().manual_seed(7)
    return [(torch.randint(0, 10, (6,), generator=g), torch.randint(0, 10, (6,), generator=g))] * count


def tied() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10)).double()
    model[1].weight = model[0].weight
    return model


def renormed() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(10, 4, max_norm=0.3), nn.Linear(4, 10)).double()


def repeated() -> nn.Sequential:
    torch.manual_seed(3)
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3)).double()


def patched() -> nn.Sequential:
    """A layer whose ``forward`` somebody replaced with one that looks at another layer."""
    model = stack()
    model[1].forward = lambda x: torch.tanh(x) * model[0].weight.norm()  # type: ignore[method-assign]  # likewise
    return model


def doubled() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(Doubled(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def sharing_with_a_subclass() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(Doubled(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    return model


def weight_normed() -> nn.Sequential:
    model = stack()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def hooked() -> nn.Sequential:
    model = stack()
    model[0].weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    model[2].register_forward_hook(lambda layer, _, y: y * layer.weight.norm())
    return model


def frozen() -> nn.Sequential:
    model = stack()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def biasless() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()


@pytest.mark.parametrize("case", [{"momentum": 0.9, "weight_decay": 0.1}, {"optimizer": "adam"}], ids=str)
@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (repeated, ["0", "3"]),
        (patched, ["0", "2", "4"]),
        (doubled, ["2"]),
        (sharing_with_a_subclass, ["2"]),
        (weight_normed, ["2", "4"]),
        (hooked, ["2", "4"]),
        (frozen, ["2", "4"]),
        (biasless, ["0", "2"]),
        (tied, ["1"]),
        (renormed, ["1"]),
    ],
)
def test_any_model_trains_as_the_reference(make: Any, layers: list[str], case: dict[str, Any]) -> None:
    batches = tokens(4) if make in (tied, renormed) else batches_of(4, 4)
    assert_trains_as_the_reference(make, batches, case, layers=layers)


def test_sparse_gradients_train_as_dense_ones() -> None:
    """Those of an embedding that asks for them."""
    dense, picky = (
        nn.Sequential(nn.Embedding(10, 4, sparse=s), nn.Linear(4, 10)).double() for s in (False, True)
    )
    picky.load_state_dict(dense.state_dict())
    models = iter([dense, picky])
    assert_trains_as_the_reference(lambda: next(models), tokens(4), {"momentum": 0.9}, layers=["1"])


class Marked(Tensor):
    """A user's own kind of input."""


def test_inputs_of_a_subclass_see_the_weights_of_each_step() -> None:
    batches = [(x.as_subclass(Marked), y) for x, y in batches_of(4, 4)]
    assert_trains_as_the_reference(stack, batches, {"momentum": 0.9}, layers=["0", "2", "4"])


def test_automatic_types_see_the_weights_of_each_step() -> None:
    """Without its cache, which keeps a weight's first value as long as the context lasts."""
    dense, thin = stack(torch.float32), stack(torch.float32)
    masks, batches = cut(dense), batches_of(4, 4, dtype=torch.float32)
    cut(thin)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
        pytest.MonkeyPatch.context() as patch,
    ):
        reference(dense, masks, batches, {})
        patch.setattr(compact, "THIN_DENSITY", 1.0)
        patch.setattr(compact, "SPARSE_DENSITY", 1.0)
        BuiltinTrainer().train(thin, batches, masks, learning_rate=0.1, client=0)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), thin.parameters(), strict=True))


@pytest.mark.parametrize("make", [stack, lambda: Uses(USES["twice"])])
@pytest.mark.parametrize("sparse", [0.0, 1.0])
def test_whoever_watches_sees_every_x_k(make: Any, sparse: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "THIN_DENSITY", 1.0)
    monkeypatch.setattr(compact, "SPARSE_DENSITY", sparse)
    dense, thin = make(), make()
    masks, data = cut(dense), batches_of(5, 4)
    cut(thin)
    _, _, path = reference(dense, masks, data, {"momentum": 0.9})
    seen: list[list[Tensor]] = []
    rows = TensorSamples(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    indices = [np.arange(5 * k, 5 * k + 5) for k in range(5)]
    batches = BatchList(rows, indices, lambda: seen.append([p.detach().clone() for p in thin.parameters()]))
    BuiltinTrainer(momentum=0.9).train(thin, batches, masks, learning_rate=0.1, client=0)
    seen.append([p.detach().clone() for p in thin.parameters()])
    assert len(seen) == len(path) == 6
    for x_k, wanted in zip(seen, path, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(x_k, wanted, strict=True))


class Fails(nn.Module):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("enough")
        return x


@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_that_fails_computes_as_before_on_what_it_reached(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "THIN_DENSITY", 1.0)
    monkeypatch.setattr(compact, "SPARSE_DENSITY", 1.0)
    dense, thin = stack(), nn.Sequential(*stack(), Fails(steps))
    masks, batches = cut(dense), batches_of(3, 4)
    cut(thin)
    _, _, path = reference(dense, masks, batches, {})
    with pytest.raises(DataError, match="GMR-304 client=0: RuntimeError: enough"):
        BuiltinTrainer().train(thin, batches, masks, learning_rate=0.1, client=0)
    assert all("forward" not in m.__dict__ for m in thin.modules())
    for got, wanted in zip(thin.parameters(), path[steps], strict=True):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-13)
        assert got.requires_grad and got.is_leaf
    with torch.no_grad():  # a write into a weight counts again
        thin[0].weight.zero_()
        assert torch.equal(thin[0](batches[0][0]), thin[0].bias.expand(5, 6))


def test_a_trained_model_can_be_copied_and_pickled() -> None:
    model = stack()
    trained(model, masks_of(model, 0.1, 0), batches_of(2, 4), {}, thin=1.0, sparse=1.0)
    x = torch.randn(2, 4, dtype=torch.float64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  (its own bytes)
        assert torch.equal(other(x), model(x))


# -- the optimizer and the masks -------------------------------------------------------------------


@few
@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    rate=st.sampled_from([0.0, 0.03, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
    pattern=st.lists(st.sets(st.integers(0, 2)), min_size=1, max_size=5),
)
def test_sgd_is_torchs_to_the_bit(
    momentum: float, weight_decay: float, rate: float, dtype: torch.dtype, seed: int, pattern: list[set[int]]
) -> None:
    """Whichever tensors have a gradient in a step; gradients are left as they are."""
    g = torch.Generator().manual_seed(seed)
    ours = [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in [(3,), (2, 4), ()]]
    torchs = [t.detach().clone().requires_grad_() for t in ours]
    sgd = trainer.SGD(ours, rate, momentum, weight_decay)
    wanted = torch.optim.SGD(torchs, lr=rate, momentum=momentum, weight_decay=weight_decay)
    for present in pattern:
        for i, (a, b) in enumerate(zip(ours, torchs, strict=True)):
            a.grad = torch.randn(a.shape, generator=g, dtype=dtype) if i in present else None
            b.grad = None if a.grad is None else a.grad.clone()
        sgd.step()
        wanted.step()
        for a, b in zip(ours, torchs, strict=True):
            assert torch.equal(a, b) and (
                a.grad is None or (b.grad is not None and torch.equal(a.grad, b.grad))
            )


def test_elsewhere_holes_are_filled_whatever_is_there() -> None:
    """What the leaf of a parameter on a GPU does; the mask of a parameter on the CPU is no hole."""
    masks = Masks({"a": torch.tensor([True, False, True]), "b": torch.tensor([False, True, True])})
    for name, mask in masks.items():
        assert torch.equal(masks.hole(name), ~mask) and masks.copy().hole(name) is masks.hole(name)
    p = nn.Parameter(torch.zeros(3))
    leaf = Leaf(p, p, torch.zeros(3), hole=masks.hole("a"))
    p.grad = torch.tensor([float("inf"), float("nan"), 2.0])
    leaf.restrict()
    assert p.grad.tolist() == [float("inf"), 0.0, 2.0]


@given(
    sizes=st.lists(st.sampled_from([1, 7, 2**15, 2**16 + 5, 2**17 + 1]), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=20, deadline=None)
def test_distances_are_those_in_float64(sizes: list[int], dtype: torch.dtype, seed: int) -> None:
    """In pieces, as on the CPU, and by lists, as elsewhere."""
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(size, generator=g, dtype=dtype) for size in sizes]
    start = [t + 1e-3 * torch.randn(t.shape, generator=g, dtype=dtype) for t in x]
    wanted = [float((a - b).double().square().sum()) for a, b in zip(x, start, strict=True)]
    assert float(distance_sq(x, start)) == pytest.approx(sum(wanted), rel=1e-12)
    assert distances(x, start).square().tolist() == pytest.approx(wanted, rel=1e-12)
    across = torch.randn(sizes[0], 2, generator=g, dtype=dtype).t()
    assert float(distance_sq([across], [torch.zeros_like(across)])) == pytest.approx(
        float(across.double().square().sum()), rel=1e-12
    )


def test_recent_masks_are_equal_and_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack(torch.float32)
    layout = build_layout(model)
    w_D = layout.gather(model)
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), (0.2, 0.4, 0.6, 0.8, 1.0))
    made: list[Tensor] = []

    def spy(layout_: Any, mask_D: Tensor) -> Any:
        made.append(mask_D)
        return parameter_masks(layout_, mask_D)

    monkeypatch.setattr(client, "parameter_masks", spy)
    monkeypatch.setattr(client, "_KEPT_BYTES", 3 * layout.size - 1)
    recent = RecentMasks(layout)
    first = recent(ranking, 0)
    for rung in (0, 1, 0, 1):
        masks, wanted = recent(ranking, rung), parameter_masks(layout, ranking.mask(rung))
        assert masks is not None and wanted is not None and masks.keys() == wanted.keys()
        assert all(torch.equal(masks[n], wanted[n]) for n in wanted)
    assert len(made) == 2
    recent(ranking, 0)
    assert recent(ranking, 4) is None and len(made) == 2
    assert recent(ranking, 2) and recent(ranking, 2) and len(made) == 3
    recent(ranking, 0)
    assert len(made) == 3  # 1 was used longest ago
    recent(ranking, 1)
    assert len(made) == 4
    assert first is not None
    first.clear()
    assert recent(ranking, 0) and len(made) == 4

    monkeypatch.setattr(client, "_KEPT_BYTES", 1)
    only = RecentMasks(layout)
    for rung in (0, 0, 1, 1, 0):
        only(ranking, rung)
    assert len(made) == 7


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
