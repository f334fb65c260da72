"""One server instance: a directory of namespaces behind one lock, and its counters.

    <directory>/lock                    held while the instance runs
    <directory>/namespaces/<name>/      settings, d0, d1, ...
    <directory>/removed/<number>/       namespaces being deleted; emptied at start
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trio

from qsfs.clock import Clock
from qsfs.errors import ConfigError
from qsfs.zdb.namespace import Namespace
from qsfs.zdb.settings import Unusable, sync_directory

_log = logging.getLogger(__name__)

DEFAULT = b"default"
MAX_NAME_BYTES = 128


@dataclass
class Counters:
    """What INFO tells of an instance since it started."""

    clients: int = 0
    executed: int = 0
    failed: int = 0
    unauthorized: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True)
class InstanceOptions:
    """How an instance runs; see `ServeOptions`."""

    sync: bool = False
    admin_password: str = ""
    default_maxsize: int = 0
    datasize: int = 256 * 1024 * 1024


@dataclass
class Instance:
    """An open instance.  `identity` is what INFO gives as instance_id."""

    directory: Path
    options: InstanceOptions
    clock: Clock
    identity: int = 0
    counters: Counters = field(default_factory=Counters)
    namespaces: dict[bytes, Namespace] = field(default_factory=dict)
    started_s: int = 0
    _lock: int = -1
    _removals: int = 0
    _work: trio.Event = field(default_factory=trio.Event)

    @classmethod
    def open(cls, directory: Path, options: InstanceOptions, clock: Clock, identity: int = 0) -> Instance:
        """Locks `directory` (made if missing) and loads its namespaces.

        Raises `ConfigError` if it is in use by another server or cannot be used.  A namespace that
        cannot be loaded is left alone and out of service, with an error in the log.
        """
        instance = cls(directory, options, clock, identity)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            instance._take_lock()
            try:
                instance._load()
            except BaseException:
                instance.close()
                raise
        except OSError as failure:
            raise ConfigError(f"zdb: {directory}: {failure}; choose another --data") from failure
        return instance

    @property
    def admin_password(self) -> bytes:
        """The admin password; empty: everyone is admin."""
        return self.options.admin_password.encode()

    def is_valid_name(self, name: bytes) -> bool:
        """Whether a new namespace may have this name."""
        return name not in (b".", b"..", DEFAULT) and b"/" not in name and b"\0" not in name

    def is_taken(self, name: bytes) -> bool:
        """Whether a namespace of this name exists, in service or not."""
        return name in self.namespaces or self._path(name).exists()

    def create(self, name: bytes, maxsize: int = 0) -> Namespace:
        """Adds a namespace; raises `OSError`, and then there is none."""
        path = self._path(name)
        try:
            namespace = Namespace.create(
                name,
                path,
                clock=self.clock,
                file_bytes=self.options.datasize,
                durable_appends=self.options.sync,
                maxsize=maxsize,
            )
            sync_directory(path.parent)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        self.namespaces[name] = namespace
        return namespace

    async def remove(self, name: bytes) -> None:
        """Deletes a namespace and its files; raises `OSError`, and then it stays."""
        namespace = self.namespaces[name]
        removed = self._removed / str(self._removals)
        self._removals += 1
        namespace.directory.rename(removed)
        sync_directory(namespace.directory.parent)
        del self.namespaces[name]
        namespace.deleted = True
        namespace.close(keep=False)
        await trio.to_thread.run_sync(lambda: shutil.rmtree(removed, ignore_errors=True))

    def wake(self) -> None:
        """Tells `run_background` that there may be something to do."""
        self._work.set()

    async def run_background(self) -> None:
        """Seals rotated files until it is cancelled."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            for namespace in list(self.namespaces.values()):
                await namespace.seal_rotated()

    def close(self) -> None:
        """Puts everything on the disk, closes all files and lets the lock go."""
        for namespace in self.namespaces.values():
            namespace.close()
        self.namespaces = {}
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def _removed(self) -> Path:
        return self.directory / "removed"

    def _path(self, name: bytes) -> Path:
        return self.directory / "namespaces" / os.fsdecode(name)

    def _take_lock(self) -> None:
        self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise ConfigError(f"zdb: {self.directory} is in use by another server; choose another") from None

    def _load(self) -> None:
        self.started_s = self.clock.time_ns() // 1_000_000_000
        shutil.rmtree(self._removed, ignore_errors=True)
        self._removed.mkdir(exist_ok=True)
        (self.directory / "namespaces").mkdir(exist_ok=True)
        for path in self._found():
            name = os.fsencode(path.name)
            try:
                self.namespaces[name] = Namespace.load(
                    name,
                    path,
                    clock=self.clock,
                    file_bytes=self.options.datasize,
                    durable_appends=self.options.sync,
                )
            except (Unusable, OSError) as failure:
                _log.error("%s: namespace out of service: %s", path, failure)
        if DEFAULT not in self.namespaces:
            if self._path(DEFAULT).exists():
                raise ConfigError(f"zdb: {self.directory}: the default namespace cannot be read; see the log")
            self.create(DEFAULT)
        self.namespaces[DEFAULT].settings.maxsize = self.options.default_maxsize

    def _found(self) -> Iterator[Path]:
        for path in sorted((self.directory / "namespaces").iterdir()):
            if not (path / "settings").exists() and not any(path.glob("d*")):
                shutil.rmtree(path, ignore_errors=True)
            else:
                yield path
