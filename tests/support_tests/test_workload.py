"""The verifiers of the workloads name exactly what is missing or wrong, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from tests.support import workload
from tests.support.workload import Running, acks
from tests.support.workload.process import WorkloadError
from tests.support.workload.tree import File, Tree

CASES = {
    "files": ("files", {}),
    "files-every-5": ("files", {"sync_every": 5}),
    "lmdb": ("lmdb", {}),
    "lmdb-single": ("lmdb", {"single": "data.lmdb", "mode": "manual"}),
    "lmdb-writemap": ("lmdb", {"mode": "writemap"}),
    "casper": ("casper", {"units": "plain"}),
    "casper-default-names": ("casper", {"default_names": True, "full_maps": True}),
    "sqlite-wal": ("sqlite", {"journal": "wal"}),
    "sqlite-delete": ("sqlite", {"journal": "delete"}),
}


def set_acked(path: Path, *, acked: int | None = None, begun: int | None = None) -> None:
    """Changes what an ack file says."""
    lines = path.read_text().splitlines()
    for key, value in (("ack", acked), ("begin", begun)):
        if value is not None:
            lines = [line for line in lines if key not in json.loads(line)]
            lines += [json.dumps({key: value})] if value >= 0 else []
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_ended_well_has_no_problems(tmp_path: Path, case: str) -> None:
    name, options = CASES[case]
    for seed in range(2):
        top = tmp_path / str(seed)
        top.mkdir()
        workload.run(name, top / "w", top / "acks", seed=seed, count=20, **options)
        assert acks.read(top / "acks").acked == 19
        assert workload.verify(top / "w", top / "acks") == []


@pytest.mark.parametrize("case", CASES)
def test_an_earlier_state_is_a_loss_and_a_later_one_an_invention(tmp_path: Path, case: str) -> None:
    name, options = CASES[case]
    workload.run(name, tmp_path / "w", tmp_path / "acks", seed=1, count=20, **options)
    set_acked(tmp_path / "acks", acked=24, begun=24)
    assert workload.verify(tmp_path / "w", tmp_path / "acks") != []
    set_acked(tmp_path / "acks", acked=9, begun=12)
    assert workload.verify(tmp_path / "w", tmp_path / "acks") != []
    set_acked(tmp_path / "acks", acked=9, begun=20)
    assert workload.verify(tmp_path / "w", tmp_path / "acks") == []


@pytest.mark.parametrize("case", CASES)
def test_all_lost_is_noticed_unless_nothing_was_promised(tmp_path: Path, case: str) -> None:
    name, options = CASES[case]
    workload.run(name, tmp_path / "w", tmp_path / "acks", seed=1, count=5, **options)
    shutil.rmtree(tmp_path / "w")
    (tmp_path / "w").mkdir()
    assert workload.verify(tmp_path / "w", tmp_path / "acks") != []
    set_acked(tmp_path / "acks", acked=-1, begun=-1)
    assert workload.verify(tmp_path / "w", tmp_path / "acks") == []


def test_steps_follow_from_the_seed(tmp_path: Path) -> None:
    for name, seed in (("1", 1), ("2", 1), ("3", 2)):
        workload.run("files", tmp_path / name, tmp_path / f"{name}.acks", seed=seed, count=30)
    trees = [
        {
            str(path.relative_to(tmp_path / name)): path.read_bytes() if path.is_file() else b""
            for path in sorted((tmp_path / name).rglob("*"))
        }
        for name in ("1", "2", "3")
    ]
    assert trees[0] == trees[1] != trees[2]


def test_the_plan_of_files_uses_every_kind_of_operation() -> None:
    kinds = set()
    for seed in range(5):
        tree = Tree()
        for number in range(300):
            operation = tree.next(str(seed), number, 1000)
            tree.apply(operation)
            kinds.add(operation.kind)
    assert kinds == {
        *("mkdir", "rmdir", "create", "write", "truncate", "rename", "link", "symlink", "unlink")
    }


class Ruin:
    """A finished `files` run, and what its tree must look like."""

    def __init__(self, top: Path) -> None:
        self.top, self.acks = top / "w", top / "acks"
        workload.run("files", self.top, self.acks, seed=6, count=120)
        self.tree = Tree()
        for number in range(120):
            self.tree.apply(self.tree.next("6", number, 60_000))

    def largest(self) -> tuple[str, bytes]:
        """A file with one name, and its content."""
        files = {path: entry for path, entry in self.tree.entries.items() if isinstance(entry, File)}
        names = [entry.number for entry in files.values()]
        single = {path: entry.data for path, entry in files.items() if names.count(entry.number) == 1}
        return max(single.items(), key=lambda item: len(item[1]))

    def linked(self) -> str:
        """A file with several names."""
        files = [(path, entry) for path, entry in self.tree.entries.items() if isinstance(entry, File)]
        numbers = [entry.number for _, entry in files]
        return next(path for path, entry in files if numbers.count(entry.number) > 1)

    def problems(self) -> list[str]:
        return workload.verify(self.top, self.acks)


def drop(ruin: Ruin) -> str:
    path, _ = ruin.largest()
    (ruin.top / path).unlink()
    return f"{path} is missing (names as after operation 119)"


def invent(ruin: Ruin) -> str:
    (ruin.top / "invented").touch()
    return "invented does not belong there (names as after operation 119)"


def flip(ruin: Ruin) -> str:
    path, data = ruin.largest()
    with (ruin.top / path).open("r+b") as file:
        file.seek(4096)
        file.write(bytes([data[4096] ^ 1]))
    return f"{path} holds wrong bytes in [4096, 8192)"


def zero(ruin: Ruin) -> str:
    path, _ = ruin.largest()
    with (ruin.top / path).open("r+b") as file:
        file.write(bytes(4096))
    return f"{path} holds zeros in [0, 4096)"


def shorten(ruin: Ruin) -> str:
    path, data = ruin.largest()
    os.truncate(ruin.top / path, len(data) - 1)
    return f"{path} has {len(data) - 1} bytes; it had [{len(data)}]"


def retype(ruin: Ruin) -> str:
    path, _ = ruin.largest()
    (ruin.top / path).unlink()
    (ruin.top / path).mkdir()
    return f"{path} is of another type (names as after operation 119)"


def relink(ruin: Ruin) -> str:
    path = next(path for path, entry in ruin.tree.entries.items() if hasattr(entry, "target"))
    target = (ruin.top / path).readlink()
    (ruin.top / path).unlink()
    (ruin.top / path).symlink_to("elsewhere")
    return f"{path} points at elsewhere, not at {target}"


@pytest.mark.parametrize("harm", [drop, invent, flip, zero, shorten, retype, relink])
def test_each_harm_to_plain_files_is_named(tmp_path: Path, harm: Callable[[Ruin], str]) -> None:
    ruin = Ruin(tmp_path)
    assert ruin.problems() == []
    said = harm(ruin)
    assert ruin.problems() == [said]


def test_a_name_that_became_a_copy_is_named(tmp_path: Path) -> None:
    ruin = Ruin(tmp_path)
    path = ruin.top / ruin.linked()
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    assert any("is not the file that its other name names" in problem for problem in ruin.problems())


@pytest.mark.parametrize("harm", ["drop", "change", "invent", "tip", "page"])
def test_each_harm_to_an_lmdb_is_named(tmp_path: Path, harm: str) -> None:
    workload.run("lmdb", tmp_path / "w", tmp_path / "acks", seed=3, count=15)
    if harm == "page":
        with (tmp_path / "w" / "data.mdb").open("r+b") as file:
            file.seek(3 * 4096)
            file.write(b"\xff" * 4096)
        assert all("data.mdb: " in problem for problem in workload.verify(tmp_path / "w", tmp_path / "acks"))
        assert workload.verify(tmp_path / "w", tmp_path / "acks")
        return
    environment = lmdb.open(str(tmp_path / "w"))
    with environment.begin(write=True) as transaction:
        key = next(key for key, _ in transaction.cursor())
        match harm:
            case "drop":
                transaction.delete(key)
                says = f"record {key.decode()} is missing"
            case "change":
                transaction.put(key, b"x")
                says = f"record {key.decode()} holds 1 bytes that it must not hold"
            case "invent":
                transaction.put(b"new", b"x")
                says = "record b'new' does not belong there"
            case _:
                transaction.put(b"tip", b"99")
                says = "is as of step 99; acknowledged was 14, begun 14"
    environment.close()
    problems = workload.verify(tmp_path / "w", tmp_path / "acks")
    assert len(problems) == 1
    assert says in problems[0]


def test_a_lost_state_record_of_a_casper_block_is_named(tmp_path: Path) -> None:
    workload.run("casper", tmp_path / "w", tmp_path / "acks", seed=3, count=6, units="durable")
    data = lmdb.open(str(tmp_path / "w" / "data.lmdb"), subdir=False, max_dbs=2)
    table = data.open_db(b"TRIE_STORE")
    with data.begin(write=True, db=table) as transaction:
        key = next(key for key, _ in transaction.cursor())
        transaction.delete(key)
    data.close()
    units = tmp_path / "w" / "unit_files" / "unit_0.dat"
    os.truncate(units, units.stat().st_size - 1)
    problems = workload.verify(tmp_path / "w", tmp_path / "acks")
    assert len(problems) == 2
    assert f"TRIE_STORE record {key.hex()} is missing" in problems[0]
    assert "unit_0.dat has" in problems[1]


def test_a_running_program_tells_its_progress_and_can_be_killed(scratch: Path) -> None:
    with Running("lmdb", scratch / "w", scratch / "acks", seed=1) as writer:
        assert writer.wait_for(5) >= 4
        writer.kill()
        assert writer.end() < 0
    assert workload.verify(scratch / "w", scratch / "acks") == []


def test_a_program_that_fails_says_why(scratch: Path) -> None:
    with Running("lmdb", scratch / "w", scratch / "acks", count=3) as writer:
        writer.finish()
    with Running("lmdb", scratch / "w", scratch / "acks", count=3) as writer:
        with pytest.raises(WorkloadError, match=r"(?s)acknowledged 0 of 1 steps: it ended with 1: .*acks"):
            writer.wait_for(1)
        assert writer.end() == 1


def test_an_ack_file_may_end_in_the_middle_of_a_line(tmp_path: Path) -> None:
    workload.run("files", tmp_path / "w", tmp_path / "acks", seed=1, count=5)
    with (tmp_path / "acks").open("ab") as file:
        file.write(b'{"begin": 77')
    assert acks.read(tmp_path / "acks").begun == 4


def test_the_command_verifies_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.support.workload.__main__ import main

    def call(*words: str) -> int:
        monkeypatch.setattr(
            "sys.argv", ["workload", "files", str(tmp_path / "w"), str(tmp_path / "acks"), *words]
        )
        return main()

    assert call("--seed", "3", "--count", "8", "--option", "sync_every=2") == 0
    assert acks.read(tmp_path / "acks").options == {"sync_every": 2}
    assert call("--verify") == 0
    shutil.rmtree(tmp_path / "w")
    assert call("--verify") == 1
    assert "is missing" in capsys.readouterr().out
