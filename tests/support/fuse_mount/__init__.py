"""The request handlers mounted in a process of their own, over the model of store and contents.

`handle` starts and steers it from a test; `server` is what runs there:
`python -m tests.support.fuse_mount SETTINGS`, commands on stdin, answers on stdout, logs on stderr.
"""

from tests.support.fuse_mount.handle import FuseMount, Settings

__all__ = ["FuseMount", "Settings"]
