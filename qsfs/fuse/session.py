"""One FUSE session: mount, tune, serve until unmounted, clean up."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import trio

from qsfs.config import MountConfig
from qsfs.errors import MountError
from qsfs.fuse import attach, loop, tuning
from qsfs.fuse.generations import GenerationOperations
from qsfs.fuse.operations import Operations

log = logging.getLogger(__name__)


def _is_asked_for(record: logging.LogRecord) -> bool:
    """Whether a record of pyfuse3 is worth a look.

    It calls it an error if an answer finds no request any more: the kernel gives up what is under way,
    RELEASE above all, when a mount ends.
    """
    return "fuse_reply" not in str(record.msg) or record.args != (os.strerror(errno.ENOENT),)


logging.getLogger("pyfuse3").addFilter(_is_asked_for)


def mount_options(config: MountConfig, *, read_only: bool = False) -> set[str]:
    """Options for libfuse.

    The kernel sets no access time of a FUSE file system: `noatime` only tells that we do not either.
    Set-id programs and devices work as on any disk that root mounts.
    """
    options = {"fsname=qsfs", "subtype=qsfs"}
    if not config.relatime:
        options.add("noatime")
    options |= {"suid", "dev"} if os.geteuid() == 0 else {"nosuid", "nodev"}
    if config.default_permissions:
        options.add("default_permissions")
    if config.allow_other:
        options.add("allow_other")
    if read_only:
        options.add("ro")
    return options


async def serve(
    operations: Operations | GenerationOperations,
    mountpoint: Path,
    config: MountConfig,
    *,
    read_only: bool = False,
    mounted: Callable[[], None] = lambda: None,
) -> None:
    """Mounts, calls `mounted`, and answers requests until the mount is gone or the task is cancelled.

    A cancelled session unmounts; one that ends with another exception leaves the mount dead but
    visible, so that nobody writes into the empty directory below.  Raises `MountError`.
    """
    options = mount_options(config, read_only=read_only)
    attachment = attach.Attachment(mountpoint, options) if config.xattr and os.geteuid() == 0 else None
    try:
        pyfuse3.init(operations, attachment.name if attachment else str(mountpoint), options)
    except RuntimeError as error:
        if attachment is not None:
            attachment.detach()
        raise MountError(
            f"{mountpoint}: cannot be mounted ({error}); check that it is an empty directory, that /dev/fuse "
            "exists and that you may mount"
        ) from error
    unmount = True
    try:
        async with trio.open_nursery() as nursery:
            operations.attributes_changed = AttributeRefresh(nursery).refresh
            nursery.start_soon(_when_initialized, operations, mountpoint, config, mounted)
            with loop.installed(config.short_loop):
                await pyfuse3.main(max_tasks=config.max_tasks)
            nursery.cancel_scope.cancel()
    except BaseException as error:
        unmount = _is_cancellation(error)
        raise
    finally:
        if unmount and attachment is not None:
            attachment.detach()
        pyfuse3.close(unmount=unmount)


async def _when_initialized(
    operations: Operations | GenerationOperations, mountpoint: Path, config: MountConfig, mounted: Callable[[], None]
) -> None:
    """Tunes once the session is agreed on: until then the kernel would set readahead again."""
    await operations.initialized.wait()
    try:
        device = tuning.find_device(mountpoint)
        if device is not None:
            tuning.tune(device, read_ahead_kb=config.read_ahead_kb, max_background=config.max_background)
    except Exception:
        log.exception("%s: the kernel's settings for the mount stay as they are", mountpoint)
    mounted()


def _is_cancellation(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_cancellation, error.exceptions))
    return isinstance(error, trio.Cancelled)


class AttributeRefresh:
    """Lets the kernel ask again for attributes that changed behind its back, from a thread.

    The call that tells the kernel may block, so it must never run on the event loop.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def refresh(self, number: int) -> None:
        """Returns at once; the kernel is told soon."""
        self._nursery.start_soon(self._tell, number)

    async def _tell(self, number: int) -> None:
        try:
            await trio.to_thread.run_sync(_invalidate, number, abandon_on_cancel=True)
        except OSError as error:
            log.debug("inode %d: the kernel need not ask again: %s", number, error)
        except Exception:
            log.exception("inode %d: the kernel was not told that its attributes changed", number)


def _invalidate(number: int) -> None:
    pyfuse3.invalidate_inode(number, attr_only=True)
