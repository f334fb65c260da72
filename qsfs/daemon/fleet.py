"""`qsfs fleet` on a mount: which backends the file system has, and changing that to what is configured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import trio

from qsfs.config import BackendConfig, Config
from qsfs.daemon.connect import SUPERBLOCK_ROW, prepare_namespaces
from qsfs.daemon.descriptors import require_descriptors
from qsfs.daemon.placing import Known, broken_by_fleet, read_known, read_table
from qsfs.daemon.promises import promises_of
from qsfs.errors import BackendError, BackendRefused, ConfigError, Corrupt, FormatMismatch, MountError, NotFound
from qsfs.format.erasure import CodeParams
from qsfs.format.fleet import Fleet, FleetEntry
from qsfs.format.identity import BackendIdentity
from qsfs.format.superblock import encode_superblock
from qsfs.remote.fleet_change import FleetChange, Joining, held_back
from qsfs.remote.fleet_plan import (
    Configured,
    FleetPlan,
    Shown,
    check_losses,
    check_plan,
    found_empty,
    lost_entries,
    name_of,
    plan_change,
)
from qsfs.remote.flush import Flusher
from qsfs.remote.generation import Generations
from qsfs.remote.identity import ask_anew, identify
from qsfs.remote.losses import Loss
from qsfs.remote.members import OUTSIDE, Candidate, Member, Members, State
from qsfs.remote.quorum import assess

if TYPE_CHECKING:
    from qsfs.daemon.service import Service

_ASK_SECONDS = 10.0
_REFUSED_SECONDS = 2.0


def describe_fleet(fleets: Sequence[Fleet], members: Members | None, left: Mapping[int, int] | None) -> dict[str, Any]:
    """What `fleet list` shows.  `members` are the backends as this mount knows them (None: not mounted)."""
    entries = {entry.number: entry for fleet in fleets for entry in fleet.entries}
    rows = [_described(entry, fleets, members, left) for _, entry in sorted(entries.items())]
    outside = [] if members is None else [m for m in members if m.entry.state == OUTSIDE]
    return {
        "fleets": [fleet.number for fleet in fleets],
        "changing": len(fleets) > 1,
        "backends": rows,
        "outside": [{"number": member.number, "name": member.name} for member in outside],
    }


def _described(
    entry: FleetEntry, fleets: Sequence[Fleet], members: Members | None, left: Mapping[int, int] | None
) -> dict[str, Any]:
    state = entry.state
    if len(fleets) > 1:
        before, after = (fleet.entry(entry.number) for fleet in fleets)
        state = "joining" if before is None else "leaving" if after is None else after.state
    return {
        "number": entry.number,
        "name": name_of(entry),
        "address": entry.address,
        "namespace": entry.namespace,
        "group": entry.group,
        "node": entry.node,
        "weight": entry.weight,
        "state": state,
        "reachable": None if members is None else _reachable(members.by_number(entry.number)),
        "packs_left": None if left is None else left.get(entry.number),
    }


def _reachable(member: Member | None) -> str:
    if member is None:
        return "not configured"
    if not member.identified:
        return "not identified"
    return "yes" if member.state is State.UP else member.state.value


class FleetRequests:
    """Answers the two requests of one mount; one change at a time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._busy = False

    async def show(self, _: Mapping[str, Any]) -> Any:
        """`fleet list`."""
        service = self._service
        flusher = service.flushing.flusher
        left = None if flusher is None or flusher.generations is None else flusher.drainer.left
        return describe_fleet(service.flushing.fleets, service.flushing.members, left)

    async def apply(self, request: Mapping[str, Any]) -> Any:
        """`fleet apply`.  Raises `ConfigError` for what is refused, `MountError` while another change is under way."""
        service = self._service
        flusher = await service.flushing.owned()
        while not flusher.knows_packs or flusher.generations is None:
            await flusher.progress()
        if self._busy or len(flusher.generations.fleets) > 1:
            waits = "; ".join(service.flushing.waits()) or "its next head"
            raise MountError(f"the fleet is being changed already, which waits for: {waits}")
        self._busy = True
        try:
            config = await trio.to_thread.run_sync(Config.load, str(request["config"]))
            if config.cache.directory != service.config.cache.directory:
                raise ConfigError(f"{config.path}: is of another cache directory than this mount's")
            lost = [str(word) for word in request.get("lost", ())]
            applying = _Applying(
                service, flusher, flusher.generations, config, lost, accept_loss=bool(request.get("accept_loss"))
            )
            try:
                return await applying.run(dry_run=bool(request.get("dry_run")))
            finally:
                await applying.close()
        finally:
            self._busy = False


