"""The KubeRay manifest: there is no cluster here, so its parts are held against what reads them."""

from pathlib import Path
from typing import Any

import yaml

from serve_app.cli.check import require_serves_schema, require_valid
from serve_app.deploy.serve_env import serve_environment
from serve_app.facts.serve_file import read_applications

ROOT = Path(__file__).parents[1]
MANIFEST: dict[str, Any]
MANIFEST, POLICY = yaml.safe_load_all((ROOT / "docker/kubernetes/rayservice.yaml").read_text())


def groups() -> list[dict[str, Any]]:
    """The head and the kinds of workers."""
    cluster = MANIFEST["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_config_within_is_one_that_serve_takes(tmp_path: Path) -> None:
    """As `serve-app check` judges a file."""
    file = tmp_path / "serve.yaml"
    file.write_text(MANIFEST["spec"]["serveConfigV2"])
    require_valid(read_applications(file))
    require_serves_schema(file)
    assert [application.name for application in read_applications(file)] == ["router", "small", "large"]


def test_serves_settings_are_those_of_node_env() -> None:
    """In the environment of every node, as the operator starts Serve itself."""
    wanted = serve_environment("/app/.venv/bin/serve-app-haproxy")
    for group in groups():
        (container,) = group["template"]["spec"]["containers"]
        given = {item["name"]: item.get("value") for item in container["env"]}
        assert {name: value for name, value in given.items() if name.startswith("RAY_SERVE_")} == wanted


def test_every_mount_has_its_volume_and_every_worker_a_gpu() -> None:
    """And the same Ray version as the lock."""
    for group in groups():
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes
    for group in groups()[1:]:
        assert int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) >= 1
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    version = MANIFEST["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"ray=={version}" in (ROOT / "requirements/cpu.txt").read_text()


def test_nobody_runs_code_on_the_pods_without_a_token() -> None:
    """Ray's own ports ask for one, and only the models' port is open to every pod; that asks for API keys."""
    assert MANIFEST["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    labels = {"ray.io/is-ray-node": "yes"}  # KubeRay puts it on every pod of a Ray cluster.
    assert POLICY["spec"]["podSelector"]["matchLabels"] == labels
    assert POLICY["spec"]["policyTypes"] == ["Ingress"]
    to_all = [rule["ports"] for rule in POLICY["spec"]["ingress"] if "from" not in rule]
    assert to_all == [[{"port": 8000}]]
    for group in groups():
        (container,) = group["template"]["spec"]["containers"]
        assert "SERVE_APP_API_KEYS_FILE" in {item["name"] for item in container["env"]}
