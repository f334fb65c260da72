"""One key and nonce never seal two plaintexts, also where random numbers repeat (cloned machines)."""

from __future__ import annotations

import dataclasses

import pytest

from qsfs.clock import FixedClock
from qsfs.format import keys as keys_module
from qsfs.format import seal
from qsfs.format.erasure import CodeParams
from qsfs.format.keys import KeyRing, MasterKey, wrap_key
from qsfs.format.pack import PackKind, PlainExtent, build_pack
from qsfs.format.passphrase import KdfCost, Passphrase
from qsfs.format.slots import wrap
from qsfs.format.superblock import create_superblock, encode_superblock, replace_slots
from qsfs.format.units import ObjectKind
from tests.format.samples import FSID, noise


class Recorder:
    """AES-GCM that remembers under which key and nonce it sealed what."""

    uses: dict[tuple[bytes, bytes], tuple[bytes, bytes]] = {}

    def __init__(self, key: bytes) -> None:
        self._key = key

    def encrypt(self, nonce: bytes, data: bytes, aad: bytes) -> bytes:
        before = self.uses.setdefault((self._key, bytes(nonce)), (bytes(data), bytes(aad)))
        assert before == (bytes(data), bytes(aad)), "one key and nonce for two plaintexts"
        return bytes(data) + bytes(16)


@pytest.fixture
def uses(monkeypatch):
    monkeypatch.setattr(keys_module, "AESGCM", Recorder)
    Recorder.uses = {}
    return Recorder.uses


def ring() -> KeyRing:
    """A key ring of another process: nothing is shared with the others but the secrets."""
    return KeyRing(FSID, [MasterKey(1, b"\x11" * 32)])


def test_packs_of_clones_never_share_a_key_for_two_plaintexts(uses):
    """The same randomness for every pack; contents, places, epochs, codes and kinds differ slightly."""
    base = [PlainExtent(1, 0, 1, 1, noise(4096)), PlainExtent(1, 1, 1, 2, noise(4096, 1))]
    variants = [base, base[:1], base[::-1], [*base, base[0]], [base[0], base[0]]]
    variants += [
        [dataclasses.replace(base[0], **{field: 7}), base[1]]
        for field in ("inode", "first_page", "write_number")
    ]
    variants.append([PlainExtent(1, 0, 2, 2, noise(4096) + noise(4096, 1))])
    variants.append([PlainExtent(1, 0, 1, 1, bytes(4096)), base[1]])
    built = 0
    for extents in variants:
        for code in (CodeParams(4, 6), CodeParams(3, 5)):
            for epoch in (1, 2):
                build_pack(
                    PackKind.DATA, extents, keys=ring(), code=code, owner_epoch=epoch, clock=FixedClock(1)
                )
                built += 1
    for chunk in (b"rows", b"more rows"):
        build_pack(
            PackKind.METADATA,
            [PlainExtent(0, 0, 0, 0, chunk)],
            keys=ring(),
            code=CodeParams(4, 6),
            owner_epoch=1,
            clock=FixedClock(1),
        )
        built += 1
    assert len({key for key, _ in uses}) == built


def test_a_pack_built_twice_from_the_same_things_is_the_same_pack(uses):
    extents = [PlainExtent(1, 0, 1, 1, noise(4096))]
    for _ in range(2):
        build_pack(
            PackKind.DATA, extents, keys=ring(), code=CodeParams(4, 6), owner_epoch=1, clock=FixedClock(1)
        )
    assert len(uses) == 3


def test_sealed_objects_of_clones_never_share_a_key_for_two_plaintexts(uses):
    plaintexts = [b"", b"a", b"b", b"aa"]
    for plaintext in plaintexts:
        for kind in (ObjectKind.HEAD, ObjectKind.OWNER):
            for number in (1, 2):
                keys = KeyRing(FSID, [MasterKey(number, b"\x11" * 32)])
                seal.seal(kind, plaintext, keys, FixedClock(1))
    assert len(uses) == 16


def test_slots_of_clones_never_share_a_key_for_two_master_keys(uses):
    for number in (1, 2):
        for master in (b"\x01" * 32, b"\x02" * 32):
            wrap_key(b"s" * 32, MasterKey(number, master), fsid=FSID, slot_number=1, clock=FixedClock(1))
    assert len(uses) == 4


SECRETS = (b"s" * 32, b"t" * 32, Passphrase("correct horse"), Passphrase("battery staple"))
CHEAP = KdfCost(64, 1, 1)


