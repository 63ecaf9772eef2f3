"""What a device remembers across restarts: its run, its last answer, its sequence numbers."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from fedgmr_plugin.protocol.pieces import Piece

_log = logging.getLogger(__name__)
_STATE, _ANSWER = "device.json", "answer.bin"
#: Sequence numbers that are written down at once: a minute's worth, where they follow the clock.
_RESERVED = 60_000


@dataclass
class Memory:
    """State of one device; on the disk where it has a folder.

    Attributes:
        folder: made where it is missing; None keeps nothing.
        token: the server's name of the run that the rest belongs to; "" before the first task.
        sequence: last number used for a message.
        answered: last dispatch that was trained; -1 before the first.
        update: the object of its answer; None once the server has been heard to go on.
        content: its bytes.
        heard: the server's sequence numbers, as `fedgmr_plugin.protocol.desk.Replays.state`.
        reserved: numbers up to this one may have been used.
        is_restored: whether this memory was loaded, and no number has been used since.
        run: FedML's ``run_id`` of that run.
        problem: why it could not be saved the last time; "" where it could.
    """

    folder: Path | None = None
    token: str = ""
    sequence: int = 0
    answered: int = -1
    update: Piece | None = None
    content: bytes | memoryview = b""
    heard: tuple[int, int] = (-1, 0)
    reserved: int = 0
    is_restored: bool = False
    run: str = ""
    problem: str = ""

    @staticmethod
    def load(folder: Path | None) -> Memory:
        """What was saved in `folder`; a fresh memory where nothing sound is.

        Where the answer's bytes are damaged, its dispatch counts as not trained.
        """
        if folder is None:
            return Memory()
        try:
            kept = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            highest, seen = kept["heard"]
            reserved = int(kept["reserved"])
            found = Memory(folder, str(kept["token"]), max(reserved - _RESERVED, 0), int(kept["answered"]))
            found.heard, found.reserved, found.is_restored = (int(highest), int(seen)), reserved, True
            found.run = str(kept.get("run", ""))
            update = None if kept["update"] is None else Piece(*kept["update"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return Memory(folder)
        if update is not None:
            found.content = _content(folder / _ANSWER, update)
            found.update = update if found.content else None
            found.answered = found.answered if found.content else -1
        return found

    def enter(self, run: str) -> None:
        """Begin anew, except for sequence numbers, where `run` is another one of FedML's than before."""
        if run != self.run:
            self.run, self.token, self.answered, self.update, self.content = run, "", -1, None, b""

    def next_sequence(self, now: int) -> int:
        """The next sequence number: increasing, also over restarts and where the clock jumps.

        After a restart the clock is believed where it is ahead of the last number that was written down: so
        numbers do not run away from it, and a device that loses its memory is heard at once.

        Args:
            now: milliseconds of the day's clock, which alone decides where there is no folder.
        """
        is_set_back = self.is_restored and now <= self.sequence
        self.sequence = max((self.reserved if is_set_back else self.sequence) + 1, now)
        self.is_restored = False
        if self.sequence > self.reserved:
            self.reserved = self.sequence + _RESERVED
            self.save()
        return self.sequence

    def save(self, *, with_answer: bool = False) -> None:
        """Bring the state to the disk: whole, or as it was, where the disk is full.

        Args:
            with_answer: the answer's bytes are new.
        """
        if self.folder is None:
            return
        kept = {
            "run": self.run,
            "token": self.token,
            "reserved": self.reserved,
            "answered": self.answered,
            "update": self.update,
            "heard": self.heard,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if with_answer:
                _write(self.folder / _ANSWER, self.content)
            _write(self.folder / _STATE, json.dumps(kept).encode())
        except OSError as error:
            if not self.problem:  # each task would say it again
                _log.warning("this device would not remember its state after a restart: %s", error)
            self.problem = str(error)
        else:
            self.problem = ""


def _content(path: Path, update: Piece) -> bytes:
    """The answer's bytes; none where they are not those that were saved."""
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    return content if hashlib.sha256(content).hexdigest() == update.sha256 else b""


def _write(path: Path, content: bytes | memoryview) -> None:
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
