"""The rights of the guide to self-hosting, held against the names that server and devices use."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.samples import BatchPlan, TensorSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.protocol.storekeys import is_file_answer, probe_key
from fedgmr_plugin.runtimes.devices.field import Field, Problem
from fedgmr_plugin.runtimes.devices.loopback import Loopback, LoopbackHands

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "self-hosting.md"
BUCKET = "arn:aws:s3:::fedgmr/"


def blocks() -> list[dict[str, Any]]:
    text = GUIDE.read_text(encoding="utf-8")
    return [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```$", text, re.M | re.S)]


def allowed(policy: dict[str, Any], action: str, key: str) -> bool:
    """Whether a policy of the guide lets its owner do this: statements only allow, and * is the only sign."""

    def listed(found: Any) -> list[str]:
        return [found] if isinstance(found, str) else found

    return any(
        statement["Effect"] == "Allow"
        and f"s3:{action}" in listed(statement["Action"])
        and any(fnmatchcase(BUCKET + key, resource) for resource in listed(statement["Resource"]))
        for statement in policy["Statement"]
    )


def samples(client: int, count: int = 20) -> TensorSamples:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(client))
    return TensorSamples(x, x[:, :3].argmax(1))


def mlp() -> nn.Module:
    with isolated_rng(5):
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def used(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> set[tuple[int, str, str]]:
    """(participant, action, key) of a whole run of the devices 1 and 2; the server is participant 0."""
    uses: list[tuple[LoopbackHands, str, str]] = []
    plain = options.get("device_submodel", "wire") != "wire"

    class Watched(LoopbackHands):
        def put(self, piece: Any, content: Any) -> None:
            uses.append((self, "PutObject", piece.key))
            super().put(piece, content)

        def fetch(self, piece: Any, then: Any) -> None:
            uses.append((self, "GetObject", piece.key))
            super().fetch(piece, then)

        def delete(self, keys: Any) -> None:
            uses.extend((self, "DeleteObject", key) for key in keys)
            super().delete(keys)

    monkeypatch.setattr("fedgmr_plugin.runtimes.devices.field.LoopbackHands", Watched)
    problem = Problem(mlp, samples, samples(99), samples(98), BatchPlan(8, 2, 1, True, 3), 0.3)
    config = FedGMRConfig(densities=(1.0, 0.5), window_slack=0.1, answer_deadline=9.0, **options)
    keys = None if plain else {n: bytes([n]) * 32 for n in (1, 2)}
    field = Field(problem, config, folder, 2, 4, Loopback(0), keys).begin()
    for n in range(2):
        field.plain_device(n) if plain else field.device(n)
    field.run()
    owners: dict[LoopbackHands, int] = {field.hands: 0}  # type: ignore[dict-item]
    owners.update({hands: n + 1 for n, hands in field._device_hands.items()})
    return {(owners[hands], action, key) for hands, action, key in uses}


@pytest.mark.parametrize("submodel", ["wire", "masked"])
def test_the_guides_rights_are_those_that_a_run_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submodel: str
) -> None:
    if submodel == "masked":
        pytest.importorskip("MNN")
        found = used(tmp_path, monkeypatch, device_submodel="masked", device_authentication="off")
    else:
        found = used(tmp_path, monkeypatch)
    for_server, for_seven, rule = blocks()
    assert {who for who, _, _ in found} == {0, 1, 2}
    for who, action, key in sorted(found):
        assert key.startswith("fedml_7") and key.startswith(rule["Rules"][0]["Filter"]["Prefix"]), key
        if who == 0:
            assert allowed(for_server, action, key), (action, key)
            continue
        for device, may in ((who, True), (3 - who, action == "GetObject")):
            policy = json.loads(
                json.dumps(for_seven)
                .replace("fedml_42", "fedml_7")
                .replace("/7/", f"/{device}/")
                .replace("_7_*", f"_{device}_*")
            )
            assert allowed(policy, action, key) == may, (device, action, key)


def test_a_device_may_measure_and_no_other_run_or_device_is_open_to_it() -> None:
    _, for_seven, _ = blocks()
    probe = probe_key("42", 7)
    assert all(allowed(for_seven, action, probe) for action in ("PutObject", "GetObject", "DeleteObject"))
    others = [probe_key("42", 8), probe_key("4", 7), "fedml_42/answers/8/0-1", "fedml_42/answers/77/0-1"]
    others += [
        "fedml_42_0_8-x",
        "fedml_42_0_77-x",
        "fedml_42_0_7_x",
        "fedml_42/sent/0/x",
        "fedml_42_sent_0_x",
        "fedml_421/answers/7/0-1",
        "fedml_42_8_x",
        "other",
    ]
    assert not any(allowed(for_seven, a, key) for key in others for a in ("PutObject", "DeleteObject"))
    answers = ["fedml_42/answers/7/0-1", "fedml_42_7_x", "fedml_42_0_7-x"]
    assert all(allowed(for_seven, "PutObject", key) for key in answers)
    assert not any(allowed(for_seven, a, key) for key in answers for a in ("GetObject", "DeleteObject"))


@pytest.mark.parametrize(
    ("key", "own"),
    [
        ("fedml_42_7_0f0e", True),
        ("fedml_42_9_0f0e", False),
        ("fedml_42_7_", False),
        ("fedml_42_7_0f0e_1", False),
        ("fedml_42_7_0f/0e", False),
        ("fedml_42_0_7_0f0e", False),
        ("fedml_42_0_7-" + "0f" * 16, True),
        ("fedml_42_0_9-" + "0f" * 16, False),
        ("fedml_42_3_7-" + "0f" * 16, False),
        ("fedml_42_0_7-0f0e", False),
        ("fedml_421_0_7-" + "0f" * 16, False),
        ("fedml_42_sent_7_0f0e", False),
        ("fedml_42/answers/7/0-1", False),
        ("fedml_421_7_0f0e", False),
    ],
)
def test_names_of_fedmls_own_devices(key: str, own: bool) -> None:
    assert is_file_answer(key, "42", (7, 8)) == own


def test_a_device_with_the_servers_id_owns_no_file_of_another_one() -> None:
    key = "fedml_42_0_7-" + "0f" * 16
    assert not is_file_answer(key, "42", (0,)) and not is_file_answer(key, "42", (7,), server=1)
