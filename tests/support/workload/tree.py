"""The plan of the `files` workload and the tree of names and contents that it leads to.

Operation `n` follows from the seed, `n` and the tree before it, so that a verifier can walk the same way.
"""

from __future__ import annotations

import posixpath
import random
from dataclasses import dataclass, field

from tests.support.workload.acks import content

MOST_FILES = 60
MOST_DIRECTORIES = 8


@dataclass(frozen=True)
class Operation:
    """One change.  `kind`: mkdir, rmdir, create, write, truncate, rename, link, symlink or unlink.

    `pieces` are the offsets and bytes of its `write(2)` calls; `path` and `to` are relative to the top.
    """

    number: int
    kind: str
    path: str
    to: str = ""
    size: int = 0
    pieces: tuple[tuple[int, bytes], ...] = ()


@dataclass
class File:
    """A regular file: its content now, and all contents since the last sync that it had (oldest first)."""

    number: int
    data: bytes = b""
    past: list[bytes] = field(default_factory=list)

    def become(self, data: bytes) -> None:
        """Changes the content."""
        self.past.append(self.data)
        self.data = data


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


Entry = File | Link | None


@dataclass
class Tree:
    """Names relative to the top: a `File`, a `Link`, or None for a directory."""

    entries: dict[str, Entry] = field(default_factory=lambda: {"": None})

    def files(self) -> list[str]:
        """The paths that name regular files."""
        return sorted(path for path, entry in self.entries.items() if isinstance(entry, File))

    def directories(self) -> list[str]:
        """The paths of directories; "" is the top."""
        return sorted(path for path, entry in self.entries.items() if entry is None)

    def file(self, path: str) -> File:
        """The regular file at `path`."""
        entry = self.entries[path]
        assert isinstance(entry, File)
        return entry

    def apply(self, operation: Operation) -> None:
        """Does what the operation does."""
        match operation.kind:
            case "mkdir":
                self.entries[operation.path] = None
            case "rmdir" | "unlink":
                del self.entries[operation.path]
            case "symlink":
                self.entries[operation.path] = Link(operation.to)
            case "rename":
                self.entries[operation.to] = self.entries.pop(operation.path)
            case "link":
                self.entries[operation.to] = self.entries[operation.path]
            case "truncate":
                file = self.file(operation.path)
                file.become(file.data[: operation.size].ljust(operation.size, b"\0"))
            case "create":
                self.entries[operation.path] = File(operation.number)
        for offset, data in operation.pieces:
            file = self.file(operation.path)
            below = file.data.ljust(offset, b"\0")
            file.become(below[:offset] + data + below[offset + len(data) :])

    def next(self, seed: str, number: int, largest: int) -> Operation:
        """The operation that follows on this tree; writes are at most `largest` bytes."""
        choose = random.Random(f"{seed}/{number}")
        files, directories = self.files(), self.directories()
        kind = choose.choice(_KINDS)
        if not files or (kind == "create" and len(files) < MOST_FILES):
            path = self._new_path(choose, directories, number)
            pieces = _pieces(choose, seed, number, 0, largest)
            return Operation(number, "create", path, pieces=pieces)
        path = choose.choice(files)
        size = len(self.file(path).data)
        match kind:
            case "mkdir" if len(directories) < MOST_DIRECTORIES:
                return Operation(number, "mkdir", self._new_path(choose, directories, number))
            case "rmdir" if empty := [name for name in directories if name and not self._below(name)]:
                return Operation(number, "rmdir", choose.choice(empty))
            case "rename" | "replace":
                others = [name for name in files if self.entries[name] is not self.entries[path]]
                if kind == "replace" and others:
                    return Operation(number, "rename", path, choose.choice(others))
                return Operation(number, "rename", path, self._new_path(choose, directories, number))
            case "link":
                return Operation(number, "link", path, self._new_path(choose, directories, number))
            case "symlink":
                return Operation(number, "symlink", self._new_path(choose, directories, number), to=path)
            case "unlink":
                links = [name for name, entry in sorted(self.entries.items()) if isinstance(entry, Link)]
                return Operation(number, "unlink", choose.choice(files + links))
            case "truncate":
                return Operation(number, "truncate", path, size=choose.randint(0, size + 9000))
            case "append":
                return Operation(number, "write", path, pieces=_pieces(choose, seed, number, size, largest))
        offset = choose.randint(0, size)
        return Operation(number, "write", path, pieces=_pieces(choose, seed, number, offset, largest))

    def _below(self, directory: str) -> bool:
        return any(posixpath.dirname(path) == directory for path in self.entries if path)

    @staticmethod
    def _new_path(choose: random.Random, directories: list[str], number: int) -> str:
        return posixpath.join(choose.choice(directories), f"n{number}")


_KINDS = (
    *["create"] * 5,
    *["write"] * 4,
    *["append"] * 4,
    *["truncate"] * 2,
    *["rename"] * 2,
    *["replace"] * 2,
    *["unlink"] * 2,
    "link",
    "symlink",
    "mkdir",
    "rmdir",
)


def _pieces(
    choose: random.Random, seed: str, number: int, offset: int, largest: int
) -> tuple[tuple[int, bytes], ...]:
    pieces = []
    for piece in range(choose.choice((1, 1, 2, 4))):
        size = choose.choice((choose.randint(1, 200), 4096, choose.randint(1, largest)))
        pieces.append((offset, content(size, seed, number, piece)))
        offset += size
    return tuple(pieces)
