"""The medium of the forgetting disk: making durable, in the backing directory, what was only seen before."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field

from tests.support.powerloss.cut import Truncate, Write
from tests.support.powerloss.node import Node


@dataclass(slots=True, eq=False)
class Operation:
    """A change of names, sizes or attributes that the medium lacks.

    `kind` is create, link, remove, rename, exchange, truncate or attributes; `names` are the directory
    entries it changes, `other` is what a rename replaced.
    """

    kind: str
    node: Node
    names: tuple[tuple[Node, bytes], ...]
    other: Node | None = None
    attributes: dict[str, int] = field(default_factory=dict)
    truncation: Truncate | None = None

    def nodes(self) -> list[Node]:
        """The inodes it needs to be known."""
        return [self.node, *(directory for directory, _ in self.names), *([self.other] if self.other else [])]

    def touches(self) -> set[tuple[int, bytes]]:
        """What it changes: entries as (directory, name), inodes as (number, ""), lists as (number, "/")."""
        return self._changes() | {(directory.number, b"/") for directory, _ in self.names}

    def needs(self) -> set[tuple[int, bytes]]:
        """Of what it builds on the earlier changes."""
        needed = self._changes() | {(directory.number, b"") for directory, _ in self.names}
        if self.kind == "remove":
            needed.add((self.node.number, b"/"))
        if self.other is not None:
            needed.add((self.other.number, b"/"))
        return needed

    def _changes(self) -> set[tuple[int, bytes]]:
        changed = {(directory.number, name) for directory, name in self.names}
        changed.add((self.node.number, b""))
        if self.other is not None:
            changed.add((self.other.number, b""))
        return changed


def load(backing: bytes, nodes: dict[int, Node]) -> Node:
    """Reads what the medium holds into `nodes`, in an order that depends on names only."""
    root = Node(1, os.lstat(backing).st_mode, links=1, root=backing, placed=True)
    _set_status(root, os.lstat(backing))
    nodes[1] = root
    linked: dict[tuple[int, int], Node] = {}
    waiting = [root]
    while waiting:
        directory = waiting.pop()
        path = directory.path()
        for name in sorted(os.listdir(path)):
            status = os.lstat(os.path.join(path, name))
            node = linked.get((status.st_dev, status.st_ino))
            if node is None:
                node = Node(len(nodes) + 1, status.st_mode, rdev=status.st_rdev, placed=True)
                _set_status(node, status)
                nodes[node.number] = node
                if node.is_directory:
                    waiting.append(node)
                elif status.st_nlink > 1:
                    linked[status.st_dev, status.st_ino] = node
            directory.add_entry(name, node)
            node.places.append((directory, name))
            if stat.S_ISLNK(node.mode):
                node.target = os.readlink(node.path())
    return root


def apply(operation: Operation) -> None:
    """Makes one operation durable."""
    node = operation.node
    match operation.kind:
        case "create":
            _create(operation)
        case "link":
            os.link(node.path(), _path(operation.names[0]), follow_symlinks=False)
            node.places.append(operation.names[0])
        case "remove":
            _remove(operation)
        case "rename":
            _rename(operation)
        case "exchange":
            _exchange(operation)
        case "truncate":
            if operation.truncation in node.events:
                truncate(node, operation.truncation)
        case "attributes":
            if node.places or node.root:
                _set_attributes(node, operation.attributes)


def truncate(node: Node, event: Truncate) -> None:
    """Makes one truncation durable: earlier writes that are not are cut to the size."""
    kept = []
    for other in node.events:
        if other is event:
            continue
        if isinstance(other, Write) and other.sequence < event.sequence:
            if other.offset >= event.size:
                continue
            other.data = other.data[: event.size - other.offset]
        kept.append(other)
    node.events = kept
    if (descriptor := node.medium()) >= 0:
        os.ftruncate(descriptor, event.size)


def apply_events(node: Node, covered: int) -> None:
    """Makes the changes of a file's contents up to sequence number `covered` durable."""
    descriptor = node.medium()
    count = sum(1 for event in node.events if event.sequence <= covered)
    for event in node.events[:count]:
        if isinstance(event, Write):
            _write(descriptor, event.offset, event.data)
        else:
            os.ftruncate(descriptor, event.size)
    del node.events[:count]
    if not node.events:
        node.forget_events()
        os.utime(descriptor, ns=(node.times["atime"], node.times["mtime"]))


def write(node: Node, writes: list[tuple[int, bytes]], size: int) -> None:
    """Applies `writes` to a file and makes it at least `size` long."""
    descriptor = node.medium()
    for offset, data in writes:
        _write(descriptor, offset, data)
    if os.fstat(descriptor).st_size < size:
        os.ftruncate(descriptor, size)


def _create(operation: Operation) -> None:
    node, place = operation.node, operation.names[0]
    path = _path(place)
    mode = operation.attributes["mode"]
    if stat.S_ISDIR(mode):
        os.mkdir(path)
    elif stat.S_ISLNK(mode):
        os.symlink(node.target, path)
    elif stat.S_ISREG(mode):
        node.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    else:
        os.mknod(path, mode, node.rdev)
    node.places.append(place)
    node.placed = True
    _set_attributes(node, operation.attributes)
    if stat.S_ISREG(mode) and node.covered:
        apply_events(node, node.covered)


def _remove(operation: Operation) -> None:
    node, path = operation.node, _path(operation.names[0])
    if node.is_directory:
        os.rmdir(path)
    else:
        _hold(node)
        os.unlink(path)
    node.places.remove(operation.names[0])


def _hold(node: Node) -> None:
    """Keeps the contents of a file within reach that may lose its last name."""
    if node.is_file:
        node.medium()


def _rename(operation: Operation) -> None:
    node, other = operation.node, operation.other
    source, to = operation.names
    if other is not None:
        _hold(other)
        other.places.remove(to)
    os.rename(_path(source), _path(to))
    node.places[node.places.index(source)] = to


def _exchange(operation: Operation) -> None:
    source, to = operation.names
    assert operation.other is not None
    spare = _path(to) + b".exchanged"
    os.rename(_path(to), spare)
    os.rename(_path(source), _path(to))
    os.rename(spare, _path(source))
    operation.node.places[operation.node.places.index(source)] = to
    operation.other.places[operation.other.places.index(to)] = source


def _set_attributes(node: Node, attributes: dict[str, int]) -> None:
    path = node.path()
    if {"uid", "gid"} & attributes.keys() and os.geteuid() == 0:
        os.chown(path, attributes.get("uid", -1), attributes.get("gid", -1), follow_symlinks=False)
    if "mode" in attributes and not stat.S_ISLNK(node.mode):
        os.chmod(path, stat.S_IMODE(attributes["mode"]))
    if {"atime", "mtime"} & attributes.keys():
        times = {**node.times, **attributes}
        os.utime(path, ns=(times["atime"], times["mtime"]), follow_symlinks=False)


def _set_status(node: Node, status: os.stat_result) -> None:
    node.uid, node.gid = status.st_uid, status.st_gid
    node.times = {"atime": status.st_atime_ns, "mtime": status.st_mtime_ns, "ctime": status.st_ctime_ns}
    if not node.is_directory:
        node.size = node.shown = status.st_size


def _path(place: tuple[Node, bytes]) -> bytes:
    directory, name = place
    return os.path.join(directory.path(), name)


def _write(descriptor: int, offset: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
