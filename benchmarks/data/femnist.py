"""FEMNIST in LEAF's JSON files: 28 x 28 grey images of 62 characters by writer.

The layout is LEAF's own, ``femnist/data/train/*.json`` and ``femnist/data/test/*.json``. Each file holds
``users``, ``num_samples`` and ``user_data``: writer to ``x``, lists of 784 numbers in [0, 1] (1 is white
paper), and ``y``, numbers 0 to 61. LEAF has divided bytes by 255, so images are read as bytes. The whole of
it, 805,263 images of 3,550 writers, takes 3.2 GB of memory, and some minutes to read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.folder import DataDamaged, DataMissing, need
from benchmarks.data.labelled import ImageData, Labelled

Array = NDArray[Any]
CLASSES = 62
_SIDE = 28
_HOW = (
    "Make it with LEAF (https://github.com/TalwalkarLab/leaf, in data/femnist: ./preprocess.sh -s niid "
    "--sf 1.0 -k 0 -t sample), copy its data/femnist folder there, or use the stand-in `name: omniglot`."
)


def femnist(folder: Path, *, normalise: bool = False) -> Labelled:
    """FEMNIST with its writers as users, in the order of their names.

    Raises:
        DataMissing: no files.
        DataDamaged: a file that is not LEAF's, or whose counts are not those that it states.
    """
    root = folder / "femnist" / "data"
    x, y, names = _part(root / "train")
    test_x, test_y, _ = _part(root / "test")
    _, users = np.unique(names, return_inverse=True)
    return ImageData(x, y, test_x, test_y, CLASSES, users.astype(np.int64)).labelled(normalise=normalise)


def _part(folder: Path) -> tuple[Array, Array, Array]:
    """All files of a folder: x uint8 [n, 1, 28, 28], y int64 [n], writers [n]."""
    files = sorted(need(folder, _HOW).glob("*.json"))
    if not files:
        raise DataMissing(f"{folder} holds no .json file. {_HOW}")
    pieces = [piece for path in files for piece in _file(path)]
    names = [name for name, _, _ in pieces]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataDamaged(
            f"{folder} holds the writer {twice!r} twice: does it mix the files of two runs of LEAF?"
        )
    if not any(len(labels) for _, _, labels in pieces):
        raise DataDamaged(f"{folder} has no image")
    x, y = (np.concatenate([piece[i] for piece in pieces]) for i in (1, 2))
    return x, y, np.repeat(np.asarray(names), [len(piece[2]) for piece in pieces])


def _file(path: Path) -> list[tuple[str, Array, Array]]:
    """Writer, images and labels of each writer of a file."""
    try:
        content = json.loads(path.read_bytes())
        users, counts, data = content["users"], content["num_samples"], content["user_data"]
        if len(users) != len(counts) or set(users) != set(data):
            raise DataDamaged(f"{path}: users, num_samples and user_data do not name the same writers")
        return [
            (name, *_writer(path, name, n, data.pop(name))) for name, n in zip(users, counts, strict=True)
        ]
    except DataDamaged:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataDamaged(f"{path} is no file of LEAF's: {type(error).__name__}: {error}") from error


def _writer(path: Path, name: str, count: int, data: dict[str, Any]) -> tuple[Array, Array]:
    x, y = np.asarray(data["x"], dtype=np.float64), np.asarray(data["y"])
    if not count and not x.size:
        x = x.reshape(0, _SIDE * _SIDE)
    where = f"{path}: writer {name!r}"
    if x.shape != (count, _SIDE * _SIDE) or y.shape != (count,):
        raise DataDamaged(f"{where} has x {x.shape} and y {y.shape}; stated are {count} images of {_SIDE**2}")
    if not (np.all(x >= 0) and np.all(x <= 1)):
        raise DataDamaged(f"{where} has pixels outside [0, 1]")
    if count and y.dtype.kind != "i":
        raise DataDamaged(f"{where} has labels that are no whole numbers")
    if count and not 0 <= y.min() <= y.max() < CLASSES:
        raise DataDamaged(f"{where} has labels {y.min()} to {y.max()}, outside 0 to {CLASSES - 1}")
    return np.rint(255 * x).astype(np.uint8).reshape(count, 1, _SIDE, _SIDE), y.astype(np.int64)
