"""Some of the histories and hostile cases of `benchmarks.fuzz_devices`, which has run many more."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, settings

from benchmarks import fuzz_devices
from benchmarks.device_histories import Histories
from fedgmr_plugin.errors import CATALOGUE

#: A device with a key, whatever it is sent: what must not be missing among the refusals of so many cases.
SOME = {"GMR-403", "GMR-701", "GMR-702", "GMR-703", "GMR-705", "GMR-741", "GMR-742", "GMR-743", "GMR-746"}

TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=max(25, settings().max_examples // 4),
    stateful_step_count=fuzz_devices.STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_no_hostile_message_or_object_reaches_the_model() -> None:
    found = fuzz_devices.run_cases(0, 420, seed=1)
    assert set(found.cases) >= set(fuzz_devices.MESSAGES) and min(found.cases.values()) >= 28
    codes: Counter[str] = sum(found.codes.values(), Counter())
    assert set(codes) >= SOME and set(codes) <= set(CATALOGUE)
