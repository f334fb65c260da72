"""The secret of a key file as lines that a person can type: each line has a checksum of its own.

A line is `N: XXXX-XXXX-XXXX-XXXX`: 8 bytes of the secret in 13 characters, then 3 of checksum, which
also binds the line's number.  A fifth line is a checksum of the whole.  The alphabet is Crockford's
base32: no case, `O` reads as 0, `I` and `L` as 1, so what looks alike is alike.
"""

from __future__ import annotations

import re

from blake3 import blake3

from qsfs.errors import KeyFileError
from qsfs.format.keys import SECRET_SIZE

SECRET_LINES = 4
LINES = SECRET_LINES + 1

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_READ = str.maketrans("OIL", "011")
_STEP = SECRET_SIZE // SECRET_LINES
_DATA, _CHECK = 13, 3
_LINE_CHECK = "qsfs 1 sheet line"
_WHOLE_CHECK = "qsfs 1 sheet whole"
_NUMBERED = re.compile(r"\s*([0-9]+)\s*:\s*(.*?)\s*")


def sheet_lines(secret: bytes) -> list[str]:
    """The five lines of a secret."""
    lines = [
        _line(number, secret[(number - 1) * _STEP : number * _STEP]) for number in range(1, SECRET_LINES + 1)
    ]
    return [*lines, _line(LINES, _whole(secret))]


def parse_line(text: str, expected: int | None = None) -> tuple[int, bytes]:
    """Number and 8 bytes of one typed line; `KeyFileError` names the line, and shows nothing of it.

    `expected` is the number of a line that may be typed without one.
    """
    found = _NUMBERED.fullmatch(text)
    if found:
        number, body = int(found.group(1)), found.group(2)
    elif expected is not None:
        number, body = expected, text
    else:
        raise KeyFileError("a line of a recovery sheet begins with its number and a colon, as '1:'")
    if not 1 <= number <= LINES or (expected is not None and number != expected):
        raise KeyFileError(f"this is line {number} of a sheet, and line {expected or f'1 to {LINES}'} is wanted")
    digits = re.sub(r"[\s-]", "", body).upper().translate(_READ)
    wrong = next((place for place, digit in enumerate(digits, 1) if digit not in _ALPHABET), None)
    if wrong is not None:
        raise KeyFileError(f"line {number}: character {wrong} is none that a sheet has (it has no U)")
    if len(digits) != _DATA + _CHECK:
        raise KeyFileError(f"line {number}: has {len(digits)} characters instead of {_DATA + _CHECK}")
    value = _number(digits[:_DATA])
    if value >= 1 << (8 * _STEP) or digits[_DATA:] != _check(number, value.to_bytes(_STEP, "big")):
        raise KeyFileError(f"line {number}: has a typing error: its last {_CHECK} characters do not fit the others")
    return number, value.to_bytes(_STEP, "big")


def join_lines(parts: dict[int, bytes]) -> bytes:
    """The secret of all lines by number; `KeyFileError` if one is missing or they do not belong together."""
    missing = [str(number) for number in range(1, LINES + 1) if number not in parts]
    if missing:
        raise KeyFileError(f"the sheet lacks line {', '.join(missing)}")
    secret = b"".join(parts[number] for number in range(1, SECRET_LINES + 1))
    if parts[LINES] != _whole(secret):
        raise KeyFileError("each line is right by itself, but they do not belong together: lines of two sheets?")
    return secret


def parse_sheet(text: str) -> bytes:
    """The secret of a sheet's text, whole or only its five lines; other lines do not count.

    Raises `KeyFileError` with every line that is wrong.
    """
    parts: dict[int, bytes] = {}
    errors: list[str] = []
    for line in text.splitlines():
        found = _NUMBERED.fullmatch(line)
        if found is None or not 1 <= int(found.group(1)[:3]) <= LINES or len(found.group(1)) > 1:
            continue
        try:
            number, value = parse_line(line)
        except KeyFileError as error:
            errors.append(str(error))
            continue
        if parts.setdefault(number, value) != value:
            errors.append(f"line {number}: is there twice, with different contents")
    if errors:
        raise KeyFileError("; ".join(dict.fromkeys(errors)))
    return join_lines(parts)


def _line(number: int, value: bytes) -> str:
    digits = _digits(int.from_bytes(value, "big"), _DATA) + _check(number, value)
    return f"{number}: " + "-".join(digits[place : place + 4] for place in range(0, len(digits), 4))


def _whole(secret: bytes) -> bytes:
    return blake3(secret, derive_key_context=_WHOLE_CHECK).digest(length=_STEP)


def _check(number: int, value: bytes) -> str:
    digest = blake3(bytes([number]) + value, derive_key_context=_LINE_CHECK).digest(length=2)
    return _digits(int.from_bytes(digest, "big") >> 1, _CHECK)


def _digits(value: int, count: int) -> str:
    return "".join(_ALPHABET[(value >> (5 * place)) & 31] for place in reversed(range(count)))


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value << 5 | _ALPHABET.index(digit)
    return value
