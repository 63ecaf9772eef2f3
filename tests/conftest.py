"""What every test runs under: a home of its own, one torch thread, no network."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parent.parent

# FedML writes ~/.fedml while it is imported, and its .env file there overrides the environment. All
# this must stand before anything imports torch or FedML; child processes inherit it.
_HOME = tempfile.mkdtemp(prefix="fedgmr-home-")
os.environ["HOME"] = _HOME
for _name in [name for name in os.environ if name.startswith("FEDML_")]:
    del os.environ[_name]
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(1)

_common: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", derandomize=bool(os.environ.get("CI")), **_common)
settings.register_profile("thorough", max_examples=2000, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

_getaddrinfo = socket.getaddrinfo


def _local_addresses_only(host: Any, *rest: Any, **keywords: Any) -> Any:
    if host not in (None, "", "localhost", "127.0.0.1", "0.0.0.0", "::1", b"localhost", b"127.0.0.1"):
        raise OSError(f"tests may not use the network, and this one looked up {host!r}")
    return _getaddrinfo(host, *rest, **keywords)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse to look up any name but this machine's, so that nothing reaches FedML's cloud."""
    socket.getaddrinfo = _local_addresses_only
    yield
    socket.getaddrinfo = _getaddrinfo


def pytest_unconfigure() -> None:
    """Remove the temporary home."""
    shutil.rmtree(_HOME, ignore_errors=True)


#: Files of minutes. They come first, so that no process is left with one of them at the end.
_LONG = (
    "test_ranks.py",
    "test_methods.py",
    "test_fedml_pickle.py",
    "test_experiments.py",
    "test_device_processes.py",
    "test_silo_processes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, else the order of collection."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def fedgmr_data_dir() -> Path:
    """Folder of the data sets: FEDGMR_DATA_DIR, or shared/data beside the source tree."""
    path = Path(os.environ.get("FEDGMR_DATA_DIR", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("no data sets: set FEDGMR_DATA_DIR to their folder")
    return path
