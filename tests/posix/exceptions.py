"""What a local file system passes and qsfs does not, and what the local ones cannot show: (kind, case) to reason.

A case listed here must fail there: what comes to pass leaves the list.  docs/posix.md says the same to users.
"""

from __future__ import annotations

_NOT_PASSED_ON = "pyfuse3 hands this request to no file system; the kernel answers EOPNOTSUPP"
_CACHED = "nobody hears of a read from the kernel's cache"

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("qsfs", "test_files.test_unnamed_files"): _NOT_PASSED_ON,
    ("qsfs", "test_files.test_fallocate"): _NOT_PASSED_ON,
    ("qsfs", "test_times.test_allocating_marks_ctime"): _NOT_PASSED_ON,
    ("qsfs", "test_files.test_holes_are_found_by_seeking"): (
        "pyfuse3 hands lseek to no file system; the kernel shows a file as data up to its end"
    ),
    ("qsfs", "test_times.test_reading_what_changed_since_it_was_opened_marks_atime"): _CACHED,
    ("qsfs", "test_times.test_reading_a_large_file_that_was_just_written_marks_atime"): _CACHED,
    ("qsfs", "test_times.test_truncating_to_the_same_size"): (
        "with a writeback cache the kernel keeps the times itself, and does not mark them here"
    ),
    ("qsfs", "test_times.test_times_after_2262"): "times are kept as nanoseconds in 64 bits: years 1677 to 2262",
    ("disk", "test_files.test_a_file_may_have_8_eib_less_one_byte"): "ext4 ends at 16 TiB",
    ("tmpfs", "test_mapped.test_bytes_behind_the_end_are_not_kept"): "tmpfs keeps them",
}
