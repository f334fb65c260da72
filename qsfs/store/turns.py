"""How a commit and a stream of long writes share the interpreter.

While the thread that commits applies a group, it gives the interpreter up for each row and wants it
back at once.  A thread that keeps wanting it too makes each of these a wake-up of the other, which
takes longer than the row: both get on at a fraction of their speed.  So a long write first lets the
commit work undisturbed for a moment, and then has the interpreter for itself: the commit does not go
on before the next long write, unless that takes long.  Short requests neither wait nor stop a commit.
"""

from __future__ import annotations

import threading

COMMIT_SECONDS = 2e-3
WRITE_SECONDS = 2e-3


class Turns:
    """The turns of one applying thread (in a `with` block) and one other thread."""

    def __init__(self) -> None:
        self._applying = False
        self._over = threading.Event()
        self._turn = threading.Event()
        self._turn.set()

    def __enter__(self) -> Turns:
        """The applying thread begins."""
        self._over.clear()
        self._applying = True
        return self

    def __exit__(self, *_: object) -> None:
        """The applying thread has done all, or failed."""
        self._applying = False
        self._turn.set()
        self._over.set()

    def step_done(self) -> None:
        """The applying thread may be stopped here, between two of its steps, while a long write is served."""
        if not self._turn.is_set() and not self._turn.wait(WRITE_SECONDS):
            self._turn.set()

    def give_way(self) -> None:
        """Returns once all is applied, or the applying thread has had its turn."""
        if self._applying:
            self._turn.set()
            if not self._over.wait(COMMIT_SECONDS):
                self._turn.clear()
