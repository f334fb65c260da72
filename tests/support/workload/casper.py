"""The two environments of a Casper node, and its unit files: each step is one block.

`storage.lmdb` is opened with WRITEMAP, so each of its commits syncs; `data.lmdb` with WRITEMAP, MAP_ASYNC and
NOMETASYNC and one forced sync a block, before the block goes into `storage.lmdb`.  Both files are as long as
their maps from the first moment on.  The unit file is appended to by plain writes and never synced.

Options: `validators` and `transactions` a block (a real node: 100 and 2 to 6), `full_maps` for the map sizes
of a production node (sparse files of 1 and 2 TiB), `units`: "" for none, "plain" (must come back as a prefix
of what was appended, which qsfs promises and a bare disk does not), "durable" (each write at once),
`default_names` for directories with data.mdb and lock.mdb instead of single files.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb

from tests.support.workload.acks import Acks, Promises, content
from tests.support.workload.lmdb_writer import check_structure

SIGNATURES = "block_metadata_v2"
STORAGE_TABLES = (
    "transactions",
    "block_body_v2",
    "block_header_v2",
    "versioned_approvals_hashes",
    "execution_results",
    "versioned_transfers",
    SIGNATURES,
    "state_store",
)
TRIE = "TRIE_STORE"
STATE_KEY = b"completed_blocks_disjoint_sequences"
MAPS = {False: (45_097_156_608, 32_212_254_720), True: (1_127_428_915_200, 2_089_072_132_096)}
UNITS = "unit_files/unit_0.dat"
UNIT_SIZE = 180
SIGNATURE = 120

Record = tuple[str, bytes, bytes]


@dataclass
class Block:
    """What one block writes: commits to `storage.lmdb` before and after the state, and the state's own."""

    before: list[list[Record]] = field(default_factory=list)
    state: list[tuple[bytes, bytes]] = field(default_factory=list)
    after: list[list[Record]] = field(default_factory=list)

    def storage(self) -> dict[tuple[str, bytes], bytes]:
        """The records of `storage.lmdb` as the block leaves them."""
        commits = self.before + self.after
        return {(table, key): value for commit in commits for table, key, value in commit}


def run(
    directory: Path,
    acks: Acks,
    steps: Iterable[int],
    seed: str,
    *,
    validators: int = 9,
    transactions: int = 2,
    full_maps: bool = False,
    units: str = "",
    default_names: bool = False,
) -> None:
    """Makes one block a step and acknowledges it when its last commit returned."""
    storage, data = open_environments(directory, full_maps=full_maps, default_names=default_names)
    tables = {name: storage.open_db(name.encode()) for name in STORAGE_TABLES}
    trie = data.open_db(TRIE.encode())
    log = _open_units(directory) if units else -1
    try:
        for height in steps:
            acks.begin(height)
            block = plan(seed, height, validators, transactions)
            _commit(storage, tables, block.before)
            if log >= 0:
                for number in range(2 * validators + 1):
                    os.write(log, unit(seed, height, number))
            with data.begin(write=True) as transaction:
                for key, value in block.state:
                    transaction.put(key, value, db=trie)
            data.sync(True)
            _commit(storage, tables, block.after)
            acks.ack(height)
    finally:
        if log >= 0:
            os.close(log)
        storage.close()
        data.close()


def verify(directory: Path, promises: Promises) -> list[str]:
    """Both structures; then all records of all blocks up to the tip that `storage` names, in both."""
    options: dict[str, Any] = {"validators": 9, "transactions": 2, "units": "", "default_names": False}
    options |= promises.options
    paths = [_data_file(directory / name, options["default_names"]) for name in ("storage.lmdb", "data.lmdb")]
    problems = [f"{path} is missing" for path in paths if not path.exists()]
    problems = problems or [problem for path in paths for problem in check_structure(path)]
    if problems:
        # Until the first commit has returned, LMDB does not promise a valid file.
        return problems if promises.acked >= 0 else []
    storage, data = open_environments(
        directory, full_maps=options.get("full_maps", False), default_names=options["default_names"]
    )
    try:
        held = _read_tables(storage, STORAGE_TABLES)
        tries = _read_tables(data, (TRIE,))
    finally:
        storage.close()
        data.close()
    state = held.get(("state_store", STATE_KEY))
    tip = struct.unpack("<QQ", state)[1] if state is not None else -1
    if not promises.acked <= tip <= promises.begun:
        promised = f"acknowledged was {promises.acked}, begun {promises.begun}"
        return [f"{directory / 'storage.lmdb'}: is at block {tip}; {promised}"]
    problems = []
    for height in range(tip + 1):
        block = plan(promises.seed, height, options["validators"], options["transactions"])
        wanted = {(TRIE, key): value for key, value in block.state} | {
            (table, key): value for (table, key), value in block.storage().items() if key != STATE_KEY
        }
        for (table, key), value in wanted.items():
            found = (tries if table == TRIE else held).get((table, key))
            # Signatures of a block still come in after it counts as complete.
            late = height > promises.acked and table == SIGNATURES and found and value.startswith(found)
            if found != value and not late:
                what = "is missing" if found is None else f"holds {len(found)} wrong bytes"
                file = "data.lmdb" if table == TRIE else "storage.lmdb"
                problems.append(f"{directory / file}: block {height}: {table} record {key.hex()} {what}")
    if options["units"]:
        needed = promises.acked if options["units"] == "durable" else -1
        problems += _verify_units(directory / UNITS, promises, needed, 2 * options["validators"] + 1)
    return problems


