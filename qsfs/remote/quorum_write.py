"""One sealed record, written everywhere, and counted where it was read back among all others.

A backend counts only if it acknowledged the record and then, on the same connection, answered the
reading of all owner records and heads, and that reading allows it.  So of two mounts that write
to two quorums at least one reads the other's record.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import trio

from qsfs import failpoints
from qsfs.backend.contract import Session
from qsfs.clock import Clock
from qsfs.errors import BackendError, BackendUnavailable, QsfsError
from qsfs.remote.control import Reading, Records, read_control
from qsfs.remote.members import Member, Members
from qsfs.remote.quorum import FleetQuorum, describe_shortage, reached
from qsfs.remote.survey import Survey, Timing, converse

Judge = Callable[[Reading], str | None]
"""Judges a reading: None if its backend counts, the reason if not; raises `Fenced` to end the attempt."""


class QuorumWrite:
    """Writes `value` to `key` on every backend of some fleets until a quorum of each counts.

    `before` are records that a backend must hold before it gets this one.  Counts are kept from one
    `start` to the next: the record and its bytes stay the same.  `finished` is set when nothing that
    the last one began is under way any more.
    """

    def __init__(
        self,
        members: Members,
        quorums: Collection[FleetQuorum],
        key: bytes,
        value: bytes,
        *,
        records: Records,
        judge: Judge,
        timing: Timing,
        clock: Clock,
        before: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        self.quorums = tuple(quorums)
        self.survey = Survey()
        self.counted: set[int] = set()
        self.failure: QsfsError | None = None
        self._members = members
        self._key = key
        self._value = value
        self._records = records
        self._judge = judge
        self._timing = timing
        self._clock = clock
        self._before = tuple(before)
        self.finished = trio.Event()
        self._settled = trio.Event()
        self._scope: trio.CancelScope | None = None

    @property
    def numbers(self) -> frozenset[int]:
        """All backends that it is written to."""
        return frozenset(number for quorum in self.quorums for number in quorum.numbers)

    @property
    def reached(self) -> bool:
        """Whether a quorum of every fleet counts."""
        return reached(self.quorums, self.counted)

    @property
    def missing(self) -> frozenset[int]:
        """Backends that have not counted (yet)."""
        return self.numbers - self.counted

    def reasons(self) -> tuple[str, ...]:
        """What is short, and why backends have not counted."""
        shortage = describe_shortage(self.quorums, self.counted)
        absent = sorted(n for n in self.missing if self._members.by_number(n) is None)
        return (
            *([shortage] if shortage else []),
            *(str(error) for number, error in sorted(self.survey.errors.items()) if number in self.missing),
            *(
                [f"no configured backend is entry {', '.join(map(str, absent))} of the fleet"]
                if absent
                else []
            ),
        )

    def start(self, nursery: trio.Nursery) -> None:
        """Writes and reads in `nursery`: until all have counted, `timing.grace` after the quorum, or `stop`.

        Raises nothing there; what ends the attempt early is in `failure`.
        """
        self.finished = trio.Event()
        self._scope = trio.CancelScope()
        self._shorten()
        nursery.start_soon(self._run, self._scope)

    def stop(self) -> None:
        """Ends what `start` began.  What is under way may still take effect at its backend."""
        if self._scope is not None:
            self._scope.cancel()

    async def settle(self, deadline: float) -> bool:
        """Waits until the quorum is reached, or until `deadline` (trio's clock): False.

        Raises what ended the attempt, if that came before the quorum.
        """
        with trio.move_on_at(deadline):
            while not self.reached and self.failure is None:
                await self._settled.wait()
        if self.reached:
            return True
        if self.failure is not None:
            raise self.failure
        return False

    async def _run(self, scope: trio.CancelScope) -> None:
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    for member in self._members.of(self.missing):
                        nursery.start_soon(self._persist, member)
        finally:
            if scope is self._scope:
                self.finished.set()

    async def _persist(self, member: Member) -> None:
        failed = 0
        while True:
            try:
                reading = await converse(
                    member, self._records, self._timing, lambda s: self._write(s, member)
                )
                reason = self._judge(reading)
            except BackendError as error:
                self.survey.errors[member.number] = error
            except QsfsError as error:
                self._fail(error)
                return
            else:
                self.survey.readings[member.number] = reading
                if reason is None:
                    self._count(member.number)
                    return
                self.survey.errors[member.number] = BackendUnavailable(
                    f"backend {member.control.name}: is not counted, it may hold something newer: {reason}"
                )
            failed += 1
            await trio.sleep(self._timing.pause(failed, self._clock))

    async def _write(self, session: Session, member: Member) -> Reading:
        for key, value in self._before:
            if not await session.exists(key):
                await session.set(key, value)
        await session.set(self._key, self._value)
        failpoints.hit("quorum_write.acknowledged")
        return await read_control(session, member.number, self._records, member.index, written=self._key)

    def _count(self, number: int) -> None:
        self.survey.errors.pop(number, None)
        self.counted.add(number)
        self._shorten()
        if self.reached:
            self._settled.set()

    def _shorten(self) -> None:
        if self._scope is not None and self.reached:
            self._scope.deadline = min(self._scope.deadline, trio.current_time() + self._timing.grace)

    def _fail(self, error: QsfsError) -> None:
        if self.failure is None:
            self.failure = error
        self._settled.set()
        self.stop()
