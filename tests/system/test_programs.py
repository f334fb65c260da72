"""Real programs find an ordinary file system: git, SQLite, LMDB, tar, cp, shared maps, huge sparse files."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import sqlite3
import struct
from pathlib import Path

import lmdb
import pytest

from tests.support.daemon import FileSystem
from tests.system.fleet import eventually
from tests.system.programs import grow_tree, in_python, listing, remount, run, succeed

pytestmark = pytest.mark.mount

TIB = 1 << 40


def test_git(place: Path) -> None:
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "gc.autoDetach=false")
    work = place / "work"
    run(*git, "init", "-q", work)
    for step in range(5):
        for number in range(40):
            (work / f"{number % 5}").mkdir(exist_ok=True)
            (work / f"{number % 5}" / f"{number}").write_text(f"{number} {number % (step + 1)}\n" * 50)
        run(*git, "add", "--all", cwd=work)
        run(*git, "commit", "-q", "--allow-empty", "-m", f"step {step}", cwd=work)
    run(*git, "clone", "-q", "--no-local", work, place / "clone")
    for repository in (work, place / "clone"):
        run(*git, "gc", "-q", "--prune=now", cwd=repository)
        run(*git, "fsck", "--full", "--strict", cwd=repository)
        assert run(*git, "status", "--porcelain", cwd=repository) == ""
    heads = {run(*git, "rev-parse", "HEAD", cwd=repository) for repository in (work, place / "clone")}
    assert len(heads) == 1


@pytest.mark.parametrize("journal", ["wal", "delete", "persist"])
def test_two_processes_write_one_sqlite_database(place: Path, journal: str) -> None:
    """Locks, with WAL an index in shared memory, and both see what the other committed."""
    program = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
database.execute(f"PRAGMA journal_mode = {sys.argv[3]}")
for number in range(60):
    database.execute("BEGIN IMMEDIATE")
    (count,) = database.execute("SELECT count(*) FROM rows").fetchone()
    database.execute("INSERT INTO rows VALUES (?, ?, ?)", (count, sys.argv[2], number))
    database.execute("COMMIT")
"""
    path = place / "database.sqlite"
    with sqlite3.connect(path) as database:
        assert database.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal,)
        database.execute("CREATE TABLE rows (place INTEGER PRIMARY KEY, who TEXT, number INTEGER)")
    succeed(*(in_python(program, path, who, journal) for who in ("one", "two")))
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert database.execute("SELECT count(*), max(place) FROM rows").fetchone() == (120, 119)
    for who in ("one", "two"):
        rows = database.execute("SELECT number FROM rows WHERE who = ? ORDER BY place", (who,))
        assert [number for (number,) in rows] == list(range(60))
    database.close()


@pytest.mark.parametrize("name", ["plain.db", "node.lmdb"])
def test_lmdb_with_a_writable_map_of_a_tebibyte(place: Path, name: str) -> None:
    """Two processes, one of which reads while the other commits; also under the policy for databases."""
    reader = """
import lmdb, sys
environment = lmdb.open(sys.argv[1], subdir=False, map_size=1 << 40, writemap=True, create=False)
print("ready", flush=True)
for line in sys.stdin:
    with environment.begin() as transaction:
        print(transaction.stat()["entries"], flush=True)
"""
    path = place / name
    environment = lmdb.open(str(path), subdir=False, map_size=TIB, writemap=True, readahead=False)
    for first in range(0, 1000, 100):
        with environment.begin(write=True) as transaction:
            for number in range(first, first + 100):
                transaction.put(f"{number:05}".encode(), bytes([number % 251]) * 1000)
        if first == 0:
            process = in_python(reader, path)
            assert process.stdout is not None and process.stdin is not None
            assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{first + 100}\n"
    succeed(process)
    environment.close()
    status = path.stat()
    assert status.st_size == TIB
    assert status.st_blocks * 512 < 8 << 20
    again = lmdb.open(str(path), subdir=False, map_size=TIB, writemap=True)
    with again, again.begin() as transaction:
        assert dict(transaction.cursor()) == {
            f"{number:05}".encode(): bytes([number % 251]) * 1000 for number in range(1000)
        }


