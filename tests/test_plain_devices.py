"""FedML's own devices: whatever is lost, late, twice there, or restarted, an answer counts for what it is to.

Their files here begin with the name of the sub-model, which training keeps: the server's belief is held
against the truth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedgmr_plugin.config import FedGMRConfig, parse
from fedgmr_plugin.engine.samples import BatchPlan, TensorSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.snapshot import Snapshot, restore_live, snapshot_live
from fedgmr_plugin.errors import ConfigError, WireError
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.protocol.desk import Desk, PlainAnswer
from fedgmr_plugin.protocol.journal import Journal
from fedgmr_plugin.protocol.notes import CHECK, INIT, MODEL, SYNC, to_device, to_server
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.runtimes.devices import field as field_module
from fedgmr_plugin.runtimes.devices.field import Field, Problem
from fedgmr_plugin.runtimes.devices.loopback import Faults, Loopback
from fedgmr_plugin.runtimes.devices.office import Fetched
from fedgmr_plugin.runtimes.devices.plain import PlainOffice
from fedgmr_plugin.runtimes.devices.plain_device import PlainDevice

SLOW = 11.0  # seconds that device 1 trains, in most tests
_NAME = 48
_FAST = Path("/dev/shm")


def mlp() -> nn.Module:
    with isolated_rng(5):
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def samples(client: int) -> TensorSamples:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(client))
    return TensorSamples(x, (x.sum(1) > 0).long())


PROBLEM = Problem(mlp, samples, samples(99), samples(98), BatchPlan(8, 2, 1, True, 3), 0.1)


class Named:
    """Files that name what they hold."""

    def __init__(self, *given: Any) -> None:
        self.office: Any = None
        self.read = b""

    def encode(self, values_S: Tensor, ranking: Ranking, rung: int) -> bytes:
        name = f"{self.office.server.version}-{ranking.digest}-{rung}".encode()
        return name.ljust(_NAME) + values_S.numpy().tobytes()

    def decode(self, content: Any, ranking: Ranking, rung: int) -> Tensor:
        self.read = bytes(content[:_NAME]).strip()
        values = np.frombuffer(bytes(content[_NAME:]), dtype=np.float32)
        return torch.from_numpy(np.resize(values, ranking.ends[rung]).copy())

    def most_bytes(self, ranking: Ranking, rung: int) -> int:
        return 2**20


class Watched(PlainOffice):
    """Whether each answer is credited to what was trained: (client, is right)."""

    chosen = True

    def __init__(self, *given: Any, codec: Any, **named: Any) -> None:
        super().__init__(*given, codec=codec, numbered=self.chosen, **named)
        codec.office, self.names = self, codec
        self.credited: list[tuple[int, bool]] = []

    def _upload(self, dispatch: int, flight: Any, *rest: Any) -> Any:
        name = f"{flight.version}-{flight.ranking.digest}-{flight.rung}".encode()
        self.credited.append((flight.client, name == self.names.read))
        return super()._upload(dispatch, flight, *rest)


#: A broker and a call keep the order of one sender's messages.
IN_ORDER = Faults(least=0.05, most=0.05)
#: The same while connections break.
LOSSY = Faults(loss=0.3, duplicate=0.3, least=0.05, most=0.05)


#: Seconds that a broker takes to ask whether it is to hand over what it was given (QoS 2), and to hear it.
ROUND = 0.3


class Silo(PlainDevice):
    """One thread does everything, in the order in which it came: hand over what it said, too."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._later: list[tuple[str, bytes]] = []
        self._unsaid: list[str] = []

    def message(self, topic: str, payload: bytes) -> None:
        if self._busy:
            self._later.append((topic, payload))
        else:
            super().message(topic, payload)

    def _next(self) -> None:
        super()._next()
        while self._later and not self._busy:
            super().message(*self._later.pop(0))
        if not self._busy:
            self._hand_over()  # what it says in one breath with its answer

    def _say_status(self, state: str) -> None:
        world = self._hands.world  # type: ignore[attr-defined]
        self._unsaid.append(state)
        world.at(world.now + ROUND, lambda: None if self._busy else self._hand_over())

    def _done(self, content: bytes, client: int) -> None:
        self._hand_over()
        super()._done(content, client)

    def _hand_over(self) -> None:
        while self._unsaid:
            super()._say_status(self._unsaid.pop(0))


