"""Secrets of the command line: where they come from, where they never show, and what is never overwritten."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import stat
import subprocess
import sys

import pytest
import trio

from qsfs.clock import SystemClock
from qsfs.config import Config
from qsfs.daemon import keys
from qsfs.daemon.secret import (
    decode_secret,
    encode_secret,
    read_passphrase_file,
    read_secret,
    write_private,
)
from qsfs.errors import BackendUnavailable, ConfigError, KeyFileError
from qsfs.format.key_changes import add_slot
from qsfs.format.keys import key_file_text, parse_key_file
from qsfs.format.passphrase import Passphrase
from qsfs.format.sheet import parse_sheet, sheet_lines
from qsfs.remote.members import Candidate
from tests.remote.harness import FaultyBackend
from tests.remote.test_format_fs import Servers
from tests.support.scratch import ROOT

SECRET = bytes(range(32))
WORDS = "correct horse battery"


def config_of(tmp_path, text: str) -> Config:
    return Config.parse(f"[filesystem]\n{text}\n[[backend]]\naddress = 'h:1'\n", tmp_path / "qsfs.toml")


class TestConfiguration:
    def test_a_key_file_a_passphrase_file_or_a_credential_opens(self, tmp_path, monkeypatch):
        (tmp_path / "other.key").write_text(key_file_text(SECRET))
        (tmp_path / "pw").write_text(f"{WORDS}\n")
        assert read_secret(config_of(tmp_path, "key_file = 'other.key'")) == SECRET
        assert read_secret(config_of(tmp_path, "passphrase_file = 'pw'")) == Passphrase(WORDS)
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
        assert read_secret(config_of(tmp_path, "key_file = 'credential:other.key'")) == SECRET
        assert read_secret(config_of(tmp_path, "passphrase_file = 'credential:pw'")) == Passphrase(WORDS)

    def test_a_credential_outside_of_the_service_says_what_to_do(self, tmp_path, monkeypatch):
        """`qsfs status` and others load the configuration all the same."""
        monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
        config = config_of(tmp_path, "key_file = 'credential:qsfs.key'")
        assert str(config.filesystem.key_file) == "credential:qsfs.key"
        with pytest.raises(KeyFileError, match="name the key file or passphrase on the command line"):
            read_secret(config)

    @pytest.mark.parametrize("name", ["credential:", "credential:../x", "credential:a/b", "credential:.x"])
    def test_a_credential_cannot_lead_elsewhere(self, tmp_path, name):
        with pytest.raises(ConfigError, match="names no credential"):
            config_of(tmp_path, f"key_file = '{name}'")

    def test_two_secrets_in_the_configuration_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="keep one"):
            config_of(tmp_path, "key_file = 'a'\npassphrase_file = 'b'")

    def test_show_and_check_know_all_three(self, qsfs, tmp_path):
        fleet = "[[backend]]\naddress = 'h:1'\n"
        (tmp_path / "qsfs.toml").write_text(f"[filesystem]\nkey_file = 'credential:qsfs.key'\n{fleet}")
        assert qsfs("config", "show", "--json").json["filesystem"]["key_file"] == "credential:qsfs.key"
        assert "key file" not in qsfs("config", "check").out
        (tmp_path / "qsfs.toml").write_text(f"[filesystem]\npassphrase_file = 'pw'\n{fleet}")
        assert "passphrase file" in qsfs("config", "check").out
        (tmp_path / "pw").write_text(WORDS)
        (tmp_path / "pw").chmod(0o644)
        assert "chmod 600" in qsfs("config", "check").out
        assert WORDS not in qsfs("config", "show").out

    @pytest.mark.parametrize("content", ["", "\n", f"{WORDS}\nand more\n", f"\n{WORDS}\n", "\xff\xfe"])
    def test_a_passphrase_file_that_is_not_one_line_is_refused_without_showing_it(self, tmp_path, content):
        (tmp_path / "pw").write_bytes(content.encode("latin-1"))
        with pytest.raises(KeyFileError) as caught:
            read_passphrase_file(tmp_path / "pw")
        assert "horse" not in str(caught.value) and "pw" in str(caught.value)


class TestFiles:
    def test_a_secret_file_is_its_owners_alone_whatever_the_umask(self, tmp_path):
        old = os.umask(0)
        try:
            write_private(tmp_path / "new", "text", SystemClock())
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
        assert [path.name for path in tmp_path.iterdir()] == ["new"]

    def test_nothing_is_overwritten_without_being_asked(self, tmp_path):
        (tmp_path / "old").write_text("precious")
        with pytest.raises(ConfigError, match="exists"):
            write_private(tmp_path / "old", "text", SystemClock())
        assert (tmp_path / "old").read_text() == "precious"
        assert [path.name for path in tmp_path.iterdir()] == ["old"]
        write_private(tmp_path / "old", "text", SystemClock(), replace=True)
        assert (tmp_path / "old").read_text() == "text"

    def test_a_name_that_leads_elsewhere_is_not_followed(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "target")
        with pytest.raises(ConfigError, match="exists"):
            write_private(tmp_path / "link", "text", SystemClock())
        assert not (tmp_path / "target").exists()

    def test_a_medium_without_links_gets_the_file_too(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
        write_private(tmp_path / "sheet", "text", SystemClock())
        assert (tmp_path / "sheet").read_text() == "text"
        assert stat.S_IMODE((tmp_path / "sheet").stat().st_mode) == 0o600
        with pytest.raises(ConfigError, match="exists"):
            write_private(tmp_path / "sheet", "other", SystemClock())

    def test_no_directory_is_said(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be written"):
            write_private(tmp_path / "no" / "file", "text", SystemClock())

    def test_a_secret_passes_the_pipe_to_the_daemon_unchanged(self):
        for secret in (SECRET, Passphrase("grüner See"), Passphrase("k" * 32)):
            assert decode_secret(encode_secret(secret)) == secret
        for data in (b"", b"x", b"k" + bytes(31), b"p"):
            with pytest.raises(KeyFileError):
                decode_secret(data)


class Reachable:
    """A formatted file system in memory behind the configuration's backends."""

    def __init__(self) -> None:
        self.servers = Servers()
        self.down = 0
        self.refuse_writes = False
        trio.run(self.servers.format)

    def links(self, *_: object) -> Reachable:
        """Stands for `daemon.connect.links`."""
        return self

    @property
    def candidates(self) -> list[Candidate]:
        self.servers.backends = [FaultyBackend(store) for store in self.servers.data]
        for number, backend in enumerate(self.servers.backends):
            backend.down = number < self.down
            if self.refuse_writes:
                backend.gate = refuse_sets
        return self.servers.candidates()

    async def aclose(self) -> None:
        pass


