"""FedML's hooks around aggregation: a user's ServerAggregator, defences, attacks, central noise."""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedgmr_plugin.engine.trainer import Metrics
from fedgmr_plugin.errors import ConfigError, HostError, UpdateRejected
from fedgmr_plugin.runtimes import host
from fedgmr_plugin.runtimes.aggregator import AggregatorBridge, State, Update

host.prepare()

from fedml.core import mlops  # noqa: E402
from fedml.core.alg_frame.server_aggregator import ServerAggregator  # noqa: E402
from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy  # noqa: E402
from fedml.core.fhe.fhe_agg import FedMLFHE  # noqa: E402
from fedml.core.security.fedml_attacker import FedMLAttacker  # noqa: E402
from fedml.core.security.fedml_defender import FedMLDefender  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh_singletons() -> Iterator[None]:
    """FedML keeps defences, attacks and privacy per process."""
    yield
    FedMLDefender._defender_instance = None
    FedMLDifferentialPrivacy._dp_instance = None
    FedMLAttacker._attacker_instance = None
    FedMLFHE._fhe_instance = None


def arguments(**changes: Any) -> SimpleNamespace:
    values = {
        "dataset": "own",
        "client_num_in_total": 5,
        "client_num_per_round": 5,
        "comm_round": 3,
        "enable_wandb": False,
        "using_gpu": False,
        "device_type": "cpu",
        "training_type": "simulation",
        "backend": "sp",
        "batch_size": 2,
    }
    return SimpleNamespace(**{**values, **changes})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def some_updates(count: int = 5, *, outlier: int | None = None) -> list[Update]:
    generator = torch.Generator().manual_seed(3)
    updates = []
    for n in range(count):
        state: State = OrderedDict()
        for name, value in network().state_dict().items():
            noise = 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else 0
            state[name] = value + noise + (50 if n == outlier and value.is_floating_point() else 0)
        updates.append((float(10 + n), state))
    return updates


def bridge(aggregator: Any = None, **changes: Any) -> AggregatorBridge:
    return AggregatorBridge(aggregator, network(), arguments(**changes))


def values(state: Any) -> Tensor:
    return torch.cat([v.flatten().double() for v in state.values()])


def global_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


class Own(ServerAggregator):
    """A user's aggregator with nothing overridden."""

    def get_model_params(self) -> Any:
        return self.model.state_dict()

    def set_model_params(self, model_parameters: Any) -> None:
        self.model.load_state_dict(model_parameters)

    def test(self, test_data: Any, device: Any, args: Any) -> Any:
        self.model.eval()
        with torch.no_grad():
            correct = sum(int((self.model(x).argmax(1) == y).sum()) for x, y in test_data)
        return {"test_correct": correct, "test_total": sum(len(y) for _, y in test_data), "test_loss": 0.0}


def own(kind: type[Own] = Own, **changes: Any) -> AggregatorBridge:
    args = arguments(**changes)
    return AggregatorBridge(kind(network(), args), network(), args)


# -- when is there anything to do ---------------------------------------------------------------------------


class Before(Own):
    def on_before_aggregation(self, updates: Any) -> Any:
        return updates[::2], None


class After(Own):
    def on_after_aggregation(self, state: Any) -> Any:
        return OrderedDict((name, value * 0 + 7) for name, value in reversed(state.items()))


DEFENCES: dict[str, dict[str, Any]] = {
    "norm_diff_clipping": {"norm_bound": 0.5},
    "crfl": {"clip_threshold": 1.0},
    "krum": {"byzantine_client_num": 1},
    "multikrum": {"byzantine_client_num": 0, "krum_param_m": 3},
    "trimmed_mean": {"beta": 0.2},
    "3sigma": {},
    "3sigma_foolsgold": {"to_keep_higher_scores": False, "pretraining_round_num": 2},
    "foolsgold": {},
    "anomaly_detection": {"cosine_similarity_bound": 0.9},
}


