"""Key slots on backends: a change holds with a quorum, and no death, outage or race locks anybody out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from qsfs import failpoints
from qsfs.errors import (
    KeyConflict,
    KeyFileError,
    NotFound,
    QsfsError,
    QuorumUnavailable,
    SplitHeads,
)
from qsfs.format.fleet import Fleet
from qsfs.format.head import seal_head
from qsfs.format.key_changes import add_slot, remove_slot, rotate_master, rotate_slot
from qsfs.format.passphrase import KdfCost, Passphrase
from qsfs.format.superblock import SUPERBLOCK_KEY, encode_superblock, open_superblock, replace_slots
from qsfs.health.copies import superblock_copies
from qsfs.remote.ask import Finding
from qsfs.remote.identity import find_members
from qsfs.remote.key_slots import change_key_slots, prove_secret, read_key_state, refill_key_slots
from qsfs.remote.superblock_write import spread_superblock
from qsfs.remote.superblocks import find_superblock
from tests.remote.harness import TIMING, FaultyBackend, TrioClock
from tests.remote.test_format_fs import SECRET as OLD
from tests.remote.test_format_fs import Servers

NEW, THIRD = b"n" * 32, b"t" * 32
CHEAP = KdfCost(64, 1, 1)
WORDS = "correct horse battery staple"


class KeyServers(Servers):
    """A formatted file system on five backends (2 + 2 shards, fence quorum 3), and commands on it."""

    @classmethod
    async def formatted(cls) -> KeyServers:
        servers = cls()
        await servers.format()
        return servers

    def connect(self) -> list[FaultyBackend]:
        """The connections of another process."""
        self.backends = [FaultyBackend(store) for store in self.data]
        return self.backends

    def down(self, *indices: int) -> None:
        for index, backend in enumerate(self.backends):
            backend.down = index in indices

    async def change(self, make, secret=OLD):
        return await change_key_slots(self.candidates(), secret, make, self.clock, TIMING)

    async def add(self, new=NEW, secret=OLD):
        return await self.change(lambda s, k, n: add_slot(s, k, new, self.clock, CHEAP), secret)

    async def remove(self, number, secret=OLD):
        return await self.change(lambda s, k, n: remove_slot(s, k, number), secret)

    async def rotate(self, number=1, new=NEW, secret=OLD):
        return await self.change(lambda s, k, n: rotate_slot(s, k, number, new, self.clock, CHEAP), secret)

    async def rotate_master(self, secrets=(OLD,), secret=OLD, drop=()):
        return await self.change(
            lambda s, k, n: rotate_master(s, k, secrets, self.clock, number=n, drop=drop), secret
        )

    async def refill(self, secret=OLD):
        return await refill_key_slots(self.candidates(), secret, self.clock, TIMING)

    async def find(self, secret=OLD):
        return await find_superblock(self.candidates(), secret)

    def revisions(self, *secrets) -> list[int]:
        """The revision on each backend, by whichever of the secrets opens it (0: none does)."""
        found = []
        for store in self.data:
            value = store.peek(SUPERBLOCK_KEY)
            revision = 0
            for secret in secrets or (OLD, NEW, THIRD):
                try:
                    revision = open_superblock(value, secret)[0].revision
                except QsfsError:
                    continue
            found.append(revision)
        return found


@pytest.fixture
async def servers(autojump_clock):
    return await KeyServers.formatted()


async def test_a_change_lies_on_every_backend_and_both_secrets_open_it(servers):
    changed = await servers.add()
    assert (changed.holders, changed.fleet, changed.late) == (5, 5, "")
    assert servers.revisions(OLD) == servers.revisions(NEW) == [2] * 5
    assert (await servers.find(NEW)).used == {2}
    assert (await servers.find(OLD)).used == {1}


async def test_changes_follow_each_other(servers):
    await servers.add(Passphrase(WORDS))
    await servers.rotate(1, NEW)
    await servers.remove(2, NEW)
    assert servers.revisions(NEW) == [4] * 5
    for secret in (OLD, Passphrase(WORDS)):
        with pytest.raises(KeyFileError, match="opens no key slot"):
            await servers.find(secret)


async def test_with_backends_down_a_quorum_suffices_and_the_rest_is_named_and_refilled(servers):
    servers.down(3, 4)
    changed = await servers.rotate(1, NEW)
    assert changed.holders == 3 and "host3:1/qsfs, host4:1/qsfs keep an older revision" in changed.sentence()
    assert servers.revisions() == [2, 2, 2, 1, 1]
    servers.down()
    assert (await servers.refill(NEW)).holders == 5
    assert servers.revisions(NEW) == [2] * 5


async def test_with_too_few_backends_nothing_is_changed(servers):
    servers.down(2, 3, 4)
    with pytest.raises(QsfsError, match=r"nothing was changed|answered"):
        await servers.add()
    assert servers.revisions() == [1] * 5


async def test_backends_that_fail_at_the_write_leave_a_change_that_refill_completes(servers):
    """Neither made nor undone: both secrets open some copy, and the next command carries it through."""
    for backend in servers.backends[1:]:
        backend.gate = _refuse_sets
    with pytest.raises(QuorumUnavailable, match="neither made nor undone"):
        await servers.rotate(1, NEW)
    assert servers.revisions() == [2, 1, 1, 1, 1]
    servers.connect()
    for secret in (OLD, NEW):
        assert (await servers.find(secret)).superblock.revision == 2
    assert (await servers.refill(OLD)).holders == 5
    assert servers.revisions(NEW) == [2] * 5


def _refuse_sets(call: str, key: bytes) -> None:
    from qsfs.errors import BackendUnavailable

    if call == "set" and key == SUPERBLOCK_KEY:
        raise BackendUnavailable("backend x: connection reset")


class Died(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["add", "rotate", "remove", "master"])
async def test_a_command_that_dies_anywhere_locks_nobody_out(servers, kind, after):
    """At every step the old or the new secret opens, and both see the newest file system."""
    await servers.add(THIRD)
    left = after

    def die() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Died

    failpoints.arm("superblock.stored", die)
    try:
        with pytest.raises(BaseExceptionGroup):
            await {
                "add": servers.add,
                "rotate": servers.rotate,
                "remove": lambda: servers.remove(2),
                "master": lambda: servers.rotate_master((OLD, THIRD)),
            }[kind]()
    finally:
        failpoints.disarm_all()
    servers.connect()
    survivor = {"add": OLD, "rotate": NEW, "remove": OLD, "master": THIRD}[kind]
    state = await read_key_state(servers.candidates(), survivor, servers.clock, TIMING)
    assert not state.found.removed and state.found.superblock.revision == 3
    assert 0 not in servers.revisions(OLD, NEW, THIRD)
    assert (await servers.refill(survivor)).holders == 5
    assert servers.revisions(survivor) == [3] * 5
    assert (await prove_secret(servers.candidates(), survivor, servers.clock, TIMING)).newest


async def test_of_two_commands_at_once_none_undoes_what_the_other_reported(autojump_clock):
    """Over many interleavings: what a command reported as done is in what the next one finds."""
    outcomes = set()
    for seed in range(40):
        world = await KeyServers.formatted()
        rounds = TrioClock(seed)
        done: list[bytes] = []

        async def run(secret: bytes, world=world, rounds=rounds, done=done) -> None:
            one = KeyServers.__new__(KeyServers)
            one.__dict__ |= world.__dict__
            for backend in one.connect():
                backend.delay = lambda call: rounds.random_bytes(1)[0] / 256
            try:
                await one.add(secret)
                done.append(secret)
            except KeyConflict:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, NEW)
            nursery.start_soon(run, THIRD)
        world.connect()
        for secret in (OLD, *done):
            found = await world.find(secret)
            assert not found.removed, f"seed {seed}: a secret that was reported as added opens nothing"
        outcomes.add(len(done))
        await world.refill(OLD)
        assert len(set(world.revisions(OLD))) <= 2
    assert {0, 1} & outcomes, "the two never met: the test shows nothing"


async def rotated_between(servers: KeyServers) -> tuple[KeyServers, Exception | None]:
    """Two rotations of the master key: the second has read before the first is done, and writes afterwards."""
    other = KeyServers.__new__(KeyServers)
    other.__dict__ |= servers.__dict__
    other.connect()

    def make(superblock, keys, number):
        trio.from_thread.run(other.rotate_master)
        return rotate_master(superblock, keys, (OLD,), servers.clock, number=number)

    servers.connect()
    try:
        await servers.change(make)
    except KeyConflict as error:
        return other, error
    return other, None


async def test_a_rotation_that_was_reported_is_not_overwritten_by_one_that_began_before(servers):
    """What a mount seals under the new master key at once would be lost with it."""
    other, error = await rotated_between(servers)
    assert isinstance(error, KeyConflict) and "at the same time" in str(error)
    found = await other.find()
    assert found.keys.numbers == (1, 2) and servers.revisions(OLD) == [2] * 5
    await other.rotate_master()
    assert (await other.find()).keys.get(2) == found.keys.get(2)


async def test_a_change_that_lost_against_another_is_replaced_once_that_is_seen_on_a_quorum(servers):
    """Two of five backends have the loser's: the next refill mends them, and no later command fails for it."""
    loser = servers.change(lambda s, k, n: rotate_master(s, k, (OLD,), servers.clock, number=n))
    for backend in servers.backends[:3]:
        backend.gate = _refuse_sets
    with pytest.raises(QuorumUnavailable):
        await loser
    lost = [store.peek(SUPERBLOCK_KEY) for store in servers.data[3:]]
    for store, value in zip(servers.data[3:], [store.peek(SUPERBLOCK_KEY) for store in servers.data[:2]], strict=True):
        store.put(SUPERBLOCK_KEY, value)
    servers.connect()
    await servers.rotate_master()
    for store, value in zip(servers.data[3:], lost, strict=True):
        store.put(SUPERBLOCK_KEY, value)
    won = (await servers.find()).keys
    refilled = await servers.refill()
    assert refilled.holders == 5 and (await servers.find()).keys.get(2) == won.get(2)


