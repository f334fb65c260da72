"""The commands on keys answer exactly as 0-db does, errors included."""

from __future__ import annotations

import pytest

from qsfs.zdb.commands_data import SCAN_ENTRIES
from tests.zdb.wire import ErrorReply, encode, wire

FROZEN = ErrorReply("Namespace is temporarily frozen (read-write disabled)")
LOCKED = ErrorReply("Namespace is temporarily locked (read-only)")
READ_ONLY = ErrorReply("Namespace is in read-only mode")
LONG_KEY = b"k" * 256


async def test_a_stored_value_comes_back(client):
    assert await client.ask("SET", "key", b"\0\r\n\xff") == b"key"
    assert await client.ask("GET", "key") == b"\0\r\n\xff"
    assert await client.ask("SETX", "key", "other") == b"key"
    assert await client.ask("GET", "key") == b"other"
    assert await client.ask("GET", "no") is None


async def test_an_identical_value_is_answered_with_nil_and_keeps_its_place(client):
    await client.ask("SET", "a", "1")
    await client.ask("SET", "b", "2")
    assert await client.ask("SET", "a", "1") is None
    _, rows = await client.ask("SCAN")
    assert [row[0] for row in rows] == [b"a", b"b"]


async def test_same_length_but_other_bytes_is_a_new_value(client):
    await client.ask("SET", "a", "1")
    assert await client.ask("SET", "a", "2") == b"a"
    assert await client.ask("GET", "a") == b"2"


async def test_an_empty_value_is_legal(client):
    assert await client.ask("SET", "e", "") == b"e"
    assert await client.ask("GET", "e") == b""
    assert await client.ask("LENGTH", "e") == 0
    assert await client.ask("CHECK", "e") == 1
    assert await client.ask("SET", "e", "") is None


