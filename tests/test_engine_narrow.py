"""Sub-models without their absent units are the same sub-models: against training under masks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedgmr_plugin.engine import narrow, trainer
from fedgmr_plugin.engine.client import parameter_masks
from fedgmr_plugin.engine.narrow import without_absent_units
from fedgmr_plugin.engine.objectives import PLAIN, Context
from fedgmr_plugin.engine.samples import BatchList, TensorSamples
from fedgmr_plugin.engine.trainer import BuiltinTrainer, LocalStats
from fedgmr_plugin.kernels import build_layout, rank, scores
from fedgmr_plugin.kernels.channels import axes
from fedgmr_plugin.kernels.layout import ModelLayout
from fedgmr_plugin.kernels.width import rank_widths

few = settings(max_examples=max(10, settings().max_examples // 3), deadline=None)
LADDER = (0.1, 0.3, 0.6, 1.0)
TRAINERS = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.3},
    {"gradient_clip": 0.05},
    {"proximal": 0.5},
    {"optimizer": "adam"},
]


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 12, bias=False), nn.ReLU(), nn.Linear(12, 5)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.InstanceNorm2d(6, affine=True), nn.Sigmoid(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 10, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(10, 9), nn.BatchNorm1d(9, track_running_stats=False), nn.GELU(), nn.Linear(9, 5)),
    )


MODELS = [perceptron, convolutions]


def model_of(kind: int, seed: int) -> tuple[nn.Module, ModelLayout]:
    torch.manual_seed(seed)
    model = MODELS[kind]().double()
    return model, build_layout(model)


def batches_of(seed: int, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(0, 5, (6,), generator=g))
        for _ in range(count)
    ]


def trained(
    model: nn.Module,
    masks: dict[str, Tensor] | None,
    batches: Sequence[tuple[Tensor, Tensor]],
    context: Context,
    seed: int,
    *,
    narrow: bool,
    **options: Any,
) -> tuple[nn.Module, LocalStats]:
    own = copy.deepcopy(model)
    trainer = BuiltinTrainer(**options)
    torch.manual_seed(seed)
    if narrow:
        stats = trainer.train(own, batches, masks, learning_rate=0.1, client=0, context=context)
    else:
        own.train()
        stats = trainer._steps(own, batches, masks, context, 0.1, watched=False)
    return own, stats


@few
@given(
    kind=st.sampled_from(range(len(MODELS))),
    rung=st.integers(0, 2),
    first=st.integers(0, 30),
    options=st.sampled_from(TRAINERS),
    ordered_dropout=st.booleans(),
    some_classes=st.booleans(),
    theta=st.sampled_from([None, 0.05]),
    seed=st.integers(0, 2**31),
)
def test_training_without_absent_units_is_training_under_masks(
    kind: int,
    rung: int,
    first: int,
    options: dict[str, Any],
    ordered_dropout: bool,
    some_classes: bool,
    theta: float | None,
    seed: int,
) -> None:
    """In float64 to 1e-10, and masked coordinates are exactly 0.

    Adam divides by the size of a gradient, be it only rounding (that of a bias before a norm): 1e-5.
    """
    model, layout = model_of(kind, seed)
    ranking = rank_widths(model, layout, LADDER, first)
    mask_D = ranking.mask(rung)
    layout.scatter(model, layout.gather(model) * mask_D)
    masks = parameter_masks(layout, mask_D)
    context = PLAIN
    if ordered_dropout:
        context = context._replace(
            narrower=[parameter_masks(layout, ranking.mask(r)) for r in range(rung + 1)]
        )
    elif theta is not None:
        context = context._replace(threshold=theta, pruned=frozenset(dict(model.named_parameters())))
    if some_classes:
        context = context._replace(classes=torch.tensor([True, False, True, True, False]))
    wide, wide_stats = trained(model, masks, batches_of(seed), context, seed, narrow=False, **options)
    slim, slim_stats = trained(model, masks, batches_of(seed), context, seed, narrow=True, **options)
    close = 1e-5 if "optimizer" in options else 1e-10
    torch.testing.assert_close(layout.gather(slim), layout.gather(wide), rtol=close, atol=close)
    assert not layout.gather(slim)[~mask_D].any()
    assert slim_stats == pytest.approx(wide_stats, rel=close, abs=close)


@few
@given(
    kind=st.sampled_from(range(len(MODELS))),
    units=st.lists(st.integers(0, 19), max_size=40),
    seed=st.integers(0, 2**31),
)
def test_any_units_may_be_absent(kind: int, units: list[int], seed: int) -> None:
    """Whichever units a mask takes away, of one layer or of several, and whatever else it masks."""
    model, layout = model_of(kind, seed)
    g = torch.Generator().manual_seed(seed)
    mask_D = torch.rand(layout.size, generator=g) < 0.9
    weighted = [name for name, p in model.named_parameters() if p.dim() > 1]
    for unit in units:
        here = unit % (len(weighted) - 1)
        before, after = weighted[here], weighted[here + 1]
        count = len(model.get_parameter(before))
        block = model.get_parameter(after).shape[1] // count
        unit %= count
        first = layout.by_name[after].slice.start
        for entry in layout.entries:
            if layout.by_name[before].slice.start <= entry.slice.start < first:
                mask_D[entry.slice].view(entry.shape)[unit] = False
        entry = layout.by_name[after]
        mask_D[entry.slice].view(entry.shape)[:, unit * block : (unit + 1) * block] = False
    layout.scatter(model, layout.gather(model) * mask_D)
    masks = parameter_masks(layout, mask_D)
    wide, _ = trained(model, masks, batches_of(seed), PLAIN, seed, narrow=False)
    slim, _ = trained(model, masks, batches_of(seed), PLAIN, seed, narrow=True)
    torch.testing.assert_close(layout.gather(slim), layout.gather(wide), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", range(len(MODELS)))
def test_the_stack_is_smaller_inside_and_itself_again_afterwards(kind: int) -> None:
    """Its parameters are the very same objects, with the values of the smaller ones, also after an error."""
    model, layout = model_of(kind, 0)
    mask_D = rank_widths(model, layout, LADDER).mask(0)
    layout.scatter(model, layout.gather(model) * mask_D)
    before = dict(model.named_parameters())
    with (
        pytest.raises(KeyError),
        without_absent_units(model, parameter_masks(layout, mask_D), PLAIN) as (masks, _),
    ):
        assert sum(p.numel() for p in model.parameters()) == int(mask_D.sum())
        assert not masks, "nothing is masked in the smaller stack"
        for parameter in model.parameters():
            parameter.data.fill_(7.0)
        raise KeyError
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[n] is after[n] for n in before)
    assert torch.equal(layout.gather(model), 7.0 * mask_D)
    assert repr(model) == repr(MODELS[kind]()), "norms have their features"


def test_a_hidden_layer_of_which_nothing_is_left_keeps_one_unit() -> None:
    model, layout = model_of(0, 1)
    mask_D = torch.zeros(layout.size, dtype=torch.bool)
    mask_D[layout.by_name["5.bias"].slice] = True
    layout.scatter(model, layout.gather(model) * mask_D)
    masks = parameter_masks(layout, mask_D)
    wide, _ = trained(model, masks, batches_of(1), PLAIN, 1, narrow=False)
    slim, _ = trained(model, masks, batches_of(1), PLAIN, 1, narrow=True)
    torch.testing.assert_close(layout.gather(slim), layout.gather(wide), rtol=1e-10, atol=1e-10)


class Subclassed(nn.Linear):
    """Code of one's own."""


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Dropout(0.3), nn.ReLU(), nn.Linear(20, 5))


