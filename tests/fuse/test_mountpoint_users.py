"""Who keeps a mount busy is named, however much it opens and closes meanwhile."""

from __future__ import annotations

from pathlib import Path

from qsfs.daemon.mountpoint import _opened


def test_a_file_that_was_closed_meanwhile_hides_no_other(tmp_path: Path) -> None:
    process = tmp_path / "7"
    (process / "fd").mkdir(parents=True)
    (process / "cwd").symlink_to("/")
    (process / "fd" / "3").write_text("nothing that can be read as a link, as one that is gone")
    (process / "fd" / "4").symlink_to("/mnt/node/data.lmdb")
    assert sorted(_opened(process)) == ["/", "/mnt/node/data.lmdb"]
