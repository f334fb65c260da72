"""A mount ends in order while programs write, sync and read, with either request loop."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.support import scratch as places
from tests.support.daemon import PATIENCE, FileSystem
from tests.system.fleet import QUICK, content, ended, eventually, running, status

pytestmark = pytest.mark.mount

PAGE = 4096
STEPS = 40
WRITERS = 2
READERS = 2


@pytest.fixture
def fs(scratch: Path) -> Iterator[FileSystem]:
    """A file system that makes a generation only when it is told to, or ends."""
    with FileSystem(scratch, count=6, settings=QUICK) as fs:
        fs.format()
        yield fs


class Load:
    """Writers that sync each page of theirs, and make and remove names; readers of what was synced.

    They work from one open directory, so they go on where the mount has no name any more.  Each ends when it
    is told to, or with the first error, which is kept.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self.synced = [0] * WRITERS
        self.errors: list[OSError] = []
        self.wrong: list[str] = []
        self._steps = [0] * (WRITERS + READERS)
        self._files = [self._open(f"w{number}", os.O_RDWR | os.O_CREAT) for number in range(WRITERS)]
        self._changed = threading.Condition()
        self._stop = threading.Event()
        works: list[Callable[[int], None]] = [self._write] * WRITERS + [self._read] * READERS
        self._threads = [threading.Thread(target=self._run, args=(i, work)) for i, work in enumerate(works)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def go_on(self) -> None:
        """Returns once each of them has made `STEPS` steps more."""
        with self._changed:
            wanted = [steps + STEPS for steps in self._steps]
            done = self._changed.wait_for(
                lambda: self.errors or all(a >= b for a, b in zip(self._steps, wanted, strict=True)), PATIENCE
            )
        assert done and not self.errors, f"{self._steps} steps, not {wanted}: {self.errors}"

    def ended(self) -> None:
        """Waits until all have ended by themselves."""
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a call was never answered"

    def stop(self) -> None:
        """Has them end, and closes what they have open; may be called twice."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for descriptor in (*self._files, self.directory):
            os.close(descriptor)
        self._files, self.directory = [], os.open("/", os.O_RDONLY)

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags, 0o644, dir_fd=self.directory)

    def _run(self, number: int, work: Callable[[int], None]) -> None:
        while not self._stop.is_set():
            try:
                work(number)
            except OSError as error:
                with self._changed:
                    self.errors.append(error)
                    self._changed.notify_all()
                return
            with self._changed:
                self._steps[number] += 1
                self._changed.notify_all()

    def _write(self, number: int) -> None:
        page = self.synced[number]
        os.pwrite(self._files[number], record(number, page), page * PAGE)
        os.fsync(self._files[number])
        self.synced[number] = page + 1
        name = f"name-{number}"
        os.close(self._open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.unlink(name, dir_fd=self.directory)

    def _read(self, number: int) -> None:
        writer = number % WRITERS
        synced = self.synced[writer]
        if not synced:
            return
        page = self._steps[number] % synced
        descriptor = self._open(f"w{writer}", os.O_RDONLY | os.O_DIRECT * (number == WRITERS))
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if os.pread(descriptor, PAGE, page * PAGE) != record(writer, page):
                self.wrong.append(f"page {page} of w{writer}")
        finally:
            os.close(descriptor)


def record(writer: int, page: int) -> bytes:
    """What a writer puts on a page."""
    return content(f"{writer}/{page}", PAGE)


def by_command(fs: FileSystem, process: subprocess.Popen[str], load: Load) -> None:
    """`qsfs umount` is refused while the load is there, and works once it is not."""
    for _ in range(3):
        assert "in use by" in fs.run("umount", code=13).stderr
        load.go_on()
    load.stop()
    fs.run("umount")


def by_signal(fs: FileSystem, process: subprocess.Popen[str], load: Load) -> None:
    """SIGTERM waits for the load, and serves it until then."""
    process.send_signal(signal.SIGTERM)
    eventually(lambda: "waiting for them to end" in fs.log(), "the stop has met the load")
    load.go_on()
    load.stop()


def lazily(fs: FileSystem, process: subprocess.Popen[str], load: Load) -> None:
    """`umount -l` takes the name away at once; who has something open is served to the end."""
    subprocess.run(["umount", "-l", fs.mountpoint], check=True)
    assert not places.mounts_below(fs.mountpoint)
    load.go_on()
    load.stop()


def by_force(fs: FileSystem, process: subprocess.Popen[str], load: Load) -> None:
    """`umount -f` ends the kernel's connection in the midst of requests: all calls fail, none hangs."""
    subprocess.run(["umount", "-f", "-l", fs.mountpoint], check=True)
    load.ended()
    assert {error.errno for error in load.errors} <= {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.EINTR}
    load.errors.clear()
    load.stop()


@pytest.mark.parametrize("short_loop", [True, False])
@pytest.mark.parametrize("way", [by_command, by_signal, lazily, by_force])
def test_a_mount_that_ends_under_load_ends_in_order(
    fs: FileSystem, way: Callable[[FileSystem, subprocess.Popen[str], Load], None], short_loop: bool
) -> None:
    """The daemon's exit code is 0, nothing stays mounted, and the next mount has all that was synced."""
    fs.configure(mount__short_loop=short_loop)
    fs.expect(r"cannot be unmounted; in use by .*waiting for them to end")
    with running(fs, "mount", "--foreground") as process:
        eventually((fs.cache / "control.sock").exists, "the daemon answers")
        eventually(lambda: status(fs)["phase"] == "mounted", "it is mounted")
        with Load(fs.mountpoint) as load:
            load.go_on()
            way(fs, process, load)
            code, printed = ended(process)
    assert code == 0, printed
    assert load.errors == []
    assert load.wrong == []
    assert not places.mounts_below(fs.mountpoint)
    fs.mount()
    for writer, synced in enumerate(load.synced):
        assert synced >= STEPS
        found = (fs.mountpoint / f"w{writer}").read_bytes()
        lost = [page for page in range(synced) if found[page * PAGE : (page + 1) * PAGE] != record(writer, page)]
        assert lost == [], f"w{writer}: {lost} of {synced}"
    fs.umount()
