"""fsck of the local store: each kind of damage is found and named, a sound store is clean, repair mends."""

from __future__ import annotations

import dataclasses
import json
import stat

import pytest

from qsfs.fsck.report import Layer, Report, Severity
from qsfs.store.environment import Environment
from qsfs.store.schema import (
    PAGE,
    ROOT_INODE,
    BlockRow,
    Entry,
    ExtentRow,
    Inode,
    InodeFlag,
    PackRow,
    Table,
    plain_u64,
    u64,
    u64_pair,
)
from tests.fsck.conftest import Checked, kinds
from tests.remote.small_fs import LIMITS


async def test_a_sound_store_is_clean(checked: Checked):
    report = await checked.fsck()
    assert report.findings == [] and report.failures == []
    assert report.exit_code == 0
    assert report.checked["inodes"] == 9 and report.checked["entries"] == 8
    assert report.checked["extents"] == 8 and report.checked["pages"] == 48
    assert list(report.sentences())[-1] == "No errors."


async def test_a_check_changes_nothing(checked: Checked):
    before = (checked.directory / "data.mdb").read_bytes()
    await checked.fsck()
    assert (checked.directory / "data.mdb").read_bytes() == before


async def test_a_repair_of_a_sound_store_changes_nothing(checked: Checked):
    before = (checked.directory / "data.mdb").read_bytes()
    report = await checked.fsck(repair=True)
    assert report.exit_code == 0
    assert (checked.directory / "data.mdb").read_bytes() == before


async def test_no_file_system_is_an_operational_error(scratch, checked: Checked):
    (scratch / "empty").mkdir()
    empty = dataclasses.replace(checked, directory=scratch / "empty")
    report = await empty.fsck()
    assert report.exit_code == 8
    assert "no file system here" in report.failures[0]


