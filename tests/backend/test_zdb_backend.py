"""The 0-db client under everything that networks and servers do."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio

from qsfs.backend import link
from qsfs.backend.open import (
    CONTROL_SUFFIX,
    create_control_namespace,
    create_namespace,
    open_backend,
    open_control,
)
from qsfs.backend.zdb import ZdbBackend
from qsfs.backend.zdb_pool import backend_error
from qsfs.clock import FixedClock
from qsfs.config import BackendConfig
from qsfs.errors import BackendFull, BackendRefused, BackendUnavailable
from qsfs.zdb.protocol import NIL, OK, bulk
from qsfs.zdb.server import ServeOptions, serve
from tests.support.backends import Servers, free_ports, in_process, silent_port
from tests.zdb.wire import encode, wire

HOST = "127.0.0.1"


def client(port: int, namespace: str = "default", **settings: object) -> ZdbBackend:
    return ZdbBackend(HOST, port, namespace, clock=FixedClock(), **settings)


@contextlib.asynccontextmanager
async def scripted(
    answer: Callable[[trio.SocketStream], Awaitable[None]],
) -> AsyncIterator[int]:
    """A server that does to each connection what `answer` says."""

    async def handle(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await answer(stream)

    async with trio.open_nursery() as nursery:
        serve_tcp = functools.partial(trio.serve_tcp, handle, 0, host=HOST)
        listeners = await nursery.start(serve_tcp)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def replying(*replies: bytes) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """Lets a client in, then gives these replies, one a request; then closes."""

    async def answer(stream: trio.SocketStream) -> None:
        for reply in (b"+OK\r\n", b"$0\r\n\r\n", *replies):
            if not await stream.receive_some():
                return
            await stream.send_all(reply)

    return answer


async def test_nobody_listens():
    backend = client(free_ports(1))
    with pytest.raises(BackendUnavailable, match=rf"^backend {backend.name}: Connection refused$"):
        await backend.get(b"k")
    await backend.aclose()


async def test_a_host_that_does_not_exist():
    backend = ZdbBackend("host.invalid", 9900, "n", clock=FixedClock(), call_timeout=5)
    with pytest.raises(BackendUnavailable, match=r"host\.invalid"):
        await backend.get(b"k")
    await backend.aclose()


async def test_a_dead_backend_is_not_asked_again_at_once_and_is_found_when_it_returns(scratch):
    port = free_ports(1)
    backend = client(port)
    with pytest.raises(BackendUnavailable, match="refused"):
        await backend.get(b"k")
    with pytest.raises(BackendUnavailable, match="not tried again for"):
        await backend.get(b"k")
    async with trio.open_nursery() as nursery:
        options = ServeOptions(scratch / "z", port=port)
        await nursery.start(lambda task_status: serve(options, task_status=task_status))
        with trio.fail_after(60):
            while True:
                try:
                    assert await backend.get(b"k") is None
                    break
                except BackendUnavailable:
                    await trio.sleep(0.01)
        await backend.aclose()
        nursery.cancel_scope.cancel()


async def test_a_silent_backend_ends_in_its_own_timeout():
    with silent_port() as port:
        backend = client(port, call_timeout=0.2)
        with pytest.raises(BackendUnavailable, match="no answer"):
            await backend.get(b"k")
        with pytest.raises(BackendUnavailable, match="no answer"):
            async with backend.session():
                pass
        await backend.aclose()


async def test_callers_deadlines_hold_against_a_silent_backend():
    with silent_port() as port:
        backend = client(port)
        with trio.move_on_after(0.1) as scope:
            await backend.get(b"k")
        assert scope.cancelled_caught
        await backend.aclose()


async def test_a_paused_server_and_its_return(start):
    servers = start(1, separate=True)
    patient, backend = client(servers.ports[0]), client(servers.ports[0], call_timeout=0.3)
    await patient.set(b"k", b"v" * 100_000)
    servers.pause(0)
    for _ in range(4):
        with pytest.raises(BackendUnavailable):
            await backend.get(b"k")
    servers.resume(0)
    await patiently(lambda: backend.get(b"k"), b"v" * 100_000)
    await backend.aclose()
    await patient.aclose()


async def patiently(call: Callable[[], Awaitable[object]], wanted: object) -> None:
    with trio.fail_after(60):
        while True:
            try:
                assert await call() == wanted
                return
            except BackendUnavailable:
                await trio.sleep(0.01)


async def test_a_restarted_server_is_used_again_without_an_error(start):
    """The idle connections are dead; that must not fail the first call after the restart."""
    servers = start(1)
    backend = client(servers.ports[0])
    await backend.set(b"k", b"v")
    for _ in range(3):
        servers.restart()
        assert await backend.get(b"k") == b"v"
    await backend.aclose()


async def test_a_session_never_reconnects(start):
    servers = start(1)
    backend = client(servers.ports[0])
    async with backend.session() as session:
        await session.set(b"k", b"v")
        servers.restart()
        with pytest.raises(BackendUnavailable):
            await session.get(b"k")
        with pytest.raises(BackendUnavailable, match="connection is lost"):
            await session.get(b"k")
        assert await backend.get(b"k") == b"v"
    await backend.aclose()


async def test_a_cancelled_call_breaks_its_session():
    """Its answer may still come: read by the next call it would be taken for that call's."""
    asked = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        await replying()(stream)
        await stream.receive_some()
        asked.set()
        await trio.sleep_forever()

    async with scripted(answer) as port:
        backend = client(port)
        async with backend.session() as session:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.get, b"k")
                await asked.wait()
                nursery.cancel_scope.cancel()
            with pytest.raises(BackendUnavailable, match="connection is lost"):
                await session.get(b"k")
        await backend.aclose()


