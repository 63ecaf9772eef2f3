"""The command that started this process, as far as it can be given again.

`note` is called when fedgmr is registered, before a script has had time to change folders.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """How a run was started.

    Attributes:
        script: absolute path of the Python file; "" for a module (`python -m`), a notebook or a prompt.
        arguments: its own.
        folder: the working directory.
        run: the how-manieth run of the process it is, from 1.
    """

    script: str
    arguments: list[str]
    folder: str
    run: int


_noted: list[Command] = []


def note(script: str | None = None) -> None:
    """Remember the command; a second call changes nothing.

    Args:
        script: the Python file that is about to run with `sys.argv`, where it is not what Python was started
            with.
    """
    if _noted:
        return
    if script is None:
        is_module = getattr(sys.modules.get("__main__"), "__spec__", None) is not None
        script = "" if is_module or not sys.argv[0].endswith(".py") else sys.argv[0]
    _noted.append(Command(script and os.path.abspath(script), sys.argv[1:], os.getcwd(), 0))


def next_run() -> Command:
    """The command, for the run of this process that is built now."""
    note()
    _noted[0] = _noted[0]._replace(run=_noted[0].run + 1)
    return _noted[0]
