"""Waking what waits for backends: one task, however many wait, and none while nothing does.

Whoever waits is asleep.  While anyone is, backends that do not answer are probed about once a
second each, and sleepers are woken by what comes back; besides, one sleeper a round looks again at
everything, so that nothing sleeps forever on an answer that has since become wrong.
"""

from __future__ import annotations

import logging
from typing import Protocol

import trio

from qsfs.remote.members import Members, State

log = logging.getLogger(__name__)

ROUND_SECONDS = 1.0
PROBE_SECONDS = 10.0
LONGEST_PAUSE = 15.0


class Sleeper(Protocol):
    """Something that waits for backends."""

    def unknown(self) -> set[int]:
        """The backends, by number, whose answer it lacks."""
        ...

    def wake(self, members: set[int] | None) -> None:
        """Asks these backends again (None: all)."""
        ...


class Watch:
    """The sleepers, and the task that wakes them."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._sleepers: dict[Sleeper, float] = {}
        self._pauses: dict[Sleeper, float] = {}
        self._news = trio.Event()
        self._probing: set[int] = set()

    def __len__(self) -> int:
        return len(self._sleepers)

    def park(self, sleeper: Sleeper) -> None:
        """Takes a sleeper in.  One that comes again without having got on is woken ever less often."""
        pause = min(LONGEST_PAUSE, 2 * self._pauses.get(sleeper, ROUND_SECONDS / 2))
        self._pauses[sleeper] = pause
        self._sleepers[sleeper] = trio.current_time() + pause
        self._news.set()

    def progress(self, sleeper: Sleeper) -> None:
        """Takes note that a sleeper got on: its next pause is short again."""
        self._pauses.pop(sleeper, None)

    def leave(self, sleeper: Sleeper) -> None:
        """Forgets a sleeper."""
        self._sleepers.pop(sleeper, None)

    def forget(self, sleeper: Sleeper) -> None:
        """Forgets a sleeper for good."""
        self._sleepers.pop(sleeper, None)
        self._pauses.pop(sleeper, None)

    async def run(self) -> None:
        """Wakes sleepers until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                if not self._sleepers:
                    self._news = trio.Event()
                    await self._news.wait()
                for member in self._members:
                    if member.state is not State.UP and member.number not in self._probing:
                        self._probing.add(member.number)
                        nursery.start_soon(self._probe, member.number)
                self._wake()
                self._news = trio.Event()
                await trio.sleep(ROUND_SECONDS)

    async def _probe(self, number: int) -> None:
        try:
            member = self._members.by_number(number)
            if member is None:
                return
            with trio.move_on_after(PROBE_SECONDS):
                await member.probe()
            if member.state is State.UP:
                self._wake()
        except Exception:
            log.exception("probing backend %d failed unexpectedly", number)
        finally:
            self._probing.discard(number)

    def _wake(self) -> None:
        """Wakes those to whom a backend that is up owes an answer, and the one that slept longest."""
        now = trio.current_time()
        up = {member.number for member in self._members if member.state is State.UP}
        for sleeper, not_before in list(self._sleepers.items()):
            useful = sleeper.unknown() & up
            if useful and now >= not_before:
                del self._sleepers[sleeper]
                sleeper.wake(useful)
        oldest = next(iter(self._sleepers), None)
        if oldest is not None and now >= self._sleepers[oldest]:
            del self._sleepers[oldest]
            oldest.wake(None)
