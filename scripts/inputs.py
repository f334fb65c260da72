"""What `scripts/quickstart` puts on the file system, and how it proves that all of it came back.

Each input knows how to write itself, how to grow, and how to check itself from the inside (`git
fsck`, an integrity check, every entry).  `manifest` compares from the outside: every byte, mode
and time of every file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sysconfig
from pathlib import Path

import lmdb

MAP_SIZE = 1 << 40
ENTRIES_PER_COMMIT = 4
# Local by policy: a restore brings back an empty one.
LOCAL_ONLY = ("*.lmdb-lock", "lock.mdb")


class Mismatch(Exception):
    """What was read back is not what was written."""


def git_clone(source: Path, target: Path) -> str:
    """Clones the repository at `source`, or makes one of its files; tells how many objects it has."""
    if (source / ".git").exists():
        _run("git", "clone", "--quiet", "--no-local", str(source), str(target))
    else:
        target.mkdir()
        shutil.copytree(source / "qsfs", target / "qsfs", ignore=shutil.ignore_patterns("__pycache__"))
        _run("git", "-C", str(target), "init", "--quiet")
        _run("git", "-C", str(target), "add", "--all")
        author = ("-c", "user.name=quickstart", "-c", "user.email=quickstart@localhost")
        _run("git", "-C", str(target), *author, "commit", "--quiet", "--message", "Everything")
    return git_check(target)


def git_check(target: Path) -> str:
    """`git fsck`, and a working tree that is as committed."""
    _run("git", "-C", str(target), "fsck", "--full", "--strict", "--no-progress")
    if changed := _run("git", "-C", str(target), "status", "--porcelain"):
        raise Mismatch(f"git sees changes in {target}: {changed.splitlines()[0]}")
    lines = _run("git", "-C", str(target), "count-objects", "-v").splitlines()
    counted = dict(line.split(": ") for line in lines)
    return f"{int(counted['count']) + int(counted['in-pack']):,} objects"


def sqlite_grow(file: Path, transactions: int) -> str:
    """Adds `transactions` transactions of ten rows, each durable before the next."""
    connection = sqlite3.connect(file, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE IF NOT EXISTS entry (id INTEGER PRIMARY KEY, content BLOB)")
        (first,) = connection.execute("SELECT coalesce(max(id), 0) + 1 FROM entry").fetchone()
        for start in range(first, first + transactions * 10, 10):
            connection.execute("BEGIN")
            rows = [(number, _content(number)) for number in range(start, start + 10)]
            connection.executemany("INSERT INTO entry VALUES (?, ?)", rows)
            connection.execute("COMMIT")
    finally:
        connection.close()
    return f"{transactions:,} transactions"


def sqlite_check(file: Path, transactions: int) -> str:
    """SQLite's own check, and every row."""
    connection = sqlite3.connect(file)
    try:
        (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
        if verdict != "ok":
            raise Mismatch(f"{file}: {verdict}")
        count = 0
        for number, content in connection.execute("SELECT id, content FROM entry ORDER BY id"):
            count += 1
            if number != count or content != _content(number):
                raise Mismatch(f"{file}: row {number} is not what was written")
    finally:
        connection.close()
    if count != transactions * 10:
        raise Mismatch(f"{file}: {count} rows instead of {transactions * 10}")
    return f"{count:,} rows"


def lmdb_grow(file: Path, commits: int) -> str:
    """Adds `commits` commits to an environment opened as a Casper node opens its store."""
    with _environment(file) as environment:
        with environment.begin() as transaction:
            first = transaction.stat()["entries"]
        for start in range(first, first + commits * ENTRIES_PER_COMMIT, ENTRIES_PER_COMMIT):
            with environment.begin(write=True) as transaction:
                for number in range(start, start + ENTRIES_PER_COMMIT):
                    transaction.put(_key(number), _content(number))
    return f"{commits:,} commits"


def lmdb_check(file: Path, commits: int) -> str:
    """Every entry, and no other."""
    wanted = commits * ENTRIES_PER_COMMIT
    with _environment(file) as environment, environment.begin() as transaction:
        if (count := transaction.stat()["entries"]) != wanted:
            raise Mismatch(f"{file}: {count} entries instead of {wanted}")
        for number in range(wanted):
            if transaction.get(_key(number)) != _content(number):
                raise Mismatch(f"{file}: entry {number} is not what was written")
    return f"{wanted:,} entries"


def library_copy(target: Path) -> str:
    """Copies Python's standard library."""
    shutil.copytree(library(), target, symlinks=True, ignore=not_copied)
    return library_check(target)


def library_check(target: Path) -> str:
    """Compares the copy with what is installed, byte by byte."""
    there, here = manifest(library(), ignore=not_copied), manifest(target)
    different = compare(there, here)
    if different:
        raise Mismatch(f"{target}: {different}")
    return f"{len(here):,} files and directories"


def library() -> Path:
    """Where Python's standard library lies."""
    return Path(sysconfig.get_path("stdlib"))


def manifest(root: Path, ignore=None) -> dict[str, tuple]:
    """Type, mode, time, size and SHA-256 of everything below `root`, by path."""
    found: dict[str, tuple] = {}
    for place, directories, files in os.walk(root):
        skipped = ignore(place, [*directories, *files]) if ignore else set()
        directories[:] = [name for name in directories if name not in skipped]
        for name in directories + [name for name in files if name not in skipped]:
            path = Path(place, name)
            if any(path.match(pattern) for pattern in LOCAL_ONLY):
                continue
            status = path.lstat()
            if path.is_symlink():
                found[str(path.relative_to(root))] = (status.st_mode, str(path.readlink()))
            elif path.is_dir():
                found[str(path.relative_to(root))] = (status.st_mode,)
            else:
                found[str(path.relative_to(root))] = (
                    status.st_mode, status.st_mtime_ns, status.st_size, _digest(path)
                )  # fmt: skip
    return found


def compare(wanted: dict[str, tuple], found: dict[str, tuple]) -> str:
    """Says the first difference, or nothing."""
    for path in wanted.keys() - found.keys():
        return f"{path} is missing"
    for path in found.keys() - wanted.keys():
        return f"{path} was not there before"
    for path, entry in wanted.items():
        if found[path] != entry:
            return f"{path} is different: {found[path]} instead of {entry}"
    return ""


def total_bytes(entries: dict[str, tuple]) -> int:
    """The bytes in the files of a manifest, a database counted by what it uses."""
    return sum(entry[3][1] for entry in entries.values() if len(entry) == 4)


def _digest(path: Path) -> tuple[str, int]:
    """SHA-256 and length; of a database that is mostly a hole, of the part in use."""
    digest, length = hashlib.sha256(), 0
    limit = _used(path) if path.suffix == ".lmdb" else None
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(1 << 20 if limit is None else min(1 << 20, limit - length)):
            digest.update(piece)
            length += len(piece)
    return digest.hexdigest(), length


def _used(file: Path) -> int:
    with lmdb.open(str(file), subdir=False, readonly=True, lock=False, create=False) as environment:
        used: int = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        return used


def _environment(file: Path) -> lmdb.Environment:
    return lmdb.open(
        str(file), subdir=False, map_size=MAP_SIZE, writemap=True, readahead=False, max_readers=5, max_dbs=0
    )


def _key(number: int) -> bytes:
    return hashlib.sha256(b"key %d" % number).digest()


def _content(number: int) -> bytes:
    """100 to 1,100 bytes that follow from the number."""
    return hashlib.shake_256(b"content %d" % number).digest(100 + number * 37 % 1000)


def not_copied(place: str, names: list[str]) -> set[str]:
    """What of the library is left out: caches, and what was installed later."""
    return {name for name in names if name in ("__pycache__", "site-packages", "dist-packages")}


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Mismatch(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
