"""The configuration: one TOML file, read once, checked whole, frozen.

Nothing else reads the file.  A key that is not known is refused and the nearest right one is
named; a value of the wrong type or out of range is refused with its key and file.  Sizes are whole
bytes or text such as "20GiB"; durations are numbers in the unit that the key's name ends in, or
text such as "30s", "10min", "24h".  Relative paths are relative to the file's own directory.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qsfs.errors import ConfigError
from qsfs.values import (
    Credential,
    Reader,
    choice,
    codec,
    duration,
    file_path,
    flag,
    fraction,
    number,
    parse_address,
    secret_file,
    size,
    text,
    word,
)

ENVIRONMENT_VARIABLE = "QSFS_CONFIG"
FILE_NAME = "qsfs.toml"
SYSTEM_FILE = Path("/etc/qsfs") / FILE_NAME

_T = TypeVar("_T")
_S = TypeVar("_S")


def _key(default: _T, read: Reader, name: str = "") -> _T:
    """A setting: its default, how its value is read, and its key where that is not the attribute's name."""
    return dataclasses.field(default=default, metadata={"read": read, "name": name})


@dataclass(frozen=True)
class FilesystemConfig:
    """`[filesystem]`: where it is mounted and which key opens it.

    Where `passphrase_file` is given it stands in the place of `key_file`.
    """

    mountpoint: Path = _key(Path("mnt"), file_path)
    key_file: Path | Credential = _key(Path("qsfs.key"), secret_file)
    passphrase_file: Path | Credential | None = _key(None, secret_file)
    label: str = _key("", text)
    # Promises: the loss of so many whole groups or nodes loses nothing.
    redundant_groups: int = _key(0, number(0, 255))
    redundant_nodes: int = _key(0, number(0, 255))


@dataclass(frozen=True)
class CacheConfig:
    """`[cache]`: the local store and its bound, which covers everything below `directory`.

    Where `size` is small, journal, spool, groups and uncovered writes get less than configured here.
    """

    directory: Path = _key(Path("cache"), file_path)
    size_bytes: int = _key(20 << 30, size(16 << 20), "size")
    group_seconds: float = _key(5.0, duration(0.01, 600))
    group_bytes: int = _key(32 << 20, size(1 << 20), "group_size")
    journal_bytes: int = _key(64 << 20, size(1 << 20), "journal_size")
    uncovered_bytes: int = _key(64 << 20, size(1 << 20), "uncovered_size")
    high_watermark: float = _key(0.90, fraction)
    low_watermark: float = _key(0.85, fraction)
    second_look_seconds: float = _key(120.0, duration(0, 86400))
    # What a database reads in its first minutes is kept for its next start: so much of the cache at most.
    start_seconds: float = _key(600.0, duration(0, 86400))
    start_share: float = _key(0.25, number(0.0, 0.5))

    def __post_init__(self) -> None:
        if not 0 < self.low_watermark < self.high_watermark < 1:
            raise ValueError(
                f"low_watermark ({self.low_watermark}) must be above 0 and below high_watermark "
                f"({self.high_watermark}), and that below 1"
            )


@dataclass(frozen=True)
class CodeConfig:
    """`[code]`: what `qsfs format` fixes for good; a mount takes it from the superblock."""

    data_shards: int = _key(16, number(1, 255))
    parity_shards: int = _key(4, number(1, 255))
    codec: str = _key("zfec", codec)

    def __post_init__(self) -> None:
        total = self.data_shards + self.parity_shards
        if total > 256:
            raise ValueError(f"data_shards + parity_shards is {total}; at most 256 are possible")


@dataclass(frozen=True)
class FlushConfig:
    """`[flush]`: when data leave for the backends.  Rates are bytes a second, 0 for no limit."""

    cut_seconds: float = _key(30.0, duration(0.05, 86400))
    quiet_seconds: float = _key(5.0, duration(0, 3600))
    cut_bytes: int = _key(256 << 20, size(1 << 20), "cut_size")
    full_grace_seconds: float = _key(2.0, duration(0, 600))
    upload_rate: int = _key(0, size(0))
    download_rate: int = _key(0, size(0))
    compression_level: int = _key(1, number(1, 19))
    stop_deadline_seconds: float = _key(60.0, duration(0, 86400))
    spool_bytes: int = _key(512 << 20, size(1 << 20), "spool_size")
    retention_seconds: float = _key(86400.0, duration(0, 10 * 365 * 86400, unit="h"), "retention_hours")
    rewrite_below: float = _key(0.5, number(0.0, 0.5))
    # Limits to what no published head has, 0 for none: cuts begin so early that they hold.
    exposure_seconds: float = _key(0.0, duration(0, 365 * 86400))
    exposure_bytes: int = _key(0, size(0))
    snapshot_ratio: float = _key(1.0, number(0.01, 100.0))
    # Applications that write faster than backends take it for so long are slowed until a cut can be made; 0: never.
    slow_writers_seconds: float = _key(600.0, duration(0, 365 * 86400), "slow_writers_after")


