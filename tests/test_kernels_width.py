"""Widths: the smaller stack, its mask and its share of weights, against brute force."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fedgmr_plugin.engine.client import parameter_masks
from fedgmr_plugin.engine.narrow import without_absent_units
from fedgmr_plugin.engine.objectives import PLAIN
from fedgmr_plugin.errors import ModelError
from fedgmr_plugin.kernels import build_layout, channels
from fedgmr_plugin.kernels.chain import is_chain, layers
from fedgmr_plugin.kernels.channels import Axis, axes
from fedgmr_plugin.kernels.steps import traced_steps
from fedgmr_plugin.kernels.width import narrow, prunable_kept, rank_widths, widths
from fedgmr_plugin.runtimes.host import define_torchvision_schemas, torchvision_usable

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
    counts = {axis.units for entry in axes(model).parameters.values() for axis in entry if axis.hidden}
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


class Residual(nn.Module):
    """Additions of blocks, a shortcut of another size, functions and methods instead of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6, track_running_stats=False)
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.down = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(6, 10, 1, stride=2)
        self.hidden = nn.Linear(90, 7)
        self.output = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.second(functional.gelu(self.first(x)))
        y = self.down(x).add(self.shortcut(x) * 0.5)
        y = functional.dropout(y.sigmoid(), 0.2, self.training)
        return self.output(functional.leaky_relu(self.hidden(y.view(y.size(0), -1)) + 0.1)).log_softmax(1)


class Depthwise(nn.Module):
    """Separable convolutions, a pooling by mean, a stack inside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 6, 3), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6), nn.InstanceNorm2d(6)),
            *(nn.Conv2d(6, 9, 1), nn.Conv2d(9, 9, 1, groups=9, bias=False)),
        )
        self.heads = nn.ModuleList([nn.Linear(9, 4), nn.Linear(9, 3)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = functional.max_pool2d(self.body(x), 1).mean((2, 3))
        return self.heads[0](y), self.heads[1](torch.flatten(y, 1))


def bottleneck(groups: int = 1) -> nn.Module:
    """torchvision's bottlenecks under norms of the batch alone."""
    if not torchvision_usable():
        define_torchvision_schemas()
    from torchvision.models.resnet import Bottleneck, ResNet

    norm = partial(nn.BatchNorm2d, track_running_stats=False)
    return ResNet(Bottleneck, [1, 1, 1, 1], 5, groups=groups, norm_layer=norm)


