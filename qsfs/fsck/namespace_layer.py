"""Layer 2: inodes, directory entries and their cookies, links, orphans, symlinks, attributes.

Checked only: nothing of the namespace is mended.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Mapping

from qsfs.errors import Corrupt
from qsfs.fsck.report import Layer, Report
from qsfs.fsck.rows import decode_inode, decoded, inode_exists, shown
from qsfs.store.environment import ReadView
from qsfs.store.schema import ROOT_INODE, Entry, Table, split_u64, split_u64_pair, u64, u64_pair

_FIRST_COOKIE = 3
_LONGEST_NAME = 255
_DIRECTORY = stat.S_IFDIR >> 12
_SYMLINK = stat.S_IFLNK >> 12
_KINDS = frozenset(
    kind >> 12
    for kind in (
        stat.S_IFDIR,
        stat.S_IFREG,
        stat.S_IFLNK,
        stat.S_IFCHR,
        stat.S_IFBLK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
    )
)


def check_namespace(view: ReadView, report: Report) -> None:
    """Checks every rule of the namespace; raises nothing."""
    _Check(view, report).run()


class _Check:
    def __init__(self, view: ReadView, report: Report) -> None:
        self._view = view
        self._report = report
        self._inodes: dict[int, tuple[int, int]] = {}
        self._directories: dict[int, tuple[int, int]] = {}
        self._links: Counter[int] = Counter()
        self._subdirectories: Counter[int] = Counter()

    def run(self) -> None:
        self._read_inodes()
        self._check_root()
        self._check_entries()
        self._check_cookies()
        self._check_orphans()
        self._check_links()
        self._check_tree()
        self._check_belongings()

    def _error(self, kind: str, message: str, subject: Mapping[str, object] | None = None) -> None:
        self._report.add(Layer.NAMESPACE, kind, message, subject)

    def _read_inodes(self) -> None:
        for _, inode in decoded(self._view, Table.INODES, 8, decode_inode):
            kind = inode.mode >> 12
            self._report.checked["inodes"] += 1
            self._inodes[inode.number] = (kind, inode.nlink)
            if kind == _DIRECTORY:
                self._directories[inode.number] = (inode.parent, inode.next_cookie)
            if inode.number == 0 or kind not in _KINDS:
                self._error(
                    "inode-kind",
                    f"inode {inode.number}: mode {inode.mode:o} cannot be",
                    {"inode": inode.number},
                )

    def _check_root(self) -> None:
        root = self._directories.get(ROOT_INODE)
        if root is None:
            self._error("root", f"inode {ROOT_INODE}, the root directory, is missing or no directory")
        elif root[0] != ROOT_INODE:
            self._error("root", f"the root directory names inode {root[0]} as its parent, not itself")

    def _check_entries(self) -> None:
        def entry_of(_: bytes, row: bytes) -> Entry:
            return Entry.decode(row)

        for key, entry in decoded(self._view, Table.ENTRIES, 8, entry_of, longer=True):
            parent, name = split_u64(key), key[8:]
            self._report.checked["entries"] += 1
            where = f"entry '{shown(name)}' of directory {parent}"
            subject = {"inode": entry.inode, "directory": parent, "name": shown(name)}
            if name in (b"", b".", b"..") or b"/" in name or b"\0" in name or len(name) > _LONGEST_NAME:
                self._error("entry-name", f"{where}: the name cannot be", subject)
            self._links[entry.inode] += 1
            directory = self._directories.get(parent)
            if directory is None:
                what = "no directory" if inode_exists(self._view, parent) else "missing"
                self._error("entry-parent", f"{where}: inode {parent} is {what}", subject)
            self._check_target(entry, parent, where, subject)
            if directory is not None and not _FIRST_COOKIE <= entry.cookie < directory[1]:
                self._error(
                    "entry-cookie",
                    f"{where}: cookie {entry.cookie} is not among those given out (3 to {directory[1] - 1})",
                    subject,
                )
            if len(key) > 8:
                row = self._view.get(Table.COOKIES, u64_pair(parent, entry.cookie))
                if row is None or bytes(row) != name:
                    found = "none" if row is None else f"'{shown(bytes(row))}'"
                    self._error(
                        "entry-cookie",
                        f"{where}: under its cookie {entry.cookie} stands {found}; readdir does not show it",
                        subject,
                    )

    def _check_target(self, entry: Entry, parent: int, where: str, subject: dict[str, object]) -> None:
        target = self._inodes.get(entry.inode)
        if target is None:
            if not inode_exists(self._view, entry.inode):
                self._error(
                    "entry-dangling",
                    f"{where}: names inode {entry.inode}, which does not exist; move the name away",
                    subject,
                )
            return
        if target[0] != entry.kind:
            self._error(
                "entry-kind",
                f"{where}: says kind {entry.kind:o}, inode {entry.inode} is of kind {target[0]:o}",
                subject,
            )
        if target[0] == _DIRECTORY:
            self._subdirectories[parent] += 1
            if self._directories[entry.inode][0] != parent:
                self._error(
                    "directory-parent",
                    f"{where}: inode {entry.inode} names {self._directories[entry.inode][0]} as its parent",
                    subject,
                )

    def _check_cookies(self) -> None:
        for key, name in self._view.scan(Table.COOKIES, b"", None):
            if len(key) != 16:
                continue
            parent, cookie = split_u64_pair(key)
            row = self._view.get(Table.ENTRIES, u64(parent) + bytes(name)) if len(name) < 500 else None
            try:
                matches = row is not None and Entry.decode(bytes(row)).cookie == cookie
            except Corrupt:
                continue
            if not matches:
                self._error(
                    "cookie-dangling",
                    f"directory {parent}: cookie {cookie} stands for '{shown(bytes(name)[:_LONGEST_NAME])}', "
                    "which is no entry with that cookie",
                    {"directory": parent},
                )

    def _check_orphans(self) -> None:
        for key, _ in self._view.scan(Table.ORPHANS, b"", None):
            if len(key) != 8:
                continue
            number = split_u64(key)
            known = self._inodes.get(number)
            if known is None and not inode_exists(self._view, number):
                self._error("orphan-dangling", f"orphan {number}: there is no such inode", {"inode": number})
            elif known is not None and known[1]:
                self._error("orphan-linked", f"orphan {number}: has {known[1]} links", {"inode": number})

    def _check_links(self) -> None:
        for number, (kind, nlink) in self._inodes.items():
            names = self._links[number]
            if kind == _DIRECTORY:
                self._check_directory_links(number, nlink, names)
            elif nlink != names:
                self._error(
                    "links",
                    f"inode {number}: says {nlink} links, {names} entries name it",
                    {"inode": number},
                )
            if nlink == 0 and names == 0 and self._view.get(Table.ORPHANS, u64(number)) is None:
                self._error(
                    "orphan-unlisted",
                    f"inode {number}: has no name and is no listed orphan: it is never removed",
                    {"inode": number},
                )

    def _check_directory_links(self, number: int, nlink: int, names: int) -> None:
        expected = 2 + self._subdirectories[number]
        if nlink == 0:
            if names:
                self._error(
                    "links",
                    f"directory {number}: was removed, and {names} entries name it",
                    {"inode": number},
                )
            return
        if nlink != expected:
            self._error(
                "links",
                f"directory {number}: says {nlink} links, has {self._subdirectories[number]} subdirectories "
                f"({expected} links)",
                {"inode": number},
            )
        if names != (number != ROOT_INODE):
            self._error("directory-names", f"directory {number}: {names} entries name it", {"inode": number})

    def _check_tree(self) -> None:
        """Every directory with links is reached from the root."""
        rooted = {ROOT_INODE} & self._directories.keys()
        lost: set[int] = set()
        for number in self._directories:
            path: list[int] = []
            seen: set[int] = set()
            step = number
            while step in self._directories and step not in rooted and step not in lost and step not in seen:
                seen.add(step)
                path.append(step)
                step = self._directories[step][0]
            if step in rooted:
                rooted.update(path)
                continue
            if step in seen:
                self._error(
                    "directory-loop",
                    f"directory {step}: is its own ancestor; it cannot be reached from the root",
                    {"inode": step},
                )
            lost.update(path)
        for number in sorted(lost):
            if self._inodes[number][1]:
                self._error(
                    "directory-lost", f"directory {number}: is not reached from the root", {"inode": number}
                )

    def _check_belongings(self) -> None:
        """Symlinks have targets, and only they; attributes have inodes."""
        for number, (kind, _) in self._inodes.items():
            if kind == _SYMLINK and self._view.get(Table.SYMLINKS, u64(number)) is None:
                self._error("symlink-target", f"symlink {number}: has no target", {"inode": number})
        for table, what in ((Table.SYMLINKS, "a symlink target"), (Table.XATTRS, "an attribute")):
            for key, _ in self._view.scan(table, b"", None):
                if len(key) < 8:
                    continue
                number = split_u64(key)
                known = self._inodes.get(number)
                if known is None:
                    if not inode_exists(self._view, number):
                        self._error(
                            "belongs-to-nothing", f"inode {number}: is gone but has {what}", {"inode": number}
                        )
                elif table is Table.SYMLINKS and known[0] != _SYMLINK:
                    self._error(
                        "symlink-target", f"inode {number}: is no symlink but has {what}", {"inode": number}
                    )
