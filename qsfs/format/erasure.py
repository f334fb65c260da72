"""Systematic Reed-Solomon codes: k data shards, m parity shards, any k of them give all."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import zfec

from qsfs.errors import FormatMismatch, QsfsBug
from qsfs.format import isal
from qsfs.format.units import Buffer

CODEC_NUMBERS = {"zfec": 1, isal.NAME: 2}
"""The number in shard headers for each codec's name.  Numbers are never used again: parity bytes differ."""
CODEC_NAMES = {number: name for name, number in CODEC_NUMBERS.items()}

_PROVE_BYTES = 64


@dataclass(frozen=True, slots=True)
class CodeParams:
    """k data shards of n shards in all, by the named codec.

    `FormatMismatch` at construction if no such code exists.
    """

    k: int
    n: int
    codec: str = "zfec"

    def __post_init__(self) -> None:
        if self.codec not in CODEC_NUMBERS:
            raise FormatMismatch(f"unknown erasure codec '{self.codec}'; known: {sorted(CODEC_NUMBERS)}")
        if not 1 <= self.k <= self.n <= 256:
            raise FormatMismatch(
                f"no code has {self.k} data shards of {self.n}: 1 <= k <= n <= 256 must hold"
            )

    @property
    def m(self) -> int:
        """Parity shards: how many of a full pack may be lost."""
        return self.n - self.k

    @property
    def write_quorum(self) -> int:
        """Shards that must be stored for a pack to count as written: k + ceil(m / 2)."""
        return self.k + (self.m + 1) // 2


class Codec(Protocol):
    """The arithmetic of one code.  Safe to share between threads; releases the interpreter lock."""

    def encode(self, data: Sequence[Buffer], numbers: Sequence[int]) -> list[bytes]:
        """The parity shards with these numbers of k data shards of equal size."""
        ...

    def decode(self, have: Mapping[int, Buffer]) -> list[bytes]:
        """The k data shards, given k shards of equal size by number, of which some are parity."""
        ...


class ZfecCodec:
    """See `Codec`."""

    def __init__(self, k: int, n: int) -> None:
        self._k = k
        self._encoder = zfec.Encoder(k, n)
        self._decoder = zfec.Decoder(k, n)

    def encode(self, data: Sequence[Buffer], numbers: Sequence[int]) -> list[bytes]:
        """See `Codec`."""
        return list(self._encoder.encode(list(data), list(numbers)))

    def decode(self, have: Mapping[int, Buffer]) -> list[bytes]:
        """See `Codec`."""
        # zfec wants each data shard at its own index and fills the gaps with parity shards.
        slots: list[Buffer | None] = [have.get(number) for number in range(self._k)]
        order = list(range(self._k))
        parity = iter(sorted(number for number in have if number >= self._k))
        for index, shard in enumerate(slots):
            if shard is None:
                order[index] = next(parity)
                slots[index] = have[order[index]]
        return [bytes(shard) for shard in self._decoder.decode(slots, order)]


_CODECS: dict[str, Callable[[int, int], Codec]] = {"zfec": ZfecCodec, isal.NAME: isal.CauchyCodec}


class Code:
    """Encodes and decodes with one set of parameters.  Safe to share between threads."""

    def __init__(
        self, params: CodeParams, *, around: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """All arithmetic, which releases the interpreter lock, is done within what `around` gives.

        Raises `FormatMismatch` if the codec has no such code, `DependencyMissing` where it is not installed.
        """
        self.params = params
        self._around = around
        self._codec = _CODECS[params.codec](params.k, params.n)

    def encode(self, data: Sequence[Buffer]) -> list[bytes]:
        """The m parity shards (numbers k to n - 1) of k data shards of equal size."""
        self._require(data, range(self.params.k))
        return self._encode(data, range(self.params.k, self.params.n))

    def decode(self, have: Mapping[int, Buffer]) -> list[bytes]:
        """The k data shards, given at least k shards by number, all of equal size.

        Data shards that are there are returned as given; only missing ones cost arithmetic.
        """
        k = self.params.k
        numbers = sorted(have)[:k]
        shards = [have[number] for number in numbers]
        self._require(shards, numbers)
        if numbers[-1] < k:
            return [bytes(shard) for shard in shards]
        with self._around():
            return self._codec.decode(dict(zip(numbers, shards, strict=True)))

    def rebuild(self, have: Mapping[int, Buffer], wanted: Iterable[int]) -> dict[int, bytes]:
        """The shards whose numbers are `wanted`, given at least k shards."""
        numbers = sorted(set(wanted))
        if numbers and not 0 <= numbers[0] <= numbers[-1] < self.params.n:
            raise QsfsBug(f"shards {numbers} are not all of a code with {self.params.n} shards")
        data = self.decode(have)
        parity = [number for number in numbers if number >= self.params.k]
        rebuilt = {number: data[number] for number in numbers if number < self.params.k}
        rebuilt.update(zip(parity, self._encode(data, parity), strict=True))
        return rebuilt

    def prove(self, seed: bytes, samples: int = 5000) -> int:
        """Decodes from k-subsets of the shards of random data; `FormatMismatch` if one fails.

        All subsets when there are at most `samples` of them, else that many chosen by `seed`, always
        including those with as few data shards as possible.  Returns how many were tried.
        """
        k, n = self.params.k, self.params.n
        source = random.Random(seed)
        data = [source.randbytes(_PROVE_BYTES) for _ in range(k)]
        shards = [*data, *self.encode(data)]
        subsets: Iterable[tuple[int, ...]]
        if math.comb(n, k) <= samples:
            subsets = itertools.combinations(range(n), k)
        else:
            last = tuple(range(n - k, n))
            subsets = itertools.chain([last], (self._subset(source, i) for i in range(samples - 1)))
        tried = 0
        for subset in subsets:
            if self.decode({number: shards[number] for number in subset}) != data:
                raise FormatMismatch(f"{self.params} does not decode from {subset}; choose another codec")
            tried += 1
        return tried

    def _subset(self, source: random.Random, turn: int) -> tuple[int, ...]:
        k, n = self.params.k, self.params.n
        if turn % 2:
            return tuple(sorted(source.sample(range(n), k)))
        # Every second subset has all parity shards it can hold: the largest matrices to invert.
        parity = source.sample(range(k, n), min(k, n - k))
        return tuple(sorted([*parity, *source.sample(range(k), k - len(parity))]))

    def _encode(self, data: Sequence[Buffer], numbers: Iterable[int]) -> list[bytes]:
        wanted = list(numbers)
        if not wanted:
            return []
        with self._around():
            return self._codec.encode(data, wanted)

    def _require(self, shards: Sequence[Buffer], numbers: Sequence[int]) -> None:
        k, n = self.params.k, self.params.n
        if len(shards) != k or not all(0 <= number < n for number in numbers):
            raise QsfsBug(f"shards numbered {list(numbers)} do not fit a code with k = {k}, n = {n}")
        if len({len(shard) for shard in shards}) != 1:
            raise QsfsBug("shards of different sizes cannot belong to one pack")
