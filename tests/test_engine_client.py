"""A client's work: batches, masked training against a plain loop, and the update that is cut from it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedgmr_plugin.engine.client import LocalUpdate, parameter_masks, train_dispatch
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.samples import (
    Batch,
    BatchList,
    BatchPlan,
    Subset,
    TensorSamples,
    in_batches,
    split,
    take_each,
)
from fedgmr_plugin.engine.seeds import derive, isolated_rng, numpy_generator
from fedgmr_plugin.engine.trainer import BuiltinTrainer, LocalStats, Metrics
from fedgmr_plugin.errors import DataError
from fedgmr_plugin.kernels import ModelLayout, build_layout, rank, scores
from fedgmr_plugin.kernels.blocks import BLOCK, sum_sq

few = settings(max_examples=max(10, settings().max_examples // 5))


# -- batches ---------------------------------------------------------------------------------------


def plan(
    batch_size: int = 4, steps: int | None = 3, epochs: int = 1, shuffle: bool = True, seed: int = 0
) -> BatchPlan:
    return BatchPlan(batch_size, steps, epochs, shuffle, seed)


def walked(p: BatchPlan, size: int, dispatches: int, client: int = 0) -> list[int]:
    return [int(i) for count in range(dispatches) for b in p.batches(client, size, count) for i in b]


@given(
    size=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    steps=st.integers(1, 7),
    dispatches=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_a_client_walks_through_permutations_one_after_another(
    size: int, batch_size: int, steps: int, dispatches: int, seed: int
) -> None:
    """Every epoch sees every sample once, whatever the dispatches and batches cut it into."""
    p = plan(batch_size, steps, seed=seed)
    seen = walked(p, size, dispatches)
    assert len(seen) == dispatches * steps * min(batch_size, size)
    for start in range(0, len(seen), size):
        epoch = seen[start : start + size]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(size))
    for count in range(dispatches):
        batches = list(p.batches(0, size, count))
        assert [len(b) for b in batches] == [min(batch_size, size)] * steps
    assert walked(plan(batch_size, steps * dispatches, seed=seed), size, 1) == seen


@given(
    size=st.integers(1, 30), batch_size=st.integers(1, 12), epochs=st.integers(1, 3), count=st.integers(0, 3)
)
def test_with_epochs_a_dispatch_makes_whole_passes(
    size: int, batch_size: int, epochs: int, count: int
) -> None:
    batches = list(plan(batch_size, None, epochs).batches(0, size, count))
    assert len(batches) == epochs * -(-size // batch_size)
    seen = [int(i) for b in batches for i in b]
    for start in range(0, len(seen), size):
        assert sorted(seen[start : start + size]) == list(range(size))
    assert all(0 < len(b) <= batch_size for b in batches)


def test_epochs_differ_from_each_other_and_between_clients_and_seeds() -> None:
    p = plan(50, 1)
    first, second = (next(iter(p.batches(0, 50, count))).tolist() for count in (0, 1))
    other_client = next(iter(p.batches(1, 50, 0))).tolist()
    other_seed = next(iter(plan(50, 1, seed=1).batches(0, 50, 0))).tolist()
    again = next(iter(plan(50, 1).batches(0, 50, 0))).tolist()
    assert len({tuple(x) for x in (first, second, other_client, other_seed)}) == 4 and again == first
    passes = [b.tolist() for count in (0, 1) for b in plan(50, None, 1).batches(0, 50, count)]
    assert passes == [first, second]


def test_without_shuffling_the_datas_order_is_kept() -> None:
    assert walked(plan(4, 2, shuffle=False), 6, 2) == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert walked(plan(4, None, 2, shuffle=False), 6, 1) == [0, 1, 2, 3, 4, 5] * 2


def test_batches_may_be_asked_for_in_any_order() -> None:
    p = plan()
    late = [b.tolist() for b in p.batches(2, 7, 9)]
    list(p.batches(2, 7, 0))
    assert [b.tolist() for b in p.batches(2, 7, 9)] == late


# -- samples ---------------------------------------------------------------------------------------


def samples(count: int, features: int = 4, classes: int = 3, seed: int = 0, **shape: Any) -> TensorSamples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape.get("shape", (features,)), generator=generator)
    return TensorSamples(x, torch.randint(0, classes, (count,), generator=generator))


@given(
    size=st.integers(1, 200), fraction=st.floats(0, 0.99), seed=st.integers(0, 99), client=st.integers(0, 9)
)
def test_the_validation_split_is_a_seeded_partition(
    size: int, fraction: float, seed: int, client: int
) -> None:
    data = TensorSamples(torch.arange(size), torch.arange(size))
    train, held = split(data, fraction, seed, client)
    assert len(train) == size - int(fraction * size) > 0
    indices = train.take(np.arange(len(train)))[0].tolist()
    if held is None:
        assert int(fraction * size) == 0 and indices == list(range(size))
        return
    validation = held.take(np.arange(len(held)))[0].tolist()
    assert sorted(indices + validation) == list(range(size))
    assert indices == sorted(indices) and validation == sorted(validation)
    again = split(data, fraction, seed, client)[1]
    assert again is not None and again.take(np.arange(len(held)))[0].tolist() == validation


def test_samples_are_cut_into_batches_in_order() -> None:
    data = samples(7)
    batches = list(in_batches(data, 3))
    assert [len(y) for _, y in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([x for x, _ in batches]), data.x)
    part = Subset(data, np.array([5, 1, 3]))
    assert len(part) == 3 and torch.equal(part.take(np.array([2, 0]))[0], data.x[[3, 5]])


def test_batches_that_are_taken_at_once_are_those_taken_one_by_one() -> None:
    tensors = samples(9)

    class Slow:
        """No tensors: batches that know what they are of."""

        def __len__(self) -> int:
            return 9

        def take(self, index: np.ndarray) -> Batch:
            return tensors.take(index)

    indices = [np.array(i, dtype=np.int64) for i in ([0, 3], [2, 2, 1], [], [4])]
    part = np.array([8, 6, 4, 2, 0])
    for of in (tensors, Subset(tensors, part), Subset(Subset(tensors, np.arange(9)), part), Slow()):
        found, wanted = take_each(of, indices), [of.take(i) for i in indices]
        for (x, y), (wanted_x, wanted_y) in zip(found, wanted, strict=True):
            assert torch.equal(x, wanted_x) and torch.equal(y, wanted_y)
        assert take_each(of, []) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_are_summed_over_parts_and_blocks(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    size = 2 * BLOCK + 1234
    v, base = (torch.randn(size, generator=g, dtype=dtype) for _ in range(2))
    cuts = sorted(torch.randint(0, size, (2,), generator=g).tolist())
    for parts in ([slice(None)], [slice(0, cuts[0]), slice(cuts[1], None)], [slice(3, 3)], []):
        kept = np.concatenate([np.zeros(0), *(v.numpy()[part] for part in parts)]).astype(np.float64)
        apart = np.concatenate([np.zeros(0), *((v - base).numpy()[part] for part in parts)])
        assert sum_sq(v, None, parts) == pytest.approx(kept @ kept, rel=1e-12)
        assert sum_sq(v, base, parts) == pytest.approx(apart @ apart, rel=1e-12)
    assert sum_sq(v * 0 + torch.finfo(dtype).max) >= 1e76  # a client that diverged: no error


def test_a_list_of_batches_is_a_sequence_that_reads_when_asked() -> None:
    read: list[list[int]] = []

    class Spy:
        def __len__(self) -> int:
            return 9

        def take(self, index: np.ndarray) -> Batch:
            read.append(index.tolist())
            return index, index

    batches = BatchList(Spy(), [np.array([0, 1]), np.array([2]), np.array([3])])
    assert len(batches) == 3 and read == []
    assert batches[1][0].tolist() == [2] and batches[-1][0].tolist() == [3] and read == [[2], [3]]
    assert [b[0].tolist() for b in batches[1:]] == [[2], [3]]
    assert [b[0].tolist() for b in batches] == [[0, 1], [2], [3]]
    with pytest.raises(IndexError):
        batches[3]


# -- the built-in trainer --------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_the_model_is_told_with_its_shapes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [(torch.zeros(5, 3), torch.full((5,), 2))]
    with pytest.raises(DataError, match=r"GMR-304 client=7: IndexError: Target 2") as caught:
        BuiltinTrainer().train(model, batches, None, learning_rate=0.1, client=7)
    assert "(batch: x float32 [5, 3], y int64 [5])" in str(caught.value)
    assert isinstance(caught.value.__cause__, IndexError)


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    with isolated_rng(seed):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def some_masks(model: nn.Module, seed: int, share: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.rand(p.shape, generator=generator) < share
        for n, p in model.named_parameters()
        if n[0] == "0"
    }


def apply_masks(model: nn.Module, masks: dict[str, Tensor] | None) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if masks and name in masks:
                parameter.mul_(masks[name])


def some_batches(count: int, size: int = 5, dtype: torch.dtype = torch.float64) -> list[Batch]:
    data = samples(count * size)
    return [(data.x[i : i + size].to(dtype), data.y[i : i + size]) for i in range(0, count * size, size)]


def plain_loop(
    model: nn.Sequential,
    batches: Sequence[Batch],
    masks: dict[str, Tensor] | None,
    rate: float,
    *,
    momentum: float = 0.0,
    decay: float = 0.0,
    clip: float | None = None,
    adam: bool = False,
    loss: str = "cross_entropy",
) -> tuple[list[Tensor], float, float]:
    """Masked training by the formulas: (x_K, mean loss, mean over k of ||x_k - x_0||^2)."""
    names = [n for n, _ in model.named_parameters()]
    x = [p.detach().clone() for p in model.parameters()]
    x0 = [t.clone() for t in x]
    m1, m2, top = ([torch.zeros_like(t) for t in x] for _ in range(3))
    losses, drift = [], 0.0
    for k, (inputs, labels) in enumerate(batches):
        drift += sum(float((a - b).square().sum()) for a, b in zip(x, x0, strict=True))
        leaves = [t.clone().requires_grad_() for t in x]
        hidden = torch.tanh(inputs @ leaves[0].T + leaves[1])
        output = hidden @ leaves[2].T + leaves[3]
        if loss == "bce":
            target = F.one_hot(labels, 3).to(output.dtype)
            p = torch.sigmoid(output)
            value = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
        else:
            value = -torch.log_softmax(output, 1)[torch.arange(len(labels)), labels].mean()
        grads = torch.autograd.grad(value, leaves)
        losses.append(float(value.detach()))
        grads = [g * masks[n] if masks and n in masks else g for g, n in zip(grads, names, strict=True)]
        if clip is not None:
            norm = float(torch.sqrt(sum(g.square().sum() for g in grads)))  # type: ignore[call-overload]
            grads = [g * min(1.0, clip / (norm + 1e-6)) for g in grads]
        for i, (t, g) in enumerate(zip(x, grads, strict=True)):
            g = g + decay * t
            if adam:
                m1[i] = 0.9 * m1[i] + 0.1 * g
                m2[i] = 0.999 * m2[i] + 0.001 * g * g
                top[i] = torch.maximum(top[i], m2[i])
                scale = (top[i] / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8
                x[i] = t - rate * m1[i] / (1 - 0.9 ** (k + 1)) / scale
            else:
                m1[i] = momentum * m1[i] + g
                x[i] = t - rate * m1[i]
    return x, float(np.mean(losses)), drift / len(batches)


CASES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"decay": 0.1},
    {"momentum": 0.9, "decay": 0.05},
    {"clip": 0.05},
    {"clip": 1e6, "momentum": 0.5},
    {"adam": True},
    {"adam": True, "decay": 0.1},
    {"loss": "bce", "momentum": 0.9},
]


def trainer(case: dict[str, Any]) -> BuiltinTrainer:
    return BuiltinTrainer(
        loss=case.get("loss", "cross_entropy"),
        optimizer="adam" if case.get("adam") else "sgd",
        momentum=case.get("momentum", 0.0),
        weight_decay=case.get("decay", 0.0),
        gradient_clip=case.get("clip"),
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_equals_the_plain_loop(case: dict[str, Any], masked: bool) -> None:
    model, batches = mlp(), some_batches(6)
    masks = some_masks(model, 1) if masked else None
    apply_masks(model, masks)
    wanted, loss, drift = plain_loop(model, batches, masks, 0.1, **case)
    stats = trainer(case).train(model, batches, masks, learning_rate=0.1, client=0)
    for got, expected in zip(model.parameters(), wanted, strict=True):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-11)
    assert (stats.steps, stats.samples) == (6, 30)
    assert stats.train_loss == pytest.approx(loss, rel=1e-6)
    assert stats.drift_sq == pytest.approx(drift, rel=1e-6)


@few
@given(
    seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
    momentum=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 0.3]),
    optimizer=st.sampled_from(["sgd", "adam"]),
    clip=st.sampled_from([None, 0.1]),
)
def test_masked_coordinates_are_exactly_zero_throughout(
    seed: int, share: float, momentum: float, decay: float, optimizer: Any, clip: float | None
) -> None:
    model = mlp(torch.float32, seed)
    masks = some_masks(model, seed, share)
    apply_masks(model, masks)
    built = BuiltinTrainer(optimizer=optimizer, momentum=momentum, weight_decay=decay, gradient_clip=clip)
    start = [p.detach().clone() for p in model.parameters()]
    built.train(model, some_batches(4, dtype=torch.float32), masks, learning_rate=0.5, client=0)
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        assert (parameters[name][~mask] == 0).all()
    assert any(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


def test_a_masked_weight_with_an_infinite_slope_at_zero_does_not_move() -> None:
    """d sqrt|w| / dw has no value at the 0 of a masked weight; 0 * inf would be NaN."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(4, 6)
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x @ self.hidden.weight.clamp(min=0).sqrt().T)

    with isolated_rng(0):
        model = Root()
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[2, 1] = False
    with torch.no_grad():
        model.hidden.weight.copy_((model.hidden.weight.abs() + 0.5) * mask)
    batches = some_batches(2, dtype=torch.float32)
    BuiltinTrainer().train(model, batches, {"hidden.weight": mask}, learning_rate=0.1, client=0)
    assert float(model.hidden.weight.detach()[2, 1]) == 0.0
    assert torch.isfinite(model.hidden.weight).all()


