"""`qsfs zdb serve`: the embedded 0-db server."""

from __future__ import annotations

import argparse
from pathlib import Path

from qsfs.errors import ConfigError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `zdb` and its subcommands."""
    parser = subparsers.add_parser(
        "zdb", help="run the embedded 0-db server", description="Run the embedded 0-db server."
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    serve = actions.add_parser(
        "serve",
        help="serve until SIGTERM or SIGINT",
        description="Serve 0-db instances on consecutive ports until SIGTERM or SIGINT. One line "
        "on standard output says when all of them are ready. Needs no configuration file.",
    )
    serve.add_argument(
        "--data", metavar="DIR", required=True, help="each instance keeps its data in DIR/PORT"
    )
    serve.add_argument(
        "--listen", metavar="ADDRESS", default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1; the protocol is not encrypted)",
    )  # fmt: skip
    serve.add_argument("--port", metavar="P", type=int, default=9900, help="first port (default: 9900)")
    serve.add_argument("--instances", metavar="N", type=int, default=1, help="how many (default: 1)")
    serve.add_argument(
        "--sync", action="store_true", help="make every write durable before it is acknowledged"
    )
    serve.add_argument(
        "--admin-password-file", metavar="FILE",
        help="who knows what is in it may manage namespaces (default: everyone may, as in 0-db)",
    )  # fmt: skip
    serve.add_argument(
        "--maxsize", metavar="SIZE", default="0", help="quota of each default namespace (default: none)"
    )
    serve.add_argument(
        "--datasize", metavar="SIZE", default="256MiB", help="where data files are rotated (default: 256MiB)"
    )


def run(args: argparse.Namespace) -> int:
    """Serves.  Raises `ConfigError` when a directory, port or option cannot be used."""
    import logging

    import trio

    from qsfs.values import parse_size
    from qsfs.zdb.server import ServeOptions, run

    sizes = {}
    for name in ("maxsize", "datasize"):
        try:
            sizes[name] = parse_size(getattr(args, name))
        except ValueError as error:
            raise ConfigError(f"zdb: --{name}: {error}") from None
    options = ServeOptions(
        data=Path(args.data).absolute(),
        listen=args.listen,
        port=args.port,
        instances=args.instances,
        sync=args.sync,
        admin_password=_password(args.admin_password_file),
        default_maxsize=sizes["maxsize"],
        datasize=sizes["datasize"],
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    trio.run(run, options)
    return 0


def _password(file: str | None) -> str:
    if file is None:
        return ""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"zdb: --admin-password-file {file} cannot be read: {error}") from error
    if not lines or not lines[0].strip():
        raise ConfigError(f"zdb: --admin-password-file {file} is empty; put the password on its first line")
    return lines[0].strip()
