"""Options that name a secret: a key file, a passphrase from a file or pipe, or one that is asked for.

A passphrase is never an argument or an environment variable, which other users see.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qsfs.errors import ConfigError, KeyFileError

if TYPE_CHECKING:
    from qsfs.format.passphrase import KdfCost
    from qsfs.format.slots import Secret


def add_unlock_options(
    parser: argparse.ArgumentParser, *, prefix: str = "", new: bool = False, what: str = "instead of the configured one"
) -> None:
    """Adds `--PREFIXkey-file`, `--PREFIXpassphrase` and `--PREFIXpassphrase-file`; with `new` the cost of one too."""
    group = parser.add_argument_group("what opens it")
    one = group.add_mutually_exclusive_group()
    one.add_argument(f"--{prefix}key-file", metavar="FILE", help=f"a key file, {what}")
    one.add_argument(f"--{prefix}passphrase", action="store_true", help="ask for a passphrase at the terminal")
    one.add_argument(
        f"--{prefix}passphrase-file", metavar="FILE", help="read a passphrase from FILE; - is standard input"
    )
    if new:
        group.add_argument("--kdf-memory", metavar="SIZE", help="of a passphrase's Argon2id (default: 256MiB)")
        group.add_argument("--kdf-iterations", metavar="N", type=int, help="passes of Argon2id (default: 3)")


def unlocking(args: argparse.Namespace, *, prefix: str = "", new: bool = False) -> Secret | None:
    """The secret that the options name, or None.  Raises `KeyFileError`."""
    from pathlib import Path

    from qsfs.daemon.secret import read_key_file, read_passphrase_file
    from qsfs.format.passphrase import check_new

    name = prefix.replace("-", "_")
    key_file, file = getattr(args, f"{name}key_file"), getattr(args, f"{name}passphrase_file")
    if key_file is not None:
        return read_key_file(Path(key_file))
    if file is not None:
        phrase = read_passphrase_file(Path(file))
        if new:
            check_new(phrase.utf8.decode("utf-8", "replace"))
        return phrase
    if getattr(args, f"{name}passphrase"):
        return ask_passphrase(new=new)
    return None


def ask_passphrase(*, new: bool, prompt: str = "Passphrase: ") -> Secret:
    """A passphrase typed at the terminal without being shown; a new one twice.  `KeyFileError` without a terminal."""
    from qsfs.format.passphrase import Passphrase, check_new

    first = _ask(f"New {prompt[0].lower()}{prompt[1:]}" if new else prompt)
    if new:
        check_new(first)
        if _ask("The same again: ") != first:
            raise KeyFileError("the two passphrases differ; nothing was changed")
    return Passphrase(first)


def _ask(prompt: str) -> str:
    import getpass
    import os

    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        raise KeyFileError(
            "there is no terminal to ask for a passphrase; give --passphrase-file FILE, or - for a pipe"
        ) from None
    return getpass.getpass(prompt)


def kdf_cost(args: argparse.Namespace) -> KdfCost | None:
    """The cost that the options name, or None for the default.  Raises `ConfigError`."""
    from qsfs.format.passphrase import KdfCost
    from qsfs.values import parse_size

    if args.kdf_memory is None and args.kdf_iterations is None:
        return None
    default = KdfCost()
    try:
        memory = default.memory_kib if args.kdf_memory is None else parse_size(args.kdf_memory) >> 10
    except ValueError as error:
        raise ConfigError(f"--kdf-memory: {error}") from None
    iterations = default.iterations if args.kdf_iterations is None else args.kdf_iterations
    cost = KdfCost(memory, iterations, default.lanes)
    refusal = cost.refusal()
    if refusal is not None:
        raise ConfigError(f"--kdf-memory, --kdf-iterations: {refusal}")
    return cost
