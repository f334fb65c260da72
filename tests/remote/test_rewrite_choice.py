"""Which packs are worth rewriting, and what that may cost."""

from __future__ import annotations

from dataclasses import replace

from qsfs.format.extent import PackKind, PackRef
from qsfs.remote import rewrite_choice
from qsfs.remote.packing import row_of
from qsfs.remote.rewrite_choice import Candidates, Choice
from qsfs.store.schema import PAGE, PackRow, PackState

FULL = 1024 * PAGE
NOW = 10_000.0


class Packs:
    """Pack rows by number, all of them old, and what may be worth rewriting of them."""

    def __init__(self, share: float = 0.5) -> None:
        self.rows: dict[int, PackRow] = {}
        self.candidates = Candidates(self.rows.get, pack_bytes=FULL, share=share)
        self.now = NOW

    def add(self, live: float, size: int = FULL) -> int:
        """A pack of `size` bytes of which that part lives."""
        number = len(self.rows) + 1
        ref = PackRef(bytes(16), bytes(32), PackKind.DATA, 1, 1, size, size // 16)
        self.rows[number] = replace(row_of(ref, (0,), 0), live=int(live * size) // PAGE * PAGE)
        return number

    def thinned(self, *numbers: int, density: float = 1.0) -> None:
        self.candidates.thinned(dict.fromkeys(numbers, density), self.now)

    def choose(self, most: int = 8 * FULL) -> list[int]:
        return [choice.number for choice in self.chosen(most)]

    def chosen(self, most: int = 8 * FULL) -> list[Choice]:
        return self.candidates.choose(most, self.now, int(self.now * 1e9))


def test_the_thinnest_go_first_and_no_more_than_fits():
    packs = Packs()
    packs.thinned(*[packs.add(live) for live in (0.45, 0.3, 0.2, 0.4)])
    assert packs.choose(FULL) == [3, 2, 4]


def test_what_is_not_thin_enough_stays():
    packs = Packs(share=0.25)
    packs.thinned(packs.add(0.4), packs.add(0.3))
    assert packs.choose() == []
    assert Packs(share=0.0).choose() == []


def test_a_pack_that_takes_little_because_it_was_compressed_is_not_full_of_life():
    """What lives is counted in plain bytes, what a pack takes in sealed ones."""
    packs = Packs()
    number, other = packs.add(1.2), packs.add(0.9)
    packs.thinned(number, other, density=0.4)
    assert packs.choose() == [other, number]
    packs.candidates.density(number, 0.6)
    packs.candidates.density(other, 0.6)
    assert packs.choose() == []


def test_thin_packs_wait_until_they_fill_half_a_pack_but_not_for_ever():
    packs = Packs()
    packs.thinned(packs.add(0.1), packs.add(0.1))
    assert packs.choose() == []
    packs.thinned(packs.add(0.4))
    assert sorted(packs.choose()) == [1, 2, 3]
    lonely = Packs()
    lonely.thinned(lonely.add(0.1))
    lonely.now += rewrite_choice.PATIENCE_SECONDS + rewrite_choice.SETTLED_SECONDS
    assert lonely.choose() == [1]


def test_young_packs_are_left_alone():
    packs = Packs()
    number = packs.add(0.4)
    packs.add(0.4)
    packs.thinned(1, 2)
    packs.rows[number] = replace(packs.rows[number], written_at_ns=int((NOW - 1) * 1e9))
    assert packs.choose() == []
    packs.now += rewrite_choice.SETTLED_SECONDS
    assert sorted(packs.choose()) == [1, 2]


def test_a_pack_that_could_not_be_rewritten_is_left_for_later():
    packs = Packs()
    packs.thinned(packs.add(0.4), packs.add(0.3))
    for choice in packs.chosen():
        packs.candidates.tried(choice, packs.now)
    assert packs.choose() == []
    packs.now += rewrite_choice.AGAIN_SECONDS
    assert packs.choose() == [2, 1]


def test_small_packs_are_merged_oldest_first_once_they_fill_half_a_pack():
    packs = Packs()
    packs.candidates.recorded(4 * FULL)
    small = [packs.add(1.0, FULL // 16) for _ in range(20)]
    packs.candidates.grew(small[:7])
    assert packs.choose() == [], "not yet half a pack"
    packs.candidates.grew(small[7:])
    assert packs.choose() == small[:16], "as many as fill one"
    assert packs.candidates.small == 4


def test_packs_that_are_large_enough_are_not_merged():
    packs = Packs()
    packs.candidates.recorded(4 * FULL)
    packs.candidates.grew([packs.add(1.0, FULL // 8) for _ in range(20)])
    assert packs.choose() == [] and packs.candidates.small == 0


def test_a_pack_that_is_small_only_because_it_was_compressed_is_left_alone():
    """Packs are closed by plain bytes, so rewriting it leaves the same again; and it keeps none from its turn."""
    packs = Packs()
    packs.candidates.recorded(100 * FULL)
    packs.candidates.grew([packs.add(live, FULL // 16) for live in (3.0, 9.0, 16.0, 40.0)])
    assert packs.choose() == [] and packs.candidates.small == 0
    full = packs.add(16.0, FULL // 16)
    small = [packs.add(1.9, FULL // 32) for _ in range(16)]
    packs.candidates.grew([full, *small])
    assert packs.choose() == small


def test_small_packs_of_what_is_read_at_a_start_are_not_merged_with_others():
    """It would lie scattered again."""
    packs = Packs()
    packs.candidates.recorded(4 * FULL)
    for number in [packs.add(1.0, FULL // 16) for _ in range(20)]:
        packs.rows[number] = replace(packs.rows[number], state=packs.rows[number].state | PackState.START)
    packs.candidates.grew(packs.rows)
    assert packs.choose() == []


def test_small_packs_that_are_young_are_not_merged():
    """What is rewritten all the time dies by itself."""
    packs = Packs()
    packs.candidates.recorded(4 * FULL)
    packs.candidates.grew([packs.add(1.0, FULL // 16) for _ in range(20)])
    packs.now = rewrite_choice.SMALL_SECONDS - 1
    assert packs.choose() == []


def test_all_rewriting_together_costs_little_more_than_what_applications_changed():
    """A load that thins one pack's worth for each that it writes leaves next to no allowance for merging.

    So what is uploaded stays below 2.2 times what changed, and, with the code and what comes with it, below 3.
    """
    packs = Packs()
    changed = marked = 0
    for _ in range(1000):
        changed += FULL
        packs.candidates.recorded(changed + marked)
        packs.candidates.grew([packs.add(1.0, FULL // 16) for _ in range(16)])
        packs.thinned(packs.add(0.49), packs.add(0.49))
        for choice in packs.chosen():
            marked += choice.row.live
            packs.candidates.marked(choice.row.live)
            del packs.rows[choice.number]
    assert 0.95 * changed < marked < 1.15 * changed


def test_where_nothing_is_thin_every_small_pack_is_merged_once():
    packs = Packs()
    changed = marked = 0
    for _ in range(200):
        changed += FULL
        packs.candidates.recorded(changed + marked)
        packs.candidates.grew([packs.add(1.0, FULL // 16) for _ in range(16)])
        for choice in packs.chosen():
            marked += choice.row.live
            packs.candidates.marked(choice.row.live)
    assert packs.candidates.small < 32
    assert marked <= changed


def test_a_long_load_does_not_pay_for_merging_long_after():
    packs = Packs()
    packs.candidates.recorded(10_000 * FULL)
    for _ in range(100):
        packs.candidates.grew([packs.add(1.0, FULL // 16) for _ in range(16)])
    merged = 0
    while chosen := packs.chosen():
        for choice in chosen:
            merged += choice.row.live
            packs.candidates.marked(choice.row.live)
    assert merged < 20 * FULL
