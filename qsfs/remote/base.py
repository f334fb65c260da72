"""The heads that the local store remembers: its base, and the last one that this machine published.

The *base* is the generation that the local tables descend from: the change marks say what differs
from it, so the next generation builds on it.  The *published* head may be another: a mount that
takes over publishes the newest head as its own first one, which moves no mark.

A store that was restored from an older generation than the newest has that one as its base, and remembers
the newest as what it *returns from*.  It is no mount's: a takeover makes its base the newest first.

Where two copies of a machine had sent heads and a person chose one, the others that there were are *rejected*:
remembered until this machine owns, they count as not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qsfs.errors import Corrupt
from qsfs.format import schema
from qsfs.format.head import Head, HeadRef, SealedHead, head_key, open_head, parse_head_key
from qsfs.format.keys import KeyRing
from qsfs.store.group import COMMIT_KEY, WRITE_NUMBER_KEY
from qsfs.store.schema import plain_u64
from qsfs.store.store import FSID_KEY, Store

BASE_KEY = b"base-head"
PUBLISHED_KEY = b"published-head"
RETURNS_KEY = b"returns-from-head"
REJECTED_KEY = b"rejected-heads"
NEWEST_KEYS = (PUBLISHED_KEY, RETURNS_KEY, BASE_KEY)
"""The first of these that there is names the newest head known here, and the fleets that it lists."""

FIRST_COMMIT = 1
"""The commit that a rebuilt store begins with; its own change marks carry it."""

_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class LocalHead:
    """A head in LOCAL.  `ours`: this machine published it (a restore records a base without that)."""

    sealed: SealedHead
    head: Head
    ours: bool


def encode_local_head(sealed: SealedHead, *, ours: bool) -> bytes:
    """The row of LOCAL."""
    return schema.pack([_SCHEMA, sealed.key, sealed.value, int(ours)])


def decode_local_head(row: bytes, keys: KeyRing) -> LocalHead:
    """The head in a row of LOCAL; `Corrupt` if it is none."""
    what = "head in the local store"
    fields = schema.record(row, _SCHEMA, 4, what)
    key, value, ours = fields.binary(), fields.binary(), fields.integer(0, 1)
    named = parse_head_key(key)
    if named is None:
        raise Corrupt(f"{what}: its key is not one of a head; run 'qsfs fsck'")
    return LocalHead(SealedHead(key, value, named.ref), open_head(key, value, keys), bool(ours))


def local_head(store: Store, name: bytes, keys: KeyRing) -> LocalHead | None:
    """The head that LOCAL holds under `name` (`BASE_KEY`, `PUBLISHED_KEY`, `RETURNS_KEY`), or None.

    Raises `Corrupt` or `FormatMismatch` if it cannot be read.
    """
    row = store.local(name)
    return None if row is None else decode_local_head(row, keys)


def encode_rejected(fsid: bytes, rejected: Iterable[HeadRef]) -> bytes:
    """The row `REJECTED_KEY` of LOCAL."""
    return schema.pack([_SCHEMA, [head_key(fsid, ref) for ref in sorted(rejected)]])


def rejected_heads(store: Store) -> frozenset[HeadRef]:
    """The heads that a person chose against here; they count as not there.

    Raises `Corrupt` or `FormatMismatch` if they cannot be read.
    """
    row = store.local(REJECTED_KEY)
    if row is None:
        return frozenset()
    what = "rejected heads in the local store"
    keys = schema.record(row, _SCHEMA, 2, what).array()
    each = schema.Fields(keys, len(keys), what)
    named = [parse_head_key(each.binary()) for _ in keys]
    if None in named:
        raise Corrupt(f"{what}: one has a key that is not one of a head; run 'qsfs fsck'")
    return frozenset(key.ref for key in named if key is not None)


def record_rejected(store: Store, fsid: bytes, rejected: Iterable[HeadRef]) -> None:
    """Remembers with the open group, in place of any others, which heads a person chose against."""
    store.set_local(REJECTED_KEY, encode_rejected(fsid, rejected))


def base_rows(head: Head, sealed: SealedHead, *, ours: bool) -> dict[bytes, bytes]:
    """The rows of LOCAL of a store that was built from `head`."""
    return {
        FSID_KEY: head.fsid,
        COMMIT_KEY: plain_u64(FIRST_COMMIT),
        # Truncations of the generation cut what was written up to its own number.
        WRITE_NUMBER_KEY: plain_u64(head.write_number + 1),
        BASE_KEY: encode_local_head(sealed, ours=ours),
    }


def record_base(store: Store, sealed: SealedHead, *, ours: bool) -> None:
    """Makes `sealed` the base with the open group; if it is `ours`, also the last one published."""
    store.set_local(BASE_KEY, encode_local_head(sealed, ours=ours))
    if ours:
        record_published(store, sealed)


def record_published(store: Store, sealed: SealedHead) -> None:
    """Takes note, with the open group, that this machine published `sealed`."""
    store.set_local(PUBLISHED_KEY, encode_local_head(sealed, ours=True))
