"""How the bound on the cache directory is divided, and what follows from it for groups and waits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qsfs.config import CacheConfig
from qsfs.errors import CacheError
from qsfs.store.schema import PAGE

_SLACK = 2 << 20
_LARGEST_APPEND = 4 << 20
"""Up to here an fsync alone is served sooner by the journal than by a commit, wherever its pages lie.

`scripts/bench --journal` measures it.  What is journalled is written again by its commit, so in unbroken
sequences of such fsyncs a commit for each would be up to a third quicker from 1 MiB on.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds in bytes.  `map_bytes` + `journal_bytes` + `spool_bytes` + slack make the configured size."""

    map_bytes: int
    journal_bytes: int
    spool_bytes: int
    group_bytes: int
    uncovered_bytes: int
    largest_append: int
    high_bytes: int
    low_bytes: int
    full_bytes: int

    @classmethod
    def of(cls, cache: CacheConfig, spool_bytes: int) -> Limits:
        """Divides `cache.size_bytes`; small caches get smaller groups, journal and spool.

        `high_bytes` and `low_bytes` of used LMDB pages start and end eviction; at `new_bytes` whoever
        makes something new waits, at `full_bytes` writers too.  The rest of the map is what commits may
        need before LMDB can reuse what they freed: pages are copied on write, and a transaction cannot
        reuse what it frees itself.
        """
        size = cache.size_bytes
        journal = min(cache.journal_bytes, size // 8)
        spool = min(spool_bytes, size // 4)
        mapped = size - journal - spool - _SLACK
        group = max(1 << 20, min(cache.group_bytes, mapped // 16))
        reserve = 4 * group + (1 << 20)
        full = mapped - reserve
        if full < 4 * group:
            raise CacheError(
                f"[cache] size of {size} bytes is too small to work with; give it at least 32MiB"
            )
        return cls(
            map_bytes=mapped - mapped % PAGE,
            journal_bytes=journal - journal % PAGE,
            spool_bytes=spool,
            group_bytes=group,
            uncovered_bytes=min(cache.uncovered_bytes, mapped // 16),
            largest_append=min(_LARGEST_APPEND, journal // 4),
            high_bytes=int((full - group) * cache.high_watermark),
            low_bytes=int((full - group) * cache.low_watermark),
            full_bytes=full,
        )

    def beside(self, tree_bytes: int) -> Limits:
        """The limits while the branch and leaf pages of all tables take `tree_bytes`.

        A commit copies each of these pages that it changes, in the worst case all, and some changes are
        never refused: chown, unlink and what is recorded of uploads.  They let the trees grow by less than
        half, by change marks.  So twice what the trees take is left free if the usual reserve is less.
        """
        full = min(self.full_bytes, self.map_bytes - 2 * tree_bytes)
        if full == self.full_bytes:
            return self
        least = 2 * self.group_bytes
        full = max(full, least)
        share = (full - self.group_bytes) / (self.full_bytes - self.group_bytes)
        return replace(
            self,
            full_bytes=full,
            high_bytes=int(self.high_bytes * share),
            low_bytes=int(self.low_bytes * share),
        )

    @property
    def stream_bytes(self) -> int:
        """With so much of whole new blocks a group is committed as soon as no other one is."""
        return self.group_bytes // 4

    @property
    def new_bytes(self) -> int:
        """Where room ends for new files; the rest is for what the kernel holds and has promised."""
        return self.full_bytes - self.group_bytes
