"""`qsfs key`: the key slots of a file system: what opens it, copies on paper, and changing both."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsfs.errors import ConfigError, KeyFileError

if TYPE_CHECKING:
    from qsfs.config import Config
    from qsfs.format.slots import Secret
    from qsfs.remote.key_slots import Changed

_UNLOCK = "unlock-"
_IN_USE = "also the slot that the configured secret opens"
_STILL_READS = "and an old copy of the superblock can still read what was written so far"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `key` and its subcommands."""
    from qsfs.cli.unlock import add_unlock_options

    parser = subparsers.add_parser(
        "key",
        help="list, add, remove, rotate and prove what opens the file system",
        description="The key slots of a file system, on its backends. Each opens with a secret of its own: a key "
        "file or a passphrase. Works while the file system is mounted.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str, description: str) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=text, description=description)
        add_unlock_options(found, prefix=_UNLOCK, what="instead of the configured one, to open the file system with")
        return found

    action("list", "show the key slots", "Show the key slots, as the backends hold them.")
    add = action(
        "add",
        "let one more secret open it",
        "Make a key slot for one more secret. A key file that does not exist is made.",
    )
    add_unlock_options(add, new=True, what="to add; it is made if it does not exist")
    remove = action(
        "remove",
        "let a secret open it no more",
        "Remove a key slot. The last one stays. Who kept the secret and an old copy of the superblock can still "
        "read what was written so far: see 'rotate-master'.",
    )
    remove.add_argument("slot", metavar="SLOT", type=int)
    remove.add_argument("--in-use", action="store_true", help=_IN_USE)
    rotate = action(
        "rotate",
        "give a slot a new secret",
        "Give a key slot a new secret; the old one opens it no more. No data are rewritten.",
    )
    rotate.add_argument("slot", metavar="SLOT", type=int)
    add_unlock_options(rotate, new=True, what="for the slot; it is made if it does not exist")
    master = action(
        "rotate-master",
        "make a new master key for what is written from now on",
        "Make a new master key. What is written from now on is sealed under it; older ones stay, for what exists. It "
        "goes into every slot, so the secret of each slot is needed, or the slot is dropped.",
    )
    master.add_argument(
        "--key-file", metavar="FILE", action="append", default=[], help="of another slot; may be repeated"
    )
    master.add_argument(
        "--passphrase-file", metavar="FILE", action="append", default=[], help="the same; - is standard input"
    )
    master.add_argument("--passphrase", action="store_true", help="ask for the passphrase of another slot")
    master.add_argument("--drop", metavar="SLOT", type=int, action="append", default=[], help="let go of a slot")
    master.add_argument("--in-use", action="store_true", help=f"drop {_IN_USE}")
    sheet = action(
        "sheet",
        "print a recovery sheet",
        "Print a sheet with a secret that can be typed back, and what a restore needs. It gets a key slot of its own.",
    )
    sheet.add_argument("file", metavar="FILE", nargs="?", help="write it there (mode 0600) instead of printing it")
    sheet.add_argument("--of", metavar="KEYFILE", help="print the secret of this key file; no slot is added")
    sheet.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    back = actions.add_parser(
        "from-sheet",
        help="make a key file of a recovery sheet",
        description="Make a key file of what is typed from a recovery sheet, line by line. Needs no configuration.",
    )
    back.add_argument("file", metavar="KEYFILE", help="the key file to write (mode 0600)")
    back.add_argument("--sheet", metavar="FILE", help="read the sheet's lines from FILE; - is standard input")
    back.add_argument("--overwrite", action="store_true", help="replace KEYFILE if it exists")
    verify = actions.add_parser(
        "verify",
        help="prove that a secret opens the file system",
        description="Prove, against the backends, that a secret opens the key slots there and that its master keys "
        "decrypt the newest generation. Exit 0: it does. 4: it opens nothing, or was removed. 5: too few backends "
        "answer to know.",
    )
    add_unlock_options(verify, what="to prove (default: the configured one)")
    verify.add_argument("--sheet", metavar="FILE", help="a recovery sheet to prove; - asks for its lines")
    action(
        "refill",
        "bring the key slots to backends that were down",
        "Bring the newest key slots to every backend that holds older ones; completes a change that was interrupted.",
    )


def run(args: argparse.Namespace) -> int:
    """Runs one action; raises `KeyFileError` among others."""
    if args.action == "from-sheet":
        return _from_sheet(args)
    from qsfs.config import Config

    config = Config.load(args.config)
    actions = {
        "list": _list,
        "add": _add,
        "remove": _remove,
        "rotate": _rotate,
        "rotate-master": _rotate_master,
        "sheet": _sheet,
        "verify": _verify,
        "refill": _refill,
    }
    return actions[args.action](config, args)


def _unlock(config: Config, args: argparse.Namespace) -> Secret:
    from qsfs.cli.unlock import unlocking
    from qsfs.daemon.secret import read_secret

    return read_secret(config, unlocking(args, prefix=_UNLOCK))


def _list(config: Config, args: argparse.Namespace) -> int:
    import trio

    from qsfs.cli.output import format_table, print_json
    from qsfs.clock import SystemClock
    from qsfs.daemon import keys

    secret = _unlock(config, args)
    state = trio.run(lambda: keys.key_state(config, SystemClock(), secret))
    found = state.found
    used = found.used
    if args.json:
        print_json(
            {
                "file_system": found.keys.fsid.hex(),
                "label": found.superblock.label,
                "revision": found.superblock.revision,
                "holders": len(state.holders),
                "backends": state.fleet,
                "master_keys": found.keys.numbers,
                "slots": [
                    {"slot": s.number, "kind": s.kind, "master_keys": s.master_keys, "in_use": s.number in used}
                    for s in state.slots
                ],
                "removed": found.removed,
                "sentences": state.sentences(),
            }
        )
        return 0
    label = f" ({found.superblock.label})" if found.superblock.label else ""
    print(
        f"file system {found.keys.fsid.hex()}{label}: revision {found.superblock.revision} of the key slots, on "
        f"{len(state.holders)} of {state.fleet} backends"
    )
    rows = [
        (s.number, s.kind, " ".join(map(str, s.master_keys)), "opened this" if s.number in used else "")
        for s in state.slots
    ]
    print(format_table(("slot", "kind", "master keys", ""), rows))
    for sentence in [*([f"{found.removed}."] if found.removed else []), *state.sentences()]:
        print(sentence)
    return 0


def _add(config: Config, args: argparse.Namespace) -> int:
    from qsfs.cli.unlock import kdf_cost
    from qsfs.clock import SystemClock
    from qsfs.format.key_changes import add_slot

    secret = _unlock(config, args)
    cost = kdf_cost(args)
    new, made = _new_secret(args)
    changed = _change(
        config, secret, made, lambda superblock, keys, _, __: add_slot(superblock, keys, new, SystemClock(), cost)
    )
    return _done(config, args, changed, f"key slot {changed.change.slot} opens with {_named(args, made)}")


def _remove(config: Config, args: argparse.Namespace) -> int:
    from qsfs.daemon.keys import refuse_used
    from qsfs.format.key_changes import Change, find_slot, remove_slot

    secret = _unlock(config, args)

    def make(superblock: Any, keys: Any, _: int, used: frozenset[int]) -> Change:
        find_slot(superblock, args.slot)
        change = remove_slot(superblock, keys, args.slot)
        if not args.in_use:
            refuse_used(used, [args.slot])
        return change

    changed = _change(config, secret, None, make)
    note = (
        f"Whoever kept its secret {_STILL_READS}; 'qsfs key rotate-master' protects what is written from now on"
    )
    return _done(config, args, changed, f"key slot {args.slot} is removed", note)


def _rotate(config: Config, args: argparse.Namespace) -> int:
    from qsfs.cli.unlock import kdf_cost
    from qsfs.clock import SystemClock
    from qsfs.format.key_changes import Change, find_slot, rotate_slot

    secret = _unlock(config, args)
    cost = kdf_cost(args)
    new, made = _new_secret(args)
    was_used = False

    def make(superblock: Any, keys: Any, _: int, used: frozenset[int]) -> Change:
        nonlocal was_used
        find_slot(superblock, args.slot)
        was_used = args.slot in used
        return rotate_slot(superblock, keys, args.slot, new, SystemClock(), cost)

    changed = _change(config, secret, made, make)
    note = ""
    if was_used:
        note = (
            "The secret used until now opens nothing any more: put the new one where [filesystem] in "
            f"{config.path} names it"
        )
    said = f"key slot {args.slot} opens with {_named(args, made)} now, and no longer with its old secret"
    return _done(config, args, changed, said, note)


def _rotate_master(config: Config, args: argparse.Namespace) -> int:
    from qsfs.cli.unlock import ask_passphrase
    from qsfs.clock import SystemClock
    from qsfs.daemon.keys import refuse_used
    from qsfs.daemon.secret import read_key_file, read_passphrase_file
    from qsfs.format.key_changes import Change, rotate_master

    secret = _unlock(config, args)
    secrets = [secret, *(read_key_file(Path(file)) for file in args.key_file)]
    secrets += [read_passphrase_file(Path(file)) for file in args.passphrase_file]
    if args.passphrase:
        secrets.append(ask_passphrase(new=False, prompt="Passphrase of the other slot: "))

    def make(superblock: Any, keys: Any, number: int, used: frozenset[int]) -> Change:
        change = rotate_master(superblock, keys, secrets, SystemClock(), number=number, drop=args.drop)
        if not args.in_use:
            refuse_used(used, args.drop)
        return change

    changed = _change(config, secret, None, make)
    number = changed.change.keys.current.number
    note = (
        "What exists stays under the old ones, which every slot keeps; 'qsfs status' says how much that is. A mount on "
        "another machine takes the new one up within minutes"
    )
    if args.drop:
        note += f". Whoever kept the secret of a slot that was dropped {_STILL_READS}"
    return _done(config, args, changed, f"master key {number} seals what is written from now on", note)


def _refill(config: Config, args: argparse.Namespace) -> int:
    import trio

    from qsfs.clock import SystemClock
    from qsfs.daemon import keys

    secret = _unlock(config, args)
    with keys.one_at_a_time(config):
        changed = trio.run(lambda: keys.refill(config, SystemClock(), secret))
    return _done(config, args, changed, "the key slots are the newest")


def _verify(config: Config, args: argparse.Namespace) -> int:
    import trio

    from qsfs.cli.output import print_json
    from qsfs.cli.unlock import unlocking
    from qsfs.clock import SystemClock
    from qsfs.daemon import keys
    from qsfs.daemon.secret import read_secret

    given = unlocking(args)
    if args.sheet is not None:
        if given is not None:
            raise ConfigError("--sheet and another secret are both given: prove one at a time")
        given = _read_sheet(args.sheet, typed=args.sheet == "-")
    secret = read_secret(config, given)
    proof = trio.run(lambda: keys.prove(config, SystemClock(), secret))
    if args.json:
        print_json(
            {
                "opens": proof.opens,
                "backends": proof.state.fleet,
                "newest_everywhere": len(proof.state.holders) == proof.state.fleet,
                "slots": sorted(proof.state.found.used),
                "sentences": proof.sentences,
            }
        )
        return 0
    for sentence in proof.sentences:
        print(sentence)
    return 0


def _sheet(config: Config, args: argparse.Namespace) -> int:
    import trio

    from qsfs.cli.output import print_json
    from qsfs.cli.sheet import add_sheet, sheet_text, show_sheet
    from qsfs.clock import SystemClock
    from qsfs.daemon import keys
    from qsfs.daemon.secret import read_key_file, write_private

    clock = SystemClock()
    secret = _unlock(config, args)
    target = None if args.file is None else Path(args.file)
    if target is not None and target.is_dir():
        raise ConfigError(f"{target}: is a directory; name a file")
    if target is not None and target.exists() and not args.overwrite:
        raise ConfigError(f"{target}: exists; name another file, or say --overwrite")

    def show(text: str, slot: int) -> None:
        show_sheet(text, slot, as_json=args.json)

    if args.of is not None:
        state = trio.run(lambda: keys.key_state(config, clock, secret))
        on_paper = read_key_file(Path(args.of))
        from qsfs.format.slots import masters_of

        if not masters_of(state.found.superblock.slots, on_paper, state.found.keys.fsid)[0]:
            raise KeyFileError(f"{args.of}: opens no key slot of this file system; nothing was printed")
        text = sheet_text(config, state, on_paper, clock.time_ns(), slot=None)
        slot = 0
        if target is None:
            show(text, slot)
        else:
            write_private(target, text, clock, replace=args.overwrite)
    else:
        slot = add_sheet(config, secret, target, replace=args.overwrite, show=show).change.slot
    if target is not None and args.json:
        print_json({"slot": slot, "file": str(target), "sheet": None})
    elif target is not None:
        print(f"wrote {target}: print it, prove it with 'qsfs key verify --sheet {target}', and delete the file")
    return 0


def _from_sheet(args: argparse.Namespace) -> int:
    from qsfs.cli.output import print_json
    from qsfs.clock import SystemClock
    from qsfs.daemon.secret import write_private
    from qsfs.format.keys import key_file_text

    target = Path(args.file)
    if target.exists() and not args.overwrite:
        raise ConfigError(f"{target}: exists; name another file, or say --overwrite")
    secret = _read_sheet(args.sheet or "-", typed=args.sheet is None)
    write_private(target, key_file_text(secret), SystemClock(), replace=args.overwrite)
    if args.json:
        print_json({"key_file": str(target)})
    else:
        print(f"wrote {target}; 'qsfs key verify --key-file {target}' proves it against the backends")
    return 0


def _read_sheet(source: str, *, typed: bool) -> bytes:
    """The secret of a sheet in a file, or typed line by line where there is a terminal."""
    from qsfs.format.sheet import parse_sheet

    if typed and sys.stdin.isatty():
        return _type_sheet()
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text("utf-8")
    except OSError as error:
        raise KeyFileError(f"{source}: the sheet cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise KeyFileError(f"{source}: the sheet cannot be read: not a text file") from None
    return parse_sheet(text)


def _type_sheet() -> bytes:
    """Asks for each line until it is right."""
    from qsfs.format.sheet import LINES, join_lines, parse_line

    parts: dict[int, bytes] = {}
    while len(parts) < LINES:
        number = len(parts) + 1
        try:
            line = input(f"line {number} of {LINES}: ")
        except EOFError:
            raise KeyFileError(f"the sheet lacks line {number}") from None
        try:
            parts[number] = parse_line(line, number)[1]
        except KeyFileError as error:
            print(f"{error}; type it again", file=sys.stderr)
    return join_lines(parts)


def _new_secret(args: argparse.Namespace) -> tuple[Secret, Path | None]:
    """The secret that a slot is to get; and the key file, if this made it."""
    from qsfs.cli.unlock import unlocking
    from qsfs.clock import SystemClock
    from qsfs.daemon.secret import read_key_file, write_private
    from qsfs.format.keys import new_key_file

    if args.key_file is not None and not Path(args.key_file).exists():
        target, clock = Path(args.key_file), SystemClock()
        write_private(target, new_key_file(clock.random_bytes), clock)
        return read_key_file(target), target
    secret = unlocking(args, new=True)
    if secret is None:
        raise ConfigError("name the new secret: --key-file FILE, --passphrase, or --passphrase-file FILE")
    return secret, None


def _named(args: argparse.Namespace, made: Path | None) -> str:
    if made is not None:
        return f"the new key file {made}"
    return "the passphrase" if args.key_file is None else args.key_file


def _change(config: Config, secret: Secret, made: Path | None, make: Any) -> Changed:
    """Changes the key slots; a file that this command made for it goes again if nothing was changed."""
    import trio

    from qsfs.clock import SystemClock
    from qsfs.daemon import keys

    begun = False

    def noted(*arguments: Any) -> Any:
        nonlocal begun
        change = make(*arguments)
        begun = True
        return change

    try:
        with keys.one_at_a_time(config):
            return trio.run(lambda: keys.change(config, SystemClock(), secret, noted))
    except BaseException:
        # Once something may have been written, what was made may be what opens it.
        if made is not None and not begun:
            made.unlink(missing_ok=True)
        raise


def _done(config: Config, args: argparse.Namespace, changed: Changed, said: str, note: str = "") -> int:
    from qsfs.cli.output import print_json
    from qsfs.daemon.keys import tell_mount

    told = tell_mount(config, changed.change.keys.current.number)
    if args.json:
        print_json(
            {
                "slot": changed.change.slot,
                "revision": changed.change.superblock.revision,
                "master_key": changed.change.keys.current.number,
                "holders": changed.holders,
                "backends": changed.fleet,
                "sentences": [line for line in (said, changed.sentence(), note, told) if line],
            }
        )
        return 0
    print(f"{said}; {changed.sentence()}")
    for line in (note, told):
        if line:
            print(f"{line}.")
    return 0
