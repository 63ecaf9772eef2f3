"""FedGMR: nested masks of largest weights, mask-aware asynchronous aggregation, densities restored."""

from fedgmr_plugin.methods.parts import Method

METHOD = Method(
    "fedgmr",
    "FedGMR",
    "Sub-models of the largest weights, restored during training; asynchronous, mask-aware aggregation of "
    "the changes that arrived in the window.",
    "arXiv 2512.05372 (ICML 2026)",
    {},
)

BUFFERED = Method(
    "fedgmr+buffer",
    "FedGMR with a buffer",
    "The same, but every window averages the weights that each client uploaded last, however old they are.",
    METHOD.source,
    {"update_scope": "buffer", "update_form": "replacement", "staleness": "constant"},
)
