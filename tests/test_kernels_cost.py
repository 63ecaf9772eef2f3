"""Seconds, shares and the cost of a weight."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedgmr_plugin.kernels import build_layout
from fedgmr_plugin.kernels.cost import (
    cost_of_layer,
    fair_shares,
    flight_seconds,
    macs_per_weight,
    window_seconds,
)

#: Model sizes of the paper's data sets in MB, and the length of a window that goes with them.
TABLE = {
    "FEMNIST": (25.98, 9.29),
    "CIFAR-10": (37.20, 12.66),
    "ImageNet-100": (43.10, 14.43),
    "StackOverflow": (17.26, 6.68),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_mean_window_is_three_tenths_of_the_size_and_three_intervals(name: str) -> None:
    megabytes, published = TABLE[name]
    assert window_seconds(megabytes) == pytest.approx(0.3 * megabytes + 1.5, abs=1e-9)
    assert round(window_seconds(megabytes), 2) == published


FLIGHTS = [
    (0.05, [(0.05, 0.77), (0.1, 1.51), (0.2, 2.98), (0.5, 7.39), (1.0, 14.7)]),
    (0.1, [(0.1, 0.77), (0.2, 1.51), (0.5, 3.71), (1.0, 7.39)]),
    (0.5, [(0.5, 0.77), (1.0, 1.51)]),
]


@pytest.mark.parametrize(
    ("initial", "density", "windows"), [(d0, d, w) for d0, row in FLIGHTS for d, w in row]
)
def test_a_restored_client_takes_the_published_number_of_windows(
    initial: float, density: float, windows: float
) -> None:
    size = Fraction("37.2")
    d0, d = Fraction(str(initial)), Fraction(str(density))
    exact = size * d * (1 / min(Fraction(10), 20 * d0) + 1 / (5 * d0)) + Fraction(1, 2)
    seconds = flight_seconds(37.2, density, initial)
    assert seconds == pytest.approx(float(exact), abs=1e-9)
    digits = 1 if windows > 10 else 2
    assert round(seconds / window_seconds(37.2), digits) == pytest.approx(windows, abs=0.011)


def test_rates_are_arguments() -> None:
    seconds = flight_seconds(
        8.0, 0.5, 0.25, client_download=4.0, client_upload=2.0, server_upload=0.5, compute_seconds=3.0
    )
    assert seconds == 4.0 / 0.5 + 4.0 / 0.5 + 3.0
    window = window_seconds(
        8.0,
        client_download=4.0,
        client_upload=2.0,
        server_upload=16.0,
        compute_seconds=1.0,
        window_slack=2.0,
        aggregation_seconds=4.0,
    )
    assert window == 2.0 + 4.0 + 7.0


# -- max-min fairness ------------------------------------------------------------------------------

rates = st.lists(st.integers(0, 1000).map(lambda i: i / 8), max_size=8)


@given(capacity=st.integers(1, 4000).map(lambda i: i / 8), demands=rates)
def test_shares_are_max_min_fair(capacity: float, demands: list[float]) -> None:
    """Nobody gets more than it can use, nothing is left over, and whoever is cut has a largest share."""
    shares = fair_shares(capacity, demands)
    assert all(0 <= s <= d for s, d in zip(shares, demands, strict=True))
    assert sum(shares) == pytest.approx(min(capacity, sum(demands)))
    for share, demand in zip(shares, demands, strict=True):
        if share < demand:
            assert share == pytest.approx(max(shares))


@given(capacity=st.floats(0.5, 100), demands=rates, data=st.data())
def test_shares_do_not_depend_on_the_order(
    capacity: float, demands: list[float], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(demands))))
    moved = fair_shares(capacity, [demands[i] for i in order])
    shares = fair_shares(capacity, demands)
    assert moved == pytest.approx([shares[i] for i in order])


def test_shares_of_a_known_case() -> None:
    assert fair_shares(10.0, [2.0, 8.0, 8.0, 1.0]) == [2.0, 3.5, 3.5, 1.0]
    assert fair_shares(100.0, [2.0, 8.0]) == [2.0, 8.0]
    assert fair_shares(5.0, []) == []


# -- operations per weight -------------------------------------------------------------------------


def macs(model: nn.Module, example: Tensor) -> dict[str, float]:
    layout = build_layout(model)
    names = [e.name for e in layout.of_kind("prunable")]
    return dict(zip(names, macs_per_weight(model, layout, example), strict=True))


def test_convolutions_use_a_weight_once_per_output_pixel_and_linear_layers_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2),  # 9x9 -> 4x4
        nn.Conv2d(3, 6, 2, groups=3),  # 4x4 -> 3x3
        nn.Flatten(),
        nn.Linear(54, 4),
        nn.Linear(4, 2),
    )
    assert macs(model, torch.zeros(5, 1, 9, 9)) == {"0.weight": 16.0, "1.weight": 9.0, "3.weight": 1.0}


def test_a_linear_layer_over_a_sequence_uses_a_weight_once_per_position() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    found = macs(model, torch.zeros(2, 7, dtype=torch.int64))
    assert found == {"0.weight": 1.0, "1.weight": 7.0}


def test_transposed_convolutions_use_a_weight_once_per_input_pixel() -> None:
    """Each input pixel is multiplied by each of its channel's weights, whatever the stride."""
    plain = nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Conv2d(3, 1, 1))
    assert macs(plain, torch.zeros(5, 2, 4, 4))["0.weight"] == 16.0
    grouped = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.Conv2d(4, 1, 1))
    assert macs(grouped, torch.zeros(5, 4, 4, 4))["0.weight"] == 16.0


def test_a_module_that_runs_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(self.inner(x)))

    assert macs(Twice(), torch.zeros(3, 4)) == {"inner.weight": 2.0}


def test_counting_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    macs(model, torch.randn(8, 4))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_a_failing_forward_pass_leaves_no_hook_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(RuntimeError):
        macs(model, torch.zeros(3, 5))
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_costs_average_to_two_per_weight_and_order_like_the_operations() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(48, 4), nn.Linear(4, 2))
    layout = build_layout(model)
    counted = macs_per_weight(model, layout, torch.zeros(1, 1, 6, 6))
    costs = cost_of_layer(layout, counted)
    sizes = [e.size for e in layout.of_kind("prunable")]
    assert counted == [16.0, 1.0]
    assert sum(s * c for s, c in zip(sizes, costs, strict=True)) / sum(sizes) == pytest.approx(2.0)
    assert costs[0] - 1 == pytest.approx(16 * (costs[1] - 1))
