"""Layer 4, what every backend carries: superblock, identity, owner record, heads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from qsfs.clock import Clock
from qsfs.errors import BackendError, Corrupt, FormatMismatch, NotFound
from qsfs.format.head import Head, HeadRef, open_head
from qsfs.format.keys import KeyRing
from qsfs.fsck.report import Finding, Layer, Report, Severity
from qsfs.health.copies import (
    Copy,
    CopySet,
    head_copies,
    identity_copies,
    owner_copies,
    refill,
    superblock_copies,
)
from qsfs.remote.ask import Finding as Answered
from qsfs.remote.identity import Stranger, read_identity, write_identity
from qsfs.remote.members import Member, Members
from qsfs.remote.quorum import FleetQuorum

_MINDED = ("superblock", "identity")


class CopiesCheck:
    """Checks the copies; `repair` refills what is missing or wrong."""

    def __init__(
        self,
        members: Members,
        keys: KeyRing,
        quorums: Collection[FleetQuorum],
        report: Report,
        *,
        repair: bool,
    ) -> None:
        self._members = members
        self._keys = keys
        self._quorums = quorums
        self._report = report
        self._repair = repair

    async def refill_emptied(self, strangers: Sequence[Stranger], head: Head, clock: Clock) -> None:
        """Backends of the fleet that lost everything: with `repair` they become members again.

        Only one that stands under the address and namespace of an entry, and positively has no
        identity, is taken for it; one with a wrong identity is left alone and named.
        """
        for stranger in strangers:
            candidate = stranger.candidate
            entry = next(
                (
                    entry
                    for fleet in head.fleets
                    for entry in fleet.entries
                    if (entry.address, entry.namespace) == (candidate.address, candidate.namespace)
                    and self._members.by_number(entry.number) is None
                ),
                None,
            )
            if entry is None:
                self._report.fail(f"backend {candidate.name}: {stranger.error}")
                continue
            try:
                await read_identity(candidate.data, self._keys)
            except NotFound:
                pass
            except (BackendError, Corrupt, FormatMismatch) as error:
                self._report.fail(f"backend {candidate.name}: {error}")
                continue
            finding = self._add(
                "backend-emptied",
                f"backend {candidate.name}: has lost its identity (entry {entry.number} of the fleet): it "
                "was re-created or emptied",
                {"backend": f"backend {candidate.name}", "entry": entry.number},
            )
            if not self._repair:
                continue
            control = candidate.control(entry.control_namespace)
            try:
                await write_identity(entry, candidate.data, control, self._keys, clock)
            except BackendError as error:
                self._report.fail(f"backend {candidate.name} could not be made a member again: {error}")
                continue
            self._members.add(Member(entry, candidate.data, control, clock, identified=True))
            self._report.settle(finding)

    async def run(self, newest: HeadRef, head: Head, owner_heads: Collection[HeadRef]) -> list[Head]:
        """Checks all copies; returns the heads that could be read, the newest first."""
        await self._check(await superblock_copies(self._members, self._keys))
        for copies in await identity_copies(self._members, self._keys):
            await self._check(copies)
        await self._check(await owner_copies(self._members, self._keys, newest.owner))
        heads = [head]
        wanted = dict.fromkeys([newest, *sorted(owner_heads, reverse=True)])
        for ref in wanted:
            copies = await head_copies(self._members, self._keys, ref)
            await self._check(copies)
            if ref != newest and copies.right is not None:
                heads.append(open_head(copies.copies[0].key, copies.right, self._keys))
        return heads

    async def _check(self, copies: CopySet) -> None:
        self._report.checked["copies"] += len(copies.copies)
        for copy in copies.copies:
            if copy.finding is Answered.UNKNOWN:
                self._report.fail(f"the {copies.what} on backend {copy.backend.name}: {copy.why}")
        if copies.right is None:
            if copies.copies and not any(copy.finding is Answered.UNKNOWN for copy in copies.copies):
                self._add("copy-lost", f"{copies.what}: no backend has it as it was written", {})
            return
        good = {copy.member.number for copy in copies.copies if copy.finding is Answered.GOOD}
        enough = not any(quorum.short(good) for quorum in self._quorums)
        for copy in copies.wrong:
            await self._check_copy(copies, copy, enough=enough)

    async def _check_copy(self, copies: CopySet, copy: Copy, *, enough: bool) -> None:
        absent = copy.finding is Answered.ABSENT
        light = absent and enough and copy.what not in _MINDED
        finding = self._add(
            "copy-missing" if absent else "copy-wrong",
            f"{copies.what}: {copy.why}",
            {"backend": f"backend {copy.backend.name}", "what": copies.what},
            Severity.WARNING if light else Severity.ERROR,
        )
        if not self._repair or copies.right is None:
            return
        reason = await refill(copy, copies.right)
        if reason is None:
            self._report.settle(finding)
        else:
            self._report.fail(f"{copies.what} on backend {copy.backend.name} could not be mended: {reason}")

    def _add(
        self, kind: str, message: str, subject: dict[str, object], severity: Severity = Severity.ERROR
    ) -> Finding:
        return self._report.add(Layer.PACKS, kind, message, subject, severity)


def kept_heads(head: Head) -> Iterator[HeadRef]:
    """The heads that must stay readable beside the newest: those that it keeps."""
    return (kept.head for kept in head.kept)
