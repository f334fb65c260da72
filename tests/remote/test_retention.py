"""Which automatic snapshots stay: what the rules say, whatever the clock did; and never one that a person named."""

from __future__ import annotations

import random

import pytest

from qsfs.format.head import HeadRef, Owner
from qsfs.remote.retention import Rules, automatic_name, automatic_time, seconds_until_due, surplus
from qsfs.remote.snapshots import Snapshot, check_name

HOUR = 3600
DAY = 24 * HOUR
START = 1_795_819_400 // (7 * DAY) * 7 * DAY + 4 * DAY
"""A Monday, 00:00 UTC."""


def made(name: str, generation: int, epoch: int = 1) -> Snapshot:
    return Snapshot(name, HeadRef(Owner(epoch, bytes(16)), generation, bytes(32)), generation)


def at(*times: float) -> list[Snapshot]:
    """Automatic snapshots made at these times, in this order."""
    return [made(automatic_name(int(time * 1e9)), number) for number, time in enumerate(times, 1)]


def stay(snapshots: list[Snapshot], rules: Rules) -> list[int | None]:
    gone = surplus(snapshots, rules)
    return [automatic_time(s.name) for s in snapshots if s.name not in gone]


def test_a_name_says_its_time_and_nobody_can_give_it():
    """So no rule can touch what a person named."""
    name = automatic_name(START * 10**9 + 5)
    assert automatic_time(name) == START
    with pytest.raises(Exception, match="automatic"):
        check_name(name)
    for other in ("auto-x", "auto-20261127", "20261127T223105Z", "auto-20261327T223105Z", "before-upgrade"):
        assert automatic_time(other) is None


def test_the_last_ones_stay():
    """By the order in which they were made."""
    times = [START + i * HOUR for i in range(6)]
    assert stay(at(*times), Rules(last=2)) == times[-2:]
    assert stay(at(*times), Rules(last=10)) == times


def test_the_last_of_each_hour_day_and_week_stays():
    """Each rule chooses on its own; what any of them keeps stays."""
    half_hours = [START + i * HOUR / 2 for i in range(20)]
    assert stay(at(*half_hours), Rules(hourly=3)) == [int(half_hours[i]) for i in (15, 17, 19)]
    days = [START + i * 6 * HOUR for i in range(60)]
    assert stay(at(*days), Rules(daily=2)) == [START + 13 * DAY + 18 * HOUR, START + 14 * DAY + 18 * HOUR]
    assert stay(at(*days), Rules(weekly=2)) == [START + 13 * DAY + 18 * HOUR, START + 14 * DAY + 18 * HOUR]
    assert len(stay(at(*days), Rules(last=1, hourly=3, daily=5, weekly=9))) == 3 + 4 + 1


def test_hours_without_a_snapshot_do_not_count():
    """After a week off the last hours before it are still there."""
    times = [START, START + HOUR, START + 2 * HOUR, START + 200 * HOUR, START + 201 * HOUR]
    assert stay(at(*times), Rules(hourly=4)) == times[1:]


def test_a_clock_that_was_ahead_takes_nothing_from_what_is_made_after_it():
    """What was made last is the newest, though its name is older."""
    ahead = [START + 1000 * DAY + i * HOUR for i in range(3)]
    now = [START, START + HOUR, START + 2 * HOUR]
    assert stay(at(*ahead, *now), Rules(last=3)) == now
    assert stay(at(*ahead, *now), Rules(hourly=3)) == now
    assert stay(at(*ahead, *now), Rules(daily=2)) == [ahead[-1], now[-1]]


def test_a_newer_owner_is_later_whatever_its_generation():
    """Generations are compared as heads are."""
    first, second = at(START, START + HOUR)
    taken_over = made(second.name, 1, epoch=2)
    assert surplus([taken_over, first], Rules(last=1)) == [first.name]


def test_named_ones_and_those_of_unknown_form_are_never_chosen():
    """Neither are they counted."""
    others = [made(name, n) for n, name in enumerate(("mine", "auto-mine", "before-rollback-20261127T223105Z"), 50)]
    times = [START + i * HOUR for i in range(5)]
    snapshots = [*at(*times), *others]
    assert surplus(snapshots, Rules(last=1)) == [s.name for s in snapshots[:4]]


def test_without_a_rule_all_stay():
    """Nobody asked for anything to be deleted."""
    assert surplus(at(START, START + 1), Rules()) == []


@pytest.mark.parametrize("seed", range(8))
def test_pruning_as_one_goes_along_keeps_as_much_as_pruning_once(seed: int):
    """No snapshot that a rule would keep in the end goes earlier, and the newest never goes."""
    chance = random.Random(seed)
    rules = Rules(chance.randrange(4), chance.randrange(1, 30), chance.randrange(8), chance.randrange(5))
    time, snapshots, left = float(START), [], []
    for number in range(1, 150):
        time += chance.choice((600, HOUR, HOUR, 5 * HOUR, 2 * DAY))
        new = made(automatic_name(int(time * 1e9)), number)
        snapshots.append(new)
        left.append(new)
        gone = surplus(left, rules)
        assert new.name not in gone
        left = [s for s in left if s.name not in gone]
    gone = surplus(snapshots, rules)
    assert [s.name for s in left] == [s.name for s in snapshots if s.name not in gone]
    assert len(left) <= rules.last + rules.hourly + rules.daily + rules.weekly


def test_when_the_next_is_due():
    """At once if there is none; never more than the interval from now, also where the clock was set back."""
    assert seconds_until_due([made("mine", 1)], HOUR, START * 10**9) == 0
    two = at(START, START + HOUR)
    assert seconds_until_due(two, HOUR, (START + HOUR + 600) * 10**9) == 3000
    assert seconds_until_due(two, HOUR, (START + 10 * HOUR) * 10**9) == 0
    assert seconds_until_due(two, HOUR, (START - 100 * DAY) * 10**9) == HOUR