@contextmanager
def silos() -> Iterator[None]:
    """Clients are FedML's silos."""
    with mock.patch.object(Watched, "chosen", False), mock.patch.object(field_module, "PlainDevice", Silo):
        yield


def trained(content: bytearray, *rest: Any, **named: Any) -> bytes:
    values = np.frombuffer(bytes(content[_NAME:]), dtype=np.float32) * np.float32(0.99)
    return bytes(content[:_NAME]) + values.tobytes()


@contextmanager
def fields() -> Iterator[Callable[..., Field]]:
    """Makes runs with such files."""
    with (
        TemporaryDirectory(dir=_FAST if _FAST.is_dir() else None) as folder,
        mock.patch.multiple(
            field_module, codec_of=lambda *given: Named(), PlainOffice=Watched, train_file=trained
        ),
    ):
        made: list[Field] = []

        def make(windows: int = 10**6, faults: Faults | None = None, seed: int = 0, **options: Any) -> Field:
            common: dict[str, Any] = {
                "densities": (1.0, 0.5),
                "interval": 3,
                "window_slack": 0.1,
                "answer_deadline": 4.0,
                "retry_seconds": 1.0,
                "device_submodel": "masked",
                "device_authentication": "off",
            }
            config = FedGMRConfig(**{**common, **options})
            world = Loopback(seed, faults)
            field = Field(PROBLEM, config, Path(folder), 2, windows, world, rate=100.0)
            field.seconds = lambda n: (0.5, SLOW)[n]
            made.append(field)
            return field.begin()

        try:
            yield make
        finally:
            for field in made:
                if field.office.journal is not None:
                    field.office.journal.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Field]]:
    with fields() as maker:
        yield maker


def go(field: Field, seconds: float) -> Field:
    """Let so much time pass, or the run end."""
    until = field.world.now + seconds
    while field.world.now < until and field.office.end is None and field.world.step():
        pass
    return field


def credited(field: Field, client: int = 1) -> list[bool]:
    return [right for n, right in field.office.credited if n == client]  # type: ignore[attr-defined]


def sent(field: Field, client: int, kinds: tuple[int, ...] = (INIT, SYNC)) -> list[dict[str, Any]]:
    """Messages of these kinds to a device, so far."""
    topic = to_device("7", 0, client + 1)
    found = [json.loads(payload) for where, payload in field.world.published if where == topic]
    return [message for message in found if message["msg_type"] in kinds]


@pytest.mark.parametrize("repeats", [True, False])
def test_a_device_slower_than_the_deadline_is_credited_with_what_it_trained(
    make: Callable[..., Field], repeats: bool
) -> None:
    field = make()
    for n in range(2):
        field.plain_device(n, repeats=repeats)
    go(field, 130)
    assert len(credited(field)) >= 10 and all(credited(field)) and all(credited(field, 0))
    merged = [r for r in field.records("arrival") if r["client"] == 1]
    assert len(merged) >= 10 and min(r["staleness"] for r in merged) > 5
    assert not field.records("rejected")
    assert len(credited(field, 0)) > 100, "the others do not wait for it"


def test_a_numbered_answer_is_right_however_late_it_is(make: Callable[..., Field]) -> None:
    """Here every answer comes after its sub-model was taken to be lost and another one was sent."""
    field = make(lost_after=8.0)
    for n in range(2):
        field.plain_device(n)
    go(field, 200)
    assert len(credited(field)) >= 4 and all(credited(field))
    assert len({message["client_idx"] for message in sent(field, 1)}) == len(sent(field, 1)) >= 10
    assert {int(message["client_idx"]) % 2 for message in sent(field, 1)} == {1}


def test_an_answer_that_comes_too_late_counts_for_nothing_else(make: Callable[..., Field]) -> None:
    field = make(lost_after=4.0)
    field.seconds = lambda n: (0.5, 30.0)[n]
    for n in range(2):
        field.plain_device(n)
    go(field, 130)
    assert not credited(field) and field.office.desk.refused[1]["GMR-401"] >= 3


def test_nothing_is_sent_to_a_device_that_owes_an_answer(make: Callable[..., Field]) -> None:
    field = make(lost_after=60.0)
    field.seconds = lambda n: (0.5, 50.0)[n]
    for n in range(2):
        field.plain_device(n)
    go(field, 48)
    assert len(sent(field, 1)) == len(sent(field, 1, (CHECK,))) == 1, "it was asked at the beginning only"
    go(field, 8)
    assert credited(field) == [True] and len(sent(field, 1)) == 2
    states = [r["state"] for r in field.records("client") if r["client"] == 1]
    assert states[:3] == ["joined", "overdue", "joined"]


