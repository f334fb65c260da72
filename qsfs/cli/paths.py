"""Paths that a person gives, as paths from the root of the mounted file system."""

from __future__ import annotations

import os
from pathlib import Path

from qsfs.errors import ConfigError


def on_mount(mountpoint: Path, given: str) -> str:
    """The path of `given` from the mount point's root ("": the root itself).

    Symbolic links on the way are followed, also into the mount; the last component is not: it is what is
    meant.  What does not begin with `/` is taken from the working directory where that leads onto the mount, else
    from the mount point.  Raises `ConfigError` for what lies elsewhere.
    """
    root = os.path.realpath(mountpoint)
    base = os.path.realpath(".")
    if not Path(given).is_absolute() and not _below(root, base):
        from_here = os.path.realpath(os.path.join(base, os.path.dirname(given)))  # noqa: PTH118, PTH120
        if not _below(root, from_here):
            base = root
    whole = os.path.join(base, given)  # noqa: PTH118 - `Path` would drop a final `..` or `.`
    head, tail = os.path.split(whole.rstrip("/") or "/")
    found = os.path.realpath(whole) if tail in ("", ".", "..") else os.path.join(os.path.realpath(head), tail)  # noqa: PTH118
    if not _below(root, found) and _below(root, os.path.realpath(found)):
        found = os.path.realpath(found)
    if not _below(root, found):
        raise ConfigError(f"{given}: lies outside the mount point {mountpoint}")
    return found[len(root) :].lstrip("/")


def _below(root: str, path: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
