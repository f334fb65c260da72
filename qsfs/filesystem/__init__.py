"""The file system without FUSE and without network: namespace, attributes, contents, policies.

Every operation is synchronous and runs on one thread.  An operation that cannot go on raises a
`Need` (module `needs`) before it has changed anything; whoever called it satisfies the need and
calls again.
"""