@dataclass(frozen=True)
class SnapshotsConfig:
    """`[snapshots]`: automatic snapshots, one `every` so long (0: none), and which of them stay.

    The last `keep_last`, and the last one of each of the last `hourly` hours, `daily` days, `weekly` weeks
    in which one was made.  Snapshots that a person named stay until they are deleted.
    """

    every_seconds: float = _key(0.0, duration(0, 366 * 86400), "every")
    keep_last: int = _key(2, number(0, 500))
    hourly: int = _key(24, number(0, 500))
    daily: int = _key(7, number(0, 366))
    weekly: int = _key(4, number(0, 520))

    def __post_init__(self) -> None:
        if 0 < self.every_seconds < 60:
            raise ValueError('every is less than a minute; give a longer time such as "1h", or 0 for none')
        if self.every_seconds and not (self.keep_last or self.hourly or self.daily or self.weekly):
            raise ValueError("no rule would keep the automatic snapshots; set keep_last, hourly, daily or weekly")


@dataclass(frozen=True)
class FetchConfig:
    """`[fetch]`: how long a read of remote data waits where the policy says `error`."""

    deadline_seconds: float = _key(30.0, duration(0.05, 86400))


@dataclass(frozen=True)
class MountConfig:
    """`[mount]`: options of the FUSE mount.

    With `fsync = "written"` an fsync returns once a published head has what it covers, else once the local disk has.
    Each of `max_background` requests may be a WRITE of 1 MiB that waits for room, and is held in memory meanwhile.
    """

    xattr: bool = _key(False, flag)
    relatime: bool = _key(True, flag)
    allow_other: bool = _key(True, flag)
    default_permissions: bool = _key(True, flag)
    max_tasks: int = _key(5000, number(10, 100_000))
    read_ahead_kb: int = _key(1024, number(0, 65536))
    max_background: int = _key(32, number(1, 65535))
    short_loop: bool = _key(True, flag)
    # As --read-only and --follow of `qsfs mount`: for a mount that is started by its configuration alone.
    read_only: bool = _key(False, flag)
    follow: bool = _key(False, flag)
    # How often a read-only mount looks at the newest head.
    follow_seconds: float = _key(10.0, duration(0.05, 86400))
    fsync: str = _key("local", choice("local", "written"))


@dataclass(frozen=True)
class LogConfig:
    """`[log]`: how much, and where to (`None` is standard error)."""

    level: str = _key("info", choice("debug", "info", "warning", "error"))
    file: Path | None = _key(None, file_path)


@dataclass(frozen=True)
class BackendConfig:
    """One `[[backend]]`: a namespace of a 0-db, and what fails together with it."""

    address: str = _key("", lambda value: "{}:{}".format(*_bracketed(parse_address(value))))
    namespace: str = _key("qsfs", word)
    password: str = _key("", text)
    password_file: Path | None = _key(None, file_path)
    group: str = _key("", text)
    node: str = _key("", text)
    weight: int = _key(1, number(1, 1_000_000))
    drain: bool = _key(False, flag)
    admin_password: str = _key("", text)

    def __post_init__(self) -> None:
        if not self.address:
            raise ValueError('address is missing; give "HOST:PORT"')
        if self.password and self.password_file:
            raise ValueError("password and password_file are both set; keep one")

    @property
    def name(self) -> str:
        """`host:port/namespace`, for messages."""
        return f"{self.address}/{self.namespace}"

    @property
    def host(self) -> str:
        """The host, without the brackets of an IPv6 address."""
        return parse_address(self.address)[0]

    @property
    def port(self) -> int:
        """The TCP port."""
        return parse_address(self.address)[1]

    def read_password(self) -> str:
        """The namespace's password: `password`, or the first line of `password_file`; "" for none.

        Raises `ConfigError` when the file cannot be read.
        """
        if self.password_file is None:
            return self.password
        try:
            lines = self.password_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"backend {self.name}: password_file {self.password_file} cannot be read: {error}"
            ) from error
        return lines[0].strip() if lines else ""


