"""`placement check` and the promises of the configuration, on a real mount and without one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, SILENCE, dead, eventually, status, store

pytestmark = pytest.mark.mount


def grouped(fs: FileSystem, groups: int, *, promise: int, nodes: int = 0) -> None:
    """Names a group (and node) for each backend in turn, and promises."""
    text = fs.config.read_text(encoding="utf-8")
    count = 0

    def name(found: re.Match[str]) -> str:
        nonlocal count
        count += 1
        node = f'\nnode = "n{count % nodes}"' if nodes else ""
        return f'{found.group(0)}\ngroup = "g{count % groups}"{node}'

    text = re.sub(r"^address = .*$", name, text, flags=re.MULTILINE)
    fs.config.write_text(re.sub(r"^redundant_groups = .*$", f"redundant_groups = {promise}", text, flags=re.MULTILINE))


def check(fs: FileSystem, *words: str, code: int = 0) -> Any:
    return fs.run("--json", "placement", "check", *words, code=code).json()


def test_losses_and_promises_are_told_mounted_and_unmounted(scratch: Path, fleet: Servers) -> None:
    """What the check says is survived can be read, and what a lost group takes is what it says."""
    with FileSystem(scratch, shards=(4, 2), servers=fleet, count=6, namespace="placed", settings=QUICK) as fs:
        grouped(fs, 3, promise=2)
        refused = fs.run("format", code=3)
        assert "redundant_groups = 2 cannot be kept" in refused.stderr
        grouped_once = fs.config.read_text(encoding="utf-8").replace("redundant_groups = 2", "redundant_groups = 1")
        fs.config.write_text(grouped_once)
        fs.format()
        formatted = check(fs)
        assert formatted["packs"]["full"] >= 1 and formatted["broken_promises"] == []
        fs.mount()
        store(fs, "a", 3 << 20)
        fs.run("sync", "--class", "full")
        mounted = check(fs)
        assert mounted["any_may_be_lost"] == {"backend": 2, "node": 2, "group": 1}
        assert mounted["packs"]["full"] > formatted["packs"]["full"]
        assert {loss["what"] for loss in mounted["losses"]} >= {"group:g0", "group:g1", "group:g2"}
        assert all(loss["survived"] for loss in mounted["losses"])
        lost = check(fs, "--lose", "group:g0", "group:g1", code=21)["losses"][0]
        assert (lost["survived"], lost["lost"]["full"] > 0, lost["flushing"]) == (False, True, False)
        assert lost["worst"][0]["shards"] == 2
        assert "--lose group:g9" in fs.run("placement", "check", "--lose", "group:g9", code=3).stderr
        assert not [line for line in status(fs)["warnings"] if "redundant" in line]
        # A fleet that could not keep what is promised now is refused, and nothing is changed.
        fs.config.write_text(re.sub(r'"g[12]"', '"g0"', grouped_once))
        assert "redundant_groups = 1 cannot be kept" in fs.run("fleet", "apply", code=3).stderr
        fs.config.write_text(grouped_once)
        assert check(fs)["broken_promises"] == []
        fs.umount()
        unmounted = check(fs)
        for key in ("any_may_be_lost", "code", "sentences", "backend_names"):
            assert unmounted[key] == mounted[key]
        # The promise is made stronger than the fleet can keep: the mount goes on, and says so everywhere.
        fs.config.write_text(grouped_once.replace("redundant_groups = 1", "redundant_groups = 2"))
        fs.expect(r"redundant_groups = 2")
        fs.mount()
        eventually(
            lambda: sum("redundant_groups = 2" in line for line in status(fs)["warnings"]) == 2,
            "fleet and packs break the promise",
        )
        assert check(fs, code=1)["broken_promises"]
        fs.umount()


def test_backends_that_are_down_count_as_lost_on_top(scratch: Path, fleet: Servers) -> None:
    with FileSystem(scratch, shards=(4, 2), servers=fleet, count=6, namespace="placed2", settings=QUICK) as fs:
        fs.expect(*SILENCE)
        fs.format()
        fs.mount()
        store(fs, "a", 3 << 20)
        fs.sync()
        with dead(fs.servers, [0, 1]):
            eventually(lambda: len(check(fs)["down_now"]) == 2, "two backends are known to be down")
            found = check(fs, "--lose", "3")
            imagined, with_those = found["losses"]
            assert (imagined["survived"], imagined["spare"]) == (True, 1)
            assert with_those["what"] == "3 + all that do not answer now"
            assert (with_those["survived"], len(with_those["backends"])) == (False, 3)
        fs.umount()
