"""An unexpected exception in any handler: its caller gets EIO, it is logged and counted, nothing is leaked."""

from __future__ import annotations

import contextlib
import errno
import inspect
import mmap
import os
import shutil

import pyfuse3
import pytest

from qsfs.fuse.operations import Operations
from qsfs.store.schema import PAGE
from tests.fuse.calls import hand_over
from tests.support import scratch
from tests.support.fuse_mount.handle import Settings, mounted

pytestmark = pytest.mark.mount

FILL = "operations._attributes.fill"


@pytest.fixture(scope="module")
def shared():
    """One mount for all cases: each must leave it as good as new."""
    with scratch.scratch_directory() as directory, mounted(Settings(xattr=True), directory) as mount:
        mount.expected_log = "planned"
        mount.spoilt = False
        yield mount


@pytest.fixture
def mount(shared):
    """The shared mount with a file, a directory and a symlink, of which the kernel knows nothing."""
    assert not shared.spoilt, "an earlier case left something behind"
    clear(shared.path)
    with contextlib.suppress(OSError):
        hand_over(shared.path)  # tells once of the WRITE that failed in another case
    (shared.path / "f").write_bytes(b"x" * 5000)
    (shared.path / "d").mkdir()
    os.symlink("f", shared.path / "s")
    os.setxattr(shared.path / "f", "user.a", b"1")
    hand_over(shared.path)
    forget_names()
    assert shared.command("known_only", 0)
    os.stat(shared.path)
    shared.spoilt = True
    return shared


def clear(directory):
    for entry in os.scandir(directory):
        shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)


def forget_names():
    """Has the kernel let go of everything that nobody uses."""
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


def write_to(root):
    """Leaves the kernel with a file of which it knows all but the blocks."""
    with open(root / "f", "r+b") as file:
        file.write(b"y")
    hand_over(root)


def opened(path, flags, mode=0o600):
    os.close(os.open(path, flags, mode))


def read_directly(root):
    """Past the kernel's cache, which reads again by the page what did not come ahead."""
    handle = os.open(root / "f", os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE) as buffer:
            os.preadv(handle, [buffer], 0)
    finally:
        os.close(handle)


def written_and_synced(root):
    with open(root / "f", "r+b", buffering=0) as file:
        file.write(b"z")
        os.fsync(file.fileno())


def synced_directory(root):
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


ACTIONS = {
    "lookup": lambda root: os.stat(root / "f"),
    "getattr": lambda root: os.stat(root / "f"),
    "setattr": lambda root: os.chmod(root / "f", 0o600),
    "readlink": lambda root: os.readlink(root / "s"),
    "mknod": lambda root: os.mkfifo(root / "new"),
    "mkdir": lambda root: os.mkdir(root / "new"),
    "symlink": lambda root: os.symlink("f", root / "new"),
    "link": lambda root: os.link(root / "f", root / "new"),
    "create": lambda root: opened(root / "new", os.O_CREAT | os.O_EXCL | os.O_RDWR),
    "unlink": lambda root: os.unlink(root / "f"),
    "rmdir": lambda root: os.rmdir(root / "d"),
    "rename": lambda root: os.rename(root / "f", root / "new"),
    "open": lambda root: opened(root / "f", os.O_RDONLY),
    "read": read_directly,
    "write": written_and_synced,
    "fsync": written_and_synced,
    "opendir": os.listdir,
    "readdir": os.listdir,
    "fsyncdir": synced_directory,
    "statfs": os.statvfs,
    "getxattr": lambda root: os.getxattr(root / "f", "user.a"),
    "listxattr": lambda root: os.listxattr(root / "f"),
    "setxattr": lambda root: os.setxattr(root / "f", "user.b", b"2"),
    "removexattr": lambda root: os.removexattr(root / "f", "user.a"),
}

PREPARATIONS = {"getattr": write_to}

BEFORE = [
    ("lookup", "namespace.lookup"),
    ("lookup", FILL),
    ("getattr", FILL),
    ("setattr", "state.check_change"),
    ("setattr", "namespace.set_attributes"),
    ("readlink", "namespace.readlink"),
    ("mknod", "has_room"),
    ("mknod", "namespace.mknod"),
    ("mkdir", "namespace.mkdir"),
    ("symlink", "namespace.symlink"),
    ("link", "namespace.link"),
    ("create", "namespace.create"),
    ("unlink", "namespace.unlink"),
    ("unlink", "store.change"),
    ("rmdir", "namespace.rmdir"),
    ("rename", "namespace.rename"),
    ("open", "operations._file_info"),
    ("read", "contents.read"),
    ("write", "contents.write"),
    ("fsync", "sync"),
    ("opendir", "namespace.tree.directory"),
    ("readdir", "namespace.list_directory"),
    ("readdir", FILL),
    ("fsyncdir", "sync_namespace"),
    ("statfs", "report"),
    ("getxattr", "namespace.get_xattr"),
    ("listxattr", "namespace.list_xattrs"),
    ("setxattr", "namespace.set_xattr"),
    ("removexattr", "namespace.remove_xattr"),
]

AFTER = [
    ("lookup", "namespace.lookup"),
    ("setattr", "namespace.set_attributes"),
    ("mknod", "namespace.mknod"),
    ("mkdir", "namespace.mkdir"),
    ("mkdir", FILL),
    ("symlink", "namespace.symlink"),
    ("link", "namespace.link"),
    ("create", "namespace.create"),
    ("create", FILL),
    ("create", "operations._file_info"),
    ("unlink", "namespace.unlink"),
    ("rmdir", "namespace.rmdir"),
    ("rename", "namespace.rename"),
    ("write", "contents.write"),
]

