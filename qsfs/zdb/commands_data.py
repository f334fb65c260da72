"""Commands on the keys of the active namespace, with 0-db's checks in 0-db's order."""

from __future__ import annotations

import re
from itertools import islice

import xxhash

from qsfs.zdb.client import Client, CommandError, exactly
from qsfs.zdb.index import Entry, Place
from qsfs.zdb.namespace import Namespace, QuotaExceeded, ReadFailed, WriteFailed
from qsfs.zdb.protocol import NIL, OK, Argument, array, bulk, integer

MAX_KEY_BYTES = 255
SCAN_ENTRIES = 500
"""Most entries of one SCAN reply; 0-db bounds the time instead."""

CURSOR_BYTES = 17


async def set_value(client: Client, arguments: list[Argument]) -> bytes:
    """SET, SETX: key value [timestamp].  The key; nil if this very value is stored already."""
    time_s = None
    if len(arguments) == 4:
        if not client.admin:
            client.instance.counters.unauthorized += 1
            raise CommandError("Permission denied")
        time_s = parse_number(arguments[3])
    else:
        exactly(arguments, 3, empty_allowed=True)
    key, value = bytes(arguments[1]), arguments[2]
    if len(key) > MAX_KEY_BYTES:
        raise CommandError("Key too large")
    namespace = _writable(client)
    if namespace.settings.worm and namespace.index.get(key) is not None:
        raise CommandError("Namespace is protected by worm mode")
    if not namespace.has_room(key, len(value)):
        raise CommandError("No space left on this namespace")
    if not key:
        raise CommandError("Invalid argument, key needed")
    try:
        stored = await namespace.put(key, value, time_s)
    except QuotaExceeded:
        raise CommandError("No space left on this namespace") from None
    except WriteFailed:
        raise CommandError("Cannot write data right now") from None
    if not stored:
        return NIL
    client.instance.counters.written_bytes += len(value)
    if namespace.has_unsealed:
        client.instance.wake()
    return bulk(key)


async def get(client: Client, arguments: list[Argument]) -> bytes | tuple[bytes, bytes | bytearray, bytes]:
    """GET: key.  The value as it lies on the disk, unchecked; nil if absent."""
    entry = _lookup(client, arguments)
    if entry is None:
        return NIL
    try:
        value = await client.namespace.value(entry)
    except ReadFailed:
        raise CommandError("Internal Error") from None
    client.instance.counters.read_bytes += len(value)
    return b"$%d\r\n" % len(value), value, b"\r\n"


async def get_many(client: Client, arguments: list[Argument]) -> bytes:
    """MGET: key...  An array of what GET would answer for each."""
    if len(arguments) < 2:
        raise CommandError("Invalid arguments")
    if any(not 1 <= len(key) <= MAX_KEY_BYTES for key in arguments[1:]):
        raise CommandError("Invalid key")
    _readable(client)
    items = []
    for key in arguments[1:]:
        entry = client.namespace.index.get(bytes(key))
        if entry is None:
            items.append(NIL)
            continue
        try:
            items.append(bulk(memoryview(await client.namespace.value(entry))))
        except ReadFailed:
            items.append(b"-Internal Error\r\n")
    return array(items)


async def delete(client: Client, arguments: list[Argument]) -> bytes:
    """DEL: key."""
    exactly(arguments, 2)
    key = _key(arguments[1])
    namespace = _writable(client)
    if namespace.index.get(key) is None:
        raise CommandError("Key not found")
    if namespace.settings.worm:
        raise CommandError("Cannot delete a key when namespace is in worm mode")
    try:
        await namespace.delete(key)
    except WriteFailed:
        raise CommandError("Cannot delete key (data)") from None
    if namespace.has_unsealed:
        client.instance.wake()
    return OK


async def exists(client: Client, arguments: list[Argument]) -> bytes:
    """EXISTS: key.  1 or 0."""
    return integer(0 if _lookup(client, arguments) is None else 1)


async def check(client: Client, arguments: list[Argument]) -> bytes:
    """CHECK: key.  1 if the stored bytes match their checksum, 0 if not, -1 if unreadable; nil if absent."""
    entry = _lookup(client, arguments)
    if entry is None:
        return NIL
    try:
        return integer(1 if await client.namespace.is_whole(entry) else 0)
    except ReadFailed:
        return integer(-1)


