"""What lies on a backend and is not what was written: never returned, named, mended, and in nobody's way."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qsfs.format.extent import PackKind
from qsfs.format.head import HeadRef, parse_head_key
from qsfs.format.keys import KeyRing, parse_key_file
from qsfs.format.shard import open_shard, parse_shard_key
from qsfs.format.superblock import SUPERBLOCK_KEY, open_superblock
from tests.support import scratch as places
from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, Inside, check, content, forget, store

pytestmark = pytest.mark.mount

K, M, COUNT = 4, 2, 8
MIB = 1 << 20
NAMES = ("a", "b", "c", "d")


@dataclass(frozen=True)
class Place:
    """One shard where it lies."""

    pack: str
    kind: PackKind
    shard: int
    backend: int
    key: bytes
    value: bytes


@pytest.fixture(scope="module")
def stored(all_servers: Servers) -> Iterator[FileSystem]:
    """Four files in packs of their own; not mounted.  Whoever damages something mends it."""
    with (
        places.scratch_directory("damage") as path,
        FileSystem(
            path,
            shards=(K, M),
            count=COUNT,
            servers=all_servers,
            namespace="damage",
            settings=QUICK | {"fetch.deadline_seconds": 10},
        ) as fs,
    ):
        fs.format()
        fs.mount()
        for name in NAMES:
            store(fs, name, MIB)
            fs.sync()
        fs.umount()
        yield fs


@pytest.fixture
def fs(stored: FileSystem, fleet: Servers) -> Iterator[FileSystem]:
    """`stored`, with nothing local but the tree."""
    forget(stored)
    yield stored
    if stored.process:
        stored.umount()
    stored.run("fsck", "--deep", "--repair", code=None)


def inside(fs: FileSystem, backend: int, suffix: str = "") -> Inside:
    return Inside(fs.servers, backend, fs.namespace + suffix)


def keys_of(fs: FileSystem) -> KeyRing:
    secret = parse_key_file((fs.directory / "qsfs.key").read_text())
    with inside(fs, 0) as data:
        return open_superblock(data.call("GET", SUPERBLOCK_KEY), secret)[1]


def shards(fs: FileSystem) -> dict[str, list[Place]]:
    """Every shard on every backend, by pack, in the order of their numbers."""
    keys = keys_of(fs)
    found: dict[str, list[Place]] = {}
    for backend in range(COUNT):
        with inside(fs, backend) as data:
            for key, value in data.values().items():
                named = parse_shard_key(key)
                if named is None:
                    continue
                kind = open_shard(value, keys, key=key).ref.kind
                place = Place(named.pack_id.hex(), kind, named.number, backend, key, value)
                found.setdefault(place.pack, []).append(place)
    return {pack: sorted(there, key=lambda place: place.shard) for pack, there in found.items()}


def put(fs: FileSystem, place: Place, value: bytes | None) -> None:
    """Replaces a shard; None: a byte of it rots on the backend's disk."""
    if value is None:
        rot(fs, place)
        return
    with inside(fs, place.backend) as data:
        data.call("SET", place.key, value)


def rot(fs: FileSystem, place: Place) -> None:
    for path in fs.servers.namespace_directory(place.backend, fs.namespace).glob("d*"):
        with path.open("r+b") as file:
            at = file.read().find(place.value)
            if at >= 0:
                middle = len(place.value) // 2
                file.seek(at + middle)
                file.write(bytes([place.value[middle] ^ 1]))
                return
    raise AssertionError(f"shard {place.shard} of pack {place.pack} lies in no data file")


def flipped(place: Place, others: list[Place]) -> bytes:
    at = random.Random(place.pack).randrange(len(place.value))
    return place.value[:at] + bytes([place.value[at] ^ 0x10]) + place.value[at + 1 :]