@pytest.mark.parametrize("size", [2047, 2049, 256 * 1024, 2 * 1024 * 1024, 8 * 1024 * 1024])
async def test_values_of_all_sizes(client, size):
    value = (b"%08d" % size) * (size // 8 + 1)
    assert await client.ask("SET", "big", value[:size]) == b"big"
    assert await client.ask("GET", "big") == value[:size]
    assert await client.ask("CHECK", "big") == 1


async def test_set_refusals(client):
    assert await client.ask("SET", "k") == ErrorReply("Unexpected arguments")
    assert await client.ask("SET") == ErrorReply("Unexpected arguments")
    assert await client.ask("SET", LONG_KEY, "v") == ErrorReply("Key too large")
    assert await client.ask("SET", "", "v") == ErrorReply("Invalid argument, key needed")
    assert await client.ask("SET", LONG_KEY[:255], "v") == LONG_KEY[:255]


async def test_a_value_past_8_mib_closes_the_connection(port, client):
    await client.send(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$8388609\r\n")
    assert await client.read() == ErrorReply("Payload too big")
    assert await client.at_end()
    async with wire(port) as other:
        assert await other.ask("GET", "k") is None


async def test_a_malformed_request_closes_the_connection(client):
    await client.send(b"PING\r\n")
    assert await client.read() == ErrorReply("Malformed request, array expected")
    assert await client.at_end()


async def test_a_timestamp_may_be_given_by_the_admin(client):
    assert await client.ask("SET", "k", "v", "1234567") == b"k"
    assert await client.ask("KEYTIME", "k") == 1234567
    assert await client.ask("KEYTIME", "no") is None


async def test_a_timestamp_needs_the_admin(guarded):
    async with wire(guarded) as client:
        assert await client.ask("SET", "k", "v", "1234567") == ErrorReply("Permission denied")


@pytest.mark.parametrize("command", ["GET", "EXISTS", "CHECK", "LENGTH", "DEL", "KEYTIME"])
async def test_commands_on_one_key_check_their_arguments(client, command):
    assert await client.ask(command) == ErrorReply("Unexpected arguments")
    assert await client.ask(command, "a", "b") == ErrorReply("Unexpected arguments")
    assert await client.ask(command, "") == ErrorReply("Invalid argument")
    assert await client.ask(command, LONG_KEY) == ErrorReply("Invalid key")


async def test_mget(client):
    await client.ask("SET", "a", "1")
    await client.ask("SET", "c", "3")
    assert await client.ask("MGET", "a", "b", "c") == [b"1", None, b"3"]
    assert await client.ask("MGET") == ErrorReply("Invalid arguments")
    assert await client.ask("MGET", "a", LONG_KEY) == ErrorReply("Invalid key")
    assert len(await client.ask("MGET", *["a"] * 1023)) == 1023


async def test_exists_length_check_and_delete(client):
    await client.ask("SET", "a", "123")
    assert await client.ask("EXISTS", "a") == 1
    assert await client.ask("LENGTH", "a") == 3
    assert await client.ask("CHECK", "a") == 1
    assert await client.ask("DBSIZE") == 1
    assert await client.ask("DEL", "a") == "OK"
    assert await client.ask("DEL", "a") == ErrorReply("Key not found")
    assert await client.ask("EXISTS", "a") == 0
    assert await client.ask("LENGTH", "a") is None
    assert await client.ask("CHECK", "a") is None
    assert await client.ask("DBSIZE") == 0


async def test_commands_match_by_prefix_in_table_order(client):
    """`S` means SET and `P` means PING in 0-db; the order of its table decides."""
    assert await client.ask("s", "a", "1") == b"a"
    assert await client.ask("g", "a") == b"1"
    assert await client.ask("p") == "PONG"
    assert await client.ask("m", "a") == ErrorReply("Command not supported")  # MIRROR
    assert await client.ask("MG", "a") == [b"1"]
    assert await client.ask("e", "a") == 1
    assert await client.ask("d", "a") == ErrorReply("Command not supported")  # DATA
    assert await client.ask("de", "a") == "OK"
    assert await client.ask("NSS", "default", "worm", "1") == ErrorReply("Cannot update default namespace")
    assert await client.ask("") == ErrorReply("This is not a valid command")
    assert await client.ask("*") == ErrorReply("This is not a valid command")
    for unknown in ("GETX", "HELLO", "CLIENT", "QUIT", "MULTI", "CONFIG", "EXPIRE", "COMMAND"):
        assert await client.ask(unknown) == ErrorReply("Command not supported")
    assert await client.ask("KSCAN", "a") == ErrorReply(
        "Command disabled in release code, not yet available"
    )
    assert await client.ask("STOP") == ErrorReply("Unauthorized")


async def walk(client, command):
    keys, cursor = [], None
    while True:
        reply = await client.ask(command, *([] if cursor is None else [cursor]))
        if isinstance(reply, ErrorReply):
            assert reply == "No more data"
            return keys, cursor
        cursor, rows = reply
        assert len(cursor) == 17
        assert 0 < len(rows) <= SCAN_ENTRIES
        keys += [row[0] for row in rows]


async def test_scan_walks_live_keys_in_the_order_of_insertion(client):
    count = 2 * SCAN_ENTRIES + 7
    keys = [b"%05d" % number for number in range(count)]
    for key in keys:
        await client.ask("SET", key, key * 2)
    await client.ask("SET", keys[0], "moved to the end")
    await client.ask("DEL", keys[1])
    expected = [*keys[2:], keys[0]]
    assert (await walk(client, "SCAN"))[0] == expected
    assert (await walk(client, "SCANX"))[0] == expected
    assert (await walk(client, "RSCAN"))[0] == expected[::-1]
    _, rows = await client.ask("RSCAN")
    assert rows[0][1] == len("moved to the end")
    assert rows[1][1] == 10


async def test_a_cursor_goes_on_where_it_stood_even_when_its_key_is_gone(client):
    await client.ask("SET", "a", "1")
    await client.ask("SET", "b", "1")
    _, cursor = await walk(client, "SCAN")
    await client.ask("DEL", "b")
    assert await client.ask("SCAN", cursor) == ErrorReply("No more data")
    await client.ask("SET", "c", "1")
    _, rows = await client.ask("SCAN", cursor)
    assert [row[0] for row in rows] == [b"c"]
    _, rows = await client.ask("RSCAN", cursor)
    assert [row[0] for row in rows] == [b"a"]


async def test_keycur_is_the_cursor_behind_a_key(client):
    for key in "abc":
        await client.ask("SET", key, "1")
    _, rows = await client.ask("SCAN", await client.ask("KEYCUR", "b"))
    assert [row[0] for row in rows] == [b"c"]
    assert await client.ask("KEYCUR", "no") == ErrorReply("Key not found")


@pytest.mark.parametrize("cursor", [b"", b"x", bytes(17), b"\xff" * 17])
async def test_a_cursor_that_is_none_is_refused(client, cursor):
    await client.ask("SET", "a", "1")
    assert await client.ask("SCAN", cursor) == ErrorReply("Invalid key format")
    assert await client.ask("RSCAN", cursor) == ErrorReply("Invalid key format")


async def test_scanning_nothing(client):
    assert await client.ask("SCAN") == ErrorReply("No more data")
    assert await client.ask("RSCAN") == ErrorReply("No more data")


async def test_requests_in_a_row_are_answered_in_order(client):
    count = 2000
    await client.send(b"".join(encode("SET", b"%d" % n, b"v%d" % n) for n in range(count)))
    assert [await client.read() for _ in range(count)] == [b"%d" % n for n in range(count)]
    await client.send(b"".join(encode("GET", b"%d" % n) for n in range(count)))
    assert [await client.read() for _ in range(count)] == [b"v%d" % n for n in range(count)]


async def test_locked_means_read_only_and_frozen_means_nothing(client):
    await client.ask("NSNEW", "n")
    await client.ask("SELECT", "n")
    await client.ask("SET", "k", "v")
    await client.ask("NSSET", "n", "lock", "1")
    assert await client.ask("SET", "k", "w") == LOCKED
    assert await client.ask("DEL", "k") == LOCKED
    assert await client.ask("GET", "k") == b"v"
    await client.ask("NSSET", "n", "freeze", "1")
    for request in (("GET", "k"), ("SET", "k", "w"), ("DEL", "k"), ("EXISTS", "k"), ("CHECK", "k"), ("SCAN",),
                    ("RSCAN",), ("MGET", "k"), ("LENGTH", "k")):  # fmt: skip
        assert await client.ask(*request) == FROZEN
    assert await client.ask("DBSIZE") == 1
    assert b"locked: yes" in await client.ask("NSINFO", "n")
    assert await client.ask("SELECT", "n") == "OK"
    await client.ask("NSSET", "n", "lock", "0")
    assert await client.ask("SET", "k", "w") == b"k"


async def test_worm_forbids_overwriting_even_with_the_same_value_and_deleting(client):
    await client.ask("NSNEW", "n")
    await client.ask("SELECT", "n")
    await client.ask("SET", "k", "v")
    await client.ask("NSSET", "n", "worm", "1")
    assert await client.ask("SET", "k", "v") == ErrorReply("Namespace is protected by worm mode")
    assert await client.ask("DEL", "k") == ErrorReply("Cannot delete a key when namespace is in worm mode")
    assert await client.ask("DEL", "no") == ErrorReply("Key not found")
    assert await client.ask("SET", "new", "v") == b"new"


async def test_the_quota_counts_live_bytes_and_is_never_passed(client):
    full = ErrorReply("No space left on this namespace")
    await client.ask("NSNEW", "n")
    await client.ask("NSSET", "n", "maxsize", "10")
    await client.ask("SELECT", "n")
    assert await client.ask("SET", "a", "123456") == b"a"
    assert await client.ask("SET", "b", "12345") == full
    assert await client.ask("SET", "b", "1234") == b"b"
    assert await client.ask("SET", "c", "1") == full
    assert await client.ask("SET", "c", "") == b"c"
    assert await client.ask("SET", "a", "abcdef") == b"a", "a replacement frees what it replaces"
    assert await client.ask("SET", "a", "1234567") == full
    assert await client.ask("DEL", "b") == "OK"
    assert await client.ask("SET", "d", "1234") == b"d"
    assert b"space_available: 0\n" in await client.ask("NSINFO", "n")


async def test_quota_is_checked_after_rights_and_worm(client):
    await client.ask("NSNEW", "n")
    await client.ask("SELECT", "n")
    await client.ask("SET", "k", "v")
    await client.ask("NSSET", "n", "maxsize", "1")
    await client.ask("NSSET", "n", "worm", "1")
    assert await client.ask("SET", "k", "vvvv") == ErrorReply("Namespace is protected by worm mode")
    await client.ask("NSSET", "n", "lock", "1")
    assert await client.ask("SET", "k", "vvvv") == LOCKED
    await client.ask("NSSET", "n", "password", "p")
    await client.ask("SELECT", "n")
    assert await client.ask("SET", "k", "vvvv") == READ_ONLY
    assert await client.ask("SET", LONG_KEY, "vvvv") == ErrorReply("Key too large")