def parts(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else torch.cat(output, 1)


@pytest.mark.parametrize(
    ("make", "shape"), [(Residual, (1, 6, 6)), (Depthwise, (1, 7, 7)), (bottleneck, (3, 40, 40))]
)
@pytest.mark.parametrize("first", [0, 5])
def test_models_that_are_no_stacks(make: Callable[[], nn.Module], shape: tuple[int, ...], first: int) -> None:
    """What the mask keeps is a smaller model, in outputs and coordinates; a rolled window is as large."""
    model = randomised(make().double())
    for parameter in model.parameters():
        parameter.data /= max(1.0, parameter[0].numel() ** 0.5)
    layout = build_layout(model)
    ranking, rolled = rank_widths(model, layout, LADDER), rank_widths(model, layout, LADDER, first)
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        for rung, width in enumerate(widths(model, layout, LADDER)):
            small = narrow(model, layout, width)
            expected = parts(masked_output(model, ranking.mask(rung), x))  # type: ignore[arg-type]
            torch.testing.assert_close(parts(small.model(x)), expected, atol=1e-9, rtol=1e-9)
            assert torch.equal(ranking.mask(rung).nonzero().squeeze(1), small.index_S)
            assert int(rolled.mask(rung).sum()) == len(small.index_S)
            context = without_absent_units(model, parameter_masks(layout, rolled.mask(rung)), PLAIN)
            whole = masked_output(model, rolled.mask(rung), x)
            layout_D = layout.gather(model)
            layout.scatter(model, layout_D * rolled.mask(rung))
            with context:
                kept = sum(p.numel() for p in model.parameters())
                inside = parts(model(x))  # type: ignore[arg-type]
            layout.scatter(model, layout_D)
            if make is not Residual:  # whose dropout keeps it whole
                assert kept == len(small.index_S)
            torch.testing.assert_close(inside, parts(whole), atol=1e-9, rtol=1e-9)  # type: ignore[arg-type]
        torch.testing.assert_close(parts(small.model(x)), parts(model(x)), atol=0, rtol=0)


def test_units_that_are_added_are_cut_together() -> None:
    cut = axes(Residual()).parameters
    added = {cut["stem.weight"][0].group, cut["second.weight"][0].group, cut["first.weight"][1].group}
    assert added == {cut["norm.weight"][0].group} == {cut["down.weight"][1].group}
    assert cut["down.bias"][0] == cut["shortcut.weight"][0]
    assert cut["hidden.weight"] == (
        *(Axis(7, 1, True, cut["hidden.bias"][0].group), Axis(10, 9, True, cut["down.bias"][0].group)),
    )
    assert cut["output.weight"][0].hidden is cut["stem.weight"][1].hidden is False
    assert axes(Residual()).draws and not axes(Depthwise()).draws


def test_what_is_added_to_the_input_or_to_the_output_is_whole() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 4, 1)
            self.c, self.d = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(x + self.a(x))
            return y + self.d(self.c(y))

    cut = axes(Skip()).parameters
    assert {name: [axis.hidden for axis in of] for name, of in cut.items()} == {
        **{"a.weight": [False, False], "a.bias": [False], "b.weight": [False, False], "b.bias": [False]},
        **{"c.weight": [True, False], "c.bias": [True], "d.weight": [False, True], "d.bias": [False]},
    }


