"""FedGMR through FedML's own objects: arguments, data sets, trainers, aggregators, FedAvg among them."""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedgmr_plugin.cli.plan import table
from fedgmr_plugin.config import FedGMRConfig, parse
from fedgmr_plugin.engine.course import model_sha256
from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.errors import ConfigError, DataError, FedGMRError, HostError, ModelError
from fedgmr_plugin.kernels.layout import build_layout
from fedgmr_plugin.protocol.runlog import read_run
from fedgmr_plugin.runtimes import registration
from fedgmr_plugin.runtimes.command import Command
from fedgmr_plugin.runtimes.planning import plan_run
from fedgmr_plugin.runtimes.run import run_directory
from fedgmr_plugin.runtimes.settings import fedml_keys


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    registration.register()
    yield
    registration.unregister()


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))


def network_size() -> int:
    return sum(p.numel() for p in network().parameters())


def arguments(tmp_path: Path, options: dict[str, Any] | None = None, **keys: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "training_type": "simulation",
            "backend": "sp",
            "federated_optimizer": "fedgmr",
            "random_seed": 3,
            "dataset": "synthetic",
            "client_num_in_total": 4,
            "client_num_per_round": 4,
            "comm_round": 6,
            "epochs": 2,
            "batch_size": 5,
            "client_optimizer": "sgd",
            "learning_rate": 0.2,
            "weight_decay": 0.0,
            "frequency_of_the_test": 2,
            "using_gpu": False,
            "enable_wandb": False,
            "using_mlops": False,
            "rank": 0,
            "run_id": "0",
            "fedgmr_args": {
                "interval": 2,
                "output_dir": str(tmp_path / "runs"),
                "progress": False,
                **(options or {}),
            },
            **keys,
        }
    )


