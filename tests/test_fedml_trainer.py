"""A user's ClientTrainer under masks that it knows nothing about."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fedgmr_plugin.engine.samples import BatchList
from fedgmr_plugin.engine.samples import TensorSamples as Tensors
from fedgmr_plugin.engine.trainer import LocalStats, Metrics
from fedgmr_plugin.errors import HostError
from fedgmr_plugin.runtimes import host
from fedgmr_plugin.runtimes.data import read_dataset
from fedgmr_plugin.runtimes.trainer import FedMLTrainer, metrics_of

host.prepare()

from fedml.core.alg_frame.client_trainer import ClientTrainer  # noqa: E402
from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy  # noqa: E402
from fedml.core.fhe.fhe_agg import FedMLFHE  # noqa: E402
from fedml.core.security.fedml_attacker import FedMLAttacker  # noqa: E402
from fedml.ml.trainer.trainer_creator import create_model_trainer  # noqa: E402

RATE = 0.1
Optimizer = Callable[[Any], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def _fresh_singletons() -> Iterator[None]:
    """FedML keeps attacks and privacy per process."""
    yield
    FedMLDifferentialPrivacy._dp_instance = None
    FedMLAttacker._attacker_instance = None
    FedMLFHE._fhe_instance = None


def arguments(**changes: Any) -> SimpleNamespace:
    values = {
        "dataset": "own",
        "learning_rate": 7.0,
        "weight_decay": 0.01,
        "client_optimizer": "sgd",
        "epochs": 3,
        "batch_size": 4,
        "client_num_in_total": 5,
        "client_num_per_round": 5,
        "comm_round": 2,
    }
    return SimpleNamespace(**{**values, **changes})


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def some_batches(count: int = 3, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 3, generator=generator), torch.randint(2, (4,), generator=generator))
        for _ in range(count)
    ]


def some_masks(model: nn.Module, seed: int = 2, share: float = 0.5) -> dict[str, Tensor]:
    """Masks on the weights; the model is made to hold m * w."""
    generator = torch.Generator().manual_seed(seed)
    masks = {
        n: torch.rand(p.shape, generator=generator) < share
        for n, p in model.named_parameters()
        if p.ndim == 2
    }
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return masks


class UserTrainer(ClientTrainer):
    """An ordinary FedML trainer: its own loop, its own optimizer."""

    def __init__(
        self, model: nn.Module, args: Any, optimizer: Optimizer, *, keep: bool = False, clip: float = 0.0
    ):
        super().__init__(model, args)
        self._make, self._keep, self._clip = optimizer, keep, clip
        self._optimizer: torch.optim.Optimizer | None = None
        self.calls: list[Any] = []

    def get_model_params(self) -> Any:
        return self.model.state_dict()

    def set_model_params(self, model_parameters: Any) -> None:
        self.model.load_state_dict(model_parameters)

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        self.calls.append(("train", len(train_data), args.learning_rate, args.epochs, self.args.epochs))
        if self._optimizer is None or not self._keep:
            self._optimizer = self._make(self.model.parameters())
        for _ in range(args.epochs):
            for x, y in train_data:
                self._optimizer.zero_grad()
                F.cross_entropy(self.model(x), y).backward()
                if self._clip:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
                self._optimizer.step()


def oracle(
    model: nn.Module,
    batches: list[Any],
    masks: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    clip: float = 0.0,
    every: int = 1,
) -> float:
    """K masked steps written out, x <- m * step(x, m * grad); returns the mean of ||x_k - x_0||^2, k < K."""
    start = [p.detach().clone() for p in model.parameters()]
    drift, steps = 0.0, 0
    optimizer.zero_grad()
    for i, (x, y) in enumerate(batches, 1):
        F.cross_entropy(model(x), y).backward()
        for name, mask in masks.items():
            model.get_parameter(name).grad *= mask  # type: ignore[operator]
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if i % every:
            continue
        drift += sum(
            float((p.detach() - s).square().sum()) for p, s in zip(model.parameters(), start, strict=True)
        )
        steps += 1
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)
    return drift / steps


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p + 0.0, q + 0.0), name


def assert_masked(model: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any(), name


def assert_no_hooks(model: nn.Module) -> None:
    from torch.optim import optimizer as module

    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not module._global_optimizer_pre_hooks and not module._global_optimizer_post_hooks


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=RATE),
    "momentum and weight decay": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, weight_decay=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=RATE, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=RATE, momentum=0.5),
}


# -- the same as a masked loop of one's own --------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_equals_a_plain_masked_loop(name: str, clip: float) -> None:
    model = network()
    masks = some_masks(model)
    expected = copy.deepcopy(model)
    drift = oracle(expected, some_batches(), masks, OPTIMIZERS[name](expected.parameters()), clip=clip)
    trainer = FedMLTrainer(UserTrainer(model, arguments(), OPTIMIZERS[name], clip=clip), arguments())
    stats = trainer.train(model, some_batches(), masks, learning_rate=RATE, client=0)
    assert_same(model, expected)
    assert_masked(model, masks)
    assert_no_hooks(model)
    assert stats._replace(drift_sq=None) == LocalStats(steps=3, samples=12, train_loss=None, drift_sq=None)
    assert stats.drift_sq == pytest.approx(drift, rel=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_density_one_is_bitwise_the_trainer_alone(name: str) -> None:
    model, alone = network(), network()
    plain = UserTrainer(alone, arguments(epochs=1), OPTIMIZERS[name])
    plain.train(some_batches(), torch.device("cpu"), plain.args)
    trainer = FedMLTrainer(UserTrainer(model, arguments(), OPTIMIZERS[name]), arguments())
    trainer.train(model, some_batches(), None, learning_rate=RATE, client=0)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert p.detach().numpy().tobytes() == q.detach().numpy().tobytes()


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1), count=st.integers(1, 4))
def test_any_masks(seed: int, share: float, count: int) -> None:
    model = network(seed)
    masks = some_masks(model, seed, share)
    expected = copy.deepcopy(model)
    oracle(expected, some_batches(count, seed), masks, OPTIMIZERS["adamw"](expected.parameters()))
    trainer = FedMLTrainer(UserTrainer(model, arguments(), OPTIMIZERS["adamw"]), arguments())
    trainer.train(model, some_batches(count, seed), masks, learning_rate=RATE, client=0)
    assert_same(model, expected)


def test_an_optimizer_kept_across_calls_keeps_its_momentum() -> None:
    make = OPTIMIZERS["momentum and weight decay"]
    model = network()
    expected = copy.deepcopy(model)
    trainer = FedMLTrainer(UserTrainer(model, arguments(), make, keep=True), arguments())
    optimizer = make(expected.parameters())
    for call, share in enumerate((1.1, 0.5, 0.3)):  # from everything to less: old momentum on masked weights
        masks = some_masks(model, call, share)
        some_masks(expected, call, share)
        oracle(expected, some_batches(seed=call), masks, optimizer)
        trainer.train(model, some_batches(seed=call), masks, learning_rate=RATE, client=call)
        assert_same(model, expected)
        assert_masked(model, masks)


class Accumulating(UserTrainer):
    def train(self, train_data: Any, device: Any, args: Any) -> None:
        optimizer = self._make(self.model.parameters())
        for i, (x, y) in enumerate(train_data, 1):
            F.cross_entropy(self.model(x), y).backward()
            if i % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()


def test_gradient_accumulation() -> None:
    model, make = network(), OPTIMIZERS["momentum and weight decay"]
    masks = some_masks(model)
    expected = copy.deepcopy(model)
    oracle(expected, some_batches(4), masks, make(expected.parameters()), every=2)
    stats = FedMLTrainer(Accumulating(model, arguments(), make), arguments()).train(
        model, some_batches(4), masks, learning_rate=RATE, client=0
    )
    assert_same(model, expected)
    assert stats.steps == 2 and stats.samples == 16


class Copying(UserTrainer):
    """Trains a deep copy and answers with the copy's weights."""

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        original, self.model = self.model, copy.deepcopy(self.model)
        super().train(train_data, device, args)
        self.answer, self.model = self.model.state_dict(), original

    def get_model_params(self) -> Any:
        return self.answer


