"""Whose turn it is among the worker threads that seal and read.

Two threads that run Python at a time only hand the interpreter back and forth: each step of a cursor, of the compressor
and of the cipher gives it up and waits to get it again, a switch of threads every few microseconds.  So one
works, and the other one starts when that one does arithmetic that needs no interpreter, which is long.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class WorkerTurn:
    """A lock that worker threads hold while they work: `with turn:`.  A thread has it at most once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._holder = 0
        self._lock.release()

    @property
    def held(self) -> bool:
        """Whether the calling thread has it."""
        return self._holder == threading.get_ident()

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """Lets others work meanwhile, if the calling thread has the turn; it has it again afterwards."""
        if not self.held:
            yield
            return
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
