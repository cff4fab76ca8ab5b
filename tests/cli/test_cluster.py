"""Which Ray cluster a command asks."""

import contextlib
import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import ray

from serve_app.cli.cluster import connected, require_open, several
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


class Listener:
    """A server that begins each connection with these bytes, until it is closed."""

    def __init__(self, greeting: bytes):
        self._greeting = greeting
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(self._greeting)

    def close(self) -> None:
        """Ends it."""
        self._server.close()


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"SSH-2.0-x\r\n"])
def test_what_listens_and_is_no_head_is_told_at_once(greeting: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """Such as the port of the dashboard or of the models, of which Ray's libraries would write for minutes."""
    listener = Listener(greeting)
    try:
        with pytest.raises(ConfigError, match=f"{listener.address}, but it is not the head of a Ray cluster"):
            require_open(listener.address)
    finally:
        listener.close()
    assert capfd.readouterr() == ("", "")


def test_what_rays_library_writes_while_it_connects_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It writes past Python. What is written before and after stays, and the error is ours."""

    def init(**_: object) -> None:
        os.write(2, b"rpc_client.h: Failed to connect to GCS\n")
        raise ConnectionError

    monkeypatch.setattr(ray, "init", init)
    listener = Listener(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    print("before", file=sys.stderr)
    try:
        with pytest.raises(ConfigError, match="does not accept this program"), connected(listener.address):
            pass
    finally:
        listener.close()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_the_server_of_rays_head_is_known() -> None:
    """It is one of grpc's own library."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        require_open(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


def test_a_server_of_grpc_may_be_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins with SETTINGS. With TLS, which has a handshake of its own, whatever listens may be one."""
    listener = Listener(bytes([0, 0, 6, 4, 0, 0, 0, 0, 0]) + b"123456")
    try:
        require_open(listener.address)
    finally:
        listener.close()
    monkeypatch.setenv("RAY_USE_TLS", "1")
    secure = Listener(b"")
    try:
        require_open(secure.address)
    finally:
        secure.close()


def test_of_several_clusters_the_one_that_is_asked_is_named() -> None:
    """With the addresses of the others. Of a single one there is nothing to say."""
    assert several("127.0.0.1:1", ["127.0.0.1:1"]) == several("127.0.0.1:1", []) == ""
    note = several("127.0.0.1:1", ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"])
    assert "asks the one at 127.0.0.1:1." in note
    assert "--address with 127.0.0.1:2 or 127.0.0.1:3." in note
