"""What stands between a machine and a working `import fedml`, repaired only where it is broken.

    defect                                        what `prepare` does
    --------------------------------------------  ------------------------------------------------
    FedML is missing, or is not 0.9.6             HostError GMR-505, GMR-501
    setuptools does not have pkg_resources        HostError GMR-505 with the line that repairs it
    torchvision's compiled operators do not load  defines the two operator schemas it looks up
    `import fedml` warns about pkg_resources      drops that one warning: users can do nothing about it
    `fedml.init` calls FedML's cloud              skips the call if nobody configured the cloud
    `fedml.init` logs every uncaught exception    shows errors of ours by their message alone

FedML's logging, its other warnings and its files in ~/.fedml are left alone. The state is that of the
process, as FedML's own is; `restore` undoes every change.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedgmr_plugin.errors import HostError
from fedgmr_plugin.runtimes import uncaught

#: The one release of FedML whose internals fedgmr knows.
SUPPORTED_FEDML = "0.9.6"

#: Operators that `import torchvision` looks up even where its compiled library cannot load.
TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

#: Backends of FedML that need no broker, so nothing from its cloud.
BROKERLESS = frozenset({"sp", "MPI", "NCCL", "GRPC", "TRPC"})

_schemas: list[Any] = []  # torch.library.Library objects: the schemas live as long as they do
_fetch_config: list[Callable[..., Any]] = []  # FedML's own function, while ours stands in for it
_handle_exception: list[Callable[..., Any]] = []  # the same of its hook for uncaught exceptions


def prepare() -> tuple[str, ...]:
    """Make `import fedml` work on this machine, and offline; a second call changes nothing.

    Returns:
        Names of the workarounds in force: "torchvision-schemas", "offline".

    Raises:
        HostError: GMR-501 for another FedML than 0.9.6, GMR-505 where FedML cannot be imported.
    """
    require_supported(installed_fedml())
    require_pkg_resources()
    if not torchvision_usable():
        define_torchvision_schemas()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
            fedml: Any = importlib.import_module("fedml")
            mlops: Any = importlib.import_module("fedml.core.mlops")
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        # AttributeError: NumPy 2; RuntimeError: torch; TypeError: protobuf's generated code.
        raise HostError("GMR-505", f"import fedml failed: {type(error).__name__}: {error}") from error
    require_supported(fedml.__version__)
    if not _fetch_config:
        _fetch_config.append(mlops.fetch_config)
        mlops.fetch_config = skip_unless_wanted(mlops.fetch_config)
        log = _runtime_log()
        _handle_exception.append(log.handle_exception)
        log.handle_exception = staticmethod(uncaught.wrap(log.handle_exception))
    return workarounds()


def restore() -> None:
    """Undo what `prepare` changed; modules stay imported."""
    if _fetch_config:
        mlops: Any = importlib.import_module("fedml.core.mlops")
        mlops.fetch_config = _fetch_config.pop()
        _runtime_log().handle_exception = staticmethod(_handle_exception.pop())
    _schemas.clear()


def _runtime_log() -> Any:
    """FedML's class whose `handle_exception` becomes `sys.excepthook` in `fedml.init`."""
    return importlib.import_module("fedml.core.mlops.mlops_runtime_log").MLOpsRuntimeLog


def workarounds() -> tuple[str, ...]:
    """Names of the workarounds in force in this process."""
    return ("torchvision-schemas",) * bool(_schemas) + ("offline",) * bool(_fetch_config)


def installed_fedml() -> str | None:
    """Version of the installed FedML distribution; None where there is none."""
    try:
        return importlib.metadata.version("fedml")
    except importlib.metadata.PackageNotFoundError:
        return None


def require_supported(version: str | None) -> None:
    """Refuse every FedML but the one that fedgmr was tested with.

    Raises:
        HostError: GMR-505 without FedML, GMR-501 for another version.
    """
    repair = f'Run: python -m pip install "fedml=={SUPPORTED_FEDML}"'
    if version is None:
        raise HostError("GMR-505", "FedML is not installed", hint=repair)
    if version != SUPPORTED_FEDML:
        raise HostError("GMR-501", f"fedml={version} is not {SUPPORTED_FEDML}", hint=repair)


def require_pkg_resources() -> None:
    """FedML 0.9.6 imports pkg_resources, which setuptools promises only up to release 80.

    Raises:
        HostError: GMR-505 where it is missing.
    """
    if importlib.util.find_spec("pkg_resources") is None:
        raise HostError(
            "GMR-505",
            "FedML imports pkg_resources, which this environment's setuptools does not have",
            hint='Run: python -m pip install "setuptools<81"',
        )


def torchvision_usable() -> bool:
    """Whether `import torchvision` finds the operators it looks up.

    The builds on PyPI are linked with CUDA, so their library cannot load beside a CPU build of torch.

    Raises:
        HostError: GMR-505 where torch or torchvision is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise HostError("GMR-505", f"import torch failed: {error}") from error
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise HostError("GMR-505", "torchvision, which FedML imports, is not installed")
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    library = compiled_library(Path(spec.submodule_search_locations[0]))
    if library is None:
        return False
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def compiled_library(package: Path) -> Path | None:
    """Path of the extension module `_C` in a package's folder, None where there is none."""
    candidates = (package / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def define_torchvision_schemas() -> None:
    """Declare torchvision's operators without implementing them, so that it can be imported.

    Transforms, datasets and classification models work then; box operators (nms) do not, as before.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in TORCHVISION_SCHEMAS:
        library.define(schema)
    _schemas.append(library)


def skip_unless_wanted(fetch_config: Callable[..., Any]) -> Callable[..., Any]:
    """FedML's `fetch_config`, but returning False, as it does offline, for runs that need no cloud."""

    @functools.wraps(fetch_config)
    def fetch(args: Any, *rest: Any, **keywords: Any) -> Any:
        return fetch_config(args, *rest, **keywords) if cloud_wanted(args) else False

    return fetch


def cloud_wanted(args: Any) -> bool:
    """Whether a run uses FedML's cloud: tracking is on, a platform was chosen, or it is the broker.

    Args:
        args: FedML's arguments. `using_mlops` and `enable_tracking` are read as FedML reads them.
    """
    if getattr(args, "using_mlops", False) or getattr(args, "enable_tracking", False) is True:
        return True
    if os.environ.get("FEDML_ENV_VERSION", "release") not in ("", "release"):
        return True
    if getattr(args, "training_type", None) == "simulation" or getattr(args, "backend", None) in BROKERLESS:
        return False
    return not getattr(args, "customized_training_mqtt_config", "")
