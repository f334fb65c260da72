"""What a repair changes in the local store: collected while checking, applied afterwards.

Each transaction is whole in itself, so a repair that is broken off has mended a part, and the next
one finds the rest.  Rows that a generation holds get change marks.
"""

from __future__ import annotations

from qsfs.fsck.report import Finding, Report
from qsfs.store.environment import Environment
from qsfs.store.group import COMMIT_KEY
from qsfs.store.schema import REMOTE_TABLES, Table, plain_u64, read_plain_u64, u64

_STEP = 5_000
_LARGEST = 2**64 - 1

Change = tuple[Table, bytes, bytes | None]


class Mends:
    """Changes of rows, each with the finding that it settles."""

    def __init__(self) -> None:
        self._changes: list[tuple[tuple[Change, ...], tuple[Finding, ...]]] = []

    def __len__(self) -> int:
        return len(self._changes)

    def add(self, findings: tuple[Finding, ...], *changes: Change) -> None:
        """Sets (or, with None, deletes) rows, all of them in one transaction."""
        self._changes.append((changes, findings))

    def apply(self, environment: Environment, report: Report) -> None:
        """Makes the changes.  Raises `CacheError` or `Corrupt`; what was settled before that stays."""
        for start in range(0, len(self._changes), _STEP):
            part = self._changes[start : start + _STEP]
            with environment.write() as txn:
                local = environment.databases[Table.LOCAL]
                commit = txn.get(COMMIT_KEY, db=local)
                number = read_plain_u64(commit) if commit is not None and len(commit) == 8 else 0
                number = min(number + 1, _LARGEST)
                txn.put(COMMIT_KEY, plain_u64(number), db=local)
                for changes, _ in part:
                    for table, key, value in changes:
                        if value is None:
                            txn.delete(key, db=environment.databases[table])
                        else:
                            txn.put(key, value, db=environment.databases[table])
                        if table in REMOTE_TABLES:
                            mark = bytes((table,)) + key
                            txn.put(mark, u64(number), db=environment.databases[Table.CHANGED])
            for _, findings in part:
                for finding in findings:
                    report.settle(finding)
        self._changes.clear()
