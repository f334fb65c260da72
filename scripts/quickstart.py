"""The whole of qsfs on one machine, in one go: store, lose backends, lose the cache, get all back.

Everything lies below one directory: `qsfs.toml`, `mnt`, `backends`, `cache`.  Running it again
ends what an earlier run left and starts anew.  See `scripts/quickstart --help`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import inputs

from qsfs.values import format_size

ROOT = Path(__file__).resolve().parent.parent
QSFS = (sys.executable, "-m", "qsfs.cli.main")
MARK = ".quickstart"
BACKENDS, DATA_SHARDS, PARITY_SHARDS = 24, 16, 4
FIRST_PORT = 9900
SQLITE_TRANSACTIONS, LMDB_COMMITS = 200, 2000
MORE_TRANSACTIONS, MORE_COMMITS = 100, 500


class Failed(Exception):
    """A step that did not do what it promises."""


class Report:
    """Prints each step as it ends: what, how much, how long."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def headline(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        """The caller appends what there is to say of the step."""
        said: list[str] = []
        started = time.monotonic()
        print(f"  {what:<46}", end="", flush=True)
        try:
            yield said
        except BaseException:
            print(" failed", flush=True)
            raise
        print(f"{time.monotonic() - started:7.1f} s   {', '.join(said)}".rstrip(), flush=True)

    def elapsed(self) -> float:
        return time.monotonic() - self.started


class Demo:
    """The file system below one directory, and the processes that belong to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mountpoint = directory / "mnt"
        self.cache = directory / "cache"
        self.backends = directory / "backends"
        self.processes = self.backends / "processes.json"

    def qsfs(self, *words: str) -> str:
        """Runs a command on this file system and returns what it printed."""
        done = subprocess.run([*QSFS, "-c", str(self.directory), *words], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise Failed(f"`qsfs {' '.join(words)}` ended with {done.returncode}: {said}")
        return done.stdout

    def fsck(self) -> str:
        """Checks every shard that answers; what the dead backends hold cannot be known."""
        command = [*QSFS, "-c", str(self.directory), "--json", "fsck", "--deep"]
        done = subprocess.run(command, capture_output=True, text=True)
        report = json.loads(done.stdout)
        if report["errors"]:
            raise Failed(f"`qsfs fsck --deep` found {report['errors']} errors: {done.stdout}")
        return f"{report['checked']['shards']:,} shards authenticated, no errors"

    def is_mounted(self) -> bool:
        """Also when its daemon is dead, which `os.path.ismount` does not see."""
        wanted = str(self.mountpoint).replace("\\", "\\134").replace(" ", "\\040")
        lines = Path("/proc/self/mounts").read_text().splitlines()
        return any(line.split()[1] == wanted for line in lines)

    def start_backends(self) -> None:
        """One process each, so that each can be killed alone."""
        self.backends.mkdir()
        first = free_ports(BACKENDS)
        running: dict[str, dict[str, int]] = {}
        for port in range(first, first + BACKENDS):
            with (self.backends / f"{port}.log").open("wb") as log:
                process = subprocess.Popen(
                    [*QSFS, "zdb", "serve", "--data", str(self.backends), "--port", str(port)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            running[str(port)] = {"pid": process.pid, "since": start_time(process.pid)}
            self.processes.write_text(json.dumps(running))
        for port in range(first, first + BACKENDS):
            wait_for(partial(answers, port), f"backend {port} to answer; see {self.backends}/{port}.log")

    def running(self) -> dict[int, int]:
        """Process ids of the backends that run, by port."""
        if not self.processes.exists():
            return {}
        noted = json.loads(self.processes.read_text())
        return {
            int(port): entry["pid"]
            for port, entry in noted.items()
            if entry["since"] and start_time(entry["pid"]) == entry["since"]
        }

    def end_backends(self, ports: list[int], number: signal.Signals) -> None:
        """Sends a signal to backends and waits until they are gone."""
        running = self.running()
        for port in ports:
            os.kill(running[port], number)
        wait_for(lambda: not self.running().keys() & set(ports), f"backends {ports} to end")

    def stop(self) -> None:
        """Unmounts and ends the backends; a daemon that is dead or stuck does not hinder it."""
        if self.is_mounted():
            try:
                self.qsfs("umount")
            except Failed as failure:
                print(f"quickstart: {failure}; detaching the mount", file=sys.stderr)
                subprocess.run(["fusermount3", "-uz", str(self.mountpoint)], check=False)
        self.end_backends(list(self.running()), signal.SIGTERM)

    def stored_bytes(self) -> dict[int, int]:
        """What each backend holds on disk, by port."""
        return {
            int(place.name): tree_bytes(place) for place in self.backends.iterdir() if place.name.isdigit()
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="quickstart",
        description="Start 24 backends on this machine, mount a file system on them, put a git clone, an "
        "SQLite database, an LMDB environment and Python's library on it, kill 4 backends, lose the local "
        "cache, restore, and verify every byte. Leaves it mounted.",
    )
    parser.add_argument("directory", metavar="DIR", nargs="?", default="demo", help="default: ./demo")
    parser.add_argument("--stop", action="store_true", help="unmount and end the backends; keeps the files")
    arguments = parser.parse_args()
    directory = Path(arguments.directory).absolute()
    demo = Demo(directory)
    try:
        if arguments.stop:
            return stop(demo)
        clear(demo)
        return play(demo, arguments.directory)
    except (Failed, inputs.Mismatch, OSError) as failure:
        print(f"\nquickstart: {failure}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("\nquickstart: interrupted", file=sys.stderr)
        code = 130
    print(f"quickstart: to end what runs: scripts/quickstart --stop {arguments.directory}", file=sys.stderr)
    return code


def stop(demo: Demo) -> int:
    if not (demo.directory / MARK).exists():
        print(f"quickstart: nothing of ours in {demo.directory}", file=sys.stderr)
        return 1
    demo.stop()
    print(f"Stopped. The files are still in {demo.directory}; `rm -r {demo.directory}` removes them.")
    return 0


def clear(demo: Demo) -> None:
    """Makes the directory empty, if it is ours or new."""
    if not Path("/dev/fuse").exists():
        raise Failed("/dev/fuse is missing: load the kernel module `fuse`, or run where FUSE is allowed")
    if (demo.directory / MARK).exists():
        print(f"Ending and removing what an earlier run left in {demo.directory}.")
        demo.stop()
        shutil.rmtree(demo.directory)
    elif demo.directory.exists() and any(demo.directory.iterdir()):
        raise Failed(f"{demo.directory} is not empty and not ours; name another directory")
    demo.directory.mkdir(parents=True, exist_ok=True)
    (demo.directory / MARK).touch()


def play(demo: Demo, shown: str) -> int:
    report = Report()
    print(f"A file system on {BACKENDS} backends below {demo.directory}")
    set_up(demo, report)
    before = fill(demo, report)
    before = lose_backends(demo, report, before)
    lose_cache(demo, report)
    verify(demo, report, before)
    tell(demo, report, shown, inputs.total_bytes(before))
    return 0


def set_up(demo: Demo, report: Report) -> None:
    report.headline("Set-up")
    with report.step(f"start {BACKENDS} backends") as said:
        demo.start_backends()
        ports = sorted(demo.running())
        said.append(f"0-db on ports {ports[0]} to {ports[-1]}")
    with report.step("write configuration and key") as said:
        subprocess.run(
            [
                *QSFS, "init", str(demo.directory), "--backends", str(BACKENDS), "--port", str(ports[0]),
                "--data-shards", str(DATA_SHARDS), "--parity-shards", str(PARITY_SHARDS),
                "--cache-size", "4GiB", "--label", "quickstart",
            ],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        said.append(str(demo.directory / "qsfs.toml"))
    with report.step("format") as said:
        demo.qsfs("format")
        said.append(f"{DATA_SHARDS}+{PARITY_SHARDS} shards: any {PARITY_SHARDS} of a pack may be lost")
    with report.step("mount") as said:
        demo.qsfs("mount")
        said.append(str(demo.mountpoint))


def fill(demo: Demo, report: Report) -> dict[str, tuple]:
    """Puts the inputs there; returns the manifest of all of it."""
    place = demo.mountpoint
    report.headline("Real input")
    with report.step("git clone of this repository, git fsck") as said:
        said.append(inputs.git_clone(ROOT, place / "repository"))
    with report.step("SQLite, WAL, each transaction durable") as said:
        said.append(inputs.sqlite_grow(place / "ledger.sqlite", SQLITE_TRANSACTIONS))
    with report.step("LMDB as a Casper node opens it, 1 TiB map") as said:
        said.append(inputs.lmdb_grow(place / "storage.lmdb", LMDB_COMMITS))
    with report.step("Python's standard library, compared") as said:
        said.append(inputs.library_copy(place / "python"))
    return synced(demo, report)


def lose_backends(demo: Demo, report: Report, before: dict[str, tuple]) -> dict[str, tuple]:
    """Kills as many backends as the code allows, those that hold most, and goes on writing."""
    place = demo.mountpoint
    report.headline(f"{PARITY_SHARDS} backends die, writing goes on")
    stored = demo.stored_bytes()
    victims = sorted(stored, key=lambda port: stored[port], reverse=True)[:PARITY_SHARDS]
    if not all(stored[port] for port in victims):
        raise Failed("there is a backend among the fullest four that holds nothing")
    with report.step(f"kill -9 {', '.join(map(str, sorted(victims)))}") as said:
        demo.end_backends(victims, signal.SIGKILL)
        said.append(f"{format_size(sum(stored[port] for port in victims))} of shards gone")
    with report.step("more transactions in both databases") as said:
        said.append(inputs.sqlite_grow(place / "ledger.sqlite", MORE_TRANSACTIONS))
        said.append(inputs.lmdb_grow(place / "storage.lmdb", MORE_COMMITS))
    with report.step("more files, some removed, some renamed") as said:
        shutil.copytree(inputs.library() / "asyncio", place / "later", ignore=inputs.not_copied)
        shutil.rmtree(place / "python" / "email")
        (place / "python" / "json").rename(place / "json moved")
        said.append(f"{len(list((place / 'later').iterdir()))} files added")
    after = synced(demo, report)
    if after == before:
        raise Failed("the manifest did not notice that anything was written")
    return after


def synced(demo: Demo, report: Report) -> dict[str, tuple]:
    """Syncs to the backends; returns the manifest."""
    with report.step("qsfs sync: published on the backends") as said:
        demo.qsfs("sync")
        said.append(f"{format_size(sum(demo.stored_bytes().values()))} stored in all")
    return inputs.manifest(demo.mountpoint)


def lose_cache(demo: Demo, report: Report) -> None:
    report.headline("The machine is lost: only backends and key remain")
    with report.step("unmount and wipe the local cache") as said:
        demo.qsfs("umount")
        said.append(f"{format_size(tree_bytes(demo.cache))} deleted")
        shutil.rmtree(demo.cache)
    with report.step("restore from the 20 backends that are left") as said:
        demo.cache.mkdir(mode=0o700)
        demo.qsfs("restore")
        said.append("only the tree; contents come when they are read")
    with report.step("take over: this machine owns it now"):
        demo.qsfs("takeover")
    with report.step("mount") as said:
        demo.qsfs("mount")
        said.append(str(demo.mountpoint))


def verify(demo: Demo, report: Report, before: dict[str, tuple]) -> None:
    place = demo.mountpoint
    report.headline("Is everything there?")
    with report.step("every file: type, mode, time, bytes") as said:
        found = inputs.manifest(place)
        if different := inputs.compare(before, found):
            raise inputs.Mismatch(f"after the restore, {different}")
        said.append(f"{len(found):,} entries, {format_size(inputs.total_bytes(found))}, all as before")
    with report.step("git fsck of the clone") as said:
        said.append(inputs.git_check(place / "repository"))
    with report.step("SQLite: integrity check and every row") as said:
        said.append(inputs.sqlite_check(place / "ledger.sqlite", SQLITE_TRANSACTIONS + MORE_TRANSACTIONS))
    with report.step("LMDB: every entry") as said:
        said.append(inputs.lmdb_check(place / "storage.lmdb", LMDB_COMMITS + MORE_COMMITS))
    with report.step("unmount, qsfs fsck --deep, mount") as said:
        demo.qsfs("umount")
        said.append(demo.fsck())
        demo.qsfs("mount")


def tell(demo: Demo, report: Report, shown: str, held: int) -> None:
    remote = format_size(sum(demo.stored_bytes().values()))
    local = format_size(tree_bytes(demo.cache))
    print(
        f"\nAll verified, in {report.elapsed():.0f} s.\n"
        f"{format_size(held)} of files take {remote} on the backends and {local} in the local cache.\n"
        f"{PARITY_SHARDS} of {BACKENDS} backends are still dead.\n\n"
        f"  look around     ls {demo.mountpoint}\n"
        f"  how it stands   {ROOT}/.venv/bin/qsfs -c {demo.directory} status\n"
        f"  stop            scripts/quickstart --stop {shown}"
    )


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports on which nothing listens."""
    first = FIRST_PORT
    while first + count < 32768:
        for port in range(first, first + count):
            with socket.socket() as probe:
                try:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    first = port + 1
                    break
        else:
            return first
    raise Failed(f"there are no {count} free ports in a row above {FIRST_PORT}")


def answers(port: int) -> bool:
    """Whether a 0-db on this machine answers PING."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"*1\r\n$4\r\nPING\r\n")
            return connection.recv(64).startswith(b"+")
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Waits until it holds; the time is a bound, not an expectation."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.02)


def start_time(pid: int) -> int:
    """When a process started, in clock ticks; 0 when it does not run.  A pid alone may be reused."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def tree_bytes(root: Path) -> int:
    """What the files below `root` take on disk."""
    total = 0
    for place, _, files in os.walk(root):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(Path(place, name)).st_blocks * 512
    return total


if __name__ == "__main__":
    sys.exit(main())
