"""Namespaces, passwords and rights are as in 0-db."""

from __future__ import annotations

import pytest

from tests.support.backends import in_process
from tests.zdb.wire import ErrorReply, wire

DENIED = ErrorReply("Permission denied")
GONE = ErrorReply("Your active namespace is not available anymore (probably removed).")


def fields(text: bytes) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in text.decode().splitlines() if ": " in line)


async def test_create_list_and_delete(client):
    assert await client.ask("NSLIST") == [b"default"]
    assert await client.ask("NSNEW", "one") == "OK"
    assert await client.ask("NSNEW", "one") == ErrorReply("This namespace is not available")
    assert sorted(await client.ask("NSLIST")) == [b"default", b"one"]
    assert await client.ask("NSDEL", "one") == "OK"
    assert await client.ask("NSDEL", "one") == ErrorReply("This namespace doesn't exists")
    assert await client.ask("NSLIST") == [b"default"]


@pytest.mark.parametrize("name", [b".", b"..", b"a/b", b"/", b"default", b"a\0b"])
async def test_names_that_are_not_allowed(client, name):
    assert await client.ask("NSNEW", name) == ErrorReply("This name is not allowed")


async def test_any_other_name_will_do(client, port):
    names = [b"n" * 128, b"\xff\xfe", b".hidden", b"with space", b"settings", b"d0"]
    for name in names:
        assert await client.ask("NSNEW", name) == "OK"
        assert await client.ask("SELECT", name) == "OK"
        assert await client.ask("SET", "k", name) == b"k"
    for name in names:
        await client.ask("SELECT", name)
        assert await client.ask("GET", "k") == name


async def test_arguments_are_checked(client):
    long = "n" * 129
    for command in ("NSNEW", "NSDEL", "NSINFO", "SELECT"):
        assert await client.ask(command, long) == ErrorReply("Namespace too long")
    assert await client.ask("NSSET", long, "worm", "1") == ErrorReply("Namespace too long")
    for request in (("NSNEW",), ("NSDEL", "a", "b"), ("NSINFO",), ("NSSET", "a", "b")):
        assert await client.ask(*request) == ErrorReply("Unexpected arguments")
    assert await client.ask("SELECT") == ErrorReply("Invalid argument")
    assert await client.ask("NSNEW", "") == ErrorReply("Invalid argument")
    assert await client.ask("NSINFO", "no") == ErrorReply("Namespace not found")
    assert await client.ask("SELECT", "no") == ErrorReply("Namespace not found")


async def test_deleting_the_active_and_the_default_namespace_is_refused(client):
    assert await client.ask("NSDEL", "default") == ErrorReply("Cannot remove default namespace")
    await client.ask("NSNEW", "n")
    await client.ask("SELECT", "n")
    assert await client.ask("NSDEL", "n") == ErrorReply("Cannot remove namespace you're currently using.")


async def test_others_in_a_deleted_namespace_are_told_and_dropped(port, client):
    await client.ask("NSNEW", "n")
    async with wire(port) as other:
        await other.ask("SELECT", "n")
        await client.ask("NSDEL", "n")
        assert await other.ask("PING") == GONE
        assert await other.at_end()


async def test_a_namespace_made_again_is_empty(client):
    await client.ask("NSNEW", "n")
    await client.ask("SELECT", "n")
    await client.ask("SET", "k", "v")
    await client.ask("SELECT", "default")
    await client.ask("NSDEL", "n")
    await client.ask("NSNEW", "n")
    await client.ask("SELECT", "n")
    assert await client.ask("GET", "k") is None
    assert await client.ask("DBSIZE") == 0


async def test_namespaces_do_not_see_each_other(client):
    await client.ask("NSNEW", "n")
    await client.ask("SET", "k", "default's")
    await client.ask("SELECT", "n")
    assert await client.ask("GET", "k") is None


async def test_deleting_frees_the_disk(client, scratch):
    await client.ask("NSNEW", "n")
    await client.ask("SELECT", "n")
    await client.ask("SET", "k", bytes(100_000))
    await client.ask("SELECT", "default")
    await client.ask("NSDEL", "n")
    assert sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()) < 50_000


