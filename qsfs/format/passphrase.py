"""Passphrases: what Argon2id makes of them, at a cost that has bounds.

The parameters of a key slot are read before anything authenticates them: a backend may have forged
them.  So a slot whose cost is absurd is never tried, and one passphrase tries only so many slots.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from qsfs.errors import DependencyMissing, KeyFileError

LEAST_CHARACTERS = 8
MOST_CHARACTERS = 4096
MOST_MEMORY_KIB = 1 << 20
"""The largest memory that a slot may ask for (1 GiB)."""
MOST_WORK_KIB = 4 << 20
"""The largest product of memory and iterations: some 10 s of one core."""
MOST_LANES = 16
MOST_DERIVATIONS = 16
"""So many different slots one passphrase is tried on."""

_KEY_SIZE = 32


@dataclass(frozen=True, slots=True)
class KdfCost:
    """What deriving a key costs: memory in KiB, passes over it, and threads at a time."""

    memory_kib: int = 256 << 10
    iterations: int = 3
    lanes: int = 4

    def refusal(self) -> str | None:
        """Why this cost is never tried, or None."""
        if self.iterations < 1 or not 1 <= self.lanes <= MOST_LANES or self.memory_kib < 8 * self.lanes:
            return (
                f"its Argon2id parameters make no sense ({self.memory_kib} KiB, {self.iterations} iterations, "
                f"{self.lanes} lanes)"
            )
        if self.memory_kib > MOST_MEMORY_KIB or self.memory_kib * self.iterations > MOST_WORK_KIB:
            return (
                f"it asks for {self.memory_kib >> 10} MiB of memory, {self.iterations} times over; at most "
                f"{MOST_MEMORY_KIB >> 10} MiB, and {MOST_WORK_KIB >> 10} MiB in all, are accepted"
            )
        return None


class Passphrase:
    """A passphrase, in Unicode's form NFC, with the keys derived from it so far.

    Not part of any message, log or `repr`.  Safe to use from one thread at a time.
    """

    __slots__ = ("_derived", "_text")

    def __init__(self, text: str) -> None:
        """`KeyFileError` if it is empty or absurdly long."""
        if not text or len(text) > MOST_CHARACTERS:
            raise KeyFileError(f"a passphrase has 1 to {MOST_CHARACTERS} characters, not {len(text)}")
        self._text = unicodedata.normalize("NFC", text).encode("utf-8", "surrogateescape")
        self._derived: dict[tuple[bytes, KdfCost], bytes] = {}

    def __repr__(self) -> str:
        return "Passphrase(...)"

    @property
    def utf8(self) -> bytes:
        """The passphrase itself: to hand it to the daemon."""
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Passphrase) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def derive(self, salt: bytes, cost: KdfCost) -> bytes:
        """32 bytes of Argon2id; takes as long as the cost says, and the second time no time.

        `KeyFileError` for a cost that is refused, too many derivations or too little memory, and
        `DependencyMissing` where the installed cryptography cannot do it.
        """
        known = self._derived.get((salt, cost))
        if known is not None:
            return known
        refusal = cost.refusal()
        if refusal is not None:
            raise KeyFileError(refusal)
        if len(self._derived) >= MOST_DERIVATIONS:
            raise KeyFileError(f"the passphrase was tried on {MOST_DERIVATIONS} slots already, and on no more")
        try:
            key = Argon2id(
                salt=salt,
                length=_KEY_SIZE,
                iterations=cost.iterations,
                lanes=cost.lanes,
                memory_cost=cost.memory_kib,
            ).derive(self._text)
        except UnsupportedAlgorithm:
            raise DependencyMissing(
                "this build of the Python package cryptography has no Argon2id (OpenSSL older than 3.2); install "
                "its wheel with pip, or use a key file"
            ) from None
        except MemoryError:
            raise KeyFileError(f"this machine does not give the {cost.memory_kib >> 10} MiB of memory needed") from None
        self._derived[salt, cost] = key
        return key


def check_new(text: str) -> None:
    """`KeyFileError` for a passphrase that protects nothing: whoever has a backend may guess for years."""
    if len(text) < LEAST_CHARACTERS:
        raise KeyFileError(
            f"a new passphrase needs at least {LEAST_CHARACTERS} characters; several random words are better"
        )
