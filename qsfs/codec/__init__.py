"""The codec on its own: any file to n sealed shard files and back from any k of them.

No file system, configuration or backend takes part.  `qsfs.format.archive` describes the bytes.

    files    temporary names until everything is there; never over what exists
    encode   a stream to shard files
    survey   which archive some files belong to, and what is wrong with each
    decode   shard files to the stream again
    bench    what it costs on this machine
"""
