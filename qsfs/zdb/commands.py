"""The table of commands and how a request finds its handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from qsfs.zdb import commands_auth, commands_data, commands_namespace, commands_system
from qsfs.zdb.client import Client, CommandError
from qsfs.zdb.protocol import Argument, error

Reply = bytes | tuple[bytes, bytes | bytearray, bytes]
"""An encoded reply, or the pieces of a bulk reply whose value need not be copied."""

Handler = Callable[[Client, list[Argument]], Awaitable[Reply]]

NAMESPACE_GONE = "Your active namespace is not available anymore (probably removed)."

COMMANDS: tuple[tuple[bytes, Handler], ...] = (
    (b"*", commands_system.not_a_command),
    (b"WAIT", commands_system.unsupported),
    (b"MIRROR", commands_system.unsupported),
    (b"MASTER", commands_system.unsupported),
    (b"PING", commands_system.ping),
    (b"TIME", commands_system.time),
    (b"AUTH", commands_auth.auth),
    (b"HOOKS", commands_system.unsupported),
    (b"INDEX", commands_system.unsupported),
    (b"DATA", commands_system.unsupported),
    (b"SET", commands_data.set_value),
    (b"SETX", commands_data.set_value),
    (b"GET", commands_data.get),
    (b"MGET", commands_data.get_many),
    (b"DEL", commands_data.delete),
    (b"EXISTS", commands_data.exists),
    (b"CHECK", commands_data.check),
    (b"SCAN", commands_data.scan),
    (b"SCANX", commands_data.scan),
    (b"RSCAN", commands_data.scan_backwards),
    (b"KSCAN", commands_system.disabled),
    (b"HISTORY", commands_system.unsupported),
    (b"KEYCUR", commands_data.key_cursor),
    (b"LENGTH", commands_data.length),
    (b"KEYTIME", commands_data.key_time),
    (b"INFO", commands_system.info),
    (b"STOP", commands_system.unauthorized),
    (b"DBSIZE", commands_data.database_size),
    (b"NSNEW", commands_namespace.create),
    (b"NSDEL", commands_namespace.remove),
    (b"NSLIST", commands_namespace.list_names),
    (b"NSSET", commands_namespace.change),
    (b"NSINFO", commands_namespace.describe),
    (b"NSJUMP", commands_system.unsupported),
    (b"SELECT", commands_namespace.select),
    (b"RELOAD", commands_system.unsupported),
    (b"FLUSH", commands_system.unsupported),
)
"""In 0-db's order: a client may send any prefix of a name, and the first that matches is meant."""

_exact = dict(COMMANDS)


def find(name: bytes) -> Handler | None:
    """The handler that `name`, in any case and possibly cut short, stands for."""
    name = name.upper()
    handler = _exact.get(name)
    if handler is not None:
        return handler
    return next((handler for command, handler in COMMANDS if command.startswith(name)), None)


async def execute(client: Client, arguments: list[Argument]) -> Reply | None:
    """The reply to a request; `None` if the client's namespace is gone and it must be dropped."""
    counters = client.instance.counters
    if client.namespace.deleted:
        return None
    handler = find(bytes(arguments[0]))
    if handler is None:
        counters.failed += 1
        return error("Command not supported")
    counters.executed += 1
    try:
        return await handler(client, arguments)
    except CommandError as refusal:
        counters.failed += 1
        return error(str(refusal))
