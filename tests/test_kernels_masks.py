"""Nested masks: sizes, order, floor and bias pruning against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedgmr_plugin.kernels import ModelLayout, Ranking, blocks, build_layout, rank, scores
from fedgmr_plugin.kernels.masks import _bins, _rungs, prunable_values

few = settings(max_examples=max(10, settings().max_examples // 4))
LADDER = (0.05, 0.1, 0.2, 0.5, 1.0)


def brute_order(score: Sequence[float]) -> list[int]:
    """Positions by descending score, ties by position."""
    return sorted(range(len(score)), key=lambda j: (-score[j], j))


def brute_rungs(score: Sequence[float], counts: Sequence[int]) -> list[int]:
    rungs = [len(counts)] * len(score)
    for place, j in enumerate(brute_order(score)):
        rungs[j] = next((r for r, k in enumerate(counts) if place < k), len(counts))
    return rungs


class Mixed(nn.Module):
    """Every kind of entry: convolutions (plain, grouped, transposed), attention, embedding, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(2, 4, 2)
        self.grouped = nn.Conv1d(4, 6, 1, groups=2)
        self.up = nn.ConvTranspose2d(3, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.bn = nn.BatchNorm1d(4)
        self.hidden = nn.Linear(4, 7)
        self.out = nn.Linear(7, 2)


def world(seed: int, dtype: torch.dtype = torch.float32, ties: bool = False) -> tuple[ModelLayout, Tensor]:
    layout = build_layout(Mixed().to(dtype))
    generator = torch.Generator().manual_seed(seed)
    w_D = torch.randn(layout.size, dtype=dtype, generator=generator)
    return layout, (w_D * 2).round() / 2 if ties else w_D


def brute_masks(
    layout: ModelLayout,
    w_D: Tensor,
    score_P: Tensor,
    densities: Sequence[float],
    floor: float = 0.0,
    biases: bool = True,
) -> list[list[bool]]:
    """Masks by sorting everything, coordinate by coordinate."""
    prunable = [j for e in layout.of_kind("prunable") for j in range(e.offset, e.offset + e.size)]
    score = dict(zip(prunable, score_P.tolist(), strict=True))
    protected: set[int] = set()
    for e in layout.of_kind("prunable"):
        local = brute_order([abs(v) for v in w_D[e.slice].tolist()])
        protected |= {e.offset + j for j in local[: int(floor * e.size)]}
    order = sorted(prunable, key=lambda j: (j not in protected, -score[j], j))
    masks = []
    for d in densities:
        mask = [True] * layout.size
        kept = set(order[: int(d * layout.prunable)])
        for j in prunable:
            mask[j] = j in kept
        if biases:
            for b in layout.of_kind("bias"):
                weight = layout.by_name[b.rows or ""]
                grid = torch.tensor(mask[weight.offset : weight.offset + weight.size]).view(weight.shape)
                for unit in range(b.size):
                    mask[b.offset + unit] = bool(grid.select(weight.output_axis, unit).any())
        masks.append(mask)
    return masks


# -- ranking ---------------------------------------------------------------------------------------

special = st.sampled_from([0.0, -0.0, 1e-45, 1.4e-45, 2.0**-126, 2.0**-149, 1.0, 1.0, 3.4e38])
plain = st.floats(0, 1e6, width=32)


@given(
    score=st.lists(special | plain, min_size=1, max_size=60),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_rungs_equal_a_stable_sort(score: list[float], shares: list[float], dtype: torch.dtype) -> None:
    counts = sorted(int(share * len(score)) for share in shares)
    tensor = torch.tensor(score, dtype=dtype)
    assert _rungs(tensor.abs(), counts).tolist() == brute_rungs(tensor.abs().tolist(), counts)


@given(
    seed=st.integers(0, 2**32 - 1), size=st.integers(1, 3000), levels=st.sampled_from([1, 2, 5, 100, 10**6])
)
def test_rungs_of_many_elements_equal_a_stable_sort(seed: int, size: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    score = rng.integers(0, levels, size) / levels * 10.0 ** rng.integers(-30, 30)
    counts = sorted(rng.integers(0, size + 1, 5).tolist())
    for dtype in (torch.float32, torch.float64):
        tensor = torch.tensor(score, dtype=dtype)
        order = torch.argsort(tensor, descending=True, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(size)
        wanted = torch.searchsorted(torch.tensor(counts), place, right=True)
        assert torch.equal(_rungs(tensor, counts).long(), wanted)


@given(seed=st.integers(0, 2**32 - 1))
def test_elements_that_are_set_aside_rank_last(seed: int) -> None:
    rng = np.random.default_rng(seed)
    score = torch.tensor(rng.integers(0, 4, 40), dtype=torch.float32)
    aside = torch.tensor(rng.random(40) < 0.3)
    kept = score.masked_fill(aside, -1.0)
    counts = sorted(rng.integers(0, 41, 4).tolist())
    expected = brute_rungs(torch.where(aside, -1.0, score).tolist(), counts)
    assert _rungs(kept, counts).tolist() == expected


def test_negative_zero_and_subnormals_sort_where_their_values_do() -> None:
    for dtype, tiny in ((torch.float32, 2.0**-149), (torch.float64, 2.0**-1074)):
        score = torch.tensor([-1.0, -0.0, 0.0, tiny, 2 * tiny, 1.0, torch.finfo(dtype).max], dtype=dtype)
        bins = _bins(score)
        assert bins[0] == 0 and bins[1] == bins[2] == 1 and (bins.diff() >= 0).all() and bins[-1] <= 2**16
        assert _rungs(score, [1, 2, 3, 4, 6]).tolist() == [5, 4, 4, 3, 2, 1, 0]


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@few
@given(
    seed=st.integers(0, 2**31),
    densities=st.sets(st.floats(0.001, 1.0), min_size=1, max_size=5),
    floor=st.sampled_from([0.0, 0.02, 0.1, 0.37, 1.0]),
    biases=st.booleans(),
    ties=st.booleans(),
)
def test_masks_equal_brute_force(
    dtype: torch.dtype, seed: int, densities: set[float], floor: float, biases: bool, ties: bool
) -> None:
    layout, w_D = world(seed, dtype, ties)
    wanted = sorted(densities)
    score_P = scores("random", layout, w_D, generator=torch.Generator().manual_seed(seed))
    if seed % 2:
        score_P = scores("magnitude", layout, w_D)
    ranking = rank(layout, w_D, score_P, wanted, layer_floor=floor, prune_biases=biases)
    masks = brute_masks(layout, w_D, score_P, wanted, floor, biases)
    for rung, mask in enumerate(masks):
        assert ranking.mask(rung).tolist() == mask


@few
@given(seed=st.integers(0, 2**31), floor=st.sampled_from([0.0, 0.02, 0.5]))
def test_sizes_are_exact_masks_are_nested_and_supports_are_prefixes(seed: int, floor: float) -> None:
    layout, w_D = world(seed)
    densities = sorted({0.003, 0.3, 0.31, 0.9, *LADDER})
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), densities, layer_floor=floor)
    previous = torch.zeros(layout.size, dtype=torch.bool)
    for rung, density in enumerate(densities):
        mask, support = ranking.mask(rung), ranking.support(rung)
        assert int(prunable_values(layout, mask).sum()) == int(density * layout.prunable)
        assert (mask | ~previous).all()
        assert len(support) == int(mask.sum()) == ranking.ends[rung]
        assert torch.equal(support.sort().values, mask.nonzero().squeeze(1))
        if rung:
            smaller = ranking.support(rung - 1)
            assert torch.equal(support[: len(smaller)], smaller)
            increment = support[len(smaller) :]
            assert torch.equal(increment, (mask & ~previous).nonzero().squeeze(1))
        previous = mask
    assert ranking.mask(len(densities) - 1).all()


def test_what_is_never_pruned_is_in_every_mask() -> None:
    layout, w_D = world(1)
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), LADDER)
    for kind in ("dense", "buffer"):
        for entry in layout.of_kind(kind):
            assert ranking.mask(0)[entry.slice].all(), entry.name


