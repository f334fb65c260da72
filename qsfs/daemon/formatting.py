"""`format`: a new file system on the backends, and the local store that goes with it.

The local store is built aside and moved into place when the backends have the first generation, so
that a format that fails leaves a cache directory without a file system.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from qsfs.clock import Clock
from qsfs.config import Config
from qsfs.daemon.connect import SUPERBLOCK_ROW, links, prepare_namespaces
from qsfs.daemon.host import host_name
from qsfs.daemon.lock import CacheLock, require_access
from qsfs.daemon.promises import require_promises
from qsfs.daemon.secret import read_secret
from qsfs.errors import CacheError, ConfigError
from qsfs.filesystem.namespace import make_root
from qsfs.format.erasure import Code, CodeParams
from qsfs.format.head import MetadataPack
from qsfs.format.passphrase import KdfCost
from qsfs.format.slots import Secret
from qsfs.format.superblock import encode_superblock
from qsfs.remote.base import record_base
from qsfs.remote.format_fs import FirstGeneration, FormatContext, FormatReport, format_fs
from qsfs.remote.images import refuse_images
from qsfs.remote.packing import RowPacker, Sealer
from qsfs.remote.placement import FreeSpace
from qsfs.remote.spool import Spool
from qsfs.remote.upload import Uploader
from qsfs.store.environment import Environment
from qsfs.store.limits import Limits
from qsfs.store.schema import BLOCK_SIZE, SCHEMA_VERSION, Table
from qsfs.store.snapshot import CommittedState
from qsfs.store.store import FSID_KEY, Store

_FORMING = "forming"
_SPOOL = "spool"
_STEP_BYTES = 1 << 20
_FILES = ("journal.0", "journal.1", "data.mdb")


@dataclass(frozen=True, slots=True)
class _Root:
    """Who owns the root directory of a new file system: whoever makes it."""

    uid: int = field(default_factory=os.geteuid)
    gid: int = field(default_factory=os.getegid)
    umask: int = 0o22
    pid: int = 0


def local_store_exists(directory: Path) -> bool:
    """Whether the cache directory holds a local store.  `CacheError` if this user may not know."""
    require_access(directory)
    return (directory / "data.mdb").exists()


async def format_file_system(
    config: Config,
    clock: Clock,
    *,
    force: bytes | None = None,
    secret: Secret | None = None,
    cost: KdfCost | None = None,
) -> FormatReport:
    """Makes the file system that `config` describes; raises as `format_fs` does, and `CacheError`.

    It opens with `secret` (default: the configured one); `cost` is of a passphrase.  `force` is the id of the
    one file system that may be lost, on the backends and in the cache directory.
    """
    directory = config.cache.directory
    if not directory.is_dir():
        raise CacheError(f"{directory}: the cache directory does not exist; 'qsfs init' makes it")
    code = CodeParams(
        config.code.data_shards, config.code.data_shards + config.code.parity_shards, config.code.codec
    )
    require_promises(config, code)
    if draining := [backend.name for backend in config.backends if backend.drain]:
        raise ConfigError(f"{config.path}: drain = true means nothing in a new file system: {', '.join(draining)}")
    secret = read_secret(config, secret)
    lock = CacheLock(directory)
    try:
        _check_free(directory, force, Limits.of(config.cache, config.flush.spool_bytes).map_bytes)
        found = links(config, clock)
        try:
            control = await prepare_namespaces(config.backends, clock)
            candidates = [replace(c, control_namespace=control[c.name]) for c in found.candidates]
            forming = _Forming(config, clock)
            try:
                report = await format_fs(
                    candidates,
                    secret=secret,
                    code=code,
                    cost=cost,
                    clock=clock,
                    host=host_name(),
                    prepare_root=forming.prepare_root,
                    store_before_send=forming.store_before_send,
                    label=config.filesystem.label,
                    block_size=BLOCK_SIZE,
                    force=force,
                )
                forming.finish(report)
            finally:
                forming.close()
        finally:
            await found.aclose()
    finally:
        lock.release()
    return report


def _check_free(directory: Path, force: bytes | None, map_bytes: int) -> None:
    shutil.rmtree(directory / _FORMING, ignore_errors=True)
    refuse_images(directory)
    if not local_store_exists(directory):
        return
    mine = _local_file_system(directory, map_bytes)
    if force is None:
        which = "a file system" if mine is None else f"file system {mine.hex()}"
        raise CacheError(
            f"{directory}: holds the local state of {which}; use another cache directory, or give its id to "
            "--force to lose it"
        )
    if mine is not None and mine != force:
        raise CacheError(
            f"{directory}: holds the local state of file system {mine.hex()}, and --force names "
            f"{force.hex()}; use another cache directory, or move what this one holds away"
        )


def _local_file_system(directory: Path, map_bytes: int) -> bytes | None:
    """The id of the file system whose local store lies in `directory`, None if it says none."""
    environment = Environment(directory, map_bytes, readonly=True)
    try:
        view = environment.read()
        try:
            row = view.get(Table.LOCAL, FSID_KEY)
            return bytes(row) if row else None
        finally:
            view.close()
    finally:
        environment.close()


def _flush(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Forming:
    """The local store of a file system that is being made."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._aside = config.cache.directory / _FORMING
        self._aside.mkdir(mode=0o700)
        self._limits = Limits.of(config.cache, config.flush.spool_bytes)
        self._spool = Spool(self._aside / _SPOOL, self._limits.spool_bytes)
        self._store: Store | None = Store(self._aside, self._limits, clock)
        make_root(self._store, _Root())
        self._commit(self._store)

    def _commit(self, store: Store) -> None:
        group = store.seal()
        store.commit(group)
        store.committed(group)

    async def store_before_send(self, sealed: object) -> None:
        """Spools a head; see `Publisher`."""
        await self._spool.store_head(sealed)  # type: ignore[arg-type]

    async def prepare_root(self, context: FormatContext) -> FirstGeneration:
        """Uploads the rows of the empty root."""
        assert self._store is not None
        code = Code(context.superblock.code)
        sealer = Sealer(context.keys, code, context.owner.epoch, self._clock)
        packs: list[MetadataPack] = []
        uploader = Uploader(
            context.members,
            FreeSpace(context.members, self._clock),
            context.superblock.code,
            context.keys.fsid,
            self._clock,
            full_grace_seconds=self._config.flush.full_grace_seconds,
        )
        with CommittedState(self._store.environment, self._clock) as state:
            rows = list(state.everything(b"", _STEP_BYTES).rows)
            counters, write_number = state.counters(), state.write_number
        packer = RowPacker(sealer.pack_bytes)
        async with trio.open_nursery() as nursery:
            await nursery.start(uploader.run)
            for chunks in [*packer.add(rows), packer.rest()]:
                pack = sealer.metadata_pack(chunks)
                upload = await uploader.upload(pack.ref, sealer.shards(pack))
                packs.append(MetadataPack(pack.ref, tuple(upload.placement), len(chunks)))
            nursery.cancel_scope.cancel()
        return FirstGeneration(tuple(packs), counters, write_number, SCHEMA_VERSION)

    def finish(self, report: FormatReport) -> None:
        """Records the first generation as the local base, and moves the store into place."""
        store = self._store
        assert store is not None
        store.set_local(FSID_KEY, report.keys.fsid)
        store.set_local(SUPERBLOCK_ROW, encode_superblock(report.superblock, report.keys, self._clock))
        record_base(store, self._spool.heads[report.ref], ours=True)
        for key, _ in list(store.scan(Table.CHANGED, b"", None)):
            store.layers.delete(Table.CHANGED, key)
        self._commit(store)
        store.close()
        self._store = None
        directory = self._config.cache.directory
        # Only now: what a former file system was sending is needed for as long as its store is there.
        shutil.rmtree(directory / _SPOOL, ignore_errors=True)
        try:
            for name in _FILES:
                (self._aside / name).rename(directory / name)
            _flush(directory)
        except OSError as error:
            raise CacheError(f"{directory}: the new store cannot be placed: {error.strerror}") from error

    def close(self) -> None:
        """Removes what is aside."""
        if self._store is not None:
            self._store.close()
        shutil.rmtree(self._aside, ignore_errors=True)
