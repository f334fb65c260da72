"""Writes a file system as an older version leaves it when its machine dies: cache directory and backends, as JSON.

    cd CHECKOUT-OF-THAT-VERSION && PYTHONPATH=$PWD python .../tests/system/older_version.py OUTPUT

It needs that version's own `tests.support`.  What it wrote once never changes; a later version gets a file of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import lmdb

from qsfs.clock import FixedClock
from qsfs.format.keys import new_key_file
from tests.support import scratch
from tests.support.daemon import FileSystem
from tests.system.fleet import Inside

PAGE = 4096
SHARDS = (2, 1)
COUNT = 4
NAMESPACES = ("qsfs", "qsfs.control")
SETTINGS: dict[str, Any] = {
    "flush.cut_seconds": "1h",
    "flush.quiet_seconds": 60,
    "flush.full_grace_seconds": 1,
    "mount.xattr": True,
    "policy": [{"match": "*.lmdb", "atomic_sync": True}],
}


def describe(root: Path) -> dict[str, list[Any]]:
    """All that a tree shows, by path: mode, links, size, time of modification, xattrs, contents."""
    found: dict[str, list[Any]] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        about = path.lstat()
        content = ""
        if stat.S_ISLNK(about.st_mode):
            content = str(path.readlink())
        elif stat.S_ISREG(about.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        names = os.listxattr(path, follow_symlinks=False)
        xattrs = {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in sorted(names)}
        size = 0 if stat.S_ISDIR(about.st_mode) else about.st_size
        found[str(path.relative_to(root))] = [about.st_mode, about.st_nlink, size, about.st_mtime_ns, xattrs, content]
    return found


def write(path: Path, data: bytes, at: int = 0) -> None:
    """Writes, and asks for durability."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
    os.pwrite(file, data, at)
    os.fsync(file)
    os.close(file)


def pages(letter: str, count: int) -> bytes:
    """Pages that are each unlike the others."""
    return b"".join(f"{letter}{number}".encode().ljust(PAGE, b".") for number in range(count))


def publish_two(fs: FileSystem) -> None:
    """Two generations: the second changes, adds and removes."""
    root = fs.mountpoint
    (root / "directory").mkdir(mode=0o750)
    write(root / "directory/grün", pages("g", 9) + b"end")
    write(root / "sparse", b"far away", 3 << 20)
    write(root / "gone", pages("x", 3))
    write(root / "cut", pages("c", 8))
    (root / "directory/hard").hardlink_to(root / "sparse")
    (root / "soft").symlink_to("directory/grün")
    os.setxattr(root / "directory/grün", "user.colour", b"\0green")
    write(root / "data.lmdb", pages("d", 6))
    fs.sync()
    (root / "gone").unlink()
    os.truncate(root / "cut", 2 * PAGE + 5)
    write(root / "data.lmdb", pages("e", 2), 2 * PAGE)
    os.mkfifo(root / "directory/fifo", 0o600)
    fs.sync()


def leave_unpublished(fs: FileSystem) -> None:
    """What only this machine has: some of it committed, the rest in the journal alone."""
    root = fs.mountpoint
    write(root / "committed", pages("m", 3))
    time.sleep(2)
    fs.kill()
    fs.configure(cache__group_seconds=60)
    fs.mount()
    write(root / "journal", pages("j", 2))
    write(root / "data.lmdb", pages("f", 1), PAGE)
    os.truncate(root / "committed", PAGE + 1)
    (root / "journal").rename(root / "directory/renamed")
    os.removexattr(root / "directory/grün", "user.colour")
    for name in ("committed", "directory/renamed"):
        write(root / name, b"!", 7)


def packed(data: bytes) -> str:
    """Bytes as text: most of a cache directory's are zero."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def unpacked(text: str) -> bytes:
    """What `packed` was given."""
    return zlib.decompress(base64.b64decode(text))


def dump(fs: FileSystem) -> dict[str, Any]:
    """The cache directory of a machine that died, and what its backends hold: equal values once."""
    compacted = fs.directory / "compacted"
    compacted.mkdir()
    with lmdb.open(str(fs.cache), readonly=True, lock=False) as environment:
        environment.copy(str(compacted), compact=True)
    files = {str(path.relative_to(fs.cache)): path.read_bytes() for path in fs.cache.rglob("*") if path.is_file()}
    files = {name: content for name, content in files.items() if name.startswith(("journal.", "spool/"))}
    files["data.mdb"] = (compacted / "data.mdb").read_bytes()
    values: dict[bytes, int] = {}
    backends = []
    for index in range(COUNT):
        namespaces = {}
        for namespace in NAMESPACES:
            with Inside(fs.servers, index, namespace) as inside:
                held = inside.values()
            namespaces[namespace] = {key.hex(): values.setdefault(value, len(values)) for key, value in held.items()}
        backends.append(namespaces)
    return {
        "key_file": (fs.directory / "qsfs.key").read_text(),
        "cache": {name: packed(content) for name, content in files.items()},
        "values": [packed(value) for value in values],
        "backends": backends,
    }


def main(output: Path) -> None:
    """Makes it, and writes it down."""
    scratch.begin_session()
    try:
        with (
            scratch.scratch_directory("older") as directory,
            FileSystem(directory, shards=SHARDS, count=COUNT, settings=SETTINGS | {"cache.group_seconds": 0.3}) as fs,
        ):
            # The test key that is also in format-1.json.
            (fs.directory / "qsfs.key").write_text(new_key_file(FixedClock(10).random_bytes))
            fs.format()
            fs.mount()
            publish_two(fs)
            published = describe(fs.mountpoint)
            leave_unpublished(fs)
            tree = describe(fs.mountpoint)
            fs.kill()
            found = {**dump(fs), "published": published, "tree": tree}
    finally:
        scratch.end_session()
    output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