async def test_a_refusal_does_not_break_a_session(scratch):
    async with in_process(scratch / "z", default_maxsize=3) as ports:
        backend = client(ports[0])
        async with backend.session() as session:
            with pytest.raises(BackendFull):
                await session.set(b"k", b"1234")
            await session.set(b"k", b"123")
        await backend.aclose()


@pytest.mark.parametrize(
    "reply",
    [b":7\r\n", b"*1\r\n$1\r\nk\r\n", b"?\r\n", b"$x\r\n", b"", b"$5\r\nab", b"*999999999\r\n" * 3,
     b"*1\r\n" * 3000, b"\r\n", b"$1\r\nk\r\n+OK\r\n", b"+" + bytes(100_000), b"#f\r\n",
     b"*-2\r\n", b"$-2\r\n", b"$1\r\nkxx",
     b"*1000000\r\n" + b":1\r\n" * 1_000_000],
)  # fmt: skip
async def test_whatever_a_backend_answers_ends_as_our_error(reply):
    async with scripted(replying(reply)) as port:
        backend = client(port, call_timeout=0.5)
        with pytest.raises(BackendUnavailable):
            await backend.get(b"k")
        await backend.aclose()


@pytest.mark.parametrize("size", [0, 1, 60, 61, 62, 63, 64, 65, 1000, 300_000])
@pytest.mark.parametrize("piece", [1, 7, 64, 100_000])
async def test_a_value_comes_whole_however_it_is_cut(size, piece):
    """Each value is what was sent, byte for byte, and so is the next one over the same connection."""
    value = random.Random(size).randbytes(size)
    reply = b"$%d\r\n%b\r\n" % (size, value)
    piece = max(piece, len(reply) // 500)

    async def answer(stream: trio.SocketStream) -> None:
        for first in (b"+OK\r\n", b"$0\r\n\r\n"):
            await stream.receive_some()
            await stream.send_all(first)
        while await stream.receive_some():
            for start in range(0, len(reply), piece):
                await stream.send_all(reply[start : start + piece])
                await trio.lowlevel.checkpoint()

    async with scripted(answer) as port:
        backend = client(port)
        assert await backend.get(b"k") == value
        assert await backend.get(b"k") == value
        await backend.aclose()


@pytest.mark.parametrize(
    ("reply", "why"),
    [(b"$300\r\n" + bytes(302), "malformed"), (b"$300\r\n" + bytes(100), "middle of a reply")],
)
async def test_a_value_that_does_not_end_as_it_should_is_no_value(reply, why):
    async def answer(stream: trio.SocketStream) -> None:
        for first in (b"+OK\r\n", b"$0\r\n\r\n", reply):
            await stream.receive_some()
            await stream.send_all(first)
        await stream.aclose()

    async with scripted(answer) as port:
        backend = client(port)
        with pytest.raises(BackendUnavailable, match=why):
            await backend.get(b"k")
        await backend.aclose()


async def test_a_value_that_stops_coming_is_given_up_in_time():
    """Its connection is not used again: the rest may still come."""
    connections = 0

    async def answer(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        for first in (b"+OK\r\n", b"$0\r\n\r\n", b"$300000\r\n" + bytes(70_000)):
            await stream.receive_some()
            await stream.send_all(first)
        await trio.sleep_forever()

    async with scripted(answer) as port:
        backend = client(port, call_timeout=0.3)
        for calls in (1, 2):
            with pytest.raises(BackendUnavailable, match="no answer within"):
                await backend.get(b"k")
            assert connections == calls
        await backend.aclose()


async def test_the_next_address_of_a_name_is_tried_where_one_does_not_answer(scratch, monkeypatch):
    """Each has its own time: a name whose first address swallows all packets is reached by the second."""
    async with in_process(scratch / "z") as ports:

        async def addresses(host: str, port: int, threads: trio.CapacityLimiter) -> list[object]:
            kind = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
            return [(*kind, ("192.0.2.1", 9)), (*kind, (HOST, port))]

        async def connect(connecting: socket.socket, address: tuple[str, int]) -> None:
            if address[0] != HOST:
                await trio.sleep_forever()
            await connect_really(connecting, address)

        connect_really = link._connect
        monkeypatch.setattr(link, "_addresses", addresses)
        monkeypatch.setattr(link, "_connect", connect)
        backend = client(ports[0], connect_timeout=0.3)
        await backend.set(b"k", b"v")
        await backend.aclose()


@pytest.mark.parametrize(
    ("call", "begin", "piece"),
    [
        pytest.param("get", b"$99999999999\r\n", bytes(1 << 20), id="a value"),
        pytest.param("scan", b"*3000000\r\n", (b"+" + bytes(4000) + b"\r\n") * 100, id="lines of a list"),
        pytest.param("scan", b"*1\r\n*2000000000\r\n", b":1\r\n" * 1000, id="a list in a list"),
    ],
)
async def test_an_endless_reply_is_given_up(call: str, begin: bytes, piece: bytes):
    """Whatever is claimed costs the memory that came, and no more than any honest reply."""

    async def answer(stream: trio.SocketStream) -> None:
        await replying(begin)(stream)
        while True:
            await stream.send_all(piece)

    async with scripted(answer) as port:
        backend = client(port)
        with pytest.raises(BackendUnavailable, match="longer than any"):
            await getattr(backend, call)(*((b"k",) if call == "get" else ()))
        await backend.aclose()


async def test_what_is_closed_while_it_connects_asks_for_nothing(monkeypatch):
    """No request is sent to a backend once whoever used it has let go of it."""
    connecting, closed = trio.Event(), trio.Event()
    received = bytearray()

    async def answer(stream: trio.SocketStream) -> None:
        received.extend(await stream.receive_some())

    async def connect(under_way: socket.socket, address: object) -> None:
        connecting.set()
        await closed.wait()
        await connect_really(under_way, address)

    connect_really = link._connect
    monkeypatch.setattr(link, "_connect", connect)
    async with scripted(answer) as port:
        backend = client(port)

        async def call() -> None:
            with pytest.raises(BackendUnavailable, match="given up"):
                await backend.get(b"k")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await connecting.wait()
            await backend.aclose()
            closed.set()
    assert not received


@pytest.mark.parametrize(
    ("call", "reply"),
    [
        ("set", b"$5\r\nother\r\n"),
        ("exists", b":2\r\n"),
        ("exists", b"$-1\r\n"),
        ("check", b":5\r\n"),
        ("check", b":-1\r\n"),
        ("scan", b":1\r\n"),
        ("scan", b"*2\r\n$1\r\nc\r\n*1\r\n$1\r\nk\r\n"),
        ("rscan", b"$-1\r\n"),
        ("info", b"$5\r\nhello\r\n"),
        ("info", b":1\r\n"),
    ],
)
async def test_senseless_answers_are_unknown_not_absent(call, reply):
    async with scripted(replying(reply)) as port:
        backend = client(port)
        arguments = {"set": (b"k", b"v"), "scan": (), "rscan": (), "info": ()}.get(call, (b"k",))
        with pytest.raises(BackendUnavailable):
            await getattr(backend, call)(*arguments)
        await backend.aclose()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("Cannot write data right now", BackendUnavailable),
        ("Cannot write index right now", BackendUnavailable),
        ("Cannot delete key (data)", BackendUnavailable),
        ("Internal Error", BackendUnavailable),
        ("Internal Server Error", BackendUnavailable),
        ("Namespace is temporarily locked (read-only)", BackendUnavailable),
        ("Namespace is temporarily frozen (read-write disabled)", BackendUnavailable),
        ("Your active namespace is not available anymore (probably removed).", BackendUnavailable),
        ("No space left on this namespace", BackendFull),
        ("Permission denied", BackendRefused),
        ("Access denied", BackendRefused),
        ("Namespace is in read-only mode", BackendRefused),
        ("Namespace is protected by worm mode", BackendRefused),
        ("Cannot delete a key when namespace is in worm mode", BackendRefused),
        ("Key too large", BackendRefused),
        ("Payload too big", BackendRefused),
        ("Namespace not found", BackendRefused),
        ("Command not supported", BackendRefused),
    ],
)
def test_what_each_answer_means(text, error):
    made = backend_error("host:1/n", text)
    assert type(made) is error
    assert "host:1/n" in str(made)
    assert text in str(made)


