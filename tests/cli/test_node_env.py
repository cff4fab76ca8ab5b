"""`serve-app node-env`: what it prints is read by a shell, by docker and by programs."""

import json
import subprocess

import pytest

from serve_app.cli.main import main
from serve_app.cli.node_env import formatted
from serve_app.deploy.serve_env import NAMES, haproxy_command, serve_environment

OURS = serve_environment(str(haproxy_command()))


def test_a_shell_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    """As `eval "$(serve-app node-env)"` does; children inherit it."""
    assert main(["node-env"]) == 0
    script = f'eval "$1"; {" ; ".join(f"printenv {name}" for name in NAMES)}'
    done = subprocess.run(
        ["sh", "-c", script, "sh", capsys.readouterr().out], capture_output=True, text=True, check=True, env={}
    )
    assert done.stdout.splitlines() == list(OURS.values())


def test_a_value_with_spaces_stays_one() -> None:
    """A path may have them."""
    assert formatted({"A": "x y'z"}, "shell") == """export A='x y'"'"'z'"""


def test_other_forms(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines for `docker run --env-file`, and JSON."""
    assert main(["node-env", "--format", "env"]) == 0
    assert dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines()) == OURS
    assert main(["node-env", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == OURS
