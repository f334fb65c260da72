"""What is refused, each with one clear sentence and the exit code of docs/errors.md, and with nothing changed."""

from __future__ import annotations

import contextlib
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from blake3 import blake3

from qsfs.format.superblock import SUPERBLOCK_KEY
from tests.support import scratch as places
from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, Inside, check, dead, ended, eventually, running, status, store
from tests.system.load import check_clean

pytestmark = pytest.mark.mount

COUNT = 6
MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
CODES = {
    kind: int(code)
    for code, kind in re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
}


@pytest.fixture(scope="module")
def shared() -> Iterator[FileSystem]:
    """A file system, unmounted, that holds one file and is used by all tests of this module."""
    with (
        places.scratch_directory("refusals") as path,
        FileSystem(path, count=COUNT, settings=QUICK, separate=True) as fs,
    ):
        fs.format()
        fs.mount()
        store(fs, "kept", MIB)
        fs.umount()
        yield fs
        fs.mount()
        check(fs, "kept")
        fs.umount()
        check_clean(fs)


def refused(fs: FileSystem, kind: str, *words: str | Path) -> str:
    """Runs a command that must be refused with an error of this kind; what it says: one line, after its progress."""
    done = fs.run(*words, code=CODES[kind])
    *progress, said = done.stderr.strip().splitlines()
    assert said.startswith("qsfs: ") and (not progress or words[0] in ("restore", "takeover")), done.stderr
    assert done.stdout == ""
    error = fs.run("--json", *words, code=CODES[kind]).json()["error"]
    assert error == {"kind": kind, "message": error["message"], "exit_code": CODES[kind]}
    assert said == f"qsfs: {error['message']}"
    assert not places.mounts_below(fs.mountpoint) or fs.process
    return said


def test_a_second_mount_on_this_machine(shared: FileSystem) -> None:
    shared.mount()
    said = refused(shared, "MountError", "mount")
    assert str(shared.cache) in said and f"process {shared.process}" in said and "qsfs umount" in said
    for command in ("format", "restore", "takeover", "fsck"):
        assert shared.run(command, code=None).returncode != 0, command
    check(shared, "kept")
    shared.umount()


def test_a_mount_over_another_mount(shared: FileSystem, scratch: Path) -> None:
    """Another file system of ours, and one that is none of ours."""
    shared.mount()
    with shared.another_machine(scratch / "other") as other:
        other.run("restore")
        other.set({"filesystem.mountpoint": str(shared.mountpoint)})
        assert "a qsfs is mounted there already" in refused(other, "MountError", "mount")
        other.set({"filesystem.mountpoint": "/proc"})
        assert "type proc" in refused(other, "MountError", "mount")
    check(shared, "kept")
    shared.umount()


def test_a_mount_point_that_is_not_an_empty_directory(shared: FileSystem) -> None:
    (shared.mountpoint / "precious").write_text("x")
    assert "not empty" in refused(shared, "MountError", "mount")
    assert (shared.mountpoint / "precious").read_text() == "x"
    shutil.rmtree(shared.mountpoint)
    assert "does not exist; make it" in refused(shared, "MountError", "mount")
    shared.mountpoint.touch()
    assert "not a directory" in refused(shared, "MountError", "mount")
    shared.mountpoint.unlink()
    shared.mountpoint.mkdir()


def test_a_key_file_that_does_not_open(shared: FileSystem, scratch: Path) -> None:
    key = shared.directory / "qsfs.key"
    right = key.read_text()
    with FileSystem(scratch / "other", servers=shared.servers, count=COUNT, namespace="other") as other:
        wrong = (other.directory / "qsfs.key").read_text()
    try:
        for text, said in (
            (wrong, "opens no key slot"),
            (right[:-6] + "abc" + right[-3:], "qsfs.key"),
            ("nonsense", "qsfs.key"),
            ("", "qsfs.key"),
        ):
            key.write_text(text)
            assert said in refused(shared, "KeyFileError", "mount")
        key.unlink()
        assert "No such file" in refused(shared, "KeyFileError", "mount")
    finally:
        key.write_text(right)


