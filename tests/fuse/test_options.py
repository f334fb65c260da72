"""Options of a mount and policies of files, as system calls see them."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from qsfs.fuse import tuning
from tests.fuse.calls import as_nobody
from tests.fuse.test_requests import counted

pytestmark = pytest.mark.mount

WRITE_THROUGH = ({"match": "*.wal", "write_through": True},)


def test_xattrs_are_off_by_default(root):
    (root / "f").touch()
    for operation in (
        lambda: os.getxattr(root / "f", "user.a"),
        lambda: os.setxattr(root / "f", "user.a", b"1"),
        lambda: os.listxattr(root / "f"),
        lambda: os.removexattr(root / "f", "user.a"),
    ):
        with pytest.raises(OSError) as caught:
            operation()
        assert caught.value.errno == errno.EOPNOTSUPP


def test_xattrs_where_they_are_on(make_mount):
    root = make_mount(xattr=True).path
    (root / "f").touch()
    os.setxattr(root / "f", "user.a", b"1", os.XATTR_CREATE)
    with pytest.raises(FileExistsError):
        os.setxattr(root / "f", "user.a", b"1", os.XATTR_CREATE)
    os.setxattr(root / "f", "user.a", b"\0two\xff", os.XATTR_REPLACE)
    with pytest.raises(OSError) as caught:
        os.setxattr(root / "f", "user.b", b"1", os.XATTR_REPLACE)
    assert caught.value.errno == errno.ENODATA
    os.setxattr(root / "f", "trusted.b", b"")
    assert os.getxattr(root / "f", "user.a") == b"\0two\xff"
    assert sorted(os.listxattr(root / "f")) == ["trusted.b", "user.a"]
    os.removexattr(root / "f", "user.a")
    with pytest.raises(OSError) as caught:
        os.getxattr(root / "f", "user.a")
    assert caught.value.errno == errno.ENODATA


def test_acls_are_enforced_and_handed_down(make_mount):
    def acl(*entries):
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)

    none = 2**32 - 1
    root = make_mount(xattr=True).path
    (root / "d").mkdir(mode=0o755)
    grant = acl((1, 7, none), (2, 7, 65534), (4, 5, none), (16, 7, none), (32, 0, none))
    (root / "d" / "f").write_text("x")
    os.chmod(root / "d" / "f", 0o600)
    assert as_nobody(root, lambda: os.close(os.open("d/f", os.O_RDWR))) == errno.EACCES
    os.setxattr(root / "d" / "f", "system.posix_acl_access", grant)
    assert stat.S_IMODE(os.stat(root / "d" / "f").st_mode) == 0o770
    assert as_nobody(root, lambda: os.close(os.open("d/f", os.O_RDWR))) == 0
    os.setxattr(root / "d", "system.posix_acl_default", grant)
    (root / "d" / "g").write_text("x")
    assert as_nobody(root, lambda: os.close(os.open("d/g", os.O_RDONLY))) == 0
    os.chmod(root / "d" / "g", 0o600)
    assert as_nobody(root, lambda: os.close(os.open("d/g", os.O_RDONLY))) == errno.EACCES


def test_a_write_to_a_write_through_file_is_durable_before_it_returns(make_mount):
    """The write-ahead log of a validator is never synced, only written."""
    mount = make_mount(policies=WRITE_THROUGH)
    handle = os.open(mount.path / "unit.wal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    number = os.fstat(handle).st_ino
    mount.command("take_syncs")
    for length in (8, 200, 5000):
        os.write(handle, b"x" * length)
        assert mount.command("take_syncs") == [[number, True]]
        assert mount.command("size", number) == os.fstat(handle).st_size
    os.close(handle)
    assert (mount.path / "unit.wal").read_bytes() == b"x" * 5208
    handle = os.open(mount.path / "unit.wal", os.O_RDWR)
    os.ftruncate(handle, 8)
    assert mount.command("take_syncs") == [[number, True]]
    os.pwrite(handle, b"y", 3)
    assert os.pread(handle, 10, 0) == b"xxxyxxxx"
    os.close(handle)


def test_a_write_through_file_cannot_be_mapped_shared_but_privately(make_mount):
    mount = make_mount(policies=WRITE_THROUGH)
    with open(mount.path / "a.wal", "w+b") as file:
        file.write(b"x" * 5000)
        file.flush()
        with pytest.raises(OSError) as caught:
            mmap.mmap(file.fileno(), 4096)
        assert caught.value.errno == errno.ENODEV
        with mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE) as private:
            assert private[:5] == b"xxxxx"


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC])
@pytest.mark.parametrize("name", ["f", "f.wal"])
def test_o_sync_makes_each_write_durable(make_mount, flag, name):
    mount = make_mount(policies=WRITE_THROUGH)
    handle = os.open(mount.path / name, os.O_WRONLY | os.O_CREAT | flag)
    for _ in range(3):
        mount.command("take_syncs")
        os.write(handle, b"x")
        assert mount.command("take_syncs")
    os.close(handle)


def test_other_files_are_not_written_through(make_mount):
    mount = make_mount(policies=WRITE_THROUGH)
    requests = counted(mount, lambda: (mount.path / "f").write_bytes(b"x" * 100))
    assert requests["write"] == 1
    assert mount.command("take_syncs") == []


def test_set_id_bits_go_with_a_direct_write(make_mount):
    mount = make_mount(policies=WRITE_THROUGH)
    path = mount.path / "a.wal"
    path.write_bytes(b"x")
    os.chmod(path, 0o6755)
    handle = os.open(path, os.O_WRONLY)
    os.write(handle, b"y")
    os.close(handle)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o755


def test_the_kernel_is_tuned(mount, root):
    device = tuning.find_device(root)
    bdi = Path(f"/sys/class/bdi/{device.major}:{device.minor}")
    assert (bdi / "read_ahead_kb").read_text().strip() == "1024"
    assert (bdi / "max_ratio").read_text().strip() == str(tuning.MAX_RATIO)
    usual = Path("/sys/fs/fuse/connections")
    with tuning._connections(usual, device) as connections:
        connection = connections / str(device.minor)
        assert (connection / "max_background").read_text().strip() == "32"
        assert (connection / "congestion_threshold").read_text().strip() == "24"
    if not (usual / str(device.minor)).exists():
        assert "fusectl" not in Path("/proc/self/mounts").read_text(), "a mount of the control files stayed"


def test_an_unmount_ends_the_daemon(root):
    (root / "f").write_text("x")
    subprocess.run(["fusermount3", "-u", root], check=True)
    assert os.listdir(root) == []
