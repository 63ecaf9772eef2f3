"""FedGMR on a virtual clock: the server's state machine, the simulated network and the clients' training.

`Simulation` is the loop between them. It touches no file and no framework: records go to a callable, data
come from callables, and how a window's clients are trained (here, in other processes, on devices) is an
`Executor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.course import Course
from fedgmr_plugin.engine.decoupled import Budget, Downlink, Thinned, Uplink
from fedgmr_plugin.engine.events import Dispatch, Effect, Record, UploadArrived, WindowClosed
from fedgmr_plugin.engine.examiner import Examiner
from fedgmr_plugin.engine.network import (
    Arrival,
    Transfer,
    VirtualNetwork,
    Window,
    mean_flight_seconds,
    payload_megabytes,
)
from fedgmr_plugin.engine.probe import Probe, probe_set
from fedgmr_plugin.engine.probing import Probing
from fedgmr_plugin.engine.samples import Batch
from fedgmr_plugin.engine.seeds import derive, isolated_rng
from fedgmr_plugin.engine.server import Server
from fedgmr_plugin.engine.workbench import Evaluator, Workbench


class Executor(Protocol):
    """Trains dispatches: when they are needed, or, in other processes, as soon as they are made."""

    def begin(self, sent: Dispatch) -> None:
        """`sent` has been dispatched; its update will be asked for in the window that takes it in."""
        ...

    def finish(self, sent: Sequence[Dispatch]) -> Sequence[LocalUpdate]:
        """The updates of a window's dispatches, in the order given; not all may have been begun."""
        ...


@dataclass(frozen=True)
class InTurn:
    """Trains a window's dispatches one after another."""

    train: Callable[[Dispatch], LocalUpdate]

    def begin(self, sent: Dispatch) -> None:
        """Nothing: what never arrives is never trained."""

    def finish(self, sent: Sequence[Dispatch]) -> list[LocalUpdate]:
        """See `Executor`."""
        return [self.train(dispatch) for dispatch in sent]


