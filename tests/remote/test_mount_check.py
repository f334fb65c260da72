"""What a mount accepts as the newest head, and what it says to everything else."""

from __future__ import annotations

import pytest

from qsfs.errors import StaleCache
from qsfs.format.head import HeadRef, Owner
from qsfs.remote.mount_check import LocalState, Standing, check_mount, check_offline, offline_warning

A, B = Owner(1, b"a" * 16), Owner(2, b"b" * 16)
NONE: frozenset[HeadRef] = frozenset()


def ref(generation: int, branch: int = 0, owner: Owner = A) -> HeadRef:
    return HeadRef(owner, generation, bytes([generation, branch]) * 16)


def healthy(generation: int, *sent: HeadRef) -> LocalState:
    return LocalState(ref(generation), True, ref(generation), frozenset(sent))


def test_its_base_and_its_last_published_head_are_accepted():
    assert check_mount(healthy(5), ref(5), NONE) is Standing.CURRENT
    rolled_back_on_purpose = LocalState(ref(3), True, ref(5))
    assert check_mount(rolled_back_on_purpose, ref(5), NONE) is Standing.CURRENT


def test_a_head_that_it_sent_is_its_own():
    assert check_mount(healthy(5, ref(6), ref(7)), ref(7), frozenset({ref(5), ref(6)})) is Standing.SENT
    first_of_a_new_owner = ref(5, owner=B)
    assert check_mount(healthy(5, first_of_a_new_owner), first_of_a_new_owner, NONE) is Standing.SENT


@pytest.mark.parametrize(
    "newest", [ref(6), ref(5, 1), ref(4), ref(1, owner=B)], ids=["newer", "twin", "older", "other owner"]
)
def test_any_other_head_means_a_clone_or_a_rollback(newest):
    with pytest.raises(StaleCache, match="cloned or rolled back"):
        check_mount(healthy(5), newest, NONE)


def test_a_copy_that_published_next_to_a_head_of_ours_is_noticed():
    """Ours, sent and given up, is newer; the copy's may be published."""
    with pytest.raises(StaleCache, match=r"generation 6 .* was sent by a copy of this machine"):
        check_mount(healthy(5, ref(7)), ref(7), frozenset({ref(6, 1)}))
    with pytest.raises(StaleCache, match="copy of this machine"):
        check_mount(healthy(5, ref(6)), ref(6), frozenset({ref(6, 1)}))


def test_a_machine_whose_copy_sent_a_head_is_told_how_to_go_on_with_either():
    """Whichever of the two heads is the larger: each machine's own state can go on, and be given up."""
    for mine, theirs in ((ref(6), ref(6, 1)), (ref(6, 1), ref(6)), (ref(6), ref(7, 1))):
        newest = max(mine, theirs)
        with pytest.raises(StaleCache) as caught:
            check_mount(healthy(5, mine), newest, frozenset({ref(5), min(mine, theirs)}), [min(mine, theirs)])
        told = str(caught.value)
        assert f"`qsfs takeover --head {mine.digest.hex()[:8]}` goes on here" in told
        assert f"`qsfs restore --set-aside --head {theirs.digest.hex()[:8]}`" in told


def test_what_a_copy_sent_before_our_last_published_head_is_past():
    assert check_mount(healthy(5), ref(5), frozenset({ref(4, 1), ref(3)})) is Standing.CURRENT


def test_a_base_that_another_machine_published_needs_a_takeover_once():
    restored = LocalState(ref(5), False)
    with pytest.raises(StaleCache, match="run `qsfs takeover` once"):
        check_mount(restored, ref(5), NONE)
    assert check_mount(restored, ref(5), NONE, takeover=True) is Standing.CURRENT
    with pytest.raises(StaleCache, match="another machine has published since"):
        check_mount(restored, ref(6), NONE, takeover=True)


def test_an_older_generation_is_no_ones_to_mount_before_a_takeover_has_made_it_the_newest():
    """Neither while nothing happened nor after a takeover that died: what it sent is a head of another image."""
    restored = LocalState(ref(5), False, returns=ref(3))
    taken = ref(5, owner=B)
    sent = LocalState(ref(5), False, sent=frozenset({taken}), returns=ref(3))
    recorded = LocalState(ref(5), False, published=taken, returns=ref(3))
    for local, newest in ((restored, ref(5)), (sent, taken), (recorded, taken)):
        with pytest.raises(StaleCache, match=r"restored from generation 3 .* run `qsfs takeover`"):
            check_mount(local, newest, NONE)
        with pytest.raises(StaleCache, match="qsfs takeover"):
            check_offline(local)
        assert check_mount(local, newest, NONE, takeover=True) is not None


def test_a_restore_of_an_older_generation_is_repeated_when_another_machine_has_published_since():
    """As a restore of the newest: nothing was agreed to that leaves what came later."""
    restored = LocalState(ref(5), False, returns=ref(3))
    with pytest.raises(StaleCache, match=r"published since.*qsfs restore --set-aside --generation 3"):
        check_mount(restored, ref(6), NONE, takeover=True)


def test_no_local_state_asks_for_a_takeover():
    with pytest.raises(StaleCache, match=r"no local state.*qsfs takeover"):
        check_mount(LocalState(None, False), ref(5), NONE)


def test_a_mount_without_network_needs_a_base_of_its_own():
    check_offline(healthy(5))
    with pytest.raises(StaleCache, match="restore it first"):
        check_offline(LocalState(None, False))
    with pytest.raises(StaleCache, match="that needs the backends"):
        check_offline(LocalState(ref(5), False))
    assert "generation 5 of epoch 1" in offline_warning(healthy(5))
