"""The state machine: each step makes one call on both sides, then everything is compared."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable
from typing import Any

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.random_calls.actors import IDS, Actor, ActorGone
from tests.random_calls.calls import NOW, OMIT, Node
from tests.random_calls.compare import differences, node_differences, same_files, shown, time_differences
from tests.random_calls.field import Field

NAMES = [b"a", b"b", b"c", b"d", b"data.mdb", b"\xff\n"]
ODD = [b".", b"..", b"", b"L" * 255, b"L" * 256, b"missing"]
SLOTS = range(6)
HUGE = 1 << 40

_name = st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES), st.sampled_from(NAMES + ODD))
_path = st.builds(lambda names: b"/" + b"/".join(names), st.lists(_name, min_size=1, max_size=3))
_short = st.builds(lambda name: b"/" + name, st.sampled_from(NAMES))
PATHS = st.one_of(_short, _path, st.sampled_from([b"/d/a", b"/d/b", b"/d/c", b"/d/c/a", b"/a/", b"/d/"]))
TARGETS = st.sampled_from(
    [b"a", b"b", b"d", b"d/a", b"../a", b"/b", b"/d/c", b".", b"..", b"c", b"missing", b"", b"t" * 300]
)
ACTORS = st.sampled_from(["user", "user", "root"])
SLOT = st.sampled_from(SLOTS)
EDGES = [0, 1, 100, 4095, 4096, 4097, 8192, 16_383, 16_384, 20_000, 65_536, 70_001]
OFFSETS = st.one_of(st.sampled_from(EDGES), st.integers(0, 80_000))
SIZES = st.sampled_from([1, 7, 100, 4095, 4096, 4097, 9000, 16_384, 33_000])
FLAGS = st.builds(
    lambda way, *flags: way | sum(flags),
    st.sampled_from([os.O_RDWR, os.O_RDWR, os.O_RDONLY, os.O_WRONLY]),
    st.sampled_from([0, os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_EXCL]),
    st.sampled_from([0, 0, 0, os.O_TRUNC]),
    st.sampled_from([0, 0, os.O_APPEND]),
    st.sampled_from([0, 0, 0, os.O_NOFOLLOW, os.O_DIRECTORY, os.O_SYNC, os.O_DSYNC]),
)
MODES = st.sampled_from([0o644, 0o600, 0o666, 0o755, 0o700, 0o400, 0o000, 0o4755, 0o2755, 0o2644, 0o6777, 0o1777])
PEOPLE = st.sampled_from([-1, 0, 61001, 61010, 70000, (1 << 32) - 2])
SECONDS = st.sampled_from([-1, 0, 1, 1_000_000_000, 4_294_967_296, 9_000_000_000])
TIME = st.one_of(
    st.tuples(SECONDS, st.sampled_from([0, 1, 999_999_999])), st.sampled_from([(0, NOW), (0, OMIT)])
)
SEEDS = st.integers(0, 255)

# What happens to the machine, and after which step: what the kernel knows is forgotten; what the cache holds is
# published, or leaves it too; the daemon begins anew, in order, after `kill -9`, or where there is only the key.
CHEAP = ["forget pages", "forget names"]
DEAR = ["publish", "split", "evict", "remount", "kill", "restore"]
EVENTS = st.dictionaries(
    st.integers(2, 50),
    st.one_of(st.sampled_from(CHEAP), st.sampled_from(CHEAP), st.sampled_from(DEAR)),
    min_size=2,
    max_size=6,
)


def data_of(seed: int, size: int) -> bytes:
    """`size` bytes that follow from a seed."""
    word = b"%02x-%05d " % (seed, size)
    return (word * (size // len(word) + 1))[:size]


class Machine(RuleBasedStateMachine):
    """One case: a directory on the mount, one beside it, and two actors for each."""

    field: Field

    def __init__(self) -> None:
        super().__init__()
        self.field.check()
        self._mount, self._plain = self.field.new_case()
        self._actors: dict[str, tuple[Actor, Actor]] = {}
        self._open: dict[int, str] = {}
        self._steps = 0
        self._events: dict[int, str] = {}
        self._start_actors()
        self._seen = self._look()

    def teardown(self) -> None:
        self._end_actors()
        shutil.rmtree(self._plain, ignore_errors=True)
        shutil.rmtree(self._mount, ignore_errors=True)

    # making calls

    def _start_actors(self) -> None:
        self._actors = {name: (Actor(name, self._plain), Actor(name, self._mount)) for name in IDS}

    def _end_actors(self) -> None:
        for pair in self._actors.values():
            for actor in pair:
                actor.end()
        self._actors.clear()
        self._open.clear()

    def _do(self, actor: str, call: str, *arguments: Any, untimed: bool = False) -> Any:
        """Makes a call on both sides; the results, and everything that is there after it, must be equal."""
        began_ns = time.time_ns()
        here, there = self._both(actor, call, *arguments)
        note(f"{actor}: {call}{shown(arguments)} = {shown(here)}")
        assert here == there, (
            f"{call}{shown(arguments)} as {actor}: {shown(here)} in the plain directory, {shown(there)} on the mount"
        )
        self._compare(None if untimed else began_ns)
        return here

    def _both(self, actor: str, call: str, *arguments: Any) -> tuple[Any, Any]:
        plain, mount = self._actors[actor]
        here = plain.call(call, *arguments)
        try:
            return here, mount.call(call, *arguments)
        except ActorGone:
            self.field.break_down()
            raise

    def _look(self) -> tuple[dict[bytes, Node], dict[bytes, Node]]:
        return self._both("root", "tree")

    def _compare(self, began_ns: int | None) -> None:
        before, self._seen = self._seen, self._look()
        found = differences(*self._seen)
        if began_ns is not None:
            found += time_differences(before, self._seen, began_ns)
        for actor in self._actors:
            here, there = self._both(actor, "opened")
            assert here.keys() == there.keys()
            for slot in here:
                found += node_differences(f"open file {slot}", here[slot], there[slot])
        assert not found, "\n".join(found)

    # files

    @initialize(owner=st.sampled_from(["root", "user"]), events=EVENTS)
    def begin(self, owner: str, events: dict[int, str]) -> None:
        self._events = events
        self._do("root", "chmod", b"/", 0o1777)
        self._do("root", "mkdir", b"/d", 0o755)
        self._do("root", "chown", b"/d", IDS[owner][0], 61010, True)
        self._do(owner, "mkdir", b"/d/c", 0o755)
        for slot, path in enumerate([b"/a", b"/d/a"]):
            self._do(owner, "open", slot, path, os.O_RDWR | os.O_CREAT, 0o644)
            self._open[slot] = owner
            self._do(owner, "pwrite", slot, 0, data_of(slot, 9000))
        self._do(owner, "symlink", b"d", b"/c")

    @rule(actor=ACTORS, slot=SLOT, path=PATHS, flags=FLAGS, mode=MODES)
    def open(self, actor: str, slot: int, path: bytes, flags: int, mode: int) -> None:
        if slot in self._open:
            self._close(slot)
        if self._do(actor, "open", slot, path, flags, mode) is None:
            self._open[slot] = actor

    @precondition(lambda self: self._open)
    @rule(slot=SLOT)
    def close(self, slot: int) -> None:
        if slot in self._open:
            self._close(slot)

    def _close(self, slot: int) -> None:
        self._do(self._open[slot], "close", slot)
        del self._open[slot]

    def _on(self, slot: int, call: str, *arguments: Any, untimed: bool = False) -> None:
        """A call on an open file: the one in the slot, or the next."""
        slots = sorted(self._open)
        slot = min((one for one in slots if one >= slot), default=slots[0])
        self._do(self._open[slot], call, slot, *arguments, untimed=untimed)

    @precondition(lambda self: self._open)
    @rule(slot=SLOT, other=SLOT, name=_name, flags=FLAGS)
    def open_below(self, slot: int, other: int, name: bytes, flags: int) -> None:
        if slot in self._open and other not in self._open:
            actor = self._open[slot]
            if self._do(actor, "open_below", other, slot, name, flags) is None:
                self._open[other] = actor

    @precondition(lambda self: self._open)
    @rule(slot=SLOT, offset=OFFSETS, size=SIZES)
    def pread(self, slot: int, offset: int, size: int) -> None:
        self._on(slot, "pread", offset, size)

    @precondition(lambda self: self._open)
    @rule(slot=SLOT, offset=OFFSETS, size=SIZES, seed=SEEDS)
    def pwrite(self, slot: int, offset: int, size: int, seed: int) -> None:
        self._on(slot, "pwrite", offset, data_of(seed, size))

    @precondition(lambda self: self._open)
    @rule(slot=SLOT, offset=st.sampled_from([HUGE, HUGE + 4097]), size=SIZES, back=OFFSETS)
    def far(self, slot: int, offset: int, size: int, back: int) -> None:
        """A sparse write far away, and often back again."""
        self._on(slot, "pwrite", offset, data_of(1, size))
        if back % 4:
            self._on(slot, "ftruncate", back)

    @precondition(lambda self: self._open)
    @rule(slot=SLOT, size=SIZES, seed=SEEDS)
    def write(self, slot: int, size: int, seed: int) -> None:
        self._on(slot, "write", data_of(seed, size))

    @precondition(lambda self: self._open)
    @rule(slot=SLOT, size=SIZES)
    def read(self, slot: int, size: int) -> None:
        self._on(slot, "read", size)

    @precondition(lambda self: self._open)
    @rule(slot=SLOT, offset=st.sampled_from([0, 5000, -1, -100_000]))
    def seek_end(self, slot: int, offset: int) -> None:
        self._on(slot, "seek_end", offset)

    @precondition(lambda self: self._open)
    @rule(slot=SLOT, size=OFFSETS)
    def ftruncate(self, slot: int, size: int) -> None:
        self._on(slot, "ftruncate", size)

    @precondition(lambda self: self._open)
    @rule(slot=SLOT, data_only=st.booleans())
    def fsync(self, slot: int, data_only: bool) -> None:
        self._on(slot, "fsync", data_only)

    @precondition(lambda self: self._open)
    @rule(slot=SLOT, mode=MODES)
    def fchmod(self, slot: int, mode: int) -> None:
        self._on(slot, "fchmod", mode)

    @precondition(lambda self: self._open)
    @rule(slot=SLOT, uid=PEOPLE, gid=PEOPLE)
    def fchown(self, slot: int, uid: int, gid: int) -> None:
        self._on(slot, "fchown", uid, gid)

    @precondition(lambda self: self._open)
    @rule(source=SLOT, source_offset=OFFSETS, to=SLOT, offset=OFFSETS, size=SIZES)
    def copy(self, source: int, source_offset: int, to: int, offset: int, size: int) -> None:
        if source in self._open and to in self._open and self._open[source] == self._open[to]:
            self._do(self._open[source], "copy", source, source_offset, to, offset, size)

    @precondition(lambda self: self._open)
    @rule(slot=SLOT, offset=OFFSETS, size=SIZES)
    def map_read(self, slot: int, offset: int, size: int) -> None:
        self._on(slot, "map_read", offset, size)

    @precondition(lambda self: self._open)
    @rule(slot=SLOT, offset=OFFSETS, size=SIZES, seed=SEEDS, flush=st.booleans())
    def map_write(self, slot: int, offset: int, size: int, seed: int, flush: bool) -> None:
        self._on(slot, "map_write", offset, data_of(seed, size), flush)

    # names

    @rule(actor=ACTORS, path=PATHS, mode=MODES)
    def mkdir(self, actor: str, path: bytes, mode: int) -> None:
        self._do(actor, "mkdir", path, mode)

    @rule(actor=ACTORS, path=PATHS)
    def rmdir(self, actor: str, path: bytes) -> None:
        self._do(actor, "rmdir", path)

    @rule(actor=ACTORS, path=PATHS)
    def unlink(self, actor: str, path: bytes) -> None:
        self._do(actor, "unlink", path)

    @rule(actor=ACTORS, text=TARGETS, path=PATHS)
    def symlink(self, actor: str, text: bytes, path: bytes) -> None:
        self._do(actor, "symlink", text, path)

    @rule(actor=ACTORS, path=PATHS)
    def readlink(self, actor: str, path: bytes) -> None:
        self._do(actor, "readlink", path)

    @rule(actor=ACTORS, old=PATHS, new=PATHS)
    def link(self, actor: str, old: bytes, new: bytes) -> None:
        self._do(actor, "link", old, new)

    @rule(actor=ACTORS, old=PATHS, new=PATHS, flags=st.sampled_from([0, 0, 0, 1, 2, 3, 8]))
    def rename(self, actor: str, old: bytes, new: bytes, flags: int) -> None:
        self._do(actor, "rename", old, new, flags)

    @rule(actor=ACTORS, path=PATHS, kind=st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG]), mode=MODES)
    def mknod(self, actor: str, path: bytes, kind: int, mode: int) -> None:
        self._do(actor, "mknod", path, kind | mode, 0)

    @rule(actor=ACTORS, path=PATHS)
    def listdir(self, actor: str, path: bytes) -> None:
        self._do(actor, "listdir", path)

    # attributes

    @rule(actor=ACTORS, path=PATHS, follow=st.booleans())
    def stat(self, actor: str, path: bytes, follow: bool) -> None:
        self._do(actor, "stat", path, follow)

    @rule(actor=ACTORS, path=PATHS, mode=st.integers(0, 7))
    def access(self, actor: str, path: bytes, mode: int) -> None:
        self._do(actor, "access", path, mode)

    @rule(actor=ACTORS, path=PATHS, size=OFFSETS)
    def truncate(self, actor: str, path: bytes, size: int) -> None:
        self._do(actor, "truncate", path, size)

    @rule(actor=ACTORS, path=PATHS, mode=MODES)
    def chmod(self, actor: str, path: bytes, mode: int) -> None:
        self._do(actor, "chmod", path, mode)

    @rule(actor=ACTORS, path=PATHS, uid=PEOPLE, gid=PEOPLE, follow=st.booleans())
    def chown(self, actor: str, path: bytes, uid: int, gid: int, follow: bool) -> None:
        self._do(actor, "chown", path, uid, gid, follow)

    @rule(actor=ACTORS, path=PATHS, atime=TIME, mtime=TIME, follow=st.booleans())
    def utimens(self, actor: str, path: bytes, atime: tuple[int, int], mtime: tuple[int, int], follow: bool) -> None:
        self._do(actor, "utimens", path, (atime, mtime), follow)

    # caches, the daemon, the machine

    @invariant()
    def happen(self) -> None:
        """What was drawn for this step happens; what is there stays the same."""
        self._steps += 1
        event = self._events.get(self._steps, "")
        if not event:
            return
        note(f"now: {event}")
        if event == "split":
            # What is fetched afterwards are parts of what was uploaded at first.
            self._sync_everything()
            self.field.publish(evict=True)
            self._both("root", "rewrite_middles")
            self._compare(None)
            event = "evict"
        before = self._seen[1]
        if event in ("publish", "evict", "kill", "restore"):
            self._sync_everything()
        if event in ("publish", "evict"):
            self.field.publish(evict=event == "evict")
        if event in ("remount", "kill", "restore"):
            self._end_actors()
            self.field.begin_again(event)
            self._start_actors()
        else:
            self._both("root", "forget_everything")
            if event != "forget pages":
                self.field.forget_names()
        self._compare(None)
        found = same_files(before, self._seen[1])
        assert not found, "\n".join(found)

    def _sync_everything(self) -> None:
        for actor in self._actors:
            self._both(actor, "sync_opened")
        self._both("root", "sync_everything")


def machine_on(field: Field) -> Callable[[], Machine]:
    """A state machine whose cases lie on the mount of `field`."""
    return type("Case", (Machine,), {"field": field})