async def dropped(servers: KeyServers) -> None:
    """OLD is dropped by a rotation while one backend is away, and comes back with its old copy."""
    await servers.add()
    servers.down(4)
    await servers.rotate_master((NEW,), NEW, drop=(1,))
    servers.down()


@pytest.mark.parametrize("change", ["rotate_master", "add", "refill"])
async def test_a_secret_that_was_dropped_changes_nothing(servers, change):
    """Not even with an old copy that it still opens: that would lock out everybody else."""
    await dropped(servers)
    held = [store.peek(SUPERBLOCK_KEY) for store in servers.data]
    with pytest.raises(KeyFileError, match="nothing was changed"):
        await {
            "rotate_master": lambda: servers.rotate_master((OLD,), OLD, drop=(2,)),
            "add": lambda: servers.add(THIRD, OLD),
            "refill": lambda: servers.refill(OLD),
        }[change]()
    assert [store.peek(SUPERBLOCK_KEY) for store in servers.data] == held
    assert servers.revisions(NEW)[:4] == [3] * 4


async def test_a_secret_that_was_dropped_proves_nothing(servers):
    await dropped(servers)
    with pytest.raises(KeyFileError, match="does not open"):
        await prove_secret(servers.candidates(), OLD, servers.clock, TIMING)
    assert (await prove_secret(servers.candidates(), NEW, servers.clock, TIMING)).opens == 5


