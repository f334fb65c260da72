"""The lasting settings of a namespace, in a small file that is replaced as a whole."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

FILE_NAME = "settings"
_VERSION = 1


class Unusable(Exception):
    """The files of a namespace are missing, damaged or of a newer version; says which."""


@dataclass
class Settings:
    """What NSSET changes, and the seed of the record checksums.

    `maxsize` bounds the live bytes of values (0: no bound).  The password is kept as given, as in
    0-db; text is Latin-1, so that any bytes fit.
    """

    seed: int
    maxsize: int = 0
    password: str = ""
    public: bool = True
    worm: bool = False

    def save(self, directory: Path) -> None:
        """Replaces the settings file of `directory`, durably; raises `OSError`."""
        content = json.dumps({"version": _VERSION, **asdict(self)}, sort_keys=True).encode()
        temporary = directory / f"{FILE_NAME}.new"
        with temporary.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(b"%s\n%s\n" % (content, xxhash.xxh3_64_hexdigest(content).encode()))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(directory / FILE_NAME)
        sync_directory(directory)


def load_settings(directory: Path) -> Settings:
    """The settings of the namespace in `directory`; raises `Unusable`."""
    path = directory / FILE_NAME
    try:
        content, checksum = path.read_bytes().splitlines()
        fields = json.loads(content)
        if checksum != xxhash.xxh3_64_hexdigest(content).encode() or fields.pop("version") != _VERSION:
            raise Unusable(f"{path}: its checksum or version is wrong")
        return Settings(**fields)
    except (OSError, ValueError, TypeError, KeyError) as failure:
        raise Unusable(f"{path}: {failure}") from failure


def sync_directory(directory: Path) -> None:
    """Puts the entries of `directory` on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