def test_tar(place: Path) -> None:
    grow_tree(place / "tree")
    run("tar", "--sparse", "--format=posix", "-cf", place / "tree.tar", "-C", place, "tree")
    (place / "out").mkdir()
    run("tar", "-xf", place / "tree.tar", "-C", place / "out")
    assert listing(place / "out" / "tree") == listing(place / "tree")
    assert (place / "out" / "tree" / "sparse").stat().st_blocks * 512 <= 2 * 4096


def test_cp_keeps_everything_and_makes_holes(place: Path, scratch: Path) -> None:
    grow_tree(place / "tree")
    run("cp", "-a", "--sparse=always", place / "tree", place / "copy")
    run("cp", "-a", place / "tree", scratch / "outside")
    run("cp", "-a", "--sparse=always", scratch / "outside", place / "back")
    wanted = listing(place / "tree")
    for name in ("copy", "back"):
        assert listing(place / name) == wanted
        assert (place / name / "sparse").stat().st_blocks * 512 <= 2 * 4096
    run("diff", "-r", place / "tree", scratch / "outside")


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed (package rsync)")
def test_rsync(place: Path, shared: FileSystem) -> None:
    """With links, ACLs and attributes; in place, into a file that has other content; what is gone goes."""
    shared.umount()
    shared.configure(mount__xattr=True)
    shared.mount()
    grow_tree(place / "tree")
    entries = ((1, 7, 2**32 - 1), (2, 6, 60929), (4, 5, 2**32 - 1), (16, 7, 2**32 - 1), (32, 0, 2**32 - 1))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    for name in ("d1", "d2/file 2"):
        os.setxattr(place / "tree" / name, "user.comment", b"kept \0 bytes")
        os.setxattr(place / "tree" / name, "system.posix_acl_access", acl)
    os.setxattr(place / "tree" / "d1", "system.posix_acl_default", acl)
    run("rsync", "-aHAXS", f"{place}/tree/", place / "copy")
    copied = listing(place / "copy", xattrs=True)
    assert copied == listing(place / "tree", xattrs=True)
    assert any("system.posix_acl_default" in str(shown) for shown in copied.values())
    with (place / "tree" / "d3" / "file 101").open("r+b") as file:
        file.seek(30_000)
        file.write(b"changed")
    (place / "tree" / "d4" / "file 102").unlink()
    os.removexattr(place / "tree" / "d1", "user.comment")
    run("rsync", "-aHAX", "--inplace", "--no-whole-file", "--delete", "--checksum", f"{place}/tree/", place / "copy")
    assert listing(place / "copy", xattrs=True) == listing(place / "tree", xattrs=True)
    shared.umount()
    shared.configure(mount__xattr=False)
    shared.mount()


MAKEFILE = """
parts := $(patsubst %.c,%.o,$(wildcard part*.c))
program: main.o libparts.a libshared.so
\t$(CC) -g -o $@ main.o -L. -lparts -lshared -Wl,-rpath,$(CURDIR)
libparts.a: $(parts)
\trm -f $@; ar rcs $@ $(parts)
libshared.so: shared.c
\t$(CC) -shared -fPIC -g -o $@ $<
%.o: %.c
\t$(CC) -MMD -g -O1 -c -o $@ $<
\techo $@ >> built
-include *.d
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="no C compiler is installed (package build-essential)")
def test_a_project_is_built_changed_and_built_again(place: Path) -> None:
    """A linker writes all over its output, which is then mapped and executed; `make` judges by times alone."""
    parts = 80
    (place / "Makefile").write_text(MAKEFILE)
    for group in range(8):
        (place / f"group{group}.h").write_text(f"#include <stdlib.h>\nenum {{ BASE{group} = {group} }};\n")
    for number in range(parts):
        group = number % 8
        (place / f"part{number}.c").write_text(
            f'#include "group{group}.h"\nint part{number}(void) {{ return {number} + BASE{group}; }}\n'
        )
    (place / "shared.c").write_text("int shared(void) { return 1000; }\n")
    declared = "".join(f"int part{number}(void);\n" for number in range(parts))
    calls = " + ".join(f"part{number}()" for number in range(parts))
    (place / "main.c").write_text(
        f'#include <stdio.h>\n{declared}int shared(void);\n'
        f'int main(void) {{ return printf("%d\\n", shared() + {calls}) < 0; }}\n'
    )
    run("make", "-j4", "program", cwd=place)
    total = 1000 + sum(range(parts)) + sum(number % 8 for number in range(parts))
    assert run(place / "program") == f"{total}\n"
    assert len((place / "built").read_text().split()) == parts + 1
    run("make", "-q", "program", cwd=place)
    (place / "built").unlink()
    (place / "group3.h").write_text("#include <stdlib.h>\nenum { BASE3 = 103 };\n")
    run("make", "-j4", "program", cwd=place)
    assert sorted((place / "built").read_text().split()) == sorted(f"part{n}.o" for n in range(parts) if n % 8 == 3)
    assert run(place / "program") == f"{total + 100 * parts // 8}\n"


def test_a_map_shared_by_two_processes(place: Path) -> None:
    program = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
    for line in sys.stdin:
        page = int(line)
        assert shared[page * 4096] == 1, page
        shared[page * 4096] = 2
        shared.flush()
        print(page, flush=True)
"""
    path = place / "map"
    with path.open("w+b") as file:
        file.truncate(64 * 4096)
        with mmap.mmap(file.fileno(), 0) as shared:
            other = in_python(program, path)
            assert other.stdin is not None and other.stdout is not None
            for page in range(64):
                shared[page * 4096] = 1
                other.stdin.write(f"{page}\n")
                other.stdin.flush()
                assert other.stdout.readline() == f"{page}\n"
                assert shared[page * 4096] == 2
        os.fsync(file.fileno())
        succeed(other)
        assert os.pread(file.fileno(), 1, 5 * 4096) == b"\2"


