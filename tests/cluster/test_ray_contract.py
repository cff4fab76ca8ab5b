"""What `serve_app/ray_serve.py` uses of a running Ray is there, and means what it meant."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.cluster.serve_run import ServeRun


@pytest.fixture(scope="module")
def told(run: ServeRun) -> dict[str, Any]:
    """What a process beside the cluster finds."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.ray_contract", run.gcs_address(), "tiny-pt"],
        env=run.environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("store", [True, True, True]),
        ("running_replicas", {"tiny-pt": 1, "nobody": 0}),
        ("listening_host", "127.0.0.1"),
        ("end_applications", None),
        ("parent_of_a_worker", "raylet"),
        ("groups", [[{"memory": 1.0}, {"memory": 2.0}], True, [{"nothing": 1.0}, {"nothing": 2.0}]]),
    ],
)
def test_a_call_answers(told: dict[str, Any], name: str, expected: object) -> None:
    """By its value."""
    assert told[name] == expected


def test_the_run_of_serve_has_a_name(told: dict[str, Any]) -> None:
    """The hexadecimal id of its controller."""
    assert int(told["run_of_serve"], 16)


def test_the_details_name_the_applications(told: dict[str, Any], run: ServeRun) -> None:
    """Those that loaded, those that failed, and the port of `http_options`."""
    assert {"router", "tiny-pt", "tiny-vllm", "homeless"} <= set(told["instance_details"])
    assert told["serve_details"] == told["instance_details"]
    assert told["http_options"] == told["http_options_of_controller"] == run.port


def test_the_controller_tells_where_replicas_listen(told: dict[str, Any]) -> None:
    """As it tells HAProxy."""
    assert told["watch_targets"]["tiny-pt"] == 1


def test_the_books_of_a_node_have_its_processors(told: dict[str, Any]) -> None:
    """What is left of a resource that is used up is not in them."""
    assert any("memory" in resources for resources in told["available_by_node"])
