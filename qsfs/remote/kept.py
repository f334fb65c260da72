"""Which generations a head keeps: the last two published ones and the pinned ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qsfs.format.head import Head, HeadRef, KeptGeneration

RECENT = 2
"""How many published generations are kept without a pin."""


def kept_with(
    kept: Iterable[KeptGeneration],
    published: Sequence[KeptGeneration],
    pins: Mapping[HeadRef, tuple[str, ...]],
) -> tuple[KeptGeneration, ...]:
    """The kept list of the next head.

    `kept` is that of the last published head, `published` the generations published so far by this
    mount with that one the last, `pins` the pins that shall hold from now on, by head.  Heads that
    were sent and never published count for nothing, so two published ones always stay.  A pin on what
    is not kept any more does not bring it back.
    """
    known = {generation.head: generation for generation in (*kept, *published)}
    recent = sorted((generation.head for generation in published), reverse=True)[:RECENT]
    # A mount that has published less than that keeps what it took over.
    recent += sorted((ref for ref in known if ref not in recent), reverse=True)[: RECENT - len(recent)]
    return tuple(
        KeptGeneration(ref, known[ref].time_ns, pins.get(ref, ()))
        for ref in sorted(known)
        if ref in recent or pins.get(ref)
    )


def kept_of_first(found: Head, ref: HeadRef) -> tuple[KeptGeneration, ...]:
    """The kept list of a new owner's first head: all that `found`, named by `ref`, keeps, and itself.

    Whether `found` was published is not known to the new owner, so nothing that it keeps goes.
    """
    return (*found.kept, KeptGeneration(ref, found.time_ns, ()))
