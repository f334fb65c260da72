"""What losses the recorded placement survives: asked for by `placement check`, and looked at now and then by a mount.

The pack rows are read in short steps on a worker thread, so that no transaction stays open and no request waits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import trio

from qsfs.clock import Clock
from qsfs.config import Config
from qsfs.daemon.connect import SUPERBLOCK_ROW, Opened, read_secret
from qsfs.daemon.formatting import local_store_exists
from qsfs.daemon.lock import CacheLock
from qsfs.daemon.promises import promises_of
from qsfs.errors import CacheError
from qsfs.format.erasure import CodeParams
from qsfs.format.fleet import Fleet, FleetEntry
from qsfs.format.head import MetadataPack
from qsfs.format.keys import KeyRing
from qsfs.format.slots import Secret
from qsfs.format.superblock import Superblock, open_superblock
from qsfs.remote.base import NEWEST_KEYS, decode_local_head
from qsfs.remote.losses import Loss, LossTable, loss_of, single_losses
from qsfs.remote.members import ACTIVE, Members, State
from qsfs.remote.promises import Place, Promises
from qsfs.remote.quorum import FleetAssessment, assess
from qsfs.store.environment import Environment
from qsfs.store.limits import Limits
from qsfs.store.schema import PackRow, Table
from qsfs.store.snapshot import CommittedState

_log = logging.getLogger(__name__)

_STEP_SECONDS = 0.02
_LOOK_SECONDS = 600.0
_FLEET_SECONDS = 5.0
_DOWN_NOW = "all that do not answer now"


def entries_of(fleets: Sequence[Fleet]) -> list[FleetEntry]:
    """The backends of all fleets that are in use, by number; of two entries the newer fleet's."""
    found = {entry.number: entry for fleet in fleets for entry in fleet.entries}
    return [found[number] for number in sorted(found)]


def broken_by_fleet(fleets: Sequence[Fleet], code: CodeParams, promises: Promises) -> list[str]:
    """Which promises the newest fleet cannot keep for what it stores from now on."""
    if not fleets:
        return []
    places = [Place(entry.group, entry.node) for entry in fleets[-1].entries if entry.state == ACTIVE]
    return promises.broken(places, code)


@dataclass(frozen=True, slots=True)
class Known:
    """What the newest head known here says: its fleets, and the metadata packs that it lists, by id."""

    fleets: tuple[Fleet, ...] = ()
    packs: Mapping[bytes, MetadataPack] = field(default_factory=dict)


def read_known(environment: Environment, keys: KeyRing) -> Known:
    """The newest head in the local store, as of the last commit; nothing where there is none."""
    view = environment.read()
    try:
        for name in NEWEST_KEYS:
            row = view.get(Table.LOCAL, name)
            if row is not None:
                head = decode_local_head(bytes(row), keys).head
                packs = (pack for part in (head.snapshot, *head.deltas) for pack in part)
                return Known(head.fleets, {pack.ref.pack_id: pack for pack in packs})
        return Known()
    finally:
        view.close()


def read_step(
    environment: Environment, clock: Clock, table: LossTable, start: bytes, pending: dict[bytes, MetadataPack]
) -> bytes | None:
    """Adds pack rows from `start` on to `table` for a moment; where to go on, None at the end.  For a worker thread.

    Packs that have a row leave `pending`: a row knows where shards went later.
    """
    until = clock.monotonic() + _STEP_SECONDS
    with CommittedState(environment, clock) as state:
        for key, value in state.view.scan(Table.PACKS, start, None):
            row = PackRow.decode(bytes(value))
            if not row.unnamed_since_ns:
                pending.pop(row.pack_id, None)
                table.add(row.pack_id, row.body_length, row.placement)
            if clock.monotonic() >= until:
                return key + b"\0"
    return None


async def read_table(
    environment: Environment, clock: Clock, known: Known, code: CodeParams, losses: Sequence[Loss]
) -> LossTable:
    """A table of all packs that something names; those of the newest generation's metadata too."""
    table = LossTable(entries_of(known.fleets), code, losses)
    pending = dict(known.packs)
    position: bytes | None = b""
    while position is not None:
        start = position
        position = await trio.to_thread.run_sync(
            lambda: read_step(environment, clock, table, start, pending)  # noqa: B023
        )
    for pack in pending.values():
        table.add(pack.ref.pack_id, pack.ref.body_length, pack.placement)
    return table


async def check_placement(
    environment: Environment,
    clock: Clock,
    known: Known,
    code: CodeParams,
    promises: Promises,
    *,
    lose: Sequence[str],
    down: Set[int] = frozenset(),
) -> dict[str, Any]:
    """What `placement check` shows.  `lose` names what is imagined to be lost; `down` does not answer now.

    `ConfigError` for a name that is not in the fleet, `CacheError` where no fleet is known yet.
    """
    fleets = known.fleets
    if not fleets:
        raise CacheError("no generation is known here yet, and so no fleet; mount once")
    entries = entries_of(fleets)
    losses = [loss_of(entries, lose)] if lose else single_losses(entries)
    if down:
        gone = frozenset(down)
        losses.append(
            Loss(f"{losses[0].name} + {_DOWN_NOW}", losses[0].numbers | gone) if lose else Loss(_DOWN_NOW, gone)
        )
    table = await read_table(environment, clock, known, code, losses)
    assessment = assess(fleets[-1], code)
    found = table.to_json()
    for loss in found["losses"]:
        loss.update(_after(fleets[-1], assessment, set(loss["backends"])))
    return {
        "code": {"data_shards": code.k, "parity_shards": code.m, "codec": code.codec},
        "backends": len(entries),
        "backend_names": {str(entry.number): f"{entry.address}/{entry.namespace}" for entry in entries},
        **found,
        "down_now": sorted(down),
        "promises": {"redundant_groups": promises.groups, "redundant_nodes": promises.nodes},
        "broken_promises": [*broken_by_fleet(fleets, code, promises), *promises.broken_by(table)],
        "sentences": [*assessment.sentences(), assessment.may_be_down()],
    }


