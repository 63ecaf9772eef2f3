"""The server's state machine: admission, merging, schedule, sampling, warm-up, coverage, snapshots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedgmr_plugin.config import FedGMRConfig
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
    Validate,
    Validated,
    WindowClosed,
)
from fedgmr_plugin.engine.measures import LayerCounts
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.snapshot import Snapshot, restore, snapshot
from fedgmr_plugin.errors import UpdateRejected
from fedgmr_plugin.kernels import (
    MaskedUpdate,
    ModelLayout,
    Ranking,
    build_layout,
    merge,
    rank,
    scores,
    staleness_weight,
)
from fedgmr_plugin.protocol.schema import RECORDS, problems

#: Keys that the loop around the server adds to its records.
ADDED = {
    "dispatch": {"bytes_down"},
    "window": {"bytes_up", "bytes_down", "server_bytes_down", "learning_rate"},
}


def tiny() -> tuple[ModelLayout, Tensor]:
    with isolated_rng(0):
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5), nn.Linear(5, 2))
    layout = build_layout(model)
    return layout, layout.gather(model)


class World:
    """A server and the dispatches that it has made."""

    def __init__(
        self,
        densities: tuple[float, ...] = (1.0, 0.5, 0.2),
        *,
        windows: int = 10,
        in_flight: int | None = None,
        test_interval: int = 5,
        client_samples: tuple[int, ...] | None = None,
        seed: int = 0,
        hooks: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        layout, w_D = tiny()
        self.config = FedGMRConfig(densities=densities, **options)
        n = len(densities)
        self.plan = Plan(
            seed, windows, in_flight or n, test_interval, client_samples or (10,) * n,
            tuple(1.0 + i for i, _ in enumerate(layout.of_kind("prunable"))),
        )  # fmt: skip
        self.layout, self.buffers = layout, layout.size - layout.parameters
        self.server = Server(self.config, self.plan, layout, w_D, **(hooks or {}))
        self.sent: dict[int, Dispatch] = {}
        self.log: list[Effect] = []
        self.clock = 0.0

    def take(self, effects: list[Effect]) -> list[Effect]:
        self.sent.update({e.dispatch: e for e in effects if isinstance(e, Dispatch)})
        self.log += effects
        return effects

    def start(self) -> World:
        self.take(self.server.start())
        return self

    def handle(self, event: Event) -> list[Effect]:
        return self.take(self.server.handle(event))

    def upload(self, number: int, *, seed: int | None = None, **changes: Any) -> UploadArrived:
        """A small random change of the dispatched sub-model, in the configured form."""
        sent = self.sent[number]
        generator = torch.Generator().manual_seed(number if seed is None else seed)
        values_S = 0.1 * torch.randn(len(sent.values_S), generator=generator)
        is_buffer = sent.index_S >= self.layout.parameters
        if self.config.update_form == "replacement":
            values_S = sent.values_S + values_S
        else:
            values_S = torch.where(is_buffer, sent.values_S + values_S, values_S)
        fields: dict[str, Any] = {"dispatch": number, "client": sent.client, "values_S": values_S}
        fields |= {"samples": 10, "time": self.clock + 1.0, "change_sq": 0.5, "steps": 2}
        return UploadArrived(**{**fields, **changes})

    def close(self) -> list[Effect]:
        start, self.clock = self.clock, self.clock + 3.0
        return self.handle(WindowClosed(start, start + 2.5, self.clock))

    def window(self, clients: Iterable[int] | None = None) -> list[Effect]:
        """Upload for `clients` in flight (all by default), close, and answer a validation."""
        wanted = None if clients is None else set(clients)
        for dispatch, flight in list(self.server.flights.items()):
            if (wanted is None or flight.client in wanted) and dispatch not in self.server.staged:
                self.handle(self.upload(dispatch))
        effects = self.close()
        if any(isinstance(e, Validate) for e in effects):
            effects = effects + self.handle(Validated("scaled", 0.5, (0.5,) * len(self.server.counts)))
        return effects


def records(effects: Iterable[Effect], kind: str) -> list[dict[str, Any]]:
    return [e.fields for e in effects if isinstance(e, Record) and e.fields["type"] == kind]


def dispatched(effects: Iterable[Effect]) -> list[int]:
    return [e.client for e in effects if isinstance(e, Dispatch)]


# -- dispatches ------------------------------------------------------------------------------------


def test_everybody_gets_its_sub_model_at_the_start() -> None:
    world = World().start()
    server = world.server
    assert [(s.dispatch, s.client, s.version, s.count, s.density) for s in world.sent.values()] == [
        (0, 0, 0, 0, 1.0),
        (1, 1, 0, 0, 0.5),
        (2, 2, 0, 0, 0.2),
    ]
    ranking = rank(
        world.layout,
        server.w_D,
        scores("magnitude", world.layout, server.w_D),
        (0.2, 0.5, 1.0),
        layer_floor=0.02,
    )
    for sent in world.sent.values():
        mask = ranking.mask(ranking.rung(sent.density))
        assert torch.equal(sent.index_S.sort().values, mask.nonzero().squeeze(1))
        assert torch.equal(sent.values_S, server.w_D[sent.index_S])
    assert len(world.sent[0].values_S) == world.layout.size


def test_a_dispatch_record_measures_what_the_mask_leaves_out() -> None:
    world = World().start()
    w_D = world.server.w_D
    for record, sent in zip(records(world.log, "dispatch"), world.sent.values(), strict=True):
        mask = sent.ranking.mask(sent.rung)
        prunable = torch.cat(
            [torch.arange(e.offset, e.offset + e.size) for e in world.layout.of_kind("prunable")]
        )
        parameters = torch.arange(world.layout.parameters)
        for name, where in (("", prunable), ("full_", parameters)):
            w = w_D[where].double()
            assert record[f"{name}norm_sq"] == pytest.approx(float(w.square().sum()), rel=1e-12)
            gap = float((w * ~mask[where]).square().sum())
            assert record[f"{name}masked_norm_sq"] == pytest.approx(gap, rel=1e-12, abs=0)
        assert record["support"] == int(mask.sum()) and record["ranking"] == sent.ranking.digest
    assert records(world.log, "dispatch")[0]["masked_norm_sq"] == 0.0


def test_only_idle_clients_are_sent_the_next_sub_model() -> None:
    world = World().start()
    assert dispatched(world.window([0])) == [0]
    assert dispatched(world.window([0, 2])) == [0, 2]
    assert [f.client for f in world.server.flights.values()] == [1, 0, 2]
    assert [s.version for s in world.sent.values()] == [0, 0, 0, 1, 2, 2]
    assert [s.count for s in world.sent.values() if s.client == 0] == [0, 1, 2]
    assert world.server.counts == [3, 1, 2]


def test_at_most_so_many_clients_are_in_flight_and_all_get_their_turn() -> None:
    world = World((1.0, 0.5, 0.2, 0.1, 0.05), in_flight=2, windows=60).start()
    chosen = [dispatched(world.log)]
    for _ in range(40):
        assert len(world.server.flights) == 2
        chosen.append(dispatched(world.window()))
        assert len(set(chosen[-1])) == len(chosen[-1]) == 2 and chosen[-1] == sorted(chosen[-1])
    counts = [sum(n in c for c in chosen) for n in range(5)]
    assert min(counts) >= 8 and len({tuple(c) for c in chosen}) > 5
    again = World((1.0, 0.5, 0.2, 0.1, 0.05), in_flight=2, windows=60).start()
    assert [dispatched(again.log)] + [dispatched(again.window()) for _ in range(40)] == chosen
    other = World((1.0, 0.5, 0.2, 0.1, 0.05), in_flight=2, windows=60, seed=1).start()
    assert [dispatched(other.log)] + [dispatched(other.window()) for _ in range(40)] != chosen


def test_sampling_keeps_busy_clients_in_flight() -> None:
    world = World((1.0, 0.5, 0.2, 0.1), in_flight=2).start()
    first = dispatched(world.log)
    new = dispatched(world.window([first[0]]))
    assert len(new) == 1 and new[0] != first[1]


def test_the_learning_rate_warms_up_linearly() -> None:
    world = World((1.0, 0.5), warmup_windows=4, windows=20).start()
    for _ in range(6):
        world.window()
    scales = [s.learning_rate_scale for s in world.sent.values() if s.client == 0]
    assert scales == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert all(s.learning_rate_scale == 1.0 for s in World().start().sent.values())


def test_a_dense_start_gives_everybody_the_whole_model() -> None:
    world = World((1.0, 0.05), dense_start=True).start()
    assert [s.density for s in world.sent.values()] == [1.0, 1.0]
    assert all(len(s.values_S) == world.layout.size for s in world.sent.values())


def test_nobody_starts_below_the_floor() -> None:
    world = World((1.0, 0.5, 0.2), density_min=0.3, trigger="none").start()
    assert [s.density for s in world.sent.values()] == [1.0, 0.5, 0.3]
    assert world.server.gmr.floor == 0.3


# -- admission -------------------------------------------------------------------------------------


def bad(values_S: Tensor, value: float) -> Tensor:
    changed = values_S.clone()
    changed[-1] = value
    return changed


REJECTIONS: dict[str, tuple[str, Any, bool]] = {
    "never made": ("GMR-401", lambda w: w.upload(1, dispatch=99), False),
    "negative number": ("GMR-401", lambda w: w.upload(1, dispatch=-1), False),
    "wrong client": ("GMR-406", lambda w: w.upload(1, client=2), False),
    "unknown client": ("GMR-406", lambda w: w.upload(1, client=77), False),
    "too short": ("GMR-402", lambda w: w.upload(1, values_S=w.upload(1).values_S[:-1]), True),
    "too long": ("GMR-402", lambda w: w.upload(1, values_S=w.upload(0).values_S), True),
    "two axes": ("GMR-402", lambda w: w.upload(1, values_S=w.upload(1).values_S[None]), True),
    "empty": ("GMR-402", lambda w: w.upload(1, values_S=torch.zeros(0)), True),
    "float64": ("GMR-402", lambda w: w.upload(1, values_S=w.upload(1).values_S.double() * 1e300), True),
    "integers": ("GMR-402", lambda w: w.upload(1, values_S=w.upload(1).values_S.long()), True),
    "NaN": ("GMR-403", lambda w: w.upload(1, values_S=bad(w.upload(1).values_S, math.nan)), True),
    "infinity": ("GMR-403", lambda w: w.upload(1, values_S=bad(w.upload(1).values_S, -math.inf)), True),
    "no samples": ("GMR-404", lambda w: w.upload(1, samples=0), True),
    "negative samples": ("GMR-404", lambda w: w.upload(1, samples=-3), True),
    "NaN samples": ("GMR-404", lambda w: w.upload(1, samples=math.nan), True),
    "infinite samples": ("GMR-404", lambda w: w.upload(1, samples=math.inf), True),
    "unbelievable samples": ("GMR-404", lambda w: w.upload(1, samples=1e308), True),
    "huge values": ("GMR-403", lambda w: w.upload(1, values_S=bad(w.upload(1).values_S, 3e38)), True),
}


@pytest.mark.parametrize("name", REJECTIONS)
def test_a_bad_upload_is_rejected_counted_and_leaves_the_model_untouched(name: str) -> None:
    code, make, frees = REJECTIONS[name]
    world = World().start()
    w_D, ranking = world.server.w_D.clone(), world.server.ranking
    event = make(world)
    (record,) = records(world.handle(event), "rejected")
    assert problems(record) == [] and json.dumps(record, allow_nan=False)
    assert (record["code"], record["window"]) == (code, 0)
    assert (record["dispatch"], record["client"]) == (event.dispatch, event.client)
    assert world.server.rejected == 1 and world.server.staged == {}
    assert (1 in world.server.flights) == (not frees)
    effects = world.close()
    assert torch.equal(world.server.w_D, w_D) and world.server.ranking is ranking
    assert records(effects, "window")[0]["arrivals"] == 0 and records(effects, "arrival") == []
    assert dispatched(effects) == ([1] if frees else [])


def test_an_upload_is_applied_at_most_once() -> None:
    world = World().start()
    upload = world.upload(0)
    assert world.handle(upload) == []
    (again,) = world.handle(upload)
    assert isinstance(again, Record) and again.fields["code"] == "GMR-401"
    world.close()
    w_D = world.server.w_D.clone()
    (late,) = world.handle(upload)
    assert isinstance(late, Record) and late.fields["code"] == "GMR-401"
    world.close()
    assert torch.equal(world.server.w_D, w_D) and world.server.rejected == 2


def test_a_repeated_upload_does_not_displace_the_first() -> None:
    world, reference = World().start(), World().start()
    world.handle(world.upload(0))
    world.handle(world.upload(0, seed=99))
    reference.handle(reference.upload(0))
    world.close()
    reference.close()
    assert torch.equal(world.server.w_D, reference.server.w_D)


def test_an_upload_after_a_refused_one_is_not_in_flight() -> None:
    world = World().start()
    world.handle(world.upload(1, samples=0))
    (record,) = records(world.handle(world.upload(1)), "rejected")
    assert record["code"] == "GMR-401"


def test_events_out_of_order_are_errors_and_change_nothing() -> None:
    world = World(interval=1)
    closing, validated = WindowClosed(0.0, 1.0, 2.0), Validated("scaled", None, ())
    for event in (closing, validated):
        with pytest.raises(UpdateRejected, match="GMR-405"):
            world.handle(event)
    world.start()
    with pytest.raises(UpdateRejected, match="GMR-405"):
        world.server.start()
    with pytest.raises(UpdateRejected, match="GMR-405"):
        world.handle(validated)
    world.close()
    assert world.server.phase == "validating"
    with pytest.raises(UpdateRejected, match="GMR-405"):
        world.handle(closing)
    world.handle(validated)
    assert world.server.phase == "collecting" and world.server.version == 1


def test_an_overdue_dispatch_frees_its_slot_and_its_answer_is_still_merged() -> None:
    world = World().start()
    late = world.upload(1)
    (record,) = records(world.handle(DispatchOverdue(1, 5.0)), "client")
    assert (record["state"], record["client"], record["dispatch"]) == ("overdue", 1, 1)
    assert world.handle(DispatchOverdue(1, 6.0)) == world.handle(DispatchOverdue(55, 6.0)) == []
    world.handle(world.upload(2))
    assert dispatched(world.close()) == [2]  # the client that was lost is away until it is heard of
    assert dispatched(world.handle(ClientJoined(1, 7.0))) == [1]
    w_D = world.server.w_D.clone()
    assert world.handle(late) == []
    (arrival,) = records(world.close(), "arrival")
    assert arrival["dispatch"] == 1 and arrival["staleness"] == 1
    assert not torch.equal(world.server.w_D, w_D)


def test_one_late_answer_of_each_client_is_waited_for() -> None:
    world = World().start()
    first = world.upload(1)
    world.handle(DispatchOverdue(1, 5.0))
    (again,) = [e for e in world.handle(ClientJoined(1, 6.0)) if isinstance(e, Dispatch)]
    world.handle(DispatchOverdue(again.dispatch, 9.0))
    (record,) = records(world.handle(first), "rejected")
    assert record["code"] == "GMR-401"


def test_an_answer_older_than_the_limit_is_refused() -> None:
    world = World(staleness_limit=1).start()
    late = world.upload(1)
    for _ in range(2):
        world.close()
    (record,) = records(world.handle(late), "rejected")
    assert record["code"] == "GMR-407"
    assert 1 in dispatched(world.close())


def test_a_client_that_left_gets_nothing_until_it_joins() -> None:
    world = World().start()
    world.handle(world.upload(1))
    world.handle(ClientLeft(1, 3.0))
    assert dispatched(world.close()) == []
    effects = world.handle(ClientJoined(1, 4.0, samples=3))
    assert dispatched(effects) == [1] and world.server.samples[1] == 3


# -- merging ---------------------------------------------------------------------------------------


def test_a_bound_on_norms_bounds_the_samples_that_are_believed() -> None:
    """Who says a million samples weighs 1.5 medians; without the bound, nearly everything."""
    for bound, share in ((None, 1.0), (1.5, 15 / 35)):
        world = World((1.0, 1.0, 1.0), norm_bound=bound, staleness="constant").start()
        for n, samples in ((0, 10), (1, 10), (2, 10_000_000)):
            world.handle(world.upload(n, samples=samples))
        weights = [a["weight"] for a in records(world.close(), "arrival")]
        assert weights[2] / sum(weights) == pytest.approx(share, rel=1e-5)


def test_a_window_merges_what_arrived_weighted_by_staleness_and_samples() -> None:
    """c_n = s(tau) * samples, with the mask of the dispatch; pibar, gamma and coverage by brute force."""
    world = World(windows=20, staleness="polynomial", staleness_exponent=0.5).start()
    world.window([0])
    world.window([0])
    w_D, ranking = world.server.w_D.clone(), world.server.ranking
    uploads = [world.upload(n, samples=s) for n, s in ((1, 30), (4, 10), (2, 20))]  # clients 1, 0, 2
    for u in uploads:
        world.handle(u)
    effects = world.close()
    ordered = sorted(uploads, key=lambda u: u.client)
    updates, taus = [], []
    for u in ordered:
        sent = world.sent[u.dispatch]
        taus.append(2 - sent.version)
        weight = u.samples * staleness_weight("polynomial", taus[-1], exponent=0.5)
        updates.append(MaskedUpdate(sent.ranking, sent.rung, u.values_S, weight))
    wanted = merge(ranking.ranked(w_D), ranking, updates, form="delta", buffers=world.buffers)
    assert torch.equal(world.server.w_D, ranking.flat(wanted.w_D))

    arrivals = records(effects, "arrival")
    assert [(a["client"], a["dispatch"], a["staleness"]) for a in arrivals] == [
        (0, 4, 0),
        (1, 1, 2),
        (2, 2, 2),
    ]
    held_ND = torch.zeros(3, world.layout.size, dtype=torch.float64)
    for row, u in zip(held_ND, updates, strict=True):
        row[u.index_S] = 1
    weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    pi_ND = held_ND * weights[:, None] / (held_ND * weights[:, None]).sum(0)
    for n, a in enumerate(arrivals):
        assert a["weight"] == updates[n].weight and a["density"] == (1.0, 0.5, 0.2)[n]
        assert a["pibar"] == pytest.approx(float(pi_ND[n].max()))
        assert a["version"] == 2 - a["staleness"] and a["samples"] == ordered[n].samples
    assert torch.allclose(pi_ND.sum(0), torch.ones(world.layout.size, dtype=torch.float64))

    (window,) = records(effects, "window")
    counts_P = held_ND[:, : world.layout.parameters].sum(0)
    assert (window["window"], window["arrivals"], window["uncovered"]) == (2, 3, 0)
    assert window["gamma_min"] == int(counts_P.min()) == 1
    assert window["coverage"] == pytest.approx(float(counts_P.mean() / 3))
    step = (world.server.w_D - w_D)[: world.layout.parameters].double()
    assert window["step_sq"] == pytest.approx(float(step.square().sum()), rel=1e-12)
    assert (window["start"], window["close"], window["end"]) == (6.0, 8.5, 9.0)
    assert window["in_flight"] == 0 and window["mean_density"] == pytest.approx(1.7 / 3)


def test_coordinates_that_no_arrival_holds_stay_and_are_counted() -> None:
    world = World().start()
    w_D = world.server.w_D.clone()
    effects = world.window([2])
    mask = world.sent[2].ranking.mask(world.sent[2].rung)
    assert torch.equal(world.server.w_D[~mask], w_D[~mask])
    assert not torch.equal(world.server.w_D[mask], w_D[mask])
    (window,) = records(effects, "window")
    assert window["uncovered"] == int((~mask[: world.layout.parameters]).sum())
    assert window["gamma_min"] == 1 and records(effects, "arrival")[0]["pibar"] == 1.0


def test_an_empty_window_changes_nothing_and_is_recorded() -> None:
    world = World().start()
    w_D = world.server.w_D.clone()
    (window,) = records(world.close(), "window")
    assert torch.equal(world.server.w_D, w_D) and world.server.version == 1
    assert (window["arrivals"], window["gamma_min"], window["step_sq"]) == (0, 0, 0.0)
    assert (window["uncovered"], window["coverage"]) == (world.layout.parameters, 0.0)


def test_the_order_of_arrival_does_not_matter() -> None:
    results = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        world = World().start()
        for dispatch in order:
            world.handle(world.upload(dispatch))
        effects = world.close()
        results.append((world.server.w_D.tolist(), [r.fields for r in effects if isinstance(r, Record)]))
    assert results[0] == results[1] == results[2]


def test_the_buffer_averages_everybodys_last_upload() -> None:
    world = World(update_scope="buffer", update_form="replacement", windows=20).start()
    world.window()
    first = {u.client: u for u in (world.upload(d) for d in (0, 1, 2))}
    w_D, ranking = world.server.w_D.clone(), world.server.ranking
    new = world.upload(3)
    world.handle(new)
    effects = world.close()
    updates = []
    for client in range(3):
        upload = new if client == 0 else first[client]
        tau = 1 - (1 if client == 0 else 0)
        weight = 10 * staleness_weight("polynomial", tau)
        sent = world.sent[upload.dispatch]
        updates.append(MaskedUpdate(sent.ranking, sent.rung, upload.values_S, weight))
    wanted = merge(ranking.ranked(w_D), ranking, updates, form="replacement", buffers=world.buffers)
    assert torch.equal(world.server.w_D, ranking.flat(wanted.w_D))
    (arrival,) = records(effects, "arrival")
    assert arrival["pibar"] is None and arrival["weight"] == 10.0 and arrival["dispatch"] == 3
    assert records(effects, "window")[0]["uncovered"] == 0


@pytest.mark.parametrize("late_first", [True, False])
def test_the_buffer_takes_the_later_of_two_answers_of_a_client(late_first: bool) -> None:
    """A late answer and the next one meet in a window: both are in the log, in whatever order they came."""

    def answered(*numbers: int) -> tuple[World, list[Effect]]:
        world = World(update_scope="buffer").start()
        world.window()
        world.handle(DispatchOverdue(3, 5.0))
        world.handle(ClientJoined(0, 6.0))
        for number in numbers:
            world.handle(world.upload(number))
        return world, world.close()

    world, effects = answered(*((3, 6) if late_first else (6, 3)))
    assert world.sent[3].client == world.sent[6].client == 0
    found = records(effects, "arrival")
    assert [(r["dispatch"], r["weight"]) for r in found] == [(3, 10.0), (6, 10.0)]
    assert records(effects, "window")[0]["arrivals"] == 2
    alone, _ = answered(6)
    assert torch.equal(world.server.w_D, alone.server.w_D)


def test_the_buffer_rests_in_a_window_without_arrivals() -> None:
    world = World(update_scope="buffer", update_form="replacement", windows=20).start()
    world.window()
    w_D = world.server.w_D.clone()
    world.close()
    assert torch.equal(world.server.w_D, w_D)


def test_mixing_moves_by_the_participating_share() -> None:
    plain, mixed = World().start(), World(mixing=True).start()
    w_D = plain.server.w_D.clone().double()
    for world in (plain, mixed):
        world.window([0, 1])
    moved = w_D + (plain.server.w_D.double() - w_D) * 2 / 3
    assert torch.allclose(mixed.server.w_D.double(), moved, rtol=1e-6, atol=1e-7)


def test_hooks_see_the_window_and_may_change_or_drop_updates() -> None:
    seen: list[tuple[int, int]] = []

    def before(window: int, w_D: Tensor, updates: list[MaskedUpdate]) -> list[MaskedUpdate]:
        seen.append((window, len(updates)))
        return updates[:1]

    def after(window: int, w_D: Tensor) -> Tensor:
        return w_D + 1.0

    hooked = World(hooks={"before_merge": before, "after_merge": after}).start()
    reference = World().start()
    effects = hooked.window()
    reference.window([0])
    assert seen == [(0, 3)] and torch.equal(hooked.server.w_D, reference.server.w_D + 1.0)
    assert [a["pibar"] for a in records(effects, "arrival")] == [None] * 3


def test_what_a_defence_cannot_judge_is_refused_and_the_run_goes_on() -> None:
    """One of three clients does not answer; those that did get the model as it was."""

    def before(window: int, w_D: Tensor, updates: list[MaskedUpdate]) -> list[MaskedUpdate]:
        if len(updates) < 3:
            raise UpdateRejected("GMR-408", "too few")
        return updates

    world = World(hooks={"before_merge": before}, windows=20).start()
    w_D = world.server.w_D.clone()
    effects = world.window([0, 1])
    refused = [(r["client"], r["code"]) for r in records(effects, "rejected")]
    assert refused == [(0, "GMR-408"), (1, "GMR-408")]
    assert torch.equal(world.server.w_D, w_D) and records(effects, "window")[0]["arrivals"] == 0
    assert world.server.rejected == 2 and {d["client"] for d in records(effects, "dispatch")} == {0, 1}
    world.window()
    assert not torch.equal(world.server.w_D, w_D)


@pytest.mark.parametrize("rule", ["mask_aware", "global_average"])
def test_a_defence_that_drops_every_update_leaves_the_model_untouched(rule: Any) -> None:
    world = World(aggregation=rule, hooks={"before_merge": lambda window, w_D, updates: []}).start()
    w_D = world.server.w_D.clone()
    (window,) = records(world.window(), "window")
    assert torch.equal(world.server.w_D, w_D) and window["gamma_min"] == 0 and window["coverage"] == 0.0


def test_finite_uploads_cannot_make_the_model_infinite() -> None:
    world = World((1.0, 1.0), windows=20).start()
    for _ in range(3):
        w_D = world.server.w_D.clone()
        for dispatch in list(world.server.flights):
            sent = world.sent[dispatch]
            world.handle(world.upload(dispatch, values_S=torch.full_like(sent.values_S, 3e38)))
        effects = world.close()
        assert torch.isfinite(world.server.w_D).all()
    assert torch.equal(world.server.w_D, w_D)
    assert {r["code"] for r in records(world.log, "rejected")} == {"GMR-403"}
    assert world.server.rejected >= 2 and records(effects, "window")[0]["arrivals"] == 0


def test_one_client_cannot_make_the_uploads_of_others_be_thrown_away() -> None:
    """A lie about samples or a huge value is refused by itself; the window's other uploads count."""
    for lie in ({"samples": 1e308}, {"samples": 2.0**60}, {"values": 3e38}, {"values": 1e25}):
        world, reference = World((1.0, 1.0)).start(), World((1.0, 1.0)).start()
        size = world.layout.size
        values = {"values_S": torch.full((size,), lie["values"])} if "values" in lie else {}
        world.handle(world.upload(1, **values, **{k: v for k, v in lie.items() if k == "samples"}))
        for w in (world, reference):
            w.handle(w.upload(0))
            w.close()
        assert torch.equal(world.server.w_D, reference.server.w_D)


