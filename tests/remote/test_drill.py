"""Drill: proven is only what was read from the backends and verified, and nothing on them changes."""

from __future__ import annotations

import dataclasses
import json
import logging
import stat
from functools import partial

import pytest

from qsfs.daemon.comparing import compare, compare_rows
from qsfs.errors import ConfigError, DataLost, NotFound, NotRunning, QsfsBug, SplitHeads
from qsfs.format.head import KeptGeneration
from qsfs.format.shard import shard_key
from qsfs.health import drill_plan
from qsfs.health.drill import drill
from qsfs.health.drill_backends import choose_down, for_drill
from qsfs.health.drill_plan import LEAST_EXTENTS, Plan, Verdict
from qsfs.health.drill_report import exit_code, json_of, text_of
from qsfs.remote.newest import describe_head
from qsfs.remote.readable import Wanted
from qsfs.remote.survey import Timing
from qsfs.store.schema import PAGE, Table
from tests.remote.harness import keys_of, plant
from tests.remote.small_fs import LIMITS, SECRET, SmallFs, noise

TIMING = Timing(attempt=2.0, retry=0.01, retry_most=0.02, grace=0.2)
ALL = Plan(1.0, 1)
READ_AROUND = r"pack [0-9a-f]{32}, shard \d: .*read from others"


@pytest.fixture
async def fs(scratch):
    fs = await SmallFs.make(scratch / "cache")
    fs.add_superblock()
    yield fs
    fs.close()


def a_tree(fs: SmallFs) -> dict[str, int]:
    directory = fs.create("dir", mode=stat.S_IFDIR | 0o750)
    files = {
        "a": fs.write("a", noise(64 * PAGE)),
        "b": fs.write("b", noise(3 * PAGE + 17, 2), parent=directory),
    }
    fs.commit()
    for number in files.values():
        fs.upload(number)
    fs.publish()
    return files


async def run(fs, scratch, plan=ALL, **options):
    directory = scratch / "drill"
    directory.mkdir()
    return await drill(
        options.pop("candidates", None) or fs.candidates(),
        secret=SECRET,
        directory=directory,
        limits=LIMITS,
        clock=fs.clock,
        plan=plan,
        timing=TIMING,
        deadline_seconds=options.pop("deadline_seconds", 5.0),
        worth_a_thread=64 << 20,
        **options,
    )


def held(fs: SmallFs) -> list[dict[bytes, bytes | None]]:
    """Everything that lies on backends."""
    stores = (*fs.world.data, *fs.world.control)
    return [{key: store.peek(key) for key in keys_of(store)} for store in stores]


def lose(fs: SmallFs, pack: int, count: int) -> None:
    """Backends forget `count` shards of a pack, the first of which holds data."""
    for place, key in fs.shard_keys(pack)[:count]:
        fs.world.data[place - 1].lose(key)


async def test_all_contents_are_read_and_proven(fs, scratch):
    """A full drill reads every extent, and says how many more backends may be lost."""
    a_tree(fs)
    found = await run(fs, scratch)
    contents = found.contents
    assert found.verdict is Verdict.PROVEN and contents.whole
    assert (contents.read_bytes, contents.read_extents) == (68 * PAGE, 9)
    assert set(contents.spares) == set(found.metadata_spares) == {2}
    assert (len(found.answered), found.silent, found.withstands >= 0) == (8, (), True)
    assert found.restored.files == 2


async def test_nothing_on_the_backends_changes(fs, scratch, expect_log):
    """A drill reads: not even damage that it meets is mended, and a write would be refused."""
    expect_log(READ_AROUND, logging.WARNING, count=1)
    a_tree(fs)
    lose(fs, 1, 1)
    before = held(fs)
    await run(fs, scratch, candidates=for_drill(fs.candidates()))
    assert held(fs) == before
    for candidate in for_drill(fs.candidates()):
        for backend in (candidate.data, candidate.control("control")):
            for change in (backend.set(b"k", b"v"), backend.delete(b"k")):
                with pytest.raises(QsfsBug):
                    await change
            async with backend.session() as session:
                with pytest.raises(QsfsBug):
                    await session.set(b"k", b"v")
    assert held(fs) == before


