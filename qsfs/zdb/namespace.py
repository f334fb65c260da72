"""One namespace: its settings, its data files and its index.

Changes are made without a pause between the checks and the append, so no limit can be passed by
requests that run side by side.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from qsfs.clock import Clock
from qsfs.zdb.datafile import DataFile
from qsfs.zdb.index import Entry, Index, Place
from qsfs.zdb.record import DELETED, HEADER_BYTES, MAX_TIME, Content, encode_record, value_checksum
from qsfs.zdb.recovery import recover
from qsfs.zdb.settings import Settings, load_settings

_log = logging.getLogger(__name__)

_DATA_FILE = re.compile(r"d(\d+)")


class WriteFailed(Exception):
    """The disk did not take a record; nothing was stored."""


class ReadFailed(Exception):
    """A stored value cannot be read from the disk."""


class QuotaExceeded(Exception):
    """The value would pass the namespace's `maxsize`; nothing was stored."""


class Namespace:
    """An open namespace in `directory`.

    `locked` and `frozen` are forgotten at a restart, as in 0-db.  With `durable_appends` (the
    server's `--sync`), `put` and `delete` return when the record is on the disk.
    """

    def __init__(
        self,
        name: bytes,
        directory: Path,
        settings: Settings,
        *,
        clock: Clock,
        file_bytes: int,
        durable_appends: bool,
    ) -> None:
        self.name = name
        self.directory = directory
        self.settings = settings
        self.locked = False
        self.frozen = False
        self.deleted = False
        self.read_failures = 0
        self.write_failures = 0
        self.last_read_failure_s = 0
        self.last_write_failure_s = 0
        self.index = Index()
        self._clock = clock
        self._file_bytes = file_bytes
        self._durable_appends = durable_appends
        self._files: dict[int, DataFile] = {}
        self._active: DataFile | None = None
        self._unsealed: list[DataFile] = []

    @classmethod
    def create(
        cls,
        name: bytes,
        directory: Path,
        *,
        clock: Clock,
        file_bytes: int,
        durable_appends: bool,
        maxsize: int = 0,
    ) -> Namespace:
        """A new, empty namespace; `directory` must not exist.  Raises `OSError`."""
        settings = Settings(seed=int.from_bytes(clock.random_bytes(8), "little"), maxsize=maxsize)
        directory.mkdir(mode=0o700)
        settings.save(directory)
        return cls(
            name, directory, settings, clock=clock, file_bytes=file_bytes, durable_appends=durable_appends
        )

    @classmethod
    def load(
        cls, name: bytes, directory: Path, *, clock: Clock, file_bytes: int, durable_appends: bool
    ) -> Namespace:
        """An existing namespace, its index rebuilt from its data files.

        Raises `Unusable`, or `OSError` if the files cannot be read at all.
        """
        namespace = cls(
            name,
            directory,
            load_settings(directory),
            clock=clock,
            file_bytes=file_bytes,
            durable_appends=durable_appends,
        )
        try:
            namespace._rebuild()
        except BaseException:
            namespace.close(keep=False)
            raise
        return namespace

    @property
    def active_file(self) -> int:
        """The number of the file that takes appends."""
        return 0 if self._active is None else self._active.number

    @property
    def active_size(self) -> int:
        """Where the next record goes in the active file."""
        return 0 if self._active is None else self._active.size

    def password_is(self, given: bytes) -> bool:
        """Whether `given` is the namespace's password."""
        return hmac.compare_digest(given, self.password)

    @property
    def password(self) -> bytes:
        """The password; empty if there is none."""
        return self.settings.password.encode("latin-1")

    def change_settings(self, change: Callable[[Settings], None]) -> None:
        """Applies `change` and saves; raises `OSError`, and then the old settings stand."""
        changed = Settings(**vars(self.settings))
        change(changed)
        changed.save(self.directory)
        self.settings = changed

    def disk_free_bytes(self) -> int:
        """Bytes that the disk below still has for us."""
        status = os.statvfs(self.directory)
        return status.f_bavail * status.f_frsize

    def has_room(self, key: bytes, length: int) -> bool:
        """Whether a value of `length` bytes under `key` keeps the live bytes within `maxsize`."""
        if not self.settings.maxsize:
            return True
        old = self.index.get(key)
        replaced = 0 if old is None else old.length
        return self.index.data_bytes + length <= self.settings.maxsize + replaced

    async def put(self, key: bytes, value: Content, time_s: int | None = None) -> bool:
        """Stores `value`; `False` if it is what is stored already.

        Raises `QuotaExceeded` or `WriteFailed`; then nothing was stored.
        """
        if not self.has_room(key, len(value)):
            raise QuotaExceeded
        old = self.index.get(key)
        if old is not None and old.length == len(value) and self._is_stored(old, value):
            await self._settle(old.place)
            return False
        if time_s is None:
            time_s = self._clock.time_ns() // 1_000_000_000
        time_s = min(max(time_s, 0), MAX_TIME)
        place = self._append(key, value, time_s, 0)
        self.index.put(Entry(key, place, len(value), time_s))
        await self._settle(place)
        return True

    async def delete(self, key: bytes) -> bool:
        """Deletes `key`; `False` if it is not there.  Raises `WriteFailed`."""
        if self.index.get(key) is None:
            return False
        place = self._append(key, b"", self._clock.time_ns() // 1_000_000_000, DELETED)
        self.index.remove(key)
        await self._settle(place)
        return True

    async def value(self, entry: Entry) -> bytes | bytearray:
        """The stored bytes, unchecked; raises `ReadFailed`."""
        number, offset = entry.place
        try:
            file = self._files[number]
            return await file.read_exactly(offset + HEADER_BYTES + len(entry.key), entry.length)
        except (OSError, KeyError) as failure:
            self._note_read_failure(failure)
            raise ReadFailed from failure

    async def is_whole(self, entry: Entry) -> bool:
        """Whether the stored bytes have the checksum they were stored with; raises `ReadFailed`."""
        try:
            stored = self._stored_checksum(entry)
        except (OSError, KeyError) as failure:
            self._note_read_failure(failure)
            raise ReadFailed from failure
        value = await self.value(entry)
        return (value_checksum(value) if value else 0) == stored

    def has_place(self, place: Place) -> bool:
        """Whether a record may begin at `place`, for the cursors that clients bring back."""
        return place[0] in self._files and 0 < place[1] < self._files[place[0]].size

    async def seal_rotated(self) -> None:
        """Puts the files that were rotated out on the disk, so that a restart need not check them."""
        while self._unsealed:
            file = self._unsealed.pop()
            try:
                await file.make_durable(file.size)
                file.seal(self.settings.seed)
            except OSError as failure:
                _log.warning("%s: not sealed: %s", file.path, failure)

    @property
    def has_unsealed(self) -> bool:
        """Whether `seal_rotated` has something to do."""
        return bool(self._unsealed)

    def close(self, *, keep: bool = True) -> None:
        """Closes all files; with `keep`, what was appended is put on the disk first."""
        if keep:
            for file in [*self._unsealed, *filter(None, [self._active])]:
                self._sync_and_seal(file)
        for file in self._files.values():
            file.close()
        self._files = {}
        self._active = None

    def _sync_and_seal(self, file: DataFile) -> None:
        try:
            if file.durable < file.size:
                file.sync()
                file.seal(self.settings.seed)
        except OSError as failure:
            _log.warning("%s: not sealed: %s", file.path, failure)

    def _rebuild(self) -> None:
        found = (_DATA_FILE.fullmatch(path.name) for path in self.directory.iterdir())
        numbers = sorted(int(match[1]) for match in found if match)
        for number in numbers:
            file = DataFile.open(self.directory / f"d{number}", number)
            self._files[number] = file
            for record in recover(file, self.settings.seed, last=number == numbers[-1]):
                if record.flags & DELETED:
                    self.index.remove(record.key)
                else:
                    place = (number, record.offset)
                    self.index.put(Entry(record.key, place, record.value_length, record.time_s))
            self._active = file

    def _append(self, key: bytes, value: Content, time_s: int, flags: int) -> Place:
        try:
            file = self._file_for(HEADER_BYTES + len(key) + len(value))
            head = encode_record(
                key, value, time_s=time_s, durable=file.durable, seed=self.settings.seed, flags=flags
            )
            return file.number, file.append(head, value)
        except OSError as failure:
            self._note_write_failure(failure)
            raise WriteFailed from failure

    def _file_for(self, length: int) -> DataFile:
        file = self._active
        if file is not None and not file.failed and (file.empty or file.size + length <= self._file_bytes):
            return file
        number = 0 if file is None else file.number + 1
        self._active = self._files[number] = DataFile.create(self.directory, number)
        if file is not None:
            self._unsealed.append(file)
        return self._active

    async def _settle(self, place: Place) -> None:
        if not self._durable_appends:
            return
        file = self._files[place[0]]
        try:
            await file.make_durable(place[1] + 1)
        except OSError as failure:
            self._note_write_failure(failure)
            raise WriteFailed from failure

    def _is_stored(self, entry: Entry, value: Content) -> bool:
        with contextlib.suppress(OSError, KeyError):
            if self._stored_checksum(entry) == (value_checksum(value) if value else 0):
                number, offset = entry.place
                return self._files[number].read(offset + HEADER_BYTES + len(entry.key), len(value)) == value
        return False

    def _stored_checksum(self, entry: Entry) -> int:
        number, offset = entry.place
        checksum = self._files[number].read(offset + HEADER_BYTES - 16, 8)
        return int.from_bytes(checksum, "little")

    def _note_write_failure(self, failure: OSError) -> None:
        self.write_failures += 1
        self.last_write_failure_s = self._clock.time_ns() // 1_000_000_000
        _log.error("%s: cannot write: %s", self.directory, failure)

    def _note_read_failure(self, failure: Exception) -> None:
        self.read_failures += 1
        self.last_read_failure_s = self._clock.time_ns() // 1_000_000_000
        _log.error("%s: cannot read: %s", self.directory, failure)
