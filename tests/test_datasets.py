"""The digits data set of the demonstration, and partitions over clients."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedgmr_plugin.datasets import (
    DigitsCNN,
    DigitsMLP,
    digits,
    dirichlet_partition,
    fedml_dataset,
    iid_partition,
)
from fedgmr_plugin.errors import ConfigError, DataError, HostError
from fedgmr_plugin.kernels.layout import build_layout
from fedgmr_plugin.runtimes.data import read_dataset


def assert_partition(parts: list[np.ndarray], n: int) -> None:
    """Each index of 0..n-1 exactly once, in increasing order within a client."""
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=120),
    clients=st.integers(1, 12),
    alpha=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31),
    min_samples=st.integers(0, 12),
    data=st.data(),
)
def test_dirichlet_partition_is_a_partition(
    labels: list[int], clients: int, alpha: float, seed: int, min_samples: int, data: Any
) -> None:
    smallest = data.draw(st.one_of(st.none(), st.integers(0, clients - 1)))
    values = np.array(labels)

    def cut() -> list[np.ndarray]:
        return dirichlet_partition(values, clients, alpha, seed, min_samples, smallest=smallest)

    if len(labels) < clients * min_samples:
        with pytest.raises(DataError, match=f"GMR-301 {len(labels)} samples cannot give {clients} clients"):
            cut()
        return
    parts = cut()
    assert len(parts) == clients
    assert_partition(parts, len(labels))
    sizes = [len(part) for part in parts]
    assert min(sizes) >= min_samples
    if smallest is not None:
        assert sizes[smallest] == min(sizes)
    assert all(np.array_equal(a, b) for a, b in zip(parts, cut(), strict=True))


def test_dirichlet_partition_follows_seed_and_alpha() -> None:
    labels = np.repeat(np.arange(10), 200)

    def skew(alpha: float, seed: int) -> float:
        """Mean over clients of the largest class's share."""
        parts = dirichlet_partition(labels, 10, alpha, seed, 10)
        return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))

    assert skew(0.05, 0) > 0.6 > 0.35 > skew(1.0, 0) > 0.15 > skew(1000.0, 0)
    first, second = (dirichlet_partition(labels, 10, 0.6, seed) for seed in (1, 2))
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_dirichlet_shares_have_the_distributions_moments() -> None:
    """Shares of one class: mean 1/N and variance (N - 1) / (N^2 (N alpha + 1))."""
    labels, n, alpha = np.zeros(2000, dtype=int), 4, 0.6
    shares = np.array(
        [[len(p) / 2000 for p in dirichlet_partition(labels, n, alpha, seed, 0)] for seed in range(400)]
    )
    expected = (n - 1) / (n**2 * (n * alpha + 1))
    assert shares.mean(0) == pytest.approx(np.full(n, 1 / n), abs=4 * np.sqrt(expected / 400))
    assert shares.var(0).mean() == pytest.approx(expected, rel=0.1)


