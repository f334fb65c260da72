"""The fence quorum, and what a fleet of some size can lose: pure arithmetic and sentences.

With N backends, m parity shards and f the larger of m and the largest group, the fence quorum is

    Q = max(N // 2 + 1, min(N - f, ceil((N + f + 1) / 2)))

Two quorums share 2Q - N backends, so 2Q - N - 1 of them may be stale or lie; N - Q may be down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from qsfs.errors import QsfsBug
from qsfs.format.erasure import CodeParams
from qsfs.format.fleet import ACTIVE, Fleet
from qsfs.remote.reasons import listed
from qsfs.values import counted


@dataclass(frozen=True, slots=True)
class FenceQuorum:
    """How many of `backends` (N) must answer (`needed`, Q) to own, and for a head to be published."""

    backends: int
    needed: int

    @property
    def may_be_down(self) -> int:
        """N - Q: so many backends may be unreachable and heads are still published."""
        return self.backends - self.needed

    @property
    def may_be_stale(self) -> int:
        """2Q - N - 1: so many that answer may have lost what they acknowledged, or lie."""
        return 2 * self.needed - self.backends - 1


def fence_quorum(backends: int, parity: int, largest_group: int) -> FenceQuorum:
    """The fence quorum of so many backends with m = `parity`; all counts are of backends."""
    if backends < 1 or parity < 0 or not 1 <= largest_group <= backends:
        raise QsfsBug(f"no quorum of {backends} backends, m = {parity}, largest group {largest_group}")
    losses = max(parity, largest_group)
    wanted = min(backends - losses, (backends + losses + 2) // 2)
    return FenceQuorum(backends, max(backends // 2 + 1, wanted))


def group_sizes(groups: Iterable[str]) -> list[int]:
    """How many backends are in each group, given the group of each; "" is a group of its own."""
    names = list(groups)
    named = Counter(name for name in names if name)
    return [*named.values(), *[1] * names.count("")]


@dataclass(frozen=True, slots=True)
class FleetQuorum:
    """The fence quorum of one fleet, with the numbers of its entries, and their names for messages."""

    fleet: int
    numbers: frozenset[int]
    quorum: FenceQuorum
    names: Mapping[int, str] = field(default_factory=dict, compare=False)

    def short(self, answered: Set[int]) -> int:
        """How many more of the fleet's backends must answer; 0 when the quorum is reached."""
        return max(0, self.quorum.needed - len(self.numbers & answered))

    def withstands(self, answered: Set[int]) -> int:
        """a - (N - Q + 1): how many of those that answered may be lost, stale or lying.

        Below 0 a newer published head may lie where nobody answered.
        """
        return len(self.numbers & answered) - (self.quorum.backends - self.quorum.needed + 1)


def fleet_quorums(fleets: Collection[Fleet], code: CodeParams) -> tuple[FleetQuorum, ...]:
    """The quorum of each fleet that a head names: it counts only with all of them."""
    return tuple(
        FleetQuorum(
            fleet.number,
            frozenset(entry.number for entry in fleet.entries),
            fence_quorum(len(fleet.entries), code.m, max(_groups(fleet), default=0)),
            {entry.number: f"{entry.address}/{entry.namespace}" for entry in fleet.entries},
        )
        for fleet in fleets
    )


def reached(quorums: Collection[FleetQuorum], answered: Set[int]) -> bool:
    """Whether the backends with these numbers are a quorum of every fleet; never of none."""
    return bool(quorums) and not any(quorum.short(answered) for quorum in quorums)


def withstands(quorums: Collection[FleetQuorum], answered: Set[int]) -> int:
    """The least that any of the fleets withstands; see `FleetQuorum.withstands`."""
    return min((quorum.withstands(answered) for quorum in quorums), default=-1)


def describe_shortage(quorums: Collection[FleetQuorum], answered: Set[int]) -> str:
    """What is missing, for messages: "fleet 1: 3 of the 4 backends needed (of 6) answered, without ..."."""
    return "; ".join(
        f"fleet {quorum.fleet}: {len(quorum.numbers & answered)} of the {quorum.quorum.needed} backends "
        f"needed (of {quorum.quorum.backends}) answered{_without(quorum, answered)}"
        for quorum in quorums
        if quorum.short(answered)
    )


def _without(quorum: FleetQuorum, answered: Set[int]) -> str:
    silent = [f"{number} {quorum.names[number]}" for number in quorum.numbers - answered if number in quorum.names]
    return f", without {listed(silent)}" if silent else ""


