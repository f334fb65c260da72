"""Choosing the newest head: lines of heads, splits, and what a reading is worth."""

from __future__ import annotations

import pytest

from qsfs.errors import ConfigError, NotFound, SplitHeads
from qsfs.format.head import HeadRef, Owner
from qsfs.remote.control import HeadFacts, Reading
from qsfs.remote.newest import Descent, Facts, Line, dead_heads, judge, largest_owner, newest_head, uncounted
from qsfs.remote.quorum import FenceQuorum, FleetQuorum
from qsfs.remote.survey import Survey

A, B = Owner(1, b"a" * 16), Owner(2, b"b" * 16)


def ref(generation: int, branch: int = 0, owner: Owner = A) -> HeadRef:
    return HeadRef(owner, generation, bytes([generation, branch]) * 16)


class Heads(dict[HeadRef, HeadFacts]):
    """Heads as they were read, by what they name."""

    def add(self, head: HeadRef, predecessor: HeadRef | None, *kept: HeadRef) -> Heads:
        self[head] = HeadFacts(head, 0, predecessor, frozenset(kept))
        return self


def descent(young: HeadRef, old: HeadRef, facts: Facts) -> Descent:
    return Line(young, facts).descends_from(old)


def reading(number: int, *heads: HeadRef, unproven: tuple[tuple[Owner | HeadRef, str], ...] = ()) -> Reading:
    return Reading(number, frozenset(head.owner for head in heads), frozenset(heads), unproven)


def line(*numbers: int) -> Heads:
    """Heads that follow one another."""
    heads = Heads()
    for before, number in zip((None, *numbers), numbers, strict=False):
        heads.add(ref(number), None if before is None else ref(before))
    return heads


def test_the_newest_head_is_the_largest_owner_then_generation():
    readings = [reading(1, ref(9)), reading(2, ref(3, owner=B), ref(2, owner=B)), reading(3)]
    assert newest_head(readings) == ref(3, owner=B)
    assert newest_head([reading(3)]) is None
    assert largest_owner(readings) == B
    assert largest_owner([reading(1)]) is None


def test_a_head_descends_from_what_its_line_and_its_kept_list_name():
    heads = line(1, 2, 3, 4)
    assert descent(ref(4), ref(1), heads.get) is Descent.YES
    del heads[ref(3)]
    assert descent(ref(4), ref(3), heads.get) is Descent.YES, "named, though it was not read"
    assert descent(ref(4), ref(1), heads.get) is Descent.UNDECIDED
    heads.add(ref(4), ref(3), ref(1))
    assert descent(ref(4), ref(1), heads.get) is Descent.YES


def test_a_line_that_passes_a_head_does_not_descend_from_it():
    heads = line(1, 2, 4)
    assert descent(ref(4), ref(3, 1), heads.get) is Descent.NO
    assert descent(ref(4), ref(2, 1), heads.get) is Descent.NO
    first = Heads().add(ref(5, owner=B), ref(4)).add(ref(5, 1, owner=B), ref(4))
    assert descent(ref(5, owner=B), ref(5, 1, owner=B), first.get) is Descent.NO


def test_another_head_of_the_same_generation_proves_another_line():
    heads = line(1, 2).add(ref(5), ref(4), ref(2))
    assert descent(ref(5), ref(2, 1), heads.get) is Descent.NO


def test_heads_that_name_newer_ones_do_not_hold_up_the_walk():
    """Only a forged head names a newer one; the walk ends all the same."""
    heads = Heads().add(ref(5), ref(5), ref(6)).add(ref(6), ref(5))
    assert descent(ref(6), ref(1), heads.get) is Descent.UNDECIDED
    assert descent(ref(6), ref(5), heads.get) is Descent.YES


def judged(heads: Heads, newest: HeadRef, *others: HeadRef):
    quorum = FleetQuorum(1, frozenset({1, 2, 3}), FenceQuorum(3, 2))
    return judge([reading(1, newest, *others), reading(2, newest)], newest, [quorum], heads.get)


def test_two_lines_of_one_owner_stop_a_restore_and_are_both_listed():
    heads = line(1, 2, 3).add(ref(2, 1), ref(1))
    judgement = judged(heads, ref(3), ref(2), ref(2, 1))
    assert judgement.splits == (ref(2, 1),) and not judgement.undecided
    with pytest.raises(SplitHeads) as caught:
        judgement.require_one_line()
    for head in (ref(3), ref(2, 1)):
        assert f"generation {head.generation} of epoch 1 (digest {head.digest.hex()[:8]})" in str(
            caught.value
        )


def test_one_line_with_heads_that_were_given_up_is_no_split():
    judged(line(1, 2, 3), ref(3), ref(1), ref(2)).require_one_line()


def test_what_a_published_head_is_newer_than_may_stay_undecided():
    """Head 7 was published by this line, so head 5 was not published by another."""
    heads = Heads().add(ref(8), ref(7), ref(7))
    judgement = judged(heads, ref(8), ref(5))
    assert judgement.undecided == (ref(5),)
    judgement.require_one_line()


def test_what_may_have_been_published_by_another_line_stops():
    """Head 7 names head 4 as the last published: whether head 5 is its ancestor cannot be seen."""
    heads = Heads().add(ref(7), ref(6), ref(4))
    assert judged(heads, ref(7), ref(5)).splits == (ref(5),)