def test_who_is_away_is_asked_once_a_second_at_most(make: Callable[..., Field]) -> None:
    field = make(retry_seconds=0.0)
    field.plain_device(0)
    go(field, 20)
    assert len(credited(field, 0)) > 15
    assert 10 <= len(sent(field, 1, (CHECK,))) <= 21


def test_what_is_lost_is_given_up_in_the_end(make: Callable[..., Field]) -> None:
    field = make(lost_after=20.0)
    field.seconds = lambda n: 1.0
    field.plain_device(0)
    field.world.faults = Faults(loss=1.0)
    device = field.plain_device(1)
    field.office.message(device.speaks, device._status("ONLINE"))
    go(field, 0.2)
    field.world.faults = Faults()
    go(field, 19)
    assert len(sent(field, 1)) == 1
    go(field, 8)
    assert len(sent(field, 1)) > 1 and all(credited(field)) and credited(field)


@pytest.mark.parametrize("repeats", [True, False])
def test_a_device_that_is_restarted_gets_another_sub_model(make: Callable[..., Field], repeats: bool) -> None:
    """Those that repeat their number need not wait until what they lost counts as lost."""
    field = make(lost_after=60.0)
    field.seconds = lambda n: (0.5, 2.0)[n]
    for n in range(2):
        field.plain_device(n, repeats=repeats)
    go(field, 7)
    while field.devices[1]._busy is False:  # type: ignore[union-attr]
        field.world.step()
    field.plain_device(1, repeats=repeats)
    before = len(sent(field, 1))
    go(field, 10)
    assert (len(sent(field, 1)) > before) == repeats
    go(field, 70)
    assert len(sent(field, 1)) > before and all(credited(field))


def test_a_device_that_answers_every_question_of_a_long_absence_was_not_restarted(
    make: Callable[..., Field],
) -> None:
    """A broker that keeps a phone's session hands over all of them when the phone is back."""
    field = make(lost_after=20.0)
    field.seconds = lambda n: (0.5, 6.0)[n]
    for n in range(2):
        field.plain_device(n)
    go(field, 20)
    device = field.devices[1]
    field.world.unsubscribe(device.hears, device.message)
    known = len(field.world.published)
    go(field, 60)
    missed = [payload for topic, payload in field.world.published[known:] if topic == device.hears]
    assert sum(json.loads(payload)["msg_type"] == CHECK for payload in missed) > 5
    field.world.subscribe(device.hears, device.message)
    for payload in missed:
        device.message(device.hears, payload)
    before = len(credited(field))
    go(field, 18)
    states = [r["state"] for r in field.records("client") if r["client"] == 1]
    assert "restarted" not in states and field.office.desk.refused[1]["GMR-401"] == 1, "what was lost"
    assert len(credited(field)) == before + 1 and all(credited(field))


def test_an_answer_that_comes_while_the_disk_is_full_waits(
    make: Callable[..., Field], monkeypatch: pytest.MonkeyPatch
) -> None:
    """These devices say nothing twice."""
    field = make(lost_after=600.0)
    field.seconds = lambda n: (0.5, 3.0)[n]
    device = field.plain_device(1)
    go(field, 1)
    office = field.office
    with monkeypatch.context() as full:
        full.setattr(office.journal, "append", mock.Mock(side_effect=OSError("no space")))
        office.message(device.speaks, device._status("OFFLINE"))
        go(field, 5)
        assert office.paused and office.credited == [(1, True)]  # type: ignore[attr-defined]
        message = next(p for t, p in field.world.published if t == device.speaks and b"model_params" in p)
        kept = len(office.waiting)
        for name in ("0a", "0b"):
            other = {**json.loads(message), "model_params": f"{device.speaks}_{name}"}
            office.message(device.speaks, json.dumps(other).encode())
        go(field, 3)
        assert len(office.waiting) == kept, "one answer of each dispatch"
    go(field, 3)
    assert not office.paused and len(field.records("arrival")) == 1


