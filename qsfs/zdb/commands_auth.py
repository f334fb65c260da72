"""AUTH: becoming admin, and the challenge that SELECT SECURE uses as well."""

from __future__ import annotations

import hashlib
import hmac

from qsfs.zdb.client import Client, CommandError, exactly
from qsfs.zdb.protocol import OK, Argument, simple

MAX_ADMIN_PASSWORD_BYTES = 128
_DIGEST_BYTES = 40


async def auth(client: Client, arguments: list[Argument]) -> bytes:
    """AUTH: password | SECURE CHALLENGE | SECURE digest."""
    if len(arguments) == 2:
        return _plain(client, arguments)
    exactly(arguments, 3)
    method, word = bytes(arguments[1]).upper(), bytes(arguments[2])
    if not b"SECURE".startswith(method):
        raise CommandError("Only SECURE extra method supported")
    if b"CHALLENGE".startswith(word.upper()):
        client.nonce = client.instance.clock.random_bytes(8).hex().encode()
        return simple(client.nonce)
    if not client.instance.admin_password:
        raise CommandError("Authentication disabled")
    granted = digest_matches(client, word, client.instance.admin_password)
    client.nonce = b""
    if not granted:
        raise CommandError("Access denied")
    client.admin = True
    return OK


def digest_matches(client: Client, digest: bytes, password: bytes) -> bool:
    """Whether `digest` is the lowercase hex SHA-1 of `nonce:password`."""
    if not client.nonce:
        raise CommandError("No CHALLENGE requested, secure authentication not available")
    if len(digest) != _DIGEST_BYTES:
        raise CommandError("Invalid hash length")
    expected = hashlib.sha1(client.nonce + b":" + password).hexdigest().encode()
    return hmac.compare_digest(expected, digest)


def _plain(client: Client, arguments: list[Argument]) -> bytes:
    if not client.instance.admin_password:
        raise CommandError("Authentication disabled")
    exactly(arguments, 2)
    if len(arguments[1]) > MAX_ADMIN_PASSWORD_BYTES:
        raise CommandError("Password too long")
    if not hmac.compare_digest(bytes(arguments[1]), client.instance.admin_password):
        raise CommandError("Access denied")
    client.admin = True
    return OK
