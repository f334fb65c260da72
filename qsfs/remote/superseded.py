"""Deleting heads and owner records that a published head has superseded.

Without that they would pile up, one for each generation, and every reading would list them all.
A head may go once a newer one is published that does not keep it: nobody may mount it any more,
whatever another mount, a copy of this machine or a restore does meanwhile.  So the decision needs
no agreement, and a late deletion by a mount that was taken over from does no harm either.
"""

from __future__ import annotations

from collections.abc import Collection, Container

import trio

from qsfs import failpoints
from qsfs.errors import BackendError
from qsfs.format.head import Head, HeadRef, Owner, head_key
from qsfs.format.owner import owner_key
from qsfs.remote.control import Listing, Reading
from qsfs.remote.members import Member, Members

MOST_AT_ONCE = 64
"""Keys deleted on one backend after one published head."""


def superseded(
    listing: Listing, head: Head, published: HeadRef, written: Container[HeadRef]
) -> tuple[list[Owner], list[HeadRef]]:
    """The owner records and heads among those listed that the published head has superseded, oldest first.

    A backend that does not hold the published head keeps all.  What is newer stays; so do the kept
    heads, and heads of this owner that are not among `written`: they show that a copy of this machine
    ran.
    """
    if published not in listing.heads:
        return [], []
    kept = {generation.head for generation in head.kept}
    older = [ref for ref in listing.heads if ref.owner < published.owner]
    older += [
        ref
        for ref in listing.heads
        if ref.owner == published.owner and ref.generation < published.generation and ref in written
    ]
    owners = sorted(owner for owner in listing.owners if owner < published.owner)
    heads = sorted(ref for ref in older if ref not in kept)
    return owners[:MOST_AT_ONCE], heads[: MOST_AT_ONCE - len(owners[:MOST_AT_ONCE])]


async def delete_superseded(
    members: Members,
    readings: Collection[Reading],
    head: Head,
    published: HeadRef,
    written: Collection[HeadRef],
    *,
    seconds: float,
) -> None:
    """Deletes on each backend what its reading lists and `published`, that is `head`, has superseded.

    Raises nothing: what is not deleted now is listed, and deleted, after a later head.
    """

    async def clean(member: Member, keys: list[bytes]) -> None:
        try:
            for key in keys:
                await member.control.delete(key)
                failpoints.hit("publish.superseded")
                if member.index is not None:
                    member.index.keys.discard(key)
        except BackendError as error:
            member.failed(error)

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for reading in readings:
                member = members.by_number(reading.number)
                if member is None:
                    continue
                owners, heads = superseded(reading.listing, head, published, written)
                keys = [owner_key(head.fsid, owner) for owner in owners]
                keys += [head_key(head.fsid, ref) for ref in heads]
                if keys:
                    nursery.start_soon(clean, member, keys)
