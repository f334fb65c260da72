"""A writer faster than its backends for long is slowed, so that a generation can be made, and let go at an end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, FileSystem
from tests.system.fleet import QUICK, content, ended, eventually, running, status

pytestmark = pytest.mark.mount

MIB = 1 << 20
SLOW = "applications have written faster than backends take it"
SETTINGS = QUICK | {
    "flush.cut_seconds": 1,
    "flush.cut_size": "1MiB",
    "flush.upload_rate": "12MiB",
    "flush.slow_writers_after": "100ms",
    "flush.stop_deadline_seconds": 1,
}


@pytest.fixture
def fs(scratch: Path) -> Iterator[FileSystem]:
    """A file system whose backends take little, and which waits for them only for a moment when it ends."""
    with FileSystem(scratch, shards=(2, 1), count=4, settings=SETTINGS) as fs:
        fs.expect(
            SLOW,
            "the cache is (full|short of room)",
            "cannot be unmounted; in use by .*waiting for them to end",
            "stopped before everything was on the backends",
        )
        fs.format()
        yield fs


class Writer(threading.Thread):
    """Writes and syncs at most 25 MiB a second, one after the other, until it is told to end; `synced` counts them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = os.open(path, os.O_RDWR | os.O_CREAT)
        self.synced = 0
        self.end = threading.Event()

    def run(self) -> None:
        while not self.end.wait(0.04):
            os.pwrite(self.file, content(str(self.synced), MIB), self.synced * MIB)
            os.fsync(self.file)
            self.synced += 1


def test_a_writer_is_slowed_until_a_generation_is_made_and_an_end_does_not_wait_for_it(fs: FileSystem) -> None:
    """SIGTERM comes while it is held back to next to nothing; it is let go, and all that it synced is there."""
    with running(fs, "mount", "--foreground") as process:
        eventually((fs.cache / "control.sock").exists, "the daemon answers")
        eventually(lambda: status(fs)["phase"] == "mounted", "it is mounted")
        writer = Writer(fs.mountpoint / "f")
        try:
            writer.start()
            eventually(lambda: status(fs)["flush"]["writers_slowed"], "it is slowed")
            assert "WRITES ARE SLOWED" in fs.run("status").stdout
            before = status(fs)["flush"]["generation"]
            eventually(lambda: status(fs)["flush"]["generation"] > before, "a generation is made nevertheless")
            eventually(lambda: status(fs)["flush"]["writers_slowed"], "it is slowed again")
            process.send_signal(signal.SIGTERM)
            eventually(lambda: "waiting for them to end" in fs.log(), "the end waits for the writer")
            assert not status(fs)["flush"]["writers_slowed"]
            stood = writer.synced
            eventually(lambda: writer.synced > stood, "it goes on")
        finally:
            writer.end.set()
            writer.join(PATIENCE)
            os.close(writer.file)
        assert ended(process)[0] == 0
    fs.mount()
    found = (fs.mountpoint / "f").read_bytes()
    assert all(found[n * MIB : (n + 1) * MIB] == content(str(n), MIB) for n in range(writer.synced))
