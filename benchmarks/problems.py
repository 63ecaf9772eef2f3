"""What the experiments train: a data set cut into clients, and a model whose weights follow the seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from benchmarks import models
from benchmarks.data import dataset


def build(
    seed: int, *, data: Mapping[str, Any], model: str, clients: int = 10, batch_size: int = 20
) -> tuple[list[Any], nn.Module]:
    """FedML's dataset and the model of one run.

    Args:
        seed: of the partition and of the initial weights.
        data: section of an experiment; see DATA.md.
        model: name in `benchmarks.models`.
        clients: N.
        batch_size: of the training loaders; FedGMR draws batches by FedML's key of that name.

    Raises:
        ConfigError, DataMissing, DataDamaged, DataError: of the data or the model.
    """
    given = dataset(data, clients, batch_size, seed)
    return given, models.build(model, given[-1], seed)
