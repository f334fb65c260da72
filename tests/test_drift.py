"""`scripts/bench --drift`: its load notices lost and wrong contents, its verdict names what grew, its plots are SVG."""

from __future__ import annotations

import json
import threading
from xml.etree import ElementTree

import pytest

from tests.test_scripts import load, script

SVG = "{http://www.w3.org/2000/svg}"
MIB = 1 << 20


@pytest.fixture(scope="module")
def drift():
    return load("drift")


@pytest.fixture(scope="module")
def mixed_load():
    return load("mixed_load")


@pytest.fixture(scope="module")
def svg():
    return load("svg")


@pytest.mark.mount
@pytest.mark.timeout(600)
def test_a_short_run_fetches_what_was_evicted_and_leaves_only_its_report(scratch):
    done = script("bench", "--drift", scratch, "--minutes", 0.1, "--size", "16MiB", "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert set(report["programs"]) == {"sequential", "evicted", "durable", "commits", "disk"}
    assert all(program["done"] for program in report["programs"].values())
    assert all(report["latencies"].values())
    assert report["fetched_bytes"] >= report["read_bytes"] > 0, "what was read as evicted came from the backends"
    assert report["samples"][-1]["evicted"] > 0
    assert min(sample["daemon_memory"] for sample in report["samples"]) > 0
    assert {path.name for path in scratch.iterdir()} == {"drift.json", "drift.svg"}
    assert json.loads((scratch / "drift.json").read_text()) == report
    drawn = script("plot", scratch / "drift.json")
    assert drawn.stdout == (scratch / "drift.svg").read_text()


def test_drift_needs_room_and_compares_with_nothing(tmp_path):
    for words in (("--size", "1MiB"), ("--minutes", "0"), ("--floor",)):
        done = script("bench", "--drift", tmp_path, *words)
        assert done.returncode == 2
        assert "--drift" in done.stderr


class TestTheVerdict:
    def row(self, name, figure, first, last):
        return {"name": name, "figure": figure, "first": first, "last": last, "ratio": last / first}

    def test_what_grew_is_named(self, drift):
        rows = [
            self.row("commits", "p50_ms", 5.0, 8.0),
            self.row("commits", "p99_ms", 50.0, 70.0),
            self.row("daemon_memory", "bytes", 200 * MIB, 260 * MIB),
            self.row("store_file", "bytes", 500 * MIB, 510 * MIB),
        ]
        assert drift.drifted(rows) == ["commits p50_ms", "daemon_memory bytes"]

    def test_little_is_no_drift_however_large_its_ratio(self, drift):
        rows = [self.row("durable", "p50_ms", 0.1, 0.4), self.row("dirty", "bytes", MIB, 9 * MIB)]
        assert drift.drifted(rows) == []

    def test_the_thirds_are_those_of_the_time(self, drift, mixed_load):
        class Slower(mixed_load.Program):
            name, what, seconds = "slower", "what becomes slower", 1.0

            def step(self):
                raise NotImplementedError

        program = Slower()
        program.taken = [(1000.0 + at, 0.001 if at < 20 else 0.009 if at < 40 else 0.003) for at in range(60)]
        sample = dict.fromkeys(drift.GAUGES, 100 * MIB)
        samples = [sample] * 8 + [sample | {"daemon_memory": 150 * MIB}] * 4
        rows = {
            (row["name"], row["figure"]): row["ratio"]
            for row in drift.thirds([program], samples, 1000.0, 60.0)
        }
        assert rows["slower", "p50_ms"] == pytest.approx(3)
        assert rows["slower", "p99_ms"] == pytest.approx(3)
        assert rows["daemon_memory", "bytes"] == 1.5
        assert rows["store_file", "bytes"] == 1


class TestTheLoad:
    def test_the_ring_gives_each_extent_of_its_oldest_quarter_once(self, mixed_load, tmp_path):
        ring = mixed_load.Ring(tmp_path / "ring", 8)
        for _ in range(8):
            ring.write()
        source = mixed_load.random.Random(1)
        seen = []
        for _ in range(2 * mixed_load.FILE // mixed_load.EXTENT):
            with ring.evicted(source) as place:
                seen.append(place)
        assert len(set(seen)) == len(seen)
        assert {slot for slot, _ in seen} == {1, 2}, "the file that is written next is left alone"

    def test_files_that_are_old_lost_or_wrong_are_noticed(self, mixed_load, tmp_path):
        ring = mixed_load.Ring(tmp_path / "ring", 8)
        for _ in range(8):
            ring.write()
        program = mixed_load.SequentialWrites(ring)
        assert program.check() == []
        before = ring.file(0).read_bytes()
        program.step()
        assert program.check() == []
        ring.file(0).write_bytes(before)
        assert len(program.check()) == 1

    def test_pages_and_values_that_are_old_are_noticed(self, mixed_load, tmp_path):
        durable = mixed_load.DurableWrites(tmp_path / "durable", MIB)
        before = (tmp_path / "durable").read_bytes()
        durable.step()
        assert durable.check() == []
        durable.close()
        (tmp_path / "durable").write_bytes(before)
        assert len(durable.check()) == 1

        commits = mixed_load.Commits(tmp_path / "a.lmdb")
        commits.step()
        commits.close()
        assert commits.check() == []
        commits._versions[7] += 1
        assert len(commits.check()) == 1

    def test_a_step_that_fails_ends_its_program_and_is_told(self, mixed_load):
        class Broken(mixed_load.Program):
            name, what, seconds = "broken", "what cannot be", 0.0

            def step(self):
                raise OSError("no such thing here")

        program = Broken()
        program.run(threading.Event())
        assert "no such thing" in str(program.error)


class TestPlots:
    def test_panels_draw_every_line_within_the_picture(self, svg):
        lines = [svg.Line("p50 <1>", [(0, 1), (15, 3), (30, 2)]), svg.Line("p95", [(0, 4), (30, 9.5)])]
        root = ElementTree.fromstring(svg.panels([svg.Panel("commits & co, ms", lines)] * 2, "minutes"))
        drawn = root.findall(f"{SVG}polyline")
        assert len(drawn) == 4
        width, height = float(root.get("width")), float(root.get("height"))
        for line in drawn:
            points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
            assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
        assert "commits & co, ms" in "".join(root.itertext())

    def test_bars_are_as_long_as_their_ratios(self, svg):
        root = ElementTree.fromstring(svg.bars([svg.Bar("a", 0.5), svg.Bar("b", 2.0)], "ratios"))
        _, short, long = (float(part.get("width").rstrip("%")) for part in root.findall(f"{SVG}rect"))
        assert long == pytest.approx(4 * short)

    @pytest.mark.parametrize(("least", "wanted"), [(0.03, 0.05), (1, 1), (1.1, 2), (7, 10), (230, 500), (0, 1)])
    def test_axes_end_at_round_numbers(self, svg, least, wanted):
        assert svg.nice(least) == pytest.approx(wanted)

    def test_a_report_of_bench_is_drawn_by_its_ratios(self, tmp_path):
        report = {"measures": [{"what": "commits", "ratio": {"floor": 0.98}}, {"what": "x", "ratio": {}}]}
        (tmp_path / "bench.json").write_text(json.dumps(report))
        drawn = script("plot", tmp_path / "bench.json")
        assert drawn.returncode == 0, drawn.stderr
        assert "commits" in drawn.stdout
        assert "0.98" in drawn.stdout
        assert script("plot", tmp_path / "bench.json", "AGAINST").returncode == 2