def test_a_refused_window_leaves_the_buffer_as_it_was() -> None:
    """What a client sent before stays, also where its next upload is refused with the window."""
    world = World((1.0, 0.5), update_scope="buffer", windows=20, interval=20).start()
    other = World((1.0, 0.5), update_scope="buffer", windows=20, interval=20).start()
    for w in (world, other):
        w.window()
    world.server.after_merge = lambda _, w_D: w_D * math.inf
    refused = world.window([0])
    world.server.after_merge = None
    assert [r["code"] for r in records(refused, "rejected")] == ["GMR-403"]
    other.close()
    for w in (world, other):
        numbers = {s.client: n for n, s in w.sent.items() if n in w.server.flights}
        w.handle(w.upload(numbers[1], seed=5))
        w.close()
    assert torch.equal(world.server.w_D, other.server.w_D)


def test_a_hook_that_breaks_the_model_leaves_it_untouched() -> None:
    world = World(hooks={"after_merge": lambda window, w_D: w_D * math.nan}).start()
    w_D = world.server.w_D.clone()
    effects = world.window()
    assert torch.equal(world.server.w_D, w_D) and records(effects, "window")[0]["arrivals"] == 0
    assert len(records(effects, "rejected")) == world.server.rejected == 3
    assert dispatched(effects) == [0, 1, 2]


