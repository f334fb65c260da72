"""The daemon of a read-only mount: any kept generation, on any machine that has the configuration and the key.

It owns nothing, writes to no backend and needs no quorum: it works with as many backends as a restore.
Start: lock the cache, find the generation on the backends, build its image unless it is still there,
mount with `ro`.  With too few backends the start waits, visibly.  While it is mounted it looks at the
newest published head, to tell how far behind it is and whether its generation is still kept; a mount that
follows moves with it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import trio

from qsfs.clock import Clock
from qsfs.config import Config
from qsfs.daemon import control, mountpoint
from qsfs.daemon.connect import Links, links, read_secret
from qsfs.daemon.following import SHARES, Follower
from qsfs.daemon.image import Image, build, image_limits
from qsfs.daemon.lock import CacheLock
from qsfs.daemon.notify import notify
from qsfs.daemon.paths import find
from qsfs.daemon.probing import probe
from qsfs.daemon.reading_status import status_of
from qsfs.daemon.runtime import tune_allocator, tune_interpreter
from qsfs.daemon.sightings import Sightings
from qsfs.daemon.stopping import Stopping
from qsfs.daemon.supervision import supervised
from qsfs.errors import (
    BackendUnavailable,
    CacheError,
    Corrupt,
    FormatMismatch,
    MountError,
    NotFound,
    QuorumUnavailable,
    Unavailable,
)
from qsfs.format.erasure import Code
from qsfs.format.slots import Secret
from qsfs.fuse import session
from qsfs.remote.control import Records
from qsfs.remote.images import image_directory, latest_image, refuse_writer, remove_others, template_directory
from qsfs.remote.inherit import Donor
from qsfs.remote.readable import Published, Wanted, owner_host, source_of
from qsfs.remote.reader import PackReader
from qsfs.remote.source import Source, find_source
from qsfs.remote.survey import Timing
from qsfs.remote.template import Template
from qsfs.store.limits import Limits
from qsfs.store.schema import BLOCK_SIZE
from qsfs.store.store import Store

_log = logging.getLogger(__name__)

_AGAIN_SECONDS = 1.0
_ANSWER_SECONDS = 2.0
_WAITED_FOR = (QuorumUnavailable, BackendUnavailable, Unavailable)

Ready = Callable[[Mapping[str, Any]], None]


class Reading:
    """One read-only mount.  The parts are attributes from the moment they are there; `status` reads them."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        wanted: Wanted,
        *,
        follow: bool = False,
        secret: Secret | None = None,
        ready: Ready = lambda shown: None,
        waiting: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`secret` opens it (default: the configured one).

        `ready` is called with what is shown once the mount answers, `waiting` with what the start waits for.
        """
        self.config = config
        self.clock = clock
        self.wanted = wanted
        self.follow = follow
        self._given = secret
        self.phase = "starting"
        self.waiting_for = ""
        self.started_ns = clock.time_ns()
        self.follower: Follower | None = None
        self._template: Template | None = None
        self.source: Source
        self.sightings: Sightings
        self._ready = ready
        self._tell_waiting = waiting
        self._links: Links
        self._limits: Limits
        self._stopping = Stopping(config.filesystem.mountpoint, self._end_waits)
        self._finished = trio.Event()
        self._pending = control.Pending()
        self._unmounts = control.Pending()
        self._timing = Timing()
        self._first: Image | None = None
        self._left: Donor | None = None

    @property
    def image(self) -> Image | None:
        """The generation that is shown; None until it is there."""
        return self._first if self.follower is None else self.follower.current

    @property
    def images(self) -> list[Image]:
        """All generations in which something may be open; the last is the one shown."""
        if self.follower is not None:
            return self.follower.images
        return [] if self._first is None else [self._first]

    async def run(self) -> None:
        """Runs the mount until it is unmounted, told to stop, or fails to start."""
        mountpoint.check_dependencies()
        if self.config.mount.allow_other:
            mountpoint.check_allow_other()
        directory = self.config.cache.directory
        secret = read_secret(self.config, self._given)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"{directory}: cannot be made: {error.strerror}") from error
        lock = CacheLock(directory)
        try:
            refuse_writer(directory)
            mountpoint.prepare(self.config.filesystem.mountpoint)
            self._links = links(self.config, self.clock)
            try:
                await self._run(directory, secret)
            finally:
                await self._links.aclose()
        finally:
            lock.release()

    async def _run(self, directory: Path, secret: Secret) -> None:
        handlers = _Handlers(status=self._on_status, umount=self._on_umount, unblock=self._on_unblock)
        begun = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stopping.watch_signals)
                await nursery.start(control.serve, directory / control.SOCKET, handlers, self._pending)
                with self._stopping.start_scope() as scope:
                    image = self._first = await self._open(directory, secret)
                    if self.follow:
                        self.follower = self._follower(directory, image)
                        await nursery.start(self.follower.serve, image)
                    else:
                        await nursery.start(image.run)
                    begun = True
                if begun and not scope.cancelled_caught:
                    await self._mounted(nursery, image)
                await self._finish()
                await self._unmounts.answered()
                with trio.move_on_after(_ANSWER_SECONDS):
                    await self._pending.answered()
                nursery.cancel_scope.cancel()
        finally:
            for opened in self.images:
                opened.close()
            left = [self._left] if self.follower is None else self.follower.donors
            for donor in left:
                if donor is not None:
                    donor.store.close()
            if self._template is not None:
                self._template.drop()

    # the generation

    async def _open(self, directory: Path, secret: Secret) -> Image:
        """Finds the wanted generation and opens its image; waits for backends as long as it takes."""
        limits = image_limits(self.config, SHARES if self.follow else 1)
        if self.follow:
            self._template = Template(template_directory(directory), limits.map_bytes)
        make_store = partial(build, deadline_seconds=self.config.fetch.deadline_seconds, template=self._template)
        while True:
            try:
                newest = await find_source(
                    self._links.candidates,
                    secret=secret,
                    clock=self.clock,
                    timing=self._timing,
                    chosen=self.wanted.head,
                )
                _check(newest)
                source = await source_of(newest, self.wanted, self._timing)
                place = image_directory(directory, source.found.ref, limits.map_bytes)
                left = latest_image(directory, limits.map_bytes, place) if self.follow else None
                await trio.to_thread.run_sync(remove_others, directory, {place, left})
                await make_store(place, source, limits, self.clock)
            except _WAITED_FOR as error:
                self.wait_for(f"backends: {error}")
                await trio.sleep(_AGAIN_SECONDS)
            else:
                break
        self.wait_for("")
        for sentence in newest.sentences():
            _log.info("%s", sentence)
        if newest.found.judgement.withstands < 0:
            _log.warning("too few backends answered to rule out a newer generation")
        self.source = source
        host = await owner_host(source.members, source.found.ref.owner, source.keys, self._timing)
        self.sightings = Sightings(
            source.members,
            Records(source.keys),
            source.superblock.code,
            self.clock,
            self._timing,
            Published(newest.found.ref, newest.found.head),
            newest.found.rejected,
        )
        self.sightings.watched.add(source.found.ref)
        self._limits = limits
        tag = 1 if self.follow else 0
        try:
            image = self._make(place, source, tag)
        except (CacheError, Corrupt, FormatMismatch) as error:
            # All of it can be had again: an image that another version left, or that is damaged, is built anew.
            _log.info("the image in %s cannot be used and is built anew: %s", place, error)
            await trio.to_thread.run_sync(remove_others, directory, {left})
            if self._template is not None:
                await trio.to_thread.run_sync(self._template.drop)
            await make_store(place, source, limits, self.clock)
            image = self._make(place, source, tag)
        image.host = host
        self._left = self._open_left(left)
        return image

    def _open_left(self, place: Path | None) -> Donor | None:
        """The store that an earlier mount has left of an older generation, if it can be used."""
        if place is None:
            return None
        try:
            return Donor(Store(place, self._limits, self.clock), place, 0)
        except (CacheError, Corrupt, FormatMismatch, lmdb.Error) as error:
            _log.info("the image in %s cannot be used: %s", place, error)
            shutil.rmtree(place, ignore_errors=True)
            return None

    def _make(self, place: Path, source: Source, tag: int) -> Image:
        reader = PackReader(source.members, source.keys, Code(source.superblock.code))
        return Image(
            place,
            source,
            self._limits,
            self.config,
            self.clock,
            reader,
            lambda name: self._links.metrics[name].sent_bytes,
            self.sightings.expired,
            tag,
        )

    def _follower(self, directory: Path, first: Image) -> Follower:
        assert self._template is not None
        return Follower(
            first,
            self.source,
            directory,
            self._limits,
            self.clock,
            self.sightings,
            self._timing,
            self._make,
            self._template,
            self._left,
            xattr=self.config.mount.xattr,
            deadline_seconds=self.config.fetch.deadline_seconds,
        )

    def wait_for(self, what: str) -> None:
        """Makes visible what the start waits for ("": for nothing any more)."""
        if what == self.waiting_for:
            return
        self.waiting_for = what
        if what:
            _log.warning("waiting for %s", what)
            notify(f"STATUS=waiting for {what}\nEXTEND_TIMEOUT_USEC=120000000")
            self._tell_waiting(what)

    # mounted

    async def _mounted(self, nursery: trio.Nursery, image: Image) -> None:
        nursery.start_soon(supervised, partial(probe, self.source.members, self.source.keys))
        nursery.start_soon(supervised, partial(self.sightings.run, self.config.mount.follow_seconds))
        async with trio.open_nursery() as serving:
            serving.start_soon(self._stopping.unmount_when_told)
            if self.follower is not None:
                serving.start_soon(supervised, partial(self.follower.run, nursery))
            await session.serve(
                image.operations if self.follower is None else self.follower.operations,
                self.config.filesystem.mountpoint,
                replace(self.config.mount, relatime=False),
                read_only=True,
                mounted=self._is_ready,
            )
            serving.cancel_scope.cancel()

    def _is_ready(self) -> None:
        self.phase = "mounted"
        tune_interpreter()
        assert self.image is not None
        where = self.config.filesystem.mountpoint
        notify(f"READY=1\nSTATUS=mounted read-only on {where}: generation {self.image.ref.generation}")
        _log.info("mounted read-only on %s: generation %d", where, self.image.ref.generation)
        self._ready(self.shown())

    def shown(self) -> dict[str, Any]:
        """Which generation is shown, of what time, and from which owner."""
        assert self.image is not None
        ref = self.image.ref
        return {
            "mode": "follow" if self.follow else "fixed",
            "wanted": str(self.wanted),
            "generation": ref.generation,
            "cut_at": self.image.head.time_ns / 1e9,
            "epoch": ref.owner.epoch,
            "host": self.image.host,
        }

    # stopping

    async def _finish(self) -> None:
        self.phase = "stopping"
        notify("STOPPING=1\nSTATUS=unmounted")
        if self.image is not None:
            await self.image.commit()
        self._finished.set()

    # control

    def _end_waits(self) -> None:
        self._unblock(None)

    def _unblock(self, number: int | None) -> int:
        return sum(image.fetcher.unblock(number) for image in self.images)

    async def _on_status(self, _: Mapping[str, Any]) -> Any:
        return status_of(self)

    async def _on_umount(self, _: Mapping[str, Any]) -> Any:
        """Answered at the end."""
        mounted = self.phase == "mounted"
        if not mounted:
            self._stopping.stop()
        else:
            self._end_waits()
            with self._unmounts:
                await trio.to_thread.run_sync(mountpoint.unmount, self.config.filesystem.mountpoint)
            self._stopping.stop()
        await self._finished.wait()
        return {"mounted": mounted, "published": False, "read_only": True}

    async def _on_unblock(self, request: Mapping[str, Any]) -> Any:
        path = request.get("path")
        if path is None:
            return {"ended": self._unblock(None)}
        tree = None if self.image is None else self.image.namespace.tree
        inode = None if tree is None else find(tree, path.encode("utf-8", "surrogateescape"))
        if inode is None:
            raise NotFound(f"{path}: no such file on this mount (give the path from the mount point)")
        return {"ended": self._unblock(inode.number)}


class _Handlers(dict[str, control.Handler]):
    """The commands of a read-only mount; all others are a writer's."""

    def __missing__(self, command: str) -> control.Handler:
        async def refuse(_: Mapping[str, Any]) -> Any:
            raise MountError(f"mounted read-only: '{command}' is for the mount that writes")

        return refuse


def _check(source: Source) -> None:
    if source.superblock.block_size != BLOCK_SIZE:
        raise FormatMismatch(
            f"file system {source.keys.fsid.hex()} has blocks of {source.superblock.block_size} bytes, this qsfs "
            f"works with {BLOCK_SIZE}; use the version that made it"
        )


def run(
    config: Config,
    clock: Clock,
    wanted: Wanted,
    *,
    follow: bool,
    secret: Secret | None = None,
    ready: Ready,
    waiting: Callable[[str], None],
) -> None:
    """Runs a read-only mount to its end in this process."""
    tune_allocator()
    reading = Reading(config, clock, wanted, follow=follow, secret=secret, ready=ready, waiting=waiting)
    trio.run(reading.run, strict_exception_groups=True)
