"""chmod, chown, utimens and truncate do what POSIX says to the mode, the ids and the times."""

from __future__ import annotations

import errno
import stat

import pytest

from qsfs.config import PolicyRule
from qsfs.filesystem.attributes import AttributeChange
from qsfs.store.schema import ROOT_INODE
from tests.filesystem.conftest import ROOT


def change(world, number, **fields):
    world.names.set_attributes(number, AttributeChange(**fields))
    return world.inode(number)


@pytest.fixture(params=["file", "directory", "fifo"])
def number(request, world):
    if request.param == "file":
        return world.file(b"f")
    if request.param == "directory":
        return world.directory(b"f")
    return world.names.mknod(ROOT_INODE, b"f", stat.S_IFIFO | 0o644, 0, ROOT).number


def test_chmod_sets_the_permissions_and_nothing_else(world, number):
    before, kind = world.times(number), stat.S_IFMT(world.inode(number).mode)
    now = world.tick()
    inode = change(world, number, mode=stat.S_IFREG | 0o6751)
    assert inode.mode == kind | 0o6751
    assert world.times(number) == (*before[:2], now)


def test_chown_sets_ids_and_ctime(world, number):
    now = world.tick()
    inode = change(world, number, uid=2**32 - 2, gid=7)
    assert (inode.uid, inode.gid, inode.ctime_ns) == (2**32 - 2, 7, now)
    assert change(world, number, gid=8).uid == 2**32 - 2


@pytest.mark.parametrize("number", ["directory", "fifo"], indirect=True)
def test_a_chown_that_changes_no_id_sets_ctime(world, number):
    """chown(-1, -1): the kernel sends no field; of a regular file it sends the ctime."""
    before, now = world.times(number), world.tick()
    change(world, number, keeps_set_ids=True)
    assert world.times(number) == (*before[:2], now)


def test_ids_that_mean_no_change_are_refused(world, number, fails):
    for field in ("uid", "gid"):
        fails(errno.EINVAL, lambda field=field: change(world, number, **{field: 2**32 - 1}))


@pytest.mark.parametrize("times", [(1, 2), (None, 5), (5, None), (-1, -(10**9) - 1), (2**40, 0)])
def test_utimens_sets_the_times_given(world, number, times):
    before = world.times(number)
    now = world.tick()
    change(world, number, atime_ns=times[0], mtime_ns=times[1])
    expected = [old if new is None else new for old, new in zip(before[:2], times, strict=True)]
    assert world.times(number) == (*expected, now)


def test_times_that_no_row_can_hold_are_the_nearest(world, number):
    change(world, number, atime_ns=2**70, mtime_ns=-(2**70))
    assert world.times(number)[:2] == (2**63 - 1, -(2**63))


def test_a_ctime_from_the_kernel_is_taken(world, number):
    world.tick()
    change(world, number, mode=0o600, ctime_ns=12345)
    assert world.times(number)[2] == 12345


def test_truncate_is_for_regular_files(world, fails):
    for made, code in (
        (world.directory(b"d"), errno.EISDIR),
        (world.names.mknod(ROOT_INODE, b"p", stat.S_IFIFO | 0o644, 0, ROOT).number, errno.EINVAL),
        (world.names.symlink(ROOT_INODE, b"s", b"t", ROOT).number, errno.EINVAL),
    ):
        fails(code, lambda made=made: change(world, made, size=0))
    number = world.file(b"f")
    fails(errno.EFBIG, lambda: change(world, number, size=2**63))
    fails(errno.EINVAL, lambda: change(world, number, size=-1))


def test_truncate_sets_size_and_times(world):
    number = world.file(b"f")
    now = world.tick()
    change(world, number, size=2**41)
    assert world.inode(number).size == 2**41
    assert world.times(number)[1:] == (now, now)
    world.tick()
    change(world, number, size=2**41)
    assert world.times(number)[1:] == (now, now), "the kernel shows no other times of a file whose size stays"


SET_IDS = [
    (0o6755, 0o0755),
    (0o4755, 0o0755),
    (0o2755, 0o0755),
    (0o2745, 0o2745),
    (0o6745, 0o2745),
    (0o1644, 0o1644),
]


@pytest.mark.parametrize(("before", "after"), SET_IDS)
@pytest.mark.parametrize("how", ["chown", "chgrp", "truncate", "kernel", "kernel with ctime", "write"])
def test_set_id_bits_go_with_what_others_may_do(world, before, after, how):
    number = world.file(b"f", mode=before)
    if how == "write":
        world.contents.write(world.inode(number), 0, b"x")
        assert world.names.written(world.inode(number)) == (before != after)
    else:
        fields = {
            "chown": {"uid": 0},
            "chgrp": {"gid": 0},
            "truncate": {"size": 0},
            "kernel": {},
            "kernel with ctime": {"ctime_ns": 1},
        }[how]
        change(world, number, **fields)
    assert stat.S_IMODE(world.inode(number).mode) == after


@pytest.mark.parametrize(("before", "after"), SET_IDS)
def test_who_may_keep_set_id_bits_keeps_them_through_a_truncation_only(world, before, after):
    number = world.file(b"f", mode=before)
    change(world, number, size=5, mtime_ns=1, keeps_set_ids=True)
    assert stat.S_IMODE(world.inode(number).mode) == before
    change(world, number, uid=7, keeps_set_ids=True)
    assert stat.S_IMODE(world.inode(number).mode) == after


def test_set_id_bits_stay_where_nothing_was_written(world):
    number = world.file(b"f", mode=0o6755)
    change(world, number, mtime_ns=5, atime_ns=5, ctime_ns=5)
    assert stat.S_IMODE(world.inode(number).mode) == 0o6755
    assert stat.S_IMODE(change(world, number, uid=3, mode=0o4711).mode) == 0o4711
    directory = world.directory(b"d", mode=0o2775)
    assert stat.S_IMODE(change(world, directory, gid=5).mode) == 0o2775


def test_nothing_is_changed_of_what_is_gone(world, fails):
    fails(errno.ESTALE, lambda: change(world, 12345, mode=0o600))


DAY_SECONDS = 24 * 3600


def test_a_read_sets_the_access_time_where_it_is_due(world, number):
    """relatime: if it is not newer than both other times, or a day old; it sets no other time."""
    created = world.times(number)

    def read():
        """Whether it set the access time, which it must set to now."""
        before, now = world.times(number)[0], world.tick()
        world.names.accessed(world.inode(number))
        after = world.times(number)[0]
        assert after in (before, now)
        return after != before

    assert read()
    assert world.times(number)[1:] == created[1:]
    assert not read()
    for field in ("mtime_ns", "ctime_ns"):
        change(world, number, **{field: world.times(number)[0]})
        assert read()
        assert not read()
    world.clock.advance(DAY_SECONDS - 2 - 1)
    assert not read()
    assert read()


def test_an_access_time_waits_for_no_sync(make_world):
    """Of a file with atomic sync it makes nothing uncovered."""
    world = make_world(PolicyRule(match="f", atomic_sync=True))
    number = world.file(b"f")
    world.contents.opened(world.inode(number))
    now = world.tick()
    world.names.accessed(world.inode(number))
    assert world.times(number)[0] == now
    assert not world.contents.has_uncovered(number)
