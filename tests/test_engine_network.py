"""The virtual clock: published windows, conservation of bytes, traces, and a state that can be stored."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.network import (
    Arrival,
    LogNormalLinks,
    TraceLinks,
    Transfer,
    VirtualNetwork,
    Window,
    train_seconds,
)
from fedgmr_plugin.kernels.cost import flight_seconds, window_seconds
from fedgmr_plugin.runtimes.traces import load_traces

few = settings(max_examples=max(10, settings().max_examples // 5))
HIGH = FedGMRConfig().initial_densities(10)
STILL: dict[str, Any] = {"client_jitter": 0.0, "server_jitter": 0.0}
Trace = tuple[np.ndarray, np.ndarray]


def network(densities: Sequence[float], megabytes: float, seed: int = 0, **options: Any) -> VirtualNetwork:
    config = FedGMRConfig(densities=tuple(densities), **options)
    return VirtualNetwork(config, densities, megabytes, LogNormalLinks(config, densities, seed))


def traced(
    densities: Sequence[float], megabytes: float, traces: list[Trace], **options: Any
) -> VirtualNetwork:
    config = FedGMRConfig(densities=tuple(densities), **options)
    return VirtualNetwork(config, densities, megabytes, TraceLinks(config, densities, 3, traces))


class Loop:
    """Everybody trains all the time: who arrives is sent the next sub-model."""

    def __init__(self, net: VirtualNetwork, held: Sequence[float] | None = None) -> None:
        self.net, self.held = net, list(held or net.densities)
        self.sent: dict[int, tuple[int, float, float]] = {}  # dispatch -> client, time, MB
        self.arrived: list[Arrival] = []
        self.windows: list[Window] = []
        self.idle = list(range(len(net.densities)))

    def window(self) -> Window:
        for n in self.idle:
            number = len(self.sent)
            megabytes = self.net.dispatch(number, n, self.held[n], self.held[n])
            self.sent[number] = (n, self.net.now, megabytes)
        window = self.net.close_window()
        self.idle = [a.client for a in window.arrivals]
        self.arrived += window.arrivals
        self.windows.append(window)
        return window

    def run(self, windows: int) -> Loop:
        for _ in range(windows):
            self.window()
        return self


# -- the published clock ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("megabytes", "published"), [(25.98, 9.29), (37.2, 12.66), (43.1, 14.43), (17.26, 6.68)]
)
def test_without_jitter_every_window_has_the_published_length(megabytes: float, published: float) -> None:
    loop = Loop(network(HIGH, megabytes, **STILL)).run(12)
    for window in loop.windows:
        assert window.end - window.start == pytest.approx(0.3 * megabytes + 1.5, abs=1e-9)
        assert window.end - window.start == pytest.approx(window_seconds(megabytes), abs=1e-9)
        assert round(window.end - window.start, 2) == published


def test_windows_follow_each_other_without_gaps() -> None:
    windows = Loop(network(HIGH, 37.2)).run(10).windows
    assert windows[0].start == 0.0
    for before, after in pairwise(windows):
        assert after.start == before.end
    for w in windows:
        assert w.start < w.close and w.end == pytest.approx(w.close + 0.5)


@pytest.mark.parametrize(
    ("initial", "density", "windows"),
    [
        (0.05, 0.05, 0.77),
        (0.05, 0.1, 1.51),
        (0.05, 0.2, 2.98),
        (0.05, 0.5, 7.39),
        (0.05, 1.0, 14.7),
        (0.1, 0.1, 0.77),
        (0.1, 0.2, 1.51),
        (0.1, 0.5, 3.71),
        (0.1, 1.0, 7.39),
        (0.5, 0.5, 0.77),
        (0.5, 1.0, 1.51),
    ],
)
def test_a_restored_client_is_as_slow_as_published(initial: float, density: float, windows: float) -> None:
    loop = Loop(network((1.0, initial), 37.2, **STILL), held=(1.0, density)).run(34)
    length = window_seconds(37.2)
    mine = [a for a in loop.arrived if a.client == 1]
    assert len(mine) >= 2
    for arrival in mine:
        seconds = arrival.time - loop.sent[arrival.dispatch][1]
        assert seconds == pytest.approx(flight_seconds(37.2, density, initial), abs=1e-9)
        assert seconds / length == pytest.approx(windows, abs=0.04 if windows > 10 else 0.0075)
    taken = [w for w, window in enumerate(loop.windows) for a in window.arrivals if a.client == 1]
    # the window takes in what has arrived at its close, the aggregation time before its end
    whole = math.ceil((flight_seconds(37.2, density, initial) + 0.5) / length)
    assert np.diff([-1, *taken]).tolist() == [whole] * len(taken)


def test_a_client_of_small_density_is_as_fast_as_the_dense_one() -> None:
    """Every class arrives in every window while densities are the initial ones."""
    for window in Loop(network(HIGH, 37.2, **STILL)).run(3).windows:
        assert [a.client for a in window.arrivals] == list(range(10))


# -- the fluid -------------------------------------------------------------------------------------


def replay(loop: Loop, dispatch: int, not_before: float) -> float:
    """When the last byte of a flight arrives: small steps of its phases over the windows' constant rates."""
    client, _, megabytes = loop.sent[dispatch]
    phases = [
        ("down", megabytes),
        ("train", train_seconds(loop.net.config, client, loop.held[client])),
        ("up", megabytes),
    ]
    time = not_before
    for phase, amount in phases:
        left = amount
        while left > 1e-12:
            number = next((i for i, w in enumerate(loop.windows) if w.start <= time < w.end), None)
            if number is None:
                return math.inf
            down, up = loop.net.links.client(number, client)
            server_up, _ = loop.net.links.server(number)
            rate = {"down": min(down(time)[0], server_up), "train": 1.0, "up": up(time)[0]}[phase]
            room = loop.windows[number].end - time
            if left <= rate * room:
                time, left = time + left / rate, 0.0
            else:
                time, left = loop.windows[number].end, left - rate * room
    return time


