"""The project keeps its own rules: sizes, docstrings, time and randomness, errors listed, links alive."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from qsfs import errors

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "qsfs").rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LONGEST_MODULE = 500

_CLOCKS = ("time.time", "time.time_ns", "time.monotonic", "time.monotonic_ns")
_SOURCES = ("os.urandom", "os.getrandom", "random.", "secrets.", "uuid.")


def outside(*places: str) -> list[Path]:
    """The modules of the package that do not lie in `places`."""
    return [module for module in MODULES if module.relative_to(ROOT / "qsfs").parts[0] not in places]


def name_of(module: Path) -> str:
    return str(module.relative_to(ROOT))


def tree(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(tree(module)), f"{name_of(module)} has no docstring"


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_no_module_grows_past_one_idea(module):
    lines = len(module.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_MODULE, f"{name_of(module)} has {lines} lines: split it by idea"


def system_calls(module: Path) -> list[str]:
    """Uses of the operating system's clock and randomness.  A generator that is given its seed is neither."""
    used = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom):
            used += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call) and ast.unparse(node) == "random.Random()":
            used.append("random.unseeded")
    allowed = ("random.Random",)
    return [name for name in used if name in _CLOCKS or (name.startswith(_SOURCES) and name not in allowed)]


@pytest.mark.parametrize("module", outside("clock.py", "zdb", "cli"), ids=name_of)
def test_time_and_randomness_come_from_the_clock(module):
    """Else a simulation on a virtual clock proves nothing."""
    assert not system_calls(module), f"{name_of(module)}: take a qsfs.clock.Clock"


@pytest.mark.parametrize("module", outside("cli", "zdb"), ids=name_of)
def test_only_programs_print(module):
    calls = [
        node.lineno
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls, f"{name_of(module)} prints in line {calls}: log, or return it"


def test_every_failpoint_is_met_by_some_test():
    """A step that no test dies at is a step that nobody knows to be safe."""
    source = "".join(module.read_text(encoding="utf-8") for module in MODULES)
    named = set(re.findall(r'failpoints\.hit\("([^"]+)"\)', source))
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    assert named and not {name for name in named if name not in tests}


def all_errors() -> list[type[errors.QsfsError]]:
    found = [errors.QsfsError]
    for kind in found:
        found += kind.__subclasses__()
    ours = {kind for kind in found if kind.__module__ == errors.__name__}
    return sorted(ours, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_is_documented_with_its_exit_code(kind):
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert f"| {kind.exit_code} | `{kind.__name__}` |" in page


def test_the_page_of_errors_names_none_that_does_not_exist():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| \d+ \| `(\w+)` \|", page, re.MULTILINE))
    assert named == {kind.__name__ for kind in all_errors()}


def test_every_error_says_what_it_means():
    assert not [kind for kind in all_errors() if not kind.__doc__]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    content = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", content):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        if not (page.parent / target.partition("#")[0]).exists():
            dead.append(target)
    assert not dead, f"{name_of(page)}: dead links {dead}"