async def test_it_speaks_nothing_but_0_db():
    """No HELLO, CLIENT or QUIT, and the namespace by name: that is all that a 0-db knows."""
    received = bytearray()

    async def answer(stream: trio.SocketStream) -> None:
        for reply in (b"+OK\r\n", b"$0\r\n\r\n", b"$-1\r\n", b""):
            received.extend(await stream.receive_some())
            await stream.send_all(reply)

    async with scripted(answer) as port:
        backend = client(port, "space")
        await backend.get(b"k")
        await backend.aclose()
    assert received == encode("SELECT", "space") + encode("NSINFO", "space") + encode("GET", "k")


async def test_a_sequential_namespace_is_refused():
    async def answer(stream: trio.SocketStream) -> None:
        for reply in (OK, bulk(b"# namespace\nname: n\nmode: sequential\n")):
            await stream.receive_some()
            await stream.send_all(reply)

    async with scripted(answer) as port:
        backend = client(port, "n")
        with pytest.raises(BackendRefused, match="sequential"):
            await backend.get(b"k")
        await backend.aclose()


async def test_passwords_never_cross_the_wire():
    received = bytearray()

    async def answer(stream: trio.SocketStream) -> None:
        for reply in (b"+0123456789abcdef\r\n", b"+OK\r\n") * 2 + (b"$0\r\n\r\n", b"$-1\r\n"):
            received.extend(await stream.receive_some())
            await stream.send_all(reply)

    async with scripted(answer) as port:
        backend = client(port, "n", password="geheim", admin_password="streng")
        await backend.get(b"k")
        await backend.aclose()
    assert b"SECURE" in received
    assert b"geheim" not in received
    assert b"streng" not in received


