"""Holding applications still: they go on again whatever becomes of the command, and at their deadline."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qsfs.cli import freeze as module
from qsfs.cli.freeze import cgroup_root, find_cgroup, freeze, refuse_own
from qsfs.daemon import control, handover
from qsfs.errors import ConfigError, DeadlineExceeded, DependencyMissing, QsfsError

PATIENCE = 60.0
LONG = 600.0

# It waits in short steps, since an interpreter that a signal reaches just before it blocks would notice it only after.
FREEZER = """
import select, signal, sys
from pathlib import Path
from qsfs.cli.freeze import freeze
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
with freeze(Path(sys.argv[1]), float(sys.argv[2])):
    print("held", flush=True)
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        pass
"""


def eventually(look: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < end, f"still not: {what}"
        time.sleep(0.002)


class Fake:
    """A directory with the files of a cgroup, and a thread in the place of the kernel."""

    def __init__(self, directory: Path, *, obeys: bool = True) -> None:
        self.directory = directory
        directory.mkdir()
        (directory / "cgroup.procs").write_text("")
        (directory / "cgroup.freeze").write_text("0\n")
        self._obeys = obeys
        self._tell("0")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._ended.wait(0.001):
            if self._obeys:
                self._tell(self.wanted)

    def _tell(self, frozen: str) -> None:
        new = self.directory / "new"
        new.write_text(f"populated 1\nfrozen {frozen or 0}\n")
        new.rename(self.directory / "cgroup.events")

    @property
    def wanted(self) -> str:
        return (self.directory / "cgroup.freeze").read_text().strip()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    found = Fake(tmp_path / "app")
    yield found
    found.close()


@pytest.fixture
def real() -> Iterator[Path]:
    """A cgroup of this test's own, with a process in it that counts."""
    try:
        directory = cgroup_root() / f"qsfs-test-{os.getpid()}"
        directory.mkdir()
    except (DependencyMissing, OSError) as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        yield directory
    finally:
        with contextlib.suppress(OSError):
            (directory / "cgroup.freeze").write_text("0")
        for word in (directory / "cgroup.procs").read_text().split():
            os.kill(int(word), signal.SIGKILL)
        eventually(lambda: _removed(directory), "the cgroup is gone")


