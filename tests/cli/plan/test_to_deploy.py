"""What is deployed of a model that was planned beside what runs does not end what runs."""

import pytest
import yaml

from serve_app.cli.init import Choice, config_text
from serve_app.cli.plan.to_deploy import ADD, to_deploy

NEW = config_text(Choice("serve-app/demo", "demo", "pt", "cpu"), otherwise="")
FILE = """# mine
applications:
- {name: router, import_path: "serve_app.app:router", route_prefix: /}
- name: other
  import_path: serve_app.app:model
  route_prefix: /models/other
  args: {model: serve-app/demo}  # small
"""
DEMO = """- name: demo
  import_path: serve_app.app:model
  route_prefix: /d
  args: {model: old}
  deployments: [{name: Model, num_replicas: 2}]
"""


def test_the_model_is_added_to_the_file() -> None:
    """Everything else stays, with its comments."""
    text, note = to_deploy(NEW, ("models.yaml", FILE), {"other"})
    assert [item["name"] for item in yaml.safe_load(text)["applications"]] == ["router", "other", "demo"]
    assert text.startswith(FILE)
    assert note == "What you download is models.yaml, which runs now, with 'demo' added."


def test_a_model_of_that_name_has_new_args() -> None:
    """Its replicas and its route stay."""
    text, note = to_deploy(NEW, ("models.yaml", FILE + DEMO), {"other", "demo"})
    model = yaml.safe_load(text)["applications"][2]
    assert (model["args"]["model"], model["route_prefix"]) == ("serve-app/demo", "/d")
    assert model["deployments"] == [{"name": "Model", "num_replicas": 2}]
    assert note == "What you download is models.yaml, which runs now, with new args of 'demo'."


@pytest.mark.parametrize(
    ("text", "running", "told"),
    [
        (None, "other", "Add it to the applications of your file."),
        (FILE, "third", "models.yaml, which `serve-app run` serves, does not have third."),
        (FILE.replace("serve-app/demo", "{env_vars: {A: b}}"), "other", "because its 'env_vars' may hold secrets"),
        (FILE + "x: {engine_args: {HF_TOKEN: s}}", "other", "because its 'HF_TOKEN' may hold secrets"),
        (FILE + "x: [{my_api_key: s}]", "other", "because its 'my_api_key' may hold secrets"),
        (FILE.replace("/models/other", "/models/demo"), "other", "choose another route_prefix"),
        (FILE + DEMO.replace("serve_app.app:model", "mine:app"), "other", "choose another name"),
        (FILE + "x: &a [*a]", "other", "of which a copy cannot be made here"),
        (FILE + "x: 1\nx: 2", "other", "of which a copy cannot be made here"),
        ("[", "other", "of which a copy cannot be made here"),
        ("applications: 1", "other", "of which a copy cannot be made here"),
    ],
)
def test_otherwise_it_is_the_application_alone(text: str | None, running: str, told: str) -> None:
    """Which nobody can deploy by mistake, because it is no config file."""
    found, note = to_deploy(NEW, None if text is None else ("models.yaml", text), {running})
    assert found.startswith(f"{ADD}\n- name: demo ")
    assert [item["name"] for item in yaml.safe_load(found)] == ["demo"]
    assert told in note