def test_a_device_that_restarts_while_its_late_answer_is_fetched_is_credited_with_it(
    make: Callable[..., Field],
) -> None:
    """It trained and said so: what it lost is nothing. Nor does a checkpoint break meanwhile."""
    field = make(lost_after=60.0)
    field.seconds = lambda n: (0.5, 6.0)[n]
    for n in range(2):
        field.plain_device(n)
    go(field, 7)
    assert credited(field) == [True], "its number is known"
    slow: list[Callable[[], None]] = []
    fetch = field.hands.fetch

    def held(piece: Piece, then: Fetched) -> None:
        is_slow = piece.key.startswith("fedml_7_2_")
        slow.append(lambda: fetch(piece, then)) if is_slow else fetch(piece, then)

    with mock.patch.object(field.hands, "fetch", held):
        while not slow:
            field.world.step()
        (dispatch,) = (d for d in field.office._fetching if field.office.server.flights[d].client == 1)
        assert dispatch in field.office.server.overdue
        field.plain_device(1)
        go(field, 12)
        json.dumps(field.office.state())
    slow[0]()
    go(field, 1)
    assert dispatch in {r["dispatch"] for r in field.records("arrival")}
    assert "restarted" not in [r["state"] for r in field.records("client")] and all(credited(field))


def test_an_answer_that_is_given_up_while_it_is_fetched_breaks_no_checkpoint(
    make: Callable[..., Field],
) -> None:
    """The store is slower than the time after which the sub-model counts as lost."""
    field = make(lost_after=8.0)
    field.seconds = lambda n: (0.5, 6.0)[n]
    for n in range(2):
        field.plain_device(n)
    go(field, 4)
    with mock.patch.object(field.hands, "fetch", side_effect=lambda piece, then: None) as fetch:
        go(field, 5)
        waiting = set(field.office._fetching)
        assert fetch.call_count == 2
    del field.devices[1]
    go(field, 40)
    assert waiting - set(field.office.server.flights) and waiting <= field.office._fetching
    json.dumps(field.office.state())


@pytest.mark.parametrize("repeats", [True, False])
def test_an_answer_that_is_delivered_twice_is_one(make: Callable[..., Field], repeats: bool) -> None:
    field = make()
    field.seconds = lambda n: (0.5, 2.0)[n]
    for n in range(2):
        field.plain_device(n, repeats=repeats)
    seen: set[bytes] = set()
    for _ in range(60):
        go(field, 0.5)
        for topic, payload in field.world.published:
            if (
                topic == to_server("7", 2)
                and json.loads(payload)["msg_type"] == MODEL
                and payload not in seen
            ):
                seen.add(payload)
                for later in (0.7, 1.4):
                    again = (topic, payload)
                    field.world.at(field.world.now + later, lambda a=again: field.office.message(*a))  # type: ignore[misc]
    assert len(credited(field)) >= 10 and all(credited(field)) and not field.records("rejected")
    assert field.office.desk.refused[1]["GMR-401"] >= 10
    assert [r["state"] for r in field.records("client") if r["client"] == 1] == ["joined"]


@pytest.mark.parametrize(("numbered", "chosen"), [(True, True), (False, True), (False, False)])
def test_a_server_that_goes_on_credits_what_was_trained(
    make: Callable[..., Field], numbered: bool, chosen: bool
) -> None:
    """Numbered devices train what the server told again; what others lose is waited for. Who numbers its
    answers is known without a checkpoint."""
    with nullcontext() if chosen else silos():
        field = make(faults=None if chosen else IN_ORDER, lost_after=8.0)
        field.seconds = lambda n: (0.5, 3.0)[n]
        for n in range(2):
            field.plain_device(n, repeats=numbered)
        go(field, 10)
        right = []
        for _ in range(4):
            field.kill()
            go(field, 0.3)
            right += field.office.credited  # type: ignore[attr-defined]
            before = len(sent(field, 0)), len(sent(field, 1))
            field.restart()
            assert (before != (len(sent(field, 0)), len(sent(field, 1)))) == numbered
            go(field, 18)
    right += field.office.credited  # type: ignore[attr-defined]
    assert all(is_right for _, is_right in right)
    assert sum(n == 0 for n, _ in right) > 50 and sum(n == 1 for n, _ in right) >= 12


