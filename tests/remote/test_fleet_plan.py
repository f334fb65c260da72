"""What a change of the fleet would be: the configuration against the newest head's fleet, without any backend."""

from __future__ import annotations

import dataclasses

import pytest

from qsfs.errors import ConfigError
from qsfs.format.erasure import CodeParams
from qsfs.format.fleet import ACTIVE, DRAINING, Fleet, FleetEntry
from qsfs.remote.fleet_plan import (
    Configured,
    FleetPlan,
    Shown,
    check_losses,
    check_plan,
    found_empty,
    lost_entries,
    new_entry,
    plan_change,
)
from qsfs.remote.losses import Loss, LossTable
from qsfs.remote.quorum import describe_shortage, fleet_quorums

CODE = CodeParams(2, 3)
EVERYONE = frozenset(range(1, 20))


def identity(number: int) -> bytes:
    return bytes([number]) * 16


def entry(number: int, **fields: object) -> FleetEntry:
    known = FleetEntry(number, identity(number), f"host{number}:9900", "qsfs", "", "", "", 1, ACTIVE)
    return dataclasses.replace(known, **fields)  # type: ignore[arg-type]


def fleet(*entries: FleetEntry) -> Fleet:
    return Fleet(1, entries or tuple(entry(number) for number in range(1, 6)))


def one(number: int, **fields: object) -> Configured:
    known = Configured(f"host{number}:9900", "qsfs", number=number, identity=identity(number))
    return dataclasses.replace(known, **fields)  # type: ignore[arg-type]


def fresh(number: int, shown: Shown = Shown.NOTHING, **fields: object) -> Configured:
    return Configured(f"host{number}:9900", "qsfs", shown=shown, **fields)  # type: ignore[arg-type]


def ones(*numbers: int) -> list[Configured]:
    return [one(number) for number in numbers]


def states(plan: FleetPlan) -> dict[int, str]:
    return {kept.number: kept.state for kept in plan.kept}


def test_what_is_configured_already_is_no_change():
    plan = plan_change(fleet(), ones(1, 2, 3, 4, 5))
    assert not plan.changes and not plan.told and not plan.notes and not plan.refusals


def test_what_shows_no_identity_is_added():
    plan = plan_change(fleet(), [*ones(1, 2, 3, 4, 5), fresh(6, group="g")])
    assert [added.name for added in plan.added] == ["host6:9900/qsfs"] and plan.changes
    assert plan.told == ["add host6:9900/qsfs (group g)"]
    after = plan.fleet(2, [new_entry(plan.added[0], 9, identity(9), "qsfs.control")])
    assert [e.number for e in after.entries] == [1, 2, 3, 4, 5, 9] and after.entries[-1].control_namespace


def test_what_does_not_answer_stays_if_it_is_known_and_is_not_added_if_not():
    """Unknown is not absent: silence takes nobody out, and makes nobody new."""
    silent = [fresh(5, Shown.SILENCE), fresh(6, Shown.SILENCE, problem="host6: refused")]
    plan = plan_change(fleet(), [*ones(1, 2, 3, 4), *silent])
    assert set(states(plan)) == {1, 2, 3, 4, 5} and not plan.added
    assert plan.refusals == ["host6:9900/qsfs cannot be added: host6: refused"]
    assert len(plan.notes) == 1 and "host5:9900/qsfs stays entry 5" in plan.notes[0]


def test_an_entry_is_known_by_its_identity_wherever_it_is_now():
    moved = one(3, address="elsewhere:1", weight=4)
    plan = plan_change(fleet(), [*ones(1, 2, 4, 5), moved])
    assert plan.kept[2] == entry(3, address="elsewhere:1", weight=4) and not plan.added
    # One that is silent at a new address cannot be known.
    away = dataclasses.replace(moved, shown=Shown.SILENCE, number=0, identity=b"")
    assert plan_change(fleet(), [*ones(1, 2, 4, 5), away]).refusals


def test_two_with_one_identity_are_refused():
    plan = plan_change(fleet(), [*ones(1, 2, 3, 4, 5), one(5, address="copy:1")])
    assert len(plan.refusals) == 1 and "copy" in plan.refusals[0]


def test_a_number_that_no_fleet_knows_is_given_anew():
    """Left from a change that was not finished, or of a backend that was retired while nobody could reach it."""
    leftover = one(9, identity=identity(77))
    plan = plan_change(fleet(), [*ones(1, 2, 3, 4, 5), leftover])
    assert plan.added == [leftover]
    assert plan_change(fleet(), [*ones(1, 2, 3, 4), one(5, identity=identity(77))]).added, "not entry 5"


def test_what_is_not_configured_drains_and_is_retired_once_nothing_is_left():
    assert states(plan_change(fleet(), ones(1, 2, 3, 4), packs_left={}))[5] == DRAINING
    draining = fleet(*(entry(n) for n in range(1, 5)), entry(5, state=DRAINING))
    for left, held in (({5: 1}, ""), (None, ""), ({5: 0}, "a rollback left it")):
        plan = plan_change(draining, ones(1, 2, 3, 4), packs_left=left, held_back=held)
        assert not plan.changes and len(plan.notes) == 1 and "not retired yet" in plan.notes[0]
    plan = plan_change(draining, ones(1, 2, 3, 4), packs_left={5: 0})
    assert [gone.number for gone in plan.retired] == [5] and set(states(plan)) == {1, 2, 3, 4}


