"""The methods that a run can follow, each as the options of FedGMR's engine that make it.

A method is no program of its own: it names a family of masks, a schedule, a rule of aggregation and a local
objective, all of which are options of `fedgmr_plugin.config.FedGMRConfig`. ``method: heterofl`` in
``fedgmr_args`` sets the defaults of those options; what the user writes beside it wins.

Sub-model methods come in three forms, so that FedGMR's own parts can be judged on any family of masks:

name        what it is
----------  -------------------------------------------------------------------------------------------
`NAME`      as its authors describe it: synchronous, every sub-model sent by itself, densities frozen
`NAME+aux`  asynchronous, the last upload of every client is averaged, increments are sent once
`NAME+gmr`  the same, and densities are restored (GMR)

See docs/methods.md for what each one is and where its rule comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fedgmr_plugin.methods import (
    fedasync,
    fedavg,
    fedbuff,
    fedgmr,
    fedprox,
    fedrolex,
    fiarse,
    fjord,
    heterofl,
)
from fedgmr_plugin.methods.parts import AUXILIARY, RESTORED, Method

#: Methods of the whole model, and FedGMR itself.
PLAIN: tuple[Method, ...] = (
    fedgmr.METHOD,
    fedgmr.BUFFERED,
    fedavg.METHOD,
    fedprox.METHOD,
    fedasync.METHOD,
    fedbuff.METHOD,
)
#: Methods of sub-models, which come in three forms.
SUBMODEL: tuple[Method, ...] = (heterofl.METHOD, fjord.METHOD, fedrolex.METHOD, fiarse.METHOD)


def _forms(method: Method) -> tuple[Method, ...]:
    aux = Method(
        f"{method.name}+aux",
        f"{method.title}, asynchronous",
        f"{method.rule} Asynchronous; every client's last upload is averaged; increments are sent once.",
        method.source,
        {**method.options, **AUXILIARY},
    )
    gmr = Method(
        f"{method.name}+gmr",
        f"{method.title} with GMR",
        f"{aux.rule} Densities are restored.",
        method.source,
        {**aux.options, **RESTORED},
    )
    return method, aux, gmr


#: Every method by the name that ``method`` in ``fedgmr_args`` takes.
METHODS: Mapping[str, Method] = MappingProxyType(
    {m.name: m for m in (*PLAIN, *(form for method in SUBMODEL for form in _forms(method)))}
)


def options_of(name: str) -> dict[str, Any]:
    """The options that a method sets; the others keep the defaults of `FedGMRConfig`.

    Raises:
        KeyError: there is no method of that name.
    """
    return dict(METHODS[name].options)


__all__ = ["METHODS", "PLAIN", "SUBMODEL", "Method", "options_of"]
