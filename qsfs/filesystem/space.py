"""What `df` shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SpaceReport:
    """Usable size of the file system.

    `total_bytes` is what the backends can hold of application data, `free_bytes` what of it is
    still free; `files` counts inodes.
    """

    total_bytes: int
    free_bytes: int
    files: int
    free_files: int
