"""What Serve's status means for a client."""

import pytest

from serve_app.router import directory as directory_module
from serve_app.router.directory import RETRY_LOADING_S, ModelDirectory
from serve_app.router.model_status import read_status, summarize
from tests.builders import application

CONSTRUCTOR_FAILED = """The deployment failed to start 3 times in a row. See controller logs for details. Error:
ray::ServeReplica:a:Model.initialize_and_get_metadata() (pid=1, ip=192.0.2.2)
  File "x.py", line 1, in y
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "engine.py", line 42, in start
OSError: no such file: 'x'

The above exception was the direct cause of the following exception:

  File "engine.py", line 44, in start
serve_app.errors.EngineError: model: cannot read /x: no such file"""


def test_every_application_but_the_router_is_a_model() -> None:
    """An application of somebody else's is none; one that could not be built is, so that its error is seen."""
    models = read_status(
        {
            "router": application(deployment="Router"),
            "b": application(),
            "a": application(),
            "theirs": application(deployment="Chat"),
            "unbuilt": application("DEPLOY_FAILED", running=0, message="unknown field 'x'.", deployment=None),
        },
        own_application="router",
    )
    assert list(models) == ["a", "b", "unbuilt"]
    assert (models["unbuilt"].state, models["unbuilt"].message) == ("failed", "unknown field 'x'.")


@pytest.mark.parametrize(
    ("status", "running", "state"),
    [
        ("RUNNING", 1, "ready"),
        ("RUNNING", 0, "asleep"),  # scaled to zero: the first request wakes it
        ("DEPLOYING", 0, "loading"),
        ("DEPLOYING", 1, "ready"),  # a rolling update: the old replica still answers
        ("DEPLOY_FAILED", 0, "failed"),
        ("UNHEALTHY", 0, "loading"),
        ("UNHEALTHY", 1, "ready"),
        ("DELETING", 1, "stopping"),
    ],
)
def test_a_model_is_ready_while_a_replica_of_it_can_answer(status: str, running: int, state: str) -> None:
    """Serve's status tells about the deployment, the replicas tell about answers."""
    (model,) = read_status({"a": application(status, running)}, "router").values()
    assert (model.state, model.replicas) == (state, running)


def test_a_traceback_is_summarized_by_its_last_error() -> None:
    """Our own errors lose their class name; they are sentences."""
    assert summarize(CONSTRUCTOR_FAILED) == "model: cannot read /x: no such file"


def test_another_librarys_error_keeps_its_class() -> None:
    """`MemoryError` without its name would say little."""
    text = "x\nTraceback (most recent call last):\n  File\ntorch.OutOfMemoryError: CUDA out of memory."
    assert summarize(text) == "OutOfMemoryError: CUDA out of memory."


def test_a_plain_message_becomes_one_line() -> None:
    """Line breaks are for tracebacks."""
    assert summarize("needs 2 GPUs,\n  has none.") == "needs 2 GPUs, has none."


def test_a_model_that_loads_for_long_is_no_news() -> None:
    """Serve warns after 30 s of each constructor, and loading a model takes that long."""
    text = "Deployment 'Model' in application 'a' has 1 replicas that have taken more than 30s to initialize.\n"
    assert summarize(f"{text}This may be caused by a slow __init__ or reconfigure method.") == ""


def test_the_time_of_a_wake_is_known_though_who_woke_it_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next one would be told of hours."""
    now = [0.0]
    monkeypatch.setattr(directory_module.time, "monotonic", lambda: now[0])
    directory = ModelDirectory("router", 2.0)

    def seen(status: str, running: int) -> None:
        directory._models = read_status({"a": application(status, running)}, "router")
        directory._time_loads()

    seen("RUNNING", 0)
    directory.waking("a")
    assert directory.time_left_s("a") == directory.load_time_s("a") == RETRY_LOADING_S
    now[0] = RETRY_LOADING_S - 0.25
    assert (directory.time_left_s("a"), directory.load_time_s("a")) == (0.25, 1.0)
    now[0] = 30.0
    assert directory.load_time_s("a") == 1.0  # It should be there by now.
    assert directory.time_left_s("a") is None
    seen("RUNNING", 1)
    now[0] = 36_000.0
    seen("RUNNING", 0)
    directory.waking("a")
    assert directory.load_time_s("a") == 30.0


def test_a_replica_on_a_node_that_drains_serves() -> None:
    """Serve sends requests to it until another is there, so the model is not asleep."""
    draining = application()
    draining["deployments"]["Model"]["replicas"][0]["state"] = "PENDING_MIGRATION"
    assert read_status({"a": draining}, "router")["a"].state == "ready"
