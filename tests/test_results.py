"""The figures in the documentation are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import (
    bench,
    byzantine,
    collect,
    devices,
    fashion_mnist,
    fuzz_devices,
    outages,
    payloads,
    ranks,
    triggers,
)

REDUCED = "benchmarks/results/reduced"


def test_the_fashion_mnist_tables_of_the_docs_are_generated(repository: Path) -> None:
    page = (repository / "docs" / "results.md").read_text(encoding="utf-8")
    for line in fashion_mnist.table().splitlines():
        assert line in page, "run `python -m benchmarks.fashion_mnist table` and copy the tables"


def test_the_tables_of_the_methods_are_generated(repository: Path) -> None:
    page = (repository / "docs" / "results.md").read_text(encoding="utf-8")
    file = f"{REDUCED}/omniglot.json"
    found = json.loads((repository / file).read_text(encoding="utf-8"))
    for table in (
        collect.table(found),
        collect.pairs(found),
        collect.horizons(found),
        collect.beside_the_paper(found, "femnist"),
    ):
        assert table in page, f"`python -m benchmarks.collect --table {file} --paper femnist`"


def test_the_tables_of_the_ablations_are_generated(repository: Path) -> None:
    page = (repository / "docs" / "results.md").read_text(encoding="utf-8")
    file = f"{REDUCED}/omniglot_ablations.json"
    found = json.loads((repository / file).read_text(encoding="utf-8"))
    for table in (collect.table(found), collect.horizons(found)):
        assert table in page, f"`python -m benchmarks.collect --table {file}`"


@pytest.mark.parametrize(
    ("names", "methods"),
    [
        (
            ["omniglot", "fashion_mnist", "tiny_imagenet100", "cifar10_small", "shakespeare"],
            ["fedgmr", "fedgmr_decoupled"],
        ),
        (
            ["omniglot", "fashion_mnist", "tiny_imagenet100", "cifar10_small", "shakespeare"],
            ["frozen", "fedgmr", "fedgmr_loss", "fedgmr_decoupled"],
        ),
        (["omniglot", "tiny_imagenet100"], ["frozen_defaults", "fedgmr_defaults"]),
        (["omniglot"], ["frozen_defaults", "fedgmr_defaults", "defaults_decoupled"]),
        (
            [
                "omniglot",
                *(f"omniglot_{v}" for v in ("medium", "low", "slow_devices", "traces", "iid")),
            ],
            ["fedgmr", "frozen", "fedgmr_decoupled"],
        ),
    ],
)
def test_the_tables_of_several_problems_are_generated(
    repository: Path, names: list[str], methods: list[str]
) -> None:
    page = (repository / "docs" / "results.md").read_text(encoding="utf-8")
    files = [f"{REDUCED}/{name}.json" for name in names]
    found = {
        name: json.loads((repository / file).read_text(encoding="utf-8"))
        for name, file in zip(names, files, strict=True)
    }
    command = f"`python -m benchmarks.collect --across {' '.join(files)} --methods {','.join(methods)}`"
    assert collect.across(found, methods) in page, command


def test_the_trigger_tables_of_the_docs_are_generated(repository: Path) -> None:
    page = (repository / "docs" / "results.md").read_text(encoding="utf-8")
    for line in triggers.table().splitlines():
        assert line in page, "run `python -m benchmarks.triggers table` and copy the tables"


def test_the_payload_table_of_the_docs_is_generated(repository: Path) -> None:
    page = (repository / "docs" / "results.md").read_text(encoding="utf-8")
    assert payloads.table() in page, "run `python -m benchmarks.payloads table` and copy the table"


def test_the_performance_table_of_the_docs_is_generated(repository: Path) -> None:
    page = (repository / "docs" / "performance.md").read_text(encoding="utf-8")
    assert bench.table() in page, "run `python -m benchmarks.bench --table` and copy the table"


def test_the_tables_on_several_processes_are_generated(repository: Path) -> None:
    page = (repository / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert ranks.table() in page, "run `python -m benchmarks.ranks --table` and copy the table"


def test_the_tables_on_devices_are_generated(repository: Path) -> None:
    page = (repository / "docs" / "devices.md").read_text(encoding="utf-8")
    for table in (byzantine.table(), byzantine.cost_table(), byzantine.choice_table()):
        assert table in page, "run `python -m benchmarks.byzantine --table` and copy the tables"
    assert devices.table() in page, "run `python -m benchmarks.devices --table` and copy the table"


def test_the_table_of_the_fuzzer_is_generated_and_no_promise_was_broken(repository: Path) -> None:
    page = (repository / "docs" / "guarantees.md").read_text(encoding="utf-8")
    assert fuzz_devices.table() in page, "run `python -m benchmarks.fuzz_devices --table` and copy the table"
    found = json.loads(fuzz_devices.RESULTS.read_text(encoding="utf-8"))
    cases = found["cases"]
    assert found["histories"]["broken_promises"] == cases["escapes"] == 0
    assert cases["peak_bytes_of_objects"] <= 2 * cases["model_bytes"] + cases["slack_bytes"]
    assert cases["peak_bytes"] <= 2 * cases["model_bytes"] + cases["slack_bytes_of_messages"]


def test_what_the_page_says_of_attackers_and_the_longer_step() -> None:
    """Chosen on data that test nothing; within two points under attack, and harmful without, where densities
    differ."""
    found = json.loads(byzantine.RESULTS.read_text(encoding="utf-8"))

    def mean(what: str, densities: str, attack: str, defence: str) -> float:
        runs = [r for r in found[what]["runs"] if r["windows"] == byzantine.WINDOWS]
        wanted = densities, attack, defence
        chosen = [r["accuracy"] for r in runs if (r["densities"], r["attack"], r["defence"]) == wanted]
        assert len(chosen) == len(byzantine.SEEDS)
        return float(np.mean(chosen))

    for name in byzantine.DENSITIES:
        tried = {d: mean("choice", name, "flip", d) for d in ("both", *byzantine.CANDIDATES)}
        assert max(tried, key=tried.__getitem__) == "longest step"
        usual = mean("costs", name, "none", "none")
        assert usual - mean("costs", name, "absent", "none") < 0.005
        assert usual - mean("costs", name, "flip", "both") > 0.02
        for attack in ("flip", "noise"):
            assert usual - mean("costs", name, attack, "longest step") < 0.02
    dense, mixed = byzantine.DENSITIES
    assert mean("costs", dense, "none", "step") - mean("costs", dense, "flip", "longest step") > 0.02
    assert mean("costs", mixed, "none", "none") - mean("costs", mixed, "none", "longest step") > 0.1


def test_the_table_of_outages_is_generated_and_nothing_was_lost(repository: Path) -> None:
    page = (repository / "docs" / "guarantees.md").read_text(encoding="utf-8")
    assert outages.table() in page, "run `python -m benchmarks.outages --table` and copy the table"
    found = json.loads(outages.RESULTS.read_text(encoding="utf-8"))
    answers = found["answers"]
    assert answers["lost"] == answers["twice"] == answers["unknown"] == answers["refused"] == 0
    assert answers["given_up"] == 0
    assert f"{answers['answered']} answers" in page and answers["merged"] == answers["answered"]
    assert found["replay_is_the_same"] and found["left_in_store"] == 0
    assert all(outage["seconds"] == 60.0 for outage in found["outages"])


def test_the_readme_says_what_the_results_say(repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    runs = json.loads(fashion_mnist.RESULTS.read_text(encoding="utf-8"))["runs"]
    for method in fashion_mnist.COMPARED:
        accuracies = [run["accuracy"] for run in runs if run["method"] == method]
        assert f"{100 * float(np.mean(accuracies)):.2f} %" in readme
