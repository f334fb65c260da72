"""What `qsfs info` shows of a file or of everything below a directory."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Mapping
from typing import Any

import trio

from qsfs.daemon.jobs import Progress
from qsfs.daemon.walking import walk
from qsfs.filesystem.contents import Contents
from qsfs.filesystem.tree import Tree
from qsfs.remote.members import Members, State
from qsfs.store.schema import (
    PAGE,
    Inode,
    InodeFlag,
    PackRow,
    PackState,
)
from qsfs.store.store import Store
from qsfs.store.survey import Answering, FileSurvey, ListedExtent, holes, spare_now

MOST_LISTED = 500
"""Extents in one answer; `next_page` says where to go on."""
_MOST_PACKS = 8
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


def answering_of(members: Members, k: int) -> Answering:
    """Who answers now, by what the last calls gave."""
    numbers = {m.number for m in members if m.identified and m.state is not State.DOWN}
    return Answering(numbers, {m.number: m.entry.group for m in members}, k)


async def inform(
    store: Store,
    tree: Tree,
    contents: Contents,
    members: Members,
    k: int,
    root: Inode,
    progress: Progress,
    *,
    extents: bool = False,
    first_page: int = 0,
) -> dict[str, Any]:
    """Surveys a file, or all below a directory, in steps of a few milliseconds with requests in between."""
    names = {member.number: member.name for member in members}
    single = not stat.S_ISDIR(root.mode)
    answering = answering_of(members, k)
    survey = FileSurvey(
        store,
        answering,
        most_extents=MOST_LISTED if extents and single else 0,
        most_packs=_MOST_PACKS if single else 0,
    )
    kinds: Counter[str] = Counter()
    size = allocated = 0
    for batch in walk(tree, root):
        for number in batch:
            inode = store.inode(number)
            if inode is None:
                continue
            kinds[_KINDS.get(stat.S_IFMT(inode.mode), "other")] += 1
            if not stat.S_ISREG(inode.mode):
                continue
            attributes = contents.stat(inode)
            size += attributes.size
            allocated += attributes.allocated * PAGE
            survey.pages.uncovered += contents.uncovered_pages(number)
            for _ in survey.steps(inode, first_page):
                progress["extents"] = survey.extents
                await trio.lowlevel.checkpoint()
        progress["files"] = kinds.total()
        await trio.lowlevel.checkpoint()
    pages = survey.pages
    packs = survey.packs
    found: dict[str, Any] = {
        "inode": root.number,
        "kind": _KINDS.get(stat.S_IFMT(root.mode), "other"),
        "policy": [flag.name.lower() for flag in InodeFlag if root.flags & flag and flag.name],
        "contains": dict(kinds),
        "size": size,
        "allocated": allocated,
        "pages": {
            "hole": holes(size, pages) if single else None,
            "remote": pages.remote,
            "clean": pages.clean,
            "dirty": pages.dirty,
            "uncovered": pages.uncovered,
            "unpublished": pages.unpublished,
        },
        "extents": survey.extents,
        "packs": {
            "count": packs.count,
            "full": packs.full,
            "written": packs.count - packs.full - packs.missing,
            "missing_rows": packs.missing,
            "looked": packs.looked,
            "oldest_look_at": packs.oldest_look_ns / 1e9 if packs.oldest_look_ns else None,
            "spare_shards": _counts(packs.spares),
            "spare_shards_now": _counts(packs.spares_now),
            "lost_with_one_group": packs.group_deaths,
        },
        "shards": {names.get(n, f"entry {n}"): count for n, count in sorted(packs.shards.items())},
        "listed_packs": [_pack(pack, names, answering) for pack in survey.listed_packs],
    }
    if extents and single:
        found["listed_extents"] = [_extent(listed) for listed in survey.listed]
        found["next_page"] = survey.next_page
    return found


def _pack(pack: PackRow, names: Mapping[int, str], answering: Answering) -> dict[str, Any]:
    return {
        "id": pack.pack_id.hex(),
        "class": "full" if pack.state & PackState.FULL else "written",
        "looked": bool(pack.state & PackState.LOOKED),
        "verified_at": pack.verified_at_ns / 1e9 if pack.verified_at_ns else None,
        "written_at": pack.written_at_ns / 1e9,
        "live": pack.live,
        "spare_now": spare_now(pack, answering),
        "shards": [None if place < 0 else names.get(place, f"entry {place}") for place in pack.placement],
    }


def _extent(listed: ListedExtent) -> dict[str, Any]:
    row = listed.row
    return {
        "first_page": row.first,
        "pages": row.pages,
        "pack": listed.pack_id.hex(),
        "ordinal": row.ordinal,
        "sealed_bytes": row.sealed_length,
        "compressed": bool(row.codec),
    }


def _counts(spares: Counter[int]) -> dict[str, int]:
    return {str(spare): spares[spare] for spare in sorted(spares)}
