"""Requests on the control socket about what lies on the backends: sync, collect, snapshots, keys, placement, fleet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from qsfs.daemon.fleet import FleetRequests
from qsfs.daemon.snapshots import Snapshots, described
from qsfs.daemon.syncing import CLASSES, sync_to
from qsfs.errors import MountError, QsfsError

if TYPE_CHECKING:
    from qsfs.daemon.service import Service

Handler = Callable[[Mapping[str, Any]], Awaitable[Any]]


class Requesting:
    """The handlers of one mount, which refuse what needs parts of it that are not there yet."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._made_snapshots: Snapshots | None = None
        self._fleet = FleetRequests(service)

    def handlers(self) -> dict[str, Handler]:
        """The handlers by command."""
        return {
            "sync": self._sync,
            "collect": self._collect,
            "placement": self._placement,
            "fleet": self._fleet_list,
            "fleet-apply": self._fleet_apply,
            "keys": self._keys,
            "snapshot-create": self._snapshot_create,
            "snapshot-cut": self._snapshot_cut,
            "snapshot-hold": self._snapshot_hold,
            "snapshot-abandon": self._snapshot_abandon,
            "snapshot-list": self._snapshot_list,
            "snapshot-delete": self._snapshot_delete,
        }

    def _require(self, ready: bool) -> None:
        if not ready:
            service = self._service
            raise MountError(f"the daemon is {service.phase}: {service.waiting_for or 'try again'}")

    def _require_mounted(self) -> None:
        self._require(self._service.phase == "mounted")

    async def _sync(self, request: Mapping[str, Any]) -> Any:
        self._require_mounted()
        service = self._service
        wanted, timeout = request.get("class"), request.get("seconds")
        if wanted is None and timeout is None:
            return await service.flushing.sync()
        wanted = "written" if wanted is None else wanted
        if wanted not in CLASSES:
            raise QsfsError(f"sync: no class {wanted!r}; it can be one of: {', '.join(CLASSES)}")
        return await sync_to(service.flushing, service.committer, wanted, None if timeout is None else float(timeout))

    async def _collect(self, request: Mapping[str, Any]) -> Any:
        self._require_mounted()
        return await self._service.flushing.collect(dry_run=bool(request.get("dry_run")))

    async def _placement(self, request: Mapping[str, Any]) -> Any:
        self._require(hasattr(self._service, "placing"))
        return await self._service.placing.check([str(word) for word in request.get("lose", ())])

    async def _fleet_list(self, request: Mapping[str, Any]) -> Any:
        self._require(hasattr(self._service, "flushing"))
        return await self._fleet.show(request)

    async def _fleet_apply(self, request: Mapping[str, Any]) -> Any:
        self._require_mounted()
        return await self._fleet.apply(request)

    async def _keys(self, _: Mapping[str, Any]) -> Any:
        """Takes up key slots that a command has changed; answers with what holds now."""
        self._require(hasattr(self._service, "key_upkeep"))
        await self._service.key_upkeep.look()
        return self._service.key_upkeep.status()

    async def _snapshots(self) -> Snapshots:
        """The mount's snapshots, once it owns the file system; raises why it does not."""
        self._require_mounted()
        service = self._service
        flusher = await service.flushing.owned()
        if self._made_snapshots is None:
            self._made_snapshots = Snapshots(service.store, service.contents, service.committer, flusher.pinning)
        return self._made_snapshots

    async def _snapshot_create(self, request: Mapping[str, Any]) -> Any:
        return await (await self._snapshots()).create(request["name"])

    async def _snapshot_cut(self, request: Mapping[str, Any]) -> Any:
        return await (await self._snapshots()).cut(request["name"], request["held_seconds"], request["ticket"])

    async def _snapshot_hold(self, request: Mapping[str, Any]) -> Any:
        return await (await self._snapshots()).hold(request["ticket"])

    async def _snapshot_abandon(self, request: Mapping[str, Any]) -> Any:
        return await (await self._snapshots()).abandon(request["ticket"])

    async def _snapshot_list(self, _: Mapping[str, Any]) -> Any:
        self._require_mounted()
        return [described(snapshot) for snapshot in self._service.flushing.snapshots]

    async def _snapshot_delete(self, request: Mapping[str, Any]) -> Any:
        return await (await self._snapshots()).delete(request["name"])
