"""The codec of ISA-L by way of pyeclib, an optional package (`pip install 'qsfs[isa-l]'`): several times as fast.

Reed-Solomon over GF(2^8), polynomial 0x11d, below the identity the Cauchy matrix 1 / (i + j): parity row i
(k to n - 1), data shard j, + the exclusive or.  Every square part of a Cauchy matrix can be inverted, so any
k shards decode (ISA-L's Vandermonde matrix does not have that).

liberasurecode, which pyeclib brings, wants a header of its own before each shard.  It depends on the number
of the shard and the size only; it is cut off what is stored, and made again from zeros to decode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from qsfs.errors import DependencyMissing, FormatMismatch
from qsfs.format.units import Buffer

NAME = "isa_l_rs_cauchy"
MOST_SHARDS = 32
"""Shards of one code that liberasurecode has room for."""

_HEADER_BYTES = 80
_SIZES = 8


class CauchyCodec:
    """See `erasure.Codec`."""

    def __init__(self, k: int, n: int) -> None:
        """Raises `FormatMismatch` for a code that this codec does not have, `DependencyMissing` without pyeclib."""
        if not 1 <= k < n <= MOST_SHARDS:
            raise FormatMismatch(
                f"codec '{NAME}' has no code with {k} data shards of {n}: it has at least one parity shard and "
                f"at most {MOST_SHARDS} shards in all; choose codec 'zfec'"
            )
        try:
            from pyeclib.ec_iface import ECDriver, ECDriverError
        except ImportError as error:
            raise DependencyMissing(
                f"codec '{NAME}' needs pyeclib ({error}): install it with pip install 'qsfs[isa-l]'"
            ) from error
        self._k = k
        try:
            self._driver = ECDriver(k=k, m=n - k, ec_type=NAME)
        except ECDriverError as error:
            raise DependencyMissing(
                f"codec '{NAME}' cannot be used: pyeclib says: {error}; install a wheel of it, which brings ISA-L"
            ) from error
        self._headers = lru_cache(_SIZES)(self._headers_of)

    def encode(self, data: Sequence[Buffer], numbers: Sequence[int]) -> list[bytes]:
        """See `erasure.Codec`."""
        fragments = self._driver.encode(b"".join(data))
        return [fragments[number][_HEADER_BYTES:] for number in numbers]

    def decode(self, have: Mapping[int, Buffer]) -> list[bytes]:
        """See `erasure.Codec`."""
        size = len(next(iter(have.values())))
        headers = self._headers(size)
        body = memoryview(self._driver.decode([b"".join((headers[n], shard)) for n, shard in have.items()]))
        return [
            bytes(have[number]) if number in have else bytes(body[number * size : (number + 1) * size])
            for number in range(self._k)
        ]

    def _headers_of(self, size: int) -> list[bytes]:
        return [fragment[:_HEADER_BYTES] for fragment in self._driver.encode(bytes(self._k * size))]
