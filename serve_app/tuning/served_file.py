"""Makes the file that is served at a point. It is pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.tuning.space import Point, replicas_of, with_point


def without_models() -> dict[str, Any]:
    """Returns a file that serves nothing but a router that anybody may ask."""
    return {"applications": [{"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}]}


def document_of(document: Mapping[str, Any], models: Sequence[str], point: Point) -> dict[str, Any]:
    """Returns a file that serves these models of `document` with the fields of a point, beside a router that anybody
    may ask. Applications that are not tuned are left out."""
    applications: list[dict[str, Any]] = list(without_models()["applications"])
    for application in document["applications"]:
        if application.get("name") in models:
            applications.append(changed(application, point))
    return {"applications": applications}


def changed(application: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """Returns an application with the fields of a point. The number of replicas does not change by itself, so a range
    becomes its least number."""
    name = str(application["name"])
    found = {**application, "args": with_point(application.get("args") or {}, name, point)}
    own: dict[str, Any] = next(
        (dict(item) for item in application.get("deployments") or () if item.get("name") == "Model"), {}
    )
    scaling, count = own.pop("autoscaling_config", None), own.get("num_replicas")
    least = int(scaling.get("min_replicas", 1)) if isinstance(scaling, Mapping) else 1
    replicas = replicas_of(name, point, count if isinstance(count, int) else max(1, least) if own or scaling else None)
    if replicas is not None:
        found["deployments"] = [{"name": "Model", **own, "num_replicas": replicas}]
    return found
