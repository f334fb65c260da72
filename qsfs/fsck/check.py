"""The whole check: the local store, then the backends; and the repair of what it found.

The caller holds the mount lock of the cache directory: nothing else works on it.  The check looks
at the last commit; what the journal holds beyond it is read, left alone, and replayed by the next mount.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from qsfs.clock import Clock
from qsfs.errors import CacheError, Corrupt, FormatMismatch, QsfsError, QuorumUnavailable
from qsfs.format.erasure import Code
from qsfs.format.head import Head, HeadRef, MetadataPack
from qsfs.format.keys import KeyRing
from qsfs.format.pack import PackKind
from qsfs.format.slots import Secret
from qsfs.fsck.copies_layer import CopiesCheck, kept_heads
from qsfs.fsck.extents_layer import check_extents
from qsfs.fsck.journal_layer import check_journal
from qsfs.fsck.lmdb_layer import check_lmdb, check_rows
from qsfs.fsck.mends import Mends
from qsfs.fsck.namespace_layer import check_namespace
from qsfs.fsck.packs_layer import PacksCheck, PackToCheck, Rows, by_pack
from qsfs.fsck.report import Layer, Report
from qsfs.fsck.rows import decoded
from qsfs.health.packs import PackDoctor
from qsfs.remote.base import BASE_KEY, LocalHead, decode_local_head
from qsfs.remote.control import Records
from qsfs.remote.identity import find_members
from qsfs.remote.members import Candidate, Members
from qsfs.remote.placement import FreeSpace
from qsfs.remote.plain import plain_errors
from qsfs.remote.quorum import fleet_quorums
from qsfs.remote.stored import StoredPack
from qsfs.remote.superblocks import find_superblock
from qsfs.remote.survey import Timing, fetch_head, survey
from qsfs.store.environment import Environment, ReadView
from qsfs.store.limits import Limits
from qsfs.store.schema import ExtentRow, PackRow, Table, split_u64
from qsfs.store.store import FSID_KEY

log = logging.getLogger(__name__)

PACKS_AT_A_TIME = 4096
"""Packs whose extents are held in memory."""

Say = Callable[[str, int], None]
"""Called with what is being checked, and how much of it is done."""


@dataclass(frozen=True, slots=True)
class Backends:
    """How to reach the backends, and a secret that opens a key slot."""

    candidates: Sequence[Candidate]
    secret: Secret
    timing: Timing | None = None


async def fsck(
    directory: Path,
    limits: Limits,
    *,
    clock: Clock,
    backends: Backends | None,
    deep: bool = False,
    repair: bool = False,
    say: Say = lambda what, done: None,
) -> Report:
    """Checks the store in `directory` and, with `backends`, what it says of them.

    `deep` reads and authenticates every shard instead of asking for its presence; `repair` mends what
    can be mended.  Raises nothing for what it finds, however damaged: the report says it all.
    """
    report = Report()
    mends = Mends() if repair else None
    say("local store", 0)
    environment = await trio.to_thread.run_sync(check_local, directory, limits, report, mends)
    if environment is None:
        if backends is not None:
            report.fail("the packs, because the local store cannot be read")
        return report
    if mends is not None and len(mends):
        say("mending the local store", 0)
        await trio.to_thread.run_sync(environment.close)
        environment = await trio.to_thread.run_sync(_apply, directory, limits, mends, report)
    if environment is None or backends is None:
        if environment is not None:
            await trio.to_thread.run_sync(environment.close)
        return report
    try:
        await _check_backends(environment, backends, report, mends, deep=deep, clock=clock, say=say)
    except QsfsError as error:
        report.fail(f"the backends: {error}")
    finally:
        await trio.to_thread.run_sync(environment.close)
    if mends is not None and len(mends):
        environment = await trio.to_thread.run_sync(_apply, directory, limits, mends, report)
        if environment is not None:
            await trio.to_thread.run_sync(environment.close)
    return report


def check_local(
    directory: Path, limits: Limits, report: Report, mends: Mends | None = None
) -> Environment | None:
    """Layers 1 to 3.  Returns the environment, open for reading, or None if LMDB cannot be trusted."""
    environment = check_lmdb(directory, limits.map_bytes, report)
    if environment is None:
        return None
    view = environment.read()
    layers: dict[str, Callable[[], None]] = {
        "rows": lambda: check_rows(view, report),
        "journal": lambda: check_journal(view, directory, report),
        "namespace": lambda: check_namespace(view, report),
        "extents": lambda: check_extents(view, report, mends),
    }
    try:
        for name, layer in layers.items():
            try:
                layer()
            except Exception as error:
                log.exception("checking the %s failed unexpectedly", name)
                report.fail(f"the {name}, wholly: {error!r}; please report this with the log")
    finally:
        view.close()
    return environment


def _apply(directory: Path, limits: Limits, mends: Mends, report: Report) -> Environment | None:
    """Makes the changes; returns the environment, open for reading again, or None if that failed."""
    try:
        environment = Environment(directory, limits.map_bytes)
        try:
            mends.apply(environment, report)
        finally:
            environment.close()
        return Environment(directory, limits.map_bytes, readonly=True)
    except (CacheError, Corrupt, FormatMismatch) as error:
        report.fail(f"not everything local could be mended: {error}")
    return None


async def _check_backends(
    environment: Environment,
    backends: Backends,
    report: Report,
    mends: Mends | None,
    *,
    deep: bool,
    clock: Clock,
    say: Say,
) -> None:
    timing = backends.timing or Timing()
    say("backends", 0)
    found = await find_superblock(backends.candidates, backends.secret, attempt_seconds=timing.attempt)
    keys = found.keys
    base = _local_base(environment, keys, report)
    if base is None:
        return
    members, strangers = await find_members(
        backends.candidates,
        keys,
        clock,
        fleets=base.head.fleets,
        attempt_seconds=timing.attempt,
    )
    code = Code(found.superblock.code)
    quorums = fleet_quorums(base.head.fleets, code.params)
    copies = CopiesCheck(members, keys, quorums, report, repair=mends is not None)
    await copies.refill_emptied(strangers, base.head, clock)
    for entry in members.adopt(base.head.fleets):
        report.fail(f"entry {entry.number} of the fleet, {entry.address}/{entry.namespace}: is not reached")
    newest, head = await _newest(members, keys, base, clock, timing, report)
    heads = await copies.run(newest, head, list(kept_heads(head)))
    free = FreeSpace(members, clock)
    if mends is not None:
        await free.refresh()
    doctor = PackDoctor(members, keys, code, free)
    check = PacksCheck(
        doctor,
        report,
        mends,
        deep=deep,
        now_ns=clock.time_ns(),
        say=lambda done: say("packs", done),
    )
    with plain_errors():
        await check.run(_packs(environment, heads, code, report))


def _local_base(environment: Environment, keys: KeyRing, report: Report) -> LocalHead | None:
    """The generation that the local store builds on; None, with the reason reported, if it cannot be read."""
    view = environment.read()
    try:
        fsid, row = view.get(Table.LOCAL, FSID_KEY), view.get(Table.LOCAL, BASE_KEY)
        if fsid is not None and bytes(fsid) != keys.fsid:
            report.fail(
                f"the backends hold file system {keys.fsid.hex()}, the local store is of {bytes(fsid).hex()}"
            )
            return None
        if row is None or not len(row):
            report.fail("the packs: the local store names no generation that was published")
            return None
        return decode_local_head(bytes(row), keys)
    except (Corrupt, FormatMismatch) as error:
        report.add(Layer.LMDB, "local-base", f"the generation that the local store builds on: {error}")
        return None
    finally:
        view.close()


async def _newest(
    members: Members, keys: KeyRing, base: LocalHead, clock: Clock, timing: Timing, report: Report
) -> tuple[HeadRef, Head]:
    """The newest head that backends hold, or the base.

    It is a later one where a mount has owned since, or died before it noted what it had published; the
    copies of what that has superseded may be gone.
    """
    records = Records(keys)
    deadline = trio.current_time() + 2 * timing.attempt
    found = await survey(members, records, clock, timing, deadline=deadline, tries=1)
    newest = found.newest
    if newest is None or newest <= base.sealed.ref:
        return base.sealed.ref, base.head
    try:
        head = await fetch_head(members, list(found.readings.values()), newest, records, timing)
    except QuorumUnavailable as error:
        report.fail(str(error))
        return base.sealed.ref, base.head
    return newest, head


def _packs(
    environment: Environment, heads: Sequence[Head], code: Code, report: Report
) -> Iterator[PackToCheck]:
    """Every pack that lives: those of the local store, then those that only kept heads name."""
    known: set[bytes] = set()
    start = b""
    while True:
        rows, more = _read_packs(environment, start, code, report)
        for item in rows:
            known.add(item.pack.ref.pack_id)
            yield item
        if more is None:
            break
        start = more
    for head in heads:
        for listed in _listed(head):
            if listed.ref.pack_id in known:
                continue
            known.add(listed.ref.pack_id)
            try:
                yield PackToCheck(StoredPack.of_metadata(listed, code.params))
            except Corrupt as error:
                report.add(Layer.PACKS, "pack-sizes", str(error))


def _read_packs(
    environment: Environment, start: bytes, code: Code, report: Report
) -> tuple[list[PackToCheck], bytes | None]:
    """Some packs with their extents, and where to go on; the transaction ends before they are used."""
    view = environment.read()
    try:
        rows: list[tuple[int, PackRow]] = []
        resume: bytes | None = None
        for key, value in view.scan(Table.PACKS, start, None):
            if len(rows) >= PACKS_AT_A_TIME:
                resume = key
                break
            try:
                row = PackRow.decode(bytes(value)) if len(key) == 8 else None
            except Corrupt:
                continue
            if row is not None and row.live:
                rows.append((split_u64(key), row))
        extents: dict[int, Rows] = {}
        if rows:
            extents = by_pack(_extents(view), range(rows[0][0], rows[-1][0] + 1))
        items = []
        for number, row in rows:
            try:
                pack = StoredPack.of_row(row, code.params)
            except Corrupt as error:
                report.add(Layer.PACKS, "pack-sizes", str(error), {"number": number})
                continue
            is_data = row.kind == PackKind.DATA
            items.append(PackToCheck(pack, number, row, extents.get(number, ()) if is_data else ()))
        return items, resume
    finally:
        view.close()


def _extents(view: ReadView) -> Iterator[tuple[int, ExtentRow]]:
    def extent_of(key: bytes, row: bytes) -> ExtentRow:
        return ExtentRow.decode(int.from_bytes(key[8:], "big"), row)

    for key, row in decoded(view, Table.EXTENTS, 16, extent_of):
        yield split_u64(key), row


def _listed(head: Head) -> Iterator[MetadataPack]:
    yield from head.snapshot
    for delta in head.deltas:
        yield from delta
