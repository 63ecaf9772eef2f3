"""Gradual model restoration: steps, triggers, cool-downs, and that a density never falls."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.server import restoration_rules
from fedgmr_plugin.kernels import GMRRules, GMRState, Observation, Restoration, next_density, restoring_pays
from fedgmr_plugin.kernels import start as gmr_start
from fedgmr_plugin.kernels import step as gmr_step
from fedgmr_plugin.kernels.density import server_patience

HIGH = FedGMRConfig().initial_densities(10)


def run(
    rules: GMRRules, state: GMRState, observations: list[Observation]
) -> tuple[GMRState, list[tuple[int, Restoration]]]:
    """Checks one after another: (last state, (number of the check from 1, restoration) ...)."""
    done = []
    for check, seen in enumerate(observations, start=1):
        state, restorations = gmr_step(rules, state, seen)
        done += [(check, r) for r in restorations]
    return state, done


def clients_only(*metrics: float | None) -> list[Observation]:
    return [Observation(0.0, None, (m,)) for m in metrics]


def server_only(*metrics: float | None) -> list[Observation]:
    return [Observation(0.0, m, ()) for m in metrics]


# -- steps -----------------------------------------------------------------------------------------


def test_the_ladder_goes_to_the_next_rung_from_anywhere() -> None:
    rules = GMRRules()
    steps = {0.01: 0.05, 0.05: 0.1, 0.07: 0.1, 0.1: 0.2, 0.2: 0.5, 0.3: 0.5, 0.5: 1.0, 0.999: 1.0, 1.0: 1.0}
    assert {d: next_density(rules, d) for d in steps} == steps


def test_fixed_steps_add_the_increment_up_to_one() -> None:
    rules = GMRRules(density_step="fixed", increment=0.1)
    density, seen = 0.05, []
    while density < 1.0:
        density = next_density(rules, density)
        seen.append(density)
    assert seen == [0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 1.0]
    assert next_density(rules, 0.9) == 1.0 == next_density(rules, 1.0)


def test_proportional_steps_double_but_add_at_most_a_fifth() -> None:
    rules = GMRRules(density_step="proportional", increment=0.1)
    density, seen = 0.05, []
    while density < 1.0:
        density = next_density(rules, density)
        seen.append(density)
    assert seen == [0.1, 0.2, 0.4, 0.6, 0.8, 1.0]


@given(
    density=st.floats(0.001, 1.0),
    mode=st.sampled_from(["ladder", "fixed", "proportional"]),
    increment=st.floats(0.01, 1.0),
)
def test_a_step_goes_up_and_never_beyond_one(density: float, mode: Any, increment: float) -> None:
    after = next_density(GMRRules(density_step=mode, increment=increment), density)
    assert density < after <= 1.0 or after == density == 1.0


# -- the time trigger ------------------------------------------------------------------------------


def means(rules: GMRRules, elapsed: list[float]) -> list[float]:
    state, seen = gmr_start(rules, HIGH), []
    for share in elapsed:
        state, _ = gmr_step(rules, state, Observation(share))
        seen.append(sum(state.densities) / 10)
    return seen


@pytest.mark.parametrize("trigger", ["time", "mixed"])
def test_the_time_trigger_has_the_published_mean_densities(trigger: Any) -> None:
    elapsed = [0.1, 0.19, 0.2, 0.39, 0.4, 0.6, 0.79, 0.8, 1.0]
    expected = [0.21, 0.21, 0.24, 0.24, 0.31, 0.55, 0.55, 1.0, 1.0]
    assert means(GMRRules(trigger=trigger), elapsed) == pytest.approx(expected, abs=1e-12)


def test_the_time_trigger_catches_up_after_a_long_interval() -> None:
    rules = GMRRules(trigger="time")
    state, done = gmr_step(rules, gmr_start(rules, (0.05, 1.0)), Observation(0.65))
    assert done == (Restoration(0, "time", 0.05, 0.5),) and state.floor == 0.5


def test_the_time_trigger_ignores_metrics_and_none_ignores_everything() -> None:
    flat = [Observation(0.1, 0.5, (0.5,) * 10, (True,) * 10) for _ in range(50)]
    for trigger in ("time", "none"):
        rules = GMRRules(trigger=trigger, patience=1)
        state, done = run(rules, gmr_start(rules, HIGH), flat)
        assert done == [] and state.densities == HIGH
    late = GMRRules(trigger="none")
    assert gmr_step(late, gmr_start(late, HIGH), Observation(1.0))[1] == ()


def test_a_floor_that_lifts_nobody_is_reported_once_without_a_client() -> None:
    rules = GMRRules(trigger="time")
    _, done = run(rules, gmr_start(rules, (0.5, 1.0)), [Observation(0.2), Observation(0.3), Observation(0.4)])
    assert done == [(1, Restoration(None, "time", 0.02, 0.1)), (3, Restoration(None, "time", 0.1, 0.2))]


def test_mixed_restores_by_time_and_by_plateau() -> None:
    rules = GMRRules(trigger="mixed", patience=1)
    observations = [
        Observation(0.0, None, (0.5,)),
        Observation(0.1, None, (0.5,)),
        Observation(0.45, None, (0.5,)),
    ]
    state, done = run(rules, gmr_start(rules, (0.05,)), observations)
    assert [(c, r.cause, r.after) for c, r in done] == [(2, "client_plateau", 0.1), (3, "time", 0.2)]
    assert state.densities == (0.2,)


# -- plateaus --------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_a_client_fires_after_patience_checks_and_sleeps_for_twice_as_many(patience: int) -> None:
    """The first check sets the mark; then `patience` bad ones fire; then 2 patience are not looked at."""
    rules = GMRRules(patience=patience)
    _, done = run(rules, gmr_start(rules, (0.05,)), clients_only(*[0.5] * (1 + 13 * patience)))
    checks = [c for c, _ in done]
    assert checks == [1 + patience * k for k in (1, 4, 7, 10)]
    assert [(r.before, r.after) for _, r in done] == [(0.05, 0.1), (0.1, 0.2), (0.2, 0.5), (0.5, 1.0)]
    assert {(r.client, r.cause) for _, r in done} == {(0, "client_plateau")}


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_the_server_fires_after_patience_checks_and_sleeps_for_as_many(patience: int) -> None:
    rules = GMRRules(patience=patience)
    _, done = run(rules, gmr_start(rules, (0.1,)), server_only(*[0.5] * (1 + 12 * patience)))
    assert [c for c, _ in done] == [1 + patience * k for k in (1, 3, 5, 7, 9)]
    floors = [(r.client, r.before, r.after) for _, r in done]
    assert floors[:3] == [(None, 0.02, 0.05), (None, 0.05, 0.1), (0, 0.1, 0.2)]
    assert floors[3:] == [(0, 0.2, 0.5), (0, 0.5, 1.0)]


def test_an_improvement_resets_the_counter() -> None:
    rules = GMRRules(patience=2)
    state, done = run(rules, gmr_start(rules, (0.05,)), clients_only(0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4))
    assert done == [] and state.clients[0].best == 0.4 and state.clients[0].bad_checks == 0


def test_counters_are_reset_when_a_detector_fires() -> None:
    rules = GMRRules(patience=3)
    state, done = run(rules, gmr_start(rules, (0.05,)), clients_only(*[0.5] * 4))
    assert len(done) == 1 and state.clients[0].bad_checks == 0
    assert state.clients[0].sleeps_until == 4 + 6


def test_a_client_at_density_one_does_not_restore_and_its_counter_restarts() -> None:
    rules = GMRRules(patience=2)
    state, done = run(rules, gmr_start(rules, (1.0,)), clients_only(*[0.5] * 5))
    assert done == [] and state.clients[0].bad_checks == 0 and state.clients[0].sleeps_until == 0


@pytest.mark.parametrize("higher", [True, False], ids=["accuracy", "loss"])
def test_there_is_no_plateau_before_something_was_learned(higher: bool) -> None:
    """Noise at chance, nothing measured, not-a-number: nothing counts before a gain of `after`."""
    sign = 1.0 if higher else -1.0
    rules = GMRRules(patience=2, after=0.25, higher_is_better=higher)
    before = [sign * m for m in (0.5, 0.5, 0.625, 0.5, 0.5, 0.5)] + [None, float("nan"), sign * 0.5]
    begun = [sign * m for m in (0.75, 0.75, 0.75)]
    state, done = run(rules, gmr_start(rules, (0.05,)), clients_only(*before, *begun))
    assert [(c, r.client) for c, r in done] == [(len(before) + 3, 0)]
    assert state.clients[0].first == sign * 0.5 and state.clients[0].best == sign * 0.75

    state, done = run(rules, gmr_start(rules, (0.05,)), server_only(*before, *begun))
    assert [(c, r.cause) for c, r in done] == [(len(before) + 3, "server_plateau")]

    again, done = run(rules, state, clients_only(*[sign * 0.5] * 4))
    assert done == [] and again.clients[0].first == sign * 0.5  # a client has to learn something itself


def test_when_the_server_fires_everybody_sleeps_and_starts_again() -> None:
    rules = GMRRules(patience=2)
    seen = [
        Observation(0.0, 0.5, (0.5, 0.9)),
        Observation(0.0, 0.5, (0.6, 0.8)),
        Observation(0.0, 0.5, (0.6, 0.95)),
    ]
    state, done = run(rules, gmr_start(rules, (0.02, 1.0)), seen)
    assert done == [(3, Restoration(0, "server_plateau", 0.02, 0.05))]
    assert [c.sleeps_until for c in state.clients] == [5, 5] and state.server.sleeps_until == 5
    assert [c.bad_checks for c in state.clients] == [0, 0]
    asleep, done = run(rules, state, [Observation(0.0, 0.1, (0.1, 0.1))] * 2)
    assert done == [] and asleep.clients == state.clients and asleep.server == state.server


def test_a_servers_cool_down_does_not_shorten_a_clients_own() -> None:
    """The client that fires in check 3 sleeps until 7; the server firing in check 5 would say 7 or less."""
    rules = GMRRules(patience=2)
    metrics = [0.1, 0.5, 0.5, 0.5]
    seen = [Observation(0.0, m, (0.5,)) for m in metrics]
    state, done = run(rules, gmr_start(rules, (0.05,)), seen)
    assert [(c, r.cause) for c, r in done] == [(3, "client_plateau"), (4, "server_plateau")]
    assert state.clients[0].sleeps_until == max(3 + 4, 4 + 2)


def test_a_client_and_the_server_may_fire_in_the_same_check() -> None:
    rules = GMRRules(patience=1, floor=0.1)
    seen = [Observation(0.0, 0.5, (0.5, 0.5))] * 2
    state, done = run(rules, gmr_start(rules, (0.05, 0.5)), seen)
    assert [(r.client, r.cause, r.before, r.after) for _, r in done] == [
        (0, "client_plateau", 0.05, 0.1),
        (1, "client_plateau", 0.5, 1.0),
        (0, "server_plateau", 0.1, 0.2),
    ]
    assert state.densities == (0.2, 1.0)


def test_an_improvement_must_exceed_delta() -> None:
    rules = GMRRules(patience=1, delta=0.25)
    exact = clients_only(0.5, 0.75)  # improves by delta, not by more
    assert len(run(rules, gmr_start(rules, (0.05,)), exact)[1]) == 1
    more = clients_only(0.5, 0.78125)
    assert run(rules, gmr_start(rules, (0.05,)), more)[1] == []


def test_a_loss_improves_downwards() -> None:
    rules = GMRRules(patience=1, higher_is_better=False)
    assert run(rules, gmr_start(rules, (0.05,)), clients_only(3.0, 2.0, 1.0))[1] == []
    assert len(run(rules, gmr_start(rules, (0.05,)), clients_only(1.0, 2.0))[1]) == 1


def test_an_unknown_metric_is_not_a_check() -> None:
    rules = GMRRules(patience=1)
    state, done = run(rules, gmr_start(rules, (0.05,)), clients_only(None, 0.5, None, None))
    assert done == [] and state.clients[0].best == 0.5 and state.checks == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("higher", [True, False])
def test_a_metric_that_is_not_finite_does_not_blind_the_detector(bad: float, higher: bool) -> None:
    """A diverged model has no best metric: a later improvement must count as one."""
    rules = GMRRules(patience=2, higher_is_better=higher)
    better = [0.1, 0.2, 0.3, 0.4, 0.5] if higher else [0.5, 0.4, 0.3, 0.2, 0.1]
    state, done = run(rules, gmr_start(rules, (0.05,)), clients_only(bad, *better))
    assert done == [] and state.clients[0].best == better[-1]


def test_patience_of_the_server_grows_once_there_is_nothing_left_to_restore() -> None:
    for patience, expected in ((1, 5), (5, 25), (9, 45), (10, 50), (40, 50)):
        rules = GMRRules(patience=patience)
        assert server_patience(rules, 0.5) == patience
        assert server_patience(rules, 1.0) == expected
        assert server_patience(GMRRules(patience=patience, trigger="none"), 0.02) == expected


def test_a_floor_at_one_stays_and_nothing_is_reported() -> None:
    rules = GMRRules(patience=1, floor=1.0)
    state, done = run(rules, gmr_start(rules, (1.0,)), server_only(*[0.5] * 60))
    assert done == [] and state.floor == 1.0


def test_rules_come_from_the_configuration() -> None:
    config = FedGMRConfig(
        trigger="mixed",
        patience=7,
        plateau_delta=0.01,
        plateau_after=0.5,
        trigger_metric="loss",
        density_min=0.03,
    )
    rules = restoration_rules(config)
    assert rules.after == 0.5
    assert (rules.trigger, rules.patience, rules.delta, rules.higher_is_better) == ("mixed", 7, 0.01, False)
    assert (rules.floor, rules.ladder) == (0.03, (0.05, 0.1, 0.2, 0.5, 1.0))
    assert restoration_rules(FedGMRConfig()).higher_is_better


# -- the gradient trigger --------------------------------------------------------------------------


def test_the_gradient_trigger_is_the_inequality_of_the_method_page() -> None:
    """||grad_J F||^2 >= 3 ||m grad F||^2 T(d') / T(d)."""
    assert restoring_pays(1.0, 6.0, 5.0, 10.0)
    assert not restoring_pays(1.0, math.nextafter(6.0, 0.0), 5.0, 10.0)
    assert restoring_pays(0.0, 1e-30, 5.0, 10.0)


@given(
    held=st.floats(1e-6, 1e6),
    gained=st.floats(1e-6, 1e6),
    now=st.floats(0.1, 100),
    after=st.floats(0.1, 100),
    scale=st.sampled_from([2.0**-8, 2.0, 2.0**10]),
)
def test_the_gradient_trigger_does_not_depend_on_units(
    held: float, gained: float, now: float, after: float, scale: float
) -> None:
    wanted = restoring_pays(held, gained, now, after)
    assert restoring_pays(held * scale, gained * scale, now, after) == wanted
    assert restoring_pays(held, gained, now * scale, after * scale) == wanted


def test_votes_restore_and_cool_down_and_leave_the_floor() -> None:
    rules = GMRRules(trigger="gradient", patience=2)
    seen = [Observation(0.0, 0.1, (), (True, False))] * 6
    state, done = run(rules, gmr_start(rules, (0.05, 0.05)), seen)
    assert [(c, r.client, r.after, r.cause) for c, r in done] == [
        (1, 0, 0.1, "gradient"),
        (6, 0, 0.2, "gradient"),
    ]
    assert state.floor == rules.floor and state.densities == (0.2, 0.05)


# -- laws ------------------------------------------------------------------------------------------

metric = st.none() | st.floats(0, 1, width=16)


@given(
    trigger=st.sampled_from(["plateau", "time", "mixed", "gradient", "none"]),
    mode=st.sampled_from(["ladder", "fixed", "proportional"]),
    patience=st.integers(1, 3),
    delta=st.sampled_from([0.0, 0.1]),
    higher=st.booleans(),
    initial=st.lists(st.sampled_from([0.03, 0.05, 0.1, 0.33, 0.5, 1.0]), min_size=1, max_size=4),
    data=st.data(),
)
def test_densities_and_floor_never_fall_and_restorations_account_for_every_rise(
    trigger: Any,
    mode: Any,
    patience: int,
    delta: float,
    higher: bool,
    initial: list[float],
    data: st.DataObject,
) -> None:
    rules = GMRRules(
        trigger=trigger, density_step=mode, patience=patience, delta=delta, higher_is_better=higher
    )
    n = len(initial)
    state = gmr_start(rules, initial)
    elapsed = 0.0
    for check in range(1, data.draw(st.integers(1, 25)) + 1):
        elapsed = min(1.0, elapsed + data.draw(st.sampled_from([0.0, 0.05, 0.2])))
        metrics = data.draw(st.lists(metric, min_size=n, max_size=n))
        votes = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
        old = state
        state, done = gmr_step(rules, state, Observation(elapsed, data.draw(metric), metrics, votes))
        assert state.checks == check
        assert all(a <= b <= 1.0 for a, b in zip(old.densities, state.densities, strict=True))
        assert rules.floor <= old.floor <= state.floor <= 1.0
        replayed = list(old.densities)
        for r in done:
            assert r.before < r.after
            if r.client is not None:
                assert replayed[r.client] == r.before
                replayed[r.client] = r.after
        assert tuple(replayed) == state.densities
        if state.floor > old.floor:
            assert min(state.densities) >= state.floor
        if trigger == "none":
            assert state.densities == tuple(initial)
        assert all(c.bad_checks < patience for c in state.clients)


@given(metrics=st.lists(metric, max_size=20))
def test_a_state_survives_its_own_tuple_form(metrics: list[float | None]) -> None:
    """Checkpoints store states as plain tuples; continuing from one gives the same restorations."""
    rules = GMRRules(patience=1)
    state = gmr_start(rules, (0.05, 0.2))
    for m in metrics:
        copy = GMRState(
            tuple(state.densities),
            state.floor,
            state.checks,
            type(state.server)(*tuple(state.server)),
            tuple(type(c)(*tuple(c)) for c in state.clients),
        )
        seen = Observation(0.0, m, (m, None))
        assert gmr_step(rules, copy, seen) == gmr_step(rules, state, seen)
        state, _ = gmr_step(rules, state, seen)
