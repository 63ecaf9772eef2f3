"""What is shipped, and what importing it costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import fedgmr_plugin
from fedgmr_plugin.methods import PLAIN, SUBMODEL

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    """The parsed pyproject.toml."""
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins(repository: Path) -> list[Requirement]:
    """The lines of constraints.txt."""
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, as hatchling builds it."""
    from hatchling.builders.wheel import WheelBuilder

    builder = WheelBuilder(str(repository))
    (path,) = builder.build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return zipfile.ZipFile(path)


def test_the_wheel_has_the_two_packages_and_nothing_else(wheel: zipfile.ZipFile, repository: Path) -> None:
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fedgmr_plugin", "theory", f"fedgmr-{fedgmr_plugin.__version__}.dist-info"}
    assert {"fedgmr_plugin/py.typed", "theory/py.typed"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    sources = {
        path.relative_to(repository).as_posix()
        for package in ("fedgmr_plugin", "theory")
        for path in (repository / package).rglob("*.py")
    }
    assert sources <= set(names)


def test_the_wheel_names_its_commands_licence_and_python(wheel: zipfile.ZipFile) -> None:
    info = f"fedgmr-{fedgmr_plugin.__version__}.dist-info"
    assert wheel.read(f"{info}/entry_points.txt").decode().split() == [
        "[console_scripts]",
        *("fedgmr", "=", "fedgmr_plugin.cli:main"),
        *("fedgmr-theory", "=", "theory.cli:main"),
    ]
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert set(re.search(r"Requires-Python: (.*)", metadata)[1].split(",")) == {">=3.10", "<3.12"}  # type: ignore[index]
    assert "END OF TERMS AND CONDITIONS" in wheel.read(f"{info}/licenses/LICENSE").decode()


def test_every_dependency_is_bounded_and_pinned_within_its_bounds(
    project: dict[str, Any], pins: list[Requirement]
) -> None:
    declared = [Requirement(text) for text in project["project"]["dependencies"]]
    extras = [Requirement(t) for extra in project["project"]["optional-dependencies"].values() for t in extra]
    pinned: dict[str, list[Requirement]] = {}
    for pin in pins:
        pinned.setdefault(pin.name.lower(), []).append(pin)
        assert [s.operator for s in pin.specifier] == ["=="], f"{pin} is not an exact pin"
    for requirement in [*declared, *extras]:
        for pin in pinned[requirement.name.lower()]:
            (exact,) = pin.specifier
            assert exact.version in requirement.specifier, f"{pin} is outside {requirement}"
    for requirement in declared:
        operators = {s.operator for s in requirement.specifier}
        assert operators == {"=="} or operators == {">=", "<"}, f"{requirement} has no tested bounds"


@pytest.mark.parametrize("python", ["3.10", "3.11"])
def test_the_pins_name_each_distribution_once_for_each_python(pins: list[Requirement], python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.13"}
    chosen = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    assert len(chosen) == len(set(chosen)) > 100


def test_torch_is_pinned_first_and_without_a_build(pins: list[Requirement]) -> None:
    assert str(pins[0]) == "torch==2.13.0"  # no "+cpu": the build is whatever pip is offered


def test_versions_agree(repository: Path, project: dict[str, Any]) -> None:
    citation = yaml.safe_load((repository / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == fedgmr_plugin.__version__
    assert f"version = {{{fedgmr_plugin.__version__}}}" in fedgmr_plugin.cite()
    assert citation["license"] == project["project"]["license"] == "Apache-2.0"
    assert project["project"]["requires-python"] == ">=3.10,<3.12"
    assert SpecifierSet(project["project"]["requires-python"]).contains("3.11.7")


def test_citation_is_balanced_bibtex_of_method_software_and_host() -> None:
    text = fedgmr_plugin.cite()
    assert re.findall(r"^@(\w+)\{(\w+),$", text, re.M) == [
        ("inproceedings", "ma2026fedgmr"),
        ("software", "fedgmr"),
        ("misc", "he2020fedml"),
    ]
    assert text.count("{") == text.count("}")
    assert "2512.05372" in text and "2007.13518" in text and max(map(len, text.splitlines())) <= 110


def test_every_method_has_its_paper_and_no_other() -> None:
    """Each entry is whole, and says what the method's source says."""
    for method in (*PLAIN, *SUBMODEL):
        own = fedgmr_plugin.cite(f"{method.name}+gmr", method.name, "nothing").removeprefix(
            fedgmr_plugin.cite()
        )
        keys = re.findall(r"^@inproceedings\{([a-z]+)(\d{4})(\w+),$", own, re.M)
        if method.name.partition("+")[0] == "fedgmr":
            assert keys == []
            continue
        ((author, year, name),) = keys
        assert name == method.name and own.count("{") == own.count("}")
        fields = dict(re.findall(r"^  (\w+) += \{(.+?)\}(?:,?\n(?=  \w+ +=)|\n\})", own, re.M | re.DOTALL))
        assert {"title", "author", "booktitle", "year", "eprint", "archivePrefix"} == set(fields)
        assert fields["year"] == year and f"arXiv {fields['eprint']}" in method.source
        first = method.source.split()[0].lower()
        assert author == first and unaccented(fields["author"]).lower().startswith(f"{first},")
        assert f"{year} (" in method.source
        venue = re.search(r"\{(\w+)\}", fields["booktitle"])
        assert venue is not None and venue[1] in method.source
    text = fedgmr_plugin.cite("fiarse", "fedavg")
    assert re.findall(r"^@\w+\{(\w+),$", text, re.M)[3:] == ["mcmahan2017fedavg", "wu2024fiarse"]


def unaccented(text: str) -> str:
    return re.sub(r"\{\\.(\w)\}", r"\1", text)


COST = """
import sys
import fedgmr_plugin
loaded = {"torch", "fedml", "numpy", "pydantic", "yaml", "click"} & set(sys.modules)
assert not loaded, loaded
assert fedgmr_plugin.cite() and "torch" not in sys.modules
assert fedgmr_plugin.register.__module__ == "fedgmr_plugin.runtimes.registration"
assert not {"torch", "fedml"} & set(sys.modules)
assert fedgmr_plugin.FedGMRConfig().heterogeneity == "high"
assert issubclass(fedgmr_plugin.FedGMRError, Exception) and "register" in dir(fedgmr_plugin)
"""


def test_importing_the_package_imports_neither_torch_nor_fedml(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COST],
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'registre'"):
        fedgmr_plugin.registre  # noqa: B018


def test_tests_have_unique_names_and_are_no_package(repository: Path) -> None:
    names = [path.name for path in (repository / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
    assert not (repository / "tests" / "__init__.py").exists()  # FedML's wheel installs a package `tests`
