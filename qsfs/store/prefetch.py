"""Reading ahead in LMDB's map: it is mapped for random access, where the kernel reads one page a fault.

A stream's values lie one behind the other, as they were committed, so where one lies tells where the
next ones do.  Nothing depends on the guess but speed, and the kernel ignores addresses that are not
mapped.
"""

from __future__ import annotations

import ctypes
import mmap

_LIBC = ctypes.CDLL(None)
_MADVISE = _LIBC.madvise
_MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_WILLNEED = 3


class _Buffer(ctypes.Structure):
    """CPython's `Py_buffer`, part of its stable interface."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_GET_BUFFER = ctypes.pythonapi.PyObject_GetBuffer
_GET_BUFFER.argtypes = (ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int)
_RELEASE_BUFFER = ctypes.pythonapi.PyBuffer_Release
_RELEASE_BUFFER.argtypes = (ctypes.POINTER(_Buffer),)
_RELEASE_BUFFER.restype = None


def read_ahead(value: memoryview, skip: int, size: int) -> None:
    """Asks the kernel to read the `size` bytes of a map that begin `skip` behind the start of `value`.

    Returns at once; what is in memory already is left alone.
    """
    begin = (address(value) + skip) & -mmap.PAGESIZE
    _MADVISE(begin, size, _WILLNEED)


def address(value: memoryview) -> int:
    """Where in memory the first byte of `value` lies."""
    buffer = _Buffer()
    _GET_BUFFER(value, buffer, 0)
    address = buffer.buf or 0
    _RELEASE_BUFFER(buffer)
    return int(address)