@pytest.mark.parametrize("rule", ["mask_aware", "global_average"])
def test_an_ancient_upload_with_a_steep_staleness_rule_is_still_merged_soundly(rule: Any) -> None:
    world = World((1.0, 0.5), windows=50, staleness_exponent=10.0, aggregation=rule).start()
    for _ in range(5):
        world.window([0])
    for alone in (True, False):
        if not alone:
            world.handle(world.upload(max(world.server.flights)))
        else:
            world.handle(world.upload(1))
        effects = world.close()
        assert torch.isfinite(world.server.w_D).all()
        assert all(0 < a["pibar"] <= 1 for a in records(effects, "arrival"))


# -- the schedule ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("windows", "interval"), [(1, 1), (5, 2), (7, 3), (6, 10), (4, 1)])
def test_evaluations_come_when_fedml_has_them(windows: int, interval: int) -> None:
    """After rounds 0, f, 2f, ... and after the last one."""
    world = World(windows=windows, test_interval=interval).start()
    evaluated = []
    for round_index in range(windows):
        found = [e for e in world.window() if isinstance(e, Evaluate)]
        evaluated += [(round_index, e.last) for e in found]
    last = windows - 1
    assert evaluated == [(r, r == last) for r in range(windows) if r % interval == 0 or r == last]
    assert world.server.phase == "finished"


