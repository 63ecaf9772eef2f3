"""The part of the run-log schema that `theory` reads, as data (``docs/run-log.md``).

Only the keys marked required must be present; every other key may be missing or null, and the
checks that need it are then UNDETERMINED. ``terms`` records (exact terms of the decomposition in one
window) are written by probing runs; ``constants`` (known L, sigma^2, ...) extend schema 1.0 and are
described in ``docs/theory.md``.
"""

from __future__ import annotations

from difflib import get_close_matches
from math import isfinite
from typing import Literal, NamedTuple

Kind = Literal["number", "text", "vector", "matrix", "objects", "metrics"]
_INF = float("inf")

#: ``method`` of the plugin's own logs.
PLUGIN = "fedgmr"

#: Types of a model, and their unit roundoff u.
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
#: Those that the plugin trains.
PLUGIN_TYPES = ("float32", "float64")


class Key(NamedTuple):
    """One key of a record.

    Attributes:
        kind: its JSON kind; ``metrics`` is an object with the numbers ``accuracy`` and ``loss``, which become
            the columns ``key.accuracy`` and ``key.loss``.
        required: a record without it is refused.
        low, high: where its numbers can lie.
    """

    kind: Kind = "number"
    required: bool = False
    low: float = -_INF
    high: float = _INF


_TEXT = Key("text")


def _keys(names: str, key: Key) -> dict[str, Key]:
    return dict.fromkeys(names.split(), key)


def _required(names: str) -> dict[str, Key]:
    return _keys(names, Key(required=True, low=0))


def _numbers(names: str) -> dict[str, Key]:
    """Numbers of either sign."""
    return _keys(names, Key())


def _sizes(names: str) -> dict[str, Key]:
    """Counts, bytes, seconds, squared norms: never negative."""
    return _keys(names, Key(low=0))


def _shares(names: str) -> dict[str, Key]:
    """Accuracies, coverages and densities."""
    return _keys(names, Key(low=0, high=1))


#: Key of a column of a ``metrics`` object.
METRICS = {"accuracy": Key(low=0, high=1), "loss": Key()}

#: The seven terms, in the order of the Gram matrix of a ``terms`` record.
TERMS: tuple[str, ...] = ("z", "D", "M", "S", "H", "U", "rho")

#: Constants of the theory that a run cannot prove, and the least that each can be; known ones come from the
#: log or the command line.
CONSTANTS = {"L": 0.0, "sigma_sq": 0.0, "sigma_g_sq": 0.0, "F_inf": -_INF, "G_sq": 0.0, "W_sq": 0.0}


