"""Any k shards give all, for every code that can be chosen; a codec that cannot is refused."""

from __future__ import annotations

import functools
import math
import operator
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsfs.errors import DependencyMissing, FormatMismatch, QsfsBug
from qsfs.format import isal
from qsfs.format.erasure import CODEC_NAMES, CODEC_NUMBERS, Code, CodeParams
from tests.format.samples import noise

CODECS = sorted(CODEC_NUMBERS)


@pytest.mark.parametrize(
    ("k", "n", "quorum"), [(16, 20, 18), (4, 6, 5), (10, 15, 13), (1, 1, 1), (2, 3, 3), (1, 3, 2)]
)
def test_the_write_quorum_is_k_and_half_of_m_rounded_up(k, n, quorum):
    params = CodeParams(k, n)
    assert (params.m, params.write_quorum) == (n - k, quorum)


@pytest.mark.parametrize(
    ("k", "n", "codec"), [(0, 1, "zfec"), (3, 2, "zfec"), (16, 257, "zfec"), (4, 6, "isa_l")]
)
def test_a_code_that_does_not_exist_is_a_mismatch(k, n, codec):
    with pytest.raises(FormatMismatch):
        CodeParams(k, n, codec)


def test_codec_numbers_are_fixed():
    assert CODEC_NUMBERS == {"zfec": 1, "isa_l_rs_cauchy": 2}
    assert CODEC_NAMES == {1: "zfec", 2: "isa_l_rs_cauchy"}


@pytest.mark.parametrize("codec", CODECS)
def test_every_subset_of_a_small_code_decodes(codec):
    code = Code(CodeParams(4, 7, codec))
    data = [noise(50, i) for i in range(4)]
    shards = [*data, *code.encode(data)]
    for subset in combinations(range(7), 4):
        assert code.decode({number: shards[number] for number in subset}) == data


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(1, 40), st.integers(0, 12), st.integers(1, 200), st.randoms(use_true_random=False))
def test_any_k_shards_give_any_others(codec, k, m, size, source):
    if codec == isal.NAME:
        k, m = min(k, 20), max(m, 1)
    code = Code(CodeParams(k, k + m, codec))
    data = [source.randbytes(size) for _ in range(k)]
    shards = [*data, *code.encode([memoryview(bytearray(shard)) for shard in data])]
    have = {
        number: memoryview(shards[number]) for number in source.sample(range(k + m), source.randint(k, k + m))
    }
    assert code.decode(have) == data
    wanted = source.sample(range(k + m), source.randint(0, k + m))
    assert code.rebuild(have, wanted) == {number: shards[number] for number in wanted}


@pytest.mark.parametrize("codec", CODECS)
def test_the_default_code_is_proved_for_every_subset(codec):
    assert Code(CodeParams(16, 20, codec)).prove(b"seed") == math.comb(20, 16)


@pytest.mark.parametrize(("k", "m"), [(5, 5), (4, 6), (3, 8)])
def test_isa_l_decodes_every_subset_with_many_parities(k, m):
    """Where its Vandermonde matrix fails for some."""
    assert Code(CodeParams(k, k + m, isal.NAME)).prove(b"seed") == math.comb(k + m, k)


@pytest.mark.parametrize(("k", "n"), [(4, 6), (16, 20), (28, 32)])
def test_the_parity_of_isa_l_is_what_the_page_of_formats_says(k, n):
    """Computed here from docs/format.md alone: a file system must not depend on one library."""
    size = 33
    data = [noise(size, i) for i in range(k)]
    parity = Code(CodeParams(k, n, isal.NAME)).encode(data)
    for row in range(k, n):
        coefficients = [gf_inverse(row ^ column) for column in range(k)]
        expected = bytes(
            functools.reduce(operator.xor, (gf_product(coefficients[j], data[j][at]) for j in range(k)))
            for at in range(size)
        )
        assert parity[row - k] == expected


def gf_product(a: int, b: int) -> int:
    """In GF(2^8), polynomial 0x11d."""
    result = 0
    while b:
        result ^= a if b & 1 else 0
        a = a << 1 ^ (0x11D if a & 0x80 else 0)
        b >>= 1
    return result


def gf_inverse(a: int) -> int:
    return next(b for b in range(1, 256) if gf_product(a, b) == 1)


@pytest.mark.parametrize(("k", "n"), [(4, 4), (1, 1), (29, 33)])
def test_what_isa_l_has_no_code_for_is_a_mismatch(k, n):
    with pytest.raises(FormatMismatch, match="choose codec 'zfec'"):
        Code(CodeParams(k, n, isal.NAME))


def test_without_pyeclib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyeclib.ec_iface", None)
    with pytest.raises(DependencyMissing, match=r"pip install 'qsfs\[isa-l\]'"):
        Code(CodeParams(4, 6, isal.NAME))


def test_threads_may_share_a_code():
    code = Code(CodeParams(4, 6, isal.NAME))

    def round_trip(seed: int) -> bool:
        data = [noise(100 + seed % 20, 10 * seed + i) for i in range(4)]
        parity = code.encode(data)
        return code.decode({0: data[0], 2: data[2], 4: parity[0], 5: parity[1]}) == data

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(round_trip, range(200)))


def test_a_large_code_is_proved_on_a_sample():
    code = Code(CodeParams(20, 40))
    assert code.prove(b"seed", samples=50) == 50


def test_a_codec_that_fails_for_some_subset_is_refused(monkeypatch):
    """As one of ISA-L's matrices does with five parities or more."""
    code = Code(CodeParams(4, 6))
    right = code.decode

    def wrong(have):
        data = right(have)
        return data if min(have) == 0 else data[::-1]

    monkeypatch.setattr(code, "decode", wrong)
    with pytest.raises(FormatMismatch, match="choose another codec"):
        code.prove(b"seed")


def test_too_few_shards_or_shards_of_different_sizes_are_a_bug_of_the_caller():
    code = Code(CodeParams(2, 4))
    shards = [b"aa", b"bb", *code.encode([b"aa", b"bb"])]
    for call in (
        lambda: code.decode({0: shards[0]}),
        lambda: code.decode({}),
        lambda: code.decode({0: b"a", 1: b"bb"}),
        lambda: code.decode({0: b"aa", 4: b"bb"}),
        lambda: code.decode({-1: b"aa", 1: b"bb"}),
        lambda: code.encode([b"aa"]),
        lambda: code.encode([b"aa", b"b"]),
        lambda: code.rebuild({0: b"aa", 1: b"bb"}, [4]),
    ):
        with pytest.raises(QsfsBug):
            call()