class Assigning(UserTrainer):
    """Replaces the parameters themselves."""

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        self.model.load_state_dict({k: v.clone() for k, v in self.model.state_dict().items()}, assign=True)
        super().train(train_data, device, args)


@pytest.mark.parametrize("kind", [Copying, Assigning])
@pytest.mark.parametrize("name", ["sgd", "momentum and weight decay", "adam"])
def test_a_trainer_that_trains_a_copy(kind: type[UserTrainer], name: str) -> None:
    model = network()
    masks = some_masks(model)
    expected = copy.deepcopy(model)
    drift = oracle(expected, some_batches(), masks, OPTIMIZERS[name](expected.parameters()))
    trainer = FedMLTrainer(kind(model, arguments(), OPTIMIZERS[name]), arguments())
    stats = trainer.train(model, some_batches(), masks, learning_rate=RATE, client=0)
    assert_same(model, expected)
    assert stats.steps == 3 and stats.drift_sq == pytest.approx(drift, rel=1e-5)


class Foreign(UserTrainer):
    """Steps an unrelated network of the same shape beside its own."""

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        self.teacher = network(9)
        for x, y in train_data:
            F.cross_entropy(self.teacher(x), y).backward()
        torch.optim.SGD(self.teacher.parameters(), lr=RATE, weight_decay=0.1).step()
        super().train(train_data, device, args)


