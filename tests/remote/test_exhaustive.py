"""Every interleaving of a publishing and an owning mount on three backends, judged by the real rules.

The backends are sets, a step is one write or one reading, and all orders of steps are walked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from qsfs.format.head import HeadRef, Owner
from qsfs.remote.control import Reading
from qsfs.remote.fencing import fenced
from qsfs.remote.quorum import FleetQuorum, fence_quorum, reached

A = Owner(1, b"a" * 16)
B = Owner(2, b"b" * 16)
TEN = HeadRef(A, 10, b"\x0a" * 32)
ELEVEN = HeadRef(A, 11, b"\x0b" * 32)

NOTHING_YET: frozenset[Owner | HeadRef] = frozenset({A, TEN})

# What a conversation with one backend has done so far.
NONE, WRITTEN, COUNTED, DEAD = range(4)


@dataclass(frozen=True)
class World:
    """What each backend holds, how far each conversation is, and what the mounts concluded.

    `found` is the newest head that B has read on backends that count; `first` the one that it
    publishes as its own, once its owner record counts with a quorum.
    """

    held: tuple[frozenset[Owner | HeadRef], ...]
    a: tuple[int, ...]
    b_owner: tuple[int, ...]
    b_head: tuple[int, ...]
    a_fenced: bool = False
    b_gone: bool = False
    found: HeadRef = TEN
    first: HeadRef | None = None


def start(count: int) -> World:
    nothing = (NONE,) * count
    return World((NOTHING_YET,) * count, nothing, nothing, nothing)


def reading(world: World, backend: int) -> Reading:
    """What `read_control` makes of a backend: the largest owner, the newest head and those of its owner."""
    held = world.held[backend]
    owners = [item for item in held if isinstance(item, Owner)]
    heads = [item for item in held if isinstance(item, HeadRef)]
    newest = max(heads)
    same = frozenset(ref for ref in heads if ref.owner == newest.owner)
    return Reading(backend, frozenset({max(owners)}), same)


def own_head(found: HeadRef) -> HeadRef:
    return HeadRef(B, found.generation, b"\xbb" * 31 + bytes([found.generation]))


def changed(states: tuple[int, ...], backend: int, state: int) -> tuple[int, ...]:
    return (*states[:backend], state, *states[backend + 1 :])


def counted(states: tuple[int, ...]) -> set[int]:
    return {backend for backend, state in enumerate(states) if state == COUNTED}


def stored(world: World, backend: int, item: Owner | HeadRef) -> World:
    return replace(world, held=changed_held(world.held, backend, item))


def changed_held(
    held: tuple[frozenset[Owner | HeadRef], ...], backend: int, item: Owner | HeadRef
) -> tuple[frozenset[Owner | HeadRef], ...]:
    return (*held[:backend], held[backend] | {item}, *held[backend + 1 :])


def steps(world: World, quorum: FleetQuorum, *, mixed: bool) -> Iterator[World]:
    """All worlds one step away.  `mixed` breaks the rule: a reading counts without a write before it."""
    for backend in range(len(world.held)):
        yield from steps_of_a(world, backend)
        yield from steps_of_b(world, backend, quorum, mixed=mixed)


def steps_of_a(world: World, backend: int) -> Iterator[World]:
    """A publishes head 11."""
    if world.a_fenced:
        return
    if world.a[backend] == NONE:
        yield stored(replace(world, a=changed(world.a, backend, WRITTEN)), backend, ELEVEN)
    elif world.a[backend] == WRITTEN:
        read = reading(world, backend)
        if fenced(read, owner=A, written={ELEVEN}, published=TEN, records=None):
            yield replace(world, a=changed(world.a, backend, DEAD), a_fenced=True)
        else:
            yield replace(world, a=changed(world.a, backend, COUNTED))


def steps_of_b(world: World, backend: int, quorum: FleetQuorum, *, mixed: bool) -> Iterator[World]:
    """B owns: first its record, then the newest head that it found, as its own."""
    if world.b_gone:
        return
    if world.first is None:
        state = world.b_owner[backend]
        if state == NONE:
            yield stored(replace(world, b_owner=changed(world.b_owner, backend, WRITTEN)), backend, B)
        if state == WRITTEN or (mixed and state == NONE):
            read = reading(world, backend)
            if fenced(read, owner=B, written=(), published=None, records=None):
                yield replace(world, b_gone=True)
                return
            found = max(world.found, *read.heads)
            after = replace(world, b_owner=changed(world.b_owner, backend, COUNTED), found=found)
            if reached([quorum], counted(after.b_owner)):
                after = replace(after, first=own_head(found))
            yield after
        return
    state = world.b_head[backend]
    if state == NONE:
        yield stored(replace(world, b_head=changed(world.b_head, backend, WRITTEN)), backend, world.first)
    elif state == WRITTEN:
        read = reading(world, backend)
        if fenced(read, owner=B, written={world.first}, published=None, records=None):
            yield replace(world, b_gone=True)
        else:
            yield replace(world, b_head=changed(world.b_head, backend, COUNTED))


def forks(world: World, quorum: FleetQuorum) -> bool:
    """Both published, and B went on from a head that A's is newer than: A's head 11 is lost."""
    published = reached([quorum], counted(world.a))
    owns = reached([quorum], counted(world.b_head))
    return published and owns and world.found != ELEVEN


def walk(count: int, *, mixed: bool = False, forgetful: bool = False) -> tuple[int, int]:
    """Visits every world that can be reached; how many there are, and how many of them are forks.

    `forgetful`: the first backend may go back to what it held at the start, at any time.
    """
    quorum = FleetQuorum(1, frozenset(range(count)), fence_quorum(count, 1, 1))
    seen = {start(count)}
    pending = list(seen)
    forked = 0
    while pending:
        world = pending.pop()
        forked += forks(world, quorum)
        forgotten = [replace(world, held=(NOTHING_YET, *world.held[1:]))] if forgetful else []
        for after in (*forgotten, *steps(world, quorum, mixed=mixed)):
            if after not in seen:
                seen.add(after)
                pending.append(after)
    return len(seen), forked


def test_no_order_of_steps_on_three_backends_lets_two_mounts_publish():
    """N = 3, Q = 2, any backend may fall silent at any step (its steps simply never come)."""
    worlds, forked = walk(3)
    assert worlds > 10_000
    assert forked == 0


def test_the_walk_finds_the_fork_where_readings_count_without_a_write_before():
    """Proof that the walk above can fail: the rule of one set of backends is needed."""
    _, forked = walk(3, mixed=True)
    assert forked > 0


def test_one_forgetful_backend_of_three_is_one_too_many():
    """2Q - N - 1 = 0 of three may be stale, and the walk shows why."""
    _, forked = walk(3, forgetful=True)
    assert forked > 0


@pytest.mark.slow
def test_one_forgetful_backend_of_four_is_withstood():
    """2Q - N - 1 = 1 of four may be stale."""
    assert fence_quorum(4, 1, 1).may_be_stale == 1
    _, forked = walk(4, forgetful=True)
    assert forked == 0


@pytest.mark.slow
def test_no_order_of_steps_on_four_backends_lets_two_mounts_publish():
    worlds, forked = walk(4)
    assert worlds > 10_000
    assert forked == 0
