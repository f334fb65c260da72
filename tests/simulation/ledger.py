"""What was written and what was promised, over all machines: the simulation's memory.

Every change of a file system gives a *version*: a number that lies in an extended attribute of the root, changed
together with what it numbers, so that any image says which version it claims to be.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from qsfs.format.head import Head, HeadRef

Files = dict[str, bytes]


@dataclass(frozen=True)
class Version:
    """One state of a file system and what it came from."""

    number: int
    parent: int | None
    files: Files


@dataclass
class Ledger:
    """Versions, heads, and what machines were told is safe.

    `snapshots` are those that were reported and that nobody asked to delete; `doubtful` may be there or not.
    `twins`: a machine was copied, so two lines of heads may come to be.  `choices`: the head that an operator chose of
    several lines, and the others that were listed.
    """

    versions: dict[int, Version] = field(default_factory=dict)
    heads: dict[HeadRef, Head] = field(default_factory=dict)
    version_of: dict[HeadRef, int] = field(default_factory=dict)
    published: list[tuple[str, HeadRef]] = field(default_factory=list)
    acknowledged: list[tuple[HeadRef, int]] = field(default_factory=list)
    snapshots: dict[str, HeadRef] = field(default_factory=dict)
    doubtful: set[str] = field(default_factory=set)
    twins: int = 0
    choices: list[tuple[HeadRef, frozenset[HeadRef]]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, parent: int | None, files: Files) -> int:
        """A new version."""
        number = len(self.versions) + 1
        self.versions[number] = Version(number, parent, files)
        return number

    def descends(self, version: int, older: int) -> bool:
        """Whether `older` is `version` or something that it came from."""
        step: int | None = version
        while step is not None and step >= older:
            if step == older:
                return True
            step = self.versions[step].parent
        return False

    def saw_head(self, head: Head, ref: HeadRef, cut: int | None) -> None:
        """A head is on its way; `cut` is the version of the committed state that it may be a cut of."""
        if ref in self.heads:
            return
        known = self.held_by(head)
        held = cut if known is None else known
        assert held is not None, f"head {ref} is of no commit that is known"
        self.heads[ref], self.version_of[ref] = head, held

    def held_by(self, head: Head) -> int | None:
        """The version of a head that names the same image as one that is known."""
        for ref, other in reversed(self.heads.items()):
            if (other.snapshot, other.deltas) == (head.snapshot, head.deltas):
                return self.version_of[ref]
        return None

    def publish(self, machine: str, head: Head, ref: HeadRef) -> None:
        """A machine counted its head as published; it keeps the newest published one that it descends from."""
        before = self.ancestors(ref) - {ref}
        last = max((other for _, other in self.published if other in before), default=None)
        kept = {generation.head for generation in head.kept}
        assert last is None or last in kept, f"published head {ref} does not keep {last}"
        self.published.append((machine, ref))

    def acknowledge(self, ref: HeadRef, version: int) -> None:
        """A machine was told that the head `ref` is published and holds `version`."""
        self.acknowledged.append((ref, version))
        held = self.version_of[ref]
        assert self.descends(held, version), f"head {ref} holds version {held}, and was to hold {version}"

    def choose(self, digest: str, digests: tuple[str, ...]) -> HeadRef:
        """An operator chose the head with this digest of those listed."""
        listed = {ref for ref in self.heads if ref.digest.hex() in digests}
        assert len(listed) == len(digests), f"heads were listed that nobody sent: {digests}"
        [chosen] = [ref for ref in listed if ref.digest.hex() == digest]
        self.choices.append((chosen, frozenset(listed - {chosen})))
        return chosen

    def left_behind(self, newest: HeadRef) -> set[HeadRef]:
        """The heads that an operator left, by a choice that `newest` descends from."""
        line = self.ancestors(newest)
        found: set[HeadRef] = set()
        for chosen, others in self.choices:
            if chosen in line:
                found |= {ref for other in others for ref in self.ancestors(other)}
        return found - line

    def ancestors(self, ref: HeadRef) -> set[HeadRef]:
        """All heads that `ref` descends from, itself included."""
        found: set[HeadRef] = set()
        step: HeadRef | None = ref
        while step is not None and step not in found:
            found.add(step)
            step = self.heads[step].predecessor if step in self.heads else None
        return found
