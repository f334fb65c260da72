"""The model of a disk that forgets, over a backing directory that is its medium.

All calls are what a file system is asked for; they raise `OSError`.  Changes stay in memory until an
fsync covers them; then, and only then, they are made in the backing directory, so that it always holds
exactly what a disk would have for certain.  `cut` adds what a power cut happens to leave.

Two models of metadata.  `ordered` is that of a journaling file system (ext4, XFS): operations become
durable in their order, an fsync commits all earlier ones, and so does an fdatasync of a file that is new,
was truncated or grew; an fdatasync of an overwritten file makes its data durable and nothing else.
`strict` promises only what POSIX does: an fsync of a file covers its contents and size, its name needs an
fsync of the directory, and a cut keeps any set of operations of which none lacks one that it builds on.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.powerloss import medium
from tests.support.powerloss.cut import CutReport, Event, Plan, Truncate, Write, split, survivors
from tests.support.powerloss.medium import Operation
from tests.support.powerloss.node import Node

METADATA = ("ordered", "strict")


class Disk:
    """A volatile file system over the medium `backing`."""

    def __init__(self, backing: Path, metadata: str = "ordered") -> None:
        if metadata not in METADATA:
            raise ValueError(f"metadata '{metadata}' is none of {', '.join(METADATA)}")
        self.strict = metadata == "strict"
        self.nodes: dict[int, Node] = {}
        self.fsyncs = 0
        self.writes = 0
        self._sequence = 0
        self._pending: list[Operation] = []
        self.root = medium.load(os.fsencode(backing), self.nodes)
        self._next_number = max(self.nodes) + 1

    # What programs see

    def lookup(self, directory: Node, name: bytes) -> Node:
        """The inode that `name` names."""
        try:
            return directory.children[name]
        except KeyError:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(name)) from None

    def create(
        self,
        directory: Node,
        name: bytes,
        mode: int,
        *,
        owner: tuple[int, int],
        rdev: int = 0,
        target: bytes = b"",
    ) -> Node:
        """Makes an inode of any type under a new name."""
        self._refuse_existing(directory, name)
        node = Node(self._next_number, mode, owner[0], owner[1], rdev, target, size=len(target))
        self._next_number += 1
        self.nodes[node.number] = node
        now = time.time_ns()
        node.times = {"atime": now, "mtime": now, "ctime": now}
        directory.add_entry(name, node)
        self._touch(directory)
        self._record(Operation("create", node, ((directory, name),), attributes=node_attributes(node)))
        return node

    def link(self, node: Node, directory: Node, name: bytes) -> None:
        """Gives an inode one more name."""
        self._refuse_existing(directory, name)
        directory.add_entry(name, node)
        self._touch(directory)
        self._record(Operation("link", node, ((directory, name),)))

    def remove(self, directory: Node, name: bytes, *, is_directory: bool) -> None:
        """Takes a name away; a directory must be empty."""
        node = self.lookup(directory, name)
        if node.is_directory != is_directory:
            raise _error(errno.ENOTDIR if is_directory else errno.EISDIR, name)
        if node.children:
            raise _error(errno.ENOTEMPTY, name)
        directory.remove_entry(name)
        self._touch(directory)
        self._record(Operation("remove", node, ((directory, name),)))

    def rename(
        self, source: tuple[Node, bytes], to: tuple[Node, bytes], *, exchange: bool, keep: bool
    ) -> None:
        """Moves a name over another; with `exchange` both stay, with `keep` the other must not exist."""
        node = self.lookup(*source)
        other = to[0].children.get(to[1])
        if keep and other is not None:
            raise _error(errno.EEXIST, to[1])
        if exchange and other is None:
            raise _error(errno.ENOENT, to[1])
        if other is node:
            return
        if other is not None and not exchange and other.children:
            raise _error(errno.ENOTEMPTY, to[1])
        source[0].remove_entry(source[1])
        if other is not None:
            to[0].remove_entry(to[1])
        to[0].add_entry(to[1], node)
        if exchange and other is not None:
            source[0].add_entry(source[1], other)
        self._touch(source[0])
        self._touch(to[0])
        self._record(Operation("exchange" if exchange else "rename", node, (source, to), other=other))

    def write(self, node: Node, offset: int, data: bytes) -> None:
        """Writes into a file."""
        self.writes += 1
        node.write(Write(self._tick(), offset, data))
        self._touch(node)

    def truncate(self, node: Node, size: int) -> None:
        """Sets the size of a file."""
        event = Truncate(self._tick(), size, node.size)
        node.truncate(event)
        self._touch(node)
        if not self.strict:
            self._record(Operation("truncate", node, (), truncation=event))

    def set_attributes(self, node: Node, attributes: Mapping[str, int]) -> None:
        """Sets any of mode, uid, gid, atime, mtime (times in nanoseconds)."""
        for name, value in attributes.items():
            if name == "mode":
                node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(value)
            elif name in ("uid", "gid"):
                setattr(node, name, value)
            else:
                node.times[name] = value
        node.times["ctime"] = time.time_ns()
        self._record(Operation("attributes", node, (), attributes=dict(attributes)))

    # What reaches the medium

    def fsync(self, node: Node, *, data_only: bool = False) -> None:
        """Makes a file or directory durable, and what the model says comes along."""
        self.fsyncs += 1
        if self.strict:
            self._commit(self._closure(lambda operation: _concerns(operation, node)))
        elif not data_only or node.is_directory or self._needs_commit(node):
            self._commit(self._pending)
        self._cover(node)

    def settle(self) -> None:
        """Makes everything durable, as an orderly unmount does."""
        self._commit(self._pending)
        for node in list(self.nodes.values()):
            self._cover(node)

    def cut(self, seed: str, keep: str = "random") -> CutReport:
        """The power goes: leaves on the medium what a disk would have.  Nothing may be asked afterwards."""
        plan = Plan(seed, keep)
        report = CutReport(seed, keep, self.fsyncs, self.writes)
        chosen = self._surviving_operations(plan)
        report.kept_operations = len(chosen)
        report.lost_operations = len(self._pending) - len(chosen)
        self._commit(chosen)
        nodes = [node for _, node in sorted(self.nodes.items()) if node.places and node.events]
        if self.strict:
            for node in nodes:
                truncations = [event for event in node.events if isinstance(event, Truncate)]
                for event in truncations[: plan.prefix(len(truncations), node.number)]:
                    medium.truncate(node, event)
        self._tear(nodes, plan, report)
        for node in nodes:
            found = survivors(node.events, plan, node.number)
            medium.write(node, found.writes, found.size)
            report.add(self._name(node), found.kept, found.lost)
        for node in self.nodes.values():
            if node.events and node.links and not node.places:
                pages = {page for event in _writes(node.events) for page, _ in split(event)}
                report.add(node.label, 0, len(pages))
        self.close()
        return report

    def close(self) -> None:
        """Closes all files on the medium.  Nothing may be asked afterwards."""
        for node in self.nodes.values():
            if node.descriptor >= 0:
                os.close(node.descriptor)
                node.descriptor = -1

    def uncovered(self) -> tuple[int, int]:
        """How many bytes of writes, and how many operations on names and sizes, a cut may lose."""
        written = sum(len(event.data) for node in self.nodes.values() for event in _writes(node.events))
        return written, len(self._pending)

    def release(self, node: Node) -> None:
        """Lets go of what nobody can reach any more."""
        if node.in_use or node.pending:
            node.rest()
        elif not node.places:
            if node.descriptor >= 0:
                os.close(node.descriptor)
                node.descriptor = -1
            self.nodes.pop(node.number, None)

    def _tear(self, nodes: list[Node], plan: Plan, report: CutReport) -> None:
        """Finds the write in flight, the newest of all, and lets the plan tear it."""
        last = [(events[-1].sequence, events[-1], node) for node in nodes if (events := _writes(node.events))]
        if last:
            _, write, node = max(last, key=lambda found: found[0])
            arrived = plan.tear(write)
            if arrived is not None:
                report.torn = (self._name(node), arrived, len(write.data))

    def _name(self, node: Node) -> str:
        return os.fsdecode(node.path()[len(self.root.root) + 1 :])

    def _surviving_operations(self, plan: Plan) -> list[Operation]:
        if not self.strict:
            return self._pending[: plan.prefix(len(self._pending))]
        numbered = enumerate(self._pending)
        wanted = {id(operation) for number, operation in numbered if plan.flip("operation", number)}
        return self._closure(lambda operation: id(operation) in wanted)

    def _closure(self, wanted: Callable[[Operation], bool]) -> list[Operation]:
        """The wanted operations and all that they build on, in order."""
        chosen: list[Operation] = []
        needed: set[Any] = set()
        for operation in reversed(self._pending):
            if wanted(operation) or operation.touches() & needed:
                chosen.append(operation)
                needed |= operation.needs()
        return chosen[::-1]

    def _commit(self, operations: list[Operation]) -> None:
        operations = list(operations)
        done = set(map(id, operations))
        self._pending = [operation for operation in self._pending if id(operation) not in done]
        for operation in operations:
            medium.apply(operation)
            for node in operation.nodes():
                node.pending -= 1
                self.release(node)

    def _cover(self, node: Node) -> None:
        if not node.is_file or not node.events:
            return
        if node.medium() < 0:
            # No name on the medium yet: its contents wait there, covered, until the name comes.
            node.covered = self._sequence
            return
        medium.apply_events(node, self._sequence)
        self.release(node)

    def _needs_commit(self, node: Node) -> bool:
        if not node.placed or any(node in operation.nodes() for operation in self._pending):
            return True
        return node.size > os.fstat(node.medium()).st_size

    def _record(self, operation: Operation) -> None:
        for node in operation.nodes():
            node.pending += 1
        self._tick()
        self._pending.append(operation)

    def _refuse_existing(self, directory: Node, name: bytes) -> None:
        if name in directory.children:
            raise _error(errno.EEXIST, name)

    def _touch(self, node: Node) -> None:
        node.times["mtime"] = node.times["ctime"] = time.time_ns()

    def _tick(self) -> int:
        self._sequence += 1
        return self._sequence


def node_attributes(node: Node) -> dict[str, int]:
    """The attributes that a new inode has on the medium."""
    return {"mode": node.mode, "uid": node.uid, "gid": node.gid}


def _concerns(operation: Operation, node: Node) -> bool:
    """Whether an fsync of `node` covers `operation` where only POSIX's promise counts."""
    if node.is_directory:
        return any(directory is node for directory, _ in operation.names)
    return operation.kind == "attributes" and operation.node is node and node.placed


def _writes(events: list[Event]) -> list[Write]:
    return [event for event in events if isinstance(event, Write)]


def _error(number: int, name: bytes) -> OSError:
    return OSError(number, os.strerror(number), os.fsdecode(name))
