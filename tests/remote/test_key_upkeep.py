"""A mount takes newer key slots up once a quorum holds them, brings them to others, and never goes back."""

from __future__ import annotations

import logging

import pytest
import trio

from qsfs.daemon.connect import SUPERBLOCK_ROW, Opened
from qsfs.daemon.key_upkeep import KeyUpkeep
from qsfs.errors import BackendFull, BackendUnavailable
from qsfs.format.erasure import Code
from qsfs.format.key_changes import add_slot, remove_slot, rotate_master, rotate_slot
from qsfs.format.keys import KeyRing, MasterKey
from qsfs.format.pack import PackKind, PlainExtent
from qsfs.format.passphrase import KdfCost, Passphrase
from qsfs.format.slots import Secret
from qsfs.format.superblock import SUPERBLOCK_KEY, encode_superblock, open_superblock, read_superblock
from qsfs.remote.base import record_base
from qsfs.remote.control import Records
from tests.remote.harness import make_head, plant
from tests.remote.small_fs import OWNER, SECRET, SmallFs, add_superblock, noise

NEW = b"n" * 32
CHEAP = KdfCost(64, 1, 1)


class Committer:
    """Commits at once."""

    def __init__(self, fs: SmallFs) -> None:
        self._fs = fs

    async def commit(self) -> None:
        await trio.lowlevel.checkpoint()
        self._fs.commit()


class Mount(SmallFs):
    """A mount of a small file system: eight backends, 4 + 2 shards, fence quorum 6 (f = 2)."""

    def start(self, secret: bytes = SECRET) -> KeyUpkeep:
        add_superblock(self.world)
        record_base(self.store, plant(self.world, make_head(self.world, OWNER, 1)), ours=True)
        value = self.world.data[0].peek(SUPERBLOCK_KEY)
        self.store.set_local(SUPERBLOCK_ROW, value)
        self.commit()
        superblock, keys = open_superblock(value, secret)
        self.opened = Opened(superblock, keys, Code(superblock.code), Records(keys))
        return self.start_with(secret)

    def start_with(self, secret: Secret) -> KeyUpkeep:
        """An upkeep of what is open, with this secret."""
        self.upkeep = KeyUpkeep(self.store, Committer(self), self.members, self.opened, secret, self.clock)
        return self.upkeep

    def changed(self, change) -> bytes:
        return encode_superblock(change.superblock, change.keys, self.clock)

    def put(self, value: bytes, count: int) -> None:
        for store in self.world.data[:count]:
            store.put(SUPERBLOCK_KEY, value)

    def held(self, value: bytes) -> int:
        return sum(store.peek(SUPERBLOCK_KEY) == value for store in self.world.data)


@pytest.fixture
async def mount(autojump_clock, scratch):
    fs = await Mount.make(scratch / "store")
    fs.start()
    yield fs
    fs.close()


async def test_what_another_command_changed_is_taken_up_and_brought_to_all(mount):
    value = mount.changed(add_slot(mount.opened.superblock, mount.opened.keys, NEW, mount.clock))
    mount.put(value, 1)
    await mount.upkeep.look()
    assert mount.held(value) == 8 and mount.upkeep.settled
    assert mount.store.local(SUPERBLOCK_ROW) == value
    assert mount.upkeep.opened.superblock.revision == 2


async def test_a_new_master_key_seals_what_is_new_only_once_a_quorum_holds_it(mount, autojump_clock):
    """Else a later change that never saw it would leave objects that nothing opens."""
    value = mount.changed(rotate_master(mount.opened.superblock, mount.opened.keys, [SECRET], mount.clock, number=2))
    mount.put(value, 2)
    for number in (3, 4, 5, 6, 7, 8):
        mount.backends[number].down = True
    await mount.upkeep.look()
    assert not mount.upkeep.settled and mount.opened.keys.numbers == (1,)
    assert mount.store.local(SUPERBLOCK_ROW) != value
    for backend in mount.backends.values():
        backend.down = False
    await mount.upkeep.look()
    assert mount.opened.keys.numbers == (1, 2) and mount.opened.keys.current.number == 2
    assert mount.store.local(SUPERBLOCK_ROW) == value and mount.held(value) == 8
    assert mount.upkeep.opened.keys is mount.opened.keys, "everything that seals has this ring"


