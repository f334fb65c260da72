"""Asks backends that do not answer, were long quiet, or have not shown who they are, for their identity."""

from __future__ import annotations

import trio

from qsfs.errors import BackendUnavailable
from qsfs.format.keys import KeyRing
from qsfs.remote.identity import identify
from qsfs.remote.members import Member, Members

_ROUND_SECONDS = 1.0
_ASK_SECONDS = 10.0


async def probe(members: Members, keys: KeyRing) -> None:
    """Probes until cancelled: one that dies or comes back is noticed whether or not it is needed now."""
    asking: set[int] = set()

    async def ask(member: Member) -> None:
        try:
            with trio.move_on_after(_ASK_SECONDS) as scope:
                await identify(member, keys)
            if scope.cancelled_caught:
                member.failed(BackendUnavailable(f"backend {member.name}: no answer in {_ASK_SECONDS:g} s"))
        finally:
            asking.discard(member.number)

    async with trio.open_nursery() as nursery:
        while True:
            due = {member.number: member for member in members.due()}
            due.update({m.number: m for m in members if not m.identified and m.ready})
            for number, member in due.items():
                if number not in asking:
                    asking.add(number)
                    nursery.start_soon(ask, member)
            await trio.sleep(_ROUND_SECONDS)
