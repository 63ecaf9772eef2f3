"""FedML's hooks around a merge of ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.seeds import derive
from fedgmr_plugin.kernels.aggregate import MaskedUpdate
from fedgmr_plugin.kernels.layout import ModelLayout
from fedgmr_plugin.runtimes.aggregator import AggregatorBridge


@dataclass(frozen=True)
class MergeHooks:
    """FedML's hooks around a merge: sub-models are made dense for them, and cut to their supports again."""

    bridge: AggregatorBridge
    layout: ModelLayout
    model: nn.Module
    config: FedGMRConfig
    seed: int

    def before(self, window: int, w_D: Tensor, updates: list[MaskedUpdate]) -> list[MaskedUpdate]:
        """Dense weights of an update: the server's, with the update's own on its support.

        Raises:
            UpdateRejected: GMR-408; they are too few for FedML's defence.
        """
        self.bridge.require(len(updates))
        is_delta = self.config.update_form == "delta"

        def base_S(index_S: Tensor) -> Tensor:
            return (
                w_D[index_S] * (index_S < self.layout.parameters)
                if is_delta
                else torch.zeros_like(w_D[index_S])
            )

        dense = []
        for update in updates:
            own_D = w_D.clone()
            own_D[update.index_S] = update.values_S + base_S(update.index_S)
            dense.append((update.weight, self.layout.state_dict(self.model, own_D)))
        seed = derive(self.seed, "before_merge", window)
        kept, positions = self.bridge.before(dense, self.layout.state_dict(self.model, w_D), seed=seed)
        result = []
        for (weight, state), n in zip(kept, positions, strict=True):
            index_S = updates[n].index_S
            own_D = self.layout.from_state_dict(state, w_D)
            values_S = own_D[index_S] - base_S(index_S)
            result.append(updates[n]._replace(values_S=values_S, weight=weight))
        return result

    def after(self, window: int, w_D: Tensor) -> Tensor:
        """The merged weights after ``on_after_aggregation``."""
        seed = derive(self.seed, "after_merge", window)
        state = self.bridge.after(self.layout.state_dict(self.model, w_D), seed=seed)
        return self.layout.from_state_dict(state, w_D)
