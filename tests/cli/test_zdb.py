"""`qsfs zdb serve`: a process that says when it is ready, answers, and ends in order on SIGTERM."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys

import pytest


@pytest.fixture
def server(tmp_path):
    """Starts the command with a port of the kernel's choice; yields the process and its port."""
    started = []

    def start(*options: str) -> tuple[subprocess.Popen, int]:
        command = [sys.executable, "-m", "qsfs.cli.main", "zdb", "serve", "--data", str(tmp_path / "data")]
        process = subprocess.Popen(
            [*command, "--port", "0", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        line = process.stdout.readline()
        assert line.startswith("zdb: ready"), process.communicate()
        return process, int(re.search(r"ports? (\d+)", line).group(1))

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ask(port: int, *words: str) -> bytes:
    request = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request.encode())
        return connection.recv(4096)


def test_it_answers_once_it_said_that_it_is_ready(server):
    process, port = server("--sync")
    assert ask(port, "PING") == b"+PONG\r\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert process.stderr.read().count("Traceback") == 0


def test_the_admin_password_comes_from_a_file(server, tmp_path):
    (tmp_path / "password").write_text("hunter2\n")
    _, port = server("--admin-password-file", str(tmp_path / "password"))
    assert ask(port, "NSNEW", "mine").startswith(b"-")
    assert ask(port, "AUTH", "hunter2") == b"+OK\r\n"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--maxsize", "-1"], "maxsize"),
        (["--datasize", "big"], "datasize"),
        (["--datasize", "1"], "datasize"),
        (["--instances", "0"], "instance"),
        (["--port", "70000"], "port"),
        (["--admin-password-file", "missing"], "missing"),
    ],
)
def test_wrong_options_are_refused(qsfs, tmp_path, options, word):
    result = qsfs("zdb", "serve", "--data", tmp_path / "data", *options)
    assert result.code == 3, result.err
    assert word in result.err


def test_a_second_server_on_the_same_port_is_refused(server, qsfs, tmp_path):
    _, port = server()
    result = qsfs("zdb", "serve", "--data", tmp_path / "other", "--port", port)
    assert result.code == 3
    assert str(port) in result.err
