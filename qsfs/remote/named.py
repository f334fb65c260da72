"""The metadata packs that must stay: those that the base lists, or a head that may have been sent.

It is asked for each pack that is about to be deleted, and a head may list many thousands: each one is
opened once.
"""

from __future__ import annotations

from collections.abc import Callable

from qsfs.format.head import HeadRef, open_head
from qsfs.format.keys import KeyRing
from qsfs.remote.base import LocalHead
from qsfs.remote.chain import listed_ids
from qsfs.remote.spool import Spool


class NamedPacks:
    """Called: the ids of the metadata packs that `base` and the heads in `spool` list now."""

    def __init__(self, spool: Spool, keys: KeyRing, base: Callable[[], LocalHead]) -> None:
        self._spool = spool
        self._keys = keys
        self._base = base
        self._lists: dict[HeadRef, frozenset[bytes]] = {}
        self._named: frozenset[bytes] = frozenset()

    def __call__(self) -> frozenset[bytes]:
        """The ids.  Raises `Corrupt` and `FormatMismatch` for a spooled head that cannot be read."""
        base = self._base()
        # A copy: a worker thread may store a head meanwhile.
        sent = dict(self._spool.heads)
        if self._lists.keys() != {base.sealed.ref, *sent}:
            lists = {
                ref: self._lists.get(ref) or listed_ids(open_head(sealed.key, sealed.value, self._keys))
                for ref, sealed in sent.items()
            }
            lists[base.sealed.ref] = self._lists.get(base.sealed.ref) or listed_ids(base.head)
            self._lists, self._named = lists, frozenset().union(*lists.values())
        return self._named
