"""The local store: tables, inodes, pages and packs under transaction groups and a journal.

Everything here is synchronous and used by one thread, that of the file system.  What must wait for
the disk is handed out and done elsewhere, by whoever drives the store (the daemon, a test):

    group = store.seal()            # this thread; the open group ends, the next begins
    store.commit(group)             # any one thread; durable when it returns
    store.committed(group)          # this thread

    frame = store.journal_frame({inode})    # this thread; None: nothing to journal
    store.journal.write([frame])            # any one thread; durable when it returns
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path

from qsfs.clock import Clock
from qsfs.errors import CacheError, FormatMismatch
from qsfs.store import replay
from qsfs.store.allowance import Allowance
from qsfs.store.blocks import Blocks
from qsfs.store.changes import Change
from qsfs.store.environment import Environment, StoreFull
from qsfs.store.extents import Extents
from qsfs.store.group import JOURNAL_START_KEY, Group, commit
from qsfs.store.inodes import Inodes
from qsfs.store.journal import FIRST_SEQUENCE, Journal, encode_record, read_frames
from qsfs.store.layers import Layers
from qsfs.store.limits import Limits
from qsfs.store.schema import (
    PAGE,
    ROOT_INODE,
    Inode,
    Page,
    Table,
    Truncation,
    plain_u64,
    read_plain_u64,
    u64,
)
from qsfs.store.spill import Spill
from qsfs.store.start import StartPages
from qsfs.store.turns import Turns

JOURNAL_KEY = b"journal"
FSID_KEY = b"fsid"
NEXT_INODE = b"next-inode"
NEXT_PACK = b"next-pack"

_MOST_ROWS = 200_000
_ROW_BYTES = 256

Frame = tuple[int, int, bytes]


def _nothing() -> None:
    pass


def _no_bytes() -> int:
    return 0


def _never() -> float | None:
    return None


class _Everyone:
    """The backends as long as nobody knows which there are."""

    def __contains__(self, number: object) -> bool:
        return True


class CommitNeeded(Exception):
    """An fsync that the journal cannot serve: the groups must be committed."""


class Store:
    """The local store of one file system.

    `on_stream` is called when `streams` begins to hold while nothing commits; it must not change the store.
    `backends` are those of which shards count for eviction.
    `promised_bytes` tells what writes that are in no group yet will take, `promised_since` the running time
    of the oldest of them.  `limits` are those that hold now: they leave the more room for commits, the larger
    the trees are.
    """

    def __init__(self, directory: Path, limits: Limits, clock: Clock) -> None:
        """Opens the store in `directory` (creating it if absent), replays the journal and commits that.

        Raises `CacheError`, `FormatMismatch`, `Corrupt`.
        """
        self.directory = directory
        self.limits = self._configured = limits
        self.clock = clock
        self.environment = Environment(directory, limits.map_bytes)
        self.layers = Layers(self.environment)
        self.turns = Turns()
        self.allowance = Allowance()
        self.inodes = Inodes(self.layers)
        self.extents = Extents(self.layers)
        self.blocks = Blocks(self.layers, self.inodes, self.extents)
        self.spill = Spill(self.layers)
        self.start = StartPages(self.layers, clock)
        self._local: dict[bytes, bytes] = {}
        self._counters: dict[bytes, int] = {
            key: read_plain_u64(row) for key, row in self.layers.scan(Table.COUNTERS, b"", None)
        }
        self._counters_changed: set[bytes] = set()
        self.on_stream: Callable[[], None] = _nothing
        self.backends: Container[int] = _Everyone()
        self.promised_bytes: Callable[[], int] = _no_bytes
        self.promised_since: Callable[[], float | None] = _never
        self.write_number = self.layers.committed_write_number
        self.used_bytes, self.tree_bytes = self.environment.usage()
        try:
            self._replay()
        except BaseException:
            # One environment is open in a process, and nobody else can close this one.
            self.layers.close()
            raise

    def _replay(self) -> None:
        """Replays the journal, takes a new journal number, and commits both in one transaction."""
        self.spill.discard(self.environment)
        old = self.local(JOURNAL_KEY)
        if old is not None:
            start = self.local(JOURNAL_START_KEY)
            first = FIRST_SEQUENCE if start is None else read_plain_u64(start)
            replay.replay(self, read_frames(self.directory, old, first))
        number = self.clock.random_bytes(16)
        self._local[JOURNAL_KEY] = number
        group = self.seal(switch=False)
        try:
            self.commit(group)
        except StoreFull:
            # The pages that the last commits before the crash freed may not be reused yet.
            self.layers.renew_view()
            self.environment.release_freed()
            self.layers.renew_view()
            self.commit(group)
        self.committed(group)
        self.journal = Journal(self.directory, self.limits.journal_bytes, number)

    def close(self) -> None:
        """Closes journal and environment.  What is not committed is lost, as after a crash."""
        self.journal.close()
        self.layers.close()

    # rows

    def get(self, table: Table, key: bytes) -> bytes | None:
        """The row at `key`, or None."""
        return self.layers.get(table, key)

    def scan(
        self, table: Table, start: bytes, stop: bytes | None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Rows with start <= key < stop, in order; nothing may change meanwhile."""
        return self.layers.scan(table, start, stop, reverse)

    def inode(self, number: int) -> Inode | None:
        """The live inode, or None."""
        return self.inodes.get(number)

    def local(self, name: bytes) -> bytes | None:
        """A row of LOCAL, as of now."""
        if name in self._local:
            return self._local[name]
        return self.layers.get(Table.LOCAL, name) or None

    def set_local(self, name: bytes, value: bytes) -> None:
        """Sets a row of LOCAL with the next commit; an empty value is as good as none."""
        self._local[name] = value

    # counters

    def counter(self, name: bytes) -> int:
        """The value of a counter, 0 if it was never set."""
        return self._counters.get(name, 0)

    def set_counter(self, name: bytes, value: int) -> None:
        """Sets a counter in the open group."""
        self._counters[name] = value
        self._counters_changed.add(name)

    def next_number(self, name: bytes) -> int:
        """Takes the next number of a counter; numbers start at 1."""
        value = self.counter(name) + 1
        self.set_counter(name, value)
        return value

    def allocate_inode(self) -> int:
        """A number that no inode has had."""
        return self.next_number(NEXT_INODE)

    def note_inode_number(self, number: int) -> None:
        """Takes note of a number that replay met."""
        if number > self.counter(NEXT_INODE):
            self.set_counter(NEXT_INODE, number)

    def next_write(self) -> int:
        """The next write number."""
        self.write_number += 1
        return self.write_number

    # changes

    def change(self) -> Change:
        """One namespace operation: applied wholly at the end of the `with` block, or not at all."""
        return Change(self)

    def put_pages(self, inode: Inode, first: int, data: Page, write_number: int) -> None:
        """Writes whole pages of a file from page `first` on.  A single page of `bytes` is kept as it is, uncopied."""
        if inode.number in self.spill.covered:
            self.spill.drop_pages(inode.number, first, len(data) // PAGE)
        self.blocks.put(inode, first, data, write_number)
        if self.layers.committing is None and self.streams():
            self.on_stream()

    def truncate_data(self, inode: Inode, first: int, size: int, cut_spill: bool = True) -> None:
        """Sets a file's size; its pages from `first` on become holes, spilled ones if `cut_spill`."""
        number = self.next_write()
        self.cut_data(inode, first, number, cut_spill)
        for group in (self.layers.open, self.layers.committing):
            log = group.data_log.get(inode.number) if group is not None else None
            if log is not None:
                log.pages = {page: n for page, n in log.pages.items() if page < first}
        log = replay.log_of(self.layers.open, inode.number)
        log.truncations.append((number, first))
        inode.size = size
        self.touch_data(inode)

    def cut_data(self, inode: Inode, first: int, write_number: int, cut_spill: bool = True) -> None:
        """Makes the pages from `first` on holes: at once if they are few, else worked off later."""
        if inode.allocated or self.extents.any(inode.number):
            self.blocks.truncate(inode, first, write_number)
            self.blocks.work_off(inode, 256)
        if cut_spill and self.spill.any(inode.number):
            self.spill.cut(inode.number, first)

    def touch_data(self, inode: Inode) -> None:
        """Takes note that size or times of a file changed with its data."""
        replay.log_of(self.layers.open, inode.number).touched = self.next_write()
        self.inodes.touch(inode)

    def forget_data(self, inode: Inode, write_number: int) -> None:
        """Makes all data of an inode that goes away holes, to be worked off."""
        for group in (self.layers.open, self.layers.committing):
            if group is not None:
                group.data_log.pop(inode.number, None)
        if not self.blocks.drop(inode):
            self.cut_data(inode, 0, write_number)
        elif self.spill.any(inode.number):
            self.spill.cut(inode.number, 0)

    def cover_spilled(self, inode: Inode, write_number: int) -> None:
        """Makes a file's spilled pages its own; durable with the commit of the open group only."""
        if self.spill.any(inode.number):
            self.spill.cover(inode.number, write_number)
            self.layers.open.covers.add(inode.number)

    def move_covered(self, steps: int) -> bool:
        """Moves spilled pages that were covered to their files; True when none is left."""
        for number in list(self.spill.covered):
            inode = self.inodes.get(number)
            if inode is None:
                self.spill.drop(number)
            elif not self.spill.move(inode, self.blocks, steps):
                return False
        return True

    def work_off_truncations(self, steps: int) -> bool:
        """Works off pending truncations, about `steps` blocks; True when none is left."""
        for number in list(self.blocks.pending):
            inode = self.inodes.get(number)
            try:
                done = self.blocks.work_off(inode or Inode(number, 0), steps)
            finally:
                if inode is None:
                    self.inodes.forget(number)
            if not done:
                return False
        return True

    def pending_truncations(self, inode: int) -> tuple[Truncation, ...]:
        """The truncations of a file that are not worked off."""
        return self.blocks.pending.get(inode, ())

    # groups

    def seal(self, switch: bool = True) -> Group:
        """Ends the open group; `commit` makes it durable.  The journal goes on in its other file."""
        self.inodes.write_back()
        self.extents.write_back()
        for name in self._counters_changed:
            self.layers.put(Table.COUNTERS, name, plain_u64(self._counters[name]))
        self._counters_changed.clear()
        self._sealed_local = dict(self._local)
        group = self.layers.seal(self.write_number)
        self.layers.open.since = self.clock.monotonic()
        if switch:
            self.journal.switch()
            group.journal_start = self.journal.next_sequence
        else:
            group.journal_start = FIRST_SEQUENCE
        return group

    def commit(self, group: Group) -> None:
        """Makes a sealed group durable.  Raises `CacheError` with the group unapplied: try again."""
        used = commit(self.environment, group, self._sealed_local, self.turns)
        self.used_bytes, self.tree_bytes = used

    def committed(self, group: Group) -> None:
        """Takes note of a finished commit."""
        for name, value in self._sealed_local.items():
            if self._local.get(name) == value:
                del self._local[name]
        self.layers.committed(group)
        self.limits = self._configured.beside(self.tree_bytes)

    @property
    def dirty(self) -> bool:
        """Whether the open group holds anything to commit."""
        return not self.layers.open.empty or bool(self._local or self._counters_changed)

    def idle(self) -> None:
        """Takes note that the open group is empty: reads from the newest commit from here on."""
        self.layers.renew_view()
        self.layers.open.since = self.clock.monotonic()

    def undurable_seconds(self) -> float | None:
        """The age, at most, of the oldest change that no commit has; None if there is none.

        What an fsync has put into the journal is durable before, and counts here nevertheless.
        """
        begun = [self.promised_since()]
        if self.layers.committing is not None:
            begun.append(self.layers.committing.since)
        elif self.dirty:
            begun.append(self.layers.open.since)
        times = [time for time in begun if time is not None]
        return self.clock.monotonic() - min(times) if times else None

    def group_is_full(self) -> bool:
        """Whether the open group has reached its bound: it should be sealed, and writers wait."""
        group = self.layers.open
        return _weight(group) >= self.limits.group_bytes or group.row_count >= _MOST_ROWS

    def streams(self) -> bool:
        """Whether the open group holds so much that will not be written again that its commit can begin."""
        return self.layers.open.streamed_bytes >= self.limits.stream_bytes

    def expected_bytes(self) -> int:
        """LMDB bytes in use once all that was accepted is committed, as an upper bound."""
        committing = self.layers.committing
        groups = _weight(self.layers.open) + (_weight(committing) if committing else 0)
        return self.used_bytes + groups + self.promised_bytes()

    # journal

    def journal_frame(self, inodes: Iterable[int]) -> Frame | None:
        """Places an append with all namespace changes and the data of `inodes` that are not yet durable.

        Returns None where nothing is left to journal.  Raises `CommitNeeded` where the append would
        not fit or a commit is cheaper: then the groups must be committed instead.
        """
        groups = [g for g in (self.layers.committing, self.layers.open) if g is not None]
        wanted = set(inodes)
        for group in groups:
            for _, _, data_of in group.namespace_log:
                wanted.update(data_of)
        if any(group.covers & wanted for group in groups):
            raise CommitNeeded
        size = sum(replay.data_bytes(g, n) for g in groups for n in wanted)
        size += sum(len(record) + 16 for g in groups for _, record, _ in g.namespace_log)
        if size > min(self.journal.room(), self.limits.largest_append):
            raise CommitNeeded
        records = []
        for group in groups:
            records += [encode_record(replay.NAMESPACE, body) for _, body, _ in group.namespace_log]
            group.namespace_log = []
        for number in sorted(wanted):
            records += replay.take_data_records(self, groups, number)
        return self.journal.frame(records) if records else None

    # the file system's identity

    def check_identity(self, fsid: bytes) -> None:
        """Raises `FormatMismatch` if this is the store of another file system, `CacheError` if of none."""
        mine = self.local(FSID_KEY)
        if mine is None:
            raise CacheError(
                f"{self.directory}: no file system here yet; run 'qsfs format' or 'qsfs restore'"
            )
        if mine != fsid:
            raise FormatMismatch(
                f"{self.directory}: the cache of file system {mine.hex()}, the backends hold {fsid.hex()}; "
                "give it the config of its own backends, or another cache directory"
            )

    def root_exists(self) -> bool:
        """Whether the namespace has a root."""
        return self.get(Table.INODES, u64(ROOT_INODE)) is not None


def _weight(group: Group) -> int:
    """About how many bytes of LMDB pages a group takes at most: its blocks, and its rows with their marks."""
    return group.bytes + group.row_count * _ROW_BYTES
