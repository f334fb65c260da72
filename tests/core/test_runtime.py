"""The daemon's allocator keeps the memory that requests need again and again."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import platform, resource, sys
from qsfs.daemon.runtime import tune_allocator
if "tuned" in sys.argv:
    tune_allocator()
pieces = lambda: [bytes(16384) for _ in range(1000)]
pieces()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    pieces()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, platform.libc_ver()[0])
"""


def faults(*words: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, *words], check=True, capture_output=True, text=True)
    count, *libc = done.stdout.split()
    if libc != ["glibc"]:
        pytest.skip("another libc than glibc is left alone")
    return int(count)


def test_memory_of_a_commit_is_not_taken_from_the_kernel_again() -> None:
    """Ten times 16 MB: 4,000 pages each if it is given back between."""
    assert faults() > 20_000
    assert faults("tuned") < 4_000
