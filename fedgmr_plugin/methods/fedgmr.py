"""FedGMR: nested masks of largest weights, mask-aware asynchronous aggregation, densities restored."""

from fedgmr_plugin.methods.parts import Method

METHOD = Method(
    "fedgmr",
    "FedGMR",
    "Sub-models of the largest weights, restored during training; asynchronous, mask-aware aggregation.",
    "arXiv 2512.05372 (ICML 2026)",
    {},
)
