"""How many requests the kernel sends for what programs do: pinned, so that no change makes it ask more.

The table in docs/performance.md is made of these.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import time

import pytest

from qsfs.fuse.attributes import CHANGING_SECONDS
from qsfs.store.schema import PAGE
from tests.fuse.calls import hand_over
from tests.support import scratch
from tests.support.fuse_mount.handle import Settings, mounted

pytestmark = pytest.mark.mount

MIB = 1 << 20
COARSE = 5  # CLOCK_REALTIME_COARSE, which marks times
LATE_SETATTR = {"setattr": (0, 1)}
"""The kernel sends times with the next hand-over, or earlier when a clock tick went by."""


def forget():
    """Has the kernel forget names, attributes and data."""
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


def cold(root):
    hand_over(root)
    forget()


def asked(mount, action, left_open=0):
    """The requests of one action and of its closes, without FORGETs, which come when the kernel likes."""
    assert mount.command("closed", left_open)
    mount.requests()
    action()
    assert mount.command("closed", left_open)
    requests = mount.requests()
    requests.pop("forget", None)
    return requests


def check(requests, expected):
    """Compares with `expected`: exact numbers, or (least, most)."""
    for name in requests.keys() | expected.keys():
        wanted = expected.get(name, 0)
        least, most = wanted if isinstance(wanted, tuple) else (wanted, wanted)
        assert least <= requests.get(name, 0) <= most, f"{name}: {requests}, not {expected}"


def create(file):
    handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    os.write(handle, b"x" * 1024)
    os.close(handle)


def read(file):
    handle = os.open(file, os.O_RDONLY)
    os.read(handle, MIB)
    os.close(handle)


def append(file):
    handle = os.open(file, os.O_WRONLY | os.O_APPEND)
    os.write(handle, b"x" * 100)
    os.close(handle)


@pytest.fixture
def directory(mount, root):
    """A directory that the kernel knows, with one file `f` of 1 KiB; `flush` and `getxattr` were asked."""
    (root / "d").mkdir()
    create(root / "d" / "f")
    hand_over(root)
    os.stat(root / "d" / "f")
    os.stat(root / "d")
    return root / "d"


def test_create_write_close(mount, directory):
    """The kernel asks for the directory each time: a name that was added changed it."""
    one = {"lookup": 1, "create": 1, "write": 1, "release": 1}
    check(asked(mount, lambda: create(directory / "a")), one | LATE_SETATTR)
    ten = {name: 10 * count for name, count in one.items()} | {"getattr": 10, "setattr": (0, 10)}
    check(asked(mount, lambda: [create(directory / f"b{number}") for number in range(10)]), ten)


def test_open_read_close(mount, directory, root):
    file = directory / "f"
    check(asked(mount, lambda: read(file)), {"open": 1, "release": 1})
    cold(root)
    os.stat(directory)
    check(asked(mount, lambda: read(file)), {"lookup": 1, "open": 1, "read": 1, "release": 1})
    check(asked(mount, lambda: read(file)), {"open": 1, "release": 1})


def test_what_relatime_costs(make_mount):
    """A READ of a small file at the first open after a change, once the clock has gone on; then nothing."""
    mount = make_mount(relatime=True)
    file = mount.path / "f"
    create(file)
    hand_over(mount.path)
    for _ in range(2):
        changed = os.stat(file).st_ctime_ns
        while time.clock_gettime_ns(COARSE) <= changed:
            pass
        check(asked(mount, lambda: read(file)), {"open": 1, "read": 1, "release": 1})
        check(asked(mount, lambda: read(file)), {"open": 1, "release": 1})
        append(file)
        hand_over(mount.path)
    file.write_bytes(b"x" * MIB)
    check(asked(mount, lambda: read(file)), {"open": 1, "release": 1})


def test_stat(mount, directory, root):
    check(asked(mount, lambda: [os.stat(directory / "f") for _ in range(10)]), {})
    cold(root)
    os.stat(directory)
    check(asked(mount, lambda: os.stat(directory / "f")), {"lookup": 1})
    check(asked(mount, lambda: os.stat(directory / "f")), {})


def test_stat_after_a_write(mount, directory):
    """It asks once, for the blocks."""
    create(directory / "g")
    check(asked(mount, lambda: os.stat(directory / "g")), {"getattr": (1, 2)} | LATE_SETATTR)
    check(asked(mount, lambda: os.stat(directory / "g")), {})


def test_writes_while_a_truncation_is_worked_off(mount):
    """The kernel asks for the blocks now and then, and not before each of 1,000 writes."""
    handle = os.open(mount.path / "f", os.O_CREAT | os.O_WRONLY)
    os.write(handle, bytes(MIB))
    os.close(handle)
    mount.command("shrink")
    handle = os.open(mount.path / "f", os.O_WRONLY | os.O_TRUNC)
    os.fstat(handle)
    mount.requests()
    began = time.monotonic()
    for _ in range(1000):
        os.write(handle, b"x" * PAGE)
    most = 2 + (time.monotonic() - began) / CHANGING_SECONDS
    getattrs = mount.requests().get("getattr", 0)
    os.close(handle)
    assert getattrs <= most


def test_append(mount, directory, root):
    one = {"open": 1, "write": 1, "release": 1}
    check(asked(mount, lambda: append(directory / "f")), one | LATE_SETATTR)
    cold(root)
    os.stat(directory)
    # The kernel fills the page that it appends to.
    check(asked(mount, lambda: append(directory / "f")), one | {"lookup": 1, "read": 1} | LATE_SETATTR)


def test_write_and_fsync(mount, directory):
    handle = os.open(directory / "f", os.O_RDWR)

    def commit():
        os.pwrite(handle, b"y" * PAGE, 0)
        os.fsync(handle)

    commit()
    one = {"write": 1, "fsync": 1} | LATE_SETATTR
    check(asked(mount, commit, 1), one)
    os.close(handle)


def test_unlink_and_rename(mount, directory):
    """Each changes the directory, and the file's ctime, which the kernel sets itself."""
    for number in range(20):
        create(directory / f"f{number}")
    hand_over(directory)
    os.stat(directory)
    ten = range(10)
    requests = asked(mount, lambda: [os.unlink(directory / f"f{number}") for number in ten])
    check(requests, {"unlink": 10, "setattr": 10, "getattr": (9, 10)})
    requests = asked(
        mount, lambda: [os.rename(directory / f"f1{number}", directory / f"g{number}") for number in ten]
    )
    check(requests, {"rename": 10, "lookup": 10, "setattr": 10, "getattr": (9, 10)})


