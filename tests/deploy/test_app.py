"""The builder of a model with adapters: what Serve gets of it."""

from pathlib import Path
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from serve_app import app
from serve_app.adapters.records import AdapterState
from tests.builders import node
from tests.lora_folders import adapter, base


@pytest.fixture(autouse=True)
def deployed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A cluster of one node, and what Serve is deployed with."""
    applications: dict[str, Any] = {}
    monkeypatch.setattr(app, "agree_on_model", lambda *_: None)
    monkeypatch.setattr(app, "ClusterRecord", lambda: None)
    monkeypatch.setattr(app, "this_node", lambda: "n")
    monkeypatch.setattr(app, "listening_host", lambda: "127.0.0.1")
    monkeypatch.setattr(app, "ray_nodes", lambda: [node(cpus=8)])
    monkeypatch.setattr(app, "_runtime_env", dict)
    monkeypatch.setattr(app, "deployed_applications", lambda: applications)
    monkeypatch.setattr(app, "told_adapters", lambda _: ({("a", "r0"): {"new": AdapterState("ready")}}, {}))
    monkeypatch.setattr(app, "agree_on_router", lambda *_: None)
    return applications


def built(folder: Path, **fields: Any) -> Any:
    """The config of a model's deployment as Serve keeps it, and the model's own as a replica gets it."""
    args = {"model": str(base(folder / "base")), "infer_backend": "pt", "device": "cpu"} | fields
    deployment = app.model(args)._bound_deployment
    config = deployment._deployment_config
    config.version = "of serve"
    return config, deployment.init_args[0]


def test_adapters_of_args_become_user_config_and_leave_the_version_alone(tmp_path: Path) -> None:
    """So Serve reconfigures the replicas, and replaces none. A replica that starts later has them in its config."""
    a, b = str(adapter(tmp_path / "a", rank=4)), str(adapter(tmp_path / "b", rank=4))
    one, config = built(tmp_path, adapters={"a": a})
    two, later = built(tmp_path, adapters={"a": a, "b": b}, allow_pickled_adapters=["b"])
    assert one.user_config == {"adapters": {"a": a}, "allow_pickled_adapters": ()}
    assert two.user_config["adapters"] == {"a": a, "b": b}
    assert one.version == two.version != "of serve"
    assert (config.max_loras, config.max_lora_rank, later.adapters) == (1, 8, {"a": a, "b": b})
    assert built(tmp_path, adapters={"a": a}, max_num_seqs=3)[0].version != one.version


def test_a_model_without_adapters_is_as_before(tmp_path: Path) -> None:
    """Its version is Serve's own."""
    config, _ = built(tmp_path)
    assert (config.user_config, config.version) == (None, "of serve")


def test_a_name_that_another_model_has_is_refused_at_the_start(
    tmp_path: Path, deployed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what Serve is deployed with and by what replicas have, in one message with both places. A clash of others
    stops nobody."""
    own = {"import_path": "serve_app.app:model", "args": {"adapters": {"x": "/x"}}}
    router = {"import_path": "serve_app.app:router", "args": {"aliases": {"new": "a"}}}
    deployed.update({"a": own, "b": own, "new": {"import_path": "serve_app.app:model"}, "router": router})
    monkeypatch.setattr(app, "application_being_built", lambda: "b")
    with pytest.raises(RayServeException, match="the name 'x' is that of adapters.x of b and of adapters.x of a"):
        built(tmp_path, adapters={"x": "/x"})
    monkeypatch.setattr(app, "application_being_built", lambda: "new")
    with pytest.raises(RayServeException, match="'new' is that of the model new and of the adapter new that a"):
        built(tmp_path)
    monkeypatch.setattr(app, "application_being_built", lambda: "router")
    with pytest.raises(RayServeException, match="'new' is that of aliases.new of router and of the adapter new that a"):
        app.router({"aliases": {"new": "a"}})
    for name in ("a", "c", None):
        monkeypatch.setattr(app, "application_being_built", lambda name=name: name)
        built(tmp_path, adapters={"z": "/x"})
