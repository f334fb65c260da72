"""Rebuilding shards that are missing, from k that are there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from qsfs.format.shard import encode_shard
from qsfs.format.units import Buffer
from qsfs.remote.packing import Sealer
from qsfs.remote.stored import StoredPack


class ShardReader(Protocol):
    """Who reads shards: `reader.PackReader`."""

    async def shards(self, pack: StoredPack, wanted: Collection[int]) -> dict[int, memoryview]:
        """The payloads of these data shards, read or decoded; raises `DataLost`, `Unavailable`."""
        ...


def rebuild(
    sealer: Sealer, pack: StoredPack, payloads: dict[int, memoryview], wanted: Sequence[int]
) -> list[bytes]:
    """The values of all n shards, those not in `wanted` empty; for a worker thread.

    `payloads` are those that are wanted, or any k.
    """
    code = sealer.code
    here = payloads.keys() >= set(wanted)
    made: Mapping[int, Buffer] = payloads if here else code.rebuild(payloads, wanted)
    return [
        encode_shard(pack.ref, number, made[number], code, sealer.keys) if number in wanted else b""
        for number in range(code.params.n)
    ]
