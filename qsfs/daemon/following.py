"""Following: a read-only mount moves with the newest published head.

Each generation is an image of its own, built beside the one that is shown; then one assignment between two
requests makes it the one that new path walks see.  An older image stays while something is open in it, and
a little longer if the kernel still knows names in it (of a working directory too, which is then stale).
After that it is a donor while nobody needs its room: what it holds of the same extents need not be fetched again.
All images together keep within the configured size: each has its share of it, the template that they are
copied from another, and while older ones that are in use take all others but one, the mount stays where it is, and
says so.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from qsfs.clock import Clock
from qsfs.daemon.image import Image, build
from qsfs.daemon.sightings import Sightings
from qsfs.errors import CacheError, LimitExceeded, QsfsError
from qsfs.fuse.generations import MOST_INODES, MOST_TAGS, GenerationOperations
from qsfs.remote.images import image_directory
from qsfs.remote.inherit import Donor
from qsfs.remote.readable import Published, owner_host, read_head
from qsfs.remote.source import Source
from qsfs.remote.survey import Timing
from qsfs.remote.template import Template
from qsfs.store.limits import Limits
from qsfs.store.store import NEXT_INODE, Store
from qsfs.values import counted

_log = logging.getLogger(__name__)

MOST_IMAGES = 4
"""Images that share the cache: the one shown, one that is being built, and older ones with open files."""
SHARES = MOST_IMAGES + 1
"""Into so many parts of one size the cache is divided: one is the template's."""

_TICK_SECONDS = 1.0
_COMMIT_SECONDS = 10.0
LINGER_SECONDS = 60.0
"""How long an image stays in which nothing is open any more, where the kernel has not forgotten its names.

It goes at once where its room is needed."""
_REST = 9.0
"""A move may read all metadata: after it, so many times its duration passes before the next."""

MakeImage = Callable[[Path, Source, int], Image]


