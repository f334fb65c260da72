"""A fleet changes under load: backends are added, one is emptied, retired or lost, and everything stays readable."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import pytest

from qsfs.daemon.control import ask
from tests.support.backends import HOST, Servers
from tests.support.daemon import PATIENCE, FileSystem
from tests.system.fleet import QUICK, Inside, check, cold, configured, dead, eventually, status, store, up

pytestmark = pytest.mark.mount

KIB = 1 << 10


def backend(fs: FileSystem, index: int, **settings: Any) -> dict[str, Any]:
    return {"address": f"{HOST}:{fs.servers.ports[index]}", "namespace": fs.namespace, **settings}


def listed(fs: FileSystem) -> dict[int, dict[str, Any]]:
    """What `fleet list` shows of a mount, without the cost of a command."""
    return {entry["number"]: entry for entry in ask(fs.cache, "fleet", timeout=PATIENCE)["backends"]}


def unmounted(fs: FileSystem) -> dict[int, str]:
    return {entry["number"]: entry["state"] for entry in fs.run("--json", "fleet", "list").json()["backends"]}


class Load:
    """Files that are written one after the other while the fleet changes."""

    def __init__(self, fs: FileSystem) -> None:
        self.names: list[str] = []
        self._fs = fs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.1) and len(self.names) < 30:
            self.names.append(store(self._fs, f"load-{len(self.names)}", 192 * KIB))


def test_two_are_added_and_one_drained_under_load_then_it_and_m_others_are_lost(scratch: Path, fleet: Servers) -> None:
    settings = QUICK | {"flush.cut_seconds": 1}
    with FileSystem(scratch, shards=(4, 2), servers=fleet, count=8, namespace="regrown", settings=settings) as fs:
        fs.format()
        fs.mount()
        names = [store(fs, f"before-{number}", 700 * KIB) for number in range(6)]
        fs.sync()
        assert set(listed(fs)) == set(range(1, 9))

        backends = configured(fs)
        backends[0]["drain"] = True
        fs.set({"backend": [*backends, backend(fs, 8, group="new"), backend(fs, 9, group="new")]})
        plan = fs.run("--json", "fleet", "apply", "--dry-run").json()
        assert len(plan["changes"]) == 3 and not plan["changed"] and not plan["refusals"], plan
        lost = [word for number in range(1, 6) for word in ("--lost", str(number))]
        refusals = fs.run("--json", "fleet", "apply", "--dry-run", *lost, code=None).json()["refusals"]
        assert any("could not be read any more" in refusal for refusal in refusals), refusals
        assert set(listed(fs)) == set(range(1, 9)), "a dry run changes nothing"
        with Load(fs) as load:
            done = fs.run("--json", "fleet", "apply").json()
            assert done["changed"] and done["quorum_before"] == [6, 8], done
            assert listed(fs)[1]["state"] == "draining"
            assert {number for number, entry in listed(fs).items() if entry["state"] == "active"} == set(range(2, 11))
            eventually(lambda: listed(fs)[1]["packs_left"] == 0, "the draining backend is empty")
        names += load.names
        assert fs.run("fleet", "apply").stdout.startswith("the fleet is as configured")
        fs.sync()

        # The drained one dies before it is retired; it is given up, and so may be any m others.
        fs.set({"backend": configured(fs)[1:]})
        with dead(fs.servers, [0]):
            eventually(lambda: listed(fs)[1]["reachable"] != "yes", "the loss of the backend is noticed")
            said = fs.run("fleet", "apply", "--lost", f"{HOST}:{fs.servers.ports[0]}").stdout
            assert "give up 1" in said and "fleet 3" in said
            assert set(listed(fs)) == set(range(2, 11))
            eventually(lambda: not status(fs)["flush"]["packs_not_full"], "every pack is full")
            names.append(store(fs, "after", 700 * KIB))
            fs.sync()
            with dead(fs.servers, [3, 8]):
                cold(fs)
                for name in names:
                    check(fs, name)
        eventually(lambda: up(fs, 9), "all backends of the fleet are up again")
        fs.umount()
        assert set(unmounted(fs)) == set(range(2, 11)), "also without a mount"


def test_a_fleet_does_not_grow_beyond_the_open_files_of_the_daemon(scratch: Path, fleet: Servers) -> None:
    with FileSystem(scratch, shards=(2, 1), servers=fleet, count=5, namespace="files", settings=QUICK) as fs:
        fs.format()
        fs.mount()
        resource.prlimit(fs.process, resource.RLIMIT_NOFILE, (5 * 5 + 256, 5 * 5 + 256))
        assert fs.run("fleet", "apply").stdout.startswith("the fleet is as configured")
        fs.set({"backend": [*configured(fs), backend(fs, 5)]})
        for words in (["--dry-run"], []):
            refused = fs.run("fleet", "apply", *words, code=3).stderr
            assert "6 backends need up to 286 open files" in refused and "may have 281" in refused
        assert set(listed(fs)) == set(range(1, 6))
        fs.umount()


def test_a_takeover_ends_the_change_that_died_between_its_heads(scratch: Path, fleet: Servers) -> None:
    """The daemon is killed when the head that names both fleets is out; the machine is lost as well."""
    with FileSystem(scratch, shards=(2, 1), servers=fleet, count=5, namespace="halfway", settings=QUICK) as fs:
        fs.format()
        fs.mount(failpoints="fleet.ordered>flush.recorded=kill")
        store(fs, "before", 300 * KIB)
        fs.set({"backend": [*configured(fs)[1:], backend(fs, 5), backend(fs, 6)]})
        assert "the daemon ended before it answered" in fs.run("fleet", "apply", code=16).stderr
        fs.wait_dead()
        assert unmounted(fs) == {1: "draining", **dict.fromkeys(range(2, 6), "active"), 6: "joining", 7: "joining"}
        cold(fs)
        eventually(lambda: not ask(fs.cache, "fleet", timeout=PATIENCE)["changing"], "the change is ended")
        assert {number: entry["state"] for number, entry in listed(fs).items()} == {
            1: "draining", **dict.fromkeys(range(2, 8), "active")
        }  # fmt: skip
        check(fs, "before")
        store(fs, "after", 300 * KIB)
        with dead(fleet, [5]):
            assert fs.sync()["class"] == "full"
            check(fs, "after")
        # A disk that was replaced under the same address: noticed, and taken up as a new one when told.
        for namespace in ("halfway", "halfway.control"):
            with Inside(fleet, 2, "") as inside:
                inside.call("NSDEL", namespace)
        fs.expect(r"emptied or swapped since it was asked last")
        said = fs.run("fleet", "apply").stdout
        assert "stays entry 3" in said
        done = fs.run("--json", "fleet", "apply", "--lost", "3").json()
        assert done["changed"] and 8 in listed(fs) and 3 not in listed(fs)
        eventually(lambda: not status(fs)["flush"]["packs_not_full"], "every pack is full")
        fs.umount()
