"""A delaying proxy: `delay.py RTT_MS LISTEN_PORT TARGET_PORT COUNT` puts a round trip before COUNT servers.

Port LISTEN_PORT + i of this machine leads to TARGET_PORT + i.  Every byte arrives half a round trip after it
was sent, in each direction, however much is on its way: latency without a limit of bandwidth.
"""

from __future__ import annotations

import sys
from functools import partial

import trio

HOST = "127.0.0.1"
_CHUNK = 256 << 10


async def main(rtt_ms: float, listen: int, target: int, count: int) -> None:
    """Serves until cancelled; prints "ready" once all ports listen."""
    async with trio.open_nursery() as nursery:
        for i in range(count):
            serve = partial(_serve, rtt_ms / 2000, target + i)
            await nursery.start(partial(trio.serve_tcp, serve, listen + i, host=HOST))
        print("ready", flush=True)


async def _serve(seconds: float, target: int, client: trio.SocketStream) -> None:
    try:
        server = await trio.open_tcp_stream(HOST, target)
    except OSError:
        return
    async with server, trio.open_nursery() as nursery:
        for source, sink in ((client, server), (server, client)):
            # What is on its way is bounded by what the client has asked for.
            send, receive = trio.open_memory_channel[tuple[float, bytes]](1 << 20)
            nursery.start_soon(_take, seconds, source, send)
            nursery.start_soon(_give, receive, sink, nursery.cancel_scope)


async def _take(
    seconds: float, source: trio.SocketStream, send: trio.MemorySendChannel[tuple[float, bytes]]
) -> None:
    async with send:
        try:
            while content := await source.receive_some(_CHUNK):
                await send.send((trio.current_time() + seconds, bytes(content)))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


async def _give(
    receive: trio.MemoryReceiveChannel[tuple[float, bytes]], sink: trio.SocketStream, scope: trio.CancelScope
) -> None:
    try:
        async for due, content in receive:
            await trio.sleep_until(due)
            await sink.send_all(content)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    scope.cancel()


if __name__ == "__main__":
    trio.run(main, float(sys.argv[1]), *map(int, sys.argv[2:5]))
