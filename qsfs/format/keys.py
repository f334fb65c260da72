"""Master keys, what is derived from them, the key file that a person keeps, and key slots.

All derivations are HKDF-SHA256 with the file system id as salt.  The info strings begin with
a label that names the use, so no two uses share a key.

A key slot is a master key wrapped under what a person keeps.  It says which master key it holds
and how its wrapping key comes from a secret: that of a key file (kind `keyfile`) or what Argon2id
makes of a passphrase (`argon2id`; see `slots`).  Slots of kinds that this version cannot open are
kept as they are.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from qsfs.clock import Clock
from qsfs.errors import Corrupt, KeyFileError, QsfsBug
from qsfs.format.units import FSID_SIZE

SECRET_SIZE = 32
"""Bytes of a master key, of a key file's secret and of every derived key."""

KEYFILE = "keyfile"
ARGON2ID = "argon2id"
SALT_SIZE = 32
NONCE_SIZE = 12
SLOT_DIGEST = b"qsfs slot digest"

_KEY_FILE_VERSION = "qsfs-key-1"
_KEY_FILE_CHECK = "qsfs 1 key file check"
_MAX_KEY_NUMBER = 2**32 - 1

SlotParams: TypeAlias = Mapping[str, int | bytes | str]


def derive(secret: bytes, fsid: bytes, info: bytes) -> bytes:
    """32 bytes of HKDF-SHA256 with input `secret`, salt `fsid` and `info`."""
    return HKDF(algorithm=SHA256(), length=SECRET_SIZE, salt=fsid, info=info).derive(secret)


@dataclass(frozen=True, slots=True)
class MasterKey:
    """One master key: its number, counting from 1 and never used again, and its 32 secret bytes."""

    number: int
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.number <= _MAX_KEY_NUMBER or len(self.secret) != SECRET_SIZE:
            raise QsfsBug(f"master key {self.number}: the number or the secret's length is out of range")


class KeyRing:
    """The master keys of one file system and the keys derived from them.

    New objects are sealed under the key with the highest number; older ones open what was
    sealed before a rotation.  Safe to share between threads.
    """

    def __init__(self, fsid: bytes, keys: Sequence[MasterKey]) -> None:
        if len(fsid) != FSID_SIZE:
            raise QsfsBug(f"a file system id has {FSID_SIZE} bytes, not {len(fsid)}")
        if not keys:
            raise QsfsBug("a key ring needs at least one master key")
        self._fsid = fsid
        self._keys: Mapping[int, MasterKey] = {key.number: key for key in sorted(keys, key=lambda key: key.number)}
        self._derived = lru_cache(maxsize=64)(self._derive)
        self._ciphers = lru_cache(maxsize=256)(self._cipher)

    def __repr__(self) -> str:
        return f"KeyRing(fsid={self._fsid.hex()}, numbers={self.numbers})"

    @property
    def fsid(self) -> bytes:
        """The file system id, 16 bytes."""
        return self._fsid

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the master keys held, ascending."""
        return tuple(self._keys)

    @property
    def current(self) -> MasterKey:
        """The master key with the highest number: what new objects are sealed under."""
        return self._keys[self.numbers[-1]]

    def get(self, number: int) -> MasterKey:
        """The master key with this number.

        `Corrupt` if none is held: the number came from bytes that this file system did not write,
        or the key ring was opened from a superblock older than the last rotation.
        """
        key = self._keys.get(number)
        if key is None:
            raise Corrupt(f"master key {number} is not one of file system {self._fsid.hex()}: {self.numbers}")
        return key

    def learn(self, keys: Iterable[MasterKey]) -> None:
        """Takes up further master keys, as after a rotation: what is sealed from now on is under the newest.

        `QsfsBug` if one of them is held with another secret: then none is taken.
        """
        held = dict(self._keys)
        for key in keys:
            if held.setdefault(key.number, key) != key:
                raise QsfsBug(f"master key {key.number} of {self._fsid.hex()} has two different secrets")
        # One assignment: other threads see the old keys or all.
        self._keys = dict(sorted(held.items()))

    def digest_key(self, number: int) -> bytes:
        """The BLAKE3 key for digests of plaintexts under master key `number`."""
        return self._derived(number, b"qsfs digest")

    def tag_key(self, number: int) -> bytes:
        """The BLAKE3 key for the tags of shards under master key `number`."""
        return self._derived(number, b"qsfs shard tag")

    def cipher(self, number: int, version: int, kind: int, object_id: bytes, digest: bytes) -> AESGCM:
        """AES-256-GCM under the one key of the object with this id and plaintext digest.

        Equal arguments mean an equal plaintext: `digest` is the keyed digest of everything that the
        object seals.  So a nonce that counts positions inside the object never meets two plaintexts.
        """
        return self._ciphers(number, version, kind, object_id, digest)

    def _derive(self, number: int, label: bytes) -> bytes:
        return derive(self.get(number).secret, self._fsid, label + struct.pack(">I", number))

    def _cipher(self, number: int, version: int, kind: int, object_id: bytes, digest: bytes) -> AESGCM:
        info = b"qsfs object" + struct.pack(">IHB", number, version, kind) + object_id + digest
        return AESGCM(derive(self.get(number).secret, self._fsid, info))


def new_key_file(random: Callable[[int], bytes]) -> str:
    """The text of a new key file with 32 bytes from `random(count)`."""
    return key_file_text(random(SECRET_SIZE))


def key_file_text(secret: bytes) -> str:
    """The text of a key file with these 32 bytes."""
    text = secret.hex()
    groups = " ".join(text[i : i + 8] for i in range(0, len(text), 8))
    return (
        "# The key of a qsfs file system.  Whoever reads it can read the file system;\n"
        "# without it the data on the backends are lost.  Keep copies off this machine.\n"
        f"{_KEY_FILE_VERSION}\n"
        f"secret {groups}\n"
        f"check {_check(secret)}\n"
    )


def parse_key_file(text: str) -> bytes:
    """The 32 secret bytes of a key file; `KeyFileError` says what is wrong with it.

    Empty lines and lines that begin with `#` are skipped, upper case and spaces in the hex digits
    do not matter.  The check value catches every typing error but one in 2**32.
    """
    numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not lines:
        raise KeyFileError("the key file is empty; restore it from a copy")
    version = lines[0][1]
    if version != _KEY_FILE_VERSION:
        kind = "of a newer version" if re.fullmatch(r"qsfs-key-\d+", version) else "not a qsfs key file"
        raise KeyFileError(f"the key file is {kind}: its first line must be '{_KEY_FILE_VERSION}'")
    fields: dict[str, str] = {}
    for number, line in lines[1:]:
        name, _, rest = line.partition(" ")
        if name not in ("secret", "check") or name in fields:
            # Not its text: of a secret that was wrapped it is a part, and messages are logged.
            raise KeyFileError(f"the key file has an unexpected line, number {number}")
        fields[name] = "".join(rest.split()).lower()
    if not re.fullmatch(r"[0-9a-f]{64}", fields.get("secret", "")):
        raise KeyFileError("the key file needs one line 'secret' with 64 hex digits; compare it with a copy")
    secret = bytes.fromhex(fields["secret"])
    if fields.get("check") != _check(secret):
        raise KeyFileError("the key file's check value does not fit its secret: one has a typing error")
    return secret


def _check(secret: bytes) -> str:
    return blake3(secret, derive_key_context=_KEY_FILE_CHECK).hexdigest(length=4)


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One wrapped master key.

    `number` names the slot (one secret of a person), `master_key_number` the master key in it:
    after a rotation one secret has a slot for each master key.  `wrapped` is the master key under
    AES-256-GCM, 48 bytes.
    """

    number: int
    kind: str
    params: SlotParams
    master_key_number: int
    nonce: bytes
    wrapped: bytes


