"""Any k good shards of each pack give the file back; nothing else ever does, and what is wrong is named."""

from __future__ import annotations

import os
import random
import shutil
import sys
from itertools import combinations

import pytest

from qsfs.errors import (
    ConfigError,
    Corrupt,
    DataLost,
    DependencyMissing,
    FormatMismatch,
    KeyFileError,
    NotFound,
    Unavailable,
)
from qsfs.format.archive import LABEL_SIZE, PUBLIC_SECRET, pack_bytes
from qsfs.format.erasure import CodeParams
from tests.codec.small_archive import CODE, content, make, read
from tests.codec.small_archive import check as checked
from tests.format.samples import noise

SIZE = pack_bytes(CODE)
ISAL = "isa_l_rs_cauchy"


@pytest.mark.parametrize("length", [0, 1, 4096, 4097, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE])
@pytest.mark.parametrize("codec", ["zfec", "isa_l_rs_cauchy"])
def test_every_length_comes_back(tmp_path, length, codec):
    data = noise(length, 3)
    archive = make(tmp_path / "a", CodeParams(2, 4, codec), data)
    for gone in archive.paths[:2]:
        gone.unlink()
    assert read(tmp_path / "a")[0] == data
    assert read(tmp_path / "a", thorough=False)[0] == data


@pytest.mark.parametrize(
    "code", [CodeParams(2, 4), CodeParams(3, 5), CodeParams(1, 3), CodeParams(3, 5, "isa_l_rs_cauchy")]
)
def test_every_k_of_the_shard_files_do_and_no_fewer(tmp_path, code):
    archive = make(tmp_path / "a", code, content(code, 1.5))
    for subset in combinations(archive.paths, code.k):
        data, report = read(*subset)
        assert data == archive.data
        assert len(report.found.missing) == code.m
    for subset in combinations(archive.paths, code.k - 1):
        if subset:
            with pytest.raises(Unavailable, match="bring any one of shards"):
                read(*subset)


@pytest.mark.parametrize(
    "code",
    [
        CodeParams(1, 2), CodeParams(16, 20), CodeParams(16, 20, ISAL), CodeParams(28, 32, ISAL),
        CodeParams(20, 100), CodeParams(1, 255), CodeParams(255, 256), CodeParams(200, 256), CodeParams(4, 4),
    ],
    ids=lambda code: f"{code.k}+{code.m} {code.codec}",
)  # fmt: skip
def test_large_and_strange_codes_survive_the_loss_of_their_first_m_files(tmp_path, code):
    archive = make(tmp_path / "a", code, noise(300_000, 1))
    for gone in archive.paths[: code.m]:
        gone.unlink()
    assert read(tmp_path / "a")[0] == archive.data


