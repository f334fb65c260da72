"""The journal's frames: what is read back is what was acknowledged, whatever happened to the rest."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsfs.errors import CacheError
from qsfs.store import direct as direct_module
from qsfs.store.direct import SECTOR
from qsfs.store.journal import (
    Frame,
    Journal,
    decode_frames,
    encode_frame,
    encode_record,
    in_order,
    read_frames,
)

NUMBER = bytes(range(16))
OTHER = bytes(range(1, 17))


def frames_of(content: bytes) -> list[Frame]:
    return list(decode_frames(content, NUMBER))


def frame(sequence: int, *bodies: bytes, number: bytes = NUMBER) -> bytes:
    return encode_frame(sequence, number, [encode_record(1, body) for body in bodies])


# frames


def test_a_frame_is_what_the_documentation_says_byte_by_byte() -> None:
    """A golden vector: magic, length, sequence, journal number, checksum, records, zeros to the sector."""
    data = encode_frame(7, NUMBER, [encode_record(1, b"abc"), encode_record(3, b"")])
    assert data[:56].hex() == (
        "514a4631"  # magic
        "0d000000"  # payload length
        "0700000000000000"  # sequence
        "000102030405060708090a0b0c0d0e0f"  # journal number
        "de5444ac6d0d39c4"  # xxh3-64 of the 32 bytes before and the payload
        "0103000000616263"  # record: kind 1, three bytes
        "0300000000000000"  # record: kind 3, none; then padding
    )
    assert len(data) == SECTOR
    assert not any(data[53:])
    assert frames_of(data) == [Frame(7, ((1, b"abc"), (3, b"")))]


def test_a_frame_ends_at_its_last_byte_of_payload() -> None:
    """A payload that fills its sectors exactly gets no more of them."""
    for size, sectors in ((SECTOR - 45, 1), (SECTOR - 44, 2), (2 * SECTOR - 45, 2)):
        data = frame(1, bytes(size))
        assert len(data) == sectors * SECTOR
        assert frames_of(data)[0].records == ((1, bytes(size)),)


def test_an_append_torn_at_any_byte_is_no_append() -> None:
    """Whatever prefix of an append reached the disk, nothing of it is replayed; what lies before is."""
    first = frame(1, b"one" * 60)
    second = frame(2, b"two" * 250)
    payload_end = len(second.rstrip(b"\0"))
    for background in (b"\0", b"\xff"):
        for length in range(payload_end):
            content = (first + second[:length]).ljust(len(first) + len(second) + SECTOR, background)
            if background == b"\0" and second[length:payload_end].strip(b"\0") == b"":
                continue
            assert [f.sequence for f in frames_of(content)] == [1], length


def test_every_flipped_byte_of_an_append_is_noticed() -> None:
    """One damaged byte in header, checksum or payload ends the replay before that append."""
    content = frame(1, b"one") + frame(2, b"two" * 20) + frame(3, b"three")
    start = len(frame(1, b"one"))
    for offset in range(start, start + 40 + 5 + 60):
        damaged = bytearray(content)
        damaged[offset] ^= 0x10
        assert [f.sequence for f in frames_of(bytes(damaged))] == [1], offset


def test_a_frame_that_a_later_sector_is_missing_of_is_no_frame() -> None:
    """A power cut may keep any sectors of an append: each one that is missing spoils it."""
    data = frame(1, bytes(range(256)) * 10)
    for sector in range(len(data) // SECTOR):
        kept = bytearray(data)
        kept[sector * SECTOR : (sector + 1) * SECTOR] = bytes(SECTOR)
        assert frames_of(bytes(kept)) == []


def test_frames_of_another_mount_are_foreign() -> None:
    """An append with another journal number ends the replay."""
    assert frames_of(frame(1, b"x", number=OTHER)) == []
    assert [f.sequence for f in frames_of(frame(1, b"x") + frame(2, b"y", number=OTHER))] == [1]


@pytest.mark.parametrize("wrong", [1, 2, 4, 5, 2**40])
def test_a_stale_frame_behind_the_last_append_is_out_of_sequence(wrong: int) -> None:
    """What an earlier group left behind the last append never follows it, older or newer."""
    assert [f.sequence for f in frames_of(frame(2, b"x") + frame(wrong, b"y"))] == [2]


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=700)), max_size=4), max_size=6),
    st.integers(1, 2**60),
    st.binary(max_size=600),
)
def test_what_is_written_is_read_back_in_order(
    appends: list[list[tuple[int, bytes]]], first: int, behind: bytes
) -> None:
    """Any records in any appends come back as they were; noise behind them does not."""
    content = b"".join(
        encode_frame(first + i, NUMBER, [encode_record(kind, body) for kind, body in records])
        for i, records in enumerate(appends)
    )
    found = frames_of(content + behind)
    assert found == [Frame(first + i, tuple(records)) for i, records in enumerate(appends)]


@given(st.binary(max_size=2000))
def test_noise_is_no_journal_and_no_error(noise: bytes) -> None:
    """Whatever a disk returns, reading it ends."""
    assert frames_of(noise) == []


# which frames count


def numbered(*sequences: int) -> list[Frame]:
    return [Frame(sequence, ()) for sequence in sequences]


@pytest.mark.parametrize(
    ("one", "two", "start", "expected"),
    [
        ((1, 2), (3, 4), 1, [1, 2, 3, 4]),
        ((3, 4), (1, 2), 1, [1, 2, 3, 4]),
        ((1, 2), (3, 4), 3, [3, 4]),
        ((1,), (4, 5), 4, [4, 5]),
        ((1,), (4, 5), 2, []),
        ((1,), (3, 4), 1, [1]),
        ((), (2, 3), 1, []),
        ((), (), 1, []),
    ],
)
def test_replay_takes_the_appends_from_the_last_commit_on_up_to_the_first_that_is_missing(
    one: tuple[int, ...], two: tuple[int, ...], start: int, expected: list[int]
) -> None:
    """What a commit made superfluous is left out, wherever it lies; nothing follows a missing append."""
    found = in_order([numbered(*one), numbered(*two)], start)
    assert [f.sequence for f in found] == expected


# files


def open_journal(directory: Path, size: int = 64 << 10, number: bytes = NUMBER) -> Journal:
    return Journal(directory, size, number)


def append(journal: Journal, *bodies: bytes) -> None:
    journal.write([journal.frame([encode_record(1, body) for body in bodies])])


def bodies(frames: list[Frame]) -> list[bytes]:
    return [body for f in frames for _, body in f.records]


def test_many_groups_rotate_through_two_files(tmp_path: Path) -> None:
    """At any time the appends of the last two groups are there, and no older one is taken for one."""
    journal = open_journal(tmp_path)
    starts = [1]
    expected: list[tuple[int, bytes]] = []
    for group in range(20):
        for i in range(group % 4):
            body = b"group %d append %d " % (group, i) * (1 + (group * 7 + i * 5) % 60)
            append(journal, body)
            expected.append((journal.next_sequence - 1, body))
            start = starts[-2] if len(starts) > 1 else 1
            wanted = [data for sequence, data in expected if sequence >= start]
            assert bodies(read_frames(tmp_path, NUMBER, start)) == wanted
        journal.switch()
        starts.append(journal.next_sequence)
        assert read_frames(tmp_path, NUMBER, starts[-1]) == []
    journal.close()


def test_a_new_mount_ignores_what_the_last_one_left(tmp_path: Path) -> None:
    """The number is renewed: old appends behind new ones are never replayed, also with the next sequence."""
    journal = open_journal(tmp_path)
    append(journal, b"old 1")
    append(journal, b"old 2")
    journal.close()
    journal = open_journal(tmp_path, number=OTHER)
    append(journal, b"new 1")
    journal.close()
    assert bodies(read_frames(tmp_path, OTHER, 1)) == [b"new 1"]
    assert read_frames(tmp_path, NUMBER, 1) == []


def test_room_is_what_the_file_still_takes(tmp_path: Path) -> None:
    """A payload as large as `room` fits, and the journal never writes past the end of its file."""
    journal = open_journal(tmp_path, 32 << 10)
    append(journal, bytes(3000))
    journal.write([journal.frame([encode_record(1, bytes(journal.room() - 5))])])
    assert journal.room() == 0
    journal.close()
    assert [(tmp_path / f"journal.{i}").stat().st_size for i in range(2)] == [16 << 10, 16 << 10]
    assert len(read_frames(tmp_path, NUMBER, 1)) == 2


def test_another_size_is_taken_over(tmp_path: Path) -> None:
    """A journal that was configured larger or smaller is read first, then has the new size."""
    journal = open_journal(tmp_path, 64 << 10)
    append(journal, bytes(20 << 10))
    journal.close()
    assert len(read_frames(tmp_path, NUMBER, 1)) == 1
    for size in (16 << 10, 128 << 10):
        open_journal(tmp_path, size).close()
        assert (tmp_path / "journal.1").stat().st_size == size // 2


def test_an_absent_journal_holds_nothing(tmp_path: Path) -> None:
    """A store that was made without a journal, or lost its files, opens."""
    assert read_frames(tmp_path, NUMBER, 1) == []
    open_journal(tmp_path).close()
    (tmp_path / "journal.0").unlink()
    assert read_frames(tmp_path, NUMBER, 1) == []


def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pwrite` may write less than it was given; an append is acknowledged when all of it is written."""
    journal = open_journal(tmp_path)
    whole = direct_module.os.pwrite
    monkeypatch.setattr(
        direct_module.os, "pwrite", lambda file, data, offset: min(700, whole(file, data[: 2 * SECTOR], offset))
    )
    append(journal, b"x" * 5000)
    monkeypatch.undo()
    journal.close()
    assert bodies(read_frames(tmp_path, NUMBER, 1)) == [b"x" * 5000]


