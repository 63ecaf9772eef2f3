"""Sub-models as model files (.mnn) of FedML's own devices."""

from __future__ import annotations

import errno
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.errors import WireError
from fedgmr_plugin.kernels.layout import ModelLayout, build_layout
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.kernels.width import narrow, widths
from fedgmr_plugin.runtimes.devices import mnn
from fedgmr_plugin.runtimes.devices.office import Content

_log = logging.getLogger(__name__)
#: Seconds between two tries to write a file.
_WAIT = 1.0
#: Stacks that are kept at the same time, each with files of its own; densities may change without end.
_MOST_KNOWN = 64


class ModelFile:
    """Files of one stack: a template with other values.

    Args:
        model: the stack.
        input_shape: of one batch.
    """

    def __init__(self, model: nn.Module, input_shape: Sequence[int]) -> None:
        self._model = model
        self._order = mnn.parameter_order(model)
        self._template = _written(model, input_shape)
        self.size = len(self._template)

    def write(self, layout: ModelLayout, w_D: Tensor) -> bytes:
        """The file of a vector [D] of the stack's own layout."""
        layout.scatter(self._model, w_D)
        named = dict(self._model.named_parameters())
        values = [named[name].detach().cpu().numpy().reshape(shape) for name, shape in self._order]
        return bytes(mnn.filled(self._template, values))

    @torch.no_grad()
    def read(self, layout: ModelLayout, content: Content) -> Tensor:
        """The vector [D] that a file holds.

        Raises:
            ModelError: GMR-208 or GMR-209; it is no file of this stack.
        """
        values = mnn.loads(content, [shape for _, shape in self._order], most_bytes=2 * self.size)
        named = dict(self._model.named_parameters())
        for (name, _), array in zip(self._order, values, strict=True):
            named[name].copy_(torch.from_numpy(array.copy()).reshape(named[name].shape))
        return layout.gather(self._model)


def _written(model: nn.Module, input_shape: Sequence[int]) -> bytes:
    """The file of a stack, by way of the disk: MNN writes nowhere else. Waits where that is full."""
    told = False
    while True:
        try:
            with tempfile.TemporaryDirectory(prefix="fedgmr-mnn-") as folder:
                path = Path(folder) / "template.mnn"
                mnn.write(model, input_shape, path)
                return path.read_bytes()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not told:
                _log.warning("a model file waits until it can be written: %s", error)
            told = True
            time.sleep(_WAIT)


class MaskedFiles:
    """Whole files, with zeros where a sub-model holds nothing; what comes back there is ignored.

    Args:
        model: the global model, used as scratch.
        layout: its layout.
        input_shape: of one batch.
    """

    def __init__(self, model: nn.Module, layout: ModelLayout, input_shape: Sequence[int]) -> None:
        self._layout, self._file = layout, ModelFile(model, input_shape)

    def encode(self, values_S: Tensor, ranking: Ranking, rung: int) -> bytes:
        """See `fedgmr_plugin.runtimes.devices.plain.Codec`."""
        whole_D = torch.zeros(self._layout.size, dtype=self._layout.dtype)
        return self._file.write(self._layout, ranking.place(values_S.cpu(), whole_D))

    def decode(self, content: Content, ranking: Ranking, rung: int) -> Tensor:
        """See `fedgmr_plugin.runtimes.devices.plain.Codec`."""
        return ranking.cut(self._file.read(self._layout, content), rung)

    def most_bytes(self, ranking: Ranking, rung: int) -> int:
        """A device's library may write more of its own; twice the size is enough."""
        return 2 * self._file.size


class WidthFiles:
    """Smaller files: the stacks of the widths that a ranking's densities mean."""

    def __init__(self, model: nn.Module, layout: ModelLayout, input_shape: Sequence[int]) -> None:
        self._model, self._layout, self._input_shape = model, layout, input_shape
        self._known: dict[tuple[tuple[float, ...], int], tuple[ModelFile, ModelLayout, Tensor]] = {}

    def encode(self, values_S: Tensor, ranking: Ranking, rung: int) -> bytes:
        """See `fedgmr_plugin.runtimes.devices.plain.Codec`."""
        file, layout, order_S = self._stack(ranking, rung)
        return file.write(layout, values_S.cpu()[order_S])

    def decode(self, content: Content, ranking: Ranking, rung: int) -> Tensor:
        """See `fedgmr_plugin.runtimes.devices.plain.Codec`."""
        file, layout, order_S = self._stack(ranking, rung)
        values_S = torch.empty(layout.size, dtype=layout.dtype)
        values_S[order_S] = file.read(layout, content)
        return values_S

    def most_bytes(self, ranking: Ranking, rung: int) -> int:
        """See `MaskedFiles.most_bytes`."""
        return 2 * self._stack(ranking, rung)[0].size

    def _stack(self, ranking: Ranking, rung: int) -> tuple[ModelFile, ModelLayout, Tensor]:
        """The stack of a rung, its layout, and the place in the payload of each of its coordinates [S]."""
        key = ranking.densities, rung
        if key in self._known:
            self._known[key] = self._known.pop(key)  # the last that is forgotten
        else:
            while len(self._known) >= _MOST_KNOWN:
                del self._known[next(iter(self._known))]
            width = widths(self._model, self._layout, ranking.densities)[rung]
            small, index_S = narrow(self._model, self._layout, width)
            order_S = ranking.support(rung).cpu().argsort()
            if not torch.equal(ranking.support(rung).cpu()[order_S], index_S):
                raise WireError("GMR-715", "the ranking is not one of widths")
            self._known[key] = ModelFile(small, self._input_shape), build_layout(small), order_S
        return self._known[key]


def codec_of(
    config: FedGMRConfig, model: nn.Module, layout: ModelLayout, input_shape: Sequence[int]
) -> MaskedFiles | WidthFiles:
    """The files that `device_submodel` asks for.

    Args:
        model: a copy of the global model, used as scratch.
        input_shape: of one batch of one sample.

    Raises:
        ModelError: GMR-207 or GMR-210; the model has no widths, or is no stack.
        HostError: GMR-511; MNN is missing.
    """
    kind = WidthFiles if config.device_submodel == "width" else MaskedFiles
    return kind(model.cpu(), layout, input_shape)  # files are written and read there
