"""FjORD: ordered dropout; every step trains a width drawn from those that the client can hold."""

from fedgmr_plugin.methods.parts import FROZEN, Method

METHOD = Method(
    "fjord",
    "FjORD",
    "The first units of every hidden layer; each local step trains a sub-model drawn uniformly from those up "
    "to the client's; each weight is the mean over its holders.",
    "Horvath et al., NeurIPS 2021 (arXiv 2102.13451), algorithm 1, without self-distillation",
    {**FROZEN, "score": "width", "local_objective": "ordered_dropout"},
)
