"""The report of a drill: what was proven, what was not, and how long it takes; for people and programs."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator
from typing import Any

from qsfs.errors import Corrupt, DataLost, QsfsError, Unavailable
from qsfs.health.drill import DrillResult
from qsfs.health.drill_plan import Problems, Tally, Verdict
from qsfs.remote.newest import describe_head
from qsfs.values import counted, format_duration, format_size

_MOST_NAMES = 50


def exit_code(result: DrillResult) -> int:
    """0: what was to be read was read and verified; else that of the worst that was found (docs/errors.md)."""
    contents = result.contents
    if contents.lost.count:
        return DataLost.exit_code
    if result.verdict is Verdict.FAILED:
        return Corrupt.exit_code
    return 0 if result.verdict is Verdict.PROVEN else Unavailable.exit_code


def could_still_lose(result: DrillResult) -> int | None:
    """How many more backends may be lost of those that hold what was looked at; None: nothing was.

    As far as backends list shards: of each pack that was read, and of all metadata packs.
    """
    spares = set(result.contents.spares) | set(result.metadata_spares)
    return min(spares, default=None)


def text_of(result: DrillResult) -> str:
    """The report as Markdown."""
    return "\n".join(_lines(result)) + "\n"


def failure_text(error: QsfsError, now_ns: int) -> str:
    """The report of a drill that did not come as far as to have a file system."""
    failed = isinstance(error, DataLost | Corrupt)
    verdict = Verdict.FAILED if failed else Verdict.NOT_PROVEN
    return f"# Drill of {_moment(now_ns)}: {verdict.value}\n\nNothing could be restored: {error}\n"


def json_of(result: DrillResult) -> dict[str, Any]:
    """The report for programs; bytes and seconds, times in seconds since 1970."""
    contents = result.contents
    compared, rows = contents.compared, contents.rows
    return {
        "verdict": result.verdict.value,
        "exit_code": exit_code(result),
        "started_at": result.started_ns / 1e9,
        "file_system": result.file_system,
        "label": result.label,
        "generation": result.ref.generation,
        "epoch": result.ref.owner.epoch,
        "cut_at": result.head.time_ns / 1e9,
        "newest_generation": result.newest.generation,
        "withstands": result.withstands,
        "share": result.plan.share,
        "seed": result.plan.seed,
        "counted_as_down": list(result.down),
        "answered": list(result.answered),
        "silent": list(result.silent),
        "metadata": {
            "packs": result.metadata_packs,
            "files": result.restored.files,
            "directories": result.restored.directories,
            "others": result.restored.others,
            "local_only_files": result.restored.emptied,
            "spare_shards": _counts(result.metadata_spares),
        },
        "contents": {
            "extents": contents.all_extents,
            "bytes": contents.all_bytes,
            "chosen_extents": contents.chosen_extents,
            "chosen_bytes": contents.chosen_bytes,
            "read_extents": contents.read_extents,
            "read_bytes": contents.read_bytes,
            "downloaded_bytes": contents.downloaded_bytes,
            "decoded_packs": contents.decoded_packs,
            "whole": contents.whole,
            "gave_up": contents.gave_up,
            "missing": _problems(contents.missing),
            "lost": _problems(contents.lost),
            "wrong": _problems(contents.wrong),
            "spare_shards": _counts(contents.spares),
            "packs_not_looked_at": contents.not_looked,
            "absent_shards": contents.unlisted,
        },
        "could_still_lose": could_still_lose(result),
        "recorded_spare_shards": _counts(result.recorded),
        "mount": {
            "asked": compared is not None,
            "failure": contents.compare_failure,
            "same_pages": 0 if compared is None else compared.same,
            "remote_pages": 0 if compared is None else compared.remote,
            "changed_pages": 0 if compared is None else compared.changed,
            "different": _problems(Problems() if compared is None else compared.differ),
            "rows": {
                "asked": rows is not None,
                "failure": "" if rows is None else rows.failure,
                "same": 0 if rows is None else rows.same,
                "changed": 0 if rows is None else rows.changed,
                "different": _problems(Problems() if rows is None else rows.differ),
            },
        },
        "seconds": {
            "find": result.find_seconds,
            "restore": result.restore_seconds,
            "read": contents.seconds,
            "read_all": contents.seconds_for_all,
        },
    }


def _lines(result: DrillResult) -> Iterator[str]:
    contents = result.contents
    of_what = "" if result.verdict is Verdict.FAILED else ", all contents" if contents.whole else ", of a sample"
    yield f"# Drill of {_moment(result.started_ns)}: {result.verdict.value}{of_what}"
    yield ""
    yield f"File system {result.file_system}{f' ({result.label})' if result.label else ''}, " + (
        f"{describe_head(result.ref)}, cut {_moment(result.head.time_ns)}."
    )
    yield ""
    yield "## Proven"
    yield ""
    yield (
        f"- From the backends and the key alone came {counted(result.restored.files, 'file')}, "
        f"{_directories(result.restored.directories)} and {counted(result.restored.others, 'other')} "
        f"({counted(result.metadata_packs, 'metadata pack')}, all of them read and verified)."
    )
    yield (
        f"- {format_size(contents.read_bytes)} of {format_size(contents.all_bytes)} of contents "
        f"({contents.read_extents:,} of {counted(contents.all_extents, 'extent')}) were read, and every byte of "
        "them was authenticated."
    )
    if contents.decoded_packs:
        yield f"- {counted(contents.decoded_packs, 'pack')} had to be decoded from parity, and could be."
    compared = contents.compared
    if compared is not None and compared.same:
        yield f"- {counted(compared.same, 'page')} are byte for byte what the running mount holds."
    if contents.rows is not None and contents.rows.same:
        yield f"- {counted(contents.rows.same, 'record')} of names and attributes are what the running mount holds."
    least = could_still_lose(result)
    if least is not None and least >= 0:
        yield f"- Of each pack that was read, and of all metadata, {_more(least)} (as far as backends list shards)."
    yield ""
    yield "## Not proven"
    yield ""
    yield from (f"- {line}" for line in _not_proven(result) or ["Nothing was left out."])
    failures = list(_failures(contents))
    if failures:
        yield ""
        yield "## Failed"
        yield ""
        yield from failures
    yield ""
    yield "## Backends"
    yield ""
    yield f"- {counted(len(result.answered), 'backend')} answered to the end."
    if result.down:
        yield f"- Counted as down by this drill (seed {result.plan.seed}): {_names(result.down)}."
    silent = sorted(set(result.silent) - set(result.down))
    if silent:
        yield f"- Did not answer: {_names(silent)}."
    if result.recorded:
        spares = _spares(result.recorded)
        yield f"- All packs, by the records of where their shards lie and of who answers: {spares}."
    for sentence in result.sentences:
        yield f"- {sentence}"
    yield ""
    yield "## Times"
    yield ""
    yield f"- Finding the generation took {format_duration(result.find_seconds)}."
    yield f"- Restoring took {format_duration(result.restore_seconds)}; a mount could begin then."
    rate = contents.bytes_per_second
    if rate is not None and contents.seconds_for_all is not None:
        yield f"- Reading took {format_duration(contents.seconds)}, {format_size(rate)} a second."
        yield f"- Reading all contents takes about {format_duration(contents.seconds_for_all)} at this rate."


def _not_proven(result: DrillResult) -> list[str]:
    contents = result.contents
    found = []
    unread = contents.all_extents - contents.chosen_extents
    if unread:
        found.append(
            f"{format_size(contents.all_bytes - contents.chosen_bytes)} of contents ({counted(unread, 'extent')}) "
            f"were not in the sample (share {result.plan.share:g}, seed {result.plan.seed}): nothing is known of "
            "them. 'qsfs drill --full' reads all."
        )
    if result.withstands < 0:
        found.append("That this is the newest generation: too few backends answered to rule out a newer one.")
    elif result.ref != result.newest:
        found.append(f"Anything of {describe_head(result.newest)}, which is newer than what was asked for.")
    if contents.missing.count:
        found.append(f"{counted(contents.missing.count, 'extent')} did not come; nothing is known of them:")
        found += [f"  {what}" for what in contents.missing.named]
    if contents.gave_up:
        rest = contents.chosen_extents - contents.read_extents - contents.missing.count
        rest -= contents.lost.count + contents.wrong.count
        found.append(f"{counted(rest, 'extent')} of the sample were not tried after that.")
    if contents.not_looked:
        found.append(f"Of {counted(contents.not_looked, 'pack')} not how many shards are left: no answer in time.")
    if min(result.contents.spares | result.metadata_spares, default=0) < 0:
        found.append("That what was read can be read again: of some packs fewer than k shards are listed now.")
    if result.restored.emptied:
        found.append(
            f"The contents of {counted(result.restored.emptied, 'file')} that policies keep local: they are empty "
            "after any restore."
        )
    compared = contents.compared
    if compared is None:
        found.append("That the mount holds the same: it was not asked.")
    else:
        if contents.compare_failure:
            found.append(f"That the mount holds the rest too: {contents.compare_failure}")
        if compared.changed:
            found.append(f"{counted(compared.changed, 'page')} changed on the mount since: not compared.")
        if compared.remote:
            found.append(f"{counted(compared.remote, 'page')} are not local on the mount: nothing to compare with.")
    rows = contents.rows
    if rows is not None and rows.failure:
        found.append(f"That the mount has the other names and attributes too: {rows.failure}")
    if rows is not None and rows.changed:
        found.append(f"{counted(rows.changed, 'record')} of names and attributes changed on the mount since.")
    return found


def _failures(contents: Tally) -> Iterator[str]:
    kinds = [
        (contents.lost, "are lost: too few shards are left, and every backend answered"),
        (contents.wrong, "are not what the metadata say"),
    ]
    for problems, what in kinds:
        if problems.count:
            yield f"- {counted(problems.count, 'extent')} {what}:"
            yield from (f"  - {named}" for named in problems.named)
    if contents.compared is not None and contents.compared.differ.count:
        yield f"- {counted(contents.compared.differ.count, 'page')} differ from what the running mount holds:"
        yield from (f"  - {named}" for named in contents.compared.differ.named)
    if contents.rows is not None and contents.rows.differ.count:
        records = counted(contents.rows.differ.count, "record")
        yield f"- {records} of names and attributes differ from what the running mount holds:"
        yield from (f"  - {named}" for named in contents.rows.differ.named)


def _spares(spares: Counter[int]) -> str:
    parts = []
    for spare in sorted(spares):
        may = f"may lose {spare} more" if spare >= 0 else f"lack {-spare} to be read"
        parts.append(f"{counted(spares[spare], 'pack')} {may}")
    return ", ".join(parts)


def _more(count: int) -> str:
    return f"{counted(count, 'more shard')} may be lost" if count else "no more shard may be lost"


def _directories(count: int) -> str:
    return f"{count:,} director" + ("y" if count == 1 else "ies")


def _names(names: tuple[str, ...] | list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _problems(problems: Problems) -> dict[str, Any]:
    return {"count": problems.count, "named": problems.named}


def _counts(spares: Counter[int]) -> dict[str, int]:
    return {str(spare): spares[spare] for spare in sorted(spares)}


def _moment(time_ns: int) -> str:
    return datetime.datetime.fromtimestamp(time_ns / 1e9, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