@dataclass(frozen=True)
class PolicyRule:
    """One `[[policy]]`: what holds for the files whose name or path matches; the first match wins.

    A pattern without `/` is matched against the name, one with `/` against the path from the root
    of the file system.
    """

    match: str = _key("", text)
    local_only: bool = _key(False, flag)
    pinned: bool = _key(False, flag)
    atomic_sync: bool = _key(False, flag)
    write_through: bool = _key(False, flag)
    restore_aside: bool = _key(False, flag)
    unavailable: str = _key("error", choice("error", "wait"))

    def __post_init__(self) -> None:
        if not self.match.strip("/ "):
            raise ValueError('match is empty; give a pattern such as "*.lmdb"')
        if self.atomic_sync and self.write_through:
            raise ValueError(
                "atomic_sync and write_through exclude each other: one holds writes back until a sync, "
                "the other makes each durable at once"
            )
        if self.local_only and self.restore_aside:
            raise ValueError("local_only files are not restored, so restore_aside can do nothing for them")


@dataclass(frozen=True)
class Config:
    """The whole configuration, and the file it came from."""

    path: Path
    filesystem: FilesystemConfig = FilesystemConfig()
    cache: CacheConfig = CacheConfig()
    code: CodeConfig = CodeConfig()
    flush: FlushConfig = FlushConfig()
    snapshots: SnapshotsConfig = SnapshotsConfig()
    fetch: FetchConfig = FetchConfig()
    mount: MountConfig = MountConfig()
    backends: tuple[BackendConfig, ...] = ()
    policies: tuple[PolicyRule, ...] = ()
    log: LogConfig = LogConfig()

    @classmethod
    def load(cls, path: Path | str | None = None) -> Config:
        """Reads the configuration from `path`, or from where `find` finds it.

        Raises `ConfigError` naming the file and the key.
        """
        file = find(path)
        try:
            content = file.read_bytes().decode("utf-8")
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: is not UTF-8 text: {error}") from error
        return cls.parse(content, file)

    @classmethod
    def parse(cls, content: str, path: Path) -> Config:
        """Checks `content` as if it had been read from `path`.  Raises `ConfigError`."""
        path = path.absolute()
        try:
            document = tomllib.loads(content)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: is not TOML: {error}") from error
        for name in document:
            if name not in _SECTIONS and name not in _LISTS:
                raise ConfigError(f"{path}: {_unknown(name, '', document[name])}")
        opened_with = document.get("filesystem", {})
        if isinstance(opened_with, dict) and {"key_file", "passphrase_file"} <= opened_with.keys():
            raise ConfigError(f"{path}: [filesystem] key_file and passphrase_file are both set; keep one")
        backends = _read_list(BackendConfig, "backend", document, path)
        for name, count in Counter(backend.name for backend in backends).items():
            if count > 1:
                raise ConfigError(
                    f"{path}: [[backend]] {name} is listed {count} times; "
                    "each needs an address or a namespace of its own"
                )
        config = cls(
            path=path,
            filesystem=_read_section(FilesystemConfig, "filesystem", document, path),
            cache=_read_section(CacheConfig, "cache", document, path),
            code=_read_section(CodeConfig, "code", document, path),
            flush=_read_section(FlushConfig, "flush", document, path),
            snapshots=_read_section(SnapshotsConfig, "snapshots", document, path),
            fetch=_read_section(FetchConfig, "fetch", document, path),
            mount=_read_section(MountConfig, "mount", document, path),
            backends=backends,
            policies=_read_list(PolicyRule, "policy", document, path),
            log=_read_section(LogConfig, "log", document, path),
        )
        config._refuse_overlaps()
        return config

    def _refuse_overlaps(self) -> None:
        """`ConfigError` if a mount would lie in its own cache, or hide what the daemon needs."""
        mountpoint = _plain(self.filesystem.mountpoint)
        needed = {
            "[cache] directory": self.cache.directory,
            "[filesystem] key_file": self.filesystem.key_file,
            "[filesystem] passphrase_file": self.filesystem.passphrase_file,
            "[log] file": self.log.file,
        }
        for key, place in needed.items():
            if isinstance(place, Path) and _plain(place).is_relative_to(mountpoint):
                raise ConfigError(
                    f"{self.path}: {key}: {place} lies below the mount point {mountpoint}, which would hide it; "
                    "name another place"
                )
        if mountpoint.is_relative_to(_plain(self.cache.directory)):
            raise ConfigError(
                f"{self.path}: [filesystem] mountpoint: {mountpoint} lies in the cache directory; name another "
                "place"
            )


