"""The parts of the FUSE layer by themselves, without a mount."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pyfuse3
import pytest
import trio

from qsfs.config import MountConfig
from qsfs.errors import Corrupt, MountError
from qsfs.filesystem.needs import NeedPages, NeedRoom
from qsfs.filesystem.posix import PosixError
from qsfs.fuse import handles, session, tuning
from qsfs.fuse.boundary import RequestCounts, request
from qsfs.fuse.state import MountState


class Handlers:
    """One handler, which does what the test says."""

    def __init__(self, *outcomes):
        self.counts = RequestCounts()
        self.waiter = self
        self.outcomes = list(outcomes)
        self.needs = []

    async def satisfy(self, need):
        self.needs.append(need)
        assert self.counts.waiting == 1
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome

    @request
    async def work(self, number):
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome + number


async def code_of(*outcomes):
    handlers = Handlers(*outcomes)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await handlers.work(0)
    return caught.value.errno, handlers.counts


async def test_a_handler_that_succeeds_is_counted():
    handlers = Handlers(1, 2)
    assert [await handlers.work(10), await handlers.work(10)] == [11, 12]
    assert (handlers.counts.requests, handlers.counts.total()) == ({"work": 2}, 2)


async def test_a_handler_that_does_not_wait_gives_no_turn_away():
    """Each turn costs a system call and more; a hit must not take one."""
    handlers = Handlers(1)
    coroutine = handlers.work(0)
    with pytest.raises(StopIteration):
        coroutine.send(None)


async def test_needs_are_satisfied_until_the_operation_is_done():
    need = NeedPages(1, 2, 3)
    handlers = Handlers(need, None, NeedRoom(), None, 5)
    assert await handlers.work(1) == 6
    assert handlers.needs[0] is need
    assert (handlers.counts.waits, handlers.counts.waiting) == ({"work": 2}, 0)


async def test_what_the_waiter_raises_is_the_answer():
    assert (await code_of(NeedRoom(), PosixError(errno.ENOSPC)))[0] == errno.ENOSPC


async def test_expected_errors_pass_unlogged():
    assert (await code_of(PosixError(errno.ENOENT)))[0] == errno.ENOENT
    assert (await code_of(pyfuse3.FUSEError(errno.ENOSYS)))[0] == errno.ENOSYS
    code, counts = await code_of(BaseExceptionGroup("", [ExceptionGroup("", [PosixError(errno.EROFS)])]))
    assert (code, counts.unexpected) == (errno.EROFS, 0)


async def test_our_own_errors_are_eio_with_their_message(expect_log):
    expect_log(r"work failed: Corrupt: inode 5: damaged", logging.ERROR, count=1)
    code, counts = await code_of(Corrupt("inode 5: damaged"))
    assert (code, counts.unexpected) == (errno.EIO, 1)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), errno.EIO),
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (OSError("no code"), errno.EIO),
        (MemoryError(), errno.EIO),
        (ExceptionGroup("x", [ValueError("x"), OSError(errno.ENOSPC, "x")]), errno.ENOSPC),
    ],
)
async def test_everything_else_is_logged_with_its_traceback(expect_log, error, code):
    expect_log("work failed unexpectedly", logging.ERROR, count=1)
    found, counts = await code_of(error)
    assert (found, counts.unexpected) == (code, 1)


async def test_a_cancellation_passes():
    handlers = Handlers()

    class Sleeper(Handlers):
        @request
        async def work(self, number):
            await trio.sleep_forever()

    with trio.move_on_after(0) as scope:
        await Sleeper().work(0)
    assert scope.cancelled_caught
    assert handlers.counts.unexpected == 0


@pytest.mark.parametrize("uncached", [True, False])
@pytest.mark.parametrize("synced", [True, False])
@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("inode", [1, 2**40, 2**61 - 1])
def test_a_handle_says_what_it_belongs_to(inode, uncached, synced, marks):
    handle = handles.make_handle(inode, uncached=uncached, synced=synced, marks_access=marks)
    assert handle < 2**64
    assert (handles.inode_of(handle), handles.is_uncached(handle), handles.marks_access(handle)) == (
        inode,
        uncached,
        marks,
    )
    assert handles.is_durable(handle) == (uncached or synced)


def test_the_first_reason_to_stop_writing_stays(expect_log):
    expect_log("read-only from now on: disk", logging.ERROR, count=1)
    state = MountState()
    state.check_write()
    state.check_change()
    assert state.writable
    state.fail("disk")
    state.fence("owner")
    assert (state.writable, state.reason) == (False, "disk")
    for check in (state.check_write, state.check_change):
        with pytest.raises(PosixError) as caught:
            check()
        assert caught.value.errno == errno.EIO


def test_options_follow_the_configuration():
    usual = {"fsname=qsfs", "subtype=qsfs", "default_permissions", "allow_other"}
    usual |= {"suid", "dev"} if os.geteuid() == 0 else {"nosuid", "nodev"}
    assert session.mount_options(MountConfig()) == usual
    assert session.mount_options(MountConfig(), read_only=True) == usual | {"ro"}
    assert session.mount_options(MountConfig(relatime=False)) == usual | {"noatime"}
    private = session.mount_options(MountConfig(allow_other=False, default_permissions=False))
    assert private == usual - {"default_permissions", "allow_other"}


def test_an_answer_that_nobody_waits_for_is_no_error(caplog):
    """The kernel gives requests up when a mount ends; any other answer that fails is told."""
    log = logging.getLogger("pyfuse3")
    log.error("fuse_release(): fuse_reply_* failed with %s", os.strerror(errno.ENOENT))
    log.error("fuse_read(): fuse_reply_* failed with %s", os.strerror(errno.EINVAL))
    (told,) = caplog.records
    assert told.getMessage().startswith("fuse_read()")


async def test_a_mount_that_cannot_be_says_what_to_look_at(tmp_path):
    class Operations(pyfuse3.Operations):
        pass

    with pytest.raises(MountError, match="empty directory"):
        await session.serve(Operations(), tmp_path / "missing", MountConfig())


def test_the_device_of_a_mount_is_found_without_asking_it(tmp_path):
    table = tmp_path / "mountinfo"
    table.write_text(
        "20 1 0:30 / /mnt rw - fuse.qsfs old rw\n"
        "21 1 0:31 / /mnt/with\\040space rw - fuse.qsfs qsfs rw\n"
        "22 20 0:32 / /mnt rw - fuse.qsfs new rw\n"
    )
    assert tuning.find_device(Path("/mnt"), table) == tuning.Device(0, 32)
    assert tuning.find_device(Path("/mnt/with space"), table) == tuning.Device(0, 31)
    assert tuning.find_device(Path("/elsewhere"), table) is None


def test_tuning_writes_what_is_there_and_leaves_the_rest(tmp_path):
    bdi = tmp_path / "class" / "bdi" / "0:77"
    bdi.mkdir(parents=True)
    assert tuning.tune(tuning.Device(0, 77), read_ahead_kb=1024, max_background=64, sys=tmp_path) == {
        "read_ahead_kb": 1024,
        "max_ratio": tuning.MAX_RATIO,
    }
    connection = tmp_path / "fs" / "fuse" / "connections" / "77"
    connection.mkdir(parents=True)
    done = tuning.tune(tuning.Device(0, 77), read_ahead_kb=1, max_background=1, sys=tmp_path)
    assert (done["max_background"], done["congestion_threshold"]) == (1, 1)
    assert (bdi / "read_ahead_kb").read_text() == "1\n"


def test_the_dirty_limit_follows_the_machine(tmp_path):
    (tmp_path / "dirty_bytes").write_text("0\n")
    (tmp_path / "dirty_ratio").write_text("20\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1000000 kB\n")
    limit = tuning.dirty_limit_bytes(50, tmp_path, tmp_path / "meminfo")
    assert limit == 1_000_000 * 1024 // 10
    (tmp_path / "dirty_bytes").write_text("4096\n")
    assert tuning.dirty_limit_bytes(50, tmp_path, tmp_path / "meminfo") == 2048
