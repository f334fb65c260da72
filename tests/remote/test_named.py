"""Which metadata packs heads name: asked for each pack that is about to be deleted, and never outdated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qsfs.clock import SystemClock
from qsfs.format.head import Head, SealedHead, open_head, seal_head
from qsfs.remote import named
from qsfs.remote.base import LocalHead
from qsfs.remote.chain import listed_ids
from qsfs.remote.named import NamedPacks
from qsfs.remote.spool import Spool
from tests.format.samples import KEYS, head


def sealed(generation: int, packs: int) -> tuple[Head, SealedHead]:
    """A head that lists some of the sample's metadata packs."""
    first, clock = head(), SystemClock()
    one = first.snapshot[0]
    listed = tuple(
        dataclasses.replace(one, ref=dataclasses.replace(one.ref, pack_id=clock.random_bytes(16)))
        for _ in range(packs)
    )
    made = dataclasses.replace(first, generation=generation, snapshot=listed, deltas=())
    return made, seal_head(made, KEYS, clock)


def test_what_is_named_follows_base_and_spool_and_each_head_is_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """To open a head of thousands of packs takes a tenth of a second, in which no file system call is answered."""
    opened: list[bytes] = []

    def counted(key: bytes, value: bytes, keys: object) -> Head:
        opened.append(key)
        return open_head(key, value, KEYS)

    monkeypatch.setattr(named, "open_head", counted)
    spool = Spool(tmp_path, 1 << 20)
    heads = [sealed(10 + number, 3) for number in range(4)]
    base = LocalHead(heads[0][1], heads[0][0], True)
    names = NamedPacks(spool, KEYS, lambda: base)
    assert names() == listed_ids(heads[0][0])
    spool.write_head(heads[1][1])
    spool.write_head(heads[2][1])
    for _ in range(50):
        assert names() == frozenset().union(*(listed_ids(made) for made, _ in heads[:3]))
    assert len(opened) == 2
    base = LocalHead(heads[2][1], heads[2][0], True)
    spool.drop_heads(heads[2][1].ref)
    assert names() == listed_ids(heads[2][0])
    spool.write_head(heads[3][1])
    assert names() == listed_ids(heads[2][0]) | listed_ids(heads[3][0])
    assert len(opened) == 3