async def test_nsset_refusals(client):
    await client.ask("NSNEW", "n")
    assert await client.ask("NSSET", "n", "colour", "1") == ErrorReply("Invalid property")
    assert await client.ask("NSSET", "no", "worm", "1") == ErrorReply("Namespace not found")
    assert await client.ask("NSSET", "n", "password", "p" * 64) == ErrorReply("Argument too long")
    assert await client.ask("NSSET", "n", "p" * 257, "1") == ErrorReply("Argument too long")
    refused = ErrorReply("Cannot update default namespace")
    assert await client.ask("NSSET", "default", "maxsize", "1") == refused
    assert await client.ask("NSSET", "default", "lock", "1") == "OK"
    assert await client.ask("NSSET", "n", "mode", "turbo") == ErrorReply(
        "Invalid property value (expected: user, seq)"
    )
    single = ErrorReply("This server instance is configured to use a single runtime mode")
    assert await client.ask("NSSET", "n", "mode", "seq") == single


@pytest.mark.parametrize(("given", "taken"), [("5", 5), ("10G", 10), ("many", 0), ("", None), ("-3", 0)])
async def test_maxsize_is_read_as_c_reads_numbers(client, given, taken):
    await client.ask("NSNEW", "n")
    reply = await client.ask("NSSET", "n", "maxsize", given)
    if taken is None:
        assert reply == ErrorReply("Invalid argument")
    else:
        assert fields(await client.ask("NSINFO", "n"))["data_limits_bytes"] == str(taken)


async def test_nsinfo(client):
    await client.ask("NSNEW", "n")
    await client.ask("NSSET", "n", "maxsize", "1000")
    await client.ask("SELECT", "n")
    await client.ask("SET", "a", "12345")
    await client.ask("SET", "a", "123")
    text = await client.ask("NSINFO", "n")
    assert text.startswith(b"# namespace\nname: n\nentries: 1\npublic: yes\nworm: no\nlocked: no\n")
    info = fields(text)
    assert info["password"] == "no"
    assert info["data_size_bytes"] == "3"
    assert info["data_limits_bytes"] == "1000"
    assert info["space_available"] == "997"
    assert info["mode"] == "userkey"
    assert info["next_internal_id"] == "0x200000000000000"
    assert int(info["data_disk_freespace_bytes"]) > 0
    assert info["data_active"] == "d0"


async def test_nsinfo_keeps_paths_from_those_who_are_not_admin(guarded):
    async with wire(guarded) as client:
        assert "data_path" not in fields(await client.ask("NSINFO", "default"))


async def test_what_only_the_admin_may(guarded):
    async with wire(guarded) as client:
        for request in (("NSNEW", "n"), ("NSDEL", "n"), ("NSSET", "n", "worm", "1")):
            assert await client.ask(*request) == DENIED
        assert await client.ask("AUTH", "wrong") == ErrorReply("Access denied")
        assert await client.ask("AUTH", "p" * 129) == ErrorReply("Password too long")
        assert await client.ask("NSNEW", "n") == DENIED
        assert await client.ask("AUTH", "root") == "OK"
        assert await client.ask("NSNEW", "n") == "OK"


async def test_secure_authentication(guarded):
    async with wire(guarded) as client:
        assert await client.ask("AUTH", "SECURE", "0" * 40) == ErrorReply(
            "No CHALLENGE requested, secure authentication not available"
        )
        digest = await client.digest("root")
        assert await client.ask("AUTH", "SECURE", digest[:-1]) == ErrorReply("Invalid hash length")
        assert await client.ask("AUTH", "OTHER", digest) == ErrorReply("Only SECURE extra method supported")
        digest = await client.digest("root")
        assert await client.ask("AUTH", "SECURE", digest.upper()) == ErrorReply("Access denied")
        assert await client.ask("AUTH", "SECURE", digest) == ErrorReply(
            "No CHALLENGE requested, secure authentication not available"
        ), "a challenge serves for one attempt"
        digest = await client.digest("root")
        assert await client.ask("AUTH", "SECURE", digest) == "OK"
        assert await client.ask("NSNEW", "n") == "OK"
        assert await client.ask("AUTH", "a", "b", "c") == ErrorReply("Unexpected arguments")
        assert await client.ask("AUTH") == ErrorReply("Unexpected arguments")


async def test_without_an_admin_password_there_is_nothing_to_authenticate(client):
    assert await client.ask("AUTH", "x") == ErrorReply("Authentication disabled")
    assert len(await client.ask("AUTH", "SECURE", "CHALLENGE")) == 16
    assert await client.ask("AUTH", "SECURE", "0" * 40) == ErrorReply("Authentication disabled")


