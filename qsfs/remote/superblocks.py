"""Finding the superblock on the configured backends: the first thing that a mount or restore reads."""

from __future__ import annotations

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
    QsfsError,
    QuorumUnavailable,
)
from qsfs.format.keys import KeyRing
from qsfs.format.superblock import SUPERBLOCK_KEY, Superblock, open_superblock
from qsfs.remote.members import Candidate
from qsfs.remote.reasons import summary


@dataclass(frozen=True, slots=True)
class FoundSuperblock:
    """The superblock of the highest revision, its key ring, and what every other backend gave instead."""

    superblock: Superblock
    keys: KeyRing
    problems: tuple[tuple[Candidate, QsfsError], ...]


async def find_superblock(
    candidates: Sequence[Candidate], secret: bytes, *, attempt_seconds: float = 10.0
) -> FoundSuperblock:
    """Asks all candidates at once and opens what they have with a key file's `secret`.

    Raises `NotFound` (all answered, none has one), `QuorumUnavailable` (none found, and some did not
    answer), `KeyFileError` (found, and the key does not open it), `Corrupt` (all rotten), and
    `FormatMismatch` (a newer version, or backends of two file systems of one key).
    """
    opened: list[tuple[Candidate, Superblock, KeyRing]] = []
    problems: list[tuple[Candidate, QsfsError]] = []

    async def ask(candidate: Candidate) -> None:
        try:
            with trio.fail_after(attempt_seconds):
                value = await candidate.data.get(SUPERBLOCK_KEY)
            if value is None:
                raise NotFound(f"backend {candidate.name}: has no superblock")
            opened.append((candidate, *open_superblock(value, secret)))
        except trio.TooSlowError:
            late = BackendUnavailable(f"backend {candidate.name}: no answer in {attempt_seconds:g} s")
            problems.append((candidate, late))
        except QsfsError as error:
            problems.append((candidate, error))

    async with trio.open_nursery() as nursery:
        for candidate in candidates:
            nursery.start_soon(ask, candidate)
    if not opened:
        raise _why_none([error for _, error in problems])
    systems = {superblock.fsid for _, superblock, _ in opened}
    if len(systems) > 1:
        told = summary(f"backend {candidate.name}: {found.fsid.hex()}" for candidate, found, _ in opened)
        raise FormatMismatch(
            f"the configured backends belong to several file systems: {told}; configure those of one"
        )
    _, superblock, keys = max(opened, key=lambda found: found[1].revision)
    problems += [
        (
            candidate,
            Corrupt(f"backend {candidate.name}: its superblock has revision {old.revision}, an older one"),
        )
        for candidate, old, _ in opened
        if old.revision < superblock.revision
    ]
    return FoundSuperblock(superblock, keys, tuple(problems))


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
