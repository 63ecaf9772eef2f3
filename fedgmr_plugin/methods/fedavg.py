"""FedAvg: everybody trains the whole model; the server waits for all and takes the mean, by samples."""

from fedgmr_plugin.methods.parts import DENSE, ROUNDS, Method

METHOD = Method(
    "fedavg",
    "FedAvg",
    "Rounds of the whole model; the mean of the clients' weights, by samples.",
    "McMahan et al., AISTATS 2017 (arXiv 1602.05629), algorithm 1",
    {**DENSE, **ROUNDS},
)