def test_the_same_densities_in_another_ranking_give_the_same_masks() -> None:
    layout, w_D = world(2)
    score_P = scores("magnitude", layout, w_D)
    many = rank(layout, w_D, score_P, LADDER, layer_floor=0.02)
    one = rank(layout, w_D, score_P, [0.2], layer_floor=0.02)
    assert torch.equal(many.mask(many.rung(0.2)), one.mask(one.rung(0.2)))


def test_the_layer_floor_keeps_a_layer_that_would_otherwise_vanish() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False), nn.Linear(10, 2))
    layout = build_layout(model)
    w_D = layout.gather(model)
    w_D[layout.by_name["0.weight"].slice] = torch.arange(1.0, 101.0)
    w_D[layout.by_name["1.weight"].slice] = torch.arange(1.0, 101.0) * 1e-6
    small = layout.by_name["1.weight"].slice
    score_P = scores("magnitude", layout, w_D)
    without = rank(layout, w_D, score_P, [0.1]).mask(0)
    with_floor = rank(layout, w_D, score_P, [0.1], layer_floor=0.05).mask(0)
    assert int(without[small].sum()) == 0
    assert with_floor[small].nonzero().squeeze(1).tolist() == [95, 96, 97, 98, 99]  # its largest
    assert int(prunable_values(layout, with_floor).sum()) == 20


