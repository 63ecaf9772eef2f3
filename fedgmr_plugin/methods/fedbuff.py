"""FedBuff: a step along the mean of K changes, each scaled by its staleness, whenever K have arrived."""

from fedgmr_plugin.methods.parts import DENSE, Method

METHOD = Method(
    "fedbuff",
    "FedBuff",
    "Whole models; whenever K = 3 (`min_updates`) changes have arrived, a step of size 1 (`server_step`) "
    "along their mean, each scaled by (1 + tau)^-0.5.",
    "Nguyen et al., AISTATS 2022 (arXiv 2106.06639), algorithm 1",
    {
        **DENSE,
        "schedule": "buffered",
        "min_updates": 3,
        "update_form": "delta",
        "staleness": "polynomial",
        "staleness_exponent": 0.5,
        "staleness_normalised": False,
    },
)