def with_own_layer() -> nn.Module:
    return nn.Sequential(nn.Flatten(), Subclassed(64, 20), nn.ReLU(), nn.Linear(20, 5))


@pytest.mark.parametrize("make", [with_dropout, with_own_layer])
def test_other_models_stay_as_they_are(make: Any) -> None:
    """Draws of dropout depend on the number of units, and nobody knows what other code makes of them."""
    model = make()
    layout = build_layout(model)
    mask_D = torch.ones(layout.size, dtype=torch.bool)
    for name in ("1.weight", "1.bias"):
        mask_D[layout.by_name[name].slice].view(layout.by_name[name].shape)[5:] = False
    last = next(e for e in layout.entries if e.shape == (5, 20))
    mask_D[last.slice].view(last.shape)[:, 5:] = False
    masks = parameter_masks(layout, mask_D)
    with without_absent_units(model, masks, PLAIN) as (same, _):
        assert same is masks
        assert sum(p.numel() for p in model.parameters()) == layout.size


def test_hooks_of_parameters_see_whole_gradients() -> None:
    model, layout = model_of(0, 2)
    mask_D = rank_widths(model, layout, LADDER).mask(0)
    shapes = []
    model.get_parameter("1.weight").register_hook(lambda grad: shapes.append(grad.shape))
    BuiltinTrainer().train(
        model, batches_of(2), parameter_masks(layout, mask_D), learning_rate=0.1, client=0, context=PLAIN
    )
    assert shapes == [(20, 64)] * 3