def refuse_sets(call: str, key: bytes) -> None:
    if call == "set":
        raise BackendUnavailable("no writes")


@pytest.fixture
def reachable(tmp_path, monkeypatch):
    found = Reachable()
    monkeypatch.setattr(keys, "links", found.links)
    (tmp_path / "qsfs.key").write_text(key_file_text(SECRET))
    (tmp_path / "qsfs.key").chmod(0o600)
    (tmp_path / "qsfs.toml").write_text("[filesystem]\nkey_file = 'qsfs.key'\n[[backend]]\naddress = 'host0:1'\n")
    return found


class TestSlotInUse:
    """The next mount starts with the configured secret: what it opens goes only if that is said."""

    @pytest.fixture
    def with_another(self, qsfs, reachable):
        assert qsfs("key", "add", "--key-file", "other.key").code == 0
        return reachable

    @pytest.mark.parametrize("unlock", [[], ["--unlock-key-file", "other.key"]])
    @pytest.mark.parametrize("words", [["remove", "1"], ["rotate-master", "--drop", "1", "--key-file", "other.key"]])
    def test_it_is_neither_removed_nor_dropped_unasked(self, qsfs, with_another, words, unlock):
        result = qsfs("key", *words, *unlock)
        assert result.code == 4 and "key slot 1 is the one in use" in result.err
        assert "--in-use" in result.err
        assert qsfs("key", "verify").code == 0
        assert [slot["slot"] for slot in qsfs("--json", "key", "list").json["slots"]] == [1, 2]

    def test_it_is_dropped_where_that_is_said_and_told_what_that_does_not_do(self, qsfs, with_another):
        result = qsfs("key", "rotate-master", "--drop", "1", "--key-file", "other.key", "--in-use")
        assert result.code == 0, result.err
        assert "an old copy of the superblock can still read what was written so far" in result.out
        assert qsfs("key", "verify").code == 4
        assert qsfs("key", "verify", "--key-file", "other.key").code == 0

    def test_another_slot_is_dropped_without_more(self, qsfs, with_another):
        assert qsfs("key", "rotate-master", "--drop", "2").code == 0
        assert qsfs("key", "verify").code == 0

    def test_who_rotates_it_with_another_secret_is_told_to_put_the_new_one_in_place(self, qsfs, with_another):
        result = qsfs("key", "rotate", "1", "--key-file", "new.key", "--unlock-key-file", "other.key")
        assert result.code == 0 and "put the new one where [filesystem]" in result.out


