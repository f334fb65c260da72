"""A shard of one codec is never decoded as one of another: their parity bytes differ, their sizes do not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from qsfs.errors import FormatMismatch
from qsfs.format.erasure import CODEC_NUMBERS, Code, CodeParams
from qsfs.format.shard import encode_shards, open_shard
from qsfs.remote.ask import Finding, ask_shard
from qsfs.remote.stored import StoredPack
from tests.format.samples import CODE, KEYS, data_pack


class Holder:
    """A member of the fleet that answers with one value."""

    name, number, identified = "b", 0, True

    def __init__(self, value: bytes) -> None:
        self.data = SimpleNamespace(get=self._get)
        self._value = value

    async def _get(self, key: bytes) -> bytes:
        return self._value

    def succeeded(self) -> None:
        pass


@pytest.mark.parametrize("written", sorted(CODEC_NUMBERS))
@pytest.mark.parametrize("expected", sorted(CODEC_NUMBERS))
async def test_a_shard_of_another_codec_is_refused_by_name(written, expected):
    pack = data_pack()
    number = 5
    value = encode_shards(pack, Code(replace(CODE, codec=written)), KEYS)[number]
    assert open_shard(value, KEYS).codec == written
    stored = StoredPack(pack.ref, tuple(range(6)))
    answer = await ask_shard(Holder(value), stored, number, replace(CODE, codec=expected), KEYS)
    if written == expected:
        assert answer.finding is Finding.GOOD
    else:
        assert answer.finding is Finding.CORRUPT
        assert f"a 4+2 code by {written}; this file system has 4+2 by {expected}" in answer.why


def test_a_codec_that_this_version_does_not_know_is_named():
    with pytest.raises(FormatMismatch, match="unknown erasure codec 'fast'; known:"):
        CodeParams(4, 6, "fast")
