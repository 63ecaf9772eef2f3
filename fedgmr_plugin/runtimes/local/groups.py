"""Process groups: who leads one, told apart from a later process of the same number, and how it is ended.

Standard library alone: the keeper imports it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

#: Seconds between two looks at a process that is awaited.
LOOK = 0.02


class Leader(NamedTuple):
    """A process that leads a group of its own.

    Attributes:
        pid: its number, which is also its group's.
        started: when it started, as `started` writes it; a recycled number has another.
    """

    pid: int
    started: str


def started(pid: int) -> str | None:
    """When a process started: ``boot id:clock ticks`` of /proc, or ps's date; None if it has ended.

    A zombie has ended. Two processes of one number have different texts, also across a restart of
    the machine (on macOS only if they started in different seconds).
    """
    if Path("/proc/self/stat").exists():
        return _started_by_proc(pid)
    return _started_by_ps(pid)


def _started_by_proc(pid: int) -> str | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # behind the command's name, which may hold anything
    return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"


def _started_by_ps(pid: int) -> str | None:
    done = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    state, _, date = done.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else date.strip()


def lives(leader: Leader) -> bool:
    """Whether this very process runs (or is stopped), and not another of its number."""
    return started(leader.pid) == leader.started


def send(leader: Leader, number: signal.Signals) -> None:
    """Send a signal to a leader's whole group, if the leader lives."""
    if lives(leader):
        _send(leader.pid, number)


def end(leaders: Iterable[Leader], patience: float) -> list[Leader]:
    """End groups: SIGTERM to all at once, and SIGKILL to what is left.

    A suspended group is woken so that it can heed SIGTERM. Whatever a leader leaves behind in its
    group is killed when the leader has ended.

    Args:
        patience: seconds from SIGTERM to SIGKILL.

    Returns:
        those that lived.
    """
    living = [leader for leader in leaders if lives(leader)]
    for leader in living:
        _send(leader.pid, signal.SIGTERM)
        _send(leader.pid, signal.SIGCONT)
    deadline = time.monotonic() + patience
    waiting = living
    while waiting and time.monotonic() < deadline:
        time.sleep(LOOK)
        waiting = [leader for leader in waiting if lives(leader)]
    for leader in living:
        _send(leader.pid, signal.SIGKILL)
    while any(lives(leader) for leader in waiting):
        time.sleep(LOOK)
    return living


def sweep(pid: int) -> None:
    """Kill what an ended leader left in its group; to be called before its number can be given again."""
    _send(pid, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
        return
