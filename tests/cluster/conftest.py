"""Two clusters for the tests here.

`run` has both engines and a model without room. Its tests measure what a client waits for, so nothing runs beside them.
`mortal` has API keys, and two replicas that the tests kill.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.mortal import MortalServe
from tests.cluster.serve_run import ServeRun

FOLDER = Path(__file__).parent
# Files whose tests may run beside each other, in the order in which workers get them: the long ones first.
IN_TURN = (
    "test_nodes.py",
    "test_traffic.py",
    "test_ranks.py",
    "test_adapters.py",
    "test_pool.py",
    "test_run.py",
    "test_starts.py",
    "test_tune.py",
    "test_by_index.py",
    "test_vllm_swap.py",
    "test_vllm_contract.py",
    "test_vllm_adapters.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything here, and gives it time: the first test of a cluster waits for the start.

    The longest files come first, so that no worker is left alone with one. Tests that must be alone come last of all.
    """
    for item in items:
        if FOLDER not in item.path.parents:
            continue
        item.add_marker(pytest.mark.cluster)
        item.add_marker(pytest.mark.timeout(600))
        if "run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.alone)
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[bool, int]:
    is_listed = item.path.parent == FOLDER and item.path.name in IN_TURN
    place = IN_TURN.index(item.path.name) if is_listed else len(IN_TURN)
    return item.get_closest_marker("alone") is not None, place


def model(name: str, **args: Any) -> dict[str, Any]:
    """One application of the test's config file, on the CPU."""
    return {
        "name": name,
        "import_path": "serve_app.app:model",
        "route_prefix": f"/models/{name}",
        "args": {"model": "serve-app/demo", "device": "cpu", "dtype": "float32", **args},
    }


@pytest.fixture(scope="session")
def run() -> Iterator[ServeRun]:
    """The running cluster, once every model serves or has failed. The last test of `test_serving.py` ends it."""
    config = {
        "applications": [
            {
                "name": "router",
                "import_path": "serve_app.app:router",
                "route_prefix": "/",
                "args": {"max_body_bytes": 100_000},
            },
            model("tiny-pt", infer_backend="pt"),
            model("tiny-vllm", infer_backend="vllm", max_num_seqs=32)
            | {"runtime_env": {"env_vars": {"VLLM_LOGGING_LEVEL": "ERROR"}}},
            model("homeless", infer_backend="vllm", device="cuda", tensor_parallel_size=2),
        ]
    }
    serve = ServeRun(config, cpus=8, is_set_before_ray=True)
    try:
        serve.wait_until(lambda models: all(m["status"] != "loading" for m in models.values()) and len(models) == 3)
        yield serve
    finally:
        serve.stop()
        serve.clean_up()


@pytest.fixture(scope="session")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MortalServe]:
    """The running cluster, once both replicas serve. Its last test ends it."""
    serve = MortalServe(tmp_path_factory.mktemp("faults"))
    try:
        serve.wait_for_both()
        yield serve
    finally:
        serve.stop()
        serve.clean_up()
