"""Policies: what the configuration says about files, as flags stored in their inodes.

Rules are matched in their order and the first that matches decides: a pattern without `/` against
the name, one with `/` against the path from the root.  A file with several names gets the safer
value of each attribute.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

from qsfs.config import PolicyRule
from qsfs.filesystem.globs import as_text, compile_glob
from qsfs.filesystem.interfaces import Contents
from qsfs.store.schema import Inode, InodeFlag

_LOCAL_ONLY = int(InodeFlag.LOCAL_ONLY)
_ATOMIC_SYNC = int(InodeFlag.ATOMIC_SYNC)
_PINNED_BY_HAND = int(InodeFlag.PINNED_BY_HAND)


class Policies:
    """The compiled rules of one configuration."""

    def __init__(self, rules: Sequence[PolicyRule] = ()) -> None:
        self._rules = [
            (compile_glob(rule.match), "/" in rule.match.rstrip("/"), rule_flags(rule)) for rule in rules
        ]
        self.has_rules = bool(rules)
        self.needs_path = any(by_path for _, by_path, _ in self._rules)
        self.fingerprint = hashlib.sha256(
            repr([(rule.match, int(rule_flags(rule))) for rule in rules]).encode()
        ).digest()
        """Changes when the rules do."""

    def flags(self, name: bytes, path: Callable[[], bytes | None]) -> int:
        """The flags of a regular file of this name; `path` is asked for only if a rule needs it."""
        text = as_text(name)
        whole: str | None = None
        for pattern, by_path, flags in self._rules:
            if by_path:
                if whole is None:
                    whole = as_text(path() or b"")
                if _matches(pattern, whole):
                    return flags
            elif _matches(pattern, text):
                return flags
        return 0


def rule_flags(rule: PolicyRule) -> int:
    """What a rule says, as inode flags."""
    flags = InodeFlag(0)
    if rule.local_only:
        flags |= InodeFlag.LOCAL_ONLY
    if rule.pinned:
        flags |= InodeFlag.PINNED
    if rule.atomic_sync:
        flags |= InodeFlag.ATOMIC_SYNC
    if rule.unavailable == "wait":
        flags |= InodeFlag.WAIT
    if rule.write_through:
        flags |= InodeFlag.WRITE_THROUGH
    if rule.restore_aside:
        flags |= InodeFlag.RESTORE_ASIDE
    return int(flags)


def safer(one: int, other: int) -> int:
    """The safer value of each attribute: uploaded over `local_only`, else set over not set."""
    return (one | other) & ~_LOCAL_ONLY | (one & other & _LOCAL_ONLY)


def settle(contents: Contents, inode: Inode, wanted: int) -> int:
    """The flags that a file can get now on its way to `wanted`; call it before the change that sets them.

    Atomic sync stays until nothing of the file is uncovered; no rule takes a pin away that was set by hand.
    """
    flags = wanted | inode.flags & _PINNED_BY_HAND
    if inode.flags & ~wanted & _ATOMIC_SYNC and contents.has_uncovered(inode.number):
        flags |= _ATOMIC_SYNC
    return flags


def _matches(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.fullmatch(text) is not None