def test_the_run_ends_after_its_windows() -> None:
    world = World(windows=2).start()
    assert not any(isinstance(e, Finish) for e in world.window())
    effects = world.window()
    assert effects[-1] == Finish("windows") and dispatched(effects) == []
    with pytest.raises(UpdateRejected, match="GMR-405"):
        world.close()


def test_the_run_ends_with_its_time_budget() -> None:
    world = World(windows=100, time_budget=7.0).start()
    ends = [e for _ in range(3) for e in world.window() if isinstance(e, Finish)]
    assert ends == [Finish("time_budget")] and world.server.version == 3 and world.server.time == 9.0
    exact = World(windows=100, time_budget=6.0).start()
    assert [e for _ in range(2) for e in exact.window() if isinstance(e, Finish)] == [Finish("time_budget")]


def test_elapsed_is_a_share_of_the_time_budget_or_of_the_windows() -> None:
    by_windows, by_time = World(windows=4).start(), World(windows=100, time_budget=30.0).start()
    for world in (by_windows, by_time):
        world.window()
    assert by_windows.server.elapsed == 0.25 and by_time.server.elapsed == pytest.approx(0.1)


def test_validation_is_asked_for_every_interval_and_not_after_the_end() -> None:
    world = World(windows=6, interval=2).start()
    asked = [any(isinstance(e, Validate) for e in world.window()) for _ in range(6)]
    assert asked == [False, True, False, True, False, False]


