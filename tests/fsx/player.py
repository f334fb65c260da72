"""Plays operations on a directory, in a process of its own: a page that cannot be read may end it (SIGBUS).

    python -m tests.fsx.player DIRECTORY SEED COUNT PROGRESS

It asks for what happens to the machine with a line on its output, and goes on when a line comes back.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
from pathlib import Path

from tests.fsx.operations import FILES, HUGE, PAGE, Operation, content, operations

_SHOWN = 32


class Wrong(Exception):
    """A file is not what it must be: `file`, and what is wrong in words."""

    def __init__(self, file: str, what: str) -> None:
        super().__init__(what)
        self.file = file


class Player:
    """The files as they are in `directory`, and as they must be."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held = {name: bytearray() for name in FILES}
        self._files: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        # For O_DIRECT: memory that begins at a page.
        self._aligned = mmap.mmap(-1, 32 * PAGE)

    def play(self, operation: Operation) -> None:
        """Does one operation and sees that the file shows what it must."""
        getattr(self, f"_{operation.kind}")(operation)
        if operation.file:
            self._check_size(operation.file)

    def _file(self, name: str) -> int:
        if name not in self._files:
            self._files[name] = os.open(self._directory / name, os.O_RDWR | os.O_CREAT, 0o600)
        return self._files[name]

    # reads

    def _read(self, op: Operation) -> None:
        self._compare(op.file, op.offset, os.pread(self._file(op.file), op.size, op.offset), op.size)

    def _map_read(self, op: Operation) -> None:
        mapped = self._map(op)
        self._compare(op.file, op.offset, mapped[op.offset : op.offset + op.size], op.size)

    def _direct_read(self, op: Operation) -> None:
        file = os.open(self._directory / op.file, os.O_RDONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            with memoryview(self._aligned) as whole, whole[: op.size or PAGE] as buffer:
                count = os.preadv(file, [buffer], op.offset)
                self._compare(op.file, op.offset, bytes(buffer[:count]), op.size)
        finally:
            os.close(file)

    def _check(self, op: Operation) -> None:
        held = self._held[op.file]
        self._compare(op.file, 0, os.pread(self._file(op.file), len(held) + PAGE, 0), len(held) + PAGE)

    def check_all(self) -> None:
        """Every byte of every file."""
        for name in FILES:
            self._check(Operation(0, "check", name))
            self._check_size(name)

    # changes

    def _write(self, op: Operation) -> None:
        data = content(op.number, op.offset, op.size)
        assert os.pwrite(self._file(op.file), data, op.offset) == op.size
        self._holds(op.file, op.offset, data)

    def _append(self, op: Operation) -> None:
        data = content(op.number, op.offset, op.size)
        file = os.open(self._directory / op.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            assert os.write(file, data) == op.size
        finally:
            os.close(file)
        self._holds(op.file, op.offset, data)

    def _direct_write(self, op: Operation) -> None:
        data = content(op.number, op.offset, op.size)
        file = os.open(self._directory / op.file, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            self._aligned[: op.size] = data
            with memoryview(self._aligned) as whole, whole[: op.size] as buffer:
                assert os.pwritev(file, [buffer], op.offset) == op.size
        finally:
            os.close(file)
        self._holds(op.file, op.offset, data)

    def _map_write(self, op: Operation) -> None:
        end = op.offset + op.size
        if end > len(self._held[op.file]):
            os.ftruncate(self._file(op.file), end)
            self._holds(op.file, end, b"")
        data = content(op.number, op.offset, op.size)
        mapped = self._map(op)
        mapped[op.offset : end] = data
        if op.variant == 3:
            mapped.flush()
        self._holds(op.file, op.offset, data)

    def _map(self, op: Operation) -> mmap.mmap:
        """A map that covers the operation: the one there is, or a new one."""
        kept = self._maps.get(op.file)
        if kept is not None and op.variant != 0 and len(kept) >= op.offset + op.size:
            return kept
        if kept is not None:
            kept.close()
        self._maps[op.file] = mapped = mmap.mmap(self._file(op.file), len(self._held[op.file]))
        return mapped

    def _truncate(self, op: Operation) -> None:
        if op.variant % 2:
            self._file(op.file)
            os.truncate(self._directory / op.file, op.offset)
        elif op.offset == 0 and op.variant == 2:
            os.close(os.open(self._directory / op.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        else:
            os.ftruncate(self._file(op.file), op.offset)
        self._resize(op.file, op.offset)

    def _balloon(self, op: Operation) -> None:
        """Far behind the end and back: what is cut off and what was a hole never shows again."""
        file, held = self._file(op.file), self._held[op.file]
        far = HUGE + op.number
        os.ftruncate(file, far + 1)
        if op.variant:
            os.pwrite(file, b"far", far - 2)
            found = os.pread(file, PAGE, far - 10)
            if found != bytes(8) + b"far":
                raise Wrong(op.file, f"read {found!r} at {far - 10}, written was 'far' at {far - 2}")
        self._compare(op.file, 0, os.pread(file, len(held), 0), len(held))
        os.ftruncate(file, op.offset)
        self._resize(op.file, op.offset)

    def _copy(self, op: Operation) -> None:
        data = bytes(self._held[op.source][op.source_offset : op.source_offset + op.size])
        source, target = self._file(op.source), self._file(op.file)
        if op.variant % 2:
            found = os.pread(source, op.size, op.source_offset)
            self._compare(op.source, op.source_offset, found, op.size)
            assert os.pwrite(target, found, op.offset) == op.size
        elif op.variant == 2:
            os.lseek(target, op.offset, os.SEEK_SET)
            done = 0
            while done < op.size:
                done += (count := os.sendfile(target, source, op.source_offset + done, op.size - done))
                assert count, "sendfile found an end of file that must not be there"
        else:
            done = 0
            while done < op.size:
                done += (
                    count := os.copy_file_range(
                        source, target, op.size - done, op.source_offset + done, op.offset + done
                    )
                )
                assert count, "copy_file_range found an end of file that must not be there"
        self._holds(op.file, op.offset, data)

    # durability and caches

    def _sync(self, op: Operation) -> None:
        file = self._file(op.file)
        mapped = self._maps.get(op.file)
        if op.variant == 0 and mapped is not None:
            mapped.flush()
        elif op.variant == 1:
            os.fdatasync(file)
        else:
            os.fsync(file)

    def _reopen(self, op: Operation) -> None:
        self._close(op.file)
        self._file(op.file)

    def _drop(self, op: Operation) -> None:
        """The kernel forgets the pages of a file; the next reader asks qsfs."""
        if op.variant == 0:
            self._close(op.file)
        file = self._file(op.file)
        os.fdatasync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def _publish(self, op: Operation) -> None:
        self._sync_all()
        request("publish")

    def _evict(self, op: Operation) -> None:
        self._sync_all()
        for mapped in self._maps.values():
            mapped.close()
        self._maps.clear()
        request("evict")
        for name in FILES:
            os.posix_fadvise(self._file(name), 0, 0, os.POSIX_FADV_DONTNEED)

    def _remount(self, op: Operation) -> None:
        self.close()
        request("remount")
        self.check_all()

    def _kill(self, op: Operation) -> None:
        self._sync_all()
        self.close()
        request("kill")
        self.check_all()

    def _restore(self, op: Operation) -> None:
        self._sync_all()
        self.close()
        request("restore")
        self.check_all()

    def _sync_all(self) -> None:
        for name in FILES:
            os.fsync(self._file(name))
        directory = os.open(self._directory, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def _close(self, name: str) -> None:
        if name in self._maps:
            self._maps.pop(name).close()
        if name in self._files:
            os.close(self._files.pop(name))

    def close(self) -> None:
        """Closes everything, so that the file system can be unmounted."""
        for name in FILES:
            self._close(name)

    # what must be there

    def _holds(self, name: str, offset: int, data: bytes) -> None:
        held = self._held[name]
        if offset > len(held):
            held.extend(bytes(offset - len(held)))
        held[offset : offset + len(data)] = data

    def _resize(self, name: str, size: int) -> None:
        held = self._held[name]
        del held[size:]
        held.extend(bytes(size - len(held)))

    def _check_size(self, name: str) -> None:
        size = os.fstat(self._file(name)).st_size
        if size != len(self._held[name]):
            raise Wrong(name, f"{name}: its size is {size}, and must be {len(self._held[name])}")

    def _compare(self, name: str, offset: int, found: bytes, size: int) -> None:
        wanted = self._held[name][offset : offset + size]
        if found == wanted:
            return
        if len(found) != len(wanted):
            raise Wrong(name, f"{name}: {len(found)} bytes at {offset}, of {size} asked; there must be {len(wanted)}")
        bad = [i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
        at, last = bad[0], bad[-1]
        raise Wrong(
            name,
            f"{name}: {len(bad)} bytes are wrong between {offset + at} (page {(offset + at) // PAGE}) and "
            f"{offset + last} (page {(offset + last) // PAGE}) of {len(self._held[name])}:\n"
            f"  found     {found[at : at + _SHOWN]!r}\n  must be   {bytes(wanted[at : at + _SHOWN])!r}\n"
            "words of seven hexadecimal digits name the operation that wrote them",
        )


def request(what: str) -> None:
    """Has the other side do something to the machine."""
    print(json.dumps({"request": what}), flush=True)
    if not sys.stdin.readline():
        raise SystemExit("the other side is gone")


def main(directory: str, seed: str, count: str, progress: str) -> None:
    """Plays to the end, or to the first thing that is wrong."""
    with Path(progress).open("r+b") as file, mmap.mmap(file.fileno(), 8) as shown:
        player = Player(Path(directory))
        for operation in operations(int(seed), int(count)):
            struct.pack_into("<Q", shown, 0, operation.number)
            try:
                player.play(operation)
            except Wrong as error:
                print(json.dumps({"wrong": str(error), "file": error.file}), flush=True)
                return
            except OSError as error:
                print(json.dumps({"wrong": f"{error!r}", "file": operation.file}), flush=True)
                return
        try:
            player.check_all()
        except Wrong as error:
            print(json.dumps({"wrong": str(error), "file": error.file}), flush=True)
            return
        player.close()
    print(json.dumps({"done": int(count)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
