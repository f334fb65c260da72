"""What an older version left is mounted, used, restored and found sound by this one.

`tests/vectors/mount-2026-11-27.json` is what `older_version.py` wrote with that day's qsfs: local schema 1, and a
machine that died with changes that were committed and not published, and others that were in the journal only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from xxhash import xxh3_64_digest

from qsfs.store.schema import LOCAL_SCHEMA_VERSION
from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, Inside, forget
from tests.system.older_version import COUNT, NAMESPACES, SETTINGS, SHARDS, describe, unpacked, write

pytestmark = pytest.mark.mount

OLD: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "mount-2026-11-27.json").read_text(encoding="utf-8")
)


@pytest.fixture
def older(scratch: Path) -> Iterator[FileSystem]:
    """The machine as that version left it, with its backends."""
    with FileSystem(scratch, shards=SHARDS, count=COUNT, settings=SETTINGS | QUICK) as fs:
        (fs.directory / "qsfs.key").write_text(OLD["key_file"])
        shutil.rmtree(fs.cache)
        for name, text in OLD["cache"].items():
            path = fs.cache / name
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.write_bytes(unpacked(text))
        values = [unpacked(text) for text in OLD["values"]]
        for index, namespaces in enumerate(OLD["backends"]):
            for namespace in NAMESPACES:
                with Inside(fs.servers, index, "") as outside:
                    outside.call("NSNEW", namespace)
                with Inside(fs.servers, index, namespace) as inside:
                    for key, value in namespaces[namespace].items():
                        inside.call("SET", bytes.fromhex(key), values[value])
        yield fs


def local_schema(fs: FileSystem) -> int:
    """The schema's version that the local store says."""
    with lmdb.open(str(fs.cache), readonly=True, lock=False, max_dbs=64) as environment:
        local = environment.open_db(b"local", create=False)
        with environment.begin() as txn:
            return int.from_bytes(txn.get(b"schema", db=local), "little")


def sound(fs: FileSystem) -> None:
    """Neither the cache nor the backends hold anything that fsck minds."""
    report = fs.run("--json", "fsck", "--deep").json()
    assert report["findings"] == [] and report["failures"] == [], report


def test_what_an_older_version_left_is_mounted_and_used(older: FileSystem) -> None:
    """All is as it was, also what only the journal had; then it is changed, published, and mounted again."""
    assert local_schema(older) == 1
    older.mount()
    assert describe(older.mountpoint) == OLD["tree"]
    write(older.mountpoint / "directory/grün", b"changed", 5000)
    older.sync()
    now = describe(older.mountpoint)
    older.umount()
    assert local_schema(older) == LOCAL_SCHEMA_VERSION
    sound(older)
    older.mount()
    assert describe(older.mountpoint) == now
    older.umount()
    forget(older)
    older.mount()
    assert describe(older.mountpoint) == now, "another machine gets all of it from the backends"
    older.umount()


def test_what_an_older_version_published_is_restored(older: FileSystem) -> None:
    """From the backends and the key alone, one backend less."""
    forget(older)
    older.mount()
    assert describe(older.mountpoint) == OLD["published"]
    older.umount()
    sound(older)


def test_a_spool_of_another_version_is_refused_before_the_store_is_changed(older: FileSystem) -> None:
    """Else the version that wrote it could not open the store any more, and nobody could go on."""
    head = b"QSPL" + (9).to_bytes(2, "little") + bytes(14)
    (older.cache / "spool").mkdir(exist_ok=True)
    stray = older.cache / "spool" / "0000000000000005-00.head"
    stray.write_bytes(head + xxh3_64_digest(head)[::-1])
    for words in (("mount",), ("takeover",)):
        refused = older.run(*words, code=9)
        assert "of version 9" in refused.stderr and "the qsfs version that wrote it" in refused.stderr
        assert local_schema(older) == 1
    stray.unlink()
    older.mount()
    assert describe(older.mountpoint) == OLD["tree"]
    older.umount()
