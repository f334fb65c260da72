"""`qsfs init`: writes a configuration and a key file, and makes the directories they name."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from qsfs.errors import ConfigError

if TYPE_CHECKING:
    from qsfs.config import BackendConfig

FIRST_PORT = 9900


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `init`."""
    parser = subparsers.add_parser(
        "init",
        help="write a configuration and a key file",
        description="Write DIR/NAME.toml and DIR/NAME.key and make the mount point and the cache "
        "directory. Nothing that exists is overwritten; no backend is asked.",
    )
    parser.add_argument("directory", metavar="DIR", nargs="?", default=".", help="default: here")
    parser.add_argument(
        "--backend", metavar="HOST:PORT[/NAMESPACE]", action="append", default=[], dest="addresses",
        help="a 0-db; give one for each",
    )  # fmt: skip
    parser.add_argument(
        "--backends", metavar="N", type=int, default=None,
        help="without --backend: list N embedded ones on this machine (default: shards + parity shards)",
    )  # fmt: skip
    parser.add_argument(
        "--port", metavar="P", type=int, default=FIRST_PORT,
        help=f"port of the first embedded backend, the others follow (default: {FIRST_PORT})",
    )  # fmt: skip
    parser.add_argument("--name", default="qsfs", help="of the two files (default: qsfs)")
    parser.add_argument("--mountpoint", metavar="PATH", default="mnt", help="default: DIR/mnt")
    parser.add_argument("--cache", metavar="PATH", default="cache", help="default: DIR/cache")
    parser.add_argument("--namespace", metavar="NAME", default="qsfs", help="default: qsfs")
    parser.add_argument("--data-shards", metavar="K", type=int, default=16, help="default: 16")
    parser.add_argument("--parity-shards", metavar="M", type=int, default=4, help="default: 4")
    parser.add_argument(
        "--codec", choices=("zfec", "isa-l"), default="zfec",
        help="zfec (default), or isa-l: less CPU, at most 32 shards, needs pip install 'qsfs[isa-l]'",
    )  # fmt: skip
    parser.add_argument("--cache-size", metavar="SIZE", default="20GiB", help="default: 20GiB")
    parser.add_argument("--spool-size", metavar="SIZE", default="512MiB", help="default: 512MiB")
    parser.add_argument("--label", metavar="TEXT", default="", help="a name for people")


def run(args: argparse.Namespace) -> int:
    """Writes the files.  Raises `ConfigError` when one exists or the settings do not fit together.

    `FormatMismatch` or `DependencyMissing` if there is no such code, or its codec is not installed.
    """
    from qsfs.cli.output import print_json
    from qsfs.cli.starter import starter_config
    from qsfs.clock import SystemClock
    from qsfs.config import Config
    from qsfs.format.erasure import Code, CodeParams
    from qsfs.format.keys import new_key_file

    directory = Path(args.directory).absolute()
    if not args.name or "/" in args.name:
        raise ConfigError(f'--name "{args.name}" is not a file name')
    config_file, key_file = directory / f"{args.name}.toml", directory / f"{args.name}.key"
    content = starter_config(
        backends(args),
        data_shards=args.data_shards,
        parity_shards=args.parity_shards,
        codec=args.codec,
        cache_size=args.cache_size,
        spool_size=args.spool_size,
        mountpoint=args.mountpoint,
        cache=args.cache,
        key_file=key_file.name,
        label=args.label,
        # The kernel lets others than root offer this only where /etc/fuse.conf allows it.
        allow_other=os.geteuid() == 0,
    )
    config = Config.parse(content, config_file)
    # Raises where the codec is not installed, or has no such code.
    Code(CodeParams(args.data_shards, args.data_shards + args.parity_shards, config.code.codec))
    for file in (config_file, key_file):
        if file.exists():
            raise ConfigError(f"{file} exists; choose another directory, or move it away if it is not needed")
    try:
        config.filesystem.mountpoint.mkdir(parents=True, exist_ok=True)
        config.cache.directory.mkdir(parents=True, exist_ok=True)
        config.cache.directory.chmod(0o700)
        _write(key_file, new_key_file(SystemClock().random_bytes), 0o600)
        try:
            _write(config_file, content, 0o600)
        except BaseException:
            key_file.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written: {error.strerror}") from error
    if args.json:
        print_json({"config": str(config_file), "key_file": str(key_file), "backends": len(config.backends)})
        return 0
    print(f"wrote {config_file} ({len(config.backends)} backends) and {key_file}")
    print("Keep a copy of the key file elsewhere: without it nothing can be restored.")
    if not args.addresses:
        print(
            f"Next: qsfs zdb serve --data {directory / 'backends'} --port {args.port} "
            f"--instances {len(config.backends)}, which goes on serving; then in another terminal:"
        )
        print(f"      qsfs -c {config_file} format")
    else:
        print(f"Next: qsfs -c {config_file} format")
    return 0


def backends(args: argparse.Namespace) -> list[BackendConfig]:
    """The backends that the arguments name.  Raises `ConfigError`."""
    from qsfs.config import BackendConfig
    from qsfs.values import parse_address

    if args.addresses and args.backends is not None:
        raise ConfigError("--backend lists backends and --backends counts embedded ones: give one of both")
    shards = args.data_shards + args.parity_shards
    count = shards + args.parity_shards if args.backends is None else args.backends
    named = args.addresses or [f"127.0.0.1:{args.port + index}" for index in range(count)]
    found = []
    for address, _, namespace in (name.partition("/") for name in named):
        try:
            parse_address(address)
        except ValueError as error:
            raise ConfigError(f"backend address: {error}") from None
        found.append(BackendConfig(address, namespace or args.namespace))
    if len(found) < shards:
        code = f"{args.data_shards}+{args.parity_shards}"
        raise ConfigError(f"{code} shards need at least {shards} backends, {len(found)} are named")
    return found


def _write(file: Path, content: str, mode: int) -> None:
    """A new file, durable with its name; never replaces one."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        os.fchmod(descriptor, mode)
        stream.write(content)
        stream.flush()
        os.fsync(descriptor)
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