def test_a_trace_leaves_nothing_in_the_model() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(3, 4), nn.Linear(4, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen = self.a(x)
            return self.b(self.seen)  # type: ignore[no-any-return]

    model = Remembers()
    assert axes(model).parameters["a.weight"][0].hidden
    assert model.calls == 0 and not hasattr(model, "seen")
    model.a = nn.Linear(3, 6)
    model.b = nn.Linear(6, 2)
    assert axes(model).parameters["a.weight"][0].units == 6, "what is remembered is of the model as it was"


class Calls(nn.Module):
    """Two layers and what stands between them, and behind the second."""

    def __init__(self, between: Callable[..., Any], images: bool = False, inputs: int = 0) -> None:
        super().__init__()
        self.between, self.behind = between, lambda own, z, y: z
        kind: Any = partial(nn.Conv2d, kernel_size=1) if images else nn.Linear
        self.a = kind(3, 4)
        self.b = nn.Linear(inputs, 2) if inputs else kind(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.behind(self, self.b(self.between(y, x)), y)  # type: ignore[no-any-return]


def behind(function: Callable[..., Any]) -> Calls:
    """A model whose output depends on its hidden layer beside the last one."""
    model = Calls(lambda y, _: y.relu())
    model.behind = function
    return model


class Optional(nn.Module):
    """Other functions where other arguments are given, or in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(
        self, x: Tensor, gate: Tensor | None = None, scale: float = 2.0, *, on: bool = True
    ) -> Tensor:
        y = self.a(x) * scale if gate is None and on else self.a(x).softmax(1)
        return self.b(y)  # type: ignore[no-any-return]


class Gated(Optional):
    def forward(self, x: Tensor, gate: Tensor | None = None, *_: Any) -> Tensor:
        return self.b(self.a(x).softmax(1) if gate is None else self.a(x))  # type: ignore[no-any-return]


class OtherwiseEvaluated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return self.c(y if self.training else y + x)  # type: ignore[no-any-return]


def hooked() -> nn.Module:
    model = perceptron()
    model[1].register_forward_hook(lambda *_: None)
    return model


def patched(name: str) -> nn.Module:
    """A layer, or the whole, computes something else than its class."""
    model = Calls(lambda y, _: y)
    model.get_submodule(name).forward = lambda x: x  # type: ignore[method-assign]
    return model


def wider() -> nn.Module:
    model = Calls(lambda y, _: y)
    model.a.register_parameter("scale", nn.Parameter(torch.ones(2)))
    return model


def tied() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, layer, nn.Linear(3, 2))


def extra() -> nn.Module:
    model = Calls(lambda y, _: y)
    model.unused = nn.Parameter(torch.zeros(2))
    return model


C, L, F = nn.Conv2d, nn.Linear, nn.Flatten


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Identity(), "no hidden"),
        (nn.Sequential(L(3, 2)), "no hidden"),
        (hooked(), "it has hooks"),
        (tied(), "share parameters"),
        (extra(), "unused is of no Conv2d, Linear or norm"),
        (nn.Sequential(C(2, 4, 1, groups=2), C(4, 2, 1)), "layer 0 (Conv2d) has no width: it has groups=2"),
        (nn.Sequential(C(2, 4, 1), C(4, 4, 1, groups=2)), "layer 1 (Conv2d) has no width: it has groups=2"),
        (bottleneck(groups=2), "it has groups=2"),
        (nn.Sequential(C(1, 4, 1), L(3, 2)), "a Flatten is missing"),
        (nn.Sequential(C(1, 4, 1), F(2), L(4, 2)), "layer 1 (Flatten)"),
        (nn.Sequential(C(1, 4, 1), F(), L(35, 2)), "its 35 inputs are not those of the 4 units"),
        (nn.Sequential(L(3, 4), C(4, 2, 1)), "behind a Linear"),
        (nn.Sequential(C(1, 4, 1), nn.BatchNorm2d(4), C(4, 2, 1)), "track_running_stats=False"),
        (nn.Sequential(C(1, 4, 1), nn.GroupNorm(2, 4), C(4, 2, 1)), "units one by one"),
        (nn.Sequential(C(1, 4, 1), nn.Softmax(1), C(4, 2, 1)), "units one by one"),
        (nn.Sequential(C(1, 4, 1), nn.MaxPool2d(2, return_indices=True), C(4, 2, 1)), "units one by one"),
        (nn.Sequential(L(3, 4), nn.LayerNorm(4), L(4, 2)), "units one by one"),
        (nn.Sequential(L(3, 4), nn.Unflatten(1, (2, 2)), L(2, 2)), "units one by one"),
        (nn.Sequential(L(3, 4), nn.PReLU(4), L(4, 2)), "units one by one"),
        (Calls(lambda y, x: y if x.sum() > 0 else -y), "it cannot be traced"),
        (Calls(lambda y, x: torch.softmax(y, 1)), "which calls softmax, has no width"),
        (Calls(lambda y, x: y[:, [1, 0, 2, 3]]), "which calls getitem, has no width"),
        (Calls(lambda y, x: torch.cat([y[:, :2], y[:, 2:]], 1)), "getitem"),
        (Calls(lambda y, x: y * y.mean(1, keepdim=True)), "which calls mean, has no width"),
        (Calls(lambda y, x: y.mT, images=True), "no width"),
        (Calls(lambda y, x: y.view(-1, 4)), "which calls view, has no width"),
        (Calls(lambda y, x: functional.linear(y, torch.ones(4, 4))), "which calls linear, has no width"),
        (Calls(lambda y, x: torch.add(y, y.relu(), alpha=2)), "which calls add, has no width"),
        (Calls(lambda y, x: 1 / y), "which calls truediv, has no width"),
        (nn.Sequential(L(3, 4), F(), L(20, 2)), "its 20 inputs are not those of the 4 units"),
        (Calls(lambda y, x: y.flatten(1), inputs=20), "its 20 inputs are not those of the 4 units"),
        (Calls(lambda y, x: torch.flatten(y, end_dim=1), True, 4), "which calls flatten, has no width"),
        (Calls(lambda y, x: y.view(-1), True, 4), "which calls view, has no width"),
        (Calls(lambda y, x: y.view(-1, x.size(0)), True, 4), "which calls view, has no width"),
        (Calls(lambda y, x: y.view(x.size(0) * 2, -1), True, 4), "which calls view, has no width"),
        (Calls(lambda y, x: y.view(y.size(1), -1), True, 4), "which calls size, has no width"),
        (Calls(lambda y, x: y.view(x.size(0), y.size(1), -1), True, 4), "no width"),
        (Calls(lambda y, x: y.mean((2, 3))), "which calls mean, has no width"),
        (behind(lambda m, z, y: z / y.shape[1]), "which calls getitem, has no width"),
        (behind(lambda m, z, y: z / y.numel()), "which calls numel, has no width"),
        (behind(lambda m, z, y: z + m.a.weight.mean()), "itself (a.weight)"),
        (behind(lambda m, z, y: z / m.b.weight.shape[1]), "itself (b.weight)"),
        (behind(lambda m, z, y: z + sum(p.mean() for p in m.parameters())), "works with parameters"),
        (behind(lambda m, z, y: z / m.b.in_features), "no attribute 'in_features'"),
        (Gated(), "which calls softmax, has no width"),
        (OtherwiseEvaluated(), "its units are others in training"),
        (patched(""), "a forward that is not its class's"),
        (patched("a"), "a forward that is not its class's"),
        (wider(), "layer a (Linear) has no width: its parameters are not its weight and bias"),
    ],
)
def test_other_models_are_refused(model: nn.Module, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        axes(model)
    assert caught.value.code == "GMR-207"
    assert said in str(caught.value)


def test_arguments_that_are_not_given_are_their_defaults() -> None:
    assert axes(Optional()).parameters["a.weight"][0].hidden


def test_a_shape_may_be_taken_apart_for_the_number_of_samples() -> None:
    def flattened(y: Tensor, x: Tensor) -> Tensor:
        b, _, _, _ = y.shape
        return y.reshape((b, -1))

    cut = axes(Calls(flattened, images=True, inputs=36)).parameters
    assert cut["b.weight"][1] == cut["a.weight"][0]._replace(block=9)


def test_a_refusal_is_remembered_and_does_not_keep_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    monkeypatch.setattr(channels, "traced_steps", lambda *a: traced.append(0) or traced_steps(*a))
    model = Calls(lambda y, x: torch.softmax(y, 1))
    for _ in range(3):
        with pytest.raises(ModelError, match="calls softmax"):
            axes(model)
    assert len(traced) == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_that_gets_a_hook_later_is_refused() -> None:
    model = Calls(lambda y, _: y)
    axes(model)
    handle = model.a.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="hooks"):
        axes(model)
    handle.remove()
    axes(model)
    model.b = nn.Identity()
    with pytest.raises(ModelError, match="no hidden"):
        axes(model)


def test_a_convolution_of_groups_with_several_outputs_each_stays_whole() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.groups, self.a, self.b = nn.Conv2d(2, 4, 1, groups=2), nn.Conv2d(2, 6, 1), nn.Conv2d(6, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.groups(x), self.b(self.a(x))

    model = Two()
    x = torch.randn(1, 2, 3, 3)
    small = narrow(model, build_layout(model), Fraction(1, 2)).model
    torch.testing.assert_close(small(x)[0], model(x)[0], atol=0, rtol=0)
    assert repr(small.groups) == repr(model.groups)


def test_layers_are_listed_as_they_are_called() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), relu), relu)
    assert [name for name, _ in layers(model)] == ["0.0", "0.1", "1"]
    assert [name for name, _ in layers(relu)] == [""]
    assert is_chain(model)
