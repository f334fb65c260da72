"""How a mount may differ from a plain directory: in numbers of inodes and sizes of directories, and nothing else."""

from __future__ import annotations

from typing import Any

from tests.random_calls.calls import Node

# The kernel keeps the times of a FUSE file by a clock that ticks some hundred times a second.
COARSE_NS = 30_000_000
_OWN = ("ino", "mtime", "ctime")

Tree = dict[bytes, Node]


def differences(plain: Tree, mount: Tree) -> list[str]:
    """What is not the same in two trees, times apart."""
    found = [f"only in the plain directory: {path!r}" for path in sorted(plain.keys() - mount.keys())]
    found += [f"only on the mount: {path!r}" for path in sorted(mount.keys() - plain.keys())]
    names: dict[int, int] = {}
    for path in sorted(plain.keys() & mount.keys()):
        here, there = plain[path], mount[path]
        found += node_differences(repr(path), here, there)
        if names.setdefault(here["ino"], there["ino"]) != there["ino"]:
            found.append(f"{path!r} is another name of the same file only in the plain directory")
    if len(set(names.values())) != len(names):
        found.append("two files of the plain directory are one on the mount")
    return found


def node_differences(what: str, plain: Node, mount: Node) -> list[str]:
    """What is not the same of two files."""
    found = []
    for key in sorted(plain.keys() | mount.keys()):
        here, there = plain.get(key), mount.get(key)
        if key in _OWN or here == there:
            continue
        if key == "content" and isinstance(here, bytes) and isinstance(there, bytes):
            found.append(f"{what}: {_bytes_differ(here, there)}")
        elif key == "mode":
            found.append(f"{what}: mode {here:o} in the plain directory, {there:o} on the mount")
        else:
            found.append(f"{what}: {key} {here!r} in the plain directory, {there!r} on the mount")
    return found


def _bytes_differ(here: bytes, there: bytes) -> str:
    if len(here) != len(there):
        return f"{len(here)} bytes in the plain directory, {len(there)} on the mount"
    at = next(i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b)
    return (
        f"contents differ from byte {at} (page {at // 4096}) on: {here[at : at + 16]!r} in the plain "
        f"directory, {there[at : at + 16]!r} on the mount"
    )


def time_differences(
    before: tuple[Tree, Tree], after: tuple[Tree, Tree], began_ns: int, *, untimed: frozenset[bytes] = frozenset()
) -> list[str]:
    """Times that one call changed on one side only.  `began_ns` is when it was made; `untimed` are left out."""
    known = {
        (node["ino"], before[1][path]["ino"]): (node, before[1][path])
        for path, node in before[0].items()
        if path in before[1]
    }
    found = []
    for path, here in after[0].items():
        there = after[1].get(path)
        old = known.get((here["ino"], there["ino"])) if there is not None else None
        if there is None or old is None or path in untimed:
            continue
        for key in ("mtime", "ctime"):
            changed = here[key] != old[0][key]
            if not changed and there[key] != old[1][key]:
                found.append(f"{path!r}: {key} changed on the mount only")
            elif changed and here[key] >= began_ns - COARSE_NS > there[key]:
                found.append(f"{path!r}: {key} is now on the plain directory only")
    return found


def same_files(before: Tree, after: Tree) -> list[str]:
    """Names that lead to another inode, or show other times, though no call was made in between."""
    return [
        f"{path!r}: {key} was {node[key]}, is {after[path][key]}"
        for path, node in before.items()
        if path in after
        for key in _OWN
        if node[key] != after[path][key]
    ]


def shown(value: Any) -> str:
    """A result, short."""
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}... ({len(text)})"
