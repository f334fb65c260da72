"""Paths that people give: only what lies on the mount, by whatever way they get there."""

from __future__ import annotations

import pytest

from qsfs.cli.paths import on_mount
from qsfs.errors import ConfigError


@pytest.fixture
def mount(tmp_path, monkeypatch):
    mount = tmp_path / "mnt"
    (mount / "dir").mkdir(parents=True)
    (mount / "dir" / "file").write_text("")
    (mount / "out").symlink_to("/etc")
    (mount / "link").symlink_to("dir/file")
    (tmp_path / "way").symlink_to(mount / "dir")
    (tmp_path / "mnt2").mkdir()
    monkeypatch.chdir(tmp_path)
    return mount


def test_paths_on_the_mount(mount, tmp_path, monkeypatch):
    """Absolute, from the mount point, from a directory on it, and over symbolic links; the last is not followed."""
    assert on_mount(mount, str(mount)) == ""
    assert on_mount(mount, ".") == ""
    assert on_mount(mount, str(mount / "dir/file")) == "dir/file"
    assert on_mount(mount, "dir/file") == "dir/file"
    assert on_mount(mount, "dir/../dir//file") == "dir/file"
    assert on_mount(mount, "dir/gone") == "dir/gone"
    assert on_mount(mount, "link") == "link"
    assert on_mount(mount, str(tmp_path / "way")) == "dir"
    assert on_mount(mount, str(tmp_path / "way" / "file")) == "dir/file"
    assert on_mount(mount, "mnt/dir/file") == "dir/file"
    assert on_mount(mount, "way/file") == "dir/file"
    monkeypatch.chdir(mount / "dir")
    assert on_mount(mount, "file") == "dir/file"
    assert on_mount(mount, "..") == ""
    monkeypatch.chdir("/")
    assert on_mount(tmp_path / "way", "file") == "file"


@pytest.mark.parametrize("path", ["/", "/etc", "..", "../mnt2", "out/passwd", "dir/../../mnt2", "{}/mnt2", "{}/mnt22"])
def test_what_lies_elsewhere_is_refused(mount, tmp_path, path):
    """However it is written, and though it begins like the mount point or goes through it."""
    with pytest.raises(ConfigError, match="outside the mount point"):
        on_mount(mount, path.format(tmp_path))
