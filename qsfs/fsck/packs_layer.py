"""Layer 4: packs against shards, and what every backend carries.

Each finding names backend, pack and shard.  A backend that does not answer proves nothing: what it
holds was not checked, and that is said.  Mended are shards that are positively missing or wrong
(rebuilt from any k), stale placements, and copies of superblock, identity, owner record and heads.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import trio

from qsfs.errors import Corrupt, DataLost, QsfsError
from qsfs.format.pack import PackKind, open_index
from qsfs.fsck.mends import Mends
from qsfs.fsck.report import Finding, Layer, Report, Severity
from qsfs.health.packs import PackDoctor, PackLook
from qsfs.remote.ask import Finding as Answered
from qsfs.remote.stored import StoredPack, entry_of
from qsfs.store.schema import ExtentRow, PackRow, PackState, Table, u64

PACKS_AT_ONCE = 4

Rows = tuple[tuple[int, ExtentRow], ...]


@dataclass(frozen=True, slots=True)
class PackToCheck:
    """A pack, its row in the local store (None: only heads name it), and the extents that lie in it."""

    pack: StoredPack
    number: int = 0
    row: PackRow | None = None
    extents: Rows = ()


class PacksCheck:
    """Checks packs; with `mends`, also rebuilds what is missing or wrong."""

    def __init__(
        self,
        doctor: PackDoctor,
        report: Report,
        mends: Mends | None,
        *,
        deep: bool,
        now_ns: int,
        say: Callable[[int], None] = lambda done: None,
    ) -> None:
        self._doctor = doctor
        self._report = report
        self._mends = mends
        self._deep = deep
        self._now_ns = now_ns
        self._say = say
        self._done = 0
        self._unchecked: Counter[str] = Counter()
        self._waiting: list[tuple[int, PackToCheck, PackLook, list[Finding]]] = []

    async def run(self, packs: Iterator[PackToCheck]) -> None:
        """Looks at all packs, a few at a time; then mends, the pack with the fewest spare shards first."""
        slots = trio.Semaphore(PACKS_AT_ONCE)

        async def one(item: PackToCheck) -> None:
            try:
                await self._check(item)
            finally:
                slots.release()
                self._done += 1
                self._say(self._done)

        async with trio.open_nursery() as nursery:
            for item in packs:
                await slots.acquire()
                nursery.start_soon(one, item)
        for name, count in sorted(self._unchecked.items()):
            self._report.fail(f"{count} shards on {name}")
        for _, item, look, findings in sorted(self._waiting, key=lambda waiting: waiting[0]):
            await self._mend(item, look, findings)

    # checking

    async def _check(self, item: PackToCheck) -> None:
        pack = item.pack
        look = await self._doctor.look(pack, deep=self._deep)
        self._report.checked["packs"] += 1
        self._report.checked["shards"] += len(look.answers)
        findings = self._describe(item, look)
        if self._deep:
            findings += await self._verify(item, look)
        look.payloads.clear()
        if findings and self._mends is not None:
            spare = look.had - pack.ref.k
            self._waiting.append((spare, item, look, findings))

    def _describe(self, item: PackToCheck, look: PackLook) -> list[Finding]:
        pack = item.pack
        findings = []
        for number, answer in sorted(look.answers.items()):
            subject = self._subject(item, number, answer.member)
            if answer.finding is Answered.UNKNOWN:
                self._unchecked[self._backend(answer.member)] += 1
                continue
            if answer.finding is Answered.GOOD:
                continue
            if number in look.elsewhere:
                where = self._backend(look.elsewhere[number])
                findings.append(
                    self._add(
                        "shard-elsewhere",
                        f"pack {pack.name}, shard {number}: lies on {where}, not on "
                        f"{self._backend(answer.member)} as recorded",
                        subject,
                        Severity.WARNING,
                    )
                )
            elif answer.member < 0:
                findings.append(
                    self._add(
                        "shard-unstored",
                        f"pack {pack.name}, shard {number}: was never stored; the pack is written, not full",
                        subject,
                        Severity.WARNING,
                    )
                )
            elif answer.finding is Answered.ABSENT:
                message = f"pack {pack.name}, shard {number}: is missing on {self._backend(answer.member)}"
                findings.append(self._add("shard-missing", message, subject))
            else:
                message = f"pack {pack.name}, shard {number}: {answer.why}"
                findings.append(self._add("shard-wrong", message, subject))
        self._describe_loss(item, look)
        return findings

    def _describe_loss(self, item: PackToCheck, look: PackLook) -> None:
        pack, missing = item.pack, len(look.missing)
        n, k = len(look.answers), pack.ref.k
        if not look.lost:
            if look.had < k:
                self._report.fail(
                    f"pack {pack.name}: only {look.had} of its shards were found, {k} are needed"
                )
            return
        what = ", ".join(
            f"inode {inode} pages {row.first} to {row.first + row.pages - 1}"
            for inode, row in item.extents[:8]
        )
        more = f" and {len(item.extents) - 8} more" if len(item.extents) > 8 else ""
        holds = f"; it holds {what}{more}" if what else ""
        if item.pack.ref.kind is PackKind.METADATA:
            holds = "; it holds metadata of a generation"
        self._add(
            "pack-lost",
            f"pack {pack.name}: {missing} of its {n} shards are gone or wrong, {n - k} may be{holds}; "
            "keep what is local and bring back older copies of backends",
            {"pack": pack.name, "number": item.number},
        )

    async def _verify(self, item: PackToCheck, look: PackLook) -> list[Finding]:
        """Decodes the pack from what was read, and compares with its index, its rows and every shard."""
        pack = item.pack
        try:
            body, strange = await trio.to_thread.run_sync(self._doctor.verify, look)
        except DataLost as error:
            if not look.lost:
                self._report.fail(f"pack {pack.name} was not read whole: {error}")
            return []
        except Corrupt as error:
            subject: dict[str, object] = {"pack": pack.name, "number": item.number}
            self._add("pack-wrong", f"pack {pack.name}: its shards authenticate, but {error}", subject)
            return []
        self._compare_rows(item, body)
        findings = []
        for number in strange:
            answer = look.answers[number]
            look.answers[number] = replace(answer, finding=Answered.CORRUPT, payload=None)
            look.elsewhere.pop(number, None)
            findings.append(
                self._add(
                    "shard-wrong",
                    f"pack {pack.name}, shard {number}: {self._backend(answer.member)} holds an authentic "
                    "shard that does not belong to the others",
                    self._subject(item, number, answer.member),
                )
            )
        return findings

    def _compare_rows(self, item: PackToCheck, body: bytes) -> None:
        index = {entry.ordinal: entry for entry in open_index(self._doctor.keys, item.pack.ref, body)}
        for inode, row in item.extents:
            if entry_of(inode, row) != index.get(row.ordinal):
                self._add(
                    "extent-index",
                    f"inode {inode}, extent at page {row.first}: pack {item.pack.name} holds another there",
                    {"inode": inode, "page": row.first, "pack": item.pack.name},
                )

    # mending

    async def _mend(self, item: PackToCheck, look: PackLook, findings: list[Finding]) -> None:
        pack = item.pack
        placed = dict(look.elsewhere)
        if look.missing:
            whole = await self._doctor.look(pack, deep=True)
            try:
                body, strange = await trio.to_thread.run_sync(self._doctor.verify, whole)
            except QsfsError as error:
                if not look.lost:
                    self._report.fail(f"pack {pack.name} could not be mended: {error}")
                return
            wanted = sorted({*whole.missing, *strange})
            stored, reasons = await self._doctor.rebuild(whole, body, wanted)
            placed = whole.elsewhere | stored
            if reasons and set(wanted) - stored.keys():
                self._report.fail(f"pack {pack.name} could not be mended wholly: {'; '.join(reasons)}")
        settled = tuple(finding for finding in findings if finding.subject.get("shard") in placed)
        placement = tuple(placed.get(number, place) for number, place in enumerate(pack.placement))
        if item.row is None or placement == pack.placement or self._mends is None:
            for finding in settled:
                self._report.settle(finding)
            return
        state = item.row.state & ~(PackState.FULL | PackState.LOOKED)
        if -1 not in placement:
            state |= PackState.FULL
        row = replace(
            item.row, placement=placement, state=int(state), written_at_ns=self._now_ns, verified_at_ns=0
        )
        self._mends.add(settled, (Table.PACKS, u64(item.number), row.encode()))

    # naming

    def _add(
        self,
        kind: str,
        message: str,
        subject: Mapping[str, object],
        severity: Severity = Severity.ERROR,
    ) -> Finding:
        return self._report.add(Layer.PACKS, kind, message, subject, severity)

    def _subject(self, item: PackToCheck, shard: int, member: int) -> dict[str, object]:
        subject: dict[str, object] = {"pack": item.pack.name, "shard": shard}
        if item.number:
            subject["number"] = item.number
        if member >= 0:
            subject["backend"] = self._backend(member)
        return subject

    def _backend(self, number: int) -> str:
        member = self._doctor.members.by_number(number)
        return f"backend {member.name}" if member is not None else f"entry {number} of the fleet"


def by_pack(rows: Iterator[tuple[int, ExtentRow]], numbers: range) -> dict[int, Rows]:
    """The extents of the packs with these numbers."""
    found: defaultdict[int, list[tuple[int, ExtentRow]]] = defaultdict(list)
    for inode, row in rows:
        if row.pack in numbers:
            found[row.pack].append((inode, row))
    return {number: tuple(extents) for number, extents in found.items()}
