"""Strict reading of msgpack: hostile bytes give `Corrupt`, never anything else.

Records are arrays whose first element is the record's schema number.  Arrays are shorter than
maps, have one encoding only, and leave no field unchecked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

from qsfs.errors import Corrupt, FormatMismatch, QsfsBug
from qsfs.format.units import Buffer

U16 = 2**16 - 1
U32 = 2**32 - 1
U64 = 2**64 - 1


def pack(value: object) -> bytes:
    """The msgpack encoding, with strings and bytes kept apart.

    `QsfsBug` for a value that it cannot express: integers beyond 64 bits, strings that are not Unicode.
    """
    try:
        encoded: bytes = msgpack.packb(value, use_bin_type=True)
    except (ValueError, TypeError, OverflowError) as error:
        raise QsfsBug(f"a value cannot be encoded: {error}") from error
    return encoded


def unpack(data: Buffer, what: str) -> object:
    """The one msgpack object that `data` is; `Corrupt` if it is none, or has more behind it."""
    try:
        value: object = msgpack.unpackb(data, raw=False, use_list=True, strict_map_key=True)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise Corrupt(f"{what}: is not valid msgpack ({type(error).__name__})") from None
    return value


def record(data: Buffer, schema: int, length: int, what: str) -> Fields:
    """The fields of a record with this schema number and this many elements.

    `FormatMismatch` if its schema number is higher: a newer qsfs wrote it.
    """
    return record_of(data, {schema: length}, what)


def record_of(data: Buffer, lengths: Mapping[int, int], what: str) -> Fields:
    """The fields of a record with one of these schema numbers, each with its number of elements.

    `FormatMismatch` if its schema number is higher than all of them: a newer qsfs wrote it.
    """
    value = unpack(data, what)
    number = value[0] if type(value) is list and value else None
    if type(number) is int and number > max(lengths):
        raise FormatMismatch(f"{what}: has schema {number}, this qsfs reads {max(lengths)}; use a newer qsfs")
    known = number if type(number) is int and number in lengths else max(lengths)
    fields = Fields(value, lengths[known], what)
    fields.integer(known, known)
    return fields


class Fields:
    """Takes the elements of one array in order, each with its type and range checked.

    Every method raises `Corrupt` for an element that is not what it asks for.
    """

    def __init__(self, value: object, length: int, what: str) -> None:
        if type(value) is not list or len(value) != length:
            raise Corrupt(f"{what}: expected an array of {length} elements")
        self._values: list[Any] = value
        self._next = 0
        self._what = what

    @property
    def complete(self) -> bool:
        """Whether every element was taken."""
        return self._next == len(self._values)

    def any(self) -> object:
        """The next element, unchecked."""
        value: object = self._values[self._next]
        self._next += 1
        return value

    def integer(self, least: int = 0, most: int = U64) -> int:
        """An integer from `least` to `most`."""
        value = self.any()
        if type(value) is not int or not least <= value <= most:
            raise self.bad(f"an integer from {least} to {most}")
        return value

    def binary(self, length: int | None = None) -> bytes:
        """Bytes, of exactly `length` if given."""
        value = self.any()
        if type(value) is not bytes or (length is not None and len(value) != length):
            raise self.bad("bytes" if length is None else f"{length} bytes")
        return value

    def text(self, most: int = 1024) -> str:
        """A string of at most `most` characters."""
        value = self.any()
        if type(value) is not str or len(value) > most:
            raise self.bad(f"a string of at most {most} characters")
        return value

    def array(self) -> list[object]:
        """An array of anything."""
        value = self.any()
        if type(value) is not list:
            raise self.bad("an array")
        return value

    def mapping(self) -> dict[str, object]:
        """A map whose keys are strings."""
        value = self.any()
        if type(value) is not dict or not all(type(key) is str for key in value):
            raise self.bad("a map with strings as keys")
        return value

    def bad(self, expected: str) -> Corrupt:
        """The error for the element taken last."""
        return Corrupt(f"{self._what}: element {self._next - 1} is not {expected}")