def wrap_key(secret: bytes, master: MasterKey, *, fsid: bytes, slot_number: int, clock: Clock) -> KeySlot:
    """Wraps `master` under a key file's secret.

    The salt is made of random bits and of both secrets, so also a machine whose random numbers
    repeat never wraps two master keys under one wrapping key.
    """
    digest = blake3(master.secret, key=derive(secret, fsid, SLOT_DIGEST)).digest()
    salt = slot_salt(digest, clock)
    return wrap_under(secret, master, KEYFILE, {"salt": salt}, salt, fsid=fsid, slot_number=slot_number)


def slot_salt(digest: bytes, clock: Clock) -> bytes:
    """The salt of a slot, of random bits and a digest of what the slot will hold."""
    return blake3(clock.random_bytes(SALT_SIZE) + digest, derive_key_context="qsfs 1 slot salt").digest()


def wrap_under(
    secret: bytes, master: MasterKey, kind: str, params: SlotParams, salt: bytes, *, fsid: bytes, slot_number: int
) -> KeySlot:
    """`master` under a key derived from 32 secret bytes, numbers and `salt`: equal ones must mean an equal `master`."""
    nonce = bytes(NONCE_SIZE)
    info = _slot_info(slot_number, master.number, salt)
    wrapped = AESGCM(derive(secret, fsid, b"qsfs slot" + info)).encrypt(nonce, master.secret, fsid + info)
    return KeySlot(slot_number, kind, MappingProxyType(dict(params)), master.number, nonce, wrapped)


def wrap_keys(secret: bytes, keys: KeyRing, *, slot_number: int, clock: Clock) -> tuple[KeySlot, ...]:
    """A slot for every master key of `keys` under one secret: for a new key file, and after a rotation."""
    return tuple(
        wrap_key(secret, keys.get(number), fsid=keys.fsid, slot_number=slot_number, clock=clock)
        for number in keys.numbers
    )


def unwrap_key(slot: KeySlot, secret: bytes, *, fsid: bytes) -> MasterKey:
    """The master key in `slot`; `KeyFileError` if this secret does not open it."""
    salt = slot.params.get("salt")
    if slot.kind != KEYFILE or not isinstance(salt, bytes):
        raise KeyFileError(f"key slot {slot.number} of kind '{slot.kind}' does not open with a key file")
    return unwrap_under(slot, secret, salt, fsid=fsid)


def unwrap_under(slot: KeySlot, secret: bytes, salt: bytes, *, fsid: bytes) -> MasterKey:
    """What `wrap_under` wrapped; `KeyFileError` if these 32 secret bytes do not open it."""
    if len(slot.nonce) != NONCE_SIZE:
        raise KeyFileError(f"key slot {slot.number} of {fsid.hex()} has a nonce of a wrong length")
    info = _slot_info(slot.number, slot.master_key_number, salt)
    try:
        cipher = AESGCM(derive(secret, fsid, b"qsfs slot" + info))
        master = cipher.decrypt(slot.nonce, slot.wrapped, fsid + info)
    except InvalidTag:
        raise KeyFileError(f"the secret does not open key slot {slot.number} of {fsid.hex()}") from None
    if len(master) != SECRET_SIZE:
        raise KeyFileError(f"key slot {slot.number} of {fsid.hex()} holds no master key")
    return MasterKey(slot.master_key_number, master)


def _slot_info(slot_number: int, master_key_number: int, salt: bytes) -> bytes:
    return struct.pack(">II", slot_number, master_key_number) + salt
