"""Each defect of an environment is found, and comes with the line that repairs it."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from fedgmr_plugin.cli import doctor as command
from fedgmr_plugin.cli.doctor import Facts, Finding, examine, render

VERSIONS = {
    "setuptools": "80.9.0",
    "click": "8.1.8",
    "numpy": "1.26.4",
    "chardet": "5.2.0",
    "pydantic": "2.11.0",
    "torch": "2.13.0+cpu",
    "torchvision": "0.28.0",
    "fedml": "0.9.6",
}
HEALTHY = Facts(
    python=(3, 11),
    executable="/env/bin/python",
    version=VERSIONS.get,
    requirements=lambda name: {"torchvision": ["numpy", "torch==2.13.0", "scipy; extra == 'scipy'"]}[name],
    has_module=lambda name: True,
    which=lambda name: f"/usr/sbin/{name}",
    home_problem=lambda: None,
    try_import=lambda: (True, "works"),
)
PIP = "/env/bin/python -m pip install"


def with_versions(**changes: str | None) -> Facts:
    return replace(HEALTHY, version={**VERSIONS, **changes}.get)


def without(module: str) -> Facts:
    return replace(HEALTHY, has_module=lambda name: name != module)


def test_a_healthy_environment_has_nothing_to_repair() -> None:
    findings = examine(HEALTHY)
    assert [f for f in findings if f.status != "ok" or f.repair] == []
    assert [f.check for f in findings] == [
        *("python", "setuptools", "click", "numpy", "chardet", "pydantic", "torch", "fedml", "home"),
        *("import fedml", "mpi4py", "mpirun", "MNN", "grpc", "moto", "mosquitto"),
    ]


DEFECTS: list[tuple[str, Facts, str, str, str]] = [
    # check, facts, status, part of the detail, repair
    ("python", replace(HEALTHY, python=(3, 12)), "fail", "3.12", "python3.11 -m venv .venv"),
    ("python", replace(HEALTHY, python=(3, 9)), "fail", "3.9", "python3.11 -m venv .venv"),
    ("setuptools", without("pkg_resources"), "fail", "80.9.0", f'{PIP} "setuptools<81"'),
    ("click", with_versions(click="8.2.0"), "warn", "8.2.0; typer", f'{PIP} "click<8.2"'),
    ("numpy", with_versions(numpy="2.0.0"), "fail", "NumPy 1", f'{PIP} "numpy<2"'),
    ("numpy", with_versions(numpy=None), "fail", "not installed", f'{PIP} "numpy<2"'),
    ("chardet", with_versions(chardet="6.0.0"), "warn", "requests", f'{PIP} "chardet<6"'),
    ("pydantic", with_versions(pydantic="1.10.22"), "fail", "pydantic 2", f'{PIP} "pydantic>=2.10,<3"'),
    ("torch", with_versions(torch="2.14.1"), "fail", "built for torch==2.13.0", f'{PIP} "torch==2.13.0"'),
    ("torch", with_versions(torch=None), "fail", "torch is not installed", f'{PIP} "torch"'),
    ("torch", with_versions(torchvision=None), "fail", "torchvision is not", f'{PIP} "torchvision"'),
    ("fedml", with_versions(fedml="0.8.51"), "fail", "0.8.51", f'{PIP} "fedml==0.9.6"'),
    ("fedml", with_versions(fedml=None), "fail", "not installed", f'{PIP} "fedml==0.9.6"'),
    (
        "home",
        replace(HEALTHY, home_problem=lambda: "read-only"),
        "fail",
        "read-only",
        'export HOME="$(mktemp -d)"',
    ),
    (
        "import fedml",
        replace(HEALTHY, try_import=lambda: (False, "No module named 'wandb'")),
        "fail",
        "No module named 'wandb'",
        '/env/bin/python -m pip install --force-reinstall "fedml==0.9.6"',
    ),
    ("mpi4py", without("mpi4py"), "ok", "optional", f'{PIP} "mpi4py>=4,<5"'),
    (
        "mpirun",
        replace(HEALTHY, which=lambda name: None if name == "mpirun" else name),
        "ok",
        "optional",
        "apt-get install openmpi-bin libopenmpi-dev",
    ),
    ("MNN", without("MNN"), "ok", "optional", f'{PIP} "MNN>=3,<4"'),
    (
        "mosquitto",
        replace(HEALTHY, which=lambda name: None if name == "mosquitto" else name),
        "ok",
        "optional",
        "apt-get install mosquitto",
    ),
]


@pytest.mark.parametrize(("check", "facts", "status", "detail", "repair"), DEFECTS)
def test_a_defect_is_the_only_finding(
    check: str, facts: Facts, status: str, detail: str, repair: str
) -> None:
    findings = [finding for finding in examine(facts) if finding.status != "ok" or finding.repair]
    assert [(f.check, f.status, f.repair) for f in findings] == [(check, status, repair)]
    assert detail in findings[0].detail


def test_the_import_is_tried_only_if_it_can_succeed() -> None:
    facts = replace(with_versions(numpy="2.1.0"), try_import=lambda: pytest.fail("numpy 2 is enough to know"))
    assert "import fedml" not in [finding.check for finding in examine(facts)]
    warned = with_versions(click="8.3.0")
    assert "import fedml" in [finding.check for finding in examine(warned)]


def test_requirements_that_are_not_understood_are_passed_over() -> None:
    facts = replace(HEALTHY, requirements=lambda name: ["???", "torch>=2", "torch-extras==1"])
    assert command.torch_pair(facts).status == "ok"


def test_rendering_aligns_and_indents_the_repair() -> None:
    text = render([Finding("python", "ok", "3.11"), Finding("a long one", "warn", "old", "do this")])
    assert text == "ok    python      3.11\nwarn  a long one  old\n                  do this"


@pytest.mark.parametrize(
    ("facts", "status"), [(HEALTHY, 0), (with_versions(click="9"), 0), (without("MNN"), 0)]
)
def test_exit_status_is_zero_unless_something_fails(
    facts: Facts, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "Facts", lambda: facts)
    result = CliRunner().invoke(command.doctor)
    assert result.exit_code == status and "fedml" in result.output


def test_json_lists_every_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = with_versions(fedml="0.8.0")
    monkeypatch.setattr(command, "Facts", lambda: facts)
    result = CliRunner().invoke(command.doctor, ["--json"])
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert report["ok"] is False
    assert report["findings"] == [finding._asdict() for finding in examine(facts)]
    assert CliRunner().invoke(command.doctor).exit_code == 1


# -- the real facts --------------------------------------------------------------------------------


def test_facts_are_those_of_this_environment() -> None:
    facts = Facts()
    assert facts.version("fedml") == importlib.metadata.version("fedml")
    assert facts.version("no-such-distribution") is None
    assert facts.has_module("json") and not facts.has_module("no_such_module")
    torch = [r for r in map(Requirement, facts.requirements("torchvision")) if r.name == "torch"]
    assert [s.operator for s in torch[0].specifier] == ["=="]
    assert facts.home_problem() is None


def test_a_home_that_cannot_be_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/no/such/home")
    assert "/no/such/home" in (Facts().home_problem() or "")


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ((0, "FedML says something\nworks, with these workarounds: offline\n", "a warning\n"), True),
        ((1, "", "a warning\nimport fedml failed: ImportError: no x\n"), False),
        ((-9, "", ""), False),
    ],
)
def test_the_import_is_judged_by_its_last_line(
    done: tuple[int, str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = done
    answer: Callable[..., Any] = lambda *_, **__: SimpleNamespace(returncode=code, stdout=out, stderr=err)  # noqa: E731
    monkeypatch.setattr(subprocess, "run", answer)
    works, detail = Facts().try_import()
    assert works is expected
    assert detail == ((out if expected else err).splitlines() or [f"exit status {code}"])[-1]
