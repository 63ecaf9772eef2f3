"""FIARSE: sub-models of the largest weights, and a gradient that knows of the threshold."""

from fedgmr_plugin.methods.parts import FROZEN, Method

METHOD = Method(
    "fiarse",
    "FIARSE",
    "The largest weights of every round's model; weights below the threshold theta drop out during local "
    "steps, and kept ones have their gradient times 1 + 2 theta |w| / (|w| + theta)^2; each weight moves by "
    "the mean change of its holders.",
    "Wu et al., NeurIPS 2024 (arXiv 2407.19389), section 3",
    {
        **FROZEN,
        "score": "magnitude",
        "mask_interval": 1,
        "local_objective": "straight_through",
    },
)
