"""POSIX ACLs as the kernel stores them in two extended attributes.

The kernel enforces them; the file system keeps the mode in step and lets new inodes inherit a
directory's default ACL.  The value: version u32 = 2, then entries of tag u16, permissions u16 and
id u32, little-endian, in the order of their tags.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qsfs.filesystem.posix import PosixError

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_VERSION = 2
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32
_TAGS = (_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER)


@dataclass(frozen=True, slots=True)
class AclEntry:
    """Permissions (rwx bits) of one tag; `id` is a user or group, or 2**32 - 1."""

    tag: int
    permissions: int
    id: int


Acl = tuple[AclEntry, ...]
_Combine = Callable[[int, int], int]


def decode(value: bytes) -> Acl:
    """The entries of an attribute's value; EINVAL if it is not a valid ACL, EOPNOTSUPP for its version."""
    if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _ENTRY.size:
        raise PosixError(errno.EINVAL)
    if _HEADER.unpack_from(value)[0] != _VERSION:
        raise PosixError(errno.EOPNOTSUPP)
    acl = tuple(AclEntry(*fields) for fields in _ENTRY.iter_unpack(value[_HEADER.size :]))
    _check(acl)
    return acl


def encode(acl: Acl) -> bytes:
    """The attribute's value."""
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(e.tag, e.permissions, e.id) for e in acl)


def mode_of(acl: Acl, mode: int) -> int:
    """`mode` with the permission bits that go with an access ACL."""
    bits = {entry.tag: entry.permissions for entry in acl}
    group = bits.get(_MASK, bits[_GROUP_OBJ])
    return mode & ~0o777 | bits[_USER_OBJ] << 6 | group << 3 | bits[_OTHER]


def is_minimal(acl: Acl) -> bool:
    """Whether the ACL says no more than a mode can."""
    return len(acl) == 3


def with_mode(acl: Acl, mode: int) -> Acl:
    """An access ACL after a chmod to `mode`."""
    return _masked(acl, lambda _, bits: bits, mode)


def inherit(default: Acl, mode: int) -> tuple[Acl, int]:
    """The access ACL and the mode of a new inode in a directory with this default ACL."""
    acl = _masked(default, lambda old, bits: old & bits, mode)
    return acl, mode_of(acl, mode)


def _masked(acl: Acl, combine: _Combine, mode: int) -> Acl:
    group_tag = _MASK if any(entry.tag == _MASK for entry in acl) else _GROUP_OBJ
    bits = {_USER_OBJ: mode >> 6 & 7, group_tag: mode >> 3 & 7, _OTHER: mode & 7}
    return tuple(
        replace(e, permissions=combine(e.permissions, bits[e.tag])) if e.tag in bits else e for e in acl
    )


def _check(acl: Sequence[AclEntry]) -> None:
    """EINVAL unless tags are known, in order, single where they must be, and complete."""
    tags = [entry.tag for entry in acl]
    named = [(entry.tag, entry.id) for entry in acl if entry.tag in (_USER, _GROUP)]
    single = [tag for tag in tags if tag not in (_USER, _GROUP)]
    complete = {_USER_OBJ, _GROUP_OBJ, _OTHER} <= set(tags) and (not named or _MASK in tags)
    if (
        tags != sorted(tags)
        or not set(tags) <= set(_TAGS)
        or len(single) != len(set(single))
        or len(named) != len(set(named))
        or not complete
        or any(entry.permissions & ~7 for entry in acl)
    ):
        raise PosixError(errno.EINVAL)