def defence(kind: str, **changes: Any) -> dict[str, Any]:
    return {"enable_defense": True, "defense_type": kind, **DEFENCES[kind], **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_defense": True}, "GMR-107 defense_type: FedML reads it for enable_defense"),
        ({"enable_defense": True, "defense_type": "cclip"}, "GMR-107 bucket_size: .* for defense_type=cclip"),
        ({"enable_defense": True, "defense_type": "kurm"}, "GMR-103 defense_type=kurm: FedML does not know"),
        ({"enable_dp": True, "dp_solution_type": "cpd", "delta": 0.1}, "GMR-103 dp_solution_type=cpd: FedML"),
        (
            {
                "enable_dp": True,
                "dp_solution_type": "cdp",
                "mechanism_type": "gaussian",
                "epsilon": 9,
                "delta": 0.1,
                "sensitivity": 1,
            },
            "GMR-104 dp_solution_type=cdp: FedML refuses its options: Epsilon cannot be greater than 1",
        ),
    ],
)
def test_what_fedml_raises_at_options_of_its_defences_and_privacy_is_said_in_words(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        bridge(**changes)
    assert refusal.value.__cause__ is not None


PRIVACY = {"mechanism_type": "gaussian", "epsilon": 0.9, "delta": 1e-2, "sensitivity": 0.1}


@pytest.mark.parametrize(
    ("make", "active"),
    [
        (lambda: bridge(), False),
        (lambda: own(), False),
        (lambda: own(Before), True),
        (lambda: own(After), True),
        (lambda: bridge(**defence("crfl")), True),
        (lambda: own(**defence("crfl")), True),
        (lambda: bridge(enable_dp=True, dp_solution_type="cdp", **PRIVACY), True),
        (lambda: bridge(enable_dp=True, dp_solution_type="ldp", **PRIVACY), False),
        (
            lambda: bridge(
                enable_attack=True, attack_type="byzantine", byzantine_client_num=1, attack_mode="zero"
            ),
            True,
        ),
        (
            lambda: bridge(
                enable_attack=True,
                attack_type="label_flipping",
                original_class_list=[0],
                target_class_list=[1],
                ratio_of_poisoned_client=1.0,
            ),
            False,
        ),
    ],
)
def test_active_only_if_a_hook_does_something(make: Any, active: bool) -> None:
    assert make().active is active


def test_a_default_aggregator_passes_everything_through() -> None:
    updates = some_updates()
    assert not bridge().user_defined and own().user_defined
    kept, where = bridge().before(updates)
    assert where == [0, 1, 2, 3, 4]
    for (weight, state), (expected_weight, expected) in zip(kept, updates, strict=True):
        assert weight == expected_weight and list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in state)
    assert torch.equal(values(bridge().after(updates[0][1])), values(updates[0][1]))


def test_an_overridden_aggregate_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(Own):
        def aggregate(self, updates: Any) -> Any:
            raise AssertionError("called")

    with caplog.at_level(logging.WARNING, logger="fedgmr_plugin"):
        made = own(Mine)
        made.before(some_updates())
        made.after(some_updates()[0][1])
        own()
    assert [r.message for r in caplog.records if "aggregate is not called" in r.message] == [
        "Mine.aggregate is not called: fedgmr aggregates sub-models by itself"
    ]


# -- before -------------------------------------------------------------------------------------------------


def test_user_hook_chooses_updates() -> None:
    updates = some_updates()
    kept, where = own(Before).before(updates)
    assert where == [0, 2, 4] and [w for w, _ in kept] == [10.0, 12.0, 14.0] and len(updates) == 5


def hooked(answer: Any) -> AggregatorBridge:
    class Mine(Own):
        def on_before_aggregation(self, updates: Any) -> Any:
            return answer(updates)

    return own(Mine)


def fresh(state: Any) -> Any:
    return {name: value + 1 for name, value in state.items()}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda u: u[3:0:-1], [3, 2, 1]),
        (lambda u: (u[1:3], [0, 1, 2, 3, 4]), [1, 2]),
        (lambda u: [(w, fresh(s)) for w, s in u], [0, 1, 2, 3, 4]),
        (lambda u: ([(w, fresh(s)) for w, s in u[2:4]], [2, 3]), [2, 3]),
        (lambda u: [(w, {k: v.clone() for k, v in s.items()}) for w, s in u[3:]], [3, 4]),
        (lambda u: [(0 if n == 1 else w, s) for n, (w, s) in enumerate(u)], [0, 2, 3, 4]),
        (lambda u: ([], []), []),
    ],
    ids=["same objects", "wrong indices", "same place", "indices", "same values", "weight 0", "none"],
)
def test_which_update_is_which(answer: Any, expected: list[int]) -> None:
    kept, where = hooked(answer).before(some_updates())
    assert where == expected and len(kept) == len(expected)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda u: [(w, fresh(s)) for w, s in u[2:4]], "returned 2 of 5 updates and does not say which"),
        (lambda u: [u[0], u[0]], "returned 2 of 5"),
        (lambda u: ([(1.0, fresh(u[0][1]))], [8]), "returned 1 of 5"),
        (lambda u: [(w, {}) for w, _ in u], "dropped 0.weight"),
    ],
)
def test_answers_that_cannot_be_used(answer: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"GMR-106 .*{problem}"):
        hooked(answer).before(some_updates())


