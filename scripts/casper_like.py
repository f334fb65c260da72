"""A block store such as a Casper node's storage.lmdb, and the scan with which the node starts.

Written block by block with the commits that a node makes, since they decide which pages a record gets: a
record that grows by a signature at a time leaves holes, which later records of other kinds fill.  So headers and
bodies, which a start reads all, come to lie between results and signatures, which it does not.

    casper_like.py build FILE BYTES     a database of about so many bytes
    casper_like.py scan FILE            reads each header and its body, as a node does when it starts
"""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path
from typing import Any

import lmdb

MAP = 45_097_156_608
TABLES = ("headers", "bodies", "signatures", "approvals", "transactions", "results", "transfers", "state")
VALIDATORS = 100
TRANSACTIONS = 2
ERA = 900
PAGE = 4096


def opened(path: Path, *, durable: bool) -> tuple[lmdb.Environment, dict[str, Any]]:
    """The environment as a node opens it; not `durable` for building it on a disk of its own."""
    environment = lmdb.open(
        str(path),
        subdir=False,
        map_size=MAP,
        writemap=True,
        readahead=False,
        max_dbs=17,
        max_readers=5,
        sync=durable,
    )
    return environment, {name: environment.open_db(name.encode()) for name in TABLES}


def build(path: Path, size: int) -> None:
    """Adds blocks until the file uses `size` bytes."""
    chosen = random.Random(1)
    environment, tables = opened(path, durable=False)
    height = 0
    while environment.info()["last_pgno"] * PAGE < size:
        add_block(environment, tables, height, chosen)
        height += 1
    used = (environment.info()["last_pgno"] + 1) * PAGE
    environment.sync(True)
    environment.close()
    with path.open("r+b") as file:
        file.truncate(used)


def add_block(environment: lmdb.Environment, tables: dict[str, Any], height: int, chosen: random.Random) -> None:
    """One block: its transactions, itself, its signatures, then a commit for each that comes late."""
    count = min(20, int(chosen.expovariate(1 / TRANSACTIONS)))
    hashes = [digest("transaction", height, index) for index in range(count)]
    block = digest("block", height, 0)

    def put(*rows: tuple[str, bytes, int]) -> None:
        with environment.begin(write=True) as txn:
            for table, key, length in rows:
                txn.put(key, content(key, length), db=tables[table])

    for key in hashes:
        put(("transactions", key, 500 if chosen.random() < 0.7 else int(chosen.lognormvariate(7.5, 1))))
    results = [("results", key, 4929) for key in hashes]
    put(
        ("bodies", block, 60 + 33 * count),
        ("headers", block, 6000 if height % ERA == ERA - 1 else 250),
        ("approvals", block, 630 + 33 * count),
        ("transfers", block, 8 + 170 * count),
        *results,
    )
    early = VALIDATORS * 2 // 3
    put(("signatures", block, 56 + 120 * early))
    put(("state", b"completed", 16))
    for signature in range(early, VALIDATORS):
        put(("signatures", block, 56 + 120 * (signature + 1)))


def digest(kind: str, height: int, index: int) -> bytes:
    return hashlib.blake2b(f"{kind} {height} {index}".encode(), digest_size=32).digest()


def content(key: bytes, length: int) -> bytes:
    return hashlib.shake_256(key).digest(length)


def scan(path: Path) -> int:
    """Reads every header and its body in one transaction; how many there are."""
    environment, tables = opened(path, durable=True)
    with environment.begin(write=True) as txn:
        for key, _ in txn.cursor(tables["headers"]):
            body = txn.get(key, db=tables["bodies"])
            assert body == content(key, len(body))
        return int(txn.stat(tables["headers"])["entries"])


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        print(scan(Path(sys.argv[2])))
