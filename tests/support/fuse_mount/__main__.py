"""Serves one mount until it is unmounted or stdin ends."""

from tests.support.fuse_mount.server import main

main()