async def test_as_many_backends_as_the_code_allows_may_be_down(fs, scratch):
    """With m backends down everything is still proven, and the report says that no more may be lost."""
    a_tree(fs)
    names = [candidate.name for candidate in fs.candidates()]
    down = choose_down(names, 2, (), 7)
    found = await run(fs, scratch, candidates=for_drill(fs.candidates(), down), down=down)
    assert found.verdict is Verdict.PROVEN and found.contents.whole
    assert found.silent == found.down == down
    assert min(found.recorded) == 0 and min(found.contents.spares) == 0


async def test_what_does_not_come_is_not_proven_and_not_called_lost(fs, scratch):
    """Backends that fall silent after the restore: their extents are unknown, neither proven nor lost."""
    a_tree(fs)
    candidates = fs.candidates()

    def say(progress):
        if progress.step == "restored":
            for number in (1, 2, 3, 4, 5):
                fs.connections[number].down = True

    found = await run(fs, scratch, candidates=candidates, say=say, deadline_seconds=0.5)
    contents = found.contents
    assert found.verdict is Verdict.NOT_PROVEN
    assert contents.missing.count > 0 and contents.lost.count == contents.wrong.count == 0
    assert contents.read_extents + contents.missing.count == contents.chosen_extents
    assert any("/a (inode" in named for named in contents.missing.named)


async def test_lost_data_fail_the_drill_and_are_named(fs, scratch, expect_log):
    """More shards of a pack gone than parity replaces, every backend answering: the file and pages are named."""
    expect_log(READ_AROUND, logging.WARNING, count=3)
    files = a_tree(fs)
    lose(fs, 2, 3)
    found = await run(fs, scratch)
    assert found.verdict is Verdict.FAILED
    assert found.contents.lost.count == 1
    assert found.contents.lost.named[0].startswith(f"/dir/b (inode {files['b']}), pages 0 to 3: ")
    assert found.contents.read_extents == 8


async def test_damage_that_parity_replaces_is_seen(fs, scratch, expect_log):
    """A lost and a rotten shard: all is proven, and the pack counts with what it still may lose."""
    expect_log(READ_AROUND, logging.WARNING, count=1)
    a_tree(fs)
    lose(fs, 1, 1)
    found = await run(fs, scratch)
    assert found.verdict is Verdict.PROVEN
    assert found.contents.spares == {1: 1, 2: 1} and found.contents.unlisted == 1
    assert found.contents.decoded_packs == 1


async def test_a_rotten_extent_is_never_proven(fs, scratch, expect_log):
    """Shards with flipped bits are read around; with too few good ones left the drill fails."""
    expect_log(READ_AROUND, logging.WARNING, count=3)
    a_tree(fs)
    for place, key in fs.shard_keys(2)[:3]:
        fs.world.data[place - 1].rot(key, lambda value: value[:-1] + bytes((value[-1] ^ 1,)))
    found = await run(fs, scratch)
    assert found.verdict is Verdict.FAILED and found.contents.lost.count == 1


async def test_lost_metadata_end_the_drill(fs, scratch, expect_log):
    """Without its metadata there is no file system to prove anything of: an error, not a report."""
    expect_log(READ_AROUND, logging.WARNING, count=3)
    a_tree(fs)
    listed = fs.head.snapshot[0]
    for number, place in enumerate(listed.placement[:3]):
        fs.world.data[place - 1].lose(
            shard_key(fs.keys.fsid, listed.ref.owner_epoch, listed.ref.pack_id, number)
        )
    with pytest.raises(DataLost):
        await run(fs, scratch)


async def test_a_generation_that_is_not_kept_is_refused(fs, scratch):
    """Only what the newest head keeps may be drilled: the message lists it."""
    a_tree(fs)
    fs.publish(9)
    with pytest.raises(NotFound, match="generation 8 is not kept any more; kept are 9"):
        await run(fs, scratch, wanted=Wanted(8))


async def test_where_two_lines_of_heads_are_a_person_says_which_one_is_drilled(fs, scratch):
    """The drill proves the generation of the head that is named, and its report names the other."""
    a_tree(fs)
    other = plant(fs.world, dataclasses.replace(fs.head, time_ns=fs.head.time_ns + 1)).ref
    with pytest.raises(SplitHeads):
        await run(fs, scratch)
    (scratch / "drill").rmdir()
    found = await run(fs, scratch, wanted=Wanted(head=fs.sealed.ref.digest.hex()[:8]))
    assert (found.ref, found.verdict) == (fs.sealed.ref, Verdict.PROVEN)
    assert any(f"Not chosen: {describe_head(other)}" in sentence for sentence in found.sentences)


