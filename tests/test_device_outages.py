"""Broker and store go away in the midst of a run, one after the other and together, and come back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import outages

pytest.importorskip("moto", reason="moto, the local S3 server, is not installed")
pytest.importorskip("MNN", reason="FedML's cross-device server needs MNN")
if shutil.which("mosquitto") is None and not Path("/usr/sbin/mosquitto").exists():
    pytest.skip("Mosquitto is not installed", allow_module_level=True)

SECONDS = 3.0


def test_broker_and_store_go_away_and_nothing_is_lost(tmp_path: Path) -> None:
    """Each is as long as the devices' deadline. With a minute each: `python -m benchmarks.outages`."""
    found = outages.measure(SECONDS, tmp_path, answer_deadline=SECONDS)
    assert found["status"] == 0 and found["windows"] == outages.WINDOWS
    answers = found["answers"]
    assert answers["lost"] == answers["twice"] == answers["unknown"] == answers["refused"] == 0, answers
    assert answers["merged"] == answers["answered"] - answers["after_the_end"] - answers["given_up"]
    assert answers["given_up"] <= outages.DEVICES * len(found["outages"])
    assert answers["merged"] >= 2 * outages.WINDOWS and answers["after_the_end"] <= outages.DEVICES
    assert found["left_in_store"] == 0
    assert found["replay_is_the_same"]
    for outage in found["outages"]:
        before, meanwhile = outage["windows"]
        assert meanwhile - before <= 2, "it was not away: windows closed"


def test_what_is_lost_or_merged_twice_is_counted() -> None:
    """The account itself sees it, or the run above would prove nothing."""
    answered = [(0, 1), (0, 3), (0, 5), (1, 2), (1, 4)]
    whole = [(0, 1), (1, 2), (0, 3), (1, 4)]
    nothing = dict.fromkeys(("refused", "twice", "unknown", "given_up", "lost"), 0)
    assert outages.account(whole, [], answered) == {
        **nothing,
        **{"answered": 5, "merged": 4, "after_the_end": 1},
    }
    assert outages.account(whole[1:], [], answered)["lost"] == 1
    overdue = [(0, 1), (1, 2), (0, 3)]  # client 0 twice
    assert outages.account(whole[1:], [], answered, overdue)["given_up"] == 1
    assert outages.account(whole[:1], [], answered, overdue)["lost"] == 2  # (0, 3), (1, 2)
    assert outages.account([*whole, (0, 1)], [], answered)["twice"] == 1
    assert outages.account([*whole, (1, 6)], [], answered)["unknown"] == 1
    assert outages.account(whole, [(0, 5)], answered)["after_the_end"] == 0
