"""What the design promises of any history, asked of the backends alone once everything is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from qsfs.daemon.committer import Committer
from qsfs.daemon.connect import members_of, open_file_system
from qsfs.daemon.owning import local_fleets
from qsfs.daemon.restoring import restore_file_system
from qsfs.errors import SplitHeads
from qsfs.format.extent import PackKind
from qsfs.format.head import Head, HeadRef, head_key, open_head
from qsfs.format.shard import open_shard, shard_key
from qsfs.remote.base import BASE_KEY, local_head
from qsfs.remote.fetch import Fetcher
from qsfs.remote.image import packs_of
from qsfs.remote.readable import Wanted
from qsfs.remote.reader import PackReader
from qsfs.store.schema import PackRow, Table
from tests.remote.flush_machine import restore
from tests.remote.small_fs import SECRET
from tests.simulation.machine import Life, Machine

if TYPE_CHECKING:
    from tests.simulation.stage import Stage


async def at_the_end(history: Stage, name: str = "restorer") -> None:
    """All of it; `name` is that of the machine that restores."""
    found = await restored(history, name)
    base: HeadRef = found.restored_ref  # type: ignore[attr-defined]
    one_line(history, history.ledger.left_behind(base))
    packs_hold(history, found)
    kept_generations(history, found)
    snapshots_are_there(history, found)
    found.cut_power()
    await found.ended.wait()


def one_line(history: Stage, left: set[HeadRef]) -> None:
    """Of any two published heads one descends from the other: never two writers, and none is lost.

    But for those that an operator has `left` by choosing another line.
    """
    ledger = history.ledger
    newest: HeadRef | None = None
    for ref in sorted({ref for _, ref in ledger.published} - left, key=lambda ref: (ref.owner, ref.generation)):
        if newest is not None:
            assert newest in ledger.ancestors(ref), f"published head {newest} is lost to {ref}"
        newest = ref


async def restored(history: Stage, name: str) -> Life:
    """A restore by a machine that knows nothing gives the state at the cut of a head that no published one follows.

    Without as many backends as may be lost.  Where two copies of one machine have left two lines of heads, the restore
    says so, and an operator chooses one.  Returns the machine, its store open.
    """
    cluster, chance, ledger = history.cluster, history.chance, history.ledger
    most = min(-(-cluster.m // 2), cluster.quorum.may_be_stale)
    others = [number for number in cluster.numbers if number not in cluster.liars]
    lost = frozenset([*cluster.liars, *chance.sample(others, most - len(cluster.liars))])
    lost = frozenset(chance.sample(sorted(lost), chance.randint(0, len(lost))))
    found = await _restored(history, name, lost)
    if isinstance(found, SplitHeads):
        ledger.counts["split"] += 1
        if not ledger.twins:
            # A backend that went back may look like a second line; without those that lie there is one.
            found = await _restored(history, f"{name}-again", cluster.liars)
            assert isinstance(found, Life), "two lines of heads, and no machine was ever copied"
            return found
        digest = chance.choice(found.digests)
        chosen = ledger.choose(digest, found.digests)
        found = await _restored(history, f"{name}-chose", lost, digest)
        assert isinstance(found, Life), f"chose {digest}, and is asked again: {found}"
        assert found.restored_ref == chosen  # type: ignore[attr-defined]
        ledger.counts["chosen"] += 1
    return found


async def _restored(history: Stage, name: str, lost: frozenset[int], head: str | None = None) -> Life | SplitHeads:
    cluster, chance, ledger = history.cluster, history.chance, history.ledger
    machine = Machine(cluster, name, history.root, chance.getrandbits(40))
    machine.opened = history.opened
    life = Life(machine, cut_off=lost)
    history.trace.note(f"restored without {sorted(lost)}")
    split: SplitHeads | None = None
    done = False

    async def work(life: Life) -> None:
        nonlocal split, done
        try:
            report = await restore_file_system(
                life.config, machine.clock, lambda line: None, wanted=Wanted(head=head), secret=SECRET
            )
        except SplitHeads as error:
            assert ledger.twins or cluster.liars, f"false alarm: {error}"
            split = error
            return
        assert report.withstands >= 0 or cluster.liars
        latest = max({ref for _, ref in ledger.published} - ledger.left_behind(report.base))
        assert latest in ledger.ancestors(report.base), f"restored {report.base}, and {latest} was published"
        store = life.open()
        held = ledger.version_of[report.base]
        assert life.version == held, f"restored version {life.version}, the head's cut was {held}"
        await _read_all(history, life)
        history.trace.note(f"restored version {held} of {report.base.generation}")
        assert store is life.store
        base = local_head(store, BASE_KEY, cluster.world.keys)
        assert base is not None
        life.restored = base.head  # type: ignore[attr-defined]
        life.restored_ref = base.sealed.ref  # type: ignore[attr-defined]
        done = True
        await trio.sleep_forever()

    life.start(history.nursery, work)
    with trio.fail_after(3600):
        while not done and not life.ended.is_set():
            await trio.sleep(1)
    if split is not None:
        return split
    assert done, f"the restore failed: {life.error!r}"
    return life


async def _read_all(history: Stage, life: Life) -> None:
    """Every byte of every file, from the backends."""
    cluster, clock, store = life.cluster, life.machine.clock, life.store
    assert store is not None
    links = cluster.links(life)
    life.committer = Committer(store, life.contents, 5.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(life.committer.run)
        opened = await open_file_system(store, links, SECRET, clock)
        members, _ = await members_of(links, opened, clock, local_fleets(store, opened))
        reader = PackReader(members, opened.keys, opened.code, worth_a_thread=64 << 20)
        life.fetcher = Fetcher(
            store, reader, life.committer, life.contents.transient, deadline_seconds=60.0, path_of=str
        )
        await nursery.start(life.fetcher.run)
        for name, content in history.ledger.versions[life.version].files.items():
            came = await history.applications.read(life, name, 0, len(content))
            assert came, f"{name} cannot be read after the restore"
        nursery.cancel_scope.cancel()


def packs_hold(history: Stage, life: Life) -> None:
    """A pack with k + x shards survives the loss of any x: what honest backends acknowledged is there, and right."""
    cluster = history.cluster
    world = cluster.world
    assert life.store is not None
    head: Head = life.restored  # type: ignore[attr-defined]
    listed = {pack.ref.pack_id for pack, _ in packs_of(head)}
    for _, value in life.store.scan(Table.PACKS, b"", None):
        row = PackRow.decode(value)
        if not (row.live if row.kind == PackKind.DATA else row.pack_id in listed):
            continue
        assert row.pack_id not in cluster.deleted, f"shards of pack {row.pack_id.hex()}, which is named, were deleted"
        intact = 0
        for number, place in enumerate(row.placement):
            if place < 0:
                continue
            key = shard_key(world.keys.fsid, row.owner_epoch, row.pack_id, number)
            if cluster.server_of[place] in cluster.liars:
                continue
            stored = cluster.server(place).peek(key)
            assert stored is not None, f"pack {row.pack_id.hex()}: shard {number} is not on {place}"
            open_shard(stored, world.keys, key=key)
            intact += 1
        stored_shards = sum(place >= 0 for place in row.placement)
        # A second look takes note of what liars have lost since.
        written = cluster.k + -(-cluster.m // 2) - len(cluster.liars)
        assert stored_shards >= written, f"pack {row.pack_id.hex()} was never written"
        assert intact >= cluster.k, f"pack {row.pack_id.hex()}: {intact} shards are left"


def kept_generations(history: Stage, life: Life) -> None:
    """Each generation that the newest head keeps restores exactly."""
    kept_restore(history, life.restored)  # type: ignore[attr-defined]


def kept_restore(history: Stage, head: Head) -> None:
    """Each generation that a head keeps restores exactly."""
    world = history.cluster.world
    published = {ref for _, ref in history.ledger.published}
    for entry in head.kept:
        key = head_key(world.keys.fsid, entry.head)
        old = _head(history, key)
        if old is None:
            # An owner keeps the head that it found, be that one that its mount sent and no quorum took.
            unpublished = entry.head not in published and not entry.pins
            assert unpublished, f"kept head {entry.head} is on no honest backend"
            continue
        image = restore(_honest(history), old)
        version = history.ledger.version_of[entry.head]
        named = {pack.ref.pack_id for pack, _ in packs_of(old)}
        named |= {row.pack_id for row in map(PackRow.decode, image.rows[Table.PACKS].values()) if _needed(row)}
        assert named.isdisjoint(history.cluster.deleted), f"packs of kept generation {entry.head} were deleted"
        assert image.files == history.ledger.versions[version].files, f"kept generation {entry.head.generation} differs"


def _needed(row: PackRow) -> bool:
    return row.kind == PackKind.DATA and row.live > 0


def _head(history: Stage, key: bytes) -> Head | None:
    cluster = history.cluster
    for number in cluster.numbers:
        value = cluster.world.control_of(number).peek(key)
        if number not in cluster.liars and value is not None:
            return open_head(key, value, cluster.world.keys)
    return None


def _honest(history: Stage) -> object:
    from dataclasses import replace

    cluster = history.cluster
    data = [store for n, store in enumerate(cluster.world.data, 1) if n not in cluster.liars]
    return replace(cluster.world, data=data)


def snapshots_are_there(history: Stage, life: Life) -> None:
    """What was reported as a snapshot, and not deleted since, is kept under its name."""
    head: Head = life.restored  # type: ignore[attr-defined]
    kept = {name: entry.head for entry in head.kept for name in entry.pins}
    left = history.ledger.left_behind(life.restored_ref)  # type: ignore[attr-defined]
    for name, ref in history.ledger.snapshots.items():
        if ref in left:
            continue
        assert kept.get(name) == ref, f"snapshot {name} is not kept: {kept}"
