"""A way to a service that can be cut: what reaches PORT is forwarded to TARGET, on this machine.

    python -m benchmarks.door PORT TARGET

To kill this process is to cut the way: connections break wherever they are, new ones are refused, and the
service behind keeps what it has.
"""

from __future__ import annotations

import asyncio
import sys

from fedgmr_plugin.runtimes.local.ports import HOST


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry bytes one way until their end."""
    try:
        while part := await reader.read(2**16):
            writer.write(part)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def serve(port: int, target: int) -> None:
    """Forward connections for ever."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection(HOST, target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(forward(reader, there[1]), forward(there[0], writer))

    async with await asyncio.start_server(accept, HOST, port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2])))
