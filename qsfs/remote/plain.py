"""One error out of a nursery, instead of a group of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qsfs.errors import QsfsError


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raises what ended the nurseries inside as the one error that it is.

    Of several, one of ours comes before any other: those beside it are the rest of the same end.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        raise first_error(group) from None


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that says most: ours, else any other than a cancellation, else that."""
    inner: BaseException = group.subgroup(QsfsError) or group.subgroup(Exception) or group
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    return inner