def _after(fleet: Fleet, assessment: FleetAssessment, gone: Set[int]) -> dict[str, bool]:
    """What goes on without some backends."""
    left = [entry for entry in fleet.entries if entry.number not in gone]
    takes = sum(entry.state == ACTIVE for entry in left)
    quorum = assessment.quorum
    return {
        "flushing": takes >= assessment.code.write_quorum and len(left) >= quorum.needed,
        "restore_proved": len(left) > quorum.may_be_down,
    }


async def check_unmounted(
    config: Config, clock: Clock, lose: Sequence[str], *, secret: Secret | None = None
) -> dict[str, Any]:
    """The same from the local store of a file system that is not mounted; no backend is asked.

    `secret` opens it (default: the configured one).  Raises `CacheError`, `KeyFileError`, and `MountError` while
    another process works there.
    """
    with _unmounted(config, secret) as (environment, superblock, keys):
        known = read_known(environment, keys)
        return await check_placement(environment, clock, known, superblock.code, promises_of(config), lose=lose)


def known_unmounted(config: Config, *, secret: Secret | None = None) -> Known:
    """What the newest head in the local store says while it is not mounted; raises as `check_unmounted`."""
    with _unmounted(config, secret) as (environment, _, keys):
        return read_known(environment, keys)


@contextlib.contextmanager
def _unmounted(config: Config, secret: Secret | None) -> Iterator[tuple[Environment, Superblock, KeyRing]]:
    directory = config.cache.directory
    if not local_store_exists(directory):
        raise CacheError(f"{directory}: no file system here; 'qsfs restore' brings the one that the backends hold")
    secret = read_secret(config, secret)
    lock = CacheLock(directory)
    try:
        limits = Limits.of(config.cache, config.flush.spool_bytes)
        environment = Environment(directory, limits.map_bytes, readonly=True)
        try:
            yield environment, *_open_superblock(environment, secret)
        finally:
            environment.close()
    finally:
        lock.release()


def _open_superblock(environment: Environment, secret: Secret) -> tuple[Superblock, KeyRing]:
    view = environment.read()
    try:
        row = view.get(Table.LOCAL, SUPERBLOCK_ROW)
        encoded = None if row is None else bytes(row)
    finally:
        view.close()
    if encoded is None:
        raise CacheError(f"{environment.directory}: was restored and not mounted yet; mount it first")
    # Not within the transaction: a passphrase takes seconds.
    return open_superblock(encoded, secret)


class PlacementWatch:
    """Looks at a mount's promises: at the start, at every change of the fleet, and at all packs every ten minutes."""

    def __init__(
        self,
        environment: Environment,
        clock: Clock,
        opened: Opened,
        promises: Promises,
        members: Members,
        fleets: Callable[[], tuple[Fleet, ...]],
    ) -> None:
        """`fleets` are those that the newest head names."""
        self._environment = environment
        self._clock = clock
        self._code = opened.superblock.code
        self._keys = opened.keys
        self._promises = promises
        self._members = members
        self._fleets = fleets
        self._recorded: list[str] = []
        self._told: set[str] = set()

    async def run(self) -> None:
        """Looks until cancelled."""
        while self._promises:
            await self.look()
            for warning in self.warnings():
                if warning not in self._told:
                    _log.warning("%s", warning)
            self._told = set(self.warnings())
            fleets = self._fleets()
            with trio.move_on_after(_LOOK_SECONDS):
                while self._fleets() == fleets:
                    await trio.sleep(_FLEET_SECONDS)

    async def look(self) -> None:
        """Reads all packs once."""
        known = read_known(self._environment, self._keys)
        if known.fleets:
            table = await read_table(self._environment, self._clock, known, self._code, ())
            self._recorded = self._promises.broken_by(table)

    def warnings(self) -> list[str]:
        """Which promises do not hold: by the fleet as of now, and by the packs as of the last look."""
        return [*broken_by_fleet(self._fleets(), self._code, self._promises), *self._recorded]

    async def check(self, lose: Sequence[str]) -> dict[str, Any]:
        """What `placement check` shows of a mount."""
        known = read_known(self._environment, self._keys)
        down = {m.number for m in self._members if m.state is State.DOWN or not m.identified}
        named = {entry.number for entry in entries_of(known.fleets)}
        missing = {number for number in named if self._members.by_number(number) is None}
        return await check_placement(
            self._environment,
            self._clock,
            known,
            self._code,
            self._promises,
            lose=lose,
            down=(down | missing) & named,
        )
