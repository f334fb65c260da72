"""The load of `scripts/bench --drift`: four programs at a steady, moderate pace, all of whose contents can be checked.

Each is a thread that begins a step whenever one is due, and leaves out those that it is late for.  What a
step takes is kept with the time at which it began.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import lmdb
from measures import MIB, PAGE

EXTENT = 256 << 10
FILE = 4 * MIB
_KEYS, _VALUE, _KEYS_IN_COMMIT = 20_000, 1000, 8
_STAMP = struct.Struct("<QQQ")
_FILLING = random.Random(1).randbytes(MIB)


def content(name: int, version: int, offset: int, size: int) -> bytes:
    """Bytes of whole pages that no two versions, names and offsets have in common and no layer can shrink."""
    begin = offset % MIB
    data = bytearray((_FILLING * (size // MIB + 2))[begin : begin + size])
    for page in range(0, size, PAGE):
        _STAMP.pack_into(data, page, name, version, offset + page)
    return bytes(data)


class Program(ABC):
    """Takes a step every `seconds`; `taken` holds when each began, and its seconds."""

    name: str
    what: str
    seconds: float

    def __init__(self) -> None:
        self.taken: list[tuple[float, float]] = []
        self.error: BaseException | None = None

    def run(self, stop: threading.Event) -> None:
        """Steps until `stop` is set or something fails; `error` tells what."""
        due = time.monotonic()
        try:
            while not stop.wait(max(0.0, due - time.monotonic())):
                self.step()
                due = max(due + self.seconds, time.monotonic())
        except Exception as error:  # noqa: BLE001 - it is raised in the thread that waits
            self.error = error

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Keeps what the block takes."""
        began, start = time.monotonic(), time.perf_counter()
        yield
        self.taken.append((began, time.perf_counter() - start))

    @abstractmethod
    def step(self) -> None:
        """Does it once, the part that counts under `timed`."""

    def check(self) -> list[str]:
        """What is not as it was written; empty if all is."""
        return []

    def close(self) -> None:  # noqa: B027 - most have nothing open
        """Lets go of what it has open."""


class Ring:
    """Files of 4 MiB that are written over in turn; the oldest quarter is what the cache no longer holds."""

    def __init__(self, directory: Path, count: int) -> None:
        self.count = count
        self.versions = [0] * count
        self._directory = directory
        self._next = 0
        self._locks = [threading.Lock() for _ in range(count)]
        self._unread: list[set[int]] = [set() for _ in range(count)]
        directory.mkdir()

    def file(self, slot: int) -> Path:
        return self._directory / f"{slot:04}"

    def write(self) -> None:
        """Writes the oldest file anew, synced, and drops what the kernel cached of it."""
        slot = self._next
        with self._locks[slot]:
            version = self.versions[slot] + 1
            with self.file(slot).open("wb", buffering=0) as out:
                for offset in range(0, FILE, MIB):
                    out.write(content(slot, version, offset, MIB))
                os.fsync(out.fileno())
                os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self.versions[slot] = version
            self._unread[slot] = set(range(0, FILE, EXTENT))
            self._next = (slot + 1) % self.count

    @contextlib.contextmanager
    def evicted(self, source: random.Random) -> Iterator[tuple[int, int]]:
        """Slot and offset of an extent of the oldest quarter that nobody has read since it was written."""
        oldest = self.count // 4
        first = self._next + 1
        slots = [(first + step) % self.count for step in range(oldest)]
        slot = source.choice([slot for slot in slots if self._unread[slot]] or slots)
        with self._locks[slot]:
            offset = source.choice(sorted(self._unread[slot]) or list(range(0, FILE, EXTENT)))
            self._unread[slot].discard(offset)
            yield slot, offset


