"""A mount of the request handlers over the model, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.fuse_mount.handle import FuseMount, Settings, mounted


@pytest.fixture
def make_mount(scratch: Path) -> Iterator[Callable[..., FuseMount]]:
    """Mounts with the given `Settings`; everything is judged and taken away at the end."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(mounted(Settings(**settings), scratch))


@pytest.fixture
def mount(make_mount: Callable[..., Any]) -> FuseMount:
    """A mount with the settings of a default configuration, but without access times."""
    return make_mount()


@pytest.fixture
def root(mount: FuseMount) -> Path:
    """The mount's root."""
    return mount.path