def batches(seed: int, count: int, size: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    y = (x[:, :3].argmax(dim=1)).long()
    return [(x[i : i + size], y[i : i + size]) for i in range(0, count, size)]


def dataset(sizes: tuple[int, ...] = (20, 25, 30, 15)) -> list[Any]:
    train = {n: batches(n, size) for n, size in enumerate(sizes)}
    test = {n: batches(100 + n, 10) for n in range(len(sizes))}
    counts = dict(enumerate(sizes))
    return [sum(sizes), 40, batches(200, 10), batches(201, 40), counts, train, test, 3]


def run(
    args: SimpleNamespace, data: list[Any] | None = None, model: nn.Module | None = None, **parts: Any
) -> Any:
    from fedml.simulation import SimulatorSingleProcess

    simulator = SimulatorSingleProcess(args, "cpu", data or dataset(), model or network(), **parts)
    simulator.run()
    return simulator.fl_trainer


# -- FedAvg ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["replacement", "delta"])
def test_with_every_density_1_and_sync_it_is_fedmls_fedavg(tmp_path: Path, form: str) -> None:
    """On the same batches (FedML walks a list of batches in order), to 1e-6."""
    import fedml
    from fedml.simulation.sp.fedavg import FedAvgAPI

    fedml.init(arguments(tmp_path), should_init_logs=False)
    theirs = network()
    simulator = FedAvgAPI(arguments(tmp_path), torch.device("cpu"), dataset(), theirs)
    # FedML's first round hands out the live model instead of a copy, so that its clients train one after
    # another on each other's result. Copies are what it means, and what it does from the second round on.
    live = simulator.model_trainer.get_model_params
    simulator.model_trainer.get_model_params = lambda: copy.deepcopy(live())
    simulator.train()

    options = {
        "heterogeneity": "none",
        "schedule": "sync",
        "trigger": "none",
        "validation_fraction": 0,
        "staleness": "constant",
        "local_steps": "epochs",
        "shuffle": False,
        "update_form": form,
    }
    ours = network()
    run(arguments(tmp_path, options), model=ours)
    assert distance(theirs, ours) < 1e-6 < 1e-2 < distance(theirs, network())


def distance(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of two models' parameters."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)


# -- determinism -------------------------------------------------------------------------------------------


def loaders(shuffle: bool = True) -> list[Any]:
    plain = dataset()

    def loader(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> DataLoader[Any]:
        x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
        return DataLoader(TensorDataset(x, y), batch_size=5, shuffle=shuffle)

    return [
        *plain[:2],
        loader(plain[2]),
        loader(plain[3]),
        plain[4],
        {n: loader(p) for n, p in plain[5].items()},
        {n: loader(p) for n, p in plain[6].items()},
        3,
    ]


def test_same_seed_same_model_whatever_the_global_generators_and_the_loader(tmp_path: Path) -> None:
    shas = set()
    for state, data in ((1, loaders()), (2, loaders()), (3, loaders(shuffle=False)), (4, dataset())):
        torch.manual_seed(state), np.random.seed(state), random.seed(state)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        shas.add(run(arguments(tmp_path), data).end["model_sha256"])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]
    assert len(shas) == 1
    assert run(arguments(tmp_path, random_seed=4)).end["model_sha256"] not in shas


def test_the_number_of_threads_belongs_to_the_run(tmp_path: Path) -> None:
    shas = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        shas.add(run(arguments(tmp_path)).end["model_sha256"])
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert len(shas) == 1


# -- what a run leaves behind ----------------------------------------------------------------------------


def test_files_of_a_run(tmp_path: Path) -> None:
    model = network()
    finished = run(arguments(tmp_path, {"trigger": "time", "probe": True}), model=model)
    assert finished.directory == tmp_path / "runs" / "run-001"
    assert run(arguments(tmp_path)).directory.name == "run-002"
    log = read_run(finished.directory)
    assert log.end is not None and log.end["windows"] == 6 and not log.torn
    assert log.count("window") == 6 and log.count("probe") == 3
    assert log.count("evaluation") == 4  # windows 0, 2, 4 as in FedML, and the last
    assert log.count("restoration") > 0
    saved = load_file(str(finished.directory / "model.safetensors"))
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    if log.end["shipped"] == "global" or min(finished.simulation.server.gmr.densities) == 1:
        assert model_sha256(build_layout(model).gather(model)) == log.end["model_sha256"]


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    run(arguments(tmp_path, {"run_name": "mine"}))
    with pytest.raises(ConfigError, match="GMR-110"):
        run(arguments(tmp_path, {"run_name": "mine"}))


def test_a_run_trains_once(tmp_path: Path) -> None:
    finished = run(arguments(tmp_path))
    before = (finished.directory / "run.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="GMR-110.*has a run already"):
        finished.train()
    assert (finished.directory / "run.jsonl").read_bytes() == before


def test_runs_that_begin_together_have_different_numbers(tmp_path: Path) -> None:
    config = parse({"output_dir": str(tmp_path / "runs")}, where="here")
    with ThreadPoolExecutor(16) as pool:
        names = list(pool.map(lambda _: run_directory(config).name, range(64)))
    assert sorted(names) == [f"run-{number:03d}" for number in range(1, 65)]


def test_a_place_for_runs_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match="GMR-110.*cannot be made: Not a directory"):
        run(arguments(tmp_path, {"output_dir": str(tmp_path / "taken" / "runs")}))


# -- every option runs ---------------------------------------------------------------------------------------


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(torch.relu(self.norm(self.hidden(x)))))


@pytest.mark.parametrize(
    "options",
    [
        {"score": "weight_change"},
        {"score": "per_cost"},
        {"score": "random", "prune_biases": False, "layer_floor": 0},
        {"trigger": "gradient"},
        {"trigger": "mixed", "patience": 1, "density_step": "proportional"},
        {"trigger": "plateau", "patience": 1, "trigger_metric": "loss", "density_step": "fixed"},
        {"trigger": "none", "validation_fraction": 0, "evaluate": "global"},
        {"evaluate": "validation", "update_scope": "buffer", "mixing": True},
        {"update_form": "replacement", "aggregation": "plain_average"},
        {"update_form": "replacement", "aggregation": "global_average", "update_scope": "buffer"},
        {"aggregation": "global_average", "server_step": 0.5, "staleness": "hinge"},
        {"loss": "bce", "client_momentum": 0.9, "gradient_clip": 1.0, "warmup_windows": 3},
        {"dense_start": True, "schedule": "sync", "trigger": "none"},
        {"payload_rule": "encoded"},
        {"payload_rule": "support", "incremental_splitting": False, "min_updates": 3},
        {"compute_slowdown": [1, 2, 3, 4], "compute_density_exponent": 1.0, "time_budget": 5.0},
        {"local_steps": "epochs", "cpu_threads": 0},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_every_option_runs_and_learns_something(tmp_path: Path, options: dict[str, Any]) -> None:
    model = WithBatchNorm()
    before = copy.deepcopy(model.state_dict())
    end = run(arguments(tmp_path, options, client_optimizer="sgd", weight_decay=1e-4), model=model).end
    assert end["windows"] >= 1 and end["rejected"] == 0
    state = model.state_dict()
    assert all(bool(torch.isfinite(v).all()) for v in state.values())
    assert not torch.equal(state["hidden.weight"], before["hidden.weight"])
    assert int(state["norm.num_batches_tracked"]) == 0  # integer buffers are never averaged


@pytest.mark.parametrize("options", [{}, {"probe": True, "probe_interval": 2}], ids=["plain", "probed"])
def test_worker_processes_change_no_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    """Dropout and batch normalisation included; the logs are equal but for the number itself.

    Steps that the probe watches are made in the main process.
    """
    logs = []
    for workers in (1, 2, 3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = WithBatchNorm()
        finished = run(arguments(tmp_path, {"workers": workers, **options}), model=model)
        records = [json.loads(line) for line in (finished.directory / "run.jsonl").read_text().splitlines()]
        assert records[0]["config"]["workers"] == workers
        logs.append([{k: v for k, v in r.items() if k != "wall_seconds"} for r in records[1:]])
    assert logs[0] == logs[1] == logs[2]
    assert bool(options) == any(r["type"] == "terms" for r in logs[0])
    assert not multiprocessing.active_children()


def test_workers_are_refused_where_they_cannot_stand_in(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GMR-106 workers=2: each trains on one thread, but cpu_threads=2"):
        run(arguments(tmp_path, {"workers": 2, "cpu_threads": 2}))


def test_clients_trained_together_make_the_same_run_up_to_rounding(tmp_path: Path) -> None:
    """Groups of three and what is left of a window; a repetition has the same bits."""
    logs, models = [], []
    for most in (1, 3, 3, 8):
        finished = run(arguments(tmp_path, {"batch_clients": most}), model=network())
        log = read_run(finished.directory)
        logs.append([(r["client"], r["density"], r["time"]) for r in log.records("dispatch")])
        models.append(load_file(str(finished.directory / "model.safetensors")))
    assert logs[0] == logs[1] == logs[2] == logs[3]
    for name, one_after_another in models[0].items():
        assert torch.equal(models[1][name], models[2][name])
        for other in models[1], models[3]:
            torch.testing.assert_close(other[name], one_after_another, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 2},
        {"label_masks": True},
        {"probe": True, "probe_interval": 2},
        {"local_objective": "straight_through"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_clients_are_not_trained_together_where_somebody_looks_at_one(
    options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"GMR-106 batch_clients=2 .* {next(iter(options))}"):
        run(arguments(tmp_path, {"batch_clients": 2, **options}))
    assert not (tmp_path / "runs").exists()


def test_a_run_s_name_does_not_change_it(tmp_path: Path) -> None:
    """Not even where the bytes of messages make the clock."""
    ends = []
    for name in ("a", "x" * 120):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = WithBatchNorm()
        options = {"run_name": name, "payload_rule": "encoded", "client_upload": 0.01, "server_upload": 0.02}
        ends.append(run(arguments(tmp_path, options), model=model).end)
    assert [ends[0][k] for k in ("model_sha256", "time")] == [ends[1][k] for k in ("model_sha256", "time")]


def test_fewer_clients_in_flight_than_clients(tmp_path: Path) -> None:
    finished = run(arguments(tmp_path, client_num_per_round=2, comm_round=12))
    log = read_run(finished.directory)
    assert max(log.column("window", "in_flight")) <= 2
    assert set(log.column("dispatch", "client").tolist()) == {0, 1, 2, 3}


def test_bandwidth_traces(tmp_path: Path) -> None:
    path = tmp_path / "traces.npz"
    np.savez(
        path,
        time_s=np.array([0.0, 1, 2, 0, 2, 5]),
        mbit_s=np.array([1.0, 0, 3, 2, 2, 8]),
        offset=np.array([0, 3, 6]),
        family=np.array(["a", "b"]),
    )
    plain = run(arguments(tmp_path)).end["time"]
    traced = run(arguments(tmp_path, {"bandwidth_traces": str(path), "model_megabytes": 26.0})).end["time"]
    assert traced > plain
    assert run(arguments(tmp_path, {"bandwidth_traces": str(path), "trace_family": "b"})).end["windows"] == 6


# -- a user's own parts ------------------------------------------------------------------------------------


def test_a_users_trainer_and_aggregator_are_honoured(tmp_path: Path) -> None:
    from fedml.core import ClientTrainer, ServerAggregator

    calls: list[str] = []

    class Trainer(ClientTrainer):  # type: ignore[misc]
        def get_model_params(self) -> Any:
            return self.model.state_dict()

        def set_model_params(self, model_parameters: Any) -> None:
            self.model.load_state_dict(model_parameters)

        def train(self, train_data: Any, device: Any, args: Any) -> None:
            calls.append("train")
            optimizer = torch.optim.SGD(
                self.model.parameters(), lr=args.learning_rate, momentum=0.9, weight_decay=0.01
            )
            for _ in range(args.epochs):
                for x, y in train_data:
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(self.model(x), y).backward()
                    optimizer.step()

        def test(self, test_data: Any, device: Any, args: Any) -> dict[str, float]:
            calls.append("trainer.test")
            pairs = [(self.model(x).argmax(1) == y, y) for x, y in test_data]
            return {
                "test_correct": float(sum(int(hit.sum()) for hit, _ in pairs)),
                "test_total": float(sum(len(y) for _, y in pairs)),
                "test_loss": 1.0,
            }

    class Aggregator(ServerAggregator):  # type: ignore[misc]
        def get_model_params(self) -> Any:
            return self.model.state_dict()

        def set_model_params(self, model_parameters: Any) -> None:
            self.model.load_state_dict(model_parameters)

        def on_before_aggregation(self, raw_client_model_or_grad_list: Any) -> Any:
            calls.append(f"before {len(raw_client_model_or_grad_list)}")
            return raw_client_model_or_grad_list[1:], list(range(1, len(raw_client_model_or_grad_list)))

        def on_after_aggregation(self, aggregated_model_or_grad: Any) -> Any:
            calls.append("after")
            aggregated_model_or_grad["4.bias"] = torch.full_like(aggregated_model_or_grad["4.bias"], 0.5)
            return aggregated_model_or_grad

        def test(self, test_data: Any, device: Any, args: Any) -> tuple[float, float, None, None]:
            calls.append(f"test {args.round_idx}")
            return 0.25, 2.0, None, None

    args = arguments(tmp_path)
    model = network()
    plain = run(arguments(tmp_path))
    assert plain.header["fedml"]["aggregation_hooks"] is False
    assert "aggregation_hooks" not in (plain.directory / "config.yaml").read_text()
    finished = run(
        args,
        model=model,
        client_trainer=Trainer(model, args),
        server_aggregator=Aggregator(copy.deepcopy(model), args),
    )
    assert finished.header["fedml"]["aggregation_hooks"] is True
    assert finished.header["local_steps"] is None and plain.header["local_steps"] == 5
    assert {"train", "trainer.test", "before 4", "after", "test 0", "test 5"} <= set(calls)
    assert torch.equal(model[4].bias, torch.full((3,), 0.5))
    log = read_run(finished.directory)
    assert set(log.column("evaluation", "accuracy").tolist()) == {0.25}
    assert set(log.column("arrival", "steps").tolist()) == {5}
    small = log.column("arrival", "density") < 1
    assert small.any() and (log.column("arrival", "change_sq")[small] > 0).all()


def test_hooks_may_return_parameters_that_have_gradients(tmp_path: Path) -> None:
    from fedml.core import ServerAggregator

    class Aggregator(ServerAggregator):  # type: ignore[misc]  # FedML is untyped
        def get_model_params(self) -> Any:
            return self.model.state_dict()

        def set_model_params(self, model_parameters: Any) -> None:
            self.model.load_state_dict(model_parameters)

        def on_before_aggregation(self, raw_client_model_or_grad_list: Any) -> Any:
            return [(n, parameters(state)) for n, state in raw_client_model_or_grad_list]

        def on_after_aggregation(self, aggregated_model_or_grad: Any) -> Any:
            return parameters(aggregated_model_or_grad)

        def test(self, test_data: Any, device: Any, args: Any) -> None:
            return None

    def parameters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: nn.Parameter(value) * 1 for name, value in state.items()}

    args, plain, hooked = arguments(tmp_path), network(), network()
    run(arguments(tmp_path), model=plain)
    run(args, model=hooked, server_aggregator=Aggregator(copy.deepcopy(hooked), args))
    for one, other in zip(plain.parameters(), hooked.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"trigger": "none"}, "mean density: 0.40 at the start, 0.40 at the end\n"),
        (
            {"patience": 1, "density_step": "fixed", "plateau_delta": 2.0},
            "0.40 at the start, 0.47 at the end\n",
        ),
        (
            {"patience": 5},
            "; nobody was restored in 2 looks for a plateau (interval: 2 windows), which 6 looks "
            "at least are needed for (patience: 5)\n",
        ),
        ({"trigger": "gradient"}, "0.40 at the end; trigger: gradient restored nobody\n"),
        ({"dense_start": True}, None),
        ({"method": "fedavg"}, None),
    ],
)
def test_the_terminal_says_what_became_of_the_densities(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: dict[str, Any], told: str | None
) -> None:
    run(arguments(tmp_path, {**options, "progress": True}))
    output = capfd.readouterr().out
    assert (told in output) if told else ("mean density" not in output)


def silent_trainer(model: nn.Module, args: Any, answer: dict[str, float]) -> Any:
    """A trainer whose `test` returns `answer`, and that trains nothing."""
    from fedml.core import ClientTrainer

    class Trainer(ClientTrainer):  # type: ignore[misc]
        def get_model_params(self) -> Any:
            return self.model.state_dict()

        def set_model_params(self, model_parameters: Any) -> None:
            self.model.load_state_dict(model_parameters)

        def train(self, train_data: Any, device: Any, args: Any) -> None:
            pass

        def test(self, test_data: Any, device: Any, args: Any) -> dict[str, float]:
            return answer

    return Trainer(model, args)


@pytest.mark.parametrize(
    ("metric", "answer"),
    [
        ("loss", {"test_correct": 1.0, "test_total": 2.0}),
        ("loss", {"test_correct": 1.0, "test_total": 2.0, "test_loss": float("nan")}),
        ("accuracy", {"test_total": 2.0, "test_loss": 1.0}),
    ],
)
def test_a_plateau_of_a_metric_that_the_trainer_does_not_give_is_refused_at_the_first_look(
    tmp_path: Path, metric: str, answer: dict[str, float]
) -> None:
    """And nowhere where it would not be looked for: such a run would restore nobody, without a word."""
    for changes, is_watched in (
        ({"trigger": "plateau"}, True),
        ({"trigger": "mixed", "time_budget": 30.0}, True),
        ({"trigger": "none"}, False),
        ({"trigger": "time", "time_budget": 30.0}, False),
        ({"trigger": "plateau", "dense_start": True}, False),
    ):
        args = arguments(tmp_path, {"trigger_metric": metric, **changes})
        model = network()
        parts = {"model": model, "client_trainer": silent_trainer(model, args, answer)}
        if is_watched:
            with pytest.raises(DataError, match=f"GMR-305 trigger_metric={metric}"):
                run(args, **parts)
        else:
            assert run(args, **parts).end["windows"] >= 1


def test_nan_from_a_client_is_rejected_counted_and_harmless(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = dataset()
    data[5][2] = [(x * float("nan"), y) for x, y in data[5][2]]
    finished = run(arguments(tmp_path, {"trigger": "none", "progress": True}), data)
    told = capfd.readouterr()
    assert told.err.count("an upload of client 2 is refused: GMR-403 ") == 1
    assert f"{finished.end['rejected']} uploads were refused" in told.out
    log = read_run(finished.directory)
    assert finished.end["rejected"] == log.count("rejected") > 0
    assert {(r["client"], r["code"]) for r in log.records("rejected")} == {(2, "GMR-403")}
    assert 2 not in log.column("arrival", "client").tolist()
    assert bool(torch.isfinite(finished.simulation.server.w_D).all())


# -- bad input ---------------------------------------------------------------------------------------------


def empty_client() -> list[Any]:
    data = dataset()
    data[5][1] = []
    return data


def tiny_convolution() -> nn.Module:
    """Four weights and a bias, of which density .05 leaves none."""
    return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 1, 4), nn.Flatten())


def zero_samples() -> list[Any]:
    data = dataset()
    data[4][3] = 0
    return data


@pytest.mark.parametrize(
    ("code", "kind", "change"),
    [
        ("GMR-301", DataError, {"data": empty_client()}),
        ("GMR-301", DataError, {"data": zero_samples()}),
        ("GMR-302", DataError, {"data": dataset()[:7]}),
        ("GMR-302", DataError, {"keys": {"client_num_in_total": 5, "client_num_per_round": 5}}),
        ("GMR-201", ModelError, {"model": nn.Sequential(nn.Linear(6, 3))}),
        ("GMR-202", ModelError, {"model": network().half()}),
        ("GMR-214", ModelError, {"model": tiny_convolution()}),
        (
            "GMR-503",
            HostError,
            {"keys": {"enable_defense": True, "defense_type": "krum", "byzantine_client_num": 1}},
        ),
        (
            "GMR-503",
            HostError,
            {
                "keys": {
                    "enable_defense": True,
                    "defense_type": "3sigma",
                    "client_num_per_round": 2,
                },
                "options": {"min_updates": 3},
            },
        ),
        ("GMR-504", HostError, {"keys": {"enable_fhe": True}}),
        ("GMR-106", ConfigError, {"keys": {"enable_dp": True, "dp_solution_type": "ldp"}}),
        ("GMR-106", ConfigError, {"keys": {"enable_attack": True, "attack_type": "label_flipping"}}),
        ("GMR-103", ConfigError, {"keys": {"client_optimizer": "lion"}}),
        ("GMR-102", ConfigError, {"keys": {"learning_rate": "1e-3"}}),
        ("GMR-104", ConfigError, {"keys": {"learning_rate": 0.0}}),
        ("GMR-104", ConfigError, {"keys": {"client_num_per_round": 9}}),
        ("GMR-107", ConfigError, {"keys": {"comm_round": None, "batch_size": None}}),
        ("GMR-109", ConfigError, {"options": {"densities": [1.0, 0.5]}}),
        ("GMR-109", ConfigError, {"options": {"compute_slowdown": [1.0]}}),
        ("GMR-101", ConfigError, {"options": {"pacience": 3}}),
        ("GMR-104", ConfigError, {"options": {"density_min": 1.3}}),
        ("GMR-105", ConfigError, {"options": {"density_ladder": [0.5, 0.2, 1.0]}}),
        ("GMR-303", DataError, {"options": {"bandwidth_traces": "no/such.npz"}}),
    ],
)
def test_bad_input_is_refused_before_training(
    tmp_path: Path, code: str, kind: type[FedGMRError], change: dict[str, Any]
) -> None:
    args = arguments(tmp_path, change.get("options"), **change.get("keys", {}))
    with pytest.raises(kind, match=code):
        security_of(args)
        try:
            run(args, change.get("data"), change.get("model"))
        finally:
            security_of(arguments(tmp_path))
    assert not (tmp_path / "runs").exists()


def security_of(args: Any) -> None:
    """FedML's security singletons belong to the process: set them from `args`."""
    from fedml.core.fhe.fhe_agg import FedMLFHE
    from fedml.core.security.fedml_defender import FedMLDefender

    FedMLDefender.get_instance().is_enabled = False
    FedMLFHE.get_instance().is_enabled = False
    if getattr(args, "enable_defense", False):
        FedMLDefender.get_instance().init(args)


def test_a_label_among_all_scores_is_no_finding(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GMR-106 top_k=3 finds every label right: .* class_num=3"):
        run(arguments(tmp_path, {"top_k": 3}))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("raised", "said"), [(ValueError(), "failed; to continue when"), (KeyboardInterrupt(), "interrupted; to")]
)
def test_how_to_go_on_is_said_with_what_ended_a_run(
    raised: BaseException,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*given: Any, **named: Any) -> Any:
        raise raised

    monkeypatch.setattr(BuiltinTrainer, "train", fail)
    monkeypatch.setattr("fedgmr_plugin.runtimes.run.next_run", lambda: Command("main.py", [], ".", 1))
    with pytest.raises(type(raised)):
        run(arguments(tmp_path, {}))
    assert said in capsys.readouterr().err


def test_probe_needs_the_built_in_trainer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GMR-106"):
        run(arguments(tmp_path, {"probe": True}), client_trainer=object())


# -- planning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("download", ["full", "decoupled"])
def test_the_plan_knows_decoupled_traffic(tmp_path: Path, download: str) -> None:
    """Restored flights are shorter, as long as the run's own, and move the bytes that it says."""
    options = {
        **{"client_jitter": 0, "server_jitter": 0, "model_megabytes": 37.2, "upload": "decoupled"},
        **{"download": download},
        **{"trigger": "time", "interval": 1, "time_fractions": [0.1], "time_floors": [1.0]},
    }
    args = arguments(tmp_path, options, comm_round=40)
    finished = run(args)
    plan = plan_run(finished.simulation.config, fedml_keys(args), network())
    usual = finished.simulation.config.model_copy(update={"upload": "full", "download": "full"})
    slow = plan_run(usual, fedml_keys(args), network()).classes[-1].seconds[1.0]
    last = plan.classes[-1]
    planned = last.seconds[1.0]
    assert planned is not None and slow is not None and planned < slow / 1.5
    log = read_run(finished.directory)
    began = {r["dispatch"]: r["time"] for r in log.records("dispatch")}
    flown = [r for r in log.records("arrival") if r["client"] == last.clients[0] and r["density"] == 1.0]
    assert [r["time"] - began[r["dispatch"]] for r in flown[:2]] == pytest.approx([planned] * 2, rel=0.2)
    assert all(r["bytes_up"] < 37.2e6 / 2 for r in flown)


def test_a_plan_refuses_what_a_run_does(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    with pytest.raises(ModelError, match="GMR-214 density=0.05 of 5 coordinates holds none"):
        plan_run(FedGMRConfig(), fedml_keys(args), tiny_convolution())


def test_the_plan_agrees_with_the_run(tmp_path: Path) -> None:
    options = {"client_jitter": 0, "server_jitter": 0, "model_megabytes": 37.2, "trigger": "none"}
    args = arguments(tmp_path, options)
    finished = run(args)
    log = read_run(finished.directory)
    plan = plan_run(finished.simulation.config, fedml_keys(args), network())
    assert plan.window_seconds == pytest.approx(12.66, abs=1e-9)
    assert log.column("window", "end")[0] == pytest.approx(plan.window_seconds, abs=1e-9)
    assert set(log.column("arrival", "client").tolist()) == {0, 1, 2, 3}
    sizes = {s.density: s.coordinates for s in plan.sub_models}
    for record in log.records("dispatch")[:4]:
        assert record["support"] == sizes[record["density"]]
        assert record["bytes_down"] == pytest.approx(37.2e6 * record["density"])


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({"trigger": "plateau", "patience": 2, "plateau_delta": 9.0}, 9),
        ({"trigger": "plateau", "patience": 2, "plateau_delta": 9.0}, 6),
        ({"trigger": "time", "time_fractions": [0.3], "time_floors": [1.0], "time_budget": 100.0}, 99),
        ({"trigger": "mixed", "patience": 2, "plateau_delta": 9.0, "time_budget": 300.0}, 9),
        ({"trigger": "mixed", "patience": 9, "plateau_delta": 9.0, "time_budget": 60.0}, 99),
        ({"trigger": "none"}, 9),
        ({"trigger": "plateau", "dense_start": True}, 9),
    ],
)
def test_the_plan_knows_when_the_first_density_can_rise(
    tmp_path: Path, options: dict[str, Any], windows: int
) -> None:
    """At a metric that never improves, that is when it does."""
    network_of = {"client_jitter": 0, "server_jitter": 0, "model_megabytes": 37.2}
    args = arguments(tmp_path, {**network_of, **options}, comm_round=windows)
    finished = run(args)
    plan = plan_run(finished.simulation.config, fedml_keys(args), network())
    found = read_run(finished.directory).column("restoration", "window").tolist()
    assert plan.windows == finished.end["windows"]
    if found:
        assert plan.first_restoration == found[0] < plan.windows
    else:
        assert plan.first_restoration is None or plan.first_restoration >= plan.windows
    said = table(plan)
    assert f"about {plan.windows} windows; no density is " in said
    assert ("ever raised" in said) == (plan.first_restoration is None)
    assert ("hence in this run none" in said) == (not found and plan.first_restoration is not None)


