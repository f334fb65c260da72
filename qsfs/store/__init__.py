"""The local store: one LMDB environment under transaction groups and a journal.

`schema` documents every table and row; `environment` opens LMDB; `overlay` and `group` hold what
is not committed yet; `blocks`, `extents` and `inodes` are the views that the file system works
on; `journal` makes an fsync cost one append; `store` ties them together.
"""
