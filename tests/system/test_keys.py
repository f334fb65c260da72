"""Keys on a real fleet: one slot of any kind and the addresses open everything; secrets show nowhere; nobody is
locked out by a death or an outage."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsfs.format.superblock import SUPERBLOCK_KEY
from qsfs.format.units import Preamble
from tests.support import scratch as places
from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, Inside, check, dead, eventually, start, status, store
from tests.system.load import check_clean
from tests.system.test_service_unit import PATIENCE, started

pytestmark = pytest.mark.mount

COUNT = 6
MIB = 1 << 20
WORDS = "correct horse battery staple"
CHEAP = ("--kdf-memory", "1MiB", "--kdf-iterations", "1")


def file_system(path: Path, servers: Servers, namespace: str) -> FileSystem:
    return FileSystem(path, shards=(3, 1), count=COUNT, servers=servers, namespace=namespace, settings=QUICK)


def secret_file(fs: FileSystem, name: str = "passphrase", words: str = WORDS) -> Path:
    path = fs.directory / name
    path.write_text(words + "\n")
    path.chmod(0o600)
    return path


def revision(fs: FileSystem, *words: str | Path) -> int:
    found: int = fs.run("--json", "key", "list", *words).json()["revision"]
    return found


@pytest.fixture(scope="module")
def kinds() -> Iterator[tuple[FileSystem, dict[str, tuple[str | Path, ...]]]]:
    """A file system with a file, and what opens it: a key file, a passphrase, a sheet typed back."""
    with (
        places.scratch_directory("keys") as path,
        FileSystem(path, shards=(3, 1), count=COUNT, settings=QUICK, separate=True) as fs,
    ):
        fs.format()
        fs.mount()
        store(fs, "kept", MIB)
        fs.umount()
        phrase, sheet, back = secret_file(fs), fs.directory / "sheet.txt", fs.directory / "back.key"
        fs.run("key", "add", "--passphrase-file", phrase, *CHEAP)
        fs.run("key", "sheet", sheet)
        fs.run("key", "from-sheet", "--sheet", sheet, back)
        yield fs, {
            "keyfile": ("--key-file", fs.directory / "qsfs.key"),
            "passphrase": ("--passphrase-file", phrase),
            "sheet": ("--key-file", back),
        }
        check_clean(fs)


@pytest.mark.parametrize("kind", ["keyfile", "passphrase", "sheet"])
def test_any_slot_and_the_addresses_are_all_that_is_needed(kinds, scratch: Path, kind: str) -> None:
    """Restore, takeover, fsck, mount; the configuration's [code] and key file are wrong."""
    fs, opens = kinds
    with fs.another_machine(scratch / "other") as other:
        (other.directory / "qsfs.key").unlink()
        other.set({"code.data_shards": 9, "code.parity_shards": 2})
        unlock = opens[kind]
        refused = other.run("restore", code=4)
        assert "qsfs.key" in refused.stderr
        other.run("key", "verify", *unlock)
        other.run("restore", *unlock)
        other.run("takeover", *unlock)
        other.run("fsck", "--deep", *unlock)
        other.mount(*map(str, unlock))
        check(other, "kept")
        store(other, kind, MIB)
        for place in ("cmdline", "environ"):
            seen = Path(f"/proc/{other.process}/{place}").read_bytes()
            assert b"horse" not in seen and b"secret " not in seen
        other.umount()
    # Whoever formatted it goes on with it.
    shutil.rmtree(fs.cache)
    fs.cache.mkdir(mode=0o700)
    fs.run("takeover")


def test_a_stranger_with_a_wrong_secret_is_told_so(kinds) -> None:
    fs, _ = kinds
    wrong = secret_file(fs, "wrong", "not the right words")
    for command in (("key", "verify"), ("takeover",), ("mount",), ("key", "list")):
        words = ("--unlock-passphrase-file",) if command == ("key", "list") else ("--passphrase-file",)
        refused = fs.run(*command, *words, wrong, code=4)
        assert "opens no key slot" in refused.stderr and "not the right" not in refused.stderr


def test_no_secret_is_in_what_any_command_says(kinds) -> None:
    fs, opens = kinds
    secrets = [WORDS, *re.findall(r"[0-9a-f]{8}", (fs.directory / "qsfs.key").read_text())]
    secrets += [line for line in (fs.directory / "sheet.txt").read_text().splitlines() if re.match(r"\s+\d: ", line)]
    said = fs.log()
    for words in (["key", "list"], ["key", "verify"], ["config", "show"], ["--debug", "key", "verify"]):
        done = fs.run(*words)
        said += done.stdout + done.stderr
    failed = fs.run("--debug", "key", "add", "--passphrase-file", opens["passphrase"][1], code=4)
    said += failed.stdout + failed.stderr
    assert not [secret for secret in secrets if secret.strip() in said]
    for name in ("qsfs.key", "sheet.txt", "back.key"):
        assert stat.S_IMODE((fs.directory / name).stat().st_mode) == 0o600


