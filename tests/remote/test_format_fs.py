"""Format: nothing is written before all is tried, everything is where a mount looks for it afterwards."""

from __future__ import annotations

import dataclasses

import pytest

from qsfs import failpoints
from qsfs.backend.memory import MemoryStore
from qsfs.errors import (
    AlreadyFormatted,
    BackendFull,
    BackendRefused,
    BackendUnavailable,
    ConfigError,
    Corrupt,
    FormatMismatch,
    KeyFileError,
    NotFound,
    QuorumUnavailable,
)
from qsfs.format.erasure import CodeParams
from qsfs.format.head import Head, Owner, SealedHead, seal_head
from qsfs.format.superblock import SUPERBLOCK_KEY, encode_superblock, replace_slots
from qsfs.remote.control import Records
from qsfs.remote.format_fs import FirstGeneration, FormatContext, FormatReport, format_fs
from qsfs.remote.identity import find_members
from qsfs.remote.members import Candidate, Members
from qsfs.remote.superblocks import find_superblock
from qsfs.remote.survey import find_newest
from tests.remote.harness import TIMING, FaultyBackend, TrioClock, keys_of

SECRET = bytes(range(32))
CODE = CodeParams(2, 4)


class Servers:
    """Backends as a configuration names them, and the stores behind them."""

    def __init__(self, count: int = 5, *, shared: bool = False) -> None:
        self.clock = TrioClock(7)
        self.data = [MemoryStore(f"host{i}:1/qsfs", clock=self.clock) for i in range(count)]
        self.control = [MemoryStore(f"host{i}:1/heads", clock=self.clock) for i in range(count)]
        self.shared = shared
        self.backends = [FaultyBackend(store) for store in self.data]
        self.spool: list[SealedHead] = []
        self.prepared: list[FormatContext] = []

    def candidates(self) -> list[Candidate]:
        return [
            Candidate(
                address=f"host{i}:1",
                namespace="qsfs",
                data=self.backends[i],
                connect=lambda name, i=i: FaultyBackend(self.control[i]),
                group=f"g{i}",
                control_namespace="" if self.shared else "heads",
            )
            for i in range(len(self.data))
        ]

    async def format(self, **options: object) -> FormatReport:
        arguments = {
            "secret": SECRET,
            "code": CODE,
            "clock": self.clock,
            "host": "alpha",
            "prepare_root": self.prepare,
            "store_before_send": self.store,
            "timing": TIMING,
        } | options
        return await format_fs(arguments.pop("candidates", self.candidates()), **arguments)  # type: ignore[arg-type]

    async def prepare(self, context: FormatContext) -> FirstGeneration:
        self.prepared.append(context)
        return FirstGeneration((), {"inodes": 1}, 5, 1)

    async def store(self, sealed: SealedHead) -> None:
        self.spool.append(sealed)

    def all_keys(self) -> set[bytes]:
        return {key for store in (*self.data, *self.control) for key in keys_of(store)}


@pytest.mark.parametrize("shared", [False, True])
async def test_a_new_file_system_is_found_by_its_key_alone(autojump_clock, shared):
    servers = Servers(shared=shared)
    report = await servers.format(label="node", block_size=32768)
    assert report.fleet.number == 1 and [entry.number for entry in report.fleet.entries] == [1, 2, 3, 4, 5]
    assert len({entry.identity for entry in report.fleet.entries}) == 5
    assert all(member.writable for member in servers.prepared[0].members)
    assert [sealed.ref for sealed in servers.spool] == [report.ref]
    assert report.sentences[1] == "The fence quorum is 3 of 5: 2 may be down, 0 may be stale or lie."
    assert any("packs become full" in warning for warning in report.warnings)

    found = await find_superblock(servers.candidates(), SECRET)
    assert found.superblock == report.superblock and found.superblock.label == "node" and not found.problems
    members, strangers = await find_members(servers.candidates(), found.keys, servers.clock)
    assert len(members) == 5 and not strangers
    newest = await find_newest(members, Records(found.keys), found.superblock.code, servers.clock, TIMING)
    assert newest.head == report.head and newest.head.counters == {"inodes": 1}
    assert newest.head.block_size == 32768 and newest.head.generation == 1 and newest.head.owner.epoch == 1
    assert [member.entry for member in members] == list(report.fleet.entries) and not newest.missing
    assert newest.judgement.withstands == 2


