"""A mount stops when it is told to: a start that waits ends, and one that is used is unmounted once it is not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import trio
import trio.testing

from qsfs.daemon import mountpoint
from qsfs.daemon.stopping import Stopping
from qsfs.errors import MountError

MOUNT = Path("/mnt/qsfs")


async def test_a_mount_in_use_is_tried_until_it_is_free_and_told_of_once(autojump_clock, expect_log, monkeypatch):
    expect_log(r"in use by 7; waiting for them to end", count=1)
    calls: list[object] = []

    def unmount(path: Path) -> None:
        calls.append(path)
        if calls.count(path) < 3:
            raise MountError("in use by 7")

    monkeypatch.setattr(mountpoint, "unmount", unmount)
    stopping = Stopping(MOUNT, lambda: calls.append("waits ended"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stopping.unmount_when_told)
        await trio.sleep(60)
        assert calls == []
        stopping.stop()
    assert calls == ["waits ended", MOUNT] * 3


async def test_a_start_that_waits_ends_at_a_signal_and_one_after_it_at_once(autojump_clock):
    stopping = Stopping(MOUNT, lambda: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stopping.watch_signals)
        await trio.testing.wait_all_tasks_blocked()
        with stopping.start_scope() as scope:
            os.kill(os.getpid(), signal.SIGTERM)
            await trio.sleep_forever()
        assert scope.cancelled_caught
        with stopping.start_scope() as scope:
            await trio.sleep_forever()
        assert scope.cancelled_caught
        nursery.cancel_scope.cancel()


async def test_once_it_is_mounted_a_stop_cancels_nothing(autojump_clock):
    stopping = Stopping(MOUNT, lambda: None)
    with stopping.start_scope() as scope:
        await trio.sleep(0)
    stopping.stop()
    assert not scope.cancel_called
