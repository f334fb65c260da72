"""qsfs: a FUSE file system whose history lives, encrypted and erasure-coded, on 0-db backends."""

__version__ = "0.1.0"
