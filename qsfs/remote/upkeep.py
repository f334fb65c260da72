"""Upkeep of written packs: second looks, missing shards, shards of packs that were given up or are dead,
packs of which little lives.

Each is a task of its own: what one of them waits for from backends must not hold up the others, by which
pages become evictable.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from qsfs.errors import QsfsError
from qsfs.remote.collect import AbandonedCollector
from qsfs.remote.complete import Completer
from qsfs.remote.context import FlushContext
from qsfs.remote.dead_packs import DeadPackCollector
from qsfs.remote.rewrite import Rewriter
from qsfs.remote.second_look import SecondLook
from qsfs.remote.shards import ShardReader

_log = logging.getLogger(__name__)

UPKEEP_SECONDS = 1.0
_LOOKS_A_ROUND = 32
_COMPLETIONS_A_ROUND = 2


async def every_second(work: Callable[[], Awaitable[None]], failed: Callable[[QsfsError], None]) -> None:
    """Does `work` again and again, until cancelled; `failed` hears of errors that are not bugs."""
    while True:
        await trio.sleep(UPKEEP_SECONDS)
        try:
            await work()
        except QsfsError as error:
            failed(error)


class Upkeep:
    """Looks after the packs of one mount.

    `short_of_room` says whether the cache is.  `named` gives the ids of packs that heads list.
    """

    def __init__(
        self,
        context: FlushContext,
        reader: ShardReader,
        *,
        short_of_room: Callable[[], bool],
        named: Callable[[], frozenset[bytes]],
        owner_epoch: Callable[[], int],
        retention_seconds: float,
        rewrite_below: float,
    ) -> None:
        """What the spool has given up by now was given up before this mount published its first head."""
        self.problem = ""
        self._context = context
        self._short_of_room = short_of_room
        self._named = named
        self._owner_epoch = owner_epoch
        self._completer = Completer(context, reader)
        self._second_look = SecondLook(context)
        self._collector = AbandonedCollector(context)
        self.dead = DeadPackCollector(
            context, reader, retention_seconds=retention_seconds, named=named, owner_epoch=owner_epoch
        )
        self.rewriter = Rewriter(context, reader, share=rewrite_below, short_of_room=short_of_room)
        self._abandoned = self.given_up()

    @property
    def found_missing(self) -> int:
        """Shards that backends had acknowledged and lost, since the start."""
        return self._second_look.found_missing

    def given_up(self) -> frozenset[bytes]:
        """The ids of packs that were given up so far."""
        return frozenset(pack.pack_id for pack in self._context.spool.abandoned)

    def published(self, given_up: frozenset[bytes]) -> None:
        """Takes note that a head was published after these packs were given up: they may be deleted."""
        self._abandoned = given_up

    async def run(self) -> None:
        """Works until cancelled."""
        async with trio.open_nursery() as nursery:
            for work in (self._look, self._complete, self._collect, self.dead.work, self.rewriter.work):
                nursery.start_soon(every_second, work, self._failed)

    def _failed(self, error: QsfsError) -> None:
        if str(error) != self.problem:
            _log.error("upkeep of written packs: %s", error)
        self.problem = str(error)

    async def _look(self) -> None:
        await self._second_look.look(_LOOKS_A_ROUND, written_too=self._short_of_room())

    async def _complete(self) -> None:
        if self._context.ledger.incomplete and self._context.uploader.enough_backends():
            await self._completer.complete_packs(_COMPLETIONS_A_ROUND)

    async def _collect(self) -> None:
        known = self._abandoned
        done = not known or await self._collector.collect(known, self._named(), self._owner_epoch())
        if done and self._abandoned is known:
            self._abandoned = frozenset()
