"""Both sides of every bound as numpy functions, made from the sympy expressions of `theory.bounds`.

    >>> from theory import numeric
    >>> numeric.mask(L=2.0, pibar=[0.5, 0.5], mask_sq=[1.0, 0.0])
    2.0

Keyword arguments carry the symbols' names (`theory.symbols.TABLE`). A quantity of axis ``arrival``
is an array ``[..., A]``, one of axis ``window`` an array ``[..., T]`` (so what is summed over arrivals
inside a mean over windows has shape ``[T, A]``, padded with zeros), one of axis ``run`` a number; all in
the units of their symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import sympy
from numpy.typing import ArrayLike, NDArray

from theory.bounds import BOUNDS, IDENTITY
from theory.symbols import TABLE, Expr

Reduction = Callable[[Any], Any]

_DEFAULT: dict[str, Reduction] = {
    "ArrivalSum": lambda x: np.sum(x, axis=-1),
    "WindowSum": lambda x: np.sum(x, axis=-1),
    "WindowMean": lambda x: np.mean(x, axis=-1),
}


@lru_cache(maxsize=256)
def compiled(expression: Expr) -> tuple[tuple[str, ...], Callable[..., Any]]:
    """``(names, function)``: function takes the three reductions, then one value for each name."""
    symbols = sorted(expression.free_symbols, key=lambda symbol: symbol.name)
    reductions = [sympy.Symbol(name) for name in _DEFAULT]
    function = sympy.lambdify([*reductions, *symbols], expression, modules="numpy")
    return tuple(symbol.name for symbol in symbols), function


def evaluate(
    expression: Expr, values: Mapping[str, ArrayLike], reductions: Mapping[str, Reduction] | None = None
) -> NDArray[Any]:
    """Value of an expression in float64; see the module for shapes.

    Raises:
        TypeError: a symbol of the expression has no value.
    """
    names, function = compiled(expression)
    missing = [name for name in names if name not in values]
    if missing:
        raise TypeError(f"missing values for {', '.join(missing)}")
    chosen = {**_DEFAULT, **(reductions or {})}
    arguments = [np.asarray(values[name], dtype=np.float64) for name in names]
    return np.asarray(function(*(chosen[name] for name in _DEFAULT), *arguments), dtype=np.float64)


def _document(expression: Expr, title: str, number: str) -> str:
    names, _ = compiled(expression)
    lines = [f"{title} (equation {number}).", "", "Args:"]
    for name in names:
        info = TABLE[name]
        lines.append(f"    {name}: {info.meaning}; axis {info.axis}, unit {info.unit}.")
    return "\n".join(lines)


def function(name: str, side: str = "rhs") -> Callable[..., Any]:
    """The function of one side (``"rhs"`` the bound, ``"lhs"`` the measured side) of bound `name`.

    Raises:
        KeyError: there is no such bound.
    """
    bound = BOUNDS[name]
    expression = bound.rhs if side == "rhs" else bound.lhs

    def side_of(**values: ArrayLike) -> Any:
        result = evaluate(expression, values)
        return float(result) if result.ndim == 0 else result

    side_of.__name__ = name
    side_of.__qualname__ = name
    side_of.__doc__ = _document(expression, bound.title, bound.number)
    return side_of


def error_sq(*, step_sq: ArrayLike, grad_dot_step: ArrayLike, grad_sq: ArrayLike, gamma: ArrayLike) -> Any:
    """``||e_t||^2`` of each window from what a probe logs (equation 1, expanded)."""
    values = {"step_sq": step_sq, "grad_dot_step": grad_dot_step, "grad_sq": grad_sq, "gamma": gamma}
    return evaluate(IDENTITY, values)


def __getattr__(name: str) -> Callable[..., Any]:
    if name in BOUNDS:
        return function(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *BOUNDS])