class SequentialWrites(Program):
    name = "sequential"
    what = "4 MiB written in order and synced"
    seconds = 2.0

    def __init__(self, ring: Ring) -> None:
        super().__init__()
        self._ring = ring

    def step(self) -> None:
        with self.timed():
            self._ring.write()

    def check(self) -> list[str]:
        wrong = []
        for slot, version in enumerate(self._ring.versions):
            data = self._ring.file(slot).read_bytes()
            if data != b"".join(content(slot, version, offset, MIB) for offset in range(0, FILE, MIB)):
                wrong.append(f"{self._ring.file(slot)} is not its version {version}")
        return wrong


class EvictedReads(Program):
    name = "evicted"
    what = "128 KiB read that the cache no longer holds"
    seconds = 0.25

    def __init__(self, ring: Ring) -> None:
        super().__init__()
        self._ring = ring
        self._source = random.Random(2)

    def step(self) -> None:
        with self._ring.evicted(self._source) as (slot, offset):
            descriptor = os.open(self._ring.file(slot), os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                with self.timed():
                    found = os.pread(descriptor, EXTENT // 2, offset)
            finally:
                os.close(descriptor)
            if found != content(slot, self._ring.versions[slot], offset, EXTENT // 2):
                raise OSError(f"{self._ring.file(slot)}: wrong bytes at {offset}")


class DurableWrites(Program):
    name = "durable"
    what = "4 KiB written and synced"
    seconds = 0.1

    def __init__(self, file: Path, size: int) -> None:
        super().__init__()
        self._file = file
        self._versions = [1] * (size // PAGE)
        self._source = random.Random(3)
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        for page in range(len(self._versions)):
            os.pwrite(self._descriptor, content(0, 1, page * PAGE, PAGE), page * PAGE)
        os.fsync(self._descriptor)

    def step(self) -> None:
        page = self._source.randrange(len(self._versions))
        version = self._versions[page] + 1
        data = content(0, version, page * PAGE, PAGE)
        with self.timed():
            os.pwrite(self._descriptor, data, page * PAGE)
            os.fsync(self._descriptor)
        self._versions[page] = version

    def check(self) -> list[str]:
        data = self._file.read_bytes()
        return [
            f"{self._file}: page {page} is not its version {version}"
            for page, version in enumerate(self._versions)
            if data[page * PAGE : (page + 1) * PAGE] != content(0, version, page * PAGE, PAGE)
        ]

    def close(self) -> None:
        os.close(self._descriptor)


class DiskWrites(DurableWrites):
    """The same on the local disk: tells drift of the machine from that of qsfs."""

    name = "disk"
    what = "4 KiB written and synced on the local disk"
    seconds = 0.5


class Commits(Program):
    name = "commits"
    what = "LMDB commit of 8 random values of 1,000 bytes"
    seconds = 0.2

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file
        self._source = random.Random(4)
        self._versions = [1] * _KEYS
        self._open()
        with self._environment.begin(write=True) as transaction:
            for key in range(_KEYS):
                transaction.put(_key(key), _value(key, 1))

    def _open(self) -> None:
        self._environment = lmdb.open(
            str(self._file), subdir=False, map_size=1 << 40, writemap=True, readahead=False
        )

    def step(self) -> None:
        keys = self._source.sample(range(_KEYS), _KEYS_IN_COMMIT)
        with self.timed(), self._environment.begin(write=True) as transaction:
            for key in keys:
                transaction.put(_key(key), _value(key, self._versions[key] + 1))
        for key in keys:
            self._versions[key] += 1

    def check(self) -> list[str]:
        self._open()
        try:
            with self._environment.begin() as transaction:
                return [
                    f"{self._file}: key {key} is not its version {version}"
                    for key, version in enumerate(self._versions)
                    if transaction.get(_key(key)) != _value(key, version)
                ]
        finally:
            self._environment.close()

    def close(self) -> None:
        self._environment.close()


def _key(number: int) -> bytes:
    # Scattered, so that a commit changes leaves all over the tree.
    return random.Random(number).randbytes(32)


def _value(number: int, version: int) -> bytes:
    begin = number * 16 % (MIB - _VALUE)
    return _STAMP.pack(number, version, 0) + _FILLING[begin : begin + _VALUE - _STAMP.size]
