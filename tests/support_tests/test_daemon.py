"""The helper for mounted tests: it drives the commands, notices every end, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsfs.config import Config
from tests.support import scratch as places
from tests.support import workload
from tests.support.backends import Servers
from tests.support.daemon import FileSystem, FileSystemError, to_toml
from tests.support.workload import Running


def nothing_left(top: Path) -> None:
    """No mount lies below `top` and no process knows it."""
    assert places.mounts_below(top) == []
    named = [places.describe_process(process) for process in places.session_processes()]
    assert [line for line in named if str(top) in line] == []


def synced_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@pytest.fixture
def fs(scratch: Path) -> Iterator[FileSystem]:
    with FileSystem(scratch, shards=(2, 1), count=4, forgetting=True) as fs:
        fs.format()
        yield fs
    nothing_left(scratch)


def test_toml_comes_back_as_it_was() -> None:
    tables = {
        "a": {"text": 'quote " and \\ and é', "flag": True, "whole": 3, "part": 0.5},
        "list": [{"x": 1}, {"x": "2", "y": False}],
    }
    assert tomllib.loads(to_toml(tables)) == tables


def test_settings_reach_the_configuration(scratch: Path) -> None:
    with FileSystem(
        scratch,
        shards=(2, 1),
        settings={"flush.cut_seconds": 77, "policy": [{"match": "*.first", "local_only": True}]},
    ) as fs:
        assert len(fs.servers.ports) == 4
        fs.configure(mount__xattr=True, fetch__deadline_seconds="3s")
        config = Config.load(fs.config)
        assert (config.flush.cut_seconds, config.mount.xattr, config.fetch.deadline_seconds) == (77, True, 3)
        assert (config.code.data_shards, config.code.parity_shards) == (2, 1)
        assert config.policies[0].match == "*.first"
        assert len(config.policies) > 1, "the presets stay"
        assert [backend.address for backend in config.backends] == [
            f"127.0.0.1:{port}" for port in fs.servers.ports
        ]
    nothing_left(scratch)


def test_a_command_that_fails_says_what_it_printed(scratch: Path) -> None:
    with FileSystem(scratch, shards=(2, 1)) as fs:
        assert fs.run("status", code=16).stderr.startswith("qsfs: ")
        with pytest.raises(FileSystemError, match=r"(?s)'status --json' exited with 16, not 0: .*NotRunning"):
            fs.status()
        with pytest.raises(FileSystemError, match="did not end in"):
            fs.run("status", timeout=0.001)


@pytest.mark.mount
def test_a_file_system_is_made_mounted_used_and_unmounted(fs: FileSystem) -> None:
    fs.mount()
    synced_file(fs.mountpoint / "a", b"1" * 10_000)
    assert fs.status()["process"] == fs.process
    assert fs.sync()["generation"] >= 1
    fs.umount()
    assert not places.mounts_below(fs.mountpoint)
    fs.mount()
    assert (fs.mountpoint / "a").read_bytes() == b"1" * 10_000
    fs.umount()


@pytest.mark.mount
def test_a_killed_daemon_leaves_a_dead_mount_that_the_next_one_clears(fs: FileSystem) -> None:
    fs.mount()
    synced_file(fs.mountpoint / "a", b"1" * 10_000)
    # The kernel remembers this, and would answer it for the dead daemon.
    fs.mountpoint.stat()
    fs.kill()
    assert places.mounts_below(fs.mountpoint)
    with pytest.raises(OSError) as caught:
        (fs.mountpoint / "b").touch()
    assert caught.value.errno == errno.ENOTCONN
    fs.mount()
    assert (fs.mountpoint / "a").read_bytes() == b"1" * 10_000


@pytest.mark.mount
def test_a_daemon_that_dies_at_a_failpoint_is_noticed(fs: FileSystem) -> None:
    fs.mount(failpoints="journal.written=kill")
    with pytest.raises(OSError):
        synced_file(fs.mountpoint / "a", b"1")
    fs.wait_dead()
    assert fs.process == 0


@pytest.mark.mount
def test_a_mount_that_fails_says_so(fs: FileSystem) -> None:
    with pytest.raises(FileSystemError, match="'--json mount --no-such-option' exited with 2"):
        fs.mount("--no-such-option")
    fs.set({"filesystem.key_file": "other.key"})
    with pytest.raises(FileSystemError, match=r"(?s)'--json mount' exited with 4.*KeyFileError"):
        fs.mount()


@pytest.mark.mount
def test_a_power_cut_takes_the_daemon_and_only_what_no_fsync_covered(fs: FileSystem) -> None:
    fs.mount()
    synced_file(fs.mountpoint / "a", b"1" * 10_000)
    fs.power_cut(seed=1)
    assert not places.mounts_below(fs.mountpoint)
    fs.mount()
    assert (fs.mountpoint / "a").read_bytes() == b"1" * 10_000
    fs.umount()


@pytest.mark.mount
def test_an_armed_power_cut_of_the_journal_ends_what_runs_on_the_mount(fs: FileSystem, scratch: Path) -> None:
    fs.mount()
    assert fs.disk is not None
    fs.disk.arm(at=20, match="journal.*", seed=1, victims=[fs.process])
    with Running("files", fs.mountpoint / "w", scratch / "acks", seed=1) as writer:
        fs.wait_power_cut()
        assert writer.end() != 0
    fs.mount()
    assert workload.verify(fs.mountpoint / "w", scratch / "acks") == []


@pytest.mark.mount
def test_a_loud_log_fails_the_test_unless_declared(scratch: Path) -> None:
    with Servers(scratch / "zdb", 4) as servers:
        for declared in (False, True):
            top = scratch / str(declared)
            fs = FileSystem(top, shards=(2, 1), servers=servers)
            with fs:
                fs.log_file.write_text("2026-01-01 WARNING qsfs.area: odd\n2026-01-01 INFO qsfs: WELL\n")
                if declared:
                    fs.expect(r"area: odd")
                    continue
                with pytest.raises(FileSystemError, match=r"undeclared in the daemon's log:\n.*area: odd$"):
                    fs.__exit__(None, None, None)
                fs.expect(r"area: odd")


@pytest.mark.mount
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_when_a_test_fails(scratch: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind), FileSystem(scratch, shards=(2, 1), count=4, forgetting=True) as fs:
        fs.format()
        fs.mount()
        file = (fs.mountpoint / "open").open("wb")
        raise kind
    with contextlib.suppress(OSError):
        file.close()
    nothing_left(scratch)


@pytest.mark.mount
def test_another_machine_has_the_same_key_and_backends_and_its_own_place(
    fs: FileSystem, scratch: Path
) -> None:
    with fs.another_machine(scratch / "other") as other:
        mine, its = Config.load(fs.config), Config.load(other.config)
        assert mine.backends == its.backends
        assert (scratch / "qsfs.key").read_text() == (scratch / "other" / "qsfs.key").read_text()
        assert its.filesystem.mountpoint == other.mountpoint != fs.mountpoint
        assert list(other.cache.iterdir()) == []
    fs.mount()
    fs.umount()
