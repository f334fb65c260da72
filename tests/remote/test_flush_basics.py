"""Generations on memory backends: what a restore finds."""

from __future__ import annotations

from pathlib import Path

from qsfs.store.schema import PAGE
from tests.remote.flush_machine import FlushMachine, restore
from tests.remote.harness import make_world


async def test_a_generation_holds_every_page_as_of_its_cut(tmp_path: Path, autojump_clock):
    world = await make_world(5, k=2, m=2)
    machine = FlushMachine(world, tmp_path / "cache")
    async with machine.mounted():
        a = machine.create("a")
        machine.write(a, 0, b"x" * 100 * PAGE)
        assert await machine.cut()
        assert restore(world).files == {"a": b"x" * 100 * PAGE}
        machine.write(a, 10, b"y" * PAGE)
        machine.write(a, 70, b"z" * 3 * PAGE)
        await machine.committer.commit()
        await machine.precopy()
        assert await machine.cut()
        assert restore(world).files["a"] == machine.content(a)
        assert not await machine.cut()
