"""Random histories of the namespace against a plain tree of dictionaries, by the rules of POSIX.

The model is written from the manual pages, not from the code.  After every step names, link counts,
listings and what is left of removed inodes agree; now and then a mount begins anew.
"""

from __future__ import annotations

import errno
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qsfs.clock import FixedClock
from qsfs.config import PolicyRule
from qsfs.filesystem.contents import Contents
from qsfs.filesystem.namespace import Namespace, make_root
from qsfs.filesystem.policies import Policies
from qsfs.filesystem.posix import Credentials, PosixError
from qsfs.store.schema import ROOT_INODE, InodeFlag, Table, split_u64, u64
from qsfs.store.store import Store
from tests.filesystem.conftest import LIMITS
from tests.support.memory_store import MemoryContents, MemoryStore

NAMES = st.sampled_from([b"a", b"b", b"c", b"hot", b"x.db", b"y.db"])
PLACES = st.integers(0, 1000)
FLAGS = st.sampled_from([0, 0, 0, 1, 2, 3, 4])
RULES = [PolicyRule(match="x.db", pinned=True), PolicyRule(match="**/hot/*", unavailable="wait")]


@dataclass(eq=False)
class Node:
    """A file or directory of the model."""

    directory: bool
    names: dict[bytes, Node] = field(default_factory=dict)
    parent: Node | None = None
    links: int = 1
    lookups: int = 0
    number: int = 0

    def is_within(self, other: Node) -> bool:
        node: Node | None = self
        while node is not None:
            if node is other:
                return True
            node = node.parent
        return False


class Refused(Exception):
    """The model refuses with this code."""


class Model:
    """The rules of POSIX over nodes."""

    def __init__(self) -> None:
        self.root = Node(True, links=2, number=ROOT_INODE)

    def directories(self) -> list[Node]:
        found = [self.root]
        for node in found:
            found += [child for child in node.names.values() if child.directory]
        return found

    def files(self) -> list[Node]:
        files = [c for d in self.directories() for c in d.names.values() if not c.directory]
        return list(dict.fromkeys(files))

    def make(self, parent: Node, name: bytes, directory: bool) -> Node:
        if name in parent.names:
            raise Refused(errno.EEXIST)
        node = Node(directory, parent=parent if directory else None, links=2 if directory else 1)
        parent.names[name] = node
        parent.links += directory
        return node

    def link(self, node: Node, parent: Node, name: bytes) -> None:
        if name in parent.names:
            raise Refused(errno.EEXIST)
        parent.names[name] = node
        node.links += 1

    def unlink(self, parent: Node, name: bytes) -> None:
        node = self.find(parent, name)
        if node.directory:
            raise Refused(errno.EISDIR)
        del parent.names[name]
        node.links -= 1

    def rmdir(self, parent: Node, name: bytes) -> None:
        node = self.find(parent, name)
        if not node.directory:
            raise Refused(errno.ENOTDIR)
        if node.names:
            raise Refused(errno.ENOTEMPTY)
        del parent.names[name]
        parent.links -= 1
        node.links = 0

    def find(self, parent: Node, name: bytes) -> Node:
        if name not in parent.names:
            raise Refused(errno.ENOENT)
        return parent.names[name]

    def rename(self, old: Node, name: bytes, new: Node, new_name: bytes, flags: int) -> None:
        if flags not in (0, 1, 2):
            raise Refused(errno.EINVAL)
        source = self.find(old, name)
        target = new.names.get(new_name)
        if source.directory and new.is_within(source):
            raise Refused(errno.EINVAL)
        if flags == 2:
            self.exchange(old, name, new, new_name)
            return
        if target is not None and flags == 1:
            raise Refused(errno.EEXIST)
        if target is source:
            return
        if target is not None:
            if target.directory and not source.directory:
                raise Refused(errno.EISDIR)
            if source.directory and not target.directory:
                raise Refused(errno.ENOTDIR)
            if target.names:
                raise Refused(errno.ENOTEMPTY)
            if target.directory:
                self.rmdir(new, new_name)
            else:
                self.unlink(new, new_name)
        del old.names[name]
        new.names[new_name] = source
        if source.directory:
            source.parent = new
            old.links -= 1
            new.links += 1

    def exchange(self, old: Node, name: bytes, new: Node, new_name: bytes) -> None:
        source, target = self.find(old, name), self.find(new, new_name)
        if target is not source and target.directory and old.is_within(target):
            raise Refused(errno.EINVAL)
        old.names[name], new.names[new_name] = target, source
        for node, before, after in ((source, old, new), (target, new, old)):
            if node.directory:
                node.parent = after
                before.links -= 1
                after.links += 1


