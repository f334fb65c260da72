"""Asking one backend for one shard: four findings, kept apart."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum

from qsfs.errors import BackendError, Corrupt, FormatMismatch
from qsfs.format.erasure import CodeParams
from qsfs.format.keys import KeyRing
from qsfs.format.shard import open_shard
from qsfs.remote.members import Member
from qsfs.remote.stored import StoredPack

log = logging.getLogger(__name__)


class Finding(Enum):
    """What a backend said of a shard."""

    GOOD = "good"
    ABSENT = "absent"
    CORRUPT = "corrupt"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Answer:
    """One backend's answer for one shard; `payload` is set if it is good, `why` if it is not."""

    number: int
    member: int
    finding: Finding
    payload: memoryview | None = None
    why: str = ""

    @property
    def negative(self) -> bool:
        """Whether the backend positively does not have the shard as it was written."""
        return self.finding in (Finding.ABSENT, Finding.CORRUPT)


async def ask_shard(member: Member, pack: StoredPack, number: int, code: CodeParams, keys: KeyRing) -> Answer:
    """Reads shard `number` of `pack` from `member` and authenticates it; tells the member how it went.

    A backend that has not shown its identity is not believed when it says that it has nothing.
    Raises nothing of a backend's.
    """
    key = pack.key(keys.fsid, number)
    try:
        value = await member.data.get(key)
    except BackendError as error:
        member.failed(error)
        return Answer(number, member.number, Finding.UNKNOWN, why=str(error))
    member.succeeded()
    if value is None:
        if not member.identified:
            why = f"backend {member.name}: has not shown yet that it is entry {member.number} of the fleet"
            return Answer(number, member.number, Finding.UNKNOWN, why=why)
        return Answer(number, member.number, Finding.ABSENT, why=f"backend {member.name}: absent")
    try:
        shard = open_shard(value, keys, key=key)
        if (shard.k, shard.n, shard.codec) != (code.k, code.n, code.codec):
            raise Corrupt(
                f"an authentic shard of a {shard.k}+{shard.n - shard.k} code by {shard.codec}; this file system has "
                f"{code.k}+{code.m} by {code.codec}"
            )
        if shard.ref != pack.ref:
            raise Corrupt("an authentic shard of another pack that has the same id")
    except (Corrupt, FormatMismatch) as error:
        why = f"backend {member.name}: shard {number} of pack {pack.name} is not what was written ({error})"
        return Answer(number, member.number, Finding.CORRUPT, why=why)
    return Answer(number, member.number, Finding.GOOD, shard.payload)
