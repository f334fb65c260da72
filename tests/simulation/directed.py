"""Stages for tests that say themselves what happens: one machine is up, nothing goes wrong of itself."""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest import mock

import trio

from qsfs.backend.wrapper import Call
from qsfs.format.extent import ExtentEntry, PackKind
from qsfs.remote.reader import PackReader
from qsfs.remote.stored import StoredPack
from qsfs.store.schema import PackRow, Table
from tests.simulation import checks, engine
from tests.simulation.cluster import prepare
from tests.simulation.engine import Trace
from tests.simulation.machine import Life, Machine
from tests.simulation.stage import Stage

Story = Callable[["Directed"], Awaitable[None]]

_HELD: contextvars.ContextVar[bool] = contextvars.ContextVar("held", default=False)


class Directed(Stage):
    """A stage whose backends do what they should."""

    def __init__(self, root: Path, code: tuple[int, int, int]) -> None:
        super().__init__(5, root, Trace(), code)
        self.cluster.liars = frozenset()
        self.cluster.faulty.clear()
        self.retention = 0.0

    @property
    def first(self) -> Machine:
        """The machine that formatted."""
        return self.machines[0]

    async def up(self, machine: Machine) -> Life:
        """The machine's mount, once it is ready."""
        if machine.life is None:
            self.mount(machine)
        await self.wait_for(machine, 300)
        assert machine.writable is not None, machine.error
        return machine.writable

    async def write(self, life: Life, name: str, pages: int, letter: str, first: int = 0) -> None:
        """Writes whole pages of a file, which is made if need be."""
        if name not in self.ledger.versions[life.version].files:
            await self.applications.create(life, name)
        await self.applications.write(life, name, first * 4096, letter.encode() * 4096 * pages)

    async def publish(self, life: Life) -> None:
        """A sync that must hold."""
        before = len(self.ledger.acknowledged)
        await self.sync(life, 600)
        assert len(self.ledger.acknowledged) > before

    async def remote_file(self, life: Life, name: str, pages: int) -> None:
        """A file that is only remote."""
        await self.write(life, name, pages, "o")
        await self.publish(life)
        await self.evict(life)

    async def evict(self, life: Life) -> None:
        """Everything clean goes."""
        await life.committer.commit()
        self.applications.evict(life)
        await life.committer.commit()

    async def read_while(
        self,
        life: Life,
        name: str,
        pages: int,
        meanwhile: Callable[[], Awaitable[None]],
        *,
        comes: bool = True,
        asked: bool = True,
    ) -> None:
        """Reads a file from the backends; `meanwhile` happens before anything of it has arrived.

        By then backends have been `asked`, or the fetch only knows which extent it wants: who else reads the pack
        waits for the same answers, so only in the latter case it can be deleted meanwhile.
        Then the data `comes`, or the read ends with an error.
        """
        begun, go_on, done = trio.Event(), trio.Event(), trio.Event()

        async def hold() -> None:
            if _HELD.get():
                begun.set()
                await go_on.wait()

        async def hold_get(number: int, call: Call) -> None:
            if asked and call.kind == "get":
                await hold()

        extent = PackReader.extent

        async def hold_extent(reader: PackReader, pack: StoredPack, entry: ExtentEntry) -> bytes:
            if not asked:
                await hold()
            return await extent(reader, pack, entry)

        async def read() -> None:
            _HELD.set(True)
            assert await self.applications.read(life, name, 0, pages * 4096) is comes
            done.set()

        self.cluster.before = hold_get
        with mock.patch.object(PackReader, "extent", hold_extent):
            with engine.on(life):
                life.nursery.start_soon(read)
            await begun.wait()
            await meanwhile()
            assert not done.is_set()
            go_on.set()
            with trio.fail_after(300):
                await done.wait()

    async def end(self) -> None:
        """All machines lose power; then what must hold of any history."""
        await self.stop_all()
        await checks.at_the_end(self)


def live_packs(life: Life) -> set[bytes]:
    """The ids of the packs in which anything lives."""
    assert life.store is not None
    rows = (PackRow.decode(value) for _, value in life.store.scan(Table.PACKS, b"", None))
    return {row.pack_id for row in rows if row.kind == PackKind.DATA and row.live}


def live(root: Path, story: Story, allowed_log: str = "", code: tuple[int, int, int] = (2, 1, 5)) -> None:
    """Lives through `story` on a stage of its own, and checks the end; logs that match `allowed_log` are no bugs.

    `code`: data shards, parity shards, backends.
    """
    prepare()

    async def main() -> None:
        stage = Directed(root, code)
        stage.allowed_log = allowed_log
        with stage.wired():
            async with trio.open_nursery() as stage.nursery:
                stage.begin()
                await stage.up(stage.first)
                await story(stage)
                await stage.end()
                stage.nursery.cancel_scope.cancel()

    engine.run(5, main)
