"""Which snapshots a head keeps, what they may be called, and which generation is meant by what."""

from __future__ import annotations

import pytest

from qsfs.errors import ConfigError, LimitExceeded, NotFound
from qsfs.format.head import HeadRef, KeptGeneration, Owner
from qsfs.remote.snapshots import (
    MOST_SNAPSHOTS,
    check_name,
    check_new,
    find_kept,
    find_snapshot,
    pins_of,
    snapshots_of,
    with_name,
    without_names,
)


def kept(epoch: int, generation: int, *pins: str) -> KeptGeneration:
    ref = HeadRef(Owner(epoch, bytes(16)), generation, bytes(32))
    return KeptGeneration(ref, generation * 1000, pins)


KEPT = (kept(2, 9), kept(1, 4, "old", "older"), kept(1, 7), kept(2, 7, "middle"))


def test_snapshots_are_listed_in_the_order_in_which_they_were_cut():
    """Every name once, with the generation and the time that its head has."""
    assert [(s.name, s.generation, s.time_ns) for s in snapshots_of(KEPT)] == [
        ("old", 4, 4000),
        ("older", 4, 4000),
        ("middle", 7, 7000),
    ]


def test_a_name_or_a_number_means_one_kept_generation():
    """Of two heads with one number, which a new owner's first head makes, the newer is meant."""
    assert find_kept(KEPT, "older") is KEPT[1]
    assert find_kept(KEPT, "4") is KEPT[1]
    assert find_kept(KEPT, "7") is KEPT[3]
    assert find_kept(KEPT, "9") is KEPT[0]


def test_what_is_not_there_is_said_with_what_is():
    """Nobody is left to guess, and a number that is not kept is never rounded to one that is."""
    with pytest.raises(NotFound, match="middle, older, old"):
        find_kept(KEPT, "new")
    with pytest.raises(NotFound, match=r"not kept any more; kept are 4 \(old, older\), 7, 7 \(middle\), 9$"):
        find_kept(KEPT, "5")
    with pytest.raises(NotFound, match="generation 10 is not there yet; the newest is 9"):
        find_kept(KEPT, "10")
    with pytest.raises(NotFound, match="none at all"):
        find_snapshot((), "x")


@pytest.mark.parametrize("name", ["before-upgrade", "v1.2_3", "A", "2026-11-27", "x" * 64])
def test_plain_names_are_taken(name: str):
    """What people write works as it is in a shell and in a path."""
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "12", "-x", ".x", "a b", "a/b", "ä", "x" * 65, "auto-x", "a\n", "\u0663"])
def test_other_names_are_refused(name: str):
    """A name is never taken for an option, a path, a generation or an automatic snapshot."""
    with pytest.raises(ConfigError):
        check_name(name)


def test_a_name_is_given_once_and_there_is_a_most():
    """A second one would take the first one's place, or make it ambiguous."""
    check_new("new", ["old"])
    with pytest.raises(ConfigError, match="already"):
        check_new("old", ["old"])
    with pytest.raises(LimitExceeded):
        check_new("new", map(str, range(MOST_SNAPSHOTS)))


def test_pins_are_changed_by_name():
    """Other names, also of the same generation, stay as they are."""
    pins = pins_of(KEPT)
    more = with_name(with_name(pins, KEPT[1].head, "oldest"), KEPT[0].head, "new")
    assert more == {KEPT[0].head: ("new",), KEPT[1].head: ("old", "older", "oldest"), KEPT[3].head: ("middle",)}
    assert without_names(more, ["older", "middle"]) == {KEPT[0].head: ("new",), KEPT[1].head: ("old", "oldest")}
