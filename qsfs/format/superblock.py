"""The superblock: a file system's parameters and key slots, at one key for all file systems.

The value, integers big-endian:

    magic, version, kind 7, zero     4, 2, 1, 1
    file system id                   16
    public length, sealed length     4, 4
    public part                      msgpack: the key slots
    sealed part                      a sealed value (see `seal`): parameters, digest of the public part
    checksum                         32  plain BLAKE3 of everything before it

The checksum tells rot from a wrong key file; the seal is what authenticates.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass, replace
from types import MappingProxyType

from blake3 import blake3

from qsfs.clock import Clock
from qsfs.errors import Corrupt, FormatMismatch, KeyFileError, LimitExceeded
from qsfs.format import schema
from qsfs.format.erasure import CodeParams
from qsfs.format.keys import (
    NONCE_SIZE,
    SECRET_SIZE,
    KeyRing,
    KeySlot,
    MasterKey,
    SlotParams,
)
from qsfs.format.passphrase import KdfCost
from qsfs.format.seal import open_sealed, require_readable, seal
from qsfs.format.slots import Secret, masters_of, name_of, wrap
from qsfs.format.units import (
    DEFAULT_BLOCK,
    FORMAT_VERSION,
    FSID_SIZE,
    KEY_PREFIX,
    MAGIC,
    MAX_VALUE,
    PAGE,
    Buffer,
    ObjectKind,
    Preamble,
)

SUPERBLOCK_KEY = KEY_PREFIX + b"superblock"
"""Where the superblock lies on every backend."""

_HEADER = struct.Struct(">4sHBB16sII")
_CHECKSUM_SIZE = 32
_SCHEMA = 1
_WHAT = "superblock"


@dataclass(frozen=True, slots=True)
class Superblock:
    """What must be known before anything else can be read.

    `revision` counts up whenever slots or parameters are replaced: of several superblocks that open,
    the one with the highest is right.
    """

    fsid: bytes
    format_version: int
    code: CodeParams
    block_size: int
    slots: tuple[KeySlot, ...]
    created_ns: int
    label: str
    revision: int = 1


def create_superblock(
    secret: Secret,
    *,
    code: CodeParams,
    clock: Clock,
    block_size: int = DEFAULT_BLOCK,
    label: str = "",
    cost: KdfCost | None = None,
) -> tuple[Superblock, KeyRing]:
    """A new file system with master key 1, wrapped in slot 1 under `secret`; `cost` is of a passphrase."""
    fsid = clock.random_bytes(FSID_SIZE)
    master = MasterKey(1, clock.random_bytes(SECRET_SIZE))
    keys = KeyRing(fsid, [master])
    slots = wrap(secret, keys, slot_number=1, clock=clock, cost=cost)
    return Superblock(fsid, FORMAT_VERSION, code, block_size, slots, clock.time_ns(), label), keys


def encode_superblock(superblock: Superblock, keys: KeyRing, clock: Clock) -> bytes:
    """The value of a superblock, sealed under the current master key."""
    public = schema.pack([_SCHEMA, [_pack_slot(slot) for slot in superblock.slots]])
    plaintext = schema.pack(
        [
            _SCHEMA,
            superblock.code.k,
            superblock.code.n,
            superblock.code.codec,
            superblock.block_size,
            superblock.created_ns,
            superblock.label,
            superblock.revision,
            blake3(public).digest(),
        ]
    )
    sealed = seal(ObjectKind.SUPERBLOCK, plaintext, keys, clock)
    header = _HEADER.pack(
        MAGIC, FORMAT_VERSION, ObjectKind.SUPERBLOCK, 0, keys.fsid, len(public), len(sealed)
    )
    value = header + public + sealed
    if len(value) + _CHECKSUM_SIZE > MAX_VALUE:
        raise LimitExceeded(f"a superblock with {len(superblock.slots)} key slots is too large")
    require_readable(superblock, lambda: _read(keys.fsid, public, sealed, keys), "a superblock")
    return value + blake3(value).digest()


def superblock_fsid(value: Buffer) -> bytes:
    """The file system id of a superblock, without its key.

    `Corrupt` if it rotted, `FormatMismatch` if it is something else or newer.
    """
    return _split(value)[0]


def is_whole(value: Buffer, fsid: bytes) -> bool:
    """Whether a superblock of this file system did not rot, whoever wrote it: its checksum fits.

    What is whole and does not authenticate under the keys at hand may be sealed under others.
    """
    try:
        return superblock_fsid(value) == fsid
    except (Corrupt, FormatMismatch):
        return False


def open_superblock(value: Buffer, secret: Secret) -> tuple[Superblock, KeyRing]:
    """The superblock, and the key ring that a secret opens.

    `FormatMismatch` for something else or a newer version, `Corrupt` if it rotted or was tampered
    with, `KeyFileError` if the secret opens no slot, or only slots of master keys since replaced.
    With a passphrase it takes as long as the slots' costs, which are bounded, say.
    """
    fsid, public, sealed = _split(value)
    keys = KeyRing(fsid, _unwrap(_take_slots(public), secret, fsid))
    number = Preamble.decode(sealed, _WHAT).key_number
    if number not in keys.numbers:
        raise KeyFileError(
            f"the {name_of(secret)} opens master keys {keys.numbers} of {fsid.hex()}, but {number} is in use: "
            f"its slot was removed; use the present {name_of(secret)}"
        )
    return _read(fsid, public, sealed, keys), keys


def read_superblock(value: Buffer, keys: KeyRing) -> Superblock:
    """The superblock by master keys that are held already: also one whose slots our secret does not open.

    Raises as `open_superblock`; `KeyFileError` if it says that it is sealed under a master key newer than
    all that are held: whether that is so cannot be known.
    """
    fsid, public, sealed = _split(value)
    if fsid != keys.fsid:
        raise FormatMismatch(f"superblock: is of file system {fsid.hex()}, not of {keys.fsid.hex()}")
    number = Preamble.decode(sealed, _WHAT).key_number
    if number > keys.current.number:
        raise KeyFileError(
            f"the superblock is sealed under master key {number}, the newest known here is {keys.current.number}: "
            "the master key was rotated"
        )
    return _read(fsid, public, sealed, keys)


def slots_of(value: Buffer) -> tuple[KeySlot, ...]:
    """The key slots of a superblock, which nothing authenticates; raises as `superblock_fsid`."""
    return _take_slots(_split(value)[1])


def replace_slots(superblock: Superblock, slots: tuple[KeySlot, ...]) -> Superblock:
    """The next revision, with other key slots."""
    return replace(superblock, slots=slots, revision=superblock.revision + 1)


def _read(fsid: bytes, public: bytes, sealed: bytes, keys: KeyRing) -> Superblock:
    fields = schema.record(open_sealed(ObjectKind.SUPERBLOCK, sealed, keys, _WHAT), _SCHEMA, 9, _WHAT)
    code = CodeParams(fields.integer(1, 256), fields.integer(1, 256), fields.text())
    superblock = Superblock(
        fsid=fsid,
        format_version=FORMAT_VERSION,
        code=code,
        block_size=fields.integer(PAGE, schema.U32),
        slots=_take_slots(public),
        created_ns=fields.integer(),
        label=fields.text(),
        revision=fields.integer(),
    )
    if not hmac.compare_digest(fields.binary(_CHECKSUM_SIZE), blake3(public).digest()):
        raise Corrupt("superblock: its key slots are not those that it was sealed with")
    if superblock.block_size % PAGE:
        raise Corrupt(f"superblock: a block of {superblock.block_size} bytes is not a multiple of {PAGE}")
    return superblock


def _split(value: Buffer) -> tuple[bytes, bytes, bytes]:
    data = bytes(value)
    if data[:4] != MAGIC:
        raise FormatMismatch(f"key {SUPERBLOCK_KEY.decode()} holds something that is not a qsfs superblock")
    body, checksum = data[:-_CHECKSUM_SIZE], data[-_CHECKSUM_SIZE:]
    if len(body) < _HEADER.size or blake3(body).digest() != checksum:
        raise Corrupt("superblock: its checksum does not fit; other backends hold copies")
    _, version, kind, zero, fsid, public_length, sealed_length = _HEADER.unpack_from(data)
    if version != FORMAT_VERSION:
        raise FormatMismatch(
            f"file system {fsid.hex()} has format version {version}, this qsfs reads {FORMAT_VERSION}: "
            "use the qsfs that formatted it"
        )
    end = _HEADER.size + public_length
    if kind != ObjectKind.SUPERBLOCK or zero != 0 or end + sealed_length + _CHECKSUM_SIZE != len(data):
        raise Corrupt("superblock: its header contradicts itself")
    return fsid, data[_HEADER.size : end], data[end : end + sealed_length]


def _unwrap(slots: tuple[KeySlot, ...], secret: Secret, fsid: bytes) -> list[MasterKey]:
    opened, refused = masters_of(slots, secret, fsid)
    masters = {number: master for slot in opened.values() for number, master in slot.items()}
    if not masters:
        kinds = ", ".join(dict.fromkeys(f"{slot.number} ({slot.kind})" for slot in slots)) or "none"
        raise KeyFileError(
            f"the {name_of(secret)} opens no key slot of file system {fsid.hex()}; its slots: {kinds}"
            + "".join(f"; {reason}" for reason in refused)
        )
    return list(masters.values())


def _pack_slot(slot: KeySlot) -> list[object]:
    params = dict(sorted(slot.params.items()))
    return [slot.number, slot.kind, params, slot.master_key_number, slot.nonce, slot.wrapped]


def _take_slots(public: bytes) -> tuple[KeySlot, ...]:
    fields = schema.record(public, _SCHEMA, 2, _WHAT)
    return tuple(_take_slot(item) for item in fields.array())


def _take_slot(value: object) -> KeySlot:
    fields = schema.Fields(value, 6, _WHAT)
    return KeySlot(
        number=fields.integer(0, schema.U32),
        kind=fields.text(64),
        params=_take_params(fields.mapping()),
        master_key_number=fields.integer(1, schema.U32),
        nonce=fields.binary(NONCE_SIZE),
        wrapped=fields.binary(),
    )


def _take_params(values: dict[str, object]) -> SlotParams:
    params: dict[str, int | bytes | str] = {}
    for name, value in values.items():
        if type(value) not in (int, bytes, str):
            raise Corrupt(f"superblock: parameter '{name}' of a key slot is of an unknown type")
        params[name] = value  # type: ignore[assignment]
    return MappingProxyType(params)