async def test_the_trial_leaves_nothing_behind(autojump_clock):
    servers = Servers()
    with pytest.raises(ConfigError):
        await servers.format(prepare_root=refuse)
    assert not [key for key in servers.all_keys() if b"canary" in key]


async def refuse(context: FormatContext) -> FirstGeneration:
    raise ConfigError("no")


@pytest.mark.parametrize("error", [BackendUnavailable, BackendRefused, BackendFull])
async def test_every_backend_must_answer_and_all_that_do_not_are_named(autojump_clock, error):
    servers = Servers()

    def gate(call: str, key: bytes) -> None:
        if call == "set":
            raise error("backend: not now")

    servers.backends[1].gate = gate
    with pytest.raises(error, match="not now"):
        await servers.format()
    assert not servers.all_keys() and not servers.prepared


async def test_a_silent_backend_ends_the_format(autojump_clock):
    servers = Servers()
    servers.backends[1].delay = lambda call: 1e6
    with pytest.raises(BackendUnavailable, match="no answer in 5 s"):
        await servers.format()


async def test_a_backend_that_returns_something_else_is_refused(autojump_clock):
    servers = Servers()
    store = servers.data[2]
    put = store.put
    store.put = lambda key, value: put(key, value[:-1] + b"?")  # type: ignore[method-assign]
    with pytest.raises(BackendRefused, match="does not return what was stored"):
        await servers.format()


async def test_a_write_once_namespace_is_refused(autojump_clock):
    servers = Servers()
    servers.data[2].worm = True
    with pytest.raises(BackendRefused, match="write-once"):
        await servers.format()
    assert not servers.all_keys()


async def test_one_namespace_under_two_addresses_is_noticed(autojump_clock):
    servers = Servers()
    servers.backends[1] = FaultyBackend(servers.data[0])
    with pytest.raises(ConfigError, match="one and the same namespace"):
        await servers.format()
    assert not servers.all_keys()


async def test_too_few_or_doubled_backends_are_refused_before_anything_is_called(autojump_clock):
    servers = Servers(3)
    with pytest.raises(ConfigError, match="3 backends are configured, and a pack has 4 shards"):
        await servers.format()
    servers = Servers()
    doubled = servers.candidates()
    doubled[1] = dataclasses.replace(doubled[1], address=doubled[0].address)
    with pytest.raises(ConfigError, match="host0:1/heads, host0:1/qsfs"):
        await servers.format(candidates=doubled)
    assert not any(backend.calls for backend in servers.backends)


async def test_an_existing_file_system_is_kept_unless_its_id_is_named(autojump_clock):
    servers = Servers()
    old = await servers.format()
    before = servers.all_keys()
    with pytest.raises(AlreadyFormatted, match=old.keys.fsid.hex()):
        await servers.format()
    with pytest.raises(AlreadyFormatted, match=old.keys.fsid.hex()):
        await servers.format(force=b"another id 16 by")
    assert servers.all_keys() == before
    new = await servers.format(force=old.keys.fsid)
    assert new.keys.fsid != old.keys.fsid
    assert any("still takes room" in warning for warning in new.warnings)
    assert (await find_superblock(servers.candidates(), SECRET)).keys.fsid == new.keys.fsid


async def test_what_is_left_of_a_file_system_without_superblock_counts(autojump_clock):
    """One backend alone holds shards or heads of it: that is enough to stop."""
    servers = Servers()
    old = await servers.format()
    for store in servers.data:
        store.clear()
    for store in servers.control[1:]:
        store.clear()
    with pytest.raises(AlreadyFormatted, match=f"{old.keys.fsid.hex()} on host0:1/heads"):
        await servers.format()


async def test_an_unreadable_superblock_is_never_overwritten(autojump_clock):
    servers = Servers()
    servers.data[0].put(SUPERBLOCK_KEY, b"QSFS of some other version")
    with pytest.raises(AlreadyFormatted, match="cannot be read on host0:1/qsfs"):
        await servers.format()
    with pytest.raises(AlreadyFormatted):
        await servers.format(force=bytes(16))


async def test_foreign_keys_are_left_alone_and_mentioned(autojump_clock):
    servers = Servers()
    servers.data[0].put(b"somebody else's", b"value")
    report = await servers.format()
    assert any("host0:1/qsfs: holds keys that qsfs did not write" in warning for warning in report.warnings)
    assert servers.data[0].peek(b"somebody else's") == b"value"