class NamespaceMachine(RuleBasedStateMachine):
    """Both sides take the same steps."""

    real = False

    @initialize()
    def begin(self) -> None:
        self.temporary = tempfile.TemporaryDirectory() if self.real else None
        self.store: Any
        self.open_store()
        make_root(self.store, Credentials())
        self.model = Model()
        self.gone: list[Node] = []
        self.mount()

    def open_store(self) -> None:
        if self.temporary is None:
            self.store = getattr(self, "store", None) or MemoryStore(FixedClock())
        else:
            self.store = Store(Path(self.temporary.name), LIMITS, FixedClock())

    def mount(self) -> None:
        contents = MemoryContents(self.store) if self.temporary is None else Contents(self.store)
        self.names = Namespace(self.store, contents, Policies(RULES))
        self.names.remove_orphans()
        self.gone.clear()

    def teardown(self) -> None:
        if getattr(self, "temporary", None) is not None:
            self.store.close()
            self.temporary.cleanup()

    def pick(self, place: int) -> Node:
        directories = self.model.directories()
        return directories[place % len(directories)]

    def pick_entry(self, place: int) -> tuple[Node, bytes]:
        """Mostly an entry that exists: steps that are refused teach little."""
        entries = [(node, name) for node in self.model.directories() for name in node.names]
        entries.append((self.model.root, b"nothing"))
        return entries[place % len(entries)]

    def agree(self, theirs: Any, ours: Any) -> Any:
        """Runs both sides: they succeed together or end with the same code."""
        try:
            result, code = ours(), 0
        except Refused as refused:
            result, code = None, refused.args[0]
        try:
            inode = theirs()
        except PosixError as error:
            assert error.errno == code, f"{error} instead of {errno.errorcode.get(code, 'success')}"
            return None
        assert code == 0, f"succeeded instead of {errno.errorcode[code]}"
        if isinstance(result, Node) and not result.number:
            result.number = inode.number
        return result

    def known(self, node: Node) -> None:
        node.lookups += 1
        self.names.references.looked_up(node.number)

    def lost(self, before: dict[Node, None]) -> None:
        """Remembers nodes that a step took the last name of, while the kernel knows them."""
        alive = set(self.model.directories()) | set(self.model.files())
        self.gone += [node for node in before if node not in alive and node.lookups]

    def all_nodes(self) -> dict[Node, None]:
        return dict.fromkeys([*self.model.directories(), *self.model.files()])

    @rule(place=PLACES, name=NAMES, directory=st.booleans(), known=st.booleans())
    def make_one(self, place: int, name: bytes, directory: bool, known: bool) -> None:
        self.make(place, name, directory, known)

    def make(self, place: int, name: bytes, directory: bool, known: bool) -> None:
        parent = self.pick(place)
        make = self.names.mkdir if directory else self.names.create
        node = self.agree(
            lambda: make(parent.number, name, 0o755, Credentials()),
            lambda: self.model.make(parent, name, directory),
        )
        if node is not None and known:
            self.known(node)

    @rule(first=PLACES, names=st.lists(NAMES, min_size=3, max_size=6), known=st.booleans())
    def make_several(self, first: int, names: list[bytes], known: bool) -> None:
        for number, name in enumerate(names):
            self.make(first + number, name, number % 2 == 0, known)

    @rule(place=PLACES, file=PLACES, name=NAMES)
    def link(self, place: int, file: int, name: bytes) -> None:
        if files := self.model.files():
            parent, node = self.pick(place), files[file % len(files)]
            self.agree(
                lambda: self.names.link(node.number, parent.number, name),
                lambda: self.model.link(node, parent, name),
            )

    @rule(place=PLACES, wrong=st.integers(0, 5))
    def remove(self, place: int, wrong: int) -> None:
        (parent, name), before = self.pick_entry(place), self.all_nodes()
        directory = (name in parent.names and parent.names[name].directory) != (wrong == 0)
        remove, expected = self.names.unlink, self.model.unlink
        if directory:
            remove, expected = self.names.rmdir, self.model.rmdir
        self.agree(lambda: remove(parent.number, name), lambda: expected(parent, name))
        self.lost(before)

    @rule(old=PLACES, new=PLACES, new_name=NAMES, flags=FLAGS)
    def rename(self, old: int, new: int, new_name: bytes, flags: int) -> None:
        one, name = self.pick_entry(old)
        self.move(one, name, self.pick(new), new_name, flags)

    @rule(old=PLACES, new=PLACES, flags=FLAGS)
    def rename_over(self, old: int, new: int, flags: int) -> None:
        self.move(*self.pick_entry(old), *self.pick_entry(new), flags)

    def move(self, one: Node, name: bytes, two: Node, new_name: bytes, flags: int) -> None:
        before = self.all_nodes()
        self.agree(
            lambda: self.names.rename(one.number, name, two.number, new_name, flags),
            lambda: self.model.rename(one, name, two, new_name, flags),
        )
        self.lost(before)

    @rule(place=PLACES)
    def look_up(self, place: int) -> None:
        parent, name = self.pick_entry(place)
        if name in parent.names:
            self.known(parent.names[name])

    @rule(place=PLACES, count=st.integers(1, 3))
    def forget(self, place: int, count: int) -> None:
        nodes = [node for node in [*self.all_nodes(), *self.gone] if node.lookups]
        if nodes:
            node = nodes[place % len(nodes)]
            count = min(count, node.lookups)
            node.lookups -= count
            self.names.forget([(node.number, count)])
            self.names.references.collect()
            self.gone = [other for other in self.gone if other.lookups]

    @rule(limit=st.integers(1, 5))
    def policy_step(self, limit: int) -> None:
        self.names.policies.step(limit)

    @rule()
    def commit(self) -> None:
        if self.temporary is not None:
            group = self.store.seal()
            self.store.commit(group)
            self.store.committed(group)

    @rule(journal=st.booleans())
    def mount_again(self, journal: bool) -> None:
        """A stop, or a crash after an fsync: all names are there, orphans are removed."""
        if self.temporary is not None:
            if journal:
                self.fsync()
            else:
                self.commit()
            self.store.close()
            self.open_store()
        for node in [*self.all_nodes(), *self.gone]:
            node.lookups = 0
        self.mount()

    def fsync(self) -> None:
        frame = self.store.journal_frame(())
        if frame is not None:
            self.store.journal.write([frame])

    @invariant()
    def both_trees_are_the_same(self) -> None:
        if not hasattr(self, "names"):
            return
        for node in self.model.directories():
            rows = [
                (cookie, name, inode.number)
                for cookie, name, inode in self.names.list_directory(node.number, 2)
            ]
            assert {name: number for _, name, number in rows} == {
                name: child.number for name, child in node.names.items()
            }
            cookies = [cookie for cookie, _, _ in rows]
            assert cookies == sorted(set(cookies))
            inode = self.names.inode(node.number)
            assert inode.next_cookie > max(cookies, default=0)
            assert inode.nlink == node.links
            assert inode.parent == (node.parent or self.model.root).number
        for node in self.model.files():
            assert self.names.inode(node.number).nlink == node.links

    @invariant()
    def nothing_is_left_or_missing(self) -> None:
        if not hasattr(self, "names"):
            return
        orphans = {split_u64(key) for key, _ in self.store.scan(Table.ORPHANS, u64(0), None)}
        assert orphans == {node.number for node in self.gone}
        for node in self.gone:
            assert self.names.inode(node.number).nlink == 0
        entries = len(list(self.store.scan(Table.ENTRIES, u64(0), None)))
        assert entries == len(list(self.store.scan(Table.COOKIES, u64(0), None)))
        assert entries == sum(len(node.names) for node in self.model.directories())

    @invariant()
    def worked_off_policies_hold_everywhere(self) -> None:
        if not hasattr(self, "names"):
            return
        status = self.names.policies.status()
        if status.directories or status.recheck:
            return
        wanted: dict[Node, int] = {}
        paths = {self.model.root: b""}
        for directory in self.model.directories():
            for name, child in directory.names.items():
                path = paths[directory] + name
                if child.directory:
                    paths[child] = path + b"/"
                    continue
                flags = 0
                if name == b"x.db":
                    flags = int(InodeFlag.PINNED)
                elif b"/hot/" in b"/" + paths[directory] and (b"/" + paths[directory]).endswith(b"/hot/"):
                    flags = int(InodeFlag.WAIT)
                wanted[child] = wanted.get(child, 0) | flags
        for node, flags in wanted.items():
            assert self.names.inode(node.number).flags == flags, node.number


class StoreMachine(NamespaceMachine):
    """The same over the real store, with commits, journal replays and remounts."""

    real = True


@pytest.mark.parametrize(("machine", "examples"), [(NamespaceMachine, 60), (StoreMachine, 25)])
def test_random_histories(machine, examples):
    """Every history leaves the same tree as a plain one, with the same codes."""
    case = machine.TestCase()
    case.settings = settings(max_examples=examples, stateful_step_count=50, derandomize=True, deadline=None)
    case.runTest()
