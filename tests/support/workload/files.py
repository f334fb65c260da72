"""Plain files and names: created, written, truncated, renamed, linked, removed, each followed by its fsyncs.

Options: `sync_every` N operations, after which all files and directories that they touched are synced and the
last operation is acknowledged; `largest` write in bytes; `grain`, see below.  A step is one operation.

What is promised of the tree that a crash leaves: the names are as after one of the operations, from the last
acknowledged on.  A file holds in each `grain` bytes (4096; on a bare disk 512, its sector) what it held there
after one of its writes since it was synced.  So with `sync_every` 1 only the last operation may be there in
part.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.support.workload.acks import Acks, Promises
from tests.support.workload.tree import Entry, File, Link, Operation, Tree


def run(
    directory: Path,
    acks: Acks,
    steps: Iterable[int],
    seed: str,
    *,
    sync_every: int = 1,
    largest: int = 60_000,
    grain: int = 4096,
) -> None:
    """Does the operations, and acknowledges them once the fsyncs that make them durable returned.

    `grain` is for the verifier, which finds it in the ack file.
    """
    tree = Tree()
    touched: list[Operation] = []
    changed: list[File] = []
    for step in steps:
        operation = tree.next(seed, step, largest)
        acks.begin(step)
        _perform(directory, operation)
        tree.apply(operation)
        touched.append(operation)
        if isinstance(entry := tree.entries.get(operation.to or operation.path), File):
            changed.append(entry)
        if len(touched) >= sync_every:
            _sync(directory, tree, touched, changed)
            acks.ack(step)
            touched.clear()
            changed.clear()


def verify(directory: Path, promises: Promises) -> list[str]:
    """Compares the tree with all that it may be."""
    largest = promises.options.get("largest", 60_000)
    tree = Tree()
    for number in range(promises.acked + 1):
        tree.apply(tree.next(promises.seed, number, largest))
    for path in tree.files():
        tree.file(path).past.clear()
    states = [dict(tree.entries)]
    for number in range(promises.acked + 1, promises.begun + 1):
        tree.apply(tree.next(promises.seed, number, largest))
        states.append(dict(tree.entries))
    found = _scan(directory)
    closest: list[str] | None = None
    for after, entries in enumerate(states, promises.acked):
        problems = list(_compare_names(entries, found, after))
        if not problems:
            return list(_compare_contents(directory, entries, promises.options.get("grain", 4096)))
        if closest is None or len(problems) < len(closest):
            closest = problems
    return closest or []


def _perform(directory: Path, operation: Operation) -> None:
    path = directory / operation.path
    match operation.kind:
        case "mkdir":
            path.mkdir()
        case "rmdir":
            path.rmdir()
        case "unlink":
            path.unlink()
        case "symlink":
            path.symlink_to(operation.to)
        case "rename":
            path.rename(directory / operation.to)
        case "link":
            (directory / operation.to).hardlink_to(path)
        case "truncate":
            os.truncate(path, operation.size)
        case _:
            flags = os.O_CREAT | os.O_EXCL if operation.kind == "create" else 0
            descriptor = os.open(path, os.O_WRONLY | flags, 0o644)
            try:
                for offset, data in operation.pieces:
                    os.pwrite(descriptor, data, offset)
            finally:
                os.close(descriptor)


def _sync(directory: Path, tree: Tree, operations: list[Operation], changed: list[File]) -> None:
    """Syncs every directory that the operations touched and every file, by any name that it still has."""
    names = {name for operation in operations for name in (operation.path, operation.to) if name}
    names |= {posixpath.dirname(name) for name in names}
    folders = {name for name in names if name in tree.entries and tree.entries[name] is None}
    numbers = {file.number for file in changed}
    files = {tree.file(path).number: path for path in tree.files() if tree.file(path).number in numbers}
    for name in sorted(files.values()) + sorted(folders):
        descriptor = os.open(directory / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for path in tree.files():
        tree.file(path).past.clear()


def _scan(directory: Path) -> dict[str, os.stat_result]:
    found = {}
    for folder, folders, files in os.walk(directory):
        for name in folders + files:
            path = Path(folder, name)
            found[str(path.relative_to(directory))] = path.lstat()
    return found


def _compare_names(expected: dict[str, Entry], found: dict[str, os.stat_result], after: int) -> Iterator[str]:
    """What differs from the names after operation `after`."""
    for path in sorted(expected.keys() - found.keys() - {""}):
        yield f"{path} is missing (names as after operation {after})"
    for path in sorted(found.keys() - expected.keys()):
        yield f"{path} does not belong there (names as after operation {after})"
    numbers: dict[int, int] = {}
    for path in sorted(expected.keys() & found.keys()):
        entry, status = expected[path], found[path]
        if _type(entry) != stat.S_IFMT(status.st_mode):
            yield f"{path} is of another type (names as after operation {after})"
        elif isinstance(entry, File) and numbers.setdefault(entry.number, status.st_ino) != status.st_ino:
            yield f"{path} is not the file that its other name names (names as after operation {after})"
    if len(set(numbers.values())) < len(numbers):
        yield f"two files are one (names as after operation {after})"


def _compare_contents(directory: Path, expected: dict[str, Entry], grain: int) -> Iterator[str]:
    for path, entry in sorted(expected.items()):
        if isinstance(entry, Link):
            target = str((directory / path).readlink())
            if target != entry.target:
                yield f"{path} points at {target}, not at {entry.target}"
        elif isinstance(entry, File):
            yield from _compare_file(path, (directory / path).read_bytes(), [*entry.past, entry.data], grain)


def _compare_file(path: str, found: bytes, states: list[bytes], grain: int) -> Iterator[str]:
    """What of a file's content it can never have had there since it was synced."""
    sizes = [len(state) for state in states]
    if not min(sizes) <= len(found) <= max(sizes):
        yield f"{path} has {len(found)} bytes; it had {sorted(set(sizes))}"
    for start in range(0, len(found), grain):
        part = found[start : start + grain]
        if not any(
            state[start : start + grain][: len(part)].ljust(len(part), b"\0") == part for state in states
        ):
            what = "zeros" if not any(part) else "wrong bytes"
            yield f"{path} holds {what} in [{start}, {start + len(part)})"


def _type(entry: Entry) -> int:
    if isinstance(entry, File):
        return stat.S_IFREG
    return stat.S_IFDIR if entry is None else stat.S_IFLNK
