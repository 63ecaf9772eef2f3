"""Top-k accuracy on the test set, which the built-in evaluation does not report.

    FedMLRunner(args, device, dataset, model, server_aggregator=top_k_aggregator(model, args, 5)).run()

Training stays with the built-in trainer, and each `evaluation` record of the run log has ``top5`` in
``metrics``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def measure(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], k: int, device: torch.device | None = None
) -> dict[str, float]:
    """Means over every target that is not negative: a text's filling has no part in them.

    Args:
        model: x to scores [b, classes, ...]; in evaluation mode afterwards.
        batches: pairs of x and y, int64 [b, ...].
        k: at most the number of classes.

    Returns:
        ``test_acc``, ``test_loss`` (cross-entropy), and ``top{k}``: the share of targets among the k highest
        scores.
    """
    device = device or torch.device("cpu")
    model.to(device).eval()
    first = highest = count = 0
    loss = 0.0
    for x, y in batches:
        known = y.to(device) >= 0
        scores = model(x.to(device)).movedim(1, -1)[known]
        target = y.to(device)[known].long()
        loss += float(F.cross_entropy(scores, target, reduction="sum"))
        hits = scores.topk(k, dim=1).indices == target[:, None]
        first += int(hits[:, 0].sum())
        highest += int(hits.sum())
        count += len(target)
    return {"test_acc": first / count, "test_loss": loss / count, f"top{k}": highest / count}


def top_k_aggregator(model: nn.Module, args: Any, k: int = 5) -> Any:
    """A FedML ServerAggregator that only measures: FedGMR aggregates, and asks it about the test set.

    Args:
        args: FedML's arguments.
    """
    from fedml.core import ServerAggregator

    class TopK(ServerAggregator):  # type: ignore[misc]
        """Accuracy, cross-entropy and top-k accuracy."""

        def get_model_params(self) -> dict[str, Tensor]:
            state: dict[str, Tensor] = self.model.state_dict()
            return state

        def set_model_params(self, model_parameters: dict[str, Tensor]) -> None:
            self.model.load_state_dict(model_parameters)

        def test(self, test_data: Any, device: Any, args: Any) -> dict[str, float]:
            return measure(self.model, test_data, k, device)

    return TopK(model, args)
