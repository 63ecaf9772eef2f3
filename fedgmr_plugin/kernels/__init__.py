"""Pure maths on flat tensors: layout, masks, densities, staleness, aggregation, cost.

Kernels know no clock, no file, no network and no configuration object; what they need is an argument.
Axis letters: D coordinates of the global vector, S support of one sub-model, N clients, R rungs.
"""

from fedgmr_plugin.kernels.aggregate import Coverage, MaskedUpdate, Merge, merge
from fedgmr_plugin.kernels.density import (
    GMRRules,
    GMRState,
    Observation,
    Restoration,
    next_density,
    restoring_pays,
    start,
    step,
)
from fedgmr_plugin.kernels.layout import Entry, Finding, ModelLayout, build_layout, validate
from fedgmr_plugin.kernels.masks import Ranking, Segment, rank, scores
from fedgmr_plugin.kernels.staleness import staleness_weight
from fedgmr_plugin.kernels.width import Narrow, narrow, rank_widths, widths

__all__ = [
    "Coverage",
    "Entry",
    "Finding",
    "GMRRules",
    "GMRState",
    "MaskedUpdate",
    "Merge",
    "ModelLayout",
    "Narrow",
    "Observation",
    "Ranking",
    "Restoration",
    "Segment",
    "build_layout",
    "merge",
    "narrow",
    "next_density",
    "rank",
    "rank_widths",
    "restoring_pays",
    "scores",
    "staleness_weight",
    "start",
    "step",
    "validate",
    "widths",
]
