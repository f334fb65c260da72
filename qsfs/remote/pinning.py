"""Snapshots on their way: from the request to the published head that carries the name.

A request waits for a cut that begins after it.  When that cut's head is published the generation is pinned,
and the snapshot holds once a later head carries the pin: a head cannot list itself.

Where applications were held still for a cut, only who holds them knows whether they were until it was sealed.
So such a cut is pinned after `confirm` alone, and abandoned if that does not come in time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Protocol

import trio

from qsfs.errors import DeadlineExceeded, NotFound, QsfsError
from qsfs.format.head import HeadRef
from qsfs.remote.generation import Generations
from qsfs.remote.snapshots import Snapshot, check_new, find_snapshot, snapshots_of, with_name, without_names

CONFIRM_SECONDS = 10.0
"""How long after it was sealed a cut with held applications may be confirmed."""


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
    `ticket` is how who holds them names it later.  `settled` is set when it is confirmed, by the time
    `confirm_by`, or when it failed.
    """

    def __init__(self, name: str, *, held: bool = False, ticket: str = "") -> None:
        self.name = name
        self.held = held
        self.ticket = ticket
        self.sealed = trio.Event()
        self.settled = trio.Event()
        self.confirm_by = math.inf
        self.head: HeadRef | None = None
        self.error: QsfsError | None = None

    def fail(self, error: QsfsError) -> None:
        """Ends the request: it gets no cut any more."""
        self.error = error
        self.sealed.set()
        self.settled.set()

    @property
    def unconfirmed(self) -> bool:
        """Whether it must not be pinned yet."""
        return self.held and not self.settled.is_set()


class Pinning:
    """Makes and deletes the snapshots of one mount."""

    def __init__(self, flushing: Flushing) -> None:
        self._flushing = flushing
        self._waiting: list[SnapshotRequest] = []
        self._in_cut: list[SnapshotRequest] = []
        self._undecided: list[SnapshotRequest] = []

    @property
    def snapshots(self) -> list[Snapshot]:
        """Those that hold: the last published head carries them.  In the order of their cuts."""
        generations = self._flushing.generations
        return [] if generations is None else snapshots_of(generations.kept)

    async def cut(self, name: str, *, held_seconds: float | None = None, ticket: str = "") -> SnapshotRequest:
        """Waits until a cut that begins after this call is sealed for the snapshot `name`.

        With `held_seconds` only that very cut will do, and if it is not sealed in time the snapshot is given
        up with `DeadlineExceeded`; once sealed it is to be confirmed, and `held` finds it by `ticket`.  The
        snapshot holds once `pinned` has returned.  Raises `ConfigError` for a name that is in use,
        `LimitExceeded`, and what ended flushing.
        """
        flushing = self._flushing
        flushing.raise_if_ended()
        check_new(name, self._names())
        request = SnapshotRequest(name, held=held_seconds is not None, ticket=ticket)
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
            self.abandon(request, error)
        if request.error is not None:
            raise request.error
        return request

    def held(self, ticket: str) -> SnapshotRequest:
        """The request for held applications with this ticket; `NotFound` if there is none, or no more."""
        self._lapse()
        for request in (*self._waiting, *self._in_cut, *self._undecided):
            if request.held and request.ticket == ticket:
                return request
        raise NotFound(
            "no such snapshot is being made: it was given up, or not confirmed within "
            f"{CONFIRM_SECONDS:g} s after its cut was sealed"
        )

    def confirm(self, request: SnapshotRequest) -> None:
        """Says that the applications were held until the cut was sealed: from now on it becomes a snapshot.

        Raises what ended the request, and `QsfsError` if its cut is not sealed.
        """
        self._lapse()
        if request.error is not None:
            raise request.error
        if not request.sealed.is_set():
            raise QsfsError(f'the cut of snapshot "{request.name}" is not sealed yet')
        request.settled.set()
        if request in self._undecided:
            self._undecided.remove(request)
            self._pin(request)
            self._flushing.kick()

    def abandon(self, request: SnapshotRequest, error: QsfsError | None = None) -> None:
        """Gives a snapshot up, however far it is: no head that is begun from now on carries its name."""
        for requests in (self._waiting, self._in_cut, self._undecided):
            if request in requests:
                requests.remove(request)
        generations, head = self._flushing.generations, request.head
        if generations is not None and head is not None and request.name in generations.pins.get(head, ()):
            generations.pins = without_names(generations.pins, [request.name])
            self._flushing.kick()
        if request.error is None:
            request.fail(error or DeadlineExceeded(f'snapshot "{request.name}" was given up'))

    def _lapse(self) -> None:
        """Abandons what should have been confirmed by now."""
        now = trio.current_time()
        for request in (*self._in_cut, *self._undecided):
            if request.unconfirmed and now >= request.confirm_by:
                self.abandon(request)

    def _pin(self, request: SnapshotRequest) -> None:
        generations = self._flushing.generations
        if generations is not None and request.head is not None:
            generations.pins = with_name(generations.pins, request.head, request.name)

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
        self._lapse()
        generations = self._flushing.generations
        pins = () if generations is None else generations.pins.values()
        names = {snapshot.name for snapshot in self.snapshots} | {name for held in pins for name in held}
        return names | {request.name for request in (*self._waiting, *self._in_cut, *self._undecided)}

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
                request.confirm_by = trio.current_time() + CONFIRM_SECONDS
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
        self._lapse()
        for request in self._in_cut:
            request.head = head
            if request.unconfirmed:
                self._undecided.append(request)
            else:
                self._pin(request)
        self._in_cut.clear()

    @property
    def undecided(self) -> bool:
        """Whether a head is published of which it is not known yet whether it is to be pinned."""
        return bool(self._undecided)

    async def decided(self) -> None:
        """Waits until that is known, which is not long: a head can be pinned only while it is kept."""
        for request in tuple(self._undecided):
            with trio.move_on_at(request.confirm_by):
                await request.settled.wait()
        self._lapse()
