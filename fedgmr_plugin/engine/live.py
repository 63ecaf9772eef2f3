"""FedGMR with clients that are really there: they come, go, answer late or never.

`Live` is a deterministic state machine: what happens and when comes in as events, each with its second, and
nothing here reads a clock. The same events give the same bits, so a journal of them is all that a server has
to keep (`fedgmr_plugin.protocol.journal`).

A window closes `window_slack` seconds after the uploads that it waits for have arrived: those of the clients
in flight with the largest initial density (`schedule` ``sync``: of everybody in flight), and `min_updates` at
least. With ``buffered`` it closes with the upload number `min_updates`, whoever's they are. After
`window_limit` seconds it closes with what there is. Whoever does not answer within `answer_deadline` seconds
is waited for no longer. See the method page, section 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedgmr_plugin.engine.admission import ANSWERED
from fedgmr_plugin.engine.course import Course
from fedgmr_plugin.engine.events import (
    ClientJoined,
    ClientLeft,
    Dispatch,
    DispatchOverdue,
    Effect,
    Record,
    UploadArrived,
    UploadRefused,
    WindowClosed,
)
from fedgmr_plugin.engine.examiner import Examiner
from fedgmr_plugin.engine.server import Server


@dataclass(frozen=True)
class Tick:
    """Time has passed."""

    time: float


LiveEvent = ClientJoined | ClientLeft | UploadArrived | UploadRefused | Tick


class Live(Course):
    """One run with real clients.

    Args:
        server: not started yet.
        examiner: measures its models.
        record: receives every record of the run log but the header, in order.
        send: gets a dispatch on its way, called once for each, in order; returns the bytes that its client
            receives and those that leave the server.
    """

    def __init__(
        self,
        server: Server,
        examiner: Examiner,
        record: Callable[[dict[str, Any]], None],
        send: Callable[[Dispatch], tuple[float, float]],
    ) -> None:
        super().__init__(server, examiner, record)
        self._deliver = send
        self.now = 0.0
        self.window_start = 0.0
        self.closing_at: float | None = None
        self.window_up = self.window_server_down = 0.0
        self.initial = list(server.gmr.densities)  # when first dispatched to
        self.deadlines: dict[int, float] = {}  # of the dispatches whose slot is taken, the earliest first
        self.early: dict[int, ClientJoined] = {}  # who joined before there were enough to begin
        self.begun = server.config.clients_at_start <= 1
        self.retries: dict[int, float] = {}  # when clients whose answer was refused are dispatched to again
        self.gone: set[int] = set()  # those of them that have left meanwhile

    def start(self) -> dict[str, Any] | None:
        """Begin with nobody there."""
        self.server.away.update(range(len(self.server.counts)))
        return self._carry_out(self.server.start())

    def handle(self, event: LiveEvent) -> dict[str, Any] | None:
        """Advance by one event, whose time is not before the last one's; the `end` record at the end."""
        self.now = max(self.now, event.time)
        effects = self._due() if isinstance(event, Tick) else self._of(event)
        end = self._carry_out(effects)
        return self._close_if_due() if end is None else end

    def next_tick(self) -> float | None:
        """Second at which a `Tick` would change something; None while nothing is waited for."""
        times = [*self.retries.values(), *list(self.deadlines.values())[:1]]
        if self.closing_at is not None:
            times.append(self.closing_at)
        return min(times, default=None)

    # -- events ---------------------------------------------------------------------------------------

    def _of(self, event: ClientJoined | ClientLeft | UploadArrived | UploadRefused) -> list[Effect]:
        if isinstance(event, UploadArrived):
            return self._uploaded(event)
        if isinstance(event, UploadRefused):
            return self.server.handle(event) + self._try_again(event.dispatch, event.client)
        if isinstance(event, ClientJoined):
            if event.client not in self.server.away or event.client in self.retries:
                self.gone.discard(event.client)
                return []
        elif event.client in self.server.away:
            self.early.pop(event.client, None)
            self.gone.update({event.client} & self.retries.keys())
            return []
        self.retries.pop(event.client, None)
        return self.server.handle(event) if self.begun else self._gather(event)

    def _gather(self, event: ClientJoined | ClientLeft) -> list[Effect]:
        """Before there are enough clients to begin."""
        if isinstance(event, ClientLeft):
            return []
        self.early[event.client] = event
        if len(self.early) < self.config.clients_at_start:
            return []
        self.begun = True
        effects: list[Effect] = []
        for joined in self.early.values():
            effects += self.server.handle(replace(joined, time=self.now))
        self.early = {}
        return effects

    def _uploaded(self, upload: UploadArrived) -> list[Effect]:
        self.bytes_up += upload.bytes_up
        self.window_up += upload.bytes_up
        effects = self.server.handle(upload)
        refused = next((e.fields["code"] for e in effects if isinstance(e, Record)), None)
        if refused is None:
            self.deadlines.pop(upload.dispatch, None)
        elif refused in ANSWERED:
            effects += self._try_again(upload.dispatch, upload.client)
        return effects

    def _try_again(self, dispatch: int, client: int) -> list[Effect]:
        """A client answered with nothing of use: it gets another sub-model, but not at once."""
        self.deadlines.pop(dispatch, None)
        self.retries[client] = self.now + self.config.retry_seconds
        return self.server.handle(ClientLeft(client, self.now))

    def _due(self) -> list[Effect]:
        """What has become due by now: deadlines, and second attempts."""
        effects: list[Effect] = []
        for dispatch in [d for d, time in self.deadlines.items() if time <= self.now]:
            del self.deadlines[dispatch]
            effects += self.server.handle(DispatchOverdue(dispatch, self.now))
        for client in [n for n, time in self.retries.items() if time <= self.now]:
            del self.retries[client]
            if client not in self.gone:
                effects += self.server.handle(ClientJoined(client, self.now))
            self.gone.discard(client)
        return effects

    # -- windows --------------------------------------------------------------------------------------

    def _close_if_due(self) -> dict[str, Any] | None:
        waits = [math.inf if self.closing_at is None else self.closing_at]
        if self.closing_at is None and self.server.staged and self.config.window_limit is not None:
            waits.append(self.now + self.config.window_limit)
        if self._enough():
            slack = 0.0 if self.config.schedule == "buffered" else self.config.window_slack
            waits.append(self.now + slack)
        self.closing_at = None if min(waits) == math.inf else min(waits)
        if self.closing_at is None or self.now < self.closing_at:
            return None
        self.closing_at = None
        totals = self._totals(self.window_up, self.window_server_down)
        self.window_up = self.window_server_down = 0.0
        effects = self.server.handle(WindowClosed(self.window_start, self.now, self.now))
        self.window_start = self.now
        for effect in effects:
            if isinstance(effect, Record) and effect.fields["type"] == "window":
                effect.fields.update(totals)
        return self._carry_out(effects)

    def _enough(self) -> bool:
        """Whether what the window waits for has arrived."""
        server = self.server
        if not server.staged:
            return False
        waiting = [f.client for d, f in server.flights.items() if d in self.deadlines]
        if not waiting:
            return True
        if self.config.schedule == "sync" or len(server.staged) < self.config.min_updates:
            return False
        if self.config.schedule == "buffered":
            return True
        best = max(self.initial[n] for n in (*waiting, *(a.upload.client for a in server.staged.values())))
        return all(self.initial[n] < best for n in waiting)

    def _send(self, sent: Dispatch) -> float:
        self.deadlines[sent.dispatch] = self.now + self.config.answer_deadline
        if sent.count == 0:
            self.initial[sent.client] = sent.density
        received, left = self._deliver(sent)
        self.window_server_down += left
        return received

    # -- state ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON-able state beyond the server's; `load_state` restores it."""
        return {
            "now": self.now,
            "window_start": self.window_start,
            "closing_at": self.closing_at,
            "window_up": self.window_up,
            "window_server_down": self.window_server_down,
            "initial": list(self.initial),
            "deadlines": list(self.deadlines.items()),
            "retries": list(self.retries.items()),
            "gone": sorted(self.gone),
            "early": [asdict(joined) for joined in self.early.values()],
            "begun": self.begun,
            "traffic": self.traffic,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.now, self.window_start = state["now"], state["window_start"]
        self.closing_at = state["closing_at"]
        self.window_up, self.window_server_down = state["window_up"], state["window_server_down"]
        self.initial = list(state["initial"])
        self.deadlines, self.retries = dict(state["deadlines"]), dict(state["retries"])
        self.gone = set(state.get("gone", ()))
        self.early = {joined["client"]: ClientJoined(**joined) for joined in state["early"]}
        self.begun = state["begun"]
        self.traffic = state["traffic"]
