"""Requests of `qsfs info`, `qsfs cache` and `qsfs drill` on the control socket; the first two start jobs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from qsfs.daemon.caching import Caching, Range
from qsfs.daemon.comparing import compare, compare_rows
from qsfs.daemon.informing import inform
from qsfs.daemon.jobs import Progress
from qsfs.daemon.walking import resolve
from qsfs.daemon.warming import warm_start
from qsfs.errors import MountError, QsfsError
from qsfs.format.head import HeadRef, Owner
from qsfs.remote.base import BASE_KEY, local_head
from qsfs.store.schema import Inode

if TYPE_CHECKING:
    from qsfs.daemon.service import Service

Handler = Callable[[Mapping[str, Any]], Awaitable[Any]]


class Operating:
    """The handlers of one mount.  What changes the cache is refused unless it is mounted and its disk works."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def handlers(self) -> dict[str, Handler]:
        """The handlers by command."""
        return {
            "info": self._info,
            "cache": self._cache,
            "compare": self._compare,
            "job": self._job,
            "job-cancel": self._job_cancel,
        }

    async def _info(self, request: Mapping[str, Any]) -> Any:
        self._require_mounted()
        service = self._service
        root = resolve(service.namespace.tree, _text(request, "path"))

        async def work(progress: Progress) -> Any:
            return await inform(
                service.store,
                service.namespace.tree,
                service.contents,
                service.fetcher.reader.members,
                service.opened.superblock.code.k,
                root,
                progress,
                extents=bool(request.get("extents")),
                first_page=_number(request, "first_page") or 0,
            )

        return await service.jobs.start(work)

    async def _cache(self, request: Mapping[str, Any]) -> Any:
        self._require_mounted()
        service = self._service
        what = _text(request, "what")
        caching = Caching(service.store, service.namespace.tree, service.fetcher, service.committer)
        roots = self._roots(request)
        if what in ("pin", "unpin") and not service.state.writable:
            raise MountError(f"the mount is read-only: {service.state.reason}")
        part = Range(_number(request, "start") or 0, _number(request, "stop"))
        works: dict[str, Callable[[Progress], Awaitable[Any]]] = {
            "evict": lambda progress: caching.evict(roots, progress),
            "warm": lambda progress: caching.warm(roots, part, progress),
            "warm-pinned": caching.warm_pinned,
            "warm-start": lambda progress: warm_start(service.store, service.fetcher, service.committer, progress),
            "pin": lambda progress: caching.pin(roots, progress),
            "unpin": lambda _: caching.unpin(roots),
            "status": lambda _: caching.status(),
        }
        work = works.get(what)
        if work is None:
            raise QsfsError(f"{what}: unknown to this daemon, which is of another version; remount it")
        return await service.jobs.start(work)

    async def _compare(self, request: Mapping[str, Any]) -> Any:
        service = self._service
        if "rows" not in request:
            return await compare(service.store, request.get("extents") or ())
        base = local_head(service.store, BASE_KEY, service.opened.keys)
        epoch, mount, generation, digest = request["generation"]
        ref = HeadRef(Owner(epoch, bytes.fromhex(mount)), generation, bytes.fromhex(digest))
        return await compare_rows(service.store, None if base is None else base.sealed.ref, ref, request["rows"])

    async def _job(self, request: Mapping[str, Any]) -> Any:
        return await self._service.jobs.ask(_number(request, "number") or 0)

    async def _job_cancel(self, request: Mapping[str, Any]) -> Any:
        self._service.jobs.cancel(_number(request, "number") or 0)
        return {}

    def _roots(self, request: Mapping[str, Any]) -> list[Inode]:
        tree = self._service.namespace.tree
        paths = request.get("paths") or []
        if not isinstance(paths, list):
            raise QsfsError("a request that this daemon cannot read: it is of another version; remount it")
        return [resolve(tree, str(path)) for path in paths]

    def _require_mounted(self) -> None:
        service = self._service
        if service.phase != "mounted":
            raise MountError(f"the daemon is {service.phase}: {service.waiting_for or 'try again'}")


def _text(request: Mapping[str, Any], name: str) -> str:
    return str(request.get(name) or "")


def _number(request: Mapping[str, Any], name: str) -> int | None:
    value = request.get(name)
    return value if isinstance(value, int) and value >= 0 else None
