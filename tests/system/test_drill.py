"""Drills of a mounted file system: the command, its report, its exit code, and what it leaves behind."""

from __future__ import annotations

import os
import signal

import pytest

from tests.support.backends import HOST
from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, SILENCE, content, dead, ended, keys_of, running


@pytest.fixture
def fs(scratch):
    with FileSystem(scratch, settings=QUICK, separate=True, count=7, shards=(4, 2)) as fs:
        fs.format()
        fs.mount()
        for number in range(3):
            (fs.mountpoint / f"file-{number}").write_bytes(content(str(number), 700_000))
        fs.sync()
        yield fs


def test_a_drill_beside_a_mount(fs, scratch):
    """Proven with dead backends and with living ones, compared with the mount; nothing written, nothing left."""
    place = scratch / "place"
    place.mkdir()
    before = keys_of(fs, range(7))
    report = fs.run("drill", "--full", "--json", "--scratch", place).json()
    assert (report["verdict"], report["contents"]["whole"]) == ("proven", True)
    assert report["mount"]["same_pages"] == 3 * 171, report["mount"]
    assert report["could_still_lose"] == 2
    assert report["mount"]["rows"]["same"] == 7 and not report["mount"]["rows"]["different"]["count"]
    fs.expect(*SILENCE, r"backend .*: .*", r".*read from others")
    with dead(fs.servers, [1]):
        written = scratch / "report.md"
        other = f"{HOST}:{fs.servers.ports[3]}"
        fs.run("drill", "--full", "--down", other, "--seed", "4", "--report", written, "--scratch", place)
        text = written.read_text()
        assert text.splitlines()[0].endswith("proven, all contents")
        assert f"Counted as down by this drill (seed 4): {other}/" in text
        assert f"Did not answer: {HOST}:{fs.servers.ports[1]}/" in text
        lost = fs.run("drill", "--backends-down", "4", "--report", written, "--scratch", place, code=None)
        assert lost.returncode == 5 and "not proven" in written.read_text().splitlines()[0]
    assert keys_of(fs, range(7)) == before
    assert list(place.iterdir()) == []


def test_an_interrupted_drill_leaves_nothing(fs, scratch):
    """SIGINT in the middle: exit code 130, and no scratch directory; nor one of a drill that was killed before."""
    place = scratch / "place"
    killed, young, other = (place / name for name in ("qsfs-drill-killed", "qsfs-drill-young", "other"))
    for path in (killed, young, other):
        (path / "restoring").mkdir(parents=True)
    for path in (killed, other):
        os.utime(path, (1, 1))
    with running(fs, "drill", "--full", "--scratch", str(place)) as process:
        for line in process.stdout:
            if "reading metadata" in line:
                process.send_signal(signal.SIGINT)
                break
        code, _ = ended(process)
    assert (code, sorted(place.iterdir())) == (130, [other, young])
