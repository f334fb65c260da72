"""The program behind `Servers`: serves what its one argument, in JSON, says, and dies with its parent."""

from __future__ import annotations

import ctypes
import json
import logging
import signal
import sys
from pathlib import Path

import trio

from qsfs.zdb.server import ServeOptions, run

_PR_SET_PDEATHSIG = 1


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    settings = json.loads(sys.argv[1])
    settings["data"] = Path(settings["data"])
    trio.run(run, ServeOptions(**settings))


if __name__ == "__main__":
    main()
