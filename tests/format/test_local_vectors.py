"""What a cache directory and a 0-db hold is written as the vectors say, and what they hold is still read."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import trio

from qsfs.clock import FixedClock
from qsfs.format.head import HeadRef
from qsfs.remote.base import BASE_KEY, PUBLISHED_KEY, decode_local_head
from qsfs.remote.deaths import Death, death_key
from qsfs.remote.running import RUNNING_KEY, RunningTime
from qsfs.remote.scanning import Walk, scan_key
from qsfs.remote.spool import Spool
from qsfs.remote.strays import Stray, stray_key
from qsfs.remote.unreclaimed import Unreclaimed, deleted_key
from qsfs.store.schema import ROOT_INODE, BlockRow, Table, u64
from qsfs.zdb.namespace import Namespace
from tests.core.machine import page
from tests.format import local_vectors, samples
from tests.format.make_vectors import VECTORS

ROOT = Path(__file__).parents[2]


def load(name: str) -> Any:
    return json.loads((VECTORS / name).read_text(encoding="utf-8"))


def stored_rows() -> dict[bytes, bytes]:
    return {bytes.fromhex(key): bytes.fromhex(row) for key, row in load("local-2.json")["local"].items()}


def test_a_cache_directory_is_written_as_the_vectors_say():
    stored = load("local-2.json")
    made = json.loads(json.dumps(local_vectors.made()))
    assert made.keys() == stored.keys()
    for name in made:
        assert made[name] == stored[name], f"{name} is written differently than by earlier versions"


def test_a_stored_block_row_is_read():
    row = bytes.fromhex(load("local-2.json")["block_row"])
    assert len(row) == 82
    assert BlockRow.decode(row) == local_vectors.BLOCK


def test_stored_rows_of_local_are_read():
    rows = stored_rows()
    for key, ours in ((BASE_KEY, False), (PUBLISHED_KEY, True)):
        found = decode_local_head(rows[key], samples.KEYS)
        assert (found.sealed, found.head, found.ours) == (samples.sealed_head(), samples.head(), ours)
    assert Stray.decode(stray_key(local_vectors.PACK_ID), rows[stray_key(local_vectors.PACK_ID)]) == local_vectors.STRAY
    for number, (death, walk) in enumerate(zip(local_vectors.DEATHS, local_vectors.WALKS, strict=True), 0x0102):
        assert Death.decode(rows[death_key(number)]) == death
        assert Walk.decode(rows[scan_key(number)]) == walk


def test_a_stored_running_time_goes_on():
    store: Any = local_vectors.LocalRows()
    store.rows = stored_rows()
    time = RunningTime(store, FixedClock(2))
    assert time.resume(local_vectors.OWNER, HeadRef(local_vectors.OWNER, 3, bytes(32)), ())
    assert time.seconds == 77.75
    assert RUNNING_KEY in store.rows


def test_stored_counts_of_deleted_bytes_go_on():
    store: Any = local_vectors.LocalRows()
    store.rows = stored_rows()
    member = local_vectors.member()
    assert deleted_key(member.number) in store.rows
    assert Unreclaimed(store).bytes(member) == 5 + 2**40


def test_stored_spool_files_are_taken_by_the_next_mount(tmp_path: Path):
    files = {name: bytes.fromhex(content) for name, content in load("local-2.json")["spool"].items()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    spool = Spool(tmp_path, 4 << 20)
    sealed, pack = samples.sealed_head(), samples.metadata_pack()
    assert spool.heads == {sealed.ref: sealed}
    *before, last = spool.abandoned
    assert tuple(before) == local_vectors.ABANDONED
    assert (last.pack_id, last.owner_epoch) == (pack.ref.pack_id, pack.ref.owner_epoch)
    (name,) = (name for name in files if name.endswith(".pack"))
    (tmp_path / name).write_bytes(files[name])
    assert spool.read_pack(local_vectors.GENERATION, local_vectors.ORDINAL) == pack.body


def test_stored_appends_are_replayed(tmp_path: Path):
    """Every kind of record and of change in it."""
    machine = local_vectors.prepared(tmp_path)
    offset = 0
    for append in map(bytes.fromhex, load("local-2.json")["journal"]):
        machine.store.journal.write([(1, offset, append)])
        offset += len(append)
    machine.crash()
    assert machine.names() == {"one", "other"}
    number = int.from_bytes((machine.store.get(Table.ENTRIES, u64(ROOT_INODE) + b"other") or b"")[:8], "little")
    assert number == 4 and machine.store.inode(3) is None
    assert machine.read(number) == b"\0" + b"b" * 4095 + bytes(4096)
    assert machine.page(2, 0) == page("a")
    root = machine.inode(ROOT_INODE)
    assert (root.mode, root.ctime_ns) == (0o40700, -5)
    assert machine.store.get(Table.XATTRS, u64(ROOT_INODE) + b"user.a") == b"value"
    assert machine.inode(number).mtime_ns == machine.clock.time_ns() + 10**9
    machine.close()


def test_a_0_db_is_written_as_the_vectors_say():
    assert local_vectors.zdb() == load("zdb-1.json")


def test_a_stored_0_db_is_read(tmp_path: Path):
    for name, content in load("zdb-1.json").items():
        (tmp_path / name).write_bytes(bytes.fromhex(content))
    namespace = Namespace.load(
        b"namespace", tmp_path, clock=FixedClock(4), file_bytes=1 << 20, durable_appends=False
    )
    entries = list(namespace.index.after(None))
    values = {entry.key: bytes(trio.run(partial(namespace.value, entry))) for entry in entries}
    assert values == {b"key": b"value", b"empty": b""}
    assert namespace.settings.maxsize == 4096
    namespace.close()


def test_every_name_of_a_row_of_local_is_documented():
    """What nobody has written down, nobody keeps compatible."""
    parts = (ROOT / "qsfs" / part for part in ("store", "remote", "filesystem", "daemon"))
    text = "\n".join(module.read_text(encoding="utf-8") for part in parts for module in part.glob("*.py"))
    names = set(re.findall(r'^\w*_(?:KEY|PREFIX|ROW) = b"([a-z:-]{3,})"$', text, re.MULTILINE))
    assert len(names) >= 16
    documented = (ROOT / "docs" / "local-store.md").read_text(encoding="utf-8")
    assert {name for name in names if f"`{name}`" not in documented} == set()
