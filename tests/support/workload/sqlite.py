"""An SQLite database: each step is one transaction that adds, changes and deletes rows.

Option `journal`: "wal" or "delete".  `synchronous` is EXTRA, without which SQLite itself does not promise
that a commit in "delete" mode is durable; "off" makes it a liar, to see that its lies are found.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from tests.support.workload.acks import Acks, Promises
from tests.support.workload.records import changes, compare, state_after

NAME = "database.sqlite"


def run(
    directory: Path,
    acks: Acks,
    steps: Iterable[int],
    seed: str,
    *,
    journal: str = "wal",
    synchronous: str = "extra",
) -> None:
    """Commits one transaction a step."""
    records: dict[bytes, bytes] = {}
    with closing(sqlite3.connect(directory / NAME, isolation_level=None)) as database:
        database.execute(f"PRAGMA journal_mode = {journal}")
        database.execute(f"PRAGMA synchronous = {synchronous}")
        # A small log, so that checkpoints happen in short runs too.
        database.execute("PRAGMA wal_autocheckpoint = 40")
        database.execute("BEGIN IMMEDIATE")
        database.execute("CREATE TABLE records (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
        database.execute("CREATE TABLE tip (step INTEGER)")
        database.execute("INSERT INTO tip VALUES (-1)")
        database.execute("COMMIT")
        for step in steps:
            acks.begin(step)
            database.execute("BEGIN IMMEDIATE")
            for key, value in changes(seed, step, records):
                if value is None:
                    database.execute("DELETE FROM records WHERE key = ?", (key,))
                    del records[key]
                else:
                    database.execute("INSERT OR REPLACE INTO records VALUES (?, ?)", (key, value))
                    records[key] = value
            database.execute("UPDATE tip SET step = ?", (step,))
            database.execute("COMMIT")
            acks.ack(step)


def verify(directory: Path, promises: Promises) -> list[str]:
    """SQLite's own check, then that the rows are those of one acknowledged or later step."""
    path = directory / NAME
    if promises.acked < 0 and not path.exists():
        return []
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True)) as database:
            checks = [row[0] for row in database.execute("PRAGMA integrity_check")]
            if checks != ["ok"]:
                return [f"{path}: {check}" for check in checks]
            if promises.acked < 0 and not database.execute("SELECT * FROM sqlite_master").fetchall():
                return []
            tip = int(database.execute("SELECT step FROM tip").fetchone()[0])
            found = dict(database.execute("SELECT key, value FROM records"))
    except sqlite3.Error as error:
        return [f"{path}: {error}"]
    if not promises.acked <= tip <= promises.begun:
        return [f"{path} is as of step {tip}; acknowledged was {promises.acked}, begun {promises.begun}"]
    return compare(str(path), state_after(promises.seed, tip), found)
