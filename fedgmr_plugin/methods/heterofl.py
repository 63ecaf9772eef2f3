"""HeteroFL: static width slices; a weight becomes the mean over the clients that hold it."""

from fedgmr_plugin.methods.parts import FROZEN, Method

METHOD = Method(
    "heterofl",
    "HeteroFL",
    "The first units of every hidden layer; each weight is the mean over its holders, rows of the last layer "
    "over those whose data have the class; the loss sees the client's own classes.",
    "Diao et al., ICLR 2021 (arXiv 2010.01264), algorithm 1",
    {**FROZEN, "score": "width", "label_masks": True},
)
