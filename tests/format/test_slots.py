"""Passphrases open what they should, at a cost that a forger cannot raise; slots keep all master keys."""

from __future__ import annotations

import dataclasses

import pytest

from qsfs.clock import FixedClock
from qsfs.errors import Corrupt, FormatMismatch, KeyFileError, LimitExceeded, QsfsBug
from qsfs.format import passphrase as passphrase_module
from qsfs.format.erasure import CodeParams
from qsfs.format.keys import KeyRing, KeySlot, MasterKey
from qsfs.format.passphrase import KdfCost, Passphrase, check_new
from qsfs.format.slots import (
    MOST_SLOTS,
    Slot,
    free_number,
    list_slots,
    masters_of,
    unwrap,
    without,
    wrap,
)
from qsfs.format.superblock import (
    create_superblock,
    encode_superblock,
    open_superblock,
    read_superblock,
    replace_slots,
)
from tests.format.samples import FSID, KEYS, OTHER_FSID

CHEAP = KdfCost(64, 1, 1)
WORDS = "correct horse battery staple"
SECRET = b"s" * 32


def phrase_slots(words=WORDS, keys=KEYS, number=2, seed=1, cost=CHEAP):
    return wrap(Passphrase(words), keys, slot_number=number, clock=FixedClock(seed), cost=cost)


@pytest.fixture
def derivations(monkeypatch):
    """Counts runs of Argon2id, and lets none of them cost anything."""
    runs = []

    class Counting:
        def __init__(self, **options):
            self.options = options
            runs.append(options)

        def derive(self, text):
            return text[:1] * 32

    monkeypatch.setattr(passphrase_module, "Argon2id", Counting)
    return runs


def test_a_passphrase_opens_its_slot_and_no_other_does():
    slots = phrase_slots()
    assert [unwrap(slot, Passphrase(WORDS), fsid=FSID) for slot in slots] == [KEYS.get(1), KEYS.get(2)]
    for secret in (Passphrase(WORDS + " "), SECRET):
        with pytest.raises(KeyFileError):
            unwrap(slots[0], secret, fsid=FSID)
    with pytest.raises(KeyFileError):
        unwrap(slots[0], Passphrase(WORDS), fsid=OTHER_FSID.fsid)
    for change in ({"number": 3}, {"master_key_number": 2}, {"nonce": b"\1" * 12}, {"wrapped": b""}, {"params": {}}):
        with pytest.raises(KeyFileError):
            unwrap(dataclasses.replace(slots[0], **change), Passphrase(WORDS), fsid=FSID)


def test_all_master_keys_of_a_passphrase_cost_one_derivation(derivations):
    slots = phrase_slots()
    assert len(derivations) == 1
    fresh = Passphrase(WORDS)
    for _ in range(24):
        masters_of(slots, fresh, FSID)
    assert len(derivations) == 2


def test_one_passphrase_typed_in_two_unicode_forms_is_one():
    assert unwrap(phrase_slots("gr\u00fcne Wiese am See")[0], Passphrase("gru\u0308ne Wiese am See"), fsid=FSID)


@pytest.mark.parametrize(
    "cost",
    [
        KdfCost(1 << 30, 1, 4),
        KdfCost(1 << 20, 5, 4),
        KdfCost(64, 1 << 31, 1),
        KdfCost(256 << 10, 3, 4096),
        KdfCost(8, 1, 4),
        KdfCost(64, 0, 1),
        KdfCost(64, 1, 0),
        KdfCost(0, 1, 1),
    ],
)
def test_an_absurd_cost_in_a_forged_slot_is_never_tried_and_is_said(derivations, cost):
    """Slots are read before anything authenticates them: a backend may write what it likes there."""
    superblock, keys = create_superblock(SECRET, code=CodeParams(4, 6), clock=FixedClock(1))
    params = {"salt": b"x" * 32, "memory_kib": cost.memory_kib, "iterations": cost.iterations, "lanes": cost.lanes}
    forged = KeySlot(9, "argon2id", params, 1, bytes(12), b"w" * 48)
    value = encode_superblock(replace_slots(superblock, (forged, *superblock.slots)), keys, FixedClock(2))
    with pytest.raises(KeyFileError, match="key slot 9 was not tried"):
        open_superblock(value, Passphrase(WORDS))
    assert derivations == []
    assert open_superblock(value, SECRET)[1].numbers == (1,)
    with pytest.raises(KeyFileError):
        phrase_slots(cost=cost)