def test_masks_change_only_at_intervals() -> None:
    world = World(windows=20, interval=3, trigger="none").start()
    digests = [world.server.ranking.digest]
    for _ in range(9):
        world.window()
        digests.append(world.server.ranking.digest)
    for start in (0, 3, 6):
        assert len(set(digests[start : start + 3])) == 1
    assert len(set(digests)) == 4


def test_between_intervals_the_stored_masks_cut_the_new_model() -> None:
    world = World(windows=20, interval=10).start()
    world.window()
    old, new = world.sent[1], world.sent[4]
    assert (old.client, new.client, new.version) == (1, 1, 1)
    assert torch.equal(old.index_S, new.index_S)
    assert torch.equal(new.values_S, world.server.w_D[new.index_S]) and not torch.equal(
        old.values_S, new.values_S
    )


def test_a_restored_coordinate_starts_at_the_servers_value() -> None:
    world = World(
        (1.0, 0.2), windows=20, interval=1, trigger="time", time_fractions=(0.05,), time_floors=(1.0,)
    )
    world.start()
    effects = world.window()
    (restored,) = records(effects, "restoration")
    assert (restored["client"], restored["cause"], restored["before"], restored["after"]) == (
        1,
        "time",
        0.2,
        1.0,
    )
    assert problems(restored) == [] and restored["floor"] == 1.0 and restored["window"] == 1
    sent = world.sent[3]
    assert sent.client == 1 and sent.density == 1.0
    assert (
        torch.equal(sent.values_S, world.server.w_D[sent.index_S]) and len(sent.values_S) == world.layout.size
    )