@pytest.mark.parametrize("kind", [k for k in DEFENCES if k != "crfl"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in scalar divide")  # of equal updates, in scipy
def test_every_accepted_defence_runs_and_says_which_updates_it_kept(kind: str) -> None:
    made = bridge(**defence(kind))
    made.check(min_updates=5)
    for _ in range(3):
        updates = some_updates(outlier=3)
        kept, where = made.before(updates, network().state_dict(), seed=1)
        assert len(kept) == len(where) == len(set(where)) > 0
        if kind in ("krum", "multikrum", "3sigma"):
            assert 3 not in where
        for (_, state), n in zip(kept, where, strict=True):
            assert {k: (v.dtype, v.shape) for k, v in state.items()} == {
                k: (v.dtype, v.shape) for k, v in updates[n][1].items()
            }
            if kind not in ("norm_diff_clipping",):
                torch.testing.assert_close(values(state), values(updates[n][1]))


def test_clipping_is_relative_to_the_servers_weights() -> None:
    server = OrderedDict(
        (k, v + 3 if v.is_floating_point() else v) for k, v in network().state_dict().items()
    )
    kept, _ = bridge(**defence("norm_diff_clipping")).before(some_updates(), server)
    names = [n for n, v in network().named_parameters()]
    for _, state in kept:
        distance = torch.cat([(state[n] - server[n]).flatten() for n in names]).norm()
        assert float(distance) == pytest.approx(0.5, rel=1e-5)


def test_an_attack_changes_updates_and_spares_the_random_state() -> None:
    made = bridge(enable_attack=True, attack_type="byzantine", byzantine_client_num=2, attack_mode="random")
    before = global_state()
    attacked = []
    for seed in (4, 4, 5):
        kept, where = made.before(some_updates(), seed=seed)
        assert where == [0, 1, 2, 3, 4]
        attacked.append(torch.stack([values(state) for _, state in kept]))
    assert global_state() == before
    assert torch.equal(attacked[0], attacked[1]) and not torch.equal(attacked[0], attacked[2])
    clean = torch.stack([values(state) for _, state in some_updates()])
    assert int((attacked[0] != clean).any(1).sum()) == 2


# -- after --------------------------------------------------------------------------------------------------


def test_after_keeps_names_order_and_types() -> None:
    state = some_updates()[0][1]
    result = own(After).after(state)
    assert list(result) == list(state)
    assert {k: (v.dtype, v.shape) for k, v in result.items()} == {
        k: (v.dtype, v.shape) for k, v in state.items()
    }
    floats = OrderedDict((k, v) for k, v in result.items() if v.is_floating_point())
    assert bool((values(floats) == 7).all())
    assert torch.equal(result["1.num_batches_tracked"], state["1.num_batches_tracked"])


def test_central_differential_privacy_adds_noise_from_the_seed() -> None:
    made = bridge(enable_dp=True, dp_solution_type="cdp", max_grad_norm=1.0, **PRIVACY)
    made.check(min_updates=1)
    state = some_updates()[0][1]
    before = global_state()
    first, again, other = (values(made.after(state, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and global_state() == before
    assert bool((first != values(state)).any())
    kept, _ = made.before(some_updates())
    assert all(float(values(s).norm()) < 1.01 for _, s in kept)


def test_crfl_clips_and_adds_noise_after_aggregation() -> None:
    made = bridge(**defence("crfl"))
    made.check(min_updates=1)
    result = made.after({k: 10 * v for k, v in network().state_dict().items()}, seed=0)
    assert float(torch.cat([result[n].flatten() for n, _ in network().named_parameters()]).norm()) < 1.2


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "clients", "needed"),
    [
        ("norm_diff_clipping", {}, 5, 1),
        ("crfl", {}, 5, 1),
        ("trimmed_mean", {}, 5, 3),
        ("3sigma", {}, 5, 3),
        ("krum", {"byzantine_client_num": 0}, 5, 3),
        ("krum", {}, 5, 5),
        ("multikrum", {"byzantine_client_num": 2, "krum_param_m": 2}, 9, 8),
        ("foolsgold", {}, 10, 10),
        ("3sigma_foolsgold", {}, 2, 3),
        ("anomaly_detection", {}, 4, 4),
    ],
)
def test_a_defence_needs_enough_updates(
    kind: str, changes: dict[str, Any], clients: int, needed: int
) -> None:
    made = bridge(**defence(kind, **changes), client_num_in_total=clients)
    made.check(needed)
    made.check(needed, clients)
    if needed > 1:
        with pytest.raises(HostError, match=f"GMR-503 defense_type={kind} needs {needed} updates"):
            made.check(needed - 1)


@pytest.mark.parametrize(
    ("kind", "clients", "taken"),
    [
        ("krum", 9, range(5, 10)),
        ("3sigma", 9, range(3, 10)),
        ("foolsgold", 4, [4]),
        ("crfl", 4, range(1, 10)),
    ],
)
def test_a_window_with_fewer_updates_than_a_defence_needs_is_refused(
    kind: str, clients: int, taken: Any
) -> None:
    """And one with two of a client, for a defence that knows clients by their places."""
    made = bridge(**defence(kind), client_num_in_total=clients)
    for updates in range(1, 10):
        with nullcontext() if updates in taken else pytest.raises(UpdateRejected, match="GMR-408"):
            made.require(updates)


@pytest.mark.parametrize("byzantine", [0, 1])
def test_krum_itself_agrees_with_the_number_needed(byzantine: int) -> None:
    made = bridge(**defence("krum", byzantine_client_num=byzantine))
    needed = 2 * byzantine + 3
    made.before(some_updates(needed))
    with pytest.raises(ValueError, match="byzantine_client_num"):
        made.before(some_updates(needed - 1))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("slsgd", {"trim_param_b": 1, "alpha": 0.5, "option_type": 2}),
        ("rfa", {}),
        ("geo_median", {"byzantine_client_num": 1, "client_num_per_round": 5, "batch_num": 1}),
        ("wise_median", {}),
        ("cclip", {"bucket_size": 1}),
        ("3sigma_geo", {}),
        ("weak_dp", {"stddev": 0.1}),
        ("robust_learning_rate", {"robust_threshold": 2}),
    ],
)
def test_defences_that_act_elsewhere_are_refused(kind: str, changes: dict[str, Any]) -> None:
    made = bridge(enable_defense=True, defense_type=kind, **changes)
    with pytest.raises(ConfigError, match=f"GMR-106 defense_type={kind} cannot be combined"):
        made.check(min_updates=5)


def test_privacy_solutions_without_effect_are_refused() -> None:
    made = bridge(enable_dp=True, dp_solution_type="nbafl", C=1.0, **PRIVACY)
    with pytest.raises(ConfigError, match="GMR-106 dp_solution_type=nbafl"):
        made.check(min_updates=5)


def test_encryption_is_refused() -> None:
    with pytest.raises(HostError, match="GMR-504"):
        bridge(enable_fhe=True).check(min_updates=5)


def test_nothing_to_refuse() -> None:
    bridge().check(min_updates=1)
    own(After).check(min_updates=1)


# -- test --------------------------------------------------------------------------------------------------


def some_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 3, generator=generator), torch.tensor([0, 1, 1])) for _ in range(2)]