async def test_a_kept_generation_is_read_as_it_was(fs, scratch):
    """`generation` reads an older one: what was written since is not in it."""
    a_tree(fs)
    first = fs.sealed.ref
    number = fs.write("later", noise(8 * PAGE, 3))
    fs.commit()
    fs.upload(number)
    fs.publish(2, kept=(KeptGeneration(first, 0, ()),))
    found = await run(fs, scratch, wanted=Wanted(1))
    assert (found.ref.generation, found.newest.generation, found.restored.files) == (1, 2, 2)
    assert found.verdict is Verdict.PROVEN


def test_a_sample_has_exactly_its_size_and_follows_from_the_seed():
    """Never nothing, never more than asked for; the same seed chooses the same extents."""

    def chosen(share: float, extents: int, seed: int = 1) -> list[int]:
        chooser = Plan(share, seed).chooser(extents)
        return [i for i in range(extents) if chooser.next()]

    assert len(chosen(0.01, 100_000)) == 1000
    assert len(chosen(0.01, 1000)) == LEAST_EXTENTS
    assert chosen(0.01, 3) == [0, 1, 2]
    assert chosen(1.0, 500) == list(range(500))
    assert chosen(0.5, 200) == chosen(0.5, 200) != chosen(0.5, 200, 2)


def test_who_counts_as_down_follows_from_seed_and_names():
    """Named backends count as down in any case, the others by the seed; unknown names are refused."""
    names = [f"host:{port}/ns" for port in range(8)]
    down = choose_down(names, 2, ("host:3",), 5)
    assert len(down) == 3 and "host:3/ns" in down
    assert down == choose_down(list(reversed(names)), 2, ("host:3/ns",), 5)
    with pytest.raises(ConfigError, match="not configured"):
        choose_down(names, 0, ("host:9",), 5)
    with pytest.raises(ConfigError, match="cannot count as down"):
        choose_down(names, 9, (), 5)


async def asked(fs: SmallFs, extents, compared) -> None:
    """As a mount is asked, without its socket."""
    answer = await compare(
        fs.store,
        [
            {
                "inode": extent.inode,
                "first": extent.first,
                "pack": extent.pack_id.hex(),
                "ordinal": extent.ordinal,
                "sums": [f"{value:x}" for value in extent.sums],
            }
            for extent in extents
        ],
    )
    compared.same += answer["same"]
    compared.remote += answer["remote"]
    compared.changed += answer["changed"]
    for page in answer["differ"]:
        compared.differ.add(f"inode {page['inode']}, page {page['page']}: {page['why']}")


async def test_the_mount_holds_the_same_pages(fs, scratch):
    """Each page is counted as what it is at the mount: the same, only remote, or changed since."""
    files = a_tree(fs)
    fs.overwrite(files["a"], 0, noise(4 * PAGE, 9))
    fs.evict(files["b"])
    found = await run(fs, scratch, compare=partial(asked, fs))
    compared = found.contents.compared
    assert (compared.same, compared.remote, compared.changed) == (60, 4, 4)
    assert not compared.differ.count and found.verdict is Verdict.PROVEN


async def test_the_same_bytes_from_another_pack_are_the_same(fs, scratch):
    """A cut and an upload ahead of it may seal one page twice: the mount then names another pack than the head."""
    files = a_tree(fs)
    data = b"".join(fs.read(files["b"], 0, 4))
    fs.overwrite(files["b"], 0, data)
    fs.upload(files["b"])
    found = await run(fs, scratch, compare=partial(asked, fs))
    assert (found.contents.compared.same, found.contents.compared.changed) == (68, 0)


async def test_a_page_that_differs_from_the_mount_fails_the_drill(fs, scratch):
    """Other local bytes for a page that has not changed since the generation: never passed over."""
    files = a_tree(fs)
    block = fs.store.blocks.writable(fs.inode(files["a"]), 3)
    block.set_page(1, noise(PAGE, 77))
    found = await run(fs, scratch, compare=partial(asked, fs))
    assert found.verdict is Verdict.FAILED and exit_code(found) == 8
    assert found.contents.compared.differ.named == [f"inode {files['a']}, page 13: other bytes"]
    assert "differ from what the running mount holds" in text_of(found)