def test_slots_of_both_kinds_in_clones_never_share_a_key_for_two_master_keys(uses):
    """Each clone rotates the master key with the same random bytes, but not to the same key."""
    first = MasterKey(1, b"\x01" * 32)
    rings = [KeyRing(FSID, [first])]
    rings += [KeyRing(FSID, [first, MasterKey(2, bytes([n]) * 32)]) for n in (2, 3)]
    rings += [KeyRing(FSID, [first, MasterKey(3, b"\x02" * 32)])]
    rings += [KeyRing(FSID, [first, MasterKey(2, b"\x02" * 32), MasterKey(3, bytes([n]) * 32)]) for n in (4, 5)]
    # Their random numbers met again at the third: only the second differs.
    rings += [KeyRing(FSID, [first, MasterKey(2, bytes([n]) * 32), MasterKey(3, b"\x09" * 32)]) for n in (6, 7)]
    sealed = 0
    for keys in rings:
        for secret in SECRETS:
            for number in (1, 2):
                sealed += len(wrap(secret, keys, slot_number=number, clock=FixedClock(1), cost=CHEAP))
    # A key file wraps an old master key again as it did before; a passphrase's salt is of all master keys.
    assert sealed == 2 * 4 * sum(len(keys.numbers) for keys in rings)
    assert len(uses) < sealed


def test_a_slot_that_changes_its_secret_or_its_cost_changes_its_key(uses):
    keys = KeyRing(FSID, [MasterKey(1, b"\x01" * 32)])
    for secret in SECRETS:
        wrap(secret, keys, slot_number=1, clock=FixedClock(1), cost=CHEAP)
    for cost in (KdfCost(72, 1, 1), KdfCost(64, 2, 1), KdfCost(64, 1, 2)):
        wrap(SECRETS[2], keys, slot_number=1, clock=FixedClock(1), cost=cost)
    assert len(uses) == 7


def test_superblocks_of_two_commands_that_ran_at_once_on_clones_share_no_key(uses, monkeypatch):
    """Both make revision 2 of one superblock with the same random bytes, each with another change."""
    monkeypatch.setattr("qsfs.format.superblock.require_readable", lambda *_: None)
    superblock, keys = create_superblock(SECRETS[0], code=CodeParams(4, 6), clock=FixedClock(1))
    rotated = [KeyRing(keys.fsid, [keys.current, MasterKey(2, bytes([n]) * 32)]) for n in (2, 3)]
    changes = [(keys, superblock.slots)]
    changes += [
        (keys, (*superblock.slots, *wrap(secret, keys, slot_number=2, clock=FixedClock(3), cost=CHEAP)))
        for secret in SECRETS[1:3]
    ]
    changes += [(ring, wrap(SECRETS[0], ring, slot_number=1, clock=FixedClock(3))) for ring in rotated]
    before = len(uses)
    for ring, slots in changes:
        encode_superblock(replace_slots(superblock, slots), ring, FixedClock(4))
    assert len(uses) == before + len(changes), "each superblock has a key of its own"


def test_positions_inside_a_pack_each_have_a_nonce_of_their_own(uses):
    extents = [PlainExtent(1, i, 1, i, noise(4096, i)) for i in range(300)]
    build_pack(PackKind.DATA, extents, keys=ring(), code=CodeParams(4, 6), owner_epoch=1, clock=FixedClock(1))
    assert sorted(int.from_bytes(nonce, "big") for _, nonce in uses) == list(range(302))


def test_an_id_is_made_of_random_bits_and_of_content():
    """Either alone would give two objects one id: on clones, or on equal contents."""
    ids = {
        seal.new_object_id(digest, FixedClock(seed)) for digest in (b"d" * 32, b"e" * 32) for seed in (1, 2)
    }
    assert len(ids) == 4
    assert all(len(object_id) == 16 for object_id in ids)


def test_a_key_depends_on_everything_that_names_an_object(uses):
    base = {"number": 1, "version": 1, "kind": 1, "object_id": b"i" * 16, "digest": b"d" * 32}
    other = {"number": 2, "version": 2, "kind": 2, "object_id": b"j" * 16, "digest": b"e" * 32}
    keys = KeyRing(FSID, [MasterKey(1, b"\x11" * 32), MasterKey(2, b"\x11" * 32)])
    foreign = KeyRing(b"another fs id 16", [MasterKey(1, b"\x11" * 32)])
    for named in (base, *({**base, name: value} for name, value in other.items())):
        keys.cipher(**named).encrypt(bytes(12), repr(named).encode(), b"")
    foreign.cipher(**base).encrypt(bytes(12), b"foreign", b"")
    assert len(uses) == 7
