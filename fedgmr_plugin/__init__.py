"""FedGMR, federated learning with gradual model restoration, as an extension of FedML.

    import fedgmr_plugin
    fedgmr_plugin.register()          # then `federated_optimizer: fedgmr` runs in FedML

Importing this package imports neither torch nor FedML: every public name is loaded when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgmr_plugin.citation import cite
    from fedgmr_plugin.config import FedGMRConfig
    from fedgmr_plugin.errors import FedGMRError
    from fedgmr_plugin.runtimes.registration import register, unregister

__version__ = "0.1.0"

__all__ = ["FedGMRConfig", "FedGMRError", "__version__", "cite", "register", "unregister"]

#: public name -> module that defines it
_HOME = {
    "FedGMRConfig": "fedgmr_plugin.config",
    "FedGMRError": "fedgmr_plugin.errors",
    "cite": "fedgmr_plugin.citation",
    "register": "fedgmr_plugin.runtimes.registration",
    "unregister": "fedgmr_plugin.runtimes.registration",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use (PEP 562)."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
