"""Encoding streams in bounded memory, leaves whole files or none, and seals nothing twice."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest

from qsfs.clock import FixedClock
from qsfs.codec.encode import Source, encode, losses_survived, shard_paths
from qsfs.codec.repair import needing_repair, repair, stem_of
from qsfs.codec.survey import close_files, find_archive, open_files
from qsfs.errors import ConfigError, QsfsError
from qsfs.format.archive import LABEL_SIZE, pack_bytes
from qsfs.format.erasure import CodeParams
from qsfs.format.shard import HEADER_SIZE, peek_shard
from tests.codec.small_archive import CODE, SECRET, check, make, read
from tests.format.samples import noise


class Watched(io.RawIOBase):
    """A pipe: it gives odd pieces, and remembers how far what was read is ahead of what was written."""

    def __init__(self, length: int, fail_at: int | None = None) -> None:
        self.left, self.given, self.ahead, self.written, self.fail_at = length, 0, 0, 0, fail_at

    def read(self, size: int = -1) -> bytes:
        if self.fail_at is not None and self.given >= self.fail_at:
            raise OSError(5, "Input/output error")
        part = bytes(min(size, self.left, 70_001))
        self.left -= len(part)
        self.given += len(part)
        self.ahead = max(self.ahead, self.given - self.written)
        return part

    def say(self, done: int) -> None:
        self.written = done


def test_a_stream_larger_than_memory_is_read_no_further_ahead_than_a_few_packs(tmp_path):
    stream = Watched(40 * pack_bytes(CODE) + 17)
    paths = shard_paths([tmp_path], "a", CODE.n)
    made = encode(Source(stream, b""), paths, secret=SECRET, code=CODE, clock=FixedClock(1), threads=2, say=stream.say)
    assert made.manifest.length == stream.given == stream.written == 40 * pack_bytes(CODE) + 17
    assert stream.ahead <= 4 * pack_bytes(CODE)
    assert read(tmp_path)[0] == bytes(stream.given)


def test_a_source_that_fails_leaves_nothing(tmp_path):
    stream = Watched(10 * pack_bytes(CODE), fail_at=3 * pack_bytes(CODE))
    with pytest.raises(QsfsError, match="tape: cannot be read; no shard file was made: Input/output error"):
        encode(Source(stream, b"tape"), shard_paths([tmp_path], "a", 4), secret=SECRET, code=CODE, clock=FixedClock(1))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    """Also not on the other disks, and the message names the file."""
    written = 0
    pwrite = os.pwrite

    def fails(handle, data, at):
        nonlocal written
        written += len(data)
        if written > 3_000_000:
            raise OSError(28, "No space left on device")
        return pwrite(handle, data, at)

    monkeypatch.setattr(os, "pwrite", fails)
    with pytest.raises(QsfsError, match=r"a\.0\d\.qsfs.*cannot be written; it was removed: No space left on device"):
        make(tmp_path, data=bytes(1) + noise(4 * pack_bytes(CODE), 1))
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_replaced_only_by_force_and_then_by_whole_ones(tmp_path):
    archive = make(tmp_path)
    before = [path.read_bytes() for path in archive.paths]
    with pytest.raises(ConfigError, match="exists"):
        make(tmp_path, data=b"other", seed=2)
    assert [path.read_bytes() for path in archive.paths] == before
    assert len(list(tmp_path.iterdir())) == 4
    encode(Source(io.BytesIO(b"other"), b"a"), archive.paths, secret=SECRET, code=CODE, clock=FixedClock(2), force=True)
    assert read(tmp_path)[0] == b"other"


def test_a_name_that_is_taken_at_the_last_moment_is_not_replaced_and_none_is_left_alone(tmp_path):
    paths = shard_paths([tmp_path], "a", 4)

    def take(done: int) -> None:
        paths[2].write_text("mine")

    with pytest.raises(ConfigError, match="exists"):
        encode(Source(io.BytesIO(b"x"), b"a"), paths, secret=SECRET, code=CODE, clock=FixedClock(1), say=take)
    assert [path.name for path in tmp_path.iterdir()] == [paths[2].name]
    assert paths[2].read_text() == "mine"


def test_a_forced_replacement_that_fails_midway_keeps_what_it_has_put_in_place(tmp_path, monkeypatch):
    """What those files replaced is gone: without them neither the old nor the new would be left."""
    archive = make(tmp_path)
    before = [path.read_bytes() for path in archive.paths]
    rename = Path.rename

    def fail_at_the_third(path, target):
        if target == archive.paths[2]:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_third)
    source = Source(io.BytesIO(b"other"), b"a")
    with pytest.raises(
        QsfsError, match=r"a\.02\.qsfs: cannot be put in place: .*in place.*a\.00\.qsfs, .*a\.01\.qsfs$"
    ):
        encode(source, archive.paths, secret=SECRET, code=CODE, clock=FixedClock(2), force=True)
    assert read(*archive.paths[:2])[0] == b"other"
    assert [path.read_bytes() for path in archive.paths[2:]] == before[2:]
    assert sorted(tmp_path.iterdir()) == archive.paths


def test_a_machine_whose_random_numbers_repeat_still_uses_no_key_twice(tmp_path):
    """Pack keys come from ids and digests, which hold what is sealed."""
    first, second = make(tmp_path / "a", data=noise(5000, 1)), make(tmp_path / "b", data=noise(5000, 2))
    assert first.archive_id == second.archive_id
    files = [path.read_bytes()[LABEL_SIZE:] for path in (first.paths[0], second.paths[0])]
    ids = [(file[36:52], file[52:84]) for file in files]
    assert ids[0][0] != ids[1][0] and ids[0][1] != ids[1][1]


def test_the_position_in_the_stream_is_under_the_tag_of_each_shard(tmp_path):
    archive = make(tmp_path / "a")
    for position in range(3):
        offset, _ = archive.shard_at(3, position)
        claim = peek_shard(archive.paths[3].read_bytes()[offset : offset + HEADER_SIZE])
        assert (claim.owner_epoch, claim.number) == (position, 3)


@pytest.mark.parametrize(
    ("directories", "code", "survived"),
    [(20, (16, 20), 4), (5, (16, 20), 1), (1, (16, 20), 0), (3, (16, 20), 0), (10, (10, 20), 5), (7, (16, 20), 1)],
)
def test_how_many_directories_may_be_lost(directories, code, survived):
    assert losses_survived(directories, CodeParams(*code)) == survived


def test_shard_files_are_spread_in_turn(tmp_path):
    found = shard_paths([tmp_path / "x", tmp_path / "y"], "a", 101)
    assert found[0] == tmp_path / "x" / "a.000.qsfs" and found[99] == tmp_path / "y" / "a.099.qsfs"
    with pytest.raises(ConfigError, match="--name"):
        shard_paths([tmp_path], "a/b", 4)


def test_repair_makes_the_same_shards_again(tmp_path):
    archive = make(tmp_path / "a")
    before = [path.read_bytes() for path in archive.paths]
    archive.paths[0].unlink()
    archive.damage(3, archive.shard_at(3, 1)[0] + 300)
    (tmp_path / "new").mkdir()
    files, _ = open_files([tmp_path / "a"])
    try:
        found = find_archive(files, SECRET)
        numbers = needing_repair(check(tmp_path / "a"))
        assert (numbers, stem_of(found)) == ([0, 3], "a")
        made = repair(found, numbers, [tmp_path / "new"], stem_of(found), clock=FixedClock(5))
    finally:
        close_files(files)
    assert [path.name for path in made] == ["a.00.qsfs", "a.03.qsfs"]
    for number, path in zip(numbers, made, strict=True):
        assert path.read_bytes()[LABEL_SIZE:-LABEL_SIZE] == before[number][LABEL_SIZE:-LABEL_SIZE]
    data, report = read(*made)
    assert data == archive.data
    assert [file.good for file in report.files] == [True, True]


def test_repair_replaces_a_damaged_file_only_by_force(tmp_path):
    archive = make(tmp_path / "a")
    archive.damage(3, archive.shard_at(3, 1)[0] + 300)
    damaged = archive.paths[3].read_bytes()
    files, _ = open_files([tmp_path / "a"])
    try:
        found = find_archive(files, SECRET)
        with pytest.raises(ConfigError, match="exists"):
            repair(found, [3], [tmp_path / "a"], "a", clock=FixedClock(5))
        assert archive.paths[3].read_bytes() == damaged
        repair(found, [3], [tmp_path / "a"], "a", clock=FixedClock(5), force=True)
    finally:
        close_files(files)
    assert not check(tmp_path / "a").damaged