def test_a_configuration_that_cannot_be_used(shared: FileSystem) -> None:
    before = shared.config.read_text()
    try:
        for text, said in (
            (before.replace("[cache]", "[cache]\nsiez = 5"), "did you mean 'size'?"),
            (before + "\n[nonsense]\n", "nonsense"),
            (before + "\nthis is not TOML", "not TOML"),
            (re.sub(r"(?m)^quiet_seconds = .*", "quiet_seconds = 'soon'", before), "quiet_seconds"),
        ):
            shared.config.write_text(text)
            message = refused(shared, "ConfigError", "mount")
            assert said in message and str(shared.config) in message
    finally:
        shared.config.write_text(before)


def test_a_cache_that_is_not_there(shared: FileSystem) -> None:
    shared.cache.rename(shared.directory / "elsewhere")
    try:
        assert "the cache directory does not exist" in refused(shared, "CacheError", "mount")
        shared.cache.mkdir(mode=0o700)
        said = refused(shared, "CacheError", "mount")
        assert "qsfs format" in said and "qsfs restore" in said
        assert nothing_in(shared.cache), "no new, empty store"
    finally:
        shutil.rmtree(shared.cache)
        (shared.directory / "elsewhere").rename(shared.cache)


def test_nobody_answers(shared: FileSystem) -> None:
    for command in ("status", "sync", "umount", "unblock"):
        assert shared.run(command, code=CODES["NotRunning"]).stderr.startswith("qsfs: ")


def test_an_old_copy_of_the_cache(shared: FileSystem) -> None:
    """A backup of the machine's disk, put back: what it published since is not forgotten."""
    shared.mount()
    store(shared, "older", MIB)
    shared.umount()
    shutil.copytree(shared.cache, shared.directory / "old copy")
    shared.mount()
    store(shared, "newer", MIB)
    shared.umount()
    shared.cache.rename(shared.directory / "right")
    (shared.directory / "old copy").rename(shared.cache)
    before = everything(shared)
    said = refused(shared, "StaleCache", "mount")
    assert "cloned or rolled back" in said and "qsfs restore" in said
    assert everything(shared) == before
    shutil.rmtree(shared.cache)
    (shared.directory / "right").rename(shared.cache)
    shared.mount()
    check(shared, "newer")
    (shared.mountpoint / "newer").unlink()
    (shared.mountpoint / "older").unlink()
    shared.umount()


def nothing_in(cache: Path) -> bool:
    """Whether a cache directory holds no more than the lock that every command takes."""
    return {path.name for path in cache.iterdir()} <= {"mount.lock"}


def everything(fs: FileSystem, indices: Iterable[int] = range(COUNT)) -> dict[tuple[int, bytes], bytes]:
    """Every value in the namespace of each backend."""
    found: dict[tuple[int, bytes], bytes] = {}
    for index in indices:
        with Inside(fs.servers, index, fs.namespace) as inside:
            found |= {(index, key): value for key, value in inside.values().items()}
    return found


def test_a_local_store_of_a_newer_version(shared: FileSystem) -> None:
    """And of a file system of its own, whose backends these are not."""
    with local_row(shared.cache, b"schema") as change:
        change(struct.pack("<I", 99))
        said = refused(shared, "FormatMismatch", "mount")
        assert "schema 99" in said
    with local_row(shared.cache, b"fsid") as change:
        change(bytes(16))
        refused(shared, "FormatMismatch", "mount")


@contextlib.contextmanager
def local_row(cache: Path, name: bytes) -> Iterator[Callable[[bytes], bytes]]:
    """What is yielded changes a row of the local store, for the time of a `with` block."""

    def change(value: bytes) -> bytes:
        environment = lmdb.open(str(cache), max_dbs=64, map_size=1 << 30)
        with environment, environment.begin(write=True) as transaction:
            database = environment.open_db(b"local", transaction, create=False)
            before = bytes(transaction.get(name, db=database))
            transaction.put(name, value, db=database)
            return before

    right = change(b"")
    change(right)
    try:
        yield change
    finally:
        change(right)


def test_backends_with_something_foreign_or_newer(shared: FileSystem, scratch: Path) -> None:
    """A restore takes nothing of it, and a format does not write over it."""
    with Inside(shared.servers, 0, shared.namespace) as inside:
        right = bytes(inside.call("GET", SUPERBLOCK_KEY))
    body = right[:4] + struct.pack(">H", 2) + right[6:-32]
    newer = body + blake3(body).digest()
    for value, said in ((newer, "format version 2"), (b"somebody else's", "not a qsfs superblock")):
        for index in range(COUNT):
            with Inside(shared.servers, index, shared.namespace) as inside:
                inside.call("SET", SUPERBLOCK_KEY, value)
        before = everything(shared)
        with shared.another_machine(scratch / said.replace(" ", "-")) as other:
            assert said in refused(other, "FormatMismatch", "restore")
            assert other.run("format", code=None).returncode in (CODES["FormatMismatch"], CODES["AlreadyFormatted"])
        assert everything(shared) == before
    for index in range(COUNT):
        with Inside(shared.servers, index, shared.namespace) as inside:
            inside.call("SET", SUPERBLOCK_KEY, right)


