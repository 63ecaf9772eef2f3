"""Checkpoints of a run: one file each, whole or not there.

A checkpoint is a safetensors file whose metadata hold the state's JSON. It is written beside its place,
brought to the disk and renamed; its name holds the window and the first 16 hex digits of its SHA-256, so that
damage shows. Two generations are kept: where the last one is damaged, the one before it serves, and the
damaged one is renamed, so that it counts for none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedgmr_plugin.errors import RunLogError
from fedgmr_plugin.protocol.journal import sync

#: Folder of the checkpoints in a run's directory.
FOLDER = "checkpoints"
FORMAT = "fedgmr checkpoint 2"
_KEPT = 2
_DAMAGED = ".damaged"
_NAME = re.compile(r"(\d{8,})-([0-9a-f]{16})\.safetensors")


class Checkpoint(NamedTuple):
    """What was saved: JSON-able `meta`, `tensors` by name; `path` of the file."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    path: Path


def save(run: Path, window: int, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write the checkpoint of a window; returns its file, which is on the disk then.

    Args:
        run: the run's directory.
        window: windows merged so far.
        meta: JSON-able state.
        tensors: by name.

    Raises:
        OSError: it cannot be written; those before it stay.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    draft = folder / "draft"
    metadata = {"format": FORMAT, "meta": json.dumps(meta)}
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, str(draft), metadata)
        sync(draft)
        path = folder / f"{window:08d}-{_digest(draft)}.safetensors"
        draft.rename(path)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise OSError(f"no checkpoint of window {window}: {error}") from error
    sync(folder)
    for _, old in list(_found(folder))[_KEPT:]:
        old.unlink()
    return path


def latest(run: Path, misfit: Callable[[Mapping[str, Any]], str] = lambda meta: "") -> Checkpoint | None:
    """The last checkpoint that is undamaged and fits; None if none was made.

    Args:
        misfit: why a checkpoint with that meta cannot be used; "" if it can.

    Raises:
        RunLogError: GMR-605 if there are some, of which none can be used.
    """
    problems, damaged = [], []
    for digest, path in _found(run / FOLDER):
        try:
            found = _read(path, digest)
            problem = misfit(found.meta)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            problem = f"{type(error).__name__}: {error}"
            damaged.append(path)
        if not problem:
            for other in damaged:  # else it would be kept in place of a sound one
                with suppress(OSError):
                    other.rename(f"{other}{_DAMAGED}")
            return found
        problems.append(f"{path.name}: {problem}")
    if problems:
        raise RunLogError("GMR-605", "; ".join(problems), where=str(run / FOLDER))
    return None


def _found(folder: Path) -> Iterator[tuple[str, Path]]:
    """Digest and path of each checkpoint, the last window first."""
    files = [(match, path) for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))]
    for match, path in sorted(files, key=lambda item: int(item[0][1]), reverse=True):
        yield match[2], path


def _read(path: Path, digest: str) -> Checkpoint:
    if _digest(path) != digest:
        raise ValueError("the content is not what was written")
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']!r}, this release reads {FORMAT!r}")
        names = file.keys()  # the file itself cannot be iterated
        tensors = {name: file.get_tensor(name) for name in names}
        return Checkpoint(json.loads(metadata["meta"]), tensors, path)


def _digest(path: Path) -> str:
    """First 16 hex digits of the file's SHA-256."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(2**20):
            found.update(piece)
    return found.hexdigest()[:16]
