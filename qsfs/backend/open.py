"""Backends from the configuration, and the namespaces that `format` makes on them."""

from __future__ import annotations

import trio

from qsfs.backend.contract import Backend
from qsfs.backend.limits import RateLimit, with_limits
from qsfs.backend.link import Refusal, Target
from qsfs.backend.metrics import Metrics, with_metrics
from qsfs.backend.retry import RetryBudget, RetryPolicy, with_retry
from qsfs.backend.zdb import (
    DEFAULT_CALL_TIMEOUT_S,
    DEFAULT_CONNECT_TIMEOUT_S,
    DEFAULT_CONNECTIONS,
    ZdbBackend,
)
from qsfs.backend.zdb_pool import LinkPool, backend_error
from qsfs.clock import Clock, SystemClock
from qsfs.config import BackendConfig
from qsfs.errors import BackendRefused

CONTROL_SUFFIX = ".control"
_EXISTS = "This namespace is not available"
_NOT_ADMIN = "Permission denied"


def open_backend(
    config: BackendConfig,
    *,
    clock: Clock | None = None,
    metrics: Metrics | None = None,
    upload: RateLimit | None = None,
    download: RateLimit | None = None,
    concurrency: trio.Semaphore | None = None,
    waits: bool = True,
    retry: RetryPolicy | None = None,
    retry_budget: RetryBudget | None = None,
    connections: int = DEFAULT_CONNECTIONS,
    call_timeout: float = DEFAULT_CALL_TIMEOUT_S,
    connect_timeout: float = DEFAULT_CONNECT_TIMEOUT_S,
    namespace: str = "",
) -> Backend:
    """The backend that `config` names; connects at the first call.

    From the inside out: the 0-db connections, `metrics` (so that they time the backend and nothing
    else), the limits (see `with_limits`, also for `waits`), and retries if `retry` or `retry_budget` is given.
    `namespace` replaces the configured one.  Raises `ConfigError` if the password file cannot be read.
    """
    clock = clock or SystemClock()
    backend: Backend = ZdbBackend(
        config.host,
        config.port,
        namespace or config.namespace,
        password=config.read_password(),
        clock=clock,
        connections=connections,
        call_timeout=call_timeout,
        connect_timeout=connect_timeout,
    )
    if metrics is not None:
        backend = with_metrics(backend, metrics)
    if upload is not None or download is not None or concurrency is not None:
        backend = with_limits(backend, upload=upload, download=download, concurrency=concurrency, waits=waits)
    if retry is not None or retry_budget is not None:
        backend = with_retry(backend, clock, retry, retry_budget)
    return backend


def open_control(
    config: BackendConfig,
    name: str,
    *,
    clock: Clock | None = None,
    metrics: Metrics | None = None,
    upload: RateLimit | None = None,
    download: RateLimit | None = None,
    call_timeout: float = DEFAULT_CALL_TIMEOUT_S,
    connect_timeout: float = DEFAULT_CONNECT_TIMEOUT_S,
) -> Backend:
    """The namespace that holds heads and owner records: `name`, or the main one if that is empty.

    Not retried, since who publishes or owns counts answers itself, and never held up by the rates: what it moves
    is charged, and data wait for it.
    """
    return open_backend(
        config,
        clock=clock,
        metrics=metrics,
        upload=upload,
        download=download,
        waits=False,
        connections=1,
        call_timeout=call_timeout,
        connect_timeout=connect_timeout,
        namespace=name,
    )


async def create_control_namespace(config: BackendConfig, *, clock: Clock | None = None) -> str:
    """Makes the small namespace for heads and owner records; returns its name.

    It gets the main namespace's password and is private then.  One that exists is taken if it
    opens with that password.  Returns "" if the backend does not let us make one: the main
    namespace serves then.  Raises `BackendUnavailable` if the backend does not answer.
    """
    name = config.namespace + CONTROL_SUFFIX
    return name if await create_namespace(config, name, clock=clock) else ""


async def create_namespace(
    config: BackendConfig, name: str = "", *, maxsize: int = 0, clock: Clock | None = None
) -> bool:
    """Makes the namespace `name` (default: the configured one) with the configured password.

    `maxsize` bounds its live bytes (0: no bound).  Returns whether it is there now and opens with
    that password: `False` if we are not allowed to make it.  Raises `BackendUnavailable`, or
    `BackendRefused` for a wrong admin password.
    """
    name = name or config.namespace
    password = config.read_password()
    admin = _pool(config, Target(config.host, config.port, "", "", config.admin_password), clock)
    try:
        try:
            await admin.call("NSNEW", name)
        except Refusal as refusal:
            if str(refusal) == _NOT_ADMIN:
                return await _opens(config, name, password, clock)
            if str(refusal) != _EXISTS:
                raise backend_error(admin.name, str(refusal)) from None
            if not password or await _has_password(admin, name):
                return await _opens(config, name, password, clock)
        await _set_up(admin, name, password, maxsize)
    finally:
        await admin.aclose()
    return True


async def _set_up(admin: LinkPool, name: str, password: str, maxsize: int) -> None:
    try:
        if maxsize:
            await admin.call("NSSET", name, "maxsize", str(maxsize))
        if password:
            await admin.call("NSSET", name, "public", "0")
            await admin.call("NSSET", name, "password", password)
    except Refusal as refusal:
        raise backend_error(admin.name, str(refusal)) from None


async def _has_password(pool: LinkPool, name: str) -> bool:
    try:
        return b"\npassword: yes" in await pool.call("NSINFO", name)
    except Refusal as refusal:
        raise backend_error(pool.name, str(refusal)) from None


async def _opens(config: BackendConfig, name: str, password: str, clock: Clock | None) -> bool:
    pool = _pool(config, Target(config.host, config.port, name, password), clock)
    try:
        protected = await _has_password(pool, name)
    except BackendRefused:
        return False
    finally:
        await pool.aclose()
    return bool(password) or not protected


def _pool(config: BackendConfig, target: Target, clock: Clock | None) -> LinkPool:
    return LinkPool(
        f"{config.address}/{target.namespace or config.namespace}",
        target,
        clock=clock or SystemClock(),
        connections=1,
        call_timeout=DEFAULT_CALL_TIMEOUT_S,
        connect_timeout=DEFAULT_CONNECT_TIMEOUT_S,
    )