def test_appends_that_follow_each_other_are_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One write serves all waiters of a flush, also where it is larger than what is written at once."""
    journal = open_journal(tmp_path, 2 << 20)
    appended = [b"%d" % i * 3000 for i in range(9)]
    frames = [journal.frame([encode_record(1, body)]) for body in appended]
    whole = direct_module.os.pwrite
    offsets: list[int] = []

    def write(file: int, data: memoryview, offset: int) -> int:
        offsets.append(offset)
        return whole(file, data, offset)

    monkeypatch.setattr(direct_module.os, "pwrite", write)
    journal.write(frames)
    assert offsets == [0]
    large = b"large" * 150_000
    append(journal, large)
    assert len(offsets) > 2
    monkeypatch.undo()
    journal.close()
    assert bodies(read_frames(tmp_path, NUMBER, 1)) == [*appended, large]


@pytest.mark.parametrize("refused", ["open", "preadv"])
def test_a_disk_without_direct_sectors_has_a_journal_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """Where O_DIRECT is refused, at once or for single sectors, appends go through the page cache."""
    whole = getattr(os, refused)

    def refuse(*arguments: Any) -> Any:
        if refused == "preadv" or arguments[1] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return whole(*arguments)

    monkeypatch.setattr(direct_module.os, refused, refuse)
    journal = open_journal(tmp_path)
    append(journal, b"x" * 5000)
    append(journal, b"y")
    journal.close()
    assert bodies(read_frames(tmp_path, NUMBER, 1)) == [b"x" * 5000, b"y"]


def test_a_disk_that_fails_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed flush is never an acknowledgement."""
    journal = open_journal(tmp_path)

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(direct_module.os, "fdatasync", fail)
    with pytest.raises(CacheError, match="journal"):
        append(journal, b"x")
    journal.close()


def test_an_acknowledged_append_has_flushed_the_other_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Appends placed before a switch and written after it are durable before any later one counts."""
    journal = open_journal(tmp_path)
    before = journal.frame([encode_record(1, b"before")])
    journal.switch()
    after = journal.frame([encode_record(1, b"after")])
    flushed: list[int] = []
    monkeypatch.setattr(direct_module.os, "fdatasync", flushed.append)
    journal.write([before, after])
    assert len(set(flushed)) == 2
    journal.close()
