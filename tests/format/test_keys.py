"""Key files catch typing errors, slots open with their own secret only, rings keep old keys."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsfs.clock import FixedClock
from qsfs.errors import Corrupt, KeyFileError, QsfsBug
from qsfs.format.keys import (
    KeyRing,
    KeySlot,
    MasterKey,
    new_key_file,
    parse_key_file,
    unwrap_key,
    wrap_key,
    wrap_keys,
)
from tests.format.samples import FSID, KEYS, OTHER_FSID

TEXT = new_key_file(FixedClock(1).random_bytes)
SECRET = parse_key_file(TEXT)
SECRET_LINE = next(line for line in TEXT.splitlines() if line.startswith("secret"))


def test_a_key_file_holds_the_bytes_it_was_made_of():
    assert FixedClock(1).random_bytes(32) == SECRET


def test_layout_and_case_of_a_key_file_do_not_matter():
    retyped = "\n\n # copied by hand\r\n" + TEXT.replace(SECRET_LINE, f"  secret {SECRET.hex().upper()}  ")
    assert parse_key_file(retyped) == SECRET


def test_every_wrong_digit_in_a_key_file_is_noticed():
    start = TEXT.index("secret ")
    for place in range(start + len("secret "), len(TEXT)):
        if TEXT[place] in "0123456789abcdef" and not TEXT[start:place].endswith(
            ("\nche", "\nc", "\nch", "\nchec")
        ):
            wrong = TEXT[:place] + ("0" if TEXT[place] != "0" else "1") + TEXT[place + 1 :]
            with pytest.raises(KeyFileError):
                parse_key_file(wrong)


def test_two_digits_swapped_in_a_key_file_are_noticed():
    digits = SECRET.hex()
    for place in range(63):
        if digits[place] != digits[place + 1]:
            swapped = digits[:place] + digits[place + 1] + digits[place] + digits[place + 2 :]
            with pytest.raises(KeyFileError, match="check value"):
                parse_key_file(TEXT.replace(SECRET_LINE, f"secret {swapped}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("-----BEGIN PRIVATE KEY-----\n", "not a qsfs key file"),
        (TEXT.replace("qsfs-key-1", "qsfs-key-2"), "newer version"),
        (TEXT + SECRET_LINE + "\n", "unexpected line"),
        (TEXT + "owner me\n", "unexpected line"),
        (TEXT.replace(SECRET_LINE, ""), "64 hex digits"),
        (TEXT.replace(SECRET_LINE, SECRET_LINE[:-1]), "64 hex digits"),
        (TEXT[: TEXT.index("check")], "check value"),
    ],
)
def test_a_broken_key_file_says_what_is_wrong(text, message):
    with pytest.raises(KeyFileError, match=message):
        parse_key_file(text)


def test_no_part_of_a_secret_is_in_what_a_broken_key_file_raises():
    digits = SECRET.hex()
    for wrapped in (f"secret {digits[:32]}\n{digits[32:]}", f"SECRET {digits}", digits):
        with pytest.raises(KeyFileError) as caught:
            parse_key_file(f"qsfs-key-1\n{wrapped}\ncheck 00000000\n")
        assert not any(digits[i : i + 6] in str(caught.value) for i in range(len(digits) - 5))


@settings(max_examples=200, derandomize=True)
@given(st.text(max_size=300))
def test_any_text_is_a_key_file_or_an_error(text):
    for candidate in (text, f"qsfs-key-1\n{text}", f"qsfs-key-1\nsecret {text}"):
        with pytest.raises(KeyFileError):
            parse_key_file(candidate)


def test_a_slot_opens_with_its_secret_and_no_other():
    master = MasterKey(3, b"m" * 32)
    slot = wrap_key(SECRET, master, fsid=FSID, slot_number=2, clock=FixedClock(2))
    assert unwrap_key(slot, SECRET, fsid=FSID) == master
    for secret, fsid, opened in (
        (b"\0" * 32, FSID, slot),
        (SECRET, OTHER_FSID.fsid, slot),
        (SECRET, FSID, dataclasses.replace(slot, number=1)),
        (SECRET, FSID, dataclasses.replace(slot, master_key_number=4)),
        (SECRET, FSID, dataclasses.replace(slot, nonce=b"\1" * 12)),
        (SECRET, FSID, dataclasses.replace(slot, nonce=b"")),
        (SECRET, FSID, dataclasses.replace(slot, wrapped=slot.wrapped[:-1])),
        (SECRET, FSID, dataclasses.replace(slot, wrapped=b"")),
        (SECRET, FSID, dataclasses.replace(slot, params={})),
        (SECRET, FSID, dataclasses.replace(slot, params={"salt": 5})),
        (SECRET, FSID, KeySlot(2, "argon2id", slot.params, 3, slot.nonce, slot.wrapped)),
    ):
        with pytest.raises(KeyFileError):
            unwrap_key(opened, secret, fsid=fsid)


def test_a_new_secret_gets_a_slot_for_every_master_key():
    slots = wrap_keys(SECRET, KEYS, slot_number=9, clock=FixedClock(2))
    assert [unwrap_key(slot, SECRET, fsid=FSID) for slot in slots] == [KEYS.get(1), KEYS.get(2)]
    assert {slot.number for slot in slots} == {9}


def test_a_ring_seals_under_its_newest_key_and_keeps_the_older():
    ring = KeyRing(FSID, [MasterKey(5, b"5" * 32), MasterKey(2, b"2" * 32)])
    assert (ring.current.number, ring.numbers, ring.get(2).secret) == (5, (2, 5), b"2" * 32)
    with pytest.raises(Corrupt, match="master key 3"):
        ring.get(3)


def test_every_derived_key_differs():
    ring = KeyRing(FSID, [MasterKey(1, b"s" * 32), MasterKey(2, b"s" * 32)])
    other = KeyRing(OTHER_FSID.fsid, [MasterKey(1, b"s" * 32)])
    keys = [ring.digest_key(1), ring.tag_key(1), ring.digest_key(2), ring.tag_key(2)]
    keys += [other.digest_key(1), other.tag_key(1), b"s" * 32]
    assert len(set(keys)) == len(keys)


def test_secrets_do_not_appear_in_what_is_logged():
    shown = repr(KEYS) + repr(KEYS.current) + repr([KEYS.get(1)])
    assert "\\x11" not in shown
    assert "1111" not in shown.replace(FSID.hex(), "")


def test_keys_of_the_wrong_size_are_refused():
    for make in (
        lambda: MasterKey(1, b"short"),
        lambda: MasterKey(0, b"s" * 32),
        lambda: KeyRing(b"short", [MasterKey(1, b"s" * 32)]),
        lambda: KeyRing(FSID, []),
    ):
        with pytest.raises(QsfsBug):
            make()
