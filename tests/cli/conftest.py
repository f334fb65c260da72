"""What the tests of the command line share."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from qsfs.cli.main import main


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def qsfs(capsys, monkeypatch, tmp_path):
    """Runs a command line in this process, in an empty directory, and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QSFS_CONFIG", raising=False)

    def run(*argv: object) -> Result:
        capsys.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run
