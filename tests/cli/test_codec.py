"""`qsfs codec`: what an operator types, what it prints, how it ends."""

from __future__ import annotations

import io
import itertools
import os
import stat
import sys

import pytest

from qsfs.values import format_size
from tests.format.samples import noise

DATA = noise(700_000, 4)


@pytest.fixture
def encoded(qsfs, tmp_path):
    """archive.tar, encoded 2+2 with a new key onto four disks."""
    (tmp_path / "archive.tar").write_bytes(DATA)
    (tmp_path / "archive.tar").chmod(0o640)
    os.utime(tmp_path / "archive.tar", ns=(10**18, 10**18))
    disks = [tmp_path / f"disk{number}" for number in range(4)]
    for disk in disks:
        disk.mkdir()
    result = qsfs(
        "codec", "encode", "archive.tar", "--new-key-file", "a.key", "--data-shards", 2, "--parity-shards", 2,
        *(word for disk in disks for word in ("--output", disk)),
    )  # fmt: skip
    assert result.code == 0, result.err
    return disks


def test_an_archive_goes_onto_disks_and_comes_back(qsfs, encoded, tmp_path):
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600
    assert [path.name for path in encoded[3].iterdir()] == ["archive.tar.03.qsfs"]
    (tmp_path / "archive.tar").unlink()
    result = qsfs("codec", "decode", *encoded[2:], "--key-file", "a.key")
    assert (result.code, result.err) == (0, "missing: shards 0, 1 of 4\n")
    found = (tmp_path / "archive.tar").stat()
    assert ((tmp_path / "archive.tar").read_bytes(), stat.S_IMODE(found.st_mode)) == (DATA, 0o640)
    assert found.st_mtime_ns == 10**18


def test_encoding_says_what_may_be_lost(qsfs, encoded, tmp_path):
    (tmp_path / "x").mkdir()
    result = qsfs("codec", "encode", "archive.tar", "--key-file", "a.key", "--output", "x")
    assert "any 4 of the shard files may be lost; of the one directory none" in result.out
    told = qsfs("--json", "codec", "encode", "archive.tar", "--no-encryption", "--output", "x", "--name", "y").json
    assert (told["length"], len(told["files"]), told["directories_that_may_be_lost"]) == (len(DATA), 20, 0)


def test_an_existing_file_is_not_overwritten_and_a_failed_decoding_leaves_none(qsfs, encoded, tmp_path):
    result = qsfs("codec", "decode", *encoded, "--key-file", "a.key")
    assert (result.code, "archive.tar: exists" in result.err) == (3, True)
    for disk in encoded[:3]:
        file = next(disk.iterdir())
        content = bytearray(file.read_bytes())
        content[100_000] ^= 1
        file.write_bytes(content)
    result = qsfs("codec", "decode", *encoded, "--key-file", "a.key", "--output", "out", "--force")
    assert (result.code, "pack 0 of 2" in result.err) == (21, True)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    assert (tmp_path / "archive.tar").read_bytes() == DATA


def test_check_and_repair(qsfs, encoded, tmp_path):
    key = ("--key-file", "a.key")
    result = qsfs("codec", "decode", "--check", *encoded, *key)
    assert (result.code, "whole; any 2 of its shard files may be lost" in result.out) == (0, True)
    next(encoded[1].iterdir()).unlink()
    result = qsfs("codec", "decode", "--check", *encoded, *key)
    assert (result.code, "can be decoded; any 1 more of its shard files may be lost" in result.out) == (8, True)
    result = qsfs("codec", "repair", *encoded, *key, "--output", encoded[1])
    assert (result.code, f"made: {encoded[1]}/archive.tar.01.qsfs" in result.out) == (0, True)
    told = qsfs("--json", "codec", "decode", "--check", *encoded, *key)
    assert (told.code, told.json["missing"], told.json["spare"]) == (0, [], 2)
    assert "nothing is missing or damaged" in qsfs("codec", "repair", *encoded, *key, "--output", encoded[1]).out


