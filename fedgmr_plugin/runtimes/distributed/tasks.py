"""Which dispatch is trained next, and by whom.

List scheduling: whoever is free takes a task. First come those that the present window waits for, the longest
first (Graham's bound: at most 4/3 of the shortest possible makespan, plus what the estimates are wrong by).
Who has nothing to do then, the server excepted, trains those that will arrive later, the oldest first; of
them everybody prefers the clients that it had before: their data are there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from fedgmr_plugin.engine.events import Dispatch

Trainer = Hashable
Work = Callable[[int], float]


@dataclass
class _Rate:
    """Seconds for a unit of work, on average; 1 before anything is known."""

    seconds: float = 0.0
    work: float = 0.0

    def add(self, seconds: float, work: float) -> None:
        self.seconds += seconds
        self.work += work

    def of(self, work: float) -> float:
        """Seconds of so much work."""
        return work * self.seconds / self.work if self.work else work


@dataclass
class Costs:
    """Seconds that a training takes, estimated from those measured before.

    The last measurement of the client at this density; else what a unit of work took at this density, times
    the client's work; else what it took anywhere, in proportion to the sub-model.

    Attributes:
        work: of a client's training, in any unit; the number of its samples where it trains on all of them.
    """

    work: Work = lambda client: 1.0
    _last: dict[tuple[int, float], float] = field(default_factory=dict)
    _at: dict[float, _Rate] = field(default_factory=lambda: defaultdict(_Rate))
    _all: _Rate = field(default_factory=lambda: _Rate())

    def learn(self, sent: Dispatch, seconds: float) -> None:
        """Take in a measurement."""
        work = self.work(sent.client)
        self._last[sent.client, sent.density] = seconds
        self._at[sent.density].add(seconds, work)
        self._all.add(seconds, work * len(sent.values_S))

    def estimate(self, sent: Dispatch) -> float:
        """What orders trainings by length: seconds; in no unit where nothing is known yet."""
        seconds = self._last.get((sent.client, sent.density))
        if seconds is not None:
            return seconds
        work = self.work(sent.client)
        if sent.density in self._at:
            return self._at[sent.density].of(work)
        return self._all.of(work * len(sent.values_S))


class Tasks:
    """Dispatches that wait for a trainer. Not thread-safe: the pool has a lock.

    Args:
        work: of a client's training; see `Costs`.

    Attributes:
        costs: learns from what is finished.
    """

    def __init__(self, work: Work = lambda client: 1.0) -> None:
        self.costs = Costs(work)
        self._needed: dict[int, Dispatch] = {}
        self._later: dict[int, Dispatch] = {}
        self._home: dict[int, Trainer] = {}

    def add(self, sent: Dispatch) -> None:
        """A dispatch whose update will be needed sometime."""
        self._later[sent.dispatch] = sent

    def need(self, sent: Iterable[Dispatch]) -> None:
        """Those whose updates are waited for now."""
        for dispatch in sent:
            self._later.pop(dispatch.dispatch, None)
            self._needed[dispatch.dispatch] = dispatch

    def take(self, trainer: Trainer, spare: int = 0, *, ahead: bool = True) -> Dispatch | None:
        """The next task of `trainer`; None if there is none for it.

        Args:
            spare: so many needed tasks must be left for others, who will be free sooner.
            ahead: whether it may be one that nobody waits for yet. Not for whoever has a task, behind which
                it would wait while it becomes needed, nor for the server, for which everybody waits.
        """
        if len(self._needed) > spare:
            sent = max(self._needed.values(), key=lambda d: (self.costs.estimate(d), -d.dispatch))
            del self._needed[sent.dispatch]
        elif self._later and ahead:
            oldest = min(self._later.values(), key=lambda d: (self._is_away(d, trainer), d.dispatch))
            sent = self._later.pop(oldest.dispatch)
        else:
            return None
        self._home[sent.client] = trainer
        return sent

    def _is_away(self, sent: Dispatch, trainer: Trainer) -> bool:
        """Whether somebody else trained the client last."""
        return self._home.get(sent.client, trainer) != trainer