def test_a_sparse_file_of_two_tebibytes(place: Path, shared: FileSystem) -> None:
    """Its holes are zeros, take no room, are counted by nobody, and outlive a crash."""
    path = place / "huge"
    with path.open("wb", buffering=0) as file:
        for offset in (0, 5000, TIB, 2 * TIB - 4096):
            file.seek(offset)
            file.write(b"x" * 4096)
        os.fsync(file.fileno())
    for _ in range(2):
        status = path.stat()
        assert status.st_size == 2 * TIB
        # 5000 is not aligned: that write covers two pages.
        assert status.st_blocks * 512 == 5 * 4096
        assert run("du", "--block-size=1", path).split()[0] == str(5 * 4096)
        with path.open("rb") as file:
            assert os.pread(file.fileno(), 4096, TIB) == b"x" * 4096
            assert os.pread(file.fileno(), 1 << 20, TIB + 4096) == bytes(1 << 20)
            assert os.pread(file.fileno(), 10, 4096 + 900) == b"\0" * 4 + b"x" * 6
        remount(shared)


def test_truncating_up_and_down_by_tebibytes(place: Path, shared: FileSystem) -> None:
    """As a database does it at each open: at once, and what was cut off never comes back."""
    path = place / "database"
    path.write_bytes(b"a" * 20_000)
    for _ in range(50):
        os.truncate(path, 2 * TIB)
        os.truncate(path, 16_384 - 100)
    assert path.stat().st_blocks * 512 == 16_384
    os.truncate(path, 2 * TIB)
    descriptor = os.open(path, os.O_RDWR)
    os.pwrite(descriptor, b"end", 2 * TIB - 3)
    os.fsync(descriptor)
    os.close(descriptor)
    for _ in range(2):
        with path.open("rb") as file:
            assert file.read(20_000) == b"a" * (16_384 - 100) + bytes(20_000 - 16_384 + 100)
            assert os.pread(file.fileno(), 10, 2 * TIB - 3) == b"end"
        assert path.stat().st_blocks * 512 == 16_384 + 4096
        remount(shared)
    os.truncate(path, 0)
    assert path.stat().st_blocks == 0


def test_files_that_were_unlinked_while_open_are_gone_after_a_remount(shared: FileSystem, place: Path) -> None:
    before = files_in_use(shared)
    with (place / "open").open("w+b", buffering=0) as file:
        file.write(b"x" * (8 << 20))
        os.fsync(file.fileno())
        (place / "open").unlink()
        assert os.pread(file.fileno(), 3, 5) == b"xxx"
        assert os.fstat(file.fileno()).st_nlink == 0
        assert files_in_use(shared) == before + 1
        shared.kill()
    shared.mount()
    assert files_in_use(shared) == before
    assert list(place.iterdir()) == []