def test_the_layer_floor_goes_by_magnitude_whatever_the_score() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 2))
    layout = build_layout(model)
    w_D = layout.gather(model)
    w_D[:100] = torch.arange(100.0)
    score_P = torch.arange(100.0).flip(0)  # against the magnitude
    kept = rank(layout, w_D, score_P, [0.1], layer_floor=0.05).mask(0)[:100].nonzero().squeeze(1).tolist()
    assert kept == [0, 1, 2, 3, 4, 95, 96, 97, 98, 99]


def test_a_density_below_the_floor_takes_the_best_of_the_protected_weights() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 2))
    layout = build_layout(model)
    w_D = layout.gather(model)
    w_D[:100] = torch.arange(100.0)
    kept = rank(layout, w_D, scores("magnitude", layout, w_D), [0.03], layer_floor=0.5).mask(0)
    assert kept[:100].nonzero().squeeze(1).tolist() == [97, 98, 99]


def test_a_bias_is_inactive_exactly_if_its_whole_row_is_masked() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    layout = build_layout(model)
    w_D = layout.gather(model)
    w_D[:6] = torch.tensor([9.0, 1.0, 2.0, 3.0, 8.0, 4.0])  # rows (9, 1), (2, 3), (8, 4)
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), [1 / 3, 5 / 6])
    bias = layout.by_name["0.bias"].slice
    assert ranking.mask(0)[:6].tolist() == [True, False, False, False, True, False]
    assert ranking.mask(0)[bias].tolist() == [True, False, True]
    assert ranking.mask(1)[bias].tolist() == [True, True, True]
    kept = rank(layout, w_D, scores("magnitude", layout, w_D), [1 / 3], prune_biases=False)
    assert kept.mask(0)[bias].all()


def test_an_active_weight_that_is_zero_is_held() -> None:
    layout, w_D = world(3)
    w_D[:] = 0.0
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), LADDER)
    for rung, density in enumerate(LADDER):
        assert int(prunable_values(layout, ranking.mask(rung)).sum()) == int(density * layout.prunable)


# -- scores ----------------------------------------------------------------------------------------


