"""Rollback: an older generation becomes the newest again, under a number above all that were seen.

By a machine that owns the file system and has its newest generation as its local state:

1. The older generation's store is built aside, from its metadata packs.
2. A head that pins what is left is published.  From then on nothing is lost, whatever happens.
3. The new head, which lists just those packs, is stored in the spool; the new store, with that head as its
   base, takes the old one's place by one rename; then the head is sent, until it is published.

Whoever dies before the rename has the old state, after it the new one.  A mount then finds its base
ahead of the newest head known to be published, and publishes that state at once.  No object is sealed but heads, so no
key meets another plaintext; new numbers of generations, inodes and packs lie above all used so far.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from qsfs import failpoints
from qsfs.clock import Clock
from qsfs.errors import BackendError, CacheError, Corrupt, FormatMismatch
from qsfs.format.erasure import Code
from qsfs.format.head import Head, HeadRef, KeptGeneration, SealedHead
from qsfs.format.keys import KeyRing
from qsfs.remote.aside import DATA, DIRECTORY, drop_second_name, flush_directory
from qsfs.remote.base import FIRST_COMMIT, PUBLISHED_KEY, encode_local_head
from qsfs.remote.image import packs_of
from qsfs.remote.members import Members
from qsfs.remote.ownership import Ownership
from qsfs.remote.plain import plain_errors
from qsfs.remote.publish import Published
from qsfs.remote.readable import read_head
from qsfs.remote.reader import PackReader
from qsfs.remote.reasons import summary
from qsfs.remote.rebuild import Rebuild, Tally
from qsfs.remote.restore import Progress, Say, load, make_empty, put_in_place
from qsfs.remote.spool import Spool
from qsfs.remote.survey import Timing
from qsfs.store.environment import Environment
from qsfs.store.limits import Limits
from qsfs.store.schema import PAGE, Inode, InodeFlag, Table, split_u64, u64
from qsfs.store.snapshot import CommittedState, Want

LEFT = "before-rollback-"
"""How the names of the snapshots begin that a rollback makes of what it leaves."""
LEFT_BEHIND = b"left-behind"
"""The counter of the newest generation that a rollback left: kept ones up to it may list packs that are not known."""

_PUBLISH_SECONDS = 30.0
_AGAIN_SECONDS = 1.0
_STEP_SECONDS = 0.1
_FILES = (DATA, "journal.0", "journal.1")


BEARABLE_BYTES = 1 << 20
"""What files that are never uploaded may hold for a rollback to empty them unasked: lock files and the like."""


@dataclass(frozen=True, slots=True)
class Unpublished:
    """What local state holds that no published generation does: bytes of contents, changes of everything else.

    `local_files` are never uploaded (`local_only`) and hold `local_bytes`: no mount publishes those.
    """

    bytes: int
    changes: int
    local_files: int = 0
    local_bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self.bytes or self.changes or self.local_files)

    @property
    def publishable(self) -> bool:
        """Whether a mount would publish some of it."""
        return bool(self.bytes or self.changes)

    @property
    def bearable(self) -> bool:
        """Whether a rollback may go ahead and lose it: little, and only what is never uploaded."""
        return not self.publishable and self.local_bytes <= BEARABLE_BYTES


def unpublished(environment: Environment, clock: Clock) -> Unpublished:
    """What the committed state of a store holds since its base.  Blocks, in short transactions.

    Not counted is what a restore itself changed against the generation, and where contents lie.
    """
    most = 1 << 62
    with CommittedState(environment, clock) as state:
        size = max(state.dirty_bytes(most, Want(1)), int(state.moving))
    lowest = u64(FIRST_COMMIT)
    marks = _stepped(environment, clock, Table.CHANGED, bytes((Table.INODES,)), bytes((Table.EXTENTS,)))
    changes = sum(mark > lowest for _, mark in marks)
    files = pages = 0
    for key, row in _stepped(environment, clock, Table.INODES, b"", None):
        inode = Inode.decode(split_u64(key), row)
        # A store that is built from a generation has them empty.
        if inode.flags & InodeFlag.LOCAL_ONLY and inode.nlink and inode.allocated and stat.S_ISREG(inode.mode):
            files += 1
            pages += inode.allocated
    return Unpublished(size, changes, files, pages * PAGE)


def _stepped(
    environment: Environment, clock: Clock, table: Table, start: bytes, stop: bytes | None
) -> Iterator[tuple[bytes, bytes]]:
    """Committed rows of a table, in short transactions."""
    while True:
        until = clock.monotonic() + _STEP_SECONDS
        with CommittedState(environment, clock) as state:
            for key, row in state.view.scan(table, start, stop):
                yield key, bytes(row)
                start = key + b"\0"
                if clock.monotonic() >= until:
                    break
            else:
                return


class HeadGate:
    """Stores heads in the spool before they are sent; `after` runs once between the two, for the next one.

    `failed`: `after` did not succeed, so no head may be sent any more.
    """

    def __init__(self, spool: Spool) -> None:
        self.after: Callable[[SealedHead], Awaitable[None]] | None = None
        self.failed = False
        self._spool = spool

    async def store(self, sealed: SealedHead) -> None:
        """As `Spool.store_head`, and then `after`."""
        await self._spool.store_head(sealed)
        after, self.after = self.after, None
        if after is not None:
            self.failed = True
            await after(sealed)
            self.failed = False


@dataclass(frozen=True, slots=True)
class RollbackReport:
    """What was done: `target` is what the file system is like now, `base` the head that says so.

    `left` is the snapshot of what was left, `aside` where unpublished local state is now.
    """

    target: KeptGeneration
    base: HeadRef
    left: str
    tally: Tally
    aside: Path | None


@dataclass(frozen=True, slots=True)
class Rollback:
    """One rollback to `target`, which the newest head keeps.

    `owned` says that this machine owns, `gate` is what its publisher stores heads with.  `directory` is the
    cache, whose store is closed, with everything in it committed; its mount lock is held.  `counters` are that
    store's, `last` the highest generation number that it knows; `local` rows of LOCAL that the new store
    is to have too.  With `aside` the old store is also kept there.
    """

    owned: Ownership
    gate: HeadGate
    spool: Spool
    members: Members
    keys: KeyRing
    code: Code
    directory: Path
    limits: Limits
    clock: Clock
    counters: Mapping[str, int]
    last: int
    local: Mapping[bytes, bytes]
    aside: Path | None
    say: Say
    waiting: Callable[[str], None]
    timing: Timing
    deadline_seconds: float = 60.0

    async def run(self, target: KeptGeneration, left: str) -> RollbackReport:
        """Rolls back; the generation that is left is pinned as `left`.

        Waits for backends as long as it takes to publish.  Raises what `read_head` and `load` raise for
        what could not be read, `Fenced`, and what the local disk raises; see the module for what is then there.
        """
        self.say(Progress("reading the generation to go back to", 0, 0))
        _, old = await read_head(self.members, target.head, self.keys, self.timing)
        building = self.directory / DIRECTORY
        await trio.to_thread.run_sync(make_empty, building)
        rebuild = await trio.to_thread.run_sync(Rebuild, building, self.limits.map_bytes, self.clock.time_ns())
        try:
            reader = PackReader(self.members, self.keys, self.code)
            with plain_errors():
                async with reader.running():
                    await load(rebuild, reader, list(packs_of(old)), self.say, self.deadline_seconds)
            failpoints.hit("rollback.loaded")
            self.say(Progress("publishing a snapshot of what is left", 0, 0))
            leaving = self._leaving(left)
            leaving_ref = await self._publish(leaving)
            failpoints.hit("rollback.left")
            new = self._new(old, leaving, leaving_ref)
            local = {**self.local, PUBLISHED_KEY: encode_local_head(self.spool.heads[leaving_ref], ours=True)}

            async def replace_store(sealed: SealedHead) -> None:
                failpoints.hit("rollback.stored")
                await trio.to_thread.run_sync(self._replace, rebuild, new, sealed, local)

            self.gate.after = replace_store
            self.say(Progress("publishing it as the newest", 0, 0))
            base = await self._publish(new)
        finally:
            rebuild.close()
            shutil.rmtree(building, ignore_errors=True)
        failpoints.hit("rollback.published")
        return RollbackReport(target, base, left, rebuild.tally, self.aside)

    def _leaving(self, left: str) -> Head:
        """The newest image once more, and with it the pin that keeps it.  Nothing that is kept goes."""
        first, ref = self.owned.first, self.owned.first_ref
        return replace(
            first,
            generation=self.last + 1,
            predecessor=ref,
            kept=(*first.kept, KeptGeneration(ref, first.time_ns, (left,))),
        )

    def _new(self, old: Head, leaving: Head, ref: HeadRef) -> Head:
        """The old generation's image as the newest."""
        counters = dict(old.counters)
        for known in (leaving.counters, self.counters):
            for name, value in known.items():
                counters[name] = max(counters.get(name, 0), value)
        counters[LEFT_BEHIND.decode()] = leaving.generation
        return replace(
            old,
            owner=leaving.owner,
            generation=self.last + 2,
            time_ns=self.clock.time_ns(),
            write_number=max(old.write_number, leaving.write_number),
            predecessor=ref,
            fleets=leaving.fleets,
            kept=(*leaving.kept, KeptGeneration(ref, leaving.time_ns, ())),
            counters=counters,
        )

    async def _publish(self, head: Head) -> HeadRef:
        while True:
            try:
                result = await self.owned.publisher.publish(head, deadline_seconds=_PUBLISH_SECONDS)
            except (BackendError, Corrupt, FormatMismatch) as error:
                if self.gate.failed:
                    raise
                # Not another head: this one may have been sent.
                self.waiting(f"a quorum of backends: {error}")
            else:
                if isinstance(result, Published):
                    self.waiting("")
                    return result.ref
                self.waiting(f"a quorum of backends: {summary(result.reasons)}")
            await trio.sleep(_AGAIN_SECONDS)

    def _replace(self, rebuild: Rebuild, new: Head, sealed: SealedHead, local: Mapping[bytes, bytes]) -> None:
        """Finishes the new store and puts it in the old one's place.  For a worker thread."""
        rebuild.finish(new, sealed, ours=True, local=local)
        rebuild.close()
        if self.aside is not None:
            _link_aside(self.directory, self.aside)
        failpoints.hit("rollback.built")
        try:
            put_in_place(self.directory / DIRECTORY, self.directory)
        except CacheError:
            if self.aside is not None:
                drop_second_name(self.directory, self.aside)
            raise
        failpoints.hit("rollback.replaced")


def _link_aside(directory: Path, aside: Path) -> None:
    """Gives the files of a closed store a second name each, in the new directory `aside`; all or none, durably."""
    try:
        aside.mkdir(mode=0o700)
        try:
            for name in _FILES:
                if (directory / name).exists():
                    (aside / name).hardlink_to(directory / name)
            flush_directory(aside)
            flush_directory(aside.parent)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    except OSError as error:
        raise CacheError(f"{directory}: cannot be set aside in {aside}: {error.strerror}") from error
