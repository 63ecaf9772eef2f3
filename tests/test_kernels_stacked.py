"""Several models at once: the scores and gradients of each alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.kernels.stacked import StackedChain

ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.Softplus, nn.Identity, nn.SiLU)


def loop(models: list[nn.Module], x: Tensor) -> Tensor:
    return torch.stack([model(x_n) for model, x_n in zip(models, x, strict=True)])


def assert_alike(model: nn.Module, shape: tuple[int, ...], n: int = 3, b: int = 4, seed: int = 0) -> None:
    """Scores and gradients of n models of other weights, stacked and one by one, in float64."""
    with isolated_rng(seed):
        model = model.double()
        models = [copy.deepcopy(model) for _ in range(n)]
        for one in models:
            for p in one.parameters():
                nn.init.normal_(p, std=0.5)
        x = torch.randn(n, b, *shape, dtype=torch.float64)
        wanted = loop(models, x)
        weight = torch.randn(wanted.shape, dtype=torch.float64)
    named = [dict(one.named_parameters()) for one in models]
    stacked = {name: torch.stack([own[name].detach() for own in named]).requires_grad_() for name in named[0]}
    found = StackedChain(model, n)(stacked, x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    if not named[0]:
        return
    (wanted * weight).sum().backward()
    (found * weight).sum().backward()
    for name, leaf in stacked.items():
        for i, own in enumerate(named):
            grad = own[name].grad
            assert (grad is None) == (leaf.grad is None)
            if grad is not None and leaf.grad is not None:
                torch.testing.assert_close(leaf.grad[i], grad, rtol=1e-8, atol=1e-9)


@st.composite
def stacks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A random stack, and the shape of a sample."""
    channels, size = draw(st.sampled_from([1, 2, 4])), draw(st.integers(5, 9))
    shape = channels, size, size
    found: list[nn.Module] = []
    for _ in range(draw(st.integers(0, 3))):
        groups = draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
        kernel, stride, dilation = (draw(st.integers(1, most)) for most in (3, 2, 2))
        padding, out = kernel // 2, draw(st.sampled_from([2, 4, 6]))
        after = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if after < 2:
            break
        bias = draw(st.booleans())
        found.append(nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias))
        channels, size = out, after
        what = draw(st.sampled_from(["elementwise", "max", "average", "adaptive", "norm", "nothing"]))
        if what == "elementwise":
            found.append(draw(st.sampled_from(ELEMENTWISE))())
        elif what == "norm":
            found.append(nn.GroupNorm(draw(st.sampled_from([1, 2])), channels, affine=draw(st.booleans())))
        elif what == "adaptive":
            found.append(nn.AdaptiveAvgPool2d(2))
            size = 2
        elif what in ("max", "average") and size >= 4:
            found.append((nn.MaxPool2d if what == "max" else nn.AvgPool2d)(2))
            size //= 2
    features = size  # a linear layer works along the last axis
    if draw(st.booleans()):
        found.append(nn.Flatten())
        features = channels * size * size
    for _ in range(draw(st.integers(0, 3))):
        out = draw(st.integers(1, 5))
        found += [nn.Linear(features, out, bias=draw(st.booleans())), draw(st.sampled_from(ELEMENTWISE))()]
        features = out
    nested = draw(st.integers(0, len(found)))
    return nn.Sequential(nn.Sequential(*found[:nested]), *found[nested:]), shape


