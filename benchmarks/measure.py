"""What the benchmarks share: a clock, the memory's speed, the machine's description, one row of a table.

Times are medians of several repeats on one thread. A *floor* is the time in which the memory moves the bytes
that a kernel cannot avoid, at the speed of a triad a = b + s c measured in the same process.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: Elements of a triad's vectors: far larger than the caches.
_TRIAD = 2**24


class Row(NamedTuple):
    """One measured goal.

    Attributes:
        name: what is measured.
        against: the reference that it is divided by.
        value: the ratio, or the figure.
        goal: what it should be: "<= 1.5", ">= 10"; "" where there is none.
        detail: the figures behind it.
    """

    name: str
    against: str
    value: float
    goal: str = ""
    detail: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)


class Calls:
    """Counts the calls of Python and C functions inside: work that does not depend on the machine.

    Attributes:
        count: calls so far.
    """

    count = 0

    def __enter__(self) -> Calls:
        sys.setprofile(self._note)
        return self

    def _note(self, frame: Any, event: str, argument: Any) -> None:
        self.count += event in ("call", "c_call")

    def __exit__(self, *raised: Any) -> None:
        sys.setprofile(None)


def seconds(work: Callable[[], Any], repeats: int = 7, prepare: Callable[[], Any] | None = None) -> float:
    """Median time of `work` over `repeats` calls after one that is not counted; `prepare` is not timed."""
    times = []
    for _ in range(repeats + 1):
        if prepare is not None:
            prepare()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def against_floor(work: Callable[[], Any], moved: float, repeats: int = 11) -> tuple[float, float, float]:
    """Time of `work` against its floor, measured in turn; what slows the memory down slows both.

    Args:
        moved: bytes that `work` cannot avoid to move.

    Returns:
        median of (time / floor), median time in seconds, median bandwidth in bytes per second.
    """
    triad, ratios, times, rates = _triad(_TRIAD), [], [], []
    for round_ in range(repeats + 1):
        start = time.perf_counter()
        triad()
        middle = time.perf_counter()
        work()
        end = time.perf_counter()
        if round_:
            rates.append(12 * _TRIAD / (middle - start))
            times.append(end - middle)
            ratios.append(times[-1] * rates[-1] / moved)
    return statistics.median(ratios), statistics.median(times), statistics.median(rates)


def triad_bandwidth(elements: int = _TRIAD) -> float:
    """Bytes per second of a = b + s c on float32 vectors (12 bytes an element)."""
    return 12 * elements / seconds(_triad(elements), repeats=11)


def _triad(elements: int) -> Callable[[], Any]:
    a, b, c = (torch.ones(elements) for _ in range(3))
    return lambda: torch.add(b, c, alpha=0.5, out=a)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gigabytes": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
