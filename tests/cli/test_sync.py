"""`qsfs sync` waits for backends as long as it takes, and says what it waits for."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qsfs.cli import sync
from qsfs.daemon import control, handover
from qsfs.errors import MountError, NotRunning


def test_what_is_waited_for_is_told_once_until_it_changes(monkeypatch, capsys):
    """Also before the mount owns; a status that does not come is passed over."""
    answers: list[Any] = [
        {"waiting_for": "a quorum", "flush": None},
        NotRunning("no answer"),
        {"waiting_for": "", "flush": {"waiting": ["1 of 3 shards stored"]}},
        {"waiting_for": "", "flush": {"waiting": ["1 of 3 shards stored"]}},
        {"waiting_for": "", "flush": {"waiting": ["2 of 3 shards stored"]}},
        {"waiting_for": "", "flush": {"waiting": []}},
    ]
    asked = threading.Event()

    def ask(cache: Path, command: str, *, timeout: float) -> Any:
        assert (cache, command) == (Path("/c"), "status")
        if len(answers) == 1:
            asked.set()
            return answers[0]
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(sync, "_TELL_SECONDS", 0.001)
    monkeypatch.setattr(control, "ask", ask)
    monkeypatch.setattr(control, "require_running", lambda cache: None)
    with sync.waits_told(Path("/c")):
        assert asked.wait(60)
    assert capsys.readouterr().err.splitlines() == [
        "waiting: a quorum",
        "waiting: 1 of 3 shards stored",
        "waiting: 2 of 3 shards stored",
    ]


def test_a_sync_for_full_packs_tells_why_they_are_not_and_how_far_it_is(monkeypatch, capsys):
    """When the reason changes, and whenever half of them are full; not to who waits for less."""

    def status(packs: int, why: str) -> dict[str, Any]:
        return {"waiting_for": "", "full_waits": [{"packs": packs, "bytes": packs << 20, "why": why}]}

    answers = [
        status(1000, "backend a: down"), status(1000, "backend a: down"), status(1000, "being made"),
        status(900, "being made"), status(499, "being made"), status(400, "being made"),
        {"waiting_for": "", "full_waits": []},
    ]  # fmt: skip
    told = [
        "waiting: 1,000 packs with 1000.0 MiB not full yet: backend a: down",
        "waiting: 1,000 packs with 1000.0 MiB not full yet: being made",
        "waiting: 499 packs with 499.0 MiB not full yet: being made",
    ]
    monkeypatch.setattr(sync, "_TELL_SECONDS", 0.001)
    for full, lines in ((True, told), (False, [])):
        left, asked = list(answers), threading.Event()

        def ask(cache: Path, command: str, *, timeout: float, left: list[Any] = left, asked: Any = asked) -> Any:
            if len(left) == 1:
                asked.set()
                return left[0]
            return left.pop(0)

        monkeypatch.setattr(control, "ask", ask)
        with sync.waits_told(Path("/c"), full=full):
            assert asked.wait(60)
        assert capsys.readouterr().err.splitlines() == lines


def test_only_a_sync_for_full_packs_tells_of_them(monkeypatch, qsfs, tmp_path):
    qsfs("init", tmp_path)
    wanted = []

    @contextlib.contextmanager
    def told(cache: Path, *, full: bool = False) -> Iterator[None]:
        wanted.append(full)
        yield

    monkeypatch.setattr(sync, "waits_told", told)
    monkeypatch.setattr(control, "ask", lambda *_, **__: {"generation": 7, "class": "full"})
    monkeypatch.setattr(control, "require_running", lambda cache: None)
    for durability in ((), ("--class", "written"), ("--class", "full")):
        qsfs("-c", tmp_path, "sync", *durability)
    assert wanted == [False, False, True]


def test_a_class_that_is_not_reached_in_time_is_exit_17_with_what_is_missing(monkeypatch, qsfs, tmp_path):
    """Which backends, and why; not an error of the daemon, which goes on."""
    qsfs("init", tmp_path)
    asked = []
    lacks = {
        "waiting": ["3 of 4 shards stored"],
        "packs_not_full": 2,
        "bytes_not_full": 4096,
        "backends": [
            {"number": 1, "name": "a:1/x", "why": "down: Connection refused", "seconds_ago": 0.0},
            {"number": 2, "name": "b:1/x", "why": "full", "seconds_ago": 12.4},
        ],
    }
    result = {"generation": 7, "class": "written", "wanted": "full", "reached": False, "missing": lacks}

    def ask(cache: Path, command: str, **arguments: Any) -> Any:
        asked.append((command, arguments))
        return result

    monkeypatch.setattr(control, "ask", ask)
    monkeypatch.setattr(control, "require_running", lambda cache: None)
    said = qsfs("-c", tmp_path, "sync", "--class", "full", "--timeout", "1min")
    assert ("sync", {"class": "full", "seconds": 60.0}) in asked
    assert (said.code, said.out) == (17, "")
    assert said.err.splitlines() == [
        "not full in time, it goes on: generation 7 is published, its packs are written",
        "not full yet: 2 packs with 4.0 KiB",
        "waiting: 3 of 4 shards stored",
        "backend a:1/x: down: Connection refused",
        "backend b:1/x: full (12 s ago)",
    ]
    assert qsfs("-c", tmp_path, "--json", "sync", "--class", "full").json == result
    assert qsfs("-c", tmp_path, "sync", "--timeout", "soon").code == 2


@pytest.mark.parametrize(("durability", "word"), [("full", "are full"), ("written", "are written, and become full")])
def test_the_number_and_what_it_is_worth_are_told(monkeypatch, qsfs, tmp_path, durability, word):
    qsfs("init", tmp_path)
    monkeypatch.setattr(control, "ask", lambda *_, **__: {"generation": 7, "class": durability})
    monkeypatch.setattr(control, "require_running", lambda cache: None)
    said = qsfs("-c", tmp_path, "sync").out
    assert said.startswith("generation 7 is published") and word in said


def test_a_kernel_that_cannot_hand_its_pages_over_holds_up_no_sync_with_a_timeout(monkeypatch, qsfs, tmp_path):
    """They wait for room in a full cache, for as long as backends are gone: nothing is certain, and that is said."""
    qsfs("init", tmp_path)
    monkeypatch.setattr(control, "require_running", lambda cache: None)
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[0])
    os.mkfifo(tmp_path / "stuck")
    monkeypatch.setattr(handover, "_CHILD", f"open({str(tmp_path / 'stuck')!r})")
    monkeypatch.setattr(sync, "_LEAST_HAND_OVER_SECONDS", 0.0)
    said = qsfs("-c", tmp_path, "sync", "--timeout", "1ms")
    assert said.code == 17 and "could not hand its pages over" in said.err
    (tmp_path / "stuck").write_bytes(b"")
    assert started[0].wait(60) == 0


def test_a_sync_with_a_timeout_says_where_nothing_is_mounted(qsfs, tmp_path):
    qsfs("init", tmp_path)
    said = qsfs("-c", tmp_path, "sync", "--timeout", "1min")
    assert said.code == NotRunning.exit_code and "not mounted" in said.err


@pytest.mark.parametrize("timeout", [(), ("--timeout", "1min")])
@pytest.mark.parametrize("failure", ["import sys; sys.exit('syncfs 5')", "raise MemoryError"])
def test_what_the_kernel_lost_is_no_success(monkeypatch, qsfs, tmp_path, timeout, failure):
    """Nor is anything asked of the daemon, which cannot know of it."""
    qsfs("init", tmp_path)
    monkeypatch.setattr(handover, "_CHILD", failure)
    monkeypatch.setattr(control, "ask", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setattr(control, "require_running", lambda cache: None)
    said = qsfs("-c", tmp_path, "sync", *timeout)
    assert said.code == MountError.exit_code and "have it written again" in said.err
    assert ("Input/output error" in said.err) == ("5" in failure)


def test_who_waits_for_the_kernel_is_another_process_that_has_no_file_of_ours(monkeypatch, tmp_path):
    """Else a daemon that is killed meanwhile keeps /dev/fuse open, and its mount hangs."""
    assert handover.hand_over(tmp_path) == ""
    ours = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(ours, True)
    try:
        told = tmp_path / "told"
        say = "print(os.getpid(), *os.listdir('/proc/self/fd'), file=told)"
        script = f"import os; told = open({str(told)!r}, 'w'); {say}"
        monkeypatch.setattr(handover, "_CHILD", script)
        handover.require_handed_over(tmp_path)
    finally:
        os.close(ours)
    process, *numbers = map(int, told.read_text().split())
    # Its standard files, the one that it writes, and the directory that it lists.
    assert process != os.getpid() and len(numbers) <= 5