def test_very_many_forged_slots_cost_a_bounded_number_of_derivations(derivations):
    superblock, keys = create_superblock(SECRET, code=CodeParams(4, 6), clock=FixedClock(1))
    forged = tuple(
        KeySlot(n, "argon2id", {"salt": n.to_bytes(32, "big"), **CHEAP_PARAMS}, 1, bytes(12), b"w" * 48)
        for n in range(2, 500)
    )
    value = encode_superblock(replace_slots(superblock, (*superblock.slots, *forged)), keys, FixedClock(2))
    with pytest.raises(KeyFileError, match="opens no key slot"):
        open_superblock(value, Passphrase(WORDS))
    assert len(derivations) == passphrase_module.MOST_DERIVATIONS


def test_forged_slots_in_ever_new_superblocks_cost_no_more(derivations):
    """A backend may send other slots each time that it is asked, and those of real superblocks among them."""
    real = phrase_slots()
    derivations.clear()
    secret = Passphrase(WORDS)
    for n in range(50):
        forged = KeySlot(9, "argon2id", {"salt": n.to_bytes(32, "big"), **CHEAP_PARAMS}, 1, bytes(12), b"w" * 48)
        opened, refused = masters_of((forged, *real), secret, FSID)
        assert set(opened) == {2}
        assert bool(refused) == (n > passphrase_module.MOST_DERIVATIONS)
    assert "was not tried" in refused[0] and "on no more" in refused[0]
    assert secret.exhausted
    assert len(derivations) == 2 + passphrase_module.MOST_DERIVATIONS


