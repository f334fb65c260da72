"""Drill: a proof of recovery.  Backends and key alone, a scratch directory, and what comes back.

The generation is restored exactly as after the loss of the machine, by the same code; then its
contents are read, a sample or all, each byte verified.  Nothing is written to backends: what they
are given to a drill refuses it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from qsfs.clock import Clock
from qsfs.format.erasure import Code
from qsfs.format.head import Head, HeadRef
from qsfs.format.slots import Secret
from qsfs.health.drill_plan import ComparedRows, Plan, Tally, Verdict
from qsfs.health.drill_read import Compare, ContentsReader
from qsfs.health.drill_rows import CompareRows, compare_rows
from qsfs.health.packs import PackDoctor
from qsfs.remote.members import Candidate, Members, State
from qsfs.remote.placement import FreeSpace
from qsfs.remote.plain import plain_errors
from qsfs.remote.readable import Wanted, source_of
from qsfs.remote.reader import WORTH_A_THREAD, PackReader
from qsfs.remote.rebuild import Tally as Restored
from qsfs.remote.restore import Progress, Say, restore_into
from qsfs.remote.source import Source, find_source
from qsfs.remote.stored import StoredPack
from qsfs.remote.survey import Timing
from qsfs.store.environment import Environment
from qsfs.store.limits import Limits
from qsfs.store.schema import ROOT_INODE, Entry, Inode, PackRow, Table, split_u64, u64

_STEP_ROWS = 2_000
_MOST_ENTRIES = 200_000


@dataclass(slots=True)
class DrillResult:
    """What a drill found.  Times are seconds; `started_ns` is wall time.

    `withstands`: how many of the backends that answered may be stale before a newer generation than
    `newest` could have been missed (below 0: it can have been); `recorded` counts all packs by how many
    more shards of them may be lost by the records of where they were stored and of who answers.
    """

    file_system: str
    label: str
    started_ns: int
    plan: Plan
    down: tuple[str, ...]
    ref: HeadRef
    head: Head
    newest: HeadRef
    withstands: int
    answered: tuple[str, ...]
    silent: tuple[str, ...]
    sentences: tuple[str, ...]
    metadata_packs: int
    restored: Restored
    find_seconds: float
    restore_seconds: float
    contents: Tally
    recorded: Counter[int] = field(default_factory=Counter)
    metadata_spares: Counter[int] = field(default_factory=Counter)

    @property
    def verdict(self) -> Verdict:
        """What was shown of what was to be read: the metadata came back whole, or there is no result."""
        return self.contents.verdict

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.find_seconds + self.restore_seconds + self.contents.seconds


async def drill(
    candidates: Sequence[Candidate],
    *,
    secret: Secret,
    directory: Path,
    limits: Limits,
    clock: Clock,
    plan: Plan,
    wanted: Wanted | None = None,
    timing: Timing | None = None,
    down: Collection[str] = (),
    compare: Compare | None = None,
    compare_names: CompareRows | None = None,
    say: Say = lambda progress: None,
    deadline_seconds: float = 30.0,
    worth_a_thread: int = WORTH_A_THREAD,
) -> DrillResult:
    """Restores the newest generation (or what is `wanted`) into `directory`, empty and the drill's own.

    `candidates` are what the caller made of the configuration, those that shall count as down included
    (`down` names them for the report); `compare` and `compare_names` ask a running mount.  Too few answers to
    rule out a newer generation do not end a drill: the result says it.  Raises what a restore raises where it
    does not come as far as to have a file system, `NotFound` for a generation that is not kept.
    """
    started_ns, began = clock.time_ns(), clock.monotonic()
    say(Progress("looking for the generation", 0, len(candidates)))
    wanted = wanted or Wanted()
    newest = await find_source(
        candidates,
        secret=secret,
        clock=clock,
        timing=timing,
        chosen=wanted.head,
        deadline_seconds=deadline_seconds,
    )
    source = await source_of(newest, wanted, timing)
    found_at = clock.monotonic()
    packs, restored = await restore_into(
        directory, source, limits, clock, say=say, deadline_seconds=deadline_seconds
    )
    restored_at = clock.monotonic()
    environment = Environment(directory, limits.map_bytes)
    try:
        code = Code(source.superblock.code)
        reader = PackReader(source.members, source.keys, code, worth_a_thread=worth_a_thread)
        doctor = PackDoctor(source.members, source.keys, code, FreeSpace(source.members, clock))
        contents = ContentsReader(
            environment,
            reader,
            doctor,
            clock,
            deadline_seconds=deadline_seconds,
            name=lambda inode: _name(environment, inode),
            compare=compare,
            say=lambda done, total: say(Progress("reading extents", done, total)),
        )
        with plain_errors():
            async with reader.running():
                await contents.read(plan)
                spares = await _metadata_spares(source, doctor, code)
        if compare_names is not None:
            contents.tally.rows = ComparedRows()
            await compare_rows(environment, source.sealed.ref, plan, compare_names, contents.tally.rows)
        answering = _answering(source.members)
        recorded = _recorded(environment, source.superblock.code.k, {member for member, _ in answering})
    finally:
        environment.close()
    names = {name for _, name in answering}
    return DrillResult(
        file_system=source.keys.fsid.hex(),
        label=source.superblock.label,
        started_ns=started_ns,
        plan=plan,
        down=tuple(sorted(down)),
        ref=source.sealed.ref,
        head=source.found.head,
        newest=newest.found.ref,
        withstands=newest.found.judgement.withstands,
        answered=tuple(sorted(names)),
        silent=tuple(sorted(_fleet_names(source) - names)),
        # Of those that count as down it is said once, and why.
        sentences=tuple(s for s in newest.sentences() if not any(name in s for name in down)),
        metadata_packs=packs,
        restored=restored,
        find_seconds=found_at - began,
        restore_seconds=restored_at - found_at,
        contents=contents.tally,
        recorded=recorded,
        metadata_spares=spares,
    )


async def _metadata_spares(source: Source, doctor: PackDoctor, code: Code) -> Counter[int]:
    """The metadata packs by how many more of their shards may be lost, as backends list them."""
    spares: Counter[int] = Counter()
    head = source.found.head
    for listed in (*head.snapshot, *(pack for delta in head.deltas for pack in delta)):
        pack = StoredPack.of_metadata(listed, code.params)
        look = await doctor.look(pack, deep=False)
        spares[look.had - pack.ref.k] += 1
    return spares


def _answering(members: Members) -> set[tuple[int, str]]:
    """Number and name of the backends that said who they are and still answer."""
    return {(member.number, member.name) for member in members if member.identified and member.state is State.UP}


def _fleet_names(source: Source) -> set[str]:
    entries = (entry for fleet in source.found.head.fleets for entry in fleet.entries)
    return {f"{entry.address}/{entry.namespace}" for entry in entries}


def _recorded(environment: Environment, k: int, answering: Collection[int]) -> Counter[int]:
    """All packs by how many of the shards that their rows place on `answering` backends may be lost."""
    spares: Counter[int] = Counter()
    for rows in _steps(environment, Table.PACKS):
        for _, value in rows:
            placed = sum(member in answering for member in PackRow.decode(value).placement)
            spares[placed - k] += 1
    return spares


def _name(environment: Environment, inode: int) -> str:
    """A path of a file for a message, or its number where none is found within a bounded search."""
    looked_at = 0
    for rows in _steps(environment, Table.ENTRIES):
        for key, value in rows:
            if Entry.decode(value).inode == inode:
                return f"{_path(environment, split_u64(key), key[8:])} (inode {inode})"
        looked_at += len(rows)
        if looked_at > _MOST_ENTRIES:
            break
    return f"inode {inode}"


def _path(environment: Environment, parent: int, name: bytes) -> str:
    """The path of an entry, as much of it as is found within a bounded search."""
    parts = [name]
    view = environment.read()
    try:
        looked_at = 0
        while parent != ROOT_INODE:
            row = view.get(Table.INODES, u64(parent))
            if row is None:
                break
            above = Inode.decode(parent, bytes(row)).parent
            for key, value in view.scan(Table.ENTRIES, u64(above), u64(above + 1)):
                looked_at += 1
                if Entry.decode(bytes(value)).inode == parent:
                    parts.append(bytes(key[8:]))
                    break
                if looked_at > _MOST_ENTRIES:
                    return "?/" + b"/".join(reversed(parts)).decode("utf-8", "backslashreplace")
            parent = above
    finally:
        view.close()
    return "/" + b"/".join(reversed(parts)).decode("utf-8", "backslashreplace")


def _steps(environment: Environment, table: Table) -> Iterator[list[tuple[bytes, bytes]]]:
    """All rows of a table, some at a time."""
    start = b""
    while True:
        view = environment.read()
        try:
            rows = [(bytes(k), bytes(v)) for k, v in islice(view.scan(table, start, None), _STEP_ROWS)]
        finally:
            view.close()
        if not rows:
            return
        yield rows
        start = rows[-1][0] + b"\0"
