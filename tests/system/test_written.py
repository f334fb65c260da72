"""`[mount] fsync = "written"` on a real mount: what an fsync returned for outlives the machine."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, dead, ended, eventually, program, running, status, up

pytestmark = pytest.mark.mount

COUNT = 8
WRITTEN = {
    **QUICK,
    "mount.fsync": "written",
    "policy": [{"match": "*.atomic", "atomic_sync": True}, {"match": "*.through", "write_through": True}],
}
FSYNC = """
import os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
os.pwrite(file, b"late" * 1024, 0)
try:
    os.fsync(file)
    print("done")
except OSError as error:
    print("errno", error.errno)
"""


def test_what_was_fsynced_is_restored_after_the_machine_is_gone_at_once(scratch: Path, fleet: Servers) -> None:
    """Killed, cache deleted, restored elsewhere from backends and key: every way of syncing, every kind of file."""
    with FileSystem(scratch, shards=(4, 2), count=COUNT, servers=fleet, namespace="written", settings=WRITTEN) as fs:
        fs.format()
        fs.mount()
        held: dict[str, bytes] = {}
        for name in ("plain", "db.atomic", "wal.through"):
            held[name] = os.urandom(300_000)
            file = os.open(fs.mountpoint / name, os.O_RDWR | os.O_CREAT, 0o644)
            os.pwrite(file, held[name], 0)
            os.fsync(file)
            os.pwrite(file, b"second", 4096)
            os.fdatasync(file)
            held[name] = held[name][:4096] + b"second" + held[name][4102:]
            os.close(file)
        file = os.open(fs.mountpoint / "o_sync", os.O_RDWR | os.O_CREAT | os.O_SYNC, 0o644)
        held["o_sync"] = b"s" * 5000
        os.pwrite(file, held["o_sync"], 0)
        os.close(file)
        (fs.mountpoint / "plain").rename(fs.mountpoint / "renamed")
        held["renamed"] = held.pop("plain")
        directory = os.open(fs.mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory)
        os.close(directory)
        fs.kill()
        with fs.another_machine(scratch / "other") as other:
            shutil.rmtree(fs.cache)
            other.run("takeover")
            other.mount()
            assert {path.name: path.read_bytes() for path in other.mountpoint.iterdir()} == held
            other.umount()


def test_without_backends_an_fsync_waits_visibly_until_unblocked_and_nothing_else_does(
    scratch: Path, fleet: Servers
) -> None:
    """EIO then, though the local disk has it; stat, reads and writes went on; with backends back it is published."""
    with FileSystem(scratch, shards=(4, 2), count=COUNT, servers=fleet, namespace="late", settings=WRITTEN) as fs:
        fs.format()
        fs.mount()
        (fs.mountpoint / "other").write_bytes(b"before")
        with dead(fleet, range(5)):
            waiting = program(FSYNC, fs.mountpoint / "late")
            eventually(lambda: status(fs)["fsync_waits"]["waiting"], "the fsync waits")
            assert (fs.mountpoint / "other").read_bytes() == b"before"
            (fs.mountpoint / "other").write_bytes(b"after")
            assert "FSYNCS WAIT for a published head: 1" in fs.run("status").stdout
            late = fs.run("--json", "sync", "--class", "written", "--timeout", "0.2", code=17).json()
            assert (late["class"], late["reached"]) == ("local", False) and late["missing"]["backends"]
            with running(fs, "sync", "--class", "full", "--timeout", "200ms") as process:
                code, said = ended(process)
            assert code == 17 and "not full in time" in said and "on this machine's disk" in said
            assert "on this machine's disk" in fs.run("sync", "--class", "local").stdout
            assert fs.run("--json", "unblock").json()["ended"] == 1
            assert waiting.communicate()[0] == f"errno {errno.EIO}\n"
        eventually(lambda: up(fs, COUNT), "the backends are back")
        assert "its packs are full" in fs.run("sync", "--class", "full", "--timeout", "60s").stdout
        fs.expect(r"WARNING qsfs.daemon.written: 1 fsyncs that waited", r"WARNING qsfs\.(remote|backend|health)")
        fs.umount()