@pytest.mark.parametrize(
    "options",
    [
        {"heterogeneity": "none", "server_download": 4.0, "model_megabytes": 26.0},
        {"heterogeneity": "none", "incremental_splitting": False, "model_megabytes": 26.0},
        {"densities": [1.0, 0.5, 0.5, 0.2], "server_download": 3.0, "payload_rule": "support"},
        {"densities": [1.0, 0.5, 0.2, 0.1], "density_min": 0.3, "incremental_splitting": False},
        {"densities": [1.0, 0.5, 0.2, 0.1], "dense_start": True, "schedule": "sync", "client_upload": 0.01},
        {"payload_rule": "encoded", "client_upload": 0.001, "client_download": 0.001},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("in_flight", [4, 2])
def test_the_plan_knows_what_clients_share_and_what_messages_weigh(
    tmp_path: Path, options: dict[str, Any], in_flight: int
) -> None:
    """Flights and windows of a run with frozen densities, to the last byte of the first interval."""
    still = {"client_jitter": 0, "server_jitter": 0, "trigger": "none", "interval": 40}
    args = arguments(tmp_path, {**still, **options}, comm_round=40, client_num_per_round=in_flight)
    finished = run(args)
    log = read_run(finished.directory)
    plan = plan_run(finished.simulation.config, fedml_keys(args), network())
    assert plan.window_seconds == pytest.approx(log.column("window", "end")[-1] / 40, rel=1e-12)
    assert plan.mean_density == pytest.approx(log.column("window", "mean_density")[0])

    sent = {r["dispatch"]: r["time"] for r in log.records("dispatch")}
    took: dict[int, list[float]] = {}
    for r in log.records("arrival"):
        took.setdefault(r["client"], []).append(r["time"] - sent[r["dispatch"]])
    for group in plan.classes:
        density, seconds = next(iter(group.seconds.items()))
        assert seconds == pytest.approx(max(np.mean(took[n]) for n in group.clients if n in took), rel=1e-9)
        assert group.windows[density] == pytest.approx(seconds / plan.window_seconds)
    down = {s.density: s.megabytes_down for s in plan.sub_models}
    first = log.records("dispatch")[0]
    assert first["bytes_down"] / 1e6 == pytest.approx(down[first["density"]], rel=1e-12)


@pytest.mark.parametrize("rule", ["density", "support", "encoded"])
def test_half_the_bytes_in_half_the_type(tmp_path: Path, rule: str) -> None:
    still = {"payload_rule": rule, "client_jitter": 0, "server_jitter": 0, "trigger": "none"}
    sent = {}
    for kind in ("model", "float16"):
        args = arguments(tmp_path, {**still, "payload_dtype": kind})
        finished = run(args)
        log = read_run(finished.directory)
        assert log.header["config"]["payload_dtype"] == kind
        sent[kind] = log.column("dispatch", "bytes_down")[0]
        plan = plan_run(finished.simulation.config, fedml_keys(args), network())
        assert max(s.megabytes_down for s in plan.sub_models) == pytest.approx(sent[kind] / 1e6, rel=1e-12)
    values = network_size() * 4 if rule == "encoded" else sent["model"]
    assert sent["model"] - sent["float16"] == pytest.approx(values / 2, abs=16)


def test_probe_refuses_a_narrow_payload(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GMR-106 probe=true"):
        run(arguments(tmp_path, {"probe": True, "payload_dtype": "bfloat16"}))


def test_a_plan_gives_up_on_clients_that_never_land(tmp_path: Path) -> None:
    options = {"densities": [1.0, 1.0, 1.0, 0.001], "trigger": "none", "compute_slowdown": [1, 1, 1, 1e6]}
    args = arguments(tmp_path, options)
    plan = plan_run(parse(options, where="here"), fedml_keys(args), network())
    assert plan.classes[-1].seconds[0.02] is None and plan.classes[-1].windows[0.02] is None
    assert plan.classes[0].seconds[1.0] is not None
    assert "1 of class 0.001 at 0.02" in table(plan) and "not heard of" in table(plan)


def test_the_table_of_a_plan_stays_narrow(tmp_path: Path) -> None:
    """Forty densities of their own make forty rows, not forty columns."""
    densities = [round(0.02 * (n + 1), 2) for n in range(40)]
    args = arguments(tmp_path, client_num_in_total=40, client_num_per_round=40)
    plan = plan_run(parse({"densities": densities}, where="here"), fedml_keys(args), network())
    lines = table(plan).splitlines()
    assert max(map(len, lines)) <= 22 + 6 * 18
    assert sum(line.startswith("1 of class") for line in lines) == 40


def test_a_plan_flies_over_measured_links(tmp_path: Path) -> None:
    """Traces are no jitter: a rehearsal uses those of the run, and refuses a file that is none."""
    path = tmp_path / "traces.npz"
    mbit = np.tile(np.array([8.0, 2.0, 5.0, 1.0]), 50)
    np.savez(path, time_s=np.arange(200.0), mbit_s=mbit, offset=np.array([0, 200]), family=np.array(["x"]))
    options = {
        **{"client_jitter": 0, "server_jitter": 0, "trigger": "none", "interval": 30},
        **{"bandwidth_traces": str(path), "model_megabytes": 30.0},
    }
    args = arguments(tmp_path, options, comm_round=30)
    finished = run(args)
    plan = plan_run(finished.simulation.config, fedml_keys(args), network())
    ends = read_run(finished.directory).column("window", "end")
    assert plan.window_seconds == pytest.approx(ends[-1] / 30, rel=1e-12)
    still = plan_run(parse({"model_megabytes": 30.0}, where="here"), fedml_keys(args), network())
    assert plan.window_seconds != pytest.approx(still.window_seconds, rel=1e-3)
    broken = parse({"bandwidth_traces": str(tmp_path / "none.npz")}, where="here")
    with pytest.raises(DataError, match="GMR-303"):
        plan_run(broken, fedml_keys(args), network())