class TestSheets:
    def test_a_sheet_becomes_a_key_file_without_any_configuration(self, qsfs, tmp_path):
        (tmp_path / "typed").write_text("\n".join(sheet_lines(SECRET)).lower())
        result = qsfs("key", "from-sheet", "--sheet", "typed", "back.key")
        assert result.code == 0, result.err
        assert parse_key_file((tmp_path / "back.key").read_text()) == SECRET
        assert stat.S_IMODE((tmp_path / "back.key").stat().st_mode) == 0o600

    def test_a_sheet_that_is_there_stays_until_the_new_one_has_its_slot(self, qsfs, tmp_path, reachable):
        sheet = tmp_path / "sheet"
        assert qsfs("key", "sheet", "sheet").code == 0
        first = sheet.read_text()
        reachable.down = 3
        result = qsfs("key", "sheet", "sheet", "--overwrite")
        assert (result.code, sheet.read_text()) == (5, first), result.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["qsfs.key", "qsfs.toml", "sheet"]
        reachable.down = 0
        assert qsfs("key", "sheet", ".", "--overwrite").code == 3
        result = qsfs("key", "sheet", "sheet", "--overwrite")
        assert result.code == 0, result.err
        assert "key slot 2" in first and "key slot 3" in sheet.read_text()
        assert stat.S_IMODE(sheet.stat().st_mode) == 0o600
        assert parse_sheet(first) != parse_sheet(sheet.read_text())
        for text in (first, sheet.read_text()):
            (tmp_path / "typed").write_text(text)
            assert qsfs("key", "verify", "--sheet", "typed").code == 0

    def test_when_it_is_unknown_whether_a_slot_was_made_both_sheets_are_kept(self, qsfs, tmp_path, reachable):
        sheet = tmp_path / "sheet"
        sheet.write_text("precious")
        reachable.refuse_writes = True
        result = qsfs("key", "sheet", "sheet", "--overwrite")
        assert (result.code, sheet.read_text()) == (5, "precious"), result.err
        [new] = tmp_path.glob("sheet.*")
        assert f"the new sheet, whose key slot may be made, is {new.name}" in result.err
        assert "key slot 2" in new.read_text()
        assert stat.S_IMODE(new.stat().st_mode) == 0o600

    def test_a_sheet_names_the_slot_that_was_made_though_another_came_between(
        self, qsfs, tmp_path, reachable, monkeypatch
    ):
        change = keys.change

        async def after_another(config, clock, secret, make):
            await change(config, clock, secret, lambda s, ring, *_: add_slot(s, ring, b"o" * 32, clock))
            return await change(config, clock, secret, make)

        monkeypatch.setattr(keys, "change", after_another)
        assert qsfs("--json", "key", "sheet", "sheet").json["slot"] == 3
        assert "key slot 3" in (tmp_path / "sheet").read_text()

    def test_a_sheet_that_cannot_be_printed_leaves_no_slot_behind(self, qsfs, reachable, monkeypatch):
        """Nobody could ever open it, and nobody would know of it."""
        read, write = os.pipe()
        os.close(read)
        for words in (["key", "sheet"], ["--json", "key", "sheet"]):
            for descriptor, code in ((os.dup(write), 141), (os.open("/dev/full", os.O_WRONLY), 3)):
                stream = os.fdopen(descriptor, "w")
                with monkeypatch.context() as patched:
                    patched.setattr(sys, "stdout", stream)
                    result = qsfs(*words)
                assert result.code == code
                assert "no key slot was made" in result.err or "--json" in words
                with contextlib.suppress(OSError):
                    stream.close()
        os.close(write)
        assert [slot["slot"] for slot in qsfs("--json", "key", "list").json["slots"]] == [1]

    def test_a_printed_sheet_is_valid_once_its_slot_is_said_to_be_added(self, qsfs, tmp_path, reachable):
        result = qsfs("key", "sheet")
        assert result.code == 0, result.err
        assert "opens nothing until it is said that key slot 2 was added" in result.err
        assert "key slot 2 added, which the sheet opens" in result.err
        (tmp_path / "typed").write_text(result.out)
        assert qsfs("key", "verify", "--sheet", "typed").code == 0
        assert qsfs("--json", "key", "sheet").json["slot"] == 3

    def test_a_printed_sheet_whose_slot_is_not_known_to_be_made_is_told_of(self, qsfs, reachable):
        reachable.refuse_writes = True
        result = qsfs("key", "sheet")
        assert result.code == 5 and "RECOVERY SHEET" in result.out
        assert "added, which" not in result.err
        assert "key slot 2 may not be made, and the sheet that was printed open nothing" in result.err

    def test_a_typing_error_names_its_line_and_writes_nothing(self, qsfs, tmp_path):
        lines = sheet_lines(SECRET)
        lines[2] = lines[2][:-1] + ("0" if lines[2][-1] != "0" else "1")
        (tmp_path / "typed").write_text("\n".join(lines))
        result = qsfs("key", "from-sheet", "--sheet", "typed", "back.key")
        assert result.code == 4 and "line 3: has a typing error" in result.err
        assert not (tmp_path / "back.key").exists()
        assert not any(group in result.err for line in lines for group in line[3:].split("-"))

    def test_a_key_file_that_exists_stays(self, qsfs, tmp_path):
        (tmp_path / "typed").write_text("\n".join(sheet_lines(SECRET)))
        (tmp_path / "back.key").write_text("precious")
        assert qsfs("key", "from-sheet", "--sheet", "typed", "back.key").code == 3
        assert (tmp_path / "back.key").read_text() == "precious"
        assert qsfs("key", "from-sheet", "--sheet", "typed", "back.key", "--overwrite").code == 0

    def test_at_a_terminal_a_wrong_line_is_asked_for_again(self, tmp_path):
        lines = sheet_lines(SECRET)
        wrong = lines[1][:-1] + ("0" if lines[1][-1] != "0" else "1")
        typed = [lines[0], wrong, *lines[1:]]
        code, shown = at_terminal(tmp_path, ["key", "from-sheet", "back.key"], [("line ", line) for line in typed])
        assert code == 0, shown
        assert "line 2: has a typing error" in shown
        assert parse_key_file((tmp_path / "back.key").read_text()) == SECRET


