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

from fedgmr_plugin.kernels import MaskedUpdate, Ranking, aggregate, blocks, merge, staleness_weight

SIZE = 6
few = settings(max_examples=max(10, settings().max_examples // 5))


class Case(NamedTuple):
    """A global vector and updates with dyadic values: sums of them are exact in float64.

    `home` is the ranking of the global vector: a rung per coordinate. An update is cut from it (`rung`), or,
    as a stale client's, from another ranking (`rung` None). It holds `index`, in the order of its payload.
    """

    w: list[float]
    home: list[int]
    updates: list[tuple[int | None, list[int], list[float], float]]


dyadic = st.integers(-(2**10), 2**10).map(lambda i: i / 64)


@st.composite
def cases(draw: st.DrawFn, whole: bool = False, buffers: int = 0) -> Case:
    """`whole`: everybody holds everything; the last `buffers` coordinates are in rung 0."""
    w = draw(st.lists(dyadic, min_size=SIZE, max_size=SIZE))
    home = draw(st.lists(st.integers(0, 3), min_size=SIZE, max_size=SIZE))
    home[SIZE - buffers :] = [0] * buffers
    updates = []
    for _ in range(draw(st.integers(1, 5))):
        rung = draw(st.sampled_from([0, 1, 2, None]))
        if whole:
            rung, held = (None, list(range(SIZE))) if rung is None or 3 in home else (2, ordered(home, 2))
        elif rung is None:
            held = [j for j in range(SIZE) if j >= SIZE - buffers or draw(st.booleans())]
        else:
            held = ordered(home, rung)
        values = draw(st.lists(dyadic, min_size=len(held), max_size=len(held)))
        updates.append((rung, held, values, draw(st.integers(1, 64)) / 8))
    return Case(w, home, updates)


def ordered(rungs: list[int], rung: int) -> list[int]:
    """Coordinates of a rung's sub-model, in the order of its payload."""
    return sorted((j for j, r in enumerate(rungs) if r <= rung), key=lambda j: (rungs[j], j))


def update(index: list[int], values: Any, weight: float, size: int = SIZE) -> MaskedUpdate:
    """An update that holds `index` (increasing), of a ranking of its own."""
    rung_D = torch.ones(size, dtype=torch.int16)
    rung_D[torch.tensor(index, dtype=torch.int64)] = 0
    return MaskedUpdate(Ranking((0.5,), rung_D), 0, torch.as_tensor(values), weight)


def tensors(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Ranking, list[MaskedUpdate]]:
    home = Ranking((0.1, 0.4, 0.9), torch.tensor(case.home, dtype=torch.int16))
    updates = []
    for rung, index, values, weight in case.updates:
        values_S = torch.tensor(values, dtype=dtype)
        updates.append(
            update(index, values_S, weight) if rung is None else MaskedUpdate(home, rung, values_S, weight)
        )
    return torch.tensor(case.w, dtype=dtype), home, updates


def flat(size: int) -> Ranking:
    """The ranking whose order is the layout's."""
    return Ranking((1.0,), torch.zeros(size, dtype=torch.int16))


def merged(w_D: Tensor, home: Ranking, updates: list[MaskedUpdate], **options: Any) -> Tensor:
    """The merged vector in the layout's order."""
    return home.flat(merge(home.ranked(w_D), home, updates, **options).w_D)


def oracle(
    case: Case,
    rule: str = "mask_aware",
    form: str = "delta",
    buffers: int = 0,
    server_step: float = 1.0,
    participation: float = 1.0,
) -> list[Fraction]:
    """The formulas of the method page, section 5, coordinate by coordinate, without rounding."""
    result = []
    total = sum(Fraction(c) for *_, c in case.updates)
    for j, old in enumerate(map(Fraction, case.w)):
        held = [(Fraction(c), Fraction(v[i.index(j)])) for _, i, v, c in case.updates if j in i]
        top, bottom = sum(c * x for c, x in held), sum(c for c, _ in held)
        if j >= SIZE - buffers:
            new = top / bottom if held else old
        elif rule == "plain_average":
            new = Fraction(top) / total
        elif rule == "global_average":
            new = old + (Fraction(top) - (0 if form == "delta" else bottom * old)) / total
        elif form == "delta":
            new = old + top / bottom if held else old
        else:
            new = top / bottom if held else old
        if j < SIZE - buffers:
            new = old + Fraction(server_step) * (new - old)
        result.append(Fraction(participation) * new + (1 - Fraction(participation)) * old)
    return result


def near(values: Tensor, case: Case, **options: Any) -> bool:
    """Whether float32 `values` are within the bound that the kernel states of the exact ones."""
    u, form, rule = Fraction(1, 2**24), options.get("form", "delta"), options.get("rule", "mask_aware")
    total = sum(Fraction(c) for *_, c in case.updates)
    for j, (got, wanted) in enumerate(zip(values.tolist(), oracle(case, **options), strict=True)):
        is_buffer = j >= SIZE - options.get("buffers", 0)
        held = [(Fraction(c), Fraction(v[i.index(j)])) for _, i, v, c in case.updates if j in i]
        base = Fraction(case.w[j]) if form == "replacement" or is_buffer else Fraction(0)
        by = sum(c for c, _ in held) if rule == "mask_aware" or is_buffer else total
        moved = sum(c * abs(x - base) for c, x in held) / by if held else Fraction(0)
        kept = abs(Fraction(case.w[j])) * (3 if rule == "plain_average" else 1)
        if abs(Fraction(got) - wanted) > u * (
            abs(wanted) + (len(held) + 3) * moved + kept * (rule == "plain_average")
        ):
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
    {"buffers": 2},
    {"buffers": 3, "form": "replacement"},
    {"buffers": 2, "rule": "global_average", "server_step": 0.5},
    {"buffers": 2, "rule": "plain_average", "form": "replacement", "participation": 0.5},
]


def label(options: dict[str, Any]) -> str:
    return "-".join(str(v) for v in options.values()) or "default"


def drawn(options: dict[str, Any]) -> st.SearchStrategy[Case]:
    return cases(buffers=options.get("buffers", 0))


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@few
@given(data=st.data())
def test_merging_equals_the_exact_oracle(options: dict[str, Any], data: st.DataObject) -> None:
    case = data.draw(drawn(options))
    assert near(merged(*tensors(case), **options), case, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@few
@given(data=st.data())
def test_the_order_of_the_updates_does_not_matter_where_sums_are_exact(
    options: dict[str, Any], data: st.DataObject
) -> None:
    w_D, home, updates = tensors(data.draw(drawn(options)))
    shuffled = data.draw(st.permutations(updates))
    assert torch.equal(merged(w_D, home, updates, **options), merged(w_D, home, shuffled, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@few
@given(data=st.data())
def test_prefixes_and_strangers_merge_alike(options: dict[str, Any], data: st.DataObject) -> None:
    """The same updates, cut from the vector's own ranking and from others."""
    case = data.draw(drawn(options))
    w_D, home, updates = tensors(case)
    strangers = Case(case.w, [0] * SIZE, [(None, *resorted(i, v), c) for _, i, v, c in case.updates])
    _, away, others = tensors(strangers)
    result = merge(w_D, away, others, **options)
    assert near(result.w_D, case, **options)
    coverage = merge(home.ranked(w_D), home, updates, **options).coverage
    assert coverage[:-1] == result.coverage[:-1]
    assert coverage.shares == pytest.approx(result.coverage.shares, rel=1e-15)


def resorted(index: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    pairs = sorted(zip(index, values, strict=True))
    return [i for i, _ in pairs], [v for _, v in pairs]


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@few
@given(data=st.data(), power=st.integers(-20, 20))
def test_scaling_all_weights_by_a_power_of_two_changes_nothing(
    options: dict[str, Any], data: st.DataObject, power: int
) -> None:
    w_D, home, updates = tensors(data.draw(drawn(options)))
    scaled = [u._replace(weight=u.weight * 2.0**power) for u in updates]
    assert torch.equal(merged(w_D, home, updates, **options), merged(w_D, home, scaled, **options))


@pytest.mark.parametrize("size", [blocks.BLOCK - 1, blocks.BLOCK, 2 * blocks.BLOCK + 3])
@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_vectors_longer_than_a_block_merge_like_short_ones(size: int, form: Any) -> None:
    """Against the formula on whole vectors, for prefixes and for several rankings."""
    generator = torch.Generator().manual_seed(size)
    w_D = torch.randn(size, generator=generator)
    home, other = (
        Ranking((0.2, 0.5, 1.0), torch.randint(0, 3, (size,), generator=generator, dtype=torch.int16))
        for _ in range(2)
    )
    for rankings in ([home] * 4, [home, other, other, home]):
        updates, sums, weights = [], torch.zeros(size).double(), torch.zeros(size).double()
        for n, ranking in enumerate(rankings):
            rung = n % 3
            values_S = torch.randn(ranking.ends[rung], generator=generator)
            updates.append(MaskedUpdate(ranking, rung, values_S, 1.0 + n))
            sums[ranking.support(rung)] += (1.0 + n) * values_S.double()
            weights[ranking.support(rung)] += 1.0 + n
        mean = sums / weights + (w_D if form == "delta" else 0)
        wanted = torch.where(weights > 0, mean, w_D.double()).float()
        got = merged(w_D, home, updates, form=form)
        assert torch.allclose(got, wanted, rtol=2**-23, atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@few
@given(data=st.data(), length=st.integers(1, SIZE))
def test_the_length_of_a_block_changes_nothing(
    options: dict[str, Any], data: st.DataObject, length: int
) -> None:
    """Values, their bits, and coverage, whichever block has which combination of holders first."""
    case = data.draw(drawn(options))
    w_D, home, updates = tensors(case)
    expected = merge(home.ranked(w_D), home, updates, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", length)
        w_D, home, updates = tensors(case)
        result = merge(home.ranked(w_D), home, updates, **options)
    assert torch.equal(result.w_D, expected.w_D) and result.coverage == expected.coverage


@pytest.mark.parametrize("options", OPTIONS, ids=label)
@few
@given(data=st.data())
def test_equal_masks_are_one_ranking_whoever_holds_them(options: dict[str, Any], data: st.DataObject) -> None:
    """A ranking that was sent, saved or found anew is another object with the same digest."""
    case = data.draw(drawn(options))
    w_D, home, updates = tensors(case)

    def twin(ranking: Ranking) -> Ranking:
        return Ranking(ranking.densities, ranking.rung_D.clone())

    others = [u._replace(ranking=twin(u.ranking)) for u in updates]
    stale = update([0, SIZE - 1], [1.0] * 2, 0.5)
    if options.get("buffers"):
        stale = update([0, *range(SIZE - options["buffers"], SIZE)], [1.0] * (1 + options["buffers"]), 0.5)
    for more in ([], [stale]):
        expected = merge(home.ranked(w_D), home, [*updates, *more], **options)
        out = torch.full((SIZE,), math.nan)
        result = merge(home.ranked(w_D), home, [*others, *more], **options, out=out)
        assert torch.equal(result.w_D, expected.w_D) and result.coverage == expected.coverage


@pytest.mark.parametrize("most", [1, 9, 2**16])
def test_more_combinations_of_rungs_than_a_table_holds(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine rankings of seven rungs: the numbers of combinations do not change a bit of the result."""
    generator = torch.Generator().manual_seed(0)
    size, ladder = 3000, (0.02, 0.05, 0.1, 0.2, 0.5, 0.9)
    w_D = torch.randn(size, generator=generator)
    home, *others = (
        Ranking(ladder, torch.randint(0, 7, (size,), generator=generator, dtype=torch.int16))
        for _ in range(9)
    )
    updates = [
        MaskedUpdate(r, n % 6, torch.randn(r.ends[n % 6], generator=generator), 1.0 + n % 4)
        for n, r in enumerate([home, *others, *others[::2], home])
    ]
    unlimited = merge(home.ranked(w_D), home, updates)
    monkeypatch.setattr(aggregate, "_MOST_COMBINATIONS", most)
    result = merge(home.ranked(w_D), home, updates)
    assert torch.equal(result.w_D, unlimited.w_D)
    assert result.coverage == unlimited.coverage
    holders = torch.stack([u.ranking.mask(u.rung) for u in updates])
    weights = (holders * torch.tensor([u.weight for u in updates]).double()[:, None]).sum(0)
    assert result.coverage.held == int(holders.sum())
    assert result.coverage.uncovered == int((weights == 0).sum())
    assert result.coverage.least_holders == int(holders.sum(0)[weights > 0].min())
    shares = [u.weight / float(weights[h].min()) for u, h in zip(updates, holders, strict=True)]
    assert result.coverage.shares == pytest.approx(shares, rel=1e-15)


COVERED = [o for o in OPTIONS if o.get("rule") != "plain_average"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", COVERED, ids=label)
@few
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_uncovered_coordinates_are_untouched(
    options: dict[str, Any], dtype: torch.dtype, data: st.DataObject, seed: int
) -> None:
    case = data.draw(drawn(options))
    _, home, updates = tensors(case, dtype)
    w_D = torch.randn(SIZE, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    free = [j for j in range(SIZE) if not any(j in index for _, index, _, _ in case.updates)]
    assert torch.equal(merged(w_D, home, updates, **options)[free], w_D[free])


@pytest.mark.parametrize("options", COVERED, ids=label)
def test_a_negative_zero_that_nobody_holds_keeps_its_sign(options: dict[str, Any]) -> None:
    """Bit for bit untouched: the model's SHA-256 sees the difference."""
    buffers = options.get("buffers", 0)
    w_D = torch.tensor([-0.0, 1.0, -0.0, -0.0, -0.0] + [1.0] * buffers)
    held = [1, *range(5, 5 + buffers)]
    u = update(held, torch.full((len(held),), 2.0), 1.0, size=len(w_D))
    for home in (u.ranking, flat(len(w_D))):
        assert merged(w_D, home, [u], **options)[[0, 2, 3, 4]].signbit().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixing_leaves_uncovered_coordinates_untouched_whatever_the_share(dtype: torch.dtype) -> None:
    """P w + (1 - P) w is not w in floating point."""
    w_D = torch.rand(2000, dtype=dtype, generator=torch.Generator().manual_seed(1))
    u = update([0], torch.tensor([1.0], dtype=dtype), 1.0, size=2000)
    for share in (0.1, 0.3, 0.7):
        for home in (u.ranking, flat(2000)):
            assert torch.equal(merged(w_D, home, [u], participation=share)[1:], w_D[1:])


def test_plain_average_counts_zeros_for_those_who_lack_a_coordinate() -> None:
    w_D = torch.tensor([8.0, 8.0, 8.0])
    updates = [update([0, 1], [4.0, 2.0], 1.0, size=3), update([0], [1.0], 3.0, size=3)]
    for home in (flat(3), updates[0].ranking):
        result = merged(w_D, home, updates, rule="plain_average", form="replacement")
        assert result.tolist() == [1.75, 0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@few
@given(seed=st.integers(0, 2**31), weight=st.floats(1e-6, 1e9))
def test_replacement_by_one_full_holder_returns_its_values(
    dtype: torch.dtype, seed: int, weight: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w_D, x_D = (torch.randn(50, dtype=dtype, generator=generator) for _ in range(2))
    ranking = Ranking((0.3, 1.0), torch.randint(0, 2, (50,), generator=generator, dtype=torch.int16))
    u = MaskedUpdate(ranking, 1, x_D, weight)
    for home in (ranking, flat(50)):
        assert torch.equal(ranking.ranked(merged(w_D, home, [u], form="replacement")), x_D)
    alone = merged(w_D, ranking, [u])
    assert torch.equal(ranking.ranked(alone), ranking.ranked(w_D) + x_D)


@few
@given(case=cases(), value=dyadic)
def test_merging_equal_weights_returns_them(case: Case, value: float) -> None:
    """Idempotence of the replacement form: everybody agrees, so the mean is what they agree on."""
    w_D = torch.full((SIZE,), value)
    _, home, updates = tensors(case)
    updates = [u._replace(values_S=torch.full_like(u.values_S, value)) for u in updates]
    assert torch.equal(merged(w_D, home, updates, form="replacement"), w_D)
    nothing = [u._replace(values_S=torch.zeros_like(u.values_S)) for u in updates]
    assert torch.equal(merged(w_D, home, nothing, form="delta"), w_D)
    assert torch.equal(merged(w_D, home, nothing, form="delta", rule="global_average"), w_D)


@few
@given(case=cases(whole=True))
def test_with_full_masks_and_no_delay_both_forms_and_both_normalisations_agree(case: Case) -> None:
    w_D, home, updates = tensors(case, torch.float64)
    deltas = [u._replace(values_S=u.values_S - w_D[u.index_S]) for u in updates]
    wanted = merged(w_D, home, updates, form="replacement")
    close = {"rtol": 1e-12, "atol": 1e-12}
    for options in ({"form": "delta"}, {"form": "delta", "rule": "global_average"}):
        assert torch.allclose(merged(w_D, home, deltas, **options), wanted, **close)
    for rule in ("global_average", "plain_average"):
        result = merged(w_D, home, updates, form="replacement", rule=rule)
        assert torch.allclose(result, wanted, **close)


@few
@given(case=cases())
def test_merged_values_lie_between_the_holders(case: Case) -> None:
    for j, value in enumerate(merged(*tensors(case), form="replacement").tolist()):
        held = [v[i.index(j)] for _, i, v, _ in case.updates if j in i]
        low, high = min(held, default=case.w[j]), max(held, default=case.w[j])
        assert low - 2**-18 <= value <= high + 2**-18


@few
@given(case=cases(buffers=1))
def test_coverage_is_that_of_the_parameters(case: Case) -> None:
    """And pi_nj = c_n m_nj / sum_k c_k m_kj sums to 1 where somebody holds j."""
    w_D, home, updates = tensors(case)
    coverage = merge(home.ranked(w_D), home, updates, buffers=1).coverage
    holders = [sum(j in i for _, i, _, _ in case.updates) for j in range(SIZE - 1)]
    assert coverage.uncovered == holders.count(0)
    assert coverage.least_holders == min((h for h in holders if h), default=0)
    assert coverage.held == sum(holders)
    weight = [sum(c for _, i, _, c in case.updates if j in i) for j in range(SIZE)]
    for (_, index, _, c), share in zip(case.updates, coverage.shares, strict=True):
        assert share == pytest.approx(max((c / weight[j] for j in index), default=0.0), rel=1e-15)


def test_fewer_but_heavier_holders_in_a_later_block_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 3)
    held = {1.0: [0, 1, 2], 1.5: [0, 1, 2], 2.0: [0], 10.0: [1, 3], 11.0: [2, 3]}
    updates = [update(index, [1.0] * len(index), weight, size=4) for weight, index in held.items()]
    coverage = merge(torch.zeros(4), flat(4), updates).coverage
    assert coverage.least_holders == 2 and coverage.uncovered == 0
    assert coverage.shares == (1 / 4.5, 1.5 / 4.5, 2 / 4.5, 10 / 12.5, 11 / 13.5)


@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_a_weight_beyond_float32_counts_where_its_client_is_alone(form: Any) -> None:
    w_D = torch.tensor([1.0, 2.0])
    updates = [update([0, 1], [3.0, 4.0], 1e-300, size=2), update([0], [5.0], 1e9, size=2)]
    for home in (flat(2), Ranking((0.5, 1.0), torch.tensor([0, 1], dtype=torch.int16))):
        result = merge(home.ranked(w_D), home, updates, form=form)
        assert result.w_D.tolist() == ([6.0, 6.0] if form == "delta" else [5.0, 4.0])
        assert result.coverage.shares == (1.0, 1.0)


def test_buffers_are_averaged_as_values_whatever_the_form_and_never_stepped() -> None:
    w_D = torch.tensor([1.0, 10.0])
    updates = [update([0, 1], [2.0, 4.0], 1.0, size=2), update([0, 1], [6.0, 8.0], 3.0, size=2)]
    for rule in ("mask_aware", "global_average"):
        result = merged(w_D, flat(2), updates, rule=rule, buffers=1, server_step=0.5)
        assert result.tolist() == [1.0 + 0.5 * 5.0, 7.0]


def test_running_variances_stay_positive_where_differences_would_not() -> None:
    """Two stale clients that each halved a variance since 8 must not take 8 off the 4 that it is now."""
    updates = [update([0], [4.0], 1.0, size=1) for _ in range(2)]
    assert merged(torch.tensor([4.0]), flat(1), updates, buffers=1).tolist() == [4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_is_a_new_vector_of_the_old_type_or_the_one_given(dtype: torch.dtype) -> None:
    w_D = torch.ones(3, dtype=dtype)
    u = update([0, 1, 2], torch.ones(3, dtype=dtype), 1.0, size=3)
    result = merge(w_D, flat(3), [u]).w_D
    assert result.dtype == dtype and result.data_ptr() != w_D.data_ptr()
    assert w_D.tolist() == [1.0] * 3 and u.values_S.tolist() == [1.0] * 3
    spare_D = torch.full_like(w_D, math.nan)
    assert merge(w_D, flat(3), [u], out=spare_D).w_D is spare_D and spare_D.tolist() == [2.0] * 3


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
