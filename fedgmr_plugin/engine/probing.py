"""A run under observation: `probe` and `terms` records of the windows in which they are due.

Watching takes nothing from the run and gives nothing to it: the same model comes out, to the bit. See
`fedgmr_plugin.engine.probe` for what is measured and `fedgmr_plugin.engine.terms` for the decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch, Effect, Record, WindowClosed
from fedgmr_plugin.engine.probe import Probe
from fedgmr_plugin.engine.server import Server
from fedgmr_plugin.engine.terms import Witness, decomposable, terms_record
from fedgmr_plugin.kernels.density import next_density, restoring_pays

#: T(d): mean seconds of one flight of a client at a density.
MeanSeconds = Callable[[int, float], float]


class Probing:
    """Watches `server`'s windows with `probe`.

    Args:
        learning_rate: eta before the warm-up's factor.

    Attributes:
        watches: whether it wants to see the local steps of some windows.
        starts: w_s of every version that is in flight, for the decomposition.
    """

    def __init__(self, server: Server, probe: Probe, learning_rate: float) -> None:
        self._server, self._probe, self._learning_rate = server, probe, learning_rate
        config = server.config
        hooked = server.before_merge is not None or server.after_merge is not None
        self.watches = config.probe and decomposable(config) and not hooked
        self.starts: dict[int, Tensor] = {}
        self._witnesses: dict[int, Witness] = {}

    @property
    def due(self) -> bool:
        """Whether the present window gets a record."""
        config = self._server.config
        return config.probe and self._server.version % (config.probe_interval or config.interval) == 0

    @property
    def watching(self) -> bool:
        """Whether it wants to see those of the present window, for which `answered` was called."""
        return bool(self._witnesses)

    def dispatched(self, sent: Dispatch) -> None:
        """A sub-model of the server's present vector leaves."""
        if self.watches:
            self.starts[sent.version] = self._server.w_D

    def answered(self, sent: Sequence[Dispatch], pending: Sequence[Dispatch]) -> None:
        """The dispatches that this window takes in are about to be trained; `pending` ones are not yet."""
        self._witnesses = {}
        if self.watches and self.due:
            self._witnesses = {s.dispatch: Witness(s, self.starts[s.version]) for s in sent}
        flying = {p.version for p in pending}
        self.starts = {version: w_D for version, w_D in self.starts.items() if version in flying}

    def watch(self, sent: Dispatch, model: nn.Module) -> Callable[[], None] | None:
        """To be called before every local step of `sent` on `model`; None if nobody wants to know."""
        witness = self._witnesses.get(sent.dispatch)
        return None if witness is None else witness.watch(model, self._server.layout)

    def merge(self, closed: WindowClosed, updates: Sequence[LocalUpdate]) -> list[Effect]:
        """The server's effects of `closed`, with a `probe` and a `terms` record after the window's."""
        server = self._server
        if not self.due:
            return server.handle(closed)
        t, old_D, scale = server.version, server.w_D.clone(), server.learning_rate_scale
        parameters = server.layout.parameters
        here, fields = self._probe.before(old_D, self._uncovered()[:parameters])
        effects = server.handle(closed)
        rest = self._probe.after(here, (server.w_D - old_D)[:parameters], server.w_D)
        records: list[Effect] = [Record({"type": "probe", "window": t, **fields, **rest})]

        written = [e.fields for e in effects if isinstance(e, Record)]
        weights = {r["dispatch"]: float(r["weight"]) for r in written if r["type"] == "arrival"}
        arrived = [
            (self._witnesses[u.dispatch], u)
            for u in updates
            if u.dispatch in weights and u.dispatch in self._witnesses
        ]
        if arrived and len(arrived) == len(weights):
            terms = terms_record(
                t,
                self._probe,
                server.layout,
                old_D,
                server.w_D,
                arrived,
                weights,
                learning_rate=self._learning_rate,
                scale=scale,
                form=server.config.update_form,
            )
            records += [] if terms is None else [Record(terms)]
        after = next(
            i for i, e in enumerate(effects, 1) if isinstance(e, Record) and e.fields["type"] == "window"
        )
        return [*effects[:after], *records, *effects[after:]]

    def gradient_votes(self, mean_seconds: MeanSeconds) -> list[bool]:
        """For the ``gradient`` trigger: whether restoring each client pays [N]; else empty."""
        server = self._server
        if server.config.trigger != "gradient":
            return []
        grad_P = self._probe.gradient(server.w_D).grad_P
        rung_P = server.ranking.rung_D[: server.layout.parameters].to(torch.int64)
        held = torch.bincount(rung_P, weights=grad_P.to(torch.float64).square()).cumsum(0).tolist()
        votes = []
        for n, density in enumerate(server.gmr.densities):
            after = next_density(server.rules, density)
            inside, with_more = (held[min(server.ranking.rung(d), len(held) - 1)] for d in (density, after))
            seconds = [mean_seconds(n, d) for d in (density, after)]
            votes.append(density < 1.0 and restoring_pays(inside, with_more - inside, *seconds))
        return votes

    def _uncovered(self) -> Tensor:
        """bool [D]: coordinates that no update of the coming merge holds."""
        server = self._server
        uncovered_D = torch.ones(server.layout.size, dtype=torch.bool, device=server.w_D.device)
        merged = {a.upload.client: a.flight for a in server.staged.values()}
        if server.config.update_scope == "buffer" and merged:
            merged = {**{n: a.flight for n, a in server.buffer.items()}, **merged}
        for flight in merged.values():
            uncovered_D[flight.ranking.support(flight.rung)] = False
        return uncovered_D