async def test_rights(scratch):
    async with in_process(scratch / "z") as ports, wire(ports[0]) as admin:
        await admin.ask("NSNEW", "n")
        await admin.ask("NSSET", "n", "password", "p")
        right, wrong, none = (client(ports[0], "n", password=word) for word in ("p", "q", ""))
        await right.set(b"k", b"v")
        with pytest.raises(BackendRefused, match="Access denied"):
            await wrong.get(b"k")
        assert await none.get(b"k") == b"v"
        with pytest.raises(BackendRefused, match="read-only"):
            await none.set(b"k", b"w")
        with pytest.raises(BackendRefused, match="Namespace not found"):
            await client(ports[0], "missing").get(b"k")
        await admin.ask("NSSET", "n", "lock", "1")
        with pytest.raises(BackendUnavailable, match="temporarily locked"):
            await right.set(b"k", b"w")
        assert (await right.info()).locked
        for backend in (right, wrong, none):
            await backend.aclose()


async def test_a_namespace_that_is_deleted_and_made_again(scratch):
    async with in_process(scratch / "z") as ports, wire(ports[0]) as admin:
        await admin.ask("NSNEW", "n")
        backend = client(ports[0], "n")
        await backend.set(b"k", b"v")
        await admin.ask("NSDEL", "n")
        with pytest.raises(BackendUnavailable, match="not available anymore"):
            await backend.get(b"k")
        await admin.ask("NSNEW", "n")
        await patiently(lambda: backend.get(b"k"), None)
        await backend.aclose()


