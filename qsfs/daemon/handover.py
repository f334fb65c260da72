"""Having the kernel hand over what it holds of a mount, so that the daemon knows of every write."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from qsfs.errors import MountError


def hand_over(mountpoint: Path) -> str:
    """Runs `syncfs`; returns why the kernel could not hand over everything, "" if it could.  Blocks.

    Raises `MountError` if nothing is mounted that can be asked.
    """
    try:
        directory = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise MountError(f"{mountpoint}: {error.strerror}; is it mounted?") from error
    try:
        library = ctypes.CDLL(None, use_errno=True)
        return os.strerror(ctypes.get_errno()) if library.syncfs(directory) else ""
    finally:
        os.close(directory)


def require_handed_over(mountpoint: Path) -> None:
    """As `hand_over`; raises `MountError` also if something could not be handed over."""
    problem = hand_over(mountpoint)
    if problem:
        raise MountError(
            f"{mountpoint}: the kernel could not hand over what programs wrote ({problem}), so a snapshot would lack "
            "it; see 'qsfs status' and the log"
        )