def test_other_optimizers_are_left_alone() -> None:
    model = network()
    masks = some_masks(model)
    trainer = Foreign(model, arguments(), OPTIMIZERS["sgd"])
    stats = FedMLTrainer(trainer, arguments()).train(
        model, some_batches(), masks, learning_rate=RATE, client=0
    )
    assert stats.steps == 3
    assert all(p.all() for p in trainer.teacher.parameters())


class TwoOptimizers(UserTrainer):
    """One optimizer per layer, and new ones for the second half."""

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        for half in (train_data[:2], train_data[2:]):
            both = [self._make(self.model[0].parameters()), self._make(self.model[2].parameters())]
            for x, y in half:
                self.model.zero_grad()
                F.cross_entropy(self.model(x), y).backward()
                for optimizer in both:
                    optimizer.step()


def test_optimizers_that_share_out_the_parameters() -> None:
    model = network()
    masks = some_masks(model)
    expected = copy.deepcopy(model)
    drift = oracle(expected, some_batches(4), masks, OPTIMIZERS["sgd"](expected.parameters()))
    stats = FedMLTrainer(TwoOptimizers(model, arguments(), OPTIMIZERS["sgd"]), arguments()).train(
        model, some_batches(4), masks, learning_rate=RATE, client=0
    )
    assert_same(model, expected)
    assert stats.steps == 4 and stats.drift_sq == pytest.approx(drift, rel=1e-5)


class ByHand(UserTrainer):
    """No optimizer at all."""

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        for x, y in train_data:
            self.model.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            with torch.no_grad():
                for p in self.model.parameters():
                    p -= args.learning_rate * p.grad  # type: ignore[operator]


def test_a_loop_without_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    masks = some_masks(model)
    expected = copy.deepcopy(model)
    oracle(expected, some_batches(), masks, OPTIMIZERS["sgd"](expected.parameters()))
    trainer = FedMLTrainer(ByHand(model, arguments(), OPTIMIZERS["sgd"]), arguments())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            stats = trainer.train(model, some_batches(), masks, learning_rate=RATE, client=0)
            if _ == 0:
                for p, q in zip(model.parameters(), expected.parameters(), strict=True):
                    torch.testing.assert_close(p, q)
    assert stats == LocalStats(steps=3, samples=12, train_loss=None, drift_sq=None)
    assert sum("ByHand takes no step" in record.message for record in caplog.records) == 1


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 3, sparse=True)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x))


def test_sparse_gradients() -> None:
    model = Embedded()
    masks = some_masks(model)
    expected = copy.deepcopy(model)
    expected.table.sparse = False
    batches = [(torch.tensor([0, 1, 1, 4]), torch.tensor([0, 1, 1, 0]))] * 2
    oracle(expected, batches, masks, OPTIMIZERS["sgd"](expected.parameters()))
    trainer = FedMLTrainer(UserTrainer(model, arguments(), OPTIMIZERS["sgd"]), arguments())
    trainer.train(model, batches, masks, learning_rate=RATE, client=0)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert_masked(model, masks)


# -- FedML's calling convention ---------------------------------------------------------------------------


class Recording(UserTrainer):
    def set_id(self, trainer_id: Any) -> None:
        self.calls.append(("set_id", trainer_id))
        super().set_id(trainer_id)

    def update_dataset(self, train: Any, test: Any, number: int) -> None:
        self.calls.append(("update_dataset", len(train), test, number))
        super().update_dataset(train, test, number)

    def on_before_local_training(self, train_data: Any, device: Any, args: Any) -> None:
        self.calls.append(("before", args.learning_rate))

    def on_after_local_training(self, train_data: Any, device: Any, args: Any) -> None:
        self.calls.append(("after", args.learning_rate))

    def get_model_params(self) -> Any:
        self.calls.append(("get",))
        return super().get_model_params()


