"""Free ports of the loopback interface, outside the range from which the system takes its own."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable

HOST = "127.0.0.1"
#: Below the ephemeral ports of Linux (32768) and macOS (49152). A client that keeps trying a closed port
#: *within* that range is in the end connected to itself, and the service cannot come back.
FIRST, LAST = 20000, 32767


def is_free(port: int) -> bool:
    """Whether the port could be listened on a moment ago."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port that was free a moment ago; another process may take it first, so be ready to try another.

    Raises:
        OSError: if none is found in a thousand tries.
    """
    for port in random.SystemRandom().sample(range(FIRST, LAST + 1), 1000):
        if is_free(port):
            return port
    raise OSError(f"no free port on {HOST} between {FIRST} and {LAST}")


def wait_until(ready: Callable[[], bool], *, alive: Callable[[], bool], patience: float) -> bool:
    """Whether something became ready within `patience` seconds and while its process lived."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if not alive():
            return False
        if ready():
            return alive()  # else it was another process that answered on the port
        time.sleep(0.02)
    return False
