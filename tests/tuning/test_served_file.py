"""The file that is served at a point."""

from typing import Any

import pytest

from serve_app.tuning.served_file import changed, document_of
from tests.tuning.test_tuner import DOCUMENT

MODEL: dict[str, Any] = {"name": "m", "import_path": "serve_app.app:model", "args": {"model": "x"}}


def test_the_file_that_is_served_has_the_models_and_an_open_router() -> None:
    """And nothing of the file's own address. The file itself does not change."""
    found = document_of(DOCUMENT, ["m"], ((("m", "num_replicas"), 2), (("m", "max_num_seqs"), None)))
    router, model = found["applications"]
    assert (router["name"], "args" in router, "http_options" in found) == ("router", False, False)
    assert model["args"] == {"model": "x"}
    assert model["deployments"] == [{"name": "Model", "num_replicas": 2}]
    assert DOCUMENT["applications"][0]["args"]["max_num_seqs"] == 2


@pytest.mark.parametrize(
    ("deployment", "replicas"),
    [
        ({"autoscaling_config": {"min_replicas": 2, "max_replicas": 4}}, 2),
        ({"autoscaling_config": {"min_replicas": 0, "max_replicas": 4}}, 1),
        ({"autoscaling_config": "auto"}, 1),
        ({"num_replicas": "auto"}, 1),
        ({"num_replicas": 3, "max_ongoing_requests": 7}, 3),
    ],
)
def test_a_range_of_replicas_becomes_its_least_number(deployment: dict[str, Any], replicas: int) -> None:
    """So that nothing starts under load. What else the deployment says stays."""
    found = changed({**MODEL, "deployments": [{"name": "Model", **deployment}]}, ())
    rest = {key: value for key, value in deployment.items() if key not in ("autoscaling_config", "num_replicas")}
    assert found["deployments"] == [{"name": "Model", **rest, "num_replicas": replicas}]
    again = changed({**MODEL, "deployments": [{"name": "Model", **deployment}]}, ((("m", "num_replicas"), 4),))
    assert again["deployments"][0]["num_replicas"] == 4


def test_a_model_without_deployments_has_none() -> None:
    """Serve starts one replica then."""
    assert "deployments" not in changed(MODEL, ())