async def length(client: Client, arguments: list[Argument]) -> bytes:
    """LENGTH: key.  Bytes of the value; nil if absent."""
    entry = _lookup(client, arguments)
    return NIL if entry is None else integer(entry.length)


async def key_time(client: Client, arguments: list[Argument]) -> bytes:
    """KEYTIME: key.  When it was stored, in Unix seconds; nil if absent."""
    entry = _lookup(client, arguments)
    return NIL if entry is None else integer(entry.time_s)


async def key_cursor(client: Client, arguments: list[Argument]) -> bytes:
    """KEYCUR: key.  The cursor at which a scan goes on behind the key."""
    entry = _lookup(client, arguments)
    if entry is None:
        raise CommandError("Key not found")
    return bulk(_encode_cursor(client.namespace, entry))


async def scan(client: Client, arguments: list[Argument]) -> bytes:
    """SCAN, SCANX: [cursor].  `[cursor, [[key, length, time], ...]]`, oldest first."""
    place = _scan_start(client, arguments)
    return _page(client, list(islice(client.namespace.index.after(place), SCAN_ENTRIES)))


async def scan_backwards(client: Client, arguments: list[Argument]) -> bytes:
    """RSCAN: [cursor].  As SCAN, newest first."""
    place = _scan_start(client, arguments)
    return _page(client, list(islice(client.namespace.index.before(place), SCAN_ENTRIES)))


async def database_size(client: Client, arguments: list[Argument]) -> bytes:
    """DBSIZE: how many keys are live, also while frozen."""
    return integer(len(client.namespace.index))


def parse_number(argument: Argument) -> int:
    """A decimal number as C's `atoll` reads it: what follows the digits is ignored, garbage is 0."""
    match = re.match(rb"\s*([+-]?\d+)", bytes(argument))
    return int(match[1]) if match else 0


def _key(argument: Argument) -> bytes:
    if len(argument) > MAX_KEY_BYTES:
        raise CommandError("Invalid key")
    return bytes(argument)


def _lookup(client: Client, arguments: list[Argument]) -> Entry | None:
    exactly(arguments, 2)
    key = _key(arguments[1])
    _readable(client)
    return client.namespace.index.get(key)


def _readable(client: Client) -> None:
    if client.namespace.frozen:
        raise CommandError("Namespace is temporarily frozen (read-write disabled)")


def _writable(client: Client) -> Namespace:
    if not client.writable:
        raise CommandError("Namespace is in read-only mode")
    _readable(client)
    if client.namespace.locked:
        raise CommandError("Namespace is temporarily locked (read-only)")
    return client.namespace


def _scan_start(client: Client, arguments: list[Argument]) -> Place | None:
    _readable(client)
    if len(arguments) == 1:
        return None
    return _decode_cursor(client.namespace, bytes(arguments[1]))


def _page(client: Client, entries: list[Entry]) -> bytes:
    if not entries:
        raise CommandError("No more data")
    rows = (
        b"*3\r\n%s%s%s" % (bulk(entry.key), integer(entry.length), integer(entry.time_s)) for entry in entries
    )
    return array((bulk(_encode_cursor(client.namespace, entries[-1])), array(rows)))


def _encode_cursor(namespace: Namespace, entry: Entry) -> bytes:
    number, offset = entry.place
    head = bytes((len(entry.key),)) + number.to_bytes(4, "little") + offset.to_bytes(8, "little")
    return head + _cursor_check(namespace, head)


def _decode_cursor(namespace: Namespace, cursor: bytes) -> Place:
    head, check_bytes = cursor[:13], cursor[13:]
    if len(cursor) != CURSOR_BYTES or check_bytes != _cursor_check(namespace, head):
        raise CommandError("Invalid key format")
    place = (int.from_bytes(head[1:5], "little"), int.from_bytes(head[5:], "little"))
    if not namespace.has_place(place):
        raise CommandError("Invalid key format")
    return place


def _cursor_check(namespace: Namespace, head: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(head, seed=namespace.settings.seed).to_bytes(8, "little")[:4]