@given(n=st.integers(1, 200), clients=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_iid_partition(n: int, clients: int, seed: int) -> None:
    if n < clients:
        with pytest.raises(DataError, match="GMR-301"):
            iid_partition(n, clients, seed)
        return
    parts = iid_partition(n, clients, seed)
    assert_partition(parts, n)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"clients": 0}, "clients=0 is below 1"),
        ({"alpha": 0.0}, "alpha=0.0 is not above 0"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"smallest": 2}, "smallest=2 is not one of 2 clients"),
        ({"smallest": -1}, "smallest=-1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], problem: str) -> None:
    values: dict[str, Any] = {"clients": 2, "alpha": 1.0, "seed": 0, **arguments}
    with pytest.raises(ConfigError, match=f"GMR-104 {problem}"):
        dirichlet_partition(np.zeros(10), **values)


# -- digits -------------------------------------------------------------------------------------------------


def test_digits_are_complete_stratified_and_scaled() -> None:
    train_num, test_num, train, test, counts, loaders, tests, classes = digits()
    assert train_num + test_num == 1797 and train_num == sum(counts.values()) and classes == 10
    x, y = train.dataset.tensors
    test_x, test_y = test.dataset.tensors
    assert x.shape == (train_num, 1, 8, 8) and test_x.shape == (test_num, 1, 8, 8)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert float(x.min()) == 0.0 and float(x.max()) == 1.0
    shares = torch.bincount(test_y) / (torch.bincount(test_y) + torch.bincount(y))
    assert bool((shares > 0.19).all()) and bool((shares < 0.21).all())
    assert {n: len(loader.dataset) for n, loader in loaders.items()} == counts
    assert min(counts.values()) >= 10
    union = torch.cat([loader.dataset.tensors[0] for loader in tests.values()])
    assert len(union) == test_num and torch.equal(union.sum(0), test_x.sum(0))


def test_only_the_partition_follows_the_seed() -> None:
    first, again, other = digits(seed=1), digits(seed=1), digits(seed=2)
    assert torch.equal(first[3].dataset.tensors[0], other[3].dataset.tensors[0])
    assert first[4] == again[4] != other[4]
    for n in range(10):
        assert torch.equal(first[5][n].dataset.tensors[0], again[5][n].dataset.tensors[0])
    assert [y.tolist() for _, y in first[5][3]] == [y.tolist() for _, y in again[5][3]]


def test_the_fast_client_has_least_data_unless_told_otherwise() -> None:
    for seed in range(5):
        counts = digits(seed=seed)[4]
        assert counts[0] == min(counts.values())
        moved = digits(seed=seed, smallest=4)[4]
        assert moved[4] == min(moved.values()) and sorted(moved.values()) == sorted(counts.values())


def test_iid_digits() -> None:
    dataset = digits(clients=4, alpha=None)
    assert set(dataset[4].values()) <= {360, 361}
    assert all(torch.bincount(loader.dataset.tensors[1]).min() > 20 for loader in dataset[5].values())


def test_digits_are_what_the_runtime_reads() -> None:
    data = read_dataset(digits(clients=3, batch_size=7), clients=3)
    assert [len(s) for s in data.clients] == list(digits(clients=3)[4].values())
    x, y = data.clients[1].take(np.array([2, 0]))
    assert x.shape == (2, 1, 8, 8) and y.shape == (2,)
    assert data.test.samples == 355


def test_without_scikit_learn_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **keywords: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return real(name, *rest, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(HostError, match=r"GMR-505 .*scikit-learn(.|\n)*pip install scikit-learn"):
        digits()


def test_read_only_and_strided_arrays_are_taken() -> None:
    x, y = np.arange(12, dtype=np.float32).reshape(2, 6).T, np.arange(6)
    y.flags.writeable = False
    dataset = fedml_dataset((x, y), (x, y), [np.array([0, 5]), np.array([1])], 2, classes=6)
    assert dataset[5][0].dataset.tensors[0].tolist() == [[0.0, 6.0], [5.0, 11.0]]
    assert dataset[4] == {0: 2, 1: 1} and dataset[0] == 3 and dataset[1] == 6


# -- its model ------------------------------------------------------------------------------------------


def test_digits_cnn_is_small_and_almost_all_prunable() -> None:
    model = DigitsCNN()
    layout = build_layout(model)
    assert layout.size == 38_282 and layout.prunable == 37_520
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_digits_mlp_has_the_parameters_that_the_demonstration_tells_of() -> None:
    layout = build_layout(DigitsMLP())
    assert layout.size == 1_210 and layout.prunable == 1_024
    assert DigitsMLP()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_digits_cnn_learns_the_digits() -> None:
    """A few epochs on all clients' data together: the data and the model fit each other."""
    torch.manual_seed(0)
    _, _, train, test, *_ = digits(batch_size=16)
    model = DigitsCNN()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(3):
        for x, y in train:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    x, y = test.dataset.tensors
    assert float((model(x).argmax(1) == y).float().mean()) > 0.9