def open_environments(
    directory: Path, *, full_maps: bool = False, default_names: bool = False
) -> tuple[lmdb.Environment, lmdb.Environment]:
    """`storage` and `data`, opened as the node does."""
    sizes = MAPS[full_maps]
    common: dict[str, Any] = {"subdir": default_names, "writemap": True, "readahead": False}
    return (
        lmdb.open(str(directory / "storage.lmdb"), map_size=sizes[0], max_readers=5, max_dbs=17, **common),
        lmdb.open(
            str(directory / "data.lmdb"),
            map_size=sizes[1],
            max_readers=512,
            max_dbs=2,
            map_async=True,
            metasync=False,
            **common,
        ),
    )


def plan(seed: str, height: int, validators: int, transactions: int) -> Block:
    """The records of block `height`; sizes follow what a node writes."""
    choose = random.Random(f"{seed}/{height}")
    count = min(40, round(choose.expovariate(1 / transactions))) if transactions else 0
    block = Block()

    def record(table: str, number: int, size: int) -> Record:
        key = hashlib.blake2b(f"{seed}/{height}/{table}/{number}".encode(), digest_size=32).digest()
        return table, key, content(size, key.hex())

    for number in range(count):
        size = 500 if choose.random() < 0.7 else min(400_000, round(choose.lognormvariate(7.5, 1)))
        block.before.append([record("transactions", number, size)])
    nodes = 8 * count + 6
    sizes = [851] + [8705] * min(6, nodes)
    sizes += [257 + 33 * choose.randint(2, 59) for _ in range(nodes)]
    sizes += [257 + 33 * choose.randint(1, 4) for _ in range(nodes)]
    sizes += [min(1186, max(39, round(choose.lognormvariate(4.8, 0.6)))) for _ in range(nodes)]
    block.state = [record(TRIE, number, size)[1:] for number, size in enumerate(sizes)]
    whole = [record("block_body_v2", 0, 60 + 33 * count), record("block_header_v2", 0, 250)]
    whole.append(record("versioned_approvals_hashes", 0, 630 + 33 * count))
    whole += [record("execution_results", number, 4929) for number in range(count)]
    whole.append(record("versioned_transfers", 0, 8 + 170 * count))
    block.after.append(whole)
    first = 56 + SIGNATURE * (2 * validators // 3)
    block.after.append([record(SIGNATURES, 0, first)])
    block.after.append([("state_store", STATE_KEY, struct.pack("<QQ", 0, height))])
    for late in range(1, validators // 3 + 1):
        block.after.append([record(SIGNATURES, 0, first + SIGNATURE * late)])
    return block


def unit(seed: str, height: int, number: int) -> bytes:
    """One entry of the unit file: its length, then as many bytes."""
    return struct.pack("<Q", UNIT_SIZE) + content(UNIT_SIZE, seed, height, number, "unit")


def _commit(
    environment: lmdb.Environment, tables: dict[str, lmdb._Database], commits: list[list[Record]]
) -> None:
    for records in commits:
        with environment.begin(write=True) as transaction:
            for table, key, value in records:
                transaction.put(key, value, db=tables[table])


def _read_tables(environment: lmdb.Environment, names: Iterable[str]) -> dict[tuple[str, bytes], bytes]:
    found: dict[tuple[str, bytes], bytes] = {}
    for name in names:
        try:
            table = environment.open_db(name.encode(), create=False)
        except lmdb.NotFoundError:
            continue
        with environment.begin() as transaction:
            found |= {(name, key): value for key, value in transaction.cursor(db=table)}
    return found


def _verify_units(path: Path, promises: Promises, needed: int, entries: int) -> list[str]:
    """The unit file is what was appended, up to some byte; with `needed` at least to that block's end."""
    found = path.read_bytes() if path.exists() else b""
    size = (UNIT_SIZE + 8) * entries
    if len(found) < (needed + 1) * size:
        return [f"{path} has {len(found)} bytes, {(needed + 1) * size} were written"]
    for height in range(promises.begun + 2):
        wanted = b"".join(unit(promises.seed, height, number) for number in range(entries))
        part = found[height * size : (height + 1) * size]
        if part != wanted[: len(part)]:
            return [f"{path}: wrong bytes among the entries of block {height}"]
    return []


def _open_units(directory: Path) -> int:
    path = directory / UNITS
    path.parent.mkdir(exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def _data_file(path: Path, default_names: bool) -> Path:
    return path / "data.mdb" if default_names else path