@pytest.mark.parametrize("step", ["format.tried", "format.marked", "format.announced", "format.prepared"])
async def test_a_format_that_broke_off_can_be_repeated(autojump_clock, step):
    """Once anything was written its id must be named: it may be a file system that lost its heads."""
    servers = Servers()

    def fail() -> None:
        raise QuorumUnavailable("broken off")

    failpoints.arm(step, fail)
    with pytest.raises(QuorumUnavailable, match="broken off"):
        await servers.format()
    failpoints.disarm(step)
    if step == "format.tried":
        await servers.format()
        return
    with pytest.raises(AlreadyFormatted, match=r"file system ([0-9a-f]{32})") as caught:
        await servers.format()
    fsid = bytes.fromhex(str(caught.value).split("file system ")[1][:32])
    await servers.format(force=fsid)
    assert (await find_superblock(servers.candidates(), SECRET)).keys.fsid != fsid


async def test_two_formats_at_once_do_not_both_succeed(autojump_clock):
    """The head is read back as a restore reads it: a head of another owner above it is noticed."""
    servers = Servers()

    def somebody_else() -> None:
        context = servers.prepared[0]
        head = dataclasses.replace(first_head_of(context), owner=Owner(9, b"e" * 16))
        sealed = seal_head(head, context.keys, servers.clock)
        for store in servers.control:
            store.put(sealed.key, sealed.value)

    failpoints.arm("publish.published", somebody_else)
    with pytest.raises(ConfigError, match="another qsfs is formatting"):
        await servers.format()


def first_head_of(context: FormatContext) -> Head:
    return Head(context.keys.fsid, context.owner, 1, 0, 0, None, (context.fleet,), (), (), ())


async def test_a_code_that_does_not_decode_is_refused_before_anything_is_written(autojump_clock, monkeypatch):
    from qsfs.format.erasure import Code

    def fails(self: Code, seed: bytes, samples: int = 0) -> int:
        raise FormatMismatch("does not decode")

    monkeypatch.setattr(Code, "prove", fails)
    servers = Servers()
    with pytest.raises(FormatMismatch):
        await servers.format()
    assert not any(backend.calls for backend in servers.backends)


async def test_superblock_absent_unknown_corrupt_and_locked_are_four_results(autojump_clock):
    servers = Servers()
    with pytest.raises(NotFound, match="qsfs format"):
        await find_superblock(servers.candidates(), SECRET)
    servers.backends[0].down = True
    with pytest.raises(QuorumUnavailable, match="not every backend could be read"):
        await find_superblock(servers.candidates(), SECRET)
    servers.backends[0].down = False
    await servers.format()
    with pytest.raises(KeyFileError):
        await find_superblock(servers.candidates(), b"x" * 32)
    for store in servers.data[1:]:
        store.rot(SUPERBLOCK_KEY, lambda value: value[:-1] + b"?")
    found = await find_superblock(servers.candidates(), SECRET)
    assert len(found.problems) == 4 and all(isinstance(error, Corrupt) for _, error in found.problems)
    servers.data[0].rot(SUPERBLOCK_KEY, lambda value: value[:-1] + b"?")
    with pytest.raises(Corrupt):
        await find_superblock(servers.candidates(), SECRET)


async def test_of_several_superblocks_the_highest_revision_is_right(autojump_clock):
    servers = Servers()
    report = await servers.format()
    newer = replace_slots(report.superblock, report.superblock.slots)
    servers.data[4].put(SUPERBLOCK_KEY, encode_superblock(newer, report.keys, servers.clock))
    found = await find_superblock(servers.candidates(), SECRET)
    assert found.superblock == newer
    assert len(found.problems) == 4


async def test_backends_of_two_file_systems_are_not_mixed(autojump_clock):
    one, two = Servers(), Servers()
    two.clock = TrioClock(8)
    await one.format()
    await two.format()
    with pytest.raises(FormatMismatch, match="several file systems"):
        await find_superblock([*one.candidates()[:2], *two.candidates()[:1]], SECRET)


async def test_no_backend_at_all_is_unknown(autojump_clock):
    with pytest.raises(QuorumUnavailable, match="no backend is configured"):
        await find_superblock([], SECRET)
    servers = Servers()
    report = await servers.format()
    with pytest.raises(QuorumUnavailable, match="none is known"):
        await find_newest(Members(), Records(report.keys), CODE, servers.clock, TIMING)