def test_weights_chosen_one_by_one_are_trained_under_masks() -> None:
    """Their biases stay, so every unit is there."""
    model, layout = model_of(1, 3)
    w_D = layout.gather(model)
    masks = parameter_masks(layout, rank(layout, w_D, scores("magnitude", layout, w_D), LADDER).mask(0))
    with without_absent_units(model, masks, PLAIN) as (same, _):
        assert same is masks


def bias_free() -> nn.Module:
    norm = nn.InstanceNorm2d(8)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(96, 5)),
    )


def test_without_biases_a_glance_tells_widths_from_weights_chosen_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The only bias, of the last layer, is never masked."""
    model = bias_free()
    layout = build_layout(model)
    w_D = layout.gather(model)
    chosen = rank(layout, w_D, scores("magnitude", layout, w_D), LADDER).mask(2)
    read = []
    monkeypatch.setattr(narrow, "axes", lambda m: read.append(m) or axes(m))
    with without_absent_units(model, parameter_masks(layout, chosen), PLAIN):
        assert not read
    for first in (0, 7):
        mask_D = rank_widths(model, layout, LADDER, first).mask(1)
        with without_absent_units(model, parameter_masks(layout, mask_D), PLAIN):
            assert sum(p.numel() for p in model.parameters()) == int(mask_D.sum())
    assert len(read) == 2


def test_the_model_is_itself_if_the_smaller_one_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may end at any parameter."""
    model, layout = model_of(1, 5)
    masks = parameter_masks(layout, rank_widths(model, layout, LADDER).mask(0))
    before, w_D, text = dict(model.named_parameters()), layout.gather(model).clone(), repr(model)
    cut = narrow.Box.cut
    for most in range(5):
        calls = iter(range(most))

        def failing(self: narrow.Box, whole: Tensor, calls: Any = calls) -> Tensor:
            if next(calls, None) is None:
                raise MemoryError
            return cut(self, whole)

        monkeypatch.setattr(narrow.Box, "cut", failing)
        with pytest.raises(MemoryError), without_absent_units(model, masks, PLAIN):
            pass
    after = dict(model.named_parameters())
    assert all(before[n] is after[n] for n in before) and repr(model) == text
    assert torch.equal(layout.gather(model), w_D)


def test_who_watches_a_training_sees_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = model_of(0, 4)
    masks = parameter_masks(layout, rank_widths(model, layout, LADDER).mask(0))
    (x, y), *_ = batches_of(4, 1)
    seen = []
    watched = BatchList(
        TensorSamples(x, y),
        [torch.arange(6)] * 2,
        lambda: seen.append(sum(p.numel() for p in model.parameters())),
    )
    entered = []
    monkeypatch.setattr(trainer, "without_absent_units", lambda *a: entered.append(a))
    BuiltinTrainer().train(model, watched, masks, learning_rate=0.1, client=0, context=PLAIN)
    assert seen == [layout.size] * 2 and not entered


def test_who_only_interrupts_a_training_does_not_watch_it() -> None:
    (x, y), *_ = batches_of(4, 1)
    calls: list[int] = []
    batches = BatchList(TensorSamples(x, y), [torch.arange(6)] * 3, interrupt=lambda: calls.append(1))
    assert not batches.watched and not batches[1:].watched
    assert len(list(batches)) == len(calls) == 3
    list(batches[1:])
    assert len(calls) == 5
