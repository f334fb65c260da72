"""The secret that opens a file system: from files, systemd's credentials, or the command that starts the daemon.

A secret comes from a file, a terminal or a pipe; never from the command line or the environment, which
other users see.  No message holds any part of one.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from qsfs.clock import Clock
from qsfs.config import Config
from qsfs.errors import ConfigError, KeyFileError
from qsfs.format.keys import parse_key_file
from qsfs.format.passphrase import MOST_CHARACTERS, Passphrase
from qsfs.format.slots import Secret
from qsfs.values import Credential

CREDENTIALS = "CREDENTIALS_DIRECTORY"
STANDARD_INPUT = "-"

_MOST_BYTES = 64 << 10
_KEY, _PASSPHRASE = b"k", b"p"


def read_secret(config: Config, given: Secret | None = None) -> Secret:
    """The secret that a command was given, else the one that the configuration names.  Raises `KeyFileError`."""
    if given is not None:
        return given
    section = config.filesystem
    if section.passphrase_file is not None:
        return read_passphrase_file(place_of(section.passphrase_file))
    return read_key_file(place_of(section.key_file))


def place_of(source: Path | Credential) -> Path:
    """Where a secret lies; `KeyFileError` for a credential where systemd gives none."""
    if isinstance(source, Path):
        return source
    directory = os.environ.get(CREDENTIALS)
    if not directory:
        raise KeyFileError(
            f"{source}: systemd hands credentials to the service only (${CREDENTIALS} is not set); here name the key "
            "file or passphrase on the command line"
        )
    return Path(directory) / source.name


def read_key_file(path: Path) -> bytes:
    """The secret in a key file.  Raises `KeyFileError`."""
    text = _text_of(path, "key file")
    try:
        return parse_key_file(text)
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from None


def read_passphrase_file(path: Path) -> Passphrase:
    """The passphrase on the only line of a file (`-`: standard input).  Raises `KeyFileError`."""
    lines = _text_of(path, "passphrase file").splitlines()
    if len([line for line in lines if line]) != 1 or not lines[0]:
        raise KeyFileError(f"{path}: a passphrase file has one line, the passphrase; this one has {len(lines)}")
    return Passphrase(lines[0])


def _text_of(path: Path, what: str) -> str:
    """The text of a file; nothing of it is in what is raised."""
    try:
        if str(path) == STANDARD_INPUT:
            content = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with path.open("rb") as stream:
                content = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        advice = "; put a copy of it there" if isinstance(error, FileNotFoundError) else ""
        raise KeyFileError(f"{path}: the {what} cannot be read: {error.strerror}{advice}") from None
    if len(content) > _MOST_BYTES:
        raise KeyFileError(f"{path}: is too large for a {what}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise KeyFileError(f"{path}: the {what} cannot be read: not a text file") from None


def write_private(path: Path, text: str, clock: Clock, *, replace: bool = False) -> None:
    """A file that only its owner reads, there whole and durable or not at all; `ConfigError` if it exists.

    With `replace` it takes the place of what is there.
    """
    aside = path.with_name(f".{path.name}.{clock.random_bytes(4).hex()}")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                os.fchmod(descriptor, 0o600)
                stream.write(text)
                stream.flush()
                os.fsync(descriptor)
            if replace:
                aside.replace(path)
            else:
                _place_new(aside, path, text)
        finally:
            aside.unlink(missing_ok=True)
        _flush_directory(path.parent)
    except FileExistsError:
        raise ConfigError(f"{path}: exists; name another file, or move it away if it is not needed") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def move_private(aside: Path, path: Path) -> None:
    """Lets a file that `write_private` made beside `path` take its place, durably."""
    try:
        aside.replace(path)
        _flush_directory(path.parent)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be replaced: {error.strerror}") from None


def _flush_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _place_new(aside: Path, path: Path, text: str) -> None:
    try:
        path.hardlink_to(aside)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without links, as on a USB stick: whole or not at all is less than it can promise.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())


def encode_secret(secret: Secret) -> bytes:
    """A secret as it goes to the daemon, over a pipe."""
    return _PASSPHRASE + secret.utf8 if isinstance(secret, Passphrase) else _KEY + secret


def decode_secret(data: bytes) -> Secret:
    """What `encode_secret` gave; `KeyFileError` for anything else."""
    if data[:1] == _PASSPHRASE and len(data) <= 8 * MOST_CHARACTERS:
        return Passphrase(data[1:].decode("utf-8", "surrogateescape"))
    if data[:1] == _KEY and len(data) == 33:
        return data[1:]
    raise KeyFileError("the command that started the daemon handed over no secret")
