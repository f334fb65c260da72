"""Restore: a file system from nothing but the configuration and the key.

Superblock, identities, heads; then the metadata packs that the newest head lists, any k shards of
each; then a local store built aside and put in place by one rename.  A restore that ends early
has done nothing, and begins again.  Contents stay remote.  Nothing on the backends is changed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from qsfs import failpoints
from qsfs.clock import Clock
from qsfs.errors import CacheError, Corrupt, NotFound, QsfsError, QuorumUnavailable, Unavailable, WrongBackend
from qsfs.format.erasure import Code
from qsfs.format.head import Head, HeadRef, MetadataPack, SealedHead, head_key, open_head
from qsfs.format.keys import KeyRing
from qsfs.format.pack import open_body
from qsfs.format.rows import Row, decode_rows
from qsfs.format.slots import Secret
from qsfs.format.superblock import Superblock
from qsfs.remote.control import Records
from qsfs.remote.identity import Stranger, find_members
from qsfs.remote.image import Counting, packs_of
from qsfs.remote.images import refuse_images
from qsfs.remote.members import Candidate, Member, Members
from qsfs.remote.newest import describe_head
from qsfs.remote.plain import plain_errors
from qsfs.remote.reader import PackReader
from qsfs.remote.reasons import summary
from qsfs.remote.rebuild import Rebuild, Tally
from qsfs.remote.stored import StoredPack
from qsfs.remote.superblocks import find_superblock
from qsfs.remote.survey import Found, Timing, find_newest
from qsfs.store.limits import Limits

DIRECTORY = "restoring"
DATA = "data.mdb"
_SPOOL = "spool"
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
    """What was restored.  `sentences` is what a person should read, `base` is now the local base."""

    superblock: Superblock
    base: HeadRef
    head: Head
    withstands: int
    packs: int
    tally: Tally
    sentences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """The newest generation (or the chosen one) on the backends, and the means to read it."""

    superblock: Superblock
    keys: KeyRing
    members: Members
    strangers: tuple[Stranger, ...]
    problems: tuple[str, ...]
    found: Found
    sealed: SealedHead

    def sentences(self) -> tuple[str, ...]:
        """What was found where, for people."""
        left_out = (f"Left out: {stranger.error}." for stranger in self.strangers)
        return (*self.found.sentences(self.strangers), *self.problems, *left_out)


async def find_source(
    candidates: Sequence[Candidate],
    *,
    secret: Secret,
    clock: Clock,
    timing: Timing | None = None,
    chosen: HeadRef | None = None,
    deadline_seconds: float = 60.0,
) -> Source:
    """Reads superblock, identities and heads, and the newest head itself (or `chosen`).

    Raises what `find_superblock` and `find_newest` raise, among them `KeyFileError`, `SplitHeads` (listing
    the heads) and `QuorumUnavailable`.
    """
    timing = timing or Timing()
    opened = await find_superblock(candidates, secret, attempt_seconds=timing.attempt)
    members, strangers = await find_members(
        candidates, opened.keys, clock, attempt_seconds=timing.attempt
    )
    records = Records(opened.keys)
    found = await find_newest(
        members,
        records,
        opened.superblock.code,
        clock,
        timing,
        deadline_seconds=deadline_seconds,
        chosen=chosen,
    )
    _add_silent(members, strangers, found.head, clock)
    sealed = await _sealed(members, found, opened.keys, timing)
    removed = (f"{opened.removed}.",) if opened.removed else ()
    problems = (*removed, *(f"Superblock: {error}." for _, error in opened.problems))
    return Source(opened.superblock, opened.keys, members, tuple(strangers), problems, found, sealed)


async def restore(
    candidates: Sequence[Candidate],
    *,
    secret: Secret,
    directory: Path,
    limits: Limits,
    clock: Clock,
    timing: Timing | None = None,
    force: bool = False,
    chosen: HeadRef | None = None,
    say: Say = lambda progress: None,
    deadline_seconds: float = 60.0,
) -> RestoreReport:
    """Restores the newest generation (or `chosen`) into the cache directory `directory`.

    The caller holds the directory's mount lock.  Refuses (`CacheError`) a directory that holds a
    file system.  Too few backends to rule out a newer generation is `QuorumUnavailable` unless
    `force`; metadata that do not come within the deadline are `Unavailable`, with nothing changed.
    """
    refuse_used(directory)
    say(Progress("looking for the newest generation", 0, len(candidates)))
    source = await find_source(
        candidates,
        secret=secret,
        clock=clock,
        timing=timing,
        chosen=chosen,
        deadline_seconds=deadline_seconds,
    )
    found = source.found
    if found.judgement.withstands < 0 and not force:
        raise QuorumUnavailable(
            f"{' '.join(found.sentences(source.strangers))} Bring more backends back, or restore with --force "
            "what may not be the newest"
        )
    packs, tally = await restore_into(
        directory, source, limits, clock, say=say, deadline_seconds=deadline_seconds
    )
    return RestoreReport(
        superblock=source.superblock,
        base=found.ref,
        head=found.head,
        withstands=found.judgement.withstands,
        packs=packs,
        tally=tally,
        sentences=(*source.sentences(), *_summary(found, tally)),
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
) -> tuple[int, Tally]:
    """Builds the store of `source` in `directory`; returns the metadata packs read, and what was found.

    All or nothing: the store is built in a directory below and takes its place by one rename.
    `exact`: no file is put beside its name, since nobody will run with what is there.
    """
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

        await trio.to_thread.run_sync(rebuild.finish, head, source.sealed, tick)
    finally:
        rebuild.close()
    failpoints.hit("restore.complete")
    await trio.to_thread.run_sync(put_in_place, building, directory)
    say(Progress("restored", len(listed), len(listed)))
    return len(listed), rebuild.tally


def refuse_used(directory: Path) -> None:
    """Raises `CacheError` if a cache directory holds a file system, or heads that were not recorded."""
    refuse_images(directory)
    if (directory / DATA).exists():
        raise CacheError(
            f"{directory}: holds the local state of a file system already; 'qsfs mount' uses it, 'qsfs "
            "restore --set-aside' moves it beside and restores"
        )
    spool = directory / _SPOOL
    if spool.is_dir() and any(spool.iterdir()):
        raise CacheError(
            f"{directory}: the spool holds what a former mount was sending; 'qsfs restore --set-aside' moves "
            "it beside"
        )


def set_aside(directory: Path, clock: Clock) -> Path | None:
    """Moves the whole state of a cache directory beside it; returns where, or None if there is none.

    The caller holds the mount lock, whose file stays.  Raises `CacheError`.
    """
    moved = [path for path in sorted(directory.iterdir()) if path.name not in ("mount.lock", DIRECTORY)]
    if not moved:
        return None
    aside = directory.with_name(f"{directory.name}.aside-{clock.time_ns() // 1_000_000_000}")
    try:
        aside.mkdir(mode=0o700)
        # Before anything lies only there.
        flush_directory(aside.parent)
        # The store goes last: until then the directory counts as in use.
        for path in sorted(moved, key=lambda path: path.name == DATA):
            path.rename(aside / path.name)
        flush_directory(aside)
        flush_directory(directory)
    except OSError as error:
        raise CacheError(f"{directory}: cannot be set aside in {aside}: {error.strerror}") from error
    return aside


def _add_silent(members: Members, strangers: Sequence[Stranger], head: Head, clock: Clock) -> None:
    """Backends of the fleet that did not say who they are may still do so while packs are read."""
    entries = {(e.address, e.namespace): e for fleet in head.fleets for e in fleet.entries}
    for stranger in strangers:
        candidate = stranger.candidate
        entry = entries.get((candidate.address, candidate.namespace))
        if entry is None or isinstance(stranger.error, WrongBackend) or members.by_number(entry.number):
            continue
        member = Member(entry, candidate.data, candidate.control(entry.control_namespace), clock)
        member.failed(stranger.error)
        members.add(member)


async def _sealed(members: Members, found: Found, keys: KeyRing, timing: Timing) -> SealedHead:
    """The head's sealed bytes, from any backend that has them."""
    ref = found.ref
    key = head_key(keys.fsid, ref)
    reasons: list[str] = []
    named = {reading.number for reading in found.survey.readings.values() if ref in reading.heads}
    for member in sorted(members, key=lambda member: (member.number not in named, member.number)):
        control = member.control
        try:
            with trio.fail_after(timing.attempt):
                value = await control.get(key)
            if value is None:
                raise NotFound(f"backend {control.name}: does not have it any more")
            open_head(key, value, keys)
        except trio.TooSlowError:
            reasons.append(f"backend {control.name}: no answer in {timing.attempt:g} s")
        except QsfsError as error:
            reasons.append(str(error))
        else:
            return SealedHead(key, value, ref)
    raise QuorumUnavailable(f"{describe_head(ref)} cannot be read any more: {summary(reasons)}")


