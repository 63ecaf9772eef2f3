"""An error of ours that nobody catches is shown by its message, not by a traceback through FedML and us.

A program that registers fedgmr itself runs under Python's own top level, so `install` puts a hook there.
FedML puts its own in that place in `fedml.init`; `wrap` lets that one, too, show our errors by message, and
an interrupt (Ctrl-C) of a run of ours in a word. All other exceptions take the way that they took before; the
traceback of one that ends a script under `fedgmr run` begins at the script, as it does under `python`.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from types import TracebackType

import click

from fedgmr_plugin.errors import FedGMRError
from fedgmr_plugin.runtimes.distributed import job

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]

#: Codes of errors whose cause is the user's own code, here or on another rank: only its traceback says where.
OF_USERS_CODE = frozenset({"GMR-304", "GMR-506", "GMR-507"})

#: Our hook, and the one in whose place it stands, while it is installed.
_installed: list[tuple[Hook, Hook]] = []


def from_script(trace: TracebackType | None, script: str) -> TracebackType | None:
    """A traceback without the frames that lead to `script`; whole where the script is not in it."""
    found = trace
    while found is not None and found.tb_frame.f_code.co_filename != script:
        found = found.tb_next
    return found or trace


def describe(error: FedGMRError) -> str:
    """The error's message, behind the traceback of its cause where that cause is the user's own code."""
    if error.code in OF_USERS_CODE and error.__cause__ is not None:
        return "".join(traceback.format_exception(error.__cause__)) + f"\n{error}"
    return str(error)


def tell(error: FedGMRError) -> None:
    """Print the error by `describe`; where several ranks have the same one, once."""
    job.after_rank_0()
    click.echo(describe(error), err=True)


def _is_in_a_run(trace: TracebackType | None) -> bool:
    """Whether a run of ours was interrupted: where it stood in our code is of no use to its user."""
    return any(
        str(frame.f_globals.get("__name__")).startswith("fedgmr_plugin.runtimes.")
        for frame, _ in traceback.walk_tb(trace)
    )


def wrap(hook: Hook) -> Hook:
    """`hook`, but for our errors, which are shown by `describe`."""

    @functools.wraps(hook)
    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, FedGMRError):
            tell(error)
        elif isinstance(error, KeyboardInterrupt) and _is_in_a_run(trace):
            job.after_rank_0()
            click.echo("\nAborted!", err=True)  # as under `fedgmr run`
        else:
            trace = from_script(trace, sys.argv[0])
            hook(kind, error.with_traceback(trace), trace)
        if isinstance(error, FedGMRError) or job.is_ours():
            job.abandon(1)

    return show


def install() -> None:
    """Show our errors by `describe` where nothing catches them; Python's exit status stays 1.

    A second call changes nothing.
    """
    if not _installed:
        ours, before = wrap(sys.excepthook), sys.excepthook
        _installed.append((ours, before))
        sys.excepthook = ours


def restore() -> None:
    """Give the hook back; where somebody has put another over ours, that stays, and ours below it."""
    for ours, before in _installed:
        if sys.excepthook is ours:
            sys.excepthook = before
    _installed.clear()
