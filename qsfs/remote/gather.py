"""Reading one pack: the shards that are wanted, or any k from which they follow.

The wanted data shards are asked for where they were placed.  Once one of them is late, wrong or
nowhere, so many other shards are asked for, fastest backends first, that k come together; when the
placed backends have no more to give, every other backend is asked for every missing shard.  What
then still lacks waits for backends to come back (`Watch`), or is positively lost.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import trio

from qsfs.backend.limits import rates_of
from qsfs.errors import BackendUnavailable, DataLost, QsfsBug, QsfsError
from qsfs.remote.ask import Answer, Finding, ask_shard
from qsfs.remote.members import Member, State
from qsfs.remote.stored import StoredPack

if TYPE_CHECKING:
    from qsfs.remote.reader import PackReader

log = logging.getLogger(__name__)

LONGEST_CALL = 60.0
"""Seconds after which a question counts as unanswered, whatever the backend's own limit is."""

_HUNTS = 32
_HOPE_SECONDS = 1.0
"""How long after it is late an answer is still hoped for before all backends are asked for the shard."""
_NAMED_IN_MESSAGES = 8


class _Get:
    """One question under way.  `began` once it has its place among those of its backend, and its turn by the rate."""

    __slots__ = ("began", "hopeless_at", "late_at", "scope")

    def __init__(self, late_at: float) -> None:
        self.began = False
        self.scope = trio.CancelScope()
        self.expect(late_at)

    def expect(self, late_at: float) -> None:
        """Sets from when on the answer is late."""
        self.late_at = late_at
        self.hopeless_at = late_at + _HOPE_SECONDS


