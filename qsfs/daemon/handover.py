"""Having the kernel hand over what it holds of a mount, so that the daemon knows of every write.

In a process of its own: nothing can interrupt a `syncfs` whose pages wait for room in the cache.  A thread
of the daemon in it would outlive the daemon's own death and keep /dev/fuse open, so that the mount hung.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from qsfs.errors import DeadlineExceeded, MountError

_CHILD = """
import ctypes, os, sys
try:
    directory = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
except OSError as error:
    sys.exit(f"open {error.errno}")
failed = ctypes.CDLL(None, use_errno=True).syncfs(directory)
sys.exit(f"syncfs {ctypes.get_errno()}" if failed else 0)
"""
"""Ends with code 0, or says on standard error which call failed, and how."""


def hand_over(mountpoint: Path, seconds: float | None = None) -> str:
    """Runs `syncfs`; returns why the kernel could not hand over everything, "" if it could.

    Blocks; with `seconds` for at most so long.  Raises `DeadlineExceeded` then, and `MountError` if nothing is
    mounted that can be asked.
    """
    command = [sys.executable, "-I", "-S", "-c", _CHILD, str(mountpoint)]
    silent = subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            command, stdin=silent, stdout=silent, stderr=subprocess.PIPE, close_fds=True, start_new_session=True
        )
    except OSError as error:
        raise MountError(f"{command[0]}: cannot be run to have the kernel hand its pages over: {error}") from error
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(
            f"{mountpoint}: the kernel could not hand its pages over within {seconds:g} s, so nothing is certain yet: "
            "writes wait for room in the cache; 'qsfs status' says what for"
        ) from error
    if not process.returncode:
        return ""
    call, _, number = said.decode("ascii", "replace").strip().partition(" ")
    if not number.isdigit():
        return f"what asks it ended with code {process.returncode}"
    if call == "open":
        raise MountError(f"{mountpoint}: {os.strerror(int(number))}; is it mounted?")
    return os.strerror(int(number))


def require_handed_over(mountpoint: Path, seconds: float | None = None) -> None:
    """As `hand_over`; raises `MountError` also if something could not be handed over."""
    problem = hand_over(mountpoint, seconds)
    if problem:
        raise MountError(
            f"{mountpoint}: the kernel could not hand over what programs wrote ({problem}), so no generation and no "
            "snapshot has it; 'qsfs status' and the log say why: mend that and have it written again"
        )
