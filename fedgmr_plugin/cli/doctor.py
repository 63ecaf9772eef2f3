"""`fedgmr doctor`: is this environment able to run FedML with fedgmr, and if not, what repairs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import click
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from fedgmr_plugin.runtimes.host import SUPPORTED_FEDML

Status = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """What one check found."""

    check: str
    status: Status
    detail: str
    repair: str = ""  # the line to run; empty where nothing is to be done


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(distribution: str) -> list[str]:
    return importlib.metadata.requires(distribution) or []


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _home_problem() -> str | None:
    try:
        with tempfile.TemporaryFile(dir=Path.home()):
            return None
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        return str(error)


def _try_import() -> tuple[bool, str]:
    """Import FedML in a process of its own, because a failed import leaves traces."""
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=False)
    output = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, output[-1].strip() if output else f"exit status {done.returncode}"


_IMPORT = """
import sys
from fedgmr_plugin.errors import HostError
from fedgmr_plugin.runtimes import host
try:
    print("works, with these workarounds:", ", ".join(host.prepare()))
except HostError as error:
    sys.exit(error.message)
"""


def find(program: str) -> str | None:
    """Path of a program, also of one in a system folder that only root has on its PATH."""
    return shutil.which(program) or shutil.which(program, path="/usr/local/sbin:/usr/sbin")


@dataclass(frozen=True)
class Facts:
    """Where the checks look; tests put other functions here to simulate a defect."""

    python: tuple[int, int] = sys.version_info[:2]
    executable: str = sys.executable
    version: Callable[[str], str | None] = _version  # of a distribution; None if not installed
    requirements: Callable[[str], list[str]] = _requirements
    has_module: Callable[[str], bool] = _has_module
    which: Callable[[str], str | None] = find
    home_problem: Callable[[], str | None] = _home_problem
    try_import: Callable[[], tuple[bool, str]] = _try_import  # (whether it works, detail)

    def pip(self, requirement: str) -> str:
        """The line that installs a requirement into this environment."""
        return f'{self.executable} -m pip install "{requirement}"'


def python_version(facts: Facts) -> Finding:
    """3.10 or 3.11: wandb 0.13, which FedML pins, imports a module that 3.12 removed."""
    found = ".".join(map(str, facts.python))
    if (3, 10) <= facts.python < (3, 12):
        return Finding("python", "ok", found)
    return Finding(
        "python",
        "fail",
        f"{found}; FedML {SUPPORTED_FEDML} runs on 3.10 and 3.11",
        "python3.11 -m venv .venv",
    )


def package(facts: Facts, name: str, below: str, why: str, *, status: Status, least: str = "0") -> Finding:
    """A distribution within [least, below)."""
    found = facts.version(name)
    spelled = f"{name}<{below}" if least == "0" else f"{name}>={least},<{below}"
    if found is None:
        return Finding(name, "fail", "not installed", facts.pip(spelled))
    if Version(least) <= Version(found) < Version(below):
        return Finding(name, "ok", found)
    return Finding(name, status, f"{found}; {why}", facts.pip(spelled))


def pkg_resources(facts: Facts) -> Finding:
    """FedML imports pkg_resources, which recent setuptools lack."""
    found = facts.version("setuptools") or "not installed"
    if facts.has_module("pkg_resources"):
        return Finding("setuptools", "ok", f"{found}, with pkg_resources")
    return Finding("setuptools", "fail", f"{found}; FedML imports pkg_resources", facts.pip("setuptools<81"))


def torch_pair(facts: Facts) -> Finding:
    """torchvision names the one torch release that it was built for."""
    torch, torchvision = facts.version("torch"), facts.version("torchvision")
    if torch is None or torchvision is None:
        missing = "torch" if torch is None else "torchvision"
        return Finding("torch", "fail", f"{missing} is not installed", facts.pip(missing))
    detail = f"torch {torch}, torchvision {torchvision}"
    for text in facts.requirements("torchvision"):
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if wanted.name == "torch" and not wanted.specifier.contains(torch, prereleases=True):
            repair = facts.pip(f"torch{wanted.specifier}")
            return Finding("torch", "fail", f"{detail}, which was built for torch{wanted.specifier}", repair)
    return Finding("torch", "ok", detail)


def fedml(facts: Facts) -> Finding:
    """fedgmr wraps FedML's internals, so exactly one release will do."""
    found, repair = facts.version("fedml"), facts.pip(f"fedml=={SUPPORTED_FEDML}")
    if found is None:
        return Finding("fedml", "fail", "not installed", repair)
    if found != SUPPORTED_FEDML:
        return Finding("fedml", "fail", f"{found}; fedgmr needs {SUPPORTED_FEDML}", repair)
    return Finding("fedml", "ok", found)


