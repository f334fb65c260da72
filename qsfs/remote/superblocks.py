"""Finding the superblock on the configured backends: the first thing that a mount or restore reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from qsfs.errors import (
    BackendError,
    BackendUnavailable,
    Corrupt,
    FormatMismatch,
    KeyFileError,
    NotFound,
    QsfsBug,
    QsfsError,
    QuorumUnavailable,
)
from qsfs.format.keys import KeyRing
from qsfs.format.passphrase import Passphrase
from qsfs.format.slots import Secret, masters_of, name_of
from qsfs.format.superblock import (
    SUPERBLOCK_KEY,
    Superblock,
    is_whole,
    open_superblock,
    read_superblock,
    superblock_fsid,
)
from qsfs.remote.members import Candidate
from qsfs.remote.reasons import summary


@dataclass(frozen=True, slots=True)
class FoundSuperblock:
    """The superblock of the highest revision, its key ring, and what every other backend gave instead.

    `value` is the superblock as it lies on backends, `same` are all values that say just this, `copies`
    what each backend that answered holds, by name, and `closed` those of them that are whole and not to be
    read: under a newer master key, or of another change of the key slots.  `used` are the slots that the
    secret opens in it; none if only an older copy opens: the secret was removed since, and `removed` says so
    for people.  `newest_master` is the highest number of a master key in any copy that is ours, also of a
    change that did not hold.
    """

    superblock: Superblock
    keys: KeyRing
    problems: tuple[tuple[Candidate, QsfsError], ...]
    value: bytes
    same: frozenset[bytes]
    copies: dict[str, bytes]
    closed: dict[bytes, QsfsError]
    used: frozenset[int]
    newest_master: int
    removed: str = ""


async def find_superblock(
    candidates: Sequence[Candidate], secret: Secret, *, attempt_seconds: float = 10.0
) -> FoundSuperblock:
    """Asks all candidates at once and opens what they have with a secret.

    Raises `NotFound` (all answered, none has one), `QuorumUnavailable` (none found, and some did not
    answer), `KeyFileError` (found, and the key does not open it), `Corrupt` (all rotten), and
    `FormatMismatch` (a newer version, or backends of two file systems of one key).
    """
    held: list[tuple[Candidate, bytes]] = []
    problems: list[tuple[Candidate, QsfsError]] = []

    async def ask(candidate: Candidate) -> None:
        try:
            with trio.fail_after(attempt_seconds):
                value = await candidate.data.get(SUPERBLOCK_KEY)
            if value is None:
                raise NotFound(f"backend {candidate.name}: has no superblock")
            held.append((candidate, value))
        except trio.TooSlowError:
            late = BackendUnavailable(f"backend {candidate.name}: no answer in {attempt_seconds:g} s")
            problems.append((candidate, late))
        except QsfsError as error:
            problems.append((candidate, error))

    async with trio.open_nursery() as nursery:
        for candidate in candidates:
            nursery.start_soon(ask, candidate)
    held.sort(key=lambda copy: copy[0].name)
    work = _Opening(held, secret)
    if isinstance(secret, Passphrase):
        await trio.to_thread.run_sync(work.run)
    else:
        work.run()
    problems += [(candidate, work.errors[value]) for candidate, value in held if value in work.errors]
    if not work.opened:
        raise _why_none([error for _, error in problems])
    if len({superblock.fsid for superblock in work.opened.values()}) > 1:
        told = summary(
            f"backend {candidate.name}: {work.opened[value].fsid.hex()}"
            for candidate, value in held
            if value in work.opened
        )
        raise FormatMismatch(
            f"the configured backends belong to several file systems: {told}; configure those of one"
        )
    value = work.best()
    superblock = work.opened[value]
    problems += [
        (candidate, _outdated(candidate, work.opened[other], superblock))
        for candidate, other in held
        if other in work.opened and work.opened[other] != superblock
    ]
    keys, used, removed = work.ring_of(value)
    copies = {candidate.name: other for candidate, other in held}
    same = frozenset(other for other, opened in work.opened.items() if opened == superblock)
    closed = {other: error for other, error in work.errors.items() if is_whole(other, keys.fsid)}
    return FoundSuperblock(
        superblock, keys, tuple(problems), value, same, copies, closed, used, work.newest_master, removed
    )


def _outdated(candidate: Candidate, old: Superblock, right: Superblock) -> Corrupt:
    if old.revision < right.revision:
        what = f"its superblock has revision {old.revision}, an older one"
    else:
        what = f"its superblock of revision {old.revision} is another one: two key commands ran at once"
    return Corrupt(f"backend {candidate.name}: {what}")


class _Opening:
    """Opens each different value once, those that most backends hold first.

    A secret that opens one of them gives master keys, which authenticate the others without it: so
    what a hostile backend writes into slots is rarely tried, and a superblock is also read where a
    later revision has removed the secret.
    """

    def __init__(self, held: Sequence[tuple[Candidate, bytes]], secret: Secret) -> None:
        self.opened: dict[bytes, Superblock] = {}
        self.errors: dict[bytes, QsfsError] = {}
        self.newest_master = 0
        self._names: dict[bytes, str] = {}
        for candidate, value in held:
            self._names.setdefault(value, candidate.name)
        self._counts = Counter(value for _, value in held)
        self._secret = secret
        self._rings: dict[bytes, KeyRing] = {}

    def run(self) -> None:
        """Fills `opened` and `errors`."""
        values = sorted(self._counts, key=lambda value: (-self._counts[value], value))
        for value in values:
            self._try(value)
        # What the secret does not open may still be ours, under keys that it gave since.
        for value in values:
            if isinstance(self.errors.get(value), KeyFileError):
                self._try(value)

    def best(self) -> bytes:
        """The highest revision; of two that were made at once the one that more backends hold."""
        return max(
            self.opened, key=lambda value: (self.opened[value].revision, self._counts[value], value)
        )

    def ring_of(self, value: bytes) -> tuple[KeyRing, frozenset[int], str]:
        """The master keys for a superblock, the slots that gave them, and what to say where none did."""
        superblock, fsid = self.opened[value], self.opened[value].fsid
        slots, _ = masters_of(superblock.slots, self._secret, fsid)
        newest = max((slot.master_key_number for slot in superblock.slots), default=0)
        masters = {number: key for slot in slots.values() for number, key in slot.items()}
        if newest in masters:
            used = frozenset(number for number, keys in slots.items() if newest in keys)
            return KeyRing(fsid, list(masters.values())), used, ""
        held = self._rings[fsid]
        return (
            held,
            frozenset(),
            f"The {name_of(self._secret)} was removed in revision {superblock.revision} of the key slots, or before; "
            "an older copy of the superblock still opens with it",
        )

    def _try(self, value: bytes) -> None:
        self.errors.pop(value, None)
        try:
            opened = self.opened[value] = self._open(value)
            self._note(opened)
        except QsfsError as error:
            self.errors[value] = error

    def _note(self, superblock: Superblock) -> None:
        numbers = (slot.master_key_number for slot in superblock.slots)
        self.newest_master = max(self.newest_master, *numbers)

    def _open(self, value: bytes) -> Superblock:
        fsid = superblock_fsid(value)
        ring = self._rings.get(fsid)
        if ring is not None:
            try:
                return read_superblock(value, ring)
            except KeyFileError:
                pass
        superblock, keys = open_superblock(value, self._secret)
        self._note(superblock)
        try:
            self._rings.setdefault(fsid, keys).learn(keys.get(number) for number in keys.numbers)
        except QsfsBug:
            raise Corrupt(
                f"backend {self._names[value]}: its superblock has another master key {keys.current.number} than "
                "others: two rotations ran at once"
            ) from None
        return superblock


def _why_none(errors: Sequence[QsfsError]) -> QsfsError:
    """One error for all: what was found weighs more than what was not, and unknown more than absent."""
    for kind in (FormatMismatch, KeyFileError, Corrupt):
        found = [error for error in errors if isinstance(error, kind)]
        if found:
            return found[0]
    reasons = summary(errors) or "no backend is configured"
    if not errors or any(isinstance(error, BackendError) for error in errors):
        return QuorumUnavailable(f"no superblock found, and not every backend could be read: {reasons}")
    return NotFound(f"there is no file system on these backends: {reasons}; `qsfs format` makes one")
