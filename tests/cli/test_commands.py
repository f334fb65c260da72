"""`qsfs init` and `qsfs config`: what they write, what they refuse, what they warn of."""

from __future__ import annotations

import stat
import sys

import pytest

from qsfs.config import Config
from qsfs.format.erasure import CODEC_NUMBERS


class TestInit:
    def test_it_writes_what_loads_and_tells_the_next_step(self, qsfs, tmp_path):
        result = qsfs("init", "demo")
        assert result.code == 0, result.err
        config = Config.load(tmp_path / "demo")
        assert len(config.backends) == 24
        assert config.filesystem.mountpoint == tmp_path / "demo" / "mnt"
        assert config.filesystem.mountpoint.is_dir()
        assert config.cache.directory.is_dir()
        assert "format" in result.out

    def test_the_key_file_opens_and_only_its_owner_reads_it(self, qsfs, tmp_path):
        from qsfs.format.keys import parse_key_file

        qsfs("init", ".")
        key = tmp_path / "qsfs.key"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert len(parse_key_file(key.read_text())) == 32
        assert stat.S_IMODE((tmp_path / "qsfs.toml").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700

    @pytest.mark.parametrize("name", ["qsfs.toml", "qsfs.key"])
    def test_nothing_is_overwritten(self, qsfs, tmp_path, name):
        """A key file that is lost loses the file system."""
        (tmp_path / name).write_text("precious")
        result = qsfs("init")
        assert result.code == 3
        assert name in result.err
        assert (tmp_path / name).read_text() == "precious"
        assert {path.name for path in tmp_path.iterdir()} == {name}

    def test_a_small_fleet(self, qsfs, tmp_path):
        result = qsfs("init", "--backends", 6, "--data-shards", 4, "--parity-shards", 2, "--port", 7000)
        assert result.code == 0, result.err
        config = Config.load(tmp_path)
        assert [backend.port for backend in config.backends] == list(range(7000, 7006))
        assert (config.code.data_shards, config.code.parity_shards) == (4, 2)

    def test_backends_by_address(self, qsfs, tmp_path):
        words = [word for index in range(3) for word in ("--backend", f"h{index}:9900/n{index}")]
        result = qsfs("init", "--data-shards", 2, "--parity-shards", 1, *words)
        assert result.code == 0, result.err
        assert [backend.name for backend in Config.load(tmp_path).backends] == [
            "h0:9900/n0", "h1:9900/n1", "h2:9900/n2"
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("argv", "word"),
        [
            (["--backends", "19"], "20"),
            (["--backends", "24", "--backend", "a:1"], "--backends"),
            (["--backend", "nonsense"], "nonsense"),
            (["--data-shards", "0"], "data_shards"),
            (["--data-shards", "300"], "data_shards"),
            (["--cache-size", "huge"], "huge"),
            (["--port", "65530"], "65535"),
        ],
    )
    def test_what_cannot_work_is_refused_before_anything_is_written(self, qsfs, tmp_path, argv, word):
        result = qsfs("init", *argv)
        assert result.code == 3
        assert word in result.err
        assert list(tmp_path.iterdir()) == []

    def test_other_names_and_places(self, qsfs, tmp_path):
        places = ("--mountpoint", tmp_path / "node", "--cache", "../var")
        assert qsfs("init", "etc", "--name", "casper", *places).code == 0
        config = Config.load(tmp_path / "etc" / "casper.toml")
        assert config.filesystem.key_file == tmp_path / "etc" / "casper.key"
        assert config.filesystem.key_file.exists()
        assert config.filesystem.mountpoint == tmp_path / "node"
        assert (tmp_path / "var").is_dir()
        assert qsfs("init", "etc", "--name", "a/b").code == 3

    def test_who_has_no_backends_yet_is_told_how_to_serve_them(self, qsfs, tmp_path):
        said = qsfs("init", "a", "--port", "7000").out
        assert f"qsfs zdb serve --data {tmp_path}/a/backends --port 7000 --instances 24" in said
        named = [word for port in range(1, 21) for word in ("--backend", f"h:{port}")]
        assert "zdb serve" not in qsfs("init", "b", *named).out

    @pytest.mark.parametrize("codec", ["zfec", "isa-l"])
    def test_the_codec_that_is_chosen_is_in_the_configuration(self, qsfs, tmp_path, codec):
        assert qsfs("init", "--codec", codec).code == 0
        assert f'\ncodec = "{codec}"\n' in (tmp_path / "qsfs.toml").read_text()
        assert Config.load(tmp_path / "qsfs.toml").code.codec in CODEC_NUMBERS

    def test_a_codec_that_is_not_installed_or_too_small_is_refused_before_anything_is_written(
        self, qsfs, tmp_path, monkeypatch
    ):
        result = qsfs("init", "--codec", "isa-l", "--data-shards", 30)
        assert (result.code, "at most 32 shards" in result.err) == (9, True)
        monkeypatch.setitem(sys.modules, "pyeclib.ec_iface", None)
        result = qsfs("init", "--codec", "isa-l")
        assert (result.code, "pip install 'qsfs[isa-l]'" in result.err) == (15, True)
        assert list(tmp_path.iterdir()) == []

    def test_json(self, qsfs, tmp_path):
        assert qsfs("init", "--json").json["config"] == str(tmp_path / "qsfs.toml")


class TestConfig:
    def test_check_of_a_fresh_configuration_warns_of_nothing(self, qsfs):
        qsfs("init", ".")
        result = qsfs("config", "check")
        assert (result.code, result.err) == (0, "")
        assert "warning" not in result.out
        assert qsfs("config", "check", "--json").json["warnings"] == []

    @pytest.mark.parametrize(
        ("count", "words"),
        [
            (19, "will refuse"),
            (20, "flushing stops with more than 2 backends down"),
            (22, "packs become full with at most 2 backends down"),
        ],
    )
    def test_check_says_what_too_few_backends_mean(self, qsfs, tmp_path, count, words):
        fleet = "".join(f"[[backend]]\naddress = 'h:{port}'\n" for port in range(1, count + 1))
        (tmp_path / "qsfs.toml").write_text(fleet)
        assert words in qsfs("config", "check").out

    def test_check_says_what_the_fleet_withstands(self, qsfs):
        qsfs("init", ".")
        assert "Flushing goes on with 6 backends down" in qsfs("config", "check").out
        assert len(qsfs("config", "check", "--json").json["sentences"]) == 3

    def test_check_warns_of_a_codec_that_is_not_installed(self, qsfs, monkeypatch):
        qsfs("init", "--codec", "isa-l")
        assert qsfs("config", "check", "--json").json["warnings"] == []
        monkeypatch.setitem(sys.modules, "pyeclib.ec_iface", None)
        assert "pip install 'qsfs[isa-l]'" in qsfs("config", "check").out

    def test_check_warns_of_a_key_that_is_not_there(self, qsfs, tmp_path):
        qsfs("init", ".")
        (tmp_path / "qsfs.key").unlink()
        shown = qsfs("config", "check").out
        assert "qsfs.key cannot be read: No such file" in shown and "in order" not in shown

    def test_check_warns_of_a_key_that_others_can_read(self, qsfs, tmp_path):
        qsfs("init", ".")
        (tmp_path / "qsfs.key").chmod(0o644)
        assert "chmod 600" in qsfs("config", "check").out

    def test_check_refuses_a_wrong_file(self, qsfs, tmp_path):
        (tmp_path / "qsfs.toml").write_text("[cache]\nszie = 1\n")
        result = qsfs("config", "check")
        assert result.code == 3
        assert "'size'" in result.err

    def test_show_prints_every_setting_but_no_password(self, qsfs, tmp_path):
        (tmp_path / "qsfs.toml").write_text("[[backend]]\naddress = 'h:1'\npassword = 'hunter2'\n")
        shown = qsfs("config", "show", "--json").json
        assert shown["cache"]["size_bytes"] == 20 << 30
        assert shown["backends"][0]["password"] == "***"
        text = qsfs("config", "show").out
        assert "cache.size_bytes" in text
        assert "hunter2" not in text
