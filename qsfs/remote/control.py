"""Reading the owner records and heads of one backend.

Their keys hold owner, generation and digest, so listing the keys says what a backend claims; a
claim counts once the value authenticates, here or anywhere before (a key has one right value).
Claims are opened from the largest down, as far as decisions need them.

Where heads have a namespace of their own the listing is a whole SCAN.  Where they share the
data's namespace it goes on from where the last listing of this mount ended (`ControlIndex`): a 0-db
appends, so what was stored since the last listing is found behind the cursor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass, replace

from qsfs.backend.contract import Session
from qsfs.errors import BackendRefused, BackendUnavailable, Corrupt, NotFound, QsfsError
from qsfs.format.head import (
    Head,
    HeadRef,
    Owner,
    OwnerRecord,
    SealedHead,
    head_key,
    open_head,
    parse_head_key,
)
from qsfs.format.keys import KeyRing
from qsfs.format.owner import open_owner_record, owner_key, parse_owner_key

MAX_CLAIMS = 100_000
"""Owner records and heads that one backend may list; one that lists more is not believed."""
MAX_UNPROVEN = 32
"""Claims above the newest proven one that are opened in vain before a backend is given up."""

_HEADS_IN_MEMORY = 8


class ControlIndex:
    """What is known of the control keys in a namespace that also holds shards.

    `cursor` is where the next listing goes on; `keys` are the control keys met so far.  Both
    may be lost at any time: then the next listing reads the whole namespace.
    """

    def __init__(self, cursor: bytes | None = None, keys: Iterable[bytes] = ()) -> None:
        self.cursor = cursor
        self.keys = set(keys)

    def reset(self) -> None:
        """Forgets everything: the namespace is not the one that the cursor came from."""
        self.cursor = None
        self.keys.clear()


@dataclass(frozen=True, slots=True)
class Listing:
    """The owner records and heads whose keys a backend lists: claims, not yet proven."""

    owners: frozenset[Owner]
    heads: frozenset[HeadRef]


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """What is remembered of every head that authenticated: which heads it descends from by name."""

    ref: HeadRef
    time_ns: int
    predecessor: HeadRef | None
    kept: frozenset[HeadRef]


@dataclass(frozen=True, slots=True)
class Reading:
    """What one backend holds, read whole over one connection.

    `owners`: the largest owner record that authenticates, if any.  `heads`: the newest head that
    does, and all others of its owner.  `unproven`: claims above those, or heads of the newest
    owner, that did not authenticate (rot, lies, a value that is gone, a master key that we do not
    hold), each with the reason.  `listing`: all that it claims.
    """

    number: int
    owners: frozenset[Owner]
    heads: frozenset[HeadRef]
    unproven: tuple[tuple[Owner | HeadRef, str], ...] = ()
    listing: Listing = Listing(frozenset(), frozenset())

    def without(self, rejected: Set[HeadRef]) -> Reading:
        """This reading as if the heads `rejected` were not there; `listing` still claims them."""
        if not rejected:
            return self
        unproven = tuple(claim for claim in self.unproven if claim[0] not in rejected)
        return replace(self, heads=self.heads - rejected, unproven=unproven)


class Records:
    """The owner records and heads that have authenticated, whichever backend they came from."""

    def __init__(self, keys: KeyRing) -> None:
        self.keys = keys
        self._owners: dict[Owner, OwnerRecord] = {}
        self._facts: dict[HeadRef, HeadFacts] = {}
        self._heads: OrderedDict[HeadRef, Head] = OrderedDict()

    @property
    def fsid(self) -> bytes:
        """The file system whose records these are."""
        return self.keys.fsid

    def learn(self, sealed: SealedHead, head: Head) -> None:
        """Takes a head that this process sealed itself, so that it is never fetched to be believed."""
        self._remember(sealed.ref, head)

    def record(self, owner: Owner) -> OwnerRecord | None:
        """The record of `owner`, if it has been read."""
        return self._owners.get(owner)

    def host(self, owner: Owner) -> str:
        """Where `owner` ran; "" if its record has not been read."""
        record = self._owners.get(owner)
        return "" if record is None else record.host

    def facts(self, ref: HeadRef) -> HeadFacts | None:
        """What is known of a head that authenticated."""
        return self._facts.get(ref)

    def held(self, ref: HeadRef) -> Head | None:
        """A head that is still in memory: always the one that was read or sealed last."""
        return self._heads.get(ref)

    def prune(self, keep: Set[HeadRef]) -> None:
        """Forgets all heads but `keep`; they are read again where they are met again."""
        self._facts = {ref: facts for ref, facts in self._facts.items() if ref in keep}
        for ref in [ref for ref in self._heads if ref not in keep]:
            del self._heads[ref]

    async def owner(self, session: Session, owner: Owner) -> OwnerRecord:
        """The record of `owner`; `NotFound` or `Corrupt` where `session` has to be asked and has none."""
        if owner not in self._owners:
            key = owner_key(self.fsid, owner)
            value = await _value(session, key)
            self._owners[owner] = open_owner_record(key, value, self.keys)
        return self._owners[owner]

    async def prove(self, session: Session, ref: HeadRef) -> HeadFacts:
        """What is known of head `ref`; `NotFound` or `Corrupt` where `session` has to be asked and has "
        "none."""
        if ref not in self._facts:
            await self.head(session, ref)
        return self._facts[ref]

    async def head(self, session: Session, ref: HeadRef) -> Head:
        """Head `ref` itself; as `prove`."""
        if ref not in self._heads:
            key = head_key(self.fsid, ref)
            self._remember(ref, open_head(key, await _value(session, key), self.keys))
        self._heads.move_to_end(ref)
        return self._heads[ref]

    def _remember(self, ref: HeadRef, head: Head) -> None:
        kept = frozenset(kept.head for kept in head.kept)
        self._facts[ref] = HeadFacts(ref, head.time_ns, head.predecessor, kept)
        self._heads[ref] = head
        while len(self._heads) > _HEADS_IN_MEMORY:
            self._heads.popitem(last=False)


