"""What `placement check` prints: broken promises first, then what each loss would take."""

from __future__ import annotations

from typing import Any

from qsfs.cli.placement import lines


def loss(what: str, spare: int, **fields: Any) -> dict[str, Any]:
    return {
        "what": what,
        "backends": [1, 2],
        "survived": spare >= 0,
        "spare": spare,
        "lost": {"full": 0 if spare >= 0 else 3, "written": 0, "bytes": 0 if spare >= 0 else 1 << 20},
        "worst": [{"pack": "ab" * 16, "shards": 16 + spare, "class": "full"}],
        "flushing": True,
        "restore_proved": True,
    } | fields


def found(**fields: Any) -> dict[str, Any]:
    each = {"backend": 2, "node": 2, "group": 0}
    return {
        "code": {"data_shards": 16, "parity_shards": 4, "codec": "zfec"},
        "packs": {"full": 10, "written": 2, "bytes": 48 << 20},
        "shards_outside_the_fleet": 0,
        "any_may_be_lost": each,
        "any_may_be_lost_of_full": {"backend": 4, "node": 2, "group": 1},
        "losses": [loss("group:ghent", -1), loss("1 a:9900/qsfs", 1)],
        "down_now": [],
        "backend_names": {"1": "a:9900/qsfs", "2": "b:9900/qsfs"},
        "broken_promises": [],
        "sentences": ["24 backends."],
    } | fields


def test_each_loss_is_a_row_and_what_is_not_survived_names_its_worst_packs():
    out = "\n".join(lines(found(), lose=False))
    assert "10 full packs, 2 packs not full, 48.0 MiB in all" in out
    assert "worst without group:ghent: " + "ab" * 16 + " (full, 15 shards of 16)" in out
    assert "worst without 1" not in out
    assert "any 2 backends may be lost now (what is full survives any 4)" in out
    assert "any 2 nodes may be lost now\n" in out
    assert "any 0 groups may be lost now (what is full survives any 1)" in out


def test_packs_that_are_lost_already_are_not_hidden_behind_a_number():
    out = lines(found(any_may_be_lost={"backend": -1, "node": -1, "group": -1}), lose=False)
    assert "SOME PACKS ARE LOST NOW: they have fewer than 16 shards" in out


def test_an_imagined_loss_says_what_it_takes_and_what_goes_on():
    told = found(losses=[loss("group:ghent", -1, flushing=False, restore_proved=False)], down_now=[2])
    out = "\n".join(lines(told, lose=True))
    assert "do not answer now: b:9900/qsfs" in out
    assert "without group:ghent (a:9900/qsfs, b:9900/qsfs):" in out
    assert "LOST: 3 full packs and 0 others, 1.0 MiB" in out
    assert "flushing stops; a restore CANNOT prove" in out


def test_a_broken_promise_comes_first_also_where_nothing_is_stored():
    told = found(broken_promises=["redundant_groups = 1 cannot be kept"], packs={"full": 0, "written": 0, "bytes": 0})
    assert lines(told, lose=False)[:2] == [
        "warning: redundant_groups = 1 cannot be kept",
        "nothing is on the backends yet",
    ]


def test_without_a_file_system_the_check_says_so(qsfs):
    qsfs("init", ".")
    result = qsfs("placement", "check")
    assert (result.code, "no file system here" in result.err) == (14, True)