class _Applying:
    """One `fleet apply`."""

    def __init__(
        self,
        service: Service,
        flusher: Flusher,
        generations: Generations,
        config: Config,
        lost: Sequence[str],
        *,
        accept_loss: bool,
    ) -> None:
        self._service = service
        self._flusher = flusher
        self._generations = generations
        self._config = config
        self._before = generations.fleets[-1]
        self._lost = lost_entries(self._before, lost)
        self._accept_loss = accept_loss
        self._code: CodeParams = service.opened.superblock.code
        self._members = flusher.context.uploader.members
        self._candidates: dict[str, Candidate] = {}
        self._new_links: list[Candidate] = []

    async def close(self) -> None:
        """Closes connections that were opened and are not used by any member."""
        used = {id(member.data) for member in self._members}
        for candidate in self._new_links:
            if id(candidate.data) not in used:
                await self._service.links.drop(candidate)

    async def run(self, *, dry_run: bool) -> dict[str, Any]:
        configs = {backend.name: backend for backend in self._config.backends}
        configured = await self._ask_all(dry_run=dry_run)
        await self._ask_lost()
        packs_left = await self._flusher.drainer.count()
        answering = {m.number for m in self._members if m.identified and m.state is State.UP}
        plan = plan_change(
            self._before,
            configured,
            lost=self._lost,
            packs_left=packs_left,
            answering=answering,
            held_back=held_back(self._service.store, self._generations.kept) or self._flusher.drainer.held_back,
        )
        here = {one.number for one in configured if one.shown is Shown.IDENTITY}
        check_plan(plan, self._code, answering | here)
        self._check_promises(plan)
        await self._check_losses(plan, configured)
        if dry_run:
            return self._answer(plan, done=False)
        if plan.refusals:
            raise ConfigError(f"{self._config.path}: the fleet is not changed: {'; '.join(plan.refusals)}")
        self._reconnect(configured)
        if not plan.changes:
            return self._answer(plan, done=False)
        control = await prepare_namespaces([configs[one.name] for one in plan.added], self._service.clock)
        joining = [Joining(one, self._candidates[one.name], control[one.name]) for one in plan.added]
        store, opened = self._service.store, self._service.opened
        superblock = store.local(SUPERBLOCK_ROW) or encode_superblock(
            opened.superblock, opened.keys, self._service.clock
        )
        change = FleetChange(self._flusher, self._generations, opened.keys, superblock, self._service.clock)
        await change.run(plan, joining)
        return self._answer(plan, done=True)

    def _answer(self, plan: FleetPlan, *, done: bool) -> dict[str, Any]:
        before, after = assess(self._before, self._code), plan.assessment(self._code)
        return {
            "changed": done,
            "changes": plan.told,
            "notes": plan.notes,
            "refusals": plan.refusals,
            "fleet": self._generations.fleets[-1].number,
            "quorum_before": [before.quorum.needed, before.quorum.backends],
            "quorum_after": [after.quorum.needed, after.quorum.backends],
            "sentences": [*after.sentences(), after.may_be_down()],
            "warnings": list(after.warnings()),
        }

    # who the configured backends are

    async def _ask_all(self, *, dry_run: bool) -> list[Configured]:
        found: list[Configured] = []
        links = self._service.links
        new = [backend for backend in self._config.backends if links.find(backend) is None]
        require_descriptors(len(links.candidates) + len(new))

        async def ask(backend: BackendConfig) -> None:
            found.append(await self._ask(backend, dry_run=dry_run))

        async with trio.open_nursery() as nursery:
            for backend in self._config.backends:
                nursery.start_soon(ask, backend)
        return found

    async def _ask(self, backend: BackendConfig, *, dry_run: bool) -> Configured:
        links, clock = self._service.links, self._service.clock
        candidate = links.find(backend)
        if candidate is None:
            candidate = links.add(backend, clock)
            self._new_links.append(candidate)
        self._candidates[backend.name] = candidate
        one = Configured(backend.address, backend.namespace, backend.group, backend.node, backend.weight, backend.drain)
        named = next((entry for entry in self._before.entries if name_of(entry) == one.name), None)
        may_be_made = named is None or named.number in self._lost
        try:
            if named is None and not dry_run:
                await prepare_namespaces([backend], clock)
            try:
                identity = await self._identity(candidate)
            except BackendRefused:
                # The namespace has gone with what is lost, most likely.
                if dry_run or not may_be_made:
                    raise
                await prepare_namespaces([backend], clock)
                # Connections that were refused are not tried again at once.
                await trio.sleep(_REFUSED_SECONDS)
                identity = await self._identity(candidate)
        except NotFound:
            return replace(one, shown=Shown.NOTHING)
        except BackendRefused as error:
            shown = Shown.NOTHING if may_be_made and dry_run else Shown.SILENCE
            return replace(one, shown=shown, problem=str(error))
        except BackendError as error:
            return replace(one, shown=Shown.SILENCE, problem=str(error))
        except (Corrupt, FormatMismatch) as error:
            return replace(one, shown=Shown.DAMAGE, problem=str(error))
        return replace(one, number=identity.number, identity=identity.identity)

    async def _identity(self, candidate: Candidate) -> BackendIdentity:
        return await ask_anew(candidate, self._members, self._service.opened.keys, _ASK_SECONDS)

    async def _ask_lost(self) -> None:
        """Sees whether what is said to be lost answers after all, also where nobody needed it for a while."""
        with trio.move_on_after(_ASK_SECONDS):
            for member in self._members.of(self._lost):
                await identify(member, self._service.opened.keys)

    def _reconnect(self, configured: Sequence[Configured]) -> None:
        """Uses the configured connections of entries that are elsewhere now, or had none."""
        by_name = {name_of(entry): entry for entry in self._before.entries}
        for one in configured:
            shown = one.shown is Shown.IDENTITY
            entry = self._before.entry(one.number) if shown else by_name.get(one.name)
            if entry is None or (shown and entry.identity != one.identity) or entry.number in self._lost:
                continue
            member, candidate = self._members.by_number(entry.number), self._candidates[one.name]
            if member is not None and (not shown or member.data is candidate.data):
                continue
            self._members.remove(entry.number)
            control = candidate.control(entry.control_namespace)
            self._members.add(Member(entry, candidate.data, control, self._service.clock))

    # what may not be

    def _check_promises(self, plan: FleetPlan) -> None:
        promises = promises_of(self._config)
        before = broken_by_fleet([self._before], self._code, promises)
        broken = broken_by_fleet([plan.imagined()], self._code, promises)
        (plan.notes if before else plan.refusals).extend(broken)

    async def _check_losses(self, plan: FleetPlan, configured: Sequence[Configured]) -> None:
        """Refuses to give up backends without which a pack could not be read any more, unless that is accepted.

        What rows place on a backend that was just found empty is not there.
        """
        if not plan.lost:
            return
        environment, clock = self._service.store.environment, self._service.clock
        await self._flusher.context.committer.commit()
        known = read_known(environment, self._service.opened.keys)
        numbers = frozenset(entry.number for entry in plan.lost)
        empty = found_empty(self._before, configured)
        losses = [Loss("", empty), Loss("", numbers | empty)]
        table = await read_table(environment, clock, Known((self._before,), known.packs), self._code, losses)
        now, after = table.outcomes
        check_losses(plan, now, after, self._code.k, accepted=self._accept_loss)
