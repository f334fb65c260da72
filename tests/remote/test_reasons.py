"""A message about a fleet stays one line that can be read, however many backends are in trouble."""

from __future__ import annotations

from qsfs.errors import BackendUnavailable
from qsfs.remote.reasons import listed, summary


def down(*ports: int, reason: str = "Connection refused") -> list[BackendUnavailable]:
    return [BackendUnavailable(f"backend 10.0.0.1:{port}/qsfs: {reason}") for port in ports]


def test_a_reason_is_told_once_for_all_that_gave_it():
    assert summary(down(*range(9900, 9924))) == (
        "24 backends: Connection refused (10.0.0.1:9900/qsfs, 10.0.0.1:9901/qsfs, 10.0.0.1:9902/qsfs and 21 more)"
    )


def test_one_backend_is_told_as_it_is():
    assert summary(down(9900)) == "backend 10.0.0.1:9900/qsfs: Connection refused"


def test_few_are_all_named():
    assert summary(down(9903, 9900)) == (
        "2 backends: Connection refused (10.0.0.1:9900/qsfs, 10.0.0.1:9903/qsfs)"
    )


def test_the_reason_of_most_comes_first_and_what_names_none_before_all():
    told = summary([*down(1, reason="no answer in 10 s"), *down(2, 3), "3 of 4 needed"])
    assert told == (
        "3 of 4 needed; 2 backends: Connection refused (10.0.0.1:2/qsfs, 10.0.0.1:3/qsfs); "
        "backend 10.0.0.1:1/qsfs: no answer in 10 s"
    )


def test_a_backend_with_two_namespaces_in_one_trouble_counts_once():
    assert summary([*down(1), *down(1)]) == "backend 10.0.0.1:1/qsfs: Connection refused"


def test_names_are_listed_once_and_the_rest_counted():
    assert listed(["b", "a", "b"]) == "a, b"
    assert listed("abcdefgh") == "a, b, c, d, e, f, g, h"
    assert listed("abcdefghi") == "a, b, c and 6 more"