def test_scores_are_what_they_say() -> None:
    layout, w_D = world(4)
    change_D = torch.randn(layout.size, generator=torch.Generator().manual_seed(9))
    w_P, change_P = prunable_values(layout, w_D), prunable_values(layout, change_D)
    costs = [2.0 ** (i - 3) for i, _ in enumerate(layout.of_kind("prunable"))]
    cost_P = torch.cat(
        [torch.full((e.size,), c) for e, c in zip(layout.of_kind("prunable"), costs, strict=True)]
    )
    assert torch.equal(scores("magnitude", layout, w_D), w_P.abs())
    assert torch.equal(scores("weight_change", layout, w_D, change_D=change_D), (w_P * change_P).abs())
    assert torch.equal(scores("per_cost", layout, w_D, cost_of_layer=costs), w_P.abs() / cost_P)
    assert len(w_P) == layout.prunable


def test_the_random_score_is_the_generators_and_not_the_weights() -> None:
    layout, w_D = world(5)
    first, again, other = (
        scores("random", layout, w, generator=torch.Generator().manual_seed(s))
        for w, s in ((w_D, 1), (w_D * 2, 1), (w_D, 2))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first >= 0).all() and (first < 1).all()


@pytest.mark.parametrize("score", ["weight_change", "per_cost", "random"])
def test_a_score_without_what_it_needs_is_refused(score: Any) -> None:
    layout, w_D = world(6)
    with pytest.raises(ValueError, match=score):
        scores(score, layout, w_D)


def test_per_cost_needs_one_cost_for_each_layer() -> None:
    layout, w_D = world(6)
    with pytest.raises(ValueError, match="argument 2"):
        scores("per_cost", layout, w_D, cost_of_layer=[1.0])


@few
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([2.0**-20, 0.5, 4.0, 2.0**30]))
def test_magnitude_masks_do_not_change_with_the_scale_or_the_signs_of_the_weights(
    seed: int, scale: float
) -> None:
    layout, w_D = world(seed)
    signs = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed + 1)).sign()
    first = rank(layout, w_D, scores("magnitude", layout, w_D), LADDER, layer_floor=0.1)
    other_D = w_D * signs * scale
    other = rank(layout, other_D, scores("magnitude", layout, other_D), LADDER, layer_floor=0.1)
    assert first.digest == other.digest


@few
@given(seed=st.integers(0, 2**31), rung=st.integers(0, len(LADDER) - 1))
def test_a_top_k_mask_contracts(seed: int, rung: int) -> None:
    """||w - m w||^2 <= (1 - k / P) ||w||^2 on the prunable coordinates, for magnitude without a floor."""
    layout, w_D = world(seed, torch.float64)
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), LADDER)
    w_P = prunable_values(layout, w_D)
    kept_P = prunable_values(layout, ranking.mask(rung))
    share = int(LADDER[rung] * layout.prunable) / layout.prunable
    assert float(w_P[~kept_P].square().sum()) <= (1 - share) * float(w_P.square().sum()) + 1e-12


# -- digest, coverage ------------------------------------------------------------------------------


def test_equal_weights_give_equal_masks_and_digests() -> None:
    layout, w_D = world(7, ties=True)
    first, second = (rank(layout, w, scores("magnitude", layout, w), LADDER) for w in (w_D, w_D.clone()))
    assert torch.equal(first.rung_D, second.rung_D) and first.digest == second.digest
    assert len(first.digest) == 16 and int(first.digest, 16) >= 0


@few
@given(seed=st.integers(0, 2**31), other=st.integers(0, 2**31))
def test_the_digest_changes_exactly_if_the_masks_do(seed: int, other: int) -> None:
    layout, w_D = world(seed, ties=True)
    changed_D = w_D.clone()
    changed_D[other % layout.size] += 0.25
    first, second = (rank(layout, w, scores("magnitude", layout, w), LADDER) for w in (w_D, changed_D))
    assert (first.digest == second.digest) == torch.equal(first.rung_D, second.rung_D)


def test_the_digest_depends_on_the_densities() -> None:
    rung_D = torch.zeros(4, dtype=torch.int16)
    assert Ranking((0.5,), rung_D).digest != Ranking((0.25,), rung_D).digest