def test_clipping_sees_only_the_sub_models_gradient() -> None:
    """The norm of what the client trains is what is clipped, after backward."""
    model = mlp()
    masks = {"0.weight": torch.zeros(6, 4, dtype=torch.bool)}
    apply_masks(model, masks)
    batch = some_batches(1)
    start = [p.detach().clone() for p in model.parameters()]
    BuiltinTrainer(gradient_clip=1e-3).train(model, batch, masks, learning_rate=1.0, client=0)
    moved = sum(
        float((a.detach() - b).square().sum()) for a, b in zip(model.parameters(), start, strict=True)
    )
    assert moved**0.5 == pytest.approx(1e-3, rel=1e-2)


def test_frozen_parameters_stay() -> None:
    model = mlp()
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    BuiltinTrainer(weight_decay=0.1).train(model, some_batches(2), None, learning_rate=0.1, client=0)
    assert torch.equal(model[2].weight, before)


def test_training_without_batches_reports_nothing() -> None:
    model = mlp()
    stats = BuiltinTrainer().train(model, [], None, learning_rate=0.1, client=0)
    assert stats == LocalStats(0, 0, None, None)


def test_training_and_measuring_set_the_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    built = BuiltinTrainer()
    model.eval()
    built.train(model, some_batches(2), None, learning_rate=0.1, client=0)
    assert model.training and float(model[1].running_mean.abs().sum()) > 0
    mean = model[1].running_mean.clone()
    built.evaluate(model, some_batches(2))
    assert not model.training and torch.equal(mean, model[1].running_mean)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_losses_of_sequences_are_means_over_positions(loss: Any) -> None:
    output, y = torch.randn(2, 3, 5, dtype=torch.float64), torch.randint(0, 3, (2, 5))
    built = BuiltinTrainer(loss=loss)
    flat = built.loss_of(output.permute(0, 2, 1).reshape(10, 3), y.reshape(10))
    assert float(built.loss_of(output, y)) == pytest.approx(float(flat), rel=1e-12)