def eight(**changes: Any) -> list[Any]:
    data = {
        40: TensorDataset(torch.zeros(5, 3), torch.zeros(5)),
        7: TensorDataset(torch.zeros(2, 3), torch.zeros(2)),
    }
    tests = {7: "test of 7"}
    return [7, 1, None, [(torch.zeros(1, 3), torch.zeros(1))], {40: 5, 7: 2}, data, tests, 2]


def test_hooks_in_order_and_arguments_restored() -> None:
    args, own = arguments(), arguments(epochs=9)
    trainer = Recording(network(), own, OPTIMIZERS["sgd"])
    adapter = FedMLTrainer(trainer, args, data=read_dataset(eight()))
    adapter.train(trainer.model, some_batches(2), None, learning_rate=0.25, client=0)
    adapter.train(trainer.model, some_batches(1), None, learning_rate=0.25, client=1)
    assert trainer.calls == [
        ("set_id", 7),
        ("update_dataset", 2, "test of 7", 2),
        ("before", 0.25),
        ("train", 2, 0.25, 1, 1),
        ("after", 0.25),
        ("get",),
        ("set_id", 40),
        ("update_dataset", 1, None, 5),
        ("before", 0.25),
        ("train", 1, 0.25, 1, 1),
        ("after", 0.25),
        ("get",),
    ]
    assert vars(args) == vars(arguments()) and vars(own) == vars(arguments(epochs=9))


def test_samples_are_those_that_the_trainer_read() -> None:
    class Hasty(UserTrainer):
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            super().train(train_data[:1], device, args)
            super().train([train_data[0]], device, args)

    model = network()
    index = [np.arange(4), np.arange(4, 7)]
    batches = BatchList(Tensors(torch.randn(7, 3), torch.zeros(7, dtype=torch.long)), index)
    stats = FedMLTrainer(Hasty(model, arguments(), OPTIMIZERS["sgd"]), arguments()).train(
        model, batches, None, learning_rate=RATE, client=0
    )
    assert stats.steps == 2 and stats.samples == 4


def test_a_trainer_with_another_model_object() -> None:
    """The trainer keeps its own module (and its optimizer): weights go in and come back by name."""
    own, model = network(5), network()
    masks = some_masks(model)
    expected = copy.deepcopy(model)
    oracle(expected, some_batches(), masks, OPTIMIZERS["adam"](expected.parameters()))
    trainer = FedMLTrainer(UserTrainer(own, arguments(), OPTIMIZERS["adam"]), arguments())
    trainer.train(model, some_batches(), masks, learning_rate=RATE, client=0)
    assert_same(model, expected)
    assert_no_hooks(own)


def test_batch_norm_statistics_come_back() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    trainer = FedMLTrainer(Copying(model, arguments(), OPTIMIZERS["sgd"]), arguments())
    trainer.train(model, some_batches(), some_masks(model), learning_rate=RATE, client=0)
    assert model[1].running_mean.any() and model[1].num_batches_tracked == 3


class Failing(UserTrainer):
    def train(self, train_data: Any, device: Any, args: Any) -> None:
        raise ValueError("no such luck")

    test = train


def test_exceptions_name_the_client_and_leave_nothing_behind() -> None:
    args = arguments()
    model = network()
    trainer = FedMLTrainer(Failing(model, args, OPTIMIZERS["sgd"]), args)
    with pytest.raises(
        HostError, match=r"GMR-506 client=6: Failing.train raised ValueError: no such luck"
    ) as caught:
        trainer.train(model, some_batches(), some_masks(model), learning_rate=RATE, client=6)
    assert isinstance(caught.value.__cause__, ValueError)
    assert vars(args) == vars(arguments())
    assert_no_hooks(model)
    with pytest.raises(HostError, match=r"GMR-506 Failing.test raised ValueError") as caught:
        trainer.evaluate(model, some_batches())
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda state: {k: v for k, v in state.items() if k != "2.bias"}, "get_model_params lacks 2.bias"),
        (lambda state: {**state, "0.bias": torch.zeros(2)}, r"get_model_params has 0.bias of shape \(2,\)"),
    ],
)
def test_wrong_weights_are_refused(answer: Any, problem: str) -> None:
    class Wrong(UserTrainer):
        def get_model_params(self) -> Any:
            return answer(self.model.state_dict())

    model = network()
    trainer = FedMLTrainer(Wrong(model, arguments(), OPTIMIZERS["sgd"]), arguments())
    with pytest.raises(HostError, match=f"GMR-506 client=1: {problem}"):
        trainer.train(model, some_batches(), None, learning_rate=RATE, client=1)


