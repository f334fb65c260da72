"""What the kernel asks, and what it need not ask: the fastest request is the one that is not sent."""

from __future__ import annotations

import os

import pytest

from qsfs.store.schema import PAGE
from tests.fuse.calls import hand_over

pytestmark = pytest.mark.mount


def counted(mount, action):
    """The requests of one action, without FORGETs and RELEASEs, which come when the kernel likes."""
    mount.requests()
    action()
    requests = mount.requests()
    return {name: n for name, n in requests.items() if name not in ("forget", "release", "releasedir")}


def test_a_name_that_does_not_exist_is_asked_once(mount, root):
    os.stat(root)
    assert counted(mount, lambda: [os.path.exists(root / "nothing") for _ in range(100)]) == {"lookup": 1}


def drop_names():
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("2")


def test_cached_data_stay_over_opens_and_stats(mount, root):
    """After a close the kernel asks for the block count again; it never asks for data again."""
    (root / "f").write_bytes(os.urandom(100 * PAGE))
    hand_over(root)
    (root / "f").read_bytes()

    def read_again():
        for _ in range(10):
            os.stat(root / "f")
            (root / "f").read_bytes()

    requests = counted(mount, read_again)
    assert requests.pop("open") == 10
    assert requests.pop("getattr", 0) <= 10
    assert requests == {}


def test_small_writes_are_gathered(mount, root):
    def write():
        with open(root / "f", "wb", buffering=0) as file:
            for _ in range(1000):
                file.write(b"x" * 100)

    requests = counted(mount, write)
    assert requests["write"] <= 2
    assert requests.get("getxattr", 0) <= 1


def test_flush_access_and_getxattr_are_asked_once(mount, root):
    for _ in range(3):
        (root / "f").write_bytes(b"x")
    requests = counted(mount, lambda: [(root / f"g{n}").write_bytes(b"x") for n in range(10)])
    assert not {"flush", "access", "getxattr"} & set(requests)


def test_open_is_always_asked(mount, root):
    """Else reads and writes would come without saying of which file."""
    (root / "f").touch()
    assert counted(mount, lambda: [open(root / "f").close() for _ in range(5)])["open"] == 5


def test_fsync_is_always_asked(mount, root):
    with open(root / "f", "wb") as file:
        for _ in range(3):
            file.write(b"x")
            file.flush()
            assert counted(mount, lambda: os.fsync(file.fileno()))["fsync"] == 1
    directory = os.open(root, os.O_RDONLY)
    for _ in range(3):
        assert counted(mount, lambda: os.fsync(directory)) == {"fsyncdir": 1}
    os.close(directory)
    assert mount.command("take_syncs")[-1] == "namespace"


def test_forgets_leave_nothing_known(mount, root):
    for number in range(300):
        (root / str(number)).touch()
    assert mount.command("known") >= 300
    for number in range(300):
        (root / str(number)).unlink()
    drop_names()
    assert mount.command("settled")
    assert mount.command("inodes") == [1]
