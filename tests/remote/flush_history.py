"""A random history of one machine that flushes, with a crash at any failpoint.

The model keeps what the application sees, and a copy of it for every commit.  After each
publication and each crash the newest head alone must give the copy of its cut, and so must the
generation before it; after a crash the store must hold the copy of its last commit.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from qsfs import failpoints
from qsfs.format.head import HeadRef
from qsfs.remote.chain import Merge, Refresh
from qsfs.remote.merge import MergeUpload
from qsfs.remote.metadata import MetadataUpload, RefreshUpload
from qsfs.store.schema import PAGE, InodeFlag
from qsfs.store.snapshot import RowsPart
from tests.remote.flush_machine import Crash, DirectReader, FlushMachine, crash, newest_head, restore
from tests.remote.harness import World

MOST_PAGES = 150

QUIET = (
    "flush.packs.uploaded",
    "test.head.stored",
    "flush.head.sent",
    "flush.record.step",
    "flush.recorded",
    "flush.precopy.written",
    "flush.metadata.uploaded",
    "upload.written",
)
"""Failpoints at which the application goes on, and at which it is safe to commit."""
SEALING = ("flush.cut.pack", "flush.cut.sealed")
"""Failpoints on the worker thread that seals; the application may go on there as well."""
DEADLY = (
    *QUIET,
    *SEALING,
    "test.head.at-one",
    "spool.head.before",
    "spool.head.stored",
    "commit.applied",
    "commit.before",
    "commit.done",
    "flush.precopy.step",
    "flush.precopy.recorded",
    "flush.spool.cleared",
)


@dataclass
class File:
    number: int
    data: bytearray = field(default_factory=bytearray)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    local_only: bool = False

    @property
    def pages(self) -> int:
        return len(self.data) // PAGE


@dataclass
class Model:
    files: dict[str, File] = field(default_factory=dict)
    orphans: dict[int, File] = field(default_factory=dict)

    def visible(self) -> dict[str, bytes]:
        """What a restore shows."""
        return {name: b"" if f.local_only else bytes(f.data) for name, f in self.files.items()}

    def xattrs(self) -> dict[str, dict[bytes, bytes]]:
        return {name: dict(f.xattrs) for name, f in self.files.items()}


class FlushHistory:
    """One run.  `run` alternates mounts and crashes."""

    def __init__(self, world: World, directory: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.world = world
        self.machine = FlushMachine(world, directory, seed=seed)
        self.machine.before_seal = self.remember
        self.model = Model()
        self.commits: dict[int, Model] = {}
        self.cuts: dict[tuple[int, int], Model] = {}
        self.names = 0
        self.trace: list[str] = []
        self.checked = 0
        self.opened_at = 0
        self.machine.opened = self.note_opened

    def note_opened(self) -> None:
        self.opened_at = self.machine.store.layers.committed_number

    def remember(self, number: int) -> None:
        self.commits[number] = copy.deepcopy(self.model)

    async def run(self, mounts: int, steps: int) -> None:
        for _ in range(mounts):
            try:
                async with self.machine.mounted():
                    self.after_mount()
                    self.lie_in_wait()
                    for _ in range(self.random.randrange(1, steps)):
                        await self.step()
                    self.trace.append("power cut")
            except Crash:
                self.trace.append("crash")
            finally:
                failpoints.disarm_all()
            self.check_newest()

    def after_mount(self) -> None:
        """The store holds what was committed last; nothing of what the mount itself does changes it."""
        machine = self.machine
        # The mount itself has committed once before it formatted or owned: what a crash interrupted
        # may have had that number, and is lost.
        number = self.opened_at
        known = max((n for n in self.commits if n < number), default=None)
        if known is None:
            known = max(self.commits)
        self.model = copy.deepcopy(self.commits[known])
        self.commits = {n: m for n, m in self.commits.items() if n <= known}
        for orphan in list(self.model.orphans):
            machine.close_orphan(orphan)
            del self.model.orphans[orphan]
        self.check_local()
        machine.committer.commit_now()

    # what happens at failpoints

    def lie_in_wait(self) -> None:
        r = self.random
        for name in (*QUIET, *SEALING):
            failpoints.arm(name, self.go_on)
        if r.random() < 0.8:
            name = r.choice(DEADLY)
            left = r.choice((1, 1, 2, 3, 6))
            self.trace.append(f"[{name} x{left}]")
            before = self.go_on if name in (*QUIET, *SEALING) else (lambda: None)
            failpoints.arm(name, self.crash_at(left, before))

    def crash_at(self, left: int, otherwise: Callable[[], None]) -> Callable[[], None]:
        def action() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                crash()
            otherwise()

        return action

    def go_on(self) -> None:
        """What the application does while flushing is at this point; sometimes it is committed."""
        r = self.random
        if self.machine.store.layers.committing is not None:
            return
        for _ in range(r.choice((0, 0, 1, 3))):
            self.application()
        if r.random() < 0.3:
            self.machine.committer.commit_now()

    # steps

    async def step(self) -> None:
        r = self.random
        choice = r.random()
        if choice < 0.62:
            self.application()
        elif choice < 0.74:
            self.trace.append("commit")
            self.machine.committer.commit_now()
        elif choice < 0.84:
            self.trace.append("pre-copy")
            await self.machine.precopy(orphans_too=r.random() < 0.5)
        elif choice < 0.95:
            await self.cut()
        elif choice < 0.965:
            await self.early_delta()
        elif choice < 0.98:
            await self.merge()
        else:
            await self.refresh()

    async def cut(self) -> None:
        machine = self.machine
        before = machine.generations.base.sealed.ref
        if self.random.random() < 0.2:
            machine.publisher.reach = self.random.randrange(len(self.world.control) // 2 + 1)
            sealed_later = machine.publisher.attempts

            def back() -> None:
                if machine.publisher.attempts > sealed_later:
                    machine.publisher.reach = len(self.world.control)

            machine.publisher.reach_again = back  # type: ignore[attr-defined]
        self.trace.append("cut")
        order = machine.generations.next_order(64 << 20)
        self.order = order.generation
        await machine.committer.commit()
        renewed = machine.generations.renewed
        sealed = await machine.generations.seal(order)
        if not hasattr(sealed, "commit_number"):
            return
        self.cuts[machine.publisher.owner.epoch, sealed.generation] = copy.deepcopy(
            self.commits[sealed.commit_number]
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.backends_return)
            await machine.generations.publish(sealed, renewed)
            nursery.cancel_scope.cancel()
        assert machine.generations.base.sealed.ref > before
        self.check_newest()

    async def backends_return(self) -> None:
        await trio.sleep(60)
        self.machine.publisher.reach = len(self.world.control)

    async def early_delta(self) -> None:
        machine = self.machine
        self.trace.append("early delta")
        floor, packs = machine.generations.pre_delta or (0, ())
        machine.generations.pre_delta = None
        upload = MetadataUpload(machine.context, floor)
        more = await upload.run()
        machine.generations.pre_delta = (upload.complete_to, (*packs, *more))

    async def refresh(self) -> None:
        """Reads some ranges anew, in small parts, while the application and generations go on."""
        machine, r = self.machine, self.random
        if machine.generations.renewal is not None:
            return
        chain = machine.generations.chain
        first = r.randrange(len(chain.ranges))
        last = r.randrange(first, len(chain.ranges))
        stretches = chain._stretches(range(first, last + 1))
        if r.random() < 0.3:
            stretches = chain._stretches(sorted(r.sample(range(len(chain.ranges)), len(chain.ranges) // 2 + 1)))
        refresh = machine.generations.renewal = Refresh(stretches, r.choice((1, 2, 3, 50)), chain.next_number)
        self.trace.append(f"refresh {first} to {last} of {len(chain.ranges)}")
        upload = RefreshUpload(machine.context, refresh)
        upload.pack_bytes = r.choice((2000, 5000, 20_000))
        reading = upload._read
        count = 0

        async def read(start: bytes, stop: bytes | None, most: int) -> RowsPart:
            nonlocal count
            count += 1
            if count % 3 == 0:
                self.go_on()
            if count % 10 == 0 and r.random() < 0.5:
                await self.cut()
            return await reading(start, stop, min(most, 700))

        upload._read = read  # type: ignore[method-assign]
        await upload.run()
        self.trace.append("refresh done")

    async def merge(self) -> None:
        """Merges some deltas; generations may come before it is listed."""
        generations, r = self.machine.generations, self.random
        chain = generations.chain
        if generations.renewal is not None or len(chain.deltas) < 2:
            return
        first = r.randrange(len(chain.deltas) - 1)
        some = chain.deltas[first : r.randrange(first + 2, len(chain.deltas) + 1)]
        self.trace.append(f"merge {len(some)} of {len(chain.deltas)}")
        merge = generations.renewal = Merge(some, chain.starts, tuple(part.since for part in chain.ranges))
        await MergeUpload(self.machine.context, merge, DirectReader(self.world)).run()

    # the application

    def application(self) -> None:
        r = self.random
        files = [(name, f) for name, f in self.model.files.items()]
        if not files or (len(files) < 5 and r.random() < 0.15):
            self.create()
            return
        name, file = r.choice(files)
        act = r.choice(
            (self.write, self.write, self.write, self.truncate, self.truncate, self.extend,
             self.xattr, self.unlink, self.background, self.evict, self.flags, self.orphan_write)
        )
        act(name, file)

    def create(self) -> None:
        self.names += 1
        name = f"f{self.names}"
        self.trace.append(f"create {name}")
        self.model.files[name] = File(self.machine.create(name))

    def write(self, name: str, file: File) -> None:
        r = self.random
        first = r.choice((0, 4, r.randrange(MOST_PAGES), 60, 64, r.randrange(8)))
        count = r.choice((1, 1, 2, 5, 20))
        data = b"".join(r.randbytes(8) * (PAGE // 8) for _ in range(count))
        self.trace.append(f"write {name} {first}+{count}")
        self.machine.write(file.number, first, data)
        file.data.extend(bytes(max(0, first * PAGE - len(file.data))))
        file.data[first * PAGE : (first + count) * PAGE] = data

    def truncate(self, name: str, file: File) -> None:
        pages = self.random.choice((0, 0, self.random.randrange(MOST_PAGES), 3))
        later = self.random.random() < 0.5
        self.trace.append(f"truncate {name} {pages} {'later' if later else ''}")
        self.machine.truncate(file.number, pages, later=later)
        del file.data[pages * PAGE :]
        file.data.extend(bytes(pages * PAGE - len(file.data)))

    def extend(self, name: str, file: File) -> None:
        pages = self.random.randrange(MOST_PAGES)
        self.trace.append(f"extend {name} {pages}")
        self.machine.extend(file.number, pages)
        file.data.extend(bytes(max(0, pages * PAGE - len(file.data))))

    def xattr(self, name: str, file: File) -> None:
        key, value = self.random.choice((b"user.a", b"user.b")), self.random.choice((None, b"1", b"2"))
        self.trace.append(f"xattr {name}")
        self.machine.set_xattr(file.number, key, value)
        file.xattrs.pop(key, None)
        if value is not None:
            file.xattrs[key] = value

    def unlink(self, name: str, file: File) -> None:
        still_open = self.random.random() < 0.5
        self.trace.append(f"unlink {name} {'open' if still_open else ''}")
        self.machine.unlink(name, file.number, still_open=still_open)
        del self.model.files[name]
        if still_open:
            self.model.orphans[file.number] = file

    def orphan_write(self, name: str, file: File) -> None:
        if not self.model.orphans:
            return
        number = self.random.choice(list(self.model.orphans))
        act = self.random.random()
        self.trace.append(f"orphan {number}")
        if act < 0.3:
            self.machine.close_orphan(number)
            del self.model.orphans[number]
        elif act < 0.5:
            self.machine.truncate(number, 0)
        else:
            self.machine.write(number, self.random.randrange(8), self.random.randbytes(PAGE))

    def flags(self, name: str, file: File) -> None:
        """The file enters or leaves `local_only`."""
        self.trace.append(f"flags {name}")
        file.local_only = not file.local_only
        with self.machine.store.change() as change:
            change.patch(file.number, flags=int(InodeFlag.LOCAL_ONLY) if file.local_only else 0)

    def background(self, name: str, file: File) -> None:
        steps = self.random.choice((1, 2, 10_000))
        self.trace.append(f"work off {steps}")
        self.machine.store.work_off_truncations(steps)

    def evict(self, name: str, file: File) -> None:
        if not file.local_only:
            self.trace.append(f"evict {name}")
            self.machine.evict(file.number)

    # checks

    def check_local(self) -> None:
        for name, file in self.model.files.items():
            assert self.machine.content(file.number) == bytes(file.data), f"{name} differs locally"

    def check_newest(self) -> None:
        """The newest head, and the one that it was published after, give what was at their cuts."""
        newest = newest_head(self.world)
        assert newest is not None
        ref, head = newest
        self.checked += 1
        model = self.cut_of(ref)
        image = restore(self.world, head)
        assert image.files.keys() == model.visible().keys()
        for name, content in model.visible().items():
            assert image.files[name] == content, f"generation {ref.generation}: {name} differs"
        assert image.xattrs == model.xattrs()
        assert not image.inodes & model.orphans.keys(), "an orphan is in the generation"

    def cut_of(self, ref: HeadRef) -> Model:
        found = [(epoch, g) for epoch, g in self.cuts if g == ref.generation and epoch <= ref.owner.epoch]
        return self.cuts[max(found)] if found else Model()
