"""Masks of five densities over all layers of VGG11, against one sort of the scores.

python -m benchmarks.masks
"""

from __future__ import annotations

import torch

from benchmarks import models
from benchmarks.measure import Row, seconds
from fedgmr_plugin.kernels.layout import build_layout
from fedgmr_plugin.kernels.masks import rank, scores

DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)


def measure() -> list[Row]:
    """The rows of this benchmark."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = models.vgg11()
    layout = build_layout(model)
    w_D = layout.gather(model)
    score_P = scores("magnitude", layout, w_D)
    sorting = seconds(lambda: torch.sort(score_P))
    rows = []
    for name, work, goal in (
        ("masks of five densities", lambda: rank(layout, w_D, score_P, DENSITIES), "<= 0.15"),
        ("with a layer floor", lambda: rank(layout, w_D, score_P, DENSITIES, layer_floor=0.02), ""),
        ("with the payloads' order", lambda: rank(layout, w_D, score_P, DENSITIES).place_D, ""),
    ):
        taken = seconds(work)
        detail = f"{1e3 * taken:.0f} ms, the sort {1e3 * sorting:.0f} ms"
        rows.append(Row(name, "sort of the scores", taken / sorting, goal, detail))
    return rows
