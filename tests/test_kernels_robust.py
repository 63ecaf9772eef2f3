"""Defences: exact on small cases, laws on random ones, and what they are for."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedgmr_plugin.kernels.aggregate import MaskedUpdate, merge
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.kernels.robust import bounded, trimmed

dyadic = st.integers(-64, 64).map(lambda k: k / 8)


def ranking(rungs: list[int]) -> Ranking:
    return Ranking((0.25, 0.5, 1.0), torch.tensor(rungs, dtype=torch.int16))


@st.composite
def merges(draw: st.DrawFn) -> tuple[list[MaskedUpdate], int]:
    size = draw(st.integers(1, 6))
    found = []
    for _ in range(draw(st.integers(1, 7))):
        order = ranking(draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)))
        rung = draw(st.integers(0, 2))
        values = draw(st.lists(dyadic, min_size=order.ends[rung], max_size=order.ends[rung]))
        found.append(MaskedUpdate(order, rung, torch.tensor(values), float(draw(st.integers(1, 4)))))
    return found, size


def exact(
    updates: list[MaskedUpdate], fraction: Fraction, size: int
) -> tuple[list[Fraction | None], Fraction]:
    """The trimmed mean of each coordinate, None where nobody holds it; and the undefended share."""
    means: list[Fraction | None] = []
    held = undefended = 0
    for j in range(size):
        holders = []
        for n, u in enumerate(updates):
            index = u.index_S.tolist()
            if j in index:
                holders.append((float(u.values_S[index.index(j)]), n, int(u.weight)))
        if not holders:
            means.append(None)
            continue
        held += 1
        k = int(fraction * len(holders))
        undefended += k == 0
        kept = sorted(holders)[k : len(holders) - k]
        top = sum(Fraction(value) * weight for value, _, weight in kept)
        means.append(top / sum(weight for _, _, weight in kept))
    return means, Fraction(undefended, held) if held else Fraction(0)


@given(merges(), st.sampled_from([Fraction(0), Fraction(1, 4), Fraction(3, 8)]))
def test_merging_what_is_trimmed_is_the_trimmed_mean(
    case: tuple[list[MaskedUpdate], int], fraction: Fraction
) -> None:
    updates, size = case
    wanted, undefended = exact(updates, fraction, size)
    result = trimmed(updates, float(fraction), size, size)
    assert result.undefended == pytest.approx(float(undefended))
    order = ranking([0] * size)
    merged = merge(torch.zeros(size), order, result.updates, form="delta").w_D
    for value, mean in zip(merged.tolist(), wanted, strict=True):
        assert value == pytest.approx(0.0 if mean is None else float(mean), abs=1e-5)


@given(merges())
def test_nothing_is_trimmed_at_zero(case: tuple[list[MaskedUpdate], int]) -> None:
    updates, size = case
    for before, after in zip(updates, trimmed(updates, 0.0, size, size).updates, strict=True):
        assert torch.equal(before.values_S, after.values_S)


@given(merges(), st.sampled_from([1.0, 2.0, 8.0]), st.sampled_from(["delta", "replacement"]))
def test_no_update_moves_further_than_the_bound(
    case: tuple[list[MaskedUpdate], int], bound: float, form: str
) -> None:
    updates, size = case
    w_D = torch.arange(size, dtype=torch.float32) / 4

    def moves(us: list[MaskedUpdate]) -> list[float]:
        changes = [u.values_S - w_D[u.index_S] if form == "replacement" else u.values_S for u in us]
        return [math.sqrt(float(c.double().square().mean())) if len(c) else 0.0 for c in changes]

    before = moves(updates)
    result, scaled = bounded(updates, w_D, bound, form, 0)  # type: ignore[arg-type]
    most = bound * sorted(before)[len(before) // 2] if len(before) % 2 else None
    after = moves(result)
    assert scaled == sum(b > a + 1e-6 for b, a in zip(before, after, strict=True))
    if most is not None:
        assert max(after) <= most * (1 + 1e-5) + 1e-6
    for b, a, u, v in zip(before, after, updates, result, strict=True):
        assert a <= b * (1 + 1e-5) + 1e-6
        if b <= (most or 0):
            assert torch.equal(u.values_S, v.values_S)


def test_buffers_are_neither_measured_nor_scaled_as_changes() -> None:
    order = ranking([0, 0, 0])
    updates = [MaskedUpdate(order, 2, torch.tensor([1.0, x, 900.0]), 1.0) for x in (1.0, 1.0, 50.0)]
    result, scaled = bounded(updates, torch.zeros(3), 2.0, "delta", 1)
    assert scaled == 1 and float(result[2].values_S[2]) == 900.0
    assert math.sqrt(float(result[2].values_S[:2].square().mean())) == pytest.approx(2.0)
