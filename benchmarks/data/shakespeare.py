"""Shakespeare's plays by role, for next-character prediction; one user per role.

A role's text is cut into sequences of `length` characters one after another, without overlap. x is a
sequence and y the same text one character on, so every position is a target: x int64 [n, T], y int64 [n, T],
and a model's output [n, 80, T]. FedGMR's trainer takes the loss and the accuracy over all n T positions.
(LEAF predicts only the character after 80 others, from 80 times as many sequences that overlap; accuracy over
all positions counts those with little text before them as well, and is lower.) What is left of a role's text,
fewer than T + 1 characters, is not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from benchmarks.data.folder import DataDamaged, arrays_of
from benchmarks.data.labelled import Labelled
from fedgmr_plugin.errors import ConfigError

Array = NDArray[Any]
_HOW = "It is one of the project's own stand-in files: set FEDGMR_DATA_DIR to the folder that holds them."


def shakespeare(folder: Path, *, length: int = 80) -> Labelled:
    """87 roles of five plays, 464,761 / 116,234 characters, LEAF's 80 symbols."""
    return _read(folder / "shakespeare_roles5.npz", length)


def shakespeare_tiny(folder: Path, *, length: int = 80) -> Labelled:
    """156 roles of the "tiny Shakespeare" text, 791,727 / 198,013 characters, the same symbols."""
    return _read(folder / "shakespeare_tiny_roles.npz", length)


def sequences(text: Array, offsets: Array, length: int) -> tuple[Array, Array, Array]:
    """Cut each role's text into pairs of sequences.

    Args:
        text: character numbers [c], one role after another.
        offsets: where each role begins in it, and its end [roles + 1].
        length: T.

    Returns:
        x and y, int64 [n, T], and the role of each, int64 [n].
    """
    roles = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    counts = [max(end - start - 1, 0) // length for start, end in roles]
    starts = [start + length * i for (start, _), n in zip(roles, counts, strict=True) for i in range(n)]
    at = np.asarray(starts, dtype=np.int64)[:, None] + np.arange(length)
    text = text.astype(np.int64)
    return text[at], text[at + 1], np.repeat(np.arange(len(roles)), counts)


def _read(path: Path, length: int) -> Labelled:
    if length < 1:
        raise ConfigError("GMR-104", f"length={length} is below 1", where="data.length")
    with arrays_of(path, _HOW) as arrays:
        classes = len(arrays["vocab"])
        train = sequences(arrays["x_train"], arrays["offset_train"], length)
        test = sequences(arrays["x_test"], arrays["offset_test"], length)
    for x, y, _ in (train, test):
        if len(x) == 0:
            raise ConfigError("GMR-104", f"length={length} is more than any role's text", where="data.length")
        if max(x.max(), y.max()) >= classes:
            raise DataDamaged(f"{path} holds characters outside its vocabulary of {classes}")
    return Labelled(_pairs(*train[:2]), _pairs(*test[:2]), classes, users=train[2])


def _pairs(x: Array, y: Array) -> TensorDataset:
    return TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