def cut_short(place: Place, others: list[Place]) -> bytes:
    return place.value[: len(place.value) // 2]


def swapped(place: Place, others: list[Place]) -> bytes:
    """Another shard of the same pack: authentic, and not the one that the key names."""
    return next(other.value for other in others if other.pack == place.pack and other.shard != place.shard)


def replayed(place: Place, others: list[Place]) -> bytes:
    """The shard with this number of another pack: what a confused backend had there at another time."""
    return next(other.value for other in others if other.pack != place.pack and other.shard == place.shard)


def emptied(place: Place, others: list[Place]) -> bytes:
    return b""


def rotten(place: Place, others: list[Place]) -> None:
    return None


Way = Callable[[Place, list[Place]], bytes | None]
WAYS: list[Way] = [flipped, cut_short, swapped, replayed, emptied, rotten]


def damage(fs: FileSystem, packs: dict[str, list[Place]], each: int) -> list[Place]:
    """Damages `each` shards of every pack, in all ways in turn; returns where."""
    everyone = [place for there in packs.values() for place in there]
    done = []
    for turn, (pack, there) in enumerate(sorted(packs.items())):
        for index, place in enumerate(random.Random(pack).sample(there, each)):
            put(fs, place, WAYS[(turn * each + index) % len(WAYS)](place, everyone))
            done.append(place)
    return done


def named(report: dict[str, Any], kind: str) -> set[tuple[str, int, str]]:
    return {
        (finding["subject"]["pack"], finding["subject"]["shard"], finding["subject"]["backend"])
        for finding in report["findings"]
        if finding["kind"] == kind
    }


def subjects(fs: FileSystem, damaged: list[Place]) -> set[tuple[str, int, str]]:
    return {
        (place.pack, place.shard, f"backend {fs.servers.config(place.backend, fs.namespace).name}") for place in damaged
    }


def test_wrong_shards_are_never_returned_and_are_named_and_mended(fs: FileSystem, scratch: Path) -> None:
    packs = shards(fs)
    damaged = damage(fs, packs, M)
    report = fs.run("--json", "fsck", "--deep", code=4).json()
    assert named(report, "shard-wrong") == subjects(fs, damaged)
    fs.mount()
    for name in NAMES:
        check(fs, name)
    log = fs.log()
    fs.expect(r"WARNING qsfs.remote.reader: pack [0-9a-f]{32}, shard \d: backend .* not what was written")
    noticed = [place for place in damaged if f"pack {place.pack}, shard {place.shard}: backend" in log]
    assert any(place.kind is PackKind.DATA for place in noticed), "the log names what a read met"
    with fs.another_machine(scratch) as other:
        other.run("restore")
        assert other.run("fsck", "--local").returncode == 0
    fs.umount()
    report = fs.run("--json", "fsck", "--deep", "--repair", code=1).json()
    assert report["mended"] == report["errors"] and named(report, "shard-wrong") >= subjects(fs, damaged)
    fs.run("fsck", "--deep")
    now = shards(fs)
    for pack, there in packs.items():
        assert {p.shard: p.value for p in now[pack]} == {p.shard: p.value for p in there}


def test_what_is_lost_is_an_error_and_the_rest_and_older_copies_are_good(fs: FileSystem) -> None:
    packs = shards(fs)
    data = {pack: there for pack, there in packs.items() if there[0].kind is PackKind.DATA}
    lost = max(data, key=lambda pack: len(data[pack][0].value))
    # One shard more than may be.
    damaged = damage(fs, {lost: data[lost]}, M + 1)
    report = fs.run("--json", "fsck", "--deep", code=4).json()
    (finding,) = [finding for finding in report["findings"] if finding["kind"] == "pack-lost"]
    assert finding["subject"]["pack"] == lost and "inode" in finding["message"] and "pages" in finding["message"]
    assert fs.run("fsck", "--deep", "--repair", code=None).returncode & 4, "it cannot be mended, and that is said"
    fs.mount()
    fs.expect(
        r"WARNING qsfs.remote.reader: pack [0-9a-f]{32}, shard \d: backend",
        rf"ERROR qsfs.remote.fetch: [abcd] \(inode \d+\), page \d+: pack {lost} is lost",
    )
    wrong, failed = 0, 0
    for name in NAMES:
        wanted = content(name, MIB)
        file = os.open(fs.mountpoint / name, os.O_RDONLY)
        for offset in range(0, MIB, 4096):
            try:
                wrong += os.pread(file, 4096, offset) != wanted[offset : offset + 4096]
            except OSError as error:
                assert error.errno == errno.EIO
                failed += 1
        os.close(file)
    assert not wrong, f"{wrong} pages came back with other bytes"
    assert 0 < failed <= MIB // 4096, f"{failed} pages of 1024 failed: those of one pack, and no others"
    # "Bring back an older copy": one shard is enough.
    put(fs, damaged[0], damaged[0].value)
    for name in NAMES:
        check(fs, name)
    fs.umount()


def heads(fs: FileSystem, backend: int) -> dict[HeadRef, tuple[bytes, bytes]]:
    """The heads on a backend: key and value."""
    with inside(fs, backend, ".control") as control:
        found = {}
        for key, value in control.values().items():
            ref = parse_head_key(key)
            if ref is not None:
                found[ref.ref] = (key, value)
        return found


def test_damaged_swapped_and_rolled_back_heads_mislead_nobody(fs: FileSystem, scratch: Path) -> None:
    held = heads(fs, 0)
    older, newest = sorted(held)[-2:]
    for backend, ways in {0: "flip", 1: "replay", 2: "roll back"}.items():
        with inside(fs, backend, ".control") as control:
            key, value = heads(fs, backend)[newest]
            if ways == "flip":
                control.call("SET", key, value[:-9] + bytes([value[-9] ^ 1]) + value[-8:])
            elif ways == "replay":
                control.call("SET", key, held[older][1])
            else:
                control.call("DEL", key)
    report = fs.run("--json", "fsck", code=4).json()
    accused = {finding["subject"]["backend"] for finding in report["findings"] if "copy" in finding["kind"]}
    assert accused == {f"backend {fs.servers.config(index, fs.namespace + '.control').name}" for index in range(3)}
    with fs.another_machine(scratch) as other:
        restored = other.run("--json", "restore").json()
        assert restored["generation"] == newest.generation
    fs.mount()
    for name in NAMES:
        check(fs, name)
    store(fs, "e", MIB)
    fs.sync()
    check(fs, "e")
    fs.umount()
    assert fs.run("fsck", "--deep", "--repair", code=None).returncode in (0, 1)
    fs.run("fsck", "--deep")
