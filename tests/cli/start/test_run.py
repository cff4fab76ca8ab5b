"""`serve-app run` before Ray starts: which cluster, which port, and what it refuses."""

import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from serve_app.cli.main import main
from serve_app.cli.start.run import activate, cluster_to_join
from serve_app.demo import CONFIG_FILE
from serve_app.errors import ConfigError

ROOT = Path(__file__).parents[3]
MODEL = "- {name: a, import_path: 'serve_app.app:model', route_prefix: /models/a, args: {model: serve-app/demo, "
MODEL += "infer_backend: pt, device: cpu}}\n"


@pytest.fixture(autouse=True)
def _own_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No address of a cluster from outside."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def silent_address() -> str:
    """A port of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_without_a_cluster_ray_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is where the address says "local", whatever the environment names."""
    assert cluster_to_join(None) is None
    monkeypatch.setenv("RAY_ADDRESS", silent_address())
    assert cluster_to_join("local") is None


def test_the_cluster_of_this_node_is_joined(tmp_path: Path) -> None:
    """As Ray does, by the file that `ray start` writes; an old file is told with what to do."""
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    head = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{head.add_insecure_port('127.0.0.1:0')}"
    head.start()
    file.write_text(address)
    assert cluster_to_join(None) == cluster_to_join("auto") == cluster_to_join(address) == address
    head.stop(None).wait()
    with pytest.raises(ConfigError, match="--address local"):
        cluster_to_join(None)


@pytest.mark.parametrize("by", ["--address", "RAY_ADDRESS"])
def test_an_address_without_a_cluster_is_refused(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and not after Ray's minute."""
    address = silent_address()
    if by == "RAY_ADDRESS":
        monkeypatch.setenv(by, address)
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}"):
        cluster_to_join(address if by == "--address" else None)


def test_a_port_that_is_taken_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two Serves on one port would share the requests without an error."""
    file = tmp_path / "x.yaml"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        file.write_text(f"http_options: {{port: {port}}}\napplications:\n{MODEL}")
        assert main(["run", str(file)]) == 2
        assert main(["demo", "--port", str(port)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert all(f"port {port} is held by " in line for line in errors)


@pytest.mark.parametrize("options", ["{port: many}", "{port: 0}", "{port: true}", "[8000]", "8000"])
def test_wrong_http_options_are_refused(options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and what to write."""
    file = tmp_path / "x.yaml"
    file.write_text(f"http_options: {options}\napplications:\n{MODEL}")
    assert main(["run", str(file)]) == 2
    assert "serve-app: http_options" in capsys.readouterr().err


def test_a_wrong_file_is_refused_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and no log is left."""
    file = tmp_path / "x.yaml"
    file.write_text(f"applications:\n{MODEL.replace('device', 'devce')}")
    assert main(["run", str(file)]) == 2
    assert "Did you mean 'device'" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "no.yaml")]) == 2
    assert not (tmp_path / "logs").exists()


def test_the_interpreters_commands_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an activated environment too; one that is active stays."""
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    activate()
    activate()
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    assert os.environ["VIRTUAL_ENV"] == sys.prefix
    monkeypatch.setenv("VIRTUAL_ENV", "/other")
    activate()
    assert os.environ["VIRTUAL_ENV"] == "/other"


def test_the_demo_is_the_local_config() -> None:
    """The wheel carries it, and so one file is the example of both."""
    assert CONFIG_FILE.read_text() == (ROOT / "deploy_configs/local.yaml").read_text()