def test_metrics_are_means_over_samples_not_over_batches() -> None:
    model = mlp()
    data = samples(11)
    x = data.x.double()
    batches = [(x[:8], data.y[:8]), (x[8:], data.y[8:])]
    metrics = BuiltinTrainer().evaluate(model, batches)
    with torch.no_grad():
        output = model(x)
    assert metrics.accuracy == float((output.argmax(1) == data.y).double().mean())
    assert metrics.loss == pytest.approx(float(F.cross_entropy(output, data.y)), rel=1e-9)
    assert metrics.samples == 11 and metrics.extra == {}
    assert BuiltinTrainer().evaluate(model, []) == Metrics(None, None, 0)


def test_accuracy_of_sequences_is_a_share_of_positions() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.one_hot(x.long(), 3).movedim(-1, 1).float()

    y = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0]])
    guess = torch.tensor([[0, 1, 2, 0], [2, 0, 0, 1]])
    metrics = BuiltinTrainer().evaluate(Fixed(), [(guess.float(), y)])
    assert metrics.accuracy == 5 / 8 and metrics.samples == 2


# -- one dispatch ----------------------------------------------------------------------------------


class Dropping(nn.Module):
    """Dropout, batch norm, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.bn = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(8, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.second(self.dropout(torch.relu(self.bn(self.first(x)))))))


def sent_to(layout: ModelLayout, w_D: Tensor, rung: int, count: int = 0, **changes: Any) -> Dispatch:
    densities = (0.3, 0.6, 1.0)
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), densities)
    values_S = w_D[ranking.support(rung)]
    fields = {"dispatch": 5, "client": 2, "version": 4, "count": count, "density": densities[rung]}
    return Dispatch(**{**fields, "ranking": ranking, "rung": rung, "values_S": values_S, **changes})


def world(seed: int = 0) -> tuple[nn.Module, ModelLayout, Tensor]:
    with isolated_rng(seed):
        model = Dropping()
    layout = build_layout(model)
    return model, layout, layout.gather(model)


def carried_out(
    sent: Dispatch, model: nn.Module, layout: ModelLayout, form: Any = "delta", built: Any = None
) -> LocalUpdate:
    return train_dispatch(
        sent,
        model=model,
        layout=layout,
        trainer=built or BuiltinTrainer(momentum=0.9, weight_decay=0.01),
        samples=samples(30),
        plan=plan(),
        learning_rate=0.1,
        form=form,
    )


def global_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, tuple(keys), tuple(rest), tuple(torch.get_rng_state().tolist())


@pytest.mark.parametrize("rung", [0, 1, 2])
def test_a_dispatch_does_not_depend_on_global_random_state_and_leaves_it_alone(rung: int) -> None:
    model, layout, w_D = world()
    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = global_state()
        results.append(carried_out(sent_to(layout, w_D, rung), model, layout))
        assert global_state() == before
    assert torch.equal(results[0].values_S, results[1].values_S)
    assert results[0].stats == results[1].stats
    later = carried_out(sent_to(layout, w_D, rung, count=1), model, layout)
    assert not torch.equal(later.values_S, results[0].values_S)


def test_random_layers_draw_anew_in_every_dispatch_of_every_client() -> None:
    model, layout, w_D = world()
    same = BatchPlan(30, 1, 1, False, 0)
    updates = [
        train_dispatch(
            sent_to(layout, w_D, 2, count=count, client=client),
            model=model,
            layout=layout,
            trainer=BuiltinTrainer(),
            samples=samples(30),
            plan=same,
            learning_rate=0.1,
            form="delta",
        )
        for client, count in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    first, later, other, again = (u.values_S.tolist() for u in updates)
    assert first == again and first != later and first != other and later != other


def test_a_failing_trainer_leaves_global_random_state_alone() -> None:
    class Failing(BuiltinTrainer):
        def train(self, *args: Any, **keywords: Any) -> LocalStats:
            torch.rand(3)
            raise RuntimeError("broken")

    model, layout, w_D = world()
    before = global_state()
    with pytest.raises(RuntimeError, match="broken"):
        carried_out(sent_to(layout, w_D, 0), model, layout, built=Failing())
    assert global_state() == before


@pytest.mark.parametrize("rung", [0, 1, 2])
@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_the_update_is_the_trained_sub_model_on_its_support(rung: int, form: str) -> None:
    """x_K - x_0 or x_K of parameters; buffers are values in both forms."""
    model, layout, w_D = world()
    sent = sent_to(layout, w_D, rung)
    kept = sent.values_S.clone()
    update = carried_out(sent, model, layout, form)
    x_D = layout.gather(model)
    index_S = sent.index_S
    is_buffer = index_S >= layout.parameters
    wanted = (
        x_D[index_S] if form == "replacement" else torch.where(is_buffer, x_D[index_S], x_D[index_S] - kept)
    )
    assert torch.equal(update.values_S, wanted) and torch.equal(sent.values_S, kept)
    assert is_buffer.any() and not torch.equal(x_D[index_S][is_buffer], kept[is_buffer])
    outside = ~sent.ranking.mask(rung)
    assert (x_D[outside] == 0).all() and bool(outside.any()) == (rung < 2)
    change = (x_D[index_S] - kept)[~is_buffer].double()
    assert update.change_sq == pytest.approx(float(change.square().sum()), rel=1e-12)
    assert (update.dispatch, update.client) == (5, 2)
    assert update.stats.steps == 3 and update.stats.samples == 12


def test_drift_is_the_mean_over_steps_of_the_distance_from_the_start() -> None:
    """k = 0..K-1, so the last step does not count and one step has no drift; buffers do not count."""
    model, layout, w_D = world()
    path: list[Tensor] = []

    class Recorded(BuiltinTrainer):
        def loss_of(self, output: Tensor, y: Tensor) -> Tensor:
            path.append(layout.gather(model)[: layout.parameters].double())
            return super().loss_of(output, y)

    update = carried_out(sent_to(layout, w_D, 1), model, layout, built=Recorded(momentum=0.5))
    assert len(path) == 3
    wanted = np.mean([float((x - path[0]).square().sum()) for x in path])
    assert update.stats.drift_sq == pytest.approx(wanted, rel=1e-5)


def test_a_sub_model_trains_as_if_masked_weights_did_not_exist() -> None:
    """Removing the masked units of a layer by hand gives the same update."""
    with isolated_rng(3):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        small = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    layout = build_layout(model)
    w_D = layout.gather(model)
    rows = [1, 4]
    with torch.no_grad():
        views = layout.views(w_D)
        views["0.weight"].mul_(1e-3)
        views["0.weight"][rows] += torch.where(views["0.weight"][rows] > 0, 1.0, -1.0)
        small[0].weight.copy_(views["0.weight"][rows])
        small[0].bias.copy_(views["0.bias"][rows])
        small[2].weight.copy_(views["2.weight"][:, rows])
        small[2].bias.copy_(views["2.bias"])
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), [1 / 3])
    sent = Dispatch(0, 0, 0, 0, 1 / 3, ranking, 0, w_D[ranking.support(0)])
    data = samples(20)
    data = TensorSamples(data.x.double(), data.y)
    update = train_dispatch(
        sent,
        model=model,
        layout=layout,
        trainer=BuiltinTrainer(momentum=0.9, weight_decay=0.01),
        samples=data,
        plan=plan(),
        learning_rate=0.1,
        form="replacement",
    )
    batches = [data.take(i) for i in plan().batches(0, 20, 0)]
    BuiltinTrainer(momentum=0.9, weight_decay=0.01).train(small, batches, None, learning_rate=0.1, client=0)
    x_D = torch.zeros_like(w_D)
    x_D[sent.index_S] = update.values_S
    trained = layout.views(x_D)
    assert torch.allclose(trained["0.weight"][rows], small[0].weight, rtol=1e-9)
    assert torch.allclose(trained["0.bias"][rows], small[0].bias, rtol=1e-9)
    assert torch.allclose(trained["2.weight"][:, rows], small[2].weight, rtol=1e-9)
    assert torch.allclose(trained["2.bias"], small[2].bias, rtol=1e-9)
    others = [i for i in range(6) if i not in rows]
    assert (trained["0.weight"][others] == 0).all() and (trained["0.bias"][others] == 0).all()


def test_the_trainer_gets_x0_the_masks_and_the_warmed_up_rate() -> None:
    model, layout, w_D = world()
    sent = sent_to(layout, w_D, 0, learning_rate_scale=0.25)
    seen: dict[str, Any] = {}

    class Spy(BuiltinTrainer):
        def train(self, model: nn.Module, batches: Any, masks: Any, **keywords: Any) -> LocalStats:
            seen.update(x0=layout.gather(model), masks=masks, batches=list(batches), **keywords)
            return LocalStats(0, 0, None, None)

    update = carried_out(sent, model, layout, built=Spy())
    mask_D = sent.ranking.mask(0)
    assert torch.equal(seen["x0"], w_D * mask_D)
    assert seen["learning_rate"] == 0.025 and seen["client"] == 2
    wanted = [samples(30).take(i) for i in plan().batches(2, 30, 0)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(seen["batches"], wanted, strict=True))
    assert set(seen["masks"]) <= {e.name for e in layout.entries if e.kind in ("prunable", "bias")}
    for name, mask in seen["masks"].items():
        entry = layout.by_name[name]
        assert mask.dtype == torch.bool and not mask.all()
        assert torch.equal(mask, mask_D[entry.slice].view(entry.shape))
    is_parameter = sent.index_S < layout.parameters
    assert (update.values_S[is_parameter] == 0).all() and update.change_sq == 0.0


def test_there_are_no_masks_at_density_one() -> None:
    _, layout, w_D = world()
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), (0.3, 1.0))
    assert parameter_masks(layout, ranking.mask(1)) is None
    masks = parameter_masks(layout, ranking.mask(0))
    assert masks is not None and "out.weight" not in masks and "bn.weight" not in masks


def test_the_bias_of_a_masked_unit_is_masked_and_stays_zero() -> None:
    model, layout, w_D = world()
    layout.views(w_D)["first.weight"][3] *= 1e-6  # the smallest row of all
    sent = sent_to(layout, w_D, 0)
    bias = layout.by_name["first.bias"]
    assert not bool(sent.ranking.mask(0)[bias.offset + 3])
    carried_out(sent, model, layout)
    bias = model.first.bias.detach()  # type: ignore[union-attr]
    assert float(bias[3]) == 0.0 and float(bias.abs().sum()) > 0


# -- seeds -----------------------------------------------------------------------------------------


def test_seeds_depend_on_nothing_but_their_address() -> None:
    assert derive(1, "batches", 2, 3) == derive(1, "batches", 2, 3)
    addresses = [
        (1, "a", 2),
        (1, "a", 3),
        (1, "b", 2),
        (2, "a", 2),
        (1, "a", "2"),
        (1, "a", 2, 0),
        (1, "a"),
        (12, "a"),
    ]
    assert len({derive(seed, *rest) for seed, *rest in addresses}) == len(addresses)
    assert all(0 <= derive(s, "x") < 2**63 for s in range(50))
    assert numpy_generator(1, "a").random() == numpy_generator(1, "a").random()


def test_isolation_seeds_all_three_generators_and_restores_them() -> None:
    before = global_state()
    draws = []
    for _ in range(2):
        with isolated_rng(derive(0, "x")):
            draws.append((random.random(), np.random.rand(), torch.rand(2).tolist()))
    assert draws[0] == draws[1] and global_state() == before
    with isolated_rng(1), isolated_rng(2):
        pass
    assert global_state() == before


def test_sparse_gradients_of_an_embedding_are_masked_like_others() -> None:
    with isolated_rng(0):
        nets = [
            nn.Sequential(nn.Embedding(30, 8, sparse=sparse), nn.Flatten(), nn.Linear(24, 3))
            for sparse in (True, False)
        ]
    nets[1].load_state_dict(nets[0].state_dict())
    x, y = torch.randint(0, 30, (20, 3)), torch.randint(0, 3, (20,))
    mask = torch.rand(30, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    trainer = BuiltinTrainer(momentum=0.9, weight_decay=0.01)
    for net in nets:
        with torch.no_grad():
            net[0].weight.mul_(mask)
        trainer.train(net, [(x, y)] * 3, {"0.weight": mask}, learning_rate=0.1, client=0)
    assert (nets[0][0].weight[~mask] == 0).all()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)
