"""Two copies of a machine have sent heads: every command can name one, and it ends in a mount that writes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import trio

from qsfs.clock import SystemClock
from qsfs.config import Config
from qsfs.daemon.connect import links, read_secret
from qsfs.format.head import HeadRef, seal_head
from qsfs.remote.readable import read_head
from qsfs.remote.source import find_source
from qsfs.remote.survey import Timing
from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, check, status, store

pytestmark = pytest.mark.mount

COUNT = 6
MIB = 1 << 20


def plant_twin(fs: FileSystem) -> tuple[HeadRef, HeadRef]:
    """Sends what a copy of the machine would have that ran on beside its last head: the generation before, once more.

    Returns the machine's last head, and the copy's.
    """
    config, clock = Config.load(fs.config), SystemClock()

    async def plant() -> tuple[HeadRef, HeadRef]:
        found = links(config, clock)
        try:
            source = await find_source(found.candidates, secret=read_secret(config), clock=clock)
            last = source.found.head
            assert last.predecessor is not None
            _, before = await read_head(source.members, last.predecessor, source.keys, Timing())
            twin = dataclasses.replace(
                before,
                generation=last.generation,
                predecessor=last.predecessor,
                kept=last.kept,
                time_ns=last.time_ns + 1_000_000_000,
            )
            sealed = seal_head(twin, source.keys, clock)
            for member in source.members:
                await member.control.set(sealed.key, sealed.value)
            return source.found.ref, sealed.ref
        finally:
            await found.aclose()

    return trio.run(plant)


def has(fs: FileSystem, *names: str) -> None:
    """The mount holds exactly these files, whole."""
    assert {path.name for path in fs.mountpoint.iterdir()} == set(names)
    for name in names:
        check(fs, name)


@pytest.mark.parametrize("right", ["original", "copy"])
def test_an_operator_gets_from_two_heads_to_a_mount_that_writes(scratch: Path, fleet: Servers, right: str) -> None:
    """Also with the local state of the machine whose head is chosen; nobody is asked again after the takeover."""
    with FileSystem(
        scratch / "one", shards=(3, 1), count=COUNT, servers=fleet, namespace=f"split-{right}", settings=QUICK
    ) as one:
        one.format()
        one.mount()
        store(one, "base", MIB)
        one.sync()
        store(one, "second", MIB)
        one.umount()
        mine, theirs = plant_twin(one)
        digests = {"original": mine.digest.hex()[:8], "copy": theirs.digest.hex()[:8]}
        holds = {"original": ("base", "second"), "copy": ("base",)}
        assert "key slot" in one.run("key", "verify").stdout
        refused = one.run("mount", code=11).stderr
        assert f"`qsfs takeover --head {digests['original']}` goes on here" in refused

        with one.another_machine(scratch / "two") as two:
            for words in (("restore",), ("takeover",), ("mount", "--read-only"), ("drill",), ("restore", "--force")):
                refused = two.run(*words, code=18).stderr
                assert all(digest in refused for digest in digests.values()), refused
                assert "`qsfs takeover --head DIGEST`" in refused
            assert "no snapshots" in two.run("snapshot", "list").stdout
            for words in (("key", "list"), ("key", "verify")):
                assert "two copies of one machine" in two.run(*words).stdout, words
            two.run("key", "refill")
            for line, digest in digests.items():
                two.mount("--read-only", "--head", digest)
                has(two, *holds[line])
                two.umount()
                assert "proven" in two.run("drill", "--full", "--head", digest).stdout

        with one.another_machine(scratch / "three") as three:
            assert "is one to choose from" in three.run("restore", "--head", "0123456789", code=8).stderr
            goes_on = one if right == "original" else three
            if goes_on is three:
                # What is chosen is remembered by the restore: the takeover need not be told.
                assert f"digest {digests['original']}" in three.run("restore", "--head", digests["copy"]).stdout
                three.run("takeover")
                wrong = one.run("takeover", "--head", digests["copy"], code=None)
                assert wrong.returncode in (8, 11), "its local state is not of that head, and another machine owns"
            else:
                stale = one.run("takeover", "--head", digests["copy"], code=11).stderr
                assert f"qsfs restore --set-aside --head {digests['copy']}" in stale
                one.run("takeover", "--head", digests["original"])
            goes_on.mount()
            has(goes_on, *holds[right])
            store(goes_on, "later", MIB)
            goes_on.sync()
            assert status(goes_on)["writable"]
            goes_on.umount()
            goes_on.mount()
            goes_on.umount()
            with one.another_machine(scratch / "four") as four:
                assert re.search(r"Restored generation \d+ of epoch", four.run("restore").stdout)
                four.run("takeover")
                four.mount()
                has(four, *holds[right], "later")
                four.umount()
