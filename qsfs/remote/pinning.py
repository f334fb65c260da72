"""Snapshots on their way: from the request to the published head that carries the name.

A request waits for a cut that begins after it.  When that cut's head is published the generation is pinned,
and the snapshot holds once a later head carries the pin: a head cannot list itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Protocol

import trio

from qsfs.errors import DeadlineExceeded, QsfsError
from qsfs.format.head import HeadRef
from qsfs.remote.generation import Generations
from qsfs.remote.snapshots import Snapshot, check_new, find_snapshot, snapshots_of, with_name, without_names


class Flushing(Protocol):
    """Who makes the generations; see `flush.Flusher`."""

    generations: Generations | None
    phase: str
    last_error: str

    def kick(self) -> None:
        """Has it looked at once whether a generation is to be made."""
        ...

    async def progress(self) -> None:
        """Waits until something was done; raises if nothing will be."""
        ...

    def raise_if_ended(self) -> None:
        """Raises why nothing will be done any more, if so."""
        ...


class SnapshotRequest:
    """One snapshot that is wanted.

    `sealed` is set when its cut is sealed (nothing written later is in it) or when it failed; `head` is
    known once the cut's head is published.  `held`: only the very cut that was sealed first will do, because
    applications were held still for it; otherwise a cut that had to be given up is followed by another.
    """

    def __init__(self, name: str, *, held: bool = False) -> None:
        self.name = name
        self.held = held
        self.sealed = trio.Event()
        self.head: HeadRef | None = None
        self.error: QsfsError | None = None

    def fail(self, error: QsfsError) -> None:
        """Ends the request: it gets no cut any more."""
        self.error = error
        self.sealed.set()


class Pinning:
    """Makes and deletes the snapshots of one mount."""

    def __init__(self, flushing: Flushing) -> None:
        self._flushing = flushing
        self._waiting: list[SnapshotRequest] = []
        self._in_cut: list[SnapshotRequest] = []

    @property
    def snapshots(self) -> list[Snapshot]:
        """Those that hold: the last published head carries them.  In the order of their cuts."""
        generations = self._flushing.generations
        return [] if generations is None else snapshots_of(generations.kept)

    async def cut(self, name: str, *, held_seconds: float | None = None) -> SnapshotRequest:
        """Waits until a cut that begins after this call is sealed for the snapshot `name`.

        With `held_seconds` only that very cut will do, and if it is not sealed in time the snapshot is given
        up with `DeadlineExceeded`.  The snapshot holds once `pinned` has returned.  Raises `ConfigError` for a
        name that is in use, `LimitExceeded`, and what ended flushing.
        """
        flushing = self._flushing
        flushing.raise_if_ended()
        check_new(name, self._names())
        request = SnapshotRequest(name, held=held_seconds is not None)
        self._waiting.append(request)
        flushing.kick()
        with trio.move_on_after(math.inf if held_seconds is None else held_seconds):
            await self._sealed(request)
        if not request.sealed.is_set():
            why = flushing.last_error or f"flushing is {flushing.phase}"
            error = DeadlineExceeded(
                f'snapshot "{name}" was given up: its cut was not sealed in the {held_seconds:.1f} s that were left '
                f"({why})"
            )
            self._waiting.remove(request)
            request.fail(error)
        if request.error is not None:
            raise request.error
        return request

    async def _sealed(self, request: SnapshotRequest) -> None:
        """Waits until the cut is sealed, or never will be."""
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                try:
                    while True:
                        await self._flushing.progress()
                except QsfsError as error:
                    if request in self._waiting:
                        self._waiting.remove(request)
                        request.fail(error)

            nursery.start_soon(watch)
            await request.sealed.wait()
            nursery.cancel_scope.cancel()

    def _names(self) -> set[str]:
        """All names that are in use, or being given to generations."""
        generations = self._flushing.generations
        pins = () if generations is None else generations.pins.values()
        names = {snapshot.name for snapshot in self.snapshots} | {name for held in pins for name in held}
        return names | {request.name for request in (*self._waiting, *self._in_cut)}

    async def pinned(self, request: SnapshotRequest) -> Snapshot:
        """Waits until the snapshot of a sealed cut holds; raises what says that it never will."""
        while True:
            if request.error is not None:
                raise request.error
            found = [snapshot for snapshot in self.snapshots if snapshot.name == request.name]
            if request.head is not None and found:
                return found[0]
            await self._flushing.progress()

    async def unpin(self, names: Collection[str]) -> None:
        """Deletes snapshots, and waits until a published head does without them.

        Raises `NotFound`, with nothing changed, if one of them is not there, and what ended flushing.
        """
        self._flushing.raise_if_ended()
        generations = self._flushing.generations
        for name in names:
            find_snapshot(() if generations is None else generations.kept, name)
        if generations is not None:
            generations.pins = without_names(generations.pins, names)
        self._flushing.kick()
        while not {snapshot.name for snapshot in self.snapshots}.isdisjoint(names):
            await self._flushing.progress()

    # for who makes the generations

    @property
    def waiting(self) -> tuple[SnapshotRequest, ...]:
        """Requests that no cut has been sealed for: a cut that begins now is to be theirs."""
        return tuple(self._waiting)

    def cut_sealed(self, asked: Iterable[SnapshotRequest]) -> None:
        """The cut that began after the requests in `asked` is sealed."""
        for request in asked:
            if request in self._waiting:
                self._waiting.remove(request)
                self._in_cut.append(request)
                request.sealed.set()

    def cut_given_up(self, error: QsfsError) -> None:
        """That cut becomes no generation: held requests fail, the others wait for the next one."""
        for request in self._in_cut:
            if request.held:
                request.fail(error)
            else:
                self._waiting.append(request)
        self._in_cut.clear()

    def cut_published(self, head: HeadRef) -> None:
        """That cut's head is published: the next one carries its pins."""
        generations = self._flushing.generations
        for request in self._in_cut:
            request.head = head
            if generations is not None:
                generations.pins = with_name(generations.pins, head, request.name)
        self._in_cut.clear()
