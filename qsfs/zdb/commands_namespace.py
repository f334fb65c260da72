"""Commands on namespaces: create, delete, list, describe, change, enter."""

from __future__ import annotations

from collections.abc import Callable

from qsfs.zdb.client import Client, CommandError, exactly, need_admin
from qsfs.zdb.commands_auth import digest_matches
from qsfs.zdb.commands_data import parse_number
from qsfs.zdb.instance import DEFAULT, MAX_NAME_BYTES
from qsfs.zdb.namespace import Namespace
from qsfs.zdb.protocol import OK, Argument, array, bulk
from qsfs.zdb.settings import Settings

MAX_PROPERTY_BYTES = 256
MAX_PROPERTY_VALUE_BYTES = 63
MAX_PASSWORD_BYTES = 255
_MEBI = 1024 * 1024


async def create(client: Client, arguments: list[Argument]) -> bytes:
    """NSNEW: name."""
    need_admin(client)
    exactly(arguments, 2)
    name = _name(arguments[1])
    if not client.instance.is_valid_name(name):
        raise CommandError("This name is not allowed")
    if client.instance.is_taken(name):
        raise CommandError("This namespace is not available")
    try:
        client.instance.create(name)
    except OSError:
        raise CommandError("Could not create namespace") from None
    return OK


async def remove(client: Client, arguments: list[Argument]) -> bytes:
    """NSDEL: name.  Frees its disk space; other clients in it are told at their next command."""
    need_admin(client)
    exactly(arguments, 2)
    name = _name(arguments[1])
    if name == DEFAULT:
        raise CommandError("Cannot remove default namespace")
    namespace = client.instance.namespaces.get(name)
    if namespace is None:
        raise CommandError("This namespace doesn't exists")
    if namespace is client.namespace:
        raise CommandError("Cannot remove namespace you're currently using.")
    try:
        await client.instance.remove(name)
    except OSError:
        raise CommandError("Could not delete this namespace") from None
    return OK


async def list_names(client: Client, arguments: list[Argument]) -> bytes:
    """NSLIST: all names."""
    return array(bulk(name) for name in client.instance.namespaces)


async def describe(client: Client, arguments: list[Argument]) -> bytes:
    """NSINFO: name.  `key: value` lines."""
    exactly(arguments, 2)
    namespace = _existing(client, arguments[1])
    settings, index = namespace.settings, namespace.index
    lines: list[tuple[str, object]] = [
        ("name", namespace.name.decode("latin-1")),
        ("entries", len(index)),
        ("public", _yes(settings.public)),
        ("worm", _yes(settings.worm)),
        ("locked", _yes(namespace.locked or namespace.frozen)),
        ("password", _yes(bool(settings.password))),
        ("data_size_bytes", index.data_bytes),
        ("data_size_mb", f"{index.data_bytes / _MEBI:.2f}"),
        ("data_limits_bytes", settings.maxsize),
        ("index_size_bytes", index.memory_bytes),
        ("index_size_kb", f"{index.memory_bytes / 1024:.2f}"),
        ("next_internal_id", f"0x{int.from_bytes(index.stored.to_bytes(8, 'little'), 'big'):08x}"),
        ("mode", "userkey"),
        ("stats_index_io_errors", 0),
        ("stats_index_io_error_last", 0),
        ("stats_index_faults", 0),
        ("stats_data_io_errors", namespace.read_failures + namespace.write_failures),
        (
            "stats_data_io_error_last",
            max(namespace.last_read_failure_s, namespace.last_write_failure_s),
        ),
        ("stats_data_faults", 0),
    ]
    if settings.maxsize:
        lines.append(("space_available", max(0, settings.maxsize - index.data_bytes)))
    lines += _disk_lines(namespace)
    if client.admin:
        lines += [
            ("data_path", namespace.directory),
            ("data_active", f"d{namespace.active_file}"),
            ("index_path", namespace.directory),
            ("index_active", "memory"),
            ("data_current_id", namespace.active_file),
            ("data_current_offset", namespace.active_size),
        ]
    text = "# namespace\n" + "".join(f"{name}: {value}\n" for name, value in lines)
    return bulk(text.encode("latin-1", "replace"))


