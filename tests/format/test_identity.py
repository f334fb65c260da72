"""Small records come back, and one that could not be read is never written."""

from __future__ import annotations

import pytest

from qsfs.clock import FixedClock
from qsfs.errors import Corrupt, QsfsBug
from qsfs.format.identity import (
    BackendIdentity,
    Tombstone,
    open_identity,
    open_tombstone,
    seal_identity,
    seal_tombstone,
)
from qsfs.format.owner import Owner, OwnerRecord, open_owner_record, seal_owner_record
from tests.format.samples import FSID, KEYS, OWNER

CLOCK = FixedClock(1)


def test_records_come_back():
    owner = OwnerRecord(FSID, OWNER, 2**63, "hôst")
    assert open_owner_record(*seal_owner_record(owner, KEYS, CLOCK), KEYS) == owner
    identity = BackendIdentity(FSID, b"i" * 16, 2**16 - 1, "")
    assert open_identity(*seal_identity(identity, KEYS, CLOCK), KEYS) == identity
    tombstone = Tombstone(FSID, b"i" * 16, 0, 0, "")
    assert open_tombstone(*seal_tombstone(tombstone, KEYS, CLOCK), KEYS) == tombstone


def test_a_record_that_could_not_be_read_is_never_written():
    for make in (
        lambda: seal_owner_record(OwnerRecord(FSID, Owner(1, b"short"), 0, ""), KEYS, CLOCK),
        lambda: seal_owner_record(OwnerRecord(FSID, Owner(-1, b"m" * 16), 0, ""), KEYS, CLOCK),
        lambda: seal_owner_record(OwnerRecord(b"x" * 16, OWNER, 0, ""), KEYS, CLOCK),
        lambda: seal_owner_record(OwnerRecord(FSID, OWNER, -1, ""), KEYS, CLOCK),
        lambda: seal_owner_record(OwnerRecord(FSID, OWNER, 0, "h" * 256), KEYS, CLOCK),
        lambda: seal_owner_record(OwnerRecord(FSID, OWNER, 0, "\udcff"), KEYS, CLOCK),
        lambda: seal_identity(BackendIdentity(FSID, b"short", 1, ""), KEYS, CLOCK),
        lambda: seal_identity(BackendIdentity(FSID, b"i" * 16, 2**16, ""), KEYS, CLOCK),
        lambda: seal_tombstone(Tombstone(FSID, b"i" * 16, 1, 2**64, ""), KEYS, CLOCK),
        lambda: seal_tombstone(Tombstone(FSID, b"i" * 16, 1, 0, "r" * 1025), KEYS, CLOCK),
    ):
        with pytest.raises(QsfsBug):
            make()


def test_an_identity_is_no_tombstone_and_the_reverse():
    key, value = seal_identity(BackendIdentity(FSID, b"i" * 16, 1, ""), KEYS, CLOCK)
    dead_key, dead = seal_tombstone(Tombstone(FSID, b"i" * 16, 1, 0, "gone"), KEYS, CLOCK)
    for opened, at, held in (
        (open_identity, key, dead),
        (open_identity, dead_key, value),
        (open_tombstone, dead_key, value),
        (open_tombstone, key, dead),
    ):
        with pytest.raises(Corrupt):
            opened(at, held, KEYS)
