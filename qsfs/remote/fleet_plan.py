"""What a change of the fleet would be: the configured backends against the fleet of the newest head.  Pure logic.

A configured backend is an entry of the fleet if it shows that entry's identity, wherever it is now; one that does not
answer, if the entry has its address and namespace.  What answers and shows no identity of the fleet is new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import Enum

from qsfs.errors import ConfigError
from qsfs.format.erasure import CodeParams
from qsfs.format.fleet import ACTIVE, DRAINING, Fleet, FleetEntry
from qsfs.remote.losses import Outcome
from qsfs.remote.quorum import FleetAssessment, assess
from qsfs.values import counted, format_size


class Shown(Enum):
    """What a configured backend showed when it was asked who it is."""

    IDENTITY = "an identity of this file system"
    NOTHING = "no identity of this file system"
    SILENCE = "no answer"
    DAMAGE = "an identity that does not authenticate"


@dataclass(frozen=True, slots=True)
class Configured:
    """One backend of the configuration, and what it showed.

    `number` and `identity` are what it carries, 0 and empty for nothing; `problem` is why it showed nothing.
    """

    address: str
    namespace: str
    group: str = ""
    node: str = ""
    weight: int = 1
    drain: bool = False
    shown: Shown = Shown.IDENTITY
    number: int = 0
    identity: bytes = b""
    problem: str = ""

    @property
    def name(self) -> str:
        """`address/namespace`."""
        return f"{self.address}/{self.namespace}"


@dataclass(slots=True)
class FleetPlan:
    """What would be done to the fleet `before`.

    `kept` are its entries as they would be; `added` is configured and new; `retired` and `lost` leave.  `told` are
    the changes, a sentence each, `notes` what else to know, `refusals` why it cannot be done.
    """

    before: Fleet
    kept: list[FleetEntry] = field(default_factory=list)
    added: list[Configured] = field(default_factory=list)
    retired: list[FleetEntry] = field(default_factory=list)
    lost: list[FleetEntry] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    @property
    def changes(self) -> bool:
        """Whether anything would be changed."""
        return bool(self.added) or tuple(self.kept) != self.before.entries

    def fleet(self, number: int, added: Sequence[FleetEntry]) -> Fleet:
        """The fleet after the change; `added` are the entries of the backends that are new."""
        return Fleet(number, tuple(sorted((*self.kept, *added), key=lambda entry: entry.number)))

    def imagined(self) -> Fleet:
        """The same before the new backends have numbers and identities."""
        first = max((entry.number for entry in self.before.entries), default=0) + 1
        return self.fleet(self.before.number, [new_entry(one, n, b"") for n, one in enumerate(self.added, first)])

    def assessment(self, code: CodeParams) -> FleetAssessment:
        """What the fleet would withstand."""
        return assess(self.imagined(), code)


def new_entry(one: Configured, number: int, identity: bytes, control_namespace: str = "") -> FleetEntry:
    """The entry of a new backend."""
    shared = control_namespace in ("", one.namespace)
    return FleetEntry(
        number=number,
        identity=identity,
        address=one.address,
        namespace=one.namespace,
        control_namespace="" if shared else control_namespace,
        group=one.group,
        node=one.node,
        weight=one.weight,
        state=DRAINING if one.drain else ACTIVE,
    )


def lost_entries(fleet: Fleet, words: Sequence[str]) -> frozenset[int]:
    """The numbers of the entries that `--lost` names by number, address or address/namespace; `ConfigError` if none."""
    found = set()
    for word in words:
        named = [e for e in fleet.entries if word in (str(e.number), e.address, name_of(e))]
        if len(named) != 1:
            known = ", ".join(f"{entry.number} {name_of(entry)}" for entry in named or fleet.entries)
            raise ConfigError(f"--lost {word}: {'names several of' if named else 'is not in'} the fleet: {known}")
        found.add(named[0].number)
    return frozenset(found)


def name_of(entry: FleetEntry) -> str:
    """`address/namespace` of an entry."""
    return f"{entry.address}/{entry.namespace}"


def plan_change(
    fleet: Fleet,
    configured: Sequence[Configured],
    *,
    lost: Set[int] = frozenset(),
    packs_left: Mapping[int, int] | None = None,
    answering: Set[int] = frozenset(),
    held_back: str = "",
) -> FleetPlan:
    """The plan from `fleet` to what is configured.

    `lost` are entries that are gone for good.  `packs_left` says how many packs have a shard on each draining
    backend (not among them, or None: not known), `answering` which entries answer; `held_back` is why none may be
    retired as empty, "" if they may.
    """
    plan = FleetPlan(fleet)
    claimed = _claims(fleet, configured, lost, plan)
    answering = answering | {one.number for one in configured if one.shown is Shown.IDENTITY}
    for entry in fleet.entries:
        one = claimed.get(entry.number)
        if entry.number in lost:
            _lose(plan, entry, entry.number in answering)
        elif one is not None:
            _keep(plan, entry, one)
        else:
            left = None if packs_left is None else packs_left.get(entry.number)
            _remove(plan, entry, left, held_back)
    return plan


def check_plan(plan: FleetPlan, code: CodeParams, answering: Set[int]) -> None:
    """Adds to `plan.refusals` why the fleet after it could not work; new backends have answered already."""
    taking = sum(entry.state == ACTIVE for entry in plan.imagined().entries)
    before = sum(entry.state == ACTIVE for entry in plan.before.entries)
    if taking < code.n and taking < before:
        plan.refusals.append(
            f"{counted(taking, 'backend')} would be left to take shards, and a pack has {code.n}: packs would not "
            "become full any more; add backends in the same change"
        )
    old = sum(entry.number in answering for entry in plan.before.entries)
    new = sum(entry.number in answering for entry in plan.kept) + len(plan.added)
    for which, there, quorum in (
        ("present", old, assess(plan.before, code).quorum),
        ("new", new, plan.assessment(code).quorum),
    ):
        if there < quorum.needed:
            plan.refusals.append(
                f"only {there} of the {quorum.needed} backends that the {which} fleet needs to publish (of "
                f"{quorum.backends}) are configured and answer now; try again when more do"
            )


def check_losses(plan: FleetPlan, now: Outcome, after: Outcome, k: int, *, accepted: bool) -> None:
    """Adds to `plan.refusals` which packs could not be read any more `after` what is given up; a note if `accepted`.

    What cannot be read `now` either is no reason: those backends do not hold it.
    """
    lost = after.lost_full + after.lost_written
    if lost <= now.lost_full + now.lost_written:
        return
    worst = ", ".join(f"{pack_id.hex()} ({spare + k} of {k})" for spare, pack_id, _ in after.worst if spare < 0)
    size = format_size(after.lost_bytes)
    if accepted:
        plan.notes.append(
            f"{counted(lost, 'pack')} with {size} of data would keep fewer than k = {k} shards: what the cache and "
            "the shards that are left hold of it is uploaded anew, the rest is lost; 'qsfs status' tells how much"
        )
        return
    plan.refusals.append(
        f"without what is given up {counted(lost, 'pack')} with {size} of data could not be read any more, with fewer "
        f"than k = {k} shards left; the worst: {worst}; bring backends back, or wait until what is missing has been "
        "made again; only if they are gone for good, save what is left with --accept-loss"
    )


def found_empty(fleet: Fleet, configured: Sequence[Configured]) -> frozenset[int]:
    """The entries at whose place something answers that has lost what they carried, and that are nowhere else."""
    there = {one.number for one in configured if one.shown is Shown.IDENTITY}
    emptied = {one.name for one in configured if one.shown is Shown.NOTHING}
    return frozenset(e.number for e in fleet.entries if name_of(e) in emptied and e.number not in there)


def _claims(fleet: Fleet, configured: Sequence[Configured], lost: Set[int], plan: FleetPlan) -> dict[int, Configured]:
    """Which entry each configured backend is; those that are new, or cannot be told, go into the plan."""
    by_name = {name_of(entry): entry for entry in fleet.entries}
    claimed: dict[int, Configured] = {}
    for one in sorted(configured, key=lambda one: (one.shown is not Shown.IDENTITY, one.name)):
        entry = fleet.entry(one.number) if one.shown is Shown.IDENTITY else by_name.get(one.name)
        if one.shown is Shown.IDENTITY and (entry is None or entry.identity != one.identity):
            _add(plan, one, f"carries a number that the fleet does not know ({one.number}) and gets a new one")
        elif entry is not None and entry.number in claimed:
            if one.shown is Shown.IDENTITY:
                plan.refusals.append(
                    f"{one.name} has the same identity as {claimed[entry.number].name} (entry {entry.number}): one is "
                    "a copy of the other, or they are one backend under two addresses; configure only the right one"
                )
            else:
                _fresh(plan, one)
        elif entry is None or entry.number in lost:
            if entry is None or one.shown is Shown.NOTHING:
                _fresh(plan, one)
        else:
            claimed[entry.number] = one
            if one.shown is Shown.NOTHING:
                plan.notes.append(
                    f"{one.name} has lost the identity of entry {entry.number}: it was emptied or made anew. If what "
                    f"it held is gone for good, 'qsfs fleet apply --lost {entry.number}' takes it up as a new backend"
                )
            elif one.shown is Shown.SILENCE:
                plan.notes.append(f"{one.name} stays entry {entry.number}, and does not answer now: {one.problem}")
            elif one.shown is Shown.DAMAGE:
                plan.notes.append(f"{one.name} stays entry {entry.number}, though: {one.problem}")
    return claimed


def _fresh(plan: FleetPlan, one: Configured) -> None:
    if one.shown in (Shown.NOTHING, Shown.IDENTITY):
        _add(plan, one, "")
    else:
        plan.refusals.append(f"{one.name} cannot be added: {one.problem or one.shown.value}")


def _add(plan: FleetPlan, one: Configured, why: str) -> None:
    plan.added.append(one)
    if why:
        plan.notes.append(f"{one.name} {why}")
    plan.told.append(f"add {one.name}{_place(one.group, one.node)}")


def _lose(plan: FleetPlan, entry: FleetEntry, answers: bool) -> None:
    if answers:
        plan.refusals.append(
            f"--lost {entry.number}: {name_of(entry)} answers, and what it holds may be needed; let it drain (drain = "
            "true), or disconnect it first"
        )
    plan.lost.append(entry)
    plan.told.append(f"give up {entry.number} {name_of(entry)}: what it held is made again from the other shards")


def _keep(plan: FleetPlan, entry: FleetEntry, one: Configured) -> None:
    known_place = one.shown is Shown.IDENTITY
    after = replace(
        entry,
        address=one.address if known_place else entry.address,
        namespace=one.namespace if known_place else entry.namespace,
        group=one.group,
        node=one.node,
        weight=one.weight,
        state=DRAINING if one.drain else ACTIVE,
    )
    plan.kept.append(after)
    if after.state != entry.state:
        what = "drain" if after.state == DRAINING else "use again"
        plan.told.append(f"{what} {entry.number} {name_of(entry)}")
    for attribute in ("address", "namespace", "group", "node", "weight"):
        old, new = getattr(entry, attribute), getattr(after, attribute)
        if old != new:
            plan.told.append(f"change {entry.number} {name_of(entry)}: {attribute} {old!r} becomes {new!r}")


def _remove(plan: FleetPlan, entry: FleetEntry, left: int | None, held_back: str) -> None:
    name = f"{entry.number} {name_of(entry)}"
    if entry.state == DRAINING and left == 0 and not held_back:
        plan.retired.append(entry)
        plan.told.append(f"retire {name}: nothing needs it any more")
        return
    plan.kept.append(replace(entry, state=DRAINING))
    if entry.state != DRAINING:
        plan.told.append(f"drain {name}: it is not configured any more")
        plan.notes.append(
            f"{name} still holds shards: keep it in the configuration, with drain = true, until it is retired. What is "
            "not configured is read by this mount only, not after the next start and not by a restore"
        )
    elif left:
        plan.notes.append(f"{name} is not retired yet: {counted(left, 'pack')} have a shard there")
    elif left is None:
        plan.notes.append(f"{name} is not retired yet: what it holds is being counted")
    else:
        plan.notes.append(f"{name} is not retired yet: {held_back}")


def _place(group: str, node: str) -> str:
    parts = [f"{kind} {name}" for kind, name in (("group", group), ("node", node)) if name]
    return f" ({', '.join(parts)})" if parts else ""