async def test_a_public_namespace_with_a_password_is_read_only_without_it(client):
    read_only = ErrorReply("Namespace is in read-only mode")
    await client.ask("NSNEW", "n")
    await client.ask("NSSET", "n", "password", "secret")
    assert await client.ask("SELECT", "n") == "OK"
    assert await client.ask("SET", "k", "v") == read_only
    assert await client.ask("DEL", "k") == read_only
    assert await client.ask("SELECT", "n", "wrong") == ErrorReply("Access denied")
    assert await client.ask("SELECT", "n", "p" * 256) == ErrorReply("Password too long")
    assert await client.ask("SELECT", "n", "secret") == "OK"
    assert await client.ask("SET", "k", "v") == b"k"


async def test_a_private_namespace_needs_its_password_also_from_the_admin(client):
    await client.ask("NSNEW", "n")
    await client.ask("NSSET", "n", "public", "0")
    assert await client.ask("SELECT", "n") == "OK", "private alone has no effect"
    await client.ask("SELECT", "default")
    await client.ask("NSSET", "n", "password", "secret")
    assert await client.ask("SELECT", "n") == ErrorReply("Namespace protected and private")
    assert await client.ask("SET", "still", "default") == b"still", "a failed SELECT changes nothing"
    assert await client.select_secure("n", "wrong") == ErrorReply("Access denied")
    assert await client.select_secure("n", "secret") == "OK"
    only_secure = ErrorReply("Only SECURE extra method supported")
    assert await client.ask("SELECT", "n", "OTHER", "0" * 40) == only_secure
    assert await client.ask("SELECT", "n", "SECURE", "0") == ErrorReply("Invalid hash length")
    assert await client.ask("SELECT", "n", "a", "b", "c") == ErrorReply("Too many arguments")
    await client.ask("NSSET", "n", "password", "*")
    assert await client.ask("SELECT", "n") == "OK"


async def test_select_secure_needs_a_challenge_and_does_not_use_it_up(client):
    await client.ask("NSNEW", "n")
    await client.ask("NSSET", "n", "password", "secret")
    assert await client.ask("SELECT", "n", "SECURE", "0" * 40) == ErrorReply(
        "No CHALLENGE requested, secure authentication not available"
    )
    digest = await client.digest("secret")
    for _ in range(2):
        assert await client.ask("SELECT", "n", "SECURE", digest) == "OK"


async def test_a_password_for_a_namespace_without_one_is_ignored(client):
    assert await client.ask("SELECT", "default", "anything") == "OK"


async def test_info_time_and_ping(client):
    info = fields(await client.ask("INFO"))
    assert info["server_name"] == "0-db (zdb)"
    assert info["sequential_key_size"] == "8"
    assert int(info["commands_executed"]) >= 1
    seconds, micros = await client.ask("TIME")
    assert int(seconds) > 1_600_000_000
    assert 0 <= int(micros) < 1_000_000
    assert await client.ask("PING") == "PONG"


async def test_settings_survive_a_restart_and_locks_do_not(scratch):
    async with in_process(scratch / "z") as ports, wire(ports[0]) as client:
        await client.ask("NSNEW", "n")
        await client.ask("NSSET", "n", "maxsize", "77")
        await client.ask("NSSET", "n", "public", "0")
        await client.ask("NSSET", "n", "worm", "1")
        await client.ask("NSSET", "n", "freeze", "1")
        await client.ask("NSSET", "n", "password", b"s\xff")
    async with in_process(scratch / "z") as ports, wire(ports[0]) as client:
        info = fields(await client.ask("NSINFO", "n"))
        assert [info[name] for name in ("data_limits_bytes", "public", "worm", "password", "locked")] == [
            "77", "no", "yes", "yes", "no",
        ]  # fmt: skip
        assert await client.ask("SELECT", "n", b"s\xff") == "OK"


async def test_the_default_namespace_has_the_quota_it_was_started_with(scratch):
    async with in_process(scratch / "z", default_maxsize=4) as ports, wire(ports[0]) as client:
        assert await client.ask("SET", "a", "12345") == ErrorReply("No space left on this namespace")
        assert await client.ask("SET", "a", "1234") == b"a"


async def test_instances_are_apart(scratch):
    async with in_process(scratch / "z", 3) as ports:
        for number, port in enumerate(ports):
            async with wire(port) as client:
                await client.ask("SET", "k", str(number))
        for number, port in enumerate(ports):
            async with wire(port) as client:
                assert await client.ask("GET", "k") == str(number).encode()