def files_in_use(fs: FileSystem) -> int:
    """The inodes that `df -i` shows as used, once what was committed is counted."""
    fs.sync()
    status = os.statvfs(fs.mountpoint)
    return status.f_files - status.f_ffree


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
@pytest.mark.parametrize("name", ["plain", "data.mdb"])
def test_a_synchronous_write_is_durable_when_it_returns(
    place: Path, shared: FileSystem, flag: int, name: str
) -> None:
    path = place / name
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag)
    for number in range(20):
        os.write(descriptor, bytes([number]) * 3000)
    shared.kill()
    with contextlib.suppress(OSError):
        os.close(descriptor)
    shared.mount()
    assert path.read_bytes() == b"".join(bytes([number]) * 3000 for number in range(20))


def test_two_processes_append_to_one_file(place: Path) -> None:
    program = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for number in range(500):
    os.write(descriptor, f"{sys.argv[2]} {number}\\n".encode())
"""
    path = place / "log"
    succeed(*(in_python(program, path, who) for who in ("a", "b", "c")))
    lines = path.read_text().splitlines()
    assert len(lines) == 1500
    for who in ("a", "b", "c"):
        assert [line for line in lines if line[0] == who] == [f"{who} {number}" for number in range(500)]


def test_extended_attributes_are_off_unless_configured(place: Path, shared: FileSystem) -> None:
    """Off, because once they are answered the kernel asks for one before every write."""
    path = place / "file"
    path.touch()
    for call in (
        lambda: os.setxattr(path, "user.a", b"1"),
        lambda: os.getxattr(path, "user.a"),
        lambda: os.listxattr(path),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.ENOTSUP
    shared.umount()
    shared.configure(mount__xattr=True)
    try:
        shared.mount()
        os.setxattr(path, "user.a", b"1" * 4000)
        os.setxattr(path, "user.b", b"", os.XATTR_CREATE)
        with pytest.raises(FileExistsError):
            os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
        shared.umount()
        shared.mount()
        assert os.listxattr(path) == ["user.a", "user.b"]
        assert os.getxattr(path, "user.a") == b"1" * 4000
        os.removexattr(path, "user.a")
        assert os.listxattr(path) == ["user.b"]
        shared.umount()
    finally:
        shared.configure(mount__xattr=False)
    shared.mount()


MEMORY = 24 << 20
MAPPED_PAGES = 64 << 8

MAPPER = """
import mmap, os, random, sys
sys.stdin.readline()
pages, rng = int(sys.argv[2]), random.Random(1)
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
    runs = [range(first, first + 16) for first in range(0, pages, 16)]
    rng.shuffle(runs)
    order = [page for run in runs for page in run]
    for page in order:
        view[page * 4096 : page * 4096 + 8] = b"%08d" % page
    for page in order[: pages // 4]:
        assert view[page * 4096 : page * 4096 + 8] == b"%08d" % page, page
        assert os.pread(file.fileno(), 8, page * 4096) == b"%08d" % page, page
"""


def memory_group() -> Path | None:
    """A new control group that holds `MEMORY` bytes; None where this machine lets us make none."""
    for limit in ("/sys/fs/cgroup/memory/{}/memory.limit_in_bytes", "/sys/fs/cgroup/{}/memory.max"):
        file = Path(limit.format(f"qsfs-test-{os.getpid()}"))
        group = file.parent
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                file.write_text(str(MEMORY))
            except OSError:
                group.rmdir()
                raise
            return group
    return None


def test_a_map_larger_than_memory(place: Path) -> None:
    """Its pages come and go: each store is found again, by the map and by reads."""
    group = memory_group()
    if group is None:
        pytest.skip("no control group of memory can be made here")
    path = place / "large"
    path.touch()
    os.truncate(path, MAPPED_PAGES << 12)
    try:
        process = in_python(MAPPER, path, MAPPED_PAGES)
        (group / "cgroup.procs").write_text(str(process.pid))
        succeed(process)
    finally:
        eventually(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
        group.rmdir()
    with path.open("rb") as file:
        for page in range(0, MAPPED_PAGES, 97):
            assert os.pread(file.fileno(), 8, page * 4096) == b"%08d" % page
