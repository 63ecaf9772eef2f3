"""An error of ours that nobody catches is shown by its message, not by a traceback through FedML and us.

A program that registers fedgmr itself runs under Python's own top level, so `install` puts a hook there.
FedML replaces that in `fedml.init`; ours is put back before a run is built. Other exceptions are passed on.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from types import TracebackType

import click

from fedgmr_plugin.errors import FedGMRError

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]

#: Codes of errors that a user's own code caused: only its traceback says where.
OF_USERS_CODE = frozenset({"GMR-506"})

_previous: list[Hook] = []


def describe(error: FedGMRError) -> str:
    """The error's message, behind the traceback of its cause where that cause is the user's own code."""
    if error.code in OF_USERS_CODE and error.__cause__ is not None:
        return "".join(traceback.format_exception(error.__cause__)) + f"\n{error}"
    return str(error)


def install() -> None:
    """Show our errors by `describe` where nothing catches them; Python's exit status stays 1."""
    if sys.excepthook is not _show:
        _previous.append(sys.excepthook)
        sys.excepthook = _show


def restore() -> None:
    """Give the hook back; where somebody has replaced ours, theirs stays."""
    if _previous and sys.excepthook is _show:
        sys.excepthook = _previous[-1]
    _previous.clear()


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, FedGMRError):
        click.echo(describe(error), err=True)
    else:
        (_previous[-1] if _previous else sys.__excepthook__)(kind, error, trace)
