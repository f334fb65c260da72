"""How a commit and a stream of long writes share the interpreter.

While the thread that commits applies a group, it gives the interpreter up for each row and wants it
back at once.  A thread that keeps wanting it too makes each of these a wake-up of the other, which
takes longer than the row: both get on at a fraction of their speed.  So a long write first lets the
commit do one step undisturbed.  Short requests do not: to wait for a step would cost them more.
"""

from __future__ import annotations

import threading

LONGEST_WAIT_SECONDS = 2e-3


class Turns:
    """Steps of one applying thread (in a `with` block), for which one other thread may wait."""

    def __init__(self) -> None:
        self._applying = False
        self._wanted = False
        self._done = threading.Event()

    def __enter__(self) -> Turns:
        """The applying thread begins."""
        self._applying = True
        return self

    def __exit__(self, *_: object) -> None:
        """The applying thread has done all, or failed."""
        self._applying = False
        self.step_done()

    def step_done(self) -> None:
        """The applying thread has done a step."""
        if self._wanted:
            self._wanted = False
            self._done.set()

    @property
    def waited_for(self) -> bool:
        """Whether a thread waits for a step."""
        return self._wanted

    def give_way(self) -> None:
        """Returns once the applying thread, if there is one, has done a step, or soon in any case."""
        if self._applying:
            self._done.clear()
            self._wanted = True
            self._done.wait(LONGEST_WAIT_SECONDS)
            self._wanted = False
