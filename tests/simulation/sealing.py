"""Remembers under which key and nonce a whole history sealed what: one pair never seals two plaintexts."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from qsfs.format import keys


class Seals:
    """All uses of (key, nonce) so far."""

    def __init__(self) -> None:
        self.uses: dict[bytes, bytes] = {}
        self.repeated = 0

    def note(self, key: bytes, nonce: bytes, data: bytes, aad: bytes | None) -> None:
        """One more use; fails for a second plaintext."""
        digest = hashlib.blake2b(len(data).to_bytes(8, "big") + data + (aad or b""), digest_size=16).digest()
        before = self.uses.setdefault(key + nonce, digest)
        assert before == digest, "one key and nonce sealed two plaintexts"
        self.repeated += before is not digest


@contextlib.contextmanager
def recorded(before: Mapping[bytes, bytes] | None = None) -> Iterator[Seals]:
    """Records what is sealed in the block; `before` are uses from before that."""
    seals = Seals()
    seals.uses.update(before or {})

    class Recorder:
        def __init__(self, key: bytes) -> None:
            self._key = bytes(key)
            self._cipher = AESGCM(key)

        def encrypt(self, nonce: bytes, data: bytes, aad: bytes | None) -> bytes:
            seals.note(self._key, bytes(nonce), bytes(data), aad)
            return self._cipher.encrypt(nonce, data, aad)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._cipher, name)

    with mock.patch.object(keys, "AESGCM", Recorder):
        yield seals
