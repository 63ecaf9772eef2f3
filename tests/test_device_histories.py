"""Some of the histories and hostile cases of `benchmarks.fuzz_devices`, which has run many more."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from benchmarks import fuzz_devices
from benchmarks.device_histories import Histories
from hypothesis import HealthCheck, settings

from fedgmr_plugin.errors import CATALOGUE

#: A device with a key, whatever it is sent: what must not be missing among the refusals of so many cases.
SOME = {"GMR-403", "GMR-701", "GMR-702", "GMR-703", "GMR-705", "GMR-741", "GMR-742", "GMR-743", "GMR-746"}

TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=max(25, settings().max_examples // 4),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_no_hostile_message_or_object_reaches_the_model() -> None:
    found = fuzz_devices.run_cases(0, 420, seed=1)
    assert set(found.cases) >= set(fuzz_devices.MESSAGES) and min(found.cases.values()) >= 28
    codes: Counter[str] = sum(found.codes.values(), Counter())
    assert set(codes) >= SOME and set(codes) <= set(CATALOGUE)


def test_the_figures_of_the_fuzzer_are_those_of_the_page(repository: Path) -> None:
    page = (repository / "docs" / "guarantees.md").read_text(encoding="utf-8")
    for line in fuzz_devices.table().splitlines():
        assert line in page, "run `python -m benchmarks.fuzz_devices --table` and copy the table"


def test_the_committed_figures_are_of_whole_runs() -> None:
    found = json.loads(fuzz_devices.RESULTS.read_text(encoding="utf-8"))
    assert found["histories"]["histories"] >= 10_000 and found["histories"]["broken_promises"] == 0
    assert (
        sum(kind["cases"] for kind in found["cases"]["kinds"].values()) == found["cases"]["asked"] >= 100_000
    )
    assert found["cases"]["escapes"] == 0
    model, slack = 2 * found["cases"]["model_bytes"], found["cases"]["slack_bytes"]
    assert found["cases"]["peak_bytes_of_objects"] <= model + slack
