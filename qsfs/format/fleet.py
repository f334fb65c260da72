"""The fleet: the numbered list of all backends."""

from __future__ import annotations

from dataclasses import dataclass

from qsfs.errors import Corrupt
from qsfs.format import schema
from qsfs.format.units import ID_SIZE

ACTIVE = "active"
"""`FleetEntry.state` of a backend that takes new shards."""
DRAINING = "draining"
"""`FleetEntry.state` of a backend that is being emptied: it is read, and takes nothing new."""


@dataclass(frozen=True, slots=True)
class FleetEntry:
    """One backend.  `number` is never used again in this file system; placements name it.

    `identity` is what the backend carries; `control_namespace` holds heads and owner records, empty
    for the same namespace; `group` and `node` say what fails together; `state` is the wanted one.
    Passwords are not part of it.
    """

    number: int
    identity: bytes
    address: str
    namespace: str
    control_namespace: str
    group: str
    node: str
    weight: int
    state: str


@dataclass(frozen=True, slots=True)
class Fleet:
    """The backends of one fleet, in ascending order of their numbers."""

    number: int
    entries: tuple[FleetEntry, ...]

    def entry(self, number: int) -> FleetEntry | None:
        """The entry with this number, or None."""
        return next((entry for entry in self.entries if entry.number == number), None)

    @property
    def draining(self) -> frozenset[int]:
        """The numbers of the backends that are being emptied."""
        return frozenset(entry.number for entry in self.entries if entry.state == DRAINING)


def pack_fleet(fleet: Fleet) -> list[object]:
    """The elements of a fleet inside a head."""
    return [fleet.number, [_pack_entry(entry) for entry in fleet.entries]]


def take_fleet(value: object, what: str) -> Fleet:
    """Reads what `pack_fleet` wrote; `Corrupt` if it is anything else."""
    fields = schema.Fields(value, 2, what)
    number = fields.integer(0, schema.U32)
    entries = tuple(_take_entry(item, what) for item in fields.array())
    numbers = [entry.number for entry in entries]
    if sorted(set(numbers)) != numbers:
        raise Corrupt(f"{what}: the entries of fleet {number} are not in order of their numbers")
    return Fleet(number, entries)


def _pack_entry(entry: FleetEntry) -> list[object]:
    return [
        entry.number,
        entry.identity,
        entry.address,
        entry.namespace,
        entry.control_namespace,
        entry.group,
        entry.node,
        entry.weight,
        entry.state,
    ]


def _take_entry(value: object, what: str) -> FleetEntry:
    fields = schema.Fields(value, 9, what)
    return FleetEntry(
        number=fields.integer(0, schema.U16),
        identity=fields.binary(ID_SIZE),
        address=fields.text(),
        namespace=fields.text(),
        control_namespace=fields.text(),
        group=fields.text(),
        node=fields.text(),
        weight=fields.integer(0, schema.U32),
        state=fields.text(32),
    )
