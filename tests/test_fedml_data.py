"""FedML's 8-element dataset, read as indexed samples."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fedgmr_plugin.engine.samples import Subset as SelectedSamples
from fedgmr_plugin.engine.samples import TensorSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.errors import DataError
from fedgmr_plugin.runtimes.data import read_dataset
from fedgmr_plugin.runtimes.samples import MapSamples, samples_of


def tensors(n: int, offset: int = 0) -> TensorDataset:
    """n samples: x [n, 2] counts up from `offset`, y [n] is the sample's number."""
    x = torch.arange(offset, offset + 2 * n, dtype=torch.float32).view(n, 2)
    return TensorDataset(x, torch.arange(offset, offset + n))


def eight(
    by_client: dict[Any, Any], tests: Any = None, test_global: Any = "default", **changes: Any
) -> list[Any]:
    counts = dict.fromkeys(by_client, 1)
    if test_global == "default":
        test_global = DataLoader(tensors(7), batch_size=3)
    parts = {"counts": counts, "loaders": by_client, "tests": tests, **changes}
    return [1, 1, None, test_global, parts["counts"], parts["loaders"], parts["tests"], 10]


def everything(samples: Any) -> tuple[Tensor, Tensor]:
    return samples.take(np.arange(len(samples)))


def global_state() -> tuple[Any, ...]:
    """Global random states, comparable."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


class Plain(Dataset[Any]):
    """Map-style, not a TensorDataset; counts how often an item was read."""

    def __init__(self, n: int = 6) -> None:
        self.n, self.reads = n, 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.reads += 1
        return torch.full((2,), float(i)), i


class Noisy(Plain):
    """A random transform, from all three global generators."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        noise = torch.rand(()) + random.random() + np.random.rand()
        return torch.full((2,), float(i)) + noise, i


class Stream(IterableDataset[Any]):
    def __init__(self, n: int | None) -> None:
        self.n, self.passes = n, 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        self.passes += 1
        i = 0
        while self.n is None or i < self.n:
            yield torch.full((2,), float(i)) + 0 * torch.rand(()), i
            i += 1


# -- forms of one client's data ----------------------------------------------------------------------


def same(n: int) -> list[tuple[str, Any]]:
    """The same n samples in every accepted form."""
    data = tensors(n)
    x, y = data.tensors
    return [
        ("loader", DataLoader(data, batch_size=4, shuffle=True)),
        ("loader that drops", DataLoader(data, batch_size=4, drop_last=True)),
        (
            "collating loader",
            DataLoader(data, batch_size=4, collate_fn=lambda items: torch.utils.data.default_collate(items)),
        ),
        ("subset", Subset(TensorDataset(torch.cat([x + 99, x]), torch.cat([y + 99, y])), range(n, 2 * n))),
        ("dataset", data),
        ("batches", [(x[:2], y[:2]), (x[2:], y[2:])]),
        ("lists and arrays", [[x[:2].numpy(), y[:2].numpy()], [x[2:].numpy(), y[2:].numpy()]]),
        ("an empty batch", ((x[:0], y[:0]), (x, y))),
        ("no automatic batching", DataLoader([(x[:2], y[:2]), (x[2:], y[2:])], batch_size=None)),  # type: ignore[arg-type]
        ("generator", ((x[i : i + 2], y[i : i + 2]) for i in range(0, n, 2))),
    ]


@pytest.mark.parametrize("position", range(10), ids=[name for name, _ in same(5)])
def test_every_form_gives_the_same_samples(position: int) -> None:
    samples = samples_of(same(5)[position][1])
    x, y = tensors(5).tensors
    assert len(samples) == 5
    for index in ([0, 1, 2, 3, 4], [4, 0, 4], [2]):
        got_x, got_y = samples.take(np.array(index))
        assert torch.equal(got_x, x[index]) and torch.equal(got_y, y[index])
        assert got_x.dtype == x.dtype and got_y.dtype == y.dtype


@given(
    n=st.integers(1, 12),
    selections=st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=8), max_size=2),
    index=st.lists(st.integers(0, 10**6), min_size=1, max_size=9),
    label_axes=st.integers(0, 1),
)
def test_fast_path_equals_slow_path(
    n: int, selections: list[list[int]], index: list[int], label_axes: int
) -> None:
    y = torch.arange(n) if label_axes == 0 else torch.arange(3 * n, dtype=torch.float64).view(n, 3)
    dataset: Any = TensorDataset(torch.arange(2.0 * n).view(n, 2), y)
    for selection in selections:
        dataset = Subset(dataset, [i % len(dataset) for i in selection])
    fast = samples_of(DataLoader(dataset, batch_size=2))
    slow = MapSamples(dataset, torch.utils.data.default_collate, "client 0")
    assert isinstance(fast, (TensorSamples, SelectedSamples)) and len(fast) == len(slow)
    where = np.array([i % len(slow) for i in index])
    for got, expected in zip(fast.take(where), slow.take(where), strict=True):
        assert torch.equal(got, expected) and got.dtype == expected.dtype


