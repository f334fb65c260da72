"""Settings of the interpreter and of the C allocator for a process that serves requests."""

from __future__ import annotations

import ctypes
import gc
import sys

_SWITCH_INTERVAL_SECONDS = 0.0005

# Of <malloc.h>.  Without them glibc gives the memory of a group back to the kernel after each commit
# and of a WRITE after each request, and takes it again, page fault by page fault.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_ALLOCATOR = ((_M_TRIM_THRESHOLD, 64 << 20), (_M_TOP_PAD, 1 << 20), (_M_MMAP_THRESHOLD, 4 << 20))


def tune_allocator() -> None:
    """Lets glibc keep the memory that groups and requests need again and again; another libc is left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _ALLOCATOR:
            mallopt(option, value)


def tune_interpreter() -> None:
    """Hands the interpreter over quickly between threads; what exists by now is never collected again."""
    sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
    gc.collect()
    gc.freeze()