def test_what_a_copy_sent_beside_a_published_head_is_dead_and_stops_nobody():
    """11b was sent next to 11a, which was published, so 11b never can be: also where a snapshot pins 11a."""
    pinned = line(10, 11, 12, 13, 14).add(ref(11, 1), ref(10), ref(10))
    pinned.add(ref(14), ref(13), ref(11), ref(12), ref(13))
    recent = line(10, 11).add(ref(11, 1), ref(10), ref(10)).add(ref(12), ref(11), ref(10), ref(11))
    for heads, newest in ((pinned, ref(14)), (recent, ref(12))):
        judgement = judged(heads, newest, ref(11), ref(11, 1))
        assert judgement.dead == (ref(11, 1),) and judgement.others == {ref(11)} and not judgement.ends
        judgement.require_one_line()


def test_where_no_head_tells_which_line_was_published_a_person_chooses():
    """12a and 12b name 11 as published; either may have been since, and 13b as well."""
    heads = line(10, 11).add(ref(12), ref(11), ref(10), ref(11)).add(ref(12, 1), ref(11), ref(10), ref(11))
    assert judged(heads, ref(12, 1), ref(11), ref(12)).splits == (ref(12),)
    heads.add(ref(13, 1), ref(12, 1), ref(10), ref(11))
    judgement = judged(heads, ref(13, 1), ref(11), ref(12), ref(12, 1))
    assert not judgement.dead and judgement.splits == (ref(12),)
    assert [(end.ref, end.published, end.holders) for end in judgement.ends] == [(ref(13, 1), 11, 2), (ref(12), 11, 1)]


def test_a_line_that_is_dead_is_not_the_newest_however_long_it_is():
    """13b names 12b as published, so nothing of 12a, 13a and 14a was; of what descends from 12b all may be."""
    heads = line(10, 11).add(ref(12), ref(11), ref(10), ref(11)).add(ref(13), ref(12), ref(10), ref(11))
    heads.add(ref(14), ref(13), ref(10), ref(11)).add(ref(12, 1), ref(11), ref(10), ref(11))
    heads.add(ref(13, 1), ref(12, 1), ref(11), ref(12, 1))
    readings = [reading(1, ref(11), ref(12), ref(13), ref(14)), reading(2, ref(12, 1), ref(13, 1))]
    assert dead_heads(readings, heads.get) == {ref(12), ref(13), ref(14)}
    assert Survey(dict(enumerate(readings))).without(frozenset(), heads.get).newest == ref(13, 1)
    del heads[ref(13)]
    assert dead_heads(readings, heads.get) == {ref(12)}, "what 14 descends from is not known any more"


def test_who_must_choose_is_told_how_the_heads_differ_and_the_commands():
    heads = line(1, 2, 3).add(ref(2, 1), ref(1))
    heads[ref(3)] = HeadFacts(ref(3), 86_400_000_000_000, ref(2), frozenset({ref(1)}))
    judgement = judge([reading(1, ref(3), ref(2, 1))], ref(3), [], heads.get, "alpha")
    told = judgement.describe_split()
    assert "of 'alpha'" in told and "DIGEST is 03000300 or 02010201." in told
    assert "(digest 03000300), cut at 1970-01-02 00:00:00 UTC, on 1 of the backends that answered, with " in told
    assert "with generation 1 of its owner published before; (2) generation 2" in told
    assert "`qsfs takeover --head DIGEST`" in told and "`qsfs restore --set-aside --head DIGEST`" in told
    assert judgement.choose("0201") == ref(2, 1)
    with pytest.raises(ConfigError, match="may mean several"):
        judgement.choose("0")
    with pytest.raises(NotFound):
        judgement.choose(ref(2).digest.hex())


def test_what_the_reading_withstands_counts_only_backends_that_hide_nothing():
    quorum = FleetQuorum(1, frozenset(range(5)), FenceQuorum(5, 3))
    rotten = reading(2, ref(3), unproven=((ref(4), "does not authenticate"),))
    older = reading(3, ref(3), unproven=((ref(2), "does not authenticate"),))
    judgement = judge([reading(0, ref(3)), reading(1), rotten, older], ref(3), [quorum], line(1, 2, 3).get)
    assert judgement.counted == {0, 1, 3}
    assert judgement.withstands == 0
    assert judgement.uncounted == {2: "does not authenticate"}
    assert uncounted(reading(7, unproven=((A, "rot"),)), ref(3)) is None, "an owner record hides no head"
    assert uncounted(rotten, None) is not None


def test_below_zero_a_newer_head_may_exist():
    quorum = FleetQuorum(1, frozenset(range(5)), FenceQuorum(5, 3))
    assert judge([reading(0, ref(3)), reading(1, ref(3))], ref(3), [quorum], line(3).get).withstands == -1


def test_where_two_lines_published_none_is_dead():
    """A published 11a and 12a; a backend was rolled back to 10, and B published 11b to 13b: both hold what counts."""
    heads = line(10, 11).add(ref(12), ref(11), ref(10), ref(11))
    heads.add(ref(11, 1), ref(10), ref(10)).add(ref(12, 1), ref(11, 1), ref(10), ref(11, 1))
    heads.add(ref(13, 1), ref(12, 1), ref(10), ref(11, 1), ref(12, 1))
    judgement = judged(heads, ref(13, 1), ref(11), ref(12), ref(11, 1), ref(12, 1))
    assert not judgement.dead
    with pytest.raises(SplitHeads):
        judgement.require_one_line()
