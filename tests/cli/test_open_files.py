"""Connections are open files: a command takes what the machine grants, and says at once where that is too little."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from qsfs.clock import SystemClock
from qsfs.config import Config
from qsfs.daemon.connect import links
from qsfs.daemon.descriptors import require_descriptors
from qsfs.errors import ConfigError
from qsfs.format.keys import key_file_text
from tests.support.scratch import ROOT

FLEET = 255


def tables(count: int) -> str:
    return "".join(f"[[backend]]\naddress = '127.0.0.1:{port}'\n" for port in range(1, count + 1))


@pytest.fixture
def soft_limit():
    """Sets the soft limit of this process for the time of the test; gives it and the hard one."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda soft: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_what_opens_backends_raises_the_limit_as_far_as_it_goes(tmp_path, soft_limit):
    soft_limit(256)
    found = links(Config.parse(tables(FLEET), tmp_path / "qsfs.toml"), SystemClock())
    await found.aclose()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard > 256


def test_each_backend_counts(monkeypatch):
    """A fleet that grows, as by `fleet apply`, is held against the limit too."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    require_descriptors(100)
    with pytest.raises(ConfigError, match=r"200 backends need up to 1256 open files.*LimitNOFILE="):
        require_descriptors(200)


def test_a_hard_limit_that_is_too_low_is_said_before_any_backend_is_asked(tmp_path):
    (tmp_path / "qsfs.key").write_text(key_file_text(bytes(32)))
    (tmp_path / "qsfs.toml").write_text(f"[filesystem]\nkey_file = 'qsfs.key'\n{tables(FLEET)}")
    qsfs = [sys.executable, "-m", "qsfs.cli.main", "-c", str(tmp_path)]
    for words in (["restore"], ["key", "list"], ["snapshot", "list"]):
        limited = ["sh", "-c", 'ulimit -n 1024; exec "$@"', "-", *qsfs, *words]
        done = subprocess.run(limited, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert "255 backends need up to 1531 open files" in done.stderr and "may have 1024" in done.stderr