def test_drain_is_an_order_that_can_be_taken_back():
    plan = plan_change(fleet(), [*ones(1, 2, 3, 4), one(5, drain=True)])
    assert states(plan)[5] == DRAINING and plan.told == ["drain 5 host5:9900/qsfs"]
    again = plan_change(plan.fleet(2, []), ones(1, 2, 3, 4, 5))
    assert states(again)[5] == ACTIVE and again.told == ["use again 5 host5:9900/qsfs"]
    still = plan_change(plan.fleet(2, []), [*ones(1, 2, 3, 4), one(5, drain=True)], packs_left={5: 0})
    assert not still.changes, "an empty one stays for as long as it is configured"


def test_what_is_lost_leaves_at_once_unless_it_answers():
    silent = [*ones(1, 2, 3, 4), fresh(5, Shown.SILENCE)]
    plan = plan_change(fleet(), silent, lost={5})
    assert [gone.number for gone in plan.lost] == [5] and set(states(plan)) == {1, 2, 3, 4} and not plan.refusals
    assert plan_change(fleet(), silent, lost={5}, answering={5}).refusals
    assert plan_change(fleet(), ones(1, 2, 3, 4, 5), lost={5}).refusals
    emptied = plan_change(fleet(), [*ones(1, 2, 3, 4), fresh(5)], lost={5})
    assert [added.name for added in emptied.added] == ["host5:9900/qsfs"] and not emptied.refusals


def test_an_emptied_backend_stays_its_entry_until_somebody_says_that_it_is_lost():
    plan = plan_change(fleet(), [*ones(1, 2, 3, 4), fresh(5)])
    assert not plan.changes and "--lost 5" in plan.notes[0]


def test_names_of_lost_backends_must_name_one_each():
    assert lost_entries(fleet(), ["2", "host3:9900", "host4:9900/qsfs"]) == {2, 3, 4}
    with pytest.raises(ConfigError, match="--lost host9: is not in the fleet"):
        lost_entries(fleet(), ["host9"])
    twice = fleet(entry(1, address="a:1"), entry(2, address="a:1", namespace="other"))
    with pytest.raises(ConfigError, match="names several of the fleet"):
        lost_entries(twice, ["a:1"])


def test_a_fleet_that_could_not_work_is_refused():
    plan = plan_change(fleet(), ones(1, 2))
    check_plan(plan, CODE, EVERYONE)
    assert len(plan.refusals) == 1 and "2 backends would be left to take shards, and a pack has 3" in plan.refusals[0]
    plan = plan_change(fleet(), [*ones(1, 2, 3, 4, 5), *map(fresh, range(6, 12))])
    check_plan(plan, CODE, {1, 2, 3})
    assert len(plan.refusals) == 1 and "3 of the 4 backends that the present fleet needs" in plan.refusals[0]
    plan = plan_change(fleet(), [*ones(1, 2, 3, 4, 5), fresh(6)])
    check_plan(plan, CODE, EVERYONE)
    assert not plan.refusals


def test_giving_up_backends_without_which_packs_are_lost_is_refused_and_names_the_worst():
    plan = plan_change(fleet(), ones(1, 2, 3), lost={4, 5})
    entries = plan.before.entries
    table = LossTable(entries, CODE, [Loss("", frozenset()), Loss("", frozenset({4, 5}))])
    table.add(b"a" * 16, 1, (1, 2, 3))
    table.add(b"b" * 16, 1, (1, 2, 4))
    now, after = table.outcomes
    check_losses(plan, now, after, CODE.k, accepted=False)
    assert not plan.refusals
    table.add(b"c" * 16, 1, (1, 4, 5))
    check_losses(plan, now, after, CODE.k, accepted=False)
    assert len(plan.refusals) == 1 and f"{(b'c' * 16).hex()} (1 of 2)" in plan.refusals[0]
    # Who knows that they are gone for good, and says so, is told what it costs.
    plan.refusals.clear()
    check_losses(plan, now, after, CODE.k, accepted=True)
    assert not plan.refusals and "1 pack with 1 B of data" in plan.notes[-1]
    # What cannot be read anyway does not tie the operator to backends that are gone.
    plan.refusals.clear()
    gone = LossTable(entries, CODE, [Loss("", frozenset()), Loss("", frozenset({4, 5}))])
    gone.add(b"d" * 16, 1, (-1, -1, 4))
    check_losses(plan, *gone.outcomes, CODE.k, accepted=False)  # type: ignore[misc]
    assert not plan.refusals


def test_what_answers_without_its_identity_holds_nothing_of_what_rows_say():
    """Emptied under the same address; but one that shows its identity elsewhere has only moved."""
    configured = [one(1), fresh(2), fresh(3, Shown.SILENCE), one(4, address="elsewhere:1"), fresh(4), fresh(9)]
    assert found_empty(fleet(), configured) == {2}


def test_a_shortage_names_the_fleet_and_its_backends_that_are_missing():
    both = fleet_quorums((fleet(), Fleet(2, tuple(entry(n) for n in (4, 5, 6)))), CODE)
    assert describe_shortage(both, {1, 2, 3, 4}) == (
        "fleet 2: 1 of the 2 backends needed (of 3) answered, without 5 host5:9900/qsfs, 6 host6:9900/qsfs"
    )
