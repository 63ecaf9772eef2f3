"""The server under random arrivals, drops, duplicates, wrong clients and orders, restored at every step."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.events import (
    ClientJoined,
    ClientLeft,
    Dispatch,
    DispatchOverdue,
    Effect,
    Record,
    UploadArrived,
    Validated,
    WindowClosed,
)
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.snapshot import Snapshot, restore, snapshot
from fedgmr_plugin.kernels import ModelLayout, build_layout, staleness_weight


def tiny() -> tuple[ModelLayout, torch.Tensor]:
    with isolated_rng(0):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2))
    layout = build_layout(model)
    return layout, layout.gather(model)


LAYOUT, W = tiny()
DENSITIES = [0.1, 0.25, 0.5, 1.0]
metric = st.none() | st.sampled_from([0.1, 0.2, 0.3, 0.5])


class ServerMachine(RuleBasedStateMachine):
    """Drives a server with whatever a network may do to it, beside a plain account of what should happen."""

    @initialize(
        densities=st.lists(st.sampled_from(DENSITIES), min_size=1, max_size=4),
        in_flight=st.integers(1, 4),
        interval=st.integers(1, 3),
        options=st.sampled_from(
            [
                {},
                {"update_form": "replacement"},
                {"update_form": "replacement", "update_scope": "buffer"},
                {"staleness": "hinge", "hinge_delay": 1.0, "trigger": "mixed"},
                {"score": "weight_change", "layer_floor": 0.0},
                {"score": "random", "prune_biases": False, "trigger": "none"},
                {"staleness_limit": 1},
            ]
        ),
    )
    def begin(self, densities: list[float], in_flight: int, interval: int, options: dict[str, Any]) -> None:
        n = len(densities)
        common = {"densities": tuple(densities), "interval": interval, "patience": 1}
        self.config = FedGMRConfig(**{**common, **options})
        self.plan = Plan(3, 1000, min(in_flight, n), 5, (7,) * n)
        self.server = Server(self.config, self.plan, LAYOUT, W.clone())
        self.sent: dict[int, Dispatch] = {}
        self.open: set[int] = set()  # dispatches that are out, by our own account
        self.arrived: dict[int, UploadArrived] = {}  # admitted, not merged yet
        self.latest: dict[int, UploadArrived] = {}  # last merged upload of each client
        self.applied: list[int] = []
        self.history: list[UploadArrived] = []
        self.rejected = 0
        self.away: set[int] = set()
        self.overdue: set[int] = set()  # among the open ones
        self.densities = self.server.gmr.densities
        self.floor = self.server.gmr.floor
        self.clock = 0.0
        self.candidate = self.server.candidate
        self._note(self.server.start())

    # -- what the network does ---------------------------------------------------------------------

    def _upload(self, dispatch: int, seed: int, **changes: Any) -> UploadArrived:
        sent = self.sent[dispatch]
        values_S = 0.1 * torch.randn(len(sent.values_S), generator=torch.Generator().manual_seed(seed))
        if self.config.update_form == "replacement":
            values_S = values_S + sent.values_S
        fields: dict[str, Any] = {"dispatch": dispatch, "client": sent.client, "values_S": values_S}
        fields |= {"samples": 1 + seed % 50, "time": self.clock}
        return UploadArrived(**{**fields, **changes})

    @precondition(lambda self: self.open)
    @rule(data=st.data(), seed=st.integers(0, 10**6))
    def arrive(self, data: st.DataObject, seed: int) -> None:
        dispatch = data.draw(st.sampled_from(sorted(self.open)))
        upload = self._upload(dispatch, seed)
        limit = self.config.staleness_limit
        if limit is not None and self.server.version - self.sent[dispatch].version > limit:
            self._refused(upload, "GMR-407")
            self._close_flight(dispatch)
            return
        assert self.server.handle(upload) == []
        self._close_flight(dispatch)
        self.arrived[dispatch] = upload
        self.history.append(upload)

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def arrive_again(self, data: st.DataObject) -> None:
        """A message delivered twice, at any later time."""
        self._refused(data.draw(st.sampled_from(self.history)), "GMR-401")

    @precondition(lambda self: self.open and len(self.densities) > 1)
    @rule(data=st.data(), other=st.integers(1, 3))
    def arrive_from_the_wrong_client(self, data: st.DataObject, other: int) -> None:
        dispatch = data.draw(st.sampled_from(sorted(self.open)))
        n = len(self.densities)
        client = (self.sent[dispatch].client + other) % n
        if client != self.sent[dispatch].client:
            self._refused(self._upload(dispatch, 1, client=client), "GMR-406")

    @rule(dispatch=st.integers(-3, 500), client=st.integers(-1, 5))
    def arrive_from_nowhere(self, dispatch: int, client: int) -> None:
        if dispatch not in self.open:
            upload = UploadArrived(dispatch, client, torch.zeros(3), 1, self.clock)
            self._refused(upload, "GMR-401")

    @precondition(lambda self: self.open)
    @rule(data=st.data(), kind=st.sampled_from(["nan", "short", "samples"]))
    def arrive_broken(self, data: st.DataObject, kind: str) -> None:
        dispatch = data.draw(st.sampled_from(sorted(self.open)))
        good = self._upload(dispatch, 2).values_S
        changes: dict[str, Any] = {
            "nan": {"values_S": torch.where(torch.arange(len(good)) == 0, float("nan"), good)},
            "short": {"values_S": good[:-1]},
            "samples": {"samples": 0},
        }[kind]
        code = {"nan": "GMR-403", "short": "GMR-402", "samples": "GMR-404"}[kind]
        limit = self.config.staleness_limit
        if limit is not None and self.server.version - self.sent[dispatch].version > limit:
            code = "GMR-407"
        self._refused(self._upload(dispatch, 2, **changes), code)
        self._close_flight(dispatch)

    def _refused(self, upload: UploadArrived, code: str) -> None:
        w_D = self.server.w_D.clone()
        (effect,) = self.server.handle(upload)
        assert isinstance(effect, Record) and effect.fields["code"] == code
        assert torch.equal(w_D, self.server.w_D)
        self.rejected += 1

    def _close_flight(self, dispatch: int) -> None:
        self.open.remove(dispatch)
        self.overdue.discard(dispatch)

    @precondition(lambda self: self.open or self.arrived)
    @rule(data=st.data())
    def wait_in_vain(self, data: st.DataObject) -> None:
        """The slot is free; one late answer of each client is still taken."""
        dispatch = data.draw(st.sampled_from(sorted(self.open | set(self.arrived))))
        effects = self.server.handle(DispatchOverdue(dispatch, self.clock))
        if dispatch in self.arrived or dispatch in self.overdue:
            assert effects == []
            return
        client = self.sent[dispatch].client
        for older in [d for d in self.overdue if self.sent[d].client == client]:
            self._close_flight(older)
        self.overdue.add(dispatch)
        self.away.add(client)
        (effect,) = effects
        assert isinstance(effect, Record) and effect.fields["state"] == "overdue"

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        client = data.draw(st.integers(0, len(self.densities) - 1))
        self.server.handle(ClientLeft(client, self.clock))
        self.away.add(client)

    @precondition(lambda self: self.server.phase != "finished")
    @rule(data=st.data(), density=st.none() | st.sampled_from([0.3, 0.7]), samples=st.none() | st.just(9))
    def join(self, data: st.DataObject, density: float | None, samples: int | None) -> None:
        client = data.draw(st.integers(0, len(self.densities) - 1))
        first = self.server.counts[client] == 0
        if density is not None and first:
            self.densities = tuple(
                min(d, density) if n == client else d for n, d in enumerate(self.densities)
            )
        effects = self.server.handle(ClientJoined(client, self.clock, density, samples))
        self.away.discard(client)
        if density is not None and first:
            assert self.server.gmr.densities[client] == max(density, self.server.gmr.floor)
        if samples is not None:
            assert self.server.samples[client] == samples
        self._note(effects)

    # -- what the clock does -----------------------------------------------------------------------

    @precondition(lambda self: self.server.phase == "collecting")
    @rule(seconds=st.floats(0.1, 10))
    def close(self, seconds: float) -> None:
        old_D, version = self.server.w_D.clone(), self.server.version
        start, self.clock = self.clock, self.clock + seconds
        effects = self.server.handle(WindowClosed(start, self.clock, self.clock))
        merged = sorted(self.arrived.values(), key=lambda u: (u.client, u.dispatch))
        self.latest |= {u.client: u for u in merged}
        self.arrived = {}
        records = [e.fields for e in effects if isinstance(e, Record) and e.fields["type"] == "arrival"]
        assert [r["dispatch"] for r in records] == [u.dispatch for u in merged]
        for r in records:
            sent = self.sent[r["dispatch"]]
            assert r["version"] == sent.version <= version and r["staleness"] == version - sent.version
            assert r["dispatch"] not in self.applied
            assert (r["pibar"] is None) == (self.config.update_scope == "buffer")
            assert r["pibar"] is None or 0 < r["pibar"] <= 1
        self.applied += [u.dispatch for u in merged]
        self._compare(old_D, version, merged)
        (window,) = (e.fields for e in effects if isinstance(e, Record) and e.fields["type"] == "window")
        assert window["arrivals"] == len(merged) and window["window"] == version
        assert window["in_flight"] == len(self.open - self.overdue)
        assert self.server.version == version + 1
        self._note(effects)

    def _compare(self, old_D: torch.Tensor, version: int, arrived: list[UploadArrived]) -> None:
        """The merged vector, coordinate by coordinate, in NumPy."""
        buffered = self.config.update_scope == "buffer"
        merged = [self.latest[n] for n in sorted(self.latest)] if buffered and arrived else arrived
        old = old_D.double().numpy()
        top, bottom, shares = (np.zeros_like(old) for _ in range(3))
        weights = []
        for u in merged:
            c = self.config
            s = staleness_weight(
                c.staleness,
                version - self.sent[u.dispatch].version,
                exponent=c.staleness_exponent,
                slope=c.hinge_slope,
                delay=c.hinge_delay,
            )
            weights.append(s * u.samples)
            index = self.sent[u.dispatch].index_S.numpy()
            top[index] += weights[-1] * u.values_S.double().numpy()
            bottom[index] += weights[-1]
        held = bottom > 0
        for weight, u in zip(weights, merged, strict=True):
            index = self.sent[u.dispatch].index_S.numpy()
            shares[index] += weight / bottom[index]
        assert np.allclose(shares[held], 1.0) and not shares[~held].any()
        mean = np.divide(top, bottom, out=np.zeros_like(top), where=held)
        is_delta = np.arange(len(old)) < (LAYOUT.parameters if self.config.update_form == "delta" else 0)
        wanted = np.where(held, np.where(is_delta, old + mean, mean), old)
        new = self.server.w_D
        assert np.allclose(new.double().numpy(), wanted, rtol=1e-6, atol=1e-7)
        assert torch.equal(new[torch.from_numpy(~held)], old_D[torch.from_numpy(~held)])
        assert bool(torch.isfinite(new).all())

    @precondition(lambda self: self.server.phase == "validating")
    @rule(data=st.data(), server=metric, candidate=st.sampled_from(["global", "scaled"]))
    def validate(self, data: st.DataObject, server: float | None, candidate: Any) -> None:
        n = len(self.densities)
        clients = data.draw(st.lists(metric, min_size=n, max_size=n))
        w_D = self.server.w_D.clone()
        self._note(self.server.handle(Validated(candidate, server, tuple(clients))))
        assert torch.equal(w_D, self.server.w_D)
        self.candidate = candidate

    def _note(self, effects: list[Effect]) -> None:
        """New dispatches: one for each idle client that has a slot, cut from the present model and masks."""
        for e in effects:
            if not isinstance(e, Dispatch):
                continue
            assert e.dispatch not in self.sent and e.version == self.server.version
            assert e.client not in {self.sent[d].client for d in self.open - self.overdue}
            assert e.client not in self.away
            assert e.density == self.server.gmr.densities[e.client]
            assert e.count == sum(s.client == e.client for s in self.sent.values())
            assert torch.equal(e.values_S, self.server.w_D[e.index_S])
            self.sent[e.dispatch] = e
            self.open.add(e.dispatch)

    # -- what always holds -------------------------------------------------------------------------

    @invariant()
    def accounts_agree(self) -> None:
        server = self.server
        assert set(server.flights) == self.open | set(self.arrived)
        assert set(server.staged) == set(self.arrived)
        assert server.rejected == self.rejected and server.dispatches == len(self.sent)
        training = [self.sent[d].client for d in self.open - self.overdue]
        assert len(training) == len(set(training)) <= self.plan.in_flight
        assert server.overdue == self.overdue
        assert server.away == self.away
        late = [self.sent[d].client for d in self.overdue]
        assert len(late) == len(set(late))
        assert len(self.applied) == len(set(self.applied))
        assert server.candidate == self.candidate and server.time == self.clock

    @invariant()
    def densities_only_rise(self) -> None:
        gmr = self.server.gmr
        assert all(a <= b <= 1.0 for a, b in zip(self.densities, gmr.densities, strict=True))
        assert self.floor <= gmr.floor <= 1.0
        self.densities, self.floor = gmr.densities, gmr.floor

    @invariant()
    def models_are_sound(self) -> None:
        coverage_D = self.server.coverage()
        assert bool(((coverage_D >= 0) & (coverage_D <= 1)).all())
        assert bool((coverage_D[LAYOUT.by_name["2.bias"].slice] <= 1).all())
        assert torch.equal(self.server.model("global"), self.server.w_D)

    @invariant()
    def state_survives_serialisation(self) -> None:
        """Every step continues on a new server, restored from JSON and tensors."""
        state = snapshot(self.server)
        text = json.dumps(state.meta, allow_nan=False)
        tensors = {k: torch.from_numpy(t.numpy().copy()) for k, t in state.tensors.items()}
        fresh = Server(self.config, self.plan, LAYOUT, torch.full_like(W, 7.0))
        restore(fresh, Snapshot(json.loads(text), tensors))
        assert json.dumps(snapshot(fresh).meta) == text
        assert {k: t.tolist() for k, t in snapshot(fresh).tensors.items()} == {
            k: t.tolist() for k, t in tensors.items()
        }
        self.server = fresh


TestServer = ServerMachine.TestCase
TestServer.settings = settings(
    max_examples=max(25, settings().max_examples // 4), stateful_step_count=25, deadline=None
)
