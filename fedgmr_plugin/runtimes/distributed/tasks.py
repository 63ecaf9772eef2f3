"""Which dispatch is trained next, and by whom.

Work conserving list scheduling: whoever is free takes a task. First come those that the present window waits
for, the longest first (Graham's bound: at most 4/3 of the shortest possible makespan, plus what the estimates
are wrong by); then those that will arrive later, the oldest first, of which everybody prefers the clients
that it had before: their data are there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from fedgmr_plugin.engine.events import Dispatch

Trainer = Hashable


@dataclass
class Costs:
    """Seconds that a training takes, estimated from those measured before.

    The last measurement of the client at this density; else the mean at this density; else proportional to
    the sub-model.
    """

    _last: dict[tuple[int, float], float] = field(default_factory=dict)
    _at: dict[float, tuple[float, int]] = field(default_factory=lambda: defaultdict(lambda: (0.0, 0)))

    def learn(self, client: int, density: float, seconds: float) -> None:
        """Take in a measurement."""
        self._last[client, density] = seconds
        total, count = self._at[density]
        self._at[density] = total + seconds, count + 1

    def estimate(self, sent: Dispatch) -> tuple[float, int]:
        """What orders trainings by length: larger is longer."""
        seconds = self._last.get((sent.client, sent.density))
        if seconds is None:
            total, count = self._at.get(sent.density, (0.0, 0))
            seconds = total / count if count else 0.0
        return seconds, len(sent.values_S)


class Tasks:
    """Dispatches that wait for a trainer. Not thread-safe: the pool has a lock.

    Attributes:
        costs: learns from what is finished.
    """

    def __init__(self) -> None:
        self.costs = Costs()
        self._needed: dict[int, Dispatch] = {}
        self._later: dict[int, Dispatch] = {}
        self._home: dict[int, Trainer] = {}

    def __len__(self) -> int:
        return len(self._needed) + len(self._later)

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
            sent = max(self._needed.values(), key=lambda d: (*self.costs.estimate(d), -d.dispatch))
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
