"""Snapshots and rollbacks as an operator makes them: by commands, on real mounts, on two machines."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsfs.cli.freeze import cgroup_root
from qsfs.errors import DependencyMissing
from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, check, content, eventually, status, store
from tests.system.load import check_clean

pytestmark = pytest.mark.mount

COUNT = 6
MIB = 1 << 20
KILLED = -9
ASIDE = {"policy": [{"match": "unit_files", "restore_aside": True}, {"match": "*.lock", "local_only": True}]}

# Where a rollback dies, and whether the file system is then what it was at the snapshot.
DEATHS = (
    ("own.announced=kill", False),
    ("publish.stored=kill@1", False),
    ("publish.stored=kill@2", False),
    ("publish.published=kill@2", False),
    ("restore.rows=kill", False),
    ("rollback.stored=kill", False),
    ("rollback.built=kill", False),
    ("restore.renamed=kill", True),
    ("publish.stored=kill@3", True),
    ("publish.published=kill@3", True),
    ("rollback.published=kill", True),
)


@contextlib.contextmanager
def file_system(scratch: Path, fleet: Servers, namespace: str) -> Iterator[FileSystem]:
    with FileSystem(
        scratch / "one", shards=(3, 1), count=COUNT, servers=fleet, namespace=namespace, settings=QUICK | ASIDE
    ) as fs:
        fs.format()
        fs.mount()
        yield fs


def names(fs: FileSystem) -> list[str]:
    return [entry["name"] for entry in fs.run("snapshot", "list", "--json").json()["snapshots"]]


def files(fs: FileSystem) -> set[str]:
    return {path.name for path in fs.mountpoint.iterdir()}


def test_an_operator_returns_to_a_snapshot_and_back(scratch: Path, fleet: Servers) -> None:
    """What was there then, and nothing else; what must not be run twice lies aside; another machine gets the same."""
    with file_system(scratch, fleet, "snapshots") as one:
        store(one, "base", MIB)
        (one.mountpoint / "unit_files").write_bytes(b"one")
        said = one.run("snapshot", "create", "first").stdout
        assert said.startswith("snapshot first: generation ")
        assert one.run("snapshot", "create", "first", code=3).stderr.count("already") == 1
        (one.mountpoint / "base").write_bytes(b"changed")
        store(one, "later", MIB)
        one.run("snapshot", "create", "second")
        one.run("snapshot", "create", "third")
        one.run("snapshot", "delete", "third")
        assert one.run("snapshot", "delete", "third", code=8).stderr.count("second, first") == 1
        assert "2 snapshots, the newest second" in one.run("status").stdout
        assert "in use by process" in one.run("rollback", "first", "--yes", code=13).stderr
        one.umount()
        assert names(one) == ["first", "second"], "from the backends"

        assert "--yes" in one.run("rollback", "first", code=3).stderr, "nobody was there to agree"
        done = one.run("rollback", "first", "--yes", "--json").json()
        with one.another_machine(scratch / "two") as two:
            two.run("restore")
            assert names(two) == ["first", "second", done["left"]]
        one.mount()
        restored = f"unit_files.restored-{done['generation']}"
        assert files(one) == {"base", restored}
        check(one, "base")
        store(one, "new", MIB)
        one.umount()

        one.run("rollback", "second", "--yes")
        one.mount()
        assert (one.mountpoint / "base").read_bytes() == b"changed"
        check(one, "later")
        assert "new" not in files(one)
        one.umount()
        check_clean(one)


def test_a_machine_that_was_taken_over_from_cannot_roll_back(scratch: Path, fleet: Servers) -> None:
    """Snapshots go with the file system; only who has the newest generation may return to one."""
    with file_system(scratch, fleet, "rolled-elsewhere") as one:
        store(one, "base", MIB)
        one.run("snapshot", "create", "first")
        store(one, "later", MIB)
        one.umount()
        with one.another_machine(scratch / "two") as two:
            assert "qsfs takeover" in two.run("rollback", "first", "--yes", code=11).stderr
            two.run("restore")
            assert "qsfs takeover" in two.run("rollback", "first", "--yes", code=11).stderr
            two.run("takeover")
            two.run("rollback", "first", "--yes")
            two.mount()
            assert files(two) == {"base"}
            check(two, "base")
            two.umount()
            assert one.run("rollback", "first", "--yes", code=11).stderr.count("restore") >= 1
            assert one.run("mount", code=11).returncode == 11
            check_clean(two)


def test_what_is_never_uploaded_is_not_lost_by_a_rollback_unsaid(scratch: Path, fleet: Servers) -> None:
    """A lock file goes, and that is said; more is refused, or lies aside where that is asked for."""
    with file_system(scratch, fleet, "local") as fs:
        lock = fs.mountpoint / "a.lock"
        lock.write_bytes(b"x" * 8192)
        fs.run("snapshot", "create", "first")
        fs.umount()
        done = fs.run("rollback", "first", "--yes", "--json")
        assert "8.0 KiB in 1 file with the policy local_only. It will be gone." in done.stderr
        assert done.json()["emptied"] == 1 and done.json()["aside"] is None
        fs.mount()
        assert lock.read_bytes() == b""
        lock.write_bytes(b"x" * (2 * MIB))
        fs.run("sync")
        fs.umount()
        refused = fs.run("rollback", "first", "--yes", code=14).stderr
        assert "2.0 MiB in 1 file with the policy local_only" in refused and "--set-aside" in refused
        said = fs.run("rollback", "first", "--yes", "--set-aside").stdout
        assert "1 files that are never uploaded (local_only) are empty" in said
        assert len(list(fs.directory.glob("*.aside-*/data.mdb"))) == 1
def test_another_machine_goes_on_from_an_older_generation(scratch: Path, fleet: Servers) -> None:
    """Restore, takeover, mount; nothing else mounts it before that, and what was the newest is a snapshot."""
    with file_system(scratch, fleet, "older-elsewhere") as one:
        store(one, "base", MIB)
        (one.mountpoint / "unit_files").write_bytes(b"one")
        generation = json.loads(one.run("--json", "snapshot", "create", "first").stdout)["generation"]
        store(one, "later", MIB)
        one.umount()
        with one.another_machine(scratch / "two") as two:
            assert "kept are" in two.run("restore", "--generation", "1", code=8).stderr
            said = two.run("restore", "--generation", str(generation)).stdout
            assert f"Restored generation {generation} " in said and "qsfs takeover" in said
            for words in (("mount",), ("mount", "--offline"), ("rollback", "first", "--yes")):
                refused = two.run(*words, code=11).stderr
                assert f"restored from generation {generation} " in refused and "qsfs takeover" in refused
            two.run("fsck")
            taken = two.run("--json", "takeover").json()
            assert taken["as"] == generation < taken["generation"]
            two.mount()
            assert files(two) == {"base", f"unit_files.restored-{taken['generation']}"}
            check(two, "base")
            store(two, "new", MIB)
            assert names(two) == ["first", taken["left"]]
            two.umount()
            check_clean(two)


def test_an_older_generation_does_not_replace_what_came_after_its_restore(scratch: Path, fleet: Servers) -> None:
    """The machine that wrote it went on: nobody agreed to leave that, and it is said how to do so."""
    with file_system(scratch, fleet, "older-late") as one:
        store(one, "base", MIB)
        one.run("snapshot", "create", "first")
        store(one, "later", MIB)
        one.sync()
        with one.another_machine(scratch / "two") as two:
            two.run("restore", "--snapshot", "first")
            store(one, "latest", MIB)
            one.umount()
            refused = two.run("takeover", code=11).stderr
            assert "published since" in refused and "--set-aside --generation" in refused
            two.run("restore", "--set-aside", "--snapshot", "first")
            two.run("takeover")


def test_what_was_never_published_is_not_lost_by_a_rollback(scratch: Path, fleet: Servers) -> None:
    """It is refused, with how much that is; set aside when that is asked for; and a mount publishes it instead."""
    with file_system(scratch, fleet, "unpublished") as fs:
        store(fs, "base", MIB)
        fs.run("snapshot", "create", "first")
        with (fs.mountpoint / "only here").open("wb") as file:
            file.write(b"x" * 8192)
            file.flush()
            os.fsync(file.fileno())
        fs.kill()
        refused = fs.run("rollback", "first", "--yes", code=14).stderr
        assert "8.0 KiB of contents" in refused and "--set-aside" in refused
        done = fs.run("rollback", "first", "--yes", "--set-aside", "--json").json()
        assert (Path(done["aside"]) / "data.mdb").exists()
        fs.mount()
        assert files(fs) == {"base"}
        fs.umount()
        check_clean(fs)


def test_a_command_ends_when_the_daemon_dies(scratch: Path, fleet: Servers) -> None:
    """And what it did not report may be missing, what it did report is there."""
    with file_system(scratch, fleet, "dying") as fs:
        store(fs, "base", MIB)
        fs.run("snapshot", "create", "first")
        fs.umount()
        fs.mount(failpoints="flush.recorded=kill@1")
        store(fs, "base", MIB // 2)
        assert "ended before it answered" in fs.run("snapshot", "create", "second", code=16).stderr
        fs.wait_dead()
        fs.mount()
        fs.run("snapshot", "create", "third")
        assert [name for name in names(fs) if name != "second"] == ["first", "third"]
        fs.umount()
        check_clean(fs)


WRITER = """
import os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.pwrite(file, b"synced  ", 0)
os.fsync(file)
os.pwrite(file, b"unsynced", 0)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    try:
        directory = cgroup_root() / f"qsfs-system-test-{os.getpid()}"
        directory.mkdir()
    except (DependencyMissing, OSError) as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        yield directory
    finally:
        eventually(lambda: _removed(directory), "the cgroup is gone")


