"""The command line's frame: every end of a command is one clear line and the right exit code."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from types import ModuleType

import pytest

from qsfs.cli import main as frame
from qsfs.errors import BackendFull, ConfigError, Fenced, QsfsBug


@pytest.fixture
def command(monkeypatch):
    """Installs a command `fake` that does what the test hands over."""

    def install(action):
        module = ModuleType("qsfs.cli.fake")
        module.add_parser = lambda subparsers: subparsers.add_parser("fake")
        module.run = action
        monkeypatch.setitem(sys.modules, "qsfs.cli.fake", module)
        monkeypatch.setattr(frame, "COMMANDS", ("fake",))

    return install


def raising(error):
    def action(args):
        raise error

    return action


def test_the_command_decides_the_exit_code(qsfs, command):
    command(lambda args: 4)
    assert qsfs("fake").code == 4


@pytest.mark.parametrize("error", [ConfigError("no key"), BackendFull("full"), Fenced("fenced")])
def test_an_expected_error_is_one_line_and_its_exit_code(qsfs, command, error):
    command(raising(error))
    result = qsfs("fake")
    assert (result.code, result.out, result.err) == (error.exit_code, "", f"qsfs: {error}\n")


def test_with_json_an_error_is_an_object_on_standard_output(qsfs, command):
    command(raising(BackendFull("b:1/q is full")))
    result = qsfs("fake", "--json")
    assert result.json == {"error": {"kind": "BackendFull", "message": "b:1/q is full", "exit_code": 7}}
    assert (result.code, result.err) == (7, "")


def test_errors_out_of_a_nursery_are_told_one_by_one(qsfs, command):
    inner = ExceptionGroup("inner", [BackendFull("b")])
    command(raising(ExceptionGroup("nursery", [ConfigError("a"), inner])))
    result = qsfs("fake")
    assert (result.code, result.err) == (3, "qsfs: a\nqsfs: b\n")


@pytest.mark.parametrize("error", [KeyError("x"), OSError(5, "io"), ExceptionGroup("g", [KeyError("x")])])
def test_an_unexpected_error_asks_for_a_report_and_shows_no_traceback(qsfs, command, error):
    command(raising(error))
    result = qsfs("fake")
    assert result.code == 70
    assert "internal error" in result.err
    assert "please report" in result.err
    assert len(result.err.splitlines()) == 1
    command(raising(error))
    assert "Traceback" in qsfs("fake", "--debug").err


def test_a_bug_of_our_own_has_the_same_exit_code(qsfs, command):
    command(raising(QsfsBug("a page in two places")))
    assert qsfs("fake").code == 70


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BaseExceptionGroup("g", [KeyboardInterrupt()])])
def test_an_interrupt_is_quiet(qsfs, command, error):
    command(raising(error))
    result = qsfs("fake")
    assert (result.code, result.out, result.err) == (130, "", "")


def test_a_reader_that_goes_away_is_quiet():
    """`qsfs ... | head -0` must not end in a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    program = (
        "import sys; from types import ModuleType; from qsfs.cli import main as frame\n"
        "fake = ModuleType('qsfs.cli.fake'); fake.add_parser = lambda s: s.add_parser('fake')\n"
        "fake.run = lambda args: print('x' * 100) or 0\n"
        "sys.modules['qsfs.cli.fake'] = fake; frame.COMMANDS = ('fake',)\n"
        "sys.exit(frame.main(['fake']))"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("argv", [("-c", "F", "fake"), ("fake", "-c", "F"), ("fake", "--config=F")])
def test_common_options_stand_before_or_after_the_command(qsfs, command, argv):
    seen = []
    command(lambda args: seen.append((args.config, args.json)) or 0)
    qsfs("--json", *argv)
    qsfs(*argv, "--json")
    assert seen == [("F", True), ("F", True)]


def test_a_wrong_command_line_is_exit_2(qsfs):
    assert qsfs().code == 2
    assert "usage" in qsfs().err
    assert qsfs("mownt").code == 2
    assert qsfs("config").code == 2


def test_version(qsfs):
    assert qsfs("--version").out.startswith("qsfs ")


def test_help_names_every_command_and_loads_nothing_heavy():
    """Help is instant because no command module imports a library before it runs."""
    program = (
        "import sys\nfrom qsfs.cli import main as frame\n"
        "try: frame.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'trio', 'lmdb', 'pyfuse3', 'zfec', 'zstandard', 'cryptography', 'blake3',"
        " 'msgpack', 'qsfs.config', 'asyncio', 'logging'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "HEAVY []" in done.stdout
    for name in frame.COMMANDS:
        assert f"\n    {name} " in done.stdout


@pytest.mark.parametrize("name", frame.COMMANDS)
def test_every_command_explains_itself(qsfs, name):
    result = qsfs(name, "--help")
    assert result.code == 0
    assert "options of every command" in result.out


def test_no_option_is_given_twice():
    """A command that brings an own `--json` would hide the common one."""
    modules = {name: __import__(f"qsfs.cli.{name}", fromlist=["run"]) for name in frame.COMMANDS}
    assert isinstance(frame.build_parser(modules), argparse.ArgumentParser)
