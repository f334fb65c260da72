"""Patterns mean what a shell means by them, over names of any bytes."""

from __future__ import annotations

import pytest

from qsfs.filesystem.globs import as_text, compile_glob


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("*.lmdb", [b"storage.lmdb", b".lmdb", b"a\nb.lmdb", b"\xff.lmdb"], [b"storage.lmdb-lock", b"lmdb"]),
        ("data.mdb", [b"data.mdb"], [b"data_mdb", b"xdata.mdb", b"data.mdbx"]),
        ("unit_?", [b"unit_1", "unit_é".encode()], [b"unit_", b"unit_12"]),
        ("[a-c]x", [b"ax", b"cx"], [b"dx", b"x"]),
        ("[!a-c]x", [b"dx", b"^x"], [b"ax", b"x"]),
        ("[]x]", [b"]", b"x"], [b"[", b""]),
        ("[^a]", [b"^", b"a"], [b"b"]),
        ("[a&&b]", [b"&", b"b"], [b"c"]),
        ("[ab", [b"[ab"], [b"a", b"b"]),
        ("a.b+c", [b"a.b+c"], [b"aXbc", b"a.bbc"]),
        ("", [b""], [b"x"]),
        ("*a*b", [b"ab", b"xaybab", b"aabb"], [b"ba", b"abc"]),
        ("a**b*", [b"ab", b"axxb", b"abbx"], [b"ba", b"xab"]),
    ],
)
def test_patterns_of_names(pattern, matching, other):
    compiled = compile_glob(pattern)
    assert [name for name in matching if not compiled.fullmatch(as_text(name))] == []
    assert [name for name in other if compiled.fullmatch(as_text(name))] == []


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("unit_files/*", [b"unit_files/a"], [b"x/unit_files/a", b"unit_files/a/b", b"unit_files"]),
        ("/unit_files/*", [b"unit_files/a"], [b"x/unit_files/a"]),
        ("*/unit_files/*", [b"x/unit_files/a"], [b"unit_files/a", b"x/y/unit_files/a"]),
        ("**/unit_files/*", [b"unit_files/a", b"x/unit_files/a", b"x/y/unit_files/a"], [b"xunit_files/a"]),
        ("a/**", [b"a/b", b"a/b/c"], [b"b/a", b"ab/c"]),
        ("a/**/z", [b"a/z", b"a/b/z", b"a/b/c/z"], [b"a/bz", b"az"]),
        ("**/a/**/a/b", [b"a/a/b", b"x/a/y/a/a/b"], [b"a/b", b"a/x/b"]),
        ("**", [b"a", b"a/b"], [b""]),
        ("a[/]b", [], [b"a/b"]),
        ("a/[!b]", [b"a/c"], [b"a//", b"a/b"]),
    ],
)
def test_patterns_of_paths(pattern, matching, other):
    compiled = compile_glob(pattern)
    assert [path for path in matching if not compiled.fullmatch(as_text(path))] == []
    assert [path for path in other if compiled.fullmatch(as_text(path))] == []


def test_no_pattern_takes_long():
    """A pattern of an operator must not be able to stop the file system."""
    assert not compile_glob("*a" * 40 + "b").fullmatch("a" * 255)
    assert not compile_glob("**/a/" * 40 + "b").fullmatch("a/" * 500)
