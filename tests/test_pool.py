"""Who trains what, and what travels: the pool over channels in memory, whatever comes first."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.trainer import LocalStats
from fedgmr_plugin.errors import HostError
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.runtimes.distributed import payloads
from fedgmr_plugin.runtimes.distributed import pool as pool_module
from fedgmr_plugin.runtimes.distributed.channel import (
    Frame,
    Gone,
    frame,
    packed,
    text_frame,
    text_of,
    unpacked,
)
from fedgmr_plugin.runtimes.distributed.pool import Absent, Pool
from fedgmr_plugin.runtimes.distributed.tasks import Tasks
from fedgmr_plugin.runtimes.distributed.worker import Failed, serve

DENSITIES = (0.2, 0.5, 1.0)


class Line:
    """A channel in memory: what is sent is bytes on the way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._in: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        self.other: Line

    def send(self, message: Frame) -> None:
        self.other._in.put(bytearray(packed(message)))

    def receive(self) -> Frame:
        data = self._in.get()
        if data is None:
            raise Gone("the line is cut")
        return unpacked(data)

    def close(self) -> None:
        pass

    def cut(self) -> None:
        self._in.put(None)


def line(number: int) -> tuple[Line, Line]:
    ours, theirs = Line(f"rank {number}"), Line("rank 0")
    ours.other, theirs.other = theirs, ours
    return ours, theirs


class World:
    """A server's dispatches: a global vector whose versions differ in a prefix, re-ranked now and then."""

    def __init__(self, seed: int, size: int = 60, clients: int = 5) -> None:
        self.random = random.Random(seed)
        self.size, self.clients = size, clients
        self.version = self.count = 0
        self.w_D = torch.arange(size, dtype=torch.float64)
        self.rank()

    def rank(self) -> None:
        rungs = [self.random.randrange(4) for _ in range(self.size)]
        self.ranking = Ranking(DENSITIES, torch.tensor(rungs, dtype=torch.int16))

    def advance(self) -> None:
        """A merge: a prefix changes, perhaps nothing; then masks may be new."""
        self.version += 1
        changed = self.random.choice([0, self.size, self.random.randrange(self.size)])
        ranked_D = self.ranking.ranked(self.w_D)
        ranked_D[:changed] += 0.125
        self.w_D = self.ranking.flat(ranked_D)
        if self.random.random() < 0.3:
            self.rank()

    def dispatch(self) -> Dispatch:
        rung = self.random.randrange(len(DENSITIES))
        client = self.random.randrange(self.clients)
        values_S = self.ranking.cut(self.w_D, rung)
        self.count += 1
        return Dispatch(
            self.count - 1, client, self.version, 2, DENSITIES[rung], self.ranking, rung, values_S, 0.5
        )


def train(sent: Dispatch) -> LocalUpdate:
    """Depends on everything that a training depends on."""
    assert (sent.count, sent.learning_rate_scale) == (2, 0.5)
    values_S = sent.values_S * (1 + sent.client) + sent.index_S + sent.dispatch
    return LocalUpdate(sent.dispatch, sent.client, values_S, 0.1 * sent.version, LocalStats(3, 9, 0.1, None))


def slowly(seed: int) -> Callable[[Dispatch], LocalUpdate]:
    """`train`, after a while."""
    draw = random.Random(seed)

    def wait_and_train(sent: Dispatch) -> LocalUpdate:
        time.sleep(draw.choice([0.0, 0.0, 0.001, 0.003]))
        return train(sent)

    return wait_and_train


def pool_of(ranks: int, trainer: Callable[[int], Callable[[Dispatch], LocalUpdate]]) -> Pool:
    """A pool on this thread and `ranks` - 1 others."""
    lines = [line(n) for n in range(1, ranks)]
    for n, (_, theirs) in enumerate(lines, 1):
        threading.Thread(target=quietly, args=(theirs, trainer(n)), daemon=True).start()
    return Pool([ours for ours, _ in lines], local=trainer(0))


