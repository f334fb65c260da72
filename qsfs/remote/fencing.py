"""When a mount must stop: what it reads next to its own records, judged without I/O."""

from __future__ import annotations

from collections.abc import Container

from qsfs.errors import Fenced
from qsfs.format.head import HeadRef, Owner
from qsfs.remote.control import Reading, Records
from qsfs.remote.newest import describe_head


def fenced(
    reading: Reading,
    *,
    owner: Owner,
    written: Container[HeadRef],
    published: HeadRef | None,
    records: Records | None,
) -> Fenced | None:
    """Why the mount `owner`, which wrote the heads `written`, must stop after this reading. Or None.

    A larger owner, in a record or a head: another mount took over.  A head of our own owner that we
    did not write, newer than our last `published` one: a copy of this machine is running.
    `records` only help to name the other machine.
    """
    above = [other for other in reading.owners if other > owner]
    above += [ref.owner for ref in reading.heads if ref.owner > owner]
    if above:
        return Fenced(_taken_over(owner, max(above), records))
    for ref in sorted(reading.heads, reverse=True):
        if _is_twin(ref, owner, written, published):
            return Fenced(
                f"{describe_head(ref)} was sent as this mount's own, and not by this mount: a copy of this "
                "machine is "
                "running. Stop one of the two; this one publishes nothing more"
            )
    return None


def unclear(
    reading: Reading, *, owner: Owner, written: Container[HeadRef], published: HeadRef | None
) -> str | None:
    """Why this reading does not count: it lists what would fence the mount, but does not authenticate."""
    for claim, reason in reading.unproven:
        if isinstance(claim, Owner):
            relevant = claim > owner
        else:
            relevant = claim.owner > owner or _is_twin(claim, owner, written, published)
        if relevant:
            return reason
    return None


def _is_twin(ref: HeadRef, owner: Owner, written: Container[HeadRef], published: HeadRef | None) -> bool:
    newer = published is None or ref.generation > published.generation
    return ref.owner == owner and ref not in written and newer


def _taken_over(owner: Owner, other: Owner, records: Records | None) -> str:
    record = records.record(other) if records is not None else None
    where = f" on '{record.host}'" if record is not None else ""
    return (
        f"another mount{where} has taken over: it owns the file system in epoch {other.epoch}, this one "
        "did in epoch "
        f"{owner.epoch}. This mount publishes nothing more; unmount it, and stop its application"
    )
