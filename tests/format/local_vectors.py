"""Writes tests/vectors/local-2.json and zdb-1.json: what a cache directory and the disk of a 0-db hold.

Run `python -m tests.format.local_vectors` only when a version is added; what a released version wrote never changes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio

from qsfs.clock import FixedClock
from qsfs.config import PolicyRule
from qsfs.filesystem.policies import Policies
from qsfs.filesystem.policy_keeper import RULES_KEY
from qsfs.format.head import Owner
from qsfs.remote.base import BASE_KEY, PUBLISHED_KEY, encode_local_head
from qsfs.remote.deaths import Death, death_key
from qsfs.remote.running import RunningTime
from qsfs.remote.scanning import Walk, scan_key
from qsfs.remote.spool import AbandonedPack, Spool
from qsfs.remote.strays import Place, Stray, stray_key
from qsfs.remote.unreclaimed import Unreclaimed
from qsfs.store.schema import ROOT_INODE, BlockRow, Table, u64
from qsfs.zdb.namespace import Namespace
from tests.core.machine import Machine, page
from tests.format import samples
from tests.format.make_vectors import VECTORS

BLOCK = BlockRow(0b1011, 0b0010, (2**64 - 1, 2, 3, 4), (5, 6, 7, 2**63), bytes(range(16)))
OWNER = Owner(9, b"running mount id")
IDENTITY = bytes(range(100, 116))
PACK_ID = bytes(range(16, 32))
DEATHS = (Death(PACK_ID, 41, None), Death(PACK_ID, 41, 1234.5))
STRAY = Stray(PACK_ID, 7, 99.25, (Place(3, 0, 262_280), Place(65_535, 5, 200)))
WALKS = (Walk(IDENTITY), Walk(IDENTITY, b"cursor", True, 1_700_000_000_000_000_000, 17.5))
RULES = (PolicyRule(match="*.lmdb", atomic_sync=True, unavailable="wait"), PolicyRule(match="/tmp/*", local_only=True))
ABANDONED = (AbandonedPack(PACK_ID, 7), AbandonedPack(IDENTITY, 8))
GENERATION, ORDINAL = 0xAB, 0xC


class LocalRows:
    """Stands for a store of which nothing but rows of LOCAL is used."""

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}

    def local(self, name: bytes) -> bytes | None:
        return self.rows.get(name)

    def set_local(self, name: bytes, value: bytes) -> None:
        self.rows[name] = value


def counted(store: Any, clock: FixedClock) -> RunningTime:
    """The running time of a store of which nothing was recorded, for `OWNER`."""
    time = RunningTime(store, clock)
    time.resume(OWNER, None, ())
    return time


def member() -> Any:
    """The backend on which something was deleted."""
    return SimpleNamespace(number=0x0102, entry=SimpleNamespace(identity=IDENTITY))


def local_rows() -> dict[bytes, bytes]:
    """The rows of LOCAL that have a form of their own."""
    store, clock = LocalRows(), FixedClock(1)
    time = counted(store, clock)
    clock.advance(77.75)
    time.note()
    store.set_local(BASE_KEY, encode_local_head(samples.sealed_head(), ours=False))
    store.set_local(PUBLISHED_KEY, encode_local_head(samples.sealed_head(), ours=True))
    store.set_local(RULES_KEY, Policies(RULES).fingerprint)
    for number, death in enumerate(DEATHS, 0x0102):
        store.set_local(death_key(number), death.encode())
    store.set_local(stray_key(STRAY.pack_id), STRAY.encode())
    for number, walk in enumerate(WALKS, 0x0102):
        store.set_local(scan_key(number), walk.encode())
    unreclaimed: Any = Unreclaimed(store)  # type: ignore[arg-type]
    unreclaimed.add(member(), 5)
    unreclaimed.add(member(), 2**40)
    return store.rows


def spool_files(directory: Path) -> dict[str, bytes]:
    """One file of each kind, by name."""
    spool = Spool(directory, 4 << 20)
    pack = samples.metadata_pack()
    spool.write_pack(GENERATION, ORDINAL, pack.ref, pack.body)
    spool.write_head(samples.sealed_head())
    spool.set_abandoned(ABANDONED)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def prepared(directory: Path) -> Machine:
    """A machine with two files of which everything is committed, as it is before the appends."""
    machine = Machine(directory)
    for name in ("one", "other"):
        machine.write(machine.create(name), 0, page("a"))
    machine.commit()
    return machine


def appends(directory: Path) -> list[bytes]:
    """Appends to the journal with every kind of record, and every kind of change among them."""
    machine = prepared(directory)
    with machine.store.change() as change:
        change.put(Table.XATTRS, u64(ROOT_INODE) + b"user.a", b"value")
        change.patch(ROOT_INODE, mode=0o40700, ctime_ns=-5)
    new = machine.create("new")
    machine.clock.advance(1)
    machine.write_at(new, 1, b"b" * 4095)
    machine.write(new, 3, page("c"))
    machine.truncate(new, 2)
    first = machine.frame(new)
    machine.rename_over("new", "other")
    second = machine.frame(new)
    machine.close()
    assert first is not None and second is not None
    return [data for _, _, data in (first, second)]


def made() -> dict[str, Any]:
    """What a cache directory holds that has a form of its own."""
    return {
        "block_row": BLOCK.encode().hex(),
        "local": {key.hex(): row.hex() for key, row in local_rows().items()},
        "spool": {name: content.hex() for name, content in _scratch(spool_files).items()},
        "journal": [frame.hex() for frame in _scratch(appends)],
    }


async def _store_values(namespace: Namespace) -> None:
    await namespace.put(b"key", b"value")
    await namespace.put(b"empty", b"")
    await namespace.put(b"gone", b"for a while")
    await namespace.delete(b"gone")


def zdb_files(directory: Path) -> dict[str, bytes]:
    """The files of a namespace of our 0-db, stopped in an orderly way."""
    path = directory / "namespace"
    namespace = Namespace.create(
        b"namespace", path, clock=FixedClock(3), file_bytes=1 << 20, durable_appends=False, maxsize=4096
    )
    trio.run(partial(_store_values, namespace))
    namespace.close()
    return {file.name: file.read_bytes() for file in path.iterdir()}


def zdb() -> dict[str, Any]:
    """What our 0-db keeps on its disk."""
    return {name: content.hex() for name, content in _scratch(zdb_files).items()}


def _scratch(make: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        return make(Path(directory))


if __name__ == "__main__":
    for name, vectors in (("local-2.json", made()), ("zdb-1.json", zdb())):
        text = json.dumps(vectors, indent=1, sort_keys=True)
        (VECTORS / name).write_text(text + "\n", encoding="utf-8")
