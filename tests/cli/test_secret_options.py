"""Every command that needs the secret takes one on its command line: the configured one may be for the service only."""

from __future__ import annotations

import argparse
import importlib
import subprocess
from collections.abc import Iterator

import pytest

from qsfs.cli import main as frame
from tests.support.scratch import ROOT

FOR_THE_SERVICE = "systemd hands credentials to the service only"
# A server that does not end, and one that takes long; neither reads a configuration.
LEFT_OUT = {"zdb serve", "codec bench"}

# So that no rule of the walk hides them all.
NEED_IT = {
    "format", "mount", "restore", "takeover", "rollback", "drill", "fsck", "snapshot list", "snapshot mount",
    "placement check", "fleet list", "key list", "key add", "key remove", "key rotate", "key rotate-master",
    "key sheet", "key verify", "key refill",
}  # fmt: skip


def leaves(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that does something, by its name."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield name, parser
    for action in inner:
        for word, command in action.choices.items():
            yield from leaves(command, f"{name} {word}".strip())


def every_command() -> dict[str, argparse.ArgumentParser]:
    modules = {name: importlib.import_module(f"qsfs.cli.{name}") for name in frame.COMMANDS}
    return {name: parser for name, parser in leaves(frame.build_parser(modules)) if name not in LEFT_OUT}


COMMANDS = every_command()


def filled(parser: argparse.ArgumentParser) -> list[str]:
    """The arguments that the command cannot do without."""
    words: list[str] = []
    for action in parser._actions:
        if action.required or (not action.option_strings and action.nargs is None):
            value = {"SLOT": "1", "DIRECTORY": "there"}.get(str(action.metavar), "x")
            words += [*action.option_strings[:1], *([] if action.nargs == 0 else [value])]
    return words


@pytest.fixture
def daemons(monkeypatch):
    """Sees to it that every daemon that a command starts has ended when the test has."""
    started: list[subprocess.Popen] = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr("qsfs.cli.mount.subprocess.Popen", Noted)
    yield
    for daemon in started:
        daemon.wait(60)


@pytest.mark.usefixtures("daemons")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_cannot_read_the_credential_takes_a_secret_instead(qsfs, tmp_path, monkeypatch, name):
    """With a local store and without: some read it only there, some only where there is none."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    cache = tmp_path / "cache"
    cache.mkdir()
    for directory in ("mnt", "there"):
        (tmp_path / directory).mkdir()
    (tmp_path / "qsfs.toml").write_text(
        "[filesystem]\nkey_file = 'credential:qsfs.key'\nmountpoint = 'mnt'\n[cache]\ndirectory = 'cache'\n"
        "[[backend]]\naddress = '127.0.0.1:1'\n"
    )
    parser = COMMANDS[name]
    needed = False
    for there in (False, True):
        if there:
            (cache / "data.mdb").touch()
        words = ["-c", ".", *name.split(), *filled(parser)]
        if FOR_THE_SERVICE not in said(qsfs(*words)):
            continue
        needed = True
        prefix = "--unlock-" if "--unlock-key-file" in parser._option_string_actions else "--"
        offered = {f"{prefix}{kind}" for kind in ("key-file", "passphrase", "passphrase-file")}
        assert offered <= parser._option_string_actions.keys()
        for option in ("key-file", "passphrase-file"):
            given = said(qsfs(*words, f"{prefix}{option}", "given"))
            assert "given: the " in given and "cannot be read" in given, given
    assert needed or name not in NEED_IT, f"'{name}' does not come so far that it reads the secret"
    if needed and not name.startswith("key "):
        assert f"`{name}`" in (ROOT / "docs" / "keys.md").read_text(), f"docs/keys.md does not name '{name}'"


def said(result) -> str:
    return result.out + result.err