UNSEEN = {"forget", "release"}
NOTHING_TO_BREAK = {"flush", "access", "releasedir"}


def test_the_cases_name_every_handler():
    handlers = {
        name
        for name, value in vars(Operations).items()
        if hasattr(pyfuse3.Operations, name) and inspect.iscoroutinefunction(value)
    }
    assert handlers == {name for name, _ in BEFORE} | UNSEEN | NOTHING_TO_BREAK
    assert {name for name, _ in BEFORE} == set(ACTIONS)


@contextlib.contextmanager
def one_failure(mount, handler):
    """Within the block one unexpected error of `handler` is counted and logged, once, with its context."""
    before, said = mount.command("failures"), len(mount.log)
    yield
    after = mount.command("failures")
    assert {name: n - before.get(name, 0) for name, n in after.items() if n != before.get(name)} == {handler: 1}
    told = [line for line in mount.log[said:].splitlines() if "failed unexpectedly" in line]
    assert len(told) <= 1
    assert all(f"{handler} failed unexpectedly (" in line for line in told)


def nothing_is_left(mount):
    """All can be removed, and the kernel and the handlers agree that it knows nothing any more."""
    clear(mount.path)
    forget_names()
    assert mount.command("known_only", 0), "lookup counts were leaked"
    # What an error kept from being removed is removed with the next that is forgotten.
    (mount.path / "last").touch()
    os.unlink(mount.path / "last")
    forget_names()
    assert mount.command("settled")
    assert mount.command("inodes") == [1]
    assert mount.command("open_files") == 0
    mount.spoilt = False


@pytest.mark.parametrize(("handler", "place"), BEFORE)
def test_an_error_before_anything_was_done_leaves_all_as_it_was(mount, handler, place):
    PREPARATIONS.get(handler, os.stat)(mount.path)
    mount.command("break_next", place)
    with one_failure(mount, handler), pytest.raises(OSError) as caught:
        ACTIONS[handler](mount.path)
    assert caught.value.errno == errno.EIO
    forget_names()
    ACTIONS[handler](mount.path)
    nothing_is_left(mount)


@pytest.mark.parametrize(("handler", "place"), AFTER)
def test_an_error_after_the_work_was_done_leaks_nothing(mount, handler, place):
    mount.command("break_next", place, "ValueError", True)
    with one_failure(mount, handler), pytest.raises(OSError) as caught:
        ACTIONS[handler](mount.path)
    assert caught.value.errno == errno.EIO
    nothing_is_left(mount)


def test_a_listing_that_fails_half_way_goes_on_where_it_was(mount):
    """The kernel has references to what it was given, and gets the rest when it asks again."""
    mount.command("break_after", FILL, 3)
    with one_failure(mount, "readdir"):
        assert sorted(os.listdir(mount.path)) == ["d", "f", "s"]
    nothing_is_left(mount)


@pytest.mark.parametrize(("place", "after"), [("contents.closed", True), ("namespace.references.collect", False)])
def test_an_error_while_closing_is_nobodys(mount, place, after):
    mount.command("break_next", place, "ValueError", after)
    with one_failure(mount, "release"):
        opened(mount.path / "f", os.O_RDONLY)
        assert mount.command("counted", "failures", "release")
    nothing_is_left(mount)


@pytest.mark.parametrize(
    ("place", "after"),
    [
        ("namespace.references.forget", True),
        ("namespace.tree.forget_name", False),
        ("namespace.references.collect", False),
    ],
)
def test_an_error_while_forgetting_ends_nothing(mount, place, after):
    """pyfuse3 does not even let `FUSEError` through there."""
    opened(mount.path / "f", os.O_RDONLY)
    mount.command("break_next", place, "ValueError", after)
    with one_failure(mount, "forget"):
        os.unlink(mount.path / "f")
        forget_names()
        assert mount.command("counted", "failures", "forget")
    nothing_is_left(mount)


def test_one_orphan_that_cannot_be_removed_holds_up_no_other(mount):
    for name in ("a", "b", "c"):
        (mount.path / name).touch()
    number = os.stat(mount.path / "b").st_ino
    mount.command("refuse_removal", number)
    for name in ("a", "b", "c"):
        os.unlink(mount.path / name)
    forget_names()
    assert mount.command("settled")
    assert number in mount.command("inodes")
    mount.command("refuse_removal", 0)
    assert mount.command("remove_orphans") == 1
    nothing_is_left(mount)


def test_the_same_error_again_and_again_does_not_flood_the_log(mount):
    said = len(mount.log)
    for _ in range(25):
        mount.command("break_next", "namespace.readlink")
        with pytest.raises(OSError):
            os.readlink(mount.path / "s")
    told = [line for line in mount.log[said:].splitlines() if "failed unexpectedly" in line]
    assert 1 <= len(told) <= 3
    assert "time: ValueError('planned')" in told[-1]
    nothing_is_left(mount)


def test_an_attribute_refresh_that_fails_ends_nothing(mount):
    """It runs in the background, after a write took the set-id bits away."""
    mount.command("break_refresh")
    os.chmod(mount.path / "f", 0o4755)
    mount.command("refresh", os.stat(mount.path / "f").st_ino)
    assert mount.command("refreshes_ended")
    assert "was not told that its attributes changed" in mount.log
    assert (mount.path / "f").exists()
    nothing_is_left(mount)


def test_kernel_settings_that_fail_leave_the_mount_usable():
    with scratch.scratch_directory() as directory, mounted(Settings(break_tuning=True), directory) as mount:
        mount.expected_log = "the kernel's settings for the mount stay as they are"
        (mount.path / "f").write_text("x")
        assert (mount.path / "f").read_text() == "x"