@pytest.mark.parametrize("away", [0.3, 5.0], ids=["it trains", "its answer was heard by nobody"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_silo_whose_answer_is_not_on_its_way_is_told_again(
    make: Callable[..., Field], away: float, first: bool, checkpoint: bool
) -> None:
    """At once, and once: what it trains is credited to what it was told, and nothing waits for a deadline."""
    with silos():
        field = make(faults=IN_ORDER, lost_after=1e6, answer_deadline=1e6)
        field.seconds = lambda n: (0.5, 3.0)[n]
        for n in range(2):
            field.plain_device(n)
        go(field, 1 if first else 10)
        field.kill()
        go(field, away)
        before, told = list(field.trained), len(sent(field, 1))
        resumed(field) if checkpoint else field.restart()
        go(field, 12)
        trainings = [n for n, _ in field.trained[len(before) :]]
        assert trainings.count(0) > 9 and 3 <= trainings.count(1) <= 5
        right = field.office.credited  # type: ignore[attr-defined]
        assert all(is_right for _, is_right in right) and {n for n, _ in right} == {0, 1}
        assert len(sent(field, 1)) - told == trainings.count(1)


def test_a_reply_to_an_older_servers_question_does_not_make_a_silo_idle(make: Callable[..., Field]) -> None:
    with silos():
        field = make(faults=IN_ORDER, lost_after=1e6, answer_deadline=1e6)
        field.seconds = lambda n: (0.5, 6.0)[n]
        for n in range(2):
            field.plain_device(n)
        go(field, 10)
        field.kill()
        field.restart()
        go(field, 0.2)
        told = len(sent(field, 1))
        silo = field.devices[1]
        field.office.message(silo.speaks, silo._status("ONLINE"))  # type: ignore[union-attr]
        go(field, 1)
        assert len(sent(field, 1)) == told
        go(field, 20)
        assert all(credited(field)) and len(credited(field)) >= 3


@pytest.mark.parametrize("leaves", [True, False])
@pytest.mark.parametrize("is_late", [True, False])
@pytest.mark.parametrize("away", [0.0, 8.0])
def test_a_silo_that_is_started_again_is_given_something_to_do(
    make: Callable[..., Field], away: float, is_late: bool, leaves: bool
) -> None:
    """Soon, and once: again what it lost, or another sub-model, be its leaving heard or not."""
    with silos():
        field = make(faults=IN_ORDER, lost_after=1e6, answer_deadline=4.0 if is_late else 1e6)
        field.seconds = lambda n: (0.5, 6.0)[n]
        for n in range(2):
            field.plain_device(n)
        go(field, 12)
        while not field.devices[1]._busy:  # type: ignore[union-attr]
            field.world.step()
        silo = field.devices[1]
        field.stop(1)
        if leaves:
            field.office.message(silo.speaks, silo.last_will())
        go(field, 5.0 + away)
        told, known = len(sent(field, 1)), len(field.trained)
        field.plain_device(1)
        go(field, 4)
        assert len(sent(field, 1)) == told + 1
        again, before = (sent(field, 1)[n]["model_params"] for n in (told, told - 1))
        assert (again == before) == (not is_late)
        go(field, 30)
        trainings = [n for n, _ in field.trained[known:]]
        assert 4 <= trainings.count(1) <= 6 and len(sent(field, 1)) - told <= trainings.count(1) + 1
        assert all(credited(field)) and len(credited(field)) >= 5


@pytest.mark.parametrize("deadline", [4.0, 1e6])
def test_a_silo_that_works_is_left_alone(make: Callable[..., Field], deadline: float) -> None:
    """However late it is: it trains each sub-model once, and is not asked much."""
    with silos():
        field = make(faults=IN_ORDER, lost_after=1e6, answer_deadline=deadline)
        field.seconds = lambda n: (0.5, 25.0)[n]
        for n in range(2):
            field.plain_device(n)
        go(field, 160)
        assert len(credited(field)) == 6 and all(credited(field)) and len(sent(field, 1)) == 7
        assert 20 < len(sent(field, 1, (CHECK,))) < 40


@pytest.mark.parametrize("kills", [False, True])
def test_a_reply_that_waited_until_a_silo_had_trained_does_not_make_it_idle(
    make: Callable[..., Field], kills: bool
) -> None:
    """It was asked just before it was told: its broker hands the reply over just before its answer."""
    with silos():
        field = make(faults=IN_ORDER, lost_after=1e6, answer_deadline=1e6, window_slack=0.01)
        lengths = iter(np.random.default_rng(1).uniform(2.0, 4.0, 1000))
        field.seconds = lambda n: next(lengths)
        field.plain_device(1)
        right: list[bool] = []
        for _ in range(10):
            go(field, 20)
            right += credited(field)
            field.office.credited.clear()  # type: ignore[attr-defined]
            if kills:
                field.kill()
                field.restart()
        assert len(right) > 50 and all(right)


def test_a_silo_that_was_told_its_first_sub_model_again_is_not_told_it_by_a_server_that_goes_on(
    make: Callable[..., Field],
) -> None:
    """It has heard no message of type 1, and would not ignore one."""
    with silos():
        field = make(faults=IN_ORDER, lost_after=1e6, answer_deadline=1e6)
        field.seconds = lambda n: (3.0, 12.0)[n]
        field.plain_device(1)
        go(field, 4)
        field.plain_device(1)
        go(field, 4)
        assert [m["msg_type"] for m in sent(field, 1)] == [INIT, SYNC]
        field.kill()
        field.restart()
        go(field, 60)
        assert len(credited(field)) >= 4 and all(credited(field))
        assert len(sent(field, 1)) == len(credited(field)) + 2


def test_a_silo_that_starts_while_what_it_is_to_be_told_waits_for_its_file_is_told_it_once(
    make: Callable[..., Field],
) -> None:
    """The store is slow: questions and sub-models leave the server in their order, and late."""
    with silos():
        field = make(faults=IN_ORDER, lost_after=1e6, answer_deadline=1e6)
        field.seconds = lambda n: 3.0
        for n in range(2):
            field.plain_device(n)
        go(field, 8)
        while not (field.devices[1]._busy and field.world.step()):  # type: ignore[union-attr]
            field.world.step()
        while field.devices[1]._busy:  # type: ignore[union-attr]
            field.world.step()
        waits: list[tuple[Any, ...]] = []
        with mock.patch.object(field.hands, "publish", lambda *given, **how: waits.append(given)):
            go(field, 1.5)
            for _ in range(2):
                field.plain_device(1)
                go(field, 1.6)
        for given_ in waits:
            field.hands.publish(*given_)
        told = [json.loads(m)["msg_type"] for topic, m, *_ in waits if topic.endswith("_2")]
        assert told.count(SYNC) == 1
        go(field, 30)
        assert len(credited(field)) > 6 and all(credited(field))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("repeats", [True, False])
def test_a_server_that_goes_on_takes_no_earlier_answer_again(
    make: Callable[..., Field], repeats: bool, checkpoint: bool, kept: bool
) -> None:
    """Every earlier answer comes once more, be its object still there (the server was killed before it was
    removed) or not: none is merged, and none costs a device what it is training now."""
    field = make(lost_after=30.0)
    field.seconds = lambda n: (0.5, 3.0)[n]
    for n in range(2):
        field.plain_device(n, repeats=repeats)
    objects: dict[str, bytes] = {}
    right: list[tuple[int, bool]] = []
    for _ in range(3):
        until = field.world.now + 20
        while field.world.now < until and field.world.step():
            objects |= field.world.objects
        while not field.devices[1]._busy:  # type: ignore[union-attr]
            field.world.step()
        right += field.office.credited  # type: ignore[attr-defined]
        field.kill()
        resumed(field) if checkpoint else field.restart()
        if kept:
            field.world.objects = objects | field.world.objects
        answers = [
            (topic, payload)
            for topic, payload in field.world.published
            if topic.count("_") == 2 and json.loads(payload)["msg_type"] == MODEL
        ]
        assert len(answers) > 20
        office = field.office
        for topic, payload in answers[-50:]:  # no more than one device may send at once
            field.world.at(field.world.now + 0.1, partial(office.message, topic, payload))
        go(field, 8)
    right += field.office.credited  # type: ignore[attr-defined]
    assert all(is_right for _, is_right in right)
    assert not field.records("rejected")
    arrivals = [r["dispatch"] for r in field.records("arrival")]
    assert len(arrivals) == len(set(arrivals))


def test_an_answer_that_was_not_written_down_may_be_heard_again(make: Callable[..., Field]) -> None:
    """The server is killed while it fetches it, behind a checkpoint."""
    field = make(lost_after=30.0)
    field.seconds = lambda n: (0.5, 3.0)[n]
    device = field.plain_device(1, repeats=False)
    while not field.office._fetching:
        field.world.step()
    objects = dict(field.world.objects)
    field.kill()
    resumed(field)
    field.world.objects = objects
    answers = [p for t, p in field.world.published if t == device.speaks and b"model_params" in p]
    for answer in (*answers, *answers):
        field.office.message(device.speaks, answer)
    go(field, 1)
    assert credited(field) == [True] and len(field.records("arrival")) == 1


def resumed(field: Field) -> None:
    """Another server goes on from a checkpoint of the one that was killed, and no journal."""
    state = json.loads(json.dumps(field.office.state()))
    meta, tensors = snapshot_live(field.office.live)
    tensors.update(field.office.tensors())
    assert field.office.journal is not None
    field.log.clear()
    field.journal.unlink()
    field.office = field._make_office()
    restore_live(field.office.live, Snapshot(json.loads(json.dumps(meta)), tensors))
    field.office.load_state(state, tensors)
    field._behind = field.world.now - field.office.live.now
    field.office.resume([], Journal(field.journal), [])
    field._open()


def test_a_first_message_that_an_older_server_may_have_sent_is_sent_again(make: Callable[..., Field]) -> None:
    field = make(lost_after=60.0)
    field.seconds = lambda n: (0.5, 20.0)[n]
    field.plain_device(1)
    go(field, 1)
    field.kill()
    field.restart()
    go(field, 25)
    assert [m["msg_type"] for m in sent(field, 1)][:2] == [INIT, INIT]
    assert [n for n, _ in field.trained] == [1, 1] and credited(field) == [True]


def test_who_repeats_its_number_is_in_the_checkpoint(make: Callable[..., Field]) -> None:
    field = make()
    for n in range(2):
        field.plain_device(n, repeats=n == 0)
    go(field, 30)
    state = json.loads(json.dumps(field.office.state()))
    assert state["numbering"] == [0]
    other = field._make_office()
    other.load_state(state, field.office.tensors())
    assert other.state()["numbering"] == [0]


def test_clients_that_choose_data_by_their_index_are_sent_it(make: Callable[..., Field]) -> None:
    with silos():
        field = make(faults=IN_ORDER)
        for n in range(2):
            field.plain_device(n, repeats=n == 0)
    go(field, 60)
    assert {m["client_idx"] for m in sent(field, 1)} == {"1"} and {
        m["client_idx"] for m in sent(field, 0)
    } == {"0"}
    assert all(credited(field)) and all(credited(field, 0)) and len(credited(field)) >= 4


def test_the_largest_index_is_one_that_a_phone_can_read(make: Callable[..., Field]) -> None:
    office = make().office
    assert isinstance(office, PlainOffice)
    office.server.flights[7] = SimpleNamespace(client=1)  # type: ignore[assignment]
    found = set()
    for count in (0, 1, 2**30 - 3, 2**30 - 2, 2**30 - 1, 2**40):
        office.tasks[7] = SimpleNamespace(count=count)  # type: ignore[assignment]
        index = office._index(7)
        assert 2 <= index < 2**31 and index % 2 == 1
        found.add(index)
    assert len(found) >= 4


@pytest.mark.parametrize(
    ("given_", "index"),
    [({}, None), ({"client_idx": "5"}, 5), ({"client_idx": 5}, 5), ({"client_idx": None}, None)],
)
def test_the_index_of_an_answer(given_: dict[str, Any], index: int | None) -> None:
    message = {"msg_type": MODEL, "sender": 1, "num_samples": 3, "model_params": "k", **given_}
    _, said = Desk("7", 0, (1,), None).read(to_server("7", 1), json.dumps(message).encode(), 1.0)
    assert said == PlainAnswer("k", 3, index)


@pytest.mark.parametrize("wrong", ["x", "-1", "9" * 16, -1, 2**53, True, 1.5, [1]])
def test_an_index_that_is_none_is_refused(wrong: Any) -> None:
    message = {"msg_type": MODEL, "sender": 1, "num_samples": 3, "model_params": "k", "client_idx": wrong}
    with pytest.raises(WireError, match="GMR-741 client_idx="):
        Desk("7", 0, (1,), None).read(to_server("7", 1), json.dumps(message).encode(), 1.0)


def test_an_answer_is_not_lost_before_it_is_late() -> None:
    with pytest.raises(ConfigError, match="GMR-106 lost_after=5 is less than answer_deadline=6"):
        parse({"lost_after": 5.0, "answer_deadline": 6.0}, where="here")


# -- histories ---------------------------------------------------------------------------------------------


def histories(*steps: str) -> st.SearchStrategy[list[tuple[str, int, float]]]:
    step = st.tuples(st.sampled_from(steps), st.integers(0, 1), st.floats(0.0, 30.0))
    return st.lists(step, min_size=5, max_size=25)


@settings(max_examples=max(30, settings().max_examples // 4))
@given(
    histories("time", "restart", "stop", "server", "slow", "fast", "lossy", "calm"),
    st.integers(0, 2**20),
    st.sampled_from((5.0, 12.0, 40.0)),
)
def test_in_whatever_history_numbered_answers_are_right(
    steps: list[tuple[str, int, float]], seed: int, lost_after: float
) -> None:
    """Messages lost, twice, in another order; devices that restart, stop, slow down; servers that go on."""
    speed = [0.5, SLOW]
    right: list[bool] = []
    with fields() as maker:
        field = maker(seed=seed, lost_after=lost_after)
        field.seconds = lambda n: speed[n]
        for n in range(2):
            field.plain_device(n)
        for what, n, seconds in steps:
            if what == "restart":
                field.plain_device(n)
            elif what == "stop":
                field.stop(n)
            elif what == "server":
                field.kill()
                right += [r for _, r in field.office.credited]  # type: ignore[attr-defined]
                field.restart()
            elif what in ("slow", "fast"):
                speed[n] = {"slow": 2 + seconds, "fast": 0.3}[what]
            elif what != "time":
                lossy = what == "lossy"
                field.world.faults = Faults(loss=0.3, duplicate=0.2) if lossy else Faults()
            go(field, seconds)
        field.world.faults = Faults()
        speed[:] = [0.5, 0.5]
        for n in range(2):
            field.plain_device(n)
        right += [r for _, r in field.office.credited]  # type: ignore[attr-defined]
        before, field.office.credited[:] = len(right), []  # type: ignore[attr-defined]
        go(field, 2 * lost_after + 30.0)
        right += [r for _, r in field.office.credited]  # type: ignore[attr-defined]
    assert all(right)
    assert {n for n, _ in field.office.credited} == {0, 1} and len(right) > before, (
        "everybody takes part again"
    )  # type: ignore[attr-defined]


@settings(max_examples=max(30, settings().max_examples // 4))
@given(
    histories("time", "restart", "stop", "leave", "server", "slow", "fast", "lossy", "calm"),
    st.integers(0, 2**20),
    st.sampled_from((4.0, 40.0, 1e6)),
)
def test_in_whatever_history_answers_of_silos_are_right(
    steps: list[tuple[str, int, float]], seed: int, deadline: float
) -> None:
    """Connections break and questions come twice. Nothing is ever taken to be lost because of its age."""
    speed = [0.5, SLOW]
    with fields() as maker, silos():
        field = maker(faults=IN_ORDER, seed=seed, answer_deadline=deadline, lost_after=1e6)
        field.seconds = lambda n: speed[n]
        right: list[tuple[int, bool]] = []
        for n in range(2):
            field.plain_device(n)
        for what, n, seconds in steps:
            silo = field.devices.get(n)
            if what == "restart":
                field.plain_device(n)
            elif what in ("stop", "leave"):
                field.stop(n)
                if what == "leave" and silo is not None:
                    field.office.message(silo.speaks, silo.last_will())
            elif what == "server":
                field.kill()
                right += field.office.credited  # type: ignore[attr-defined]
                field.restart()
            elif what in ("slow", "fast"):
                speed[n] = {"slow": 2 + seconds, "fast": 0.3}[what]
            elif what != "time":
                field.world.faults = LOSSY if what == "lossy" else IN_ORDER
            go(field, seconds)
        speed[:] = [0.5, 0.5]
        field.world.faults = IN_ORDER
        for n in range(2):
            if n not in field.devices:
                field.plain_device(n)
        go(field, 40.0)  # what they train may take so long
        right += field.office.credited  # type: ignore[attr-defined]
        field.office.credited.clear()  # type: ignore[attr-defined]
        go(field, 10.0)
        right += field.office.credited  # type: ignore[attr-defined]
    assert all(is_right for _, is_right in right)
    assert {n for n, _ in field.office.credited} == {0, 1}  # type: ignore[attr-defined]
