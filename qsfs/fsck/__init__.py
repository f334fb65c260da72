"""The check of a file system, layer by layer, and the repair of what can be mended.

    check            runs all layers over a cache directory and its backends
    lmdb_layer       1: the LMDB file, and every row by itself
    namespace_layer  2: inodes, entries, cookies, links, orphans (checked only)
    extents_layer    3: extents, packs' rows, counts; `pages`: local bytes and states
    packs_layer      4: shards on backends; `copies_layer`: superblock, identity, owner, heads
    mends            changes of local rows, applied in whole transactions
    report           findings, JSON, exit codes as fsck(8)
"""