class TestPassphrases:
    OFFER = ["format", "--passphrase", "--kdf-memory", "1MiB", "--kdf-iterations", "1"]

    def test_a_new_one_is_asked_for_twice_and_not_shown(self, tmp_path):
        (tmp_path / "qsfs.toml").write_text("[[backend]]\naddress = '127.0.0.1:1'\n")
        code, shown = at_terminal(tmp_path, self.OFFER, [("New passphrase", WORDS), ("again", WORDS + "x")])
        assert code == 4 and "differ" in shown and "horse" not in shown

    def test_a_short_one_is_refused(self, tmp_path):
        (tmp_path / "qsfs.toml").write_text("[[backend]]\naddress = '127.0.0.1:1'\n")
        code, shown = at_terminal(tmp_path, self.OFFER, [("New passphrase", "short")])
        assert code == 4 and "at least 8" in shown

    def test_without_a_terminal_the_file_is_named(self, tmp_path):
        (tmp_path / "qsfs.toml").write_text("[[backend]]\naddress = '127.0.0.1:1'\n")
        done = subprocess.run(
            [sys.executable, "-m", "qsfs.cli.main", "-c", str(tmp_path), "restore", "--passphrase"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        assert done.returncode == 4 and "--passphrase-file" in done.stderr

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--kdf-memory", "64GiB"], "at most"),
            (["--kdf-memory", "huge"], "huge"),
            (["--kdf-iterations", "0"], "no sense"),
        ],
    )
    def test_a_cost_that_no_reader_would_accept_is_refused(self, qsfs, tmp_path, words, said):
        (tmp_path / "qsfs.toml").write_text("[[backend]]\naddress = '127.0.0.1:1'\n")
        (tmp_path / "pw").write_text(WORDS)
        result = qsfs("format", "--passphrase-file", "pw", *words)
        assert result.code == 3 and said in result.err

    def test_no_option_and_no_variable_holds_a_secret(self, qsfs):
        """`--passphrase` takes no value: what is on a command line is seen by all."""
        assert qsfs("restore", "--passphrase=words").code == 2


def at_terminal(directory, words: list[str], answers: list[tuple[str, str]]) -> tuple[int, str]:
    """Runs a command in a terminal of its own; each answer is typed when its prompt is shown."""
    process, terminal = pty.fork()
    if not process:
        os.chdir(directory)
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "qsfs.cli.main", *words])
    shown = b""
    waiting = list(answers)
    seen = 0
    try:
        while select.select([terminal], [], [], 60)[0]:
            try:
                chunk = os.read(terminal, 4096)
            except OSError:
                break
            if not chunk:
                break
            shown += chunk
            while waiting and waiting[0][0].encode() in shown[seen:] and shown.endswith(b": "):
                seen = len(shown)
                os.write(terminal, waiting.pop(0)[1].encode() + b"\n")
    finally:
        os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), shown.decode("utf-8", "replace")
