"""Who runs a case: root or an ordinary user, each in a process of its own."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class User:
    """Ids that a process takes; none of them needs an account."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


TEAM = 61010
"""A supplementary group of `ALICE`, and of no other."""

ROOT = User("root", 0, 0)
ALICE = User("user", 61001, 61001, (TEAM,))
BOB = User("bob", 61002, 61002)


class ChildError(AssertionError):
    """What went wrong in a child, as text."""


def run(user: User, action: Callable[[], Any]) -> Any:
    """Runs `action` in a child as `user` with umask 022; returns its result.

    An `OSError` arrives as such, a skip as a skip, any other failure as `ChildError`.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _in_child(user, action, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        answer = answers.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not answer:
        raise ChildError(f"the child ended with {status}")
    outcome, value = pickle.loads(answer)
    if outcome == "result":
        return value
    if outcome == "skip":
        pytest.skip(value)
    if outcome == "error":
        raise OSError(*value)
    raise ChildError(value)


def _in_child(user: User, action: Callable[[], Any], writer: int) -> None:
    answer: tuple[str, Any] = ("failure", "nothing came back")
    try:
        os.umask(0o022)
        if os.geteuid() == 0:
            os.setgroups(user.groups)
            os.setresgid(user.gid, user.gid, user.gid)
            os.setresuid(user.uid, user.uid, user.uid)
        answer = ("result", action())
    except OSError as error:
        answer = ("error", (error.errno, f"{error.strerror}\n{traceback.format_exc()}"))
    except pytest.skip.Exception as skipped:
        answer = ("skip", str(skipped))
    except BaseException:
        answer = ("failure", traceback.format_exc())
    finally:
        try:
            with os.fdopen(writer, "wb") as answers:
                answers.write(pickle.dumps(answer))
        finally:
            os._exit(0)
