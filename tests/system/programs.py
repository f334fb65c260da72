"""Real programs on a mount: how they are run, as whom, and what they find afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.daemon import FileSystem

NOBODY = 65534


def run(*words: object, cwd: Path | None = None, **options: Any) -> str:
    """Runs a program that must succeed; what it printed."""
    done = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def in_python(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python program in a process of its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def succeed(*processes: subprocess.Popen[str]) -> list[str]:
    """Waits for the end of all, which must be a good one; what each printed."""
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return said


def remount(fs: FileSystem) -> None:
    """Ends the daemon at once, and mounts again."""
    fs.kill()
    fs.mount()


def grow_tree(top: Path, files: int = 120) -> None:
    """A tree with links, modes, holes and files of many sizes."""
    for number in range(files):
        folder = top / f"d{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"file {number}"
        path.write_bytes(bytes([number]) * (number * number * 7))
        path.chmod(0o600 | number % 0o100)
        os.utime(path, ns=(number * 10**9, number * 10**9 + number))
    (top / "link").symlink_to("d0/file 0")
    (top / "d1" / "hard").hardlink_to(top / "d1" / "file 1")
    with (top / "sparse").open("wb") as file:
        file.write(b"head")
        file.seek(3 << 20)
        file.write(b"tail")


def listing(top: Path, *, xattrs: bool = False) -> dict[str, tuple[object, ...]]:
    """Everything below `top` as a program sees it."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(top))
        shown: tuple[object, ...] = (status.st_mode,)
        if path.is_symlink():
            shown += (path.readlink(),)
        elif path.is_file():
            shown += (status.st_nlink, status.st_mtime_ns, path.read_bytes())
        if xattrs and not path.is_symlink():
            shown += tuple((each, os.getxattr(path, each)) for each in sorted(os.listxattr(path)))
        found[name] = shown
    return found
