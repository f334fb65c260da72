"""What is written as a stream goes to the disk while it comes; what is written again and again waits for its group."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from qsfs.daemon.committer import Committer
from qsfs.store.group import Group
from qsfs.store.schema import BLOCK_PAGES, PAGE
from tests.core.machine import Machine, page

NEVER = 3600.0


async def test_a_stream_is_committed_before_its_group_is_full(tmp_path: Path) -> None:
    """So the fsync at its end waits for the last part of it only."""
    machine = Machine(tmp_path)
    committer = Committer(machine.store, machine.contents, NEVER)
    number = machine.create("stream")
    machine.commit()
    committed = trio.Event()
    committer.after_commit.append(committed.set)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(committer.run)
        await trio.testing.wait_all_tasks_blocked()
        assert not committed.is_set()
        machine.write(number, 0, bytes(machine.limits.stream_bytes))
        assert not machine.store.group_is_full()
        with trio.fail_after(60):
            await committed.wait()
        nursery.cancel_scope.cancel()
    machine.close()


async def test_a_stream_that_comes_while_another_group_commits_is_committed_next(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    committer = Committer(machine.store, machine.contents, NEVER)
    number = machine.create("stream")
    machine.commit()
    size = machine.limits.stream_bytes
    seal, twice = machine.store.seal, trio.Event()

    def seal_and_write() -> Group:
        group = seal()
        if not committer.commits:
            machine.write(number, size // PAGE, bytes(size))
        return group

    machine.store.seal = seal_and_write  # type: ignore[assignment]
    committer.after_commit.append(lambda: twice.set() if committer.commits == 2 else None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(committer.run)
        machine.write(number, 0, bytes(size))
        with trio.fail_after(60):
            await twice.wait()
        nursery.cancel_scope.cancel()
    machine.close()


def test_what_is_written_again_or_in_small_pieces_is_no_stream(tmp_path: Path) -> None:
    """A database's hot pages go to the disk once a group, not once for each commit."""
    machine = Machine(tmp_path)
    number = machine.create("database")
    calls: list[None] = []
    machine.store.on_stream = lambda: calls.append(None)
    for _ in range(2 * machine.limits.stream_bytes // (BLOCK_PAGES * PAGE)):
        machine.write(number, 0, page("a") * BLOCK_PAGES)
    for first in range(0, machine.limits.stream_bytes // PAGE, BLOCK_PAGES):
        machine.write(number, first + 1, page("b"))
    assert not calls
    assert not machine.store.streams()
    machine.close()
