"""`qsfs mount`: starts the daemon of a file system and returns once it is mounted."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from qsfs.errors import QsfsError, error_of

if TYPE_CHECKING:
    from qsfs.config import Config
    from qsfs.format.slots import Secret


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `mount`."""
    from qsfs.cli.unlock import add_unlock_options

    parser = subparsers.add_parser(
        "mount",
        help="mount the file system",
        description="Mount the file system. Returns once it is mounted; the daemon goes on in the "
        "background and logs to daemon.log in the cache directory. With too few backends it waits.",
    )
    parser.add_argument("--foreground", action="store_true", help="stay, and log to standard error")
    parser.add_argument(
        "--offline",
        action="store_true",
        help="mount without the backends: nothing is uploaded until enough of them answer",
    )
    parser.add_argument(
        "--read-only",
        action="store_true",
        help="mount a generation that a mount elsewhere published, without owning or writing anything",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--generation", type=int, metavar="G", help="with --read-only: this generation (default: the newest)"
    )
    which.add_argument(
        "--follow",
        action="store_true",
        help="with --read-only: move on whenever a newer generation is published; what is open stays as it is",
    )
    which.add_argument("--snapshot", metavar="NAME", help="with --read-only: the generation of this snapshot")
    parser.add_argument(
        "--head",
        metavar="DIGEST",
        help="with --read-only, where two copies of a machine have sent heads: the one to show, by the first digits of "
        "its digest",
    )
    parser.set_defaults(wrong=parser.error)
    add_unlock_options(parser)
    parser.add_argument("--report-fd", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--secret-stdin", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--beside", nargs=3, metavar=("NAME", "MOUNTPOINT", "BYTES"), help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Mounts; raises what the daemon could not do."""
    from qsfs.cli.unlock import unlocking
    from qsfs.config import Config

    config = Config.load(args.config)
    if args.beside is not None:
        from pathlib import Path

        from qsfs.daemon.beside import beside

        args.snapshot, place, cache_bytes = args.beside
        config = beside(config, args.snapshot, Path(place), int(cache_bytes))
    chosen = args.generation is not None or args.snapshot is not None
    args.read_only = args.read_only or config.mount.read_only or config.mount.follow
    args.follow = args.follow or (config.mount.follow and not chosen)
    if args.read_only and args.offline:
        args.wrong("a read-only mount and --offline exclude each other: a generation is read from the backends")
    if not args.read_only and (chosen or args.follow):
        args.wrong("--generation, --snapshot and --follow need --read-only")
    if not args.read_only and args.head is not None:
        args.wrong("--head needs --read-only; to go on from a head, give it to 'qsfs takeover'")
    secret = _handed_over() if args.secret_stdin else unlocking(args)
    if args.foreground:
        return _serve(config, args, secret)
    words = [
        *(["--offline"] if args.offline else []),
        *(["--debug"] if args.debug else []),
        *(["--read-only"] if args.read_only else []),
        *(["--follow"] if args.follow else []),
        *(["--generation", str(args.generation)] if args.generation is not None else []),
        *(["--snapshot", args.snapshot] if args.snapshot is not None else []),
        *(["--head", args.head] if args.head is not None else []),
    ]
    return start(config, words, secret, as_json=args.json)


def _handed_over() -> Secret:
    from qsfs.daemon.secret import decode_secret

    return decode_secret(sys.stdin.buffer.read())


def _serve(config: Config, args: argparse.Namespace, secret: Secret | None) -> int:
    from qsfs.clock import SystemClock
    from qsfs.daemon import log, reading, service
    from qsfs.daemon.lock import require_access
    from qsfs.remote.readable import Wanted

    report = _Report(args.report_fd)
    try:
        require_access(config.cache.directory)
        log_file, most_bytes = config.log.file, 0
        if args.report_fd is not None and log_file is None and config.cache.directory.is_dir():
            log_file, most_bytes = config.cache.directory / "daemon.log", log.OWN_LOG_BYTES
        log.set_up(config.log, log_file, most_bytes=most_bytes)
        if args.read_only:
            reading.run(
                config,
                SystemClock(),
                Wanted(args.generation, args.snapshot, args.head),
                follow=args.follow,
                secret=secret,
                ready=lambda shown: report.send(ready=True, shown=shown),
                waiting=lambda what: report.send(waiting=what),
            )
            return 0
        service.run(
            config,
            SystemClock(),
            offline=args.offline,
            secret=secret,
            ready=lambda offline: report.send(ready=True, offline=offline),
            waiting=lambda what: report.send(waiting=what),
        )
    except BaseException as error:
        expected = _expected(error)
        if expected is not None:
            report.send(error=type(expected).__name__, message=str(expected))
            raise expected from None
        report.send(error="QsfsBug", message=f"the daemon ended: {error!r}; see its log")
        raise
    return 0


def _expected(error: BaseException) -> QsfsError | None:
    """The one expected error in `error`, which a nursery may have wrapped."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, QsfsError) else None


class _Report:
    """Tells the command that started the daemon how it goes: JSON lines on a pipe."""

    def __init__(self, file: int | None) -> None:
        self._file = file

    def send(self, **fields: Any) -> None:
        """Sends one line; after `ready` or `error` the pipe is closed."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            os.write(self._file, json.dumps(fields).encode() + b"\n")
        if "waiting" not in fields:
            os.close(self._file)
            self._file = None


def start(config: Config, words: list[str], secret: Secret | None, *, as_json: bool) -> int:
    """Starts the daemon with `words` for `qsfs mount`, and says when it is mounted; raises what it could not do."""
    from qsfs.daemon.secret import encode_secret

    read, write = os.pipe()
    command = [sys.executable, "-m", "qsfs.cli.main", "-c", str(config.path), "mount", "--foreground"]
    command += ["--report-fd", str(write), *words]
    command += [] if secret is None else ["--secret-stdin"]
    environment = {"MALLOC_ARENA_MAX": "2", **os.environ}
    with open(os.devnull, "r+b") as nothing:  # noqa: PTH123 - a device, not a path of ours
        process = subprocess.Popen(
            command,
            stdin=nothing if secret is None else subprocess.PIPE,
            stdout=nothing,
            stderr=nothing,
            pass_fds=(write,),
            start_new_session=True,
            cwd="/",
            env=environment,
        )
    os.close(write)
    if process.stdin is not None and secret is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(encode_secret(secret))
    with open(read, encoding="utf-8") as lines:  # noqa: PTH123 - a descriptor
        for line in lines:
            answer = json.loads(line)
            if "waiting" in answer:
                print(f"waiting for {answer['waiting']} (Ctrl-C leaves the daemon waiting)", file=sys.stderr)
            elif "error" in answer:
                raise error_of(answer["error"], answer["message"])
            else:
                return _report_mounted(config, process.pid, as_json, answer)
    process.wait()
    raise QsfsError(
        f"the daemon ended with {process.returncode} before it was mounted; "
        f"see {config.log.file or config.cache.directory / 'daemon.log'}"
    )


def _report_mounted(config: Config, pid: int, as_json: bool, answer: dict[str, Any]) -> int:
    from qsfs.cli.output import print_json
    from qsfs.cli.reading import generation_line

    shown, offline = answer.get("shown"), answer.get("offline", "")
    if as_json:
        more = {"offline": offline} if shown is None else {"read_only": shown}
        print_json({"mountpoint": str(config.filesystem.mountpoint), "process": pid, **more})
    elif shown is not None:
        print(f"mounted read-only on {config.filesystem.mountpoint} (process {pid}): {generation_line(shown)}")
    else:
        print(f"mounted on {config.filesystem.mountpoint} (process {pid})")
        if offline:
            print(f"warning: {offline}", file=sys.stderr)
    return 0
