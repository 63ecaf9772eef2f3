"""FedProx: FedAvg whose clients minimise f(x) + (mu / 2) ||x - x_0||^2."""

from fedgmr_plugin.methods.parts import DENSE, ROUNDS, Method

METHOD = Method(
    "fedprox",
    "FedProx",
    "FedAvg with a proximal term of weight mu = 0.01 (`proximal`) in the clients' objective.",
    "Li et al., MLSys 2020 (arXiv 1812.06127), algorithm 2",
    {**DENSE, **ROUNDS, "proximal": 0.01},
)
