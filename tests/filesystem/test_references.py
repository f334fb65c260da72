"""What has no name lives exactly as long as somebody uses it, and never past the next mount."""

from __future__ import annotations

import pytest

from qsfs.filesystem.needs import NeedRoom
from qsfs.store.schema import ROOT_INODE, Table


def test_what_nobody_uses_is_gone_with_its_name(world):
    number = world.file(b"f")
    world.names.unlink(ROOT_INODE, b"f")
    assert world.store.inode(number) is None
    assert world.names.references.orphans == 0


def test_what_the_kernel_knows_lives_until_it_forgets(world):
    number = world.file(b"f")
    world.looked_up(number, 3)
    world.names.unlink(ROOT_INODE, b"f")
    assert world.inode(number).nlink == 0
    assert len(list(world.store.scan(Table.ORPHANS, b"", None))) == 1
    world.forget(number, 2)
    assert world.names.references.orphans == 1
    world.forget(number, 1)
    assert world.store.inode(number) is None
    assert list(world.store.scan(Table.ORPHANS, b"", None)) == []
    assert (world.names.references.orphans, world.names.references.known) == (0, 0)


@pytest.mark.parametrize("close_first", [False, True])
def test_what_is_open_lives_until_it_is_closed_and_forgotten(world, close_first):
    """The kernel may send the two in either order."""
    number = world.file(b"f")
    world.looked_up(number)
    world.contents.opened(world.inode(number))
    world.names.unlink(ROOT_INODE, b"f")

    def close() -> None:
        world.contents.closed(world.inode(number))
        world.names.references.closed(number)
        world.names.references.collect()

    steps = [close, lambda: world.forget(number)]
    for step in steps if close_first else reversed(steps):
        assert world.store.inode(number) is not None
        step()
    assert world.store.inode(number) is None


def test_what_has_a_name_survives_forgetting(world):
    number = world.file(b"f")
    world.looked_up(number)
    world.forget(number)
    assert world.find(b"f") == number
    world.names.unlink(ROOT_INODE, b"f")
    assert world.store.inode(number) is None


def test_a_removed_directory_lives_until_forgotten(world):
    number = world.directory(b"d")
    world.looked_up(number)
    world.names.rmdir(ROOT_INODE, b"d")
    assert world.listing(number) == []
    world.forget(number)
    assert world.store.inode(number) is None


def test_many_forgets_are_one_change(world):
    numbers = [world.file(b"%d" % n) for n in range(100)]
    for number in numbers:
        world.looked_up(number)
    for n in range(100):
        world.names.unlink(ROOT_INODE, b"%d" % n)
    if hasattr(world.store, "changes"):
        world.store.changes.clear()
    world.names.forget([(number, 1) for number in numbers])
    world.names.references.collect()
    assert all(world.store.inode(number) is None for number in numbers)
    if hasattr(world.store, "changes"):
        assert len(world.store.changes) == 1


def test_a_forget_that_must_wait_is_done_later_and_counted_once(world):
    if not hasattr(world.store, "need"):
        pytest.skip("only the model raises needs at will")
    number, other = world.file(b"f"), world.file(b"g")
    for n in (number, other):
        world.looked_up(n, 2)
    world.names.unlink(ROOT_INODE, b"f")
    world.store.need = NeedRoom()
    world.forget(number, 2)
    assert world.store.inode(number) is not None
    world.forget(other, 1)
    assert world.store.inode(number) is None
    assert world.names.references.known == 1


def test_a_mount_removes_what_the_last_one_left(make_world):
    world = make_world()
    numbers = [world.file(b"%d" % n) for n in range(300)]
    for n, number in enumerate(numbers):
        world.looked_up(number)
        if n:
            world.names.unlink(ROOT_INODE, b"%d" % n)
    world = make_world(again=True)
    assert world.names.remove_orphans() == 299
    assert [n for n in numbers if world.store.inode(n) is not None] == numbers[:1]
    assert list(world.store.scan(Table.ORPHANS, b"", None)) == []
    assert world.names.remove_orphans() == 0
    assert world.find(b"0") == numbers[0]
