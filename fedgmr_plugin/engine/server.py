"""The FedGMR server as a deterministic state machine: `handle(event) -> effects`, no I/O, no clock.

Legend: D coordinates of the global vector, N clients, S support of one sub-model, R rungs.

    start -> Dispatch ...                  UploadArrived *   (staged, checked)
             WindowClosed -> merge, then   Dispatch ...               between checks
                                           Validate ...               every `interval` windows
             Validated    -> restore densities, rebuild masks, Dispatch ...
             ... until the budget is spent: Finish.

Real clients come and go: ClientJoined dispatches to a client at once, DispatchOverdue frees the slot of one
that does not answer.

Uploads are merged in the order (client, dispatch), whatever order they arrived in. An upload is merged by
the first window that closes after its arrival and by no other; with `update_scope` ``buffer``, every
client's last upload takes part in every merge. See the method page, sections 3 to 6.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine import records
from fedgmr_plugin.engine.admission import ANSWERED, Admitted, InFlight, admit
from fedgmr_plugin.engine.events import (
    ClientJoined,
    ClientLeft,
    Dispatch,
    DispatchOverdue,
    Effect,
    Evaluate,
    Event,
    Finish,
    Record,
    UploadArrived,
    UploadRefused,
    Validate,
    Validated,
    WindowClosed,
)
from fedgmr_plugin.engine.measures import LayerCounts, Norms, norms, step_sq
from fedgmr_plugin.engine.restricted import Restricted, Shares
from fedgmr_plugin.engine.sampling import choose_idle
from fedgmr_plugin.engine.seeds import torch_generator
from fedgmr_plugin.errors import UpdateRejected, WireError
from fedgmr_plugin.kernels import density as gmr
from fedgmr_plugin.kernels.aggregate import Coverage, MaskedUpdate, merge
from fedgmr_plugin.kernels.layout import ModelLayout
from fedgmr_plugin.kernels.masks import Ranking, rank, refuse_empty, scores
from fedgmr_plugin.kernels.robust import bounded, scaled, trimmed
from fedgmr_plugin.kernels.rounding import PAYLOAD_TYPES, travelled
from fedgmr_plugin.kernels.staleness import staleness_weight


@dataclass(frozen=True)
class Plan:
    """What a server needs beyond its configuration.

    Attributes:
        seed: root of the seed tree.
        windows: windows after which the run ends.
        in_flight: clients that train at the same time, at most N.
        test_interval: windows between evaluations.
        client_samples: training samples of each client, the weights of coverage [N]; a client that joins
            may say otherwise.
        layer_costs: c_layer of each prunable layer, for the ``per_cost`` score.
    """

    seed: int
    windows: int
    in_flight: int
    test_interval: int
    client_samples: tuple[int, ...]
    layer_costs: tuple[float, ...] | None = None


#: Hook on the updates of a window before they are merged: (window, w_D, updates) -> updates. Where it raises
#: `UpdateRejected`, none is merged.
BeforeMerge = Callable[[int, Tensor, list[MaskedUpdate]], list[MaskedUpdate]]
#: Hook on the merged vector: (window, w_D) -> w_D.
AfterMerge = Callable[[int, Tensor], Tensor]
#: Nested masks of some densities (ascending) of a global vector: (w_D, densities, version) -> ranking.
MaskFamily = Callable[[Tensor, Sequence[float], int], Ranking]


class Server:
    """FedGMR's server.

    Args:
        config: validated options.
        plan: budget, seed and clients.
        layout: map of the global vector.
        w_D: initial global vector; the server's own from now on, which it overwrites.
        before_merge, after_merge: hooks of the host framework; see `BeforeMerge`.
        masks: family of masks; by `score` where None.
        shares: what of a client's uploads counts; all of them where None.

    Raises:
        ModelError: GMR-214, the smallest sub-model holds nothing.
    """

    def __init__(
        self,
        config: FedGMRConfig,
        plan: Plan,
        layout: ModelLayout,
        w_D: Tensor,
        *,
        before_merge: BeforeMerge | None = None,
        after_merge: AfterMerge | None = None,
        masks: MaskFamily | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.config, self.plan, self.layout = config, plan, layout
        self.before_merge, self.after_merge, self._masks = before_merge, after_merge, masks
        self._restricted = Restricted(shares)
        self._layers = LayerCounts(layout)
        clients = len(plan.client_samples)
        self.rules = restoration_rules(config)
        self.version = 0
        self.time = 0.0
        self.phase: Literal["ready", "collecting", "validating", "finished"] = "ready"
        self.candidate: Literal["global", "scaled"] = "global" if config.evaluate == "global" else "scaled"
        self.gmr = gmr.start(self.rules, config.start_densities(clients))
        self.dispatches = 0
        self.rejected = 0
        self.counts = [0] * clients  # dispatches made to each client
        self.samples = list(plan.client_samples)
        self.away: set[int] = set()  # clients that cannot be reached
        self.flights: dict[int, InFlight] = {}
        self.overdue: set[int] = set()  # dispatches whose slot is free, and whose answer would be merged
        self.staged: dict[int, Admitted] = {}
        self.buffer: dict[int, Admitted] = {}
        self.interval_start_D = w_D.clone() if config.score == "weight_change" else None
        self._densities_mean: tuple[tuple[float, ...], float] = ((), 0.0)
        self.ranked_D: Tensor = w_D  # in no ranking's order before the first
        self._flat_D: Tensor | None = w_D
        #: Room for the next merge [D]; between merges anybody may overwrite it.
        self.spare_D: Tensor | None = None
        self.put(w_D, self._rank())
        refuse_empty(self.ranking)

    @property
    def w_D(self) -> Tensor:
        """The global vector [D] in the layout's order, not to be changed in place."""
        if self._flat_D is None:
            self._flat_D = self.ranking.flat(self.ranked_D)
        return self._flat_D

    def put(self, w_D: Tensor, ranking: Ranking) -> None:
        """Make `w_D` [D], in the layout's order, the global vector, and `ranking` its ranking."""
        self.ranking, self._flat_D = ranking, None
        self.ranked_D, self.spare_D = ranking.ranked(w_D, out=self.spare_D), self.ranked_D
        is_other_D = torch.zeros_like(w_D, dtype=torch.bool)
        for entry in self.layout.entries:
            if entry.kind in ("dense", "bias"):
                is_other_D[entry.slice] = True
        self._others_O = ranking.ranked(is_other_D).nonzero().squeeze(1)

    # -- the state machine ----------------------------------------------------------------------------

    def start(self) -> list[Effect]:
        """First dispatches."""
        self._expect("ready", "start")
        self.phase = "collecting"
        return self._dispatch()

    def handle(self, event: Event) -> list[Effect]:
        """Advance by one event; the effects are to be carried out in order.

        Raises:
            UpdateRejected: GMR-405 if the phase does not allow the event.
        """
        if isinstance(event, UploadArrived):
            return self._upload(event)
        if isinstance(event, UploadRefused):
            return self._refused(event)
        if isinstance(event, ClientJoined):
            return self._joined(event)
        if isinstance(event, ClientLeft):
            self.away.add(event.client)
            return [self._client("left", event.client, event.time)]
        if isinstance(event, DispatchOverdue):
            return self._overdue(event)
        if isinstance(event, WindowClosed):
            self._expect("collecting", "WindowClosed")
            return self._close(event)
        self._expect("validating", "Validated")
        return self._restore(event)

    def _expect(self, phase: str, what: str) -> None:
        if self.phase != phase:
            raise UpdateRejected("GMR-405", f"{what} while the server is {self.phase}")

    # -- clients that come and go -----------------------------------------------------------------------

    def _joined(self, event: ClientJoined) -> list[Effect]:
        client = event.client
        self.away.discard(client)
        self.time = max(self.time, event.time)
        if event.samples is not None:
            self.samples[client] = event.samples
        if event.density is not None and self.counts[client] == 0:
            self._start_at(client, event.density)
        if event.fresh:
            for dispatch in [d for d in self.overdue if self.flights[d].client == client]:
                self._forget(dispatch)
        record = self._client("restarted" if event.fresh else "joined", client, event.time)
        return [record, *self._dispatch()] if self.phase == "collecting" else [record]

    def _start_at(self, client: int, density: float) -> None:
        """Give a client that has no sub-model yet another initial density."""
        densities = list(self.gmr.densities)
        densities[client] = max(density, self.gmr.floor)
        self.gmr = self.gmr._replace(densities=tuple(densities))
        if densities[client] not in self.ranking.densities:
            self.put(self.w_D, self._rank())

    def _overdue(self, event: DispatchOverdue) -> list[Effect]:
        flight = self.flights.get(event.dispatch)
        if flight is None or event.dispatch in self.staged or event.dispatch in self.overdue:
            return []
        before = [d for d in self.overdue if self.flights[d].client == flight.client]
        for d in before:  # one late answer of each client is waited for: what is remembered stays bounded
            self._forget(d)
        self.overdue.add(event.dispatch)
        self.away.add(flight.client)
        return [self._client("overdue", flight.client, event.time, event.dispatch)]

    def _forget(self, dispatch: int) -> None:
        self.flights.pop(dispatch, None)
        self.overdue.discard(dispatch)

    def _client(self, state: str, client: int, time: float, dispatch: int | None = None) -> Record:
        density, samples = self.gmr.densities[client], self.samples[client]
        return records.client(state, client, self.version, time, density, samples, dispatch)

    # -- uploads --------------------------------------------------------------------------------------

    def _upload(self, upload: UploadArrived) -> list[Effect]:
        limit = self.config.staleness_limit
        oldest = 0 if limit is None else self.version - limit
        try:
            admitted = admit(upload, self.flights, self.staged, self.layout.dtype, oldest=oldest)
        except UpdateRejected as refusal:
            self.rejected += 1
            if refusal.code in ANSWERED:
                self._forget(upload.dispatch)
            return [records.rejected(self.version, upload, refusal.code, refusal.message)]
        self.staged[upload.dispatch] = admitted
        self.overdue.discard(upload.dispatch)
        return []

    def _refused(self, event: UploadRefused) -> list[Effect]:
        self.rejected += 1
        flight = self.flights.get(event.dispatch)
        if flight is not None and flight.client == event.client and event.dispatch not in self.staged:
            self._forget(event.dispatch)
        return [records.rejected(self.version, event, event.code, event.message)]

    # -- windows --------------------------------------------------------------------------------------

    def _close(self, event: WindowClosed) -> list[Effect]:
        effects = self._merge(self._arrived(), event)
        is_tested = self._is_tested(event.start, event.end)
        self.version += 1
        self.time = event.end

        reason = self._budget_spent()
        if reason or is_tested:
            effects.append(Evaluate(last=reason is not None))
        if reason:
            self.phase = "finished"
            effects.append(Finish(reason))
        elif self.version % self.config.interval == 0:
            self.phase = "validating"
            effects.append(Validate())
        else:
            if self.config.mask_interval and self.version % self.config.mask_interval == 0:
                self.put(self.w_D, self._rank())
            effects += self._dispatch()
        return effects

    def _is_tested(self, before: float, end: float) -> bool:
        """Whether the model is evaluated after the present window, from second `before` to `end`."""
        every = self.config.evaluation_seconds
        if every is None:
            return self.version % self.plan.test_interval == 0
        return end // every > before // every

    def _arrived(self) -> list[Admitted]:
        """The window's uploads in the order of their merge, which are no longer in flight."""
        arrived = sorted(self.staged.values(), key=lambda a: a.order)
        self.staged = {}
        for admitted in arrived:
            del self.flights[admitted.upload.dispatch]
        return arrived

    def _budget_spent(self) -> Literal["windows", "time_budget"] | None:
        if self.config.time_budget is not None and self.time >= self.config.time_budget:
            return "time_budget"
        return "windows" if self.version >= self.plan.windows else None

    def _most_samples(self, scope: Sequence[Admitted]) -> float:
        """Samples that are believed of an upload: with `norm_bound`, so many times the median of all."""
        bound = self.config.norm_bound
        if bound is None or not scope:
            return math.inf
        return bound * statistics.median(a.upload.samples for a in scope)

    def _weighted(self, admitted: Admitted, most: float) -> MaskedUpdate:
        """c_n = s(tau_n) * samples (`most` of them), with the support of the dispatched mask.

        Without `staleness_normalised`, c_n = samples, and s(tau_n) scales the change.
        """
        c, flight, upload = self.config, admitted.flight, admitted.upload
        tau = self.version - flight.version
        damping = staleness_weight(
            c.staleness, tau, exponent=c.staleness_exponent, slope=c.hinge_slope, delay=c.hinge_delay
        )
        samples = min(float(upload.samples), most)
        update = MaskedUpdate(flight.ranking, flight.rung, upload.values_S, samples)
        update = self._restricted(upload.client, update, upload.sent_S)
        if c.staleness_normalised:
            return update._replace(weight=samples * damping)
        return scaled(update, damping, self.w_D, c.update_form, self._buffers)

    def _merge(self, arrived: list[Admitted], event: WindowClosed) -> list[Effect]:
        """Merge what `update_scope` says, if any `arrived`; returns their records and the window's."""
        latest, scope = self.buffer, arrived
        if self.config.update_scope == "buffer":
            latest = {**self.buffer, **{a.upload.client: a for a in arrived}}
            scope = [latest[n] for n in sorted(latest)]
        most = self._most_samples(scope)
        updates = [self._weighted(a, most) for a in scope] if arrived else []
        updates, defence = self._defended(updates)
        weights = {a.upload.dispatch: u.weight for a, u in zip(scope, updates, strict=False)}
        for a in arrived:  # of a client that answered twice, the buffer takes its later dispatch
            if a.upload.dispatch not in weights:
                weights[a.upload.dispatch] = self._weighted(a, most).weight
        if updates and self.before_merge is not None:
            try:
                updates = self.before_merge(self.version, self.w_D, updates)
            except UpdateRejected as refusal:
                return self._refuse_window(arrived, event, refusal)
        coverage, moved = records.NOBODY, 0.0
        shares: list[float | None] = [None] * len(arrived)
        if updates:
            result = merge(
                self.ranked_D,
                self.ranking,
                updates,
                rule=self.config.aggregation,
                form=self.config.update_form,
                buffers=self._buffers,
                server_step=self.config.server_step,
                participation=len(arrived) / len(self.counts) if self.config.mixing else 1.0,
                out=self.spare_D,
            )
            new_D, coverage = result.w_D, result.coverage
            if self.after_merge is not None:
                new_D = self.ranking.ranked(self.after_merge(self.version, self.ranking.flat(new_D)))
            moved = step_sq(self.ranked_D, new_D, self.ranking, self._buffers)
            if not math.isfinite(moved):
                problem = "the merged model would hold NaN or infinity"
                return self._refuse_window(arrived, event, UpdateRejected("GMR-403", problem))
            if not self._travels(new_D):  # else nobody could be sent it, and the run would end
                problem = f"the merged model would not fit payload_dtype={self.config.payload_dtype}"
                return self._refuse_window(arrived, event, UpdateRejected("GMR-403", problem))
            self.spare_D, self.ranked_D, self._flat_D = self.ranked_D, new_D, None
            self.buffer = latest
            if self.config.update_scope == "arrivals" and len(updates) == len(arrived):
                shares = list(coverage.shares)
        written: list[Effect] = [
            records.arrival(a, self.version, weights[a.upload.dispatch], share)
            for a, share in zip(arrived, shares, strict=True)
        ]
        if updates:
            written.append(records.layers(self.version, self._layers.held(updates)))
        return [*written, *defence, self._window(event, len(arrived), len(updates), coverage, moved)]

    def _defended(self, updates: list[MaskedUpdate]) -> tuple[list[MaskedUpdate], list[Effect]]:
        """The updates after `norm_bound` and `trim`, and the record of what they did."""
        config, reduced, undefended = self.config, 0, 0.0
        if not updates or (config.norm_bound is None and config.trim == 0.0):
            return updates, []
        if config.norm_bound is not None:
            updates, reduced = bounded(
                updates, self.w_D, config.norm_bound, config.update_form, self._buffers
            )
        if config.trim:
            updates, undefended = trimmed(updates, config.trim, self.layout.size, self.layout.parameters)
        return updates, [records.defence(self.version, len(updates), reduced, undefended)]

    def _refuse_window(
        self, arrived: list[Admitted], event: WindowClosed, why: UpdateRejected
    ) -> list[Effect]:
        """Uploads that are sound one by one cannot be merged: none is, and the buffer stays."""
        self.rejected += len(arrived)
        refused: list[Effect] = [
            records.rejected(self.version, a.upload, why.code, why.message) for a in arrived
        ]
        return [*refused, self._window(event, 0, 0, records.NOBODY, 0.0)]

    def _window(
        self, event: WindowClosed, arrivals: int, updates: int, coverage: Coverage, moved: float
    ) -> Record:
        return records.window(
            self.version,
            event,
            arrivals=arrivals,
            updates=updates,
            parameters=self.layout.parameters,
            coverage=coverage,
            moved=moved,
            in_flight=len(self.flights) - len(self.overdue),
            mean_density=self._mean_density(),
            density_floor=self.gmr.floor,
        )

    def _mean_density(self) -> float:
        densities, mean = self._densities_mean
        if densities is not self.gmr.densities:
            densities = self.gmr.densities
            mean = sum(densities) / len(densities)
            self._densities_mean = densities, mean
        return mean

    # -- restoration and dispatch ---------------------------------------------------------------------

    def _restore(self, event: Validated) -> list[Effect]:
        self.candidate = event.candidate
        seen = gmr.Observation(self.elapsed, event.server, event.clients, event.gradient)
        self.gmr, restorations = gmr.step(self.rules, self.gmr, seen)
        self.put(self.w_D, self._rank())
        if self.interval_start_D is not None:
            self.interval_start_D = self.w_D.clone()
        self.phase = "collecting"
        restored = [
            records.restoration(self.version, self.time, change, self.gmr.floor) for change in restorations
        ]
        return [*restored, *self._dispatch()]

    @property
    def elapsed(self) -> float:
        """Share of the budget that has passed: of `time_budget` if given, else of the windows."""
        if self.config.time_budget is not None:
            return min(1.0, self.time / self.config.time_budget)
        return self.version / self.plan.windows

    @property
    def learning_rate_scale(self) -> float:
        """Factor on the learning rate of what is dispatched now: rises linearly over the warm-up."""
        return (
            min(1.0, (self.version + 1) / self.config.warmup_windows) if self.config.warmup_windows else 1.0
        )

    def _rank(self) -> Ranking:
        """Masks for every density that is held now or could be held after the next restoration."""
        held = set(self.gmr.densities)
        wanted = held | {gmr.next_density(self.rules, d) for d in held}
        if self.config.local_objective == "ordered_dropout":
            wanted |= set(self.config.density_ladder)
        if self._masks is not None:
            return self._masks(self.w_D, sorted(wanted), self.version)
        change_D = None
        if self.interval_start_D is not None:
            change_D = self.w_D - self.interval_start_D
        score = self.config.score
        if score == "width" or score == "rolling_width":
            raise ValueError(f"score={score} needs its family of masks")
        score_P = scores(
            "magnitude" if score == "weight_change" and self.version == 0 else score,
            self.layout,
            self.w_D,
            change_D=change_D,
            cost_of_layer=self.plan.layer_costs,
            generator=torch_generator(self.plan.seed, "random_score"),
        )
        return rank(
            self.layout,
            self.w_D,
            score_P,
            sorted(wanted),
            layer_floor=self.config.layer_floor,
            prune_biases=self.config.prune_biases,
        )

    def _dispatch(self) -> list[Effect]:
        """Sub-models for idle clients, as many as may be in flight."""
        busy = {f.client for d, f in self.flights.items() if d not in self.overdue}
        idle = choose_idle(
            self.plan.seed, self.version, len(self.counts), busy, self.plan.in_flight, self.away
        )
        if not idle:
            return []
        prunable, parameters = self._norms()
        payloads: dict[int, Tensor] = {}
        scale = self.learning_rate_scale
        effects: list[Effect] = []
        for client in idle:
            density = self.gmr.densities[client]
            rung = self.ranking.rung(density)
            if rung not in payloads:
                payloads[rung] = self._payload(rung)
            sent = Dispatch(
                self.dispatches,
                client,
                self.version,
                self.counts[client],
                density,
                self.ranking,
                rung,
                payloads[rung],
                scale,
            )
            self.flights[sent.dispatch] = InFlight(client, self.version, density, self.ranking, rung)
            self.dispatches += 1
            self.counts[client] += 1
            effects += [records.dispatch(sent, self.time, prunable, parameters), sent]
        self._flat_D = None  # nobody asks for it while clients train, who need the memory
        return effects

    def _payload(self, rung: int) -> Tensor:
        """The rung's sub-model as a client receives it [S].

        Raises:
            WireError: GMR-722 if a weight is too large for `payload_dtype`.
        """
        values_S = self.ranked_D[: self.ranking.ends[rung]].clone()
        received_S = travelled(values_S, PAYLOAD_TYPES[self.config.payload_dtype])
        if received_S is not values_S and not bool(received_S.isfinite().all()):
            largest, kind = float(values_S.abs().max()), self.config.payload_dtype
            raise WireError("GMR-722", f"weight={largest:g} does not fit payload_dtype={kind}")
        return received_S

    def _travels(self, w_D: Tensor) -> bool:
        """Whether no value of a finite vector is too large for `payload_dtype`."""
        dtype = PAYLOAD_TYPES[self.config.payload_dtype]
        if dtype is None or not w_D.numel():
            return True
        ends = torch.stack(torch.aminmax(w_D))
        return bool(travelled(ends, dtype).isfinite().all())

    def _norms(self) -> tuple[Norms, Norms]:
        """Squared norms of the global vector, over prunable coordinates and over all parameters."""
        return norms(self.ranked_D, self.ranking, self._others_O, self._buffers)

    @property
    def _buffers(self) -> int:
        return self.layout.size - self.layout.parameters

    # -- models ---------------------------------------------------------------------------------------

    def coverage(self) -> Tensor:
        """float32 [D]: share of the clients, weighted by their samples, that hold a coordinate."""
        return self.ranking.coverage(self._samples_of_rungs())

    def _samples_of_rungs(self) -> list[float]:
        """Samples of the clients whose sub-model is of that rung [R]."""
        samples_R = [0.0] * len(self.ranking.densities)
        for density, samples in zip(self.gmr.densities, self.samples, strict=True):
            samples_R[self.ranking.rung(density)] += samples
        return samples_R

    def model(self, which: Literal["global", "scaled"]) -> Tensor:
        """The global vector [D], or the same scaled per coordinate by its coverage (a new tensor)."""
        model_D = self.ranking.flat(self.ranked_D) if self._flat_D is None else self._flat_D.clone()
        if which == "scaled" and min(self.gmr.densities) < 1.0:
            self.ranking.scale_by_coverage(model_D, self._samples_of_rungs())
        return model_D


#: Nobody holds anything: no update was merged.
_NOBODY = Coverage(0, 0, 0, ())


def restoration_rules(config: FedGMRConfig) -> gmr.GMRRules:
    """The restoration rules that a configuration describes."""
    return gmr.GMRRules(
        trigger=config.trigger,
        ladder=config.density_ladder,
        density_step=config.density_step,
        increment=config.density_increment,
        floor=config.density_min,
        patience=config.patience,
        delta=config.plateau_delta,
        after=config.plateau_after,
        higher_is_better=config.trigger_metric == "accuracy",
        time_fractions=config.time_fractions,
        time_floors=config.time_floors,
    )