async def change(client: Client, arguments: list[Argument]) -> bytes:
    """NSSET: name property value."""
    need_admin(client)
    exactly(arguments, 4)
    name = _name(arguments[1])
    if len(arguments[2]) > MAX_PROPERTY_BYTES or len(arguments[3]) > MAX_PROPERTY_VALUE_BYTES:
        raise CommandError("Argument too long")
    prop, value = bytes(arguments[2]), bytes(arguments[3])
    namespace = client.instance.namespaces.get(name)
    if namespace is None:
        raise CommandError("Namespace not found")
    if prop in (b"lock", b"freeze"):
        on = value[:1] == b"1"
        namespace.locked = on and prop == b"lock"
        namespace.frozen = on and prop == b"freeze"
        return OK
    if prop == b"mode":
        if value not in (b"user", b"seq"):
            raise CommandError("Invalid property value (expected: user, seq)")
        raise CommandError("This server instance is configured to use a single runtime mode")
    if name == DEFAULT:
        raise CommandError("Cannot update default namespace")
    try:
        namespace.change_settings(_settings_change(prop, value))
    except OSError:
        raise CommandError("Internal Error") from None
    return OK


async def select(client: Client, arguments: list[Argument]) -> bytes:
    """SELECT: name [password | SECURE digest]."""
    if len(arguments) < 2:
        raise CommandError("Invalid argument")
    namespace = _existing(client, arguments[1])
    writable = True
    if namespace.password:
        writable = _may_write(client, namespace, arguments)
    client.namespace = namespace
    client.writable = writable
    return OK


def _may_write(client: Client, namespace: Namespace, arguments: list[Argument]) -> bool:
    if len(arguments) > 4:
        raise CommandError("Too many arguments")
    if len(arguments) == 2:
        if not namespace.settings.public:
            raise CommandError("Namespace protected and private")
        return False
    if len(arguments) == 4:
        if bytes(arguments[2]).upper() != b"SECURE":
            raise CommandError("Only SECURE extra method supported")
        granted = digest_matches(client, bytes(arguments[3]), namespace.password)
    else:
        if len(arguments[2]) > MAX_PASSWORD_BYTES:
            raise CommandError("Password too long")
        granted = namespace.password_is(bytes(arguments[2]))
    if not granted:
        raise CommandError("Access denied")
    return True


def _settings_change(prop: bytes, value: bytes) -> Callable[[Settings], None]:
    fields: dict[bytes, tuple[str, object]] = {
        b"maxsize": ("maxsize", max(0, parse_number(value))),
        b"password": ("password", "" if value == b"*" else value.decode("latin-1")),
        b"public": ("public", value[:1] == b"1"),
        b"worm": ("worm", value[:1] == b"1"),
    }
    if prop not in fields:
        raise CommandError("Invalid property")
    name, setting = fields[prop]
    return lambda settings: setattr(settings, name, setting)


def _disk_lines(namespace: Namespace) -> list[tuple[str, object]]:
    try:
        free = namespace.disk_free_bytes()
    except OSError:
        return []
    return [
        (f"{part}_disk_freespace_{unit}", text)
        for part in ("index", "data")
        for unit, text in (("bytes", str(free)), ("mb", f"{free / _MEBI:.2f}"))
    ]


def _name(argument: Argument) -> bytes:
    if len(argument) > MAX_NAME_BYTES:
        raise CommandError("Namespace too long")
    return bytes(argument)


def _existing(client: Client, argument: Argument) -> Namespace:
    namespace = client.instance.namespaces.get(_name(argument))
    if namespace is None:
        raise CommandError("Namespace not found")
    return namespace


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
