"""Rates, not only inequalities: slopes of log error against log cause, on problems where they are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from theory.laboratory import (
    Logistic,
    Problem,
    Quadratic,
    Schedule,
    client_grads,
    decompose,
    local_steps,
    mask,
    ranking,
    simulate,
)


def slope(cause: list[float], error: list[float]) -> float:
    """Least-squares slope of log(error) on log(cause)."""
    assert min(error) > 0
    return float(np.polyfit(np.log(cause), np.log(error), 1)[0])


def dense(problem: Problem) -> np.ndarray:
    return np.ones(problem.size, dtype=bool)


def test_mask_error_is_linear_in_the_pruned_share() -> None:
    """||M||^2 ~ (1 - d), for weights of equal size, where top-k leaves out exactly that share."""
    rng = np.random.default_rng(0)
    problem = Quadratic.random(rng, clients=1, size=300)
    shares, errors, distances = [0.01, 0.02, 0.04, 0.08], [], []
    signs = rng.choice([-1.0, 1.0], size=(40, 300))
    for share in shares:
        found = []
        for w in signs:
            keep = mask(problem, rng.permutation(300), 1 - share)
            upload = local_steps(problem, 0, w, keep, eta=0.1, steps=1, rng=rng)
            found.append(decompose(problem, w, [upload], gamma=0.1, form="delta"))
        errors.append(float(np.mean([f.M @ f.M for f in found])))
        distances.append(float(np.mean([f.parts[0]["mask_sq"] for f in found])))
    assert slope(shares, distances) == pytest.approx(1.0, abs=1e-9)
    assert slope(shares, errors) == pytest.approx(1.0, abs=0.1)


def test_topk_of_spread_weights_beats_the_bound() -> None:
    """For Gaussian weights top-k leaves out less than 1 - d, by a factor that grows with density."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal(20_000)
    order = ranking(w, np.ones(w.size, dtype=bool))
    left = [float(np.square(w[order[int(d * w.size) :]]).sum() / (w @ w)) for d in (0.1, 0.5, 0.9)]
    assert all(x < 1 - d for x, d in zip(left, (0.1, 0.5, 0.9), strict=True))
    assert left[2] / 0.1 < left[0] / 0.9 < 1


@pytest.mark.parametrize("kind", ["quadratic", "logistic"])
def test_drift_error_is_quadratic_in_the_step(kind: str) -> None:
    """||D||^2 ~ eta^2 for K fixed, and 0 for K = 1."""
    rng = np.random.default_rng(2)
    problem: Problem = (
        Quadratic.random(rng, clients=1, size=10)
        if kind == "quadratic"
        else Logistic.random(rng, clients=1, size=10, batch=0)
    )
    etas, errors = [1e-4, 4e-4, 1.6e-3, 6.4e-3], []
    for eta in etas:
        upload = local_steps(problem, 0, problem.start, dense(problem), eta=eta, steps=5, rng=rng)
        found = decompose(problem, problem.start, [upload], gamma=5 * eta, form="delta")
        errors.append(float(found.D @ found.D))
    assert slope(etas, errors) == pytest.approx(2.0, abs=0.05)
    single = local_steps(problem, 0, problem.start, dense(problem), eta=0.1, steps=1, rng=rng)
    assert not np.any(decompose(problem, problem.start, [single], gamma=0.1, form="delta").D)


def test_drift_grows_with_the_square_of_the_local_steps() -> None:
    """mean_k ||x_k - x_0||^2 ~ (K-1)(2K-1)/6 eta^2 ||g||^2 for a small step (equation 31)."""
    rng = np.random.default_rng(3)
    problem = Quadratic.random(rng, clients=1, size=6)
    grad = problem.grad(0, problem.start)
    for steps in (2, 4, 8):
        upload = local_steps(problem, 0, problem.start, dense(problem), eta=1e-6, steps=steps, rng=rng)
        found = decompose(problem, problem.start, [upload], gamma=1e-6 * steps, form="delta").parts[0]
        predicted = (steps - 1) * (2 * steps - 1) / 6 * 1e-12 * (grad @ grad)
        assert found["drift_sq"] == pytest.approx(predicted, rel=1e-4)


