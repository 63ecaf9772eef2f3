"""Where data files lie, and what is wrong with them when they cannot be used.

Nothing here, nor in any reader, uses the network or writes a file.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class DataMissing(FileNotFoundError):
    """A data set is not where it was looked for; the message says where that was and how to get it."""


class DataDamaged(ValueError):
    """A file of a data set does not hold what it must hold: another checksum, count or form."""


def data_dir(folder: str | Path | None = None) -> Path:
    """Folder of the data files: `folder`, else FEDGMR_DATA_DIR, else ``shared/data`` beside the source tree.

    Raises:
        DataMissing: there is no such folder.
    """
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    chosen = Path(folder or os.environ.get("FEDGMR_DATA_DIR") or beside).expanduser()
    if not chosen.is_dir():
        raise DataMissing(f"no data sets in {chosen}: set FEDGMR_DATA_DIR to their folder")
    return chosen


def need(path: Path, how: str) -> Path:
    """`path` if it exists.

    Args:
        how: what to do where it does not.

    Raises:
        DataMissing: it does not.
    """
    if not path.exists():
        raise DataMissing(f"{path} does not exist. {how}")
    return path


@contextmanager
def arrays_of(path: Path, how: str) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Arrays of an ``.npz`` file by name, each read when it is asked for.

    Raises:
        DataMissing: there is no file.
        DataDamaged: it is no such file, or lacks an array that is asked for.
    """
    try:
        with np.load(need(path, how)) as arrays:
            yield arrays
    except DataDamaged:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise DataDamaged(f"{path} is damaged or another file: {error}") from error


def verified(path: Path, md5: str) -> bytes:
    """The content of a file whose MD5 is the published one.

    Raises:
        DataDamaged: it is another.
    """
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataDamaged(
            f"{path} has md5={found}, not {md5}: it is damaged or another version; get it again"
        )
    return content
