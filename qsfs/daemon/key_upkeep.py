"""Keeps the key slots of a mount and of its backends the newest that there are.

Key commands change the superblock on the backends, from this machine or another one.  A mount looks
there from time to time: it brings the newest revision to backends that were down, and takes it up
once a quorum holds it.  From then on new objects are sealed under the newest master key in it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import trio

from qsfs.clock import Clock
from qsfs.daemon.committer import Committer
from qsfs.daemon.connect import SUPERBLOCK_ROW, Opened
from qsfs.daemon.owning import local_fleets
from qsfs.errors import BackendError, KeyFileError, QsfsBug, QsfsError
from qsfs.format.keys import KeyRing
from qsfs.format.passphrase import Passphrase
from qsfs.format.slots import Secret, name_of
from qsfs.format.superblock import SUPERBLOCK_KEY, Superblock, encode_superblock, open_superblock, read_superblock
from qsfs.remote.members import Member, Members, State
from qsfs.remote.quorum import fleet_quorums, reached
from qsfs.remote.superblock_write import Standing, spread_superblock
from qsfs.remote.survey import Timing
from qsfs.store.schema import PackRow, Table
from qsfs.store.store import Store

_log = logging.getLogger(__name__)

LOOK_SECONDS = 60.0
AGAIN_SECONDS = 5.0
COUNT_SECONDS = 600.0
_STEP_ROWS = 256
_TICK_SECONDS = 1.0
_PAUSE_SECONDS = 0.05
_TIMING = Timing(attempt=5.0)


class KeyUpkeep:
    """Looks after the key slots of one mount; `opened` is the file system with the newest ones taken up.

    `settled`: at the last look a quorum held just these.  `left` are packs and their bytes by the number of
    an old master key; None until they were counted.
    """

    def __init__(
        self,
        store: Store,
        committer: Committer,
        members: Members,
        opened: Opened,
        secret: Secret,
        clock: Clock,
        *,
        changed: Callable[[Opened], None] = lambda _: None,
    ) -> None:
        """`changed` is told what was taken up."""
        self.opened = opened
        self.settled = False
        self.left: dict[int, tuple[int, int]] | None = None
        self._store = store
        self._committer = committer
        self._members = members
        self._secret = secret
        self._clock = clock
        self._changed = changed
        self._told: set[str] = set()
        self._seen: frozenset[int] = frozenset()
        self._turn = trio.Lock()

    async def run(self) -> None:
        """Looks until cancelled: each minute, sooner while no quorum holds the same, at once where a backend
        is back."""
        while True:
            await self.look()
            with trio.move_on_after(LOOK_SECONDS if self.settled else AGAIN_SECONDS):
                while not self._returned():
                    await trio.sleep(_TICK_SECONDS)

    def _up(self) -> frozenset[int]:
        return frozenset(m.number for m in self._members if m.identified and m.state is State.UP)

    def _returned(self) -> bool:
        """Whether a backend is up that was not when it was looked at; one that is, and refuses, waits its minute."""
        up = self._up()
        self._seen &= up
        return up > self._seen

    async def look(self) -> None:
        """One look: refills older copies, and takes up what is newer.  Raises nothing of the backends'."""
        async with self._turn:
            try:
                await self._look()
            except QsfsError as error:
                self._tell(f"the key slots could not be looked after: {error}")

    async def _look(self) -> None:
        self._seen = self._up()
        copies = await self._read()
        newest = await self._newest(copies)
        here = self.opened.superblock
        if newest is not None and newest[1].revision > here.revision:
            value, superblock, keys = newest
        else:
            held = Counter(value for value in copies.values() if self._reads(value) == here)
            value = held.most_common(1)[0][0] if held else encode_superblock(here, self.opened.keys, self._clock)
            superblock, keys = here, self.opened.keys
        holders = {n for n, copy in copies.items() if copy == value or self._reads(copy) == superblock}
        # Most of the time all hold it, and nobody needs a connection of its own to be asked once more.
        others = Members(m for m in self._members if m.number not in holders and m.identified and m.ready)
        spread = await spread_superblock(others, value, keys, timing=_TIMING)
        quorums = fleet_quorums(local_fleets(self._store, self.opened), self.opened.superblock.code)
        self.settled = reached(quorums, holders | spread.holders)
        for number, (found, _) in spread.others.items():
            if found in (Standing.RIVAL, Standing.FOREIGN):
                self._tell(f"{spread.reasons[number]}; 'qsfs key list' says more")
        if superblock.revision > here.revision and self.settled:
            await self._take_up(value, superblock, keys)

    async def _read(self) -> dict[int, bytes]:
        copies: dict[int, bytes] = {}

        async def read(member: Member) -> None:
            with trio.move_on_after(_TIMING.attempt):
                try:
                    value = await member.data.get(SUPERBLOCK_KEY)
                except BackendError as error:
                    member.failed(error)
                    return
                if value is not None:
                    copies[member.number] = value

        async with trio.open_nursery() as nursery:
            for member in self._members:
                if member.identified and member.ready:
                    nursery.start_soon(read, member)
        return copies

    async def _newest(self, copies: dict[int, bytes]) -> tuple[bytes, Superblock, KeyRing] | None:
        """The highest revision among the copies, by the master keys held or else by the mount's secret."""
        counts = Counter(copies.values())
        best: tuple[int, int, bytes, Superblock, KeyRing] | None = None
        for value in sorted(counts, key=lambda value: -counts[value]):
            keys = self.opened.keys
            try:
                superblock = read_superblock(value, keys)
            except KeyFileError:
                try:
                    superblock, keys = await trio.to_thread.run_sync(open_superblock, value, self._secret)
                except KeyFileError:
                    self._tell(self._why_closed())
                    continue
                except QsfsError:
                    continue
            except QsfsError:
                continue
            rank = (superblock.revision, counts[value], value)
            if best is None or rank > best[:3]:
                best = (*rank, superblock, keys)
        return None if best is None else (best[2], best[3], best[4])

    def _why_closed(self) -> str:
        if isinstance(self._secret, Passphrase) and self._secret.exhausted:
            why = "was tried on very many key slots that it does not open, as a backend may forge, and is on no more"
        else:
            why = "does not open the new one"
        return (
            f"the master key was rotated, and the {name_of(self._secret)} of this mount {why}: it goes on with the "
            "old; mount again with one that opens the new one"
        )

    def _reads(self, value: bytes) -> Superblock | None:
        try:
            return read_superblock(value, self.opened.keys)
        except QsfsError:
            return None

    async def _take_up(self, value: bytes, superblock: Superblock, keys: KeyRing) -> None:
        held = self.opened.keys
        try:
            KeyRing(held.fsid, [held.get(number) for number in held.numbers]).learn(
                keys.get(number) for number in keys.numbers
            )
        except QsfsBug as error:
            self._tell(f"the key slots on the backends are not taken up: {error}; 'qsfs key list' says more")
            return
        # Durable here before anything is sealed under it: a restart must be able to open that.
        self._store.set_local(SUPERBLOCK_ROW, value)
        await self._committer.commit()
        before = held.current.number
        held.learn(keys.get(number) for number in keys.numbers)
        self.opened = replace(self.opened, superblock=superblock)
        self._changed(self.opened)
        _log.info("took up revision %d of the key slots", superblock.revision)
        if held.current.number > before:
            self.left = None
            _log.info("new objects are sealed under master key %d from now on", held.current.number)

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            _log.warning("%s", what)

    # what is left under old master keys

    async def run_count(self) -> None:
        """Counts, now and then, the packs under old master keys; does nothing while there is one only."""
        while True:
            if len(self.opened.keys.numbers) > 1:
                self.left = await self._count()
                await trio.sleep(COUNT_SECONDS)
            else:
                await trio.sleep(AGAIN_SECONDS)

    async def _count(self) -> dict[int, tuple[int, int]]:
        found: dict[int, tuple[int, int]] = {}
        start = b""
        current = self.opened.keys.current.number
        while True:
            rows = 0
            for key, value in self._store.scan(Table.PACKS, start, None):
                rows += 1
                start = bytes(key) + b"\0"
                row = PackRow.decode(bytes(value))
                if row.key_number != current:
                    packs, size = found.get(row.key_number, (0, 0))
                    found[row.key_number] = (packs + 1, size + row.body_length)
                if rows == _STEP_ROWS:
                    break
            if rows < _STEP_ROWS:
                return found
            await trio.sleep(_PAUSE_SECONDS)

    def status(self) -> dict[str, object]:
        """For `status`: which master key is in use, and what is left under older ones."""
        keys = self.opened.keys
        left = None if self.left is None else {
            str(number): {"packs": packs, "bytes": size} for number, (packs, size) in sorted(self.left.items())
        }
        return {
            "revision": self.opened.superblock.revision,
            "master_key": keys.current.number,
            "old_master_keys": list(keys.numbers[:-1]),
            "left": left,
            "on_a_quorum": self.settled,
        }