def test_the_noise_floor_is_linear_in_gamma() -> None:
    """The stationary mean of ||grad F||^2 under noise ~ gamma: the 2 L gamma sigma^2/K term."""
    rng = np.random.default_rng(4)
    problem = replace(Quadratic.random(rng, clients=1, size=4, spread=0.0, sigma=1.0))
    problem = replace(problem, start=problem.optimum)
    etas, floors = [0.01, 0.04, 0.16], []
    for eta in etas:
        w, kept, noise = problem.start.copy(), [], np.random.default_rng(7)
        for t in range(20_000):
            w = w - eta * problem.noisy(0, w, noise)
            if t * eta > 20 and t % 5 == 0:
                grad = problem.grad(0, w)
                kept.append(float(grad @ grad))
        floors.append(float(np.mean(kept)))
    assert slope(etas, floors) == pytest.approx(1.0, abs=0.12)


def steady(form: str, eta: float, delay: int, windows: int = 24) -> list[tuple[float, float]]:
    """(||S||, ||rho||/gamma) of every stale arrival of a two-client run with one late client."""
    problem = Quadratic.random(np.random.default_rng(5), clients=2, size=8, alike=True, spread=0.1)
    schedule = Schedule(
        windows=windows,
        eta=eta,
        local_steps=1,
        densities=(1.0, 1.0),
        delays=(0, delay),
        form="delta" if form == "delta" else "replacement",
    )
    found = []
    for d in simulate(problem, schedule).decompositions:
        if len(d.parts) == 2:
            found.append((float(np.linalg.norm(d.S)), float(np.linalg.norm(d.rho)) / d.gamma))
    return found


def test_staleness_error_is_quadratic_in_the_delay() -> None:
    """||S||^2 ~ tau^2 where the model moves at a steady pace, which is what tau * path allows."""
    delays, errors = [1, 2, 4, 8], []
    for delay in delays:
        errors.append(np.mean([s**2 for s, _ in steady("delta", 1e-5, delay, windows=40)]))
    assert slope([float(d) for d in delays], [float(e) for e in errors]) == pytest.approx(2.0, abs=0.02)


def test_the_replacement_residual_does_not_vanish_with_the_step_and_the_delta_form_does() -> None:
    """||rho||/gamma tends to a constant, ||S|| to 0 like gamma; in the delta form there is no residual."""
    etas = [1e-5, 1e-4, 1e-3]
    stale, residual = [], []
    for eta in etas:
        found = steady("replacement", eta, 3)
        stale.append(float(np.mean([s for s, _ in found])))
        residual.append(float(np.mean([r for _, r in found])))
    assert slope(etas, stale) == pytest.approx(1.0, abs=0.02)
    assert slope(etas, residual) == pytest.approx(0.0, abs=0.02)
    problem = Quadratic.random(np.random.default_rng(5), clients=2, size=8, alike=True, spread=0.1)
    grad = client_grads(problem, problem.start).mean(axis=0)
    assert 0.3 * np.linalg.norm(grad) < residual[0] < 3 * np.linalg.norm(grad)
    delta = [steady("delta", eta, 3) for eta in etas]
    assert all(r == 0 for found in delta for _, r in found)
    assert slope(etas, [float(np.mean([s for s, _ in found])) for found in delta]) == pytest.approx(
        1.0, abs=0.02
    )


def test_nested_shares_grow_like_a_logarithm() -> None:
    """sum pibar for n nested clients of distinct density is the harmonic number, not |A|/Gamma = n."""
    for n in (2, 8, 32):
        size = np.arange(n, 0, -1)
        pibar = np.array([1 / (size >= own).sum() for own in size])
        assert pibar.sum() == pytest.approx((1 / np.arange(1, n + 1)).sum(), rel=1e-12)
        assert pibar.sum() <= 1 + np.log(n)
