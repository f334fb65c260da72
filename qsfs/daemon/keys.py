"""Key commands: from the configuration to the key slots on the backends, and to the mount that runs here."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from qsfs.clock import Clock
from qsfs.config import Config
from qsfs.daemon import control
from qsfs.daemon.connect import Links, links
from qsfs.daemon.secret import read_secret
from qsfs.errors import DeadlineExceeded, KeyFileError, MountError, NotRunning, QsfsError
from qsfs.format.key_changes import Change
from qsfs.format.keys import KeyRing
from qsfs.format.slots import Secret, masters_of
from qsfs.format.superblock import Superblock
from qsfs.remote.key_slots import (
    Changed,
    KeyState,
    Proof,
    change_key_slots,
    prove_secret,
    read_key_state,
    refill_key_slots,
)

_T = TypeVar("_T")
_TELL_SECONDS = 60.0


async def key_state(config: Config, clock: Clock, secret: Secret) -> KeyState:
    """The key slots as the backends hold them."""
    return await _with_links(config, clock, lambda found: read_key_state(found.candidates, secret, clock))


async def prove(config: Config, clock: Clock, secret: Secret) -> Proof:
    """Proves what a secret opens; raises as `prove_secret`."""
    return await _with_links(config, clock, lambda found: prove_secret(found.candidates, secret, clock))


async def change(
    config: Config,
    clock: Clock,
    secret: Secret,
    make: Callable[[Superblock, KeyRing, int, frozenset[int]], Change],
) -> Changed:
    """Makes one change of the key slots; raises as `change_key_slots`.

    `make` gets the superblock, its key ring, the number for a new master key, and the slots in use: those that
    `secret` opens, or the configured one, which the next mount starts with.
    """
    in_use = {secret}
    with suppress(KeyFileError):
        in_use.add(read_secret(config))

    def in_use_of(superblock: Superblock) -> frozenset[int]:
        return frozenset(n for one in in_use for n in masters_of(superblock.slots, one, superblock.fsid)[0])

    async def work(found: Links) -> Changed:
        return await change_key_slots(
            found.candidates,
            secret,
            lambda superblock, keys, number: make(superblock, keys, number, in_use_of(superblock)),
            clock,
        )

    return await _with_links(config, clock, work)


async def refill(config: Config, clock: Clock, secret: Secret) -> Changed:
    """Brings the newest key slots to all backends; raises as `refill_key_slots`."""
    return await _with_links(config, clock, lambda found: refill_key_slots(found.candidates, secret, clock))


async def _with_links(config: Config, clock: Clock, work: Callable[[Links], Awaitable[_T]]) -> _T:
    found = links(config, clock)
    try:
        return await work(found)
    finally:
        await found.aclose()


@contextmanager
def one_at_a_time(config: Config) -> Iterator[None]:
    """Lets key commands with one configuration file wait for each other."""
    descriptor = os.open(config.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def tell_mount(config: Config, wanted_master: int) -> str:
    """Lets a mount that runs here take the new key slots up; what came of it, for people ("": none runs)."""
    if not config.cache.directory.is_dir():
        return ""
    try:
        found: dict[str, Any] = control.ask(config.cache.directory, "keys", timeout=_TELL_SECONDS)
    except NotRunning:
        return ""
    except MountError as error:
        return f"The mount here did not take it up ({error}); one that is read-only does when it is mounted again"
    except (DeadlineExceeded, QsfsError) as error:
        return f"The mount here has not taken it up yet, and will by itself: {error}"
    if found["master_key"] < wanted_master:
        return (
            f"The mount here goes on with master key {found['master_key']}: what it was mounted with does not open the "
            "new one, or too few backends answer. 'qsfs umount' and 'qsfs mount' with a present secret change that"
        )
    return f"The mount here works with revision {found['revision']} of the key slots, master key {found['master_key']}"


def refuse_used(used: frozenset[int], going: Sequence[int]) -> None:
    """`KeyFileError` if a slot that is to go is one that the configured secret, or this command's, opens."""
    for number in going:
        if number in used:
            raise KeyFileError(
                f"key slot {number} is the one in use: the configured secret, or the one given, opens it, and would "
                "not any more; configure another secret first, or say --in-use"
            )
