"""One pack on the backends: what each shard is like, and rebuilding those that are missing or wrong.

Unknown, absent and corrupt stay apart: only what a backend positively does not have as it was
written is rebuilt, and nothing is ever deleted.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import trio

from qsfs.errors import BackendError, Corrupt, DataLost
from qsfs.format.erasure import Code
from qsfs.format.keys import KeyRing
from qsfs.format.pack import verify_body
from qsfs.format.shard import encode_shard
from qsfs.remote.ask import Answer, Finding, ask_shard
from qsfs.remote.members import Member, Members
from qsfs.remote.placement import FreeSpace, assign, group_count, ranking
from qsfs.remote.stored import StoredPack

CALL_SECONDS = 60.0


@dataclass(slots=True)
class PackLook:
    """What was found of a pack: an answer for each shard from where it was placed.

    `elsewhere`: shards that another backend holds.  `payloads`: what was read, if it was.  `silent`:
    backends that owe an answer.
    """

    pack: StoredPack
    answers: dict[int, Answer] = field(default_factory=dict)
    elsewhere: dict[int, int] = field(default_factory=dict)
    payloads: dict[int, memoryview] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)

    def numbers(self, *findings: Finding) -> list[int]:
        """The shards with one of these findings, that are not elsewhere either."""
        return sorted(
            n for n, answer in self.answers.items() if answer.finding in findings and n not in self.elsewhere
        )

    @property
    def missing(self) -> list[int]:
        """The shards that are positively nowhere as they were written."""
        return self.numbers(Finding.ABSENT, Finding.CORRUPT)

    @property
    def had(self) -> int:
        """The shards that are there."""
        return len(self.answers) - len(self.numbers(Finding.ABSENT, Finding.CORRUPT, Finding.UNKNOWN))

    @property
    def lost(self) -> bool:
        """Whether all backends answered, and too few shards are left."""
        return not self.silent and len(self.missing) > len(self.answers) - self.pack.ref.k

    def holders(self) -> set[int]:
        """The backends that hold a shard of it, or may."""
        held = {a.member for a in self.answers.values() if a.finding in (Finding.GOOD, Finding.UNKNOWN)}
        return held | set(self.elsewhere.values())


class PackDoctor:
    """Looks at packs and mends them, for checks, scrubs and repairs."""

    def __init__(self, members: Members, keys: KeyRing, code: Code, free: FreeSpace) -> None:
        self.members = members
        self.keys = keys
        self.code = code
        self._free = free

    # looking

    async def look(self, pack: StoredPack, *, deep: bool) -> PackLook:
        """Asks for every shard: whether it is listed, or (`deep`) for the shard itself.

        What is missing where it was placed is looked for on all other backends.
        """
        look = PackLook(pack)
        async with trio.open_nursery() as nursery:
            for number, place in enumerate(pack.placement):
                nursery.start_soon(self._ask_into, look, number, place, deep)
        wanted = [n for n, answer in look.answers.items() if answer.negative]
        async with trio.open_nursery() as nursery:
            for number in wanted:
                for member in self.members:
                    if member.number != pack.placement[number]:
                        nursery.start_soon(self._search, look, number, member, deep)
        return look

    async def _ask_into(self, look: PackLook, number: int, place: int, deep: bool) -> None:
        member = self.members.by_number(place)
        if place < 0:
            answer = Answer(number, place, Finding.ABSENT, why="it was never stored")
        elif member is None:
            why = f"entry {place} of the fleet is not among the configured backends that answer"
            answer = Answer(number, place, Finding.UNKNOWN, why=why)
        else:
            answer = await self._ask(look.pack, number, member, deep)
        look.answers[number] = answer
        if answer.finding is Finding.UNKNOWN:
            look.silent.add(place)
        if answer.payload is not None:
            look.payloads[number] = answer.payload

    async def _search(self, look: PackLook, number: int, member: Member, deep: bool) -> None:
        answer = await self._ask(look.pack, number, member, deep)
        if answer.finding is Finding.UNKNOWN:
            look.silent.add(member.number)
        if answer.finding is Finding.GOOD and number not in look.elsewhere:
            look.elsewhere[number] = member.number
            if answer.payload is not None:
                look.payloads[number] = answer.payload

    async def _ask(self, pack: StoredPack, number: int, member: Member, deep: bool) -> Answer:
        with trio.move_on_after(CALL_SECONDS):
            if deep:
                return await ask_shard(member, pack, number, self.code.params, self.keys)
            return await self._listed(pack, number, member)
        why = f"backend {member.name}: no answer in {CALL_SECONDS:.0f} s"
        return Answer(number, member.number, Finding.UNKNOWN, why=why)

    async def _listed(self, pack: StoredPack, number: int, member: Member) -> Answer:
        try:
            found = await member.data.exists(pack.key(self.keys.fsid, number))
        except BackendError as error:
            member.failed(error)
            return Answer(number, member.number, Finding.UNKNOWN, why=str(error))
        member.succeeded()
        if found:
            return Answer(number, member.number, Finding.GOOD)
        if not member.identified:
            why = f"backend {member.name}: has not shown yet that it is entry {member.number} of the fleet"
            return Answer(number, member.number, Finding.UNKNOWN, why=why)
        return Answer(number, member.number, Finding.ABSENT, why=f"backend {member.name}: absent")

    # verifying

    def verify(self, look: PackLook) -> tuple[bytes, list[int]]:
        """The body of a pack of which the shards were read, and the shards that do not belong to it.

        The body is decoded, verified whole and encoded again: every shard must be just that.
        Raises `DataLost` if too few shards were read, `Corrupt` if no k of them make the pack.  Takes
        long: use a worker thread.
        """
        k = self.code.params.k
        if len(look.payloads) < k:
            raise DataLost(f"pack {look.pack.name}: {len(look.payloads)} of the {k} shards needed were read")
        first: Corrupt | None = None
        for chosen in _subsets(sorted(look.payloads), k):
            data = self.code.decode({number: look.payloads[number] for number in chosen})
            body = b"".join(data)
            try:
                verify_body(self.keys, look.pack.ref, body)
            except Corrupt as error:
                first = first or error
                continue
            whole = self.code.rebuild(dict(enumerate(data)), look.payloads)
            return body, [number for number, payload in look.payloads.items() if whole[number] != payload]
        raise first or Corrupt(f"pack {look.pack.name}: no {k} of its shards make it whole")

    # mending

    async def rebuild(
        self, look: PackLook, body: bytes, numbers: Collection[int]
    ) -> tuple[dict[int, int], list[str]]:
        """Stores shards `numbers` anew, made from a verified `body`: where they were, else elsewhere.

        Returns the backend that has each now, and why others could not be stored.  Each was read back.
        """
        pack = look.pack
        values = await trio.to_thread.run_sync(self._values, pack, body, numbers)
        placed: dict[int, int] = {}
        reasons: list[str] = []
        for number in sorted(numbers):
            member = self.members.by_number(pack.placement[number])
            if member is not None and member.writable:
                why = await self._store(member, pack.key(self.keys.fsid, number), values[number])
                if why is None:
                    placed[number] = member.number
                else:
                    reasons.append(why)
        tried: set[int] = {place for place in pack.placement if place >= 0}
        while rest := [number for number in sorted(numbers) if number not in placed]:
            holders = look.holders() | set(placed.values())
            spare = [m for m in self.members if m.writable and m.number not in holders | tried]
            chosen = assign(
                rest,
                ranking(pack.ref.pack_id, spare, self._free),
                self.members.of(holders),
                n=self.code.params.n,
                groups=group_count(list(self.members)),
            )
            if not chosen:
                reasons.append(f"no backend is left that could take shards {', '.join(map(str, rest))}")
                break
            for number, member in chosen.items():
                tried.add(member.number)
                why = await self._store(member, pack.key(self.keys.fsid, number), values[number])
                if why is None:
                    placed[number] = member.number
                else:
                    reasons.append(why)
        return placed, reasons

    def _values(self, pack: StoredPack, body: bytes, numbers: Iterable[int]) -> dict[int, bytes]:
        size = pack.ref.shard_size
        view = memoryview(body)
        data = {i: view[i * size : (i + 1) * size] for i in range(pack.ref.k)}
        payloads: Mapping[int, bytes] = self.code.rebuild(data, numbers)
        return {
            number: encode_shard(pack.ref, number, payload, self.code, self.keys)
            for number, payload in payloads.items()
        }

    async def _store(self, member: Member, key: bytes, value: bytes) -> str | None:
        """Why it could not be stored, or None."""
        try:
            with trio.fail_after(CALL_SECONDS):
                await member.data.set(key, value)
                member.succeeded(stored=True)
                if await member.data.get(key) != value:
                    return f"backend {member.name}: gives back something else than was stored"
        except BackendError as error:
            member.failed(error)
            return str(error)
        except trio.TooSlowError:
            return f"backend {member.name}: no answer in {CALL_SECONDS:.0f} s"
        return None


def _subsets(numbers: list[int], k: int) -> Iterator[tuple[int, ...]]:
    """Some k of `numbers`: the first, then such as leave out each one, then each two of them."""
    seen = set()
    for count in range(3):
        for without in itertools.combinations(numbers, count):
            chosen = tuple([number for number in numbers if number not in without][:k])
            if len(chosen) == k and chosen not in seen:
                seen.add(chosen)
                yield chosen
