"""Passphrases: what Argon2id makes of them, at a cost that has bounds.

The parameters of a key slot are read before anything authenticates them: a backend may have forged
them.  So a slot whose cost is absurd is never tried, and a passphrase is tried on only so many slots
until one of them opens.
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
"""So many different slots a passphrase is tried on until one opens, which nobody without it can make.

As many as a file system may have: a passphrase meets no more real ones from one that it opens to the next.
"""

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

    __slots__ = ("_derived", "_in_vain", "_text")

    def __init__(self, text: str) -> None:
        """`KeyFileError` if it is empty or absurdly long."""
        if not text or len(text) > MOST_CHARACTERS:
            raise KeyFileError(f"a passphrase has 1 to {MOST_CHARACTERS} characters, not {len(text)}")
        self._text = unicodedata.normalize("NFC", text).encode("utf-8", "surrogateescape")
        self._derived: dict[tuple[bytes, KdfCost], bytes] = {}
        self._in_vain: set[tuple[bytes, KdfCost]] = set()

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

    @property
    def exhausted(self) -> bool:
        """Whether it was tried on so many slots since one opened that it is tried on no other."""
        return len(self._in_vain) >= MOST_DERIVATIONS

    def refusal(self, salt: bytes, cost: KdfCost) -> str | None:
        """Why it is not tried on a slot with this salt and cost, or None."""
        if (salt, cost) in self._derived:
            return None
        if self.exhausted:
            return f"the passphrase was tried on {MOST_DERIVATIONS} slots that it does not open, and is on no more"
        return cost.refusal()

    def try_on(self, salt: bytes, cost: KdfCost) -> bytes:
        """What it derives for a slot that somebody wrote; `opened` is to be told if that opens it.

        Raises as `derive`, and `KeyFileError` if there is a `refusal`.
        """
        refusal = self.refusal(salt, cost)
        if refusal is not None:
            raise KeyFileError(refusal)
        if (salt, cost) not in self._derived:
            self.derive(salt, cost)
            self._in_vain.add((salt, cost))
        return self._derived[salt, cost]

    def opened(self, salt: bytes, cost: KdfCost) -> None:
        """It opens the slot with this salt and cost; if that is news, as many others may be tried again."""
        if (salt, cost) in self._in_vain:
            self._in_vain.clear()

    def derive(self, salt: bytes, cost: KdfCost) -> bytes:
        """32 bytes of Argon2id, for a slot of ours; takes as long as the cost says, and the second time no time.

        `KeyFileError` for a cost that is refused or too little memory, and `DependencyMissing` where the
        installed cryptography cannot do it.
        """
        known = self._derived.get((salt, cost))
        if known is not None:
            return known
        refusal = cost.refusal()
        if refusal is not None:
            raise KeyFileError(refusal)
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