async def test_a_check_of_copies_leaves_another_change_of_the_key_slots_alone(servers):
    """It is whole: what a repair by our keys would write over it may be what was lost in the race."""
    before = servers.data[0].peek(SUPERBLOCK_KEY)
    other, _ = await rotated_between(servers)
    held = (await other.find()).keys
    servers.data[4].put(SUPERBLOCK_KEY, before)
    stranger = KeyServers.__new__(KeyServers)
    stranger.__dict__ |= servers.__dict__
    stranger.connect()
    stranger.down(0, 1, 2, 3)
    alone = await find_superblock(stranger.candidates(), OLD)
    rival = rotate_master(alone.superblock, alone.keys, (OLD,), servers.clock, number=2)
    servers.data[4].put(SUPERBLOCK_KEY, encode_superblock(rival.superblock, rival.keys, servers.clock))
    servers.connect()
    members, _ = await find_members(servers.candidates(), held, servers.clock)
    copies = await superblock_copies(members, held)
    assert [copy.finding for copy in copies.copies] == [*[Finding.GOOD] * 4, Finding.UNKNOWN]
    assert not copies.wrong


async def test_a_removed_secret_still_opens_an_old_copy_and_is_told_so(servers):
    await servers.add()
    servers.down(4)
    await servers.remove(1, NEW)
    servers.down()
    found = await servers.find(OLD)
    assert "was removed" in found.removed and not found.used and found.superblock.revision == 3
    with pytest.raises(KeyFileError, match="was removed"):
        await prove_secret(servers.candidates(), OLD, servers.clock, TIMING)
    with pytest.raises(KeyFileError, match="nothing was changed"):
        await servers.add(THIRD, OLD)
    await servers.refill(NEW)
    with pytest.raises(KeyFileError, match="opens no key slot"):
        await servers.find(OLD)


