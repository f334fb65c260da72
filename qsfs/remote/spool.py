"""The local spool: sealed packs of the cut under way, and the heads that this machine may have sent.

A directory of files, each written to a temporary name, flushed and renamed:

    <generation>-<ordinal>.pack     a sealed pack's body, before its shards are sent
    <generation>-<digest>.head      a sealed head, before it is sent
    abandoned                       ids of packs that no head sent ever named

A file is, little-endian: magic "QSPL", version u16 = 1, kind u8, zero u8, length u32 of its
description, length u64 of its body, xxh3-64 u64 of everything else, then both.  The description is a
msgpack array.  A torn file was never needed: packs are durable before anything of them is sent, a
head before it is sent, and no head names packs that are not written.  A whole file of another version
may well be needed: all versions have this frame, so that it is never taken for a torn one.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import trio
from xxhash import xxh3_64

from qsfs import failpoints
from qsfs.errors import CacheError, Corrupt, FormatMismatch
from qsfs.format import schema
from qsfs.format.extent import PackKind, PackRef
from qsfs.format.head import HeadRef, SealedHead, parse_head_key

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

_HEADER = struct.Struct("<4sHBBIQQ")
_SUMMED = struct.Struct("<4sHBBIQ")
_MAGIC = b"QSPL"
_VERSION = 1
_PACK, _HEAD, _ABANDONED = 1, 2, 3
_BLOCK = 4096
_KEPT_BACK = 1 << 20
_ABANDONED_NAME = "abandoned"
MOST_ABANDONED = 4096


class SpoolFull(Exception):
    """What was to be spooled does not fit into its bound.  For the cut, which then takes less."""


@dataclass(frozen=True, slots=True)
class AbandonedPack:
    """A pack of ours that no head sent names: its shards may be deleted."""

    pack_id: bytes
    owner_epoch: int


def _locked(method: Callable[Concatenate[Spool, P], T]) -> Callable[Concatenate[Spool, P], T]:
    """One worker thread at a time."""

    @functools.wraps(method)
    def locked(self: Spool, /, *arguments: P.args, **named: P.kwargs) -> T:
        with self._lock:
            return method(self, *arguments, **named)

    return locked


class Spool:
    """The spool in `directory`, bounded by `limit_bytes`.  Calls block: use them in worker threads."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        """Opens the spool, creating it if absent, and drops what no crash can have left as needed.

        Packs of a cut that was under way are abandoned, except those that a head may name.
        Raises `CacheError`, and `FormatMismatch` if a version that we do not know wrote it: what it holds stays.
        """
        self.directory = directory
        self.limit_bytes = limit_bytes
        self.heads: dict[HeadRef, SealedHead] = {}
        self.abandoned: list[AbandonedPack] = []
        self._packs: dict[tuple[int, int], PackRef] = {}
        self._sizes: dict[str, int] = {}
        self._used = 0
        self._lock = threading.RLock()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise self._failed(error) from error

    # room

    @property
    def used_bytes(self) -> int:
        """Bytes that its files take, in whole pages.  Never waits: also the event loop asks."""
        return self._used

    def room(self) -> int:
        """Bytes of packs that still fit; a part of the bound is kept back for heads."""
        return max(0, self.limit_bytes - _KEPT_BACK - self.used_bytes)

    # packs

    @_locked
    def write_pack(self, generation: int, ordinal: int, ref: PackRef, body: bytes) -> None:
        """Stores a sealed pack; durable only after `sync`.  Raises `SpoolFull` or `CacheError`."""
        if len(body) + 2 * _BLOCK > self.room():
            raise SpoolFull(f"{self.directory}: no room for a pack of {len(body)} bytes")
        self._write(_pack_name(generation, ordinal), _PACK, _pack_ref(ref), body, flush_name=False)
        self._packs[generation, ordinal] = ref

    def read_pack(self, generation: int, ordinal: int) -> bytes:
        """The body of a pack.  Raises `Corrupt`, `FormatMismatch` or `CacheError`."""
        return self._read(_pack_name(generation, ordinal), _PACK)[1]

    @property
    def named(self) -> set[bytes]:
        """The ids of the packs in it, and of those that were abandoned.  Never waits."""
        refs, abandoned = list(self._packs.values()), list(self.abandoned)
        return {ref.pack_id for ref in refs} | {pack.pack_id for pack in abandoned}

    def sync(self) -> None:
        """Makes the names of all files durable."""
        try:
            _flush_directory(self.directory)
        except OSError as error:
            raise self._failed(error) from error

    @_locked
    def drop_packs(self, generation: int) -> None:
        """Removes the packs of a cut."""
        for key in [key for key in self._packs if key[0] == generation]:
            self._remove(_pack_name(*key))
            del self._packs[key]

    @_locked
    def abandon(self, generation: int) -> None:
        """Gives a cut up: its packs are remembered as named by no head, and removed."""
        self.add_abandoned(ref for (number, _), ref in self._packs.items() if number == generation)
        self.drop_packs(generation)

    @_locked
    def add_abandoned(self, refs: Iterable[PackRef]) -> None:
        """Remembers packs whose shards may be deleted: no head that was sent names them."""
        more = [AbandonedPack(ref.pack_id, ref.owner_epoch) for ref in refs]
        if more:
            self.set_abandoned([*self.abandoned, *more])

    @_locked
    def set_abandoned(self, abandoned: Iterable[AbandonedPack]) -> None:
        """Replaces the list of abandoned packs, durably; of too many the oldest are forgotten."""
        self.abandoned = list(abandoned)[-MOST_ABANDONED:]
        if not self.abandoned:
            # Whose spool is empty can go on with any version.
            self._remove(_ABANDONED_NAME)
            self.sync()
            return
        rows = [[pack.pack_id, pack.owner_epoch] for pack in self.abandoned]
        self._write(_ABANDONED_NAME, _ABANDONED, [rows], b"", flush_name=True)

    # heads

    async def store_head(self, sealed: SealedHead) -> None:
        """Stores a head durably: it may be sent once this returns.  Raises `CacheError`."""
        await trio.to_thread.run_sync(self.write_head, sealed)

    @_locked
    def write_head(self, sealed: SealedHead) -> None:
        """As `store_head`, blocking."""
        failpoints.hit("spool.head.before")
        # Before it is written: where that fails half-way the file may be found by the next mount.
        self.heads[sealed.ref] = sealed
        self._write(_head_name(sealed.ref), _HEAD, [sealed.key], sealed.value, flush_name=True)
        failpoints.hit("spool.head.stored")

    @_locked
    def drop_heads(self, upto: HeadRef) -> None:
        """Removes the heads up to and with `upto`, which the local store has recorded as published, and their packs.

        The removal of packs is made durable first: packs that came back without the head that names
        them would look abandoned.
        """
        gone = [ref for ref in self.heads if ref <= upto]
        if gone:
            # One that could not be removed when its head was recorded would look abandoned without that head.
            for generation in {ref.generation for ref in gone}:
                self.drop_packs(generation)
            self.sync()
        for ref in gone:
            self._remove(_head_name(ref))
            del self.heads[ref]

    # files

    def _open(self) -> None:
        for path in sorted(self.directory.iterdir()):
            if path.suffix == ".tmp" or not path.is_file():
                if path.is_file():
                    path.unlink()
                continue
            self._note(path.name, path.stat().st_size)
            try:
                self._take(path)
            except Corrupt as error:
                _log.warning("%s; it was never needed and is removed", error)
                self._remove(path.name)
        named = {ref.generation for ref in self.heads}
        for generation in {generation for generation, _ in self._packs}:
            if generation in named:
                self.drop_packs(generation)
            else:
                self.abandon(generation)

    def _take(self, path: Path) -> None:
        if path.suffix == ".pack":
            generation, _, ordinal = path.stem.partition("-")
            description, _ = self._read(path.name, _PACK)
            self._packs[_hexadecimal(generation, path), _hexadecimal(ordinal, path)] = _take_ref(
                description, path
            )
        elif path.suffix == ".head":
            description, value = self._read(path.name, _HEAD)
            key = schema.Fields(description, 1, str(path)).binary()
            named = parse_head_key(key)
            if named is None:
                raise Corrupt(f"{path}: holds no head")
            self.heads[named.ref] = SealedHead(key, value, named.ref)
        elif path.name == _ABANDONED_NAME:
            rows = schema.Fields(self._read(path.name, _ABANDONED)[0], 1, str(path)).array()
            for row in rows:
                fields = schema.Fields(row, 2, str(path))
                self.abandoned.append(AbandonedPack(fields.binary(), fields.integer()))

    def _write(
        self, name: str, kind: int, description: list[object], body: bytes, *, flush_name: bool
    ) -> None:
        about = schema.pack(description)
        head = _SUMMED.pack(_MAGIC, _VERSION, kind, 0, len(about), len(body))
        digest = xxh3_64(head)
        digest.update(about)
        digest.update(body)
        path = self.directory / name
        temporary = path.with_name(f"{name}.tmp")
        try:
            with temporary.open("wb", buffering=0) as file:
                for part in (head + digest.intdigest().to_bytes(8, "little") + about, body):
                    view = memoryview(part)
                    while view:
                        view = view[file.write(view) :]
                os.fsync(file.fileno())
            temporary.rename(path)
            if flush_name:
                _flush_directory(self.directory)
        except OSError as error:
            raise self._failed(error) from error
        self._note(name, _HEADER.size + len(about) + len(body))

    def _read(self, name: str, kind: int) -> tuple[list[object], bytes]:
        path = self.directory / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise self._failed(error) from error
        if len(content) < _HEADER.size:
            raise Corrupt(f"{path}: a spooled file of {len(content)} bytes")
        magic, version, found, zero, about, body, total = _HEADER.unpack_from(content)
        view = memoryview(content)
        digest = xxh3_64(view[: _SUMMED.size])
        digest.update(view[_HEADER.size :])
        if (
            magic != _MAGIC
            or len(content) != _HEADER.size + about + body
            or digest.intdigest() != total
        ):
            raise Corrupt(f"{path}: a spooled file fails its checksum")
        if version != _VERSION:
            raise FormatMismatch(
                f"{path}: a spooled file of version {version}, this qsfs knows {_VERSION}; it may be a head that was "
                "sent: mount once with the qsfs version that wrote it, unmount when 'qsfs sync' has published all, "
                "then use this one"
            )
        if (found, zero) != (kind, 0):
            raise Corrupt(f"{path}: a spooled file of kind {found}, not {kind}")
        description = schema.unpack(view[_HEADER.size : _HEADER.size + about], str(path))
        if not isinstance(description, list):
            raise Corrupt(f"{path}: a spooled file describes itself wrongly")
        return description, content[_HEADER.size + about :]

    def _remove(self, name: str) -> None:
        try:
            (self.directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise self._failed(error) from error
        self._note(name, 0)

    def _note(self, name: str, size: int) -> None:
        """Takes note of the size of a file, 0 for one that is gone."""
        self._used += _in_blocks(size) - _in_blocks(self._sizes.pop(name, 0))
        if size:
            self._sizes[name] = size

    def _failed(self, error: OSError) -> CacheError:
        return CacheError(f"{self.directory}: the spool cannot be used: {error}; check the cache's disk")


def _in_blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _pack_name(generation: int, ordinal: int) -> str:
    return f"{generation:016x}-{ordinal:06x}.pack"


def _head_name(ref: HeadRef) -> str:
    return f"{ref.generation:016x}-{ref.digest.hex()}.head"


def _hexadecimal(text: str, path: Path) -> int:
    try:
        return int(text, 16)
    except ValueError:
        raise Corrupt(f"{path}: not the name of a spooled file") from None


def _pack_ref(ref: PackRef) -> list[object]:
    return [
        ref.pack_id,
        ref.digest,
        int(ref.kind),
        ref.key_number,
        ref.owner_epoch,
        ref.body_length,
        ref.shard_size,
    ]


def _take_ref(description: list[object], path: Path) -> PackRef:
    fields = schema.Fields(description, 7, str(path))
    return PackRef(
        pack_id=fields.binary(),
        digest=fields.binary(),
        kind=PackKind(fields.integer(PackKind.DATA, PackKind.METADATA)),
        key_number=fields.integer(),
        owner_epoch=fields.integer(),
        body_length=fields.integer(1),
        shard_size=fields.integer(1),
    )


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
