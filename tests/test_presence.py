"""One server for each run: of any that hear each other one goes on, and nothing of another time moves it."""

from __future__ import annotations

import itertools
import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgmr_plugin.protocol.presence import PATIENCE, UNHEARD, Presence, presence_topic

KEYS = [bytes([n]) * 32 for n in (1, 2)]


class Broker:
    """What is said reaches everybody who has subscribed, its sender too, in order or in any other."""

    def __init__(self) -> None:
        self.now = 0.0
        self.there: dict[str, Presence] = {}
        self.waiting: list[tuple[str, bytes]] = []  # (receiver, message)
        self.said: list[bytes] = []

    def server(self, letter: str, *, keys: list[bytes] = KEYS, serves: bool = False) -> Presence:
        made = Presence("7", 0, keys, f"place {letter}", letter * 32, lambda: self.now)
        made.serves = serves
        self.there[letter] = made
        self.say(made.ask())
        return made

    def say(self, message: bytes) -> None:
        self.said.append(message)
        self.waiting += [(name, message) for name in self.there]

    def step(self, pick: int = 0) -> None:
        name, message = self.waiting.pop(pick)
        if name in self.there:
            answer = self.there[name].heard(message)
            if answer is not None:
                self.say(answer)

    def settle(self) -> None:
        while self.waiting:
            self.step()

    def wait(self, seconds: float = PATIENCE) -> None:
        self.settle()
        self.now += seconds


def test_a_server_that_nobody_answers_begins() -> None:
    broker = Broker()
    first = broker.server("c")
    assert not first.is_alone()
    broker.settle()
    assert not first.is_alone()
    broker.wait()
    assert first.is_alone() and not first.taken_by


def test_the_second_is_refused_and_told_where_the_first_is() -> None:
    broker = Broker()
    first = broker.server("c", serves=True)
    broker.wait()
    for letter in "ae":
        second = broker.server(letter)
        broker.wait(100.0)
        assert second.taken_by == "place c" and not second.is_alone()
    assert not first.taken_by


def test_a_server_that_was_killed_is_followed_at_once() -> None:
    """Whatever it has said, and whatever of it is still on its way or was retained or recorded."""
    broker = Broker()
    broker.server("a", serves=True)
    broker.server("c")
    broker.settle()
    old = list(broker.said)
    broker.there.clear()
    follower = broker.server("b")
    for message in (*old, *old):
        broker.say(message)
    broker.wait()
    assert follower.is_alone() and not follower.taken_by


@pytest.mark.parametrize("serves", list(itertools.product([False, True], repeat=2)))
def test_two_that_were_apart_and_meet(serves: tuple[bool, bool]) -> None:
    """Both were asked while they could not hear each other; one asks again, as after each connection."""
    for asking in "ab":
        broker = Broker()
        for letter, is_serving in zip("ab", serves, strict=True):
            broker.server(letter, serves=is_serving)
        broker.waiting.clear()
        broker.say(broker.there[asking].ask())
        broker.wait()
        stays = "b" if serves == (False, True) else "a"
        assert {n: bool(p.taken_by) for n, p in broker.there.items()} == {n: n != stays for n in "ab"}


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=5, unique=True), st.data())
def test_of_any_that_start_together_one_begins(letters: list[str], data: st.DataObject) -> None:
    broker = Broker()
    for letter in letters:
        for _ in range(data.draw(st.integers(0, min(3, len(broker.waiting))))):
            broker.step(data.draw(st.integers(0, len(broker.waiting) - 1)) if broker.waiting else 0)
        broker.server(letter)
    while broker.waiting:
        broker.step(data.draw(st.integers(0, len(broker.waiting) - 1)))
    broker.now += PATIENCE
    assert [name for name, p in sorted(broker.there.items()) if p.is_alone()] == [min(letters)]


def test_one_that_begins_is_not_moved_by_those_that_ask_later() -> None:
    broker = Broker()
    first = broker.server("e")
    broker.wait()
    assert first.is_alone()
    first.serves = True
    second = broker.server("a")
    broker.wait()
    assert second.taken_by and not first.taken_by


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=4, unique=True), st.data())
def test_however_late_messages_are_one_stays(letters: list[str], data: st.DataObject) -> None:
    """Even where several have begun meanwhile."""
    broker = Broker()
    for letter in letters:
        broker.server(letter)
        for _ in range(data.draw(st.integers(0, 6))):
            if broker.waiting and data.draw(st.booleans()):
                broker.step(data.draw(st.integers(0, len(broker.waiting) - 1)))
            else:
                broker.now += data.draw(st.sampled_from((0.5, PATIENCE)))
            for name in data.draw(st.sets(st.sampled_from(sorted(broker.there)))):
                broker.there[name].begin()
    while broker.waiting:
        broker.step(data.draw(st.integers(0, len(broker.waiting) - 1)))
    assert not all(p.taken_by for p in broker.there.values())
    for _ in broker.there:
        for one in [p for p in broker.there.values() if not p.taken_by]:
            broker.say(one.ask())
        broker.wait()
    stays = [p for p in broker.there.values() if not p.taken_by]
    assert len(stays) == 1 and stays[0].begin()