async def test_a_full_disk_is_a_passing_fault_and_reads_go_on(scratch, monkeypatch, expect_log):
    expect_log("cannot write")
    async with in_process(scratch / "z") as ports:
        backend = client(ports[0])
        await backend.set(b"k", b"v")

        def full(*arguments: object) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", full)
            with pytest.raises(BackendUnavailable, match="Cannot write data right now"):
                await backend.set(b"l", b"v")
            with pytest.raises(BackendUnavailable, match="Cannot delete"):
                await backend.delete(b"k")
        assert await backend.get(b"k") == b"v"
        assert await backend.get(b"l") is None
        await backend.aclose()


async def test_no_more_connections_than_allowed(scratch):
    connections = 0

    async def answer(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        while received := await stream.receive_some():
            await stream.send_all(bulk(b"") if b"NSINFO" in received else NIL)

    async with scripted(answer) as port:
        backend = client(port, connections=2)
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(backend.get, b"%d" % number)
        assert connections == 2
        await backend.aclose()


def config(port: int, **settings: object) -> BackendConfig:
    return BackendConfig(address=f"{HOST}:{port}", namespace="fs", **settings)


async def test_the_control_namespace_is_made_private_and_found_again(scratch):
    async with in_process(scratch / "z", admin_password="root") as ports:
        settings = config(ports[0], password="p", admin_password="root")
        assert await create_namespace(settings, maxsize=1000)
        for _ in range(2):
            assert await create_control_namespace(settings) == "fs" + CONTROL_SUFFIX
        main, control = open_backend(settings), open_control(settings, "fs" + CONTROL_SUFFIX)
        await control.set(b"head", b"1")
        assert await main.get(b"head") is None
        assert (await main.info()).limit_bytes == 1000
        with pytest.raises(BackendRefused, match="private"):
            await client(ports[0], "fs" + CONTROL_SUFFIX).get(b"head")
        for backend in (main, control):
            await backend.aclose()


async def test_without_the_right_to_make_one_the_main_namespace_serves(scratch):
    async with in_process(scratch / "z", admin_password="root") as ports:
        async with wire(ports[0]) as admin:
            await admin.ask("AUTH", "root")
            await admin.ask("NSNEW", "fs")
        assert await create_control_namespace(config(ports[0])) == ""
        control = open_control(config(ports[0]), "")
        await control.set(b"head", b"1")
        main = open_backend(config(ports[0]))
        assert await main.get(b"head") == b"1"
        for backend in (main, control):
            await backend.aclose()


async def test_a_control_namespace_of_someone_else_is_not_taken(scratch):
    async with in_process(scratch / "z") as ports, wire(ports[0]) as admin:
        await admin.ask("NSNEW", "fs" + CONTROL_SUFFIX)
        await admin.ask("NSSET", "fs" + CONTROL_SUFFIX, "password", "theirs")
        assert await create_control_namespace(config(ports[0], password="ours")) == ""
        assert await create_control_namespace(config(ports[0])) == ""


async def test_a_namespace_left_without_its_password_by_a_crash_gets_it(scratch):
    async with in_process(scratch / "z") as ports, wire(ports[0]) as admin:
        await admin.ask("NSNEW", "fs" + CONTROL_SUFFIX)
        assert await create_control_namespace(config(ports[0], password="ours")) == "fs" + CONTROL_SUFFIX
        assert b"password: yes" in await admin.ask("NSINFO", "fs" + CONTROL_SUFFIX)


async def test_making_namespaces_tells_apart_unreachable_and_refused(scratch):
    with pytest.raises(BackendUnavailable):
        await create_control_namespace(config(free_ports(1)))
    async with in_process(scratch / "z", admin_password="root") as ports:
        with pytest.raises(BackendRefused, match="Access denied"):
            await create_namespace(config(ports[0], admin_password="wrong"))


async def test_an_ipv6_address_is_named_in_brackets():
    assert ZdbBackend("::1", 9900, "n", clock=FixedClock()).name == "[::1]:9900/n"


async def test_a_server_over_ipv6(scratch):
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    async with in_process(scratch / "z", listen="::1") as ports:
        backend = open_backend(BackendConfig(address=f"[::1]:{ports[0]}", namespace="default"))
        await backend.set(b"k", b"v")
        assert await backend.get(b"k") == b"v"
        await backend.aclose()


def test_servers_give_configurations(scratch: Path):
    servers = Servers(scratch / "z", 2)
    assert [one.port for one in servers.configs()] == servers.ports
    assert servers.toml().count("[[backend]]") == 2