def test_a_passphrase_opens_one_revision_of_full_slots_after_the_other():
    """Each revision has salts of its own: what real slots cost is no reason to try no later ones."""
    words = [f"words of slot {number}" for number in range(1, MOST_SLOTS + 1)]
    for mine in (0, MOST_SLOTS // 2, MOST_SLOTS - 1):
        secret = Passphrase(words[mine])
        for revision in range(4):
            slots = tuple(
                slot
                for number, phrase in enumerate(words, start=1)
                for slot in phrase_slots(phrase, number=number, seed=100 * revision + number)
            )
            opened, refused = masters_of(slots, secret, FSID)
            assert (set(opened), refused) == ({mine + 1}, [])
        # Nor are those that others hold in the way of a slot of its own.
        assert wrap(secret, KEYS, slot_number=mine + 1, clock=FixedClock(9), cost=CHEAP)


CHEAP_PARAMS = {"memory_kib": 64, "iterations": 1, "lanes": 1}


def test_too_little_memory_is_a_clear_refusal(monkeypatch):
    class Hungry:
        def __init__(self, **_):
            pass

        def derive(self, _):
            raise MemoryError

    slots = phrase_slots()
    monkeypatch.setattr(passphrase_module, "Argon2id", Hungry)
    with pytest.raises(KeyFileError, match="memory"):
        unwrap(slots[0], Passphrase(WORDS), fsid=FSID)


def test_nonsense_parameters_are_refused():
    slot = phrase_slots()[0]
    for change in ({"salt": b""}, {"salt": 5}, {"memory_kib": "64"}, {"lanes": b"1"}, {"iterations": -1}):
        with pytest.raises(KeyFileError):
            unwrap(dataclasses.replace(slot, params={**slot.params, **change}), Passphrase(WORDS), fsid=FSID)


def test_a_passphrase_shows_nowhere():
    shown = Passphrase(WORDS)
    assert "horse" not in f"{shown!r} {shown} {[shown]}"
    with pytest.raises(KeyFileError) as caught:
        unwrap(phrase_slots("another one, really")[0], shown, fsid=FSID)
    assert "horse" not in str(caught.value)


def test_empty_and_short_new_passphrases_are_refused():
    for text in ("", "x" * 5000):
        with pytest.raises(KeyFileError):
            Passphrase(text)
    for text in ("", "secret", "7 chars"):
        with pytest.raises(KeyFileError):
            check_new(text)
    check_new("eight or more")


def test_a_superblock_opens_with_any_of_its_secrets_of_both_kinds():
    superblock, keys = create_superblock(SECRET, code=CodeParams(4, 6), clock=FixedClock(1))
    phrase = wrap(Passphrase(WORDS), keys, slot_number=2, clock=FixedClock(3), cost=CHEAP)
    value = encode_superblock(replace_slots(superblock, (*superblock.slots, *phrase)), keys, FixedClock(4))
    for secret in (SECRET, Passphrase(WORDS)):
        opened, found = open_superblock(value, secret)
        assert opened.revision == 2 and found.current == keys.current
    with pytest.raises(KeyFileError, match="the passphrase opens no key slot"):
        open_superblock(value, Passphrase("something else"))
    assert list_slots(opened.slots) == (Slot(1, "keyfile", (1,)), Slot(2, "argon2id", (1,)))
    assert free_number(opened.slots) == 3
    assert list_slots(without(opened.slots, {1})) == (Slot(2, "argon2id", (1,)),)


def test_a_file_system_can_be_made_with_a_passphrase_alone():
    superblock, keys = create_superblock(
        Passphrase(WORDS), code=CodeParams(4, 6), clock=FixedClock(1), cost=CHEAP
    )
    value = encode_superblock(superblock, keys, FixedClock(2))
    assert open_superblock(value, Passphrase(WORDS))[1].current == keys.current


def test_there_is_a_most_of_slots():
    slots = tuple(KeySlot(n, "keyfile", {}, 1, bytes(12), b"") for n in range(1, MOST_SLOTS + 1))
    assert free_number(slots[:-1]) == MOST_SLOTS
    with pytest.raises(LimitExceeded):
        free_number(slots)


def test_a_superblock_reads_with_held_master_keys_also_when_its_slots_are_not_ours():
    superblock, keys = create_superblock(SECRET, code=CodeParams(4, 6), clock=FixedClock(1))
    other = wrap(b"o" * 32, keys, slot_number=2, clock=FixedClock(3))
    value = encode_superblock(replace_slots(superblock, other), keys, FixedClock(4))
    with pytest.raises(KeyFileError):
        open_superblock(value, SECRET)
    assert read_superblock(value, keys).revision == 2
    with pytest.raises(Corrupt):
        read_superblock(value, KeyRing(keys.fsid, [MasterKey(1, b"\0" * 32)]))
    with pytest.raises(FormatMismatch):
        read_superblock(value, KEYS)


def test_a_superblock_under_a_newer_master_key_is_unknown_and_not_corrupt():
    """Whoever takes it for damage would overwrite the newer one with an old copy."""
    superblock, keys = create_superblock(SECRET, code=CodeParams(4, 6), clock=FixedClock(1))
    ring = KeyRing(keys.fsid, [keys.current, MasterKey(2, b"2" * 32)])
    rotated = encode_superblock(
        replace_slots(superblock, wrap(SECRET, ring, slot_number=1, clock=FixedClock(3))), ring, FixedClock(4)
    )
    with pytest.raises(KeyFileError, match="master key was rotated"):
        read_superblock(rotated, keys)


def test_a_ring_learns_later_master_keys_and_seals_under_the_newest():
    ring = KeyRing(FSID, [MasterKey(1, b"1" * 32)])
    before = ring.digest_key(1)
    ring.learn([MasterKey(1, b"1" * 32), MasterKey(3, b"3" * 32)])
    assert (ring.numbers, ring.current.number, ring.digest_key(1)) == ((1, 3), 3, before)
    with pytest.raises(QsfsBug):
        ring.learn([MasterKey(4, b"4" * 32), MasterKey(3, b"x" * 32)])
    assert ring.numbers == (1, 3)