def home(facts: Facts) -> Finding:
    """FedML writes to ~/.fedml as soon as it is imported."""
    problem = facts.home_problem()
    if problem is None:
        return Finding("home", "ok", "writable")
    return Finding("home", "fail", f"FedML writes to ~/.fedml: {problem}", 'export HOME="$(mktemp -d)"')


def fedml_import(facts: Facts) -> Finding:
    """The proof: FedML is imported, with fedgmr's workarounds."""
    works, detail = facts.try_import()
    if works:
        return Finding("import fedml", "ok", detail)
    repair = f'{facts.executable} -m pip install --force-reinstall "fedml=={SUPPORTED_FEDML}"'
    return Finding("import fedml", "fail", detail, repair)


def optional(facts: Facts) -> list[Finding]:
    """What only some runtimes of FedML need; never worse than ok."""
    parts = (
        ("mpi4py", facts.has_module("mpi4py"), "FedML's MPI simulator", facts.pip("mpi4py>=4,<5")),
        (
            "mpirun",
            facts.which("mpirun") is not None,
            "FedML's MPI simulator",
            "apt-get install openmpi-bin libopenmpi-dev",
        ),
        ("MNN", facts.has_module("MNN"), "cross-device servers", facts.pip("MNN>=3,<4")),
        ("grpc", facts.has_module("grpc"), "cross-silo runs over gRPC", facts.pip("grpcio>=1.60,<2")),
        ("moto", facts.has_module("moto"), "`fedgmr local`", facts.pip("moto[server]>=5,<6")),
        (
            "mosquitto",
            facts.which("mosquitto") is not None,
            "a local MQTT broker",
            "apt-get install mosquitto",
        ),
    )
    return [
        Finding(name, "ok", "present")
        if present
        else Finding(name, "ok", f"not installed; optional, for {purpose}", repair)
        for name, present, purpose, repair in parts
    ]


def examine(facts: Facts) -> list[Finding]:
    """All findings, the import last but for the optional parts; it is tried only if nothing failed."""
    findings = [
        python_version(facts),
        pkg_resources(facts),
        package(
            facts, "click", "8.2", "typer 0.9, which FedML pins, breaks with 8.2 and later", status="warn"
        ),
        package(facts, "numpy", "2", "FedML needs NumPy 1", status="fail"),
        package(facts, "chardet", "6", "requests 2.31, which FedML pins, warns about it", status="warn"),
        package(facts, "pydantic", "3", "fedgmr is tested with pydantic 2", status="fail", least="2.10"),
        torch_pair(facts),
        fedml(facts),
        home(facts),
    ]
    if all(finding.status != "fail" for finding in findings):
        findings.append(fedml_import(facts))
    return findings + optional(facts)


def render(findings: list[Finding]) -> str:
    """One line a finding, and under it the line that repairs it."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<4}  {finding.check:<{width}}  {finding.detail}")
        if finding.repair:
            lines.append(f"{'':<{width + 8}}{finding.repair}")
    return "\n".join(lines)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object.")
def doctor(as_json: bool) -> None:
    """Check this environment, and print the line that repairs each finding."""
    findings = examine(Facts())
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        click.echo(
            json.dumps({"ok": not failed, "findings": [finding._asdict() for finding in findings]}, indent=2)
        )
    else:
        click.echo(render(findings))
    sys.exit(int(failed))
