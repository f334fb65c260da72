"""The scripts: the bench measures and cleans up, the quickstart touches only what is its own."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qsfs.zdb.record import FILE_HEADER, FILE_MAGIC, FORMAT_VERSION, encode_record

SCRIPTS = Path(__file__).parent.parent / "scripts"


def load(name: str):
    """A script as a module; scripts import each other by name."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def inputs():
    return load("inputs")


@pytest.fixture(scope="module")
def quickstart():
    return load("quickstart")


def script(name: str, *words: object, timeout: float = 120) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


class TestBench:
    @pytest.mark.mount
    def test_it_compares_with_the_floor_and_leaves_nothing_behind(self, scratch):
        names = ["seq_write", "seq_read_cold", "rand_read_direct", "rand_read_16", "create", "mmap_msync"]
        options = ("--floor", "--json", "--rounds", 2, "--size", "2MiB", "--only", ",".join(names))
        done = script("bench", scratch, *options)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert [result["name"] for result in report["measures"]] == names
        for result in report["measures"]:
            assert not result["errors"]
            assert all(len(runs) == 2 and min(runs) > 0 for runs in result["runs"].values())
            assert result["ratio"]["floor"] == pytest.approx(
                result["median"]["DIR"] / result["median"]["floor"]
            )
            assert result["cpu"]["DIR"] is None, "the disk has no daemon"
            assert result["cpu"]["floor"] > 0
        assert list(scratch.iterdir()) == []

    def test_the_table_names_what_was_measured(self, tmp_path):
        done = script("bench", tmp_path, "--against", tmp_path, "--size", "1MiB", "--only", "seq_write")
        assert done.returncode == 0, done.stderr
        assert "sequential write" in done.stdout
        assert "ratio" in done.stdout

    def test_an_unknown_measure_is_refused(self, tmp_path):
        done = script("bench", tmp_path, "--only", "seq_wirte")
        assert done.returncode != 0
        assert "seq_write" in done.stderr

    def test_a_measure_that_fails_is_told_and_fails_the_run(self, tmp_path, monkeypatch):
        """A figure that could not be taken must never look like a slow one."""
        bench = load("bench")

        def broken(directory: Path, size: int, watch: object) -> float:
            raise OSError("no such thing here")

        item = bench.Measure("broken", "/s", "what cannot be", broken)
        (result,) = bench.measure([item], {"DIR": tmp_path, "AGAINST": tmp_path}, 1, 1, quiet=True)
        assert result["median"] == {"DIR": None, "AGAINST": None}
        assert result["ratio"] == {"AGAINST": None}
        assert "no such thing" in result["errors"]["DIR"]

    @pytest.mark.mount
    def test_the_floor_unmounts_on_sigterm(self, scratch):
        mountpoint = scratch / "mnt"
        mountpoint.mkdir()
        command = [sys.executable, str(SCRIPTS / "floor.py"), str(mountpoint), str(scratch / "appended")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            (mountpoint / "file").write_text("content")
            with (mountpoint / "file").open("r+b") as stream:
                os.fsync(stream.fileno())
            assert (scratch / "appended").stat().st_size == 4096
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
        assert not mountpoint.is_mount()


class TestJournal:
    def test_each_size_is_timed_by_both_ways_and_nothing_is_left(self, tmp_path):
        """The one store journals every fsync, the other one none: else the comparison would be of nothing."""
        done = script("bench", tmp_path, "--journal", "--rounds", 1, "--size", "1MiB", "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert [row["size"] for row in report["rows"]] == [4096 << power for power in range(9)] * 2
        for row in report["rows"]:
            assert all(value > 0 for name, value in row.items() if name.endswith("_ms"))
        assert report["flushes"]["journal"] >= 18 * 17, "one alone and at least 16 in a row for each"
        assert report["flushes"]["commit"] == 0
        assert list(tmp_path.iterdir()) == []

    def test_the_crossover_is_where_the_commit_stays_ahead(self):
        def found(*commits):
            rows = [{"size": 4096 << power, "a": 5.0, "b": commit} for power, commit in enumerate(commits)]
            return load("journal_sizes").crossover(rows, "a", "b")

        assert found(9.0, 4.0, 9.0, 4.0, 4.0) == 4096 << 3
        assert found(4.0, 4.0) == 4096
        assert found(4.0, 9.0) is None


class TestInputs:
    def test_every_input_grows_and_checks_itself(self, inputs, tmp_path):
        inputs.sqlite_grow(tmp_path / "a.sqlite", 3)
        inputs.sqlite_grow(tmp_path / "a.sqlite", 2)
        assert inputs.sqlite_check(tmp_path / "a.sqlite", 5) == "50 rows"
        inputs.lmdb_grow(tmp_path / "a.lmdb", 3)
        inputs.lmdb_grow(tmp_path / "a.lmdb", 2)
        assert inputs.lmdb_check(tmp_path / "a.lmdb", 5) == "20 entries"

    def test_checks_notice_what_is_missing_or_wrong(self, inputs, tmp_path):
        import sqlite3

        inputs.lmdb_grow(tmp_path / "a.lmdb", 3)
        with pytest.raises(inputs.Mismatch, match="12 entries"):
            inputs.lmdb_check(tmp_path / "a.lmdb", 4)
        inputs.sqlite_grow(tmp_path / "a.sqlite", 3)
        with pytest.raises(inputs.Mismatch, match="30 rows"):
            inputs.sqlite_check(tmp_path / "a.sqlite", 4)
        connection = sqlite3.connect(tmp_path / "a.sqlite")
        with connection:
            connection.execute("UPDATE entry SET content = x'00' WHERE id = 7")
        connection.close()
        with pytest.raises(inputs.Mismatch, match="row 7"):
            inputs.sqlite_check(tmp_path / "a.sqlite", 3)

    def test_the_manifest_notices_every_kind_of_difference(self, inputs, tmp_path):
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "f").write_text("content")
        (tmp_path / "l").symlink_to("d/f")
        before = inputs.manifest(tmp_path)
        assert set(before) == {"d", "d/f", "l"}
        assert inputs.compare(before, inputs.manifest(tmp_path)) == ""

        times = (tmp_path / "d" / "f").stat()
        (tmp_path / "d" / "f").write_text("kontent")
        os.utime(tmp_path / "d" / "f", ns=(times.st_atime_ns, times.st_mtime_ns))
        assert "d/f is different" in inputs.compare(before, inputs.manifest(tmp_path))
        (tmp_path / "d" / "f").unlink()
        assert "d/f is missing" in inputs.compare(before, inputs.manifest(tmp_path))
        (tmp_path / "d" / "f").write_text("content")
        (tmp_path / "new").touch()
        assert "new was not there" in inputs.compare(before, inputs.manifest(tmp_path))

    def test_a_database_that_is_mostly_a_hole_is_compared_by_what_it_uses(self, inputs, tmp_path):
        inputs.lmdb_grow(tmp_path / "a.lmdb", 2)
        before = inputs.manifest(tmp_path)
        assert set(before) == {"a.lmdb"}, "the lock file is local"
        assert (tmp_path / "a.lmdb").stat().st_size == inputs.MAP_SIZE
        assert inputs.total_bytes(before) < 1 << 20


class TestQuickstart:
    def test_a_directory_that_is_not_ours_is_left_alone(self, tmp_path):
        (tmp_path / "precious").write_text("x")
        done = script("quickstart", tmp_path)
        assert done.returncode == 1
        assert "not empty" in done.stderr
        assert script("quickstart", "--stop", tmp_path).returncode == 1
        assert [path.name for path in tmp_path.iterdir()] == ["precious"]

    def test_only_the_very_process_that_was_started_counts_as_a_backend(self, quickstart, tmp_path):
        """A pid may belong to somebody else by now: it must never be killed."""
        demo = quickstart.Demo(tmp_path)
        demo.backends.mkdir()
        mine = {"pid": os.getpid(), "since": quickstart.start_time(os.getpid())}
        reused = {"pid": os.getpid(), "since": mine["since"] - 1}
        demo.processes.write_text(json.dumps({"1": mine, "2": reused, "3": {"pid": 4194304, "since": 0}}))
        assert demo.running() == {1: os.getpid()}

    def test_ports_in_use_are_passed_over(self, quickstart, monkeypatch):
        import socket

        first = quickstart.free_ports(3)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", first + 1))
            taken.listen()
            monkeypatch.setattr(quickstart, "FIRST_PORT", first)
            assert quickstart.free_ports(3) >= first + 2

    def test_a_mount_is_seen_also_when_its_name_has_blanks(self, quickstart, tmp_path):
        assert not quickstart.Demo(tmp_path / "a b").is_mounted()
        root = quickstart.Demo(tmp_path)
        root.mountpoint = Path("/")
        assert root.is_mounted()


@pytest.mark.parametrize("name", ["setup", "test", "bench", "quickstart"])
def test_shell_scripts_parse_and_may_be_run(name):
    assert os.access(SCRIPTS / name, os.X_OK)
    assert subprocess.run(["bash", "-n", str(SCRIPTS / name)], capture_output=True).returncode == 0


class TestCost:
    def test_what_servers_stored_is_counted_by_what_it_is(self, tmp_path):
        """Keys and values, also of records that were replaced or deleted since; not what the server adds."""
        cost = load("cost")
        values = [
            (b"qsfs:s:one", bytes(84) + b"\x01" + bytes(115)),
            (b"qsfs:s:two", bytes(84) + b"\x02" + bytes(15)),
            (b"qsfs:h:head", bytes(1000)),
            (b"qsfs:h:head", b""),
            (b"qsfs:o:owner", bytes(30)),
        ]
        place = tmp_path / "8" / "data"
        place.mkdir(parents=True)
        with (place / "d0").open("wb") as out:
            out.write(FILE_HEADER.pack(FILE_MAGIC, FORMAT_VERSION, 0))
            for key, value in values:
                out.write(encode_record(key, value, time_s=1, durable=0, seed=7) + value)
        (place / "index").write_bytes(b"other")
        assert cost.stored(tmp_path) == {"data": 210, "metadata": 110, "heads": 1022, "other": 42}
