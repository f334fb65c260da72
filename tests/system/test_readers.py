"""Read-only mounts elsewhere: exactly one generation, nothing written, nobody disturbed."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from qsfs.daemon.status import disk_bytes
from qsfs.errors import QsfsError
from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.fleet import (
    QUICK,
    Inside,
    check,
    content,
    dead,
    ended,
    eventually,
    keys_of,
    running,
    status,
    store,
    up,
)
from tests.system.test_service_unit import started

pytestmark = pytest.mark.mount

COUNT = 6
MIB = 1 << 20


def machines(scratch: Path, fleet: Servers, namespace: str) -> FileSystem:
    return FileSystem(scratch / "one", shards=(3, 2), count=COUNT, servers=fleet, namespace=namespace, settings=QUICK)


def error_of(work: object, *arguments: object) -> int:
    """The error code of what must fail."""
    try:
        work(*arguments)  # type: ignore[operator]
    except OSError as error:
        return error.errno or 0
    raise AssertionError("it did not fail")


def names(fs: FileSystem) -> list[str]:
    """What lies at the root."""
    return sorted(path.name for path in fs.mountpoint.iterdir())


def test_a_reader_shows_exactly_a_generation_and_changes_nothing(scratch: Path, fleet: Servers) -> None:
    """The promise of a read-only mount, with m backends gone, next to a writer that goes on."""
    with machines(scratch, fleet, "reader") as one:
        one.format()
        one.mount()
        store(one, "base", MIB)
        (one.mountpoint / "directory").mkdir()
        (one.mountpoint / "directory" / "small").write_text("first")
        first = one.sync()["generation"]
        (one.mountpoint / "directory" / "small").write_text("second")
        with one.another_machine(scratch / "two") as two, dead(fleet, [0, 1]):
            one.expect("")
            two.expect("Left out", "no answer", "too few backends")
            said = two.run("mount", "--read-only").stdout
            two.adopt(two.status()["process"])
            assert f"generation {first} of " in said and "from host" in said and "read-only" in said
            check(two, "base")
            assert (two.mountpoint / "directory" / "small").read_text() == "first"
            assert names(two) == ["base", "directory"]
            for work in (
                (two.mountpoint / "new").touch,
                lambda: (two.mountpoint / "base").rename(two.mountpoint / "other"),
                lambda: os.truncate(two.mountpoint / "base", 0),
                lambda: os.open(two.mountpoint / "base", os.O_RDWR),
                lambda: (two.mountpoint / "base").chmod(0o600),
            ):
                assert error_of(work) == errno.EROFS
            shown = status(two)["read_only"]
            assert shown["generation"] == first and shown["is_newest"] and shown["kept"] and not shown["expired"]
            for command in ("sync", "collect"):
                refused = two.run(command, code=None)
                assert refused.returncode == 13 and "is for the mount that writes" in refused.stderr
            printed = two.run("status").stdout
            assert "it is the newest generation" in printed and "READ-ONLY" not in printed
            room = os.statvfs(two.mountpoint)
            assert room.f_blocks > 0 and room.f_files >= 4
            assert "it was read-only" in two.umount()
        # The writer went on all the time, and knows nothing of it.
        assert one.sync()["generation"] > first and status(one)["writable"]
        assert (one.mountpoint / "directory" / "small").read_text() == "second"
        one.umount()


def test_readers_leave_the_backends_and_a_writers_directory_alone(scratch: Path, fleet: Servers) -> None:
    """Not one key comes or goes, and neither kind of mount takes the other's directory for its own."""
    with machines(scratch, fleet, "apart") as one:
        one.format()
        one.mount()
        store(one, "base", MIB)
        one.umount()
        before = keys_of(one, range(COUNT))
        refused = one.run("mount", "--read-only", code=None)
        assert refused.returncode == 14 and "of a mount that writes" in refused.stderr
        with one.another_machine(scratch / "two") as two:
            two.mount("--read-only")
            check(two, "base")
            os.kill(two.process, signal.SIGTERM)
            two.wait_ended()
            assert keys_of(one, range(COUNT)) == before
            # What was fetched is still there, and no writer takes it.
            two.mount("--read-only")
            fetched = status(two)["fetched_bytes"]
            check(two, "base")
            assert status(two)["fetched_bytes"] == fetched == 0
            two.umount()
            for words, code in ((("mount",), 14), (("takeover",), 14), (("restore",), 14), (("fsck",), 8)):
                refused = two.run(*words, code=None)
                assert refused.returncode == code and "the cache of read-only mounts" in refused.stderr, words
            assert keys_of(one, range(COUNT)) == before
        one.mount()
        check(one, "base")
        assert status(one)["writable"]
        one.umount()


