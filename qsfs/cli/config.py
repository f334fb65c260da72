"""`qsfs config check` and `qsfs config show`: is the configuration right, and what does it say."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qsfs.errors import QsfsError

if TYPE_CHECKING:
    from qsfs.config import Config
    from qsfs.remote.quorum import FleetAssessment


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `config` and its subcommands."""
    parser = subparsers.add_parser(
        "config", help="check or show the configuration", description="Check or show the configuration."
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser(
        "check",
        help="read it and say what is wrong",
        description="Read the configuration and say what a file system on its backends withstands; exit 3 "
        "when it cannot be used. Warnings do not change that. No backend is asked.",
    )
    actions.add_parser(
        "show",
        help="print every setting, defaults too",
        description="Print every setting, defaults too, without passwords.",
    )


def run(args: argparse.Namespace) -> int:
    """Checks or shows; raises `ConfigError` for what cannot be used."""
    from qsfs.cli.output import print_json
    from qsfs.config import Config

    config = Config.load(args.config)
    if args.action == "show":
        if args.json:
            print_json(settings(config))
        else:
            for line in _lines(settings(config)):
                print(line)
        return 0
    assessed = assessment(config)
    sentences = () if assessed is None else assessed.sentences()
    found = warnings(config)
    if args.json:
        print_json(
            {
                "file": str(config.path),
                "backends": len(config.backends),
                "sentences": sentences,
                "warnings": found,
            }
        )
        return 0
    for sentence in sentences:
        print(sentence)
    for warning in found:
        print(f"warning: {warning}")
    order = "can be used" if found else "in order"
    print(f"{config.path}: {order}, {len(config.backends)} backends")
    return 0


def assessment(config: Config) -> FleetAssessment | None:
    """What a new file system on the listed backends withstands; None if they are too few for one."""
    from qsfs.format.erasure import CodeParams
    from qsfs.remote.quorum import assess_groups

    code = CodeParams(
        config.code.data_shards, config.code.data_shards + config.code.parity_shards, config.code.codec
    )
    if len(config.backends) < code.n:
        return None
    return assess_groups([backend.group for backend in config.backends], code)


def warnings(config: Config) -> list[str]:
    """What can be used but is probably not meant."""
    from qsfs.daemon.promises import promises_of
    from qsfs.format.erasure import Code, CodeParams
    from qsfs.remote.promises import Place
    from qsfs.values import Credential

    found = []
    k, m = config.code.data_shards, config.code.parity_shards
    count, shards = len(config.backends), k + m
    if count < shards:
        found.append(f"{k}+{m} shards need {shards} backends, {count} are listed: `qsfs format` will refuse")
    try:
        Code(CodeParams(k, shards, config.code.codec))
    except QsfsError as error:
        found.append(f"[code] {error}")
    assessed = assessment(config)
    if assessed is not None:
        found += assessed.warnings()
        places = [Place(backend.group, backend.node) for backend in config.backends]
        found += promises_of(config).broken(places, assessed.code)
    for key, promised in (
        ("group", config.filesystem.redundant_groups),
        ("node", config.filesystem.redundant_nodes),
    ):
        if promised and any(not getattr(backend, key) for backend in config.backends):
            found.append(f"redundant_{key}s is {promised}, but some backends name no {key}")
    named = config.filesystem.passphrase_file or config.filesystem.key_file
    what = "key file" if config.filesystem.passphrase_file is None else "passphrase file"
    if isinstance(named, Credential):
        return found
    try:
        mode = named.stat().st_mode
    except OSError as error:
        found.append(f"{what} {named} cannot be read: {error.strerror}")
    else:
        if mode & 0o077:
            found.append(f"{what} {named} can be read by others; run `chmod 600 {named}`")
    return found


def settings(config: Config) -> dict[str, Any]:
    """Every setting by section and attribute, passwords replaced by "***"."""
    import dataclasses

    plain = dataclasses.asdict(config)
    for name in ("key_file", "passphrase_file"):
        value = getattr(config.filesystem, name)
        plain["filesystem"][name] = None if value is None else str(value)
    for backend in plain["backends"]:
        for key in ("password", "admin_password"):
            if backend[key]:
                backend[key] = "***"
    return plain


def _lines(plain: dict[str, Any]) -> list[str]:
    lines = []
    for section, value in plain.items():
        if isinstance(value, dict):
            lines += [f"{section}.{key} = {inner}" for key, inner in value.items()]
        elif isinstance(value, tuple | list):
            for index, entry in enumerate(value, 1):
                told = (f"{key}={inner}" for key, inner in entry.items() if inner not in ("", None, False))
                lines.append(f"{section}[{index}]: {', '.join(told)}")
        else:
            lines.append(f"{section} = {value}")
    return lines
