"""What a format leaves of local state that is there already: everything, unless it was named to be lost."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import trio

from qsfs.clock import FixedClock
from qsfs.config import Config
from qsfs.daemon import formatting
from qsfs.errors import BackendError, CacheError
from qsfs.format.keys import new_key_file
from qsfs.store.limits import Limits
from qsfs.store.store import FSID_KEY, Store
from tests.support.backends import free_ports

MINE = b"m" * 16
OTHER = b"o" * 16


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "cache").mkdir()
    (tmp_path / "qsfs.key").write_text(new_key_file(FixedClock().random_bytes))
    first = free_ports(3)
    backends = "".join(f'[[backend]]\naddress = "127.0.0.1:{port}"\n' for port in range(first, first + 3))
    return Config.parse(f"[code]\ndata_shards = 2\nparity_shards = 1\n{backends}", tmp_path / "qsfs.toml")


def make_store(config: Config) -> bytes:
    store = Store(config.cache.directory, Limits.of(config.cache, config.flush.spool_bytes), FixedClock())
    store.set_local(FSID_KEY, MINE)
    group = store.seal()
    store.commit(group)
    store.committed(group)
    store.close()
    return (config.cache.directory / "data.mdb").read_bytes()


def test_the_local_state_of_another_file_system_than_the_named_one_is_not_lost(config: Config) -> None:
    before = make_store(config)
    for force in (None, OTHER):
        with pytest.raises(CacheError, match="local state"):
            trio.run(lambda: formatting.format_file_system(config, FixedClock(), force=force))  # noqa: B023
    assert (config.cache.directory / "data.mdb").read_bytes() == before
    # With its own name it goes on, to the backends, which are not there.
    with pytest.raises(BackendError):
        trio.run(lambda: formatting.format_file_system(config, FixedClock(), force=MINE))
    assert (config.cache.directory / "data.mdb").read_bytes() == before


def test_a_format_that_fails_leaves_what_a_former_mount_was_sending(config: Config) -> None:
    before = make_store(config)
    spooled = config.cache.directory / "spool" / "0000000000000001-aa.head"
    spooled.parent.mkdir()
    spooled.write_bytes(b"a head that may have been sent")
    formatting._Forming(config, FixedClock()).close()
    assert spooled.read_bytes() == b"a head that may have been sent"
    assert (config.cache.directory / "data.mdb").read_bytes() == before


def test_the_local_store_is_for_its_owner_alone(config: Config) -> None:
    make_store(config)
    files = [path for path in config.cache.directory.iterdir() if path.is_file()]
    assert {path.name for path in files} >= {"data.mdb", "lock.mdb", "journal.0", "journal.1"}
    assert [path.name for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077] == []
