"""The part of the run-log schema that `theory` reads, as data (``docs/run-log.md``).

Only the keys marked required must be present; every other key may be missing or null, and the
checks that need it are then UNDETERMINED. ``terms`` records (exact terms of the decomposition in one
window) are written by probing runs; ``constants`` (known L, sigma^2, ...) extend schema 1.0 and are
described in ``docs/theory.md``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["number", "text", "vector", "matrix", "objects"]


class Key(NamedTuple):
    """One key of a record: its JSON kind and whether a record without it is refused."""

    kind: Kind = "number"
    required: bool = False


_REQUIRED = Key(required=True)
_NUMBER = Key()
_TEXT = Key("text")
_VECTOR = Key("vector")


def _numbers(names: str) -> dict[str, Key]:
    return dict.fromkeys(names.split(), _NUMBER)


def _required(names: str) -> dict[str, Key]:
    return dict.fromkeys(names.split(), _REQUIRED)


#: The seven terms, in the order of the Gram matrix of a ``terms`` record.
TERMS: tuple[str, ...] = ("z", "D", "M", "S", "H", "U", "rho")

#: Constants of the theory that a run cannot prove; known ones come from the log or the command line.
CONSTANTS = ("L", "sigma_sq", "sigma_g_sq", "F_inf", "G_sq", "W_sq")

#: Roundings of a forward and backward pass that the tolerance model allows for (`theory.precision`).
SLACK = 64.0

#: record type -> key -> kind. Keys outside this table are ignored, as the schema demands.
RECORDS: dict[str, dict[str, Key]] = {
    "dispatch": _required("dispatch client version density")
    | {"ranking": _TEXT}
    | _numbers(
        "support time bytes_down ranking_version norm_sq masked_norm_sq full_norm_sq full_masked_norm_sq"
    ),
    "arrival": _required("window dispatch client version staleness")
    | _numbers("density time bytes_up samples weight pibar drift_sq change_sq steps train_loss"),
    "rejected": _numbers("window dispatch client") | {"code": _TEXT},
    "window": _required("window arrivals")
    | _numbers(
        "start close end gamma_min uncovered coverage step_sq in_flight mean_density density_floor "
        "bytes_up bytes_down server_bytes_down learning_rate"
    ),
    "restoration": _required("window") | _numbers("time client before after floor") | {"cause": _TEXT},
    "evaluation": _required("window") | _numbers("time accuracy loss bytes_up bytes_down"),
    "probe": _required("window")
    | _numbers(
        "loss loss_next grad_sq grad_next_sq grad_dot_step grad_change_sq step_sq grad_uncovered_sq noise_sq"
    )
    | {"client_grad_sq": _VECTOR, "client_gap_sq": _VECTOR},
    "terms": _required("window gamma")
    | {"form": _TEXT}
    | _numbers(" ".join(f"{term}_sq" for term in TERMS))
    | _numbers("e_sq b_sq residual_sq scale_sq")
    | {"grad_dot": _VECTOR, "gram": Key("matrix"), "arrivals": Key("objects")},
    "constants": _numbers(" ".join(CONSTANTS)),
    "end": _numbers("windows time rejected"),
}

#: Keys of each object in ``arrivals`` of a ``terms`` record.
TERM_ARRIVAL: dict[str, Key] = _required("dispatch client") | _numbers(
    "pibar mask_sq stale_sq drift_sq gap_sq D_sq M_sq S_sq"
)
