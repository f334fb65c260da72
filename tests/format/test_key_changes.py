"""Changes of key slots lock nobody out: each leaves a slot that opens, and old objects stay readable."""

from __future__ import annotations

import pytest

from qsfs.clock import FixedClock
from qsfs.errors import KeyFileError, LimitExceeded, NotFound
from qsfs.format.erasure import CodeParams
from qsfs.format.key_changes import add_slot, remove_slot, rotate_master, rotate_slot
from qsfs.format.keys import KeySlot
from qsfs.format.passphrase import KdfCost, Passphrase
from qsfs.format.slots import MOST_SLOTS, Slot, list_slots
from qsfs.format.superblock import create_superblock, encode_superblock, open_superblock, replace_slots

ONE, TWO, THREE = b"1" * 32, b"2" * 32, b"3" * 32
CHEAP = KdfCost(64, 1, 1)
WORDS = "correct horse battery staple"
CLOCK = FixedClock(5)
FIRST, KEYS = create_superblock(ONE, code=CodeParams(4, 6), clock=FixedClock(1))


def opens(change, secret) -> tuple[int, ...]:
    """The master keys that `secret` opens in the superblock as it would be written; () if it does not."""
    try:
        found, keys = open_superblock(encode_superblock(change.superblock, change.keys, CLOCK), secret)
    except KeyFileError:
        return ()
    assert found == change.superblock
    return keys.numbers


def test_a_secret_is_added_and_the_first_stays():
    change = add_slot(FIRST, KEYS, TWO, CLOCK)
    assert (change.slot, change.superblock.revision) == (2, FIRST.revision + 1)
    assert opens(change, ONE) == opens(change, TWO) == (1,)
    phrase = add_slot(change.superblock, KEYS, Passphrase(WORDS), CLOCK, CHEAP)
    assert phrase.slot == 3 and opens(phrase, Passphrase(WORDS)) == (1,)
    for secret in (TWO, Passphrase(WORDS)):
        with pytest.raises(KeyFileError, match="already"):
            add_slot(phrase.superblock, KEYS, secret, CLOCK)


def test_there_is_a_most_of_slots():
    superblock = FIRST
    for number in range(2, MOST_SLOTS + 1):
        superblock = add_slot(superblock, KEYS, bytes([number]) * 32, CLOCK).superblock
    with pytest.raises(LimitExceeded):
        add_slot(superblock, KEYS, b"x" * 32, CLOCK)


def test_a_removed_secret_opens_nothing_and_the_last_slot_stays():
    two = add_slot(FIRST, KEYS, TWO, CLOCK).superblock
    change = remove_slot(two, KEYS, 1)
    assert (opens(change, ONE), opens(change, TWO)) == ((), (1,))
    with pytest.raises(KeyFileError, match="the last"):
        remove_slot(change.superblock, KEYS, 2)
    with pytest.raises(NotFound, match="there are 2"):
        remove_slot(change.superblock, KEYS, 1)


def test_a_slot_of_a_kind_that_does_not_open_here_is_not_what_may_be_left():
    foreign = KeySlot(7, "tpm2", {}, 1, bytes(12), b"")
    with pytest.raises(KeyFileError, match="the last"):
        remove_slot(replace_slots(FIRST, (*FIRST.slots, foreign)), KEYS, 1)


def test_a_slot_gets_a_new_secret_also_of_the_other_kind():
    change = rotate_slot(FIRST, KEYS, 1, TWO, CLOCK)
    assert (opens(change, ONE), opens(change, TWO)) == ((), (1,))
    phrase = rotate_slot(change.superblock, KEYS, 1, Passphrase(WORDS), CLOCK, CHEAP)
    assert (opens(phrase, TWO), opens(phrase, Passphrase(WORDS))) == ((), (1,))
    assert list_slots(phrase.superblock.slots) == (Slot(1, "argon2id", (1,)),)
    with pytest.raises(KeyFileError, match="already"):
        rotate_slot(FIRST, KEYS, 1, ONE, CLOCK)
    with pytest.raises(NotFound):
        rotate_slot(FIRST, KEYS, 2, TWO, CLOCK)


def test_a_new_master_key_goes_into_every_slot_and_the_old_stays():
    superblock = add_slot(FIRST, KEYS, TWO, CLOCK).superblock
    superblock = add_slot(superblock, KEYS, Passphrase(WORDS), CLOCK, CHEAP).superblock
    change = rotate_master(superblock, KEYS, [ONE, TWO, Passphrase(WORDS)], CLOCK, number=2)
    assert change.keys.current.number == 2 and change.keys.get(1) == KEYS.get(1)
    for secret in (ONE, TWO, Passphrase(WORDS)):
        assert opens(change, secret) == (1, 2)
    assert [slot.params["memory_kib"] for slot in change.superblock.slots if slot.kind == "argon2id"] == [64, 64]


def test_a_master_key_is_not_rotated_past_a_slot_that_would_stop_to_open():
    superblock = add_slot(FIRST, KEYS, TWO, CLOCK).superblock
    with pytest.raises(KeyFileError, match=r"slot 2 \(keyfile\)"):
        rotate_master(superblock, KEYS, [ONE], CLOCK, number=2)
    with pytest.raises(KeyFileError, match="opens no key slot"):
        rotate_master(superblock, KEYS, [ONE, THREE], CLOCK, number=2)
    with pytest.raises(KeyFileError, match="keep one"):
        rotate_master(superblock, KEYS, [ONE], CLOCK, number=2, drop=[1, 2])
    with pytest.raises(NotFound):
        rotate_master(superblock, KEYS, [ONE], CLOCK, number=2, drop=[5])
    change = rotate_master(superblock, KEYS, [ONE], CLOCK, number=2, drop=[2])
    assert (opens(change, ONE), opens(change, TWO)) == ((1, 2), ())


def test_slots_added_after_a_rotation_hold_all_master_keys():
    change = rotate_master(FIRST, KEYS, [ONE], CLOCK, number=2)
    more = add_slot(change.superblock, change.keys, TWO, CLOCK)
    assert opens(more, TWO) == (1, 2)
    again = rotate_master(more.superblock, more.keys, [ONE, TWO], CLOCK, number=5)
    assert opens(again, TWO) == (1, 2, 5)


def test_a_passphrase_of_a_rotated_slot_has_another_salt():
    phrase = Passphrase(WORDS)
    superblock = add_slot(FIRST, KEYS, phrase, CLOCK, CHEAP).superblock
    change = rotate_master(superblock, KEYS, [ONE, phrase], CLOCK, number=2)
    salts = {slot.params["salt"] for s in (superblock, change.superblock) for slot in s.slots if slot.number == 2}
    assert len(salts) == 2
