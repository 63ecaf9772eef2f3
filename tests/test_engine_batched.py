"""Clients trained together: the updates of one after another, up to rounding."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.batched import Batched, _Group
from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.samples import BatchPlan, TensorSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.engine.workbench import Clients, Training, Workbench
from fedgmr_plugin.errors import DataError, ModelError
from fedgmr_plugin.kernels import build_layout
from fedgmr_plugin.kernels.masks import rank, scores
from fedgmr_plugin.kernels.stacked import StackedChain

DENSITIES = (0.1, 0.3, 0.6, 1.0)


class Tied(nn.Module):
    """Shared weights, a frozen layer, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.frozen = nn.Linear(6, 6)
        self.out = nn.Linear(6, 7)
        self.out.weight = self.embedding.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.out(torch.tanh(self.frozen(self.embedding(x)))).movedim(1, -1)
        return scores


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 3)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(48, 3),
    ),
    "plain stack": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.Tanh(),
        nn.Conv2d(8, 6, (1, 2), groups=2),
        nn.AvgPool2d((2, 1)),
        nn.Flatten(),
        nn.Linear(12, 3),
    ),
    "tied": Tied,
}


class World:
    """Some clients with data, and dispatches for them."""

    def __init__(
        self,
        model: str = "mlp",
        *,
        sizes: Sequence[int] = (23, 40, 31, 12),
        steps: int | None = 3,
        most: int = 8,
        dtype: torch.dtype = torch.float64,
        trainer: BuiltinTrainer | None = None,
        module: nn.Module | None = None,
        **options: Any,
    ) -> None:
        with isolated_rng(5):
            self.model = (module or MODELS[model]()).to(dtype)
        self.layout = build_layout(self.model)
        self.config = FedGMRConfig(validation_fraction=0.0, trigger="none", **options)
        generator = torch.Generator().manual_seed(3)
        self.samples = []
        for size in sizes:
            if model == "tied":
                x = torch.randint(0, 7, (size, 4), generator=generator)
                self.samples.append(TensorSamples(x, x.roll(1, 1)))
            else:
                x = torch.randn(size, 6, generator=generator, dtype=dtype)
                self.samples.append(TensorSamples(x, torch.randint(0, 3, (size,), generator=generator)))
        self.bench = Workbench(
            self.config,
            self.layout,
            self.model,
            Clients(self.samples.__getitem__, 0.0, 0, len(sizes)),
            Training(trainer or BuiltinTrainer(), BatchPlan(5, steps, 1, True, 7), 0.1),
        )
        self.w_D = self.layout.gather(self.model)
        self.ranking = rank(self.layout, self.w_D, scores("magnitude", self.layout, self.w_D), DENSITIES)
        self.batched = Batched(self.bench, most)

    def sent(self, client: int, rung: int, count: int = 0, scale: float = 1.0) -> Dispatch:
        values_S = self.ranking.cut(self.w_D, rung)
        density = DENSITIES[rung]
        return Dispatch(10 * client + count, client, 0, count, density, self.ranking, rung, values_S, scale)

    def both(self, sent: Sequence[Dispatch]) -> Iterator[tuple[LocalUpdate, LocalUpdate]]:
        together = self.batched.finish(sent)
        yield from zip(together, [self.bench.train(dispatch) for dispatch in sent], strict=True)


def assert_equal(a: LocalUpdate, b: LocalUpdate, tolerance: float = 1e-10) -> None:
    assert (a.dispatch, a.client) == (b.dispatch, b.client)
    torch.testing.assert_close(a.values_S, b.values_S, rtol=tolerance, atol=tolerance)
    assert a.change_sq == pytest.approx(b.change_sq, rel=1e-6)
    assert a.stats[:2] == b.stats[:2]
    assert a.stats[2:] == pytest.approx(b.stats[2:], rel=1e-5)