class Simulation(Course):
    """One run.

    Args:
        server: not started yet.
        network: its clock at 0.
        bench: where models are measured, and trained by default.
        test_batches: gives the test set, once per model that is evaluated.
        record: receives every record of the run log but the header, in order.
        executor: how clients are trained; one after another on `bench` by default.
        evaluate: how models are measured on the test set; as the trainer does by default.
        sizes: what a dispatch and its upload move; None leaves it to `payload_rule`.
    """

    def __init__(
        self,
        server: Server,
        network: VirtualNetwork,
        bench: Workbench,
        test_batches: Callable[[], Iterable[Batch]],
        record: Callable[[dict[str, Any]], None],
        executor: Executor | None = None,
        evaluate: Evaluator | None = None,
        sizes: Callable[[Dispatch], Transfer | None] = lambda sent: None,
    ) -> None:
        super().__init__(server, Examiner(server, bench, test_batches, evaluate), record)
        self.network = network
        self.clients, self.training = bench.clients, bench.training
        bench.room = lambda: server.spare_D
        self._executor = executor or InTurn(bench.train)
        self._sizes = sizes
        config = self.config
        self.uplink: Uplink | None = None
        self.downlink: Downlink | None = None
        self._budget: Budget | None = None
        if "decoupled" in (config.upload, config.download):
            self._budget = Budget(self.layout, network.densities)
            if config.upload == "decoupled":
                self.uplink = Uplink(self._budget, config.update_form)
            if config.download == "decoupled":
                self.downlink = Downlink(self._budget)
        self.pending: dict[int, Dispatch] = {}
        self._probing = self._make_probing()

    def run(self) -> dict[str, Any]:
        """Run to the end of the budget; returns the `end` record (without wall time)."""
        end = self.start()
        while end is None:
            end = self.step()
        return end

    def start(self) -> dict[str, Any] | None:
        """The first dispatches; what follows is `step`, window by window."""
        return self._carry_out(self.server.start())

    def step(self) -> dict[str, Any] | None:
        """One window: train who arrives, merge, dispatch; returns the `end` record after the last."""
        server_bytes_down = self.network.channel_megabytes() * 1e6
        window = self.network.close_window()
        up = sum(arrival.megabytes for arrival in window.arrivals) * 1e6
        self.bytes_up += up
        totals = self._totals(up, server_bytes_down)
        effects = self._take_in(window)
        for effect in effects:
            if isinstance(effect, Record) and effect.fields["type"] == "window":
                effect.fields.update(totals)
        return self._carry_out(effects)

    def _take_in(self, window: Window) -> list[Effect]:
        """Train who arrives and hand the updates to the server; closes its window."""
        sent = [self.pending.pop(a.dispatch) for a in window.arrivals]
        if self._probing is not None:
            self._probing.answered(sent, list(self.pending.values()))
        updates = list(self._train(sent))
        effects: list[Effect] = []
        for arrival, update, part in zip(window.arrivals, updates, self._thinned(sent, updates), strict=True):
            effects += self.server.handle(_upload(arrival, update, part))
        del sent  # payloads whose time is over: memory for those that the server cuts next
        closed = WindowClosed(window.start, window.close, window.end)
        if self._probing is not None:
            return effects + self._probing.merge(closed, updates)
        updates.clear()
        return effects + self.server.handle(closed)

    def _train(self, sent: Sequence[Dispatch]) -> Sequence[LocalUpdate]:
        """The updates of a window's dispatches; somebody who watches their steps can do so only here."""
        probing = self._probing
        if probing is None or not probing.watching:
            return self._executor.finish(sent)
        return [self.bench.train(d, probing.watch(d, self.bench.model)) for d in sent]

    def _thinned(self, sent: Sequence[Dispatch], updates: Sequence[LocalUpdate]) -> Iterator[Thinned]:
        """What of the updates travels."""
        for dispatch, update in zip(sent, updates, strict=True):
            if self.uplink is None:
                yield Thinned(update.values_S, None)
            else:
                yield self.uplink.thin(dispatch, update.values_S)

    # -- state ----------------------------------------------------------------------------------------

    @property
    def probed_starts(self) -> dict[int, Tensor]:
        """w_s of the versions in flight, which the probe remembers; empty without one."""
        return {} if self._probing is None else self._probing.starts

    @probed_starts.setter
    def probed_starts(self, starts: dict[int, Tensor]) -> None:
        if self._probing is not None:
            self._probing.starts = starts

    def wait_for(self, pending: Iterable[Dispatch]) -> None:
        """Make `pending` the dispatches that are out."""
        self.pending = {}
        for sent in pending:
            self._await(sent)

    def _await(self, sent: Dispatch) -> None:
        self.pending[sent.dispatch] = sent
        if self._probing is None or not self._probing.watches:
            self._executor.begin(sent)

    def _send(self, whole: Dispatch) -> float:
        sent = whole if self.downlink is None else self.downlink.cut(whole)
        share = len(sent.values_S) / self.layout.size
        transfer = self._sizes(sent)
        if self._budget is not None:
            transfer = self._budget.transfer(
                self.config,
                self.network.model_megabytes,
                sent.client,
                sent.ranking,
                sent.rung,
                whole=sent is whole,
            )
        megabytes = self.network.dispatch(sent.dispatch, sent.client, sent.density, share, transfer)
        self._await(sent)
        if self._probing is not None:
            self._probing.dispatched(sent)
        return megabytes * 1e6

    # -- the theory's probe ---------------------------------------------------------------------------

    def _make_probing(self) -> Probing | None:
        if not self.config.probe and self.config.trigger != "gradient":
            return None
        seed = self.clients.seed
        with isolated_rng(derive(seed, "probe_set")):
            data = probe_set(
                [self.clients.train(n) for n in range(self.clients.count)],
                seed,
                self.config.probe_samples,
                self.training.plan.batch_size,
            )
        probe = Probe(self.bench.model, self.layout, self.training.trainer, data)  # type: ignore[arg-type]
        return Probing(self.server, probe, self.training.learning_rate)

    def _votes(self) -> list[bool]:
        return [] if self._probing is None else self._probing.gradient_votes(self._mean_seconds)

    def _mean_seconds(self, client: int, density: float) -> float:
        """T(d): mean seconds of one flight of `client` at `density`."""
        ranking, network, config = self.server.ranking, self.network, self.config
        rung = ranking.rung(density)
        if self._budget is not None:
            moved = self._budget.transfer(config, network.model_megabytes, client, ranking, rung)
        else:
            share = ranking.ends[rung] / self.layout.size
            size = payload_megabytes(config, network.model_megabytes, density, share)
            moved = Transfer(size, size)
        return mean_flight_seconds(config, moved, client, density, network.densities[client])


def _upload(arrival: Arrival, update: LocalUpdate, part: Thinned) -> UploadArrived:
    stats = update.stats
    return UploadArrived(
        dispatch=arrival.dispatch,
        client=update.client,
        values_S=part.values_S,
        sent_S=part.sent_S,
        samples=stats.samples,
        time=arrival.time,
        bytes_up=arrival.megabytes * 1e6,
        steps=stats.steps,
        train_loss=stats.train_loss,
        drift_sq=stats.drift_sq,
        change_sq=update.change_sq,
    )