@given(stack=stacks(), n=st.integers(1, 4), b=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_random_stacks(stack: tuple[nn.Module, tuple[int, ...]], n: int, b: int, seed: int) -> None:
    model, shape = stack
    assert_alike(model, shape, n, b, seed)


def tied() -> nn.Module:
    """A layer twice, and a weight of two layers."""
    twice, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = twice.weight
    return nn.Sequential(twice, nn.Tanh(), twice, nn.Tanh(), other)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (tied, (4,)),
        (lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding="same"), nn.MaxPool1d(2), nn.Flatten()), (2, 8)),
        (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.AvgPool3d(2), nn.Linear(2, 2)), (1, 5, 5, 5)),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)), (3,)),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), (5, 3)),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.AvgPool1d(3, 1, 1), nn.Linear(8, 3)), (6,)),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.AdaptiveMaxPool1d(4)), (6,)),
        (lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Flatten(), nn.Linear(25, 3)), (5, 5)),
        (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.MaxPool2d(3, 1, 1), nn.Conv1d(3, 2, 1)), (2, 6)),
        (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4, eps=0.5)), (2, 6)),
        (lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.Unflatten(1, (2, 2))), (6,)),
        (lambda: nn.Linear(3, 2), (3,)),
    ],
    ids=[
        *("tied", "one axis", "three axes", "norm of rows", "sequences"),
        *("pool of rows", "adaptive pool of rows", "no channels", "pool of more axes", "large eps"),
        *("unflattened", "one layer"),
    ],
)  # fmt: skip
def test_other_stacks(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    assert_alike(make(), shape)


def buffered() -> nn.Module:
    """A bias that is not trained, nor in `parameters`."""
    layer = nn.Linear(2, 2)
    del layer.bias
    layer.register_buffer("bias", torch.ones(2))
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (lambda: nn.Conv1d(1, 2, 2), (4,), r"Conv1d of 1 channels got input of shape \[2, 4\]"),
        (lambda: nn.Conv2d(1, 2, 2), (3, 5, 5), r"Conv2d of 1 channels got input of shape \[2, 3, 5, 5\]"),
        (lambda: nn.GroupNorm(1, 3), (2, 5), r"GroupNorm of 3 channels got input of shape \[2, 2, 5\]"),
    ],
)
def test_images_that_do_not_fit_are_told_as_those_of_one_model(
    make: Callable[[], nn.Module], shape: tuple[int, ...], message: str
) -> None:
    """Two models whose channels would fit together, too."""
    model = make()
    tensors = {name: torch.stack([p, p]) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        StackedChain(model, 2)(tensors, torch.zeros(2, 2, *shape))


class Own(nn.Linear):
    """May compute anything."""


def hooked() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: None)
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(Own(2, 2)),
        hooked,
        lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
        lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")),
        lambda: nn.Sequential(nn.MaxPool2d(2, return_indices=True)),
        lambda: nn.Sequential(nn.Flatten(0), nn.Linear(2, 2)),
        lambda: nn.Sequential(nn.Conv1d(1, 1, 2), nn.Flatten(1, 1)),
        buffered,
        lambda: nn.Sequential(nn.Unflatten(0, (2, 2))),
        lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
        lambda: nn.Sequential(nn.Embedding(3, 2)),
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Softmax(1)),
    ],
)
def test_what_is_no_plain_stack_is_left_to_others(make: Callable[[], nn.Module]) -> None:
    assert not StackedChain.fits(make())
    with pytest.raises(ValueError, match="no plain stack"):
        StackedChain(make(), 2)


def test_dropout_draws_for_each_model_and_sample() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    with isolated_rng(1):
        out = StackedChain(model.train(), 2)({}, torch.ones(2, 3, 40))
    assert set(out.flatten().tolist()) == {0.0, 2.0}
    assert len({tuple(row) for row in out.flatten(0, 1).tolist()}) == 6
    assert torch.equal(StackedChain(model.eval(), 2)({}, torch.ones(2, 3, 4)), torch.ones(2, 3, 4))


@given(
    n=st.integers(1, 3),
    shape=st.sampled_from([(4,), (2, 3)]),
    loss=st.sampled_from(["cross_entropy", "bce"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_losses_are_those_of_each(n: int, shape: tuple[int, ...], loss: str, seed: int) -> None:
    """Labels that cross-entropy leaves out, too; of a text's positions as of images."""
    g = torch.Generator().manual_seed(seed)
    output = torch.randn(n, shape[0], 5, *shape[1:], generator=g, dtype=torch.float64)
    y = torch.randint(0, 5, (n, *shape), generator=g)
    if loss == "cross_entropy":
        y = torch.where(torch.rand(y.shape, generator=g) < 0.2, -100, y)
    trainer = BuiltinTrainer(loss=loss)  # type: ignore[arg-type]  # drawn as a str
    wanted = torch.stack([trainer.loss_of(o, own) for o, own in zip(output, y, strict=True)])
    torch.testing.assert_close(trainer.losses_of(output, y), wanted, rtol=1e-10, atol=0, equal_nan=True)
    if loss == "cross_entropy":
        assert torch.equal(F.cross_entropy(output[0], y[0]).isnan(), (y[0] == -100).all())