def test_a_flight_keeps_the_density_and_mask_that_it_was_sent_with() -> None:
    world = World(
        (1.0, 0.2), windows=20, interval=1, trigger="time", time_fractions=(0.05,), time_floors=(1.0,)
    )
    world.start()
    world.window([0])
    assert world.server.gmr.densities == (1.0, 1.0) and world.server.flights[1].density == 0.2
    w_D = world.server.w_D.clone()
    effects = world.window([1])
    mask = world.sent[1].ranking.mask(world.sent[1].rung)
    assert torch.equal(world.server.w_D[~mask], w_D[~mask])
    assert records(effects, "arrival")[0]["density"] == 0.2
    assert world.sent[max(world.sent)].density == 1.0


def test_the_validated_candidate_is_the_one_to_ship() -> None:
    world = World(interval=1, evaluate="validation", windows=9).start()
    assert world.server.candidate == "scaled"
    world.close()
    world.handle(Validated("global", 0.5, ()))
    assert world.server.candidate == "global"
    assert World(evaluate="global").server.candidate == "global"


# -- scores over time ------------------------------------------------------------------------------


def test_the_weight_change_score_uses_the_change_over_the_last_interval() -> None:
    world = World(
        (1.0, 0.3), windows=20, interval=2, score="weight_change", trigger="none", layer_floor=0.0
    ).start()
    server, layout = world.server, world.layout
    first_D = server.w_D.clone()
    magnitude = rank(layout, first_D, scores("magnitude", layout, first_D), (0.3, 0.5, 1.0))
    assert torch.equal(server.ranking.mask(server.ranking.rung(0.3)), magnitude.mask(0))
    for _ in range(2):
        world.window()
    for _ in range(2):
        wanted = rank(
            layout,
            server.w_D,
            scores("weight_change", layout, server.w_D, change_D=server.w_D - first_D),
            (0.3,),
        )
        assert torch.equal(server.ranking.mask(server.ranking.rung(0.3)), wanted.mask(0))
        first_D = server.w_D.clone()
        world.window()
        world.window()


