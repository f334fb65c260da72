"""Writes tests/vectors/archive-1.json: the shard files of a small archive.  Run once for each version."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

from qsfs.clock import FixedClock
from qsfs.codec.encode import Source, encode, shard_paths
from qsfs.format.erasure import CodeParams
from tests.format.make_vectors import VECTORS
from tests.format.samples import noise

SECRET = b"\x55" * 32
CONTENT = noise(4090, 77)
NAME = "größe.tar".encode()


def made() -> dict[str, Any]:
    """The shard files of `CONTENT`, which does not compress, so that no version of zstd matters."""
    with tempfile.TemporaryDirectory() as directory:
        source = Source(io.BytesIO(CONTENT), NAME, 0o640, 1_700_000_000_000_000_000)
        paths = shard_paths([Path(directory)], "x", 3)
        encode(source, paths, secret=SECRET, code=CodeParams(2, 3), clock=FixedClock(78), threads=1)
        return {"secret": SECRET.hex(), "files": [path.read_bytes().hex() for path in paths]}


if __name__ == "__main__":
    (VECTORS / "archive-1.json").write_text(json.dumps(made(), indent=1) + "\n", encoding="utf-8")
