"""Which Ray cluster a command asks."""

import socket

import pytest

from serve_app.cli.cluster import connected, several
from serve_app.errors import ConfigError


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://head:10001", "local", "nonsense", "head:", "a:b"])
def test_what_is_no_address_of_a_head_is_refused(address: str) -> None:
    """Ray would raise, or start a cluster of its own for `local`."""
    with pytest.raises(ConfigError, match="Write HOST:PORT of Ray's head"), connected(address):
        pass


def test_where_nothing_listens_it_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself tries for more than a minute. The variable counts as the option does."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    for address in (None, f"127.0.0.1:{port}", "127.0.0.1:99999"):
        with pytest.raises(ConfigError, match=r"no Ray cluster answers at 127\.0\.0\.1"), connected(address):
            pass


def test_of_several_clusters_the_one_that_is_asked_is_named() -> None:
    """With the addresses of the others. Of a single one there is nothing to say."""
    assert several("127.0.0.1:1", ["127.0.0.1:1"]) == several("127.0.0.1:1", []) == ""
    note = several("127.0.0.1:1", ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"])
    assert "asks the one at 127.0.0.1:1." in note
    assert "--address with 127.0.0.1:2 or 127.0.0.1:3." in note
