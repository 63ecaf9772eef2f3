"""FedGMR on a virtual clock: the server's state machine, the simulated network and the clients' training.

`Simulation` is the loop between them. It touches no file and no framework: records go to a callable, data
come from callables, and how a window's clients are trained (here, in other processes, on devices) is an
`Executor`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.client import (
    Batch,
    BatchPlan,
    LocalTrainer,
    LocalUpdate,
    Metrics,
    RecentMasks,
    Samples,
    in_batches,
    split,
    train_dispatch,
)
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
from fedgmr_plugin.kernels.layout import ModelLayout
from fedgmr_plugin.kernels.rounding import PAYLOAD_TYPES

Which = Literal["global", "scaled"]


#: Measures a model on batches.
Evaluator = Callable[[nn.Module, Iterable[Batch]], Metrics]


class Executor(Protocol):
    """Trains the dispatches whose uploads a window takes in; the result is in the order given."""

    def __call__(self, sent: Sequence[Dispatch]) -> Sequence[LocalUpdate]: ...


@dataclass(frozen=True)
class Clients:
    """The clients' training data, read when needed and split into training and validation.

    Attributes:
        samples: client to its samples.
        fraction: share held out for validation.
        seed: root of the seed tree.
        count: N.
    """

    samples: Callable[[int], Samples]
    fraction: float
    seed: int
    count: int
    _parts: dict[int, tuple[Samples, Samples | None]] = field(default_factory=dict, repr=False)

    def train(self, client: int) -> Samples:
        """The part that the client trains on."""
        return self._split(client)[0]

    def validation(self, client: int) -> Samples | None:
        """The part held out."""
        return self._split(client)[1]

    @property
    def anything_held_out(self) -> bool:
        """Whether any client has validation samples."""
        return self.fraction > 0 and any(self.validation(n) is not None for n in range(self.count))

    def _split(self, client: int) -> tuple[Samples, Samples | None]:
        if client not in self._parts:
            self._parts[client] = split(self.samples(client), self.fraction, self.seed, client)
        return self._parts[client]


@dataclass(frozen=True)
class Training:
    """How clients train: the trainer, which batches, and the learning rate eta."""

    trainer: LocalTrainer
    plan: BatchPlan
    learning_rate: float


class Simulation:
    """One run.

    Args:
        server: not started yet.
        network: its clock at 0.
        model: scratch model for training and evaluation; overwritten.
        clients: training data.
        training: trainer, batch plan, learning rate.
        test_batches: gives the test set, once per model that is evaluated.
        record: receives every record of the run log but the header, in order.
        executor: how a window's clients are trained; one after another on `model` by default.
        evaluate: how models are measured on the test set; as the trainer does by default.
        sizes: what a dispatch and its upload move; None leaves it to `payload_rule`.
    """

    def __init__(
        self,
        server: Server,
        network: VirtualNetwork,
        model: nn.Module,
        clients: Clients,
        training: Training,
        test_batches: Callable[[], Iterable[Batch]],
        record: Callable[[dict[str, Any]], None],
        executor: Executor | None = None,
        evaluate: Evaluator | None = None,
        sizes: Callable[[Dispatch], Transfer | None] = lambda sent: None,
    ) -> None:
        self.server, self.network, self.model = server, network, model
        self.clients, self.training = clients, training
        self.config: FedGMRConfig = server.config
        self.layout: ModelLayout = server.layout
        self._test_batches, self._record = test_batches, record
        self._execute = executor or self.train_in_turn
        self._sizes = sizes
        self._evaluator = evaluate or training.trainer.evaluate
        self._fixed = {n: b.clone() for n, b in model.named_buffers() if n not in self.layout.by_name}
        self._modes = [module.training for module in model.modules()]
        self._masks = RecentMasks(self.layout)
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
        updates = list(self._execute(sent))
        del sent  # payloads whose time is over: memory for those that the server cuts next
        effects: list[Effect] = []
        for arrival, update in zip(window.arrivals, updates, strict=True):
            effects += self.server.handle(_upload(arrival, update))
        closed = WindowClosed(window.start, window.close, window.end)
        if self._probing is not None:
            return effects + self._probing.merge(closed, updates)
        updates.clear()
        return effects + self.server.handle(closed)

    def train_in_turn(self, sent: Sequence[Dispatch]) -> list[LocalUpdate]:
        """The default executor."""
        return [self.train(dispatch) for dispatch in sent]

    def train(self, sent: Dispatch) -> LocalUpdate:
        """Train one dispatch on the scratch model."""
        self._reset()
        return train_dispatch(
            sent,
            model=self.model,
            layout=self.layout,
            trainer=self.training.trainer,
            samples=self.clients.train(sent.client),
            plan=self.training.plan,
            learning_rate=self.training.learning_rate,
            form=self.config.update_form,
            on_step=None if self._probing is None else self._probing.watch(sent, self.model),
            recent=self._masks,
            payload_dtype=PAYLOAD_TYPES[self.config.payload_dtype],
        )

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
                self.pending[effect.dispatch] = effect
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

    def place(self, w_D: Tensor) -> None:
        """Put the vector `w_D` [D] into the scratch model; other buffers as they were at the start."""
        self.layout.scatter(self.model, w_D)
        self._reset()

    def _reset(self) -> None:
        """The modules' modes, and the buffers that are not in the layout (integers, not persistent), as they
        were at the beginning: every training starts so."""
        for module, mode in zip(self.model.modules(), self._modes, strict=True):
            module.training = mode
        for name, buffer in self.model.named_buffers():
            if name in self._fixed:
                buffer.copy_(self._fixed[name])

    # -- measuring ------------------------------------------------------------------------------------

    def measure(self, w_D: Tensor, batches: Iterable[Batch], evaluate: Evaluator | None = None) -> Metrics:
        """Metrics of the vector `w_D` on `batches`; random transforms see the same draws each time."""
        self.place(w_D)
        with isolated_rng(derive(self.clients.seed, "measure")):
            return (evaluate or self.training.trainer.evaluate)(self.model, batches)

    def _both(
        self, batches: Callable[[], Iterable[Batch]], evaluate: Evaluator | None = None
    ) -> dict[Which, Metrics]:
        """Metrics of w and of the coverage-scaled model."""
        plain = self.measure(self.server.w_D, batches(), evaluate)
        if min(self.server.gmr.densities) >= 1.0:
            return {"global": plain, "scaled": plain}
        return {"global": plain, "scaled": self.measure(self.server.model("scaled"), batches(), evaluate)}

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
        return self.measure(self.server.w_D * mask_D, in_batches(held_out, 512))

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
        probe = Probe(self.model, self.layout, self.training.trainer, data)  # type: ignore[arg-type]
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
