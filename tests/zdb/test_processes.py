"""The server as a process: killed, terminated, restarted, besieged."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
import trio

from qsfs.clock import FixedClock
from qsfs.errors import ConfigError
from qsfs.zdb.instance import Instance, InstanceOptions
from qsfs.zdb.server import ServeOptions, open_server
from tests.support.backends import in_process
from tests.zdb.wire import ErrorReply, encode, wire


async def test_what_was_acknowledged_is_there_after_sigkill(start):
    """Killed in the midst of stores from several clients, at several moments."""
    servers = start(sync=True, datasize=1 << 20)
    acknowledged: dict[bytes, bytes] = {}

    async def store(number: int, kill_after: int) -> None:
        try:
            async with wire(servers.ports[0]) as client:
                for turn in range(kill_after):
                    key, value = b"%d/%d" % (number, turn % 7), b"%d " % turn * 3000
                    await client.send(encode("SET", key, value))
                    acknowledged.pop(key, None)
                    assert await client.read() in (key, None)
                    acknowledged[key] = value
            servers.kill()
        except (OSError, EOFError, trio.BrokenResourceError):
            pass

    for kill_after in (3, 20, 45):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(store, number, kill_after + 5 * number)
        servers.restart()
        async with wire(servers.ports[0]) as client:
            for key, value in acknowledged.items():
                assert await client.ask("GET", key) == value
                assert await client.ask("CHECK", key) == 1


async def test_a_synced_store_is_answered_only_after_the_fsync(scratch, monkeypatch):
    release = threading.Event()
    real = os.fdatasync

    def slow(descriptor: int) -> None:
        assert release.wait(60)
        real(descriptor)

    async with in_process(scratch / "z", sync=True) as ports, wire(ports[0]) as client:
        monkeypatch.setattr(os, "fdatasync", slow)
        async with wire(ports[0]) as other:
            for request in (("SET", "k", "v"), ("DEL", "k")):
                release.clear()
                await client.send(encode(*request))
                while await other.ask("EXISTS", "k") != (request[0] == "SET"):
                    pass
                with trio.move_on_after(0.05) as waited:
                    await client.read()
                assert waited.cancelled_caught, "answered before it was on the disk"
                release.set()
                assert await client.read() in (b"k", "OK")


async def test_sigterm_ends_in_order_and_everything_is_there_again(start):
    servers = start(3)
    for number, port in enumerate(servers.ports):
        async with wire(port) as client:
            await client.ask("SET", "k", str(number) * 300_000)
    assert servers.stop() == [0]
    assert "Traceback" not in servers.log()
    servers.start()
    for number, port in enumerate(servers.ports):
        async with wire(port) as client:
            assert await client.ask("GET", "k") == str(number).encode() * 300_000


async def test_a_single_instance_can_be_killed_and_paused(start):
    servers = start(2, separate=True)
    servers.kill(0)
    with pytest.raises(OSError):
        async with wire(servers.ports[0]):
            pass
    async with wire(servers.ports[1]) as client:
        assert await client.ask("PING") == "PONG"
        servers.pause(1)
        await client.send(encode("PING"))
        with trio.move_on_after(0.05) as waited:
            await client.read()
        assert waited.cancelled_caught
        servers.resume(1)
        assert await client.read() == "PONG"
    servers.start(0)
    async with wire(servers.ports[0]) as client:
        assert await client.ask("PING") == "PONG"


def test_a_directory_has_one_server_at_a_time(scratch):
    instance = Instance.open(scratch / "i", InstanceOptions(), FixedClock())
    with pytest.raises(ConfigError, match="in use by another server"):
        Instance.open(scratch / "i", InstanceOptions(), FixedClock())
    instance.close()
    Instance.open(scratch / "i", InstanceOptions(), FixedClock()).close()


async def test_a_port_in_use_is_refused_by_name_and_leaves_nothing_open(scratch):
    async with in_process(scratch / "one") as ports:
        options = ServeOptions(scratch / "two", port=ports[0])
        with pytest.raises(ConfigError, match=str(ports[0])):
            async with open_server(options, FixedClock()):
                pass
    async with open_server(options, FixedClock()) as server:
        assert server.ports == [ports[0]]


@pytest.mark.parametrize(
    "settings",
    [{"instances": 0}, {"port": 65535, "instances": 2}, {"datasize": 1000}, {"default_maxsize": -1}],
)
def test_options_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError):
        ServeOptions(Path("data"), **settings)


async def test_the_server_holds_no_values(start):
    """Memory must not grow with what is stored, only with how many keys there are."""
    servers = start()
    status = Path(f"/proc/{servers._processes[0].pid}/status")

    def resident() -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    async with wire(servers.ports[0]) as client:
        for number in range(20):
            await client.ask("SET", str(number), bytes([number]) * 1_000_000)
        before = resident()
        for number in range(20, 100):
            await client.ask("SET", str(number), bytes([number]) * 1_000_000)
            await client.ask("GET", str(number))
        assert resident() - before < 8_000_000


async def test_no_bytes_whatsoever_bring_it_down(port):
    draw = random.Random(7)
    words = [b"SET", b"GET", b"SCAN", b"NSSET", b"AUTH", b"SELECT", b"MGET", b"", b"\xff", b"SECURE"]
    for turn in range(200):
        async with wire(port) as client:
            if turn % 2:
                content = draw.randbytes(draw.randrange(1, 300))
            else:
                content = encode(*draw.choices(words, k=draw.randrange(1, 6)))
                content = bytearray(content * 3)
                content[draw.randrange(len(content))] = draw.randrange(256)
            await client.send(bytes(content))
    async with wire(port) as client:
        assert await client.ask("PING") == "PONG"


async def test_clients_that_vanish_in_the_middle_of_a_value_do_no_harm(port):
    for size in (10, 100_000, 999_999):
        async with wire(port) as client:
            await client.send(encode("SET", "k", bytes(1_000_000))[:size])
    async with wire(port) as client:
        assert await client.ask("GET", "k") is None
        assert await client.ask("DBSIZE") == 0


async def test_a_client_that_does_not_read_holds_up_no_other(port):
    async with wire(port) as lazy, wire(port) as client:
        await lazy.ask("SET", "k", bytes(1_000_000))
        await lazy.send(encode("GET", "k") * 100)
        for _ in range(100):
            assert await client.ask("PING") == "PONG"
        assert await client.ask("GET", "no") is None


async def test_deleting_a_namespace_while_it_is_read_and_written(port):
    requests = (("SET", "k", bytes(300_000)), ("GET", "k"), ("CHECK", "k"), ("DEL", "k"))
    gone = "Your active namespace is not available anymore (probably removed)."
    for _ in range(5):
        async with trio.open_nursery() as nursery, wire(port) as admin:
            await admin.ask("NSNEW", "n")

            async def use(task_status: trio.TaskStatus[None]) -> None:
                async with wire(port) as client:
                    await client.ask("SELECT", "n")
                    task_status.started()
                    while True:
                        for request in requests:
                            reply = await client.ask(*request)
                            if isinstance(reply, ErrorReply) and reply == gone:
                                return

            for _ in range(3):
                await nursery.start(use)
            assert await admin.ask("NSDEL", "n") == "OK"