def test_key_files_and_sheets_are_never_overwritten_unasked(kinds) -> None:
    fs, _ = kinds
    before = (fs.directory / "sheet.txt").read_text()
    assert "--overwrite" in fs.run("key", "sheet", fs.directory / "sheet.txt", code=3).stderr
    assert (fs.directory / "sheet.txt").read_text() == before
    slots = len(fs.run("--json", "key", "list").json()["slots"])
    # An existing key file is added as it is; nothing new is written into it.
    fs.run("key", "add", "--key-file", fs.directory / "back.key", code=4)
    assert len(fs.run("--json", "key", "list").json()["slots"]) == slots
    fs.run("key", "sheet", fs.directory / "same.txt", "--of", fs.directory / "back.key")
    lines = [line for line in before.splitlines() if re.match(r"\s+\d: ", line)]
    assert all(line in (fs.directory / "same.txt").read_text() for line in lines)


def sealed_under(servers: Servers, namespace: str) -> set[int]:
    """The master keys under which the values on one backend are sealed."""
    found = set()
    for space in (namespace, namespace + ".control"):
        with Inside(servers, 0, space) as inside:
            found |= {
                Preamble.decode(value, "value").key_number
                for key, value in inside.values().items()
                if key != SUPERBLOCK_KEY and not key.startswith(b"qsfs:i:")
            }
    return found


def test_a_running_mount_works_with_a_new_master_key_at_once(scratch: Path, fleet: Servers) -> None:
    with file_system(scratch / "one", fleet, "rotation") as fs:
        fs.format()
        fs.mount()
        store(fs, "before", MIB)
        fs.sync()
        assert sealed_under(fleet, fs.namespace) == {1}
        done = fs.run("--json", "key", "rotate-master").json()
        assert done["master_key"] == 2 and any("works with revision 2" in line for line in done["sentences"])
        store(fs, "after", MIB)
        fs.sync()
        assert sealed_under(fleet, fs.namespace) == {1, 2}
        found = eventually(lambda: (now := status(fs)["keys"])["left"] and now, "what is left is counted")
        assert found["master_key"] == 2 and found["left"]["1"]["packs"] > 0
        assert "keys: master key 2 seals what is new; left: " in fs.run("status").stdout
        fs.kill()
        fs.mount()
        for name in ("before", "after"):
            check(fs, name)
        fs.umount()
        with fs.another_machine(scratch / "two") as two:
            two.run("takeover")
            two.mount()
            for name in ("before", "after"):
                check(two, name)
            two.umount()
            check_clean(two)


def test_a_slot_is_rotated_and_removed_while_mounted_and_backends_are_down(scratch: Path, fleet: Servers) -> None:
    """Those that were down keep an old copy, which is said; the mount refills them when they are back."""
    with file_system(scratch / "one", fleet, "slots") as fs:
        fs.expect(r"backend .* is down")
        fs.format()
        fs.mount()
        store(fs, "kept", MIB)
        fs.sync()
        key, new = fs.directory / "qsfs.key", fs.directory / "new.key"
        with dead(fleet, [4, 5]):
            done = fs.run("key", "rotate", "1", "--key-file", new)
            assert "on 4 of 6 backends" in done.stdout and "keep an older revision" in done.stdout
        with dead(fleet, [0, 1, 2]):
            fs.run("key", "add", "--key-file", fs.directory / "more.key", "--unlock-key-file", new, code=5)
        eventually(
            lambda: fs.run("--json", "key", "list", "--unlock-key-file", new).json()["holders"] == COUNT,
            "the mount has refilled the backends that were down",
        )
        fs.run("key", "verify", code=4)
        fs.umount()
        assert "opens no key slot" in fs.run("mount", code=4).stderr
        shutil.copy(new, key)
        fs.mount()
        check(fs, "kept")
        assert "the last" in fs.run("key", "remove", "1", "--in-use", code=4).stderr
        phrase = secret_file(fs)
        fs.run("key", "add", "--passphrase-file", phrase, *CHEAP)
        assert "the one in use" in fs.run("key", "remove", "1", code=4).stderr
        fs.run("key", "remove", "1", "--in-use")
        fs.run("key", "remove", "2", "--unlock-passphrase-file", phrase, code=4)
        fs.umount()
        fs.run("mount", code=4)
        fs.mount("--passphrase-file", str(phrase))
        check(fs, "kept")
        fs.umount()
        fs.run("fsck", "--passphrase-file", phrase)


