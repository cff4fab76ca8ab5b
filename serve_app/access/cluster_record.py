"""Records whether this cluster needs API keys, so that all its processes agree.

Each process reads the keys of its own node. A process that finds none, because a file or a variable is missing there,
would be open by mistake, by its model's route and on its own port. So a process that has keys says so in Ray's
key-value store. A process that has none looks there first, and does not start if keys are needed.

Keys win, whichever process comes first. A process that runs without keys looks again at each of Serve's health checks.
If another process has keys by then, it refuses every request from then on and has itself replaced.

The records belong to one run of Serve, by its controller's id, so they end with `serve shutdown`.
"""

import asyncio
import logging
import time
from typing import Protocol

from serve_app.access.keys import ENVIRONMENT, FILE_VARIABLE, KeySource
from serve_app.access.origin import is_loopback
from serve_app.config import RouterConfig
from serve_app.errors import ConfigError
from serve_app.ray_serve import run_of_serve, store, stored
from serve_app.terminal import notify

logger = logging.getLogger("ray.serve")

# A model's builder waits this many seconds for the router's, which Serve runs at the same time.
ROUTER_TIMEOUT_S = 60.0
LOOK_AGAIN_S = 0.5
# A health check waits this many seconds for Ray's key-value store, which is away while Ray's head restarts.
CHECK_TIMEOUT_S = 1.0

HOW_TO_SET = (
    f"Set {FILE_VARIABLE} or {ENVIRONMENT} for every node: under controller_options.runtime_env.env_vars of the config "
    "file, or in the environment in which Ray starts. Make sure that the file is on every node."
)


class AccessRecord(Protocol):
    """Holds what the processes of one run of Serve have told each other."""

    def require(self, where: str) -> None:
        """Records that a process on the node `where` has keys. The record is final."""
        ...

    def required_by(self) -> str | None:
        """Returns the first node that has keys, or None if no node has any."""
        ...

    def allow_open(self) -> None:
        """Records that the router's config allows access without a key."""
        ...

    def is_open_allowed(self) -> bool:
        """Returns whether the router's config allows access without a key."""
        ...


class ClusterRecord:
    """Keeps the records in Ray's key-value store. Each call blocks for about a millisecond."""

    def __init__(self) -> None:
        run = run_of_serve()
        self._required = f"serve-app-keys-required:{run}".encode()
        self._allowed = f"serve-app-open-allowed:{run}".encode()

    def require(self, where: str) -> None:
        """Does what `AccessRecord` says."""
        store(self._required, where.encode(), overwrite=False)

    def required_by(self) -> str | None:
        """Does what `AccessRecord` says."""
        where = stored(self._required)
        return None if where is None else where.decode()

    def allow_open(self) -> None:
        """Does what `AccessRecord` says."""
        store(self._allowed, b"1", overwrite=True)

    def is_open_allowed(self) -> bool:
        """Does what `AccessRecord` says."""
        return stored(self._allowed) is not None


def agree(source: KeySource, record: AccessRecord, node: str) -> None:
    """Is called by every process at its start. Raises ConfigError if it has no keys and the cluster needs them."""
    if not source.is_open:
        record.require(node)
    elif (where := record.required_by()) is not None:
        raise _without_keys(where, node)


def agree_on_router(source: KeySource, record: AccessRecord, node: str, host: str, config: RouterConfig) -> None:
    """Is called by the router's builder. `host` is where Serve listens. Raises ConfigError if it is open by mistake."""
    agree(source, record, node)
    if source.is_open and (config.allow_open_access or is_loopback(host)):
        record.allow_open()
    elif source.is_open:
        raise _open_by_mistake(host)


def agree_on_model(
    source: KeySource, record: AccessRecord, node: str, host: str, timeout_s: float = ROUTER_TIMEOUT_S
) -> None:
    """Is called by a model's builder, and waits for the router's, since all run at once. Raises ConfigError."""
    ends = time.monotonic() + timeout_s
    while True:
        agree(source, record, node)
        if not source.is_open or is_loopback(host) or record.is_open_allowed():
            return
        if time.monotonic() > ends:
            raise _open_by_mistake(host)
        time.sleep(LOOK_AGAIN_S)


def _without_keys(where: str, node: str) -> ConfigError:
    return ConfigError(
        f"This cluster needs API keys (the node {where} has some), but nothing names any on the node {node}, so "
        f"everyone who reaches its ports could use its models. {HOW_TO_SET}"
    )


def _open_by_mistake(host: str) -> ConfigError:
    return ConfigError(
        f"Serve listens on {host}, and nothing names API keys, so everyone who reaches it could use every model. "
        f"{HOW_TO_SET} Or write http_options: {{host: 127.0.0.1}}. If it is meant to be open, write "
        "allow_open_access: true under 'args' of the router."
    )


class OpenAccess:
    """Checks whether it is still right that this process has no keys."""

    def __init__(self, source: KeySource, record: AccessRecord, node: str):
        self._source = source
        self._record = record
        self._node = node
        self._look: asyncio.Future[str | None] | None = None
        self._problem = ""

    async def check(self) -> None:
        """Raises ConfigError once keys are needed and this process has none. It costs nothing if it has some."""
        if self._problem:
            raise ConfigError(self._problem)
        if not self._source.is_open:
            return
        if self._look is None:
            self._look = asyncio.ensure_future(asyncio.to_thread(self._record.required_by))
        if not (await asyncio.wait({self._look}, timeout=CHECK_TIMEOUT_S))[0]:
            return
        look, self._look = self._look, None
        if look.exception() is not None:
            logger.warning("Ray's key-value store does not say whether API keys are needed: %s", look.exception())
        elif look.result() is not None:
            self._source.shut()
            self._problem = str(_without_keys(str(look.result()), self._node))
            notify(self._problem)
            raise ConfigError(self._problem)


def joined(source: KeySource) -> OpenAccess:
    """Is called by every replica before anything else. It blocks for milliseconds. Raises ConfigError as `agree`."""
    record, node = ClusterRecord(), this_node()
    try:
        agree(source, record, node)
    except ConfigError as error:
        notify(f"this replica does not start: {error}")
        raise
    return OpenAccess(source, record, node)


def this_node() -> str:
    """Returns the address by which Ray knows this node."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address
