"""`rollback`: this machine's file system becomes what it was at an older generation.

A takeover by a machine that was restored from an older generation is the same, but for owning: see `return_to_base`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import trio

from qsfs.clock import Clock
from qsfs.config import Config
from qsfs.daemon.committer import Committer
from qsfs.daemon.connect import SUPERBLOCK_ROW, links, members_of, open_file_system, read_secret
from qsfs.daemon.formatting import local_store_exists
from qsfs.daemon.key_upkeep import KeyUpkeep
from qsfs.daemon.lock import CacheLock
from qsfs.daemon.owning import local_fleets, local_state, own_when_possible
from qsfs.daemon.restoring import Told
from qsfs.errors import CacheError, Fenced, StaleCache
from qsfs.filesystem.contents import Contents
from qsfs.format.head import Head, HeadRef, KeptGeneration
from qsfs.format.keys import KeyRing
from qsfs.format.slots import Secret
from qsfs.remote.aside import drop_second_names
from qsfs.remote.base import BASE_KEY, NEWEST_KEYS, local_head
from qsfs.remote.generation import GENERATION
from qsfs.remote.mount_check import require_returned
from qsfs.remote.readable import readable
from qsfs.remote.rollback import LEFT, HeadGate, Rollback, RollbackReport, Unpublished, unpublished
from qsfs.remote.snapshots import find_kept, snapshots_of
from qsfs.remote.spool import Spool
from qsfs.remote.survey import Timing
from qsfs.store.limits import Limits
from qsfs.store.schema import Table, read_plain_u64
from qsfs.store.store import Store
from qsfs.values import counted, format_size


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rollback would do, for a person to agree to.  `lost` is in no snapshot, only in `aside` if given."""

    target: KeptGeneration
    newest: HeadRef
    lost: Unpublished
    aside: Path | None


@dataclass(frozen=True, slots=True)
class Order:
    """What is wanted: the snapshot or generation; whether unpublished local state may be set aside.

    `agree` is asked before anything is changed; it raises if a person does not agree.
    """

    which: str
    set_aside: bool
    agree: Callable[[Plan], None]


async def roll_back(
    config: Config, clock: Clock, order: Order, progress: Callable[[str], None], *, secret: Secret | None = None
) -> RollbackReport:
    """Rolls back; raises with the local state as it was, or with it rolled back and not yet published.

    `secret` opens it (default: the configured one).
    Raises `MountError` while it is mounted here, `NotFound` for what is not kept, `CacheError` while
    something is not published, `StaleCache` if this machine does not have the newest generation.
    """
    if not local_store_exists(config.cache.directory):
        raise StaleCache(
            f"{config.cache.directory}: there is no local state of this file system: run 'qsfs takeover' first, once "
            "the machine that wrote it is stopped"
        )
    lock = CacheLock(config.cache.directory)
    try:
        return await _Work(config, clock, order, progress, read_secret(config, secret)).run()
    finally:
        lock.release()


async def return_to_base(
    config: Config, clock: Clock, progress: Callable[[str], None], secret: Secret
) -> RollbackReport:
    """Takes over, and makes the base of the local store, which is older than the newest generation, the newest.

    The caller holds the mount lock.  Raises as `roll_back` and a
    takeover; may be repeated for as long as the store has a row `RETURNS_KEY`.
    """
    order = Order("", set_aside=False, agree=lambda plan: None)
    return await _Work(config, clock, order, progress, secret, takeover=True).run()


