"""An inode of the forgetting disk: what running programs see, and what of it the medium lacks."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field

from tests.support.powerloss.cut import PAGE, Event, Truncate, Write, split


@dataclass(slots=True, eq=False)
class Node:
    """One inode.

    Reads see `pages`, and where there is none the first `shown` bytes of the medium, then zeros.  `events`
    are the writes and truncations that the medium lacks, in order.  `places` are its names on the medium,
    as (directory, name); `root` is the path of the medium in the topmost directory only.
    """

    number: int
    mode: int
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    target: bytes = b""
    size: int = 0
    links: int = 0  # names
    times: dict[str, int] = field(default_factory=dict)
    children: dict[bytes, Node] = field(default_factory=dict)
    cookies: dict[bytes, int] = field(default_factory=dict)
    next_cookie: int = 1
    label: str = ""

    lookups: int = 0
    opens: int = 0
    pending: int = 0

    shown: int = 0
    pages: dict[int, bytearray] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    covered: int = 0
    places: list[tuple[Node, bytes]] = field(default_factory=list)
    placed: bool = False
    descriptor: int = -1
    root: bytes = b""

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def in_use(self) -> bool:
        """Whether a program or the kernel can still reach it."""
        return bool(self.lookups or self.opens or self.links)

    @property
    def link_count(self) -> int:
        """What `stat` shows as the number of links."""
        if not self.is_directory:
            return self.links
        return 2 + sum(child.is_directory for child in self.children.values()) if self.links else 0

    def path(self) -> bytes:
        """Where the medium has it; it must have a name there."""
        if not self.places:
            return self.root
        directory, name = self.places[0]
        return os.path.join(directory.path(), name)

    def medium(self) -> int:
        """A descriptor of its contents on the medium; -1 where it never had a name there."""
        if self.descriptor < 0 and self.places:
            self.descriptor = os.open(self.path(), os.O_RDWR | os.O_CLOEXEC)
        return self.descriptor

    def rest(self) -> None:
        """Closes the descriptor if it can be opened again by name."""
        if self.descriptor >= 0 and self.places and not self.opens and not self.events:
            os.close(self.descriptor)
            self.descriptor = -1

    def add_entry(self, name: bytes, child: Node) -> None:
        """Enters `child` into this directory."""
        self.children[name] = child
        self.cookies[name] = self.next_cookie
        self.next_cookie += 1
        child.links += 1
        child.label = f"{self.label}/{os.fsdecode(name)}" if self.label else os.fsdecode(name)

    def remove_entry(self, name: bytes) -> Node:
        """Takes the entry `name` out of this directory and returns what it named."""
        child = self.children.pop(name)
        del self.cookies[name]
        child.links -= 1
        return child

    def read(self, offset: int, size: int) -> bytes:
        """What a program sees in [`offset`, `offset` + `size`), cut at the end of the file."""
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        below = self._read_medium(offset, min(end, self.shown))
        first, last = offset // PAGE, (end - 1) // PAGE
        if not any(page in self.pages for page in range(first, last + 1)):
            return below.ljust(end - offset, b"\0")
        found = bytearray(below.ljust(end - offset, b"\0"))
        for page in range(first, last + 1):
            held = self.pages.get(page)
            if held is not None:
                start, stop = max(offset, page * PAGE), min(end, (page + 1) * PAGE)
                found[start - offset : stop - offset] = held[start - page * PAGE : stop - page * PAGE]
        return bytes(found)

    def write(self, event: Write) -> None:
        """Takes a write that the medium has not."""
        self.events.append(event)
        for page, unit in split(event):
            if len(unit.data) == PAGE:
                self.pages[page] = bytearray(unit.data)
            else:
                start = unit.offset - page * PAGE
                self._held(page)[start : start + len(unit.data)] = unit.data
        self.size = max(self.size, event.offset + len(event.data))

    def truncate(self, event: Truncate) -> None:
        """Takes a change of size that the medium has not."""
        self.events.append(event)
        if event.size < self.size:
            if event.size % PAGE:
                edge = event.size // PAGE
                self._held(edge)[event.size - edge * PAGE :] = bytes(PAGE - event.size % PAGE)
            for page in [page for page in self.pages if page * PAGE >= event.size]:
                del self.pages[page]
        self.shown = min(self.shown, event.size)
        self.size = event.size

    def forget_events(self) -> None:
        """Notes that the medium now holds all that programs see."""
        self.events.clear()
        self.pages.clear()
        self.shown = self.size

    def _held(self, page: int) -> bytearray:
        held = self.pages.get(page)
        if held is None:
            start = page * PAGE
            below = self._read_medium(start, min(start + PAGE, self.shown))
            held = self.pages[page] = bytearray(below.ljust(PAGE, b"\0"))
        return held

    def _read_medium(self, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        return os.pread(self.medium(), end - start, start)
