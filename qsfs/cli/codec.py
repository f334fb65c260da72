"""`qsfs codec`: any file to n sealed shard files and back, without a file system, configuration or backends."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qsfs.cli import codec_parser
from qsfs.errors import ConfigError, Corrupt

if TYPE_CHECKING:
    from qsfs.codec.decode import Report
    from qsfs.codec.encode import Source
    from qsfs.codec.survey import Found
    from qsfs.format.erasure import CodeParams

_PROGRESS_SECONDS = 0.2
_BUFFER = 1 << 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `codec` and its subcommands."""
    codec_parser.add_parser(subparsers)


def run(args: argparse.Namespace) -> int:
    """Runs the action.  Raises what the modules of `qsfs.codec` raise."""
    if getattr(args, "threads", None) is not None and not 1 <= args.threads <= 256:
        raise ConfigError(f"--threads {args.threads}: must be 1 to 256")
    if not 1 <= getattr(args, "compression_level", 1) <= 22:
        raise ConfigError(f"--compression-level {args.compression_level}: must be 1 to 22")
    # What is half written is taken away also when it is ended from outside.
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        code: int = globals()[f"_{args.action}"](args)
        return code
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _encode(args: argparse.Namespace) -> int:
    from qsfs.cli.output import print_json
    from qsfs.clock import SystemClock
    from qsfs.codec.encode import encode, losses_survived, shard_paths
    from qsfs.values import counted, format_size

    clock, code = SystemClock(), _code(args)
    directories = [_directory(name) for name in args.output]
    source, size, name = _source(args.file)
    paths = shard_paths(directories, args.name or name, code.n)
    secret = _secret_for_encoding(args)
    with source.stream, contextlib.ExitStack() as stack:
        stack.callback(_end_progress)
        made = encode(
            source,
            paths,
            secret=secret,
            code=code,
            clock=clock,
            level=args.compression_level,
            threads=args.threads,
            force=args.force,
            say=_progress("encoded", size, clock.monotonic),
        )
        _warn_if_changed(args.file, source)
    places = len({path.parent for path in paths})
    survived = losses_survived(places, code)
    if args.json:
        print_json(
            {
                "archive": made.manifest.archive_id.hex(),
                "length": made.manifest.length,
                "blake3": made.manifest.digest.hex(),
                "stored_bytes": made.stored_bytes,
                "files": [str(path) for path in made.files],
                "files_that_may_be_lost": code.m,
                "directories": places,
                "directories_that_may_be_lost": survived,
            }
        )
        return 0
    print(
        f"archive {made.manifest.archive_id.hex()}: {counted(made.manifest.length, 'byte')} in "
        f"{counted(code.n, 'shard file')}, {format_size(made.stored_bytes)} together"
    )
    print(f"any {code.m} of the shard files may be lost; of {_places(places)} {_of_places(survived, places)}")
    if args.new_key_file:
        print(f"wrote {args.new_key_file}: keep copies elsewhere; without it the archive is lost")
    return 0


def _warn_if_changed(name: str, source: Source) -> None:
    import os

    found = os.fstat(source.stream.fileno()) if source.mtime_ns else None
    if found is not None and found.st_mtime_ns != source.mtime_ns:
        print(
            f"qsfs: warning: {name} changed while it was read: what was encoded may be no state of it", file=sys.stderr
        )


def _places(places: int) -> str:
    return "the one directory" if places == 1 else f"the {places} directories"


def _of_places(survived: int, places: int) -> str:
    if survived == 0:
        return "none" + (": use more, or more parity shards" if places > 1 else "")
    return f"any {survived}"


def _decode(args: argparse.Namespace) -> int:
    from qsfs.clock import SystemClock
    from qsfs.codec.decode import decode
    from qsfs.codec.files import NewFile
    from qsfs.codec.survey import described

    clock = SystemClock()

    def work(found: Found) -> int:
        say = _progress("checked" if args.check else "decoded", found.archive.manifest.length, clock.monotonic)
        options = {"thorough": not args.quick, "threads": args.threads, "say": say}
        if args.check or args.output == "-":
            report = decode(found, None if args.check else _to_stdout, **options)
            sys.stdout.flush()
            _end_progress()
            _tell(args, report, None if args.check else "-")
            return Corrupt.exit_code if args.check and report.damaged else 0
        target = Path(_name(found) if args.output is None else args.output)
        file = NewFile(target, clock, mode=0o600, force=args.force)
        try:
            report = decode(found, file.write, **options)
            file.set_attributes(found.archive.manifest.mode & 0o777, found.archive.manifest.mtime_ns)
            file.flush()
            file.publish()
        finally:
            file.close()
        _end_progress()
        _tell(args, report, str(target))
        if not args.json:
            print(f"{target}: {described(found)}")
        return 0

    return _with_archive(args, work)


