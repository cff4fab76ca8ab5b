"""One truth for all processes: no node is open where another has keys, and no address by mistake."""

from pathlib import Path

import pytest

from serve_app.access.cluster_record import OpenAccess, agree, agree_on_model, agree_on_router
from serve_app.access.keys import KeySource
from serve_app.config import RouterConfig
from serve_app.errors import ConfigError, Unauthorized

ANYWHERE, HERE = "0.0.0.0", "127.0.0.1"  # noqa: S104


class Record:
    """What Ray's key-value store holds."""

    def __init__(self) -> None:
        self.where: str | None = None
        self.is_open = False
        self.is_away = False

    def require(self, where: str) -> None:
        """The first one stays."""
        self.where = self.where or where

    def required_by(self) -> str | None:
        """As in the cluster."""
        if self.is_away:
            raise ConnectionError("no GCS")
        return self.where

    def allow_open(self) -> None:
        """As in the cluster."""
        self.is_open = True

    def is_open_allowed(self) -> bool:
        """As in the cluster."""
        return self.is_open


def keyless() -> KeySource:
    """A node on which nothing names keys."""
    return KeySource(None, {})


def with_keys() -> KeySource:
    """A node that has one."""
    return KeySource(None, {"SERVE_APP_API_KEYS": "sk-a-key-of-this-cluster"})


def test_a_process_without_keys_does_not_start_where_another_has_some() -> None:
    """The message names both nodes and what to set; those with keys start, and where nobody has any, all do."""
    record = Record()
    agree(keyless(), record, "10.0.0.1")
    agree(with_keys(), record, "10.0.0.2")
    agree(with_keys(), record, "10.0.0.3")
    with pytest.raises(ConfigError, match=r"the node 10.0.0.2 has some.*on the node 10.0.0.4.*SERVE_APP_API_KEYS_FILE"):
        agree(keyless(), record, "10.0.0.4")


async def test_a_process_that_started_open_shuts_when_keys_come_up(tmp_path: Path) -> None:
    """From then on nobody enters, and each health check fails, so that Serve replaces it."""
    source, record = keyless(), Record()
    access = OpenAccess(source, record, "10.0.0.1")
    await access.check()
    record.is_away = True
    await access.check()
    record.is_away = False
    assert source.is_open
    record.require("10.0.0.2")
    for _ in range(2):
        with pytest.raises(ConfigError, match="the node 10.0.0.2 has some"):
            await access.check()
    assert not source.is_open
    with pytest.raises(Unauthorized):
        source.refresh().find(b"Bearer anything")
    await OpenAccess(with_keys(), record, "10.0.0.2").check()


@pytest.mark.parametrize(("host", "allowed", "starts"), [(ANYWHERE, False, False), (ANYWHERE, True, True),
                                                         (HERE, False, True), ("::1", False, True),
                                                         ("10.1.2.3", False, False)])  # fmt: skip
def test_an_address_that_others_reach_is_open_only_where_that_is_meant(host: str, allowed: bool, starts: bool) -> None:
    """The router's config says so, for the models too. With keys any address is right."""
    record, config = Record(), RouterConfig(allow_open_access=allowed)
    agree_on_router(with_keys(), Record(), "n", host, RouterConfig())
    agree_on_model(with_keys(), Record(), "n", host)
    if starts:
        agree_on_router(keyless(), record, "n", host, config)
        agree_on_model(keyless(), record, "n", host, timeout_s=0)
        return
    with pytest.raises(ConfigError, match=rf"listens on {host}.*allow_open_access: true"):
        agree_on_router(keyless(), record, "n", host, config)
    with pytest.raises(ConfigError, match=rf"listens on {host}"):
        agree_on_model(keyless(), record, "n", host, timeout_s=0)


def test_a_model_waits_for_the_router_that_is_built_beside_it() -> None:
    """Serve builds all applications of a file at once."""
    import threading

    record = Record()
    threading.Timer(0.2, record.allow_open).start()
    agree_on_model(keyless(), record, "n", ANYWHERE, timeout_s=10)
