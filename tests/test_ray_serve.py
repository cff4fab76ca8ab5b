"""Private parts of Ray that need no cluster. The others: `tests/cluster/test_ray_contract.py`."""

import os
from typing import Any

import pytest

from serve_app import ray_serve

APPLICATION: dict[str, Any] = {"name": "a", "import_path": "serve_app.app:model", "args": {"model": "m"}}


def test_a_version_of_an_application_follows_its_args_and_not_its_number_of_replicas() -> None:
    """`serve-app diff` says by it which models are replaced."""
    version = ray_serve.code_version(APPLICATION)
    assert version == ray_serve.code_version(APPLICATION | {"deployments": [{"name": "Model", "num_replicas": 2}]})
    assert version != ray_serve.code_version(APPLICATION | {"args": {"model": "other"}})


def test_ray_brings_an_haproxy() -> None:
    """`serve-app-haproxy` becomes it."""
    assert os.access(ray_serve.haproxy_binary(), os.X_OK)


def test_serve_names_the_header_of_a_session() -> None:
    """The door decodes it before Serve does, which would fail with a 500."""
    assert ray_serve.session_header() == b"x-session-id"


@pytest.mark.parametrize("name", ["RAY_SERVE_ENABLE_HA_PROXY", "SERVE_CONTROLLER_NAME", "SERVE_NAMESPACE"])
def test_serve_has_these_constants(name: str) -> None:
    """Names that `ray_serve` reads or repeats."""
    from ray.serve._private import constants

    expected = {"SERVE_CONTROLLER_NAME": ray_serve.CONTROLLER, "SERVE_NAMESPACE": ray_serve.NAMESPACE}
    value = getattr(constants, name)
    assert value == expected.get(name, value)