def test_the_random_score_keeps_its_masks() -> None:
    world = World((1.0, 0.3), windows=20, interval=1, score="random", trigger="none", layer_floor=0.0).start()
    digests = {world.server.ranking.digest}
    for _ in range(3):
        world.window()
        digests.add(world.server.ranking.digest)
    assert len(digests) == 1


def test_the_per_cost_score_uses_the_plans_costs() -> None:
    world = World((1.0, 0.3), score="per_cost", layer_floor=0.0)
    server = world.server
    score_P = scores("per_cost", world.layout, server.w_D, cost_of_layer=world.plan.layer_costs)
    wanted = rank(world.layout, server.w_D, score_P, (0.3,))
    assert torch.equal(server.ranking.mask(server.ranking.rung(0.3)), wanted.mask(0))


# -- models ----------------------------------------------------------------------------------------


def test_the_scaled_model_is_the_plain_mean_of_the_latest_sub_models() -> None:
    world = World((1.0, 0.5, 0.2), client_samples=(10, 30, 60)).start()
    world.window()
    server = world.server
    mean_D = torch.zeros(world.layout.size, dtype=torch.float64)
    for density, samples in zip((1.0, 0.5, 0.2), (10, 30, 60), strict=True):
        mean_D += samples / 100 * server.w_D * server.ranking.mask(server.ranking.rung(density))
    assert torch.allclose(server.model("scaled").double(), mean_D, rtol=1e-6, atol=1e-9)
    coverage_D = server.coverage()
    assert set(coverage_D.unique().tolist()) == {torch.tensor(v).item() for v in (0.1, 0.4, 1.0)}
    buffers = torch.arange(world.layout.parameters, world.layout.size)
    assert (coverage_D[buffers] == 1.0).all()
    assert torch.equal(server.model("global"), server.w_D)
    server.model("global").fill_(9.0)
    server.model("scaled").fill_(9.0)
    assert not (server.w_D == 9.0).any()


def test_the_scaled_model_is_w_once_everybody_holds_everything() -> None:
    world = World((1.0, 1.0)).start()
    world.window()
    assert torch.equal(world.server.model("scaled"), world.server.w_D)


# -- records ---------------------------------------------------------------------------------------


def test_records_are_complete_typed_and_json() -> None:
    world = World((1.0, 0.5, 0.05), windows=12, interval=2, patience=1).start()
    world.handle(world.upload(1, samples=0))
    for _ in range(12):
        world.window()
    kinds = set()
    for effect in world.log:
        if not isinstance(effect, Record):
            continue
        fields = effect.fields
        added = ADDED.get(fields["type"], set())
        assert problems({**fields, **dict.fromkeys(added, 0.0)}) == []
        assert json.loads(json.dumps(fields, allow_nan=False)) == fields
        present = [k for k in RECORDS[fields["type"]] if k in fields]
        assert [k for k in fields if k != "type"] == present  # in the documented order
        kinds.add(fields["type"])
    assert kinds == {"dispatch", "arrival", "rejected", "layers", "window", "restoration"}


@pytest.mark.parametrize("scope", ["arrivals", "buffer"])
def test_what_is_held_of_each_layer_is_recorded_with_every_merge(scope: str) -> None:
    """By counting in masks, and against the mean coverage that the window's record has."""
    world = World((1.0, 0.5, 0.05), windows=12, interval=2, patience=1, update_scope=scope).start()
    server, layout = world.server, world.server.layout
    latest: dict[int, Tensor] = {}
    for _ in range(12):
        flights = {f.client: f.ranking.mask(f.rung) for f in server.flights.values()}
        effects = world.window()
        arrived = {r["client"] for r in records(effects, "arrival")}
        latest = {**(latest if scope == "buffer" else {}), **{n: flights[n] for n in arrived}}
        (window,), found = records(effects, "window"), records(effects, "layers")
        assert bool(found) == bool(arrived)
        for record in found:
            entries = [e for e in layout.entries if e.kind != "buffer"]
            assert record["window"] == window["window"]
            assert record["held"] == [sum(int(m[e.slice].sum()) for m in latest.values()) for e in entries]
            total = window["coverage"] * layout.parameters * len(latest)
            assert sum(record["held"]) == pytest.approx(total)