async def list_control(
    session: Session, fsid: bytes, index: ControlIndex | None, *, newest_first: bool = False
) -> Listing:
    """The control keys that `session` lists now.

    With an index only what was stored behind its cursor is listed; the index is brought up to date
    page by page, so that a listing that breaks off goes on where it was.  Without one, or
    `newest_first` (by RSCAN, for a restore), the whole namespace is listed and the index is left
    alone.  A whole listing does not stop early: a head stored again by repair lies behind newer ones.
    """
    if index is None or newest_first:
        return _claims(await _list_whole(session, fsid, newest_first=newest_first))
    while True:
        try:
            page = await session.scan(index.cursor)
        except BackendRefused:
            if index.cursor is None:
                raise
            index.reset()
            continue
        if page.cursor is None:
            return _claims(index.keys)
        index.keys.update(entry.key for entry in page.entries if _is_control(entry.key, fsid))
        _refuse_too_many(session, index.keys)
        index.cursor = page.cursor


async def read_control(
    session: Session,
    number: int,
    records: Records,
    index: ControlIndex | None = None,
    *,
    newest_first: bool = False,
    written: bytes | None = None,
) -> Reading:
    """Lists and opens what the backend with this `number` holds, all over `session`.

    `written` is a key that it acknowledged before: one that does not list it is not believed.
    Raises what the calls of a session raise, and `FormatMismatch` for an authentic record of a
    newer version: this qsfs must decide nothing next to one.
    """
    for last in (False, False, True):
        listing = await list_control(session, records.fsid, index, newest_first=newest_first)
        if written is not None and not _lists(listing, written):
            if index is not None:
                index.reset()
            raise BackendUnavailable(f"backend {session.name}: acknowledged a record and does not list it")
        reader = _Reader(session, records, index)
        reading = await reader.read(number, listing)
        # What is superseded meanwhile is deleted: the listing was too old, and there is something newer.
        if last or not reader.outdated:
            break
    return reading