async def test_a_mount_that_stops_answering_takes_nothing_from_the_proof(fs, scratch):
    """Then only the comparison is missing, and the report says so."""
    a_tree(fs)

    async def gone(extents, compared):
        raise NotRunning("the daemon ended")

    found = await run(fs, scratch, compare=gone)
    assert found.verdict is Verdict.PROVEN
    assert "That the mount holds the rest too: the daemon ended" in text_of(found)


async def rows_asked(fs: SmallFs, base, ref, rows, found) -> None:
    """As a mount is asked for names and attributes, without its socket."""
    asked = [(table, key.hex(), f"{value:x}") for table, key, value in rows]
    answer = await compare_rows(fs.store, base, ref, asked)
    found.same += answer["same"]
    found.changed += answer["changed"]
    for what in answer["differ"]:
        found.differ.add(what)


async def test_names_and_attributes_are_those_of_the_mount(fs, scratch):
    """The same rows are counted; those that changed since, in memory or in LMDB, are not called wrong."""
    files = a_tree(fs)
    for key, _ in list(fs.store.scan(Table.CHANGED, b"", None)):
        fs.store.layers.delete(Table.CHANGED, key)
    fs.commit()
    with fs.store.change() as change:
        change.patch(files["a"], mode=stat.S_IFREG | 0o600)
    fs.commit()
    with fs.store.change() as change:
        change.patch(files["b"], uid=7)
    found = await run(fs, scratch, compare_names=partial(rows_asked, fs, fs.sealed.ref))
    rows = found.contents.rows
    assert (rows.same, rows.changed, rows.differ.count, rows.failure) == (5, 2, 0, "")
    assert found.verdict is Verdict.PROVEN and "5 records of names and attributes are" in text_of(found)


@pytest.mark.parametrize("newest", [True, False])
async def test_a_name_that_differs_without_a_change_fails_the_drill(fs, scratch, newest):
    """Unchanged since the mount's own newest generation and not the same: wrong; else it may have changed."""
    files = a_tree(fs)
    for key, _ in list(fs.store.scan(Table.CHANGED, b"", None)):
        fs.store.layers.delete(Table.CHANGED, key)
    fs.commit()
    fs.inode(files["a"]).mode = stat.S_IFREG | 0o600
    found = await run(fs, scratch, compare_names=partial(rows_asked, fs, fs.sealed.ref if newest else None))
    rows = found.contents.rows
    assert (rows.same, rows.changed, rows.differ.count) == ((6, 0, 1) if newest else (6, 1, 0))
    assert found.verdict is (Verdict.FAILED if newest else Verdict.PROVEN)


@pytest.mark.parametrize("lost", [0, 3])
async def test_the_report_says_what_the_exit_code_says(fs, scratch, lost, expect_log):
    """Text, JSON and exit code agree, and "proven" stands only for what was read."""
    a_tree(fs)
    if lost:
        expect_log(READ_AROUND, logging.WARNING)
        lose(fs, 2, lost)
    found = await run(fs, scratch)
    report = json_of(found)
    json.dumps(report)
    assert report["exit_code"] == exit_code(found) == (21 if lost else 0)
    assert report["verdict"] == ("failed" if lost else "proven")
    assert report["could_still_lose"] == 2
    first = text_of(found).splitlines()[0]
    assert first.endswith("failed" if lost else "proven, all contents")
    assert ("## Failed" in text_of(found)) is bool(lost)


async def test_a_sample_is_not_called_all(fs, scratch, monkeypatch):
    """What was not read is named as not proven, with its size and the seed that repeats the choice."""
    monkeypatch.setattr(drill_plan, "LEAST_EXTENTS", 1)
    a_tree(fs)
    found = await run(fs, scratch, plan=Plan(0.3, 5))
    assert (found.contents.read_extents, found.contents.whole) == (3, False)
    text = text_of(found)
    assert text.splitlines()[0].endswith("proven, of a sample")
    assert "(6 extents) were not in the sample (share 0.3, seed 5)" in text
    assert exit_code(found) == 0
