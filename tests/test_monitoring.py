"""The files for Prometheus, Grafana and compose: they cannot run here, so their names are held against the code."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.replica import metrics as replica_metrics
from serve_app.router import metrics as router_metrics

DOCKER = Path(__file__).parents[1] / "docker"
MONITORING = DOCKER / "monitoring"
# What Ray 2.60 exports itself, as far as it is used; seen at the metrics address of a Serve that ran.
OF_RAY = {
    "ray_serve_application_status",
    "ray_serve_deployment_replica_healthy",
    "ray_serve_autoscaling_target_replicas",
    "ray_node_gram_used",
    "ray_node_gram_available",
}


def exported() -> set[str]:
    """The names under which Prometheus sees our metrics."""
    source = "".join(Path(str(module.__file__)).read_text() for module in (router_metrics, replica_metrics))
    suffixes = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"]}
    found = re.findall(r'metrics\.(Counter|Gauge|Histogram)\(\s*"(serve_app_\w+)"', source)
    assert len(found) >= 14
    return {f"ray_{name}{suffix}" for kind, name in found for suffix in suffixes[kind]}


def dashboard() -> dict[str, Any]:
    """The dashboard of this project."""
    document: dict[str, Any] = json.loads((MONITORING / "grafana/dashboards/serve-app.json").read_text())
    return document


def expressions() -> list[str]:
    """All queries."""
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    return [*panels, *(rule["expr"] for rule in rules)]


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_that_is_asked_for_exists(expression: str) -> None:
    """By the name that Ray's exporter gives it."""
    names = set(re.findall(r"\bray_\w+", expression))
    assert names
    assert names <= exported() | OF_RAY
    assert expression.count("(") == expression.count(")")


def test_every_metric_of_ours_is_shown() -> None:
    """None is left out of the dashboard."""
    shown = " ".join(expressions())
    for name in {name.removesuffix("_bucket") for name in exported() if not name.endswith(("_sum", "_count"))}:
        assert name in shown, name


def test_alerts_say_what_happened_and_how_bad_it_is() -> None:
    """With a time, so that a hiccup wakes nobody, but for those of what has happened already."""
    for rule in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]:
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("page", "warn")
        assert "for" in rule or "increase" in rule["expr"]


def test_the_panels_do_not_overlap() -> None:
    """Two in a row."""
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard()["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(places)


def test_compose_starts_ray_with_a_token_on_every_node() -> None:
    """From a secret that has to be made first: without the file compose starts nothing."""
    document = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert document["secrets"] == {"ray-token": {"file": "./ray-token"}}
    for name in ("head", "worker"):
        service = document["services"][name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == f"/run/secrets/{service['secrets'][0]}"
    for service in document["services"].values():  # To the machine itself, and to nobody else.
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_compose_mounts_files_that_exist() -> None:
    """And starts Serve with a file of the image, which is this repository."""
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    mounted = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    for path in (item for item in mounted if item.startswith(".")):
        assert (DOCKER / path).exists(), path
    config = re.search(r"/app/(\S+\.yaml)", services["head"]["command"][0])
    assert config is not None
    assert (DOCKER.parent / config[1]).exists()
    for image in ("cpu", "gpu"):  # A new volume belongs to whom the image says, else to root, and Ray could not write.
        assert "--owner=serve --group=serve /app /tmp/ray" in (DOCKER / f"Dockerfile.{image}").read_text()
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", ()))