@few
@given(
    seed=st.integers(0, 2**31),
    held=st.lists(st.sampled_from([0.05, 0.1, 0.2, 0.5, 1.0]), min_size=2, max_size=5),
    megabytes=st.floats(1, 60),
    sigma=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_no_byte_is_lost_or_gained_across_windows(
    seed: int, held: list[float], megabytes: float, sigma: float
) -> None:
    """Each arrival is where replaying the flight over the recorded windows puts it."""
    initial = [1.0, *(min(d, 0.3) for d in held[1:])]
    held[0] = 1.0
    net = network(
        initial,
        megabytes,
        seed,
        client_jitter=sigma,
        server_jitter=0.1,
        server_download=1e9,
        client_download=1.0,
    )
    loop = Loop(net, held).run(12)
    assert loop.arrived
    for arrival in loop.arrived:
        client, sent_at, sent_mb = loop.sent[arrival.dispatch]
        assert (arrival.client, arrival.megabytes) == (client, sent_mb)
        assert arrival.time == pytest.approx(replay(loop, arrival.dispatch, sent_at), rel=1e-9)


@few
@given(seed=st.integers(0, 2**31), schedule=st.sampled_from(["async", "sync"]), splitting=st.booleans())
def test_arrivals_are_never_earlier_than_physics_allows_and_never_late_for_their_window(
    seed: int, schedule: str, splitting: bool
) -> None:
    held = (1.0, 1.0, 0.2, 0.2, 0.1)
    net = network((1.0, 0.5, 0.2, 0.1, 0.05), 20.0, seed, schedule=schedule, incremental_splitting=splitting)
    loop = Loop(net, held).run(15)
    fastest = [
        max(net.links.client(w, n)[direction](0.0)[0] for w in range(15))
        for n in range(5)
        for direction in (0, 1)
    ]
    for number, window in enumerate(loop.windows):
        for arrival in window.arrivals:
            client, sent_at, megabytes = loop.sent[arrival.dispatch]
            least = megabytes / min(fastest[2 * client], 20.0) + 0.5 + megabytes / fastest[2 * client + 1]
            assert arrival.time >= sent_at + least - 1e-9
            assert arrival.time <= window.close
            if number:  # else it would have been taken in before
                assert arrival.time > loop.windows[number - 1].close
        assert [(a.client, a.dispatch) for a in window.arrivals] == sorted(
            (a.client, a.dispatch) for a in window.arrivals
        )
    numbers = [a.dispatch for a in loop.arrived]
    assert len(numbers) == len(set(numbers))


def test_an_upload_that_misses_the_close_waits_for_the_next_window() -> None:
    """It arrives while the server aggregates: its own arrival time stays, the next window takes it in."""
    net = network((1.0, 0.5), 10.0, compute_slowdown=(1.0, 3.0), **STILL)
    loop = Loop(net).run(2)
    # client 0: 1 + .5 + 2 = 3.5 s, close at 4, end at 4.5; client 1: .5 + 1.5 + 2 = 4 s: in time
    assert [a.client for a in loop.windows[0].arrivals] == [0, 1]
    net = network((1.0, 0.5), 10.0, compute_slowdown=(1.0, 3.5), **STILL)
    loop = Loop(net).run(2)
    assert [a.client for a in loop.windows[0].arrivals] == [0]
    late = next(a for a in loop.windows[1].arrivals if a.client == 1)
    assert late.time == pytest.approx(4.25) and late.dispatch == 1


def test_what_is_for_one_client_alone_leaves_the_server_beside_what_is_shared() -> None:
    """By hand: 10 MB for two, shared, and 2 MB for one client; 10 MB/s divided into 9 and 1."""
    net = network((1.0, 1.0, 0.05), 10.0, **STILL)
    net.dispatch(0, 0, 1.0, 1.0)
    net.dispatch(1, 1, 1.0, 1.0)
    net.dispatch(2, 2, 1.0, 1.0, Transfer(2.0, 0.25, shared=False))
    assert net.channel_megabytes() == pytest.approx(12.0)
    restored = network((1.0, 1.0, 0.05), 10.0, **STILL)
    restored.load_state(json.loads(json.dumps(net.state())))
    for each in (net, restored):
        window = each.close_window()
        assert [(a.dispatch, a.time) for a in window.arrivals] == [
            (d, pytest.approx(t)) for d, t in enumerate((10 / 9 + 2.5, 10 / 9 + 2.5, 2.0 + 0.5 + 1.0))
        ]
    apart = network((1.0, 1.0, 0.05), 10.0, incremental_splitting=False, **STILL)
    apart.dispatch(0, 0, 1.0, 1.0)
    apart.dispatch(1, 2, 1.0, 1.0, Transfer(2.0, 0.25, shared=False))
    assert apart.channel_megabytes() == pytest.approx(12.0)


# -- when a window closes --------------------------------------------------------------------------


def test_a_window_waits_for_every_client_of_the_densest_class() -> None:
    net = network((1.0, 1.0, 0.05), 10.0, compute_slowdown=(1.0, 7.0, 1.0), **STILL)
    window = Loop(net).window()
    assert window.close == pytest.approx(1.0 + 3.5 + 2.0 + 0.5)


def test_without_an_unconstrained_client_the_densest_in_flight_sets_the_pace() -> None:
    net = network((1.0, 0.5, 0.05), 10.0, **STILL)
    net.dispatch(0, 1, 0.5, 0.5)
    net.dispatch(1, 2, 1.0, 1.0)
    assert net.close_window().close == pytest.approx(0.5 + 0.5 + 2.0 + 0.5)


def test_sync_waits_for_everybody() -> None:
    net = network((1.0, 0.05), 10.0, schedule="sync", **STILL)
    loop = Loop(net, held=(1.0, 1.0)).run(4)
    slowest = flight_seconds(10.0, 1.0, 0.05)
    for window in loop.windows:
        assert [a.client for a in window.arrivals] == [0, 1]
        last = max(a.time for a in window.arrivals)
        assert last - window.start == pytest.approx(slowest)
        assert window.close == last and window.end == pytest.approx(last + 0.5)
    assert not net.flights


@pytest.mark.parametrize("wanted", [1, 2, 3, 5, 99])
def test_a_window_waits_for_the_least_number_of_updates(wanted: int) -> None:
    held = (1.0, 1.0, 1.0, 1.0, 1.0)
    initial = (1.0, 0.5, 0.2, 0.1, 0.05)
    window = Loop(network(initial, 20.0, min_updates=wanted, **STILL), held).window()
    finished = sorted(flight_seconds(20.0, 1.0, d0) for d0 in initial)
    assert window.close == pytest.approx(finished[min(wanted, 5) - 1] + 0.5)
    assert len(window.arrivals) >= min(wanted, 5)


def test_a_window_without_flights_is_only_slack_and_aggregation() -> None:
    net = network((1.0,), 10.0, **STILL)
    window = net.close_window()
    assert window == Window(0.0, 0.5, 1.0, ()) and net.now == 1.0


def test_a_dropped_flight_never_arrives_and_frees_the_channel() -> None:
    net = network((1.0, 0.5), 10.0, **STILL)
    net.dispatch(0, 0, 1.0, 1.0)
    net.dispatch(1, 1, 0.5, 0.5)
    net.drop(0)
    net.drop(77)
    assert net.channel_megabytes() == 5.0
    window = net.close_window()
    assert [a.dispatch for a in window.arrivals] == [1] and window.close == pytest.approx(0.5 + 0.5 + 2 + 0.5)


# -- the server's links ----------------------------------------------------------------------------


def test_with_splitting_each_increment_leaves_once_and_without_it_every_sub_model() -> None:
    for splitting, expected in ((True, 10.0), (False, 10.0 + 5.0 + 0.5)):
        net = network((1.0, 0.5, 0.05), 10.0, incremental_splitting=splitting, **STILL)
        for n, d in enumerate(net.densities):
            net.dispatch(n, n, d, d)
        assert net.channel_megabytes() == expected
        net.close_window()
        assert net.channel_megabytes() == 0.0


def test_without_splitting_receivers_share_the_servers_uplink() -> None:
    """10 MB/s out: the client that can take 1 MB/s has 1, the two others 4.5 each."""
    net = network((1.0, 1.0, 0.05), 9.0, incremental_splitting=False, **STILL)
    loop = Loop(net).run(1)
    times = {a.client: a.time for a in loop.arrived}
    assert times[0] == times[1] == pytest.approx(9 / 4.5 + 0.5 + 9 / 5)
    assert times[2] == pytest.approx(0.45 / 1.0 + 0.5 + 0.45 / 0.25)


def test_a_busy_channel_delays_the_next_dispatches() -> None:
    """A full model leaves for a slow client until 1 s; who comes back at .51 s is served from then on."""
    net = network(
        (0.5, 0.05),
        10.0,
        client_upload=1000.0,
        server_download=1e9,
        compute_seconds=0.0,
        window_slack=0.0,
        aggregation_seconds=0.0,
        **STILL,
    )
    loop = Loop(net, held=(0.5, 1.0)).run(3)
    assert [w.close for w in loop.windows] == pytest.approx([0.51, 1.51, 2.02])
    assert [a.client for a in loop.arrived] == [0, 0, 0]


def test_uploads_share_the_servers_downlink_max_min_fairly() -> None:
    net = network((1.0, 1.0, 1.0, 0.2), 10.0, server_download=10.0, **STILL)
    loop = Loop(net).run(1)
    times = {a.client: a.time for a in loop.arrived}
    assert times[0] == times[1] == times[2] == pytest.approx(1.0 + 0.5 + 10.0 / 3.0)
    assert times[3] == pytest.approx(0.5 + 0.5 + 2.0)


def test_only_uploads_take_a_share_of_the_downlink() -> None:
    """Client 1 downloads for 10 s; meanwhile client 0 uploads alone, at the whole 5 MB/s."""
    net = network((1.0, 0.05), 10.0, server_download=5.0, **STILL)
    loop = Loop(net, held=(1.0, 1.0)).run(1)
    assert loop.arrived[0].time == pytest.approx(1.0 + 0.5 + 10.0 / 5.0)


def test_an_upload_that_has_arrived_takes_no_share_of_the_downlink() -> None:
    """Client 1 arrives while the server aggregates; in the next window client 0 uploads alone."""
    net = network(
        (1.0, 0.9), 1.0, server_download=6.0, window_slack=0.1, compute_slowdown=(1.0, 2.0), **STILL
    )
    loop = Loop(net).run(2)
    assert [a.client for a in loop.windows[0].arrivals] == [0]
    arrival = next(a for a in loop.windows[1].arrivals if a.client == 0)
    assert arrival.time - loop.windows[1].start == pytest.approx(0.1 + 0.5 + 1.0 / 5.0)


def test_payload_by_support_uses_the_share_of_coordinates() -> None:
    net = network((1.0, 0.5), 10.0, payload_rule="support", **STILL)
    assert net.dispatch(0, 0, 1.0, 1.0) == 10.0
    assert net.dispatch(1, 1, 0.5, 0.8) == 8.0
    assert network((0.5,), 10.0, **STILL).dispatch(0, 0, 0.5, 0.8) == 5.0


# -- compute time ----------------------------------------------------------------------------------


def test_training_time_may_depend_on_the_device_and_on_the_density() -> None:
    net = network((1.0, 0.25), 8.0, compute_slowdown=(2.0, 6.0), compute_density_exponent=0.5, **STILL)
    loop = Loop(net).run(1)
    times = {a.client: a.time for a in loop.arrived}
    assert times[0] == pytest.approx(0.8 + 0.5 * 2 + 1.6)
    assert times[1] == pytest.approx(2.0 / 5.0 + 0.5 * 6 * 0.5 + 2.0 / 1.25)


# -- jitter ----------------------------------------------------------------------------------------


def test_rates_jitter_around_the_log_normal_mean_and_have_seeds_of_their_own() -> None:
    config = FedGMRConfig(densities=(1.0, 0.5), jitter_draws=20)
    links = LogNormalLinks(config, (1.0, 0.5), 0)
    draws = np.array([[links.client(w, n)[k](0.0)[0] for n in (0, 1) for k in (0, 1)] for w in range(1500)])
    draws /= [20.0, 5.0, 10.0, 2.5]
    server = np.array([links.server(w) for w in range(1500)]) / [10.0, 50.0]
    for values, sigma in ((draws, 0.3), (server, 0.1)):
        mean = math.exp(sigma**2 / 2)
        spread = mean * math.sqrt(math.expm1(sigma**2) / 20)
        assert np.allclose(values.mean(axis=0), mean, atol=4 * spread / math.sqrt(1500))
        assert np.allclose(values.std(axis=0), spread, rtol=0.1)
    correlation = np.corrcoef(np.hstack([draws, server]).T) - np.eye(6)
    assert np.abs(correlation).max() < 0.12
    again = LogNormalLinks(config, (1.0, 0.5), 0)
    assert again.server(7) == links.server(7) and LogNormalLinks(config, (1.0, 0.5), 1).server(
        7
    ) != links.server(7)


def test_mean_window_length_is_near_the_published_one_with_jitter() -> None:
    windows = Loop(network(HIGH, 37.2, seed=5)).run(200).windows
    mean = windows[-1].end / 200
    assert mean == pytest.approx(12.66, rel=0.05)


# -- traces ----------------------------------------------------------------------------------------


def megabytes_by_time(links: TraceLinks, client: int, direction: int, grid: np.ndarray) -> np.ndarray:
    """MB that pass until each time of a grid far finer than the trace's steps, by the midpoint rule."""
    rate = links.client(0, client)[direction]
    values = [rate(float(t))[0] for t in (grid[:-1] + grid[1:]) / 2]
    return np.concatenate([[0.0], np.cumsum(values * np.diff(grid))])


def made_traces() -> list[Trace]:
    rng = np.random.default_rng(0)
    regular = (np.arange(7.0), np.array([1.0, 0.0, 0.0, 3.0, 2.0, 0.0, 8.0]))
    uneven = (np.cumsum(rng.random(9) + 0.1) + 100.0, rng.random(9) * 50)
    return [regular, uneven]


def test_a_trace_is_scaled_to_the_clients_base_rate_and_repeats() -> None:
    config = FedGMRConfig(densities=(1.0, 0.25))
    times, rate = np.array([5.0, 6.0, 8.0]), np.array([3.0, 0.0, 6.0])  # steps 1, 2; the last lasts 1.5
    links = TraceLinks(config, (1.0, 0.25), 11, [(times, rate)])
    period, mean = 4.5, (3.0 * 1 + 6.0 * 1.5) / 4.5
    for client, d0 in ((0, 1.0), (1, 0.25)):
        for direction, base in ((0, 20.0), (1, 5.0)):
            at = links.client(0, client)[direction]
            grid = (np.arange(45_000) + 0.5) * period / 45_000
            values = np.array([at(float(t))[0] for t in grid])
            assert values.mean() == pytest.approx(base * d0, rel=1e-3)
            levels = sorted(set(np.round(values, 9)))
            assert levels == pytest.approx([0.0, base * d0 * 3.0 / mean, base * d0 * 6.0 / mean])
            for t in (0.3, 2.2, 4.4):
                assert at(t)[0] == at(t + period)[0] == links.client(9, client)[direction](t)[0]


def test_a_rate_holds_until_the_time_that_it_names() -> None:
    config = FedGMRConfig(densities=(1.0,))
    for seed in range(5):
        at = TraceLinks(config, (1.0,), seed, made_traces()).client(0, 0)[0]
        time = 0.0
        for _ in range(60):
            rate, until = at(time)
            assert until > time
            assert all(at(time + share * (until - time))[0] == rate for share in (0.01, 0.5, 0.99))
            time = until


@pytest.mark.parametrize("seed", range(4))
def test_flights_over_traces_equal_a_fine_integration(seed: int) -> None:
    """Download, then training, then upload, over the client's own rates, whatever the windows do."""
    initial, held = (1.0, 0.5, 0.2), (1.0, 1.0, 0.5)
    config = FedGMRConfig(densities=initial, server_download=1e9, server_upload=1e9)
    links = TraceLinks(config, initial, seed, made_traces())
    net = VirtualNetwork(config, initial, 6.0, links)
    loop = Loop(net, held).run(8)
    grid = np.linspace(0.0, loop.windows[-1].end + 1.0, 20_001)
    moved = {(n, k): megabytes_by_time(links, n, k, grid) for n in range(3) for k in (0, 1)}
    assert len(loop.arrived) > 8
    for arrival in loop.arrived:
        n, sent_at, megabytes = loop.sent[arrival.dispatch]
        down, up = moved[n, 0], moved[n, 1]
        downloaded = np.interp(np.interp(sent_at, grid, down) + megabytes, down, grid)
        passed = np.interp(arrival.time, grid, up) - np.interp(downloaded + 0.5, grid, up)
        assert passed == pytest.approx(megabytes, rel=1e-2)


def test_a_client_without_bandwidth_for_a_while_only_waits() -> None:
    outage = [(np.array([0.0, 1.0]), np.array([0.0, 2.0]))]  # every other second nothing passes
    loop = Loop(traced((1.0,), 30.0, outage)).run(3)
    assert len(loop.arrived) == 3 and all(math.isfinite(w.end) for w in loop.windows)
    # 30 MB at 40 MB/s, capped by the server's 10 MB/s, half of the time, then 30 MB at 10 MB/s likewise
    for window, arrival in zip(loop.windows, loop.arrived, strict=True):
        assert 6.0 - 1.5 <= arrival.time - window.start - 6.0 - 0.5 + 3.0 <= 6.0 + 3.0


@pytest.mark.parametrize(
    ("times", "rate"),
    [
        ([0.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
        ([1.0, 0.0], [1.0, 1.0]),
        ([0.0, 1.0], [0.0, 0.0]),
        ([0.0, 1.0], [1.0, -1.0]),
    ],
)
def test_traces_that_cannot_be_followed_are_refused(times: list[float], rate: list[float]) -> None:
    with pytest.raises(ValueError, match="trace"):
        traced((1.0,), 1.0, [(np.array(times), np.array(rate))])


def test_measured_traces_carry_a_run(fedgmr_data_dir: Path) -> None:
    """Real throughput of mobile and fixed networks: every flight ends, and where the integral says."""
    path = fedgmr_data_dir / "bandwidth_traces.npz"
    if not path.is_file():
        pytest.skip(f"no measured traces: {path.name} is not in FEDGMR_DATA_DIR")
    traces = load_traces(str(path))
    initial = (1.0, 0.5, 0.2, 0.05)
    net = traced(initial, 5.0, traces, server_download=1e9, server_upload=1e9)
    loop = Loop(net).run(12)
    assert len(loop.arrived) >= 12
    for arrival in loop.arrived:
        n, sent_at, megabytes = loop.sent[arrival.dispatch]
        assert arrival.time > sent_at + 0.5
        down, up = net.links.client(0, n)
        time = sent_at
        for rate, pause in ((down, 0.5), (up, 0.0)):
            left = megabytes
            while True:
                value, until = rate(time)
                if value * (until - time) >= left:
                    break
                left, time = left - value * (until - time), until
            time += left / value + pause
        assert arrival.time == pytest.approx(time, rel=1e-9)


# -- state -----------------------------------------------------------------------------------------


BUSY: dict[str, Any] = {"client_upload": 1000.0, "server_download": 1e9, "compute_seconds": 0.0}
BUSY |= {"window_slack": 0.0, "aggregation_seconds": 0.0}
STATES: dict[str, dict[str, Any]] = {
    "jitter": {},
    "traces": {},
    "sync": {"schedule": "sync"},
    "whole": {"incremental_splitting": False},
    "busy channel": BUSY,
}


@pytest.mark.parametrize("kind", STATES)
def test_a_stored_state_continues_with_the_same_windows(kind: str) -> None:
    """At every window: through JSON into a new network, before and after the dispatches."""
    initial, held = (1.0, 0.5, 0.2, 0.05), (1.0, 1.0, 1.0, 0.5)
    if kind == "busy channel":
        initial, held = (0.5, 0.4, 0.2, 0.05), (0.5, 1.0, 1.0, 1.0)

    def fresh() -> VirtualNetwork:
        if kind == "traces":
            return traced(initial, 12.0, made_traces())
        return network(initial, 12.0, seed=4, **STATES[kind])

    reference = Loop(fresh(), held).run(10)
    loop = Loop(fresh(), held)
    for expected in reference.windows:
        stored = json.loads(json.dumps(loop.net.state()))
        loop.net = fresh()
        loop.net.load_state(stored)
        for n in loop.idle:
            loop.net.dispatch(len(loop.sent), n, held[n], held[n])
            loop.sent[len(loop.sent)] = (n, loop.net.now, 0.0)
        stored = json.loads(json.dumps(loop.net.state()))
        loop.net = fresh()
        loop.net.load_state(stored)
        window = loop.net.close_window()
        assert window == expected
        loop.idle = [a.client for a in window.arrivals]