def constant_complaint(name: str, value: float) -> str:
    """Why `value` cannot be the constant `name`, in words; '' if it can."""
    if name not in CONSTANTS:
        near = [c for c in CONSTANTS if c.lower() == name.lower()] or get_close_matches(name, CONSTANTS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{name!r} is no constant: {hint}there are {', '.join(CONSTANTS)}"
    if not isfinite(value) or value < CONSTANTS[name]:
        return f"{name}={value} is not a finite number" + (" of at least 0" if CONSTANTS[name] == 0 else "")
    return ""


#: Roundings of a forward and backward pass that the tolerance model allows for (`theory.precision`).
SLACK = 64.0

#: record type -> key -> kind. Keys outside this table are ignored, as the schema demands.
RECORDS: dict[str, dict[str, Key]] = {
    "dispatch": _required("dispatch client version density")
    | {"ranking": _TEXT}
    | _sizes(
        "support time bytes_down ranking_version norm_sq masked_norm_sq full_norm_sq full_masked_norm_sq"
    ),
    "arrival": _required("window dispatch client version staleness")
    | _shares("density")
    | _sizes("time bytes_up samples weight pibar drift_sq change_sq steps")
    | _numbers("train_loss"),
    "rejected": _sizes("window") | _numbers("dispatch client") | {"code": _TEXT},
    "window": _required("window arrivals")
    | _sizes(
        "start close end gamma_min uncovered step_sq in_flight bytes_up bytes_down server_bytes_down "
        "learning_rate"
    )
    | _shares("coverage mean_density density_floor"),
    "validation": _required("window")
    | _sizes("time")
    | {"global": Key("metrics"), "scaled": Key("metrics"), "candidate": _TEXT},
    "restoration": _required("window")
    | _sizes("time client")
    | _shares("before after floor")
    | {"cause": _TEXT},
    "evaluation": _required("window")
    | _sizes("time samples bytes_up bytes_down")
    | _shares("accuracy")
    | _numbers("loss")
    | {"global": Key("metrics"), "scaled": Key("metrics"), "candidate": _TEXT},
    "probe": _required("window")
    | _numbers("loss loss_next grad_dot_step")
    | _sizes("grad_sq grad_next_sq grad_change_sq step_sq grad_uncovered_sq noise_sq")
    | _keys("client_grad_sq client_gap_sq", Key("vector", low=0)),
    "terms": _required("window gamma")
    | {"form": _TEXT}
    | _sizes(" ".join(f"{term}_sq" for term in TERMS))
    | _sizes("e_sq b_sq residual_sq scale_sq")
    | {"grad_dot": Key("vector"), "gram": Key("matrix"), "arrivals": Key("objects")},
    "constants": {name: Key(low=low) for name, low in CONSTANTS.items()},
    "end": _sizes("windows time rejected") | {"reason": _TEXT, "shipped": _TEXT},
}

#: Every key that the plugin writes in a record of each type, those first that it never writes as null.
WRITTEN: dict[str, tuple[str, str]] = {
    "dispatch": (
        "dispatch client version density ranking support time bytes_down",
        "norm_sq masked_norm_sq full_norm_sq full_masked_norm_sq",
    ),
    "arrival": (
        "window dispatch client version staleness density time bytes_up samples weight steps",
        "pibar drift_sq change_sq train_loss",
    ),
    "rejected": ("window dispatch client code message", ""),
    "window": (
        "window start close end arrivals gamma_min uncovered coverage step_sq in_flight mean_density "
        "density_floor bytes_up bytes_down server_bytes_down learning_rate",
        "",
    ),
    "validation": ("window time clients candidate", "global scaled"),
    "restoration": ("window time cause before after floor", "client"),
    "evaluation": (
        "window time candidate global scaled samples bytes_up bytes_down metrics",
        "accuracy loss",
    ),
    "probe": (
        "window step_sq client_grad_sq client_gap_sq",
        "loss loss_next grad_sq grad_next_sq grad_dot_step grad_change_sq grad_uncovered_sq noise_sq",
    ),
    "terms": (
        "window form gamma grad_dot gram arrivals",
        "z_sq D_sq M_sq S_sq H_sq U_sq rho_sq e_sq b_sq residual_sq scale_sq",
    ),
    "end": ("windows time reason model_sha256 shipped wall_seconds rejected", ""),
}
#: Squared norms of models and updates: float32 cannot make them overflow, so there they are never null.
FINITE_IN_FLOAT32 = ("norm_sq", "masked_norm_sq", "full_norm_sq", "full_masked_norm_sq", "change_sq")


def never_null(kind: str, dtype: str) -> frozenset[str]:
    """Keys of the plugin's records of one type that are never null in a run with a model of type `dtype`."""
    surely, otherwise = (keys.split() for keys in WRITTEN[kind])
    finite = FINITE_IN_FLOAT32 if dtype == "float32" else ()
    return frozenset((*surely, *(key for key in otherwise if key in finite)))


#: Keys of each object in ``arrivals`` of a ``terms`` record.
TERM_ARRIVAL: dict[str, Key] = _required("dispatch client") | _sizes(
    "pibar mask_sq stale_sq drift_sq gap_sq D_sq M_sq S_sq"
)