async def test_old_copies_never_replace_newer_ones_also_with_an_old_secret(servers):
    """A repair with a secret that was removed, or that is of before a rotation, must not bring it back."""
    await servers.add()
    servers.down(4)
    await servers.remove(1, NEW)
    await servers.rotate_master((NEW,), NEW)
    servers.down()
    stale = await servers.find(OLD)
    assert stale.superblock.revision == 2 and stale.keys.numbers == (1,)
    members, _ = await find_members(servers.candidates(), stale.keys, servers.clock)
    copies = await superblock_copies(members, stale.keys)
    assert [copy.finding for copy in copies.copies] == [*[Finding.UNKNOWN] * 4, Finding.GOOD]
    assert not copies.wrong
    spread = await spread_superblock(members, stale.value, stale.keys, timing=TIMING)
    assert spread.holders == {5} and servers.revisions(NEW)[:4] == [4] * 4


async def test_a_new_master_key_opens_old_and_new_objects_and_its_number_is_new(servers):
    before = (await servers.find()).keys.current
    await servers.rotate_master()
    found = await servers.find()
    assert found.keys.numbers == (1, 2) and found.keys.get(1) == before
    assert (await prove_secret(servers.candidates(), OLD, servers.clock, TIMING)).newest
    await servers.rotate_master()
    assert (await servers.find()).keys.numbers == (1, 2, 3)


async def test_the_number_of_a_master_key_that_did_not_hold_is_not_used_again(servers):
    for backend in servers.backends[1:]:
        backend.gate = _refuse_sets
    with pytest.raises(QuorumUnavailable):
        await servers.rotate_master()
    servers.connect()
    await servers.rotate_master()
    # The copy on one backend was of the highest revision and is built upon.
    assert (await servers.find()).keys.numbers == (1, 2, 3)


async def test_what_a_passphrase_opens_is_proven_on_every_backend(servers):
    await servers.add(Passphrase(WORDS))
    proof = await prove_secret(servers.candidates(), Passphrase(WORDS), servers.clock, TIMING)
    assert proof.opens == 5 and proof.newest
    assert "opens key slot 2 (argon2id)" in proof.sentences[0] and "5 of 5" in proof.sentences[0]
    assert "generation 1 of epoch 1" in proof.sentences[1]
    with pytest.raises(KeyFileError):
        await prove_secret(servers.candidates(), Passphrase("something else"), servers.clock, TIMING)


def another_line(servers, state, **changes) -> None:
    """What a copy of the machine that wrote the newest head sent in its place."""
    head = state.newest.head
    sealed = seal_head(replace(head, time_ns=head.time_ns + 1, **changes), state.found.keys, servers.clock)
    for store in servers.control:
        store.put(sealed.key, sealed.value)


async def test_key_commands_need_nobody_to_choose_between_two_lines_of_heads(servers):
    """A slot may have to be closed at once; what holds, holds whichever line is chosen, and it is told of."""
    state = await read_key_state(servers.candidates(), OLD, servers.clock, TIMING)
    another_line(servers, state)
    await servers.add(NEW)
    await servers.remove(1, NEW)
    assert (await servers.refill(NEW)).holders == 5
    proof = await prove_secret(servers.candidates(), NEW, servers.clock, TIMING)
    assert proof.opens == 5 and "two copies of one machine" in proof.sentences[-1]