def test_collate_function_is_used() -> None:
    def doubled(items: list[Any]) -> tuple[Tensor, Tensor]:
        return torch.stack([2 * x for x, _ in items]), torch.tensor([y for _, y in items])

    x, _ = samples_of(DataLoader(tensors(4), batch_size=2, collate_fn=doubled)).take(np.array([3]))
    assert torch.equal(x, 2 * tensors(4).tensors[0][3:])


def test_collated_inputs_may_be_structures_but_not_labels() -> None:
    def words(items: list[Any]) -> tuple[dict[str, Tensor], Tensor]:
        return {"ids": torch.stack([x for x, _ in items])}, torch.tensor([y for _, y in items])

    x, y = samples_of(DataLoader(Plain(), batch_size=2, collate_fn=words)).take(np.array([1, 2]))
    assert x["ids"].shape == (2, 2) and y.tolist() == [1, 2]


def test_random_transforms_are_evaluated_at_every_take_and_follow_the_seed() -> None:
    samples = samples_of(DataLoader(Noisy(), batch_size=2))
    draws = []
    for seed in (1, 2, 1):
        with isolated_rng(seed):
            draws.append(everything(samples)[0])
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_items_are_read_only_when_taken() -> None:
    dataset = Plain()
    samples = samples_of(DataLoader(dataset, batch_size=2))
    assert len(samples) == 6 and dataset.reads == 0
    samples.take(np.array([1, 5]))
    assert dataset.reads == 2


def test_a_stream_is_read_once() -> None:
    stream = Stream(9)
    samples = samples_of(DataLoader(stream, batch_size=4), declared=9)
    for _ in range(2):
        assert everything(samples)[1].tolist() == list(range(9))
    assert stream.passes == 1
    assert len(samples_of(Stream(70))) == 70


def test_an_endless_stream_is_refused() -> None:
    with pytest.raises(DataError, match=r"GMR-302 the data of client 7 goes on after 10900 samples"):
        samples_of(DataLoader(Stream(None), batch_size=4), "client 7", declared=9)


# -- which samples a loader's samplers stand for -----------------------------------------------------------


class Odd(Sampler[int]):
    """A sampler of our own."""

    def __iter__(self) -> Iterator[int]:
        yield from random.sample([1, 3, 5], 3)


@pytest.mark.parametrize(
    ("loader", "members"),
    [
        (lambda d: DataLoader(d, sampler=SubsetRandomSampler([4, 2]), batch_size=2), [4, 2]),
        (lambda d: DataLoader(d, sampler=Odd(), batch_size=2), [1, 3, 5]),
        (lambda d: DataLoader(d, batch_sampler=[[5, 0], [3]]), [0, 3, 5]),
        (lambda d: DataLoader(d, batch_sampler=BatchSampler(Odd(), 2, True)), [1, 3, 5]),
        (lambda d: DataLoader(d, sampler=SequentialSampler(range(3))), [0, 1, 2]),
        (lambda d: DataLoader(d, sampler=RandomSampler(d, replacement=True, num_samples=2)), list(range(6))),
        (lambda d: DataLoader(d, sampler=WeightedRandomSampler([0.0] * 5 + [1.0], 6)), list(range(6))),
    ],
)
@pytest.mark.parametrize("dataset", [Plain(6), tensors(6)], ids=["plain", "tensors"])
def test_samplers_select_but_do_not_order(loader: Any, members: list[int], dataset: Any) -> None:
    before = global_state()
    samples = samples_of(loader(dataset))
    assert everything(samples)[1].tolist() == members
    assert global_state() == before


# -- bad data -------------------------------------------------------------------------------------------

X, Y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)


class Unsized(Dataset[Any]):
    def __getitem__(self, i: int) -> int:
        return i


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        (None, "GMR-301", "the training data of client 3 is None"),
        ([], "GMR-301", "client 3 has no sample"),
        ([(X[:0], Y[:0])], "GMR-301", "client 3 has no sample"),
        (TensorDataset(X[:0], Y[:0]), "GMR-301", "client 3 has no sample"),
        (DataLoader(Stream(0), batch_size=2), "GMR-301", "client 3 has no sample"),
        ([(X, Y[:3])], "GMR-302", "x (4, 2) and y (3,): lengths differ"),
        ([(X, torch.tensor(1))], "GMR-302", "lengths differ"),
        ([X, Y], "GMR-302", "a batch of client 3 is not a pair (x, y): Tensor"),
        ([(X, Y, Y)], "GMR-302", "not a pair (x, y): 3 elements"),
        ([("text", Y)], "GMR-302", "holds a str, not a tensor"),
        ([(X, Y), (X[:, :1], Y)], "GMR-302", "samples of different shapes"),
        (TensorDataset(X), "GMR-302", "1 tensors, not x and y"),
        (3.5, "GMR-302", "the data of client 3 is a float"),
        (Unsized(), "GMR-302", "has no length"),
    ],
)
def test_bad_data_of_a_client(source: Any, code: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        samples_of(source, "client 3")
    assert caught.value.code == code and message in str(caught.value) and "client 3" in str(caught.value)


def test_a_dataset_that_yields_no_pairs_is_refused_when_read() -> None:
    samples = samples_of(DataLoader([1, 2, 3]), "client 3")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="GMR-302 a batch of client 3 is not a pair"):
        samples.take(np.array([0]))


