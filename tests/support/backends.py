"""Embedded 0-db servers for tests: in processes that can be killed, stopped and restarted, or in-process.

with Servers(scratch / "zdb", 24) as servers:                  # one process for all
with Servers(scratch / "zdb", 6, separate=True) as servers:    # a process each
    backend = open_backend(servers.config(3))
    servers.kill(3); servers.restart(3); servers.pause(3); servers.resume(3)

async with in_process(scratch / "zdb", 4) as ports:            # fast; shares the event loop
"""

from __future__ import annotations

import contextlib
import json
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Self

import trio

from qsfs.config import BackendConfig
from qsfs.zdb.server import ServeOptions, serve
from tests.support.scratch import ROOT

START_SECONDS = 60.0
HOST = "127.0.0.1"


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that are free now, outside the range of outgoing ones."""
    for _ in range(200):
        first = random.randrange(12_000, 32_000 - count)
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    listener = held.enter_context(socket.socket())
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    listener.bind((HOST, port))
            except OSError:
                continue
            return first
    raise RuntimeError(f"no {count} consecutive free ports found")


class Servers:
    """`count` instances on consecutive ports, data in `directory`/<port>; stopped at the end of `with`.

    `separate` runs a process for each instance: only then can single ones be killed, paused and
    restarted.  `options` are those of `ServeOptions` (`sync`, `admin_password`, `default_maxsize`,
    `datasize`); `options` given to `restart` replace them from then on.
    """

    def __init__(self, directory: Path, count: int = 1, *, separate: bool = False, **options: Any) -> None:
        self.directory = directory
        self.count = count
        self.first_port = free_ports(count)
        self._separate = separate
        self._options = options
        self._processes: dict[int, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        for _ in range(4):
            try:
                self.start()
                return self
            except RuntimeError:
                # Another run may have taken a port meanwhile.
                self.kill()
                self.first_port = free_ports(self.count)
        self.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.kill()

    @property
    def ports(self) -> list[int]:
        """The port of each instance."""
        return list(range(self.first_port, self.first_port + self.count))

    def data_directory(self, index: int = 0) -> Path:
        """Where an instance keeps its data."""
        return self.directory / str(self.first_port + index)

    def namespace_directory(self, index: int = 0, namespace: str = "default") -> Path:
        """Where an instance keeps the data files `d0`, `d1` ... of a namespace."""
        return self.data_directory(index) / "namespaces" / namespace

    def log(self, index: int = 0) -> str:
        """What the process of an instance logged so far."""
        return self._log_path(self._group(index)).read_text()

    def config(self, index: int = 0, namespace: str = "default", **settings: Any) -> BackendConfig:
        """The `[[backend]]` of an instance."""
        return BackendConfig(address=f"{HOST}:{self.first_port + index}", namespace=namespace, **settings)

    def configs(self, namespace: str = "default", **settings: Any) -> tuple[BackendConfig, ...]:
        """The `[[backend]]` of every instance."""
        return tuple(self.config(index, namespace, **settings) for index in range(self.count))

    def toml(self, namespace: str = "default") -> str:
        """The `[[backend]]` tables of a configuration file."""
        return "".join(
            f'[[backend]]\naddress = "{HOST}:{port}"\nnamespace = "{namespace}"\n\n' for port in self.ports
        )

    def start(self, index: int | None = None, **options: Any) -> None:
        """Starts what does not run, and waits until it answers; `index` names one instance."""
        self._options.update(options)
        groups = [group for group in self._groups(index) if group not in self._processes]
        for group in groups:
            self._processes[group] = self._spawn(group)
        for group in groups:
            self._await_ready(group)

    def restart(self, index: int | None = None, **options: Any) -> None:
        """Kills, if it runs, and starts again."""
        self.kill(index)
        self.start(index, **options)

    def kill(self, index: int | None = None) -> None:
        """SIGKILL; returns when the process is gone."""
        self._end(index, signal.SIGKILL)

    def stop(self, index: int | None = None) -> list[int]:
        """SIGTERM; returns the exit codes when the processes have ended in order."""
        return self._end(index, signal.SIGTERM)

    def pause(self, index: int | None = None) -> None:
        """SIGSTOP: connections stay open and nothing is answered."""
        self._signal(index, signal.SIGSTOP)

    def resume(self, index: int | None = None) -> None:
        """SIGCONT."""
        self._signal(index, signal.SIGCONT)

    def running(self, index: int = 0) -> bool:
        """Whether the process of an instance runs."""
        process = self._processes.get(self._group(index))
        return process is not None and process.poll() is None

    def _group(self, index: int) -> int:
        return index if self._separate else 0

    def _groups(self, index: int | None) -> list[int]:
        if not self._separate:
            return [0]
        return list(range(self.count)) if index is None else [index]

    def _log_path(self, group: int) -> Path:
        return self.directory / f"log-{group}"

    def _spawn(self, group: int) -> subprocess.Popen[str]:
        settings = {
            "data": str(self.directory),
            "port": self.first_port + group,
            "instances": 1 if self._separate else self.count,
            **self._options,
        }
        with self._log_path(group).open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.support.zdb_process", json.dumps(settings)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _await_ready(self, group: int) -> None:
        process = self._processes[group]
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline() if ready else ""
        if not line.startswith("zdb: ready"):
            self._end(group if self._separate else None, signal.SIGKILL)
            raise RuntimeError(f"zdb did not start:\n{self._log_path(group).read_text()[-4000:]}")

    def _signal(self, index: int | None, number: signal.Signals) -> None:
        for group in self._groups(index):
            self._processes[group].send_signal(number)

    def _end(self, index: int | None, number: signal.Signals) -> list[int]:
        ending = [self._processes.pop(group) for group in self._groups(index) if group in self._processes]
        for process in ending:
            process.send_signal(number)
        codes = []
        for process in ending:
            codes.append(process.wait(timeout=START_SECONDS))
            assert process.stdout is not None
            process.stdout.close()
        return codes


@contextlib.asynccontextmanager
async def in_process(directory: Path, count: int = 1, **options: Any) -> AsyncIterator[list[int]]:
    """`count` instances in this event loop; yields their ports."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = ServeOptions(data=directory, port=0, instances=count, **options)
    async with trio.open_nursery() as nursery:
        ports = await nursery.start(lambda task_status: serve(settings, task_status=task_status))
        yield ports
        nursery.cancel_scope.cancel()


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(64)
        yield listener.getsockname()[1]