async def test_a_change_of_keys_holds_with_a_quorum_of_the_fleets_of_both_lines(servers):
    """One line has left two backends: of the three that it counts one is not enough, though three of five are."""
    state = await read_key_state(servers.candidates(), OLD, servers.clock, TIMING)
    [fleet] = state.newest.head.fleets
    fewer = Fleet(fleet.number + 1, fleet.entries[2:])
    another_line(servers, state, fleets=(fewer,))
    candidates = servers.candidates()
    servers.down(3, 4)
    with pytest.raises(QuorumUnavailable, match=f"fleet {fewer.number}: 1 of the 2"):
        await change_key_slots(
            candidates, OLD, lambda s, k, n: add_slot(s, k, NEW, servers.clock, CHEAP), servers.clock, TIMING
        )


async def test_two_lines_that_call_different_backends_by_one_number_stop_key_commands(servers):
    state = await read_key_state(servers.candidates(), OLD, servers.clock, TIMING)
    [fleet] = state.newest.head.fleets
    other = replace(fleet.entries[0], identity=b"o" * 16)
    another_line(servers, state, fleets=(Fleet(fleet.number + 1, (other, *fleet.entries[1:])),))
    with pytest.raises(SplitHeads):
        await servers.add(NEW)


async def test_too_few_backends_prove_nothing(servers):
    servers.down(1, 2, 3, 4)
    with pytest.raises(QuorumUnavailable):
        await prove_secret(servers.candidates(), OLD, servers.clock, TIMING)


async def test_a_rotten_copy_is_named_and_the_next_change_replaces_it(servers):
    servers.data[2].rot(SUPERBLOCK_KEY, lambda value: value[:100] + b"\0" + value[101:])
    state = await read_key_state(servers.candidates(), OLD, servers.clock, TIMING)
    assert state.holders == {1, 2, 4, 5} and any("checksum" in line for line in state.sentences())
    assert (await servers.add()).holders == 5


async def test_a_copy_that_is_gone_is_filled_and_something_else_is_left_alone(servers):
    servers.data[1].lose(SUPERBLOCK_KEY)
    servers.data[2].put(SUPERBLOCK_KEY, b"not of qsfs")
    changed = await servers.add()
    assert changed.holders == 4 and "host2:1/qsfs" in changed.late
    assert servers.data[2].peek(SUPERBLOCK_KEY) == b"not of qsfs"


async def test_all_copies_rotten_is_said_as_that(servers):
    for store in servers.data:
        store.rot(SUPERBLOCK_KEY, lambda value: value[:100] + b"\0" + value[101:])
    with pytest.raises(QsfsError, match="checksum does not fit"):
        await servers.find()
    for store in servers.data:
        store.lose(SUPERBLOCK_KEY)
    with pytest.raises(NotFound, match="no file system"):
        await servers.find()


async def test_hostile_copies_are_tried_after_the_common_one(servers, monkeypatch):
    """A backend that invents slots costs the reader nothing where others hold the right superblock."""
    await servers.add(Passphrase(WORDS))
    found = await servers.find()
    params = {"salt": b"f" * 32, "memory_kib": 64, "iterations": 1, "lanes": 1}
    forged = [
        type(found.superblock.slots[0])(9, "argon2id", params | {"salt": bytes([n]) * 32}, 1, bytes(12), b"w" * 48)
        for n in range(9)
    ]
    value = encode_superblock(replace_slots(found.superblock, tuple(forged)), found.keys, servers.clock)
    servers.data[0].put(SUPERBLOCK_KEY, value[:-40] + bytes(40))
    runs = []
    derive = Passphrase.derive
    monkeypatch.setattr(Passphrase, "derive", lambda *args: runs.append(args) or derive(*args))
    again = await servers.find(Passphrase(WORDS))
    assert again.superblock == found.superblock
    assert len({args[1] for args in runs}) == 1