def test_counts_of_layers_are_right_after_many_rankings() -> None:
    layout = build_layout(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 6), nn.Linear(6, 2)))
    counts, generator = LayerCounts(layout), torch.Generator().manual_seed(0)
    for _ in range(150):
        rung_D = torch.randint(0, 4, (layout.size,), generator=generator).to(torch.int16)
        rung_D[layout.parameters :] = 0
        ranking = Ranking((0.1, 0.5, 1.0), rung_D)
        updates = [MaskedUpdate(ranking, rung, torch.empty(0), 1.0) for rung in (2, 0, 1, 0)]
        entries = [e for e in layout.entries if e.kind != "buffer"]
        wanted = [sum(int((rung_D[e.slice] <= u.rung).sum()) for u in updates) for e in entries]
        assert counts.held(updates) == wanted


def test_densities_of_a_run_only_rise_and_every_rise_is_recorded() -> None:
    world = World((1.0, 0.5, 0.05), windows=60, interval=2, patience=1).start()
    held = {0: 1.0, 1: 0.5, 2: 0.05}
    for _ in range(60):
        for r in records(world.window(), "restoration"):
            if r["client"] is not None:
                assert r["before"] == held[r["client"]] < r["after"]
                held[r["client"]] = r["after"]
        assert tuple(held.values()) == world.server.gmr.densities
    assert world.server.gmr.densities == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_staleness_that_scales_changes_and_running_statistics(form: str) -> None:
    """Client 1's upload is two windows old: its change counts s = 3^-1/2 of itself, alone and unweighed.

    In the delta form running statistics are no changes: they are averaged as they came.
    """
    options = {"staleness_normalised": False, "staleness_exponent": 0.5, "trigger": "none"}
    world = World((1.0, 0.5), update_form=form, **options).start()
    world.window([0])
    world.window([0])
    (late,) = (d for d, f in world.server.flights.items() if f.client == 1)
    upload, sent, before_D = world.upload(late), world.sent[late], world.server.w_D.clone()
    world.handle(upload)
    effects = world.close()
    assert [r["staleness"] for r in records(effects, "arrival")] == [2] and world.buffers > 0
    index_S, factor = sent.index_S, 3**-0.5
    is_buffer_S = index_S >= world.layout.parameters
    change_S = upload.values_S - (before_D[index_S] if form == "replacement" else 0.0)
    wanted_S = before_D[index_S] + factor * change_S
    if form == "delta":
        wanted_S = torch.where(is_buffer_S, upload.values_S, wanted_S)
    after_D = world.server.w_D
    torch.testing.assert_close(after_D[index_S], wanted_S, rtol=1e-6, atol=1e-6)
    assert bool((after_D[index_S][is_buffer_S] != before_D[index_S][is_buffer_S]).all())
    others_D = torch.ones(world.layout.size, dtype=torch.bool)
    others_D[index_S] = False
    assert torch.equal(after_D[others_D], before_D[others_D])


# -- snapshots -------------------------------------------------------------------------------------

SNAPSHOT_OPTIONS: list[dict[str, Any]] = [
    {},
    {"update_scope": "buffer", "update_form": "replacement"},
    {"score": "weight_change"},
    {"score": "random", "trigger": "mixed"},
    {"score": "per_cost", "evaluate": "validation", "in_flight": 2},
]


def stored(state: Snapshot) -> Snapshot:
    """Through JSON, and tensors through their bytes."""
    tensors = {
        k: torch.frombuffer(bytearray(t.contiguous().numpy().tobytes()), dtype=t.dtype).reshape(t.shape)
        for k, t in state.tensors.items()
    }
    return Snapshot(json.loads(json.dumps(state.meta, allow_nan=False)), tensors)


@pytest.mark.parametrize("options", SNAPSHOT_OPTIONS, ids=str)
def test_a_server_restored_at_every_event_continues_to_the_same_bits(options: dict[str, Any]) -> None:
    common: dict[str, Any] = {"windows": 13, "interval": 2, "patience": 1, **options}
    reference = World((1.0, 0.5, 0.05), **common)
    resumed = World((1.0, 0.5, 0.05), **common)

    def again(world: World) -> None:
        state = stored(snapshot(world.server))
        world.server = Server(world.config, world.plan, world.layout, torch.zeros(world.layout.size))
        restore(world.server, state)
        assert stored(snapshot(world.server)).meta == state.meta

    script: list[Any] = [lambda w: w.start()]
    arrivals = [(0,), (0, 1), (0,), (0, 1, 2), (1,), (), (2, 0)]
    for number in range(13):
        for client in arrivals[number % len(arrivals)]:

            def one(w: World, client: int = client) -> None:
                for d, f in list(w.server.flights.items()):
                    if f.client == client and d not in w.server.staged:
                        w.handle(w.upload(d))

            script.append(one)
        script.append(lambda w: w.close())

        def answer(w: World) -> None:
            if w.server.phase == "validating":
                metric = 0.5 - 0.01 * w.server.version
                w.handle(Validated("global", metric, (metric, None, 0.5)))

        script.append(answer)
    for act in script:
        act(reference)
        again(resumed)
        act(resumed)
        assert torch.equal(resumed.server.w_D, reference.server.w_D)
        assert resumed.server.ranking.digest == reference.server.ranking.digest
        assert resumed.server.candidate == reference.server.candidate
        assert resumed.server.elapsed == reference.server.elapsed
    assert reference.server.phase == resumed.server.phase == "finished"
    assert [e.fields for e in reference.log if isinstance(e, Record)] == [
        e.fields for e in resumed.log if isinstance(e, Record)
    ]


def test_a_snapshot_does_not_change_with_the_server() -> None:
    world = World(update_scope="buffer", update_form="replacement").start()
    world.window()
    state = snapshot(world.server)
    before = {k: t.clone() for k, t in state.tensors.items()}
    meta = json.dumps(state.meta)
    world.window()
    world.server.ranked_D.add_(1.0)
    assert json.dumps(state.meta) == meta
    assert all(torch.equal(before[k], t) for k, t in state.tensors.items())
