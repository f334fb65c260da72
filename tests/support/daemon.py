"""A file system under test: configuration, backends, and the daemon that mounts it, killed and started again.

    with FileSystem(scratch, separate=True, settings={"flush.cut_seconds": 1}) as fs:
        fs.format()
        fs.mount()
        (fs.mountpoint / "a").write_bytes(b"1")
        fs.kill()
        fs.mount()

With `forgetting=True` the cache lies on a disk that loses at `power_cut` what no fsync covered.  However
the block ends, no mount and no process of it stays.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support import scratch
from tests.support.backends import Servers
from tests.support.powerloss import CutReport, PowerLoss

PATIENCE = 120.0

# Small enough for a test, otherwise as a user has it.
SETTINGS: dict[str, Any] = {
    "cache.size": "256MiB",
    "cache.journal_size": "4MiB",
    "cache.uncovered_size": "16MiB",
    "flush.spool_size": "64MiB",
    "flush.cut_size": "32MiB",
}

_LOUD = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|^Traceback ")


class FileSystemError(AssertionError):
    """A command or the daemon did not do what a test needs; the message holds what it said."""


class Command(subprocess.CompletedProcess[str]):
    """A `qsfs` command that ended: `returncode`, `stdout`, `stderr`."""

    def json(self) -> Any:
        """What it printed with `--json`."""
        return json.loads(self.stdout)


class FileSystem:
    """One file system and one machine that mounts it.

    `directory` gets `qsfs.toml`, `qsfs.key`, `mnt`, `cache` and `daemon.log`.  `shards` is (k, m), `count`
    the number of backends (k + 2m unless given), each an embedded 0-db; `separate` gives each a process, so
    that single ones can be killed.  `servers` are used instead where given, the first `count` of them or
    all, and outlive this.  `namespace` is the one that is used on each.  `settings` change the
    configuration: "table.key" to a value; "policy" to a list of tables, put before the presets.
    """

    def __init__(
        self,
        directory: Path,
        *,
        shards: tuple[int, int] = (4, 2),
        count: int | None = None,
        separate: bool = False,
        servers: Servers | None = None,
        namespace: str = "qsfs",
        settings: Mapping[str, Any] | None = None,
        forgetting: bool = False,
        metadata: str = "ordered",
    ) -> None:
        self.directory = directory
        self.config = directory / "qsfs.toml"
        self.mountpoint = directory / "mnt"
        self.cache = directory / "cache"
        self.log_file = directory / "daemon.log"
        self.disk: PowerLoss | None = None
        self.process = 0
        self._shards = shards
        self._settings = SETTINGS | {"log.file": str(self.log_file)} | dict(settings or {})
        self._forgetting = forgetting
        self._metadata = metadata
        self._own_servers = servers is None
        k, m = shards
        self.namespace = namespace
        self._count = count
        self.servers = servers or Servers(directory / "zdb", count or k + 2 * m, separate=separate)
        self._handle = -1
        self._declared: list[str] = []

    def __enter__(self) -> Self:
        scratch.session()
        try:
            if self._own_servers:
                self.servers.__enter__()
            self._initialise()
            if self._forgetting:
                shutil.rmtree(self.cache)
                self.disk = PowerLoss(self.directory / "medium", self.cache, metadata=self._metadata)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None and (loud := self.undeclared()):
            raise FileSystemError("undeclared in the daemon's log:\n" + "\n".join(loud))

    # Commands

    def run(self, *words: str | Path, code: int | None = 0, timeout: float = PATIENCE, **env: str) -> Command:
        """Runs `qsfs -c CONFIG WORDS...` to its end.

        Raises `FileSystemError` unless it exits with `code` (None: however), or when `timeout` is over.
        """
        command = [sys.executable, "-m", "qsfs.cli.main", "-c", str(self.config), *map(str, words)]
        try:
            done = subprocess.run(
                command,
                cwd=scratch.ROOT,
                env=os.environ | env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise FileSystemError(
                f"'{' '.join(map(str, words))}' did not end in {timeout} s{self._tail()}"
            ) from error
        if code is not None and done.returncode != code:
            raise FileSystemError(
                f"'{' '.join(map(str, words))}' exited with {done.returncode}, not {code}: "
                f"{done.stdout}{done.stderr}{self._tail()}"
            )
        return Command(done.args, done.returncode, done.stdout, done.stderr)

    def format(self) -> None:
        """Makes the file system on the backends."""
        self.run("format")

    def mount(self, *options: str, failpoints: str = "", **env: str) -> None:
        """Starts the daemon; returns once it is mounted.  `failpoints` is a value of `QSFS_FAILPOINTS`."""
        answer = self.run("--json", "mount", *options, QSFS_FAILPOINTS=failpoints, **env).json()
        self.adopt(answer["process"])

    def adopt(self, process: int) -> None:
        """Takes a daemon that another command (`takeover`, a test's own `mount`) started for this one's."""
        self._forget()
        self.process = process
        self._handle = os.pidfd_open(process)

    def umount(self) -> str:
        """Unmounts in order; returns what the command said when the daemon has ended."""
        said = self.run("umount").stdout
        self.wait_ended()
        return said

    def status(self) -> dict[str, Any]:
        """What `status --json` prints."""
        found: dict[str, Any] = self.run("status", "--json").json()
        return found

    def sync(self) -> dict[str, Any]:
        """Publishes a generation; what `sync --json` prints."""
        found: dict[str, Any] = self.run("sync", "--json").json()
        return found

    # Ends that nobody asked for

    def kill(self) -> None:
        """SIGKILL to the daemon; returns when it is gone and the mount is dead."""
        scratch.kill_process(self.process)
        self.wait_dead()

    def wait_ended(self, timeout: float = PATIENCE) -> None:
        """Waits until the daemon has ended, by whatever; a failpoint for example."""
        if self._handle >= 0 and not select.select([self._handle], [], [], timeout)[0]:
            raise FileSystemError(f"the daemon still runs after {timeout} s{self._tail()}")
        self._forget()

    def wait_dead(self) -> None:
        """Waits until the daemon has ended, and sees that its mount stays visibly dead (ENOTCONN)."""
        self.wait_ended()
        try:
            # What stat shows may come from the kernel's cache; this always asks.
            os.statvfs(self.mountpoint)
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                return
            raise
        raise FileSystemError(f"the daemon died and {self.mountpoint} still answers")

    def power_cut(self, *, seed: object = 0, keep: str = "random") -> CutReport:
        """The power of this machine goes, and comes back; `mount` may follow.  Backends run on.

        Whoever uses the mount must have ended, or ends with errors.
        """
        assert self.disk is not None, "the cache does not lie on a forgetting disk"
        report = self.disk.cut(seed=seed, keep=keep, victims=[self.process] if self.process else [])
        return self._power_back(report)

    def wait_power_cut(self) -> CutReport:
        """The same for a cut that was armed (`disk.arm`): waits until it has come."""
        assert self.disk is not None, "the cache does not lie on a forgetting disk"
        report = self.disk.wait()
        if self.process:
            scratch.kill_process(self.process)
        return self._power_back(report)

    def _power_back(self, report: CutReport) -> CutReport:
        assert self.disk is not None
        self.wait_ended()
        for mountpoint in scratch.mounts_below(self.mountpoint):
            scratch.detach(mountpoint)
        self.disk.restart()
        return report

    # Configuration

    def configure(self, **settings: Any) -> None:
        """Changes the configuration; the daemon reads it when it starts.  "__" stands for the dot."""
        self.set({name.replace("__", "."): value for name, value in settings.items()})

    def set(self, settings: Mapping[str, Any]) -> None:
        """Changes the configuration by "table.key"; "policy" and "backend" are lists of tables."""
        tables = tomllib.loads(self.config.read_text())
        for name, value in settings.items():
            table, _, key = name.partition(".")
            if table == "policy":
                tables["policy"] = [*value, *tables.get("policy", [])]
            elif not key:
                tables[table] = value
            else:
                tables.setdefault(table, {})[key] = value
        self.config.write_text(to_toml(tables))

    def another_machine(self, directory: Path, *, with_cache: bool = False) -> FileSystem:
        """The same file system on another machine: same key and backends, own mount point and cache.

        `with_cache` copies the cache too, as a cloned disk would; this one must not be mounted then.  Use it
        as a context manager.
        """
        other = FileSystem(
            directory, shards=self._shards, servers=self.servers, count=self._count, namespace=self.namespace
        )
        other._settings = self._settings | {"log.file": str(other.log_file)}
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.directory / "qsfs.key", directory / "qsfs.key")
        tables = tomllib.loads(self.config.read_text())
        tables["log"]["file"] = str(other.log_file)
        other.config.write_text(to_toml(tables))
        other.config.chmod(0o600)
        other.mountpoint.mkdir()
        if with_cache:
            shutil.copytree(self.cache, other.cache)
        else:
            other.cache.mkdir(mode=0o700)
        return other

    # The log

    def log(self) -> str:
        """What the daemons logged so far."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    def expect(self, *patterns: str) -> None:
        """Declares lines of the daemon's log at WARNING or above, which fail the test otherwise."""
        self._declared += patterns

    def undeclared(self) -> list[str]:
        """The lines of the log at WARNING or above, and tracebacks, that no pattern covers."""
        return [
            line
            for line in self.log().splitlines()
            if _LOUD.search(line) and not any(re.search(pattern, line) for pattern in self._declared)
        ]

    # The end

    def close(self) -> None:
        """Ends everything at once: daemon, mounts, disk and own backends.  May be called twice."""
        with contextlib.ExitStack() as stack:
            if self._own_servers:
                stack.callback(self.servers.kill)
            if self.disk is not None:
                stack.callback(self.disk.close)
            stack.callback(self._detach)
            for process in self._daemons():
                stack.callback(scratch.kill_process, process)
            stack.callback(self._forget)

    def _daemons(self) -> Iterable[int]:
        """The processes that run with this configuration, also such as no test knows of."""
        found = []
        for process in scratch.session_processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                if os.fsencode(self.config) in words:
                    found.append(process)
        return found

    def _detach(self) -> None:
        for mountpoint in scratch.mounts_below(self.mountpoint):
            scratch.detach(mountpoint)

    def _forget(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1
        self.process = 0

    def _initialise(self) -> None:
        if self.config.exists():
            return
        k, m = self._shards
        words: list[str] = ["init", str(self.directory), "--data-shards", str(k), "--parity-shards", str(m)]
        for port in self.servers.ports[: self._count]:
            words += ["--backend", f"127.0.0.1:{port}/{self.namespace}"]
        words += [
            "--cache-size",
            self._settings["cache.size"],
            "--spool-size",
            self._settings["flush.spool_size"],
        ]
        self.run(*words)
        self.set(self._settings)

    def _tail(self) -> str:
        lines = self.log().splitlines()[-30:]
        return "\ndaemon.log:\n" + "\n".join(lines) if lines else ""


def to_toml(tables: Mapping[str, Any]) -> str:
    """A TOML text of tables, and lists of tables, of plain values."""
    lines: list[str] = []
    for name, table in tables.items():
        for part in table if isinstance(table, list) else [table]:
            lines.append(f"[[{name}]]" if isinstance(table, list) else f"[{name}]")
            lines += [f"{key} = {_toml_value(value)}" for key, value in part.items()]
            lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False)