def accuracy(model: nn.Module) -> float:
    x, y = (torch.cat(part) for part in zip(*some_batches(), strict=True))
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).double().mean())


def test_a_users_test_measures_the_given_model() -> None:
    model = network().train()
    with torch.no_grad():
        model[2].bias += torch.tensor([9.0, 0.0])
    metrics = own().test(model, iter(some_batches()))
    assert model.training
    assert metrics == Metrics(accuracy(model), 0.0, 6, {}) and metrics.accuracy == pytest.approx(1 / 3)


def test_fedmls_default_aggregator_reads_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = bridge(), network()
    monkeypatch.setattr(mlops.MLOpsStore, "mlops_args", made._args)  # as after fedml.init
    metrics = made.test(model, some_batches(), round_index=4)
    assert made._args.round_idx == 4
    assert metrics.accuracy == pytest.approx(accuracy(model)) and metrics.samples == 6
    assert metrics.loss is not None


def test_an_overridden_test_all_gets_fedmls_loaders() -> None:
    seen: list[Any] = []

    class Mine(Own):
        def test_all(self, train: Any, test: Any, device: Any, args: Any) -> bool:
            seen.append((train, test, str(device), args.comm_round))
            return True

        def test(self, test_data: Any, device: Any, args: Any) -> Any:
            return None

    args = arguments()
    made = AggregatorBridge(
        Mine(network(), args), network(), args, train_loaders={0: "train"}, test_loaders={0: "test"}
    )
    assert made.test(network(), some_batches()) == Metrics(None, None, 0, {})
    assert seen == [({0: "train"}, {0: "test"}, "cpu", 3)]
