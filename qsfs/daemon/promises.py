"""`redundant_groups` and `redundant_nodes` as the configuration has them."""

from __future__ import annotations

from qsfs.config import Config
from qsfs.errors import ConfigError
from qsfs.format.erasure import CodeParams
from qsfs.remote.promises import Place, Promises


def promises_of(config: Config) -> Promises:
    """What the configuration promises."""
    return Promises(config.filesystem.redundant_groups, config.filesystem.redundant_nodes)


def require_promises(config: Config, code: CodeParams) -> None:
    """For `format`: `ConfigError` where the configured backends cannot keep what is promised."""
    places = [Place(backend.group, backend.node) for backend in config.backends]
    found = promises_of(config).broken(places, code)
    for kind, promised in (
        ("group", config.filesystem.redundant_groups),
        ("node", config.filesystem.redundant_nodes),
    ):
        unnamed = [backend.name for backend in config.backends if not getattr(backend, kind)]
        if promised and unnamed:
            found.append(
                f"redundant_{kind}s = {promised} cannot be checked: {len(unnamed)} backends name no {kind}, the first "
                f"{unnamed[0]}"
            )
    if found:
        raise ConfigError(f"{config.path}: {'; '.join(found)}")