def test_repair_writes_nothing_where_not_all_is_to_be_had(qsfs, encoded, tmp_path):
    for disk in encoded[:3]:
        next(disk.iterdir()).unlink()
    result = qsfs("codec", "repair", *encoded, "--key-file", "a.key", "--output", encoded[0])
    assert (result.code, "bring any one of shards 0 to 2" in result.err) == (5, True)
    assert not list(encoded[0].iterdir())


class Stdio:
    """Standard input and output that hold bytes."""

    def __init__(self, data: bytes = b"") -> None:
        self.buffer = io.BytesIO(data)

    def flush(self) -> None:
        pass


def test_it_works_in_a_pipe(qsfs, tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", Stdio(DATA))
        result = qsfs("codec", "encode", "-", "--output", "d", "--no-encryption")
    assert (result.code, (tmp_path / "d" / "stdin.19.qsfs").exists()) == (0, True)
    output = Stdio()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        result = qsfs("codec", "decode", "d", "--output", "-")
    assert (result.code, output.buffer.getvalue() == DATA) == (0, True)


class Terminal(io.StringIO):
    """A standard error that a person watches."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def watched(qsfs, monkeypatch):
    """Runs a command at a terminal, a step of its clock for each look at it; gives each line that was shown there."""

    def run(*words: object, seconds: float = 1.0, into: type[io.StringIO] = Terminal) -> list[str]:
        terminal, looks = into(), itertools.count()
        with monkeypatch.context() as patch:
            patch.setattr("qsfs.clock.SystemClock.monotonic", lambda _: next(looks) * seconds)
            patch.setattr(sys, "stderr", terminal)
            assert qsfs(*words).code in (0, 8)
        before, *lines = terminal.getvalue().split("\r\x1b[K")
        assert before == ""
        return lines

    return run


def test_a_person_who_watches_sees_how_far_it_is_and_how_fast(watched, encoded, tmp_path):
    """Each line takes the place of the one before, and the last leaves an empty one."""
    whole, half = format_size(len(DATA)), format_size(512 << 10)
    key = ("--key-file", "a.key")

    def steps(what: str) -> list[str]:
        return [f"{what} {half} of {whole}, {half}/s", f"{what} {whole} of {whole}, {format_size(len(DATA) / 2)}/s"]

    encode = ("codec", "encode", "archive.tar", *key, "--data-shards", 2, "--parity-shards", 2, "--force")
    assert watched(*encode, *(word for disk in encoded for word in ("--output", disk))) == [*steps("encoded"), ""]
    assert watched("codec", "decode", *encoded, *key, "--output", "out") == [*steps("decoded"), "", ""]
    assert watched("codec", "decode", "--check", *encoded, *key) == [*steps("checked"), "", ""]
    next(encoded[1].iterdir()).unlink()
    shown = watched("codec", "repair", *encoded, *key, "--output", encoded[1])
    assert shown == [*steps("checked"), "", *steps("repaired"), "", ""]


def test_progress_of_what_has_no_known_size_tells_what_is_done(watched, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdio(DATA))
    shown = watched("codec", "encode", "-", "--output", ".", "--no-encryption", "--data-shards", 2)
    assert shown[0] == f"encoded {format_size(512 << 10)}, {format_size(512 << 10)}/s"


def test_progress_is_not_shown_more_often_than_a_person_reads_nor_to_nobody(watched, encoded):
    words = ("codec", "decode", "--check", *encoded, "--key-file", "a.key")
    assert set(watched(*words, seconds=0.01)) == {""}
    assert watched(*words, into=io.StringIO) == []


def test_inspect_tells_what_the_key_allows(qsfs, encoded, tmp_path):
    file = next(encoded[0].iterdir())
    without = qsfs("--json", "codec", "inspect", file).json[0]
    assert (without["shard"], without["key"], without["shards"]["claims"]) == (0, "a key file", "2 data shards of 4")
    assert "name" not in without and "length" not in without
    told = qsfs("--json", "codec", "inspect", file, "--key-file", "a.key").json[0]
    assert (told["name"], told["length"], told["shards"]["authentic"]) == ("archive.tar", len(DATA), 2)
    content = bytearray(file.read_bytes())
    content[100_000] ^= 1
    file.write_bytes(content)
    assert qsfs("codec", "inspect", file).code == 0
    result = qsfs("codec", "inspect", file, "--key-file", "a.key")
    assert (result.code, "not good pack 0" in result.out) == (8, True)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--no-encryption", "--output", "gone"), 3, "is not a directory"),
        (("--no-encryption", "--output", ".", "--data-shards", "0"), 3, "at least one data shard"),
        (("--no-encryption", "--output", ".", "--data-shards", "250"), 0, ""),
        (("--no-encryption", "--output", ".", "--parity-shards", "241"), 3, "at most 256"),
        (("--no-encryption", "--output", ".", "--parity-shards", "30", "--codec", "isa-l"), 9, "choose codec 'zfec'"),
        (("--no-encryption", "--output", ".", "--compression-level", "23"), 3, "1 to 22"),
        (("--output", "."), 2, "is required"),
        (("--key-file", "gone.key", "--output", "."), 4, "gone.key: the key file cannot be read"),
    ],
)
def test_wrong_options_are_told_and_nothing_is_made(qsfs, tmp_path, options, code, says):
    (tmp_path / "f").write_bytes(b"x")
    result = qsfs("codec", "encode", "f", *options)
    assert (result.code, says in result.err) == (code, True), result.err
    if code:
        assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_without_its_library_isa_l_says_what_to_install(qsfs, tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyeclib.ec_iface", None)
    result = qsfs("codec", "encode", "f", "--output", ".", "--no-encryption", "--codec", "isa-l")
    assert (result.code, "pip install 'qsfs[isa-l]'" in result.err) == (15, True)
    result = qsfs("codec", "bench", "--seconds", "0.001", "--data-shards", 2, "--parity-shards", 1)
    assert (result.code, "left out: codec 'isa_l_rs_cauchy' needs pyeclib" in result.err) == (0, True)


def test_bench_measures_every_step_of_each_codec(qsfs):
    told = qsfs(
        "--json", "codec", "bench", "--seconds", "0.001", "--data-shards", 2, "--parity-shards", 1, "--threads", 1
    ).json
    assert {(each["codec"], each["step"]) for each in told} >= {
        ("zfec", "compress"), ("zfec", "seal"), ("zfec", "encode"), ("zfec", "decode"),
        ("isa_l_rs_cauchy", "encode"), ("isa_l_rs_cauchy", "shards to file"),
    }  # fmt: skip
    assert all(each["mb_per_second"] > 0 and each["mb_per_cpu_second"] > 0 for each in told)


def test_a_file_that_changes_while_it_is_read_is_told(qsfs, tmp_path, monkeypatch):
    """What was read of it then is perhaps no state that it ever had."""
    from qsfs.codec import encode

    (tmp_path / "f").write_bytes(b"x")
    read = encode._read

    def read_and_change(source, size):
        found = read(source, size)
        os.utime(tmp_path / "f", ns=(1, 1))
        return found

    monkeypatch.setattr(encode, "_read", read_and_change)
    result = qsfs("codec", "encode", "f", "--output", ".", "--no-encryption")
    assert (result.code, "f changed while it was read" in result.err) == (0, True)


def test_shard_files_that_hide_nothing_are_for_no_more_people_than_the_file_was(qsfs, encoded, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "archive.tar").chmod(0o600)
    assert qsfs("codec", "encode", "archive.tar", "--output", "x", "--no-encryption").code == 0
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "x").iterdir()} == {0o600}
    (tmp_path / "x" / "archive.tar.03.qsfs").unlink()
    assert qsfs("codec", "repair", "x", "--output", "x").code == 0
    assert stat.S_IMODE((tmp_path / "x" / "archive.tar.03.qsfs").stat().st_mode) == 0o600
