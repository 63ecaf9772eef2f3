"""What every run does with the server's effects, whatever makes its clock tick."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fedgmr_plugin.engine.events import (
    Dispatch,
    Effect,
    Evaluate,
    Finish,
    Record,
    Validate,
    Validated,
)
from fedgmr_plugin.engine.examiner import Examiner
from fedgmr_plugin.engine.server import Server


class Course(ABC):
    """A server, its examiner and its run log.

    Args:
        server: not started yet.
        examiner: measures its models.
        record: receives every record of the run log but the header, in order.
    """

    def __init__(self, server: Server, examiner: Examiner, record: Callable[[dict[str, Any]], None]) -> None:
        self.server, self.examiner, self.bench = server, examiner, examiner.bench
        self.config, self.layout = server.config, server.layout
        self._record = record
        self.bytes_up = self.bytes_down = 0.0
        self._window_down = 0.0

    @abstractmethod
    def _send(self, sent: Dispatch) -> float:
        """Get a dispatch to its client; returns the bytes that the client receives."""

    def _votes(self) -> Sequence[bool]:
        """The gradient trigger's votes [N]; empty without it."""
        return ()

    @property
    def traffic(self) -> list[float]:
        """Bytes up and down so far, and down in the present window."""
        return [self.bytes_up, self.bytes_down, self._window_down]

    @traffic.setter
    def traffic(self, values: Sequence[float]) -> None:
        self.bytes_up, self.bytes_down, self._window_down = values

    def _totals(self, bytes_up: float, server_bytes_down: float) -> dict[str, Any]:
        """What a `window` record says of the window that closes now; the next one begins."""
        totals = {
            "bytes_up": bytes_up,
            "bytes_down": self._window_down,
            "server_bytes_down": server_bytes_down,
            "learning_rate": self.bench.training.learning_rate * self.server.learning_rate_scale,
        }
        self._window_down = 0.0
        return totals

    def _carry_out(self, effects: Sequence[Effect]) -> dict[str, Any] | None:
        """Carry `effects` out, and those that follow from them; the `end` record at the end."""
        queue = list(effects)
        dispatch_record: dict[str, Any] = {}
        while queue:
            effect = queue.pop(0)
            if isinstance(effect, Record) and effect.fields["type"] == "dispatch":
                dispatch_record = effect.fields
            elif isinstance(effect, Record):
                self._record(effect.fields)
            elif isinstance(effect, Dispatch):
                received = self._send(effect)
                self._window_down += received
                self.bytes_down += received
                self._record({**dispatch_record, "bytes_down": received})
            elif isinstance(effect, Validate):
                queue += self.server.handle(self._validate())
            elif isinstance(effect, Evaluate):
                self._record(self.examiner.evaluation(self.bytes_up, self.bytes_down))
            else:
                return self._end(effect)
        return None

    def _validate(self) -> Validated:
        seen, record = self.examiner.validation()
        if record is not None:
            self._record(record)
        return Validated(seen.candidate, seen.server, seen.clients, self._votes())

    def _end(self, effect: Finish) -> dict[str, Any]:
        return {
            "type": "end",
            "windows": self.server.version,
            "time": self.server.time,
            "reason": effect.reason,
            "model_sha256": model_sha256(self.server.w_D),
            "shipped": self.server.candidate,
            "rejected": self.server.rejected,
        }


def model_sha256(w_D: Tensor) -> str:
    """SHA-256 of the vector's little-endian bytes in layout order."""
    array = w_D.detach().cpu().contiguous().numpy()
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()
