"""Mask-aware aggregation and staleness, against an oracle in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedgmr_plugin.kernels import MaskedUpdate, holders, merge, staleness_weight

SIZE = 6
few = settings(max_examples=max(10, settings().max_examples // 5))


class Case(NamedTuple):
    """A global vector and updates with dyadic values: sums of them are exact in float64."""

    w: list[float]
    updates: list[tuple[list[int], list[float], float]]


dyadic = st.integers(-(2**10), 2**10).map(lambda i: i / 64)


@st.composite
def cases(draw: st.DrawFn, whole: bool = False) -> Case:
    w = draw(st.lists(dyadic, min_size=SIZE, max_size=SIZE))
    updates = []
    for _ in range(draw(st.integers(1, 5))):
        held = list(range(SIZE)) if whole else draw(st.permutations(range(SIZE)))
        held = held if whole else held[: draw(st.integers(0, SIZE))]
        values = draw(st.lists(dyadic, min_size=len(held), max_size=len(held)))
        updates.append((list(held), values, draw(st.integers(1, 64)) / 8))
    return Case(w, updates)


def tensors(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[MaskedUpdate]]:
    return torch.tensor(case.w, dtype=dtype), [
        MaskedUpdate(torch.tensor(index, dtype=torch.int64), torch.tensor(values, dtype=dtype), weight)
        for index, values, weight in case.updates
    ]


def oracle(
    case: Case,
    rule: str = "mask_aware",
    form: str = "delta",
    parameters: int = SIZE,
    server_step: float = 1.0,
    participation: float = 1.0,
) -> list[Fraction]:
    """The formulas of the method page, section 5, coordinate by coordinate, without rounding."""
    merged = []
    total = sum(Fraction(c) for _, _, c in case.updates)
    for j, old in enumerate(map(Fraction, case.w)):
        held = [(Fraction(c), Fraction(v[i.index(j)])) for i, v, c in case.updates if j in i]
        top, bottom = sum(c * x for c, x in held), sum(c for c, _ in held)
        if j >= parameters:
            new = top / bottom if held else old
        elif rule == "plain_average":
            new = Fraction(top) / total
        elif rule == "global_average":
            new = old + (Fraction(top) - (0 if form == "delta" else bottom * old)) / total
        elif form == "delta":
            new = old + top / bottom if held else old
        else:
            new = top / bottom if held else old
        if j < parameters:
            new = old + Fraction(server_step) * (new - old)
        merged.append(Fraction(participation) * new + (1 - Fraction(participation)) * old)
    return merged


def near(values: Tensor, exact: list[Fraction], ulps: float = 1.0) -> bool:
    """Whether float32 `values` are the correctly rounded `exact` ones, give or take a few units."""
    for got, wanted in zip(values.tolist(), exact, strict=True):
        unit = math.ulp(max(abs(float(wanted)), 2.0**-10)) * 2**29  # spacing of float32 there
        if abs(Fraction(got) - wanted) > Fraction(ulps) * Fraction(unit):
            return False
    return True


OPTIONS: list[dict[str, Any]] = [
    {},
    {"form": "replacement"},
    {"rule": "global_average"},
    {"rule": "global_average", "form": "replacement"},
    {"rule": "plain_average", "form": "replacement"},
    {"server_step": 0.5},
    {"form": "replacement", "server_step": 0.25},
    {"participation": 0.375},
    {"form": "replacement", "participation": 0.25},
    {"rule": "global_average", "server_step": 0.5, "participation": 0.5},
    {"parameters": 4},
    {"parameters": 3, "form": "replacement"},
    {"parameters": 4, "rule": "global_average", "server_step": 0.5},
    {"parameters": 4, "rule": "plain_average", "form": "replacement", "participation": 0.5},
]


def label(options: dict[str, Any]) -> str:
    return "-".join(str(v) for v in options.values()) or "default"


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@few
@given(case=cases())
def test_merging_equals_the_exact_oracle(options: dict[str, Any], case: Case) -> None:
    w_D, updates = tensors(case)
    assert near(merge(w_D, updates, **options).w_D, oracle(case, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@few
@given(case=cases(), data=st.data())
def test_the_order_of_the_updates_does_not_matter_where_sums_are_exact(
    options: dict[str, Any], case: Case, data: st.DataObject
) -> None:
    w_D, updates = tensors(case)
    shuffled = data.draw(st.permutations(updates))
    first, second = merge(w_D, updates, **options), merge(w_D, shuffled, **options)
    assert torch.equal(first.w_D, second.w_D) and torch.equal(first.weight_D, second.weight_D)


@few
@given(case=cases(), data=st.data())
def test_the_order_of_an_updates_coordinates_does_not_matter(case: Case, data: st.DataObject) -> None:
    w_D, updates = tensors(case)
    moved = []
    for u in updates:
        order = torch.tensor(data.draw(st.permutations(range(len(u.index_S)))), dtype=torch.int64)
        moved.append(MaskedUpdate(u.index_S[order], u.values_S[order], u.weight))
    assert torch.equal(merge(w_D, updates).w_D, merge(w_D, moved).w_D)


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@few
@given(case=cases(), power=st.integers(-20, 20))
def test_scaling_all_weights_by_a_power_of_two_changes_nothing(
    options: dict[str, Any], case: Case, power: int
) -> None:
    w_D, updates = tensors(case)
    scaled = [u._replace(weight=u.weight * 2.0**power) for u in updates]
    assert torch.equal(merge(w_D, updates, **options).w_D, merge(w_D, scaled, **options).w_D)


COVERED = [o for o in OPTIONS if o.get("rule") != "plain_average"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", COVERED, ids=label)
@few
@given(case=cases(), seed=st.integers(0, 2**31))
def test_uncovered_coordinates_are_untouched(
    options: dict[str, Any], dtype: torch.dtype, case: Case, seed: int
) -> None:
    _, updates = tensors(case, dtype)
    w_D = torch.randn(SIZE, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    free = holders(updates, SIZE) == 0
    assert torch.equal(merge(w_D, updates, **options).w_D[free], w_D[free])


@pytest.mark.parametrize("options", COVERED, ids=label)
def test_a_negative_zero_that_nobody_holds_keeps_its_sign(options: dict[str, Any]) -> None:
    """Bit for bit untouched: the model's SHA-256 sees the difference."""
    w_D = torch.tensor([-0.0, 1.0, -0.0, -0.0, -0.0])
    update = MaskedUpdate(torch.tensor([1]), torch.tensor([2.0]), 1.0)
    merged = merge(w_D, [update], **options).w_D
    assert merged[[0, 2, 3, 4]].signbit().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixing_leaves_uncovered_coordinates_untouched_whatever_the_share(dtype: torch.dtype) -> None:
    """P w + (1 - P) w is not w in floating point."""
    w_D = torch.rand(2000, dtype=dtype, generator=torch.Generator().manual_seed(1))
    update = MaskedUpdate(torch.tensor([0]), torch.tensor([1.0], dtype=dtype), 1.0)
    for share in (0.1, 0.3, 0.7):
        assert torch.equal(merge(w_D, [update], participation=share).w_D[1:], w_D[1:])


