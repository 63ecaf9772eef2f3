"""The simulated network and its virtual clock: who arrives when, and when a window closes.

Every client's flight is a download, a training time and an upload, moved on as a fluid: what a window does
not finish goes on in the next, at the next window's rates. Units: MB (10^6 bytes), MB/s, seconds. See the
method page, section 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.seeds import numpy_generator
from fedgmr_plugin.kernels.cost import fair_shares

#: Rate at a time, and the time until which it holds: (MB/s, seconds).
RateFunction = Callable[[float], tuple[float, float]]
#: Times (seconds) or rates of a trace.
Series = NDArray[np.float64]


class Links(Protocol):
    """Where rates come from."""

    def server(self, window: int) -> tuple[float, float]:
        """Rates out of and into the server in a window, MB/s."""
        ...

    def client(self, window: int, client: int) -> tuple[RateFunction, RateFunction]:
        """Download and upload rates of a client in a window."""
        ...


class LogNormalLinks:
    """Each window every rate is the mean of `jitter_draws` draws of base * LogNormal(0, sigma)."""

    def __init__(self, config: FedGMRConfig, densities: Sequence[float], seed: int) -> None:
        self._config, self._densities, self._seed = config, densities, seed

    def server(self, window: int) -> tuple[float, float]:
        c = self._config
        up, down = self._draw(window, "server", c.server_jitter)
        return c.server_upload * up, c.server_download * down

    def client(self, window: int, client: int) -> tuple[RateFunction, RateFunction]:
        c, d0 = self._config, self._densities[client]
        down, up = self._draw(window, client, c.client_jitter)
        return _constant(c.client_download * d0 * down), _constant(c.client_upload * d0 * up)

    def _draw(self, window: int, who: int | str, sigma: float) -> tuple[float, float]:
        if sigma == 0:
            return 1.0, 1.0
        generator = numpy_generator(self._seed, "bandwidth", window, who)
        first, second = generator.lognormal(0.0, sigma, (2, self._config.jitter_draws)).mean(axis=1)
        return float(first), float(second)


class TraceLinks:
    """Measured throughput: each client follows a trace, scaled so that its mean is the client's base rate.

    A client's trace and where in it the run begins come from the seed tree; a trace repeats when it ends.
    The server's rates have no jitter.

    Args:
        traces: (time_s, rate) of each trace: times increasing, rates >= 0, not all 0.
    """

    def __init__(
        self,
        config: FedGMRConfig,
        densities: Sequence[float],
        seed: int,
        traces: Sequence[tuple[Series, Series]],
    ) -> None:
        self._config, self._densities, self._seed = config, densities, seed
        self._traces = [_normalised(time_s, rate) for time_s, rate in traces]

    def server(self, window: int) -> tuple[float, float]:
        return self._config.server_upload, self._config.server_download

    def client(self, window: int, client: int) -> tuple[RateFunction, RateFunction]:
        generator = numpy_generator(self._seed, "trace", client)
        edges, rate = self._traces[int(generator.integers(len(self._traces)))]
        phase = float(generator.random()) * edges[-1]

        def at(base: float) -> RateFunction:
            def rate_at(time: float) -> tuple[float, float]:
                laps, position = divmod(time + phase, edges[-1])
                i = min(int(np.searchsorted(edges, position, side="right")) - 1, len(rate) - 1)
                until = laps * edges[-1] + edges[i + 1] - phase
                return base * rate[i], until if until > time else math.nextafter(time, math.inf)

            return rate_at

        d0 = self._densities[client]
        return at(self._config.client_download * d0), at(self._config.client_upload * d0)


def _normalised(time_s: Series, rate: Series) -> tuple[Series, Series]:
    """Segment edges from 0 [n + 1] and rates of mean 1 over time [n]; each rate holds until the next time."""
    time = np.asarray(time_s, dtype=np.float64)
    value = np.asarray(rate, dtype=np.float64)
    steps = np.diff(time)
    lengths = np.append(steps, np.median(steps) if len(steps) else 1.0)
    mean = float((value * lengths).sum() / lengths.sum())
    if not (np.all(lengths > 0) and np.all(value >= 0) and mean > 0 and math.isfinite(mean)):
        raise ValueError("a trace needs increasing times and rates >= 0 that are not all 0")
    return np.concatenate([[0.0], np.cumsum(lengths)]), value / mean


def _constant(rate: float) -> RateFunction:
    return lambda _time: (rate, math.inf)


def _capped(rate: RateFunction, cap: float) -> RateFunction:
    def capped(time: float) -> tuple[float, float]:
        value, until = rate(time)
        return min(value, cap), until

    return capped


class Transfer(NamedTuple):
    """MB that one flight moves.

    Attributes:
        shared: whether the download is a sub-model as others get it too, whose increments can leave the
            server once for all; else it is for this client alone.
    """

    down: float
    up: float
    shared: bool = True


@dataclass(frozen=True)
class Flight:
    """What is left of one client's download (MB), training (s) and upload (MB).

    Attributes:
        down, up: MB in all.
        not_before: earliest second at which it can move (its dispatch, or the server's busy channel).
        arrived: second at which the last byte arrived, once it has.
        shared: see `Transfer`.
    """

    dispatch: int
    client: int
    down: float
    up: float
    down_left: float
    train_left: float
    up_left: float
    not_before: float
    arrived: float | None = None
    shared: bool = True


class Arrival(NamedTuple):
    """An upload that a window takes in."""

    dispatch: int
    client: int
    time: float
    megabytes: float


class Window(NamedTuple):
    """One window of the virtual clock: times in seconds, arrivals by (client, dispatch)."""

    start: float
    close: float
    end: float
    arrivals: tuple[Arrival, ...]


class VirtualNetwork:
    """Flights and the clock; deterministic, serialisable by `state`.

    Args:
        config: rates, jitter, slack, schedule.
        densities: initial densities; they fix every client's bandwidth for the whole run [N].
        model_megabytes: S.
        links: where the rates come from.
    """

    def __init__(
        self, config: FedGMRConfig, densities: Sequence[float], model_megabytes: float, links: Links
    ) -> None:
        self.config, self.densities = config, tuple(densities)
        self.model_megabytes, self.links = model_megabytes, links
        self.now = 0.0
        self.window = 0
        self.flights: dict[int, Flight] = {}
        self._receivers: list[int] = []
        self._channel_free = 0.0

    def dispatch(
        self, dispatch: int, client: int, density: float, share: float, encoded: Transfer | None = None
    ) -> float:
        """Start a flight now; returns its download in MB.

        Args:
            density: of the sub-model.
            share: its share of all coordinates, used when `payload_rule` is ``support``.
            encoded: what travels, instead of what `payload_rule` says.
        """
        if encoded is None:
            size = payload_megabytes(self.config, self.model_megabytes, density, share)
            encoded = Transfer(size, size)
        training = train_seconds(self.config, client, density)
        self.flights[dispatch] = Flight(
            dispatch,
            client,
            down=encoded.down,
            up=encoded.up,
            down_left=encoded.down,
            train_left=training,
            up_left=encoded.up,
            not_before=self.now,
            shared=encoded.shared,
        )
        self._receivers.append(dispatch)
        return encoded.down

    def drop(self, dispatch: int) -> None:
        """Forget a flight."""
        self.flights.pop(dispatch, None)

    def channel_megabytes(self) -> float:
        """MB through the server's uplink for this window's receivers: under IMS each increment once."""
        flights = [self.flights[d] for d in self._receivers if d in self.flights]
        if not self.config.incremental_splitting:
            return sum(f.down for f in flights)
        alone = sum(f.down for f in flights if not f.shared)
        return max((f.down for f in flights if f.shared), default=0.0) + alone

    def close_window(self) -> Window:
        """Run the clock to the window's close, take what has arrived, and move everybody to its end."""
        up_cap, rates = self._rates()
        start = max(self.now, self._channel_free)
        for d in self._receivers:
            if d in self.flights:
                self.flights[d] = replace(self.flights[d], not_before=max(self.now, self._channel_free))
        self._channel_free = (
            start + self.channel_megabytes() / up_cap if self._receivers else self._channel_free
        )

        finished = {d: self._finish(f, rates[d]) for d, f in self.flights.items()}
        close = self._closing_time(finished)
        if self.config.schedule == "async":
            close += self.config.window_slack
        end = close + self.config.aggregation_seconds
        arrivals = sorted(
            (
                Arrival(d, f.client, finished[d], f.up)
                for d, f in self.flights.items()
                if finished[d] <= close
            ),
            key=lambda a: (a.client, a.dispatch),
        )
        if self.config.schedule == "buffered":
            first = sorted(arrivals, key=lambda a: (a.time, a.client, a.dispatch))
            arrivals = sorted(first[: self.config.min_updates], key=lambda a: (a.client, a.dispatch))
        for arrival in arrivals:
            del self.flights[arrival.dispatch]
        self.flights = {d: self._advance(f, rates[d], end) for d, f in self.flights.items()}
        window = Window(self.now, close, end, tuple(arrivals))
        self.now, self.window, self._receivers = end, self.window + 1, []
        return window

    def state(self) -> dict[str, Any]:
        """JSON-able state; `load_state` restores it."""
        return {
            "now": self.now,
            "window": self.window,
            "channel_free": self._channel_free,
            "receivers": list(self._receivers),
            "flights": [asdict(f) for f in self.flights.values()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.now, self.window = state["now"], state["window"]
        self._channel_free, self._receivers = state["channel_free"], list(state["receivers"])
        self.flights = {f["dispatch"]: Flight(**f) for f in state["flights"]}

    # -- the fluid ------------------------------------------------------------------------------------

    def _rates(self) -> tuple[float, dict[int, tuple[RateFunction, RateFunction]]]:
        """The server's upload rate and each flight's two rates, capped by the server's share.

        The server's downlink is shared by the flights that can begin their upload before the window would
        close without sharing; its uplink by what is downloaded, increments sent once for all being one.
        """
        server_up, server_down = self.links.server(self.window)
        rates = {d: self.links.client(self.window, f.client) for d, f in self.flights.items()}
        caps = dict.fromkeys(rates, server_up)
        streams = self._streams()
        if len(streams) > 1:
            demands = [max(rates[d][0](self.now)[0] for d in stream) for stream in streams]
            for stream, share in zip(streams, fair_shares(server_up, demands), strict=True):
                caps.update(dict.fromkeys(stream, share))
        rates = {d: (_capped(down, caps[d]), up) for d, (down, up) in rates.items()}

        unshared = {d: self._finish(f, rates[d]) for d, f in self.flights.items()}
        close = self._closing_time(unshared) + self.config.window_slack
        uploading = [
            d
            for d, f in self.flights.items()
            if f.arrived is None and self._uploads_from(f, rates[d]) < close
        ]
        demands = [rates[d][1](self.now)[0] for d in uploading]
        for d, demand, share in zip(uploading, demands, fair_shares(server_down, demands), strict=True):
            if share < demand:
                rates[d] = (rates[d][0], _capped(rates[d][1], share))
        return server_up, rates

    def _streams(self) -> list[list[int]]:
        """Flights that download, those together whose increments leave the server once."""
        down = [f for f in self.flights.values() if f.down_left > 0]
        once = [f.dispatch for f in down if f.shared and self.config.incremental_splitting]
        others = [[f.dispatch] for f in down if not (f.shared and self.config.incremental_splitting)]
        return [once, *others] if once else others

    def _closing_time(self, finished: dict[int, float]) -> float:
        """Arrival of the last flight that the window waits for."""
        if not finished:
            return self.now
        if self.config.schedule == "sync":
            return max(self.now, *finished.values())
        enough = sorted(finished.values())[min(self.config.min_updates, len(finished)) - 1]
        if self.config.schedule == "buffered":
            return max(self.now, enough)
        best = max(self.densities[f.client] for f in self.flights.values())
        anchors = [finished[d] for d, f in self.flights.items() if self.densities[f.client] == best]
        return max(self.now, *anchors, enough)

    def _finish(self, flight: Flight, rates: tuple[RateFunction, RateFunction]) -> float:
        """Second of the last byte if this window's rates went on."""
        if flight.arrived is not None:
            return flight.arrived
        return _done_at(rates[1], flight.up_left, self._uploads_from(flight, rates))

    def _uploads_from(self, flight: Flight, rates: tuple[RateFunction, RateFunction]) -> float:
        """Second at which its download and training are done."""
        return _done_at(rates[0], flight.down_left, max(self.now, flight.not_before)) + flight.train_left

    def _advance(self, flight: Flight, rates: tuple[RateFunction, RateFunction], until: float) -> Flight:
        """The flight at second `until`."""
        if flight.arrived is not None:
            return flight
        arrived = self._finish(flight, rates)
        if arrived <= until:
            return replace(flight, down_left=0.0, train_left=0.0, up_left=0.0, arrived=arrived)
        time = max(self.now, flight.not_before)
        if time >= until:
            return flight
        downloaded = _done_at(rates[0], flight.down_left, time)
        if downloaded >= until:
            return replace(flight, down_left=flight.down_left - _moved(rates[0], time, until))
        trained = downloaded + flight.train_left
        if trained >= until:
            return replace(flight, down_left=0.0, train_left=trained - until)
        left = max(flight.up_left - _moved(rates[1], trained, until), 0.0)
        return replace(flight, down_left=0.0, train_left=0.0, up_left=left)


def _done_at(rate: RateFunction, megabytes: float, time: float) -> float:
    """When `megabytes` that start at `time` have passed."""
    while megabytes > 0:
        value, until = rate(time)
        if value > 0 and megabytes <= value * (until - time):
            return time + megabytes / value
        megabytes -= value * (until - time)
        time = until
    return time


def _moved(rate: RateFunction, time: float, end: float) -> float:
    """MB that pass between `time` and `end`."""
    total = 0.0
    while time < end:
        value, until = rate(time)
        total += value * (min(until, end) - time)
        time = until
    return total


def payload_megabytes(config: FedGMRConfig, model_megabytes: float, density: float, share: float) -> float:
    """MB of a sub-model on the simulated link: S * d, or S times its share of all coordinates.

    For ``encoded``, whose messages are measured one by one, that share is what its values take.
    """
    return model_megabytes * (density if config.payload_rule == "density" else share)


def train_seconds(config: FedGMRConfig, client: int, density: float) -> float:
    """Seconds that a client trains a sub-model of `density` for one dispatch."""
    slowdown = config.compute_slowdown[client] if config.compute_slowdown else 1.0
    return float(config.compute_seconds * slowdown * density**config.compute_density_exponent)


def mean_flight_seconds(
    config: FedGMRConfig, moved: Transfer, client: int, density: float, initial_density: float
) -> float:
    """Seconds from a client's dispatch to its arrival at mean rates: download, training, upload."""
    down = moved.down / min(config.server_upload, config.client_download * initial_density)
    up = moved.up / (config.client_upload * initial_density)
    return down + train_seconds(config, client, density) + up
