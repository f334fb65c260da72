"""Each case runs on a local disk, on tmpfs and on qsfs, as root and as an ordinary user.

What passes on the local ones must pass on qsfs.  `exceptions.py` lists, with reasons, what does not.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.posix import users
from tests.posix.exceptions import EXCEPTIONS
from tests.support import scratch as places
from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.fleet import Inside
from tests.system.load import check_clean

HERE = Path(__file__).parent
KINDS = ("disk", "tmpfs", "qsfs")
ACTORS = {"root": users.ROOT, "user": users.ALICE}

SHARDS, BACKENDS, BACKEND_BYTES = (4, 2), 6, 1 << 30
POLICIES = [{"match": "*.through", "write_through": True}]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kinds(*names): the file systems that a case is for; all unless given")
    config.addinivalue_line("markers", "actors(*names): root, user, or both unless given")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, all_values in (("kind", KINDS), ("actor", tuple(ACTORS))):
        if name in metafunc.fixturenames:
            marker = metafunc.definition.get_closest_marker(f"{name}s")
            values = marker.args if marker else all_values
            metafunc.parametrize(name, values, indirect=True, scope="package" if name == "kind" else "function")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent != HERE:
            continue
        item.add_marker(pytest.mark.mount)
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
            continue
        kind = str(item.callspec.params.get("kind", ""))
        name = f"{item.path.stem}.{item.originalname}"
        if (reason := EXCEPTIONS.get((kind.partition("-")[0], name))) is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a case as its actor."""
    actor = pyfuncitem.funcargs.get("actor")
    if not isinstance(actor, users.User):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    failure = ""
    try:
        users.run(actor, functools.partial(pyfuncitem.obj, **arguments))
    except (users.ChildError, OSError) as error:
        failure = str(error)
    if failure:
        pytest.fail(failure, pytrace=False)
    return True


@pytest.fixture
def actor(request: pytest.FixtureRequest) -> users.User:
    """Who runs the case."""
    return ACTORS[request.param]


@pytest.fixture(scope="package")
def mounted() -> dict[str, FileSystem]:
    """The qsfs among the kinds that were made by now."""
    return {}


@pytest.fixture(scope="package")
def root_of(mounted: dict[str, FileSystem]) -> Iterator[Callable[[str], Path]]:
    """The root of a file system of a kind, made when it is first asked for."""
    made: dict[str, Path] = {}
    with places.scratch_directory("posix") as top, ExitStack() as stack:
        top.chmod(0o711)

        def root(kind: str) -> Path:
            if kind not in made:
                made[kind] = _make(kind, top, stack, mounted)
            return made[kind]

        yield root


@pytest.fixture(scope="package")
def kind(request: pytest.FixtureRequest) -> str:
    """Which kind of file system."""
    return str(request.param)


@pytest.fixture
def place(kind: str, actor: users.User, root_of: Callable[[str], Path]) -> Iterator[Path]:
    """An empty directory of the actor's."""
    path = root_of(kind) / "place"
    path.mkdir()
    os.chown(path, actor.uid, actor.gid)
    yield path
    shutil.rmtree(path)


def _make(kind: str, top: Path, stack: ExitStack, mounted: dict[str, FileSystem]) -> Path:
    directory = top / kind
    directory.mkdir(0o755)
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", directory], check=True)
        stack.callback(places.detach, directory)
    elif kind.startswith("qsfs"):
        servers = stack.enter_context(Servers(directory / "zdb", BACKENDS))
        settings: dict[str, object] = {"mount.xattr": kind == "qsfs-xattr", "policy": POLICIES}
        if kind == "qsfs-large":
            settings |= {"cache.size": "8GiB", "cache.journal_size": "64MiB", "flush.spool_size": "512MiB"}
        fs = stack.enter_context(FileSystem(directory, shards=SHARDS, servers=servers, settings=settings))
        fs.format()
        for index in range(BACKENDS):
            with Inside(servers, index, "default") as inside:
                inside.call("NSSET", fs.namespace, "maxsize", str(BACKEND_BYTES))
        fs.mount()
        stack.callback(_finish, fs)
        mounted[kind] = fs
        return fs.mountpoint
    return directory


def _finish(fs: FileSystem) -> None:
    fs.umount()
    check_clean(fs)
