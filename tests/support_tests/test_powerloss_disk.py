"""The model of a disk that forgets: what an fsync covered stays, what none covered may go, no more."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import scratch as places
from tests.support.powerloss.cut import PAGE, SECTOR, CutReport
from tests.support.powerloss.disk import Disk
from tests.support.powerloss.node import Node

OWNER = (0, 0)


def new_file(disk: Disk, name: bytes, directory: Node | None = None) -> Node:
    return disk.create(directory or disk.root, name, stat.S_IFREG | 0o644, owner=OWNER)


def new_directory(disk: Disk, name: bytes) -> Node:
    return disk.create(disk.root, name, stat.S_IFDIR | 0o755, owner=OWNER)


def rename(disk: Disk, old: bytes, new: bytes) -> None:
    disk.rename((disk.root, old), (disk.root, new), exchange=False, keep=False)


def tree(top: Path) -> dict[str, bytes | None]:
    """What a directory holds: contents of files, None for directories."""
    return {
        str(path.relative_to(top)): path.read_bytes() if path.is_file() else None for path in top.rglob("*")
    }


def mounted_again(backing: Path) -> dict[str, bytes]:
    """What programs see that start on the medium anew."""
    disk = Disk(backing)
    seen = {name.decode(): node.read(0, 1 << 20) for name, node in disk.root.children.items()}
    disk.close()
    return seen


def outcomes(
    top: Path, script: Callable[[Disk], None], *, cuts: int = 60, metadata: str = "ordered"
) -> list[dict[str, bytes | None]]:
    """What the medium holds after `script` and each of `cuts` power cuts."""
    found = []
    for seed in range(cuts):
        backing = top / f"{metadata}-{len(list(top.iterdir()))}"
        backing.mkdir()
        disk = Disk(backing, metadata)
        script(disk)
        disk.cut(str(seed))
        found.append(tree(backing))
    return found


def test_an_fsync_covers_all_earlier_writes_of_the_file_and_a_cut_only_the_later_ones(tmp_path: Path) -> None:
    def script(disk: Disk) -> None:
        node = new_file(disk, b"a")
        disk.write(node, 0, b"1" * 3 * PAGE)
        disk.fsync(node)
        disk.write(node, PAGE, b"2" * PAGE)

    contents = {state["a"] for state in outcomes(tmp_path, script)}
    assert {b"1" * 3 * PAGE, b"1" * PAGE + b"2" * PAGE + b"1" * PAGE} <= contents
    for content in contents:
        assert content is not None
        assert len(content) == 3 * PAGE
        assert content[:PAGE] + content[2 * PAGE :] == b"1" * 2 * PAGE
        assert all(
            content[start : start + SECTOR] in (b"1" * SECTOR, b"2" * SECTOR)
            for start in range(0, 3 * PAGE, SECTOR)
        )


def test_any_of_the_uncovered_pages_may_be_lost_also_an_earlier_and_not_a_later_one(tmp_path: Path) -> None:
    def script(disk: Disk) -> None:
        node = new_file(disk, b"a")
        disk.write(node, 0, bytes(4 * PAGE))
        disk.fsync(node)
        for page in range(4):
            disk.write(node, page * PAGE, bytes([page + 1]) * PAGE)

    kept = set()
    for state in outcomes(tmp_path, script, cuts=300):
        content = state["a"]
        assert content is not None
        kept.add(tuple(content[page * PAGE] != 0 for page in range(4)))
    assert len(kept) == 16


def test_the_write_in_flight_is_torn_at_a_sector(tmp_path: Path) -> None:
    def script(disk: Disk) -> None:
        node = new_file(disk, b"a")
        disk.write(node, 0, b"1" * 2 * PAGE)
        disk.fsync(node)
        disk.write(node, 100, b"2" * (PAGE + 1000))

    arrived = set()
    for state in outcomes(tmp_path, script, cuts=200):
        content = state["a"]
        assert content is not None
        # Sector by sector old or new; where old follows new inside a page, that is the tear.
        for start in range(0, 2 * PAGE, SECTOR):
            old = b"1" * SECTOR
            new = bytes(0x32 if 100 <= at < PAGE + 1100 else 0x31 for at in range(start, start + SECTOR))
            assert content[start : start + SECTOR] in (old, new)
        arrived.add(content.count(b"2"))
    assert {0, SECTOR - 100, 2 * SECTOR - 100, PAGE + 1000} <= arrived


def test_a_page_is_written_back_as_it_was_at_some_moment(tmp_path: Path) -> None:
    """The later append of a page is not there without the earlier one: both were in one page in memory."""

    def script(disk: Disk) -> None:
        node = new_file(disk, b"log")
        disk.fsync(node)
        for number in range(10):
            disk.write(node, number * 10, bytes([65 + number]) * 10)

    whole = b"".join(bytes([65 + number]) * 10 for number in range(10))
    sizes = set()
    for state in outcomes(tmp_path, script, cuts=120):
        content = state["log"]
        assert content is not None
        written = content.rstrip(b"\0")
        assert whole.startswith(written)
        sizes.add(len(written))
    assert len(sizes) > 5


def test_names_become_durable_in_their_order(tmp_path: Path) -> None:
    def script(disk: Disk) -> None:
        for name in (b"1", b"2", b"3"):
            new_file(disk, name)
        rename(disk, b"1", b"4")

    found = {tuple(sorted(state)) for state in outcomes(tmp_path, script)}
    assert found == {(), ("1",), ("1", "2"), ("1", "2", "3"), ("2", "3", "4")}


def test_an_fsync_of_any_file_makes_all_earlier_names_durable_but_no_other_file_s_data(
    tmp_path: Path,
) -> None:
    def script(disk: Disk) -> None:
        other = new_file(disk, b"other")
        disk.write(other, 0, b"x" * PAGE)
        node = new_file(disk, b"node")
        disk.write(node, 0, b"y" * PAGE)
        disk.fsync(node, data_only=True)

    found = outcomes(tmp_path, script)
    assert all(state["node"] == b"y" * PAGE for state in found)
    assert {b"", b"x" * PAGE} <= {state["other"] for state in found}


def test_an_fdatasync_of_an_overwritten_file_makes_no_name_durable(tmp_path: Path) -> None:
    """A journal in place, synced, does not carry a rename of something else along."""

    def script(disk: Disk) -> None:
        journal = new_file(disk, b"journal")
        disk.write(journal, 0, bytes(PAGE))
        disk.fsync(journal)
        new_file(disk, b"spool")
        disk.write(journal, 0, b"1" * PAGE)
        disk.fsync(journal, data_only=True)

    found = outcomes(tmp_path, script)
    assert all(state["journal"] == b"1" * PAGE for state in found)
    assert {"spool" in state for state in found} == {True, False}


@pytest.mark.parametrize("data_only", [False, True])
def test_an_fsync_covers_the_size(tmp_path: Path, data_only: bool) -> None:
    def script(disk: Disk) -> None:
        node = new_file(disk, b"a")
        disk.fsync(node)
        disk.truncate(node, 10 * PAGE)
        disk.write(node, 11 * PAGE, b"end")
        disk.fsync(node, data_only=data_only)

    assert {state["a"] for state in outcomes(tmp_path, script, cuts=20)} == {bytes(11 * PAGE) + b"end"}


def test_an_uncovered_truncation_brings_nothing_back_and_keeps_what_was_covered(tmp_path: Path) -> None:
    def script(disk: Disk) -> None:
        node = new_file(disk, b"a")
        disk.write(node, 0, b"1" * 3 * PAGE)
        disk.fsync(node)
        disk.truncate(node, PAGE // 2)
        disk.truncate(node, 2 * PAGE)
        disk.write(node, PAGE, b"2" * PAGE)

    half = PAGE // 2
    allowed = {
        b"1" * 3 * PAGE,
        b"1" * half,
        b"1" * half + bytes(2 * PAGE - half),
    }
    found = {state["a"] for state in outcomes(tmp_path, script, cuts=120)}
    assert allowed <= found
    for content in found - allowed:
        # The second page of twos needs the truncation that made room for it.
        assert content is not None
        assert content[:PAGE] == b"1" * half + bytes(half)
        assert set(content[PAGE:]) <= {0, 0x32}


def test_a_replaced_name_is_one_file_or_the_other(tmp_path: Path) -> None:
    def script(disk: Disk) -> None:
        old, new = new_file(disk, b"name"), new_file(disk, b"name.new")
        for node, data in ((old, b"old"), (new, b"new")):
            disk.write(node, 0, data)
            disk.fsync(node)
        rename(disk, b"name.new", b"name")

    found = {tuple(sorted(state.items())) for state in outcomes(tmp_path, script)}
    assert found == {(("name", b"old"), ("name.new", b"new")), (("name", b"new"),)}


def test_a_rename_without_fsync_of_the_file_can_leave_an_empty_one(tmp_path: Path) -> None:
    """The classic mistake, which this disk must show."""

    def script(disk: Disk) -> None:
        old = new_file(disk, b"name")
        disk.write(old, 0, b"old")
        disk.fsync(old)
        new = new_file(disk, b"name.new")
        disk.write(new, 0, b"new")
        rename(disk, b"name.new", b"name")
        disk.fsync(disk.root)

    assert {b"", b"new"} <= {state["name"] for state in outcomes(tmp_path, script)}


def test_strictly_a_new_file_needs_its_own_fsync_and_its_directory_s(tmp_path: Path) -> None:
    def file_only(disk: Disk) -> None:
        node = new_file(disk, b"a", new_directory(disk, b"d"))
        disk.write(node, 0, b"1")
        disk.fsync(node)

    def directory_only(disk: Disk) -> None:
        directory = new_directory(disk, b"d")
        disk.write(new_file(disk, b"a", directory), 0, b"1")
        disk.fsync(directory)

    def both(disk: Disk) -> None:
        directory = new_directory(disk, b"d")
        node = new_file(disk, b"a", directory)
        disk.write(node, 0, b"1")
        disk.fsync(node)
        disk.fsync(directory)
        disk.fsync(disk.root)

    for found in outcomes(tmp_path, file_only, metadata="strict"):
        assert found in ({}, {"d": None}, {"d": None, "d/a": b"1"})
    assert {} in outcomes(tmp_path, file_only, metadata="strict")
    assert {b"", b"1"} <= {found["d/a"] for found in outcomes(tmp_path, directory_only, metadata="strict")}
    assert all(found == {"d": None, "d/a": b"1"} for found in outcomes(tmp_path, both, metadata="strict"))


def test_strictly_names_of_different_directories_have_no_order(tmp_path: Path) -> None:
    def script(disk: Disk) -> None:
        first, second = new_directory(disk, b"1"), new_directory(disk, b"2")
        disk.fsync(disk.root)
        new_file(disk, b"a", first)
        new_file(disk, b"b", second)

    found = {tuple(sorted(state)) for state in outcomes(tmp_path, script, metadata="strict")}
    assert found == {("1", "2"), ("1", "1/a", "2"), ("1", "2", "2/b"), ("1", "1/a", "2", "2/b")}


def test_an_unlinked_open_file_is_read_and_written_until_it_is_let_go(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    node = new_file(disk, b"a")
    disk.write(node, 0, b"1" * PAGE)
    disk.fsync(node)
    node.opens += 1
    disk.remove(disk.root, b"a", is_directory=False)
    disk.fsync(disk.root)
    assert tree(tmp_path) == {}
    disk.write(node, 10, b"2")
    disk.fsync(node)
    assert node.read(0, 20) == b"1" * 10 + b"2" + b"1" * 9
    node.opens -= 1
    disk.release(node)
    assert node.number not in disk.nodes
    assert node.descriptor == -1


def test_a_file_replaced_while_open_is_still_read(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    old, new = new_file(disk, b"old"), new_file(disk, b"new")
    disk.write(old, 0, b"1" * PAGE)
    disk.settle()
    old.opens += 1
    old.rest()
    disk.release(old)
    rename(disk, b"new", b"old")
    disk.fsync(new)
    assert old.read(0, PAGE) == b"1" * PAGE


def test_a_durable_truncation_cuts_the_uncovered_writes_before_it(tmp_path: Path) -> None:
    def script(disk: Disk) -> None:
        node = new_file(disk, b"a")
        disk.write(node, 0, b"1" * 3 * PAGE)
        disk.write(node, 4000, b"2" * 3 * PAGE)
        disk.truncate(node, 100)
        disk.fsync(new_file(disk, b"b"))

    for state in outcomes(tmp_path, script):
        content = state["a"]
        assert content in (bytes(100), b"1" * 100)


def test_a_file_shortened_and_extended_shows_zeros(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    node = new_file(disk, b"a")
    disk.write(node, 0, b"1" * 2 * PAGE)
    disk.fsync(node)
    disk.truncate(node, 10)
    disk.truncate(node, 2 * PAGE)
    assert node.read(0, 3 * PAGE) == b"1" * 10 + bytes(2 * PAGE - 10)


def test_a_torn_sector_shows_also_what_was_written_into_it_before(tmp_path: Path) -> None:
    def script(disk: Disk) -> None:
        node = new_file(disk, b"a")
        disk.fsync(node)
        disk.write(node, 0, b"1" * 100)
        disk.write(node, 100, b"2" * 3000)

    found = {state["a"] for state in outcomes(tmp_path, script)}
    assert len(found) > 5
    for content in found:
        assert content is not None
        assert b"2" not in content or content.startswith(b"1" * 100)


def test_an_fdatasync_of_a_file_that_grew_commits_earlier_names(tmp_path: Path) -> None:
    def script(disk: Disk) -> None:
        node = new_file(disk, b"a")
        disk.fsync(node)
        new_file(disk, b"b")
        disk.write(node, 0, b"1")
        disk.fsync(node, data_only=True)

    assert outcomes(tmp_path, script, cuts=10) == [{"a": b"1", "b": b""}] * 10


def test_strictly_a_removed_directory_takes_the_removal_of_its_entries_along(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "strict")
    directory = new_directory(disk, b"d")
    new_file(disk, b"a", directory)
    disk.settle()
    disk.remove(directory, b"a", is_directory=False)
    disk.remove(disk.root, b"d", is_directory=True)
    disk.fsync(disk.root)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("keep", "content", "names"),
    [
        ("none", b"0" * 2 * PAGE, {"a"}),
        ("all", b"1" * PAGE + b"2" * PAGE, {"a", "b"}),
        ("oldest", b"1" * PAGE + b"0" * PAGE, {"a", "b"}),
        ("newest", b"0" * PAGE + b"2" * PAGE, {"a", "b"}),
    ],
)
def test_a_directed_cut_keeps_what_it_says(
    tmp_path: Path, keep: str, content: bytes, names: set[str]
) -> None:
    disk = Disk(tmp_path)
    node = new_file(disk, b"a")
    disk.write(node, 0, b"0" * 2 * PAGE)
    disk.fsync(node)
    new_file(disk, b"b")
    disk.write(node, 0, b"1" * PAGE)
    disk.write(node, PAGE, b"2" * PAGE)
    report = disk.cut("0", keep)
    assert (tmp_path / "a").read_bytes() == content
    assert set(tree(tmp_path)) == names
    assert report.kept_pages + report.lost_pages == 2


# Random histories against a plain reference

NAMES = [b"a", b"b", b"c"]
SIZES = st.integers(0, 4 * PAGE + 100)

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("create"), st.sampled_from(NAMES)),
        st.tuples(st.just("write"), st.sampled_from(NAMES), SIZES, st.integers(1, 2 * PAGE + 50)),
        st.tuples(st.just("truncate"), st.sampled_from(NAMES), SIZES),
        st.tuples(st.just("rename"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
        st.tuples(st.just("exchange"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
        st.tuples(st.just("link"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
        st.tuples(st.just("remove"), st.sampled_from(NAMES)),
        st.tuples(st.just("fsync"), st.sampled_from(NAMES)),
        st.tuples(st.just("fdatasync"), st.sampled_from(NAMES)),
        st.tuples(st.just("fsyncdir")),
    ),
    max_size=25,
)


def play(disk: Disk, steps: list[tuple]) -> tuple[dict[str, bytearray], dict[int, bytes]]:
    """Runs `steps`; what programs see by name, and what inodes hold that are unchanged since their fsync."""
    seen: dict[bytes, bytearray] = {}
    synced: dict[int, bytes] = {}
    for name in NAMES[:2]:
        node = new_file(disk, name)
        seen[name] = bytearray(name * (2 * PAGE + 1000))
        disk.write(node, 0, bytes(seen[name]))
        disk.fsync(node)
    for number, (kind, *rest) in enumerate(steps):
        name = rest[0] if rest else b""
        node = disk.root.children.get(name)
        if kind == "create" and node is None:
            new_file(disk, name)
            seen[name] = bytearray()
        elif kind == "fsyncdir":
            disk.fsync(disk.root)
        elif node is None or kind == "create":
            continue
        elif kind == "write":
            offset, size = rest[1:]
            data = bytes([number % 255 + 1]) * size
            disk.write(node, offset, data)
            synced.pop(node.number, None)
            seen[name].extend(bytes(max(0, offset + size - len(seen[name]))))
            seen[name][offset : offset + size] = data
        elif kind == "truncate":
            disk.truncate(node, rest[1])
            synced.pop(node.number, None)
            seen[name].extend(bytes(max(0, rest[1] - len(seen[name]))))
            del seen[name][rest[1] :]
        elif kind == "remove":
            disk.remove(disk.root, name, is_directory=False)
            del seen[name]
        elif kind in ("fsync", "fdatasync"):
            disk.fsync(node, data_only=kind == "fdatasync")
            synced[node.number] = bytes(seen[name])
        elif kind == "link" and rest[1] not in seen:
            disk.link(node, disk.root, rest[1])
            seen[rest[1]] = seen[name]
        elif kind == "rename" or (kind == "exchange" and rest[1] in seen):
            disk.rename((disk.root, name), (disk.root, rest[1]), exchange=kind == "exchange", keep=False)
            if node is not disk.root.children.get(name) or seen[name] is not seen.get(rest[1]):
                source = seen.pop(name)
                if kind == "exchange":
                    seen[name] = seen[rest[1]]
                seen[rest[1]] = source
        for known, content in seen.items():
            assert disk.root.children[known].read(0, 1 << 20) == content, known
    return {name.decode(): content for name, content in seen.items()}, synced


@pytest.mark.parametrize("metadata", ["ordered", "strict"])
@given(steps=STEPS)
def test_programs_see_what_they_wrote_and_an_orderly_end_keeps_it(metadata: str, steps: list[tuple]) -> None:
    with places.scratch_directory() as backing:
        disk = Disk(backing, metadata)
        seen, _ = play(disk, steps)
        disk.settle()
        disk.close()
        assert tree(backing) == seen
        assert mounted_again(backing) == seen


@pytest.mark.parametrize("metadata", ["ordered", "strict"])
@given(steps=STEPS, seed=st.integers(0, 1000))
def test_the_same_seed_cuts_the_same_and_the_medium_can_be_mounted_again(
    metadata: str, steps: list[tuple], seed: int
) -> None:
    found: list[tuple[dict[str, bytes | None], CutReport]] = []
    for _ in range(2):
        with places.scratch_directory() as backing:
            disk = Disk(backing, metadata)
            play(disk, steps)
            report = disk.cut(str(seed))
            found.append((tree(backing), report))
            assert mounted_again(backing) == found[-1][0]
    assert found[0] == found[1]


@given(steps=STEPS, seed=st.integers(0, 1000))
def test_what_an_fsync_of_file_and_directory_covered_is_there_after_any_cut(
    steps: list[tuple], seed: int
) -> None:
    with places.scratch_directory() as backing:
        disk = Disk(backing, "strict")
        seen, _ = play(disk, steps)
        for node in disk.root.children.values():
            disk.fsync(node)
        disk.fsync(disk.root)
        disk.cut(str(seed))
        assert tree(backing) == seen


@given(steps=STEPS, seed=st.integers(0, 1000))
def test_a_file_that_no_one_touched_since_its_fsync_is_whole_after_any_cut(
    steps: list[tuple], seed: int
) -> None:
    with places.scratch_directory() as backing:
        disk = Disk(backing, "ordered")
        _, synced = play(disk, steps)
        idle = {
            node.number: content
            for node in disk.nodes.values()
            if (content := synced.get(node.number)) is not None
        }
        disk.cut(str(seed))
        for node in disk.nodes.values():
            if node.number in idle and node.places:
                assert Path(node.path().decode()).read_bytes() == idle[node.number]
