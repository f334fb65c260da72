"""Changes of the fleet: servers are configured, drained and taken out, and some machine applies that."""

from __future__ import annotations

from dataclasses import replace

from qsfs.daemon.connect import SUPERBLOCK_ROW
from qsfs.errors import BackendError, NotFound
from qsfs.remote.fleet_change import FleetChange, Joining, held_back
from qsfs.remote.fleet_plan import Configured, Shown, check_plan, plan_change
from qsfs.remote.identity import ask_anew
from qsfs.remote.members import Candidate, Members, State
from tests.simulation.cluster import Cluster
from tests.simulation.machine import Life


class Configuration:
    """What the operator's configuration says of servers, by their numbers in the cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.listed = list(cluster.numbers[: -cluster.spare])
        self.drained: set[int] = set()

    def change(self) -> str:
        """One more server, one less, or one that is to be emptied; says which."""
        cluster, chance = self._cluster, self._cluster.chance
        unused = [number for number in cluster.numbers if number not in self.listed]
        if unused and (self.drained or chance.random() < 0.7):
            number = chance.choice(unused)
            self.listed.append(number)
            return f"server {number} is new"
        if self.drained:
            number = self.drained.pop()
            self.listed.remove(number)
            return f"server {number} is no longer configured"
        number = chance.choice([number for number in self.listed if number not in cluster.liars])
        self.drained.add(number)
        return f"server {number} is to be emptied"

    async def apply(self, life: Life, lost: int = 0) -> str:
        """`fleet apply` on a mount, with a server that is given up as lost; what was changed.

        Raises as the command does.
        """
        flusher = await life.flushing.owned()
        while not flusher.knows_packs or flusher.generations is None or len(flusher.generations.fleets) > 1:
            await flusher.publish_all()
        generations, keys, store = flusher.generations, self._cluster.world.keys, flusher.context.store
        members = flusher.context.uploader.members
        candidates = {life.links.candidates[number - 1].name: number for number in self.listed}
        configured = [await self._ask(life, number, members) for number in candidates.values()]
        answering = {member.number for member in members if member.identified and member.state is State.UP}
        plan = plan_change(
            generations.fleets[-1],
            configured,
            lost={entry for entry, server in self._cluster.server_of.items() if server == lost},
            packs_left=await flusher.drainer.count(),
            answering=answering,
            held_back=held_back(store, generations.kept) or flusher.drainer.held_back,
        )
        check_plan(plan, self._cluster.world.code, answering)
        if plan.refusals or not plan.changes:
            return f"refused: {plan.refusals}"
        joining = []
        for one in plan.added:
            candidate = life.links.candidates[candidates[one.name] - 1]
            joining.append(Joining(one, candidate, candidate.control_namespace))
        superblock = store.local(SUPERBLOCK_ROW)
        assert superblock is not None
        change = FleetChange(flusher, generations, keys, superblock, life.machine.clock)
        fleet = await change.run(plan, joining)
        return f"fleet {fleet.number} has {[entry.number for entry in fleet.entries]}"

    async def _ask(self, life: Life, number: int, members: Members) -> Configured:
        candidate: Candidate = life.links.candidates[number - 1]
        one = Configured(candidate.address, candidate.namespace, drain=number in self.drained)
        try:
            identity = await ask_anew(candidate, members, self._cluster.world.keys, 5.0)
        except NotFound:
            return replace(one, shown=Shown.NOTHING)
        except BackendError as error:
            return replace(one, shown=Shown.SILENCE, problem=str(error))
        return replace(one, number=identity.number, identity=identity.identity)
