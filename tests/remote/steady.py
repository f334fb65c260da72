"""A database at work for long on virtual time, and what it costs on the backends, counted.

The load is that of LMDB: scattered pages of 4 KiB, all over a file, of bytes that do not compress, and hot roots that
change every time.  The flusher cuts, collects, rewrites thin packs and renews its metadata as in a mount.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from qsfs.backend.memory import MemoryStore
from qsfs.format.extent import PackKind
from qsfs.remote.packing import Sealer
from qsfs.store.limits import Limits
from qsfs.store.schema import PAGE
from tests.remote import flush_machine
from tests.remote.flush_machine import FlushMachine, restore
from tests.remote.flushing import VirtualClock, flushing, pack_rows
from tests.remote.harness import World, make_world

BACKENDS, DATA_SHARDS, PARITY_SHARDS = 24, 16, 4
_PACK_KIND = 84


@dataclass(frozen=True)
class Load:
    """`pages` of a file; every `cut_seconds` `changed` random ones and `hot` others are overwritten, `cuts` times.

    What is measured begins after `warm_up` cuts.  `pack_pages`: where packs are closed; 0: as a mount does it.
    """

    pages: int = 2048
    changed: int = 400
    hot: int = 8
    cuts: int = 30
    warm_up: int = 10
    cut_seconds: float = 60.0
    pack_pages: int = 0
    retention_seconds: float = 600.0
    seed: int = 1
    evict: bool = False


@dataclass
class Cost:
    """What was counted: bytes stored by kind, on all backends, and at the end; pages that changed; live bytes."""

    changed_bytes: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)
    live_bytes: int = 0
    packs: int = 0
    rewrite: dict[str, int] = field(default_factory=dict)

    @property
    def per_byte(self) -> float:
        """Bytes sent for each byte of the pages that changed."""
        return self.sent.total() / self.changed_bytes

    @property
    def metadata_per_page(self) -> float:
        """Bytes of metadata sent for each page that changed: each is a changed row."""
        return self.sent["metadata"] / (self.changed_bytes / PAGE)

    @property
    def held_per_byte(self) -> float:
        """Bytes of packs that something lives in, as stored, for each byte that lives."""
        return self.held["live packs"] / self.live_bytes

    def report(self) -> dict[str, float]:
        """All of it, for JSON."""
        return {
            "changed_bytes": self.changed_bytes,
            "sent_per_byte": self.per_byte,
            **{f"sent_{kind}_per_byte": count / self.changed_bytes for kind, count in sorted(self.sent.items())},
            "metadata_bytes_per_page": self.metadata_per_page,
            "held_per_byte": self.held_per_byte,
            "held_with_dead_per_byte": self.held["data"] / self.live_bytes,
            "held_metadata_per_byte": self.held["metadata"] / self.live_bytes,
            "packs": self.packs,
            **self.rewrite,
        }


async def steady_cost(load: Load, directory: Path, clock: MockClock) -> Cost:
    """Runs a load.  At the end the file is restored from the backends and must be as it was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flush_machine, "SmallSealer", _sealer(load))
        world = await make_world(BACKENDS, k=DATA_SHARDS, m=PARITY_SHARDS)
        machine = FlushMachine(world, directory / "cache", limits=_limits(load))
        machine.clock = VirtualClock(clock)
        return await _run(load, world, machine)


async def _run(load: Load, world: World, machine: FlushMachine) -> Cost:
    source = random.Random(load.seed)
    cost = Cost()
    async with flushing(
        machine, cut_seconds=load.cut_seconds, quiet_seconds=5.0, retention_seconds=load.retention_seconds
    ) as flusher:
        number = machine.create("data.mdb")
        content = bytearray(source.randbytes(load.pages * PAGE))
        for first in range(0, load.pages, 256):
            machine.write(number, first, bytes(content[first * PAGE : (first + 256) * PAGE]))
            await machine.committer.commit()
        await flusher.sync()
        hot = source.sample(range(load.pages), load.hot)
        with counting(world) as sent:
            for cut in range(load.cuts):
                if cut == load.warm_up:
                    await flusher.sync()
                    sent.clear()
                    cost.changed_bytes = 0
                some = {*hot, *(source.randrange(load.pages) for _ in range(load.changed))}
                for page in sorted(some):
                    data = source.randbytes(PAGE)
                    machine.write(number, page, data)
                    content[page * PAGE : (page + 1) * PAGE] = data
                cost.changed_bytes += len(some) * PAGE
                await machine.committer.commit()
                if load.evict:
                    machine.evict(number)
                await trio.sleep(load.cut_seconds)
            await flusher.sync()
            cost.sent = Counter(sent)
        cost.rewrite = flusher.status()["rewrite"]
        rows = [row for row in pack_rows(machine).values() if row.kind == PackKind.DATA and row.live]
        cost.packs, cost.live_bytes = len(rows), sum(row.live for row in rows)
        cost.held = stored(world)
        live = {row.pack_id for row in rows}
        cost.held["live packs"] = sum(
            size for store in world.data for key, size in _sizes(store) if any(pack_id in key for pack_id in live)
        )
        assert restore(world).files["data.mdb"] == bytes(content)
    return cost


@contextmanager
def counting(world: World) -> Iterator[Counter[str]]:
    """Counts the bytes of keys and values that are sent to any backend, again and again sent ones each time."""
    sent: Counter[str] = Counter()

    def counted(store: MemoryStore) -> None:
        put = store.put

        def count(key: bytes, value: bytes) -> None:
            sent[kind_of(key, value)] += len(key) + len(value)
            put(key, value)

        patch.setattr(store, "put", count)

    with pytest.MonkeyPatch.context() as patch:
        for store in {id(store): store for store in (*world.data, *world.control)}.values():
            counted(store)
        yield sent


def stored(world: World) -> Counter[str]:
    """Bytes of all keys and values on all backends, by what they are."""
    found: Counter[str] = Counter()
    for store in {id(store): store for store in (*world.data, *world.control)}.values():
        for key in list(store.keys()):
            value = store.peek(key) or b""
            found[kind_of(key, value)] += len(key) + len(value)
    return found


def kind_of(key: bytes, value: bytes) -> str:
    """What a record is."""
    kind = {b"h": "heads", b"s": "shards"}.get(key[5:6], "other")
    if kind == "shards":
        return "data" if value[_PACK_KIND] == 1 else "metadata"
    return kind


def _sizes(store: MemoryStore) -> Iterator[tuple[bytes, int]]:
    for key in list(store.keys()):
        yield key, len(key) + len(store.peek(key) or b"")


def _sealer(load: Load) -> type[Sealer]:
    if not load.pack_pages:
        return Sealer

    class Small(Sealer):
        pack_bytes = load.pack_pages * PAGE  # type: ignore[assignment]

    return Small


def _limits(load: Load) -> Limits:
    size = load.pages * PAGE
    return Limits(
        map_bytes=(64 << 20) + 4 * size,
        journal_bytes=1 << 20,
        spool_bytes=(32 << 20) + size // 2,
        group_bytes=8 << 20,
        uncovered_bytes=1 << 20,
        largest_append=64 << 10,
        high_bytes=(48 << 20) + 3 * size,
        low_bytes=(40 << 20) + 2 * size,
        full_bytes=(56 << 20) + 3 * size,
    )
