"""Every pointwise inequality on generated windows: 1,000 examples each, 10,000 in the profile `thorough`.

A failing example is shrunk by hypothesis to a readable problem. Each bound is evaluated by its numpy
function from `theory.numeric`, so that a wrong constant in `theory.bounds` shows here or in the oracles.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from theory import numeric
from theory.laboratory import Decomposition, decompose, mask, merge, ranking, shares
from theory.strategies import OneWindow, dyadics, quadratics, restored, top_k_masks, vectors, weights, windows

THOROUGH = settings.get_current_profile_name() == "thorough"
EXAMPLES = int(os.environ.get("THEORY_EXAMPLES", 10_000 if THOROUGH else 1_000))
many = settings(max_examples=EXAMPLES)


def below(lhs: float, rhs: float, scale: float = 1.0) -> bool:
    """lhs <= rhs up to the rounding of float64 sums of numbers of size `scale`."""
    return lhs <= rhs + 1e-12 * max(scale, abs(lhs), abs(rhs))


def sq(x: np.ndarray) -> float:
    return float(x @ x)


def exact(window: OneWindow, form: str = "delta") -> Decomposition:
    return decompose(window.problem, window.w, window.arrivals, gamma=window.gamma, form=form)  # type: ignore[arg-type]


def column(found: Decomposition, key: str) -> np.ndarray:
    return np.array([part[key] for part in found.parts])


def smoothness(window: OneWindow) -> float:
    value = window.problem.smoothness
    assert value is not None
    return value


@many
@given(windows(), st.sampled_from(("delta", "replacement")))
def test_the_decomposition_is_an_identity(window: OneWindow, form: str) -> None:
    found = exact(window, form)
    scale = np.sqrt(max(found.scale_sq, sq(window.w) / window.gamma**2, 1e-300))
    assert np.linalg.norm(found.residual) <= 1e-13 * max(scale, 1.0) * 10


@many
@given(windows())
def test_shares_are_convex_on_covered_coordinates(window: OneWindow) -> None:
    pi = shares(window.arrivals, len(window.w))
    total = pi.sum(axis=0)
    held = np.any([a.mask_D for a in window.arrivals], axis=0) if window.arrivals else np.zeros(len(window.w))
    assert np.all(np.abs(total - held) <= 1e-15 * 8)
    assert np.all(pi >= 0)


@many
@given(quadratics(), st.data(), st.floats(1e-3, 1.0))
def test_descent(problem: Any, data: st.DataObject, fraction: float) -> None:
    """I0 for any step whatever, with gamma = fraction / L."""
    n = problem.size
    w, after = data.draw(vectors(n)), data.draw(vectors(n))
    L = problem.smoothness
    gamma = fraction / L if L > 0 else 1.0
    loss = [np.mean([problem.loss(c, x) for c in range(problem.clients)]) for x in (w, after)]
    grad = np.mean([problem.grad(c, w) for c in range(problem.clients)], axis=0)
    step = after - w
    values: dict[str, Any] = {
        "step_sq": sq(step),
        "grad_dot_step": grad @ step,
        "grad_sq": sq(grad),
        "gamma": gamma,
    }
    e_sq = numeric.error_sq(**values)
    direct = sq(-step / gamma - grad)
    assert below(abs(e_sq - direct), 0.0, scale=max(direct, sq(step) / gamma**2))
    bound = numeric.descent(F=loss[0], gamma=gamma, grad_sq=sq(grad), e_sq=e_sq)
    assert below(loss[1], bound, scale=gamma * max(e_sq, sq(grad)) + abs(loss[0]))


@many
@given(windows(noise=True))
def test_merged_terms_are_at_most_the_clients_own(window: OneWindow) -> None:
    found = exact(window)
    pibar = column(found, "pibar")
    for letter, name in (("M", "mask"), ("S", "staleness"), ("D", "drift")):
        own = {f"{letter}_n_sq": column(found, f"{letter}_sq"), "pibar": pibar}
        assert below(sq(getattr(found, letter)), numeric.function(f"{name}_merge")(**own), found.scale_sq)


@many
@given(windows())
def test_term_bounds(window: OneWindow) -> None:
    found, L = exact(window), smoothness(window)
    pibar = column(found, "pibar")
    scale = found.scale_sq
    assert below(sq(found.M), numeric.mask(L=L, pibar=pibar, mask_sq=column(found, "mask_sq")), scale)
    assert below(sq(found.S), numeric.staleness(L=L, pibar=pibar, stale_sq=column(found, "stale_sq")), scale)
    assert below(sq(found.D), numeric.drift(L=L, pibar=pibar, drift_sq=column(found, "drift_sq")), scale)
    assert below(sq(found.H), numeric.heterogeneity(pibar=pibar, gap_sq=column(found, "gap_sq")), scale)
    for letter, distance in (("M", "mask_sq"), ("S", "stale_sq"), ("D", "drift_sq")):
        for part in found.parts:
            limit = L**2 * part[distance]
            assert below(part[f"{letter}_sq"], limit, scale)


@many
@given(windows())
def test_uncovered_gradient(window: OneWindow) -> None:
    found = exact(window)
    held = (
        np.any([a.mask_D for a in window.arrivals], axis=0)
        if window.arrivals
        else np.zeros(len(window.w), bool)
    )
    assert sq(found.U) == sq(found.grad[~held])
    assert not (np.any(found.U) and any(a.mask_D.all() for a in window.arrivals))
    others = [found.z, found.D, found.M, found.S, found.H, found.rho]
    assert all(not np.any(v[~held]) for v in others)


@many
@given(windows())
def test_replacement_residual(window: OneWindow) -> None:
    found = exact(window, "replacement")
    limit = numeric.residual(pibar=column(found, "pibar"), stale_sq=column(found, "stale_sq"))
    assert below(sq(found.rho), limit)
    assert not np.any(exact(window, "delta").rho)


@many
@given(windows(), st.sampled_from(("delta", "replacement")))
def test_split(window: OneWindow, form: str) -> None:
    found = exact(window, form)
    squares = {f"{name}_sq": sq(vector) for name, vector in found.terms.items()}
    limit = (
        numeric.split_delta(**{k: squares[k] for k in ("D_sq", "M_sq", "S_sq", "H_sq", "U_sq")})
        if form == "delta"
        else numeric.split_replacement(
            gamma=window.gamma, **{k: squares[k] for k in ("D_sq", "M_sq", "S_sq", "H_sq", "U_sq", "rho_sq")}
        )
    )
    assert below(sq(found.bias), limit, found.scale_sq)


@many
@given(windows())
def test_update(window: OneWindow) -> None:
    found = exact(window)
    step = merge(window.w, window.arrivals, "delta") - window.w
    limit = numeric.update(pibar=column(found, "pibar"), change_sq=column(found, "change_sq"))
    assert below(sq(step), limit, sq(window.w))


@many
@given(st.lists(vectors(3), min_size=2, max_size=6))
def test_path(models: list[np.ndarray]) -> None:
    steps = sum(sq(b - a) for a, b in pairwise(models))
    assert below(sq(models[-1] - models[0]), numeric.path(tau=len(models) - 1, path_sq=steps))


@many
@given(top_k_masks(size=7))
def test_topk(drawn: tuple[np.ndarray, list[np.ndarray]]) -> None:
    w, masks = drawn
    for keep in masks:
        q = 1 - keep.sum() / len(w)
        assert below(sq(w[~keep]), numeric.topk(q=q, prunable_sq=sq(w)))


def test_topk_fails_with_the_nominal_density() -> None:
    """With k = floor(d D_p) the factor 1 - d is too small: equal weights, d = 1/4 of 10, k = 2."""
    w = np.ones(10)
    assert sq(w[2:]) > (1 - 0.25) * sq(w)
    assert sq(w[2:]) == numeric.topk(q=1 - 2 / 10, prunable_sq=sq(w))


@many
@given(st.lists(vectors(5, signed=False), min_size=1, max_size=3), dyadics(1, 8), dyadics(1, 8))
def test_floored_topk(layers: list[np.ndarray], floor: float, density: float) -> None:
    sizes = tuple(map(len, layers))
    w, total = np.concatenate(layers), sum(sizes)
    kept = [int(floor * n) for n in sizes]
    k = int(density * total)
    assume(sum(kept) <= k < total)
    order = ranking(w, np.ones(total, dtype=bool), floor=floor, layers=sizes)
    left_out = w[order[k:]]
    least = min(c / n for c, n in zip(kept, sizes, strict=True))
    limit = numeric.floored_topk(phi_floor=least, k_floor=sum(kept), D_p=total, k=k, prunable_sq=sq(w))
    assert below(sq(left_out), limit)


def test_a_proportional_floor_costs_nothing() -> None:
    """If every layer keeps exactly the same share, equation 13 is equation 12."""
    for share in (0.25, 0.5):
        limit = numeric.floored_topk(phi_floor=share, k_floor=share * 16, D_p=16, k=10, prunable_sq=3.0)
        assert abs(limit - numeric.topk(q=1 - 10 / 16, prunable_sq=3.0)) < 1e-15


@many
@given(vectors(6), st.lists(vectors(6, limit=4), min_size=1, max_size=3), st.floats(0.01, 1.0))
def test_aged_topk(w: np.ndarray, moves: list[np.ndarray], density: float) -> None:
    order = ranking(w, np.ones(6, dtype=bool))
    gone = order[int(density * 6) :]
    later = w + np.sum(moves, axis=0)
    theta = 1 - int(density * 6) / 6
    path = sum(map(sq, moves))
    limit = numeric.aged_topk(theta=theta, ranked_sq=sq(w), age=len(moves), aged_path_sq=path)
    assert below(sq(later[gone]), limit)


def test_topk_of_an_aged_ranking_needs_the_path() -> None:
    """A ranking of an older model contracts nothing of a newer one by itself."""
    old, new = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    gone = ranking(old, np.ones(2, dtype=bool))[1:]
    assert sq(new[gone]) > 0.5 * sq(new)


@many
@given(windows(uniform=True, noise=False, least=1))
def test_coverage_with_uniform_weights(window: OneWindow) -> None:
    pi = shares(window.arrivals, len(window.w))
    holders = np.sum([a.mask_D for a in window.arrivals], axis=0)
    assume(holders.any())
    fewest = holders[holders > 0].min()
    pibar = pi.max(axis=1)
    assert below(float((pibar * fewest).max()), numeric.coverage(kappa=1.0))
    assert below(float(pibar.sum()), len(pibar) / fewest)
    assert below(float(np.square(pibar).sum()), len(pibar) / fewest**2)


@many
@given(windows(nested=True, noise=False, least=1), st.booleans())
def test_nested_coverage_and_rank_gap(window: OneWindow, equal: bool) -> None:
    arrivals = [a._replace(weight=1.0) if equal else a for a in window.arrivals]
    pi = shares(arrivals, len(window.w))
    pibar = pi.max(axis=1)
    weight, size = np.array([a.weight for a in arrivals]), np.array([a.mask_D.sum() for a in arrivals])
    held = size > 0
    assume(held.all())
    densest = weight[size == size.max()].sum()
    assert below(float(pibar.sum()), numeric.nested_coverage(weight_sum=weight.sum(), weight_dense=densest))
    prunable = window.problem.prunable
    q = np.array([1 - (a.mask_D & prunable).sum() / prunable.sum() for a in arrivals])
    rank = np.empty(len(q))
    rank[np.argsort(-size, kind="stable")] = np.arange(1, len(q) + 1)
    kappa = weight.max() / weight.min()
    assert below(float(pibar @ q), numeric.rank_gap(kappa=kappa, q=q, rank=rank))
    if equal:
        harmonic = (1 / np.arange(1, len(q) + 1)).sum()
        assert below(float(pibar.sum()), harmonic)
        assert below(float(np.square(pibar).sum()), np.pi**2 / 6)
        chain = np.array([1 / (size >= own).sum() for own in size])
        assert np.allclose(pibar, chain, rtol=1e-14)


@many
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), st.data())
def test_restoration_lowers_the_average_and_the_ranked_gap(before: list[float], data: st.DataObject) -> None:
    after = data.draw(restored(before))
    q0, q = 1 - np.array(before), 1 - np.array(after)
    ranks = [np.argsort(np.argsort(x, kind="stable"), kind="stable") + 1.0 for x in (q0, q)]
    assert below(q.sum() / len(q), numeric.average_restored(A=len(q), q_0=q0))
    assert below(float((q / ranks[1]).sum()), numeric.rank_restored(q_0=q0, rank_0=ranks[0]))


def test_the_gap_with_its_own_shares_can_rise_under_restoration() -> None:
    """Three nested clients at .05; one restored to .5 raises sum pibar (1 - d) from .95 to 1.13."""

    def gap(densities: list[float]) -> float:
        d = np.array(densities)
        pibar = np.array([1 / (d >= own).sum() for own in d])
        return float(pibar @ (1 - d))

    def fewest(densities: list[float]) -> int:
        return densities.count(max(densities))

    frozen, raised = [0.05] * 3, [0.5, 0.05, 0.05]
    assert gap(raised) > gap(frozen)
    assert sum(1 - d for d in raised) / fewest(raised) > sum(1 - d for d in frozen) / fewest(frozen)
    ranked = [sum((1 - d) / r for r, d in enumerate(sorted(x, reverse=True), 1)) for x in (frozen, raised)]
    assert ranked[1] < ranked[0]


@many
@given(top_k_masks(size=6), vectors(6))
def test_a_larger_mask_leaves_out_less(drawn: tuple[np.ndarray, list[np.ndarray]], w: np.ndarray) -> None:
    _, masks = drawn
    for small, large in pairwise(masks):
        assert np.all(large[small])
        assert sq(w[~large]) <= sq(w[~small])


@many
@given(quadratics(clients=1), st.data(), weights())
def test_restoring_a_stalled_mask(problem: Any, data: st.DataObject, seconds: float) -> None:
    """Equations 36 to 38 at one point w, for masks m inside m' and eta = 1/L."""
    L = problem.smoothness
    assume(L > 0)
    w, eta = data.draw(vectors(problem.size)), 1 / L
    order = ranking(data.draw(vectors(problem.size)), np.ones(problem.size, dtype=bool))
    low, high = sorted((data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))))
    m = mask(problem, order[problem.prunable[order]], low)
    larger = mask(problem, order[problem.prunable[order]], high)
    grad = problem.grad(0, w)

    def decrease(keep: np.ndarray) -> float:
        return float(problem.loss(0, w) - problem.loss(0, w - eta * np.where(keep, grad, 0.0)))

    scale = abs(problem.loss(0, w)) + eta * sq(grad)
    inside, gained = sq(grad[m]), sq(grad[larger & ~m])
    assert below(decrease(m), numeric.stalled_step(eta=eta, masked_grad_sq=inside), scale)
    assert below(
        numeric.function("restored_step", "lhs")(eta=eta, restored_grad_sq=gained), decrease(larger), scale
    )
    threshold = numeric.function("restore_when", "lhs")(
        masked_grad_sq=inside, seconds=1.0, seconds_restored=seconds
    )
    if gained >= threshold:
        assert below(decrease(m) / 1.0, decrease(larger) / seconds, scale * max(1.0, 1 / seconds))
