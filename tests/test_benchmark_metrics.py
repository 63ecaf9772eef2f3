"""Top-k accuracy: by hand, and in a run's log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import models
from benchmarks.data import dataset, stackoverflow
from benchmarks.metrics import measure, top_k_aggregator
from fedgmr_plugin.engine.client import BuiltinTrainer
from fedgmr_plugin.protocol.runlog import read_run
from fedgmr_plugin.runtimes import registration
from fedgmr_plugin.runtimes.launch import KEYS


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    registration.register()
    yield
    registration.unregister()


def test_top_k_by_hand() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [9.0, 0.0, 0.0, 0.5]])
    found = measure(nn.Identity(), [(scores, torch.tensor([0, 2, 1]))], 2)
    assert found["test_acc"] == pytest.approx(1 / 3) and found["top2"] == pytest.approx(2 / 3)
    losses = -scores.log_softmax(1)[[0, 1, 2], [0, 2, 1]]
    assert found["test_loss"] == pytest.approx(float(losses.mean()))


def test_filling_does_not_count() -> None:
    scores = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[0, 1, 2], [3, 4, -100], [5, -100, -100], [6, 0, 1], [2, 3, 4]])
    known = y >= 0
    padded = measure(nn.Identity(), [(scores[:2], y[:2]), (scores[2:], y[2:])], 3)
    flat = measure(nn.Identity(), [(scores.movedim(1, -1)[known], y[known])], 3)
    assert padded == pytest.approx(flat)


def test_top_1_is_the_built_in_accuracy() -> None:
    model = models.build("char_transformer", 12, 0)
    draw = torch.Generator().manual_seed(0)
    batches = [(torch.randint(12, (4, 9), generator=draw), torch.randint(12, (4, 9), generator=draw))]
    ours, built_in = measure(model, batches, 1), BuiltinTrainer().evaluate(model, batches)
    assert ours["test_acc"] == ours["top1"] == pytest.approx(built_in.accuracy)
    assert ours["test_loss"] == pytest.approx(built_in.loss)
    assert measure(model, batches, 12)["top12"] == 1.0


@pytest.mark.usefixtures("registered")
def test_a_run_logs_top_5(tmp_path: Path) -> None:
    import fedml

    users = {
        f"user{n}": [[(n + i + w) % 12 + 1 for w in range(3 + i % 4)] for i in range(8)] for n in range(4)
    }
    stackoverflow.write(tmp_path, 12, users, users)
    section = {"name": "stackoverflow", "folder": str(tmp_path), "split": "users", "length": 6}
    data: list[Any] = dataset(section, 4, 4, 0)
    model = models.build("char_transformer", data[-1], 0)
    options = {"output_dir": str(tmp_path), "run_name": "run", "progress": False, "validation_fraction": 0.0}
    options |= {"trigger": "none"}
    keys = {"client_num_in_total": 4, "client_num_per_round": 4, "comm_round": 2, "frequency_of_the_test": 1}
    args = SimpleNamespace(**{**KEYS, **keys, "random_seed": 0, "fedgmr_args": options})
    args = fedml.init(args, should_init_logs=False)
    aggregator = top_k_aggregator(model, args)
    fedml.FedMLRunner(args, torch.device("cpu"), data, model, server_aggregator=aggregator).run()
    log = read_run(tmp_path / "run")
    for record in log.records("evaluation"):
        top5 = record["metrics"]["top5"]
        assert record["accuracy"] <= top5 <= 1 and record["samples"] == 32
    shipped = measure(model, data[3], 5)
    assert top5 == pytest.approx(shipped["top5"]) and record["loss"] == pytest.approx(shipped["test_loss"])
