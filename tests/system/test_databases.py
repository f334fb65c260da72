"""Databases run on the mount and recover after a crash of it: PostgreSQL, RocksDB, LMDB without syncs of its own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from tests.support import scratch as places
from tests.support.daemon import FileSystem
from tests.system.programs import NOBODY, in_python, remount, run, succeed

pytestmark = pytest.mark.mount

POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin/postgres"), default=Path("/none")).parent


# PostgreSQL

SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "16MB",
    "max_wal_size": "64MB",
    "checkpoint_timeout": "30s",
    "wal_recycle": "on",
    "data_sync_retry": "off",
}
COUNTS = (
    "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(bbalance) FROM pgbench_branches), "
    "(SELECT sum(tbalance) FROM pgbench_tellers), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)"
)


class Postgres:
    """A server on `data`, run as an unprivileged user; its socket lies in `sockets`, on another file system."""

    def __init__(self, data: Path, sockets: Path) -> None:
        self.data = data
        self.sockets = sockets

    def call(self, program: str, *words: object) -> str:
        """Runs one of PostgreSQL's programs."""
        ids = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        return run(POSTGRES / program, *words, cwd=self.sockets, **ids)

    def make(self) -> None:
        self.call("initdb", "--auth=trust", "--username=test", "--data-checksums", "--locale=C", "-D", self.data)

    def control(self, *words: object) -> str:
        return self.call("pg_ctl", "--wait", "--timeout=120", "-D", self.data, *words)

    def start(self) -> None:
        # A crashed server leaves its lock files; who it was may still be a process that nobody waits for.
        for lock in (self.data / "postmaster.pid", self.sockets / ".s.PGSQL.5432.lock"):
            lock.unlink(missing_ok=True)
        options = " ".join(f"-c {name}='{value}'" for name, value in SETTINGS.items())
        log = self.sockets / "log"
        try:
            self.control("start", "-l", log, "-o", f"-k {self.sockets} {options}")
        except AssertionError as error:
            error.add_note(log.read_text(errors="replace") if log.exists() else "It wrote no log.")
            raise

    def end(self) -> None:
        """As a crash does, also where the mount is dead."""
        with contextlib.suppress(AssertionError):
            self.control("stop", "--mode=immediate")
        for process in places.session_processes():
            with contextlib.suppress(OSError):
                if b"postgres" in Path(f"/proc/{process}/cmdline").read_bytes():
                    places.kill_process(process)

    def sql(self, text: str) -> str:
        return self.call("psql", *self.where, "-AtXq", "-v", "ON_ERROR_STOP=1", "-c", text).strip()

    @property
    def where(self) -> tuple[str, ...]:
        return ("-h", str(self.sockets), "-U", "test", "postgres")

    def load(self) -> subprocess.Popen[str]:
        """Transactions without end; a line to its output for each that was acknowledged."""
        command = [POSTGRES / "pgbench", "--no-vacuum", "-c4", "-T600", "--log", *self.where]
        return subprocess.Popen(
            list(map(str, command)),
            cwd=self.sockets,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def acknowledged(self) -> int:
        """How many transactions of `load` are in its log, which it writes by the block."""
        return sum(log.read_text().count("\n") for log in self.sockets.glob("pgbench_log.*"))


@pytest.fixture
def postgres(place: Path) -> Iterator[Postgres]:
    with places.scratch_directory("pg") as sockets:
        os.chown(sockets, NOBODY, NOBODY)
        os.chown(place, NOBODY, NOBODY)
        server = Postgres(place / "data", sockets)
        try:
            yield server
        finally:
            server.end()


@pytest.mark.timeout(900)
@pytest.mark.skipif(not POSTGRES.exists(), reason="PostgreSQL is not installed (package postgresql)")
def test_postgresql_recovers_from_a_crash_of_the_mount_under_load(shared: FileSystem, postgres: Postgres) -> None:
    """Nothing that was acknowledged is lost, all balances agree, and every page passes its checksum."""
    postgres.make()
    postgres.start()
    postgres.call("pgbench", "-i", "-q", *postgres.where)
    postgres.call("pgbench", "-c4", "-t25", *postgres.where)
    assert postgres.sql("SELECT count(*) FROM pgbench_history") == "100"
    before = 100
    for end in ("server", "mount"):
        load = postgres.load()
        try:
            while postgres.acknowledged() < 50:
                assert load.poll() is None
            if end == "mount":
                shared.kill()
            postgres.end()
        finally:
            load.kill()
            load.wait()
        if end == "mount":
            shared.mount()
        postgres.start()
        accounts, branches, tellers, history = postgres.sql(COUNTS).split("|")
        assert accounts == branches == tellers == history
        count = int(postgres.sql("SELECT count(*) FROM pgbench_history"))
        assert count >= before + postgres.acknowledged()
        before = count
        for log in postgres.sockets.glob("pgbench_log.*"):
            log.unlink()
    postgres.sql("CHECKPOINT")
    postgres.control("stop", "--mode=fast")
    assert re.search(r"Bad checksums: *0\n", postgres.call("pg_checksums", "--check", "-D", postgres.data))


# RocksDB

needs_rocksdb = pytest.mark.skipif(
    shutil.which("db_bench") is None, reason="the tools of RocksDB are not installed (package rocksdb-tools)"
)
ROCKSDB_MODES = {
    "buffered": (),
    "direct": ("--use_direct_reads=true", "--use_direct_io_for_flush_and_compaction=true"),
    "mapped": ("--mmap_read=true", "--mmap_write=true"),
}


@needs_rocksdb
@pytest.mark.parametrize("mode", ROCKSDB_MODES)
def test_rocksdb_writes_compacts_and_verifies(place: Path, mode: str) -> None:
    database = place / "db"
    sizes = ("--num=20000", "--value_size=200", "--write_buffer_size=1000000", "--threads=2")
    work = "--benchmarks=fillrandom,overwrite,compact,readrandom,verifychecksum"
    run("db_bench", f"--db={database}", work, *sizes, *ROCKSDB_MODES[mode], cwd=place)
    run("ldb", f"--db={database}", "checkconsistency", cwd=place)
    for table in database.glob("*.sst"):
        run("sst_dump", f"--file={table}", "--command=verify", cwd=place)


@needs_rocksdb
def test_rocksdb_keeps_what_it_synced_through_a_crash_of_the_mount(place: Path, shared: FileSystem) -> None:
    database = place / "db"
    options = ("--num=100000000", "--value_size=200", "--sync=true", "--write_buffer_size=100000")
    command = ["db_bench", f"--db={database}", "--benchmarks=fillseq", "--stats_interval=50", *options]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as writer:
        assert writer.stderr is not None
        done = 0
        while done < 300:
            line = writer.stderr.readline()
            assert line, "db_bench ended by itself"
            said = re.search(r"\(\d+,(\d+)\) ops and", line)
            done = int(said[1]) if said else done
        shared.kill()
        writer.kill()
    shared.mount()
    run("ldb", f"--db={database}", "checkconsistency", cwd=place)
    keys = run("ldb", f"--db={database}", "scan", "--no_value", "--hex", cwd=place).split()
    assert len(keys) >= done


# LMDB

LMDB_MODES = {
    "sync": {"writemap": True},
    "async, no metasync": {"writemap": True, "map_async": True, "metasync": False},
    "no sync": {"writemap": True, "sync": False},
}


@pytest.mark.parametrize("mode", LMDB_MODES)
def test_lmdb_is_whole_after_a_crash_of_the_mount(place: Path, shared: FileSystem, mode: str) -> None:
    """Under the policy for databases also with flags that give its own safety up; synced is there."""
    path = place / "data.mdb"
    environment = lmdb.open(str(path), subdir=False, map_size=1 << 40, **LMDB_MODES[mode])
    synced = 0
    for number in range(200):
        with environment.begin(write=True) as transaction:
            for part in range(20):
                transaction.put(f"{number % 50:05}-{part}".encode(), b"%d" % number * 300)
            transaction.put(b"last", b"%d" % number)
        if number % 70 == 69:
            environment.sync(True)
            synced = number
    remount(shared)
    with contextlib.suppress(lmdb.Error):
        environment.close()
    again = lmdb.open(str(path), subdir=False, map_size=1 << 40, writemap=True)
    with again, again.begin() as transaction:
        last = int(transaction.get(b"last"))
        assert last >= (199 if mode == "sync" else synced)
        for number in range(max(0, last - 49), last + 1):
            for part in range(20):
                assert transaction.get(f"{number % 50:05}-{part}".encode()) == b"%d" % number * 300


def test_two_processes_write_one_lmdb(place: Path) -> None:
    """Locks in a shared map, a reader's snapshot beside a writer, flags of a Casper node's block store."""
    program = """
import lmdb, sys
environment = lmdb.open(sys.argv[1], subdir=False, map_size=1 << 40, writemap=True, map_async=True, metasync=False)
for number in range(150):
    with environment.begin(write=True) as transaction:
        count = int(transaction.get(b"count", b"0"))
        transaction.put(b"count", b"%d" % (count + 1))
        transaction.put(b"%05d" % count, sys.argv[2].encode())
    with environment.begin() as transaction:
        assert transaction.stat()["entries"] == int(transaction.get(b"count")) + 1
environment.sync(True)
"""
    path = place / "data.mdb"
    succeed(*(in_python(program, path, who) for who in ("one", "two")))
    with lmdb.open(str(path), subdir=False, readonly=True) as environment, environment.begin() as transaction:
        rows = {bytes(key): bytes(value) for key, value in transaction.cursor()}
    assert rows.pop(b"count") == b"300"
    assert sorted(rows) == [b"%05d" % number for number in range(300)]
    assert sorted(rows.values()) == [b"one"] * 150 + [b"two"] * 150
