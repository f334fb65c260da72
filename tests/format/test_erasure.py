"""Any k shards give all, for every code that can be chosen; a codec that cannot is refused."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsfs.errors import FormatMismatch, QsfsBug
from qsfs.format.erasure import CODEC_NAMES, CODEC_NUMBERS, Code, CodeParams
from tests.format.samples import noise


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
    assert CODEC_NUMBERS == {"zfec": 1}
    assert CODEC_NAMES == {1: "zfec"}


def test_every_subset_of_a_small_code_decodes():
    code = Code(CodeParams(4, 7))
    data = [noise(50, i) for i in range(4)]
    shards = [*data, *code.encode(data)]
    for subset in combinations(range(7), 4):
        assert code.decode({number: shards[number] for number in subset}) == data


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(1, 40), st.integers(0, 12), st.integers(1, 200), st.randoms(use_true_random=False))
def test_any_k_shards_give_any_others(k, m, size, source):
    code = Code(CodeParams(k, k + m))
    data = [source.randbytes(size) for _ in range(k)]
    shards = [*data, *code.encode([memoryview(bytearray(shard)) for shard in data])]
    have = {
        number: memoryview(shards[number]) for number in source.sample(range(k + m), source.randint(k, k + m))
    }
    assert code.decode(have) == data
    wanted = source.sample(range(k + m), source.randint(0, k + m))
    assert code.rebuild(have, wanted) == {number: shards[number] for number in wanted}


def test_the_default_code_is_proved_for_every_subset():
    assert Code(CodeParams(16, 20)).prove(b"seed") == math.comb(20, 16)


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
