"""Whether a mount may go on from the newest head found: pure logic.

It may if that head is its base, its last published one, or one that it sent.  Anything else
means that this machine was cloned, rolled back, or taken over from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum

from qsfs.errors import StaleCache
from qsfs.format.head import Head, HeadRef
from qsfs.remote.newest import Judgement, describe_head, short_digest

_RESTORE = (
    "To go on here, stop the other machine for good; then `qsfs restore --set-aside` moves this machine's "
    "state beside the cache and takes the newest generation"
)


@dataclass(frozen=True, slots=True)
class LocalState:
    """What the local store and spool know of heads.

    `base`: the head that the local tables descend from; `published_here`: whether this machine
    published it (a restore records a base without that).  `published`: the last head that this
    machine knows to be published by itself.  `sent`: heads in the spool, which it may have sent.
    `returns`: the older head whose generation the local tables hold, where `base` was the newest when
    they were restored; a takeover makes that generation the newest, and only then it is one to mount.
    """

    base: HeadRef | None
    published_here: bool
    published: HeadRef | None = None
    sent: frozenset[HeadRef] = frozenset()
    returns: HeadRef | None = None

    @property
    def heads(self) -> frozenset[HeadRef]:
        """The heads that may be the newest for this machine to go on."""
        known = (self.base, self.published, *self.sent)
        return frozenset(ref for ref in known if ref is not None)


class Standing(Enum):
    """What the newest head is to this machine."""

    CURRENT = "its base or last published head"
    SENT = "a head that it sent, and whose publication it had not recorded"


def check_mount(
    local: LocalState,
    newest: HeadRef,
    others: frozenset[HeadRef],
    splits: Collection[HeadRef] = (),
    *,
    takeover: bool = False,
) -> Standing:
    """What `newest` is to this machine; `others` are the other heads of its owner that were read, `splits` those of
    them that may be of another line.

    Raises `StaleCache`, with what to do, if the local state is not the newest, if a copy of this machine
    has sent a head since, or if another machine published the base and `takeover` was not asked for.
    """
    if local.base is None:
        raise StaleCache(
            "there is no local state of this file system: `qsfs takeover` restores the newest generation "
            f"({describe_head(newest)}) and goes on from it, once the machine that wrote it is stopped"
        )
    ours = local.heads
    if newest not in ours and local.returns is not None:
        raise StaleCache(
            f"the newest generation on the backends is {describe_head(newest)}, and this machine was restored from "
            f"{describe_head(local.returns)} when it was {describe_head(local.base)}: another machine has published "
            "since. To go on here, stop the other machine for good; then `qsfs restore --set-aside --generation "
            f"{local.returns.generation}` does that again, and `qsfs takeover` makes it the newest"
        )
    if newest not in ours and (mine := max(ours.intersection(splits), default=None)) is not None:
        raise StaleCache(_copied(newest, mine))
    if newest not in ours:
        raise StaleCache(
            f"the newest generation on the backends is {describe_head(newest)}, and this machine goes on "
            "from "
            f"{describe_head(local.base)}: another machine has published since, or this one was cloned or "
            "rolled back. "
            + _RESTORE
        )
    known = [ref for ref in (local.base, local.published) if ref is not None and ref.owner == newest.owner]
    last = max((ref.generation for ref in known), default=-1)
    for ref in sorted(others - ours, reverse=True):
        if ref.generation > last or ref.generation == newest.generation:
            raise StaleCache(_copied(ref, newest))
    if not takeover:
        require_returned(local)
    if newest in local.sent or newest == local.published or local.published_here:
        return Standing.CURRENT if newest in (local.base, local.published) else Standing.SENT
    if not takeover:
        raise StaleCache(
            f"the local state was restored from {describe_head(newest)}, which another machine published. "
            "Stop that machine "
            "(a validator's keys must not run twice), then run `qsfs takeover` once"
        )
    return Standing.CURRENT


def _copied(theirs: HeadRef, mine: HeadRef) -> str:
    return (
        f"{describe_head(theirs)} was sent by a copy of this machine, next to this one's {describe_head(mine)}. Stop "
        "the copy for good, and decide which one is right (`qsfs mount --read-only --head DIGEST` elsewhere shows "
        f"one). `qsfs takeover --head {short_digest(mine)}` goes on here with what this machine has; `qsfs restore "
        f"--set-aside --head {short_digest(theirs)}`, then `qsfs takeover`, with what the copy sent"
    )


def require_returned(local: LocalState) -> None:
    """Raises `StaleCache` if the local tables are an older generation's, which a takeover did not make the newest."""
    if local.returns is None or local.base is None:
        return
    raise StaleCache(
        f"the local state was restored from {describe_head(local.returns)}, which was not the newest: that was "
        f"{describe_head(local.base)}. Stop the machine that wrote it (a validator's keys must not run twice), then "
        "run `qsfs takeover`: it keeps the newest as a snapshot, and makes the older one the newest"
    )


def accept_for_mount(
    local: Callable[[], LocalState], *, takeover: bool = False
) -> Callable[[Head, Judgement], None]:
    """What `own` asks of a mount (or, with `takeover`, of a takeover that has restored).

    `local` is asked each time.  A takeover also refuses where two copies of a machine have sent
    heads (`SplitHeads`).
    """

    def accept(_: Head, judgement: Judgement) -> None:
        if takeover:
            judgement.require_one_line()
        check_mount(local(), judgement.newest, judgement.others, judgement.splits, takeover=takeover)

    return accept


def check_offline(local: LocalState) -> None:
    """Raises `StaleCache` where even an offline mount may not go on: no base, an older one, or another machine's."""
    if local.base is None:
        raise StaleCache("there is no local state of this file system to mount offline; restore it first")
    require_returned(local)
    if not local.published_here:
        raise StaleCache(
            f"the local state was restored from {describe_head(local.base)}, which another machine "
            "published: it needs "
            "`qsfs takeover` once, and that needs the backends"
        )


def offline_warning(local: LocalState) -> str:
    """What an offline mount says, and shows until it owns: what a takeover elsewhere meanwhile would cost."""
    base = "nothing" if local.base is None else describe_head(local.base)
    return (
        "mounted offline: nothing is uploaded until a quorum of backends answers. They know this machine up to "
        f"{base}. If another machine takes over before then, what was written here since is on this disk only: this "
        "mount turns read-only when it notices, and files can be copied out of it"
    )