def quietly(channel: Line, work: Callable[[Dispatch], LocalUpdate]) -> None:
    try:
        serve(channel, work, beats=False)
    except (Failed, Gone):
        return


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_updates_are_those_of_one_process_in_any_order_of_completion(seed: int, ranks: int) -> None:
    """Begun early or not at all, needed soon, late or never; versions and rankings pass by meanwhile."""
    world = World(seed)
    trained: list[int] = []

    def trainer(n: int) -> Callable[[Dispatch], LocalUpdate]:
        work = slowly(seed + n)

        def note_and_work(sent: Dispatch) -> LocalUpdate:
            trained.append(sent.dispatch)
            return work(sent)

        return note_and_work

    pool = pool_of(ranks, trainer)
    out: list[Dispatch] = []
    try:
        for _ in range(12):
            made = [world.dispatch() for _ in range(world.random.randrange(5))]
            for sent in made:
                if world.random.random() < 0.8:
                    pool.begin(sent)
            out += made
            world.random.shuffle(out)
            cut = world.random.randrange(len(out) + 1)
            needed, out = out[:cut], out[cut:]
            for got, sent in zip(pool.finish(needed), needed, strict=True):
                wanted = train(sent)
                assert torch.equal(got.values_S, wanted.values_S)
                assert got._replace(values_S=None) == wanted._replace(values_S=None)  # type: ignore[arg-type]
            world.advance()
    finally:
        pool.close()
    assert len(trained) == len(set(trained)) <= world.count


def test_what_was_begun_is_trained_while_the_server_is_at_something_else() -> None:
    trained: list[int] = []

    def note(n: int) -> Callable[[Dispatch], LocalUpdate]:
        def work(sent: Dispatch) -> LocalUpdate:
            trained.append(n)
            return train(sent)

        return work

    world = World(0)
    pool = pool_of(3, note)
    sent = [world.dispatch() for _ in range(4)]
    for dispatch in sent:
        pool.begin(dispatch)
    deadline = time.monotonic() + 30
    while len(trained) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(trained) <= {1, 2} and len(trained) == 4
    pool.finish(sent)
    pool.close()
    assert len(trained) == 4