def test_damage_is_judged_pack_by_pack(tmp_path):
    """Every one of the files is rotten somewhere; in each pack no more than m of them."""
    archive = make(tmp_path / "a")
    for number, position in ((0, 0), (1, 0), (1, 1), (2, 1), (3, 2), (0, 2)):
        offset, length = archive.shard_at(number, position)
        archive.damage(number, offset + length // 2)
    data, report = read(tmp_path / "a")
    assert data == archive.data
    assert {file.number: file.wrong for file in report.files} == {0: 2, 1: 2, 2: 1, 3: 1}
    assert report.files[0].first == ["pack 0 rotten", "pack 2 rotten"]
    assert report.spare == 0
    assert read(tmp_path / "a", thorough=False)[0] == archive.data


def test_one_pack_beyond_repair_is_named_and_the_others_are_still_checked(tmp_path):
    archive = make(tmp_path / "a")
    for number in (0, 1, 2):
        archive.damage(number, archive.shard_at(number, 1)[0] + 200)
    with pytest.raises(DataLost, match=r"pack 1 of 3: 1 good shard of the 2 .*a.00.qsfs: rotten"):
        read(tmp_path / "a")
    report = checked(tmp_path / "a")
    assert (report.packs_read, len(report.lost), report.damaged) == (3, 1, True)


def test_missing_files_make_it_unknown_not_lost(tmp_path):
    """Who is told 'lost' gives up; the other disks may be in a drawer."""
    archive = make(tmp_path / "a")
    archive.damage(0, archive.shard_at(0, 1)[0] + 200)
    archive.paths[1].unlink()
    archive.paths[3].unlink()
    with pytest.raises(Unavailable, match=r"pack 1 of 3: 1 good shard of the 2 .* bring any one of shards 1, 3"):
        read(tmp_path / "a")


def test_rotten_headers_do_not_hide_what_follows(tmp_path):
    """Also where the header of a data shard claims another size: the guess of where the next pack begins is wrong."""
    archive = make(tmp_path / "a")
    offset, _ = archive.shard_at(0, 0)
    content = bytearray(archive.paths[0].read_bytes())
    for field in (92, 100):  # body length and shard size, both half: the header does not contradict itself
        at = offset + field
        width = 8 if field == 92 else 4
        half = int.from_bytes(content[at : at + width], "big") // 2
        content[at : at + width] = half.to_bytes(width, "big")
    archive.paths[0].write_bytes(content)
    data, report = read(tmp_path / "a")
    assert data == archive.data
    assert [file.wrong for file in report.files] == [1, 0, 0, 0]


def test_files_cut_short_help_with_what_they_have(tmp_path):
    archive = make(tmp_path / "a")
    for number in (0, 3):
        offset, _ = archive.shard_at(number, 1)
        archive.paths[number].write_bytes(archive.paths[number].read_bytes()[: offset + 10])
    offset, _ = archive.shard_at(1, 0)
    archive.damage(1, offset + 120)
    data, report = read(tmp_path / "a")
    assert data == archive.data
    assert report.files[0].first[0] == "pack 1 cut short"


def test_a_file_whose_labels_are_both_gone_still_helps(tmp_path):
    archive = make(tmp_path / "a")
    archive.damage(1, 0, LABEL_SIZE)
    archive.damage(1, archive.paths[1].stat().st_size - LABEL_SIZE, LABEL_SIZE)
    archive.paths[0].unlink()
    archive.paths[2].unlink()
    data, report = read(tmp_path / "a")
    assert data == archive.data
    assert report.found.missing == [0, 2]
    assert report.files[0].labels == ("its first label is rotten", "its last label is rotten")


def test_one_label_of_all_is_enough(tmp_path):
    archive = make(tmp_path / "a")
    for number in range(4):
        archive.damage(number, 0, LABEL_SIZE)
        if number:
            archive.damage(number, archive.paths[number].stat().st_size - LABEL_SIZE, LABEL_SIZE)
    assert read(tmp_path / "a")[0] == archive.data
    archive.damage(0, archive.paths[0].stat().st_size - 1)
    with pytest.raises(NotFound):
        read(tmp_path / "a")


def swap_packs(archive, number: int) -> None:
    """The shards of packs 0 and 2 change places; both have the same size then."""
    content = archive.paths[number].read_bytes()
    (first, length), (third, other) = archive.shard_at(number, 0), archive.shard_at(number, 2)
    assert length == other
    moved = (
        content[:first] + content[third : third + length] + content[first + length : third]
        + content[first : first + length] + content[third + length :]
    )  # fmt: skip
    archive.paths[number].write_bytes(moved)


def test_shards_that_changed_places_are_refused(tmp_path):
    """In m files they are worked around; in all files the archive does not decode, whoever did it."""
    archive = make(tmp_path / "a", data=noise(3 * SIZE, 9))
    for number in (0, 1):
        swap_packs(archive, number)
    data, report = read(tmp_path / "a")
    assert data == archive.data
    assert report.files[0].first == [
        "pack 0 out of place (it belongs to pack 2)", "pack 2 out of place (it belongs to pack 0)",
    ]  # fmt: skip
    for number in (2, 3):
        swap_packs(archive, number)
    with pytest.raises(DataLost, match="out of place"):
        read(tmp_path / "a")


def test_an_end_that_was_cut_off_everywhere_is_noticed(tmp_path):
    """The labels are put right behind what is left, as one would who wants a shorter file to be believed."""
    archive = make(tmp_path / "a")
    for number, path in enumerate(archive.paths):
        content = path.read_bytes()
        path.write_bytes(content[: archive.shard_at(number, 2)[0]] + content[-LABEL_SIZE:])
    with pytest.raises(DataLost, match="pack 2 of 3"):
        read(tmp_path / "a")


def test_two_encodings_of_one_file_under_one_key_do_not_mix(tmp_path):
    first = make(tmp_path / "a")
    second = make(tmp_path / "b", seed=2)
    first.paths[0].unlink()
    shutil.copy(second.paths[0], first.paths[0])
    # And one whose label is right, but whose shards are not.
    mixed = first.paths[1].read_bytes()
    offset, length = first.shard_at(1, 0)
    other = second.paths[1].read_bytes()
    first.paths[1].write_bytes(mixed[:offset] + other[offset : offset + length] + mixed[offset + length :])
    data, report = read(tmp_path / "a")
    assert data == first.data
    assert report.found.foreign == [(first.paths[0], f"shard 0 of another archive, {second.archive_id.hex()} (a)")]
    assert report.found.missing == [0]
    assert report.files[0].first == ["pack 0 of another archive"]


def test_of_several_whole_archives_one_must_be_named(tmp_path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b", seed=2, data=noise(5000, 1))
    paths = (tmp_path / "a", tmp_path / "b")
    with pytest.raises(ConfigError, match=r"several archives: .*--id"):
        read(*paths)
    assert read(*paths, wanted=first.archive_id)[0] == first.data
    assert read(*paths, wanted=second.archive_id)[0] == second.data
    with pytest.raises(NotFound, match="no file of archive"):
        read(*paths, wanted=b"x" * 16)


def test_copies_of_one_shard_file_help_each_other(tmp_path):
    archive = make(tmp_path / "a")
    copy = tmp_path / "a" / "copy of 0.qsfs"
    shutil.copy(archive.paths[0], copy)
    archive.damage(0, archive.shard_at(0, 0)[0] + 120)
    content = bytearray(copy.read_bytes())
    content[archive.shard_at(0, 2)[0] + 120] ^= 1
    copy.write_bytes(content)
    archive.paths[1].unlink()
    archive.paths[2].unlink()
    assert read(tmp_path / "a")[0] == archive.data


def test_the_wrong_key_no_key_and_a_needless_key_are_told(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "p", secret=PUBLIC_SECRET, seed=3)
    with pytest.raises(KeyFileError, match="opens no key slot of archive"):
        read(tmp_path / "a", secret=b"t" * 32)
    with pytest.raises(KeyFileError, match="is encrypted; give its key"):
        read(tmp_path / "a", secret=None)
    with pytest.raises(KeyFileError, match="made without a key"):
        read(tmp_path / "p")
    assert read(tmp_path / "p", secret=None)[0] == content()


def test_what_is_no_shard_file_is_told_and_does_no_harm(tmp_path):
    archive = make(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("about these disks")
    (tmp_path / "a" / "b.00.qsfs").write_bytes(b"")
    (tmp_path / "a" / "nested").mkdir()
    data, report = read(tmp_path / "a")
    assert data == archive.data
    assert [path.name for path, _ in report.found.foreign] == ["b.00.qsfs"]
    with pytest.raises(NotFound):
        read(tmp_path / "a" / "notes.txt")
    with pytest.raises(NotFound, match="gone: No such file"):
        read(tmp_path / "gone")


def test_a_dead_disk_does_not_hide_the_others(tmp_path, monkeypatch):
    """Its directory, or a file on it, cannot be read: it is told, and the rest does."""
    archive = make(tmp_path / "a")
    dead = tmp_path / "dead"
    opened = os.open

    def fails(path, *args, **kwargs):
        if path == archive.paths[1]:
            raise OSError(5, "Input/output error")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fails)
    data, report = read(tmp_path / "a", dead)
    assert data == archive.data
    assert report.found.unreadable == [
        (archive.paths[1], "Input/output error"), (dead, "No such file or directory")
    ]  # fmt: skip
    assert report.found.missing == [1]


def test_places_that_cannot_be_read_are_worked_around_and_not_called_lost(tmp_path, monkeypatch):
    """An answer of the disk other than bytes says nothing of what lies there."""
    archive = make(tmp_path / "a")
    for number in (2, 3):
        archive.damage(number, archive.shard_at(number, 1)[0] + 200)
    offset, _ = archive.shard_at(0, 1)
    bad = {archive.paths[0].stat().st_ino}
    pread = os.pread

    def fails(handle, count, at):
        if os.fstat(handle).st_ino in bad and at <= offset < at + count:
            raise OSError(5, "Input/output error")
        return pread(handle, count, at)

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(Unavailable, match=r"make a\.00\.qsfs readable"):
        read(tmp_path / "a")
    monkeypatch.undo()
    assert read(tmp_path / "a")[0] == archive.data


def test_random_damage_never_gives_wrong_bytes(tmp_path):
    """Many kinds of damage at once: the result is the file, or a named error."""
    archive = make(tmp_path / "a", CodeParams(2, 5))
    whole = [path.read_bytes() for path in archive.paths]
    source = random.Random(11)
    outcomes = []
    for _ in range(60):
        for path, before in zip(archive.paths, whole, strict=True):
            changed = bytearray(before)
            for _ in range(source.randint(0, 2)):
                at = source.randrange(len(changed))
                kind = source.randrange(4)
                if kind == 0:
                    changed[at] ^= 1 << source.randrange(8)
                elif kind == 1:
                    del changed[at:]
                elif kind == 2:
                    other = source.choice(whole)
                    changed[at : at + 5000] = other[at : at + 5000]
                else:
                    changed[at : at + 300_000] = bytes(len(changed[at : at + 300_000]))
                if not changed:
                    break
            path.write_bytes(changed)
        try:
            data, _ = read(tmp_path / "a")
        except (DataLost, Unavailable, NotFound, Corrupt, FormatMismatch) as error:
            outcomes.append(type(error).__name__)
        else:
            assert data == archive.data
            outcomes.append("whole")
    assert {"whole", "DataLost"} <= set(outcomes)


def test_an_archive_of_the_other_codec_says_what_to_install(tmp_path, monkeypatch):
    make(tmp_path / "a", CodeParams(2, 4, ISAL))
    monkeypatch.setitem(sys.modules, "pyeclib.ec_iface", None)
    with pytest.raises(DependencyMissing, match=r"pip install 'qsfs\[isa-l\]'"):
        read(tmp_path / "a")