class _Reader:
    """Opens claims over one session and remembers those that did not authenticate.

    `outdated`: a claim above all proven ones was gone when its value was asked for.
    """

    def __init__(self, session: Session, records: Records, index: ControlIndex | None) -> None:
        self._session = session
        self._records = records
        self._index = index
        self.outdated = False
        self._unproven: list[tuple[Owner | HeadRef, str]] = []

    async def read(self, number: int, listing: Listing) -> Reading:
        """Opens what `listing` claims, from the newest down."""
        owners: set[Owner] = set()
        for owner in sorted(listing.owners, reverse=True):
            if await self._proves_owner(owner):
                owners.add(owner)
                break
        heads: set[HeadRef] = set()
        newest: HeadRef | None = None
        for ref in sorted(listing.heads, reverse=True):
            if newest is not None and ref.owner != newest.owner:
                break
            if await self._proves_head(ref, above=newest is None):
                newest = newest or ref
                heads.add(ref)
        return Reading(number, frozenset(owners), frozenset(heads), tuple(self._unproven), listing)

    async def _proves_owner(self, owner: Owner) -> bool:
        try:
            await self._records.owner(self._session, owner)
        except (NotFound, Corrupt) as error:
            self._reject(owner, owner_key(self._records.fsid, owner), error, above=True)
            return False
        return True

    async def _proves_head(self, ref: HeadRef, *, above: bool) -> bool:
        try:
            await self._records.prove(self._session, ref)
        except (NotFound, Corrupt) as error:
            self._reject(ref, head_key(self._records.fsid, ref), error, above=above)
            return False
        return True

    def _reject(self, claim: Owner | HeadRef, key: bytes, error: QsfsError, *, above: bool) -> None:
        if isinstance(error, NotFound):
            self.outdated |= above
            if self._index is not None:
                self._index.keys.discard(key)
        self._unproven.append((claim, str(error)))
        if len(self._unproven) > MAX_UNPROVEN:
            raise BackendUnavailable(
                f"backend {self._session.name}: more than {MAX_UNPROVEN} of the newest records that it lists "
                f"do not authenticate, the last because: {error}"
            )


async def _list_whole(session: Session, fsid: bytes, *, newest_first: bool) -> set[bytes]:
    keys: set[bytes] = set()
    cursor: bytes | None = None
    while True:
        page = await (session.rscan(cursor) if newest_first else session.scan(cursor))
        if page.cursor is None:
            return keys
        keys.update(entry.key for entry in page.entries if _is_control(entry.key, fsid))
        _refuse_too_many(session, keys)
        cursor = page.cursor


async def _value(session: Session, key: bytes) -> bytes:
    value = await session.get(key)
    if value is None:
        raise NotFound(f"backend {session.name}: lists key {key.hex()} and has no value for it")
    return value


def _is_control(key: bytes, fsid: bytes) -> bool:
    named = parse_owner_key(key) or parse_head_key(key)
    return named is not None and named.fsid == fsid


def _refuse_too_many(session: Session, keys: Collection[bytes]) -> None:
    if len(keys) > MAX_CLAIMS:
        raise BackendUnavailable(
            f"backend {session.name}: lists more than {MAX_CLAIMS} heads and owner records"
        )


def _claims(keys: Collection[bytes]) -> Listing:
    owners = (parse_owner_key(key) for key in keys)
    heads = (parse_head_key(key) for key in keys)
    return Listing(
        frozenset(named.owner for named in owners if named is not None),
        frozenset(named.ref for named in heads if named is not None),
    )


def _lists(listing: Listing, key: bytes) -> bool:
    owner, head = parse_owner_key(key), parse_head_key(key)
    return (owner is not None and owner.owner in listing.owners) or (
        head is not None and head.ref in listing.heads
    )