def _repair(args: argparse.Namespace) -> int:
    from qsfs.cli.output import print_json
    from qsfs.clock import SystemClock
    from qsfs.codec.decode import decode
    from qsfs.codec.repair import needing_repair, repair, stem_of

    clock = SystemClock()
    directories = [_directory(name) for name in args.output]

    def work(found: Found) -> int:
        length = found.archive.manifest.length
        report = decode(found, None, threads=args.threads, say=_progress("checked", length, clock.monotonic))
        _end_progress()
        if report.lost:
            raise report.lost[0]
        numbers = needing_repair(report)
        paths = []
        if numbers:
            paths = repair(
                found,
                numbers,
                directories,
                args.name or stem_of(found),
                clock=clock,
                force=args.force,
                threads=args.threads,
                say=_progress("repaired", length, clock.monotonic),
            )
            _end_progress()
        if args.json:
            print_json({**report.to_json(), "made": [str(path) for path in paths]})
            return 0
        for line in report.sentences():
            print(line)
        for path in paths:
            print(f"made: {path}")
        if not paths:
            print("nothing is missing or damaged")
        return 0

    return _with_archive(args, work)


def _inspect(args: argparse.Namespace) -> int:
    from qsfs.cli.output import print_json
    from qsfs.codec.inspect import inspect_file
    from qsfs.codec.survey import close_files, open_files
    from qsfs.errors import NotFound

    secret = None if args.key_file is None else _read_key(Path(args.key_file))
    files, unreadable = open_files([Path(path) for path in args.paths])
    try:
        if not files:
            reasons = "".join(f"; {path}: {why}" for path, why in unreadable)
            raise NotFound(f"no shard file is among what was given{reasons}")
        told = [inspect_file(file, secret) for file in files]
        told += [{"file": str(path), "problems": [f"unreadable: {why}"]} for path, why in unreadable]
    finally:
        close_files(files)
    if args.json:
        print_json(told)
    else:
        for each in told:
            _print_inspected(each)
    bad = any(each["problems"] or each.get("shards", {}).get("not_good") for each in told)
    return Corrupt.exit_code if bad else 0


def _print_inspected(told: dict[str, object]) -> None:
    print(told["file"])
    for name, value in told.items():
        if name == "file" or value == []:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key.replace('_', ' ')} {_shown(item)}" for key, item in value.items() if item != [])
        print(f"  {name.replace('_', ' ')}: {_shown(value)}")


