"""The laboratory: gradients, constants and the decomposition are what they claim to be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from theory.laboratory import (
    Logistic,
    Problem,
    Quadratic,
    ReluNetwork,
    Schedule,
    client_grads,
    decompose,
    local_steps,
    mask,
    mean_loss,
    ranking,
    simulate,
)
from theory.log import parse
from theory.strategies import runs


def problems() -> list[Problem]:
    rng = np.random.default_rng(3)
    return [
        Quadratic.random(rng, clients=3, size=8, smoothness=2.0, sigma=0.5, dense=2),
        Quadratic.random(rng, clients=2, size=5, alike=True),
        Logistic.random(rng, clients=3, size=6, dense=1),
        Logistic.random(rng, clients=2, size=4, batch=0),
        ReluNetwork.random(rng, clients=3, inputs=3, hidden=4),
    ]


@pytest.mark.parametrize("problem", problems(), ids=lambda p: type(p).__name__)
def test_gradients_are_derivatives(problem: Problem) -> None:
    rng = np.random.default_rng(0)
    w, step = problem.start, 1e-6
    for n in range(problem.clients):
        grad = problem.grad(n, w)
        for direction in rng.standard_normal((3, problem.size)):
            slope = (problem.loss(n, w + step * direction) - problem.loss(n, w - step * direction)) / (
                2 * step
            )
            assert slope == pytest.approx(grad @ direction, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("problem", problems(), ids=lambda p: type(p).__name__)
def test_smoothness_and_infimum(problem: Problem) -> None:
    if problem.smoothness is None:
        assert isinstance(problem, ReluNetwork)
        return
    rng = np.random.default_rng(1)
    for _ in range(50):
        x, y = 4 * rng.standard_normal((2, problem.size))
        for n in range(problem.clients):
            change = np.linalg.norm(problem.grad(n, x) - problem.grad(n, y))
            assert change <= problem.smoothness * np.linalg.norm(x - y) * (1 + 1e-12)
        assert mean_loss(problem, x) >= problem.infimum


def test_the_quadratic_smoothness_is_attained() -> None:
    problem = Quadratic.random(np.random.default_rng(0), clients=2, size=6, smoothness=3.0)
    assert problem.smoothness == pytest.approx(3.0, rel=1e-9)
    gap = client_grads(problem, problem.optimum).mean(axis=0)
    assert np.linalg.norm(gap) < 1e-12


def test_the_logistic_optimum_is_stationary() -> None:
    problem = Logistic.random(np.random.default_rng(0), clients=3, size=5)
    assert np.linalg.norm(client_grads(problem, problem.optimum).mean(axis=0)) < 1e-12


@pytest.mark.parametrize("problem", problems(), ids=lambda p: type(p).__name__)
def test_noise_is_unbiased_and_bounded(problem: Problem) -> None:
    rng = np.random.default_rng(5)
    exact = problem.grad(0, problem.start)
    draws = np.stack([problem.noisy(0, problem.start, rng) - exact for _ in range(4000)])
    variance = float(np.square(draws).sum(axis=1).mean())
    assert np.linalg.norm(draws.mean(axis=0)) <= 5 * np.sqrt(variance / len(draws)) + 1e-15
    assert variance <= problem.noise_sq * (1 + 5 / np.sqrt(len(draws))) + 1e-15
    if isinstance(problem, Quadratic):
        assert variance == pytest.approx(problem.noise_sq, rel=0.05)


def test_masks_are_nested_and_drop_whole_rows_biases() -> None:
    problem = ReluNetwork.random(np.random.default_rng(0), clients=1, inputs=3, hidden=4)
    order = ranking(problem.start, problem.prunable)
    magnitude = np.abs(problem.start[order])
    assert np.all(np.diff(magnitude) <= 0)
    before = np.zeros(problem.size, dtype=bool)
    for density in (0.05, 0.2, 0.5, 1.0):
        keep = mask(problem, order, density)
        assert (keep & problem.prunable).sum() == int(density * problem.prunable.sum())
        assert np.all(keep[before])
        for bias, row in problem.rows:
            assert keep[bias] == keep[list(row)].any()
        assert keep[-problem.hidden :].all()
        before = keep
    assert before.all()


def test_a_layer_floor_ranks_first() -> None:
    w = np.array([9.0, 8.0, 7.0, 6.0, 0.4, 0.3, 0.2, 0.1])
    order = ranking(w, np.ones(8, dtype=bool), floor=0.5, layers=(4, 4))
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert ranking(w, np.ones(8, dtype=bool), layers=(4, 4)).tolist() == list(range(8))  # no floor


@pytest.mark.parametrize("form", ["delta", "replacement"])
@pytest.mark.parametrize("problem", problems(), ids=lambda p: type(p).__name__)
def test_the_identity_closes(problem: Problem, form: str) -> None:
    clients = problem.clients
    schedule = Schedule(
        windows=25,
        form="delta" if form == "delta" else "replacement",
        densities=(1.0, 0.5, 0.2)[:clients],
        delays=(0, 1, 3)[:clients],
        delay_grows=True,
        restorations=((8, 1, 1.0),),
        interval=4,
        staleness="polynomial",
        local_steps=3,
    )
    trace = simulate(problem, schedule)
    for found in trace.decompositions:
        assert np.linalg.norm(found.residual) <= 1e-10 * np.linalg.norm(found.e)
    assert any(np.any(d.M) for d in trace.decompositions) and any(np.any(d.S) for d in trace.decompositions)
    assert any(np.any(d.rho) for d in trace.decompositions) == (form == "replacement")
    assert mean_loss(problem, trace.models[-1]) < mean_loss(problem, trace.models[0])


@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_every_term_against_a_loop_over_coordinates(form: str) -> None:
    """The decomposition once more, coordinate by coordinate, from the definitions."""
    rng = np.random.default_rng(9)
    problem = Quadratic.random(rng, clients=3, size=7, sigma=0.4)
    w, old, eta = rng.standard_normal(7), rng.standard_normal(7), 0.1
    held = [
        np.array(bits, dtype=bool)
        for bits in ((1, 1, 1, 0, 0, 1, 0), (1, 1, 0, 0, 0, 0, 0), (1, 0, 0, 0, 1, 0, 0))
    ]
    starts, weight = (old, w, old), (2.0, 1.0, 4.0)
    uploads = [
        local_steps(problem, n, starts[n], held[n], eta=eta, steps=3, weight=weight[n], rng=rng)
        for n in range(3)
    ]
    found = decompose(problem, w, uploads, gamma=3 * eta, form="delta" if form == "delta" else "replacement")
    full = np.mean([problem.grad(n, w) for n in range(3)], axis=0)
    want = {name: np.zeros(7) for name in ("z", "D", "M", "S", "H", "U", "rho")}
    for j in range(7):
        total = sum(weight[n] for n in range(3) if held[n][j])
        if total == 0:
            want["U"][j] = -full[j]
            continue
        want["H"][j] = -full[j]
        for n, upload in enumerate(uploads):
            if not held[n][j]:
                continue
            share = weight[n] / total
            at = [problem.grad(n, x)[j] for x in (*upload.path_KD, starts[n], w)]
            path, (start, now) = at[:3], at[3:]
            want["z"][j] += share * np.mean([upload.grads_KD[k][j] - path[k] for k in range(3)])
            want["D"][j] += share * np.mean([g - path[0] for g in path])
            want["M"][j] += share * (path[0] - start)
            want["S"][j] += share * (start - now)
            want["H"][j] += share * now
            if form == "replacement":
                want["rho"][j] += share * (starts[n][j] - w[j])
    for name, vector in want.items():
        assert np.allclose(found.terms[name], vector, rtol=1e-12, atol=1e-14), name
    assert np.array_equal(found.grad, full)
    scales = []
    for n, (part, upload) in enumerate(zip(found.parts, uploads, strict=True)):
        grads = np.stack([problem.grad(n, x) for x in upload.path_KD])
        start, now, m = problem.grad(n, starts[n]), problem.grad(n, w), held[n]
        scales += [*np.square(grads).sum(axis=1), start @ start, now @ now]
        moved = upload.path_KD - upload.path_KD[0]
        by_hand = {
            "D_sq": np.square((grads.mean(axis=0) - grads[0])[m]).sum(),
            "M_sq": np.square((grads[0] - start)[m]).sum(),
            "S_sq": np.square((start - now)[m]).sum(),
            "mask_sq": np.square(starts[n][~m]).sum(),
            "stale_sq": np.square(w - starts[n]).sum(),
            "drift_sq": np.square(moved).sum() / 3,
            "gap_sq": np.square(now - full).sum(),
            "change_sq": np.square(eta * upload.grads_KD.sum(axis=0)[m]).sum(),
        }
        for key, value in by_hand.items():
            assert part[key] == pytest.approx(value, rel=1e-12), key
    assert found.scale_sq == pytest.approx(max(scales), rel=1e-12)
    assert [part["pibar"] for part in found.parts] == pytest.approx([1.0, 1 / 3, 1.0])


def test_the_scale_is_the_largest_gradient_on_the_way() -> None:
    """A step far beyond 2/L diverges, so the last local gradient is the largest of all."""
    problem = Quadratic.random(np.random.default_rng(1), clients=1, size=4)
    everything = np.ones(4, dtype=bool)
    upload = local_steps(
        problem, 0, problem.start, everything, eta=5.0, steps=4, rng=np.random.default_rng(0)
    )
    found = decompose(problem, problem.start, [upload], gamma=20.0, form="delta")
    last = problem.grad(0, upload.path_KD[-1])
    assert found.scale_sq == pytest.approx(last @ last, rel=1e-12)
    assert found.scale_sq > 4 * (problem.grad(0, problem.start) @ problem.grad(0, problem.start))


def test_local_steps_never_leave_the_mask() -> None:
    problem = Quadratic.random(np.random.default_rng(1), clients=1, size=6, sigma=1.0)
    keep = np.array([1, 0, 1, 1, 0, 0], dtype=bool)
    upload = local_steps(problem, 0, problem.start, keep, eta=0.1, steps=4, rng=np.random.default_rng(2))
    assert upload.weight == 1.0
    assert np.array_equal(upload.path_KD[0], np.where(keep, problem.start, 0.0))
    assert not np.any(upload.path_KD[:, ~keep]) and not np.any(upload.end_D[~keep])
    steps = np.diff(np.vstack([upload.path_KD, upload.end_D]), axis=0)
    assert np.allclose(steps, -0.1 * np.where(keep, upload.grads_KD, 0.0), rtol=0, atol=1e-15)


@settings(max_examples=100)
@given(runs())
def test_logs_are_valid_and_reproducible(drawn: tuple[Quadratic, Schedule]) -> None:
    problem, schedule = drawn
    first, second = simulate(problem, schedule).lines(), simulate(problem, schedule).lines()
    assert first == second
    log = parse(first)
    assert log.ended and len(log["window"]) == schedule.windows == len(log["terms"]) == len(log["probe"])


def test_clients_are_busy_for_their_delay() -> None:
    problem = Quadratic.random(np.random.default_rng(0), clients=2, size=4)
    trace = simulate(problem, Schedule(windows=7, densities=(1.0, 0.5), delays=(0, 2)))
    arrivals = [r for r in trace.records if r["type"] == "arrival" and r["client"] == 1]
    assert [r["window"] for r in arrivals] == [2, 5] and all(r["staleness"] == 2 for r in arrivals)
