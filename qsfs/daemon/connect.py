"""From a configuration to what works with backends: key, candidates, superblock, members."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import trio

from qsfs.backend.contract import Backend
from qsfs.backend.limits import RateLimit
from qsfs.backend.metrics import Metrics
from qsfs.backend.open import create_control_namespace, create_namespace, open_backend, open_control
from qsfs.clock import Clock
from qsfs.config import BackendConfig, Config
from qsfs.daemon.descriptors import CONNECTIONS, require_descriptors
from qsfs.daemon.secret import read_secret as read_secret  # noqa: PLC0414 - all that opens a file system is here
from qsfs.errors import BackendError, ConfigError, FormatMismatch, KeyFileError
from qsfs.format.erasure import Code
from qsfs.format.head import Fleet
from qsfs.format.keys import KeyRing
from qsfs.format.passphrase import Passphrase
from qsfs.format.slots import Secret
from qsfs.format.superblock import Superblock, open_superblock
from qsfs.remote.control import Records
from qsfs.remote.identity import Stranger, find_members
from qsfs.remote.members import Candidate, Members
from qsfs.remote.reasons import summary
from qsfs.remote.superblocks import FoundSuperblock, find_superblock
from qsfs.store.schema import BLOCK_SIZE
from qsfs.store.store import Store

SUPERBLOCK_ROW = b"superblock"
"""LOCAL row: the superblock as it lies on the backends, so that a mount needs none of them."""


@dataclass(slots=True)
class Links:
    """The configured backends, not yet contacted, with what they share.  `aclose` ends all connections."""

    candidates: list[Candidate]
    controls: list[Backend]
    metrics: dict[str, Metrics]
    upload: RateLimit
    download: RateLimit
    _opened: dict[int, BackendConfig] = field(default_factory=dict)

    def add(self, backend: BackendConfig, clock: Clock) -> Candidate:
        """Makes one more backend; nothing is connected before the first call."""

        def connect_control(namespace: str) -> Backend:
            control = open_control(backend, namespace, clock=clock, upload=self.upload, download=self.download)
            self.controls.append(control)
            return self.controls[-1]

        meter = self.metrics.setdefault(backend.name, Metrics())
        candidate = Candidate(
            address=backend.address,
            namespace=backend.namespace,
            data=open_backend(
                backend,
                clock=clock,
                metrics=meter,
                upload=self.upload,
                download=self.download,
                connections=CONNECTIONS,
            ),
            connect=connect_control,
            group=backend.group,
            node=backend.node,
            weight=backend.weight,
        )
        self.candidates.append(candidate)
        self._opened[id(candidate)] = backend
        return candidate

    def find(self, backend: BackendConfig) -> Candidate | None:
        """The candidate that connects just as `backend` says, or None."""
        same = ("address", "namespace", "password", "password_file", "admin_password")
        for candidate in self.candidates:
            known = self._opened[id(candidate)]
            if all(getattr(known, key) == getattr(backend, key) for key in same):
                return candidate
        return None

    async def drop(self, candidate: Candidate) -> None:
        """Closes the connections of a candidate that is not used any more."""
        self.candidates.remove(candidate)
        del self._opened[id(candidate)]
        await candidate.data.aclose()

    async def aclose(self) -> None:
        """Closes the connections to both namespaces of every candidate."""
        with trio.CancelScope(shield=True):
            for backend in (*(candidate.data for candidate in self.candidates), *self.controls):
                await backend.aclose()


@dataclass(frozen=True, slots=True)
class Opened:
    """A file system whose key fits: what every command that touches backends starts from."""

    superblock: Superblock
    keys: KeyRing
    code: Code
    records: Records


def links(config: Config, clock: Clock) -> Links:
    """Makes the configured backends; nothing is connected before the first call.

    Raises `ConfigError` if there are none, or if this process may not have so many connections.
    """
    if not config.backends:
        raise ConfigError(f"{config.path}: no [[backend]] is listed; add the backends' addresses")
    require_descriptors(len(config.backends))
    found = Links([], [], {}, RateLimit(config.flush.upload_rate), RateLimit(config.flush.download_rate))
    for backend in config.backends:
        found.add(backend, clock)
    return found


async def prepare_namespaces(backends: Sequence[BackendConfig], clock: Clock) -> dict[str, str]:
    """Makes the namespaces of new backends where we may; returns each one's control namespace, by name.

    Raises `BackendError` naming the backend that cannot be used.
    """
    control: dict[str, str] = {}
    failures: list[BackendError] = []

    async def prepare(backend: BackendConfig) -> None:
        try:
            await create_namespace(backend, clock=clock)
            control[backend.name] = await create_control_namespace(backend, clock=clock)
        except BackendError as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for backend in backends:
            nursery.start_soon(prepare, backend)
    if failures:
        raise type(failures[0])(summary(failures))
    return control


async def open_file_system(store: Store, found: Links, secret: Secret, clock: Clock) -> Opened:
    """Opens the superblock that the local store keeps; a restored store takes it from the backends.

    So does one whose own copy the secret does not open: key slots may have changed elsewhere.  Raises
    `KeyFileError` for another key, `CacheError` or `FormatMismatch` if the store is of no, or of another,
    file system, and what `find_superblock` raises.
    """
    encoded = store.local(SUPERBLOCK_ROW)
    if encoded is not None:
        try:
            if isinstance(secret, Passphrase):
                superblock, keys = await trio.to_thread.run_sync(open_superblock, encoded, secret)
            else:
                superblock, keys = open_superblock(encoded, secret)
        except KeyFileError as error:
            answer = await _newer_slots(found, secret, error)
            superblock, keys, encoded = answer.superblock, answer.keys, answer.value
        else:
            store.check_identity(keys.fsid)
            return _opened(superblock, keys)
    else:
        answer = await find_superblock(found.candidates, secret)
        superblock, keys, encoded = answer.superblock, answer.keys, answer.value
    opened = _opened(superblock, keys)
    store.check_identity(keys.fsid)
    store.set_local(SUPERBLOCK_ROW, encoded)
    return opened


async def _newer_slots(found: Links, secret: Secret, refused: KeyFileError) -> FoundSuperblock:
    """The superblock on the backends for a secret that does not open the local one; else `refused`."""
    try:
        answer = await find_superblock(found.candidates, secret)
    except BackendError as error:
        raise KeyFileError(
            f"{refused} here, and the backends could not be asked for newer key slots: {error}"
        ) from None
    if answer.removed:
        raise KeyFileError(f"{answer.removed}; use one that opens the present key slots")
    return answer


def _opened(superblock: Superblock, keys: KeyRing) -> Opened:
    if superblock.block_size != BLOCK_SIZE:
        raise FormatMismatch(
            f"file system {keys.fsid.hex()} has blocks of {superblock.block_size} bytes, this qsfs works "
            f"with {BLOCK_SIZE}; use the version that made it"
        )
    return Opened(superblock, keys, Code(superblock.code), Records(keys))


async def members_of(
    found: Links, opened: Opened, clock: Clock, fleets: Collection[Fleet] = (), *, seconds: float = 5.0
) -> tuple[Members, list[Stranger]]:
    """The members of the fleet among the configured backends; see `find_members`."""
    return await find_members(found.candidates, opened.keys, clock, fleets=fleets, attempt_seconds=seconds)
