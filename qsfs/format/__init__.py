"""The formats of everything that qsfs writes to backends, as pure functions of bytes.

Nothing here does I/O, keeps state, or asks the operating system for time or randomness: callers
pass a `qsfs.clock.Clock`.  `docs/format.md` describes every byte.

    units        page size, limits, the common first bytes of every value
    keys         master keys, what is derived from them, key files, key slots
    seal         one small object under a key of its own
    compression  zstd unless it does not pay
    erasure      Reed-Solomon codes
    extent       the names of extents and packs, as other layers keep them
    layout       where extents lie in a pack
    pack         sealed extents and their index: the unit of upload
    shard        one piece of a pack, one value on one backend
    rows         metadata rows as chunks for metadata packs
    owner        the owner of a mount, and its record
    fleet        the numbered list of backends
    identity     what marks a backend as ours, or as retired
    head         the small record that names a generation
    superblock   the file system's parameters and key slots, found without its id
    archive      one file as a stream of packs in n shard files, without a file system

Bytes read from a backend may be anything.  Opening them raises `Corrupt` when they are not
exactly what was written, and `FormatMismatch` when they are, but by a newer version of qsfs.
"""

from qsfs.format.units import FORMAT_VERSION, PAGE

__all__ = ["FORMAT_VERSION", "PAGE"]