def test_a_density_that_was_not_ranked_is_an_error() -> None:
    layout, w_D = world(8)
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), (0.5, 1.0))
    assert ranking.rung(0.5) == 0 and ranking.rung(1.0) == 1
    with pytest.raises(ValueError, match="not in"):
        ranking.rung(0.2)


@few
@given(
    seed=st.integers(0, 2**31),
    clients=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 1000)), min_size=1, max_size=12),
)
def test_coverage_is_the_share_of_the_clients_weight_that_holds_a_coordinate(
    seed: int, clients: list[tuple[int, int]]
) -> None:
    layout, w_D = world(seed)
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), LADDER)
    weight_R = [0.0] * len(LADDER)
    held_D = torch.zeros(layout.size, dtype=torch.float64)
    for rung, samples in clients:
        weight_R[rung] += samples
        held_D += samples * ranking.mask(rung)
    wanted_D = held_D / sum(samples for _, samples in clients)
    coverage_D = ranking.coverage(weight_R)
    assert coverage_D.dtype == torch.float32
    assert torch.allclose(coverage_D.double(), wanted_D, rtol=1e-6, atol=0)
    everywhere = ranking.mask(0)
    assert (coverage_D[everywhere] == 1.0).all()


def test_masks_of_a_large_model_are_ranked_in_reasonable_time() -> None:
    """A million weights sort in well under a second; the release needed seconds for its index lists."""
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 2))
    layout = build_layout(model)
    w_D = layout.gather(model)
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), LADDER, layer_floor=0.02)
    magnitude = w_D[:1_000_000].abs()
    for rung, density in enumerate(LADDER[:-1]):
        kept = magnitude[ranking.mask(rung)[:1_000_000]]
        assert len(kept) == int(density * 1_000_000)
        assert math.isclose(float(kept.min()), float(magnitude.sort().values[-len(kept)]))


@given(
    rungs=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    edges=st.lists(st.integers(0, 40), max_size=5),
    stop=st.integers(0, 40),
    length=st.sampled_from([1, 2, 7, 40, blocks.BLOCK]),
)
def test_the_order_is_that_of_rungs_and_then_of_coordinates(
    rungs: list[int], edges: list[int], stop: int, length: int
) -> None:
    """However long the blocks are in which a ranking remembers it."""
    order = sorted(range(len(rungs)), key=lambda j: (rungs[j], j))
    edges, stop = sorted(min(e, len(rungs)) for e in edges), min(stop, len(rungs))
    flat_D = torch.arange(100, 100 + len(rungs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", length)
        ranking = Ranking((0.1, 0.2, 0.3), torch.tensor(rungs, dtype=torch.int16))
        assert ranking.order_D.tolist() == order
        assert ranking.ranked(flat_D).tolist() == [100 + j for j in order]
        assert torch.equal(ranking.flat(ranking.ranked(flat_D)), flat_D)
        for rung, end in enumerate(ranking.ends):
            assert ranking.support(rung).tolist() == order[:end]
            assert ranking.cut(flat_D, rung).tolist() == [100 + j for j in order[:end]]
        placed_D = ranking.place(torch.arange(stop), torch.full((len(rungs),), -1)).tolist()
        assert placed_D == [order.index(j) if j in order[:stop] else -1 for j in range(len(rungs))]
        for rung, places in enumerate(ranking.crossings(edges)):
            for (low, high), (a, b) in zip(
                itertools.pairwise(edges), itertools.pairwise(places), strict=True
            ):
                assert order[a:b] == [j for j in range(low, high) if rungs[j] == rung]


def test_a_vector_with_a_gradient_is_cut_like_any_other() -> None:
    """As `ModelLayout.gather` does, a payload leaves the graph behind."""
    ranking = Ranking((0.5,), torch.tensor([1, 0, 1, 0], dtype=torch.int16))
    flat_D = torch.arange(4.0, requires_grad=True)
    for values, expected in ((ranking.cut(flat_D, 0), [1, 3]), (ranking.ranked(flat_D), [1, 3, 0, 2])):
        assert values.tolist() == expected and not values.requires_grad
