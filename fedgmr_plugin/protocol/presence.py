"""One server for each run: whoever begins to serve it asks whether somebody else does.

On the topic ``fedml_{run}_{server}_server``, which devices have no right to, servers exchange two notes,
signed like those of devices with a key that is made from all of theirs:

    ask   {nonce, serves}                who else is there?
    here  {nonce, serves, asked, place}  I am, and I go before `asked`

Who serves goes before who does not yet, then the smaller nonce. Whoever hears an ask says ``here`` if it goes
before; else it asks, too. Whoever hears ``here`` to its own nonce gives way to one that goes before it now;
if it goes before itself, having begun to serve since it asked, it says ``here`` in turn. Who serves goes on
serving, so nobody gives way in a circle, and of any that hear each other exactly one goes on. A nonce is
drawn by each process anew, so what the broker retained, what was recorded, and what the same run's server
said before it was killed, moves nobody; and a process that is dead says nothing, so another may follow it at
once.

Silence counts only while the own connection lives: a wait that it does not outlast is begun anew (`lost`).
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol.notes import parse, read_signed, signed

_log = logging.getLogger(__name__)
#: Seconds for which others may say that they are there, once the own question has come back.
PATIENCE = 2.0
#: Seconds after which a question that does not come back never will: the broker lets nobody hear it.
UNHEARD = 10.0
_NONCE = re.compile(r"[0-9a-f]{32}")


def presence_topic(run: str, server: int) -> str:
    """Topic of the servers of a run."""
    return f"fedml_{run}_{server}_server"


class Presence:
    """One process that serves a run, or is about to. Safe for two threads: one hears, one looks.

    Args:
        run, server: FedML's ``run_id`` and ``server_id``.
        keys: of the devices; none where they are not authenticated.
        place: where this process is, for whoever has to look for it.
        nonce: name of this process, 32 hex digits.

    Attributes:
        topic: where it hears and speaks.
        serves: whether it has begun.
        taken_by: where the one is that it has to give way to; "" while there is none.
    """

    def __init__(
        self,
        run: str,
        server: int,
        keys: Iterable[bytes],
        place: str,
        nonce: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.topic = presence_topic(run, server)
        self.serves = False
        self.taken_by = ""
        self._nonce, self._place, self._clock = nonce or secrets.token_hex(16), place[:128], clock
        secrets_of_all = b"".join(sorted(keys))
        self._key = hashlib.sha256(b"fedgmr-server\n" + secrets_of_all).digest() if secrets_of_all else None
        self._asked: float | None = None  # seconds
        self._returned: float | None = None
        self._answered: set[str] = set()
        self._warned = self._told = False
        self._lock = threading.RLock()

    def ask(self) -> bytes:
        """The question; to be published after each connection."""
        with self._lock:
            self._asked, self._returned = self._clock(), None
            return self._sign({"kind": "ask", "nonce": self._nonce, "serves": self.serves})

    def lost(self) -> None:
        """The connection is gone: what others said since it was asked may have been missed."""
        with self._lock:
            self._asked = self._returned = None

    def heard(self, payload: bytes) -> bytes | None:
        """What is to be published in answer to a message on the topic; None for nothing."""
        try:
            fields = read_signed(parse(payload), self.topic, self._key)
            kind, nonce = fields.get("kind"), fields.get("nonce")
            if kind not in ("ask", "here") or not isinstance(nonce, str) or not _NONCE.fullmatch(nonce):
                raise WireError("GMR-741", "no note of a server")
        except WireError as refusal:
            if not self._warned:
                _log.warning("another server of this run, or somebody who pretends to be one: %s", refusal)
            self._warned = True
            return None
        with self._lock:
            return self._answer(str(kind), nonce, fields)

    def _answer(self, kind: str, nonce: str, fields: dict[str, Any]) -> bytes | None:
        if kind == "here":
            if fields.get("asked") != self._nonce or nonce == self._nonce:
                return None
            if self._goes_before(nonce, fields):
                self.taken_by = str(fields.get("place"))[:128] or "another process"
            return None if self.taken_by else self._here(nonce)
        if self.taken_by:
            return None
        if nonce == self._nonce:
            if self._returned is None:
                self._returned = self._clock()
            return None
        if not self._goes_before(nonce, fields):
            return self._here(nonce)
        if nonce in self._answered or len(self._answered) >= 64:
            return None
        self._answered.add(nonce)
        return self.ask()

    def _goes_before(self, nonce: str, fields: dict[str, Any]) -> bool:
        """Whether who said this goes before this process."""
        return (fields.get("serves") is not True, nonce) < (not self.serves, self._nonce)

    def _here(self, asked: str) -> bytes:
        fields = {"kind": "here", "nonce": self._nonce, "serves": self.serves}
        return self._sign({**fields, "asked": asked, "place": self._place})

    def is_alone(self) -> bool:
        """Whether everybody has had the time to say that they are there, and nobody has."""
        with self._lock:
            return self._is_alone()

    def begin(self) -> bool:
        """Serve from now on, if this is the only process; whether it does.

        Nothing is heard in between: what is said to others before agrees with what is said after.
        """
        with self._lock:
            self.serves = self.serves or self._is_alone()
            if self.serves and self._returned is None and not self._told:
                _log.warning("the broker lets nobody hear %s: another server would not be seen", self.topic)
                self._told = True
            return self.serves

    def _is_alone(self) -> bool:
        if self.taken_by or self._asked is None:
            return False
        now = self._clock()
        if self._returned is not None:
            return now - self._returned >= PATIENCE
        return now - self._asked >= UNHEARD

    def _sign(self, fields: dict[str, Any]) -> bytes:
        return signed(fields, self.topic, self._key)
