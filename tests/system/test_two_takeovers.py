"""Two `qsfs takeover` at once, of two machines that restored the same file system: never two writers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.backends import Servers
from tests.support.daemon import FileSystem
from tests.system.fleet import QUICK, check, ended, running, status, store

pytestmark = pytest.mark.mount

COUNT = 4
MIB = 1 << 20
REFUSED = {10: "has taken over", 11: "another machine has published since"}
"""What the one that comes second is told, by exit code: in the middle of its takeover, or before it."""


@pytest.mark.parametrize("turn", range(2))
def test_of_two_takeovers_at_once_one_machine_writes_and_the_other_is_told(scratch: Path, turn: int) -> None:
    """Both may succeed, one after the other: then only the later one may mount, and the other is told when it does."""
    with (
        Servers(scratch / "zdb", COUNT, separate=True) as servers,
        FileSystem(scratch / "gone", shards=(2, 1), count=COUNT, servers=servers, settings=QUICK) as gone,
    ):
        gone.format()
        gone.mount()
        store(gone, "base", MIB)
        gone.umount()
        with gone.another_machine(scratch / "one") as one, gone.another_machine(scratch / "two") as two:
            machines = (one, two)
            for machine in machines:
                machine.run("restore")
            with running(one, "takeover") as first, running(two, "takeover") as second:
                codes = {}
                for machine, process in zip(machines, (first, second), strict=True):
                    codes[machine], printed = ended(process)
                    told = REFUSED.get(codes[machine], "this machine owns the file system now")
                    assert told in printed, printed
            assert set(codes.values()) <= {0, *REFUSED}, codes
            if 0 not in codes.values():
                # One had sent a head when the other stopped it, and that head stopped the other.
                codes = {machine: machine.run("takeover", code=None).returncode for machine in machines}
            assert 0 in codes.values(), codes
            mounted, refused = [], []
            for machine in machines:
                done = machine.run("mount", code=None)
                if done.returncode == 0:
                    machine.adopt(int(done.stdout.rpartition("process ")[2].split(")")[0]))
                    mounted.append(machine)
                else:
                    assert done.returncode == 11, done.stderr
                    assert "restore --set-aside" in done.stderr or "qsfs takeover" in done.stderr, done.stderr
                    refused.append(machine)
            assert (len(mounted), len(refused)) == (1, 1) and codes[mounted[0]] == 0
            owner = mounted[0]
            check(owner, "base")
            store(owner, "new", MIB)
            owner.sync()
            assert status(owner)["owner"] and status(owner)["writable"]
            owner.umount()