TRAINERS = {
    "sgd": BuiltinTrainer(),
    "momentum": BuiltinTrainer(momentum=0.9, weight_decay=0.01),
    "adam": BuiltinTrainer(optimizer="adam", weight_decay=0.01),
    "clipped": BuiltinTrainer(gradient_clip=0.3, momentum=0.5),
    "proximal": BuiltinTrainer(proximal=0.5, gradient_clip=0.5),
    "bce": BuiltinTrainer(loss="bce"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_together_is_one_after_another(model: str, trainer: str) -> None:
    world = World(model, trainer=TRAINERS[trainer])
    sent = [world.sent(client, rung, count=client) for client, rung in enumerate((3, 0, 2, 1))]
    for a, b in world.both(sent):
        assert_equal(a, b)


@pytest.mark.parametrize("form", ["delta", "replacement"])
@pytest.mark.parametrize("payload", ["model", "bfloat16"])
def test_what_travels_is_the_same(form: str, payload: str) -> None:
    world = World("batch norm", update_form=form, payload_dtype=payload)
    for a, b in world.both([world.sent(0, 0), world.sent(1, 2)]):
        assert_equal(a, b, tolerance=1e-10 if payload == "model" else 1e-2)
        assert a.values_S.dtype == b.values_S.dtype


@given(
    rungs=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    sizes=st.lists(st.integers(1, 12), min_size=6, max_size=6),
    scales=st.lists(st.sampled_from([0.5, 1.0]), min_size=6, max_size=6),
    most=st.integers(1, 6),
    steps=st.sampled_from([None, 1, 3]),
)
@settings(max_examples=30, deadline=None)
def test_any_window_is_cut_into_groups(
    rungs: list[int], sizes: list[int], scales: list[float], most: int, steps: int | None
) -> None:
    """Few samples, whole epochs, warm-up, small groups: each dispatch is trained once, in the order given."""
    world = World(sizes=sizes, steps=steps, most=most)
    sent = [world.sent(client, rung, scale=scales[client]) for client, rung in enumerate(rungs)][::-1]
    for a, b in world.both(sent):
        assert_equal(a, b)


def test_stale_clients_have_the_masks_of_their_own_ranking() -> None:
    world = World("plain stack")
    old = world.ranking
    sent = [world.sent(0, 0), world.sent(1, 1)]
    noise = torch.rand(world.layout.prunable, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    world.ranking = rank(world.layout, world.w_D, noise, DENSITIES)
    assert world.ranking.digest != old.digest
    for a, b in world.both([*sent, world.sent(2, 0), world.sent(3, 2)]):
        assert_equal(a, b)


class Partial(nn.Module):
    """With a layer that is not used, a scalar, a counter, a constant, and its own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.full((8,), 0.25), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.last(torch.tanh(self.scale * self.first(x) + self.calls * self.shift))
        return out if self.training else 0 * out


@pytest.mark.parametrize("trainer", ["clipped", "proximal", "momentum"])
def test_parameters_without_a_gradient_and_buffers_outside_of_the_layout(trainer: str) -> None:
    world = World(module=Partial().eval(), trainer=TRAINERS[trainer])
    for _ in range(2):  # the second finds them as the first did
        for a, b in world.both([world.sent(0, 1), world.sent(1, 3), world.sent(2, 0)]):
            assert_equal(a, b)


def test_stacks_are_let_go_without_the_collector() -> None:
    for model in ("mlp", "batch norm"):
        world = World(model)
        world.batched.finish([world.sent(0, 3), world.sent(1, 3)])
        gc.collect()
        gc.disable()
        try:
            world.batched.finish([world.sent(0, 3), world.sent(1, 3)])
            assert not [o for o in gc.get_objects() if type(o) is _Group]
        finally:
            gc.enable()


class Noisy:
    """Samples with a random transform."""

    def __len__(self) -> int:
        return 9

    def take(self, index: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        return torch.randn(len(index), 6, dtype=torch.float64), torch.from_numpy(index) % 3


def test_random_transforms_are_those_of_the_client_alone() -> None:
    world = World()
    world.samples[:2] = [Noisy(), Noisy()]  # type: ignore[list-item]  # any samples will do
    before = torch.get_rng_state()
    for a, b in world.both([world.sent(0, 3), world.sent(1, 3)]):
        assert_equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)


def test_masked_coordinates_stay_exactly_zero_whatever_their_slope() -> None:
    class Root(nn.Module):
        """The slope of a weight at 0 is infinite."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 8)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.inner.weight
            out: Tensor = self.out(x @ (weight.sign() * weight.abs().sqrt()).T)
            return out

    world = World(module=Root())
    for update in world.batched.finish([world.sent(0, 0), world.sent(1, 1)]):
        assert bool(update.values_S.isfinite().all())


def test_a_client_whose_training_diverges_leaves_the_others_alone() -> None:
    world = World()
    world.samples[1] = TensorSamples(world.samples[1].x * float("inf"), world.samples[1].y)
    diverged, (healthy, alone) = None, (None, None)
    for a, b in world.both([world.sent(0, 2), world.sent(1, 2)]):
        if a.client:
            diverged = a
        else:
            healthy, alone = a, b
    assert diverged is not None and not bool(diverged.values_S.isfinite().all())
    assert healthy is not None and alone is not None
    assert_equal(healthy, alone)


def test_plain_stacks_need_no_mapping() -> None:
    assert {name for name, make in MODELS.items() if StackedChain.fits(make())} == {"mlp", "plain stack"}


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d])
def test_random_layers_differ_by_client_and_repeat(norm: type[nn.Module]) -> None:
    layers = nn.Linear(6, 12), nn.Dropout(0.5), norm(12), nn.Tanh(), nn.Linear(12, 3)
    world = World(module=nn.Sequential(*layers))
    sent = [world.sent(0, 3), world.sent(1, 3)]
    world.samples[1] = world.samples[0]
    before = torch.get_rng_state()
    first, again = world.batched.finish(sent), world.batched.finish(sent)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a.values_S, b.values_S) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].values_S, first[1].values_S)


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x if x.sum() > 0 else -x)
        return out


