"""Requests are understood however the network cuts them up, and nothing oversized gets in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsfs.zdb.protocol import MAX_ARGUMENT_BYTES, ProtocolError, RequestParser
from tests.zdb.wire import encode


def feed(parser: RequestParser, content: bytes, pieces: list[int]) -> list[list[bytes]]:
    """Every request in `content`, received in pieces of the given lengths, over and over."""
    requests = []
    position = turn = 0
    while True:
        while (request := parser.next_request()) is not None:
            requests.append([bytes(argument) for argument in request])
        if position == len(content):
            return requests
        wanted = pieces[turn % len(pieces)]
        turn += 1
        for view in parser.buffers():
            part = content[position : position + min(wanted, len(view))]
            view[: len(part)] = part
            parser.received(len(part))
            position += len(part)
            wanted -= len(part)
            if len(part) < len(view):
                break


large = st.integers(2000, 40_000).map(lambda size: b"\r\n$*" * (size // 4))
arguments = st.one_of(st.binary(max_size=40), large)
requests = st.lists(st.lists(arguments, min_size=1, max_size=5), min_size=1, max_size=6)


@given(requests, st.lists(st.integers(1, 9000), min_size=1, max_size=8))
def test_any_cutting_gives_the_same_requests(wanted, pieces):
    content = b"".join(encode(*request) for request in wanted)
    assert feed(RequestParser(), content, pieces) == wanted


def test_one_byte_at_a_time():
    wanted = [[b"SET", b"k", b"v" * 3000], [b"PING"]]
    assert feed(RequestParser(), b"".join(encode(*request) for request in wanted), [1]) == wanted


def test_large_values_of_one_request_do_not_share_memory():
    """Two large arguments must both be right, although the parser reuses its memory."""
    wanted = [[b"SET", b"a" * 5000, b"b" * 5000, b"c" * 5000], [b"SET", b"d" * 5000, b"e" * 70_000]]
    assert feed(RequestParser(), b"".join(encode(*request) for request in wanted), [7777]) == wanted


def test_the_largest_value_is_accepted():
    wanted = [[b"SET", b"k", bytes(MAX_ARGUMENT_BYTES)]]
    assert feed(RequestParser(), encode(*wanted[0]), [65536]) == wanted


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"PING\r\n", "Malformed request, array expected"),
        (b"*0\r\n", "Missing arguments"),
        (b"*-1\r\n", "Missing arguments"),
        (b"*1025\r\n", "Too many arguments"),
        (b"*x\r\n", "Malformed request, array expected"),
        (b"*1\r\n+PING\r\n", "Malformed query string"),
        (b"*1\r\n$-1\r\n", "Malformed query string"),
        (b"*1\r\n$4\r\nPINGxx", "Malformed query string"),
        (b"*1" + b"1" * 40, "Malformed request, array expected"),
        (b"*1\r\n$%d\r\n" % (MAX_ARGUMENT_BYTES + 1), "Payload too big"),
    ],
)
def test_what_is_no_request_is_refused_as_0_db_does(content, complaint):
    with pytest.raises(ProtocolError, match=complaint) as caught:
        feed(RequestParser(), content, [4096])
    assert caught.value.reply == b"-" + complaint.encode() + b"\r\n"


def test_many_large_arguments_cannot_fill_the_memory():
    content = b"*1024\r\n" + (b"$%d\r\n" % MAX_ARGUMENT_BYTES + bytes(MAX_ARGUMENT_BYTES) + b"\r\n") * 3
    with pytest.raises(ProtocolError, match="Payload too big"):
        feed(RequestParser(), content, [1 << 20])