class Follower:
    """Moves one mount.  `images` are those that are open, the last is the one shown.

    `donors` are those in which nothing is shown any more, oldest first.  `held` says why it does not move although
    there is something newer, `error` why the last move failed; "" otherwise.
    """

    def __init__(
        self,
        first: Image,
        source: Source,
        directory: Path,
        limits: Limits,
        clock: Clock,
        sightings: Sightings,
        timing: Timing,
        make: MakeImage,
        template: Template,
        left: Donor | None = None,
        *,
        xattr: bool,
        deadline_seconds: float,
    ) -> None:
        """`make` opens the image that lies in a directory, for a source and with a tag; `template` builds them.

        `left` is what an earlier mount has left of an older generation.
        """
        self.images = [first]
        self.donors: list[Donor] = [] if left is None else [left]
        first.inheritance.donors = partial(self._donors_of, first)
        self.held = ""
        self.error = ""
        self.moves = 0
        self.operations = GenerationOperations(xattr=xattr)
        self.operations.show(first.generation)
        self._source = source
        self._directory = directory
        self._limits = limits
        self._clock = clock
        self._sightings = sightings
        self._timing = timing
        self._make = make
        self._template = template
        self._deadline = deadline_seconds
        self._next_tag = first.generation.tag + 1
        self._wake = trio.Event()
        self._rest_until = 0.0
        self._idle_since: dict[Image, float] = {}
        self._scopes: dict[Image, tuple[trio.CancelScope, trio.Event]] = {}
        sightings.on_newer.append(self._newer)

    @property
    def current(self) -> Image:
        """The image that new path walks see."""
        return self.images[-1]

    async def serve(self, image: Image, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs an image until it is retired or the mount ends."""
        ended = trio.Event()
        try:
            with trio.CancelScope() as scope:
                self._scopes[image] = scope, ended
                await image.run(task_status=task_status)
        finally:
            ended.set()

    async def run(self, nursery: trio.Nursery) -> None:
        """Follows until cancelled; new images run in `nursery`."""
        while True:
            await self.step(nursery)
            with trio.move_on_after(_TICK_SECONDS):
                await self._wake.wait()
            self._wake = trio.Event()

    def _newer(self) -> None:
        self._wake.set()

    async def step(self, nursery: trio.Nursery) -> None:
        """Retires what nobody uses, and moves if there is something newer, room for it, and it is time."""
        await self._retire(idle_too=False)
        newest = self._sightings.newest
        if newest.ref <= self.current.ref:
            self.held = ""
            return
        if trio.current_time() < self._rest_until:
            return
        if len(self.images) >= MOST_IMAGES:
            await self._retire(idle_too=True)
        if len(self.images) >= MOST_IMAGES:
            self._hold()
            return
        while self.donors and len(self.images) + len(self.donors) >= MOST_IMAGES:
            # One that was shown for long may hold more of what is still the same than some that came after it.
            await self._drop(min(self.donors, key=lambda donor: donor.store.used_bytes))
        self.held = ""
        begin = trio.current_time()
        try:
            await self._move(newest, nursery)
        except QsfsError as error:
            if not self.error:
                _log.warning("cannot move to generation %d, and tries again: %s", newest.ref.generation, error)
            self.error = str(error)
        else:
            self.error = ""
        now = trio.current_time()
        self._rest_until = now + _REST * (now - begin)

    def _hold(self) -> None:
        older = [image for image in self.images[:-1] if image.generation.handles]
        names = ", ".join(str(image.ref.generation) for image in older)
        held = f"{counted(sum(i.generation.handles for i in older), 'open file')} of older generations ({names})"
        if not self.held:
            _log.warning("stays at generation %d: %s take all room for a newer one", self.current.ref.generation, held)
        self.held = held

    async def _move(self, newest: Published, nursery: trio.Nursery) -> None:
        if self._next_tag >= MOST_TAGS:
            raise LimitExceeded(f"{MOST_TAGS - 1} generations were shown, which is all one mount can: remount")
        source = self._source
        sealed, head = await read_head(source.members, newest.ref, source.keys, self._timing)
        found = replace(source.found, head=head, judgement=replace(source.found.judgement, newest=newest.ref))
        source = replace(source, found=found, sealed=sealed)
        place = image_directory(self._directory, newest.ref, self._limits.map_bytes)
        image = None
        for donor in [donor for donor in self.donors if donor.directory == place]:
            # An earlier mount has shown this very generation: its image is opened as it is.
            self.donors.remove(donor)
            donor.store.close()
        try:
            await build(
                place, source, self._limits, self._clock, deadline_seconds=self._deadline, template=self._template
            )
            image = self._make(place, source, self._next_tag)
            image.inheritance.donors = partial(self._donors_of, image)
            if image.store.counter(NEXT_INODE) >= MOST_INODES:
                raise LimitExceeded(f"generation {head.generation} has more inodes than a mount that follows can show")
            image.host = self.current.host
            if image.ref.owner != self.current.ref.owner:
                image.host = await owner_host(source.members, image.ref.owner, source.keys, self._timing)
            await nursery.start(self.serve, image)
        except BaseException:
            if image is not None:
                image.close()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(partial(shutil.rmtree, place, ignore_errors=True))
            raise
        self._next_tag += 1
        self.operations.show(image.generation)
        self.images.append(image)
        self.moves += 1
        self._sightings.watched.add(image.ref)
        _log.info("moved to generation %d", image.ref.generation)

    def _donors_of(self, image: Image) -> Iterator[Store]:
        """The stores of what was shown before an image, the newest first."""
        shown = ((one.generation.tag, one.store) for one in self.images)
        stores = dict([*((one.tag, one.store) for one in self.donors), *shown])
        return (stores[tag] for tag in sorted(stores, reverse=True) if tag < image.generation.tag)

    async def _retire(self, *, idle_too: bool) -> None:
        """Makes donors of older images in which nothing is open, and that the kernel forgot or had time to.

        Or of all idle ones.
        """
        now = trio.current_time()
        for image in self.images[:-1]:
            generation = image.generation
            if generation.handles:
                self._idle_since.pop(image, None)
                continue
            late = idle_too or now - self._idle_since.setdefault(image, now) >= LINGER_SECONDS
            if generation.known and not late:
                continue
            self._idle_since.pop(image)
            self.operations.forget_generation(generation)
            self.images.remove(image)
            self._sightings.watched.discard(image.ref)
            scope, ended = self._scopes.pop(image)
            with trio.CancelScope(shield=True):
                # What is in memory only would stay there; a local disk that failed is no reason to keep an image.
                with contextlib.suppress(CacheError), trio.move_on_after(_COMMIT_SECONDS):
                    await image.commit()
                scope.cancel()
                await ended.wait()
            self.donors.append(Donor(image.store, image.directory, generation.tag))
            _log.debug("generation %d is not shown any more", image.ref.generation)

    async def _drop(self, donor: Donor) -> None:
        self.donors.remove(donor)
        with trio.CancelScope(shield=True):
            donor.store.close()
            await trio.to_thread.run_sync(partial(shutil.rmtree, donor.directory, ignore_errors=True))

    def status(self) -> dict[str, Any]:
        """What `qsfs status` adds for a mount that follows."""
        return {
            "moves": self.moves,
            "held": self.held,
            "move_error": self.error,
            "donors": len(self.donors),
            "older": [
                {
                    "generation": image.ref.generation,
                    "open": image.generation.handles,
                    "kept": self._sightings.gone_since(image.ref) is None,
                }
                for image in self.images[:-1]
            ],
        }
