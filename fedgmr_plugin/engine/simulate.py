"""FedGMR on a virtual clock: the server's state machine, the simulated network and the clients' training.

`Simulation` is the loop between them. It touches no file and no framework: records go to a callable, data
come from callables, and how a window's clients are trained (here, in other processes, on devices) is an
`Executor`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.client import Batch, LocalUpdate, Metrics, in_batches
from fedgmr_plugin.engine.events import (
    Dispatch,
    Effect,
    Evaluate,
    Finish,
    Record,
    UploadArrived,
    Validate,
    Validated,
    WindowClosed,
)
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
from fedgmr_plugin.engine.seeds import derive, isolated_rng
from fedgmr_plugin.engine.server import Server
from fedgmr_plugin.engine.workbench import Evaluator, Workbench
from fedgmr_plugin.kernels.layout import ModelLayout

Which = Literal["global", "scaled"]


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


class Simulation:
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
        self.server, self.network, self.bench = server, network, bench
        self.clients, self.training = bench.clients, bench.training
        self.config: FedGMRConfig = server.config
        self.layout: ModelLayout = server.layout
        self._test_batches, self._record = test_batches, record
        self._executor = executor or InTurn(bench.train)
        self._sizes = sizes
        self._evaluator = evaluate or self.training.trainer.evaluate
        self.pending: dict[int, Dispatch] = {}
        self.bytes_up = self.bytes_down = 0.0
        self._window_down = 0.0
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
        totals = {
            "bytes_up": up,
            "bytes_down": self._window_down,
            "server_bytes_down": server_bytes_down,
            "learning_rate": self.training.learning_rate * self.server.learning_rate_scale,
        }
        self._window_down = 0.0
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
        del sent  # payloads whose time is over: memory for those that the server cuts next
        effects: list[Effect] = []
        for arrival, update in zip(window.arrivals, updates, strict=True):
            effects += self.server.handle(_upload(arrival, update))
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

    # -- state ----------------------------------------------------------------------------------------

    @property
    def traffic(self) -> list[float]:
        """Bytes up and down so far, and down in the present window."""
        return [self.bytes_up, self.bytes_down, self._window_down]

    @traffic.setter
    def traffic(self, values: Sequence[float]) -> None:
        self.bytes_up, self.bytes_down, self._window_down = values

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

    # -- effects --------------------------------------------------------------------------------------

    def _carry_out(self, effects: Sequence[Effect]) -> dict[str, Any] | None:
        """Carry `effects` out, and those that follow from them."""
        queue = list(effects)
        dispatch_record: dict[str, Any] = {}
        while queue:
            effect = queue.pop(0)
            if isinstance(effect, Record) and effect.fields["type"] == "dispatch":
                dispatch_record = effect.fields
            elif isinstance(effect, Record):
                self._record(effect.fields)
            elif isinstance(effect, Dispatch):
                share = len(effect.values_S) / self.layout.size
                megabytes = self.network.dispatch(
                    effect.dispatch, effect.client, effect.density, share, self._sizes(effect)
                )
                self._await(effect)
                if self._probing is not None:
                    self._probing.dispatched(effect)
                self._window_down += megabytes * 1e6
                self.bytes_down += megabytes * 1e6
                self._record({**dispatch_record, "bytes_down": megabytes * 1e6})
            elif isinstance(effect, Validate):
                queue += self.server.handle(self._validate())
            elif isinstance(effect, Evaluate):
                self._evaluate()
            else:
                return self._end(effect)
        return None

    def _end(self, effect: Finish) -> dict[str, Any]:
        return {
            "type": "end",
            "windows": self.server.version,
            "time": self.server.time,
            "reason": effect.reason,
            "model_sha256": model_sha256(self.server.w_D),
            "shipped": self.server.candidate,
            "rejected": self.server.rejected,
        }

    # -- measuring ------------------------------------------------------------------------------------

    def _both(
        self, batches: Callable[[], Iterable[Batch]], evaluate: Evaluator | None = None
    ) -> dict[Which, Metrics]:
        """Metrics of w and of the coverage-scaled model."""
        plain = self.bench.measure(self.server.w_D, batches(), evaluate)
        if min(self.server.gmr.densities) >= 1.0:
            return {"global": plain, "scaled": plain}
        return {
            "global": plain,
            "scaled": self.bench.measure(self.server.model("scaled"), batches(), evaluate),
        }

    def _evaluate(self) -> None:
        metrics = self._both(self._test_batches, self._evaluator)
        shipped = metrics[self.server.candidate]
        self._record(
            {
                "type": "evaluation",
                "window": self.server.version,
                "time": self.server.time,
                "candidate": self.server.candidate,
                "accuracy": shipped.accuracy,
                "loss": shipped.loss,
                "global": _short(metrics["global"]),
                "scaled": _short(metrics["scaled"]),
                "samples": shipped.samples,
                "bytes_up": self.bytes_up,
                "bytes_down": self.bytes_down,
                "metrics": dict(shipped.extra),
            }
        )

    def _validation_batches(self) -> Iterator[Batch]:
        for n in range(self.clients.count):
            held_out = self.clients.validation(n)
            if held_out is not None:
                yield from in_batches(held_out, 512)

    def _validate(self) -> Validated:
        server, metric = self.server, self.config.trigger_metric
        if not self.clients.anything_held_out:
            return Validated(server.candidate, None, (), self._gradient_votes())
        both = self._both(self._validation_batches)
        candidate = self._choose(both)
        clients = [self._client_metrics(n) for n in range(self.clients.count)]
        self._record(
            {
                "type": "validation",
                "window": server.version,
                "time": server.time,
                "global": _short(both["global"]),
                "scaled": _short(both["scaled"]),
                "clients": [None if c is None else _short(c) for c in clients],
                "candidate": candidate,
            }
        )
        return Validated(
            candidate,
            getattr(both[candidate], metric),
            [None if c is None else getattr(c, metric) for c in clients],
            self._gradient_votes(),
        )

    def _choose(self, both: dict[Which, Metrics]) -> Which:
        """The model to ship: fixed by `evaluate`, or the better one on the validation split."""
        if self.config.evaluate != "validation":
            return self.server.candidate
        plain, scaled = (getattr(both[w], self.config.trigger_metric) for w in ("global", "scaled"))
        if plain is None or scaled is None:
            return "scaled"
        better = plain > scaled if self.config.trigger_metric == "accuracy" else plain < scaled
        return "global" if better else "scaled"

    def _client_metrics(self, client: int) -> Metrics | None:
        """Metrics of m_n w on the client's own validation samples."""
        held_out = self.clients.validation(client)
        if held_out is None:
            return None
        mask_D = self.server.ranking.mask(self.server.ranking.rung(self.server.gmr.densities[client]))
        return self.bench.measure(self.server.w_D * mask_D, in_batches(held_out, 512))

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

    def _gradient_votes(self) -> list[bool]:
        return [] if self._probing is None else self._probing.gradient_votes(self._mean_seconds)

    def _mean_seconds(self, client: int, density: float) -> float:
        """T(d): mean seconds of one flight of `client` at `density`."""
        ranking, network = self.server.ranking, self.network
        share = ranking.ends[ranking.rung(density)] / self.layout.size
        megabytes = payload_megabytes(self.config, network.model_megabytes, density, share)
        return mean_flight_seconds(self.config, megabytes, client, density, network.densities[client])


def model_sha256(w_D: Tensor) -> str:
    """SHA-256 of the vector's little-endian bytes in layout order."""
    array = w_D.detach().cpu().contiguous().numpy()
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def _upload(arrival: Arrival, update: LocalUpdate) -> UploadArrived:
    stats = update.stats
    return UploadArrived(
        dispatch=arrival.dispatch,
        client=update.client,
        values_S=update.values_S,
        samples=stats.samples,
        time=arrival.time,
        bytes_up=arrival.megabytes * 1e6,
        steps=stats.steps,
        train_loss=stats.train_loss,
        drift_sq=stats.drift_sq,
        change_sq=update.change_sq,
    )


def _short(metrics: Metrics) -> dict[str, float | None]:
    return {"accuracy": metrics.accuracy, "loss": metrics.loss}
