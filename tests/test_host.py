"""Workarounds exist exactly where the machine has the defect, and go away again."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fedgmr_plugin.errors import HostError
from fedgmr_plugin.runtimes import host


@pytest.fixture
def clean_host() -> Any:
    host.restore()
    yield
    host.restore()


def test_versions_but_the_supported_one_are_refused() -> None:
    host.require_supported("0.9.6")
    for version in ("0.9.5", "0.9.6rc1", "0.9.61", "0.10.0", "1.0"):
        with pytest.raises(HostError, match=f"GMR-501 fedml={version} is not 0.9.6") as caught:
            host.require_supported(version)
        assert "fedml==0.9.6" in caught.value.hint


def test_prepare_refuses_before_it_imports(monkeypatch: pytest.MonkeyPatch, clean_host: None) -> None:
    for version, code in (("0.8.9", "GMR-501"), (None, "GMR-505")):
        monkeypatch.setattr(host, "installed_fedml", lambda version=version: version)
        with pytest.raises(HostError) as caught:
            host.prepare()
        assert caught.value.code == code
        assert host.workarounds() == ()


def test_a_copy_that_is_not_the_installed_one_is_refused_too(
    monkeypatch: pytest.MonkeyPatch, clean_host: None
) -> None:
    fake = SimpleNamespace(__version__="0.7.0")
    monkeypatch.setattr(host.importlib, "import_module", lambda name: fake)
    monkeypatch.setattr(host, "torchvision_usable", lambda: True)
    with pytest.raises(HostError, match="GMR-501 fedml=0.7.0"):
        host.prepare()


def test_missing_pkg_resources_is_named_with_its_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    host.require_pkg_resources()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pkg_resources" else find_spec(name)
    )
    with pytest.raises(HostError, match="GMR-505.*pkg_resources") as caught:
        host.require_pkg_resources()
    assert '"setuptools<81"' in caught.value.hint


@pytest.mark.parametrize("kind", [ImportError, AttributeError, RuntimeError, TypeError])
def test_a_failing_import_is_a_host_error(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, clean_host: None
) -> None:
    def fail(name: str) -> None:
        raise kind(f"{name} is broken")

    monkeypatch.setattr(host, "torchvision_usable", lambda: True)
    monkeypatch.setattr(host.importlib, "import_module", fail)
    with pytest.raises(HostError, match=f"GMR-505 import fedml failed: {kind.__name__}: fedml is broken"):
        host.prepare()


def test_absence_of_fedml_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    assert host.installed_fedml() == importlib.metadata.version("fedml")
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert host.installed_fedml() is None


def test_only_the_extension_module_counts_as_compiled_library(tmp_path: Any) -> None:
    (tmp_path / "image.so").touch()
    (tmp_path / "_C.txt").touch()
    assert host.compiled_library(tmp_path) is None
    (tmp_path / "_C.so").touch()
    assert host.compiled_library(tmp_path) == tmp_path / "_C.so"


OPERATORS = """
import sys, torch
from fedgmr_plugin.runtimes import host
present = lambda: hasattr(torch.ops.torchvision, "nms")
assert not present()
usable = host.torchvision_usable()                 # loads the library where it can be loaded
assert present() == usable
host.prepare()
assert ("torchvision-schemas" in host.workarounds()) == (not usable), host.workarounds()
assert present() and "torchvision" in sys.modules and "fedml" in sys.modules
before = host.workarounds()
assert host.prepare() == before and len(host._schemas) == (not usable)
from fedml.core import mlops
assert mlops.fetch_config.__wrapped__.__module__ == "fedml.core.mlops"
host.restore()
assert host.workarounds() == () and present() == usable
assert not hasattr(mlops.fetch_config, "__wrapped__")
host.restore()
assert host.prepare() == before and present()
print("usable" if usable else "defective")
"""


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_operator_schemas_are_declared_exactly_where_the_library_does_not_load(repository: Any) -> None:
    assert run_python(f"import sys; sys.path.insert(0, {str(repository)!r})\n{OPERATORS}") in (
        "usable",
        "defective",
    )


def test_a_library_that_loads_is_left_alone(monkeypatch: pytest.MonkeyPatch, clean_host: None) -> None:
    import torch

    loaded: list[Any] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(host, "compiled_library", lambda package: package / "_C.so")
    assert host.torchvision_usable()
    assert len(loaded) <= 1  # none where another test has imported torchvision already


def test_missing_torch_and_torchvision_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "torchvision" else find_spec(name)
        )
        with pytest.raises(HostError, match="GMR-505 torchvision"):
            host.torchvision_usable()
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` fail
    with pytest.raises(HostError, match="GMR-505 import torch failed"):
        host.torchvision_usable()


def run(**attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(**attributes)


@pytest.mark.parametrize(
    "args",
    [
        run(training_type="simulation", backend="sp"),
        run(training_type="simulation", backend="MPI", using_mlops=False, enable_tracking=False),
        run(training_type="cross_silo", backend="GRPC"),
        run(
            training_type="cross_silo",
            backend="MQTT_S3",
            customized_training_mqtt_config={"BROKER_HOST": "::1"},
        ),
    ],
)
def test_runs_that_need_no_cloud_do_not_contact_it(args: SimpleNamespace) -> None:
    calls: list[Any] = []
    fetch = host.skip_unless_wanted(lambda *a, **k: calls.append((a, k)))
    assert fetch(args, "release") is False
    assert fetch(args, version="release") is False
    assert calls == []


@pytest.mark.parametrize(
    "args",
    [
        run(training_type="simulation", backend="sp", using_mlops=True),
        run(training_type="simulation", backend="sp", enable_tracking=True),
        run(training_type="cross_silo", backend="MQTT_S3"),
        run(training_type="cross_silo", backend="MQTT_S3", customized_training_mqtt_config=""),
        run(training_type="cross_device", backend="MQTT_S3_MNN"),
        run(),
    ],
)
def test_runs_that_need_the_cloud_call_fedml_unchanged(args: SimpleNamespace) -> None:
    fetch = host.skip_unless_wanted(lambda *a, **k: (a, k))
    assert fetch(args, "release") == ((args, "release"), {})
    assert fetch(args, version="dev") == ((args,), {"version": "dev"})


def test_a_chosen_platform_is_contacted(monkeypatch: pytest.MonkeyPatch) -> None:
    args = run(training_type="simulation", backend="sp")
    for version, wanted in (("local", True), ("dev", True), ("release", False), ("", False)):
        monkeypatch.setenv("FEDML_ENV_VERSION", version)
        assert host.cloud_wanted(args) is wanted