def test_list_with_attributes(mount, root):
    directory = root / "many"
    directory.mkdir()
    for number in range(1000):
        create(directory / f"file-{number:04}")
    cold(root)
    os.stat(directory)

    def list_all():
        lines = subprocess.run(["ls", "-l", directory], capture_output=True, check=True).stdout.splitlines()
        assert len(lines) == 1001

    listing = {"opendir": 1, "readdir": (1, 8), "releasedir": 1}
    check(asked(mount, list_all), listing)
    check(asked(mount, list_all), listing | {"getattr": (0, 1)})


def test_a_map_touched_and_written_back(mount, directory, root):
    pages = 64
    (directory / "m").write_bytes(bytes(pages * PAGE))
    cold(root)
    handle = os.open(directory / "m", os.O_RDWR)
    with mmap.mmap(handle, pages * PAGE) as shared:
        shared.madvise(mmap.MADV_RANDOM)

        def touch():
            return [shared[page * PAGE] for page in range(0, pages, 2)]

        def dirty():
            for page in range(0, pages, 2):
                shared[page * PAGE] = 1

        check(asked(mount, touch, 1), {"read": 32})
        check(asked(mount, touch, 1), {})
        check(asked(mount, dirty, 1), {})
        check(asked(mount, shared.flush, 1), {"write": 32, "fsync": 1} | LATE_SETATTR)
        shared[:] = b"x" * (pages * PAGE)
        check(asked(mount, shared.flush, 1), {"write": 1, "fsync": 1, "read": 0} | LATE_SETATTR)
    os.close(handle)


def test_large_reads_and_writes(mount, directory, root):
    size = 16 * MIB
    data = os.urandom(size)

    def write():
        with open(directory / "large", "wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())

    requests = asked(mount, write)
    assert requests["write"] <= 18, requests
    cold(root)
    os.stat(directory)
    requests = asked(mount, (directory / "large").read_bytes)
    assert requests["read"] <= 20, requests


def test_git_status(mount, root):
    """Cold: one lookup a name, which also brings its attributes.  Warm: only directories are listed."""
    tree = root / "tree"
    plain = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "GIT_OPTIONAL_LOCKS": "0"}
    environment = os.environ | plain

    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)

    past = time.time() - 1000
    for number in range(10):
        (tree / f"d{number}").mkdir(parents=True)
        for file in range(10):
            create(tree / f"d{number}" / f"f{file}")
            os.utime(tree / f"d{number}" / f"f{file}", (past, past))
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    git("status")
    cold(root)
    requests = asked(mount, lambda: git("status"))
    assert requests["lookup"] <= 170, requests
    assert requests.get("read", 0) <= 12, requests
    assert requests.get("getattr", 0) <= 20, requests
    requests = asked(mount, lambda: git("status"))
    assert requests.get("lookup", 0) + requests.get("read", 0) <= 6, requests
    assert requests.get("getattr", 0) <= 36, requests
    assert requests["readdir"] <= 28, requests


def look_for_a_lock(directory):
    for _ in range(10):
        assert not os.path.exists(directory / "lock")


def write_little_by_little(directory):
    with open(directory / "f", "wb", buffering=0) as file:
        for _ in range(10):
            file.write(b"x" * 100)


SAVINGS = {
    "timeouts": ("lookup", lambda directory: [os.stat(directory / "f") for _ in range(10)]),
    "negative entries": ("lookup", look_for_a_lock),
    "keep_cache": ("read", lambda directory: [read(directory / "f") for _ in range(10)]),
    "ENOSYS to flush": ("flush", lambda directory: [read(directory / "f") for _ in range(10)]),
    "writeback cache": ("write", write_little_by_little),
    "kernel settings": ("read", lambda directory: (directory / "large").read_bytes()),
}


def asked_for(mount, saving):
    """How many requests of the kind that a saving is about what it is good for costs."""
    kind, action = SAVINGS[saving]
    directory = mount.path / saving.replace(" ", "-")
    directory.mkdir()
    create(directory / "f")
    (directory / "large").write_bytes(bytes(4 * MIB))
    cold(mount.path)
    read(directory / "f")
    os.stat(directory / "f")

    def act():
        handle = os.open(directory / "f", os.O_RDWR)
        action(directory)
        os.fsync(handle)
        os.close(handle)

    return asked(mount, act).get(kind, 0)


@pytest.fixture(scope="module")
def with_all_savings():
    with scratch.scratch_directory() as directory, mounted(Settings(), directory) as mount:
        return {saving: asked_for(mount, saving) for saving in SAVINGS}


@pytest.mark.parametrize("saving", SAVINGS)
def test_each_saving_is_one(make_mount, with_all_savings, saving):
    """Without it the kernel asks more often."""
    assert asked_for(make_mount(without=saving), saving) > with_all_savings[saving]
