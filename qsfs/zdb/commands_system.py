"""PING, TIME, INFO and the commands that are refused."""

from __future__ import annotations

from qsfs import __version__
from qsfs.zdb.client import Client, CommandError
from qsfs.zdb.protocol import Argument, array, bulk, simple
from qsfs.zdb.record import FORMAT_VERSION

_MEBI = 1024 * 1024


async def ping(client: Client, arguments: list[Argument]) -> bytes:
    """PING."""
    return simple(b"PONG")


async def time(client: Client, arguments: list[Argument]) -> bytes:
    """TIME: seconds and microseconds, as strings."""
    seconds, rest = divmod(client.instance.clock.time_ns(), 1_000_000_000)
    return array((bulk(b"%d" % seconds), bulk(b"%d" % (rest // 1000))))


async def info(client: Client, arguments: list[Argument]) -> bytes:
    """INFO: `key: value` lines in sections."""
    instance, counters = client.instance, client.instance.counters
    now_s = instance.clock.time_ns() // 1_000_000_000
    namespaces = instance.namespaces.values()
    sections: dict[str, dict[str, object]] = {
        "server": {
            "server_name": "0-db (zdb)",
            "server_revision": f"qsfs-{__version__}",
            "engine_revision": f"qsfs-{__version__}",
            "instance_id": instance.identity,
            "boot_time": instance.started_s,
            "uptime": now_s - instance.started_s,
        },
        "clients": {"clients_lifetime": counters.clients},
        "internals": {
            "sequential_key_size": 8,
            "data_version": FORMAT_VERSION,
            "index_version": FORMAT_VERSION,
        },
        "stats": {
            "commands_executed": counters.executed,
            "commands_failed": counters.failed,
            "commands_unauthorized": counters.unauthorized,
            "index_disk_read_failed": 0,
            "index_disk_write_failed": 0,
            "data_disk_read_failed": sum(namespace.read_failures for namespace in namespaces),
            "data_disk_write_failed": sum(namespace.write_failures for namespace in namespaces),
            **_volume("index_disk_read", 0),
            **_volume("index_disk_write", 0),
            **_volume("data_disk_read", counters.read_bytes),
            **_volume("data_disk_write", counters.written_bytes),
            **_volume("network_rx", counters.received_bytes),
            **_volume("network_tx", counters.sent_bytes),
        },
    }
    text = "\n".join(
        f"# {title}\n" + "".join(f"{name}: {value}\n" for name, value in lines.items())
        for title, lines in sections.items()
    )
    return bulk(text.encode())


async def not_a_command(client: Client, arguments: list[Argument]) -> bytes:
    """The empty command."""
    raise CommandError("This is not a valid command")


async def unsupported(client: Client, arguments: list[Argument]) -> bytes:
    """A command of 0-db that this server does not have."""
    raise CommandError("Command not supported")


async def disabled(client: Client, arguments: list[Argument]) -> bytes:
    """KSCAN, as 0-db's release builds answer it."""
    raise CommandError("Command disabled in release code, not yet available")


async def unauthorized(client: Client, arguments: list[Argument]) -> bytes:
    """STOP, as 0-db's release builds answer it."""
    raise CommandError("Unauthorized")


def _volume(name: str, count: int) -> dict[str, object]:
    return {f"{name}_bytes": count, f"{name}_mb": f"{count / _MEBI:.2f}"}