class _Work:
    def __init__(
        self,
        config: Config,
        clock: Clock,
        order: Order,
        progress: Callable[[str], None],
        secret: Secret,
        *,
        takeover: bool = False,
    ) -> None:
        self._config = config
        self._clock = clock
        self._order = order
        self._progress = progress
        self._limits = Limits.of(config.cache, config.flush.spool_bytes)
        self._secret = secret
        self._takeover = takeover

    async def run(self) -> RollbackReport:
        directory = self._config.cache.directory
        drop_second_names(directory)
        spool = Spool(directory / "spool", self._limits.spool_bytes)
        self._store: Store | None = Store(directory, self._limits, self._clock)
        found = links(self._config, self._clock)
        try:
            gate = HeadGate(spool)
            store = self._store
            opened = await open_file_system(store, found, self._secret, self._clock)
            if not self._takeover:
                require_returned(local_state(store, spool, opened))
            plan = self._plan(store, opened.keys)
            self._order.agree(plan)
            members, strangers = await members_of(found, opened, self._clock, local_fleets(store, opened))
            for stranger in strangers:
                self._progress(f"left out: {stranger.error}")
            self._progress("owning the file system")
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as committing:
                    committer = Committer(store, Contents(store), self._config.cache.group_seconds)
                    committing.start_soon(committer.run)
                    if self._takeover:
                        await KeyUpkeep(store, committer, members, opened, self._secret, self._clock).look()
                    owned = await own_when_possible(
                        store,
                        spool,
                        opened,
                        members,
                        self._clock,
                        nursery,
                        takeover=self._takeover,
                        on_fenced=_raise,
                        waiting=self._wait,
                        store_before_send=gate.store,
                    )
                    last = max(store.counter(GENERATION), owned.first.generation, plan.newest.generation)
                    store.set_counter(GENERATION, last + 2)
                    await committer.commit()
                    committing.cancel_scope.cancel()
                rollback = Rollback(
                    owned=owned,
                    gate=gate,
                    spool=spool,
                    members=members,
                    keys=opened.keys,
                    code=opened.code,
                    directory=directory,
                    limits=self._limits,
                    clock=self._clock,
                    counters=_counters(store),
                    last=last,
                    local={SUPERBLOCK_ROW: store.local(SUPERBLOCK_ROW) or b""},
                    aside=plan.aside,
                    say=Told(self._progress).say,
                    waiting=self._wait,
                    timing=Timing(),
                )
                self._close()
                target = _still_kept(owned.first, owned.first_ref, plan.target)
                names = {snapshot.name for snapshot in snapshots_of(owned.first.kept)}
                report = await rollback.run(target, name_of_left(self._clock, names))
                nursery.cancel_scope.cancel()
            return report
        finally:
            self._close()
            await found.aclose()

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()
        self._store = None

    def _plan(self, store: Store, keys: KeyRing) -> Plan:
        """What is to be done, by what is known here; refuses what cannot be."""
        base = local_head(store, BASE_KEY, keys)
        if base is None:
            raise CacheError("the local store has no base generation; run 'qsfs restore --set-aside'")
        known = [head for name in NEWEST_KEYS if (head := local_head(store, name, keys)) is not None]
        newest = max(known, key=lambda head: head.sealed.ref)
        if self._takeover:
            target = KeptGeneration(base.sealed.ref, base.head.time_ns, ())
        else:
            target = find_kept(readable(newest.head, newest.sealed.ref), self._order.which)
        lost = unpublished(store.environment, self._clock)
        directory = self._config.cache.directory
        if not self._order.set_aside:
            refuse_to_lose(directory, lost)
        aside = directory.with_name(f"{directory.name}.aside-{self._clock.time_ns() // 1_000_000_000}")
        return Plan(target, newest.sealed.ref, lost, aside if lost and self._order.set_aside else None)

    def _wait(self, what: str) -> None:
        if what:
            self._progress(f"waiting for {what}")


def refuse_to_lose(directory: Path, lost: Unpublished) -> None:
    """Raises `CacheError` if the state in `directory` holds more that no generation does than may be lost unasked."""
    if lost.bearable:
        return
    if lost.publishable:
        raise CacheError(
            f"{directory}: holds what no generation holds yet ({describe_unpublished(lost)}): 'qsfs mount' and "
            "'qsfs umount' publish it, so that the snapshot of what is left has it; --set-aside goes back "
            "without, and moves the local state beside the cache directory"
        )
    raise CacheError(
        f"{directory}: holds {describe_unpublished(lost)}, and no snapshot ever has that: copy elsewhere what is "
        "still needed and delete it; --set-aside goes back without, and moves the local state beside the cache "
        "directory"
    )


def describe_unpublished(lost: Unpublished) -> str:
    """What is not published, for people."""
    parts = []
    if lost.publishable:
        changes = counted(lost.changes, "change")
        parts.append(f"{format_size(lost.bytes)} of contents, {changes} of files, names and attributes")
    if lost.local_files:
        files = counted(lost.local_files, "file")
        parts.append(f"{format_size(lost.local_bytes)} in {files} with the policy local_only")
    return "; ".join(parts)


def name_of_left(clock: Clock, taken: Container[str]) -> str:
    """The name of the snapshot of what is left: by the time, and one that nothing has."""
    now = datetime.datetime.fromtimestamp(clock.time_ns() / 1e9, datetime.UTC)
    base = name = f"{LEFT}{now:%Y%m%dT%H%M%SZ}"
    turn = 1
    while name in taken:
        turn += 1
        name = f"{base}-{turn}"
    return name


def _still_kept(first: Head, ref: HeadRef, target: KeptGeneration) -> KeptGeneration:
    """The target as the newest head has it, now that this machine owns: `NotFound` if it went meanwhile."""
    kept = readable(first, ref)
    for entry in kept:
        if entry.head == target.head:
            return entry
    return find_kept(kept, target.pins[0] if target.pins else str(target.head.generation))


def _counters(store: Store) -> dict[str, int]:
    rows = store.scan(Table.COUNTERS, b"", None)
    return {name.decode("ascii"): read_plain_u64(row) for name, row in rows}


def _raise(error: Fenced) -> None:
    raise error
