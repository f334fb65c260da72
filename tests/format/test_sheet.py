"""A sheet's lines come back as the secret, and a typing error is found in the line where it is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsfs.errors import KeyFileError
from qsfs.format.sheet import LINES, join_lines, parse_line, parse_sheet, sheet_lines

SECRET = bytes(range(200, 232))


@settings(max_examples=100, derandomize=True)
@given(st.binary(min_size=32, max_size=32))
def test_every_secret_comes_back(secret):
    assert parse_sheet("\n".join(sheet_lines(secret))) == secret


def test_case_spaces_and_letters_that_look_like_digits_do_not_matter():
    lines = [line.partition(":") for line in sheet_lines(SECRET)]
    typed = [
        f"{number}: {body.lower().replace('0', 'o').replace('1', 'l').replace('-', ' - ')}" for number, _, body in lines
    ]
    assert parse_sheet("Some heading\n\n" + "\n".join(typed) + "\nthe end") == SECRET


def test_each_wrong_character_and_each_swap_is_found_in_its_line():
    """A person sees which line to look at again; the whole is never taken for another secret."""
    missed = 0
    for number, line in enumerate(sheet_lines(SECRET), 1):
        for place in range(3, len(line)):
            if line[place] == "-":
                continue
            for other in "0ZK":
                if other == line[place]:
                    continue
                wrong = line[:place] + other + line[place + 1 :]
                try:
                    parse_line(wrong)
                    missed += 1
                except KeyFileError as error:
                    assert f"line {number}" in str(error)
        body = line[3:].replace("-", "")
        for place in range(len(body) - 1):
            if body[place] != body[place + 1]:
                swapped = body[:place] + body[place + 1] + body[place] + body[place + 2 :]
                with pytest.raises(KeyFileError, match=f"line {number}"):
                    parse_line(f"{number}: {swapped}")
    assert missed == 0


def test_lines_of_two_sheets_and_lines_in_each_others_place_are_refused():
    other = sheet_lines(bytes(32))
    mixed = [*other[:1], *sheet_lines(SECRET)[1:]]
    with pytest.raises(KeyFileError, match="belong together"):
        parse_sheet("\n".join(mixed))
    exchanged = sheet_lines(SECRET)
    first, second = exchanged[0][3:], exchanged[1][3:]
    with pytest.raises(KeyFileError, match="line 1"):
        parse_line(f"1: {second}")
    with pytest.raises(KeyFileError, match="line 2"):
        parse_line(f"2: {first}")


def test_what_is_missing_too_much_or_no_sheet_is_said():
    lines = sheet_lines(SECRET)
    for text, message in (
        ("", "lacks line 1, 2, 3, 4, 5"),
        ("\n".join(lines[:2] + lines[3:]), "lacks line 3"),
        ("\n".join([*lines, sheet_lines(bytes(32))[0]]), "line 1: is there twice"),
        (lines[0][:-1], "line 1: has 15 characters"),
        (lines[0][:-1] + "U", "line 1: character 16"),
    ):
        with pytest.raises(KeyFileError, match=message):
            parse_sheet(text)
    with pytest.raises(KeyFileError, match="line 2 is wanted"):
        parse_line(lines[0], 2)
    assert parse_line(lines[2][3:], 3)[0] == 3


def test_all_wrong_lines_are_named_at_once():
    lines = sheet_lines(SECRET)
    lines[1] = lines[1][:-1] + ("0" if lines[1][-1] != "0" else "1")
    lines[3] = lines[3][:-1] + ("0" if lines[3][-1] != "0" else "1")
    with pytest.raises(KeyFileError, match=r"line 2.*line 4"):
        parse_sheet("\n".join(lines))


def test_no_part_of_the_secret_is_in_an_error():
    for line in sheet_lines(SECRET):
        wrong = line[:-1] + ("0" if line[-1] != "0" else "1")
        with pytest.raises(KeyFileError) as caught:
            parse_sheet(wrong)
        assert not any(group in str(caught.value) for group in line[3:].split("-"))


@settings(max_examples=200, derandomize=True)
@given(st.text(max_size=60))
def test_any_text_is_refused_without_another_error(text):
    for candidate in (text, f"1: {text}"):
        with pytest.raises(KeyFileError):
            parse_sheet(candidate)
        with pytest.raises(KeyFileError):
            parse_line(candidate)


def test_join_needs_all_lines():
    parts = dict(map(parse_line, sheet_lines(SECRET)))
    assert join_lines(parts) == SECRET and len(parts) == LINES
