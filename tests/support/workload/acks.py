"""The ack file: what a program began and what it was promised, kept outside the mount."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def content(size: int, *name: object) -> bytes:
    """`size` bytes that follow from `name`; no two names give the same."""
    return hashlib.shake_256("/".join(map(str, name)).encode()).digest(size)


@dataclass(frozen=True)
class Promises:
    """What an ack file says: the run's name, seed and options, and step numbers (-1 = none).

    All steps up to `acked` are durable; those up to `begun` may have had any effect; later ones none.
    """

    workload: str
    seed: str
    acked: int = -1
    begun: int = -1
    options: dict[str, Any] = field(default_factory=dict)


class Acks:
    """Writes an ack file, one JSON object a line; `echo` names each acknowledged step on standard output."""

    def __init__(
        self, path: Path, workload: str, seed: str, options: dict[str, Any], *, echo: bool = False
    ) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._echo = echo
        self._put({"workload": workload, "seed": seed, "options": options})

    def begin(self, step: int) -> None:
        """Notes that step `step` may have an effect from now on."""
        self._put({"begin": step})

    def ack(self, step: int) -> None:
        """Notes that all steps up to `step` were promised to be durable."""
        self._put({"ack": step})
        if self._echo:
            print(step, flush=True)

    def close(self) -> None:
        """Ends the file."""
        os.close(self._file)

    def _put(self, line: dict[str, Any]) -> None:
        # The machine does not really lose power: a write is as good as an fsync here.
        os.write(self._file, json.dumps(line).encode() + b"\n")


def read(path: Path) -> Promises:
    """What the ack file at `path` says; a line that its program was killed over does not count."""
    lines = path.read_bytes().split(b"\n")[:-1]
    header = json.loads(lines[0])
    acked = begun = -1
    for line in map(json.loads, lines[1:]):
        acked = line.get("ack", acked)
        begun = line.get("begin", begun)
    return Promises(header["workload"], header["seed"], acked, begun, header["options"])