@pytest.mark.parametrize("at", ["superblock.stored=kill@2", "superblock.spread=kill"])
def test_a_killed_rotation_leaves_a_key_that_opens_and_the_mount_completes_it(
    scratch: Path, fleet: Servers, at: str
) -> None:
    with file_system(scratch / "one", fleet, f"killed{len(at)}") as fs:
        fs.format()
        fs.mount()
        new = fs.directory / "new.key"
        fs.run("key", "rotate", "1", "--key-file", new, code=-signal.SIGKILL, QSFS_FAILPOINTS=at)
        assert new.exists(), "the new secret is on disk before anything opens with it"
        listed = fs.run("--json", "key", "list", "--unlock-key-file", new).json()
        assert listed["revision"] == 2
        fs.run("key", "refill", "--unlock-key-file", new)
        assert fs.run("--json", "key", "list", "--unlock-key-file", new).json()["holders"] == COUNT
        fs.umount()
        shutil.copy(new, fs.directory / "qsfs.key")
        fs.mount()
        fs.umount()


def test_a_passphrase_alone_makes_and_opens_a_file_system(scratch: Path, fleet: Servers) -> None:
    with file_system(scratch / "one", fleet, "phrase") as fs:
        (fs.directory / "qsfs.key").unlink()
        tables = fs.config.read_text().replace('key_file = "qsfs.key"', 'passphrase_file = "passphrase"')
        fs.config.write_text(tables)
        secret_file(fs)
        fs.run("format", *CHEAP)
        fs.mount()
        store(fs, "kept", MIB)
        fs.umount()
        shutil.rmtree(fs.cache)
        fs.run("takeover")
        fs.mount()
        check(fs, "kept")
        fs.umount()


def test_the_service_takes_its_key_from_a_credential(scratch: Path, fleet: Servers) -> None:
    """systemd's part, a directory of files that only the service reads, is played by the test."""
    with file_system(scratch / "one", fleet, "credential") as fs:
        fs.format()
        given = fs.directory / "credentials"
        given.mkdir(mode=0o700)
        (fs.directory / "qsfs.key").rename(given / "qsfs.key")
        (given / "qsfs.key").chmod(0o400)
        fs.set({"filesystem.key_file": "credential:qsfs.key"})
        assert "systemd" in fs.run("mount", code=4).stderr
        os.environ["CREDENTIALS_DIRECTORY"] = str(given)
        try:
            with started(fs) as unit:
                store(fs, "kept", MIB)
                unit.process.send_signal(signal.SIGTERM)
                assert unit.process.wait(PATIENCE) == 0
        finally:
            del os.environ["CREDENTIALS_DIRECTORY"]


def test_outside_of_the_service_commands_work_with_a_secret_that_is_named(scratch: Path, fleet: Servers) -> None:
    """The configuration names a credential, which only the service can read."""
    with file_system(scratch / "one", fleet, "named") as fs:
        fs.format()
        phrase, key = secret_file(fs), fs.directory / "elsewhere.key"
        fs.run("key", "add", "--passphrase-file", phrase, *CHEAP)
        (fs.directory / "qsfs.key").rename(key)
        fs.set({"filesystem.key_file": "credential:qsfs.key"})
        opens: tuple[tuple[str | Path, ...], ...] = (("--passphrase-file", phrase), ("--key-file", key))
        fs.mount(*map(str, opens[0]))
        store(fs, "base", MIB)
        fs.run("snapshot", "create", "first")
        store(fs, "later", MIB)
        fs.umount()
        commands = (["snapshot", "list"], ["placement", "check"], ["fleet", "list"], ["drill", "--no-mount"])
        for words in (*commands, ["rollback", "first", "--yes"]):
            assert "systemd" in fs.run(*words, code=4).stderr
        for words in commands:
            for secret in opens:
                fs.run(*words, *secret)
        for secret in opens:
            fs.run("rollback", "first", "--yes", *secret)
            fs.mount(*map(str, secret))
            check(fs, "base")
            assert not (fs.mountpoint / "later").exists()
            fs.umount()


def test_a_passphrase_is_read_from_a_pipe(scratch: Path, fleet: Servers) -> None:
    with file_system(scratch / "one", fleet, "pipe") as fs:
        fs.format()
        command = [sys.executable, "-m", "qsfs.cli.main", "-c", str(fs.config), "key"]

        def piped(*words: str) -> int:
            return subprocess.run([*command, *words], input=WORDS + "\n", text=True, cwd=places.ROOT).returncode

        assert piped("add", "--passphrase-file", "-", *CHEAP) == 0
        assert piped("verify", "--passphrase-file", "-") == 0
        assert piped("remove", "1", "--in-use", "--unlock-passphrase-file", "-") == 0
        assert piped("list") == 4
        start(fleet, [])
