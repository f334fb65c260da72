"""Users who are not root: what they may do works, and what they may not is one sentence, never a traceback."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsfs.daemon import mountpoint
from qsfs.errors import DependencyMissing, MountError
from qsfs.store.environment import Environment
from qsfs.store.schema import ROOT_INODE, Inode, Table, u64
from tests.support.backends import Servers

NOBODY = 65534

# Commands import what they need when they run; others cannot read a Python that lies in root's home.
for name in ("checking", "formatting", "log", "restoring", "service", "takeover"):
    importlib.import_module(f"qsfs.daemon.{name}")
for encoding in ("ascii", "idna"):
    codecs.lookup(encoding)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def home(scratch: Path) -> Path:
    """A directory of somebody else's, which they can reach."""
    for path in (scratch, scratch.parent):
        path.chmod(0o755)
    place = scratch / "home"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    return place


@pytest.fixture
def of_root(qsfs, home: Path) -> Path:
    """A configuration that everybody can read, with a cache and a key that only root can."""
    place = home.parent / "root"
    assert qsfs("init", place).code == 0
    (place / "qsfs.toml").chmod(0o644)
    (place / "cache" / "data.mdb").touch()
    return place


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("status",), 14),
        (("sync",), 14),
        (("unblock",), 14),
        (("umount",), 14),
        (("takeover",), 14),
        (("mount", "--foreground"), 14),
        (("fsck",), 8),
        (("format",), 4),
        (("restore",), 4),
    ],
    ids=lambda word: word[0] if isinstance(word, tuple) else str(word),
)
def test_a_file_system_of_another_user_is_refused(qsfs, of_root, command, code):
    with somebody_else():
        result = qsfs("-c", of_root, *command)
    assert result.code == code, result.err
    assert "permission denied" in result.err.lower() and result.err.count("\n") <= 2


def test_a_configuration_that_only_its_owner_reads(qsfs, of_root):
    of_root.chmod(0o700)
    with somebody_else():
        for file in (of_root, of_root / "qsfs.toml"):
            result = qsfs("-c", file, "status")
            assert result.code == 3 and "cannot be read: Permission denied" in result.err


def test_who_formats_owns_the_root_directory(qsfs, home):
    """Else an ordinary user could mount the new file system and write nothing in it."""
    sizes = ("--backends", 3, "--data-shards", 2, "--parity-shards", 1, "--cache-size", "64MiB")
    with Servers(home.parent / "zdb", count=3) as servers, somebody_else():
        assert qsfs("init", home, "--port", servers.first_port, *sizes).code == 0
        made = qsfs("-c", home, "format")
    assert made.code == 0, made.err
    environment = Environment(home / "cache", 64 << 20, readonly=True)
    with contextlib.closing(environment), contextlib.closing(environment.read()) as view:
        root = Inode.decode(ROOT_INODE, bytes(view.get(Table.INODES, u64(ROOT_INODE)) or b""))
    assert (root.uid, root.gid) == (NOBODY, NOBODY)


def test_letting_others_in_needs_the_line_in_fuse_conf(scratch):
    """FUSE itself only says that the mount failed."""
    conf = scratch / "fuse.conf"
    conf.write_text("#user_allow_other\n")
    mountpoint.check_allow_other(conf)
    with somebody_else(), pytest.raises(MountError, match="user_allow_other"):
        mountpoint.check_allow_other(conf)
    conf.write_text("mount_max = 5\nuser_allow_other\n")
    for path in (scratch, scratch.parent):
        path.chmod(0o755)
    with somebody_else():
        mountpoint.check_allow_other(conf)


def test_a_device_that_is_closed_to_the_user(monkeypatch):
    monkeypatch.setattr(mountpoint.os, "access", lambda *_, **__: False)
    with pytest.raises(DependencyMissing, match="/dev/fuse: permission denied"):
        mountpoint.check_dependencies()