@dataclass(frozen=True, slots=True)
class FleetAssessment:
    """What a fleet with this code withstands: what `format` and `status` say."""

    code: CodeParams
    quorum: FenceQuorum
    largest_group: int
    groups: int
    draining: int = 0

    @property
    def shards_in_a_group(self) -> int:
        """The most shards of one pack that placement puts into one group."""
        return min(self.largest_group, -(-self.code.n // self.groups))

    @property
    def down_while_flushing(self) -> int:
        """Backends that may be down while packs are still written; negative if none can be."""
        return self.quorum.backends - self.draining - self.code.write_quorum

    @property
    def down_while_full(self) -> int:
        """Backends that may be down while packs still become full; negative if none can be."""
        return self.quorum.backends - self.draining - self.code.n

    @property
    def down_while_publishing(self) -> int:
        """Backends that may be down while generations go on: packs written, and heads published."""
        return min(self.down_while_flushing, self.quorum.may_be_down)

    def sentences(self) -> tuple[str, ...]:
        """The facts, in the order in which they matter to an operator."""
        code, quorum = self.code, self.quorum
        return (
            f"{quorum.backends} backends, {code.k} data and {code.m} parity shards ({code.codec}): a full "
            f"pack survives the loss of {counted(code.m, 'shard')}, one that is only written of "
            f"{code.write_quorum - code.k}.",
            f"The fence quorum is {quorum.needed} of {quorum.backends}: {quorum.may_be_down} may be down, "
            f"{quorum.may_be_stale} may be stale or lie.",
            f"Flushing goes on with {counted(max(0, self.down_while_publishing), 'backend')} down; packs become full "
            f"with up to {max(0, self.down_while_full)} down.",
        )

    def may_be_down(self) -> str:
        """What may be down for reading, for flushing, and for a restore that proves what it found."""
        code, proof, flushing = self.code, self.quorum.needed - 1, self.down_while_publishing
        written = code.write_quorum - code.k
        lacking = f"not even 0, as {counted(-flushing, 'backend')} that would take shards are lacking"
        return (
            f"May be down: for reading, {code.m} (for what is only written, {written}); for flushing, "
            f"{lacking if flushing < 0 else flushing}; for a restore that proves its generation to be the newest, "
            f"{min(code.m, proof)} (if that is only written, {min(written, proof)}), and for writing on there, "
            f"{'not even 0' if flushing < 0 else min(code.m, flushing)}."
        )

    def outage(self, down: int) -> tuple[str, ...]:
        """What it means that so many backends do not answer now; nothing while all do."""
        if not down:
            return ()
        code = self.code
        silent = f"{down} of {self.quorum.backends} backends {'does' if down == 1 else 'do'} not answer"
        if down < code.m:
            found = [f"{silent}: what is full on the backends survives the loss of {code.m - down} more"]
        elif down == code.m:
            found = [f"{silent}: what is only on the backends can be read; with one more gone, not all of it"]
        else:
            found = [
                f"{silent}, more than m = {code.m}: not all that is only on the backends can be read until "
                f"{down - code.m} of them return"
            ]
        if down > self.down_while_publishing:
            back = down - max(0, self.down_while_publishing)
            found.append(f"nothing new gets safe on the backends until {back} of them return")
        elif down > self.down_while_full:
            found.append("new packs are written, and become full when enough of them return")
        return tuple(found)

    def warnings(self) -> tuple[str, ...]:
        """Where the fleet falls short of m; each says how many backends would do."""
        code, quorum = self.code, self.quorum
        found: list[str] = []
        taking = quorum.backends - self.draining
        if taking < code.n:
            found.append(
                f"{taking} backends cannot hold {code.n} shards of a pack on as many backends: "
                "packs never "
                f"become full, and nothing is evicted without an alarm; have at least {code.n} backends"
            )
        if quorum.may_be_down < code.m:
            found.append(
                f"heads are no longer published with more than {quorum.may_be_down} backends down, fewer "
                "than "
                f"m = {code.m}"
            )
        if quorum.may_be_stale < code.m:
            found.append(
                f"ownership withstands {quorum.may_be_stale} stale or lying backends, fewer than m = {code.m}"
            )
        flushing = code.write_quorum + code.m
        if self.down_while_flushing < code.m:
            found.append(
                f"flushing stops with more than {max(0, self.down_while_flushing)} backends down, fewer than "
                f"m = {code.m}; it goes on with {code.m} down from {flushing} backends"
            )
        if self.down_while_full < code.m:
            found.append(
                f"packs become full with at most {max(0, self.down_while_full)} backends down; with m = "
                f"{code.m} "
                f"down from {code.n + code.m} backends"
            )
        if self.shards_in_a_group > code.m:
            found.append(
                f"the loss of one group may take {self.shards_in_a_group} shards of a pack, more than "
                f"m = {code.m}; spread the backends over more groups"
            )
        return tuple(found)


def assess(fleet: Fleet, code: CodeParams) -> FleetAssessment:
    """What `fleet` withstands with `code`."""
    found = assess_groups([entry.group for entry in fleet.entries], code)
    return replace(found, draining=sum(entry.state != ACTIVE for entry in fleet.entries))


def assess_groups(groups: Sequence[str], code: CodeParams) -> FleetAssessment:
    """What as many backends as there are `groups`, the group of each, withstand with `code`."""
    sizes = group_sizes(groups)
    largest = max(sizes, default=0)
    return FleetAssessment(code, fence_quorum(len(groups), code.m, largest), largest, len(sizes))


def _groups(fleet: Fleet) -> list[int]:
    return group_sizes(entry.group for entry in fleet.entries)
