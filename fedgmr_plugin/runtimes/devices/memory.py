"""What a device remembers across restarts: its run, its last answer, its sequence number."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from fedgmr_plugin.protocol.pieces import Piece

_STATE, _ANSWER = "device.json", "answer.bin"


@dataclass
class Memory:
    """State of one device; on the disk where it has a folder.

    Attributes:
        folder: made where it is missing; None keeps nothing.
        token: run that the rest belongs to.
        sequence: last number used for a message.
        answered: last dispatch that was trained; -1 before the first.
        update: the object of its answer; None once the server has been heard to go on.
        content: its bytes.
    """

    folder: Path | None = None
    token: str = ""
    sequence: int = 0
    answered: int = -1
    update: Piece | None = None
    content: bytes | memoryview = b""

    @staticmethod
    def load(folder: Path | None) -> Memory:
        """What was saved in `folder`; a fresh memory where nothing sound is."""
        if folder is None:
            return Memory()
        try:
            kept = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            update = None if kept["update"] is None else Piece(*kept["update"])
            content = b"" if update is None else (folder / _ANSWER).read_bytes()
            return Memory(folder, kept["token"], kept["sequence"], kept["answered"], update, content)
        except (OSError, ValueError, KeyError, TypeError):
            return Memory(folder)

    def save(self, *, with_answer: bool = False) -> None:
        """Bring the state to the disk: whole, or as it was.

        Args:
            with_answer: the answer's bytes are new.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if with_answer:
            _write(self.folder / _ANSWER, self.content)
        kept = {
            "token": self.token,
            "sequence": self.sequence,
            "answered": self.answered,
            "update": self.update,
        }
        _write(self.folder / _STATE, json.dumps(kept).encode())


def _write(path: Path, content: bytes | memoryview) -> None:
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
