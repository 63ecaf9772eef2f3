"""FedRolex: a window of units that moves on by one every round."""

from fedgmr_plugin.methods.parts import FROZEN, Method

METHOD = Method(
    "fedrolex",
    "FedRolex",
    "A window of units of every hidden layer that begins at unit (round mod units); each weight is the mean "
    "over its holders.",
    "Alam et al., NeurIPS 2022 (arXiv 2212.01548), algorithm 1",
    {**FROZEN, "score": "rolling_width", "mask_interval": 1},
)