def test_encryption_is_refused() -> None:
    with pytest.raises(HostError, match="GMR-504"):
        FedMLTrainer(object(), arguments(enable_fhe=True))
    FedMLFHE.get_instance().is_enabled = True
    with pytest.raises(HostError, match="GMR-504"):
        FedMLTrainer(object(), arguments())


# -- FedML's own trainers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fedmls_classification_trainer(optimizer: str) -> None:
    model = network()
    masks = some_masks(model)
    expected = copy.deepcopy(model)
    own = (
        torch.optim.SGD(expected.parameters(), lr=RATE)
        if optimizer == "sgd"
        else torch.optim.Adam(expected.parameters(), lr=RATE, weight_decay=0.01, amsgrad=True)
    )
    oracle(expected, some_batches(), masks, own)
    args = arguments(client_optimizer=optimizer)
    trainer = FedMLTrainer(create_model_trainer(model, args), args)
    trainer.train(model, some_batches(), masks, learning_rate=RATE, client=0)
    assert_same(model, expected)
    metrics = trainer.evaluate(model, some_batches())
    with torch.no_grad():
        x, y = (torch.cat(part) for part in zip(*some_batches(), strict=True))
        assert metrics.accuracy == pytest.approx(float((expected(x).argmax(1) == y).float().mean()))
        assert metrics.loss == pytest.approx(float(F.cross_entropy(expected(x), y)), rel=1e-6)
    assert metrics.samples == 12 and metrics.extra == {}


