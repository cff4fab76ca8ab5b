"""What Serve's details say of the names that are taken."""

from collections.abc import Iterable
from enum import Enum
from typing import Any

import pytest
from ray.exceptions import RayError

from serve_app.adapters import deployed
from serve_app.adapters.deployed import deployed_applications, told_adapters
from serve_app.adapters.records import AdapterState, FoundInFolder

CONFIG = {"import_path": "serve_app.app:model", "args": {"adapters": {"x": "/x"}}}


class Status(Enum):
    """As Serve's own."""

    RUNNING = "RUNNING"
    DEPLOY_FAILED = "DEPLOY_FAILED"


def application(status: Status, *deployments: str) -> dict[str, Any]:
    """One, as the controller tells it."""
    return {"status": status, "deployed_app_config": CONFIG, "deployments": {name: {} for name in deployments}}


def test_what_could_not_be_built_takes_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a model that was refused for a name would have it. If only its update failed, the model is there, and
    its new config is not."""
    details = {
        "runs": application(Status.RUNNING, "Model"), "unhealthy": application(Status.DEPLOY_FAILED, "Model"),
        "refused": application(Status.DEPLOY_FAILED), "update": application(Status.DEPLOY_FAILED),
    }  # fmt: skip

    async def running(names: Iterable[str]) -> dict[str, int]:
        return {name: int(name == "update") for name in names}

    monkeypatch.setattr(deployed, "serve_details", lambda _: {"applications": details})
    monkeypatch.setattr(deployed, "running_replicas", running)
    assert deployed_applications() == {
        "runs": CONFIG, "unhealthy": CONFIG, "update": {"import_path": "serve_app.app:model"},
    }  # fmt: skip


def test_without_an_answer_nothing_is_known(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Which is logged. Commands check names too."""

    def silent(_: object) -> Any:
        raise RayError("no answer")

    monkeypatch.setattr(deployed, "serve_details", silent)
    assert deployed_applications() == {}
    reader = type("Reader", (), {"read": silent})
    monkeypatch.setattr(deployed, "RecordReader", reader)
    assert told_adapters({"a": CONFIG}) == ({}, {})
    assert caplog.text.count("no answer") == 2


def test_folders_are_asked_of_models_that_watch_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have no record, and what was found in another folder than the config's is past."""
    found = FoundInFolder("/srv", {"x": AdapterState("ready")})

    class Reader:
        def read(self) -> dict[Any, Any]:
            return {}

        def found(self, names: Iterable[str]) -> dict[str, FoundInFolder]:
            return dict.fromkeys(names, found)

    monkeypatch.setattr(deployed, "RecordReader", Reader)
    watching = {name: {"args": {"adapters_folder": folder}} for name, folder in (("b", "/srv"), ("c", "/other"))}
    assert told_adapters({"a": CONFIG, **watching}) == ({}, {"b": found})