# -- the 8-element list ------------------------------------------------------------------------------------


def test_clients_need_not_be_contiguous() -> None:
    data = read_dataset(eight({30: tensors(3, 30), 2: tensors(2, 2), 11: tensors(1, 11)}))
    assert data.ids == (2, 11, 30) and data.classes == 10
    assert [len(s) for s in data.clients] == [2, 1, 3]
    assert data.clients[-1].take(np.array([0]))[1].tolist() == [30]
    assert data.clients[1] is data.clients[1]


def test_named_clients_keep_their_order_and_the_first_ones_are_used() -> None:
    data = read_dataset(eight({"b": tensors(1), "a": tensors(2), "c": tensors(3)}), clients=2)
    assert data.ids == ("b", "a") and [len(s) for s in data.clients[:]] == [1, 2]


def test_ten_thousand_clients_are_not_touched() -> None:
    class Untouchable:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("touched")

    loaders: dict[int, Any] = {n: Untouchable() for n in range(10_000)}
    loaders[77] = [(X, Y)]
    data = read_dataset(eight(loaders))
    assert len(data.clients) == 10_000 and len(data.clients[77]) == 4


BAD = [
    (None, "GMR-302", "not FedML's list of 8 elements: NoneType"),
    ([1, 2, 3], "GMR-302", "not FedML's list of 8 elements: 3 elements"),
    (eight({0: X}, loaders=[X]), "GMR-302", "train_loader_dict is a list"),
    (eight({0: X}, counts=None), "GMR-302", "train_num_dict is a NoneType"),
    (eight({0: X}, tests=[X]), "GMR-302", "test_loader_dict"),
    (eight({0: X}, counts={0: 1, 5: 1}), "GMR-302", "client 5 is missing"),
    (eight({0: X, 4: X}, counts={0: 1}), "GMR-302", "client 4 is missing"),
    (eight({}), "GMR-302", "there is no client"),
    (eight({0: X, 9: None}), "GMR-301", "the training data of client 9 is None"),
    (eight({0: X, 9: X}, counts={0: 1, 9: 0}), "GMR-301", "client 9 has 0 samples"),
    (eight({0: X}, test_global=None), "GMR-302", "no test data"),
    (eight({0: X}, tests={0: None}, test_global=[]), "GMR-302", "no test data"),
]


@pytest.mark.parametrize(("dataset", "code", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_datasets(dataset: Any, code: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(dataset)
    assert caught.value.code == code and message in str(caught.value)


def test_too_many_clients_asked_for() -> None:
    with pytest.raises(DataError, match="client_num_in_total=3, but the dataset has 1 clients"):
        read_dataset(eight({0: tensors(1)}), clients=3)


# -- test batches -----------------------------------------------------------------------------------------


def labels(batches: Any) -> list[list[int]]:
    return [y.tolist() for _, y in batches]


def test_global_test_data_is_preferred() -> None:
    data = read_dataset(eight({0: tensors(1)}, tests={0: [(X, Y)]}))
    assert labels(data.test) == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(data.test) == 3 and data.test.samples == 7


def test_without_global_test_data_the_clients_are_united() -> None:
    loaders = {n: tensors(1) for n in range(4)}
    tests = {0: DataLoader(tensors(2), batch_size=1, shuffle=True), 1: None, 3: [tensors(2, 30)[:]]}
    data = read_dataset(eight(loaders, tests=tests, test_global=None))
    assert labels(data.test) == [[0], [1], [30, 31]]
    assert len(data.test) == 3 and data.test.samples == 4


def test_test_batches_repeat_and_leave_the_global_state_alone() -> None:
    data = read_dataset(eight({0: tensors(1)}, test_global=DataLoader(Noisy(), batch_size=4, shuffle=True)))
    before = global_state()
    first, second = (torch.cat([x for x, _ in data.test]) for _ in range(2))
    assert torch.equal(first, second) and global_state() == before
    assert labels(data.test) == [[0, 1, 2, 3], [4, 5]]


def test_a_consumer_sees_its_own_random_state() -> None:
    """Isolation ends before a batch is handed over."""
    data = read_dataset(eight({0: tensors(1)}, test_global=DataLoader(Noisy(), batch_size=4)))
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(torch.cat([torch.rand(1) for _ in data.test]), expected)