def _removed(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        directory.rmdir()
    return not directory.exists()


def test_they_are_held_for_the_time_of_the_block(fake: Fake):
    """All have stopped before it begins, and they go on after it."""
    with freeze(fake.directory, LONG) as frozen:
        assert "frozen 1" in (fake.directory / "cgroup.events").read_text()
        frozen.require_held()
        assert 0 < frozen.seconds_left <= LONG
    assert fake.wanted == "0"


@pytest.mark.parametrize("error", [QsfsError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_they_go_on_after_any_failure(fake: Fake, error: BaseException):
    """Whatever the block raises."""
    with pytest.raises(type(error)), freeze(fake.directory, LONG):
        raise error
    assert fake.wanted == "0"


def test_those_that_do_not_stop_go_on(tmp_path: Path):
    """One process that hangs in the kernel does not keep the others held."""
    fake = Fake(tmp_path / "app", obeys=False)
    with pytest.raises(DeadlineExceeded, match="did not stop"), freeze(fake.directory, 0.05):
        raise AssertionError("never held")
    assert fake.wanted == "0"
    fake.close()


def test_at_the_deadline_they_go_on_though_the_command_hangs(fake: Fake):
    """And the command learns that what it has is no image of held applications."""
    with freeze(fake.directory, 0.2) as frozen:
        eventually(lambda: fake.wanted == "0", "thawed at the deadline")
        with pytest.raises(QsfsError, match="was thawed before"):
            frozen.require_held()


def test_a_kernel_that_hands_nothing_over_holds_the_command_no_longer_than_the_applications(
    fake: Fake, qsfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The cache may be full for hours; what is left of the wait is told, and no snapshot is made."""
    waits: list[float | None] = []
    asked: list[str] = []

    def hand_over(mountpoint: Path, seconds: float | None = None) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            raise DeadlineExceeded("the kernel could not hand its pages over")

    def ask(cache: Path, command: str, **_: object) -> object:
        asked.append(command)
        return {"status": {"process": 1}, "snapshot-list": []}.get(command)

    monkeypatch.setattr(handover, "require_handed_over", hand_over)
    monkeypatch.setattr(control, "ask", ask)
    monkeypatch.setattr(module, "find_cgroup", lambda *_: fake.directory)
    monkeypatch.setattr(module, "cgroup_root", lambda: fake.directory)
    monkeypatch.setattr(module, "refuse_own", lambda *_: None)
    assert qsfs("init", "demo").code == 0
    done = qsfs("-c", tmp_path / "demo", "snapshot", "create", "name", "--freeze", "app", "--freeze-seconds", "5")
    assert done.code and "could not hand its pages over" in done.err
    assert waits[0] is None and waits[1] is not None and 0 < waits[1] <= 5
    assert asked[-1] == "snapshot-abandon" and "snapshot-hold" not in asked
    assert fake.wanted == "0"


def test_that_somebody_else_thawed_them_is_noticed(fake: Fake):
    """A cut that is sealed after that is not what was asked for."""
    with freeze(fake.directory, LONG) as frozen:
        (fake.directory / "cgroup.freeze").write_text("0")
        eventually(lambda: "frozen 0" in (fake.directory / "cgroup.events").read_text(), "thawed")
        with pytest.raises(QsfsError, match="was thawed before"):
            frozen.require_held()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_they_go_on_when_the_command_is_killed(fake: Fake, number: signal.Signals):
    """By any signal."""
    command = [sys.executable, "-c", FREEZER, str(fake.directory), str(LONG)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert fake.wanted == "1"
        process.send_signal(number)
        eventually(lambda: fake.wanted == "0", "thawed")
        assert process.wait(PATIENCE) != 0


def test_what_somebody_else_holds_is_left_alone(fake: Fake):
    """It is not thawed under the feet of whoever froze it."""
    (fake.directory / "cgroup.freeze").write_text("1")
    with pytest.raises(ConfigError, match="already"), freeze(fake.directory, LONG):
        pass
    assert fake.wanted == "1"


def test_a_cgroup_with_qsfs_in_it_is_refused(fake: Fake):
    """Also where it is in a cgroup below: a frozen daemon would never cut anything."""
    below = fake.directory / "below"
    below.mkdir()
    (below / "cgroup.procs").write_text(f"1\n{os.getpid()}\n")
    with pytest.raises(ConfigError, match=f"holds process {os.getpid()} of qsfs"):
        refuse_own(fake.directory, [12345678, os.getpid()])
    refuse_own(fake.directory, [12345678])


def test_a_cgroup_is_found_by_its_path_or_its_unit(fake: Fake, monkeypatch: pytest.MonkeyPatch):
    """From the root of the cgroups or of the machine; what cannot be frozen is refused with its reason."""
    root = fake.directory.parent
    assert find_cgroup("/app", root) == find_cgroup(str(fake.directory), root) == fake.directory
    monkeypatch.setattr(module, "_cgroup_of_unit", lambda unit: Path("/app"))
    assert find_cgroup("node.service", root) == fake.directory
    with pytest.raises(ConfigError, match="cannot be frozen"):
        find_cgroup("/", root)
    with pytest.raises(ConfigError, match="is it running"):
        find_cgroup("/other", root)
    (fake.directory / "cgroup.freeze").unlink()
    (root / "old").mkdir()
    with pytest.raises(ConfigError, match="version 2"):
        find_cgroup("/old", root)
    (fake.directory / "cgroup.freeze").write_text("0")


def test_where_cgroups_are_mounted(tmp_path: Path):
    """Alone, or beside those of version 1."""
    mounts = tmp_path / "mounts"
    mounts.write_text("cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n")
    assert cgroup_root(mounts) == Path("/sys/fs/cgroup/unified")
    mounts.write_text("proc /proc proc rw 0 0\n")
    with pytest.raises(DependencyMissing):
        cgroup_root(mounts)


def test_a_real_process_stands_still_and_goes_on(real: Path):
    """By the kernel's own freezer, also after the command was killed."""
    counter = "import sys\nn = 0\nwhile True:\n n += 1\n print(n, flush=True)\n sys.stdin.readline()"
    with subprocess.Popen(
        [sys.executable, "-c", counter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        (real / "cgroup.procs").write_text(str(process.pid))
        assert process.stdout.readline() == "1\n"
        command = [sys.executable, "-c", FREEZER, str(real), str(LONG)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as freezer:
            assert freezer.stdout is not None and freezer.stdout.readline() == "held\n"
            assert "frozen 1" in (real / "cgroup.events").read_text()
            process.stdin.write("\n")
            freezer.kill()
        assert process.stdout.readline() == "2\n", "it goes on"
        process.kill()
