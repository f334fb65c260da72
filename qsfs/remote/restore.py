"""Restore: a file system from nothing but the configuration and the key.

Superblock, identities, heads; then the metadata packs that the newest head lists, any k shards of
each; then a local store built aside and put in place by one rename.  A restore that ends early
has done nothing, and begins again.  Contents stay remote.  Nothing on the backends is changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from qsfs import failpoints
from qsfs.clock import Clock
from qsfs.errors import CacheError, Corrupt, QuorumUnavailable, Unavailable
from qsfs.format.erasure import Code
from qsfs.format.head import Head, HeadRef, KeptGeneration
from qsfs.format.keys import KeyRing
from qsfs.format.pack import open_body
from qsfs.format.rows import Row, decode_rows
from qsfs.format.slots import Secret
from qsfs.format.superblock import Superblock
from qsfs.remote.aside import DATA, DIRECTORY, flush_directory, refuse_used
from qsfs.remote.base import REJECTED_KEY, RETURNS_KEY, encode_local_head, encode_rejected
from qsfs.remote.image import Listed, packs_of
from qsfs.remote.members import Candidate
from qsfs.remote.newest import describe_head
from qsfs.remote.plain import plain_errors
from qsfs.remote.readable import Wanted, readable, source_of
from qsfs.remote.reader import PackReader
from qsfs.remote.rebuild import Rebuild, Tally
from qsfs.remote.source import Source, find_source
from qsfs.remote.stored import StoredPack
from qsfs.remote.survey import Found, Timing
from qsfs.store.limits import Limits

_AHEAD = 4

Say = Callable[["Progress"], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a restore has come: `done` of `total` (0: not known) in `step`."""

    step: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What was restored.  `sentences` is what a person should read, `base` names `head`, which is now the local base.

    `newest` is the newest generation, `kept` what it keeps and itself.
    """

    superblock: Superblock
    base: HeadRef
    head: Head
    newest: HeadRef
    kept: tuple[KeptGeneration, ...]
    withstands: int
    packs: int
    tally: Tally
    sentences: tuple[str, ...]


async def restore(
    candidates: Sequence[Candidate],
    *,
    secret: Secret,
    directory: Path,
    limits: Limits,
    clock: Clock,
    timing: Timing | None = None,
    force: bool = False,
    wanted: Wanted | None = None,
    clear: Callable[[], None] | None = None,
    say: Say = lambda progress: None,
    deadline_seconds: float = 60.0,
) -> RestoreReport:
    """Restores the newest generation, or an older one that it keeps, into the cache directory `directory`.

    Where two copies of a machine have sent heads, `wanted` says which one counts as the newest, and the store remembers
    those that it was chosen against.  An older one becomes the newest when it is taken over, not before; see
    `qsfs.remote.base`.
    The caller holds the directory's mount lock.  Refuses (`CacheError`) a directory that holds a
    file system, unless `clear` empties it, which is called once the store is built.  Too few
    backends to rule out a newer generation is `QuorumUnavailable` unless `force`, and `NotFound` says that what is
    `wanted` is not kept.  Metadata that do not come within the deadline are `Unavailable`: nothing is built then.
    """
    if clear is None:
        refuse_used(directory)
    say(Progress("looking for the newest generation", 0, len(candidates)))
    wanted = wanted or Wanted()
    newest = await find_source(
        candidates,
        secret=secret,
        clock=clock,
        timing=timing,
        chosen=wanted.head,
        deadline_seconds=deadline_seconds,
    )
    found = newest.found
    if found.judgement.withstands < 0 and not force:
        raise QuorumUnavailable(
            f"{' '.join(found.sentences(newest.strangers))} Bring more backends back, or restore with --force "
            "what may not be the newest"
        )
    source = await source_of(newest, wanted, timing)
    local: dict[bytes, bytes] = {}
    if source.found.ref != found.ref:
        local[RETURNS_KEY] = encode_local_head(newest.sealed, ours=False)
    if found.rejected:
        local[REJECTED_KEY] = encode_rejected(newest.keys.fsid, found.rejected)
    packs, tally = await restore_into(
        directory,
        source,
        limits,
        clock,
        say=say,
        deadline_seconds=deadline_seconds,
        clear=clear,
        local=local,
    )
    return RestoreReport(
        superblock=source.superblock,
        base=source.found.ref,
        head=source.found.head,
        newest=found.ref,
        kept=readable(found.head, found.ref),
        withstands=found.judgement.withstands,
        packs=packs,
        tally=tally,
        sentences=(*newest.sentences(), *_summary(source.found, tally)),
    )


async def restore_into(
    directory: Path,
    source: Source,
    limits: Limits,
    clock: Clock,
    *,
    say: Say = lambda progress: None,
    deadline_seconds: float = 60.0,
    exact: bool = False,
    clear: Callable[[], None] | None = None,
    local: Mapping[bytes, bytes] | None = None,
) -> tuple[int, Tally]:
    """Builds the store of `source` in `directory`; returns the metadata packs read, and what was found.

    All or nothing: the store is built in a directory below and takes its place by one rename.
    `exact`: no file is put beside its name, since nobody will run with what is there.  `clear` empties the
    directory before that, but for what is built; without it a directory in use is refused.  `local`: rows of
    LOCAL that the store is to have besides.
    """
    if clear is None:
        refuse_used(directory)
    building = directory / DIRECTORY
    await trio.to_thread.run_sync(make_empty, building)
    head = source.found.head
    listed = list(packs_of(head))
    rebuild = await trio.to_thread.run_sync(Rebuild, building, limits.map_bytes, clock.time_ns())
    rebuild.exact = exact
    try:
        reader = PackReader(source.members, source.keys, Code(source.superblock.code))
        with plain_errors():
            async with reader.running():
                await load(rebuild, reader, listed, say, deadline_seconds)
        done = 0

        def tick(rows: int) -> None:
            nonlocal done
            done += rows
            trio.from_thread.run_sync(say, Progress("putting it in order", done, 0))

        await trio.to_thread.run_sync(partial(rebuild.finish, head, source.sealed, tick, local=local))
    finally:
        rebuild.close()
    failpoints.hit("restore.complete")
    if clear is not None:
        await trio.to_thread.run_sync(clear)
        refuse_used(directory)
    await trio.to_thread.run_sync(put_in_place, building, directory)
    say(Progress("restored", len(listed), len(listed)))
    return len(listed), rebuild.tally


async def load(
    rebuild: Rebuild,
    reader: PackReader,
    listed: Sequence[Listed],
    say: Say,
    deadline_seconds: float,
) -> None:
    """Reads the metadata packs and applies them in order.  Raises what `read_in_order` and `Rebuild.load` raise."""
    done = 0

    async def apply(item: Listed, body: bytes) -> None:
        nonlocal done
        await trio.to_thread.run_sync(lambda: rebuild.load(counted_rows(reader.keys, item, body)))
        done += 1
        say(Progress("reading metadata", done, len(listed)))

    say(Progress("reading metadata", 0, len(listed)))
    await read_in_order(reader, listed, apply, deadline_seconds)


async def read_in_order(
    reader: PackReader,
    listed: Sequence[Listed],
    use: Callable[[Listed, bytes], Awaitable[None]],
    deadline_seconds: float,
) -> None:
    """Reads metadata packs, a few at a time, and calls `use` with each and its verified body, in order.

    Raises `Unavailable` for one that does not come within the deadline, though no rate holds it up, and
    `DataLost` for one that cannot.
    """
    bodies: dict[int, bytes] = {}
    arrived = trio.Condition()
    slots = trio.Semaphore(_AHEAD)

    async def end_when_late(pack: StoredPack, scope: trio.CancelScope) -> None:
        while True:
            await trio.sleep(deadline_seconds)
            if not reader.held_up(pack):
                scope.cancel()

    async def fetch(index: int, pack: StoredPack) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as reading:
                reading.start_soon(end_when_late, pack, scope)
                body = await reader.body(pack)
                reading.cancel_scope.cancel()
        if scope.cancelled_caught:
            raise Unavailable(
                f"metadata {reader.explain(pack)}; nothing was changed: bring backends back and try again"
            )
        async with arrived:
            bodies[index] = body
            arrived.notify_all()

    async def fetch_all(nursery: trio.Nursery) -> None:
        for index, (pack, _) in enumerate(listed):
            await slots.acquire()
            nursery.start_soon(fetch, index, StoredPack.of_metadata(pack, reader.code))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch_all, nursery)
        for index, item in enumerate(listed):
            async with arrived:
                while index not in bodies:
                    await arrived.wait()
            await use(item, bodies.pop(index))
            slots.release()


def counted_rows(keys: KeyRing, item: Listed, body: bytes) -> Iterator[Row]:
    """The rows of a verified pack that count.  Raises `Corrupt` if it does not hold what its head says."""
    pack, counting = item
    plain = [data for _, data in open_body(keys, pack.ref, body)]
    if len(plain) != pack.chunks:
        name = pack.ref.pack_id.hex()
        raise Corrupt(f"metadata pack {name}: holds {len(plain)} chunks, its head says {pack.chunks}")
    yield from counting.of(row for chunk in plain for row in decode_rows(chunk))


def make_empty(building: Path) -> None:
    """Makes an empty directory of `building`, whatever was there.  Blocks; raises `CacheError`."""
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise CacheError(f"{building}: cannot be made: {error.strerror}") from error


def put_in_place(building: Path, directory: Path) -> None:
    """The one step that makes the store built in `building` the directory's own, in place of any other.

    Blocks; raises `CacheError`.  Nothing may have the other store open, and its journal be needed no more.
    """
    try:
        for name in ("journal.0", "journal.1", "lock.mdb"):
            (directory / name).unlink(missing_ok=True)
        flush_directory(building)
        (building / DATA).rename(directory / DATA)
        flush_directory(directory)
        failpoints.hit("restore.renamed")
        shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise CacheError(f"{directory}: the store cannot be put in place: {error.strerror}") from error


def _summary(found: Found, tally: Tally) -> Iterator[str]:
    yield (
        f"Restored {describe_head(found.ref)}: {tally.files} files, {tally.directories} directories, "
        f"{tally.others} others; contents stay on the backends until they are read."
    )
    yield from changed_sentences(tally)


def changed_sentences(tally: Tally) -> Iterator[str]:
    """What is not as it was: files that are empty now, those put beside their names, and what that means."""
    if tally.emptied:
        yield f"{tally.emptied} files that are never uploaded (local_only) are empty."
    for aside in tally.aside:
        yield f"{aside.path} was put beside as {aside.name}."
    if tally.aside:
        yield (
            "An old copy of these may be dangerous to run with (a validator may sign twice): use one only if "
            "you know that it is the newest."
        )
