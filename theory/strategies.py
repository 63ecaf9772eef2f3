"""Hypothesis strategies for the theory: vectors, masks, problems, windows, schedules.

They are public, so that another implementation can be tested against the same inequalities:

    @given(windows())
    def test_my_merge(window):
        problem, w, arrivals = window
        ...

Values are small multiples of 1/8, which floats hold exactly and which shrink to readable witnesses.
``hypothesis`` is not a dependency of this package; it is imported with this module only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from theory.laboratory.decompose import Arrival, Form
from theory.laboratory.masks import mask, ranking
from theory.laboratory.problems import Quadratic
from theory.laboratory.simulate import Schedule

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: Update forms.
FORMS: tuple[Form, ...] = ("delta", "replacement")


@lru_cache(maxsize=64)
def dyadics(low: int = -16, high: int = 16) -> st.SearchStrategy[float]:
    """Multiples of 1/8 between low/8 and high/8."""
    return st.integers(low, high).map(lambda n: n / 8)


@lru_cache(maxsize=256)
def vectors(size: int, *, limit: int = 16, signed: bool = True) -> st.SearchStrategy[Floats]:
    """Vectors ``[size]`` of multiples of 1/8, at most limit/8 in absolute value; one draw, which is fast."""

    def decode(raw: bytes) -> Floats:
        values = np.frombuffer(raw, dtype=np.int8).astype(np.float64)
        magnitude = np.abs(values) % (limit + 1) / 8
        return np.sign(values) * magnitude if signed else magnitude

    return st.binary(min_size=size, max_size=size).map(decode)


@lru_cache(maxsize=1)
def densities() -> st.SearchStrategy[float]:
    """Densities, the usual rungs first."""
    return st.sampled_from((1.0, 0.5, 0.2, 0.1, 0.05)) | st.floats(0.01, 1.0)


@lru_cache(maxsize=1)
def weights() -> st.SearchStrategy[float]:
    """Aggregation weights c_n > 0, up to a ratio of 64."""
    return st.integers(1, 64).map(lambda n: n / 8)


@st.composite
def top_k_masks(draw: st.DrawFn, size: int = 6) -> tuple[Floats, list[Bools]]:
    """A vector and nested top-k masks of it, sparse to dense."""
    w = draw(vectors(size))
    order = ranking(w, np.ones(size, dtype=bool))
    masks = []
    for density in sorted(draw(st.lists(densities(), min_size=1, max_size=4))):
        keep = np.zeros(size, dtype=bool)
        keep[order[: int(density * size)]] = True
        masks.append(keep)
    return w, masks


@st.composite
def quadratics(draw: st.DrawFn, *, clients: int | None = None, size: int | None = None) -> Quadratic:
    """Quadratic problems ``1/2 (w - a)' B'B (w - a)`` with exact data; B may be singular."""
    n = draw(_small(1, 3)) if clients is None else clients
    dim = draw(_small(1, 4)) if size is None else size
    roots = draw(vectors(n * dim * dim, limit=8)).reshape(n, dim, dim)
    centres, start = np.split(draw(vectors((n + 1) * dim)).reshape(n + 1, dim), [n])
    dense = draw(_small(0, dim - 1))
    return Quadratic(roots.transpose(0, 2, 1) @ roots, centres, start[0], dense=dense)


_ETA = st.sampled_from((0.5, 0.125, 0.03125))


@lru_cache(maxsize=64)
def _small(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


@lru_cache(maxsize=64)
def _subsets(count: int, least: int) -> st.SearchStrategy[list[int]]:
    """Distinct numbers below `count`, in any order."""
    return st.lists(_small(0, count - 1), unique=True, min_size=least)


class OneWindow(NamedTuple):
    """One window: the problem, the model before it, its arrivals, and the local step size.

    `steps` are the server's models between the oldest dispatch and now, oldest first, w_t last.
    """

    problem: Quadratic
    w: Floats
    arrivals: list[Arrival]
    eta: float
    local_steps: int
    steps: list[Floats]

    @property
    def gamma(self) -> float:
        """eta * K."""
        return self.eta * self.local_steps


@st.composite
def windows(
    draw: st.DrawFn, *, noise: bool = True, uniform: bool = False, nested: bool = False, least: int = 0
) -> OneWindow:
    """A window with arrivals of any staleness, density and weight.

    Args:
        noise: add arbitrary noise to the minibatch gradients.
        uniform: all weights are 1.
        nested: all masks are cut from one ranking (else from the ranking of each one's own model).
        least: fewest arrivals, 0 or 1.
    """
    problem = draw(quadratics())
    dim, steps = problem.size, draw(_small(1, 3))
    eta = draw(_ETA)
    age = draw(_small(1, 3))
    history = list(draw(vectors(age * dim)).reshape(age, dim))
    common = ranking(draw(vectors(dim)), problem.prunable) if nested else None
    arrivals = []
    for client in draw(_subsets(problem.clients, least)):
        start = history[draw(_small(0, age - 1))]
        order = ranking(start, problem.prunable) if common is None else common
        keep = mask(problem, order, draw(densities()))
        x = np.where(keep, start, 0.0)
        path, grads = [], []
        errors = draw(vectors(steps * dim, limit=8)).reshape(steps, dim) if noise else np.zeros((steps, dim))
        for error in errors:
            grad = problem.grad(client, x) + error
            path.append(x)
            grads.append(grad)
            x = x - eta * np.where(keep, grad, 0.0)
        weight = 1.0 if uniform else draw(weights())
        arrivals.append(Arrival(client, weight, keep, start, np.stack(path), np.stack(grads), x))
    return OneWindow(problem, history[-1], arrivals, eta, steps, history)


@st.composite
def schedules(draw: st.DrawFn, *, clients: int, forms: Sequence[Form] = FORMS) -> Schedule:
    """Laboratory runs of a few windows: delays, densities, restorations, weights, forms."""
    horizon = draw(st.integers(1, 6))
    start = tuple(draw(st.sampled_from((0.25, 0.5, 1.0))) for _ in range(clients))
    raised = tuple(
        (draw(st.integers(1, 5)), n, 1.0) for n in range(clients) if start[n] < 1 and draw(st.booleans())
    )
    return Schedule(
        windows=horizon,
        eta=draw(st.sampled_from((0.25, 0.0625))),
        local_steps=draw(st.integers(1, 3)),
        densities=start,
        delays=tuple(draw(st.integers(0, 2)) for _ in range(clients)),
        delay_grows=draw(st.booleans()),
        restorations=raised,
        form=draw(st.sampled_from(tuple(forms))),
        interval=draw(st.integers(1, 3)),
        staleness=draw(st.sampled_from(("constant", "polynomial"))),
        samples=tuple(draw(weights()) for _ in range(clients)),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def runs(draw: st.DrawFn, *, forms: Sequence[Form] = FORMS) -> tuple[Quadratic, Schedule]:
    """A problem and a schedule for it."""
    problem = draw(quadratics())
    return problem, draw(schedules(clients=problem.clients, forms=forms))


def restored(before: Sequence[float]) -> st.SearchStrategy[list[float]]:
    """Densities that are nowhere below `before`."""
    raised: list[Any] = [st.just(d) | st.floats(d, 1.0) for d in before]
    return st.tuples(*raised).map(list)
