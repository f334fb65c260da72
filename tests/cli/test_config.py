"""The configuration: every wrong file is refused, and the message names the key and the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qsfs import config as configuration
from qsfs.cli.starter import starter_config
from qsfs.config import BackendConfig, CacheConfig, CodeConfig, Config, PolicyRule
from qsfs.errors import ConfigError
from qsfs.format.erasure import CODEC_NUMBERS

FILE = Path("/etc/qsfs/node.toml")


def parse(content: str) -> Config:
    return Config.parse(content, FILE)


def complaint(content: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(content)
    message = str(caught.value)
    assert str(FILE) in message
    return message


class TestValues:
    def test_an_empty_file_is_all_defaults(self):
        config = parse("")
        assert config.cache.size_bytes == 20 << 30
        assert config.cache.group_seconds == 5.0
        assert config.code == CodeConfig(16, 4, "zfec")
        assert config.flush.retention_seconds == 86400
        assert config.flush.spool_bytes == 512 << 20
        assert config.mount.max_tasks == 5000
        assert config.log.file is None
        assert config.backends == config.policies == ()

    @pytest.mark.parametrize(
        ("value", "wanted"),
        [
            ('"20GiB"', 20 << 30),
            ('"512 MiB"', 512 << 20),
            ("33554432", 32 << 20),
            ('"0.5GiB"', 512 << 20),
            ('"64m"', 64 << 20),
            ('"64MB"', 64_000_000),
        ],
    )
    def test_sizes(self, value, wanted):
        assert parse(f"[cache]\ngroup_size = {value}").cache.group_bytes == wanted

    @pytest.mark.parametrize(
        ("value", "wanted"),
        [("30", 30.0), ("0.5", 0.5), ('"30s"', 30.0), ('"10min"', 600.0), ('"24h"', 86400.0)],
    )
    def test_durations(self, value, wanted):
        assert parse(f"[flush]\ncut_seconds = {value}").flush.cut_seconds == wanted

    @pytest.mark.parametrize(
        ("written", "wanted"), [("zfec", "zfec"), ("isa-l", "isa_l_rs_cauchy"), ("isa_l_rs_cauchy", "isa_l_rs_cauchy")]
    )
    def test_a_codec_goes_by_the_name_that_people_use_and_by_the_formats(self, written, wanted):
        assert parse(f"[code]\ncodec = '{written}'").code.codec == wanted
        assert wanted in CODEC_NUMBERS

    def test_another_codec_is_refused_with_those_that_there_are(self):
        assert '"zfec" or "isa-l"' in complaint("[code]\ncodec = 'isal'")

    def test_a_plain_retention_counts_in_hours(self):
        assert parse("[flush]\nretention_hours = 2").flush.retention_seconds == 7200
        assert parse('[flush]\nretention_hours = "90min"').flush.retention_seconds == 5400

    def test_relative_paths_are_relative_to_the_file(self):
        config = parse('[filesystem]\nkey_file = "k"\n[cache]\ndirectory = "/var/c"\n[log]\nfile = "l"')
        assert config.filesystem.mountpoint == Path("/etc/qsfs/mnt")
        assert config.filesystem.key_file == Path("/etc/qsfs/k")
        assert config.cache.directory == Path("/var/c")
        assert config.log.file == Path("/etc/qsfs/l")

    def test_a_backend_knows_its_parts(self):
        (backend,) = parse('[[backend]]\naddress = "[::1]:9900"\nnamespace = "n"').backends
        assert (backend.host, backend.port, backend.name) == ("::1", 9900, "[::1]:9900/n")

    def test_the_password_comes_from_its_file(self, tmp_path):
        (tmp_path / "secret").write_text("hunter2\n")
        content = '[[backend]]\naddress = "a:1"\npassword_file = "secret"'
        (backend,) = Config.parse(content, tmp_path / "qsfs.toml").backends
        assert backend.read_password() == "hunter2"
        (tmp_path / "secret").unlink()
        with pytest.raises(ConfigError, match="secret"):
            backend.read_password()


class TestRefusals:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("[cahce]\nsize = 1", ["[cahce]", "'cache'"]),
            ("[cache]\nszie = 1", ["[cache]", "'szie'", "'size'"]),
            ("[[backend]]\nadress = 'a:1'", ["'adress'", "'address'"]),
            ("[[policy]]\nmatch = '*'\natomic-sync = true", ["'atomic-sync'", "'atomic_sync'"]),
            ("[cache]\ncut_size = 1", ["'cut_size'", "belongs in [flush]"]),
            ("data_shards = 4", ["'data_shards'", "belongs in [code]"]),
            ("[cache]\nxyzzyqq = 1", ["'xyzzyqq'", "group_seconds"]),
        ],
    )
    def test_unknown_names_are_refused_with_the_nearest_right_one(self, content, words):
        message = complaint(content)
        assert all(word in message for word in words), message

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("[cache]\nsize = -1", ["size", "negative"]),
            ('[cache]\nsize = "-1GiB"', ["size", "negative"]),
            ('[cache]\nsize = "lots"', ["size", "lots"]),
            ('[cache]\nsize = "3 elephants"', ["size", "elephants"]),
            ("[cache]\nsize = true", ["size", "not a size"]),
            ("[cache]\nsize = 1.5", ["size", "1.5"]),
            ("[cache]\nsize = 1", ["size", "out of range"]),
            ("[cache]\ngroup_seconds = -5", ["group_seconds", "negative"]),
            ('[cache]\ngroup_seconds = "soon"', ["group_seconds", "soon"]),
            ("[cache]\ngroup_seconds = nan", ["group_seconds"]),
            ("[cache]\nhigh_watermark = 90", ["high_watermark", "out of range"]),
            ("[cache]\nhigh_watermark = 0.5", ["low_watermark", "high_watermark"]),
            ("[cache]\ndirectory = 3", ["directory", "not text"]),
            ("[cache]\ndirectory = ''", ["directory", "empty"]),
            ('[filesystem]\nlabel = "a\\u0007"', ["label", "control"]),
            ("[mount]\nxattr = 1", ["xattr", "true or false"]),
            ("[mount]\nmax_tasks = 5.5", ["max_tasks", "whole number"]),
            ("[mount]\nmax_tasks = true", ["max_tasks", "whole number"]),
            ("[code]\ndata_shards = 0", ["data_shards", "out of range"]),
            ("[code]\nparity_shards = 0", ["parity_shards", "out of range"]),
            ("[code]\ndata_shards = 250\nparity_shards = 7", ["257", "256"]),
            ("[log]\nlevel = 'loud'", ["level", "loud", "info"]),
            ("[[policy]]\nmatch = ''", ["match", "empty"]),
            ("[[policy]]\nmatch = '/'", ["match", "empty"]),
            ("[[policy]]\npinned = true", ["match", "empty"]),
            ("[[policy]]\nmatch = '*'\nunavailable = 'perhaps'", ["unavailable", "perhaps", "wait"]),
            ("[[policy]]\nmatch = '*'\natomic_sync = true\nwrite_through = true", ["exclude each other"]),
            ("[[backend]]\nnamespace = 'n'", ["[[backend]] number 1", "address is missing"]),
            ("[[backend]]\naddress = 'a:1'\npassword = 'x'\npassword_file = 'y'", ["password_file", "both"]),
            ("[[backend]]\naddress = 'a:1'\nweight = 0", ["weight", "out of range"]),
            ("[[backend]]\naddress = 'a:1'\nnamespace = 'a b'", ["namespace", "blanks"]),
            ("backend = 3", ["backend", "[[backend]]"]),
            ("[backend]\naddress = 'a:1'", ["backend", "[[backend]]"]),
            ("cache = 3", ["cache", "[cache]"]),
            ("cache = [", ["not TOML"]),
        ],
    )
    def test_wrong_values_are_refused_by_key(self, content, words):
        message = complaint(content)
        assert all(word in message for word in words), message

    @pytest.mark.parametrize(
        "address", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "::1:9900", "a b:1", "redis://a:1"]
    )
    def test_a_bad_address_is_refused(self, address):
        assert "address" in complaint(f"[[backend]]\naddress = '{address}'")

    @pytest.mark.parametrize(
        ("content", "key"),
        [
            ("[filesystem]\nmountpoint = 'x'\n[cache]\ndirectory = 'x'", "directory"),
            ("[filesystem]\nmountpoint = 'x'\n[cache]\ndirectory = 'y/../x/c'", "directory"),
            ("[filesystem]\nmountpoint = 'x'\nkey_file = 'x/k'", "key_file"),
            ("[filesystem]\nmountpoint = 'x'\n[log]\nfile = 'x/l'", "file"),
            ("[filesystem]\nmountpoint = 'c/mnt'\n[cache]\ndirectory = 'c'", "mountpoint"),
        ],
    )
    def test_a_mount_hides_nothing_that_it_needs_and_is_not_in_its_cache(self, content, key):
        """The daemon would wait for itself, or lose its key at the next start."""
        with pytest.raises(ConfigError, match=rf"\] {key}: .* lies (below the mount point|in the cache)"):
            Config.parse(content, Path("/d/qsfs.toml"))

    def test_neighbours_of_the_mount_point_are_not_below_it(self):
        Config.parse("[filesystem]\nmountpoint = 'mnt'\n[cache]\ndirectory = 'mnt-cache'", Path("/d/q.toml"))

    def test_the_same_backend_twice_is_refused(self):
        twice = "[[backend]]\naddress = 'a:1'\n" * 2
        assert "a:1/qsfs" in complaint(twice)
        assert len(parse(twice + "namespace = 'other'").backends) == 2

    def test_sections_built_in_code_are_checked_too(self):
        with pytest.raises(ValueError, match="watermark"):
            CacheConfig(low_watermark=0.95)
        with pytest.raises(ValueError, match="match"):
            PolicyRule()


class TestLookup:
    @pytest.fixture(autouse=True)
    def _somewhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("QSFS_CONFIG", raising=False)
        monkeypatch.setattr(configuration, "SYSTEM_FILE", tmp_path / "etc" / "qsfs.toml")

    def label(self, path=None):
        return Config.load(path).filesystem.label

    def write(self, path: Path, label: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'[filesystem]\nlabel = "{label}"\n')
        return path

    def test_order(self, tmp_path, monkeypatch):
        """An explicit path wins over $QSFS_CONFIG, that over ./qsfs.toml, that over /etc."""
        with pytest.raises(ConfigError, match="qsfs init"):
            self.label()
        self.write(tmp_path / "etc" / "qsfs.toml", "system")
        assert self.label() == "system"
        self.write(tmp_path / "qsfs.toml", "here")
        assert self.label() == "here"
        monkeypatch.setenv("QSFS_CONFIG", str(self.write(tmp_path / "e.toml", "environment")))
        assert self.label() == "environment"
        assert self.label(self.write(tmp_path / "x.toml", "named")) == "named"

    def test_a_named_file_that_is_missing_is_never_replaced_by_another(self, tmp_path):
        self.write(tmp_path / "qsfs.toml", "here")
        with pytest.raises(ConfigError, match=r"nowhere\.toml"):
            Config.load(tmp_path / "nowhere.toml")

    def test_a_directory_stands_for_the_file_in_it(self, tmp_path):
        self.write(tmp_path / "demo" / "qsfs.toml", "demo")
        assert self.label("demo") == "demo"
        assert Config.load("demo").path == tmp_path / "demo" / "qsfs.toml"

    def test_what_cannot_be_read_is_a_config_error(self, tmp_path):
        (tmp_path / "qsfs.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match="UTF-8"):
            Config.load()
        (tmp_path / "qsfs.toml").unlink()
        (tmp_path / "qsfs.toml").mkdir()
        with pytest.raises(ConfigError, match="cannot be read"):
            Config.load()


class TestStarter:
    def test_it_parses_to_what_was_asked(self):
        backends = [BackendConfig(f"127.0.0.1:{9900 + i}", group=f"g{i}", password='a"b\\') for i in range(6)]
        content = starter_config(
            backends, data_shards=4, parity_shards=2, label='my "node"', cache_size="8GiB", spool_size="1GiB"
        )
        config = parse(content)
        assert config.backends == tuple(backends)
        assert (config.code.data_shards, config.code.parity_shards) == (4, 2)
        assert config.filesystem.label == 'my "node"'
        assert config.cache.size_bytes == 8 << 30

    def test_all_else_is_the_default(self):
        assert dataclasses.replace(parse(starter_config([])), policies=()) == parse("")

    def test_the_presets_of_the_policies(self):
        rules = {rule.match: rule for rule in parse(starter_config([])).policies}
        assert rules["lock.mdb"].local_only
        assert rules["*.lmdb-lock"].local_only
        for name in ("*.lmdb", "data.mdb"):
            assert rules[name].atomic_sync
            assert rules[name].unavailable == "wait"
        for name in ("unit_files/*", "*/unit_files/*"):
            assert rules[name].write_through
            assert rules[name].restore_aside

