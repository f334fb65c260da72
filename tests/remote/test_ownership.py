"""Owning and publishing: who may, when it counts, and when a mount must stop."""

from __future__ import annotations

import pytest
import trio

from qsfs.format.head import Owner
from qsfs.remote.publish import Published
from tests.remote.harness import Machine, make_head, make_world, plant




async def test_a_mount_owns_by_publishing_the_newest_head_as_its_own(autojump_clock, nursery):
    world = await make_world(4)
    old = make_head(world, Owner(3, b"x" * 16), 7)
    sealed = plant(world, old, (1, 2, 3))
    machine = Machine(world)
    ownership = await machine.own(nursery)
    assert ownership.owner.epoch == 4
    assert ownership.found == old and ownership.found_ref == sealed.ref
    assert ownership.first.generation == 7 and ownership.first.predecessor == sealed.ref
    assert machine.spool[0].ref == ownership.first_ref
    result = await machine.publish()
    assert isinstance(result, Published)
    assert all(sealed.key in store.keys() for store in world.control for sealed in machine.spool)