def _shown(value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _bench(args: argparse.Namespace) -> int:
    import os
    from dataclasses import asdict

    from qsfs.cli.output import format_table, print_json
    from qsfs.clock import SystemClock
    from qsfs.codec.bench import bench
    from qsfs.errors import DependencyMissing, FormatMismatch
    from qsfs.format.erasure import Code

    if not 0 < args.seconds <= 3600:
        raise ConfigError(f"--seconds {args.seconds:g}: must be above 0 and at most 3600")
    codes = []
    for name in ("zfec", "isa-l") if args.codec is None else (args.codec,):
        args.codec, wanted = name, args.codec
        try:
            code = _code(args)
            Code(code)
            codes.append(code)
        except (DependencyMissing, FormatMismatch) as error:
            if wanted is not None or name == "zfec":
                raise
            print(f"qsfs: left out: {error}", file=sys.stderr)
        args.codec = wanted
    threads = args.threads or os.cpu_count() or 1
    measured = bench(codes, SystemClock(), seconds=args.seconds, level=args.compression_level, threads=threads)
    if args.json:
        print_json([asdict(each) for each in measured])
        return 0
    both = ("compress", "seal")
    rows = [
        (
            "any" if m.step in both else m.codec,
            m.step,
            m.threads,
            f"{m.mb_per_second:.0f}",
            f"{m.mb_per_cpu_second:.0f}",
        )
        for m in measured
    ]
    print(f"{codes[0].k}+{codes[0].m}, zstd level {args.compression_level}; half of the data compresses")
    print(format_table(("codec", "step", "threads", "MB/s", "MB per CPU s"), rows))
    return 0


def _with_archive(args: argparse.Namespace, work: Callable[[Found], int]) -> int:
    from qsfs.codec.survey import close_files, find_archive, open_files

    wanted = None
    if args.id is not None:
        try:
            wanted = bytes.fromhex(args.id)
        except ValueError:
            raise ConfigError(f"--id {args.id}: not the id of an archive (32 hexadecimal digits)") from None
    secret = None if args.key_file is None else _read_key(Path(args.key_file))
    files, unreadable = open_files([Path(path) for path in args.paths])
    try:
        return work(find_archive(files, secret, wanted, unreadable))
    finally:
        _end_progress()
        close_files(files)


def _code(args: argparse.Namespace) -> CodeParams:
    from qsfs.format.erasure import CodeParams
    from qsfs.values import CODECS

    if args.data_shards < 1 or args.parity_shards < 0 or args.data_shards + args.parity_shards > 256:
        raise ConfigError(
            f"{args.data_shards}+{args.parity_shards} shards: there must be at least one data shard and at most 256 "
            "shards in all"
        )
    return CodeParams(args.data_shards, args.data_shards + args.parity_shards, CODECS[args.codec])


def _directory(name: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        raise ConfigError(f"--output {name}: is not a directory; make it, or attach its disk")
    return path


def _source(name: str) -> tuple[Source, int | None, str]:
    """The source, its length if it is known, and the name of its shard files."""
    import os
    import stat

    from qsfs.codec.encode import Source

    if name == "-":
        return Source(sys.stdin.buffer, b"stdin"), None, "stdin"
    path = Path(name)
    try:
        stream = path.open("rb", buffering=_BUFFER)
        found = os.fstat(stream.fileno())
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from error
    regular = stat.S_ISREG(found.st_mode)
    mode, mtime_ns = (found.st_mode & 0o777, max(0, found.st_mtime_ns)) if regular else (0o644, 0)
    return Source(stream, os.fsencode(path.name), mode, mtime_ns), found.st_size if regular else None, path.name


def _secret_for_encoding(args: argparse.Namespace) -> bytes:
    from qsfs.cli.init import _write
    from qsfs.clock import SystemClock
    from qsfs.format.archive import PUBLIC_SECRET
    from qsfs.format.keys import new_key_file

    if args.no_encryption:
        return PUBLIC_SECRET
    if args.new_key_file is None:
        return _read_key(Path(args.key_file))
    path = Path(args.new_key_file)
    try:
        _write(path, new_key_file(SystemClock().random_bytes), 0o600)
    except FileExistsError:
        raise ConfigError(f"{path}: exists; use it with --key-file, or choose another name") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    return _read_key(path)


def _read_key(path: Path) -> bytes:
    from qsfs.errors import KeyFileError
    from qsfs.format.keys import parse_key_file

    try:
        return parse_key_file(path.read_text("ascii"))
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise KeyFileError(f"{path}: the key file cannot be read: {reason}; use a copy of it") from error


def _name(found: Found) -> str:
    """The name that the archive keeps, if it may be one here."""
    import os

    name = os.fsdecode(found.archive.manifest.name)
    if not name or "/" in name or name in (".", "..") or "\0" in name:
        raise ConfigError(f"the archive keeps no usable name ({name!r}); name a file with --output")
    return name


def _to_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)


def _tell(args: argparse.Namespace, report: Report, output: str | None) -> None:
    """Says what was found wrong: where the file itself goes to standard output, on standard error."""
    from qsfs.cli.output import print_json
    from qsfs.codec.survey import described

    if args.json and output != "-":
        print_json({**report.to_json(), "output": output})
        return
    for line in report.sentences():
        print(line, file=sys.stdout if args.check else sys.stderr)
    if args.check:
        print(described(report.found))
        if report.lost:
            print("cannot be decoded from these shard files")
        elif report.damaged:
            print(f"can be decoded; {_spare(report)}; make what is missing or damaged again with 'qsfs codec repair'")
        else:
            print(f"whole; {_spare(report)}")


def _spare(report: Report) -> str:
    spare = report.spare
    if spare is None:
        return "not every shard was read"
    more = "" if not report.damaged else " more"
    return f"any {spare}{more} of its shard files may be lost" if spare else "none of its shard files may be lost"


def _progress(what: str, size: int | None, monotonic: Callable[[], float]) -> Callable[[int], None]:
    """Tells how far it is, and how fast, to a person who watches."""
    from qsfs.values import format_size

    start = last = monotonic()

    def say(done: int) -> None:
        nonlocal last
        now = monotonic()
        if not sys.stderr.isatty() or now - last < _PROGRESS_SECONDS:
            return
        last = now
        whole = "" if size is None else f" of {format_size(size)}"
        rate = format_size(done / (now - start))
        print(f"\r\x1b[K{what} {format_size(done)}{whole}, {rate}/s", end="", file=sys.stderr, flush=True)

    return say


def _end_progress() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
