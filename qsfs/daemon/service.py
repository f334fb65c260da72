"""The daemon of one mount: what it starts, in which order, and how it ends.

Start: lock the cache, open the store (which replays the journal), open the superblock that it
keeps, find the backends, own, mount.  With too few backends the start waits, visibly; `offline`
mounts first and owns when it can.  Stop: unmount, cover what the last closes left, publish what is
not yet published until a deadline, commit, close.  A crash at any point is what the store is for.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import trio

from qsfs.clock import Clock
from qsfs.config import Config
from qsfs.daemon import control, mountpoint
from qsfs.daemon.automatic import AutomaticSnapshots
from qsfs.daemon.committer import Committer
from qsfs.daemon.connect import Links, Opened, links, members_of, open_file_system
from qsfs.daemon.flushing import Flushing
from qsfs.daemon.handover import require_handed_over
from qsfs.daemon.jobs import Jobs
from qsfs.daemon.keeper import Keeper
from qsfs.daemon.key_upkeep import KeyUpkeep
from qsfs.daemon.lock import CacheLock
from qsfs.daemon.notify import notify
from qsfs.daemon.operating import Operating
from qsfs.daemon.owning import local_fleets
from qsfs.daemon.paths import find, path_of
from qsfs.daemon.placing import PlacementWatch
from qsfs.daemon.probing import probe
from qsfs.daemon.promises import promises_of
from qsfs.daemon.requesting import Requesting
from qsfs.daemon.runtime import tune_allocator, tune_interpreter
from qsfs.daemon.secret import read_secret
from qsfs.daemon.space import DaemonSpace
from qsfs.daemon.status import status_of
from qsfs.daemon.stopping import Stopping
from qsfs.daemon.supervision import supervised
from qsfs.daemon.waiter import DaemonWaiter
from qsfs.daemon.written import LATE_SECONDS, WrittenDurability
from qsfs.errors import CacheError, NotFound, QsfsError
from qsfs.filesystem.contents import Contents
from qsfs.filesystem.namespace import Namespace
from qsfs.filesystem.needs import Need
from qsfs.filesystem.policies import Policies
from qsfs.format.slots import Secret
from qsfs.fuse import loop, session
from qsfs.fuse.interfaces import Durability
from qsfs.fuse.operations import Operations
from qsfs.fuse.state import MountState
from qsfs.remote.aside import DIRECTORY, drop_second_names
from qsfs.remote.fetch import Fetcher
from qsfs.remote.images import refuse_images
from qsfs.remote.reader import PackReader
from qsfs.remote.spool import Spool
from qsfs.store.limits import Limits
from qsfs.store.schema import BLOCK_SIZE, InodeFlag
from qsfs.store.store import Store

_log = logging.getLogger(__name__)

_POLICY_STEP_SECONDS = 0.2
_ANSWER_SECONDS = 2.0
_SAVED_AT_ONCE = 1024


class Service:
    """One mount.  The parts are attributes from the moment they are there; `status` reads them."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        *,
        offline: bool = False,
        secret: Secret | None = None,
        ready: Callable[[str], None] = lambda _: None,
        waiting: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`secret` opens it (default: the configured one).

        `ready` is called once the mount answers requests, with what follows from its being offline ("": it is not),
        `waiting` with what the start waits for.
        """
        self.config = config
        self.clock = clock
        self.offline = offline
        self._given = secret
        self.state = MountState()
        self.phase = "starting"
        self.waiting_for = ""
        self.started_ns = clock.time_ns()
        self._ready = ready
        self._tell_waiting = waiting
        self._stopping = Stopping(config.filesystem.mountpoint, self._end_waits)
        self.jobs = Jobs()
        self._pending = control.Pending()
        self._unmounts = control.Pending()
        self._finished = trio.Event()
        self._published = False
        self._lock: CacheLock | None = None
        self.store: Store
        self.contents: Contents
        self.committer: Committer
        self.keeper: Keeper
        self.opened: Opened
        self.links: Links
        self.fetcher: Fetcher
        self.flushing: Flushing
        self.placing: PlacementWatch
        self.key_upkeep: KeyUpkeep
        self.space: DaemonSpace
        self.namespace: Namespace
        self.operations: Operations | None = None
        self.automatic: AutomaticSnapshots | None = None
        self._is_mounted = trio.Event()
        self.written: WrittenDurability | None = None

    async def run(self) -> None:
        """Runs the mount until it is unmounted, told to stop, or fails to start."""
        mountpoint.check_dependencies()
        if self.config.mount.allow_other:
            mountpoint.check_allow_other()
        directory = self.config.cache.directory
        if not directory.is_dir():
            raise CacheError(f"{directory}: the cache directory does not exist; 'qsfs init' makes it")
        self._lock = CacheLock(directory)
        try:
            refuse_images(directory)
            mountpoint.prepare(self.config.filesystem.mountpoint)
            self._open_store()
            try:
                await self._run_with_store()
            finally:
                self.store.close()
        finally:
            self._lock.release()

    def _open_store(self) -> None:
        config = self.config
        secret = read_secret(config, self._given)
        limits = Limits.of(config.cache, config.flush.spool_bytes)
        if not (config.cache.directory / "data.mdb").exists():
            raise CacheError(
                f"{config.cache.directory}: no file system here yet; run 'qsfs format' for a new one or "
                "'qsfs restore' for the one that the backends hold"
            )
        # What a restore or rollback that was killed has left would count against the cache's size.
        shutil.rmtree(config.cache.directory / DIRECTORY, ignore_errors=True)
        drop_second_names(config.cache.directory)
        self._secret = secret
        # First: opening a store may change its schema, and a spool of another version needs the qsfs that wrote it.
        self._spool = Spool(config.cache.directory / "spool", limits.spool_bytes)
        self.store = Store(config.cache.directory, limits, self.clock)
        most = int(config.cache.start_share * limits.full_bytes) // BLOCK_SIZE
        self.store.start.begin(config.cache.start_seconds, most)

    async def _run_with_store(self) -> None:
        config, store = self.config, self.store
        self.contents = Contents(store)
        self.namespace = Namespace(store, self.contents, Policies(config.policies))
        self.committer = Committer(
            store, self.contents, config.cache.group_seconds, alone=loop.nothing_waits
        )
        self.keeper = Keeper(store, self.contents, self.committer, self.clock)
        self.links = links(config, self.clock)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stopping.watch_signals)
                nursery.start_soon(self.committer.run)
                await nursery.start(self.jobs.run)
                self.opened = await open_file_system(store, self.links, self._secret, self.clock)
                await nursery.start(
                    control.serve,
                    config.cache.directory / control.SOCKET,
                    self._control_handlers(),
                    self._pending,
                )
                with self._stopping.start_scope() as scope:
                    await self._start_remote(nursery)
                if not scope.cancelled_caught:
                    await self._mounted(nursery)
                await self._finish()
                # The kernel may still drop names and pages, for seconds, after the session has ended.  The thread
                # that waits for it cannot be cut short, so a deadline here would only lose its answer.
                await self._unmounts.answered()
                with trio.move_on_after(_ANSWER_SECONDS):
                    await self._pending.answered()
                nursery.cancel_scope.cancel()
        finally:
            await self.links.aclose()

    def wait_for(self, what: str) -> None:
        """Makes visible what the start waits for ("": for nothing any more)."""
        self.waiting_for = what
        if what:
            _log.warning("waiting for %s", what)
            notify(f"STATUS=waiting for {what}\nEXTEND_TIMEOUT_USEC=120000000")
            self._tell_waiting(what)

    async def _start_remote(self, nursery: trio.Nursery) -> None:
        fleets = local_fleets(self.store, self.opened)
        members, strangers = await members_of(self.links, self.opened, self.clock, fleets)
        for stranger in strangers:
            _log.warning("%s: %s", stranger.candidate.name, stranger.error)
        self.key_upkeep = KeyUpkeep(
            self.store,
            self.committer,
            members,
            self.opened,
            self._secret,
            self.clock,
            changed=self._take_up_keys,
        )
        if not self.offline:
            await self.key_upkeep.look()
        nursery.start_soon(supervised, self.key_upkeep.run)
        nursery.start_soon(supervised, self.key_upkeep.run_count)
        reader = PackReader(members, self.opened.keys, self.opened.code)
        self.fetcher = Fetcher(
            self.store,
            reader,
            self.committer,
            self.contents.transient,
            deadline_seconds=self.config.fetch.deadline_seconds,
            path_of=partial(path_of, self.namespace.tree),
        )
        await nursery.start(self.fetcher.run)
        self.space = DaemonSpace(
            self.store,
            members,
            self.opened.superblock.code,
            lambda name: self.links.metrics[name].sent_bytes,
            lambda: not self.keeper.futile or self.flushing.makes_room(exhausted=self.keeper.exhausted),
        )
        nursery.start_soon(supervised, self.space.run)
        nursery.start_soon(supervised, partial(probe, members, self.opened.keys))
        self.flushing = Flushing(
            self.config.flush,
            self.config.cache.second_look_seconds,
            self.store,
            self._spool,
            self.committer,
            self.opened,
            members,
            reader,
            self.clock,
            on_fenced=self.fenced,
            waiting=self.wait_for,
        )
        self.placing = PlacementWatch(
            self.store.environment,
            self.clock,
            self.opened,
            promises_of(self.config),
            members,
            lambda: self.flushing.fleets,
        )
        await self.flushing.start(nursery, offline=self.offline)
        nursery.start_soon(supervised, self.placing.run)

    async def _mounted(self, nursery: trio.Nursery) -> None:
        removed = self.namespace.remove_orphans()
        if removed:
            _log.info("%d files that were unlinked while open are gone now", removed)
        nursery.start_soon(supervised, self.keeper.run)
        waiter = DaemonWaiter(self.keeper, self.fetcher, self.state)
        nursery.start_soon(supervised, partial(self._walk_policies, waiter))
        nursery.start_soon(supervised, self._make_automatic_snapshots)
        self.operations = Operations(
            self.namespace,
            waiter,
            self._durability(nursery),
            self.space,
            self.state,
            xattr=self.config.mount.xattr,
            relatime=self.config.mount.relatime,
        )
        async with trio.open_nursery() as serving:
            serving.start_soon(self._stopping.unmount_when_told)
            nursery.start_soon(self._watch_disk)
            await session.serve(
                self.operations,
                self.config.filesystem.mountpoint,
                self.config.mount,
                mounted=self._is_ready,
            )
            serving.cancel_scope.cancel()

    def _durability(self, nursery: trio.Nursery) -> Durability:
        """What an fsync waits for, as `[mount] fsync` says."""
        if self.config.mount.fsync == "local":
            return self.committer
        self.written = written = WrittenDurability(
            self.committer,
            self.flushing.published,
            self._stays_here,
            lambda: "; ".join(self.flushing.waits()) or "the generation is being uploaded",
            self.clock,
        )
        self.flushing.hurried = lambda: written.waiting
        nursery.start_soon(supervised, written.run)
        return written

    def _stays_here(self, number: int) -> bool:
        inode = self.store.inode(number)
        return inode is not None and bool(inode.flags & InodeFlag.LOCAL_ONLY)

    def _end_waits(self) -> None:
        """Before an unmount: ends reads that wait, fsyncs that have waited for long, and what slows writes."""
        self.fetcher.unblock(None)
        self.store.allowance.end()
        if self.written is not None:
            self.written.unblock(older_than=LATE_SECONDS)

    def _is_ready(self) -> None:
        self.phase = "mounted"
        self._is_mounted.set()
        tune_interpreter()
        notify(f"READY=1\nSTATUS=mounted on {self.config.filesystem.mountpoint}")
        _log.info("mounted on %s", self.config.filesystem.mountpoint)
        self._ready(self.flushing.offline)

    async def _finish(self) -> None:
        """After the unmount: publishes until the deadline, and commits in any case.

        A start that was stopped may not have come to what publishes.
        """
        self.phase = "stopping"
        notify("STOPPING=1\nSTATUS=publishing the last generation")
        if hasattr(self, "flushing"):
            await self._publish_the_last()
        if self.committer.failed is None:
            while not self.store.start.end_all(_SAVED_AT_ONCE):
                await trio.lowlevel.checkpoint()
            while not self.store.start.save(_SAVED_AT_ONCE):
                await self.committer.room()
            await self.committer.commit()
        self._finished.set()

    async def _publish_the_last(self) -> None:
        deadline = self.config.flush.stop_deadline_seconds
        with trio.move_on_after(deadline) as scope:
            self._published = await self.flushing.stop(deadline)
        if scope.cancelled_caught:
            _log.warning(
                "stopped before everything was on the backends; it is safe in the cache and goes on at the "
                "next mount"
            )

    def _take_up_keys(self, opened: Opened) -> None:
        self.opened = opened

    # background

    async def _walk_policies(self, waiter: DaemonWaiter) -> None:
        while True:
            done = False
            while not done:
                try:
                    done = self.namespace.policies.step()
                except Need as need:
                    await waiter.satisfy(need)
                await trio.lowlevel.checkpoint()
                await self.committer.room()
            await trio.sleep(_POLICY_STEP_SECONDS)

    async def _make_automatic_snapshots(self) -> None:
        try:
            pinning = (await self.flushing.owned()).pinning
        except QsfsError:
            # A mount that does not own says so by itself, and can make none.
            return
        await self._is_mounted.wait()
        self.automatic = AutomaticSnapshots(self.config.snapshots, pinning, self.clock, self._hand_over)
        await self.automatic.run()

    async def _hand_over(self) -> None:
        mountpoint = self.config.filesystem.mountpoint
        await trio.to_thread.run_sync(require_handed_over, mountpoint, abandon_on_cancel=True)

    async def _watch_disk(self) -> None:
        self.state.fail(str(await self.committer.failure()))
        if self.written is not None:
            # No generation can be made any more.
            self.written.unblock()

    def fenced(self, error: QsfsError) -> None:
        """This mount may not own the file system (any more): everything that changes anything is refused."""
        self.state.fence(str(error))
        notify(f"STATUS=read-only: {error}")

    # control

    def _control_handlers(self) -> dict[str, control.Handler]:
        return {
            "status": self._on_status,
            "umount": self._on_umount,
            "unblock": self._on_unblock,
            **Requesting(self).handlers(),
            **Operating(self).handlers(),
        }

    async def _on_status(self, _: Mapping[str, Any]) -> Any:
        return status_of(self)

    async def _on_umount(self, _: Mapping[str, Any]) -> Any:
        """Answered at the end: `published` is whether all of it is on the backends, `failure` why the disk failed."""
        mounted = self.operations is not None
        if not mounted:
            self._stopping.stop()
        else:
            self._end_waits()
            with self._unmounts:
                await trio.to_thread.run_sync(mountpoint.unmount, self.config.filesystem.mountpoint)
            self._stopping.stop()
        await self._finished.wait()
        failed = self.committer.failed
        return {"mounted": mounted, "published": self._published, "failure": "" if failed is None else str(failed)}

    async def _on_unblock(self, request: Mapping[str, Any]) -> Any:
        path = request.get("path")
        number = None if path is None else self._number_of(path)
        ended = self.fetcher.unblock(number)
        if self.written is not None:
            ended += self.written.unblock(number)
        return {"ended": ended}

    def _number_of(self, path: str) -> int:
        inode = find(self.namespace.tree, path.encode("utf-8", "surrogateescape"))
        if inode is None:
            raise NotFound(f"{path}: no such file on this mount (give the path from the mount point)")
        return inode.number


def run(
    config: Config,
    clock: Clock,
    *,
    offline: bool,
    secret: Secret | None = None,
    ready: Callable[[str], None],
    waiting: Callable[[str], None],
) -> None:
    """Runs a mount to its end in this process."""
    tune_allocator()
    service = Service(config, clock, offline=offline, secret=secret, ready=ready, waiting=waiting)
    trio.run(service.run, strict_exception_groups=True)