def find(path: Path | str | None = None) -> Path:
    """The configuration file: `path`, $QSFS_CONFIG, ./qsfs.toml or /etc/qsfs/qsfs.toml.

    A directory stands for the `qsfs.toml` in it.  The first that is named is taken, also when it
    does not exist; of the last two the first that exists.  Raises `ConfigError`.
    """
    named = path or os.environ.get(ENVIRONMENT_VARIABLE)
    candidates = [Path(named)] if named else [Path(FILE_NAME), SYSTEM_FILE]
    for candidate in candidates:
        try:
            file = candidate / FILE_NAME if named and candidate.is_dir() else candidate
            if file.exists():
                return file.absolute()
        except PermissionError as error:
            raise ConfigError(f"{candidate}: cannot be read: {error.strerror}") from error
    if named:
        raise ConfigError(f"{named}: no such configuration file; `qsfs init` writes one")
    raise ConfigError(
        f"no configuration: neither ./{FILE_NAME} nor {SYSTEM_FILE} exists; name one with -c FILE or "
        f"${ENVIRONMENT_VARIABLE}, or write one with `qsfs init`"
    )


_SECTIONS: Mapping[str, type] = {
    "filesystem": FilesystemConfig,
    "cache": CacheConfig,
    "code": CodeConfig,
    "flush": FlushConfig,
    "snapshots": SnapshotsConfig,
    "fetch": FetchConfig,
    "mount": MountConfig,
    "log": LogConfig,
}
_LISTS: Mapping[str, type] = {"backend": BackendConfig, "policy": PolicyRule}


def _plain(path: Path) -> Path:
    """The path without `..` and the like, as it is written: symlinks are not followed."""
    return Path(os.path.normpath(path))


def _bracketed(address: tuple[str, int]) -> tuple[str, int]:
    host, port = address
    return (f"[{host}]" if ":" in host else host), port


def _keys(section: type) -> dict[str, dataclasses.Field[Any]]:
    """The TOML keys of a section and their attributes."""
    return {field.metadata["name"] or field.name: field for field in dataclasses.fields(section)}


def _unknown(name: str, section: str, value: object = None) -> str:
    """What to say about a key or section that does not exist."""
    if not section and isinstance(value, dict | list):
        known, what = [*_SECTIONS, *_LISTS], f"unknown section [{name}]"
    elif not section:
        known, what = [], f"unknown key '{name}' outside of any section"
    else:
        known, what = list(_keys({**_SECTIONS, **_LISTS}[section])), f"[{section}] has no key '{name}'"
    for other, of in {**_SECTIONS, **_LISTS}.items():
        if other != section and name in _keys(of):
            return f"{what}; '{name}' belongs in [{other}]"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if nearest:
        return f"{what}; did you mean '{nearest[0]}'?"
    return f"{what}; it can be one of: {', '.join(known or [*_SECTIONS, *_LISTS])}"


def _read_section(kind: type[_S], name: str, document: Mapping[str, Any], path: Path) -> _S:
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {name} must be a section: [{name}]")
    return _read_table(kind, name, f"[{name}]", table, path)


def _read_list(kind: type[_S], name: str, document: Mapping[str, Any], path: Path) -> tuple[_S, ...]:
    tables = document.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: {name} must be a list of sections: [[{name}]]")
    return tuple(
        _read_table(kind, name, f"[[{name}]] number {index}", table, path)
        for index, table in enumerate(tables, 1)
    )


def _read_table(kind: type[_S], name: str, where: str, table: Mapping[str, Any], path: Path) -> _S:
    keys = _keys(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in keys:
            raise ConfigError(f"{path}: {_unknown(key, name)}")
        field = keys[key]
        if value == "" and field.default is None:
            continue
        try:
            values[field.name] = field.metadata["read"](value)
        except ValueError as error:
            raise ConfigError(f"{path}: {where} {key}: {error}") from None
    for field in keys.values():
        value = values.get(field.name, field.default)
        if isinstance(value, Path):
            values[field.name] = path.parent / value
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{path}: {where}: {error}") from None
