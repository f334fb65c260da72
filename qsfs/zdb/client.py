"""What the server knows of one connection."""

from __future__ import annotations

from dataclasses import dataclass

from qsfs.zdb.instance import Instance
from qsfs.zdb.namespace import Namespace
from qsfs.zdb.protocol import Argument


@dataclass
class Client:
    """One connection: where it is, and what it may do."""

    instance: Instance
    namespace: Namespace
    admin: bool
    writable: bool = True
    nonce: bytes = b""


class CommandError(Exception):
    """Ends a command with an error reply: the message as 0-db words it, without the dash."""


def exactly(arguments: list[Argument], count: int, *, empty_allowed: bool = False) -> None:
    """Refuses any other number of arguments (the command included), and empty ones."""
    if len(arguments) != count:
        raise CommandError("Unexpected arguments")
    if not empty_allowed and not all(len(argument) for argument in arguments):
        raise CommandError("Invalid argument")


def need_admin(client: Client) -> None:
    """Refuses clients that are not admin."""
    if not client.admin:
        client.instance.counters.unauthorized += 1
        raise CommandError("Permission denied")