def test_a_generation_that_is_kept_may_be_chosen_and_others_are_refused(scratch: Path, fleet: Servers) -> None:
    with machines(scratch, fleet, "choose") as one:
        one.format()
        one.mount()
        numbers = []
        for text in ("a", "b", "c", "d"):
            (one.mountpoint / "file").write_text(text)
            numbers.append(one.sync()["generation"])
        with one.another_machine(scratch / "two") as two:
            gone = two.run("mount", "--read-only", "--generation", str(numbers[0]), code=None)
            assert gone.returncode == 8
            assert f"generation {numbers[0]} is not kept any more; kept are {numbers[1]}, " in gone.stderr
            missing = two.run("mount", "--read-only", "--snapshot", "mine", code=None)
            assert missing.returncode == 8 and 'no snapshot "mine"' in missing.stderr
            assert two.run("mount", "--generation", "1", code=None).returncode == 2
            two.mount("--read-only", "--generation", str(numbers[2]))
            assert (two.mountpoint / "file").read_text() == "c"
            shown = status(two)["read_only"]
            assert (shown["generation"], shown["newest"], shown["is_newest"]) == (numbers[2], numbers[3], False)
            two.umount()
        one.umount()


def test_an_expired_generation_says_so_and_silence_is_not_taken_for_that(scratch: Path, fleet: Servers) -> None:
    """What the newest head does not keep any more may go; a reader is told to remount, in log and status."""
    with machines(scratch, fleet, "gone") as one:
        one.format()
        one.mount()
        store(one, "early", MIB)
        store(one, "late", MIB)
        first = one.sync()["generation"]
        with one.another_machine(scratch / "two") as two:
            two.set({"mount.follow_seconds": 0.2})
            two.expect("absent; it is read from others", "not here after", "expired")
            two.mount("--read-only")
            for text in "abc":
                (one.mountpoint / "file").write_text(text)
                one.sync()
            found = eventually(lambda: not (now := status(two)["read_only"])["kept"] and now, "it is not kept any more")
            assert not found["expired"] and "not kept any more since" in two.run("status").stdout
            one.expect("")
            with dead(fleet, range(COUNT)):
                assert error_of((two.mountpoint / "early").read_bytes) == errno.EIO
            assert not status(two)["read_only"]["expired"] and " expired: " not in two.log()
            one.umount()
            for index in range(COUNT):
                with Inside(fleet, index, one.namespace) as inside:
                    for key in filter(lambda key: key.startswith(b"qsfs:s:"), inside.keys()):
                        inside.call("DEL", key)
            eventually(lambda: up(two, COUNT), "all backends answer")
            assert error_of((two.mountpoint / "late").read_bytes) == errno.EIO
            assert status(two)["read_only"]["expired"]
            assert f"EXPIRED: generation {first} " in two.run("status").stdout
            assert f"generation {first} expired: generation " in two.log()
            two.umount()


def test_the_service_unit_runs_a_reader_that_its_configuration_asks_for(scratch: Path, fleet: Servers) -> None:
    """Nothing but `[mount] read_only` makes the unit a reader; it stops in order on SIGTERM, and survives a kill."""
    with machines(scratch, fleet, "unit") as one:
        one.format()
        one.mount()
        store(one, "base", MIB)
        one.umount()
        with one.another_machine(scratch / "two") as two:
            two.set({"mount.read_only": True})
            with started(two) as unit:
                check(two, "base")
                unit.process.kill()
                unit.process.wait()
                two.wait_dead()
            # An image that cannot be used is only a cache.
            [image] = (two.cache / "readers").iterdir()
            (image / "data.mdb").write_bytes(b"no database")
            with started(two) as unit:
                check(two, "base")
                assert error_of((two.mountpoint / "new").touch) == errno.EROFS
                unit.process.send_signal(signal.SIGTERM)
                unit.wait_for("STOPPING=1")
                assert unit.process.wait(60) == 0


def test_a_reader_waits_for_backends_visibly_and_can_be_stopped(scratch: Path, fleet: Servers) -> None:
    with machines(scratch, fleet, "waits") as one:
        one.format()
        one.mount()
        store(one, "base", MIB)
        one.umount()
        with one.another_machine(scratch / "two") as two:
            two.expect("waiting for backends", "no answer|refused|Left out")
            with dead(fleet, range(COUNT)), running(two, "mount", "--read-only") as process:
                found = eventually(lambda: asked(two), "it waits")
                assert found["phase"] == "starting" and "backends" in found["waiting_for"]
                assert "WAITING for backends" in two.run("status").stdout
                two.run("umount")
                code, printed = ended(process)
                assert code != 0 and "waiting for backends" in printed


def asked(fs: FileSystem) -> dict[str, Any]:
    """The status of a daemon that may not be there yet, once it waits for something."""
    try:
        found = status(fs)
    except QsfsError:
        return {}
    return found if found["waiting_for"] else {}


