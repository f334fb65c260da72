"""`qsfs sync` waits for backends as long as it takes, and says what it waits for."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from qsfs.cli import sync
from qsfs.daemon import control
from qsfs.errors import NotRunning


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
    with sync.waits_told(Path("/c")):
        assert asked.wait(60)
    assert capsys.readouterr().err.splitlines() == [
        "waiting: a quorum",
        "waiting: 1 of 3 shards stored",
        "waiting: 2 of 3 shards stored",
    ]


@pytest.mark.parametrize(("durability", "word"), [("full", "are full"), ("written", "are written, and become full")])
def test_the_number_and_what_it_is_worth_are_told(monkeypatch, qsfs, tmp_path, durability, word):
    qsfs("init", tmp_path)
    monkeypatch.setattr(control, "ask", lambda *_, **__: {"generation": 7, "class": durability})
    said = qsfs("-c", tmp_path, "sync").out
    assert said.startswith("generation 7 is published") and word in said