async def test_the_local_copy_opens_before_anything_is_sealed_under_the_new_key(mount):
    value = mount.changed(rotate_master(mount.opened.superblock, mount.opened.keys, [SECRET], mount.clock, number=2))
    mount.put(value, 8)
    seen = []
    commit = mount.upkeep._committer.commit

    async def watched() -> None:
        seen.append(mount.opened.keys.current.number)
        await commit()

    mount.upkeep._committer.commit = watched
    await mount.upkeep.look()
    assert seen == [1] and mount.opened.keys.current.number == 2


async def test_slots_with_another_master_key_of_a_number_that_is_held_are_not_taken_up(mount, expect_log):
    """What was sealed under ours would open nowhere: the local copy, which still opens it, stays."""
    expect_log("are not taken up: master key 2 .* has two different secrets", logging.WARNING, count=1)
    first = mount.opened.superblock, mount.opened.keys

    def rotated(superblock, keys, number):
        return rotate_master(superblock, keys, [SECRET], mount.clock, number=number)

    rival = rotated(first[0], open_superblock(mount.store.local(SUPERBLOCK_ROW), SECRET)[1], 2)
    rival = rotated(rival.superblock, rival.keys, 3)
    ours = mount.changed(rotated(*first, 2))
    mount.put(ours, 8)
    await mount.upkeep.look()
    assert mount.opened.keys.numbers == (1, 2)
    mount.put(mount.changed(rival), 8)
    await mount.upkeep.look()
    assert mount.store.local(SUPERBLOCK_ROW) == ours and mount.opened.keys.numbers == (1, 2)


async def test_a_secret_that_was_rotated_away_does_not_hinder_the_mount(mount):
    change = rotate_slot(mount.opened.superblock, mount.opened.keys, 1, NEW, mount.clock)
    mount.put(mount.changed(change), 3)
    await mount.upkeep.look()
    assert mount.upkeep.opened.superblock == change.superblock
    assert open_superblock(mount.store.local(SUPERBLOCK_ROW), NEW)[0].revision == 2


async def test_a_master_key_that_the_mounts_secret_does_not_open_is_said_and_left(mount, caplog, expect_log):
    expect_log("does not open the new one", logging.WARNING, count=1)
    two = add_slot(mount.opened.superblock, mount.opened.keys, NEW, mount.clock)
    three = remove_slot(two.superblock, two.keys, 1)
    value = mount.changed(rotate_master(three.superblock, three.keys, [NEW], mount.clock, number=2))
    mount.put(value, 7)
    for _ in range(2):
        await mount.upkeep.look()
    assert mount.opened.keys.numbers == (1,) and mount.held(value) == 7
    assert SECRET.hex() not in caplog.text


async def test_a_mount_with_a_passphrase_takes_up_one_master_key_after_the_other(mount):
    """With four passphrases, each rotation gives four salts more to try."""
    phrases = [Passphrase(f"words of slot {number}") for number in range(2, 6)]
    superblock, keys = mount.opened.superblock, mount.opened.keys
    for phrase in phrases:
        change = add_slot(superblock, keys, phrase, mount.clock, CHEAP)
        superblock, keys = change.superblock, change.keys
    mount.put(mount.changed(change), 8)
    upkeep = mount.start_with(Passphrase(phrases[2].utf8.decode()))
    for number in range(2, 9):
        every = [SECRET, *(Passphrase(phrase.utf8.decode()) for phrase in phrases)]
        change = rotate_master(superblock, keys, every, mount.clock, number=number)
        superblock, keys = change.superblock, change.keys
        mount.put(mount.changed(change), 8)
        await upkeep.look()
        assert upkeep.opened.keys.current.number == number


