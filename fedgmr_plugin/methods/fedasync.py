"""FedAsync: every upload is merged by itself when it arrives, w <- w + alpha s(tau) (x_n - w)."""

from fedgmr_plugin.methods.parts import DENSE, Method

METHOD = Method(
    "fedasync",
    "FedAsync",
    "Whole models, one upload at a time: w + alpha s(tau) (x - w), alpha = 0.6 (`server_step`), "
    "s(tau) = (1 + tau)^-0.5, and a proximal term of weight 0.005 in the clients' objective.",
    "Xie et al., OPT 2020 (arXiv 1903.03934), algorithm 1",
    {
        **DENSE,
        "schedule": "buffered",
        "min_updates": 1,
        "update_form": "replacement",
        "staleness": "polynomial",
        "staleness_exponent": 0.5,
        "staleness_normalised": False,
        "server_step": 0.6,
        "proximal": 0.005,
    },
)
