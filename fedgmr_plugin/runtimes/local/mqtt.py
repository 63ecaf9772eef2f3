"""One MQTT 3.1.1 handshake, to know that a broker answers: CONNECT, CONNACK, DISCONNECT."""

from __future__ import annotations

import secrets
import socket
import ssl
import struct
from contextlib import ExitStack

_CONNACK = 0x20


def handshake(
    port: int,
    user: str = "",
    password: str = "",
    *,
    host: str = "127.0.0.1",
    context: ssl.SSLContext | None = None,
    timeout: float = 0.5,
) -> int | None:
    """What a broker answers to a client.

    Args:
        user: name; "" connects anonymously.
        context: TLS; plain TCP where None.
        timeout: seconds for each step.

    Returns:
        CONNACK's return code (0 accepted, 5 not authorised, others as in MQTT 3.1.1, 3.2.2.3), or None if
        nothing answers in time, or something that does not speak MQTT, or TLS fails.
    """
    try:
        with ExitStack() as opened:
            connection = opened.enter_context(socket.create_connection((host, port), timeout))
            if context is not None:
                connection = opened.enter_context(context.wrap_socket(connection, server_hostname=host))
            connection.sendall(_connect(user, password))
            answer = connection.recv(4)
            if len(answer) < 4 or answer[0] != _CONNACK:
                return None
            connection.sendall(b"\xe0\x00")
            return answer[3]
    except OSError:  # ssl.SSLError and timeouts are of this kind
        return None


def _connect(user: str, password: str) -> bytes:
    flags = 0x02 | (0xC0 if user else 0)  # clean session; user name and password
    fields = [f"probe-{secrets.token_hex(6)}", *([user, password] if user else [])]
    body = _text("MQTT") + bytes([4, flags]) + struct.pack(">H", 10) + b"".join(map(_text, fields))
    return b"\x10" + _length(len(body)) + body


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8")
    return struct.pack(">H", len(encoded)) + encoded


def _length(number: int) -> bytes:
    digits = bytearray()
    while True:
        number, digit = divmod(number, 128)
        digits.append(digit | (0x80 if number else 0))
        if not number:
            return bytes(digits)
