"""The configuration that `qsfs init` writes: complete, commented, every setting at its default."""

from __future__ import annotations

import json
from collections.abc import Sequence

from qsfs.config import BackendConfig

_HEAD = """\
# Configuration of a qsfs file system.  Relative paths are relative to this file's directory.
# Sizes: bytes, or text such as "512MiB".  Durations: seconds, or text such as "10min".
# `qsfs config check` says what is wrong with this file; `qsfs config show` prints every setting.

[filesystem]
mountpoint = {mountpoint}
# Opens everything on the backends.  Keep a copy elsewhere: without it nothing can be restored.
key_file = {key_file}
label = {label}
# Promises that are checked at format, at every change of the backends, and by `qsfs status`:
# so many whole groups (sites, farms, hosts) or nodes may be lost and nothing is lost.
redundant_groups = 0
redundant_nodes = 0

[cache]
# Everything local lies here and never takes more than `size`.
directory = {cache}
size = {size}

[code]
# Fixed by `qsfs format`.  Everything is cut into `data_shards` pieces and `parity_shards` are added;
# any `parity_shards` of them may be lost.
data_shards = {k}
parity_shards = {m}
# "zfec", or "isa-l", which costs less CPU and has at most 32 shards; it needs: pip install 'qsfs[isa-l]'
codec = {codec}

[flush]
# Every `cut_seconds` the backends get an image of the whole file system.
cut_seconds = 30
# Sooner where otherwise more than so much, or what is older, would be lost with this machine; 0 for no limit.
exposure_bytes = 0
exposure_seconds = 0
# Who writes faster than backends take it keeps the next image waiting; after so long that slows writes; 0: never.
slow_writers_after = "10min"
# Bytes a second over all backends, 0 for no limit. What is sent again counts too; heads count and never wait.
upload_rate = 0
download_rate = 0
# Room for what waits for its upload; part of the cache's size.
spool_size = {spool}

[snapshots]
# Automatic snapshots: one every so long ("1h"; 0 for none), and how many stay. Named ones stay until they are deleted.
every = 0
keep_last = 2
hourly = 24
daily = 7
weekly = 4

[fetch]
# How long a read of data that are only remote waits before it fails (policy `unavailable = "error"`).
deadline_seconds = 30

[mount]
# Extended attributes and ACLs slow down every small write: the kernel asks for one each time.
xattr = false
# Access times as on a local disk: a first read after each change sets one.
relatime = true
# Let other users than the one who mounts in; the kernel checks permissions.  Who is not root needs
# `user_allow_other` in /etc/fuse.conf for it.
allow_other = {allow_other}
# What an fsync waits for: this disk ("local"), or also a published head on the backends ("written": far slower).
fsync = "local"

[log]
level = "info"
# file = "qsfs.log"
"""

_POLICIES = """
# What holds for which files; the first pattern that matches wins.  A pattern without "/" is matched
# against the name, one with "/" against the path from the root of the file system.

# Lock files of LMDB: worthless on another machine, so they stay here and are empty after a restore.
[[policy]]
match = "*.lmdb-lock"
local_only = true

[[policy]]
match = "lock.mdb"
local_only = true

# Memory-mapped databases.  After a crash they stand exactly at one of their own syncs, and a read
# waits for the backends: an error in a mapped page would kill the program.
[[policy]]
match = "*.lmdb"
atomic_sync = true
unavailable = "wait"

[[policy]]
match = "data.mdb"
atomic_sync = true
unavailable = "wait"

# What a Casper validator has signed.  It is written without a sync, so each write is made durable
# before it is answered; an old copy could make it sign twice, so a restore puts it beside.
[[policy]]
match = "unit_files/*"
write_through = true
restore_aside = true

[[policy]]
match = "*/unit_files/*"
write_through = true
restore_aside = true
"""

_BACKENDS = """
# The backends: 0-db namespaces.  What is likely to fail together belongs in one `group`.
"""


def starter_config(
    backends: Sequence[BackendConfig],
    *,
    data_shards: int = 16,
    parity_shards: int = 4,
    codec: str = "zfec",
    mountpoint: str = "mnt",
    cache: str = "cache",
    cache_size: str = "20GiB",
    spool_size: str = "512MiB",
    key_file: str = "qsfs.key",
    label: str = "",
    allow_other: bool = True,
) -> str:
    """The text of a configuration for these backends, with the presets of the policies."""
    parts = [
        _HEAD.format(
            mountpoint=_quoted(mountpoint),
            key_file=_quoted(key_file),
            label=_quoted(label),
            cache=_quoted(cache),
            size=_quoted(cache_size),
            spool=_quoted(spool_size),
            k=data_shards,
            m=parity_shards,
            codec=_quoted(codec),
            allow_other=str(allow_other).lower(),
        ),
        _POLICIES,
        _BACKENDS,
    ]
    for backend in backends:
        lines = ["", "[[backend]]", f"address = {_quoted(backend.address)}"]
        lines.append(f"namespace = {_quoted(backend.namespace)}")
        settings = {"group": backend.group, "node": backend.node, "password": backend.password}
        lines += [f"{key} = {_quoted(value)}" for key, value in settings.items() if value]
        parts.append("\n".join(lines) + "\n")
    return "".join(parts)


def _quoted(text: str) -> str:
    """A TOML basic string; JSON's escapes are a subset of TOML's."""
    return json.dumps(text, ensure_ascii=False)
