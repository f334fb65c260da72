"""The options of `qsfs codec`."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `codec` and its subcommands."""
    parser = subparsers.add_parser(
        "codec",
        help="turn any file into sealed shard files, and back",
        description="Turn any file into n compressed, encrypted, erasure-coded shard files, and back from any k of "
        "them. Needs no file system, configuration or backends.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_encode(actions)
    _add_decode(actions)
    repair = actions.add_parser(
        "repair",
        help="make missing and damaged shard files again",
        description="Check all shard files; make those that are missing or damaged again, from k good shards of each "
        "pack. Nothing is removed; an existing file is replaced only with --force.",
    )
    _add_input(repair)
    repair.add_argument(
        "--output", metavar="DIR", action="append", required=True, help="where the new ones go; may be repeated"
    )
    repair.add_argument("--name", metavar="NAME", help="what their names begin with (default: as those given)")
    repair.add_argument("--force", action="store_true", help="replace existing files")
    inspect = actions.add_parser(
        "inspect",
        help="explain shard files",
        description="Explain each shard file by itself: what it says without a key, and with it what is sealed and "
        "whether its shards authenticate.",
    )
    inspect.add_argument("paths", metavar="PATH", nargs="+", help="shard files, or directories of them")
    inspect.add_argument("--key-file", metavar="FILE", help="the key file it was encoded with")
    bench = actions.add_parser(
        "bench",
        help="measure the codec on this machine",
        description="Measure each step in memory: MB (10^6 bytes) of the file a second, and for each second of CPU.",
    )
    _add_code(bench, codec_help="one only (default: all that are installed)", default=None)
    bench.add_argument("--seconds", metavar="S", type=float, default=1.0, help="for each step (default: 1)")


def _add_encode(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    encode = actions.add_parser(
        "encode",
        help="a file to shard files",
        description="Turn FILE into n shard files, of which any k give it back. They appear when all are whole and "
        "durable.",
    )
    encode.add_argument("file", metavar="FILE", help="what to encode; - is standard input")
    encode.add_argument(
        "--output", metavar="DIR", action="append", required=True,
        help="where shard files go; repeat it to spread them over disks in turn",
    )  # fmt: skip
    _add_code(encode, codec_help="zfec (default), or isa-l: less CPU, at most 32 shards", default="zfec")
    key = encode.add_mutually_exclusive_group(required=True)
    key.add_argument("--key-file", metavar="FILE", help="encrypt with this key file")
    key.add_argument("--new-key-file", metavar="FILE", help="make a key file, and encrypt with it")
    key.add_argument("--no-encryption", action="store_true", help="anyone who has k shard files may read it")
    encode.add_argument("--name", metavar="NAME", help="what shard files' names begin with (default: FILE's name)")
    encode.add_argument("--force", action="store_true", help="replace existing shard files")


def _add_decode(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    decode = actions.add_parser(
        "decode",
        help="shard files to the file",
        description="Give back the file from any k of its shard files, wherever each is damaged, as long as every "
        "pack has k good shards. Says which shard files are missing, damaged or foreign.",
    )
    _add_input(decode)
    target = decode.add_mutually_exclusive_group()
    target.add_argument(
        "--output", metavar="FILE", help="- is standard output (default: its name when it was encoded, here)"
    )
    target.add_argument(
        "--check", action="store_true", help="write nothing; exit code 8 if anything is missing or damaged"
    )
    decode.add_argument("--quick", action="store_true", help="read only as many shards as are needed")
    decode.add_argument("--force", action="store_true", help="replace an existing file")


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", metavar="PATH", nargs="+", help="shard files, or directories of them")
    parser.add_argument("--key-file", metavar="FILE", help="the key file it was encoded with")
    parser.add_argument("--id", metavar="ID", help="which archive, if there are several")
    parser.add_argument("--threads", metavar="N", type=int, help="default: as many as processors")


def _add_code(parser: argparse.ArgumentParser, *, codec_help: str, default: str | None) -> None:
    parser.add_argument("--data-shards", metavar="K", type=int, default=16, help="default: 16")
    parser.add_argument("--parity-shards", metavar="M", type=int, default=4, help="default: 4")
    parser.add_argument("--codec", choices=("zfec", "isa-l"), default=default, help=codec_help)
    parser.add_argument("--compression-level", metavar="L", type=int, default=1, help="of zstd, 1 to 22 (default: 1)")
    parser.add_argument("--threads", metavar="N", type=int, help="default: as many as processors")
