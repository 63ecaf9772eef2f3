"""Widths: the smaller stack, its mask and its share of weights, against brute force."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedgmr_plugin.errors import ModelError
from fedgmr_plugin.kernels import build_layout
from fedgmr_plugin.kernels.chain import is_chain, layers
from fedgmr_plugin.kernels.width import axes, narrow, prunable_kept, rank_widths, widths

few = settings(max_examples=max(10, settings().max_examples // 4))
LADDER = (0.05, 0.1, 0.2, 0.5, 1.0)


def lenet(classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 10, 3, padding=1)),
        nn.InstanceNorm2d(10, affine=True),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(40, track_running_stats=False),
        nn.Dropout(0.5),
        nn.Linear(40, 12, bias=False),
        nn.Tanh(),
        nn.Linear(12, classes),
        nn.Softmax(dim=1),
    )


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 7), nn.ReLU(), nn.Linear(7, 5), nn.ELU(), nn.Linear(5, 3)
    )


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.GELU(), nn.Conv2d(4, 2, 2, bias=False))


STACKS = pytest.mark.parametrize("make", [lenet, perceptron, convolutional])


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model.eval()


def masked_output(model: nn.Module, mask_D: Tensor, x: Tensor) -> Tensor:
    """Output of `model` with the coordinates outside of a mask set to 0."""
    layout = build_layout(model)
    flat_D = layout.gather(model)
    layout.scatter(model, flat_D * mask_D)
    output: Tensor = model(x)
    layout.scatter(model, flat_D)
    return output


@STACKS
def test_a_narrow_stack_computes_what_the_masked_one_does(make: type[nn.Sequential]) -> None:
    model = randomised(make())
    layout = build_layout(model)
    x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    ranking = rank_widths(model, layout, LADDER)
    with torch.no_grad():
        for rung, width in enumerate(widths(model, layout, LADDER)):
            small = narrow(model, layout, width)
            torch.testing.assert_close(
                small.model(x), masked_output(model, ranking.mask(rung), x), atol=1e-6, rtol=1e-6
            )
        torch.testing.assert_close(small.model(x), model(x), atol=0, rtol=0)


@STACKS
def test_the_mask_holds_exactly_the_smaller_stacks_coordinates(make: type[nn.Sequential]) -> None:
    model = randomised(make())
    layout = build_layout(model)
    flat_D = torch.arange(layout.size, dtype=torch.float32)  # every coordinate is its own value
    layout.scatter(model, flat_D)
    ranking = rank_widths(model, layout, LADDER)
    for rung, width in enumerate(widths(model, layout, LADDER)):
        small = narrow(model, layout, width)
        own = build_layout(small.model)
        assert [e.name for e in own.entries] == [e.name for e in layout.entries]
        assert [e.kind for e in own.entries] == [e.kind for e in layout.entries]
        assert torch.equal(own.gather(small.model), small.index_S.float())
        assert torch.equal(ranking.mask(rung).nonzero().squeeze(1), small.index_S)
        assert own.prunable == prunable_kept(layout, axes(model), width)
        for (_, a), (_, b) in zip(layers(small.model), layers(model), strict=True):
            assert type(a) is type(b) and repr(a) == repr(rebuilt(a))


def rebuilt(layer: nn.Module) -> nn.Module:
    """A new layer of the sizes that `layer` states; fails where its tensors are of others."""
    made: nn.Module = eval(f"nn.{layer!r}", {"nn": nn, **vars(nn)})  # noqa: S307  # torch's own representation
    if layer._parameters:
        made.load_state_dict(layer.state_dict())
    return made


def brute_width(model: nn.Module, density: float) -> Fraction:
    """The largest j/C whose stack, built, has few enough prunable weights; else the least."""
    layout = build_layout(model)
    counts = {axis.units for entry in axes(model).values() for axis in entry if axis.hidden}
    candidates = sorted({Fraction(j, c) for c in counts for j in range(1, c + 1)})
    fits = [
        p for p in candidates
        if build_layout(narrow(model, layout, p).model).prunable <= int(density * layout.prunable)
    ]  # fmt: skip
    return fits[-1] if fits else candidates[0]


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(0.001, 1.0))
def test_widths_are_the_largest_that_fit(hidden: list[int], density: float) -> None:
    sizes = [4, *hidden, 3]
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    layout = build_layout(model)
    assert widths(model, layout, [density]) == (brute_width(model, density),)


@few
@given(st.sets(st.floats(0.01, 1.0), min_size=1, max_size=6))
def test_shares_are_at_most_the_densities_and_masks_are_nested(densities: set[float]) -> None:
    model, ladder = lenet(), sorted(densities)
    layout = build_layout(model)
    ranking = rank_widths(model, layout, ladder)
    least = prunable_kept(layout, axes(model), Fraction(1, 12))
    previous = torch.zeros(layout.size, dtype=torch.bool)
    for rung, (density, width) in enumerate(zip(ladder, widths(model, layout, ladder), strict=True)):
        mask = ranking.mask(rung)
        kept = sum(int(mask[e.slice].sum()) for e in layout.of_kind("prunable"))
        assert kept == prunable_kept(layout, axes(model), width) <= max(int(density * layout.prunable), least)
        assert not (previous & ~mask).any()
        previous = mask
    assert ranking.ends[-1] == int(previous.sum())
    assert bool(previous.all()) == (ladder[-1] == 1.0 or width == 1)


def test_a_density_below_one_unit_of_each_layer_keeps_one_unit() -> None:
    model = perceptron()
    layout = build_layout(model)
    (width,) = widths(model, layout, [1e-9])
    assert width == Fraction(1, 7)
    assert [tuple(p.shape) for p in narrow(model, layout, width).model.parameters()] == [
        *((1, 36), (1,)), *((1, 1), (1,)), *((3, 1), (3,))
    ]  # fmt: skip


def test_a_linear_layer_behind_flatten_keeps_the_block_of_each_channel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(36, 8), nn.Linear(8, 2))
    layout = build_layout(model)
    with torch.no_grad():
        model[2].weight.copy_(torch.arange(8 * 36.0).view(8, 36))
    small = narrow(model, layout, Fraction(1, 2)).model
    assert torch.equal(small[2].weight, model[2].weight[:4, :18])  # type: ignore[index]


def test_units_are_rounded_up() -> None:
    model = nn.Sequential(nn.Linear(3, 10), nn.Linear(10, 7), nn.Linear(7, 2))
    layout = build_layout(model)
    for percent in range(1, 101):
        width = Fraction(percent, 100)
        small = narrow(model, layout, width).model
        units = [len(p) for p in small.parameters() if p.dim() == 2]
        assert units == [math.ceil(percent * 10 / 100), math.ceil(percent * 7 / 100), 2]


def test_dense_layers_change_the_share_and_not_the_cut() -> None:
    model = perceptron()
    plain, kept = build_layout(model), build_layout(model, ["1.weight"])
    half = Fraction(1, 2)
    assert prunable_kept(plain, axes(model), half) - prunable_kept(kept, axes(model), half) == 4 * 36
    assert torch.equal(narrow(model, plain, half).index_S, narrow(model, kept, half).index_S)


def test_the_model_and_its_copy_are_independent() -> None:
    model = lenet()
    model[0][0].weight.requires_grad_(False)  # type: ignore[index]
    before = [p.clone() for p in model.parameters()]
    small = narrow(model, build_layout(model), Fraction(1)).model
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def hooked() -> nn.Module:
    model = perceptron()
    model[1].register_forward_hook(lambda *_: None)
    return model


def tied() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, layer, nn.Linear(3, 2))


C, L, F = nn.Conv2d, nn.Linear, nn.Flatten


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Own(), "not a Sequential"),
        (hooked(), "not a Sequential"),
        (nn.Sequential(L(3, 4), Own(), L(4, 2)), "not a Sequential"),
        (nn.Sequential(L(3, 2)), "no hidden"),
        (tied(), "share parameters"),
        (nn.Sequential(C(2, 4, 1, groups=2), C(4, 2, 1)), "layer 0 (Conv2d) has no width: it has groups=2"),
        (nn.Sequential(C(1, 4, 1), L(3, 2)), "a Flatten is missing"),
        (nn.Sequential(C(1, 4, 1), F(2), L(4, 2)), "layer 1 (Flatten)"),
        (nn.Sequential(C(1, 4, 1), F(), L(35, 2)), "4 channels do not divide"),
        (nn.Sequential(L(3, 4), C(4, 2, 1)), "behind a Linear"),
        (nn.Sequential(C(1, 4, 1), nn.BatchNorm2d(4), C(4, 2, 1)), "track_running_stats=False"),
        (nn.Sequential(C(1, 4, 1), nn.GroupNorm(2, 4), C(4, 2, 1)), "units one by one"),
        (nn.Sequential(C(1, 4, 1), nn.Softmax(1), C(4, 2, 1)), "units one by one"),
        (nn.Sequential(C(1, 4, 1), nn.MaxPool2d(2, return_indices=True), C(4, 2, 1)), "units one by one"),
        (nn.Sequential(L(3, 4), nn.LayerNorm(4), L(4, 2)), "units one by one"),
        (nn.Sequential(L(3, 4), nn.Unflatten(1, (2, 2)), L(2, 2)), "units one by one"),
        (nn.Sequential(nn.BatchNorm2d(1), C(1, 4, 1), C(4, 2, 1)), "stands before the first"),
        (nn.Sequential(L(3, 4), nn.PReLU(4), L(4, 2)), "units one by one"),
    ],
)
def test_other_models_are_refused(model: nn.Module, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        axes(model)
    assert caught.value.code == "GMR-207"
    assert said in str(caught.value)


def test_layers_are_listed_as_they_are_called() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), relu), relu)
    assert [name for name, _ in layers(model)] == ["0.0", "0.1", "1"]
    assert [name for name, _ in layers(relu)] == [""]
    assert is_chain(model)
