"""The theory of FedGMR as an instrument: bounds as data, and a checker for recorded runs.

This package knows runs only through their log (``docs/run-log.md``), so that any framework can be
checked. It imports neither torch nor FedML. Start at `theory.check.check_runs`,
`theory.bounds.BOUNDS`, or on the command line with ``fedgmr-theory check RUN``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from theory.bounds import BOUNDS
    from theory.check import check_runs
    from theory.citation import cite
    from theory.gap import density_gap
    from theory.log import read_log

__all__ = ["BOUNDS", "check_runs", "cite", "density_gap", "read_log"]

_HOME = {
    "BOUNDS": "theory.bounds",
    "check_runs": "theory.check",
    "cite": "theory.citation",
    "density_gap": "theory.gap",
    "read_log": "theory.log",
}


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used (sympy takes a second)."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'theory' has no attribute {name!r}")
