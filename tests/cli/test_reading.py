"""What people read of a read-only mount: what to act on comes first, and in words that say what to do."""

from __future__ import annotations

from typing import Any

from qsfs.cli.reading import generation_line, status_lines

SHOWN: dict[str, Any] = {
    "mode": "fixed",
    "wanted": "the newest generation",
    "generation": 12,
    "cut_at": 1_000_000.0,
    "epoch": 3,
    "host": "node",
    "newest": 12,
    "is_newest": True,
    "behind_seconds": 0.0,
    "looked_at": 1_000_090.0,
    "look_error": "",
    "kept": True,
    "not_kept_since": None,
    "expired": False,
    "expired_reads": 0,
}
NOW = 1_000_100.0


def test_the_generation_its_time_and_its_owner_are_named() -> None:
    assert generation_line(SHOWN) == "generation 12 of 1970-01-12 13:46:40 UTC, from host node (epoch 3)"
    named = SHOWN | {"wanted": 'snapshot "mine"', "host": ""}
    assert generation_line(named) == (
        'generation 12 (snapshot "mine") of 1970-01-12 13:46:40 UTC, from the owner of epoch 3'
    )


def test_age_and_lag_are_told() -> None:
    assert status_lines(SHOWN, NOW)[0].endswith("1 min 40 s old")
    assert status_lines(SHOWN, NOW)[1] == "it is the newest generation (seen 10 s ago)"
    behind = SHOWN | {"newest": 14, "is_newest": False, "behind_seconds": 60.0}
    assert status_lines(behind, NOW)[1] == "the newest generation is 14, 1 min newer (seen 10 s ago)"


def test_what_somebody_must_act_on_is_told() -> None:
    gone = SHOWN | {"kept": False, "not_kept_since": NOW, "newest": 20, "is_newest": False}
    assert "remount" in status_lines(gone, NOW)[-1] and "not kept any more since" in status_lines(gone, NOW)[-1]
    expired = gone | {"expired": True, "expired_reads": 2}
    assert status_lines(expired, NOW)[0].startswith("EXPIRED: generation 12 ")
    held = SHOWN | {
        "mode": "follow",
        "held": "2 open files of older generations (10, 11)",
        "moves": 3,
        "move_error": "metadata do not come",
        "donors": 2,
        "older": [{"generation": 11, "open": 1, "kept": False}],
    }
    told = "\n".join(status_lines(held, NOW))
    assert "stays here: 2 open files of older generations" in told and "cannot move now: metadata" in told
    assert "generation 11: 1 open file, not kept any more" in told
    assert "what is the same in 2 older generations is not fetched again" in told
    assert "older generation" not in "\n".join(status_lines(held | {"donors": 0, "held": ""}, NOW))


def test_a_start_that_still_looks_says_for_what() -> None:
    assert status_lines({"mode": "fixed", "wanted": "generation 7"}, NOW) == [
        "read-only: generation 7 is being looked for"
    ]
