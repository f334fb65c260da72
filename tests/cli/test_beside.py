"""The caches of snapshots that are mounted beside: what is removed with a mount, and what never is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qsfs.config import Config
from qsfs.daemon import beside
from qsfs.daemon.lock import CacheLock
from qsfs.errors import CacheError, MountError


@pytest.fixture
def config(qsfs, tmp_path: Path) -> Config:
    assert qsfs("init", "demo").code == 0
    return Config.load(tmp_path / "demo")


def of(config: Config, mountpoint: Path, name: str = "daily") -> Config:
    return beside.beside(config, name, mountpoint, 32 << 20)


def test_what_is_not_the_cache_of_a_snapshot_is_never_removed(config: Config, tmp_path: Path):
    """A directory of that name may be anything, even the state of a mount that writes."""
    place = beside.cache_of(config, "daily")
    place.mkdir(parents=True)
    (place / "data.mdb").write_bytes(b"not on the backends yet")
    with pytest.raises(CacheError, match="move it elsewhere"):
        beside.make(of(config, tmp_path / "mnt"))
    beside.remove(place)
    assert [path.name for path in place.iterdir()] == ["data.mdb"]


def test_a_cache_goes_and_what_its_mount_point_shows_stays(config: Config, tmp_path: Path):
    mountpoint = tmp_path / "shown"
    mountpoint.mkdir()
    (mountpoint / "file").touch()
    beside.make(of(config, mountpoint))
    place = beside.cache_of(config, "daily")
    assert beside.mountpoint_of(place) == mountpoint
    beside.remove(place)
    assert (mountpoint / "file").exists() and not place.parent.exists()


def test_a_cache_that_somebody_works_in_stays(config: Config, tmp_path: Path):
    shown = of(config, tmp_path / "shown")
    beside.make(shown)
    place = beside.cache_of(config, "daily")
    lock = CacheLock(place)
    try:
        beside.remove(place)
        assert place.exists()
        with pytest.raises(MountError, match=f"mounted already, on {tmp_path / 'shown'}"):
            beside.make(of(config, tmp_path / "other"))
        assert beside.mounted(config) == {"daily": tmp_path / "shown"}
    finally:
        lock.release()


def test_of_two_that_start_the_one_that_runs_says_where(config: Config, tmp_path: Path):
    first, second = (of(config, tmp_path / name) for name in ("first", "second"))
    beside.make(first)
    beside.make(second)
    beside.started(first)
    assert beside.mountpoint_of(beside.cache_of(config, "daily")) == tmp_path / "first"


def test_half_a_cache_is_never_found(config: Config, tmp_path: Path, monkeypatch):
    """Whoever dies while one is removed leaves it under another name, and the next removal takes that, too."""
    shown = of(config, tmp_path / "shown")
    beside.make(shown)
    place = beside.cache_of(config, "daily")
    (place / "images").mkdir()
    with monkeypatch.context() as dying:
        dying.setattr(shutil, "rmtree", lambda *_, **__: None)
        beside.remove(place)
    assert not place.exists() and beside.mounted(config) == {}
    beside.make(shown)
    assert not (place / "images").exists()
    beside.remove(place)
    assert not place.parent.exists()