def test_a_model_that_cannot_be_stacked_is_refused() -> None:
    world = World(module=Deciding())
    with pytest.raises(ModelError, match="data-dependent") as caught:
        world.batched.finish([world.sent(0, 3), world.sent(1, 3)])
    assert caught.value.code == "GMR-211" and "Deciding" in str(caught.value)
    assert "(batch: x float64 [2, 5, 6], y int64 [2, 5])" in str(caught.value)
    assert len(world.batched.finish([world.sent(0, 3)])) == 1  # alone it trains as ever


@pytest.mark.parametrize("model", ["mlp", "batch norm"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:, :4], y), "x float64 [2, 5, 4], y int64 [2, 5]"),
        (lambda x, y: (x.float(), y), "x float32 [2, 5, 6]"),
        (lambda x, y: (x, y.unsqueeze(1)), "y int64 [2, 5, 1]"),
    ],
    ids=["width", "type", "labels' shape"],
)
def test_data_that_do_not_fit_are_told_as_such(model: str, change: Any, message: str) -> None:
    """Also of models that are mapped: leaving `batch_clients` out would not help."""
    world = World(model)
    world.samples[:] = [TensorSamples(*change(s.x, s.y)) for s in world.samples]
    with pytest.raises(DataError) as caught:
        world.batched.finish([world.sent(0, 3), world.sent(1, 3)])
    assert caught.value.code == "GMR-304" and "one of the clients 0, 1" in str(caught.value)
    assert message in str(caught.value)


def test_what_a_users_code_raises_is_told_with_the_batch() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("my own check")

    world = World(module=nn.Sequential(nn.Linear(6, 4), Failing(4, 3)))
    with pytest.raises(DataError, match="GMR-304 one of the clients 0, 1: RuntimeError: my own check"):
        world.batched.finish([world.sent(0, 3), world.sent(1, 3)])


def test_a_want_of_memory_is_no_fault_of_model_or_data() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch._C._are_functorch_transforms_active():  # alone it has enough
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x

    world = World(module=nn.Sequential(nn.Linear(6, 4), Large(), nn.Linear(4, 3)))
    with pytest.raises(torch.OutOfMemoryError):
        world.batched.finish([world.sent(0, 3), world.sent(1, 3)])


@pytest.mark.parametrize("model", ["mlp", "batch norm"])
@pytest.mark.parametrize("label", [3, -7])
def test_a_label_that_is_no_class_is_told_with_the_batch(label: int, model: str) -> None:
    world = World(model)
    world.samples[1] = TensorSamples(world.samples[1].x, torch.full_like(world.samples[1].y, label))
    with pytest.raises(DataError) as caught:
        world.batched.finish([world.sent(0, 3), world.sent(1, 3)])
    assert caught.value.code == "GMR-304" and "one of the clients 0, 1" in str(caught.value)
    assert "x float64 [2, 5, 6], y int64 [2, 5]" in str(caught.value)


class Ragged:
    """Texts, each client's of a length of its own."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return 9

    def take(self, index: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(index).unsqueeze(1).repeat(1, self._length) % 7
        return x, x.roll(1, 1)


def test_batches_of_other_shapes_are_trained_one_after_another() -> None:
    world = World("tied")
    world.samples[:2] = [Ragged(3), Ragged(5)]  # type: ignore[list-item]
    for a, b in world.both([world.sent(0, 2), world.sent(1, 2)]):
        assert torch.equal(a.values_S, b.values_S)
