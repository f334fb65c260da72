"""When a dead pack may be deleted: each of the three conditions holds on its own."""

from __future__ import annotations

import pytest

from qsfs.remote.graveyard import DeadPack, Graveyard, KeptFacts

DATA = DeadPack(7, b"data pack's id..", True, 1000)
ROWS = DeadPack(8, b"metadata pack id", False, 500)
HOUR = 3600.0


def buried(dead: DeadPack, *, kept: list[KeptFacts], retention: float = HOUR) -> Graveyard:
    """A graveyard with one pack that generation 10 is the first not to name, at time 0."""
    graveyard = Graveyard(retention)
    graveyard.died(dead)
    graveyard.published(graveyard.before_cut(0.0), 10)
    graveyard.release(graveyard.waiting, kept, 0.0)
    return graveyard


def publish(graveyard: Graveyard, began: float, generation: int) -> list[int]:
    graveyard.published(graveyard.before_cut(began), generation)
    return [dead.number for dead in graveyard.permitted(10)]


def test_a_pack_goes_with_the_first_head_whose_cut_began_after_the_retention_time():
    graveyard = buried(DATA, kept=[])
    assert publish(graveyard, HOUR - 1, 11) == []
    assert publish(graveyard, HOUR, 12) == [7]


def test_a_cut_that_began_too_early_releases_nothing_however_late_its_head_is_published():
    """Only a head that was published after the retention time shows that this mount still is the owner."""
    graveyard = buried(DATA, kept=[])
    view = graveyard.before_cut(HOUR - 1)
    graveyard.published(view, 11)
    assert graveyard.permitted(10) == []


def test_without_a_head_nothing_goes():
    graveyard = buried(DATA, kept=[], retention=0)
    assert graveyard.permitted(10) == []


def test_what_dies_after_a_cut_began_is_not_released_by_its_head():
    """The generation of that cut may still name it."""
    graveyard = Graveyard(0)
    view = graveyard.before_cut(0.0)
    graveyard.died(DATA)
    graveyard.published(view, 10)
    assert graveyard.waiting == []
    graveyard.release([7], [], 0.0)
    assert publish(graveyard, 1.0, 11) == [] and graveyard.waiting == [7]
    assert graveyard.without_of(7) == 11


@pytest.mark.parametrize("dead", [DATA, ROWS])
def test_an_older_kept_generation_of_which_nothing_is_known_keeps_everything(dead: DeadPack):
    graveyard = buried(dead, kept=[KeptFacts(9)])
    assert publish(graveyard, 10 * HOUR, 11) == [] and graveyard.waiting == [dead.number]


@pytest.mark.parametrize("dead", [DATA, ROWS])
def test_a_kept_generation_that_is_not_older_keeps_nothing(dead: DeadPack):
    graveyard = buried(dead, kept=[KeptFacts(10), KeptFacts(11)])
    assert publish(graveyard, HOUR, 12) == [dead.number]


@pytest.mark.parametrize(("last_pack", "kept"), [(6, False), (7, True), (100, True)])
def test_a_data_pack_is_kept_by_generations_that_knew_its_number(last_pack: int, kept: bool):
    graveyard = buried(DATA, kept=[KeptFacts(9, last_pack, frozenset({DATA.pack_id}))])
    assert publish(graveyard, HOUR, 11) == ([] if kept else [7])


@pytest.mark.parametrize(("listed", "kept"), [({ROWS.pack_id}, True), ({b"another"}, False)])
def test_a_metadata_pack_is_kept_by_generations_that_list_it(listed: set[bytes], kept: bool):
    graveyard = buried(ROWS, kept=[KeptFacts(9, 0, frozenset(listed))])
    assert publish(graveyard, HOUR, 11) == ([] if kept else [8])


def test_the_retention_time_begins_when_the_last_kept_generation_that_may_name_it_is_gone():
    graveyard = buried(DATA, kept=[KeptFacts(9)])
    graveyard.release(graveyard.waiting, [], 5 * HOUR)
    assert publish(graveyard, 6 * HOUR - 1, 11) == []
    assert publish(graveyard, 6 * HOUR, 12) == [7]


def test_a_pack_that_is_not_dead_after_all_is_let_go_of_at_any_time():
    for step in range(4):
        graveyard = Graveyard(0)
        graveyard.died(DATA)
        if step > 0:
            graveyard.published(graveyard.before_cut(0.0), 10)
        if step > 1:
            graveyard.release(graveyard.waiting, [], 0.0)
        if step > 2:
            publish(graveyard, 0.0, 11)
        assert graveyard.report(0.0)["packs"] == 1
        graveyard.forget(7)
        assert graveyard.report(0.0)["packs"] == 0 and graveyard.permitted(10) == []


def test_a_pack_that_dies_again_begins_anew():
    graveyard = buried(DATA, kept=[])
    graveyard.died(DATA)
    assert publish(graveyard, HOUR, 11) == [] and graveyard.waiting == [7]


def test_what_is_told_adds_up():
    graveyard = buried(DATA, kept=[])
    graveyard.died(ROWS)
    told = graveyard.report(600.0)
    assert (told["packs"], told["bytes"]) == (2, 1500)
    assert (told["until_next_generation"], told["in_retention"]) == (1, 1)
    assert told["next_retention_end_seconds"] == HOUR - 600
    publish(graveyard, HOUR, 11)
    graveyard.gone(DATA)
    told = graveyard.report(HOUR)
    assert (told["packs"], told["deleted_packs"], told["deleted_bytes"]) == (1, 1, 1000)
