"""The template of a reader that follows: a store with the rows of one generation, and nothing of its contents.

It moves from one generation to the next by what differs; the image of a generation is a copy of it, which
shares its bytes with it where the file system can do that.  It is nothing that must be kept: without one, or
where a difference cannot be told or is not worth it, a generation is restored whole, and becomes the template.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import trio

from qsfs import failpoints
from qsfs.errors import CacheError
from qsfs.format.erasure import Code
from qsfs.format.head import Head
from qsfs.remote.advance import Advance, ByPosition, NotAdvanced
from qsfs.remote.aside import DATA, DIRECTORY
from qsfs.remote.base import base_rows
from qsfs.remote.difference import Difference, bytes_of, difference
from qsfs.remote.image import Listed, packs_of
from qsfs.remote.plain import plain_errors
from qsfs.remote.reader import PackReader
from qsfs.remote.restore import counted_rows, make_empty, put_in_place, read_in_order
from qsfs.remote.source import Source
from qsfs.store.environment import Environment
from qsfs.store.schema import BLOCK_SIZE, SCHEMA_VERSION, Table

_MOST_BYTES = 64 << 20
"""What may be read of a difference, packed: it is in memory together."""
_MOST_DELTA_BYTES = 8 << 20
"""What of that may be deltas: their rows are in memory together."""
_COPIED_AT_ONCE = 64 << 20
_COPIED_BY_HAND = 1 << 20

Bodies = dict[bytes, bytes]
"""Bodies of packs, verified, by pack id."""


class Template:
    """What lies in `directory`, with an LMDB map of `map_bytes`.  `head` is the generation that it holds, or None."""

    def __init__(self, directory: Path, map_bytes: int) -> None:
        self.head: Head | None = None
        self._directory = directory
        self._map_bytes = map_bytes

    def take(self, image: Path, head: Head) -> None:
        """Becomes a copy of an image of `head` that was just restored, and that nobody opened.  Blocks.

        One that a restore had to mend is not taken.  Raises `CacheError`.
        """
        self.drop()
        make_empty(self._directory)
        _copy(image / DATA, self._directory / DATA)
        environment = Environment(self._directory, self._map_bytes, durable=False)
        try:
            view = environment.read()
            try:
                mended = view.count(Table.CHANGED)
            finally:
                view.close()
        finally:
            environment.close()
        if mended:
            self.drop()
        else:
            self.head = head

    def drop(self) -> None:
        """Becomes nothing.  Blocks."""
        self.head = None
        shutil.rmtree(self._directory, ignore_errors=True)

    async def move(self, source: Source, *, deadline_seconds: float) -> None:
        """Becomes the generation of `source`.

        Raises `NotAdvanced` where that takes a restore, and what `read_in_order` raises; it stays what it
        was then.  After any other error it is nothing any more.
        """
        head = source.found.head
        if self.head is None:
            raise NotAdvanced("there is none yet")
        if (head.schema_version, head.block_size) != (SCHEMA_VERSION, BLOCK_SIZE):
            raise NotAdvanced("it is of another layout")
        found = await trio.to_thread.run_sync(difference, self.head, head)
        _check_worth(found, head)
        bodies: Bodies = {}

        async def keep(listed: Listed, body: bytes) -> None:
            bodies[listed[0].ref.pack_id] = body

        reader = PackReader(source.members, source.keys, Code(source.superblock.code))
        with plain_errors():
            async with reader.running():
                await read_in_order(reader, found.listed, keep, deadline_seconds)
        try:
            await trio.to_thread.run_sync(self._apply, source, found, bodies)
        except NotAdvanced:
            raise
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.drop)
            raise
        self.head = head

    def copy_to(self, directory: Path) -> None:
        """Makes the store of an image in `directory`, all or nothing.  Blocks.  Raises `CacheError`."""
        building = directory / DIRECTORY
        make_empty(building)
        _copy(self._directory / DATA, building / DATA)
        failpoints.hit("template.copied")
        put_in_place(building, directory)

    def _apply(self, source: Source, found: Difference, bodies: Bodies) -> None:
        def rows_of(listed: Sequence[Listed]) -> dict[tuple[int, bytes], bytes | None]:
            each = (counted_rows(source.keys, item, bodies[item[0].ref.pack_id]) for item in listed)
            return {(table, key): value for rows in each for table, key, value in rows}

        rows = rows_of(found.deltas)
        if not rows_of(found.gone).keys() <= rows.keys():
            raise NotAdvanced("rows of deltas that are not listed any more are not in others")
        laid = ByPosition(rows)
        environment = Environment(self._directory, self._map_bytes, durable=False)
        try:
            with environment.write() as txn:
                advance = Advance(environment, txn)
                for part in found.anew:
                    held = ByPosition(rows_of(part.packs))
                    for start, stop in part.stretches:
                        advance.replace(start, stop, held.between(start, stop) | laid.between(start, stop))
                for (table, key), value in sorted(rows.items()):
                    advance.put(Table(table), key, value)
                failpoints.hit("template.applied")
                advance.finish(base_rows(source.found.head, source.sealed, ours=False))
        finally:
            environment.close()


def _check_worth(found: Difference, head: Head) -> None:
    """Raises `NotAdvanced` if a restore reads hardly more, or if it is too much to be in memory."""
    size = bytes_of(found.listed)
    whole = bytes_of(list(packs_of(head)))
    deltas = bytes_of(found.deltas) + bytes_of(found.gone)
    if 2 * size > whole or size > _MOST_BYTES or deltas > _MOST_DELTA_BYTES:
        raise NotAdvanced(f"{size} of {whole} bytes differ")


def _copy(source: Path, target: Path) -> None:
    """Copies a file durably; file systems that can share what is the same do."""
    try:
        with source.open("rb", buffering=0) as reading, target.open("xb") as writing:
            target.chmod(0o600)
            try:
                while os.copy_file_range(reading.fileno(), writing.fileno(), _COPIED_AT_ONCE):
                    pass
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                    raise
            # What the file system does not copy by itself: everything, or nothing.
            shutil.copyfileobj(reading, writing, _COPIED_BY_HAND)
            writing.flush()
            os.fsync(writing.fileno())
    except OSError as error:
        raise CacheError(f"{target}: cannot be copied: {error.strerror}") from error
