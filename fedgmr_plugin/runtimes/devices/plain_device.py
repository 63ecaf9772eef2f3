"""A device as FedML's own: it trains whatever model it is sent, knows nothing of masks, and signs nothing.

online -> model file -> train -> model file, and again until it is told to finish

As FedML's app does, it ignores a second message of type 1, keeps only the newest model that comes while it
trains, and repeats ``client_idx`` in its answer.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Callable

from fedgmr_plugin.errors import FedGMRError, WireError
from fedgmr_plugin.protocol.header import shown
from fedgmr_plugin.protocol.notes import (
    CHECK,
    FINISH,
    INIT,
    MODEL,
    STATUS,
    SYNC,
    parse,
    to_device,
    to_server,
)
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.runtimes.devices.memory import Memory
from fedgmr_plugin.runtimes.devices.office import Hands

_log = logging.getLogger(__name__)
_MOST_BYTES = 2**31
#: Trains a model file and calls back with the trained one, in the device's thread: (file, client, count).
TrainFile = Callable[[bytearray, int, int, Callable[[bytes], None]], None]


class PlainDevice:
    """One device; see `fedgmr_plugin.runtimes.devices.device.Device` for what its arguments mean.

    Args:
        train: trains a model file; its ``client`` is ``client_idx`` as it came.
        repeats: whether answers have ``client_idx``.
    """

    def __init__(
        self,
        run: str,
        server: int,
        device: int,
        samples: int,
        train: TrainFile,
        hands: Hands,
        clock: Callable[[], float],
        heartbeat: float = 3600.0,
        repeats: bool = True,
    ) -> None:
        self.device, self.samples, self._repeats = device, samples, repeats
        self.hears, self.speaks = to_device(run, server, device), to_server(run, device)
        self.finished = False
        self.heard_at = clock()
        self.trained = 0
        self.memory = Memory()
        self._run, self._server, self._train, self._hands, self._clock = run, server, train, hands, clock
        self._heartbeat, self._next_beat = heartbeat, clock() + heartbeat
        self._waiting: tuple[str, int] | None = None  # the newest model that came while one was trained
        self._busy = self._trains = self._begun = False

    def begin(self) -> None:
        """Say hello."""
        self._say_status("ONLINE")

    def tick(self) -> None:
        """FedML's devices say nothing by themselves."""
        self._next_beat = self._clock() + self._heartbeat

    def next_tick(self) -> float:
        """Second at which `tick` is to be called at the latest."""
        return self._next_beat

    def message(self, topic: str, payload: bytes) -> None:
        """A message of the server."""
        try:
            message = parse(payload)
            kind = message.get("msg_type")
            if topic != self.hears or kind not in (INIT, SYNC, CHECK, FINISH):
                raise WireError("GMR-741", f"msg_type={shown(kind)} on {topic} is not for this device")
            client = str(message.get("client_idx") or 0)
            if not re.fullmatch("[0-9]{1,18}", client):
                raise WireError("GMR-741", f"client_idx={shown(client)}")
        except WireError as refusal:
            _log.warning("%s", refusal)
            return
        self.heard_at = self._clock()
        if kind == CHECK:
            self._say_status("ONLINE")
        elif kind == FINISH:
            self.finished = True
            self._say_status("FINISHED")
        elif kind != INIT or not self._begun:
            self._begun = True
            self._waiting = str(message.get("model_params")), int(client)
            self._next()

    def kept(self, topic: str, payload: bytes) -> None:
        """FedML's devices take nothing that the broker kept."""

    def waits_since(self) -> float | None:
        """See `fedgmr_plugin.runtimes.devices.device.Device.waits_since`."""
        return None if self._trains else self.heard_at

    def last_will(self) -> bytes:
        """The message that the broker sends when the connection breaks; its topic is `speaks`."""
        return self._status("OFFLINE")

    def _next(self) -> None:
        if not self._busy and self._waiting is not None:
            self._busy = True
            (key, client), self._waiting = self._waiting, None
            self._hands.fetch(Piece(key, _MOST_BYTES, ""), lambda content: self._fetched(client, content))

    def _fetched(self, client: int, content: bytearray | WireError) -> None:
        if isinstance(content, WireError):
            self.failed(content)
        else:
            self._trains = True
            self._train(content, client, self.trained, lambda trained: self._done(trained, client))

    def failed(self, error: FedGMRError) -> None:
        """A model could not be had, or is none; the next one may be."""
        _log.warning("%s", error)
        self._busy = self._trains = False
        self.heard_at = self._clock()
        self._next()

    def _done(self, content: bytes, client: int) -> None:
        self.trained += 1
        key = f"{self.speaks}_{uuid.uuid4()}"
        self._hands.put(Piece(key, len(content), ""), content)
        message = {
            "msg_type": MODEL,
            "sender": self.device,
            "receiver": self._server,
            "num_samples": self.samples,
            "model_params": key,
        }
        if self._repeats:
            message["client_idx"] = str(client)
        self._hands.publish(self.speaks, json.dumps(message).encode())
        self._busy = self._trains = False
        self.heard_at = self._clock()
        self._next()

    def _say_status(self, state: str) -> None:
        self._hands.publish(self.speaks, self._status(state))

    def _status(self, state: str) -> bytes:
        message = {
            "msg_type": STATUS,
            "sender": self.device,
            "receiver": self._server,
            "client_status": state,
            "client_os": "linux",
        }
        return json.dumps(message).encode()