async def test_a_mount_says_that_forged_slots_wore_its_passphrase_out(mount, expect_log):
    expect_log("key slots that it does not open, as a backend may forge", logging.WARNING, count=1)
    expect_log("does not open the new one", logging.WARNING, count=1)
    upkeep = mount.start_with(Passphrase("not tried for ever"))
    keys = mount.opened.keys
    for number in range(2, 6):
        superblock = mount.opened.superblock
        for slot in range(6):
            phrase = Passphrase(f"forged {number} {slot}")
            superblock = add_slot(superblock, keys, phrase, mount.clock, CHEAP).superblock
        forged = KeyRing(keys.fsid, [MasterKey(number, b"f" * 32)])
        mount.put(encode_superblock(superblock, forged, mount.clock), 1)
        await upkeep.look()
    assert upkeep.opened.keys.numbers == (1,)


async def test_backends_that_were_down_or_lost_it_get_it_again(mount):
    mount.world.data[3].lose(SUPERBLOCK_KEY)
    mount.world.data[4].rot(SUPERBLOCK_KEY, lambda value: value[:-1] + b"?")
    await mount.upkeep.look()
    assert mount.held(mount.world.data[0].peek(SUPERBLOCK_KEY)) == 8


async def test_a_backend_that_is_back_is_refilled_at_once_and_one_that_refuses_is_not_pressed(mount, autojump_clock):
    """Not once a second, for ever: a full backend would be asked as often."""
    value = mount.changed(add_slot(mount.opened.superblock, mount.opened.keys, NEW, mount.clock))
    mount.put(value, 6)
    mount.backends[8].down = True
    refused = []

    def full(call: str, key: bytes) -> None:
        if call == "set":
            refused.append(key)
            raise BackendFull("backend x: no room")

    mount.backends[7].gate = full
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mount.upkeep.run)
        await trio.sleep(10)
        assert mount.held(value) == 6 and mount.upkeep.settled
        before = len(refused)
        mount.members.by_number(8).failed(BackendUnavailable("backend x: gone"))
        await trio.sleep(3)
        mount.backends[8].down = False
        mount.members.by_number(8).succeeded()
        await trio.sleep(3)
        assert mount.held(value) == 7
        await trio.sleep(30)
        assert before and len(refused) <= before + 2
        nursery.cancel_scope.cancel()


async def test_a_mount_never_brings_back_an_older_revision(mount, autojump_clock):
    """Its own copy is the old one as long as too few backends answer; theirs stays."""
    value = mount.changed(add_slot(mount.opened.superblock, mount.opened.keys, NEW, mount.clock))
    mount.put(value, 8)
    for number in range(2, 9):
        mount.backends[number].down = True
    await mount.upkeep.look()
    for number in range(1, 9):
        mount.backends[number].down = number == 1
    await mount.upkeep.look()
    assert mount.held(value) == 8


async def test_what_is_left_under_old_master_keys_is_counted(mount, autojump_clock):
    def pack(seed: int) -> None:
        built, placement = mount.put_pack(PackKind.DATA, [PlainExtent(2, seed, 1, seed + 1, noise(4096, seed))])
        mount.add_pack_row(built, placement)

    for seed in range(300):
        pack(seed)
    value = mount.changed(rotate_master(mount.opened.superblock, mount.opened.keys, [SECRET], mount.clock, number=2))
    mount.put(value, 8)
    await mount.upkeep.look()
    mount.keys = mount.opened.keys
    pack(300)
    with trio.move_on_after(30):
        await mount.upkeep.run_count()
    status = mount.upkeep.status()
    assert status["master_key"] == 2 and status["old_master_keys"] == [1]
    assert status["left"]["1"]["packs"] == 300 and set(status["left"]) == {"1"}
    assert read_superblock(value, mount.opened.keys).revision == status["revision"]