def _removed(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        directory.rmdir()
    return not directory.exists()


def test_a_held_database_is_what_it_would_be_if_it_were_killed(scratch: Path, fleet: Servers, cgroup: Path) -> None:
    """Of a file with atomic sync a plain snapshot has the last sync, one with --freeze everything; and it goes on."""
    with (
        file_system(scratch, fleet, "frozen") as fs,
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(fs.mountpoint / "data.mdb")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as writer,
    ):
        try:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            (cgroup / "cgroup.procs").write_text(str(writer.pid))
            fs.run("snapshot", "create", "plain")
            fs.run("snapshot", "create", "held", "--freeze", f"/{cgroup.name}")
            assert "frozen 0" in (cgroup / "cgroup.events").read_text()
            fs.run(
                *("snapshot", "create", "dead", "--freeze", f"/{cgroup.name}"),
                code=KILLED,
                QSFS_FAILPOINTS="snapshot.cut=kill",
            )
            store(fs, "later", 4096)
            fs.sync()
            assert set(names(fs)) == {"plain", "held"}
            (cgroup / "cgroup.procs").write_text(f"{fs.process}")
            assert "qsfs itself" in fs.run("snapshot", "create", "x", "--freeze", str(cgroup), code=3).stderr
            cgroup.parent.joinpath("cgroup.procs").write_text(f"{fs.process}")
            assert status(fs)["phase"] == "mounted"
        finally:
            writer.communicate("")
        fs.umount()
        for name, expected in (("plain", b"synced  "), ("held", b"unsynced")):
            fs.run("rollback", name, "--yes")
            fs.mount()
            assert (fs.mountpoint / "data.mdb").read_bytes() == expected
            fs.umount()
        check_clean(fs)


def test_snapshots_are_mounted_beside_the_mount_that_writes(scratch: Path, fleet: Servers) -> None:
    """Each shows what was there then, while the other and the writer go on; nothing stays of one that is unmounted."""
    with file_system(scratch, fleet, "beside") as fs:
        fs.run("snapshot", "create", "empty")
        store(fs, "base", MIB)
        fs.run("snapshot", "create", "first")
        (fs.mountpoint / "base").write_bytes(content("changed", 4096))
        places = {name: scratch / name for name in ("empty", "first")}
        assert fs.run("snapshot", "mount", "first", places["first"], code=13).stderr.count("does not exist") == 1
        for name, place in places.items():
            place.mkdir()
            said = fs.run("snapshot", "mount", name, place, "--cache-size", "32MiB").stdout
            assert said.startswith(f"mounted read-only on {place} ")
        try:
            assert not list(places["empty"].iterdir())
            assert (places["first"] / "base").read_bytes() == content("base", MIB)
            assert (fs.mountpoint / "base").read_bytes() == content("changed", 4096)
            with pytest.raises(OSError, match="Read-only"):
                (places["first"] / "new").touch()
            listed = fs.run("snapshot", "list", "--json").json()["snapshots"]
            assert {entry["name"]: entry["mounted_on"] for entry in listed} == {
                name: str(place) for name, place in places.items()
            }
            other = scratch / "other"
            other.mkdir()
            assert "mounted already" in fs.run("snapshot", "mount", "first", other, code=13).stderr
            assert (places["first"] / "base").read_bytes() == content("base", MIB)
            fs.run("snapshot", "umount", "empty")
            assert not list(places["empty"].iterdir())
            with (places["first"] / "base").open("rb") as held:
                assert held.read(1) and "in use" in fs.run("snapshot", "umount", "first", code=13).stderr
            fs.umount()
            assert (places["first"] / "base").read_bytes() == content("base", MIB)
        finally:
            for name in places:
                fs.run("snapshot", "umount", name, code=None)
        assert not list(scratch.glob("one/*-snapshots")) and not list(places["first"].iterdir())
        assert "not mounted" in fs.run("snapshot", "umount", "first", code=16).stderr
        check_clean(fs)


@pytest.mark.slow
@pytest.mark.parametrize(("point", "rolled_back"), DEATHS, ids=[point for point, _ in DEATHS])
def test_a_rollback_that_is_killed(scratch: Path, fleet: Servers, point: str, rolled_back: bool) -> None:
    """The next mount has the old state or the new, on the backends too; and the command can be repeated."""
    with file_system(scratch, fleet, "killed-" + point.replace("=", "-").replace("@", "-")) as fs:
        store(fs, "base", MIB)
        fs.run("snapshot", "create", "first")
        store(fs, "later", MIB)
        fs.umount()
        fs.run("rollback", "first", "--yes", code=KILLED, QSFS_FAILPOINTS=point)
        fs.mount()
        assert files(fs) == ({"base"} if rolled_back else {"base", "later"})
        fs.sync()
        with fs.another_machine(scratch / "two") as two:
            two.run("restore")
        fs.umount()
        fs.run("rollback", "first", "--yes")
        fs.mount()
        assert files(fs) == {"base"}
        check(fs, "base")
        fs.umount()
        left = [name for name in names(fs) if name.startswith("before-rollback-")]
        fs.run("rollback", left[0], "--yes")
        fs.mount()
        check(fs, "later")
        fs.umount()
        check_clean(fs)


@pytest.mark.slow
@pytest.mark.parametrize(("point", "returned"), DEATHS, ids=[point for point, _ in DEATHS])
def test_a_takeover_of_an_older_generation_that_is_killed(
    scratch: Path, fleet: Servers, point: str, returned: bool
) -> None:
    """Before its one step nothing mounts what is there, after it a mount publishes it; and it can be repeated."""
    with file_system(scratch, fleet, "killed-older-" + point.replace("=", "-").replace("@", "-")) as one:
        store(one, "base", MIB)
        one.run("snapshot", "create", "first")
        store(one, "later", MIB)
        one.umount()
        with one.another_machine(scratch / "two") as two:
            two.run("restore", "--snapshot", "first")
            two.run("takeover", code=KILLED, QSFS_FAILPOINTS=point)
            if not returned:
                assert "qsfs takeover" in two.run("mount", code=11).stderr
            two.run("takeover")
            two.mount()
            assert files(two) == {"base"}
            check(two, "base")
            two.sync()
            left = [name for name in names(two) if name.startswith("before-rollback-")]
            two.umount()
            check_clean(two)
            two.run("rollback", left[0], "--yes")
            two.mount()
            check(two, "later")
            two.umount()
            check_clean(two)