def test_payloads_that_are_there_do_not_travel_again() -> None:
    world = World(1)
    pool = Pool([])
    ours, theirs = line(1)
    world.ranking = Ranking(DENSITIES, torch.arange(60, dtype=torch.int16) // 20)
    threading.Thread(target=quietly, args=(theirs, train), daemon=True).start()
    pool = Pool([ours])
    masks = 60  # a byte for each coordinate

    def down(rung: int) -> int:
        """Bytes that travel for one more dispatch."""
        before = pool.traffic["down"]
        values_S = world.ranking.cut(world.w_D, rung)
        sent = Dispatch(world.count, 0, world.version, 2, DENSITIES[rung], world.ranking, rung, values_S, 0.5)
        world.count += 1
        pool.finish([sent])
        return pool.traffic["down"] - before

    assert down(1) == masks + 40 * 8
    assert down(1) == down(0) == 0
    assert down(2) == 20 * 8  # what the larger one has more
    world.version, world.w_D = 1, world.w_D.clone()
    world.w_D[:7] += 1.0
    assert down(2) == 7 * 8  # behind the last change all is there
    assert down(0) == 0
    pool.close()
    assert pool.traffic["up"] == 8 * (40 + 40 + 20 + 60 + 60 + 20)


@given(st.lists(st.sampled_from([0.0, -0.0, 1.5, float("nan")]), max_size=40), st.data())
def test_the_last_difference_is_of_bits(values: list[float], data: st.DataObject) -> None:
    a = torch.tensor(values, dtype=torch.float32)
    b = a.clone()
    places = data.draw(st.sets(st.integers(0, len(values) - 1)) if values else st.just(set()))
    for place in places:
        b[place] = -7.0
    assert payloads.last_difference(a, b) == max(places, default=-1) + 1
    zero = torch.zeros(3)
    assert payloads.last_difference(zero, -zero) == 3


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_a_payload_is_put_together_from_its_parts(size: int, held: int, changed: int) -> None:
    new = torch.arange(size, dtype=torch.float32)
    base = torch.arange(held, dtype=torch.float32)
    kept = min(size, held)
    changed = min(changed, kept)
    base[:changed] = -1.0
    parts = payloads.Parts(4, changed, kept)
    travelling = parts.travelling(new)
    assert torch.equal(parts.joined(travelling, base, size), new)
    assert len(travelling) == (size if changed == kept else changed + size - kept)


# -- failures ---------------------------------------------------------------------------------------------


def test_an_error_there_is_an_error_here_with_its_traceback() -> None:
    def trainer(n: int) -> Callable[[Dispatch], LocalUpdate]:
        def work(sent: Dispatch) -> LocalUpdate:
            if n == 2:
                raise KeyError("no such thing")
            time.sleep(0.002)
            return train(sent)

        return work

    world = World(2)
    pool = pool_of(3, trainer)
    with pytest.raises(HostError, match="GMR-507 client=.: KeyError: 'no such thing'") as caught:
        for _ in range(50):
            pool.finish([world.dispatch() for _ in range(6)])
    assert caught.value.where == "rank 2"
    assert "in work" in str(caught.value.__cause__) and "raise KeyError" in str(caught.value.__cause__)


def test_a_process_that_is_gone_is_named() -> None:
    ours, _ = line(7)
    pool = Pool([ours])
    pool.begin(World(3).dispatch())
    ours.cut()
    with pytest.raises(HostError, match="GMR-507 rank 7 is gone: the line is cut"):
        pool.finish([World(3).dispatch()])


def test_an_error_of_ours_in_a_thread_is_not_lost() -> None:
    ours, theirs = line(1)
    pool = Pool([ours])
    theirs.send(frame("update", dispatch=12345, seconds=0.0))
    with pytest.raises(HostError, match="GMR-507 rank 1: KeyError"):
        pool.finish([World(3).dispatch()])


def test_others_learn_that_a_run_has_ended_early() -> None:
    for patience, expected in ((None, None), (1.0, Failed)):
        ours, theirs = line(1)
        ended: list[Any] = []

        def live(theirs: Line = theirs, ended: list[Any] = ended) -> None:
            try:
                ended.append(serve(theirs, train, beats=False))
            except Failed as failed:
                ended.append(failed)

        thread = threading.Thread(target=live)
        thread.start()
        Pool([ours]).close(patience)
        thread.join(30)
        assert len(ended) == 1 and (ended[0] is None if expected is None else isinstance(ended[0], expected))


def failing(numbers: set[int], tried: list[int]) -> Callable[[Dispatch], LocalUpdate]:
    def work(sent: Dispatch) -> LocalUpdate:
        tried.append(sent.dispatch)
        if sent.dispatch in numbers:
            raise KeyError("no such thing")
        return train(sent)

    return work


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


@pytest.mark.parametrize("needed", [False, True])
def test_an_error_in_what_nobody_needs_is_none(caplog: pytest.LogCaptureFixture, needed: bool) -> None:
    """And once it is needed, it is one."""
    world = World(8)
    tried: list[int] = []
    sent = [world.dispatch() for _ in range(6)]
    pool = pool_of(2, lambda n: failing({0}, tried) if n else train)
    pool.begin(sent[0])
    wait_for(lambda: pool._peers[0].failure)
    assert [u.dispatch for u in pool.finish(sent[1:])] == [1, 2, 3, 4, 5]
    assert tried == [0] and "rank 1 trains no more: client=" in caplog.text
    if needed:
        with pytest.raises(HostError, match="GMR-507 client=.: KeyError: 'no such thing'"):
            pool.finish(sent[:1])
    else:
        assert pool.close() == Absent()
        wait_for(lambda: "training failed, but nobody needs it" in caplog.text)


def test_a_pool_without_anybody_left_says_why() -> None:
    world = World(9)
    ours, theirs = line(1)
    threading.Thread(target=quietly, args=(theirs, failing({0}, [])), daemon=True).start()
    pool = Pool([ours])
    pool.begin(world.dispatch())
    wait_for(lambda: pool._peers[0].failure)
    with pytest.raises(HostError, match="GMR-507 client="):
        pool.finish([world.dispatch()])


@pytest.mark.parametrize("answers", [True, False])
def test_nobody_waits_for_ever_for_what_nobody_needs(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    """Half of the time that the others have is theirs to say goodbye, whatever they are at."""
    monkeypatch.setattr(pool_module, "FAREWELL", 0.4)
    gone, go_on = threading.Event(), threading.Event()
    trained: list[Dispatch] = []

    def hang(sent: Dispatch) -> LocalUpdate:
        trained.append(sent)
        go_on.wait(30)
        return train(sent)

    ours, theirs = line(1)
    if not answers:
        theirs.send = lambda message: None  # type: ignore[method-assign]
    threading.Thread(
        target=serve, args=(theirs, hang), kwargs={"beats": False, "leave": gone.set}, daemon=True
    ).start()
    pool = Pool([ours], local=train)
    pool.begin(World(10).dispatch())
    wait_for(lambda: trained)
    absent = pool.close()
    assert (absent.late, absent.silent) == ((("rank 1",), ()) if answers else ((), ("rank 1",)))
    assert gone.wait(30) and bool(absent.threads) == (not answers)
    go_on.set()


# -- who trains what --------------------------------------------------------------------------------------


def test_what_is_needed_comes_first_the_longest_of_it_before_the_others() -> None:
    world = World(4, clients=100)
    sent = [world.dispatch() for _ in range(9)]
    tasks = Tasks()
    for dispatch in sent:
        tasks.add(dispatch)
    seconds = {d.dispatch: 1.0 + (d.dispatch * 5) % 9 for d in sent}
    for d in sent:
        tasks.costs.learn(d, 100.0)
        tasks.costs.learn(d, seconds[d.dispatch])  # the last measurement counts
    tasks.need([sent[8], sent[2], sent[5]])
    order = [tasks.take("a") for _ in range(9)]
    numbers = [d.dispatch for d in order if d is not None]
    assert numbers[:3] == sorted([8, 2, 5], key=lambda n: -seconds[n])
    assert numbers[3:] == [0, 1, 3, 4, 6, 7] and tasks.take("a") is None


def test_estimates_fall_back_on_the_density_and_then_on_the_size() -> None:
    world = World(5)
    ranking = Ranking(DENSITIES, torch.arange(60, dtype=torch.int16) // 20)

    def of(client: int, rung: int, number: int) -> Dispatch:
        values_S = ranking.cut(world.w_D, rung)
        return Dispatch(number, client, 0, 0, DENSITIES[rung], ranking, rung, values_S)

    tasks = Tasks()
    assert tasks.costs.estimate(of(0, 0, 0)) < tasks.costs.estimate(of(1, 2, 1))
    tasks.costs.learn(of(0, 0, 0), 4.0)
    tasks.costs.learn(of(1, 0, 1), 2.0)
    assert [tasks.costs.estimate(of(n, 0, n)) for n in range(3)] == [4.0, 2.0, 3.0]
    assert tasks.costs.estimate(of(2, 1, 2)) == 6.0


def test_clients_stay_where_they_were_while_nobody_waits_for_them() -> None:
    world = World(6, clients=1000)
    tasks = Tasks()
    first = [world.dispatch() for _ in range(6)]
    for d in first:
        tasks.add(d)
    homes = {d.client: who for who in "ababab" if (d := tasks.take(who)) is not None}
    for number, d in enumerate(first, 10):
        tasks.add(Dispatch(number, d.client, 1, 2, d.density, d.ranking, d.rung, d.values_S, 0.5))
    for who in "aaabbb":
        taken = tasks.take(who)
        assert taken is not None and homes[taken.client] == who
    tasks.add(Dispatch(20, first[0].client, 2, 2, 0.2, first[0].ranking, 0, first[0].values_S, 0.5))
    assert tasks.take("c") is not None  # but nobody idles for that


def test_tasks_are_left_for_those_who_will_be_free_sooner() -> None:
    world = World(7)
    tasks = Tasks()
    tasks.need(world.dispatch() for _ in range(3))
    assert tasks.take("busy", spare=3) is None and tasks.take("busy", spare=2) is not None


def test_nobody_takes_what_is_not_needed_unless_it_may_be_ahead() -> None:
    world = World(7)
    tasks = Tasks()
    tasks.add(world.dispatch())
    assert tasks.take("server", ahead=False) is None and tasks.take("idle") is not None


# -- frames -----------------------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.text(max_size=5), st.one_of(st.floats(), st.integers(), st.none(), st.text()), max_size=4
    ),
    st.lists(st.floats(width=32), max_size=20),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_a_message_comes_back_as_it_was(
    head: dict[str, Any], values: list[float], dtype: torch.dtype
) -> None:
    sent = frame("x", torch.tensor(values, dtype=dtype), **{f"k{k}": v for k, v in head.items()})
    got = unpacked(bytearray(packed(sent)))
    assert repr(got.head) == repr(sent.head)
    same_bits(got.values, sent.values)


def same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def test_masks_and_texts_travel_too() -> None:
    for dtype in (torch.int8, torch.int16):
        sent = frame("ranking", torch.arange(7, dtype=dtype))
        same_bits(unpacked(bytearray(packed(sent))).values, sent.values)
    for text in ("", "é" * 5000):
        assert text_of(unpacked(bytearray(packed(text_frame("failure", text))))).strip() == text
