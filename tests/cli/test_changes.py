"""What `serve deploy` of another file does to each application. The cluster test asks Serve itself."""

from typing import Any

import pytest

from serve_app.cli.changes import changes, not_applied

ARGS = {"model": "serve-app/demo", "infer_backend": "pt", "device": "cpu"}


def application(name: str, **fields: Any) -> dict[str, Any]:
    """A model's application."""
    return {
        "name": name,
        "import_path": "serve_app.app:model",
        "route_prefix": f"/models/{name}",
        "args": ARGS,
    } | fields


def document(*applications: dict[str, Any], **top: Any) -> dict[str, Any]:
    """A config file."""
    return {"applications": list(applications), **top}


def options(**fields: Any) -> dict[str, Any]:
    """The application with options of its deployment."""
    return application("a", deployments=[{"name": "Model", **fields}])


def test_applications_that_come_and_go() -> None:
    """The others stay, whatever their order."""
    before, after = document(application("a"), application("b")), document(application("c"), application("a"))
    assert [(change.name, change.kind) for change in changes(before, after)] == [
        ("a", "stays as it is"), ("b", "stops"), ("c", "starts"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "kind", "why"),
    [
        (
            application("a"),
            application("a", args=ARGS | {"max_num_seqs": 4}),
            "restarts",
            "args.max_num_seqs: none → 4",
        ),
        (application("a"), application("a", runtime_env={"env_vars": {"A": "1"}}), "restarts", "runtime_env: none"),
        (options(num_replicas=1), options(num_replicas=2), "changes in place", "deployments.Model.num_replicas: 1 → 2"),
        (application("a"), options(num_replicas=2), "changes in place", "deployments.Model"),
        (application("a"), options(autoscaling_config={"min_replicas": 0}), "restarts", "deployments.Model"),
        (
            options(autoscaling_config={"max_replicas": 2}),
            options(autoscaling_config={"max_replicas": 3}),
            "changes in place",
            "deployments.Model.autoscaling_config.max_replicas: 2 → 3",
        ),
        (options(), options(user_config={"aliases": {}}), "changes in place", "deployments.Model.user_config"),
        (options(), options(max_replicas_per_node=1), "restarts", "deployments.Model.max_replicas_per_node: none → 1"),
        (
            application("a"),
            options(max_replicas_per_node=1),
            "restarts",
            "deployments.Model.max_replicas_per_node: none",
        ),
        (
            options(ray_actor_options={"num_cpus": 1}),
            application("a"),
            "restarts",
            "deployments.Model.ray_actor_options",
        ),
        (application("a"), application("a", route_prefix="/b"), "changes in place", "route_prefix: /models/a → /b"),
    ],
)
def test_what_replaces_replicas_and_what_does_not(old: Any, new: Any, kind: str, why: str) -> None:
    """With the field that makes it so."""
    (change,) = changes(document(old), document(new))
    assert (change.kind, change.why[0].startswith(why)) == (kind, True), change


def test_what_serve_reads_at_its_start_is_told() -> None:
    """`serve deploy` leaves it as it was."""
    assert not_applied(document(http_options={"port": 1}), document(http_options={"port": 2})) == ["http_options"]
    assert not_applied(document(), document()) == []
