"""A file larger than the cache, read and overwritten all over while its pages are evicted and fetched."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

PAGE = 4096
FILL_BYTES = 1 << 20
NAME = "ballast"


class Ballast:
    """The file `ballast` of a mount, and what each of its pages must hold.

    While the block of `with` runs, a thread reads pages and overwrites parts of them, each followed by an
    fsync.  An error of the file system ends it quietly: the daemon is about to be killed.
    """

    def __init__(self, mountpoint: Path, pages: int, seed: object = 0) -> None:
        self.pages = pages
        self.path = mountpoint / NAME
        self.synced = 0
        self.wrong: list[str] = []
        self._choose = random.Random(f"ballast/{seed}")
        self._seed = seed
        self._changed: dict[int, bytes] = {}
        self._maybe: dict[int, bytes] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def fill(self) -> None:
        """Writes the file for the first time and syncs it."""
        with self.path.open("wb") as file:
            for first in range(0, self.pages, FILL_BYTES // PAGE):
                last = min(self.pages, first + FILL_BYTES // PAGE)
                file.write(b"".join(self._at_first(page) for page in range(first, last)))
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> Self:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def verify(self, mountpoint: Path | None = None, *, sample: int = 0) -> list[str]:
        """What is wrong in the pages that were overwritten and `sample` others (0: all pages)."""
        path = self.path if mountpoint is None else mountpoint / NAME
        touched = self._changed.keys() | self._maybe.keys()
        pages: Iterable[int] = range(self.pages)
        if sample:
            pages = sorted(touched | {self._choose.randrange(self.pages) for _ in range(sample)})
        problems = self.wrong
        with path.open("rb", buffering=0) as file:
            for page in pages:
                found = os.pread(file.fileno(), PAGE, page * PAGE)
                if found == self._maybe.get(page):
                    self._changed[page] = found
                elif found != self._expected(page):
                    problems.append(f"{path}: page {page} holds what it must not hold")
        self._maybe.clear()
        return problems

    def _run(self) -> None:
        try:
            with self.path.open("r+b", buffering=0) as file:
                while not self._stop.is_set() and not self.wrong:
                    self._step(file.fileno())
        except OSError:
            return

    def _step(self, file: int) -> None:
        first = page = self._choose.randrange(self.pages)
        if self._choose.random() < 0.5:
            self._forget(file, page)
            if os.pread(file, PAGE, page * PAGE) != self._expected(page):
                self.wrong.append(f"{self.path}: page {page} reads wrong")
            return
        for page in {first, self._choose.randrange(self.pages)}:
            start = self._choose.randrange(PAGE)
            data = self._choose.randbytes(self._choose.randint(1, PAGE - start))
            before = self._expected(page)
            self._maybe[page] = before[:start] + data + before[start + len(data) :]
            self._forget(file, page)
            os.pwrite(file, data, page * PAGE + start)
        os.fsync(file)
        self._changed |= self._maybe
        self._maybe.clear()
        self.synced += 1

    def _forget(self, file: int, page: int) -> None:
        """Lets the kernel drop its own copy, so that it asks the daemon."""
        os.posix_fadvise(file, page * PAGE, PAGE, os.POSIX_FADV_DONTNEED)

    def _expected(self, page: int) -> bytes:
        held = self._changed.get(page)
        return self._at_first(page) if held is None else held

    def _at_first(self, page: int) -> bytes:
        return hashlib.shake_256(f"{self._seed}/{page}".encode()).digest(PAGE)