async def test_a_damaged_tree_is_never_opened(checked: Checked):
    path = checked.directory / "data.mdb"
    data = bytearray(path.read_bytes())
    # Page 0 and 1 are LMDB's own; every other page loses its number.
    for page in range(2, len(data) // PAGE):
        data[page * PAGE] ^= 0xFF
    path.write_bytes(bytes(data))
    report = await checked.fsck()
    assert "lmdb-structure" in kinds(report)
    assert report.exit_code == 4 | 8
    assert "qsfs restore" in report.findings[0].message


async def test_something_that_is_no_lmdb_file(checked: Checked):
    (checked.directory / "data.mdb").write_bytes(b"x" * 100_000)
    assert (await checked.fsck()).exit_code == 4 | 8


@pytest.mark.parametrize("table", [t for t in Table if t not in (Table.LOCAL, Table.SYMLINKS, Table.ORPHANS)])
async def test_a_row_that_cannot_be_decoded_is_named(checked: Checked, table: Table):
    checked.put(table, b"\0" * 3, b"?")
    report = await checked.fsck()
    named = [finding for finding in report.findings if finding.kind == "row"]
    assert named and named[0].subject == {"table": table.name.lower(), "key": "000000"}
    assert named[0].layer is Layer.LMDB


# layer 2


def _entry(checked: Checked, name: bytes, parent: int = ROOT_INODE) -> Entry:
    return Entry.decode(checked.get(Table.ENTRIES, u64(parent) + name))


async def test_dangling_entry(checked: Checked):
    checked.put(Table.INODES, u64(checked.numbers["link"]), None)
    report = await checked.fsck()
    assert "entry-dangling" in kinds(report)
    (finding,) = [f for f in report.findings if f.kind == "entry-dangling"]
    assert finding.subject["name"] == "link" and "link" in finding.message


async def test_wrong_link_count(checked: Checked):
    inode = checked.inode("big")
    inode.nlink = 3
    checked.put_inode(inode)
    report = await checked.fsck()
    assert kinds(report) == ["links"]
    assert "says 3 links, 2 entries name it" in report.findings[0].message


async def test_wrong_link_count_of_a_directory(checked: Checked):
    inode = checked.inode("dir")
    inode.nlink = 2
    checked.put_inode(inode)
    assert kinds(await checked.fsck()) == ["links"]


async def test_entry_without_cookie_and_cookie_without_entry(checked: Checked):
    entry = _entry(checked, b"big")
    checked.put(Table.COOKIES, u64_pair(ROOT_INODE, entry.cookie), None)
    assert kinds(await checked.fsck()) == ["entry-cookie"]
    checked.put(Table.COOKIES, u64_pair(ROOT_INODE, entry.cookie), b"nobody")
    assert kinds(await checked.fsck()) == ["cookie-dangling", "entry-cookie"]


async def test_a_cookie_that_will_be_given_out_again(checked: Checked):
    root = checked.inode("root")
    root.next_cookie = 4
    checked.put_inode(root)
    assert kinds(await checked.fsck()) == ["entry-cookie"]


async def test_names_that_cannot_be(checked: Checked):
    entry = _entry(checked, b"big")
    for name in (b"a/b", b".", b"..", b"nul\0"):
        checked.put(Table.ENTRIES, u64(ROOT_INODE) + name, entry.encode())
    report = await checked.fsck()
    assert sum(finding.kind == "entry-name" for finding in report.findings) == 4


async def test_entry_of_the_wrong_kind(checked: Checked):
    entry = _entry(checked, b"big")
    wrong = dataclasses.replace(entry, kind=stat.S_IFIFO >> 12)
    checked.put(Table.ENTRIES, u64(ROOT_INODE) + b"big", wrong.encode())
    assert kinds(await checked.fsck()) == ["entry-kind"]


async def test_entries_of_what_is_no_directory(checked: Checked):
    entry = _entry(checked, b"big")
    checked.put(Table.ENTRIES, u64(checked.numbers["big"]) + b"x", entry.encode())
    assert "entry-parent" in kinds(await checked.fsck())


async def test_a_loop_of_directories(checked: Checked):
    directory, inner = checked.inode("dir"), checked.inode("inner")
    directory.parent = inner.number
    checked.put_inode(directory)
    found = kinds(await checked.fsck())
    assert "directory-loop" in found and "directory-lost" in found and "directory-parent" in found


async def test_a_lost_directory_and_no_root(checked: Checked):
    checked.put(Table.INODES, u64(ROOT_INODE), None)
    found = kinds(await checked.fsck())
    assert "root" in found and "directory-lost" in found


async def test_orphans(checked: Checked):
    number = checked.numbers["orphan"]
    checked.put(Table.ORPHANS, u64(number), None)
    assert kinds(await checked.fsck()) == ["orphan-unlisted"]
    checked.put(Table.ORPHANS, u64(number), b"")
    checked.put(Table.ORPHANS, u64(checked.numbers["big"]), b"")
    checked.put(Table.ORPHANS, u64(999), b"")
    assert kinds(await checked.fsck()) == ["orphan-dangling", "orphan-linked"]


async def test_symlinks_and_attributes(checked: Checked):
    checked.put(Table.SYMLINKS, u64(checked.numbers["link"]), None)
    checked.put(Table.SYMLINKS, u64(checked.numbers["big"]), b"x")
    checked.put(Table.XATTRS, u64(999) + b"user.x", b"x")
    assert kinds(await checked.fsck()) == ["belongs-to-nothing", "symlink-target"]


async def test_the_namespace_is_not_mended(checked: Checked):
    inode = checked.inode("big")
    inode.nlink = 3
    checked.put_inode(inode)
    report = await checked.fsck(repair=True)
    assert report.exit_code == 4
    assert checked.inode("big").nlink == 3


# layer 3


def _block(checked: Checked, number: int, block: int) -> BlockRow:
    return BlockRow.decode(checked.get(Table.BLOCKS, u64_pair(number, block)))


async def test_rotten_bytes_of_a_clean_page_are_dropped_and_fetched_again(checked: Checked):
    number = checked.numbers["big"]
    key = u64_pair(number, 2)
    value = bytearray(checked.get(Table.VALUES, key))
    value[PAGE + 5] ^= 1
    checked.put(Table.VALUES, key, bytes(value))
    report = await checked.fsck()
    (finding,) = report.findings
    assert (finding.kind, finding.subject) == ("page-rot", {"inode": number, "page": 9})
    assert report.exit_code == 4
    report = await checked.fsck(repair=True)
    assert report.exit_code == 1 and report.findings[0].mended
    assert (await checked.fsck()).exit_code == 0
    fs = checked.reopen()
    assert [page is None for page in fs.read(number, 8, 4)] == [False, True, False, False]
    fs.close()


async def test_every_page_of_a_block_rotten(checked: Checked):
    number = checked.numbers["big"]
    checked.put(Table.VALUES, u64_pair(number, 2), None)
    report = await checked.fsck(repair=True)
    assert report.exit_code == 1 and report.count() == 4
    assert checked.get(Table.BLOCKS, u64_pair(number, 2)) is None
    assert (await checked.fsck()).exit_code == 0


async def test_rotten_bytes_of_a_dirty_page_are_lost_and_say_so(checked: Checked):
    number = checked.numbers["dirty"]
    key = u64_pair(number, 0)
    value = bytearray(checked.get(Table.VALUES, key))
    value[3 * PAGE + 5] ^= 1
    checked.put(Table.VALUES, key, bytes(value))
    report = await checked.fsck(repair=True)
    assert kinds(report) == ["page-lost"] and report.exit_code == 4
    assert _block(checked, number, 0).resident == 15, "nothing is dropped that nothing else holds"


async def test_a_rotten_tail(checked: Checked):
    number = checked.numbers["big"]
    row = _block(checked, number, 1)
    checked.put(Table.BLOCKS, u64_pair(number, 1), dataclasses.replace(row, tail=b"x" * 16).encode())
    report = await checked.fsck()
    assert [(f.kind, f.subject["page"]) for f in report.findings] == [("page-rot", 7)]


async def test_a_clean_page_that_no_pack_holds_is_marked_dirty(checked: Checked):
    number = checked.numbers["dirty"]
    row = _block(checked, number, 0)
    checked.put(Table.BLOCKS, u64_pair(number, 0), dataclasses.replace(row, dirty=row.dirty & ~2).encode())
    report = await checked.fsck()
    assert kinds(report) == ["clean-nowhere"]
    assert (await checked.fsck(repair=True)).exit_code == 1
    assert _block(checked, number, 0).dirty == 15
    assert (await checked.fsck()).exit_code == 0


async def test_clean_pages_of_local_only_files_are_sound(checked: Checked):
    inode = checked.inode("dirty")
    inode.flags |= InodeFlag.LOCAL_ONLY
    checked.put_inode(inode)
    for block in (0, 1):
        row = _block(checked, inode.number, block)
        checked.put(Table.BLOCKS, u64_pair(inode.number, block), dataclasses.replace(row, dirty=0).encode())
        checked.put(Table.DIRTY, u64_pair(inode.number, block), None)
    assert (await checked.fsck()).exit_code == 0


async def test_the_dirty_index_is_mended(checked: Checked):
    number = checked.numbers["dirty"]
    checked.put(Table.DIRTY, u64_pair(number, 0), None)
    checked.put(Table.DIRTY, u64_pair(checked.numbers["big"], 0), b"")
    report = await checked.fsck(repair=True)
    assert kinds(report) == ["dirty-index"] and report.count() == 2 and report.exit_code == 1
    assert checked.get(Table.DIRTY, u64_pair(number, 0)) == b""
    assert (await checked.fsck()).exit_code == 0


async def test_counts_are_mended_and_marked_for_the_next_generation(checked: Checked):
    inode = checked.inode("big")
    inode.allocated = 5
    checked.put_inode(inode)
    number = checked.packs["big"][0]
    row = PackRow.decode(checked.get(Table.PACKS, u64(number)))
    checked.put(Table.PACKS, u64(number), dataclasses.replace(row, live=1).encode())
    checked.put(Table.COUNTERS, b"next-inode", plain_u64(2))
    report = await checked.fsck(repair=True)
    assert kinds(report) == ["allocated", "counter", "pack-live"] and report.exit_code == 1
    assert checked.inode("big").allocated == 40
    assert checked.get(Table.CHANGED, bytes((Table.INODES,)) + u64(inode.number)) is not None
    assert checked.get(Table.CHANGED, bytes((Table.PACKS,)) + u64(number)) is not None
    assert (await checked.fsck()).exit_code == 0
    fs = checked.reopen()
    fs.close()


def _extent(checked: Checked, number: int, first: int) -> ExtentRow:
    return ExtentRow.decode(first, checked.get(Table.EXTENTS, u64_pair(number, first)))


async def test_overlapping_extents(checked: Checked):
    number = checked.numbers["big"]
    row = _extent(checked, number, 8)
    checked.put(Table.EXTENTS, u64_pair(number, 12), dataclasses.replace(row, pages=4, skip=4).encode())
    assert "extent-overlap" in kinds(await checked.fsck())


async def test_extents_that_cannot_be(checked: Checked):
    number = checked.numbers["cold"]
    row = _extent(checked, number, 0)
    checked.put(Table.EXTENTS, u64_pair(number, 0), dataclasses.replace(row, skip=3).encode())
    assert "extent-shape" in kinds(await checked.fsck())


async def test_extents_in_a_pack_that_is_not_there(checked: Checked):
    checked.put(Table.PACKS, u64(checked.packs["cold"][0]), None)
    report = await checked.fsck()
    assert "extent-pack" in kinds(report)
    assert "which is unknown" in report.findings[0].message
    checked.put(Table.PACKS, u64(checked.packs["cold"][0]), b"short")
    assert "row" in kinds(await checked.fsck())


async def test_data_past_the_end(checked: Checked):
    inode = checked.inode("cold")
    inode.size = 3 * PAGE
    checked.put_inode(inode)
    report = await checked.fsck()
    assert kinds(report) == ["past-end"]
    assert report.findings[0].subject["page"] == 8


async def test_data_of_what_is_gone(checked: Checked):
    number = checked.numbers["dirty"]
    checked.put(Table.INODES, u64(number), None)
    assert "data-of-nothing" in kinds(await checked.fsck())


async def test_data_of_what_is_no_file(checked: Checked):
    inode = checked.inode("dirty")
    inode.mode = stat.S_IFIFO | 0o600
    checked.put_inode(inode)
    assert "data-of-no-file" in kinds(await checked.fsck())


async def test_values_of_which_nothing_is_recorded(checked: Checked):
    checked.put(Table.VALUES, u64_pair(77, 7), bytes(4 * PAGE - 16))
    report = await checked.fsck(repair=True)
    assert kinds(report) == ["value-without-block"] and report.exit_code == 1


async def test_pending_truncations_are_no_errors(checked: Checked):
    fs = checked.reopen()
    number = checked.numbers["big"]
    inode = fs.inode(number)
    fs.store.blocks.truncate(inode, 10, fs.store.next_write())
    inode.size = 10 * PAGE
    fs.store.touch_data(inode)
    gone = checked.numbers["dirty"]
    fs.store.blocks.truncate(fs.inode(gone), 0, fs.store.next_write())
    fs.commit()
    fs.close()
    assert kinds(await checked.fsck()) == []


async def test_a_pack_that_is_less_full_than_it_says(checked: Checked):
    number = checked.packs["big"][0]
    row = PackRow.decode(checked.get(Table.PACKS, u64(number)))
    placement = (-1, row.placement[2], *row.placement[2:])
    checked.put(Table.PACKS, u64(number), dataclasses.replace(row, placement=placement).encode())
    report = await checked.fsck()
    assert kinds(report) == ["pack-full"]
    assert [f.kind for f in report.findings if f.severity is Severity.WARNING] == ["pack-crowded"]


async def test_a_repair_that_is_broken_off_goes_on_next_time(checked: Checked, monkeypatch):
    """Each transaction is whole; the next repair finds the rest."""
    from qsfs.fsck import mends

    monkeypatch.setattr(mends, "_STEP", 1)
    number = checked.numbers["big"]
    for block in (0, 1, 2):
        checked.put(Table.VALUES, u64_pair(number, block), None)
    environment = Environment(checked.directory, LIMITS.map_bytes, readonly=True)
    environment.close()
    calls = []
    original = Environment.write

    def write(self):
        calls.append(1)
        if len(calls) == 2:
            from qsfs.errors import CacheError

            raise CacheError("the disk failed")
        return original(self)

    monkeypatch.setattr(Environment, "write", write)
    report = await checked.fsck(repair=True)
    assert report.mended() == 4 and report.exit_code == 1 | 4 | 8
    monkeypatch.setattr(Environment, "write", original)
    assert (await checked.fsck(repair=True)).exit_code == 1
    assert (await checked.fsck()).exit_code == 0


# the report


def test_exit_codes_combine():
    report = Report()
    assert report.exit_code == 0
    report.add(Layer.PACKS, "a", "a warning", severity=Severity.WARNING)
    assert report.exit_code == 0
    first = report.add(Layer.PACKS, "b", "one")
    assert report.exit_code == 4
    report.settle(first)
    report.settle(first)
    assert report.exit_code == 1 and report.mended() == 1
    report.add(Layer.PACKS, "b", "two")
    assert report.exit_code == 5
    report.fail("something")
    assert report.exit_code == 13


def test_a_flood_of_findings_is_counted_not_kept():
    report = Report()
    for number in range(1000):
        finding = report.add(Layer.EXTENTS, "page-rot", f"page {number}", {"page": number})
    assert len(report.findings) == 200 and report.count() == 1000
    report.settle(finding)
    assert report.mended() == 1
    assert any("800 more" in sentence for sentence in report.sentences())
    assert report.to_json()["errors"] == 1000


async def test_the_report_is_json(checked: Checked):
    inode = checked.inode("big")
    inode.nlink = 3
    checked.put_inode(inode)
    report = await checked.fsck()
    again = json.loads(json.dumps(report.to_json()))
    assert again["exit_code"] == 4
    assert again["findings"][0]["kind"] == "links"
    assert again["findings"][0]["subject"] == {"inode": inode.number}
    assert Inode.decode(inode.number, inode.encode()).nlink == 3
