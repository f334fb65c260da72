"""fsck and the journal: it says what waits for the next mount, sees damage, and never loses any of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qsfs.fsck.report import Finding, Report, Severity
from qsfs.store.direct import SECTOR
from qsfs.store.journal import encode_record, journal_paths
from qsfs.store.schema import PAGE, Table, u64_pair
from tests.fsck.conftest import Checked, kinds

TEXT = b"fsynced, not committed"


def journal_findings(report: Report) -> list[Finding]:
    return [finding for finding in report.findings if finding.kind.startswith("journal")]


def files(checked: Checked) -> list[bytes]:
    return [path.read_bytes() for path in journal_paths(checked.directory)]


@pytest.fixture
async def crashed(checked: Checked) -> AsyncIterator[Checked]:
    """A store whose last mount died after three fsyncs; the last of them is of a new file."""
    fs = checked.reopen()
    for name in ("one", "two", "three"):
        number = fs.write(name, TEXT.ljust(PAGE, b"."))
        frame = fs.store.journal_frame((number,))
        assert frame is not None
        fs.store.journal.write([frame])
        checked.numbers[name] = number
    fs.close()
    yield checked


def replayed(checked: Checked, *names: str) -> bool:
    """Whether the next mount shows these files."""
    fs = checked.reopen()
    try:
        pages = [fs.read(checked.numbers[name], 0, 1)[0] for name in names]
        return [bytes(page or b"")[: len(TEXT)] for page in pages] == [TEXT] * len(names)
    finally:
        fs.close()


async def test_a_journal_that_waits_is_said_and_is_no_error(crashed: Checked):
    before = files(crashed)
    report = await crashed.fsck()
    assert report.exit_code == 0
    (finding,) = journal_findings(report)
    assert (finding.kind, finding.severity) == ("journal-waiting", Severity.NOTE)
    assert finding.subject["appends"] == 3 and finding.subject["bytes"] > 3 * PAGE
    assert "replayed by the next mount" in finding.message
    assert files(crashed) == before
    assert replayed(crashed, "one", "two", "three")
    # Now it is committed: nothing waits any more.
    assert journal_findings(await crashed.fsck()) == []


async def test_a_repair_keeps_the_journal(crashed: Checked):
    """What it mends lies below: the next mount replays every append on top of that."""
    crashed.put(Table.DIRTY, u64_pair(crashed.numbers["dirty"], 0), None)
    before = files(crashed)
    report = await crashed.fsck(repair=True)
    assert report.exit_code == 1
    assert files(crashed) == before
    assert [finding.kind for finding in journal_findings(await crashed.fsck())] == ["journal-waiting"]
    assert replayed(crashed, "one", "two", "three")
    assert (await crashed.fsck()).exit_code == 0


async def test_a_torn_last_append_is_what_a_crash_leaves(crashed: Checked):
    tear(crashed, append=2)
    report = await crashed.fsck()
    (finding,) = journal_findings(report)
    assert finding.kind == "journal-waiting" and finding.subject["appends"] == 2
    assert replayed(crashed, "one", "two")


async def test_damage_in_the_middle_is_told_from_a_torn_end(crashed: Checked):
    """Whole appends behind it: either they were never acknowledged, or the disk lost one that was."""
    tear(crashed, append=1)
    report = await crashed.fsck()
    gap, waiting = sorted(journal_findings(report), key=lambda finding: finding.kind)
    assert (gap.kind, gap.severity) == ("journal-gap", Severity.WARNING)
    assert gap.subject == {"missing": 2, "following": 1}
    assert waiting.subject["appends"] == 1
    assert replayed(crashed, "one")


async def test_a_whole_append_of_something_unknown_is_an_error(checked: Checked):
    """As a newer version would write it: the mount would refuse it, so the check must say so."""
    fs = checked.reopen()
    fs.store.journal.write([fs.store.journal.frame([encode_record(99, b"new")])])
    fs.close()
    report = await checked.fsck()
    assert kinds(report) == ["journal-append"] and report.exit_code == 4
    assert "unknown kind 99" in journal_findings(report)[0].message


async def test_a_journal_file_that_is_gone_or_cannot_be_read(crashed: Checked):
    first, second = journal_paths(crashed.directory)
    second.unlink()
    (finding,) = (f for f in journal_findings(await crashed.fsck()) if f.kind != "journal-waiting")
    assert (finding.kind, finding.severity) == ("journal-missing", Severity.WARNING)
    kept = first.read_bytes()
    first.unlink()
    first.mkdir()
    report = await crashed.fsck(repair=True)
    assert kinds(report) == ["journal-unreadable"] and report.exit_code == 4
    first.rmdir()
    first.write_bytes(kept)
    assert replayed(crashed, "one", "two", "three")


def tear(checked: Checked, append: int) -> None:
    """Destroys the end of one of the appends, counted from 0."""
    path: Path = journal_paths(checked.directory)[0]
    content = path.read_bytes()
    starts = [at for at in range(0, len(content), SECTOR) if content[at : at + 4] == b"QJF1"]
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"torn", starts[append] + PAGE)