class Words(nn.Module):
    """Next-word scores [b, words, positions], as FedML's trainer expects them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(6, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x)).movedim(-1, 1)


def test_fedmls_next_word_trainer() -> None:
    model, args = Words(), arguments(dataset="stackoverflow_nwp")
    masks = some_masks(model)
    x = torch.tensor([[1, 2, 3, 0], [4, 5, 1, 1]])
    trainer = FedMLTrainer(create_model_trainer(model, args), args)
    stats = trainer.train(model, [(x, x.roll(-1, 1))] * 2, masks, learning_rate=RATE, client=0)
    assert stats.steps == 2 and stats.samples == 4
    assert_masked(model, masks)
    metrics = trainer.evaluate(model, [(x, x)])
    assert metrics.samples == 7 and metrics.accuracy is not None  # the padding 0 does not count


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fedmls_tag_trainer_reads_lr_and_wd(optimizer: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Sigmoid())
    args = arguments(dataset="stackoverflow_lr", client_optimizer=optimizer)
    masks = some_masks(model)
    batches = [(torch.ones(2, 3), torch.tensor([[0.0, 1.0], [1.0, 1.0]]))] * 2
    trainer = FedMLTrainer(create_model_trainer(model, args), args)
    before = weights(model)
    trainer.train(model, batches, masks, learning_rate=RATE, client=0)
    assert_masked(model, masks)
    assert any(not torch.equal(p, q) for p, q in zip(before, weights(model), strict=True))
    assert not hasattr(args, "lr") and not hasattr(args, "wd")
    metrics = trainer.evaluate(model, batches)
    assert metrics.samples == 4 and set(metrics.extra) == {"test_precision", "test_recall"}
    assert 0 <= metrics.extra["test_recall"] <= 1


def test_a_users_own_lr_is_not_touched() -> None:
    class Reader(UserTrainer):
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            self.calls.append((args.lr, args.wd))

    args = arguments(lr=0.5, wd=0.25)
    trainer = Reader(network(), args, OPTIMIZERS["sgd"])
    FedMLTrainer(trainer, args).train(trainer.model, some_batches(), None, learning_rate=RATE, client=0)
    args.lr = args.learning_rate
    FedMLTrainer(trainer, args).train(trainer.model, some_batches(), None, learning_rate=RATE, client=0)
    assert trainer.calls == [(0.5, 0.25), (RATE, 0.25)] and args.lr == args.learning_rate == 7.0


def test_local_differential_privacy_noise_is_projected() -> None:
    args = arguments(
        enable_dp=True,
        dp_solution_type="ldp",
        mechanism_type="gaussian",
        epsilon=0.9,
        delta=1e-2,
        sensitivity=0.1,
    )
    model, quiet = network(), network()
    masks = some_masks(model)
    some_masks(quiet)
    FedMLTrainer(UserTrainer(quiet, arguments(), OPTIMIZERS["sgd"]), arguments()).train(
        quiet, some_batches(), masks, learning_rate=RATE, client=0
    )
    trainer = FedMLTrainer(UserTrainer(model, args, OPTIMIZERS["sgd"]), args)
    trainer.train(model, some_batches(), masks, learning_rate=RATE, client=0)
    assert_masked(model, masks)
    assert any((p != q).any() for p, q in zip(weights(model), weights(quiet), strict=True))


def test_a_data_poisoning_attack_reaches_the_training() -> None:
    args = arguments(
        enable_attack=True,
        attack_type="label_flipping",
        original_class_list=[0],
        target_class_list=[1],
        ratio_of_poisoned_client=1.0,
    )
    seen: list[int] = []

    class Watching(UserTrainer):
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            for _, y in train_data:
                seen.extend(y.tolist())

    dataset = eight()
    dataset[6] = {7: [(torch.zeros(1, 3), torch.zeros(1))], 40: [(torch.zeros(1, 3), torch.zeros(1))]}
    trainer = Watching(network(), args, OPTIMIZERS["sgd"])
    stats = FedMLTrainer(trainer, args, data=read_dataset(dataset)).train(
        trainer.model, some_batches(), None, learning_rate=RATE, client=0
    )
    assert seen == [1] * 12 and stats.samples == 12


# -- evaluation ----------------------------------------------------------------------------------------------


def test_evaluation_keeps_mode_and_weights() -> None:
    class Testing(UserTrainer):
        def test(self, test_data: Any, device: Any, args: Any) -> Any:
            self.model.eval()
            return {"test_correct": len(test_data), "test_total": 4, "test_loss": 2.0}

    model = network().train()
    before = weights(model)
    adapter = FedMLTrainer(Testing(network(3), arguments(), OPTIMIZERS["sgd"]), arguments())
    assert adapter.evaluate(model, iter(some_batches(2))) == Metrics(0.5, 0.5, 4, {})
    assert model.training and all(torch.equal(p, q) for p, q in zip(before, weights(model), strict=True))
    for p, q in zip(before, weights(adapter.trainer.model), strict=True):
        assert torch.equal(p, q)


def test_a_loader_is_passed_on() -> None:
    class Testing(UserTrainer):
        def test(self, test_data: Any, device: Any, args: Any) -> Any:
            assert isinstance(test_data, DataLoader)
            return None

    trainer = Testing(network(), arguments(), OPTIMIZERS["sgd"])
    loader = DataLoader(TensorDataset(torch.zeros(2, 3), torch.zeros(2)))
    assert FedMLTrainer(trainer, arguments()).evaluate(trainer.model, loader) == Metrics(None, None, 0, {})


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (None, Metrics(None, None, 0, {})),
        (True, Metrics(None, None, 0, {})),
        ({}, Metrics(None, None, 9, {})),
        (
            {"test_correct": torch.tensor(3), "test_total": np.int64(4), "test_loss": 2},
            Metrics(0.75, 0.5, 4, {}),
        ),
        ({"test_correct": 0, "test_total": 0, "test_loss": 0}, Metrics(None, None, 0, {})),
        ({"test_total": 4, "test_loss": float("nan"), "auc": 0.5}, Metrics(None, None, 4, {"auc": 0.5})),
        (
            {"test_total": 4, "test_precision": 2.0, "test_recall": 1.0, "note": "text"},
            Metrics(None, None, 4, {"test_precision": 0.5, "test_recall": 0.25}),
        ),
        ({"test_acc": 0.5, "test_loss": 1.5, "f1": 0.25}, Metrics(0.5, 1.5, 9, {"f1": 0.25})),
        ((0.5, 1.5, None, None), Metrics(0.5, 1.5, 9, {})),
        ([0.5], Metrics(0.5, None, 9, {})),
        (((), torch.ones(2)), Metrics(None, None, 9, {})),
    ],
)
def test_metrics(result: Any, expected: Metrics) -> None:
    assert metrics_of(result, samples=9) == expected
