"""The exact decomposition of one window's error: what a real server cannot see, and a simulation can.

Legend: P parameters of the global vector, S support of one sub-model, A arrivals, K local steps.

    e_t := -(w_{t+1} - w_t)/gamma - grad F(w_t) = z + D + M + S + H + U - rho/gamma

holds coordinate by coordinate whatever F is (derivation 1 of the theory's documentation). Here F_n is
client n's mean loss on its part of the probe set in evaluation mode, so z, the rest of what the client did,
holds the minibatch noise and whatever else its K steps were (dropout, momentum, samples that are not probed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.probe import Probe
from fedgmr_plugin.kernels.layout import ModelLayout

#: Order of the terms in a record's vectors and matrix.
TERMS = ("z", "D", "M", "S", "H", "U", "rho")


def decomposable(config: FedGMRConfig) -> bool:
    """Whether a merge is the one that the decomposition is about: mask-aware, of this window's arrivals."""
    return (
        config.aggregation == "mask_aware"
        and config.update_scope == "arrivals"
        and not config.mixing
        and config.server_step == 1.0
    )


@dataclass(frozen=True)
class Witness:
    """What is remembered of one dispatch until its window's record is written.

    Attributes:
        sent: the dispatch.
        start_D: w_s, the whole vector.
        path: x_0 .. x_{K-1} on the support, each [S].
    """

    sent: Dispatch
    start_D: Tensor
    path: list[Tensor] = field(default_factory=list)

    def watch(self, model: nn.Module, layout: ModelLayout) -> Callable[[], None]:
        """To be called before every local step, while `model` holds x_k."""
        return lambda: self.path.append(layout.gather(model)[self.sent.index_S])


def terms_record(
    window: int,
    probe: Probe,
    layout: ModelLayout,
    w_D: Tensor,
    next_D: Tensor,
    arrived: Sequence[tuple[Witness, LocalUpdate]],
    weights: Mapping[int, float],
    *,
    learning_rate: float,
    scale: float,
    form: str,
) -> dict[str, Any] | None:
    """The `terms` record of one window.

    Args:
        w_D, next_D: w_t and w_{t+1}.
        arrived: the merged uploads, at least one.
        weights: c_n by dispatch.
        learning_rate, scale: eta of this window is their product.

    Returns:
        The record; None where gamma = eta K of this window is not that of every arrival (different numbers
        of steps, or a warm-up), or where a path was not seen (trained elsewhere).
    """
    steps = {u.stats.steps for _, u in arrived}
    if len(steps) > 1 or any(
        len(w.path) != u.stats.steps or w.sent.learning_rate_scale != scale for w, u in arrived
    ):
        return None
    gamma = learning_rate * scale * steps.pop()
    head = slice(0, layout.parameters)
    here = probe.client_gradients(w_D)
    grad_P = torch.stack(here).mean(0)
    scale_sq = max(_sq(g) for g in here)
    held_P = torch.zeros(layout.parameters, dtype=torch.float64, device=w_D.device)
    for witness, _ in arrived:
        held_P += weights[witness.sent.dispatch] * _mask(witness, layout).to(torch.float64)
    covered_P = held_P > 0
    sums = {name: torch.zeros_like(held_P) for name in TERMS}
    sums["H"] = torch.where(covered_P, -grad_P, 0.0)
    sums["U"] = torch.where(covered_P, 0.0, -grad_P)
    parts = []
    for witness, update in arrived:
        sent, mask_P = witness.sent, _mask(witness, layout)
        pi_P = torch.where(mask_P, weights[sent.dispatch] / held_P, 0.0)
        change_P = _placed(update.values_S, sent, layout)[head].to(torch.float64)
        if form == "replacement":
            change_P -= _placed(sent.values_S, sent, layout)[head].to(torch.float64)
        along = [_placed(x_S, sent, layout) for x_S in witness.path]
        exact = [probe.client_gradient(sent.client, x_D) for x_D in along]
        at_start = probe.client_gradient(sent.client, witness.start_D)
        mean = torch.stack(exact).mean(0)
        own = {
            "z": -change_P / gamma - mean * mask_P,
            "D": (mean - exact[0]) * mask_P,
            "M": (exact[0] - at_start) * mask_P,
            "S": (at_start - here[sent.client]) * mask_P,
            "H": here[sent.client],
        }
        stale_P = (witness.start_D - w_D)[head].to(torch.float64)
        if form == "replacement":
            own["rho"] = stale_P
        for name, vector in own.items():
            sums[name] += pi_P * vector
        scale_sq = max(scale_sq, _sq(at_start), *map(_sq, exact))
        parts.append(
            {
                "dispatch": sent.dispatch,
                "client": sent.client,
                "pibar": float(pi_P.max()),
                "mask_sq": _sq(witness.start_D[head][~mask_P]),
                "stale_sq": _sq(stale_P),
                "drift_sq": sum(_sq((x_D - along[0])[head]) for x_D in along) / len(along),
                "gap_sq": _sq(here[sent.client] - grad_P),
                **{f"{name}_sq": _sq(own[name]) for name in ("D", "M", "S")},
            }
        )
    error = -(next_D - w_D)[head].to(torch.float64) / gamma - grad_P
    bias = sums["D"] + sums["M"] + sums["S"] + sums["H"] + sums["U"] - sums["rho"] / gamma
    stack = torch.stack([sums[name] for name in TERMS])
    return {
        "type": "terms",
        "window": window,
        "form": form,
        "gamma": gamma,
        **{f"{name}_sq": _sq(sums[name]) for name in TERMS},
        "e_sq": _sq(error),
        "b_sq": _sq(bias),
        "residual_sq": _sq(error - sums["z"] - bias),
        "scale_sq": scale_sq,
        "grad_dot": (stack @ grad_P).tolist(),
        "gram": (stack @ stack.T).tolist(),
        "arrivals": parts,
    }


def _mask(witness: Witness, layout: ModelLayout) -> Tensor:
    """m_n on parameters, bool [P]."""
    return witness.sent.ranking.mask(witness.sent.rung)[: layout.parameters]


def _placed(values_S: Tensor, sent: Dispatch, layout: ModelLayout) -> Tensor:
    """A sub-model's values in a vector [D] that is 0 elsewhere."""
    x_D = torch.zeros(layout.size, dtype=values_S.dtype, device=values_S.device)
    x_D[sent.index_S] = values_S
    return x_D


def _sq(v: Tensor) -> float:
    return float(v.to(torch.float64).square().sum())