def test_plain_average_counts_zeros_for_those_who_lack_a_coordinate() -> None:
    w_D = torch.tensor([8.0, 8.0, 8.0])
    updates = [
        MaskedUpdate(torch.tensor([0, 1]), torch.tensor([4.0, 2.0]), 1.0),
        MaskedUpdate(torch.tensor([0]), torch.tensor([1.0]), 3.0),
    ]
    assert merge(w_D, updates, rule="plain_average", form="replacement").w_D.tolist() == [1.75, 0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@few
@given(seed=st.integers(0, 2**31), weight=st.floats(1e-6, 1e9))
def test_replacement_by_one_full_holder_returns_its_values(
    dtype: torch.dtype, seed: int, weight: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w_D, x_D = (torch.randn(50, dtype=dtype, generator=generator) for _ in range(2))
    update = MaskedUpdate(torch.randperm(50, generator=generator), x_D, weight)
    merged = merge(w_D, [update], form="replacement").w_D
    assert torch.equal(merged[update.index_S], x_D)


@few
@given(case=cases(), value=dyadic)
def test_merging_equal_weights_returns_them(case: Case, value: float) -> None:
    """Idempotence of the replacement form: everybody agrees, so the mean is what they agree on."""
    w_D = torch.full((SIZE,), value)
    updates = [u._replace(values_S=torch.full_like(u.values_S, value)) for u in tensors(case)[1]]
    assert torch.equal(merge(w_D, updates, form="replacement").w_D, w_D)
    nothing = [u._replace(values_S=torch.zeros_like(u.values_S)) for u in updates]
    assert torch.equal(merge(w_D, nothing, form="delta").w_D, w_D)
    assert torch.equal(merge(w_D, nothing, form="delta", rule="global_average").w_D, w_D)


@few
@given(case=cases(whole=True))
def test_with_full_masks_and_no_delay_both_forms_and_both_normalisations_agree(case: Case) -> None:
    w_D, updates = tensors(case, torch.float64)
    deltas = [u._replace(values_S=u.values_S - w_D[u.index_S]) for u in updates]
    wanted = merge(w_D, updates, form="replacement").w_D
    for options in ({"form": "delta"}, {"form": "delta", "rule": "global_average"}):
        assert torch.allclose(merge(w_D, deltas, **options).w_D, wanted, rtol=1e-12, atol=1e-12)
    replaced = merge(w_D, updates, form="replacement", rule="global_average").w_D
    assert torch.allclose(replaced, wanted, rtol=1e-12, atol=1e-12)
    plain = merge(w_D, updates, form="replacement", rule="plain_average").w_D
    assert torch.allclose(plain, wanted, rtol=1e-12, atol=1e-12)


@few
@given(case=cases())
def test_merged_values_lie_between_the_holders(case: Case) -> None:
    w_D, updates = tensors(case)
    merged = merge(w_D, updates, form="replacement").w_D.tolist()
    for j, value in enumerate(merged):
        held = [v[i.index(j)] for i, v, _ in case.updates if j in i]
        assert min(held, default=case.w[j]) <= value <= max(held, default=case.w[j])


@few
@given(case=cases())
def test_coverage_weights_sum_to_one_on_covered_coordinates(case: Case) -> None:
    """pi_nj = c_n m_nj / sum_k c_k m_kj, and max_j pi_nj is in (0, 1]."""
    w_D, updates = tensors(case)
    weight_D = merge(w_D, updates).weight_D
    assert weight_D.dtype == torch.float64
    total_D = torch.zeros(SIZE, dtype=torch.float64)
    for u in updates:
        pi_S = u.weight / weight_D[u.index_S]
        assert ((pi_S > 0) & (pi_S <= 1)).all()
        total_D[u.index_S] += pi_S
    covered = weight_D > 0
    assert torch.allclose(total_D[covered], torch.ones(int(covered.sum()), dtype=torch.float64))
    assert (total_D[~covered] == 0).all()
    assert [float(c) for c in weight_D] == [sum(c for i, _, c in case.updates if j in i) for j in range(SIZE)]


@few
@given(case=cases())
def test_holders_counts_updates(case: Case) -> None:
    _, updates = tensors(case)
    wanted = [sum(j in i for i, _, _ in case.updates) for j in range(SIZE)]
    assert holders(updates, SIZE).tolist() == wanted


def test_nobody_holds_anything_without_updates() -> None:
    assert holders([], 3).tolist() == [0, 0, 0]


def test_buffers_are_averaged_as_values_whatever_the_form_and_never_stepped() -> None:
    w_D = torch.tensor([1.0, 10.0])
    updates = [
        MaskedUpdate(torch.tensor([0, 1]), torch.tensor([2.0, 4.0]), 1.0),
        MaskedUpdate(torch.tensor([0, 1]), torch.tensor([6.0, 8.0]), 3.0),
    ]
    for rule in ("mask_aware", "global_average"):
        merged = merge(w_D, updates, rule=rule, parameters=1, server_step=0.5).w_D  # type: ignore[arg-type]
        assert merged.tolist() == [1.0 + 0.5 * 5.0, 7.0]


def test_running_variances_stay_positive_where_differences_would_not() -> None:
    """Two stale clients that each halved a variance since 8 must not take 8 off the 4 that it is now."""
    w_D = torch.tensor([4.0])
    updates = [MaskedUpdate(torch.tensor([0]), torch.tensor([4.0]), 1.0) for _ in range(2)]
    assert merge(w_D, updates, parameters=0).w_D.tolist() == [4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_is_a_new_vector_of_the_old_type(dtype: torch.dtype) -> None:
    w_D = torch.ones(3, dtype=dtype)
    update = MaskedUpdate(torch.tensor([0, 1, 2]), torch.ones(3, dtype=dtype), 1.0)
    merged = merge(w_D, [update]).w_D
    assert merged.dtype == dtype and merged.data_ptr() != w_D.data_ptr()
    assert w_D.tolist() == [1.0] * 3 and update.values_S.tolist() == [1.0] * 3


# -- staleness -------------------------------------------------------------------------------------


def test_staleness_weights_are_those_of_the_method_page() -> None:
    assert [staleness_weight("constant", t) for t in (0, 1, 100)] == [1.0, 1.0, 1.0]
    assert staleness_weight("polynomial", 3, exponent=0.5) == 0.5
    assert staleness_weight("polynomial", 1) == pytest.approx(2**-0.6)
    hinge = [staleness_weight("hinge", t, slope=2.0, delay=4.0) for t in (0, 4, 5, 6)]
    assert hinge == [1.0, 1.0, 1 / 3, 1 / 5]


@given(
    kind=st.sampled_from(["constant", "polynomial", "hinge"]),
    tau=st.integers(0, 10**6),
    exponent=st.floats(0, 1000),
    slope=st.floats(1e-3, 1e6),
    delay=st.floats(0, 100),
)
def test_staleness_weights_are_in_the_half_open_unit_interval_and_never_rise(
    kind: Any, tau: int, exponent: float, slope: float, delay: float
) -> None:
    options = {"exponent": exponent, "slope": slope, "delay": delay}
    assert staleness_weight(kind, 0, **options) == 1.0
    now, later = (staleness_weight(kind, t, **options) for t in (tau, tau + 1))
    assert 0 < later <= now <= 1
