"""Models as FedML's own cross-silo clients exchange them: pickled, and read without unpickling."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import torch
from torch import Tensor, nn

from fedgmr_plugin.kernels.layout import ModelLayout
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.protocol.fedml_pickle import most_bytes, read_model
from fedgmr_plugin.runtimes.devices.office import Content


class PickledModels:
    """Whole state dictionaries, with zeros where a sub-model holds nothing; what comes back there is ignored.

    Integer buffers are those of the global model in what is sent, and ignored in what comes back: they are
    not merged, so one client's would go to the others as they are.

    FedML's clients unpickle what they are sent, as they always do; the server interprets their pickles with
    a closed list of operations and executes none (`fedgmr_plugin.protocol.fedml_pickle`).

    Args:
        model: the global model; untouched.
        layout: its layout.
    """

    def __init__(self, model: nn.Module, layout: ModelLayout) -> None:
        self._model, self._layout = model, layout
        self.expected = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}

    def encode(self, values_S: Tensor, ranking: Ranking, rung: int) -> bytes:
        """See `fedgmr_plugin.runtimes.devices.plain.Codec`."""
        whole_D = torch.zeros(self._layout.size, dtype=self._layout.dtype)
        w_D = ranking.place(values_S.cpu(), whole_D)
        state = self._layout.state_dict(self._model, w_D)
        plain = OrderedDict((name, state[name].detach().cpu().contiguous()) for name in self.expected)
        return pickle.dumps(plain)

    def decode(self, content: Content, ranking: Ranking, rung: int) -> Tensor:
        """See `fedgmr_plugin.runtimes.devices.plain.Codec`."""
        none_D = torch.zeros(self._layout.size, dtype=self._layout.dtype)
        w_D = self._layout.from_state_dict(read_model(content, self.expected), none_D)
        return ranking.cut(w_D, rung)

    def most_bytes(self, ranking: Ranking, rung: int) -> int:
        """See `fedgmr_plugin.runtimes.devices.plain.Codec`."""
        return most_bytes(self.expected)