async def load(
    rebuild: Rebuild,
    reader: PackReader,
    listed: Sequence[tuple[MetadataPack, Counting]],
    say: Say,
    deadline_seconds: float,
) -> None:
    """Reads the metadata packs, a few at a time, and applies them in order.

    Raises `Unavailable` for one that does not come within the deadline, though no rate holds it up, and what
    `Rebuild.load` raises.
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

    packs = [StoredPack.of_metadata(pack, reader.code) for pack, _ in listed]

    async def fetch_all(nursery: trio.Nursery) -> None:
        for index, pack in enumerate(packs):
            await slots.acquire()
            nursery.start_soon(fetch, index, pack)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch_all, nursery)
        for index, (pack, (entry, counting)) in enumerate(zip(packs, listed, strict=True)):
            say(Progress("reading metadata", index, len(packs)))
            async with arrived:
                while index not in bodies:
                    await arrived.wait()
            body = bodies.pop(index)
            await trio.to_thread.run_sync(_apply, rebuild, reader.keys, pack, entry.chunks, body, counting)
            del body
            slots.release()


def _apply(
    rebuild: Rebuild, keys: KeyRing, pack: StoredPack, chunks: int, body: bytes, counting: Counting
) -> None:
    """Applies the rows of one verified pack that count."""
    plain = [data for _, data in open_body(keys, pack.ref, body)]
    if len(plain) != chunks:
        raise Corrupt(f"metadata pack {pack.name}: holds {len(plain)} chunks, its head says {chunks}")

    def rows() -> Iterator[Row]:
        for chunk in plain:
            yield from decode_rows(chunk)

    rebuild.load(counting.of(rows()))


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


def flush_directory(directory: Path) -> None:
    """Makes the names in a directory durable.  Blocks; raises `OSError`."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