def test_a_follower_moves_and_what_is_open_stays_as_it_was(scratch: Path, fleet: Servers) -> None:
    """Old handles read old bytes, also such as were never fetched; every new path walk sees the new generation."""
    with machines(scratch, fleet, "follow") as one:
        one.format()
        one.mount()
        place = one.mountpoint / "directory"
        place.mkdir()
        (place / "file").write_bytes(content("old", 3 * MIB))
        (place / "goes").write_text("old")
        first = one.sync()["generation"]
        with one.another_machine(scratch / "two") as two:
            two.set({"mount.follow_seconds": 0.2})
            two.mount("--read-only", "--follow")
            there = two.mountpoint / "directory"
            with (there / "file").open("rb") as held, (two.mountpoint / "directory" / "goes").open() as goes:
                assert held.read(4096) == content("old", 3 * MIB)[:4096]
                assert names(two) == ["directory"]
                (place / "file").write_bytes(content("new", MIB))
                (place / "goes").unlink()
                (one.mountpoint / "more").write_text("more")
                second = one.sync()["generation"]
                moved(two, second)
                assert (there / "file").read_bytes() == content("new", MIB)
                assert not (there / "goes").exists() and (two.mountpoint / "more").read_text() == "more"
                assert names(two) == ["directory", "more"]
                shown = status(two)["read_only"]
                assert [(older["generation"], older["open"]) for older in shown["older"]] == [(first, 2)]
                assert held.read() == content("old", 3 * MIB)[4096:] and goes.read() == "old"
                assert os.fstat(held.fileno()).st_size == 3 * MIB
                assert "follows the newest generation" in two.run("status").stdout
            assert error_of(lambda: (there / "file").write_bytes(b"")) == errno.EROFS
            assert "it was read-only" in two.umount()
        one.umount()


def moved(fs: FileSystem, generation: int) -> None:
    """Returns once a follower shows a generation."""
    eventually(lambda: status(fs)["read_only"]["generation"] >= generation, f"generation {generation} is shown")


def test_a_follower_keeps_within_its_bound_however_much_is_held_open(scratch: Path, fleet: Servers) -> None:
    """With a file open in each of the generations that find room, it stays, says so, and goes on once one is closed."""
    with machines(scratch, fleet, "held") as one:
        one.format()
        one.mount()
        with one.another_machine(scratch / "two") as two, contextlib.ExitStack() as files:
            two.set({"mount.follow_seconds": 0.2})
            two.expect("stays at generation")
            two.mount("--read-only", "--follow")
            held = []
            for text in ("a", "b", "c", "d"):
                (one.mountpoint / "file").write_text(text)
                moved(two, one.sync()["generation"])
                held.append(files.enter_context((two.mountpoint / "file").open()))
            (one.mountpoint / "file").write_text("e")
            last = one.sync()["generation"]
            shown = eventually(lambda: (now := status(two)["read_only"])["held"] and now, "it stays")
            assert shown["generation"] < last == shown["newest"] and not shown["is_newest"]
            assert "3 open files" in shown["held"] and (two.mountpoint / "file").read_text() == "d"
            assert disk_bytes(two.cache) <= status(two)["cache"]["size_bytes"]
            assert held[0].read() == "a"
            held[0].close()
            moved(two, last)
            assert (two.mountpoint / "file").read_text() == "e"
            assert [file.read() for file in held[1:]] == ["b", "c", "d"]
            files.close()
            two.umount()
        one.umount()


def test_a_follower_that_was_restarted_fetches_what_changed_since(scratch: Path, fleet: Servers) -> None:
    """What it had read of the generation that it showed before is taken over; what is new comes from the backends."""
    with machines(scratch, fleet, "again") as one:
        one.format()
        one.mount()
        (one.mountpoint / "same").write_bytes(content("same", 3 * MIB))
        (one.mountpoint / "other").write_bytes(content("other", MIB))
        one.sync()
        with one.another_machine(scratch / "two") as two:
            two.mount("--read-only", "--follow")
            for name, size in (("same", 3 * MIB), ("other", MIB)):
                assert (two.mountpoint / name).read_bytes() == content(name, size)
            assert status(two)["fetched_bytes"] == 4 * MIB and not status(two)["taken_over_bytes"]
            two.umount()
            (one.mountpoint / "other").write_bytes(content("newer", MIB))
            one.sync()
            two.mount("--read-only", "--follow")
            for name, size in (("same", 3 * MIB), ("newer", MIB)):
                found = (two.mountpoint / name.replace("newer", "other")).read_bytes()
                assert found == content(name, size)
            assert (status(two)["taken_over_bytes"], status(two)["fetched_bytes"]) == (3 * MIB, MIB)
            assert len(list((two.cache / "readers").iterdir())) == 3, "two images and the template"
            two.umount()
        one.umount()
