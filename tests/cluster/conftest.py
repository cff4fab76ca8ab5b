"""Two clusters for the tests here.

`run` has both engines, a model that cannot load, one without room and one that scales. Its tests measure what a client
waits for, so nothing runs beside them. `mortal` has API keys, and two replicas that the tests kill.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.mortal import MortalServe
from tests.cluster.serve_run import ServeRun


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything here, and gives it time: the first test of a cluster waits for the start.

    The longest file comes first, so that no worker is left alone with it. Tests that must be alone come last of all.
    """
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.cluster)
        item.add_marker(pytest.mark.timeout(600))
        if "run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.alone)
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[bool, bool]:
    return item.get_closest_marker("alone") is not None, "mortal" not in getattr(item, "fixturenames", ())


def model(name: str, **args: Any) -> dict[str, Any]:
    """One application of the test's config file, on the CPU."""
    return {
        "name": name,
        "import_path": "serve_app.app:model",
        "route_prefix": f"/models/{name}",
        "args": {"model": "serve-app/demo", "device": "cpu", "dtype": "float32", **args},
    }


@pytest.fixture(scope="session")
def broken_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose weights are missing."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return folder


@pytest.fixture(scope="session")
def run(broken_folder: Path) -> Iterator[ServeRun]:
    """The running cluster, once every model serves or has failed."""
    scaling = model("scaling", infer_backend="auto", max_num_seqs=4) | {
        "deployments": [
            {
                "name": "Model",
                "max_ongoing_requests": 8,
                "autoscaling_config": {
                    "min_replicas": 1,
                    "max_replicas": 2,
                    "policy": {"policy_function": "serve_app.replica.autoscaling:by_engine_load"},
                    "upscale_delay_s": 1,
                    "downscale_delay_s": 3,
                    "metrics_interval_s": 1,
                    "look_back_period_s": 2,
                },
            }
        ]
    }
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
            model("broken", infer_backend="pt", model=str(broken_folder)),
            model("homeless", infer_backend="vllm", device="cuda", tensor_parallel_size=2),
            scaling,
        ]
    }
    # Serve would start the model that cannot load three times, each of which imports torch.
    serve = ServeRun(config, cpus=8, controller={"RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1"}, is_set_before_ray=True)
    try:
        serve.wait_until(lambda models: all(m["status"] != "loading" for m in models.values()) and len(models) == 5)
        yield serve
        left = serve.stop()
        assert not left, f"`serve run` left processes behind: {left}"
    finally:
        serve.clean_up()


@pytest.fixture(scope="session")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MortalServe]:
    """The running cluster, once both replicas serve. Its last test ends it."""
    serve = MortalServe(tmp_path_factory.mktemp("faults"))
    try:
        serve.wait_for_both()
        yield serve
        left = serve.stop()
        assert not left, f"`serve run` left processes behind: {left}"
    finally:
        serve.clean_up()