def test_who_has_begun_since_it_asked_gives_way_by_the_order_of_now() -> None:
    """To one that serves, too, only if that goes before it: else several could give way in a circle."""
    broker = Broker()
    first, second = broker.server("a"), broker.server("b", serves=True)
    late = second.heard(broker.said[0])
    assert late is not None
    first.serves = True
    answer = first.heard(late)
    assert answer is not None and not first.taken_by
    assert second.heard(answer) is None and second.taken_by == "place a"


def test_who_has_begun_says_so_to_one_whose_answer_comes_late() -> None:
    """It asked before, and the other, which goes before it, answered: what took longer than the wait."""
    broker = Broker()
    first, second = broker.server("c"), broker.server("a")
    asked = broker.said[0]
    late = second.heard(asked)
    assert late is not None
    broker.waiting = [("c", asked)]  # nothing else arrived
    broker.wait()
    assert first.begin() and not second.taken_by
    answer = first.heard(late)
    assert answer is not None and not first.taken_by
    assert second.heard(answer) is None and second.taken_by == "place c"


def test_while_it_looks_whether_it_may_begin_nothing_is_heard() -> None:
    """Whoever asks just then is told by one that serves, or makes it wait: never both."""
    now, heard = [0.0], [False]
    other = Presence("7", 0, KEYS, "there", "a" * 32).ask()
    answers: list[bytes | None] = []

    def clock() -> float:
        if heard[0]:  # the link's thread hears it while this one decides
            heard[0] = False
            thread.start()
            thread.join(0.2)
        return now[0]

    own = Presence("7", 0, KEYS, "here", "c" * 32, clock)
    thread = threading.Thread(target=lambda: answers.append(own.heard(other)))
    own.heard(own.ask())
    assert not own.begin() and not own.serves
    now[0], heard[0] = PATIENCE, True
    assert own.begin() and own.serves
    thread.join()
    assert answers[0] is not None and json.loads(json.loads(answers[0])["fedgmr"])["kind"] == "here"
    assert own.begin() and not own.taken_by


@pytest.mark.parametrize("keys", [[], [bytes([9]) * 32]])
def test_who_has_other_keys_is_not_believed(keys: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker()
    broker.server("a", keys=keys, serves=True)
    own = broker.server("c")
    broker.wait()
    assert own.is_alone()
    assert caplog.text.count("another server of this run, or somebody who pretends to be one: GMR-743") >= 1


@pytest.mark.parametrize("keys", [[], KEYS])
@pytest.mark.parametrize(
    "message", [b"", b"x", b"[]", b"{}", b'{"fedgmr": 3}', b'{"fedgmr": "{}"}', b'{"fedgmr": "[1]"}']
)
def test_what_is_no_note_changes_nothing(message: bytes, keys: list[bytes]) -> None:
    own = Presence("7", 0, keys, "here", clock=lambda: 0.0)
    own.ask()
    assert own.heard(message) is None and not own.taken_by


@pytest.mark.parametrize(
    "fields", [{"kind": "x"}, {"nonce": 3}, {"nonce": "a"}, {"nonce": "A" * 32}, {"kind": ["ask"]}]
)
def test_what_is_no_ask_changes_nothing(fields: dict[str, Any]) -> None:
    own = Presence("7", 0, [], "here", "c" * 32, clock=lambda: 0.0)
    note = {"protocol": 1, "kind": "here", "nonce": "a" * 32, "asked": "c" * 32, "place": "there", **fields}
    assert own.heard(json.dumps({"fedgmr": json.dumps(note)}).encode()) is None and not own.taken_by


def test_where_nobody_may_hear_it_a_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    own = Presence("7", 0, KEYS, "here", clock=lambda: now[0])
    now[0] = 50.0
    assert not own.is_alone(), "it has not asked"
    own.ask()
    now[0] += UNHEARD - 1
    assert not own.is_alone()
    now[0] += 1
    assert own.is_alone() and own.begin() and own.begin()
    assert caplog.text.count("another server would not be seen") == 1


@pytest.mark.parametrize("returned", [False, True])
def test_a_wait_that_the_connection_does_not_outlast_is_begun_anew(returned: bool) -> None:
    now = [0.0]
    own = Presence("7", 0, KEYS, "here", clock=lambda: now[0])
    wait = PATIENCE if returned else UNHEARD

    def asks() -> None:
        question = own.ask()
        if returned:
            own.heard(question)

    asks()
    now[0] += wait - 1
    own.lost()
    now[0] += 100
    assert not own.is_alone()
    asks()
    now[0] += wait - 1
    assert not own.begin()
    now[0] += 1
    assert own.begin()
    own.lost()
    assert own.begin(), "who serves goes on"


def test_questions_are_answered_with_questions_so_often_only() -> None:
    own = Presence("7", 0, [], "here", "f" * 32, clock=lambda: 0.0)
    asks = [Presence("7", 0, [], "there", f"{n:032x}").ask() for n in range(200)]
    assert sum(own.heard(ask) is not None for ask in (*asks, *asks)) == 64


def test_the_topic_is_no_devices() -> None:
    assert presence_topic("42", 0) == "fedml_42_0_server"