def test_a_second_format(shared: FileSystem) -> None:
    """Neither over a local store nor over backends that hold a file system."""
    before = everything(shared)
    assert "holds the local state of file system" in refused(shared, "CacheError", "format")
    shared.cache.rename(shared.directory / "elsewhere")
    shared.cache.mkdir(mode=0o700)
    try:
        said = refused(shared, "AlreadyFormatted", "format")
        assert "not empty: file system" in said and "--force" in said
        assert nothing_in(shared.cache)
    finally:
        shutil.rmtree(shared.cache)
        (shared.directory / "elsewhere").rename(shared.cache)
    assert everything(shared) == before


def test_backends_that_do_not_answer(shared: FileSystem, scratch: Path) -> None:
    """Each is named; what needs all of them, or a quorum, gives up and leaves nothing behind."""
    with (
        shared.another_machine(scratch / "other") as other,
        FileSystem(scratch / "new", servers=shared.servers, count=COUNT, namespace="new") as new,
    ):
        with dead(shared.servers, range(COUNT)):
            said = refused(new, "BackendUnavailable", "format")
            assert all(f":{port}/new" in said for port in shared.servers.ports), said
            assert nothing_in(new.cache)
            for command in ("restore", "takeover"):
                said = refused(other, "QuorumUnavailable", command)
                assert all(f":{port}/" in said for port in shared.servers.ports), said
                assert nothing_in(other.cache)
        with dead(shared.servers, range(2)):
            said = refused(new, "BackendUnavailable", "format")
            assert [f":{port}/new" in said for port in shared.servers.ports] == [True] * 2 + [False] * 4, said
            assert not everything(new, range(2, COUNT)), "nothing of a file system is stored"
        with dead(shared.servers, range(4)):
            said = refused(other, "QuorumUnavailable", "restore")
            assert nothing_in(other.cache)
        new.format()
        other.run("restore")


def test_full_backends(scratch: Path, shared: FileSystem) -> None:
    """A format names them and stores nothing; a sync waits visibly and goes on when they have room."""
    with FileSystem(scratch / "new", servers=shared.servers, count=COUNT, namespace="full", settings=QUICK) as fs:
        for index in range(COUNT):
            with Inside(fs.servers, index, "default") as inside:
                inside.call("NSNEW", "full")
        with limit(fs, (2, 4), 1000):
            said = refused(fs, "BackendFull", "format")
            assert [f":{port}/full" in said for port in fs.servers.ports] == [i in (2, 4) for i in range(COUNT)], said
            assert nothing_in(fs.cache) and not everything(fs)
        fs.format()
        fs.mount()
        fs.expect("backend .* (full|room)")
        with limit(fs, range(2, COUNT), MIB):
            for number in range(8):
                store(fs, f"file {number}", MIB)
            with running(fs, "sync") as sync:
                eventually(lambda: no_room_on(4, status(fs)), "the status says what is waited for")
                assert sync.poll() is None
                check(fs, "file 7")
                store(fs, "one more", MIB)
                with limit(fs, range(2, COUNT), 0):
                    assert ended(sync)[0] == 0
        fs.umount()
        check_clean(fs)


def no_room_on(count: int, found: dict[str, Any]) -> bool:
    """Whether the status names so many backends as full, also in what an upload waits for."""
    full = [backend["name"] for backend in found["backends"] if backend["full"]]
    reasons = " ".join(found["flush"]["waiting"])
    return len(full) == count and "no room left" in reasons and all(name in reasons for name in full)


@contextlib.contextmanager
def limit(fs: FileSystem, indices: Iterable[int], size: int) -> Iterator[None]:
    """Backends take no more than `size` bytes (0: any number) for the time of a `with` block."""

    def set_limit(size: int) -> None:
        for index in indices:
            with Inside(fs.servers, index, "default") as inside:
                inside.call("NSSET", fs.namespace, "maxsize", str(size))

    set_limit(size)
    try:
        yield
    finally:
        set_limit(0)
