"""Each order of events that broke a near miss of the design has a test by name; this is the list, and it is kept true.

The events are told in the docstrings of the tests.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

JOURNAL = "core/test_schedules_journal.py"
ATOMIC = "core/test_schedules_atomic.py"
TRUNCATION = "core/test_schedules_truncation.py"
FLUSH = "remote/test_flush_schedules.py"
FETCH = "remote/test_fetch_schedules.py"
OWNERSHIP = "remote/test_schedules.py"
SYSTEM = "simulation/test_schedules.py"
RACES = "simulation/test_fetch_races.py"

NAMED: dict[str, tuple[tuple[str, str], ...]] = {
    # journal and groups
    "a cover gives new write numbers": (
        (JOURNAL, "test_cover_then_commit_then_truncate_and_fsync_keeps_the_covered_write"),
    ),
    "spilled rows do not count as committed": (
        (JOURNAL, "test_a_spill_in_a_later_group_leaves_earlier_appends_to_be_replayed"),
        (JOURNAL, "test_a_spill_that_commits_takes_no_append_of_its_group_with_it"),
    ),
    "truncations are journaled in order": (
        (JOURNAL, "test_write_truncate_into_it_fsync_crash_extend_shows_zeros"),
        (JOURNAL, "test_write_truncate_write_in_one_append_is_replayed_in_order"),
    ),
    "an fsync journals the committing group too": ((JOURNAL, "test_write_seal_fsync_while_the_group_commits_crash"),),
    "an append is replayed whole or not at all": ((JOURNAL, "test_the_second_half_of_an_atomic_files_append_is_torn"),),
    "appends of a former mount are foreign": (
        (JOURNAL, "test_a_new_mounts_append_in_the_place_of_one_that_a_power_cut_lost"),
    ),
    "the journal holds whole pages": ((JOURNAL, "test_half_of_an_evicted_page_is_written_and_fsynced"),),
    "the journal holds the page that a truncation cuts": (
        (JOURNAL, "test_an_evicted_page_is_cut_by_a_truncation_fsynced_and_extended"),
    ),
    "a replay is one transaction": ((JOURNAL, "test_a_crash_in_the_middle_of_a_replay_repeats_it"),),
    "a sync brings those that had returned": (
        (JOURNAL, "test_a_large_sync_that_commits_brings_every_sync_that_had_returned"),
    ),
    "a rollback leaves no journal to replay": (
        (JOURNAL, "test_every_mount_renews_the_journals_number"),
        (SYSTEM, "test_a_rollback_meets_appends_that_no_commit_has"),
        ("simulation/test_points.py", "test_a_death_at_any_step_costs_nothing_that_was_promised"),
    ),
    # truncation, background work, fetch
    "a write works off the truncation that it touches": (
        (TRUNCATION, "test_a_write_behind_a_pending_truncation_brings_no_old_page_of_its_block_back"),
    ),
    "a clean mark meets a pending truncation": (
        (TRUNCATION, "test_a_clean_mark_does_not_reach_a_page_under_a_pending_truncation"),
        (FLUSH, "test_pre_copy_reads_a_page_that_is_truncated_before_it_is_marked_clean"),
    ),
    "background changes go through the open group": (
        (TRUNCATION, "test_background_changes_meet_the_overlay"),
        (FLUSH, "test_a_clean_mark_of_a_block_that_is_in_the_overlay"),
    ),
    "a fetch lands after a truncation": (
        (TRUNCATION, "test_a_fetch_that_lands_after_a_truncation_installs_nothing"),
        (FETCH, "test_truncate_then_write_another_page_of_the_block"),
    ),
    "a fetch lands after its page was uploaded again": (
        (TRUNCATION, "test_a_fetch_that_lands_after_its_page_was_uploaded_again_installs_nothing"),
        (FETCH, "test_rewritten_evicted_and_uploaded_again"),
    ),
    # the races of fetch
    "fetch against truncate": (
        (RACES, "test_fetch_against_truncate"),
        (FETCH, "test_truncate_that_is_not_worked_off_yet"),
    ),
    "fetch against write": ((RACES, "test_fetch_against_write"), (FETCH, "test_written_meanwhile")),
    "fetch against evict": (
        (RACES, "test_fetch_against_evict"),
        (FETCH, "test_an_eviction_between_install_and_commit_loses_nothing"),
    ),
    "fetch against flush": ((RACES, "test_fetch_against_flush"), (RACES, "test_fetch_against_pre_copy")),
    "fetch against collect": (
        (RACES, "test_fetch_against_collect"),
        (RACES, "test_fetch_against_collect_by_another_owner"),
    ),
    "fetch against unlink": ((RACES, "test_fetch_against_unlink"), (FETCH, "test_removed_meanwhile")),
    # generations
    "own heads are stored before they are sent": (
        (FLUSH, "test_cut_head_sent_crash_before_the_record"),
        (OWNERSHIP, "test_a_healthy_machine_mounts_after_a_crash_between_sending_and_recording"),
        (SYSTEM, "test_a_machine_that_is_alone_is_never_refused"),
    ),
    "an extent that only the last cut has is deleted by the next": (
        (FLUSH, "test_cut_with_page_p_truncated_before_the_record_then_extended"),
        (FLUSH, "test_cut_with_page_p_rewritten_as_part_of_another_extent"),
    ),
    "no cut before the last record": (
        (FLUSH, "test_no_cut_before_the_last_record_is_committed"),
        (FLUSH, "test_a_generation_number_is_never_used_twice"),
    ),
    "packs that only the local tables name stay": (
        ("remote/test_schedules_collect.py", "test_a_pre_copied_page_is_named_by_the_local_tables_alone"),
    ),
    "exposure counts published heads": (
        ("remote/test_flush_flusher.py", "test_what_an_earlier_mount_uploaded_ahead_is_exposed_until_a_head_names_it"),
    ),
    # atomic sync
    "nothing but its own sync covers": (
        (ATOMIC, "test_nothing_covers_while_the_application_runs"),
        (ATOMIC, "test_another_files_sync_covers_nothing"),
    ),
    "a stop is no last close": ((ATOMIC, "test_a_stop_with_the_file_open_is_no_last_close"),),
    "a file leaves the policy when nothing is uncovered": (
        (ATOMIC, "test_a_file_leaves_the_policy_when_nothing_of_it_is_uncovered"),
    ),
    "a change of a closed file is covered at once": ((ATOMIC, "test_a_change_to_a_closed_file_is_covered_at_once"),),
    "a copy larger than the cache joins": (
        ("core/test_room.py", "test_a_copy_larger_than_the_cache_onto_an_atomic_name_joins_with_an_alarm"),
        (ATOMIC, "test_a_copy_larger_than_memory_spills_and_its_close_covers_all_of_it"),
    ),
    "a rename takes no uncovered data along": (
        (ATOMIC, "test_a_rename_over_an_existing_name_takes_no_uncovered_data_along"),
    ),
    # ownership, heads, collect
    "acknowledgement and reading are of one set": (
        (OWNERSHIP, "test_acknowledgements_and_readings_of_different_backends_are_no_quorum"),
        ("remote/test_publish.py", "test_a_connection_that_breaks_between_acknowledgement_and_reading_does_not_count"),
    ),
    "a restart owns anew": ((OWNERSHIP, "test_a_restart_is_another_owner_and_no_head_overwrites_another"),),
    "the last two published generations are kept": (
        (SYSTEM, "test_heads_that_were_given_up_cost_no_published_generation_its_packs"),
        (OWNERSHIP, "test_heads_sent_and_given_up_do_not_push_published_ones_out_of_the_kept_list"),
        ("remote/test_superseded.py", "test_heads_that_were_given_up_stay_until_a_newer_one_is_published"),
    ),
    "taking over ends with a head": (
        (SYSTEM, "test_a_head_that_lands_after_a_takeover_is_no_newest_one"),
        (OWNERSHIP, "test_taking_over_ends_with_a_head_of_the_new_owner"),
        (OWNERSHIP, "test_a_mount_whose_first_head_is_not_published_does_not_own"),
    ),
    "a deletion is preceded by a head": (
        (SYSTEM, "test_a_copy_of_the_machine_deletes_nothing_of_the_one_that_owns"),
        ("remote/test_dead_packs.py", "test_without_another_head_nothing_goes_however_long_it_takes"),
    ),
    "the kept list is in the head": (
        (OWNERSHIP, "test_what_one_mount_lets_expire_is_not_kept_by_the_next"),
        ("remote/test_dead_packs.py", "test_a_pin_from_before_a_restart_still_keeps_what_it_names"),
    ),
    "owner records and heads are refilled": (
        (SYSTEM, "test_backends_that_are_emptied_one_after_the_other_lose_no_head_and_no_owner_record"),
        ("remote/test_copies_upkeep.py", "test_backends_that_are_emptied_in_turn_lose_nothing"),
    ),
    "a change of the fleet has two heads": (
        (OWNERSHIP, "test_a_change_of_the_fleet_counts_with_a_quorum_of_both"),
        (OWNERSHIP, "test_a_takeover_from_the_old_list_finds_the_new_fleet"),
    ),
    "the newest fleet is that of the newest head": (
        (OWNERSHIP, "test_the_newest_fleet_is_that_of_the_newest_head_not_the_highest_number"),
    ),
    "shards of named packs are never deleted": (
        (SYSTEM, "test_an_owner_that_stood_still_deletes_nothing_that_the_next_one_keeps"),
        (SYSTEM, "test_a_copy_that_came_late_stays_as_long_as_its_pack_is_named"),
    ),
    "publishing clears only marks of the cut": (
        (FLUSH, "test_publishing_clears_only_the_marks_that_the_cut_contained"),
    ),
}


def names_in(path: Path) -> set[str]:
    """The tests of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("schedule", NAMED)
def test_every_schedule_has_a_test_by_name(schedule: str) -> None:
    missing = [f"{place}: {name}" for place, name in NAMED[schedule] if name not in names_in(TESTS / place)]
    assert not missing
