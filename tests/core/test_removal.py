"""A file that goes away leaves nothing behind, whatever layers its pages lie in."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsfs.filesystem.namespace import Namespace
from qsfs.filesystem.posix import Credentials
from qsfs.store.schema import BLOCK_PAGES, PAGE, Table
from tests.core.machine import Machine

LEFT = (Table.BLOCKS, Table.VALUES, Table.DIRTY, Table.TRUNCATIONS, Table.SYMLINKS, Table.XATTRS, Table.ORPHANS)


def rows(machine: Machine) -> dict[Table, int]:
    return {table: count for table in LEFT if (count := machine.store.layers.view.count(table))}


@pytest.mark.parametrize("blocks", [1, 63, 64, 100])
@pytest.mark.parametrize("crash", [True, False])
def test_no_row_of_it_stays(tmp_path: Path, blocks: int, crash: bool) -> None:
    """Few blocks go at once, many are worked off; through every layer, and through a replay."""
    machine = Machine(tmp_path)
    other = machine.create("other")
    machine.write(other, 0, b"o" * PAGE)
    machine.commit()
    before = rows(machine)
    names = Namespace(machine.store, machine.contents)
    number = names.create(1, b"file", 0o600, Credentials()).number
    names.set_xattr(number, b"user.a", b"1")
    names.symlink(1, b"link", b"target", Credentials())
    machine.write(number, 0, b"1" * PAGE * (BLOCK_PAGES * (blocks - 1) + 1))
    machine.commit()
    machine.write(number, BLOCK_PAGES * blocks - 1, b"2" * PAGE)
    machine.seal()
    machine.write(number, 0, b"3" * PAGE)
    names.unlink(1, b"file")
    names.unlink(1, b"link")
    assert machine.store.inode(number) is None
    machine.finish()
    if crash:
        machine.fsync(other)
        machine.crash()
    machine.work_off()
    machine.commit()
    assert rows(machine) == before
    assert machine.names() == {"other"}
    machine.close()
