"""Reads of what is only remote against everything that may happen before their bytes arrive, in the whole system.

A read gives what was written last before it returned, whatever became of the extent that it started from.
"""

from __future__ import annotations

from pathlib import Path

import trio

from tests.remote.test_strays import packs_on
from tests.simulation.directed import Directed, live, live_packs
from tests.simulation.machine import Life

PAGES = 8


def race(root: Path, meanwhile) -> None:
    """A file that is only remote is read while `meanwhile(stage, life)` happens."""

    async def story(stage: Directed) -> None:
        life = await stage.up(stage.first)
        await stage.remote_file(life, "f", PAGES)
        await stage.read_while(life, "f", PAGES, lambda: meanwhile(stage, life))
        await stage.publish(life)

    live(root, story)


def test_fetch_against_truncate(scratch: Path) -> None:
    """What was cut off is a hole after the file has grown again, not what the fetch brings."""

    async def meanwhile(stage: Directed, life: Life) -> None:
        await stage.applications.truncate(life, "f", 0)
        await stage.applications.truncate(life, "f", PAGES * 4096)

    race(scratch, meanwhile)


def test_fetch_against_write(scratch: Path) -> None:
    """Pages written meanwhile are the newer ones, the others come from the fetch."""

    async def meanwhile(stage: Directed, life: Life) -> None:
        await stage.write(life, "f", 2, "n", first=3)

    race(scratch, meanwhile)


def test_fetch_against_evict(scratch: Path) -> None:
    """Pages of the file that were written, published and evicted meanwhile lie in another pack now."""

    async def meanwhile(stage: Directed, life: Life) -> None:
        await stage.write(life, "f", 2, "n", first=3)
        await stage.publish(life)
        await stage.evict(life)

    race(scratch, meanwhile)


def test_fetch_against_flush(scratch: Path) -> None:
    """A generation is published between the question and the answer: its pages are clean, and stay what they are."""

    async def meanwhile(stage: Directed, life: Life) -> None:
        await stage.write(life, "f", PAGES // 2, "n")
        await stage.publish(life)

    race(scratch, meanwhile)


def test_fetch_against_pre_copy(scratch: Path) -> None:
    """The same with pages that leave ahead of any cut."""

    async def meanwhile(stage: Directed, life: Life) -> None:
        await stage.write(life, "f", PAGES, "n")
        await trio.sleep(12)
        await stage.evict(life)

    race(scratch, meanwhile)


async def _until_deleted(stage: Directed, life: Life, packs: set[bytes]) -> None:
    """Rewrites the file and collects until this machine has deleted the packs."""
    for turn in range(20):
        if packs <= stage.cluster.deleted_by.get(life.name, set()):
            return
        await stage.write(life, "f", PAGES, "abcdefg"[turn % 7])
        await stage.publish(life)
        await life.flushing.collect(dry_run=False)
        await trio.sleep(2)
    raise AssertionError("packs that nothing names are not deleted")


def test_fetch_against_collect(scratch: Path, expect_log) -> None:
    """The pack of a fetch under way dies and is deleted: the read gives what was written since, also once that is
    only remote."""
    expect_log("absent; it is read from others")

    async def story(stage: Directed) -> None:
        life = await stage.up(stage.first)
        await stage.remote_file(life, "f", PAGES)
        packs = live_packs(life)
        assert packs
        await stage.read_while(life, "f", PAGES, lambda: _until_deleted(stage, life, packs), asked=False)
        assert not any(packs & packs_on(store) for store in stage.cluster.world.data)
        await stage.evict(life)
        assert await stage.applications.read(life, "f", 0, PAGES * 4096)

    live(scratch, story)


def test_fetch_against_collect_of_a_part(scratch: Path) -> None:
    """Of what is fetched a page was not written since: its pack stays until that is evicted and written too."""

    async def story(stage: Directed) -> None:
        life = await stage.up(stage.first)
        await stage.remote_file(life, "f", PAGES)
        packs = live_packs(life)

        async def meanwhile() -> None:
            for letter in "abcdef":
                await stage.write(life, "f", PAGES - 1, letter)
                await stage.publish(life)
                await life.flushing.collect(dry_run=False)
                await trio.sleep(2)
            assert stage.cluster.deleted and packs.isdisjoint(stage.cluster.deleted)

        await stage.read_while(life, "f", PAGES, meanwhile)
        await _until_deleted(stage, life, packs)
        await stage.evict(life)
        assert await stage.applications.read(life, "f", 0, PAGES * 4096)

    live(scratch, story)


def test_fetch_against_collect_by_another_owner(scratch: Path, expect_log) -> None:
    """A machine that was taken over from reads what the new owner has deleted: an error, never zeros."""
    expect_log("is lost|taken over|read from others", optional=True)

    async def story(stage: Directed) -> None:
        life = await stage.up(stage.first)
        await stage.remote_file(life, "f", PAGES)
        packs = live_packs(life)
        second = stage.new_machine()

        async def meanwhile() -> None:
            await stage.take_over(second, 600)
            await _until_deleted(stage, await stage.up(second), packs)

        await stage.read_while(life, "f", PAGES, meanwhile, comes=False)
        life.cut_power()
        await life.ended.wait()

    live(scratch, story, allowed_log="is lost")


def test_fetch_against_unlink(scratch: Path) -> None:
    """The file goes away while it is read: the read ends, and nothing of the file comes back."""

    async def meanwhile(stage: Directed, life: Life) -> None:
        await stage.applications.unlink(life, "f")
        await stage.write(life, "g", 1, "n")

    race(scratch, meanwhile)
