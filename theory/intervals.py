"""Interval arithmetic for verdicts: vectorised in float64, and mpmath.iv where that is not enough.

`Interval` holds arrays of lower and upper ends, rounded outwards after every operation, so that the
true value of an expression lies inside for all true values of its inputs inside theirs.
`evaluate` walks a sympy expression once; the same walk serves `Interval` and `mpmath.iv`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mpmath
import numpy as np
import sympy
from numpy.typing import ArrayLike, NDArray

from theory.symbols import Expr

Floats = NDArray[np.float64]

#: Bits of the mpmath evaluation that settles close verdicts.
PRECISION_BITS = 160


def _down(x: Floats, exact: NDArray[np.bool_] | bool = False) -> Floats:
    return np.where(exact, x, np.nextafter(x, -np.inf))


def _up(x: Floats, exact: NDArray[np.bool_] | bool = False) -> Floats:
    return np.where(exact, x, np.nextafter(x, np.inf))


def _two_sum_error(a: Floats, b: Floats, total: Floats) -> Floats:
    """The rounding error of ``a + b`` (Knuth), exactly."""
    part = total - a
    return (a - (total - part)) + (b - part)


class Interval:
    """Arrays of closed intervals ``[lo, hi]``, outwardly rounded.

    Shapes broadcast as numpy arrays do. Sums know when they are exact, so that ``x - x`` of exact
    values is exactly zero.

    Attributes:
        lo, hi: the ends.
        nominal: the number that was logged, or that follows from logged ones, for reports; it decides
            nothing. The midpoint where there is none.
    """

    __slots__ = ("hi", "lo", "nominal")
    __array_ufunc__ = None  # numpy arrays defer to the reflected operators

    def __init__(self, lo: ArrayLike, hi: ArrayLike | None = None, nominal: ArrayLike | None = None) -> None:
        self.lo: Floats = np.asarray(lo, dtype=np.float64)
        self.hi: Floats = self.lo if hi is None else np.asarray(hi, dtype=np.float64)
        if nominal is None:
            nominal = self.lo if hi is None else self.lo + 0.5 * (self.hi - self.lo)
        self.nominal: Floats = np.asarray(nominal, dtype=np.float64)

    @classmethod
    def around(cls, value: ArrayLike, absolute: ArrayLike) -> Interval:
        """``value`` with an error of at most `absolute` (both arrays; 0 keeps a value exact)."""
        x, radius = np.asarray(value, dtype=np.float64), np.asarray(absolute, dtype=np.float64)
        exact = radius == 0
        return cls(_down(x - radius, exact), _up(x + radius, exact), x)

    def __repr__(self) -> str:
        return f"Interval({self.lo!r}, {self.hi!r})"

    def __getitem__(self, index: Any) -> Interval:
        return Interval(self.lo[index], self.hi[index], self.nominal[index])

    def clip_low(self, least: float) -> Interval:
        """The part at or above `least` (for quantities that cannot be smaller)."""
        return Interval(*(np.maximum(x, least) for x in (self.lo, self.hi, self.nominal)))

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo, -self.nominal)

    def __add__(self, other: Any) -> Interval:
        o = _interval(other)
        lo, hi = self.lo + o.lo, self.hi + o.hi
        return Interval(
            _down(lo, _two_sum_error(self.lo, o.lo, lo) >= 0),
            _up(hi, _two_sum_error(self.hi, o.hi, hi) <= 0),
            self.nominal + o.nominal,
        )

    __radd__ = __add__

    def __sub__(self, other: Any) -> Interval:
        return self + (-_interval(other))

    def __rsub__(self, other: Any) -> Interval:
        return _interval(other) + (-self)

    def __mul__(self, other: Any) -> Interval:
        o = _interval(other)
        products = [a * b for a in (self.lo, self.hi) for b in (o.lo, o.hi)]
        lo, hi = np.minimum.reduce(products), np.maximum.reduce(products)
        exact = ((self.lo == 0) & (self.hi == 0)) | ((o.lo == 0) & (o.hi == 0))
        return Interval(_down(lo, exact), _up(hi, exact), self.nominal * o.nominal)

    __rmul__ = __mul__

    def reciprocal(self) -> Interval:
        """1/x; ``[-inf, inf]`` where the interval holds zero."""
        holds_zero = (self.lo <= 0) & (self.hi >= 0)
        with np.errstate(divide="ignore", over="ignore"):
            lo, hi, nominal = _down(1.0 / self.hi), _up(1.0 / self.lo), 1.0 / self.nominal
        return Interval(np.where(holds_zero, -np.inf, lo), np.where(holds_zero, np.inf, hi), nominal)

    def __truediv__(self, other: Any) -> Interval:
        o = _interval(other)
        holds_zero = (o.lo <= 0) & (o.hi >= 0)
        with np.errstate(invalid="ignore", over="ignore"):
            quotient = self * o.reciprocal()
        lo, hi = np.where(holds_zero, -np.inf, quotient.lo), np.where(holds_zero, np.inf, quotient.hi)
        return Interval(lo, hi, quotient.nominal)

    def __pow__(self, exponent: int) -> Interval:
        if exponent < 0:
            return (self ** (-exponent)).reciprocal()
        low, high = np.abs(self.lo), np.abs(self.hi)
        if exponent % 2 == 0:
            least = np.where((self.lo <= 0) & (self.hi >= 0), 0.0, np.minimum(low, high))
            return _power(Interval(least, np.maximum(low, high), self.nominal), exponent)
        return _power(self, exponent)

    def log(self) -> Interval:
        """Natural logarithm of positive intervals (two ulps wider than numpy's)."""
        lo, hi = np.log(self.lo), np.log(self.hi)
        return Interval(_down(_down(lo)), _up(_up(hi)), np.log(self.nominal))


def _power(base: Interval, exponent: int) -> Interval:
    """Monotone power: of ends of one sign, or with an odd exponent."""
    lo, hi = base.lo**exponent, base.hi**exponent
    for _ in range(2):
        lo, hi = _down(lo, base.lo == 0), _up(hi, base.hi == 0)
    return Interval(lo, hi, base.nominal**exponent)


def _interval(value: Any) -> Interval:
    return value if isinstance(value, Interval) else Interval(value)


def segment_sum(x: Interval, segment: NDArray[np.int64], segments: int) -> Interval:
    """Sums of consecutive rows: row i of `x` is added to entry ``segment[i]`` of ``[segments]``.

    The rounding of each sum of m rows is bounded by ``m * 2^-52 * sum |x|`` and added to its ends.
    """
    rows = [np.broadcast_to(part, segment.shape) for part in (x.lo, x.hi, x.nominal)]
    size = np.maximum(np.abs(rows[0]), np.abs(rows[1]))
    count = np.bincount(segment, minlength=segments)
    slack = np.where(count > 1, count, 0) * 2.0**-52 * np.bincount(segment, weights=size, minlength=segments)
    lo, hi, nominal = (np.bincount(segment, weights=part, minlength=segments) for part in rows)
    exact = slack == 0
    return Interval(_down(lo - slack, exact), _up(hi + slack, exact), nominal)


def total(x: Interval) -> Interval:
    """Sum over the last axis."""
    count = x.lo.shape[-1]
    slack = count * 2.0**-52 * np.maximum(np.abs(x.lo), np.abs(x.hi)).sum(axis=-1)
    lo, hi = _down(x.lo.sum(axis=-1) - slack), _up(x.hi.sum(axis=-1) + slack)
    return Interval(lo, hi, x.nominal.sum(axis=-1))


def evaluate(
    expression: Expr,
    values: Mapping[str, Any],
    reductions: Mapping[str, Callable[[Any], Any]],
    constant: Callable[[Expr], Any],
) -> Any:
    """Value of a sympy expression over any type with ``+ * **`` (floats, `Interval`, ``mpmath.iv``).

    Args:
        expression: made of numbers, symbols, sums, products, integer powers, ``log``, ``pi`` and the
            reductions ``ArrivalSum``, ``WindowSum`` and ``WindowMean``.
        values: symbol name -> value.
        reductions: reduction name -> function of a value; also ``log``.
        constant: turns a sympy number into the type.

    Raises:
        KeyError: a symbol has no value.
        NotImplementedError: another kind of node.
    """

    def walk(node: Expr) -> Any:
        if node.is_Number or node is sympy.pi:
            return constant(node)
        if node.is_Symbol:
            return values[node.name]
        if node.is_Add or node.is_Mul:
            result = walk(node.args[0])
            for argument in node.args[1:]:
                value = walk(argument)
                if isinstance(value, _Rows):  # mpmath.iv raises where it should defer to the other operand
                    result, value = value, result
                result = result + value if node.is_Add else result * value
            return result
        if node.is_Pow and node.exp.is_Integer:
            return walk(node.base) ** int(node.exp)
        name = type(node).__name__
        if name in reductions and len(node.args) == 1:
            return reductions[name](walk(node.args[0]))
        raise NotImplementedError(f"cannot evaluate {node!r}")

    return walk(expression)


def constant_interval(node: Expr) -> Interval:
    """A sympy number (or pi) as an `Interval`."""
    value = float(node)
    if node.is_Rational and sympy.Rational(value) == node:
        return Interval(value)
    return Interval(_down(np.array(value)), _up(np.array(value)))


def evaluate_iv(expression: Expr, values: Mapping[str, Any]) -> Any:
    """The same with `mpmath.iv` at `PRECISION_BITS`, for one window.

    Args:
        expression: see `evaluate`.
        values: symbol name -> ``(lo, hi)``, or a list of such pairs for what varies over arrivals
            (inside ``ArrivalSum``) or windows (inside ``WindowSum`` and ``WindowMean``).

    Returns:
        An ``mpmath.iv`` interval.
    """
    context = mpmath.iv
    before = context.prec
    context.prec = PRECISION_BITS
    try:
        boxes = {name: _box(context, value) for name, value in values.items()}
        reductions = {
            "ArrivalSum": _Rows.total,
            "WindowSum": _Rows.total,
            "WindowMean": lambda rows: _Rows.total(rows) / len(rows.items),
            "log": lambda x: context.log(x),
        }
        return evaluate(expression, boxes, reductions, lambda node: _constant_iv(context, node))
    finally:
        context.prec = before


def _constant_iv(context: Any, node: Expr) -> Any:
    if node is sympy.pi:
        return context.pi
    return context.mpf(int(node.p)) / int(node.q)


def _box(context: Any, value: Any) -> Any:
    if isinstance(value, list):
        return _Rows([context.mpf([lo, hi]) for lo, hi in value])
    return context.mpf([value[0], value[1]])


class _Rows:
    """A list of iv intervals with elementwise arithmetic, as far as `evaluate` needs it."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def _with(self, other: Any, operation: Callable[[Any, Any], Any]) -> _Rows:
        others = other.items if isinstance(other, _Rows) else [other] * len(self.items)
        return _Rows([operation(a, b) for a, b in zip(self.items, others, strict=True)])

    def __add__(self, other: Any) -> _Rows:
        return self._with(other, lambda a, b: a + b)

    __radd__ = __add__

    def __mul__(self, other: Any) -> _Rows:
        return self._with(other, lambda a, b: a * b)

    __rmul__ = __mul__

    def __pow__(self, exponent: int) -> _Rows:
        return _Rows([item**exponent for item in self.items])

    def total(self) -> Any:
        """Sum of the rows."""
        result = mpmath.iv.mpf(0)
        for item in self.items:
            result = result + item
        return result