class Gathering:
    """One pack being read, for as many readers as want something of it.

    `found` has the payloads that are here.  `asleep` is whether it waits for backends to come back.
    """

    def __init__(self, reader: PackReader, pack: StoredPack) -> None:
        self.pack = pack
        self.wanted: set[int] = set()
        self.found: dict[int, memoryview] = {}
        self.readers = 0
        self.failure: QsfsError | None = None
        self.finished = False
        self.asleep = False
        self._reader = reader
        self._waiting: dict[trio.Event, set[int]] = {}
        self._answers: dict[tuple[int, int], Answer] = {}
        self._running: dict[tuple[int, int], _Get] = {}
        self._sources: dict[int, int] = {}
        self._dropped: dict[int, int] = {}
        self._hunt: Iterator[tuple[int, int]] = iter(())
        self._poked = trio.Event()
        self._decoding = False

    async def payloads(self, numbers: Collection[int]) -> dict[int, memoryview]:
        """The payloads of these data shards; raises what ends the gathering without them."""
        self.readers += 1
        self.wanted.update(numbers)
        self.poke()
        try:
            while lacking := {number for number in numbers if number not in self.found}:
                if self.failure is not None:
                    raise self.failure
                if self.finished:
                    raise QsfsBug(f"pack {self.pack.name}: reading it ended without what was wanted")
                here = trio.Event()
                self._waiting[here] = lacking
                try:
                    await here.wait()
                finally:
                    del self._waiting[here]
            return {number: self.found[number] for number in numbers}
        finally:
            self.readers -= 1
            self.poke()

    def end(self, failure: QsfsError) -> None:
        """Ends it for all who wait, unless it has ended already."""
        self.failure = self.failure or failure
        self.finished = True
        self._wake_all()

    def poke(self) -> None:
        """Makes the gathering look again at what there is to do."""
        self._poked.set()

    async def run(self) -> None:
        """Gathers until everything wanted is here, nobody wants it any more, or it is lost."""
        try:
            await self._gather()
        except QsfsError as error:
            self.failure = error
        except Exception as error:
            log.exception("pack %s: reading it failed unexpectedly", self.pack.name)
            self.failure = QsfsBug(f"pack {self.pack.name}: reading it failed: {error!r}")
        finally:
            self.finished = True
            self._reader.slots.release(self)
            self._reader.watch.forget(self)
            for get in self._running.values():
                if not get.began:
                    get.scope.cancel()
            self._wake_all()

    async def _gather(self) -> None:
        while self.readers and not self.wanted <= self.found.keys():
            self._poked = trio.Event()
            if len(self.found) >= self.pack.ref.k:
                await self._decode()
                continue
            more = self._ask()
            # What is late may never come: others must be woken meanwhile.
            if not more and all(map(_late, self._running.values())):
                self._refuse_lost()
                await self._sleep()
                continue
            now = trio.current_time()
            times = (at for get in self._running.values() for at in (get.late_at, get.hopeless_at) if at > now)
            with trio.move_on_at(min(times, default=math.inf)):
                await self._poked.wait()

    async def _decode(self) -> None:
        k = self.pack.ref.k
        have = {number: self.found[number] for number in sorted(self.found)[:k]}
        self._reader.counts.decoded += 1
        data = await self._reader.decode(have)
        for number, payload in enumerate(data):
            self._arrived(number, memoryview(payload))

    # asking

    def _ask(self) -> bool:
        """Starts what questions are worth asking now; False if there is none besides those under way."""
        missing = self.wanted - self.found.keys()
        if not self._decoding:
            asked = [self._ask_directly(number) for number in missing]
            if all(asked):
                return True
            if not self._reader.slots.take(self):
                return True
            self._decoding = True
        pending = {number for (number, _), get in self._running.items() if not _late(get)} - self.found.keys()
        lacking = self.pack.ref.k - len(self.found) - len(pending)
        if lacking <= 0:
            return True
        # A backend may have left the fleet since it gave a shard.
        members = self._reader.members
        self._dropped = {n: m for n, m in self._dropped.items() if members.by_number(m) is not None}
        kept = {n: m for n, m in self._dropped.items() if n not in self.found and n not in pending}
        if len(kept) >= lacking:
            return bool(self._start_some(iter(kept.items()), lacking))
        wanting = lacking - len(kept)
        started = self._start_some(self._placed(pending | kept.keys()), wanting)
        if not started and self._hoped_for(pending) < wanting:
            started = self._start_some(self._elsewhere(pending | kept.keys()), _HUNTS)
        elif not started:
            return True
        return bool(started)

    def _hoped_for(self, pending: set[int]) -> int:
        """How many shards besides `pending` may still come from where they were placed, though late.

        Where this machine itself is slow all answers are: to ask every backend for every shard makes it slower.
        """
        now = trio.current_time()
        late = {number for (number, _), get in self._running.items() if now < get.hopeless_at}
        return len(late - pending - self.found.keys())

    def _ask_directly(self, number: int) -> bool:
        """Whether the backend where data shard `number` was placed is being asked and is not late."""
        place = self.pack.placement[number]
        get = self._running.get((number, place))
        if get is not None:
            return not _late(get)
        member = self._reader.members.by_number(place)
        if member is None or not member.ready or (number, place) in self._answers:
            return False
        return self._start(number, place)

    def _start_some(self, choices: Iterator[tuple[int, int]], count: int) -> int:
        started = 0
        for number, member in choices:
            started += self._start(number, member)
            if started >= count:
                break
        return started

    def _placed(self, besides: set[int]) -> Iterator[tuple[int, int]]:
        """Shards not yet asked for where they were placed, the fastest healthy backends first."""
        choices = []
        for number, place in enumerate(self.pack.placement):
            member = self._askable(number, place)
            if member is not None and number not in besides and number not in self.found:
                choices.append((self._rank(member), number, place))
        return ((number, place) for _, number, place in sorted(choices))

    def _elsewhere(self, besides: set[int]) -> Iterator[tuple[int, int]]:
        """Every missing shard at every backend that was not asked for it: the placement was only a hint.

        The hunt goes on where it stopped, since with a large code all there is to ask takes long to look through.
        What it has passed over may be worth asking by now, so only one from the start shows that nothing is left.
        """
        from_start = False
        while True:
            for number, place in self._hunt:
                if number not in besides and number not in self.found and self._askable(number, place) is not None:
                    yield number, place
            if from_start:
                return
            from_start = True
            self._hunt = self._everywhere()

    def _everywhere(self) -> Iterator[tuple[int, int]]:
        """All shards at all backends, the fastest healthy backends first."""
        for _, equal in groupby(sorted(self._reader.members, key=self._rank), key=self._rank):
            places = sorted(member.number for member in equal)
            for number in range(len(self.pack.placement)):
                for place in places:
                    yield number, place

    def _askable(self, number: int, place: int) -> Member | None:
        member = self._reader.members.by_number(place)
        if member is None or not member.ready:
            return None
        if (number, place) in self._answers or (number, place) in self._running:
            return None
        return member

    def _rank(self, member: Member) -> tuple[bool, float]:
        return member.state is not State.UP, self._reader.latencies.typical(member.number)

    def _start(self, number: int, place: int) -> bool:
        member = self._reader.members.by_number(place)
        if member is None or (number, place) in self._running:
            return False
        get = _Get(trio.current_time() + self._reader.latencies.late_after(place))
        self._running[number, place] = get
        self._reader.start(self._get, member, number, get)
        return True

    async def _get(self, member: Member, number: int, get: _Get) -> None:
        answer: Answer | None = None
        limit = self._reader.limit(member.number)
        try:
            with get.scope:
                try:
                    limit.acquire_nowait()
                except trio.WouldBlock:
                    await limit.acquire()
                try:
                    rate = rates_of(member.data).download
                    if rate.waits:
                        get.expect(math.inf)
                    async with rate.turn(self.pack.ref.shard_size):
                        answer = await self._timed(member, number, get)
                finally:
                    limit.release()
        except Exception as error:
            log.exception("backend %s: asking it failed unexpectedly", member.name)
            answer = Answer(number, member.number, Finding.UNKNOWN, why=f"backend {member.name}: {error!r}")
        finally:
            del self._running[number, member.number]
        if answer is not None:
            await self._reader.received(self.pack, answer)
            self._take(answer)

    async def _timed(self, member: Member, number: int, get: _Get) -> Answer:
        began = trio.current_time()
        get.began = True
        if get.late_at == math.inf:
            get.expect(began + self._reader.latencies.late_after(member.number))
            self.poke()
        answer = await self._question(member, number)
        if answer.finding is not Finding.UNKNOWN:
            self._reader.latencies.note(member.number, trio.current_time() - began)
        return answer

    async def _question(self, member: Member, number: int) -> Answer:
        with trio.move_on_after(LONGEST_CALL):
            return await ask_shard(member, self.pack, number, self._reader.code, self._reader.keys)
        error = BackendUnavailable(f"backend {member.name}: no answer in {LONGEST_CALL:.0f} s")
        member.failed(error)
        return Answer(number, member.number, Finding.UNKNOWN, why=str(error))

    def _take(self, answer: Answer) -> None:
        if answer.payload is not None:
            self._arrived(answer.number, answer.payload)
            self._sources[answer.number] = answer.member
            self._dropped.pop(answer.number, None)
            self._reader.watch.progress(self)
            if not self._decoding and not self.asleep and not self.wanted <= self.found.keys():
                return
        else:
            if self._dropped.get(answer.number) == answer.member:
                del self._dropped[answer.number]
            self._answers[answer.number, answer.member] = answer
        self.poke()

    def _arrived(self, number: int, payload: memoryview) -> None:
        self.found.setdefault(number, payload)
        for here, lacking in self._waiting.items():
            lacking.discard(number)
            if not lacking:
                here.set()

    def _wake_all(self) -> None:
        for here in self._waiting:
            here.set()

    # waiting

    def _refuse_lost(self) -> None:
        """Raises `DataLost` if every backend has answered, and too few shards are left."""
        members = self._reader.members
        here = self.found.keys() | self._dropped.keys()
        lost = []
        for number, place in enumerate(self.pack.placement):
            if place >= 0 and members.by_number(place) is None:
                return
            if number in here:
                continue
            answers = [self._answers.get((number, member.number)) for member in members]
            if all(answer is not None and answer.negative for answer in answers):
                lost.append(number)
        if len(lost) > self._reader.code.m and len(members):
            raise DataLost(
                f"pack {self.pack.name} is lost: all {len(members)} backends answered, and of its "
                f"{len(self.pack.placement)} shards {len(lost)} are absent or damaged, more than the "
                f"{self._reader.code.m} that may be: {self._reasons()}; bring back an older copy of a backend"
            )

    async def _sleep(self) -> None:
        """Waits until the watch sees a reason to go on.  What is not wanted is let go of meanwhile."""
        for number in [n for n in self.found if n not in self.wanted]:
            self._dropped[number] = self._sources[number]
            del self.found[number]
        self._decoding = False
        self._reader.slots.release(self)
        self._reader.watch.park(self)
        self.asleep = True
        try:
            await self._poked.wait()
        finally:
            self.asleep = False
            self._reader.watch.leave(self)

    def unknown(self) -> set[int]:
        """The backends that gave no answer where one is needed."""
        silent = {member for (_, member), answer in self._answers.items() if not answer.negative}
        asked = {member for _, member in self._answers}
        return silent | {member.number for member in self._reader.members} - asked

    def wake(self, members: set[int] | None) -> None:
        """Forgets what these backends answered (None: all), so that they are asked again."""
        for key in [key for key in self._answers if members is None or key[1] in members]:
            del self._answers[key]
        self._hunt = iter(())
        self.poke()

    @property
    def held_up(self) -> bool:
        """Whether a question waits for its turn by the download rate."""
        asked = [self._reader.members.by_number(place) for (_, place), get in self._running.items() if not get.began]
        return any(member is not None and rates_of(member.data).download.waits for member in asked)

    def explain(self) -> str:
        """How far it has come and what is in the way."""
        k = self.pack.ref.k
        here = len(self.found.keys() | self._dropped.keys())
        why = "the download rate holds up the others" if self.held_up else self._reasons()
        return f"pack {self.pack.name}: {here} of the {k} shards needed can be had; {why}"

    def _reasons(self) -> str:
        parts = []
        for number, place in enumerate(self.pack.placement):
            if number in self.found or number in self._dropped:
                continue
            answer = self._answers.get((number, place))
            if answer is not None:
                parts.append(f"shard {number}: {answer.why}")
                continue
            member = self._reader.members.by_number(place)
            if place < 0:
                parts.append(f"shard {number}: never stored")
            elif member is None:
                parts.append(f"shard {number}: entry {place} of the fleet is not configured")
            elif not member.ready:
                parts.append(f"shard {number}: backend {member.name} is down ({member.error})")
            elif (number, place) in self._running:
                parts.append(f"shard {number}: no answer yet from backend {member.name}")
        if len(parts) > _NAMED_IN_MESSAGES:
            parts = [*parts[:_NAMED_IN_MESSAGES], f"and {len(parts) - _NAMED_IN_MESSAGES} more"]
        return "; ".join(parts) or "not asked yet"


def _late(get: _Get) -> bool:
    return trio.current_time() >= get.late_at
