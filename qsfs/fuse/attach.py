"""Mounts by mount(2), where libfuse cannot say what is wanted; libfuse then only gets the open /dev/fuse.

What it cannot say is `posixacl`: that the kernel leaves the umask to us, because only we know whether a default
ACL takes its place.  It takes root; a mount without ACLs goes through libfuse.
"""

from __future__ import annotations

import ctypes
import os
import select
from collections.abc import Set as AbstractSet
from pathlib import Path

from qsfs.errors import MountError

_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noatime": 1 << 10}
_PASSED_ON = ("default_permissions", "allow_other")
_POSIXACL = 1 << 16
_MNT_DETACH = 2
_DEVICE = "/dev/fuse"


class Attachment:
    """A mount of an open /dev/fuse, to be served by whoever is given `name` as its mount point."""

    def __init__(self, mountpoint: Path, options: AbstractSet[str]) -> None:
        """Mounts with the `options` that libfuse would get.  Raises `MountError`."""
        self._mountpoint = os.fsencode(mountpoint.absolute())
        self._call = ctypes.CDLL(None, use_errno=True)
        try:
            self._device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise MountError(f"{_DEVICE}: {error.strerror}; load the fuse module ('modprobe fuse')") from error
        named = dict(option.split("=", 1) for option in options if "=" in option)
        flags = sum(bit for option, bit in _FLAGS.items() if option in options) | _POSIXACL
        data = [f"fd={self._device}", "rootmode=40000", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
        data += [option for option in _PASSED_ON if option in options]
        if self._call.mount(
            named["fsname"].encode(),
            self._mountpoint,
            f"fuse.{named['subtype']}".encode(),
            ctypes.c_ulong(flags),
            ",".join(data).encode(),
        ):
            reason = os.strerror(ctypes.get_errno())
            os.close(self._device)
            raise MountError(f"{mountpoint}: cannot be mounted ({reason}); check that it is an empty directory")

    @property
    def name(self) -> str:
        """What libfuse takes for a mount point that is mounted already; it closes the device in the end."""
        return f"/dev/fd/{self._device}"

    def detach(self) -> None:
        """Unmounts unless somebody has: then another mount may be there.  Call before libfuse closes the device."""
        poll = select.poll()
        poll.register(self._device, 0)
        if not any(events & select.POLLERR for _, events in poll.poll(0)):
            self._call.umount2(self._mountpoint, _MNT_DETACH)
